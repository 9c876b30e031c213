"""Very small random-weight configurations and models for every causal language model type of transformers.

The sizes are found by introspection: every known size field of a configuration class gets a small value by
its name, per-layer lists are squeezed to the wanted depth with all their kinds kept, and sub-configurations
are treated the same way. What the rules cannot know is in `tiny_overrides.OVERRIDES`.

Run as a script it builds, runs and samples from every type, or from those named:
`python -m tests.architectures.tiny_models [type ...]`.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.architectures.tiny_overrides import (
    ALWAYS_SET_TOKENS,
    CACHE_DIFFERS,
    CANNOT_BUILD,
    EXPERTS,
    KEEP_AS_INITIALIZED,
    NOISY_BUFFERS,
    NOT_CAUSAL,
    NOT_DECODER_ONLY,
    OVERRIDES,
    SIZES,
    SPECIAL_TOKENS,
    VOCAB,
)

__all__ = [
    "CACHE_DIFFERS",
    "CANNOT_BUILD",
    "CAUSAL_LM_TYPES",
    "NOT_CAUSAL",
    "NOT_DECODER_ONLY",
    "OVERRIDES",
    "tiny_config",
    "tiny_inputs",
    "tiny_model",
]

CAUSAL_LM_TYPES: list[str] = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# The mapping gives these a class that takes the `decoder` part of their configuration, while the automatic
# class passes it the whole; `tiny_config` returns that part, and the model is made without that class.
DECODER_OF_COMPOSITE: tuple[str, ...] = ("musicgen", "musicgen_melody")

# Per-layer lists that the configuration derives from its depth, and that are squeezed rather than cut.
_LAYER_KIND_FIELDS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")
# Sub-configurations that describe the language model; they get the wanted depth, all others get two layers.
_TEXT_KEYS = ("text_config", "decoder", "global_config")
_SIDE_LAYERS = 2


def tiny_config(model_type: str, num_layers: int = 4, **changes: Any) -> PreTrainedConfig:
    """Build a very small configuration of a model type.

    Args:
        model_type: A key of the causal language model mapping of transformers.
        num_layers: Number of decoder layers.
        **changes: Fields that take the place of the tiny ones.

    Returns:
        A configuration whose model builds in a fraction of a second.
    """
    config_class = CONFIG_MAPPING[model_type]
    config = config_class(**_tiny_fields(config_class, model_type, num_layers, {}, changes))
    return config.decoder if model_type in DECODER_OF_COMPOSITE else config


def tiny_inputs(config: PreTrainedConfig, batch: int = 2, length: int = 10, seed: int = 0) -> torch.Tensor:
    """Draw input ids that avoid all special tokens of the tiny configurations.

    Args:
        config: A configuration made by `tiny_config`.
        batch: Number of rows.
        length: Number of tokens in a row.
        seed: Seed of the draw.

    Returns:
        Integer tensor of shape `[batch, length]`.
    """
    text = config if hasattr(config, "vocab_size") else config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, min(text.vocab_size, VOCAB) - 16, (batch, length), generator=generator)


def tiny_model(model_type: str, num_layers: int = 4, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build a very small float32 model in evaluation mode, in which every layer visibly matters.

    Args:
        model_type: A key of the causal language model mapping of transformers.
        num_layers: Number of decoder layers.
        seed: Seed of all weights.
        **changes: Fields that take the place of the tiny configuration's.

    Returns:
        The model; two calls with the same arguments give equal weights.
    """
    config = tiny_config(model_type, num_layers, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model_type in DECODER_OF_COMPOSITE:
            model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])(config)
            # Generation needs both, and only the whole configuration has a field for the token.
            model.generation_config.decoder_start_token_id = config.bos_token_id
            model.generation_config.num_return_sequences = 1
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed)
    return model.eval()


