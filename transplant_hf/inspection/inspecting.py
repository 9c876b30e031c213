"""`inspect`: find out what something is, and inspect it as that."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..architecture import Anatomy, LayerNames, open_recipient, text_config
from ..compatibility import refuse_unsupported
from ..config import TransplantConfig
from ..display import dtype_name
from ..donor import DONOR_CONFIG
from ..donor.from_pt import METADATA_FILE, match_pt_file
from ..donor.tensors import TensorInfo
from ..errors import CheckpointError, CompatibilityError, ConfigurationError
from ..layer_map import Placement, Position, Splice
from ..pt_files import PtFile
from ..pt_files.layouts import numbers_in
from ..sources import HubArguments, HubOptions
from ..storage import read_json
from .donors import InspectArguments, has_recipient_inside, inspect_donor, inspect_transplant, read_transplant_config
from .files import BIN_FILES, MODEL_FILES, Files, all_tensors, summarize_weights
from .findings import Inspection, ModelInspection, Numbering, PtInspection, PtTensorFinding, Weights

if TYPE_CHECKING:
    from typing_extensions import Unpack

_TORCH_SUFFIXES = (".pt", ".pth")
_MAX_PROBLEMS = 8
_NAME_THE_SOURCE = "name the source model (recipient=, --recipient) to see which of its layers these are."


def inspect(
    what: str | os.PathLike[str],
    *,
    recipient: str | os.PathLike[str] | None = None,
    position: Position | None = None,
    verify: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    **hub_kwargs: Unpack[HubArguments],
) -> Inspection:
    """Show what a donor, a transplant, a model or a `.pt` file is, from headers and configurations.

    Weights are read only for `verify`. From a repository only configurations are downloaded, and the headers of weight
    files by range requests. Nothing in a `.pt` file is run.

    Args:
        what: Hub id, folder, or a file that `torch.save` wrote.
        recipient: A recipient to compare it with: Hub id or folder.
        position: The position of the donor, 0..L; by default the recommended one.
        verify: Hash the weight files that are on this machine, and compare them with what is recorded.
        revision: Branch, tag or commit of the repository.
        subfolder: A folder inside it.
        **hub_kwargs: `token`, `cache_dir`, `local_files_only`, `force_download`, as in `from_pretrained`.

    Returns:
        The inspection. It is false when loading would be refused: bytes that differ from the recorded ones, or a
        recipient that does not fit; `problems` says why.

    Raises:
        CheckpointError: Malformed or missing files.
        ConfigurationError: Not a model, a donor or a transplant, or a position outside the recipient.
        HubError: A repository is missing, gated, private or out of reach.

    Example:
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from transplant_hf import Donor
        >>> folder = tempfile.mkdtemp()
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
        >>> model.save_pretrained(f"{folder}/recipient")
        >>> donor = Donor.from_model(model, layers=[1, 2], name="tail")
        >>> donor.save_pretrained(f"{folder}/donor", position=1, recipient=f"{folder}/recipient")
        >>> result = inspect(f"{folder}/donor", verify=True)
        >>> result.kind, result.layer_indices, result.weights.parameters, result.weights.sha256
        ('donor', (1, 2), 1744, 'verified')
    """
    arguments = InspectArguments(
        what=os.fspath(what),
        recipient=os.fspath(recipient) if recipient is not None else None,
        position=position,
        verify=verify,
        hub=HubOptions(**hub_kwargs),
    )
    path = Path(arguments.what).expanduser()
    if path.is_file() or (path.suffix in _TORCH_SUFFIXES and not path.is_dir()):
        return _inspect_pt(path, arguments)
    files = Files.find(arguments.what, arguments.hub, revision=revision, subfolder=subfolder)
    config = files.source.folder / "config.json"
    fields = read_json(config, "config.json") if config.exists() else {}
    if (files.source.folder / DONOR_CONFIG).exists() and _is_donor(files, fields):
        return inspect_donor(files, fields, arguments)
    if not config.exists():
        raise ConfigurationError(
            f"{files.source} is neither a model, a donor nor a transplant: it has no config.json and no {DONOR_CONFIG}."
        )
    if fields.get("model_type") == TransplantConfig.model_type:
        return inspect_transplant(files, fields, arguments)
    return _inspect_model(files, fields, arguments)


def _is_donor(files: Files, fields: dict[str, object]) -> bool:
    """Whether a folder is a donor, and not a transplant with one of its donors at the top."""
    if fields.get("model_type") != TransplantConfig.model_type:
        return True
    config = read_transplant_config(fields, files.source)
    own = [spec for spec in config.donors if spec.donor == "." and spec.subfolder is None]
    return len(config.donors) == len(own) == 1 and not has_recipient_inside(config, files.source)


# -- Models that may be recipients -----------------------------------------------------------------------------------


def _inspect_model(files: Files, fields: Mapping[str, Any], arguments: InspectArguments) -> ModelInspection:
    """Inspect a model of a class of Transformers."""
    model_type = fields.get("model_type")
    if arguments.recipient is not None or arguments.position is not None:
        raise ConfigurationError(
            f"{files.source} is a model of type {model_type!r}, not a donor: recipient and position apply to donors, "
            "transplants and .pt files."
        )
    if not isinstance(model_type, str):
        raise ConfigurationError(f"{files.source} is not a model: its config.json has model_type {model_type!r}.")
    anatomy, reason = _anatomy(files, arguments)
    weights, problems, notes = _weights(files, anatomy, arguments.verify)
    architectures = fields.get("architectures")
    layers = hidden_size = None
    if anatomy is not None:
        layers, architectures = anatomy.num_layers, [anatomy.model_class.__name__]
        hidden_size = getattr(text_config(anatomy.config), "hidden_size", None)
    return ModelInspection(
        what=arguments.what,
        revision=files.source.revision,
        notes=tuple(notes),
        problems=tuple(problems),
        model_type=model_type,
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else None,
        num_layers=layers,
        positions=(0, layers) if layers is not None else None,
        hidden_size=hidden_size if isinstance(hidden_size, int) else None,
        movable=reason is None,
        reason=reason,
        sharing_layers=tuple(sorted(anatomy.sharing_layers)) if anatomy is not None else (),
        weights=weights,
    )


def _anatomy(files: Files, arguments: InspectArguments) -> tuple[Anatomy | None, str | None]:
    """Return the model's structure if its layers can be found, and why donors cannot be put between them, if so."""
    source = files.source
    base = source if source.subfolder else None
    place = (".", None) if source.subfolder else (source.reference, source.revision)
    anatomy: Anatomy | None = None
    try:
        found = open_recipient(*place, arguments.hub, relative_to=base).anatomy()
        anatomy = found if found.num_layers else None  # finding layers may fail
        refuse_unsupported(found)
    except (CompatibilityError, ConfigurationError) as error:
        return anatomy, str(error)
    return found, None


