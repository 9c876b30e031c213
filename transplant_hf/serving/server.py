"""`serve`: a model whose donors are chosen by each request, behind the API of OpenAI.

The server is that of `transformers serve`. Here its model manager gives out one model, which is loaded once. A request
runs with the donors that its `model` field names, in one batch with others where that is possible (`batches`).
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
import secrets
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState

from ..architecture import max_context_length
from ..config import DonorSpec
from ..display import position_text
from ..donor import Donor
from ..errors import ConfigurationError, TransplantError
from ..model.in_memory import transplant
from ..model.routing import AUTO
from .batches import Batches, Choice

# What answers `/v1/chat/completions`, `/v1/completions` and `/v1/responses`.
_SERVED = {
    "chat_handler": ChatCompletionHandler,
    "completion_handler": CompletionHandler,
    "response_handler": ResponseHandler,
}
_THREADS = 256  # given to requests in turn; a request waits for an earlier one in its thread
_STRENGTH = re.compile(r"[0-9]+(\.[0-9]*)?|\.[0-9]+")
# Fields that Transformers ignores, and the values that ask for nothing else than what is done.
_PLAIN_TEXT = {"type": "text"}
_KNOWN_VALUES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("n", "best_of"), (1,)),
    **dict.fromkeys(("presence_penalty", "top_logprobs"), (0,)),
    **dict.fromkeys(("logprobs", "echo", "background"), (False,)),
    **dict.fromkeys(("tool_choice", "function_call"), ("auto", "none")),
    **dict.fromkeys(("functions", "previous_response_id", "audio", "web_search_options"), ([],)),
    "response_format": (_PLAIN_TEXT,),
    "text": ({}, {"format": _PLAIN_TEXT}),
    "modalities": (["text"],),
}
_LARGEST = {"temperature": 100, "top_p": 1}  # from 0


def build_app(model: Any, tokenizer: Any, name: str, token: str | None = None) -> FastAPI:
    """Return the server of a loaded transplant.

    Requests call the model without its donors by its name. Those that add or remove donors need the token; without one
    they are refused.
    """
    models = DonorModels(model, tokenizer, name)
    state = Threads()
    # Each version of Transformers has handlers of its own for what generates no text.
    parameters = inspect.signature(build_server).parameters
    handlers: dict[str, Any] = {name: NotServed() for name in parameters if name.endswith("handler")}
    for handler, served in _SERVED.items():
        handlers[handler] = type(served.__name__, (Checked, served), {})(models, state)
    app = build_server(models, **handlers, generation_state=state)

    @app.exception_handler(TransplantError)
    @app.exception_handler(HTTPException)
    async def answer(_: Request, error: Exception) -> JSONResponse:
        status, message = (error.status_code, error.detail) if isinstance(error, HTTPException) else (400, str(error))
        return JSONResponse({"error": {"message": message, "code": status}}, status_code=status)

    if token is not None:
        _add_changes(app, models, token)
    return app


class DonorModels(ModelManager):
    """The recipient, by its name, and its donors as the models of a server."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        super().__init__(model_timeout=-1)
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        if not hasattr(model, "transplant_config"):
            raise ConfigurationError(
                f"{name} has no donors. Name one with --donor, or serve it with transformers serve."
            )
        for spec in self.donors:
            self.check_donor(str(spec.name), spec.mode)
        self.batches = Batches(self.model, GenerateManager().submit)

    @property
    def donors(self) -> list[DonorSpec]:
        """The donors that the model has now."""
        return list(self.model.transplant_config.donors)

    def check_donor(self, name: str, mode: str) -> None:
        """Refuse a donor that requests could not name, or could not leave out."""
        if name in (self.name, AUTO):
            raise ConfigurationError(
                f"a donor cannot be called {name!r} here: requests use that name for something else. Give the donor "
                "another name, or the model (--name)."
            )
        if mode == "replace":
            raise ConfigurationError(
                f"donor {name!r} replaces layers of the recipient, and a request without it could not run them. Serve "
                "a donor that is inserted, or export the transplant and serve the result."
            )

    def choice(self, model: str) -> Choice:
        """Return the donors that a request names, such as `law+code@0.5`; "auto" lets them choose themselves."""
        known = {str(spec.name): spec.strength for spec in self.donors}
        if model == self.name:
            return {}
        if model in known:  # names may have + and @ in them
            return {model: known[model]}
        if model == AUTO:
            return AUTO
        names, choice = ", ".join([self.name, *known]), dict[str, float]()
        for part in model.split("+"):
            donor, at, strength = part.rpartition("@")
            donor = donor if at else part
            if donor not in known or donor in choice or (at and not _STRENGTH.fullmatch(strength)):
                raise HTTPException(
                    404,
                    f"there is no model {model!r} here. Models are {names}; several donors are joined by "
                    f"+, @0.5 after one is its strength, and with {AUTO} they choose themselves.",
                )
            choice[donor] = float(strength) if at else known[donor]
            if at and choice[donor] > max(1.0, known[donor]):
                raise HTTPException(
                    400, f"{part!r}: in a request, a strength from 0 to 1 follows the @, not a position."
                )
        return choice

    def process_model_name(self, model_id: str) -> str:  # type: ignore[override]
        """Return a name as it is: revisions are those of the donors that were loaded."""
        return model_id

    def load_model_and_processor(
        self, model_id_and_revision: str, *args: Any, gguf_file: str | None = None, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Return the model as a request sees it, and the tokenizer."""
        name = model_id_and_revision if gguf_file is None else f"{model_id_and_revision}:{gguf_file}"
        with self.model.using(self.choice(name)):  # refuses what these donors cannot do
            return ChosenDonors(self, name), self.tokenizer

    async def load_model_streaming(
        self, model_id_and_revision: str, gguf_file: str | None = None
    ) -> AsyncIterator[str]:
        """Say that a model is ready, as `/load_model` does for one that is loaded."""
        self.load_model_and_processor(model_id_and_revision, gguf_file=gguf_file)
        yield f"data: {json.dumps({'status': 'ready', 'model': model_id_and_revision, 'cached': True})}\n\n"

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """List the recipient and the donors."""
        about = {self.name: "the model without donors"}
        for spec in self.donors:
            about[str(spec.name)] = f"donor at {position_text(spec.position)}, strength {spec.strength:g}"
        more = {"object": "model", "created": 0, "owned_by": "transplant_hf"}
        return [{"id": name, **more, "description": text} for name, text in about.items()]

    get_gen_models = list_models  # type: ignore[assignment]  # its name before Transformers 5.24

    def shutdown(self) -> None:
        """Keep the model: it is loaded as long as the server runs."""


class ChosenDonors:
    """A model that generates with the donors that a request names. Everything else is the model's own."""

    def __init__(self, models: DonorModels, name: str) -> None:
        self._models, self._name = models, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._models.model, name)

    def generate(self, **kwargs: Any) -> Any:
        """Generate with the chosen donors, at most as many tokens as the model can read."""
        length, limit = kwargs["input_ids"].shape[-1], max_context_length(self._models.model.config)
        if limit is not None:
            settings = kwargs["generation_config"]  # made for this request
            if length >= limit:
                raise ConfigurationError(f"the prompt has {length:,} tokens, and the model reads at most {limit:,}.")
            settings.max_new_tokens = min(settings.max_new_tokens or limit, limit - length)
        try:
            return self._models.batches.generate(self._models.choice(self._name), **kwargs)
        except ConfigurationError:
            self._models.choice(self._name)  # not found where a donor was removed while the request waited
            raise


