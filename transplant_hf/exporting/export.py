"""`export`: a transplant as a plain checkpoint, without building a model for the writing."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from ..cards import TERMS
from ..donor.companions import copy_companions, locate_with_companions
from ..donor.record import FileStamp
from ..donor.recorded import check_artefact_folder, replaced_in
from ..errors import ConfigurationError
from ..layer_map import LayerMap
from ..model.loading import FileChecks
from ..sources import HubOptions, Source, points_to_folder
from ..splice import follow_quantization
from ..storage import publish
from .card import write_export_card
from .checkpoint import open_recipient
from .opened import Opened, open_transplant
from .plan import Plan, draw_plan
from .verify import compare_logits
from .writer import write_weights

__all__ = ["DTYPES", "Export", "export", "export_transplant"]

DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Export:
    """What was exported.

    Args:
        folder: Where it is.
        recipient: The recipient, with its commit if it has one.
        model_class: The class of Transformers that loads it.
        layer_map: Where each layer came from.
        dtype: The type of most of its numbers.
        files: sha256 and size of every weight file.
        verified: Whether plain Transformers loaded it and gave the transplant's logits.
        difference: The largest difference of logits; where it is not 0, all weights were found equal bit for bit.
        left_out: Tensors of the recipient's files that belong to layers it does not have.
        mixed: Donors in full precision inside a quantised recipient.
        irregular: Whether kinds of layers no longer repeat as they do in the recipient; programs that place them by
            number, instead of reading `layer_types`, compute something else.
    """

    folder: str
    recipient: str
    model_class: str
    layer_map: LayerMap
    dtype: str
    files: Mapping[str, FileStamp]
    verified: bool
    difference: float = 0.0
    left_out: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    irregular: bool = False

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum(stamp.size for stamp in self.files.values())

    @property
    def _verdict(self) -> str:
        if not self.verified:
            return "not verified by logits"
        equal = (
            f"equal weights, logits within {self.difference:.2g}" if self.difference else "equal logits, bit for bit"
        )
        return f"loaded in plain Transformers: {equal}"

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {
            "layer_map": [list(layer) for layer in self.layer_map],
            "files": {name: dataclasses.asdict(stamp) for name, stamp in self.files.items()},
            "size": self.size,
        }

    def __str__(self) -> str:
        count = len(self.files)
        lines = [
            f"{self.folder}: {self.model_class} with {len(self.layer_map)} layers, a plain checkpoint",
            f"  recipient {self.recipient}",
            f"  {count} weight file{'s' if count > 1 else ''}, {self.size:,} bytes, {self.dtype}, read back",
            f"  {self._verdict}",
        ]
        if self.mixed:
            lines.append(f"  in full precision inside a quantised model: {', '.join(self.mixed)}")
        if self.irregular:
            lines.append(
                "  its layer_types do not repeat as the recipient's do; Transformers reads them, vLLM and llama.cpp "
                "place some kinds of layers by number (docs/export.md)"
            )
        if self.left_out:
            shown = ", ".join(self.left_out[:3]) + (", ..." if len(self.left_out) > 3 else "")
            lines.append(f"  left out, of layers the recipient does not have: {len(self.left_out)} tensors ({shown})")
        return "\n".join(lines)


def export(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    donors: Any = None,
    *,
    overwrite: bool = False,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    verify: bool = True,
    composition: str | None = None,
    license: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> Export:
    """Write a transplant as a plain checkpoint that loads without this package.

    Weights go from file to file, a few MiB at a time; no model is built for it. The folder takes its place only after
    every file was read back, the donors' sha256 were found right and, unless `verify=False`, plain Transformers gave
    the transplant's logits on random tokens.

    Args:
        source: A transplant or a donor, as Hub id or folder; or, with `donors`, a recipient.
        output: The folder to write.
        donors: `{donor: position}`, `None` as the position meaning the recommended one, or a list of `DonorSpec`.
        overwrite: Replace what transplant_hf wrote to the output before; without it, an output that is not empty is
            refused, before anything else is done.
        dtype: "bfloat16", "float16" or "float32" for weights that are not quantised; by default as they are in the
            recipient's files, donors included.
        max_shard_size: Largest weight file.
        verify: Compare logits. Both models are loaded, one after the other; pass `False` where one does not fit.
        composition: "stacked" or "side_by_side"; by default as the source says.
        license: The licence that the card names; by default what recipient and donors agree on.
        revision: The source's branch, tag or commit.
        token: As in `from_pretrained`.
        cache_dir: The same.
        local_files_only: The same.

    Returns:
        What was written.

    Raises:
        ConfigurationError: What runs cannot be described by a plain checkpoint, or the output is no place for one.
        CompatibilityError: A donor does not fit.
        CheckpointError: Weights that are missing, malformed or not finite, or other logits.
        IntegrityError: A donor's bytes are not the recorded ones.
        HubError: Out of reach.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
        >>> from transplant_hf import Donor
        >>> from transplant_hf.exporting import export
        >>> folder = tempfile.mkdtemp()
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
        >>> model.save_pretrained(f"{folder}/recipient")
        >>> donor = Donor.from_model(model, layers=[1, 2], name="tail")
        >>> donor.save_pretrained(f"{folder}/donor", position=1, recipient=f"{folder}/recipient")
        >>> done = export(f"{folder}/donor", f"{folder}/full")
        >>> done.verified, AutoModelForCausalLM.from_pretrained(f"{folder}/full").config.n_layer
        (True, 5)
    """
    check_artefact_folder(output, overwrite)
    wanted = _dtype(dtype)
    hub = HubOptions(token, cache_dir, local_files_only)
    opened = open_transplant(source, donors, composition, revision, hub)
    target = Path(output)
    _refuse_place(target, opened)
    config = opened.config
    named = getattr(opened.blueprint.recipient.config, "transformers_weights", None)
    tensors = open_recipient(str(config.recipient), config.recipient_revision, named, hub)
    plan = draw_plan(opened.blueprint, tensors, wanted)
    with (
        FileChecks(part.donor for part in opened.blueprint.parts) as checks,
        publish(target, replaced_in(target.expanduser())) as staging,
    ):
        stamps = write_weights(staging, plan.tensors, max_shard_size)
        checks.result()
        recipient = _write_companions(opened, staging, target.expanduser())
        _write_config(opened, staging, wanted, plan)
        write_export_card(opened, staging, target, recipient, license)
        difference = compare_logits(opened, staging, plan.main_dtype) if verify else 0.0
    return Export(
        folder=str(target),
        recipient=opened.recipient,
        model_class=opened.blueprint.recipient.model_class.__name__,
        layer_map=opened.blueprint.layer_map(),
        dtype=str(plan.main_dtype).removeprefix("torch."),
        files=stamps,
        verified=verify,
        difference=difference,
        left_out=plan.left_out,
        mixed=plan.mixed,
        irregular=_breaks_pattern(
            _kinds(opened.blueprint.recipient.config), _kinds(opened.blueprint.built_config.config)
        ),
    )


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    name = str(dtype).removeprefix("torch.")
    if dtype is None or name == "auto":
        return None
    if name not in DTYPES:
        raise ConfigurationError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}. To quantise, do so after.")
    found: torch.dtype = getattr(torch, name)
    return found


def _kinds(config: PreTrainedConfig) -> list[Any]:
    return list(getattr(config.get_text_config(), "layer_types", None) or ())


def _breaks_pattern(before: list[Any], after: list[Any]) -> bool:
    """Whether a longer list of layers' kinds is no continuation of the shorter one's shortest period."""
    lengths = range(1, len(before) + 1)
    period = next((n for n in lengths if before == [before[i % n] for i in range(len(before))]), 1)
    return bool(before) and after != [before[i % period] for i in range(len(after))]


def _refuse_place(target: Path, opened: Opened) -> None:
    """Refuse a folder that holds what the export is made from.

    Raises:
        ConfigurationError: With what is there.
    """
    place = target.expanduser().resolve()
    donors = [part.donor.source for part in opened.blueprint.parts]
    inputs = [source.folder for source in (opened.request.source, *donors) if source is not None]
    recipient = points_to_folder(str(opened.config.recipient), revision=opened.config.recipient_revision)
    for folder in (*inputs, *([recipient] if recipient else [])):
        if place == folder.resolve():
            raise ConfigurationError(f"{target} is what is being exported, whose files would be lost. Choose another.")


def _write_companions(opened: Opened, staging: Path, target: Path) -> Path:
    """Copy tokenizer and the like, the transplant's own before the recipient's, and return the latter's folder."""
    config, request, hub = opened.config, opened.request, opened.hub
    recipient = locate_with_companions(
        str(config.recipient),
        files=("config.json", *TERMS, "README.md"),
        revision=config.recipient_revision,
        hub=hub,
    )
    own: Source = request.source
    if request.names_transplant and own.from_hub:
        own = locate_with_companions(own.reference, revision=own.revision, subfolder=own.subfolder, hub=hub)
    copy_companions([(str(source.folder), None) for source in (own, recipient)], staging, target)
    for path in (recipient.folder / name for name in TERMS):
        if path.is_file():
            shutil.copyfile(path, staging / path.name)
    return recipient.folder


def _write_config(opened: Opened, staging: Path, dtype: torch.dtype | None, plan: Plan) -> None:
    blueprint = opened.blueprint
    config: PreTrainedConfig = copy.deepcopy(follow_quantization(blueprint.built_config.config, blueprint))
    config.architectures = [blueprint.recipient.model_class.__name__]
    chosen = dtype or config.dtype or plan.main_dtype
    for part in (config, config.get_text_config()):
        part.dtype = chosen
    # They name files that are not here: a plain checkpoint needs neither another weight file nor code.
    for name in ("auto_map", "transformers_weights"):
        if getattr(config, name, None) is not None:
            delattr(config, name)
    config.save_pretrained(staging)
    if not (staging / "generation_config.json").exists() and blueprint.recipient.model_class.can_generate():
        GenerationConfig.from_model_config(config).save_pretrained(staging)


export_transplant = export  # the old name, for one release
