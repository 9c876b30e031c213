"""`inspect`: find out what something is, and inspect it as that."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import TransplantConfig
from ..donor import DONOR_CONFIG
from ..errors import ConfigurationError
from ..layer_map import Position
from ..sources import HubArguments, HubOptions
from ..storage import read_json
from .donors import InspectArguments, has_recipient_inside, inspect_donor, inspect_transplant, read_transplant_config
from .files import Files
from .findings import Inspection
from .models import inspect_model
from .pt_files import inspect_pt

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["inspect"]

_TORCH_SUFFIXES = (".pt", ".pth")


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
        >>> print(result.layer_map)
        layer  from
            0  recipient 0
            1  |  tail 1
            2  |  tail 2
            3  recipient 1
            4  recipient 2
        5 layers run: 3 recipient, 2 tail
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
        return inspect_pt(path, arguments)
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
    return inspect_model(files, fields, arguments)


def _is_donor(files: Files, fields: dict[str, object]) -> bool:
    """Whether a folder is a donor, and not a transplant with one of its donors at the top."""
    if fields.get("model_type") != TransplantConfig.model_type:
        return True
    config = read_transplant_config(fields, files.source)
    own = [spec for spec in config.donors if spec.donor == "." and spec.subfolder is None]
    return len(config.donors) == len(own) == 1 and not has_recipient_inside(config, files.source)