class Threads(GenerationState):
    """The threads of requests, which wait there for the tokens of their row."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = itertools.cycle(range(_THREADS))

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        """Return what has a thread for the request, whatever its model is."""
        return super().get_manager(str(next(self._numbers)), use_cb)


class Checked:
    """Refuses requests that would end in an internal error, and fields that would be ignored."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a request."""
        if not isinstance(body.get("model"), str):
            raise HTTPException(400, 'name a model: {"model": ...}; /v1/models lists them.')
        if not any(body.get(name) for name in ("prompt", "messages", "input")):
            raise HTTPException(400, "there is no prompt.")
        for name, known in _KNOWN_VALUES.items():
            if body.get(name) not in (None, *known):
                raise HTTPException(400, f"{name}={body[name]!r} is not supported; leave it out.")
        for name, most in _LARGEST.items():
            if body.get(name) is not None and not (isinstance(body[name], int | float) and 0 <= body[name] <= most):
                raise HTTPException(400, f"{name} must be a number from 0 to {most}, got {body[name]!r}.")
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if body.get(name) is not None and not (isinstance(body[name], int) and body[name] > 0):
                raise HTTPException(400, f"{name} must be a number of tokens from 1, got {body[name]!r}.")
        try:
            return await super().handle_request(body, request_id)  # type: ignore[misc]
        except (ValueError, TypeError) as error:  # by Transformers: no chat template, a seed that is no number, ...
            raise HTTPException(400, str(error)) from error

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the settings of a request; Transformers keeps a greedy model greedy at any temperature."""
        settings = super()._build_generation_config(body, *args, **kwargs)  # type: ignore[misc]
        temperature, top_p, bias = (body.get(name) for name in ("temperature", "top_p", "logit_bias"))
        if temperature is not None:
            settings.do_sample = temperature > 0
        elif top_p is not None and top_p < 1:
            settings.do_sample = True
        if bias:  # which Transformers reads for chats alone
            settings.sequence_bias = {(int(token),): float(value) for token, value in bias.items()}
        return settings


class NotServed:
    """Answers requests that do not generate text."""

    async def handle_request(self, *args: Any) -> Any:
        """Refuse."""
        raise HTTPException(501, "this server has /v1/chat/completions, /v1/completions and /v1/responses.")


class AddedDonor(BaseModel):
    """The body of a request that adds a donor: the donor, its name in the model, and its strength."""

    donor: str
    name: str | None = None
    strength: float | None = None


def _add_changes(app: FastAPI, models: DonorModels, token: str) -> None:
    """Add the requests that change the donors of the model; they wait until others have ended."""
    bearer = HTTPBearer()

    def check(given: HTTPAuthorizationCredentials = Depends(bearer)) -> None:  # noqa: B008
        if not secrets.compare_digest(given.credentials.encode(), token.encode()):
            raise HTTPException(401, "this is not the token that the server was started with.")

    @app.post("/v1/donors", dependencies=[Depends(check)])
    def add(body: AddedDonor) -> JSONResponse:
        spec = DonorSpec.parse(body.donor)
        mode = Donor.from_pretrained(spec.donor).mode if spec.position is None else "insert"
        models.check_donor(body.name or str(spec.name), mode)
        transplant(models.model, spec.donor, spec.position, name=body.name, strength=body.strength, in_place=True)
        return JSONResponse({"object": "list", "data": models.list_models()})

    @app.delete("/v1/donors/{name}", dependencies=[Depends(check)])
    def remove(name: str) -> JSONResponse:
        if name not in [spec.name for spec in models.donors]:
            raise HTTPException(404, f"there is no donor {name!r} here; /v1/models lists them.")
        models.model.remove_donor(name)
        return JSONResponse({"object": "list", "data": models.list_models()})
