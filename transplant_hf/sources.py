"""What a name refers to: a folder, or a repository at a commit. Downloads only the files that are needed."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypedDict, cast

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

LOG_IN = "log in with `hf auth login`, set HF_TOKEN, or pass token="
# What the client's HTTP library raises without a response: no connection, or a broken one. Which library it is depends
# on the client's version.
_HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])


class _Bar(tqdm):
    """The client's progress bar, shown after one second: the client also shows one if nothing is downloaded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._shown_from = time.monotonic() + (delay := kwargs.pop("delay", 1.0))
        super().__init__(*args, delay=delay, **kwargs)

    def display(self, *args: Any, **kwargs: Any) -> Any:
        """Draw the bar."""
        if (self.n or self.total) and time.monotonic() >= self._shown_from:
            return super().display(*args, **kwargs)
        return None


class HubArguments(TypedDict, total=False):
    """Keyword arguments of every function that reads from the Hub; they mean what they mean in `from_pretrained`."""

    token: str | bool | None
    cache_dir: str | None
    local_files_only: bool
    force_download: bool


@dataclasses.dataclass(frozen=True)
class HubOptions:
    """How to reach the Hub: `HubArguments` with their defaults."""

    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    force_download: bool = False

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> HubOptions:
        """Pick the fields out of the keyword arguments of a `from_pretrained` call."""
        return cls(**{name: kwargs[name] for name in vars(cls()) if kwargs.get(name) is not None})

    def as_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of huggingface_hub's download functions."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder of files, and where they came from."""

    reference: str  # what the user wrote: a Hub id or a folder
    folder: Path
    revision: str | None = None  # the commit; `None` for a plain folder
    subfolder: str | None = None

    @property
    def from_hub(self) -> bool:
        """Whether the files came from a repository."""
        return self.revision is not None

    def __str__(self) -> str:
        return at_revision(self.reference, self.revision)


def locate(
    reference: str,
    *,
    files: Sequence[str],
    revision: str | None = None,
    subfolder: str | None = None,
    relative_to: Source | None = None,
    hub: HubOptions | None = None,
) -> Source:
    """Find the folder or repository of a name, and download the given files of a repository."""
    hub = hub or HubOptions()
    folder = points_to_folder(reference, relative_to, revision)
    if folder is not None:
        if relative_to is not None and relative_to.from_hub:
            # A folder of the same repository, whose files may not have been downloaded yet.
            parts = [relative_to.subfolder, os.path.relpath(folder, relative_to.folder.resolve()), subfolder]
            inner = os.path.normpath(os.path.join(*filter(None, parts)))
            pinned, inside = relative_to.revision, None if inner == "." else inner
            return locate(relative_to.reference, files=files, revision=pinned, subfolder=inside, hub=hub)
        if folder.is_file():
            hint = " Make a donor of it first: transplant-hf convert FILE OUTPUT --recipient RECIPIENT."
            hint = hint if folder.suffix in (".pt", ".pth", ".bin") else ""
            raise ConfigurationError(f"{reference!r} is a file; name a folder or a Hub id.{hint}")
        if not folder.is_dir():
            raise ConfigurationError(f"{reference!r} is neither a folder (looked for {folder}) nor a Hub id.")
        return Source(str(folder) if reference == "." else reference, _inside(folder, subfolder), subfolder=subfolder)
    patterns = [f"{subfolder}/{name}" for name in files] if subfolder else list(files)
    snapshot = _download(reference, revision, hub, patterns)
    source = Source(reference, _inside(snapshot, subfolder), snapshot.name, subfolder)
    offline = hub.local_files_only or constants.HF_HUB_OFFLINE
    if offline and "*" not in files[0] and not (source.folder / files[0]).exists():
        # Offline, the client takes the files in the cache for the whole repository.
        raise HubError(
            f"{files[0]} of {source} is not in the local cache, and the Hub cannot be asked: offline mode or "
            "local_files_only. Load it once with a connection."
        )
    return source


def _download(
    reference: str, revision: str | None, hub: HubOptions, patterns: Sequence[str], ignore: list[str] | None = None
) -> Path:
    """Download the files of a repository that match, and return the folder of its commit in the cache."""
    with _cache_errors(reference, revision, hub), hub_errors(reference, revision, or_folder=revision is None):
        which: dict[str, Any] = {"allow_patterns": list(patterns), "ignore_patterns": ignore}
        return Path(snapshot_download(reference, revision=revision, tqdm_class=_Bar, **which, **hub.as_kwargs()))


def commit_of(reference: str, revision: str | None, hub: HubOptions, file: str | None = None) -> str:
    """Return the commit of a branch or tag of a repository, by downloading a file that the repository has."""
    file = file or "config.json"
    with _cache_errors(reference, revision, hub), hub_errors(reference, revision, or_folder=revision is None):
        path = hf_hub_download(reference, file, revision=revision, **hub.as_kwargs())
    return Path(path).parents[file.count("/")].name


