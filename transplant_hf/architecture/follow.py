"""Make a configuration follow the layers: every per-layer field gets the values that the layers were built from.

Yields candidates, the most likely first. `native.py` builds them and compares the layers.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from transformers import PreTrainedConfig

from ..errors import BUILD_ERRORS
from ..numeric import is_whole
from .anatomy import Anatomy, LayerOrigin
from .exceptions import COMPLETIONS, REWRITES
from .stack import text_config, text_key

Fields = dict[str, Any]

_NUMBERS_OF_LAYERS = re.compile(r"layers?$|layer_i(d|dx|ndex)s?$|_i(dxs?|ndices|ds)$")
_COUNT = re.compile(r"^(num|n)_?(hidden_|decoder_)?(layers?|blocks?)$|^decoder_layers$")
# Numbers that set where a kind of layer begins, ends or recurs.
_RULE = re.compile(
    r"dense|period|offset|step|interval|freq|pattern|every|_start|_end|first|last|skip|global_attn", re.I
)
# What the class of all configurations keeps to itself: how a model runs, and where it came from.
RUNTIME = frozenset(name for name in vars(PreTrainedConfig()) if name.startswith("_"))


def is_rule(name: str) -> bool:
    """Whether a field may set where a kind of layer begins, ends or recurs."""
    return bool(_RULE.search(name))


class Follower:
    """Rewrites the recipient's configuration for layers that come from several configurations."""

    def __init__(self, recipient: Anatomy, origins: Sequence[LayerOrigin]) -> None:
        self.recipient = recipient.config
        self.text = text_config(recipient.config)
        self.num_layers = recipient.num_layers
        self.origins = origins
        self.fields = _rewritten(recipient)
        anatomies = {id(origin.anatomy): origin.anatomy for origin in origins}
        self._sources = {key: _rewritten(anatomy) for key, anatomy in anatomies.items()}

    def candidates(self) -> Iterator[PreTrainedConfig]:
        """Yield configurations under which a native model might build the layers as they were."""
        followed = self._follow()
        for fields in itertools.chain([followed], self._other_readings(followed), self._other_rules(followed)):
            config = self._build(fields)
            if config is not None:
                yield config

    def running_config(self) -> PreTrainedConfig:
        """Return a configuration to run layers with that no native configuration can build.

        Caches and masks are sized from it. Where the class computes a per-layer list from rules, a subclass holds
        the list itself.
        """
        fields = self._follow()
        config = self._build(fields) or copy.deepcopy(self.recipient)
        text = text_config(config)
        # Bypasses rules of the class, such as a last layer that must have full attention.
        plain = [name for name in fields if not isinstance(getattr(type(text), name, None), property)]
        vars(text).update({text.attribute_map.get(name, name): fields[name] for name in plain})
        computed = {
            name: [getattr(text_config(origin.anatomy.config), name)[origin.index] for origin in self.origins]
            for name in _computed_lists(self.text, self.num_layers)
        }
        if computed:
            kind = type(text)
            text.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, **computed})
        return config

    def _follow(self) -> Fields:
        """Return the decoder's fields that change: counts, per-layer lists, lists of numbers, dicts by number."""
        before = self.text.to_dict()
        changed: Fields = {}
        for name, value in self.fields.items():
            if isinstance(value, list | tuple) and self._are_layer_numbers(name, value):
                changed[name] = self._numbers(name)
            elif isinstance(value, list | tuple) and self._has_entry_per_layer(name, value):
                changed[name] = self._list(name)
            elif _is_by_number(value, self.num_layers):
                changed[name] = self._dict(name)
            elif value != before.get(name):
                changed[name] = value
        for complete in COMPLETIONS.get(self.text.model_type, ()):
            changed = complete(changed)
        return {**changed, **self._counts()}

    def _counts(self) -> Fields:
        real = self.text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        # Decoders of encoder-decoder families size their cache from another count than they are built from, and
        # some layers hold two attentions, each with a cache of its own.
        names = {real, *(name for name in self.fields if _COUNT.search(name))}
        counts: Fields = {real: len(self.origins)}
        for name in names:
            value = self.fields.get(name, getattr(self.text, name, None))
            if isinstance(value, int) and value and value % self.num_layers == 0:
                counts[name] = value // self.num_layers * len(self.origins)
        return counts

    def _are_layer_numbers(self, name: str, value: Sequence[Any]) -> bool:
        whole = all(is_whole(item) and 0 <= item < self.num_layers for item in value)
        return whole and len(set(value)) == len(value) and bool(_NUMBERS_OF_LAYERS.search(name))

    def _has_entry_per_layer(self, name: str, value: Sequence[Any]) -> bool:
        # In every source model: in a recipient of one layer any list of one would look like it.
        theirs = [(self._of(origin, name), origin.anatomy.num_layers) for origin in self.origins]
        return len(value) == self.num_layers and all(
            len(other) == count for other, count in theirs if isinstance(other, list | tuple)
        )

    def _of(self, origin: LayerOrigin, name: str) -> Any:
        return self._sources[id(origin.anatomy)].get(name)

    def _list(self, name: str) -> list[Any]:
        per_layer = [(self._of(origin, name), origin.index) for origin in self.origins]
        return [value[index] if isinstance(value, list | tuple) else value for value, index in per_layer]

    def _numbers(self, name: str) -> list[int]:
        return [n for n, origin in enumerate(self.origins) if origin.index in (self._of(origin, name) or ())]

    def _dict(self, name: str) -> Fields:
        followed = {}
        for number, origin in enumerate(self.origins):
            by_number = {int(key): value for key, value in (self._of(origin, name) or {}).items()}
            if origin.index in by_number:
                followed[str(number)] = copy.deepcopy(by_number[origin.index])
        return followed

    def _other_readings(self, followed: Fields) -> Iterator[Fields]:
        """A list such as [0, 1] may name layers or hold a value for each: try the second meaning."""
        for name, value in self.fields.items():
            if isinstance(value, list) and len(value) == self.num_layers and self._are_layer_numbers(name, value):
                yield {**followed, name: self._list(name)}

    def _other_rules(self, followed: Fields) -> Iterator[Fields]:
        """Change one number that places kinds of layers: to where kinds change, to no layer or to all."""
        runs = groupby(origin.anatomy.kind(origin.index) for origin in self.origins)
        borders = list(itertools.accumulate(len(list(run)) for _, run in runs))
        for name, value in self.fields.items():
            if is_whole(value) and is_rule(name) and 0 <= value <= self.num_layers:
                numbers = dict.fromkeys([*borders, *(border - 1 for border in borders), 0, 1, len(self.origins)])
                yield from ({**followed, name: number} for number in numbers if number != value)

    def _build(self, changed: Fields) -> PreTrainedConfig | None:
        # Configuration classes edit the lists they are given.
        full, changed = self.recipient.to_dict(), copy.deepcopy(changed)
        key = text_key(self.recipient)
        if key is None:
            full.update(changed)
        else:
            full[key] = {**full[key], **changed}
        try:
            config = type(self.recipient).from_dict(full)
        except BUILD_ERRORS:
            return None
        copy_runtime(self.recipient, config)
        return config


