"""A Hub for tests: enough of the public Hub's HTTP interface for the unmodified `huggingface_hub` client.

    with HubServer() as server:
        sha = server.add_repo("alice/tiny", {"config.json": b"{}"}, gated=True)
        run = run_with_hub(server, "from huggingface_hub import hf_hub_download; ...", token=BOB)
        assert not server.requests.downloads("*.safetensors")

Only the standard library is used. Models only: data sets, spaces, discussions and the Xet protocol are not
imitated.
"""

from __future__ import annotations

from .client import ENDPOINT, hub_environment, json_result, run_with_hub, start_session_server
from .faults import Fault
from .requestlog import RequestLog, RequestRecord
from .server import HubServer
from .users import ALICE, ALICE_READ_ONLY, BOB, EXPIRED

__all__ = [
    "ALICE",
    "ALICE_READ_ONLY",
    "BOB",
    "ENDPOINT",
    "EXPIRED",
    "Fault",
    "HubServer",
    "RequestLog",
    "RequestRecord",
    "hub_environment",
    "json_result",
    "run_with_hub",
    "start_session_server",
]
