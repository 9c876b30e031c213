"""From a model to a donor repo: some of its layers, as they are or started as the identity."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..architecture import decoder_stack, find_stack
from ..config import TransplantConfig
from ..donor import Donor
from ..donor.companions import locate_with_companions
from ..donor.deliver import output_folder, push_donor
from ..donor.save import save_donor
from ..donor.saved_files import check_artifact_folder
from ..errors import ConfigurationError
from ..layer_map import RECIPIENT, check_position, paper_layers
from ..numeric import whole_number
from ..sources import HubOptions, Source
from .opening import load_model

__all__ = ["Extraction", "extract"]


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What was taken out of a model.

    Args:
        source: The model that was named, with its commit.
        folder: The donor repo; `None` when it was only pushed.
        recipient: What the donor is made for.
        recipient_revision: Its commit, if it is on the Hub.
        model_type: The source model's type.
        layer_indices: The donor layers' numbers in their source model.
        position: The recommended position.
        init: How the donor starts.
        files: sha256 and size of every weight file.
        commit: Where it was pushed to.
    """

    source: str
    folder: str | None
    recipient: str
    recipient_revision: str | None
    model_type: str
    layer_indices: tuple[int, ...]
    position: int
    init: str
    files: Mapping[str, Mapping[str, Any]]
    commit: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return {**dataclasses.asdict(self), "files": {name: dict(stamp) for name, stamp in self.files.items()}}

    def __str__(self) -> str:
        size = sum(stamp["size"] for stamp in self.files.values())
        start = "as they are" if self.init == "copy" else "started as the identity: they add nothing until trained"
        pinned = f"@{self.recipient_revision}" if self.recipient_revision else ""
        return "\n".join(
            [
                f"{self.source} -> {self.commit or self.folder}",
                f"  {len(self.layer_indices)} layers ({self.model_type}): {', '.join(map(str, self.layer_indices))}, "
                f"{start}",
                f"  for {self.recipient}{pinned}, recommended position {self.position}; "
                f"{len(self.files)} weight file{'s' if len(self.files) > 1 else ''}, {size:,} bytes",
            ]
        )


