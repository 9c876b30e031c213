"""Upload a folder as one commit of the files that changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers.utils import logging

from .cards import CARD_FILE, written_by_us
from .errors import ConfigurationError, HubError
from .sources import LOG_IN, hub_errors
from .storage import files_in, sha256_of

logger = logging.get_logger(__name__)

# What the Hub answers when the branch has moved on since its files were read.
_MOVED_ON = (409, 412)


def check_can_push(repo_id: str, token: str | bool | None = None) -> None:
    """Check before a long run that its result can be pushed: somebody is logged in, and the Hub can be reached."""
    with hub_errors(repo_id):
        validate_repo_id(repo_id)
        try:
            HfApi(token=token).whoami()
        except LocalTokenNotFoundError as error:
            raise HubError(f"nothing can be pushed to {repo_id}: nobody is logged in: {LOG_IN}.") from error


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str,
    commit_description: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    replaced: Callable[[Sequence[str]], set[str]] = lambda names: set(),
    only: Collection[str] | None = None,
    kept: Callable[[Sequence[str], Callable[[str], Path]], Collection[str]] = lambda names, fetch: (),
) -> CommitInfo:
    """Upload a folder as one commit on top of the branch; files that the repository has already are not sent.

    Hidden files and folders are not uploaded. While large files are sent, huggingface_hub shows its progress bars.
    """
    files = _files_in(folder, only)
    api = HfApi(token=token)
    with hub_errors(repo_id, revision):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        found = api.model_info(repo_id, revision=revision, files_metadata=True)
        if private and not found.private:
            raise HubError(
                f"{repo_id} exists and is public: private=True (--private) cannot hide what is pushed to it. "
                "Make it private in its settings, or push to another name. Nothing was uploaded."
            )
        present = _files_of(found)
        if CARD_FILE in present and _keeps_its_card(api, repo_id, found):
            files.pop(CARD_FILE, None)
        stay = kept(list(present), lambda name: Path(api.hf_hub_download(repo_id, name, revision=found.sha)))
        behind = {name: path for name in stay if (path := files.pop(name, None)) is not None}
        if differing := sorted(name for name, path in behind.items() if not _is_same(path, present.get(name))):
            logger.warning(
                f"{repo_id} has a tokenizer or processor of its own, which is kept: {', '.join(differing)} not sent."
            )
        operations = _changes(files, present, replaced)
        if not operations:
            return _present(api, repo_id, found, commit_message)
        try:
            # The repository's own .gitignore must not leave the weights out of the commit.
            additions = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
            api.preupload_lfs_files(
                repo_id, additions, revision=revision, create_pr=create_pr, free_memory=False, gitignore_content=""
            )
            return api.create_commit(
                repo_id,
                operations,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=found.sha,
            )
        except HfHubHTTPError as error:
            if error.response.status_code not in _MOVED_ON:
                raise
            # The client repeats a request whose answer was lost: then what happened since is this very commit.
            now = api.model_info(repo_id, revision=revision, files_metadata=True)
            if not create_pr and not _changes(files, _files_of(now), replaced):
                return _present(api, repo_id, now, commit_message)
            raise HubError(
                f"{repo_id} was changed by someone else since this push began (it was at {found.sha}, now at "
                f"{now.sha}): nothing was committed. Look at what changed, and push again. ({error})"
            ) from error
        except RuntimeError as error:
            # The client's word for a large file that could not be sent.
            raise HubError(
                f"{repo_id}: {error} ({error.__cause__ or 'no further reason given'}). Nothing was committed; push "
                "again."
            ) from error


def _keeps_its_card(api: HfApi, repo_id: str, found: ModelInfo) -> bool:
    """Whether a person wrote or edited the README.md of a repository, so that it must stay."""
    path = api.hf_hub_download(repo_id, CARD_FILE, revision=found.sha)
    if written_by_us(Path(path).read_text(encoding="utf-8", errors="replace")):
        return False
    logger.warning(f"{CARD_FILE} of {repo_id} was not written by transplant_hf, or was edited since: it is kept.")
    return True


def _files_in(folder: Path, only: Collection[str] | None) -> dict[str, Path]:
    """The files below a folder that are meant, by their names in the repository; never hidden ones."""
    found = {}
    for name in sorted(files_in(folder)):
        path = folder / name
        # A link to a folder may lead to files that are meant.
        meant = only is None or name in only or (path.is_symlink() and any(one.startswith(f"{name}/") for one in only))
        hidden = any(part.startswith(".") for part in name.split("/"))
        if meant and not hidden and path.is_symlink():
            raise ConfigurationError(
                f"{path} is a link to {path.readlink()}; links are not uploaded. Put a copy of the file in its place, "
                "or remove it. Nothing was uploaded."
            )
        if meant and not hidden and path.is_file():
            found[name] = path
    return found


def _files_of(found: ModelInfo) -> dict[str, RepoSibling]:
    return {sibling.rfilename: sibling for sibling in found.siblings or ()}


def _changes(
    files: Mapping[str, Path], present: Mapping[str, RepoSibling], replaced: Callable[[Sequence[str]], set[str]]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What turns a repository's files into those of a folder, by their hashes."""
    gone = [CommitOperationDelete(name) for name in sorted(replaced(list(present)) - set(files))]
    changed = {name: path for name, path in files.items() if not _is_same(path, present.get(name))}
    return [*gone, *(CommitOperationAdd(name, str(path)) for name, path in changed.items())]


def _is_same(path: Path, sibling: RepoSibling | None) -> bool:
    """Whether a repository holds a file's bytes already; git knows small files by sha1, large ones by sha256."""
    size = path.stat().st_size
    if sibling is None or sibling.size != size:
        return False
    if sibling.lfs is not None:
        return sibling.lfs.sha256 == sha256_of(path)
    return sibling.blob_id == hashlib.sha1(b"blob %d\0" % size + path.read_bytes(), usedforsecurity=False).hexdigest()


def _present(api: HfApi, repo_id: str, found: ModelInfo, commit_message: str) -> CommitInfo:
    logger.info(f"{repo_id} holds all of this already, at {found.sha}; nothing was uploaded.")
    url = f"{api.endpoint}/{repo_id}/commit/{found.sha}"
    return CommitInfo(commit_url=url, commit_message=commit_message, commit_description="", oid=str(found.sha))