def _rewritten(anatomy: Anatomy) -> Fields:
    """The fields of a decoder's configuration, with rules about layer numbers as lists where that is possible."""
    fields = text_config(anatomy.config).to_dict()
    for rewrite in REWRITES.get(fields.get("model_type", ""), ()):
        fields = rewrite(fields, anatomy.num_layers)
    return fields


def copy_runtime(old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Carry over what belongs to this run and is not part of `config.json`."""
    vars(new).update({name: value for name, value in vars(old).items() if name in RUNTIME or name == "dtype"})
    for key in old.sub_configs:
        old_part, new_part = getattr(old, key, None), getattr(new, key, None)
        if old_part is not None and new_part is not None:
            copy_runtime(old_part, new_part)


def _is_by_number(value: Any, num_layers: int) -> bool:
    # The values must be dicts too: `id2label` is also a dict by number.
    return (
        isinstance(value, dict)
        and bool(value)
        and all(str(key).isdigit() and int(key) < num_layers for key in value)
        and all(isinstance(item, dict) for item in value.values())
    )


def stale_lists(config: PreTrainedConfig) -> dict[str, int]:
    """Find per-layer lists whose length is not the number of layers; tools that prune models leave such lists.

    A list has an entry per layer if the class makes it longer for more layers.
    """
    text = text_config(config)
    count = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    kind: Any = type(text)
    try:
        made = {number: kind(**{count: number}) for number in (7, 11)}
    except BUILD_ERRORS:  # a class that needs more than a number: nothing is known about its lists
        return {}
    per_layer = set.intersection(*(_lists_of(one, number) for number, one in made.items()))
    values = {name: vars(text).get(name) for name in sorted(per_layer)}
    return {
        name: len(value)
        for name, value in values.items()
        if isinstance(value, list | tuple) and len(value) != getattr(text, count)
    }


def _lists_of(text: PreTrainedConfig, length: int) -> set[str]:
    """The fields that hold a list of that length, and not just the numbers of all layers."""
    lists = {name: list(value) for name, value in vars(text).items() if isinstance(value, list | tuple)}
    return {name for name, value in lists.items() if len(value) == length and value != list(range(length))}


def _computed_lists(text: PreTrainedConfig, num_layers: int) -> list[str]:
    names = [name for name in dir(type(text)) if isinstance(getattr(type(text), name, None), property)]
    values = {name: getattr(text, name, None) for name in names if not name.startswith("_")}
    return [name for name, value in values.items() if isinstance(value, list) and len(value) == num_layers]