def extract(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    layers: Sequence[int] | None = None,
    count: int = 3,
    init: str = "copy",
    position: int | None = None,
    name: str | None = None,
    revision: str | None = None,
    dtype: Any = "auto",
    max_shard_size: int | str = "5GB",
    push_to: str | None = None,
    private: bool | None = None,
    trust_remote_code: bool | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> Extraction:
    """Take layers out of a model and write them as a donor repo, in a folder, on the Hub, or both.

    Args:
        model: Hub id or folder of a model, or of a transplant or donor, in which case layers are running numbers and
            all of one source.
        output: The folder to write.
        overwrite: Replace what transplant_hf wrote to the output before; without it, an output that is not empty is
            refused, before anything else is done.
        layers: Consecutive running numbers; by default those of the paper, from a third of the way up.
        count: How many, where `layers` are not named.
        init: As in `Donor.from_model`: "copy", or "identity" for a donor to be trained.
        position: The recommended position; by default right after the layers, or where a transplanted donor is.
        name: What to call the donor; by default as in the transplant, or after the folder or repository it is written
            to.
        revision: The model's branch, tag or commit; the commit is recorded.
        dtype: As in `from_pretrained`; by default as the checkpoint has it.
        max_shard_size: Largest weight file.
        push_to: A repository to upload to, as one commit.
        private: As in huggingface_hub.
        trust_remote_code: As in `from_pretrained`.
        token: The same.
        cache_dir: The same.
        local_files_only: The same.

    Returns:
        What was done.

    Raises:
        ConfigurationError: No such layers or position, layers of several sources, or an output that is not empty.
        CompatibilityError: Layers that cannot be the identity.
        CheckpointError: Weights that are quantised.
        HubError: The model or the repository is out of reach.

    Example:
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> folder = tempfile.mkdtemp()
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
        >>> model.save_pretrained(f"{folder}/model")
        >>> done = extract(f"{folder}/model", f"{folder}/donor", init="identity")
        >>> done.layer_indices, done.position
        ((2, 3, 4), 5)
    """
    if output is None and push_to is None:
        raise ConfigurationError("extract needs somewhere to write to: name a folder (output), or push_to.")
    if output is not None:
        check_artifact_folder(output, overwrite)
    hub = HubOptions(token, cache_dir, local_files_only)
    source = locate_with_companions(os.fspath(model), revision=revision, hub=hub)
    donor, place, recipient = _taken(source, layers, count, init, name, dtype, trust_remote_code, hub)
    place = check_position(
        place if position is None else position, recipient.num_layers, recipient=str(recipient.source)
    )
    if push_to is not None and not recipient.source.from_hub:
        raise ConfigurationError(
            f"a donor on the Hub must name a recipient on the Hub, and {recipient.source} is a folder. Push the "
            "recipient first and extract from it there, or write to a folder only."
        )

    with output_folder(output, push_to) as target:
        files = save_donor(
            donor,
            target,
            position=place,
            recipient=recipient.source.reference,
            recipient_revision=recipient.source.revision,
            max_shard_size=max_shard_size,
            repo_id=push_to,
        )
        done = _report(source, recipient, Donor.from_pretrained(target), init)
        commit = None
        if push_to is not None:
            message = f"Upload donor {donor.name or target.name}"
            commit = str(push_donor(target, push_to, files, message, token=token, private=private).commit_url)
    return dataclasses.replace(done, folder=None if output is None else str(output), commit=commit)


@dataclasses.dataclass(frozen=True)
class _Recipient:
    """What a donor is made for: its tokenizer and configuration, and L."""

    source: Source
    num_layers: int


def _taken(
    source: Source,
    layers: Sequence[int] | None,
    count: int,
    init: str,
    name: str | None,
    dtype: Any,
    trust_remote_code: bool | None,
    hub: HubOptions,
) -> tuple[Donor, int, _Recipient]:
    """Load the model, and return the donor, its place, and the recipient it has that place in."""
    loaded = load_model(
        source.reference,
        revision=source.revision,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        token=hub.token,
        cache_dir=hub.cache_dir,
        local_files_only=hub.local_files_only,
    )
    path = find_stack(loaded, str(source))
    config: TransplantConfig | None = getattr(loaded, "transplant_config", None)
    if config is None:
        recipient = _Recipient(source, len(decoder_stack(loaded, path)))
    else:
        # Positions are in the recipient's numbering, whatever the layers came from.
        found = locate_with_companions(config.recipient, revision=config.recipient_revision, hub=hub)
        recipient = _Recipient(found, loaded._transplant.blueprint.splice.num_layers)
    if layers is None:
        layers = list(paper_layers(recipient.num_layers, whole_number(count, "count")))
        if config is not None:
            wanted = {(RECIPIENT, index) for index in layers}
            layers = [number for number, slot in enumerate(loaded.layer_map) if tuple(slot) in wanted]
    taken = Donor.from_model(loaded, layers, name=name, init=init, revision=source.revision)
    place = taken.position if taken.position is not None else taken.layer_indices[-1] + 1
    donor = taken.replaced(position=None, companions=recipient.source)
    return donor, min(place, recipient.num_layers), recipient


def _report(source: Source, recipient: _Recipient, written: Donor, init: str) -> Extraction:
    assert written.position is not None
    return Extraction(
        source=str(source),
        folder=None,
        recipient=recipient.source.reference,
        recipient_revision=recipient.source.revision,
        model_type=written.model_type,
        layer_indices=tuple(written.layer_indices),
        position=written.position,
        init=init,
        files={name: dataclasses.asdict(stamp) for name, stamp in written.record.files.items()},
    )
