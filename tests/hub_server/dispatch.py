"""From a request to its answer: faults, identification, the endpoint, and the record of it all."""

from __future__ import annotations

import time
from dataclasses import dataclass

from . import api_account, api_browse, api_commit, api_files, api_lfs, api_refs
from .errors import ApiError
from .faults import Fault, FaultBoard
from .messages import Request, Response, error_response
from .requestlog import RequestLog, RequestRecord
from .routing import Router
from .state import HubState

__all__ = ["Dispatcher", "Outcome"]


@dataclass
class Outcome:
    """What is to happen on the connection: an answer, or none, and the fault that spoils it."""

    response: Response | None
    record: RequestRecord
    fault: Fault | None = None


class Dispatcher:
    """Answers requests of both ports."""

    def __init__(self, state: HubState) -> None:
        self.state = state
        self.log = RequestLog()
        self.faults = FaultBoard()
        self._router = Router()
        for module in (api_account, api_browse, api_commit, api_files, api_lfs, api_refs):
            self._router.include(module.router)

    def answer(self, request: Request) -> Outcome:
        """Answer a request, as far as it can be done without the connection."""
        record = RequestRecord(
            origin=request.origin,
            method=request.method,
            path=request.path,
            query=request.query,
            range=request.headers.get("Range"),
            has_token=request.headers.get("Authorization") is not None,
        )
        self.log.add(record)
        fault = self.faults.take(request.method, request.path)
        if fault is not None:
            record.faulty = True
            time.sleep(fault.delay)
            if fault.drops_before:
                return Outcome(None, record, fault)
        response = self._respond(request, record, fault.error if fault else None)
        record.bytes_received = request.body.received
        if fault is not None and fault.drops_after:
            return Outcome(None, record, fault)
        record.status = response.status
        return Outcome(response, record, fault)

    def _respond(self, request: Request, record: RequestRecord, injected: ApiError | None) -> Response:
        try:
            if request.origin == "hub":
                request.caller = self.state.users.identify(request.headers.get("Authorization"))
                record.user = request.caller.name
            if injected is not None:
                raise injected
            endpoint = self._router.find(request)
            if endpoint is None:
                record.routed = False
                raise ApiError(404, f"The test Hub has no endpoint {request.method} {request.path}")
            handler, arguments = endpoint
            response = handler(self.state, request, **arguments)
        except ApiError as error:
            response = error_response(error)
        # Whatever nobody read would be taken for the next request on this connection.
        request.body.drain()
        return response