def for_transformers(
    reference: str, revision: str | None, hub: HubOptions, *, weights: bool, file: str | None = None
) -> str:
    """Return the name or folder that Transformers must load, so that it reads the repository that is meant.

    Transformers prefers a folder in the working directory to the repository of that name, even if a revision is given.
    If there is such a folder, the repository is downloaded first, and its folder in the cache is returned.
    """
    if revision is None or not os.path.exists(reference):
        return reference
    whole = weights and file is None
    needed = ["*.json", "*.py", *(["*.safetensors"] if whole else []), *([file] if file else [])]
    ignore = None if file else ["*/*"]  # folders of other formats, which can be large
    folder = _download(reference, revision, hub, needed, ignore)
    if whole and not any(folder.glob("*.safetensors")):
        _download(reference, revision, hub, ["*.bin"], ignore)
    return str(folder)


def revision_for(reference: str, revision: str | None) -> str | None:
    """Return the `revision` of a call like `from_pretrained`; `None` if it is "main" and the name is that of a folder.

    "main" is the default of Transformers, which tools pass on. Any other revision means a repository.
    """
    return None if revision == "main" and points_to_folder(reference) is not None else revision


def points_to_folder(reference: str, relative_to: Source | None = None, revision: str | None = None) -> Path | None:
    """Return the folder of a reference, or `None` for a Hub id.

    A relative reference is looked up beside the `config.json` that contains it, then in the working directory. A
    repository on the Hub may only refer to its own folders. A name with a revision is a Hub id: a folder of the same
    name must not replace what was pinned.
    """
    path = Path(reference).expanduser()
    looks_local = path.is_absolute() or reference.startswith((".", "~")) or reference.count("/") > 1
    if revision is not None and looks_local:
        where = f", in the config.json of {relative_to}" if relative_to is not None else ""
        raise ConfigurationError(
            f"{reference!r} is a folder and has no revisions, but revision {revision!r} is given{where}. Leave it out, "
            "or name the repository on the Hub."
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
    """Turn the errors of Transformers about files that it cannot find or read into errors of this package."""
    try:
        with _cache_errors(reference, revision, HubOptions()):
            yield
    except (OSError, _HTTP_ERROR) as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, (_HTTP_ERROR, LocalEntryNotFoundError, OfflineModeIsEnabled)):
                with hub_errors(reference, revision):
                    raise cause from error
            cause = cause.__cause__ or cause.__context__
        raise CheckpointError(f"cannot read {what} of {at_revision(reference, revision)}: {error}") from error


@contextmanager
def _cache_errors(reference: str, revision: str | None, hub: HubOptions) -> Iterator[None]:
    """Turn the errors of writing into the local cache into errors of this package."""
    where = at_revision(reference, revision)
    try:
        with writing(hub.cache_dir or constants.HF_HUB_CACHE, f"Only complete files of {where} were kept."):
            yield
    except ValueError as error:
        if "Invalid filename" in str(error):  # the client's words for a name that leads out of the cache
            raise CheckpointError(f"{where} is refused, that file was not written: {error}") from error
        raise


@contextmanager
def hub_errors(reference: str, revision: str | None = None, or_folder: bool = False) -> Iterator[None]:
    """Turn an error of the Hub client into one that says what to do; the client's error is the `__cause__`."""
    try:
        yield
    except HFValidationError as error:
        hint = " A donor's position goes with donors= (--donor DONOR@POSITION)." if "@" in reference else ""
        raise ConfigurationError(f"{reference!r} is neither a folder nor a Hub id: {error}{hint}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, _HTTP_ERROR, ConnectionError) as error:
        missing = isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError))
        no_folder = or_folder and missing and not isinstance(error, GatedRepoError)
        start = f"there is no folder {reference!r} here, and " if no_folder else ""
        raise HubError(f"{start}{_hub_message(reference, revision, error)}") from error


def _hub_message(reference: str, revision: str | None, error: Exception) -> str:
    where = at_revision(reference, revision)
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        if isinstance(error.__cause__, HfHubHTTPError):
            return f"{_hub_message(reference, revision, error.__cause__)} It is not in the local cache either."
        # A subclass means that some files are there, and its message says which are missing.
        partly = isinstance(error, LocalEntryNotFoundError) and type(error) is not LocalEntryNotFoundError
        return (
            f"{where} is {'only partly' if partly else 'not'} in the local cache, and the Hub cannot be asked: offline "
            "mode, local_files_only or no connection. Load it once with a connection." + (f" {error}" if partly else "")
        )
    if isinstance(error, GatedRepoError):
        return f"{where} is gated. Ask for access on its page, then {LOG_IN}."
    if isinstance(error, RepositoryNotFoundError):
        return f"{where} was not found, or is private. Check the name; for a private one {LOG_IN}."
    if isinstance(error, RevisionNotFoundError):
        return f"{reference} has no revision {revision!r}."
    if not isinstance(error, HfHubHTTPError):
        return f"the Hub cannot be reached for {where}: {error!r}. Check the connection, and try again."
    status, advice = error.response.status_code, ""
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        advice = f" Try again in {error.response.headers.get('Retry-After') or 'some'} seconds."
    elif status == HTTPStatus.UNAUTHORIZED:
        advice = f" The token is not valid or has expired: {LOG_IN}."
    elif status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        advice = " Try again later."
    return f"the Hub returned an error ({status}) for {where}.{advice} {error}"


def at_revision(reference: str, revision: str | None) -> str:
    """Return a name with its revision, if it has one."""
    return f"{reference}@{revision}" if revision else reference
