"""Upload a saved artefact as one commit, after its files were checked."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCard
from tqdm import tqdm

from .cards import CARD_FILE, TERMS, written_by_us
from .cards.authorship import signed
from .cards.text import python_literal
from .config import TransplantConfig
from .donor import Donor
from .donor.companions import code_named_in, companions_in
from .donor.recorded import recorded_files
from .donor.save import replaced_among
from .donor.stream import pieces, size_of
from .donor.tensors import TensorInfo
from .errors import CheckpointError, ConfigurationError
from .exporting.checkpoint import open_recipient
from .hub import push_folder
from .numeric import is_finite
from .outputs import files_in
from .sources import HubOptions, Source, points_to_folder
from .storage import read_json, writing

__all__ = ["Push", "push", "push_artefact"]

_PROGRESS_FROM = 1 << 28
# Where a card's snippets name what they load; the tokenizer's line may name another repository.
_LOADED = re.compile(r'((?:model=|(?<!AutoTokenizer)\.from_pretrained\())"(?:[^"\\\n]|\\.)*"')
_SIGNED = "<!-- Written by transplant_hf"


@dataclasses.dataclass(frozen=True)
class Push:
    """What was uploaded.

    Args:
        folder: Where it is on this machine.
        kind: "donor", "transplant" or "model".
        repo_id: The repository.
        commit: The commit's id.
        url: Its page; of a pull request, that one's.
        tensors: How many tensors were looked at.
        size: Their bytes.
        files: What the repository holds of the folder now, by paths there, with the sizes.
        left_out: What else lies in the folder, and was not sent; a folder ends in `/`.
    """

    folder: str
    kind: str
    repo_id: str
    commit: str
    url: str
    tensors: int
    size: int
    files: Mapping[str, int]
    left_out: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        files = [{"name": name, "size": size} for name, size in self.files.items()]
        return {**dataclasses.asdict(self), "files": files}

    def __str__(self) -> str:
        return f"{self.folder}: a {self.kind}, {self.tensors} tensors, {self.size:,} bytes, all finite\n{self.url}"


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
    on_files: Callable[[Mapping[str, int], Sequence[str]], None] | None = None,
) -> Push:
    """Upload a donor, a transplant or an exported model, as it lies in a folder, as one commit.

    Before anything is sent, every weight is read: donors must have their recorded sha256, nothing may be NaN or
    infinite, and what the configuration refers to must be there for others too. Only what belongs to the artefact is
    uploaded: the files that its configuration, record or index names, the tokenizer, processor and generation
    configuration, the card, licence and notice. What the repository has already is not sent again, and files of an
    older artefact in it go. A card that transplant_hf wrote is changed so that its examples load the repository.

    Args:
        folder: What was saved.
        repo_id: The repository; made if it does not exist.
        private: As in huggingface_hub.
        revision: The branch; made if it does not exist.
        create_pr: Open a pull request instead.
        commit_message: Its first line.
        token: As in huggingface_hub.
        on_files: Called before anything is sent, with the sizes of the files by their paths, and with the names of what
            is left out.

    Returns:
        What was uploaded, and where it is.

    Raises:
        ConfigurationError: No such folder, nothing that was saved, a reference to a folder on this machine, or a link
            in the place of a file.
        CheckpointError: Weights that are missing, malformed or not finite.
        IntegrityError: A donor's bytes are not the recorded ones.
        HubError: Missing, gated, private or out of reach.
    """
    place = Path(folder).expanduser()
    if not (place / "config.json").is_file():
        what = "no folder" if not place.is_dir() else "no saved donor, transplant or model: it has no config.json"
        raise ConfigurationError(f"{folder} is {what}. Name a folder that save_pretrained or `export` wrote.")
    kind, weights = _opened(place)
    _refuse_not_finite(weights)
    _name_in_card(place / CARD_FILE, repo_id)
    files, left_out = _outgoing(place)
    if on_files is not None:
        on_files(files, left_out)
    done: CommitInfo = push_folder(
        place,
        repo_id,
        only=files.keys(),
        commit_message=commit_message or f"Upload {kind} {place.resolve().name}",
        token=token,
        private=private,
        revision=revision,
        create_pr=create_pr,
        replaced=replaced_among,
    )
    size = sum(size_of(info) for info, _, _ in weights)
    url = str(done.pr_url or done.commit_url)
    return Push(str(folder), kind, repo_id, str(done.oid), url, len(weights), size, files, left_out)


def _outgoing(folder: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the sizes of the files that belong to the artefact in a folder, and the names of all else there."""
    code = code_named_in(folder, [folder / "config.json"])
    wanted = recorded_files(folder) | companions_in(folder) | code | {*TERMS, CARD_FILE}
    there = files_in(folder)
    sent = {name: (folder / name).lstat().st_size for name in sorted(wanted & there)}
    others = sorted(there - set(sent))
    folders = {name.partition("/")[0] for name in sent if "/" in name}
    # A folder of which nothing is sent is named once.
    names = (name if (top := name.partition("/")[0]) in folders or top == name else f"{top}/" for name in others)
    return sent, tuple(dict.fromkeys(names))


