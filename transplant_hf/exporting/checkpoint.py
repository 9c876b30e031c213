"""`export`: a transplant as a plain checkpoint, which loads without this package."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Mxfp4Config, PreTrainedModel  # type: ignore[attr-defined]

from ..architecture import Recipient, max_context_length
from ..cards import CARD_FILE, TERMS, check_license
from ..display import parse_size, progress_bar
from ..donor.companions import copy_companions, locate_with_companions
from ..donor.record import FileStamp
from ..donor.saved_files import check_artifact_folder, replaced_in
from ..errors import CheckpointError, ConfigurationError
from ..heads import CAUSAL_LM, Head, head_of
from ..model.load import load_transplant
from ..model.load_request import ADAPTER_CONFIG, LoadRequest, read_request, recipient_of
from ..model.native_methods import recipient_class
from ..model.save_parts import write_full_card
from ..model.surface import transplant_class
from ..numeric import is_finite
from ..sources import HubArguments, HubOptions, locate, points_to_folder, reading
from ..splice import Blueprint
from ..storage import publish, sha256_of
from .gguf import export_gguf
from .result import Export, breaks_pattern, layer_types, refuse_beyond_layers

if TYPE_CHECKING:
    from typing_extensions import Unpack

_DTYPES = ("bfloat16", "float16", "float32")
_MAX_TOKENS = 32  # of the input on which logits are compared
# Logits may differ by this many times the dtype's epsilon, relative to the largest: sums in another order.
_MAX_ROUNDING = 16
_UNPACKED = "mxfp4"  # the one quantization whose weights are unpacked; donors are never quantized
_LOAD = "load it with AutoModelWithTransplant and call save_pretrained(folder)"


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
    gguf: str | os.PathLike[str] | None = None,
    **hub_kwargs: Unpack[HubArguments],
) -> Export:
    """Write a transplant as a plain checkpoint that loads without this package, or as a GGUF file.

    The transplant is loaded, checked and saved; then the checkpoint is loaded again and, unless `verify=False`, must
    give the transplant's logits on random tokens. Only then does the folder take its place, in one step.

    A recipient that is a GGUF file gives a GGUF file, for which no model is loaded: the recipient's tensors are copied
    as they are, under new block numbers, and those of the donors are added.

    Args:
        source: A transplant or a donor, as Hub id or folder; or, with `donors`, a recipient, which may be a GGUF file.
        output: The folder, or the GGUF file, to write.
        donors: `{donor: position}`, where the position `None` means the recommended one, or a list of `DonorSpec`.
        overwrite: Replace what transplant_hf wrote to the output before. Without it, a folder that is not empty is
            refused before anything else is done.
        dtype: "bfloat16", "float16" or "float32"; by default the recipient's. In a GGUF file it is the dtype of the
            donors' matrices: also "q8_0", and by default "float16".
        max_shard_size: Largest weight file.
        verify: Load the export and compare its logits; read a GGUF file again and compare its tensors.
        composition: "stacked" or "side_by_side"; by default as the source says.
        license: The license that the card names; by default the one that recipient and donors agree on.
        revision: The source's branch, tag or commit.
        gguf: A GGUF file to use as the recipient of the transplant or donor `source`.
        **hub_kwargs: `token`, `cache_dir`, `local_files_only`, `force_download`, as in `from_pretrained`.

    Returns:
        What was written.

    Raises:
        ConfigurationError: A plain checkpoint cannot describe the transplant, or the output folder cannot be used.
        CompatibilityError: A donor does not fit.
        CheckpointError: Weights that are missing, malformed or not finite, or logits that differ.
        IntegrityError: The sha256 of a donor file is not the recorded one.
        HubError: The Hub cannot be reached, or refuses.

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
    file = source if gguf is None and Path(source).expanduser().is_file() else gguf
    if file is not None:
        if (max_shard_size, license) != ("5GB", None):
            raise ConfigurationError(
                "a GGUF file is one file without a card: leave out max_shard_size (--max-shard-size) and license "
                "(--license)."
            )
        if (gguf is None) == (donors is None):
            raise ConfigurationError(
                "for a GGUF file, name a donor or a transplant and the recipient's file as gguf= (--gguf), or the "
                "recipient's file as the source and its donors as donors= (--donor)."
            )
        return export_gguf(
            file, output, source if donors is None else None, donors, overwrite=overwrite, dtype=dtype, verify=verify,
            composition=composition, revision=revision, hub=HubOptions(**hub_kwargs),
        )  # fmt: skip
    if Path(output).suffix == ".gguf":
        raise ConfigurationError(
            f"{output} would be a folder: for a GGUF file, name that of the recipient as gguf= (--gguf), or as the "
            "source."
        )
    check_artifact_folder(output, overwrite)
    dtype = _checked_dtype(dtype)
    shard_size = parse_size(max_shard_size, "max_shard_size (--max-shard-size)")
    if license is not None:
        check_license(license)
    hub = HubOptions(**hub_kwargs)
    request = read_request(source, donors=donors, revision=revision, hub=hub)
    recipient = recipient_of(request, hub)
    refuse_adapters(request, recipient)
    options = _quantization_options(recipient)
    head: Head = head_of(recipient.config.architectures or (), recipient.config) or CAUSAL_LM
    model, info = load_transplant(
        head.find(), source, donors=donors, composition=composition, revision=revision, dtype=dtype or "auto",
        output_loading_info=True, **options, **hub.as_kwargs(),
    )  # fmt: skip
    blueprint: Blueprint = model._transplant.blueprint
    refuse_beyond_native(blueprint)
    target = Path(output).expanduser()
    inputs = [place.folder for place in (request.source, *(part.donor.source for part in blueprint.parts)) if place]
    _refuse_inputs_place(target, [*inputs, points_to_folder(recipient.reference, revision=recipient.revision)])
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        more = f" and {len(missing) - 1} more weights" if len(missing) > 1 else ""
        raise CheckpointError(
            f"the checkpoint of {recipient} lacks {_origin(missing[0], model)}{more}. A file is missing, or its "
            "config.json belongs to another model."
        )
    _check_finite(model, dtype)
    with publish(target, replaced_in) as staging:
        _write_model(model, staging, shard_size)
        _copy_companions(request, recipient, staging, target)
        write_full_card(model, staging, target, [part.donor.record for part in blueprint.parts], license=license)
        difference = _compare_logits(model, staging) if verify else 0.0
        files = {
            path.name: FileStamp(sha256_of(path), path.stat().st_size) for path in sorted(staging.glob("*.safetensors"))
        }
    return Export(
        folder=str(output),
        recipient=str(recipient),
        model_class=type(model).__name__,
        layer_map=blueprint.layer_map(),
        dtype=str(model.dtype).removeprefix("torch."),
        files=files,
        verified=verify,
        difference=difference,
        irregular=breaks_pattern(layer_types(recipient.config), layer_types(model.config)),
    )


