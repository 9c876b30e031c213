"""The hidden states before the trained part of a model: computed once, kept in memory or in files.

The layers that compute them may stay in their files, too.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import get_int_from_env
from transformers.utils import logging

from ..architecture import decoder_stack, eval_mode
from ..display import bytes_text, parse_size
from ..donor.signature import FEWEST_ROWS, PROBE_TOKENS, TOKENS, Signature, describe_rows
from ..errors import ConfigurationError
from ..evaluation.windows import Windows
from ..layer_map import RECIPIENT, Position
from ..model.layers_in_files import layers_in_files
from ..model.load_weights import HeldBack
from ..partial import PrefixCache, fill_cache
from ..partial.cache import MOST_IN_MEMORY, refuse_small_disk
from ..partial.running import block_ids, block_states
from ..partial.streaming import StreamedStates, Text, reason_against_streaming, stream_prefix
from ..splice import Blueprint
from ..texts import Blocks

__all__ = ["CACHE_FOLDER", "CachePlan", "PrefixStates", "held_back_layers", "held_out_texts"]

logger = logging.get_logger(__name__)

CACHE_FOLDER = "prefix-cache"
_MOST_ROWS = 512  # of each text in a signature
_PROBE = Blocks(torch.arange(PROBE_TOKENS)[None], "probe")
_COPIES = 4  # of a donor: weights, gradients and two numbers of Adam
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class CachePlan:
    """Where hidden states before a part are kept.

    Args:
        kind: "auto", "memory", "disk" or "off".
        limit: The largest size in bytes.
        folder: For files; by default one in the output folder.
        kept: Whether files stay after training.
    """

    kind: str = "auto"
    limit: int | None = None
    folder: Path | None = None
    kept: bool = False

    @classmethod
    def from_arguments(cls, args: Any) -> CachePlan:
        """Read the plan from arguments for training.

        Args:
            args: `DonorTrainingArguments`, or others with `cache_prefix`, `prefix_cache_limit` and `prefix_cache_dir`.
        """
        folder = None if args.prefix_cache_dir is None else Path(args.prefix_cache_dir)
        return cls(args.cache_prefix, parse_size(args.prefix_cache_limit), folder, kept=folder is not None)


class PrefixStates:
    """The hidden states before the part of the model of a `PartTrainer`."""

    def __init__(self, trainer: Any, plan: CachePlan) -> None:
        self.plan, self.seconds = plan, 0.0
        self.streams = layers_in_files(trainer.inner) is not None
        self._trainer = trainer
        self._streamed: StreamedStates | None = None
        # The hidden states of tokens 0, 1, ..., which tell a signature's model from others, [1, tokens, hidden].
        self._probe: torch.Tensor | None = None

    @property
    def folder(self) -> Path:
        """Where files are."""
        return self.plan.folder or Path(str(self._trainer.args.output_dir), CACHE_FOLDER)

    def fill(self, position: int) -> None:
        """Compute them for all rows that the trainer reads; where layers stay in files, for held-out texts too."""
        trainer, args, plan = self._trainer, self._trainer.args, self.plan
        rows, model = trainer.rows, trainer.inner
        numbers = rows.used
        identity = [rows.fingerprints, numbers, position, str(model.config.name_or_path), str(model.dtype)]
        identity += [args.bf16, args.fp16, model.config.to_json_string()]  # also how it is quantized
        how: dict[str, Any] = {
            "batch_size": max(1, 2 * args.train_batch_size),
            "limit": plan.limit,
            "autocast": trainer.autocast_smart_context_manager,
            "quiet": args.disable_tqdm or not trainer.is_local_process_zero(),
        }
        if self.streams:
            with args.main_process_first(desc="hidden states before the part"):
                self._stream(position, identity, how)
            return
        width = model.config.get_text_config(decoder=True).hidden_size
        size = len(numbers) * rows.domain.block_length * width * model.dtype.itemsize
        on_disk = plan.kind == "disk" or (plan.kind == "auto" and size > MOST_IN_MEMORY) or args.world_size > 1
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
        # The processes of one machine compute a share each, and read each other's files.
        count = min(get_int_from_env(["LOCAL_WORLD_SIZE"], 1), args.world_size, len(numbers))
        shares = [numbers[len(numbers) * n // count : len(numbers) * (n + 1) // count] for n in range(count)]
        how["limit"] = None if plan.limit is None else plan.limit // count
        names = [key] if count == 1 else [f"{key}-{share + 1}-of-{count}" for share in range(count)]
        files = [self.folder / f"{name}.states" for name in names]
        if on_disk:
            there = sum(file.stat().st_size for file in files if file.is_file())
            refuse_small_disk(self.folder, size - there)
            trainer.accelerator.wait_for_everyone()  # before one of them writes
        if self._can_sign:
            with eval_mode(model):
                self._probe = block_states(model, block_ids(model, _PROBE, [0]), position, how["autocast"])

        def filled(share: int) -> PrefixCache:
            file = files[share] if on_disk else None
            return fill_cache(model, rows.blocks, shares[share], position, file=file, **how)

        if count > 1:
            if args.local_process_index < count:
                self.seconds = filled(args.local_process_index).seconds
            trainer.accelerator.wait_for_everyone()
        with args.main_process_first(desc="hidden states before the part"):
            caches = [filled(share) for share in range(count)]
        self.seconds = self.seconds or caches[0].seconds
        joined: Any = ChainMap(*caches)  # type: ignore[arg-type]
        rows.prefix = caches[0] if count == 1 else joined

    def _stream(self, position: int, identity: list[Any], how: Mapping[str, Any]) -> None:
        rows = self._trainer.rows
        if self._streamed is None:
            held_out = list(held_out_texts(self._trainer).values())
            texts = [Text(rows.blocks, rows.used), *(part for text in held_out for part in text.texts())]
            texts += [Text(_PROBE, [0])] * self._can_sign
            about = {"run": identity, "held_out": [text.fingerprint for text in held_out]}
            # On disk also where they are small: a run that is stopped goes on from there.
            folder = None if self.plan.kind == "memory" else self.folder
            self._streamed = stream_prefix(self._trainer.inner, texts, position, folder=folder, identity=about, **how)
            self.seconds = self._streamed.seconds
        rows.prefix = self._streamed.caches[0]
        self._probe = self._streamed.caches[-1].rows if self._can_sign else None

    @property
    def _can_sign(self) -> bool:
        """Whether the run makes a signature, and reads enough long rows of the domain and of general text for it."""
        rows = self._trainer.rows
        return (
            self._trainer.signs
            and rows.domain.block_length >= TOKENS
            and min(map(len, rows.used_by_text)) >= FEWEST_ROWS
        )

    def signature(self, position: int) -> tuple[Signature, tuple[int, int]] | None:
        """Make a donor's signature of the hidden states that are there; returns it with its rows of each text."""
        rows = self._trainer.rows
        if self._probe is None or rows.prefix is None:
            return None
        learned, general = (self._described(numbers) for numbers in rows.used_by_text)
        made = Signature.of_rows(position, learned, general, describe_rows(self._probe)[0])
        return made, (len(learned), len(general))

    def _described(self, numbers: Sequence[int]) -> torch.Tensor:
        some = numbers[:: -(-len(numbers) // _MOST_ROWS)]
        prefix = self._trainer.rows.prefix
        return describe_rows(torch.stack([prefix[number][:TOKENS] for number in some]))

    def find(self, input_ids: Any) -> Any:
        """Return the hidden states of held-out blocks `[batch, tokens]`; `None` where the whole model can run."""
        return None if self._streamed is None else self._streamed.find(input_ids)

    def release(self, completed: bool) -> None:
        """Remove files that are not to be kept; those of a streamed run only if it is complete."""
        self._trainer.rows.prefix = None
        if not self.plan.kept and (completed or not self.streams) and self._trainer.is_world_process_zero():
            # Files that are mapped can be read until they are no longer used.
            shutil.rmtree(self.folder, ignore_errors=True)


def held_out_texts(trainer: Any) -> dict[str, Windows]:
    """Return the texts that a trainer measures on, by name."""
    held = trainer.eval_dataset
    return dict(held) if isinstance(held, Mapping) else {held.name: held} if isinstance(held, Windows) else {}


# -- Layers that stay in their files -----------------------------------------------------------------------------------


def held_back_layers(
    model: Any, args: Any, model_kwargs: Mapping[str, Any], position_in: Callable[[int], Position]
) -> HeldBack | None:
    """Return how many layers of a named recipient stay in their files, as a function of its blueprint.

    `position_in` returns the donor's position or positions for the number of the recipient's layers.
    """
    if args.stream_prefix is False:
        return None

    def refuse(reason: str | None) -> bool:
        if args.stream_prefix and reason is not None:
            raise ConfigurationError(f"stream_prefix=True (--stream-prefix) is not possible: {reason}.")
        return reason is not None

    reason = reason_against_streaming(model, model_kwargs)
    if args.method == "standalone":
        reason = 'method="standalone" (--method) runs the donor alone, between the embeddings and the head'
    elif args.cache_prefix == "off":
        reason = 'cache_prefix="off" (--cache-prefix) runs the layers before the donor in every step'
    if refuse(reason):
        return None

    def count(blueprint: Blueprint) -> int:
        position = position_in(blueprint.splice.num_layers)
        position = min(position) if isinstance(position, tuple) else position
        slots = (tuple(stage.slot) for stage in blueprint.built)
        before = len(list(itertools.takewhile(lambda slot: slot != (RECIPIENT, position), slots)))
        reason = None
        if before == 0:
            reason = f"no layer runs before position {position}, so that there is nothing to stream"
        elif any(part.spec.mode == "replace" for part in blueprint.parts):
            reason = "the recipient has donors that replace layers"
        if refuse(reason) or not (args.stream_prefix or _is_too_large(blueprint, args, model_kwargs)):
            return 0
        return before

    return count


def _is_too_large(blueprint: Blueprint, args: Any, model_kwargs: Mapping[str, Any]) -> bool:
    """Whether a recipient with a donor in training does not fit into free memory; says so."""
    recipient = blueprint.recipient
    if model_kwargs.get("quantization_config") or getattr(recipient.config, "quantization_config", None):
        return False  # only its library knows its size
    dtype = model_kwargs.get("dtype") or model_kwargs.get("torch_dtype") or "auto"
    dtype = recipient.config.dtype or torch.get_default_dtype() if dtype == "auto" else dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    layers = decoder_stack(recipient.model, recipient.stack_path)
    donor = args.donor_layers * max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    needed = (sum(parameter.numel() for parameter in recipient.model.parameters()) + _COPIES * donor) * dtype.itemsize
    free = _free_memory(args.device)
    if needed <= free:
        return False
    logger.warning(
        f"{blueprint.config.recipient} and a donor in training take {bytes_text(needed)}, and {bytes_text(free)} are "
        "free: the layers before the donor stay in their files (stream_prefix)."
    )
    return True


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:  # no container
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))