def _weights(files: Files, anatomy: Anatomy | None, verify: bool) -> tuple[Weights | None, list[str], list[str]]:
    """Return what the weight files hold, how they differ from what the Hub lists, and notes."""
    if not any(files.has(name) for name in MODEL_FILES):
        pickled = ", ".join(name for name in BIN_FILES if files.has(name))
        if pickled:
            return None, [], [f"its weights are pickled ({pickled}) and have no headers, so nothing is known of them."]
        return None, [], [f"no weights were found under the usual names ({', '.join(MODEL_FILES)})."]
    headers = files.headers(MODEL_FILES)
    per_layer = _per_layer(anatomy, all_tensors(headers)) if anatomy is not None else ()
    return *summarize_weights(files, headers, {}, verify, per_layer), []


def _per_layer(anatomy: Anatomy, tensors: Mapping[str, TensorInfo]) -> Sequence[int]:
    names = LayerNames(anatomy.model, anatomy.stack_path)
    counts = [0] * anatomy.num_layers
    for name, tensor in tensors.items():
        try:
            parts = names.split(name)
        except CompatibilityError:  # the number of its layer is computed while loading
            continue
        if parts is not None and parts.number < len(counts):
            counts[parts.number] += tensor.num_elements
    return counts if any(counts) else ()


# -- `.pt` files -----------------------------------------------------------------------------------------------------


def _inspect_pt(path: Path, arguments: InspectArguments) -> PtInspection:
    """Inspect a `.pt` file."""
    file = PtFile(path)
    dtypes: Counter[str] = Counter()
    # Tied tensors count once. By their texts: a file can choose numbers whose hashes are all equal.
    for tensor in {repr(tensor): tensor for tensor in file.tensors.values()}.values():
        dtypes[dtype_name(tensor.dtype)] += tensor.num_elements
    beside = path.parent / METADATA_FILE
    found = PtInspection(
        what=arguments.what,
        notes=() if arguments.recipient else (_NAME_THE_SOURCE,),
        problems=tuple(_false_claims(file)),
        size=path.stat().st_size,
        tensors={name: PtTensorFinding(t.shape, dtype_name(t.dtype)) for name, t in file.tensors.items()},
        parameters=sum(dtypes.values()),
        dtypes=dict(dtypes.most_common()),
        numbering=_numbering(file.tensors),
        classes=file.classes,
        values=dict(file.values),
        metadata=read_json(beside, "the donor's metadata") if beside.exists() else {},
    )
    if arguments.recipient is None:
        return found
    try:
        matched = match_pt_file(path, arguments.recipient, None, None, None, None, arguments.hub)
        position = matched.position if arguments.position is None else arguments.position
        placement = Placement(matched.record.name or path.stem, position, matched.layout.layers)
        layer_map = Splice(matched.num_layers, [placement]).layer_map()
    except (CheckpointError, CompatibilityError, ConfigurationError) as error:
        return dataclasses.replace(found, problems=(*found.problems, str(error)))
    return dataclasses.replace(
        found,
        recipient=str(matched.recipient),
        model_type=matched.record.model_type,
        layer_indices=matched.layout.layers,
        prefix=matched.layout.prefix,
        dropped=matched.layout.dropped,
        placed_at=position,
        layer_map=layer_map,
    )


def _false_claims(file: PtFile) -> list[str]:
    """The tensors that claim more than the file holds."""
    problems = []
    for name in file.tensors:
        try:
            file.check_claims(name)
        except CheckpointError as error:
            problems.append(str(error))
    more = len(problems) - _MAX_PROBLEMS
    return [*problems[:_MAX_PROBLEMS], *([f"... and {more:,} more tensors"] if more > 0 else [])]


def _numbering(names: Iterable[str]) -> tuple[Numbering, ...]:
    """Group names by what stands before the first number in them."""
    groups: dict[str, Counter[int]] = {}
    for name in names:
        for _, prefix, number in itertools.islice(numbers_in(name), 1):
            groups.setdefault(prefix, Counter())[number] += 1
    found = [Numbering(prefix, tuple(sorted(counts)), counts.total()) for prefix, counts in groups.items()]
    return tuple(sorted(found, key=lambda group: (-group.tensors, group.prefix)))