def _checked_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in (*_DTYPES, "auto"):
        raise ConfigurationError(
            f"dtype must be one of {', '.join(_DTYPES)}, got {name!r}. Quantize the export instead."
        )
    return getattr(torch, name) if name in _DTYPES else None


# -- What is refused ------------------------------------------------------------------------------------------------


def refuse_adapters(request: LoadRequest, recipient: Recipient) -> None:
    """Refuse adapters beside the recipient or the transplant: a plain checkpoint holds weights alone."""
    files = (f"{ADAPTER_CONFIG}*", "config.json")  # a pattern that matches no file would be a warning of the client
    beside = locate(recipient.reference, files=files, revision=recipient.revision, hub=recipient.hub)
    for place in filter(None, (request.adapter, beside)):
        if (place.folder / ADAPTER_CONFIG).exists():
            raise ConfigurationError(
                f"{place} holds an adapter ({ADAPTER_CONFIG}), which an export would leave out. Merge it into the "
                "weights (PEFT's merge_and_unload, then save_pretrained), or move that file away."
            )


def _quantization_options(recipient: Recipient) -> dict[str, Any]:
    """Return how a quantized recipient is loaded: unpacked where Transformers can, since donors are not quantized."""
    fields = getattr(recipient.config, "quantization_config", None)
    if fields is None:
        return {"quantization_config": None}  # a thin transplant may name one
    method = fields.get("quant_method") if isinstance(fields, dict) else fields.quant_method
    name = str(getattr(method, "value", method))
    if name != _UNPACKED:
        raise ConfigurationError(
            f"{recipient} is quantized ({name}) and donors are not; a plain checkpoint cannot hold both. Export from "
            "the recipient in full precision, and quantize the export."
        )
    return {"quantization_config": Mxfp4Config(dequantize=True)}


def refuse_beyond_native(blueprint: Blueprint) -> None:
    """Refuse what would load in plain Transformers as another model, or not at all."""
    refuse_beyond_layers(
        blueprint,
        "a plain checkpoint",
        f" Or {_LOAD}, which writes the transplant format; for a donor of one layer with attention and MLP in parallel "
        "(GPT-NeoX, Falcon, Phi), it folds a strength into the weights of a plain checkpoint.",
    )
    state = blueprint.state(())
    if not state.native:
        reason = state.reasons[0] if state.reasons else "its layers differ"
        raise ConfigurationError(
            f"no configuration of {blueprint.recipient.config.model_type} describes these layers ({reason}), so a "
            f"plain checkpoint would load as another model. Either {_LOAD}, which writes the transplant format; or "
            "choose another position (`transplant-hf check` says which positions are native)."
        )


