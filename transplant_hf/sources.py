"""What a name refers to: a folder, or a repository at a commit. Downloads the few files that are asked for."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from .errors import CheckpointError, ConfigurationError, HubError
from .storage import writing

# What the client's HTTP library raises without an answer: no connection, or one that broke. Which library it is
# depends on the client's version.
_HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])

__all__ = [
    "HubOptions",
    "Source",
    "commit_of",
    "for_transformers",
    "hub_errors",
    "locate",
    "points_to_folder",
    "reading",
    "revision_for",
]


class _Bar(tqdm):
    """The client's progress bar, for downloads that take a while: it also shows one where nothing was to be done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._shown_from = time.monotonic() + (delay := kwargs.pop("delay", 1.0))
        super().__init__(*args, delay=delay, **kwargs)

    def display(self, *args: Any, **kwargs: Any) -> Any:
        """Draw the bar."""
        if (self.n or self.total) and time.monotonic() >= self._shown_from:
            return super().display(*args, **kwargs)
        return None


@dataclasses.dataclass(frozen=True)
class HubOptions:
    """How to reach the Hub; the fields mean what they mean in `from_pretrained`."""

    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    force_download: bool = False

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> HubOptions:
        """Pick the fields out of the keyword arguments of a `from_pretrained` call."""
        named = {
            field.name: kwargs[field.name] for field in dataclasses.fields(cls) if kwargs.get(field.name) is not None
        }
        return cls(**named)

    def as_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of huggingface_hub's download functions."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder of files, and where they came from.

    Args:
        reference: What the user wrote: a Hub id or a folder.
        folder: Where the files are now.
        revision: The commit; `None` for a plain folder.
        subfolder: The folder inside the repository that is meant.
    """

    reference: str
    folder: Path
    revision: str | None = None
    subfolder: str | None = None

    @property
    def from_hub(self) -> bool:
        """Whether the files came from a repository."""
        return self.revision is not None

    def __str__(self) -> str:
        return f"{self.reference}@{self.revision}" if self.revision else str(self.reference)


def locate(
    reference: str,
    *,
    files: Sequence[str],
    revision: str | None = None,
    subfolder: str | None = None,
    relative_to: Source | None = None,
    hub: HubOptions | None = None,
) -> Source:
    """Find what a reference names and have the given files at hand.

    Args:
        reference: Hub id, folder, or "." for `relative_to` itself.
        files: Names or patterns of the files that are needed; only these are downloaded. The first one, if a name,
            must be in the cache when the Hub cannot be asked.
        revision: Branch, tag or commit. With one, a name is never that of a folder in the working directory.
        subfolder: A folder inside it.
        relative_to: What holds the `config.json` in which the reference stands.
        hub: How to reach the Hub.

    Returns:
        The folder with the files, and the commit it shows.

    Raises:
        ConfigurationError: Not a Hub id, no such folder, a folder with a revision, or a repository that points out of
            itself.
        HubError: Missing, gated, private or out of reach.
    """
    hub = hub or HubOptions()
    folder = points_to_folder(reference, relative_to, revision)
    if folder is not None:
        remote = relative_to is not None and relative_to.from_hub
        if folder.is_file() and not remote:
            hint = " Make a donor of it first: transplant-hf convert FILE OUTPUT --recipient RECIPIENT."
            hint = hint if folder.suffix in (".pt", ".pth", ".bin") else ""
            raise ConfigurationError(f"{reference!r} is a file, and a folder or a Hub id is needed.{hint}")
        if not folder.is_dir() and not remote:
            raise ConfigurationError(f"{reference!r} is neither a folder (looked for {folder}) nor a Hub id.")
        if relative_to is not None and remote:
            # A part of the repository that refers to it: these files may not have been asked for yet.
            parts = [relative_to.subfolder, os.path.relpath(folder, relative_to.folder.resolve()), subfolder]
            inner = os.path.normpath(os.path.join(*filter(None, parts)))
            return locate(
                relative_to.reference,
                files=files,
                revision=relative_to.revision,
                subfolder=None if inner == "." else inner,
                hub=hub,
            )
        return Source(str(folder) if reference == "." else reference, _inside(folder, subfolder), subfolder=subfolder)
    patterns = [f"{subfolder}/{name}" for name in files] if subfolder else list(files)
    with _downloading(reference, revision, hub):
        snapshot = snapshot_download(
            reference, revision=revision, allow_patterns=patterns, tqdm_class=_Bar, **hub.as_kwargs()
        )
    source = Source(reference, _inside(Path(snapshot), subfolder), Path(snapshot).name, subfolder)
    offline = hub.local_files_only or constants.HF_HUB_OFFLINE
    if offline and "*" not in files[0] and not (source.folder / files[0]).exists():
        # Without the repository's listing the client takes what is there for all.
        raise HubError(
            f"{files[0]} of {source} is not in the local cache and the Hub cannot be asked: offline mode or "
            "local_files_only. Load it once with a connection."
        )
    return source


def commit_of(reference: str, revision: str | None, hub: HubOptions, file: str | None = None) -> str:
    """Return the commit that a branch, tag or commit of a repository stands for, by a file that it has."""
    file = file or "config.json"
    with _downloading(reference, revision, hub):
        path = hf_hub_download(reference, file, revision=revision, **hub.as_kwargs())
    return Path(path).parents[file.count("/")].name


def for_transformers(
    reference: str, revision: str | None, hub: HubOptions, *, weights: bool, file: str | None = None
) -> str:
    """Return what Transformers must be given, so that it loads what this package means.

    Transformers takes a folder in the working directory before the repository of that name, whatever the revision.
    Where there is one, the repository's files are downloaded first, and their folder is returned instead of the name.

    Args:
        reference: Hub id or folder, as `locate` found it.
        revision: The commit; `None` for a folder.
        hub: How to reach the Hub.
        weights: Whether the weights are going to be read.
        file: A file that is also needed, such as the `gguf_file` of `from_pretrained`.

    Raises:
        HubError: Out of reach.
    """
    if revision is None or not os.path.exists(reference):
        return reference
    wanted = ["*.json", "*.py", *(["*.safetensors"] if weights and file is None else []), *([file] if file else [])]
    with _downloading(reference, revision, hub):

        def snapshot(patterns: Sequence[str]) -> Path:
            beside = None if file else ["*/*"]  # folders of other formats, which can be large
            found = snapshot_download(
                reference,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=beside,
                tqdm_class=_Bar,
                **hub.as_kwargs(),
            )
            return Path(found)

        folder = snapshot(wanted)
        if weights and file is None and not any(folder.glob("*.safetensors")):
            snapshot(["*.bin"])
    return str(folder)


def revision_for(reference: str, revision: str | None) -> str | None:
    """Return what `revision` says in a call like `from_pretrained`, for a name that a user typed.

    "main" is what Transformers assumes where nothing is said, and what tools pass on by default. So it says nothing of
    a folder, while any other revision cannot mean one.
    """
    return None if revision == "main" and points_to_folder(reference) is not None else revision


def points_to_folder(reference: str, relative_to: Source | None = None, revision: str | None = None) -> Path | None:
    """Return the folder a reference means, or `None` when it is a Hub id.

    Relative references mean folders beside the `config.json` in which they stand, then in the working directory. A
    repository from the Hub may only point into itself. A name with a revision is a Hub id: what was pinned must not
    be replaced by a folder that happens to have that name.

    Raises:
        ConfigurationError: A path with a revision, or a repository that points out of itself.
    """
    path = Path(reference).expanduser()
    looks_local = path.is_absolute() or reference.startswith((".", "~")) or reference.count("/") > 1
    if revision is not None and looks_local:
        where = f", in the config.json of {relative_to}" if relative_to is not None else ""
        raise ConfigurationError(
            f"{reference!r} is a folder, which has no revisions, but revision {revision!r} is asked for{where}. Leave "
            "the revision out, or name the repository on the Hub."
        )
    if relative_to is not None:
        base = relative_to.folder.resolve()
        beside = (base / path).resolve()
        if relative_to.from_hub:
            # Files in a snapshot are links into the cache, but folders are not: resolve() keeps them inside.
            inside = len(Path(relative_to.subfolder or "").parts)
            if looks_local and not beside.is_relative_to(base.parents[inside - 1] if inside else base):
                raise ConfigurationError(
                    f"{relative_to} refers to {reference!r}, a folder outside that repository. A repository may "
                    "only name Hub ids and its own folders."
                )
            return beside if looks_local else None
        if looks_local or (revision is None and beside.is_dir()):
            return beside
    return path if looks_local or (revision is None and path.is_dir()) else None


def _inside(folder: Path, subfolder: str | None) -> Path:
    if not subfolder:
        return folder
    inside = (folder / subfolder).resolve()
    if not inside.is_relative_to(folder.resolve()):
        raise ConfigurationError(f"subfolder {subfolder!r} leads out of {folder}.")
    return inside


@contextmanager
def reading(what: str, reference: str, revision: str | None = None) -> Iterator[None]:
    """Turn what Transformers raises for files it cannot find or read into one sentence.

    Args:
        what: What is being read, for the message.
        reference: The Hub id or folder.
        revision: Its revision.
    """
    where = f"{reference}@{revision}" if revision else reference
    try:
        with writing(constants.HF_HUB_CACHE, _kept(where)):
            yield
    except (OSError, _HTTP_ERROR) as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, (_HTTP_ERROR, LocalEntryNotFoundError, OfflineModeIsEnabled)):
                with hub_errors(reference, revision):
                    raise cause from error
            cause = cause.__cause__ or cause.__context__
        raise CheckpointError(f"{what} of {where} could not be read: {error}") from error
    except ValueError as error:
        _refuse_if_hostile(where, error)
        raise


@contextmanager
def _downloading(reference: str, revision: str | None, hub: HubOptions) -> Iterator[None]:
    """Like `hub_errors`, for what is written into the local cache."""
    where = f"{reference}@{revision}" if revision else reference
    try:
        cache = hub.cache_dir or constants.HF_HUB_CACHE
        with hub_errors(reference, revision, or_folder=revision is None), writing(cache, _kept(where)):
            yield
    except ValueError as error:
        _refuse_if_hostile(where, error)
        raise


def _kept(where: str) -> str:
    return f"Of {where} nothing is kept but files that arrived whole."


def _refuse_if_hostile(where: str, error: ValueError) -> None:
    if "Invalid filename" in str(error):  # the client's words for a name that leads out of the cache
        raise CheckpointError(f"{where} is refused, nothing of that file was written: {error}") from error


@contextmanager
def hub_errors(reference: str, revision: str | None = None, or_folder: bool = False) -> Iterator[None]:
    """Turn what the Hub client raises into one sentence that says what to do; the original is the `__cause__`.

    Args:
        reference: The repository.
        revision: Its revision.
        or_folder: Whether a folder could have been meant, which was looked for first.
    """
    where = f"{reference}@{revision}" if revision else reference
    no_folder = f"there is no folder {reference!r} here, and on the Hub " if or_folder else ""
    try:
        yield
    except HFValidationError as error:
        raise ConfigurationError(f"{reference!r} is neither a folder nor a Hub id: {error}") from error
    except GatedRepoError as error:
        raise HubError(
            f"{where} is gated: ask for access on its page, then log in with `hf auth login` or pass token=."
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{no_folder}{where} was not found, or is private. Check the name; for a private one log in or pass token=."
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{reference} has no revision {revision!r}.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if isinstance(error.__cause__, HfHubHTTPError):
            raise HubError(f"{_refusal(where, error.__cause__)} It is not in the local cache either.") from error
        # Of its kinds, the one that says more: some files are there.
        partly = isinstance(error, LocalEntryNotFoundError) and type(error) is not LocalEntryNotFoundError
        found = f"{where} is only partly" if partly else f"{no_folder.removesuffix('on the Hub ')}{where} is not"
        raise HubError(
            f"{found} in the local cache and the Hub cannot be asked: offline mode, local_files_only or no connection."
            f"{f' Load it once with a connection. {error}' if partly else ''}"
        ) from error
    except HfHubHTTPError as error:
        raise HubError(_refusal(where, error)) from error
    except (_HTTP_ERROR, ConnectionError) as error:
        raise HubError(
            f"the Hub cannot be reached for {where}, or the connection broke: {error!r}. Check the connection, and try "
            "again."
        ) from error


def _refusal(where: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        wait = error.response.headers.get("Retry-After")
        return f"the Hub refused {where}: too many requests (429). Try again in {wait or 'some'} seconds."
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return f"the Hub is in trouble and did not serve {where} ({status}). Try again later. {error}"
    if status == HTTPStatus.UNAUTHORIZED:
        return (
            f"the Hub refused {where} (401): the token is not valid, or has expired. Log in anew with `hf auth login`, "
            f"or pass another token=. {error}"
        )
    return f"the Hub refused {where}: {error}"