def randomise(model: nn.Module, seed: int = 0, std: float = 0.1) -> None:
    """Give parameters and saved state seeded values under which each layer visibly changes the output.

    Args:
        model: Model to change in place.
        seed: Seed of the values.
        std: Standard deviation of matrices and embeddings.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or any(part in name for part in KEEP_AS_INITIALIZED):
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            constant = bool((parameter == parameter.flatten()[0]).all()) if parameter.numel() else True
            if constant and (parameter.dim() < 2 or bool((parameter != 0).all())):
                # A constant vector is a norm weight (one, or zero where the model adds one), a bias or a
                # gate; it stays near its constant. Norms of single heads are matrices of ones.
                parameter.add_(noise * 0.05)
            elif parameter.dim() >= 2:
                parameter.copy_(noise * std)
        for name, buffer in model.named_buffers():
            if name.endswith(NOISY_BUFFERS):
                buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.05)
            elif name.endswith("tid2eid"):  # The experts of every token, distinct ones in each row.
                order = torch.rand(buffer.shape[0], EXPERTS, generator=generator).argsort(dim=-1)
                buffer.copy_(order[:, : buffer.shape[1]])


def _tiny_fields(
    config_class: type[PreTrainedConfig],
    model_type: str,
    num_layers: int,
    given: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> dict[str, Any]:
    """Collect the keyword arguments of a tiny configuration.

    Args:
        config_class: Class to make arguments for.
        model_type: Its key in `OVERRIDES`.
        num_layers: Number of layers.
        given: Values that replace the defaults of the class before they are shrunk.
        overrides: Values that replace the shrunk ones, on top of `OVERRIDES`.

    Returns:
        Keyword arguments for the class.
    """
    chosen = {**OVERRIDES.get(model_type, {}), **overrides}
    chosen = {name: value(num_layers) if callable(value) else value for name, value in chosen.items()}
    defaults = {field.name: _default(field) for field in dataclasses.fields(config_class)} | dict(given)
    fields: dict[str, Any] = dict(given)
    special, parts = VOCAB - 1, _parts_of(config_class)
    for name, default in defaults.items():
        if name in chosen or name in parts:
            continue
        if name in SIZES:
            rule = SIZES[name]
            if callable(rule):
                fields[name] = rule(default, defaults, num_layers)
            elif default is not None:
                fields[name] = rule
        elif name in SPECIAL_TOKENS:
            if default is not None or name in ALWAYS_SET_TOKENS:
                fields[name] = SPECIAL_TOKENS[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(default, int):
            fields[name], special = special, special - 1
    fields |= _squeezed_kinds(config_class, num_layers)
    for key, (sub_class, given_in) in parts.items():
        if key in chosen and not isinstance(chosen[key], dict):
            continue
        depth = num_layers if key in _TEXT_KEYS else _SIDE_LAYERS
        own = chosen.pop(key, {})
        fields[key] = sub_class(**_tiny_fields(sub_class, sub_class.model_type, depth, given_in, own))
    return fields | chosen


def _parts_of(config_class: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return the configurations within one: the class of each, and what it is made with."""
    if not hasattr(config_class, "sub_configs_defaults"):  # of Transformers 5.17
        return {
            key: (part if issubclass(part, PreTrainedConfig) else type(getattr(config_class(), key)), {})
            for key, part in config_class.sub_configs.items()
        }
    parts = {}
    for key, spec in config_class.sub_configs_defaults.items():
        part = spec.config_class
        parts[key] = (
            part if issubclass(part, PreTrainedConfig) else spec.get_config_class(spec.model_type),
            spec.init_kwargs,
        )
    return parts


def _default(field: dataclasses.Field[Any]) -> Any:
    """Read the default of a dataclass field.

    Args:
        field: A field of a configuration class.

    Returns:
        The default, or `None` where there is none.
    """
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _squeezed_kinds(config_class: type[PreTrainedConfig], num_layers: int) -> dict[str, list[str]]:
    """Shorten the default per-layer kind lists of a class to a depth, with all kinds kept.

    Args:
        config_class: Configuration class.
        num_layers: Wanted depth.

    Returns:
        One list for every list field in which the class has more than one kind by default.
    """
    names = {field.name for field in dataclasses.fields(config_class)}.intersection(_LAYER_KIND_FIELDS)
    if not names:
        return {}
    default = config_class()
    lists = {name: getattr(default, name, None) for name in names}
    return {name: squeeze(kinds, num_layers) for name, kinds in lists.items() if kinds and len(set(kinds)) > 1}


def squeeze(kinds: Sequence[str], length: int) -> list[str]:
    """Shorten a list of layer kinds to a length so that as many of its kinds as possible remain.

    Args:
        kinds: Kinds of the layers of a deep model.
        length: Wanted number of layers.

    Returns:
        A prefix with one layer for each leading kind where every kind forms one run, otherwise the kinds in
        turn, in the order in which they first appear.
    """
    order = list(dict.fromkeys(kinds))
    runs = 1 + sum(left != right for left, right in itertools.pairwise(kinds))
    if runs == len(order):
        return [order[min(i, len(order) - 1)] for i in range(length)]
    return [order[i % len(order)] for i in range(length)]


def _check(model_type: str) -> str:
    """Build, run and sample from a tiny model.

    Args:
        model_type: A key of the causal language model mapping.

    Returns:
        A short description of the model and of the time it took.
    """
    start = time.perf_counter()
    model: Any = tiny_model(model_type)  # the class that has `generate` is not in the type of the model
    built = time.perf_counter()
    ids = tiny_inputs(model.config)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("the logits are not finite")
        ran = time.perf_counter()
        options = {"min_new_tokens": 4, "max_new_tokens": 4, "do_sample": False}
        plain = model.generate(ids, use_cache=False, **options)
        cached = plain if model_type in CACHE_DIFFERS else model.generate(ids, use_cache=True, **options)
        if not torch.equal(plain, cached):
            raise ValueError("generation with the cache differs from generation without it")
    done = time.perf_counter()
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1000
    times = f"build {built - start:.2f} s, run {ran - built:.2f} s, generate {done - ran:.2f} s"
    return f"{times}, {parameters:.0f}k parameters, logits {logits.std():.2f}"


def main(model_types: Iterable[str]) -> int:
    """Check the given types, or all of them, and print one line for each.

    Args:
        model_types: Types to check; all where empty.

    Returns:
        Number of types that failed.
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    failed = 0
    for model_type in list(model_types) or CAUSAL_LM_TYPES:
        try:
            line = "ok      " + _check(model_type)
        except Exception as error:  # noqa: BLE001 - one type that fails must not hide the others
            expected = NOT_DECODER_ONLY.get(model_type) or CANNOT_BUILD.get(model_type)
            failed += expected is None
            state = "listed" if expected else "FAILED"
            line = f"{state}  {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"{model_type:28s} {line}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
