"""Running the real client against the test Hub: a subprocess, or the test process itself.

`huggingface_hub` copies its settings into constants when it is imported: `HF_ENDPOINT`, `HF_HUB_OFFLINE`,
`HF_HOME` and `HF_HUB_DISABLE_XET` count only if they are set before that. Three ways follow from it:

* **A subprocess** (`run_with_hub`) is the default: every run gets its own endpoint, cache and offline switch,
  and the client is exactly what a user has.
* **The environment before the import** (`start_session_server`, called at the top of `tests/conftest.py`)
  also leaves the client untouched, and saves the seconds that importing `transformers` takes. One server and
  one cache serve the whole session: call `server.reset()` between tests and pass `cache_dir=`. `HF_TOKEN` is
  read at every call, so `monkeypatch.setenv("HF_TOKEN", ALICE)` works. Offline mode cannot be switched on
  later; `local_files_only=True` can.
* **`endpoint=`** alone, without the environment, reaches only part of the client: `HfApi(endpoint=...)`,
  `hf_hub_download` and `snapshot_download` take it, `from_pretrained` and `push_to_hub` of `transformers` do
  not. The frozen constants also decide which hosts may see the token and which address error messages name.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .server import HubServer

__all__ = ["ENDPOINT", "hub_environment", "json_result", "run_with_hub", "start_session_server"]

# A Hub to run some of the tests against instead, with the token in `HF_TOKEN`; see CONTRIBUTING.md.
ENDPOINT = os.environ.get("TRANSPLANT_HF_TEST_ENDPOINT")

# Settings of the person who runs the tests must not leak into them.
_FOREIGN_PREFIXES = (
    "HF_",
    "HUGGINGFACE_",
    "HUGGING_FACE_",
    "TRANSFORMERS_",
    "DISABLE_TELEMETRY",
    "DO_NOT_TRACK",
)
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")

_OWN = ("HF_TOKEN", "HF_HUB_DISABLE_XET", "TRANSPLANT_HF_TEST_ENDPOINT")

_session_server: HubServer | None = None


def hub_environment(
    server: HubServer,
    home: Path,
    *,
    token: str | None = None,
    offline: bool = False,
    base: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Environment in which the client talks to the test Hub and to nobody else.

    Args:
        server: The Hub.
        home: Folder for `HF_HOME`: cache and stored tokens.
        token: Token of the user to be; nobody by default.
        offline: Forbid the client all requests.
        base: Environment to start from; that of this process by default.
    """
    source = os.environ if base is None else base
    environment = {
        name: value
        for name, value in source.items()
        if not name.upper().startswith(_FOREIGN_PREFIXES) and name.lower() not in _PROXIES
    }
    environment |= {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        # With Xet the client needs a storage service of its own, which this server does not imitate.
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        # Otherwise transformers asks a public service to convert a repository that has only `.bin` weights.
        "DISABLE_SAFETENSORS_CONVERSION": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    if token is not None:
        environment["HF_TOKEN"] = token
    if offline:
        environment["HF_HUB_OFFLINE"] = "1"
    return environment


def run_with_hub(
    server: HubServer,
    code: str,
    *,
    token: str | None = None,
    cache: Path | None = None,
    offline: bool = False,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process whose `huggingface_hub` talks to the test Hub.

    Args:
        server: The Hub; it may have been stopped, to see what the client does then.
        code: The code; common indentation is taken off.
        token: Token of the user to be; nobody by default.
        cache: Folder for `HF_HOME`, to be used by several runs; by default one that is deleted afterwards.
        offline: Forbid the client all requests.
        env: Further variables.
        cwd: Folder to run in; a temporary one by default.
        timeout: Seconds after which the run is given up.

    Returns:
        The finished process, with its output as text. Success is for the caller to check; `json_result` does.
    """
    with tempfile.TemporaryDirectory(prefix="test-hub-run-") as folder:
        work = Path(folder, "work")
        work.mkdir()
        environment = hub_environment(server, cache or Path(folder, "home"), token=token, offline=offline)
        environment["PYTHONPATH"] = os.pathsep.join(_import_path())
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**environment, **(env or {})},
            cwd=cwd or work,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


def json_result(run: subprocess.CompletedProcess[str]) -> Any:
    """What a run printed on its last line, as JSON; a run that failed fails the test with its traceback."""
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stdout}\n{run.stderr}"
    return json.loads(run.stdout.splitlines()[-1])


def start_session_server(**options: int) -> HubServer:
    """Start one server for the whole session and point this process at it.

    Nothing happens unless this is called. Call it at the top of `tests/conftest.py`, above every import that
    could lead to `huggingface_hub`. A second call returns the same server.

    Args:
        options: Sizes, as for `HubServer`.

    Raises:
        RuntimeError: `huggingface_hub` was imported already and would go on talking to the public Hub.
    """
    global _session_server
    if _session_server is not None:
        return _session_server
    if "huggingface_hub.constants" in sys.modules:
        raise RuntimeError("Call start_session_server() before anything imports huggingface_hub")
    server = HubServer(**options).start()
    home = tempfile.TemporaryDirectory(prefix="test-hub-home-")
    environment = hub_environment(server, Path(home.name))
    if ENDPOINT:
        # The network, the token and Xet are then the person's own; the cache is not.
        del environment["HF_HUB_DISABLE_XET"]
        own = {name: os.environ[name] for name in (*_OWN, *_PROXIES, *map(str.upper, _PROXIES)) if name in os.environ}
        environment = {**environment, **own, "HF_ENDPOINT": ENDPOINT}
    # Assigning one by one, rather than clearing first, never leaves the process without a PATH.
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)
    # Functions registered last run first: the server goes before the folder its clients write to.
    atexit.register(home.cleanup)
    atexit.register(server.stop)
    _session_server = server
    return server


def _import_path() -> list[str]:
    """Where this process finds the code under test, for a process that starts elsewhere."""
    # What the interpreter finds by itself must not move to the front, where it would hide other things.
    own = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    found = [Path(entry).resolve() for entry in sys.path if not entry.endswith(".zip")]
    return [str(entry) for entry in found if not any(entry.is_relative_to(path) for path in own)]
