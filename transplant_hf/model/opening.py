"""Load any model by its name: a plain one, a transplant, or a donor in its recipient."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from ..config import TransplantConfig
from ..sources import HubOptions, commit_of, points_to_folder, reading

__all__ = ["load_model", "pinned_commit"]


def load_model(
    reference: str | os.PathLike[str], *, revision: str | None = None, keep_replaced: bool = False, **kwargs: Any
) -> Any:
    """Load a causal language model, whatever kind of repository it is in.

    Args:
        reference: Hub id or folder: of a model, a transplant or a donor.
        revision: Its branch, tag or commit.
        keep_replaced: Keep recipient layers that donors replace, where there are any.
        **kwargs: As in `AutoModelForCausalLM.from_pretrained`.

    Returns:
        The model; a transplanted one where the repository holds donors.

    Raises:
        TransplantError: Out of reach, or something does not fit.
    """
    name = os.fspath(reference)
    hub = {key: kwargs[key] for key in ("token", "cache_dir", "local_files_only", "trust_remote_code") if key in kwargs}
    with reading("the model", name, revision):
        config = AutoConfig.from_pretrained(name, revision=revision or "main", **hub)
        if keep_replaced and isinstance(config, TransplantConfig):
            kwargs["keep_replaced"] = True
        return AutoModelForCausalLM.from_pretrained(name, revision=revision or "main", **kwargs)


def pinned_commit(reference: str, revision: str | None, kwargs: Mapping[str, Any]) -> str | None:
    """Return the commit that a model on the Hub is at; `None` for a folder.

    Transformers forgets it once a model is loaded.

    Args:
        reference: Hub id or folder.
        revision: Branch, tag or commit.
        kwargs: Of `from_pretrained`, for how to reach the Hub.

    Raises:
        HubError: Out of reach.
    """
    if points_to_folder(reference) is not None or Path(reference).expanduser().is_dir():
        return None
    return commit_of(reference, revision, HubOptions.from_kwargs(kwargs))
