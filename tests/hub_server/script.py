"""Short scripts against the test Hub, whose results come back as values."""

from __future__ import annotations

import textwrap
from typing import Any

from .client import json_result, run_with_hub
from .server import HubServer

__all__ = ["run_script"]

_PRELUDE = """
import json
from huggingface_hub import (
    CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
)
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

api = HfApi()

def outcome(call, *args, **kwargs):
    try:
        return call(*args, **kwargs)
    except HfHubHTTPError as error:
        return [type(error).__name__, error.response.status_code, str(error)]
    except LocalEntryNotFoundError as error:
        return [type(error).__name__, 0, str(error)]

def content(*args, **kwargs):
    with open(hf_hub_download(*args, **kwargs), "rb") as file:
        return file.read().decode("latin-1")

def finish(**values):
    print(json.dumps(values))
"""


def run_script(server: HubServer, code: str, **options: Any) -> Any:
    """Run a script like `run_with_hub`, with a few names defined; give back what it passed to `finish`.

    It finds the usual names of `huggingface_hub`, an `api` and three functions. `content(repo, path)`
    is a downloaded file as latin-1 text; `outcome(call, ...)` is what the call returns, or name, status and
    message of the client's error; `finish(name=value, ...)` ends it with values that fit into JSON.
    """
    return json_result(run_with_hub(server, _PRELUDE + textwrap.dedent(code), **options))