_Weight = tuple[TensorInfo, Any, str]


def _opened(folder: Path) -> tuple[str, list[_Weight]]:
    """Say what is in a folder, and open its weights."""
    fields = read_json(folder / "config.json", "config.json")
    if fields.get("model_type") != TransplantConfig.model_type:
        return "model", _model_weights(folder, fields)
    config = TransplantConfig(**{**fields, "name_or_path": str(folder)})
    source = Source(str(folder), folder)
    weights: list[_Weight] = []
    inside = points_to_folder(str(config.recipient), source, config.recipient_revision)
    if inside is not None:
        _refuse_outside(folder, inside, f"recipient {config.recipient!r}")
        weights += _model_weights(inside, read_json(inside / "config.json", "the recipient's config.json"))
    for spec in config.donors:
        if spec.donor != ".":
            outside = points_to_folder(spec.donor, source, spec.revision)
            if outside is None:
                continue  # a repository of its own
            _refuse_outside(folder, outside, f"donor {spec.donor!r}")
        place = folder / ("" if spec.donor == "." else spec.donor) / (spec.subfolder or "")
        donor = Donor.open(Source(str(place), place))
        donor.verify()
        parts = donor.store.slices()
        weights += [(info, parts[name], f"{name} of donor {donor}") for name, info in donor.infos().items()]
    alone = inside is None and len(config.donors) == 1 and config.donors[0].donor == "."
    return "donor" if alone else "transplant", weights


def _model_weights(folder: Path, fields: Mapping[str, Any]) -> list[_Weight]:
    stored = open_recipient(str(folder.absolute()), None, fields.get("transformers_weights"), HubOptions())
    return [(tensor.info, tensor.part, tensor.origin) for tensor in stored.values()]


def _refuse_outside(folder: Path, referred: Path, what: str) -> None:
    """Refuse what only this machine can load.

    Raises:
        ConfigurationError: The reference leads out of the folder.
    """
    if not referred.resolve().is_relative_to(folder.resolve()):
        raise ConfigurationError(
            f"{folder / 'config.json'} names {what}, a folder on this machine that nobody else has. Push that first, "
            "then save this anew with its Hub id (save_pretrained(..., recipient='user/model'), or load it from there)."
        )


def _refuse_not_finite(weights: Iterable[_Weight]) -> None:
    found = list(weights)
    total = sum(size_of(info) for info, _, _ in found)
    with tqdm(total=total, desc="Checking", unit="B", unit_scale=True, disable=total < _PROGRESS_FROM) as bar:
        for info, part, origin in found:
            for piece in pieces(info, part):
                if not is_finite(piece):
                    raise CheckpointError(f"{origin} holds NaN or infinity; nothing was uploaded.")
                bar.update(piece.numel() * piece.element_size())


def _name_in_card(path: Path, repo_id: str) -> None:
    """Let the examples in a card of ours load the repository; a person's card stays as it is."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if not written_by_us(text):
        return
    card = ModelCard(text[: text.rindex(_SIGNED)])
    before = card.text
    card.text = _LOADED.sub(lambda found: f"{found[1]}{python_literal(repo_id)}", card.text)
    if card.text != before:
        with writing(path):
            path.write_text(str(signed(card)), encoding="utf-8")


push_artefact = push  # the old name, for one release