def _refuse_inputs_place(target: Path, inputs: Sequence[Path | None]) -> None:
    """Refuse a folder that holds the transplant, a donor or the recipient."""
    if target.resolve() in [folder.resolve() for folder in inputs if folder is not None]:
        raise ConfigurationError(
            f"{target} is what is being exported, and its files would be lost. Choose another folder."
        )


def _check_finite(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    tensors = model.state_dict()
    total = sum(tensor.nbytes for tensor in tensors.values())
    with progress_bar(total, "Checking weights") as bar:
        for name, tensor in tensors.items():
            if not is_finite(tensor):
                advice = "Use a checkpoint from before its training diverged."
                if dtype is not None:
                    advice = f"If its file is finite, its numbers are too large for {dtype}: use bfloat16 or float32."
                raise CheckpointError(f"{_origin(name, model)} holds NaN or infinity; nothing was exported. {advice}")
            bar.update(tensor.nbytes)


def _origin(name: str, model: Any) -> str:
    """Return the name of a weight, and for a layer which layer of which model it is."""
    path = f"{model._transplant.blueprint.recipient.stack_path}."
    number = name.removeprefix(path).partition(".")[0]
    if not name.startswith(path) or not number.isdecimal():
        return f"{name} of the recipient"
    source, index = model.layer_map[int(number)]
    return f"{name} (layer {index} of {source})"


# -- What is written ------------------------------------------------------------------------------------------------


def _write_model(model: PreTrainedModel, folder: Path, max_shard_size: int) -> None:
    # They name files that are not here: a plain checkpoint needs neither other weight files nor code.
    for name in ("auto_map", "transformers_weights"):
        if getattr(model.config, name, None) is not None:
            delattr(model.config, name)
    recipient_class(type(model)).save_pretrained(model, folder, max_shard_size=max_shard_size)


def _copy_companions(request: LoadRequest, recipient: Recipient, staging: Path, target: Path) -> None:
    """Copy tokenizer, processor and license files; the transplant's own come before the recipient's."""
    own, hub = request.source, recipient.hub
    if request.names_transplant and own.from_hub:
        own = locate_with_companions(own.reference, revision=own.revision, subfolder=own.subfolder, hub=hub)
    wanted = ("config.json", *TERMS, CARD_FILE)
    theirs = locate_with_companions(recipient.reference, files=wanted, revision=recipient.revision, hub=hub)
    copy_companions([(str(source.folder), None) for source in (own, theirs)], staging, target)
    for path in (theirs.folder / name for name in TERMS):
        if path.is_file():
            shutil.copyfile(path, staging / path.name)


# -- What is verified -----------------------------------------------------------------------------------------------


def _compare_logits(model: Any, folder: Path) -> float:
    """Load the export and return the largest difference of its logits, 0 in nearly all cases.

    The last bits may differ, as sums do whose terms lie elsewhere in memory, but only if all weights are equal.
    """
    expected = _logits(model)
    if not expected.isfinite().all():
        raise CheckpointError(
            f"the transplant's logits are not finite in {model.dtype}, so there is nothing to compare with. Export in "
            "another dtype (dtype=, --dtype), or check its donors. Nothing was kept."
        )
    # The class as Transformers has it, loaded without its changes to the whole process.
    with reading("the weights", str(folder)):
        plain = transplant_class(recipient_class(type(model))).from_pretrained(folder, dtype=model.dtype)
    difference = float((_logits(plain) - expected).abs().max())
    largest = float(expected.abs().max())
    if not difference <= _MAX_ROUNDING * torch.finfo(model.dtype).eps * largest:
        raise CheckpointError(
            f"the logits of the export differ from the transplant's in {model.dtype} (largest difference "
            f"{difference:.3g}, logits up to {largest:.3g}). Nothing was kept."
        )
    if difference > 0:
        found = plain.state_dict()
        for name, tensor in model.state_dict().items():
            if name not in found or not torch.equal(found[name], tensor):
                raise CheckpointError(f"{name} of the export differs from the transplant's. Nothing was kept.")
    return difference


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    """Return the logits of random tokens, `[1, tokens, vocabulary]`, or what else the model's head gives."""
    length = min(_MAX_TOKENS, max_context_length(model.config) or _MAX_TOKENS)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    logits: torch.Tensor = model(ids.to(model.device), use_cache=False)[0]
    return logits.float().cpu()
