"""Extract layers of a model into a donor repository, unchanged or started as the identity."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..architecture import decoder_stack, find_stack
from ..cards import check_license
from ..display import position_text
from ..donor import Donor
from ..donor.companions import locate_with_companions
from ..donor.save import output_folder, push_saved, save_donor
from ..donor.saved_files import check_artifact_folder
from ..errors import ConfigurationError
from ..layer_map import RECIPIENT, Placement, Position, check_position, extracted_position, paper_layers
from ..numeric import whole_number
from ..sources import HubArguments, HubOptions, at_revision
from .load_any_model import load_model

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclasses.dataclass(frozen=True)
class Extraction:
    """The result of `extract`.

    Args:
        source: The model that was named, with its commit.
        folder: The donor's folder; `None` if it was only pushed.
        recipient: The donor's recipient.
        recipient_revision: Its commit, if it is on the Hub.
        model_type: The source model's type.
        layer_indices: The donor layers' numbers in their source model.
        position: The recommended position.
        init: How the donor starts.
        files: sha256 and size of every weight file.
        commit: The address of the commit, if it was pushed.
    """

    source: str
    folder: str | None
    recipient: str
    recipient_revision: str | None
    model_type: str
    layer_indices: tuple[int, ...]
    position: Position
    init: str
    files: Mapping[str, Mapping[str, Any]]
    commit: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON."""
        return {**dataclasses.asdict(self), "files": {name: dict(stamp) for name, stamp in self.files.items()}}

    def __str__(self) -> str:
        size = sum(stamp["size"] for stamp in self.files.values())
        recipient = at_revision(self.recipient, self.recipient_revision)
        numbers = ", ".join(map(str, self.layer_indices))
        start = "copied" if self.init == "copy" else "started as the identity: they add nothing until they are trained"
        return (
            f"{self.source} -> {self.commit or self.folder}\n"
            f"  {len(self.layer_indices)} layers ({self.model_type}): {numbers}, {start}\n"
            f"  for {recipient}, recommended {position_text(self.position)}; "
            f"{len(self.files)} weight file{'s' if len(self.files) > 1 else ''}, {size:,} bytes"
        )


def extract(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    layers: Sequence[int] | None = None,
    count: int = 3,
    init: str = "copy",
    position: Position | None = None,
    name: str | None = None,
    revision: str | None = None,
    dtype: Any = "auto",
    max_shard_size: int | str = "5GB",
    license: str | None = None,
    push_to: str | None = None,
    private: bool | None = None,
    trust_remote_code: bool | None = None,
    **hub_kwargs: Unpack[HubArguments],
) -> Extraction:
    """Extract layers of a model as a donor, into a folder, to the Hub, or both.

    Args:
        model: Hub id or folder of a model, a transplant or a donor. In a transplant, layers are running numbers, all
            of one source.
        output: The folder to write.
        overwrite: Replace what transplant_hf wrote to the output before. Otherwise an output that is not empty is an
            error, before any work is done.
        layers: Consecutive running numbers; by default the layers of the paper, starting at a third of the model.
        count: The number of layers, if `layers` is not given.
        init: As in `Donor.from_model`: "copy", or "identity" for a donor to be trained.
        position: The recommended position; by default right after the layers, or that of a transplanted donor.
        name: The donor's name; by default that in the transplant, or of the folder or repository.
        revision: The model's branch, tag or commit; the commit is recorded.
        dtype: As in `from_pretrained`; by default that of the checkpoint.
        max_shard_size: Largest weight file.
        license: The license that the card names; by default the one in the metadata, or the recipient's.
        push_to: A repository to upload to, as one commit.
        private: As in huggingface_hub.
        trust_remote_code: As in `from_pretrained`.
        **hub_kwargs: `token`, `cache_dir`, `local_files_only`, `force_download`, as in `from_pretrained`.

    Returns:
        The donor's source, place and files.

    Raises:
        ConfigurationError: No such layers or position, layers of several sources, or an output that is not empty.
        CompatibilityError: Layers that cannot start as the identity.
        CheckpointError: Quantized weights.
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
        raise ConfigurationError("extract needs an output: name a folder (output), or push_to.")
    if license is not None:
        check_license(license)
    if output is not None:
        check_artifact_folder(output, overwrite)
    hub = HubOptions(**hub_kwargs)
    source = locate_with_companions(os.fspath(model), revision=revision, hub=hub)
    loaded = load_model(
        source.reference,
        revision=source.revision,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        **{name: value for name, value in hub.as_kwargs().items() if name != "force_download"},
    )
    # Positions and default layers are in the recipient's numbering, even if the model is a transplant.
    path, transplant_config = find_stack(loaded, str(source)), getattr(loaded, "transplant_config", None)
    if transplant_config is None:
        recipient, num_layers = source, len(decoder_stack(loaded, path))
    else:
        pinned = transplant_config.recipient_revision
        recipient = locate_with_companions(transplant_config.recipient, revision=pinned, hub=hub)
        num_layers = loaded._transplant.blueprint.splice.num_layers
    if layers is None:
        layers = list(paper_layers(num_layers, whole_number(count, "count")))
        if transplant_config is not None:
            slots = {(RECIPIENT, index) for index in layers}
            layers = [number for number, slot in enumerate(loaded.layer_map) if tuple(slot) in slots]
    donor = Donor.from_model(loaded, layers, name=name, init=init, revision=source.revision)
    if position is None:
        position = extracted_position(num_layers, donor.layer_indices) if donor.position is None else donor.position
    asked = Placement("the donor", position, tuple(range(donor.num_layers))).positions
    places = tuple(check_position(place, num_layers, recipient=str(recipient)) for place in asked)
    position = places if len(places) > 1 else places[0]
    if push_to is not None and not recipient.from_hub:
        raise ConfigurationError(
            f"a donor on the Hub must name a recipient on the Hub, and {recipient} is a folder. Push the recipient "
            "first and extract from it there, or write to a folder only."
        )

    with output_folder(output, push_to) as target:
        files = save_donor(
            donor.replaced(position=position, companions=recipient),
            target,
            recipient=recipient.reference,
            recipient_revision=recipient.revision,
            max_shard_size=max_shard_size,
            repo_id=push_to,
            license=license,
        )
        written = Donor.from_pretrained(target)
        commit = None
        if push_to is not None:
            message = f"Upload donor {donor.name or target.name}"
            commit = str(push_saved(target, push_to, files, message, token=hub.token, private=private).commit_url)
    return Extraction(
        source=str(source),
        folder=None if output is None else str(output),
        recipient=recipient.reference,
        recipient_revision=recipient.revision,
        model_type=written.model_type,
        layer_indices=tuple(written.layer_indices),
        position=position,
        init=init,
        files={name: dataclasses.asdict(stamp) for name, stamp in written.record.files.items()},
        commit=commit,
    )
