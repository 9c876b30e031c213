"""`transplant-hf serve`, with the client of OpenAI: every request runs with the donors that it names."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import copied, edit_json, plain, refused
from transplant_hf import AutoModelWithTransplant, ConfigurationError, Donor, sign, transplant
from transplant_hf.cli import main
from transplant_hf.model.load_any_model import load_tokenizer
from transplant_hf.sources import HubOptions

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
server = pytest.importorskip("transplant_hf.serving.server", exc_type=ImportError)

TOKEN = "a token of the test"
CONTENT = {"Content-Type": "application/json"}
PROMPT = "The court held that"


@pytest.fixture(scope="module")
def family(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copied(tiny_llama, tmp_path_factory.mktemp("serving") / "family")
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    edit_json(folder / "recipient" / "tokenizer_config.json", chat_template=template)
    source = plain(folder / "source")
    for number, name in enumerate(("law", "code")):
        donor = Donor.from_model(source, [number, number + 1], name=name)
        donor.save_pretrained(folder / name, position=2 + number, recipient=str(folder / "recipient"))
    return folder


@pytest.fixture(scope="module")
def model(family: Path) -> Any:
    return AutoModelWithTransplant.from_pretrained(
        family / "recipient", donors=[str(family / "law"), str(family / "code")]
    ).eval()


@pytest.fixture(scope="module")
def tokenizer(family: Path) -> Any:
    return load_tokenizer(str(family / "recipient"), None, HubOptions())


@pytest.fixture(scope="module")
def address(model: Any, tokenizer: Any) -> Iterator[str]:
    with Running(server.build_app(model, tokenizer, "recipient", TOKEN)) as address:
        yield address


class Running:
    """A server on loopback, inside a `with` block."""

    def __init__(self, app: Any) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))

    def __enter__(self) -> str:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def __exit__(self, *error: object) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture
def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def completed(client: Any, model: str, prompt: str = PROMPT, **options: Any) -> str:
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=6, temperature=0.0, **options)
    text = "".join(part.choices[0].text for part in answer) if options.get("stream") else answer.choices[0].text
    return text.rstrip("\ufffd")  # a stream leaves out a character that is not complete


@pytest.fixture(scope="module")
def expected(model: Any, tokenizer: Any) -> Callable[..., str]:
    """What one thread writes."""
    kept: dict[Any, str] = {}

    def write(donors: dict[str, float], prompt: str = PROMPT) -> str:
        key = (tuple(donors.items()), prompt)
        if key not in kept:
            inputs = tokenizer(prompt, return_tensors="pt")
            with model.using(donors):
                ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
            text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            kept[key] = text.rstrip("\ufffd")
        return kept[key]

    return write


CHOICES = {
    "recipient": {},
    "law": {"law": 1.0},
    "code": {"code": 1.0},
    "law+code": {"law": 1.0, "code": 1.0},
    "law@0.5": {"law": 0.5},
    "code@0.25+law": {"code": 0.25, "law": 1.0},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", CHOICES)
def test_a_request_runs_with_the_donors_that_it_names(client: Any, expected: Any, name: str, stream: bool) -> None:
    assert len({expected(donors) for donors in CHOICES.values()}) > 3
    assert completed(client, name, stream=stream) == expected(CHOICES[name])


def test_a_chat(client: Any, expected: Any) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    answer = client.chat.completions.create(model="law", messages=messages, max_tokens=6, temperature=0.0)
    assert answer.model == "law"
    assert answer.choices[0].message.content.rstrip("\ufffd") == expected({"law": 1.0}, f"<{PROMPT}>")


def test_the_models_are_listed(client: Any) -> None:
    listed = {one.id: one.description for one in client.models.list()}
    assert list(listed) == ["recipient", "law", "code"]
    assert listed["code"] == "donor at position 3, strength 1"


@pytest.mark.parametrize("name", ["art", "law+art", "law@much", "law@", "law@1_0", "law@ 1", "law+law@0.5"])
def test_an_unknown_donor_is_not_found(client: Any, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        completed(client, name)
    assert "recipient, law, code" in str(error.value)


@pytest.mark.parametrize("name", ["law@8", "code+law@1.5"])
def test_a_position_is_no_strength(client: Any, name: str) -> None:
    with pytest.raises(openai.BadRequestError, match="not a position"):
        completed(client, name)


@pytest.mark.parametrize(
    ("fields", "fact"),
    [
        ({"model": None}, "name a model"),
        ({"prompt": ""}, "no prompt"),
        ({"max_tokens": 0}, "from 1, got 0"),
        ({"max_tokens": "x"}, "got 'x'"),
        ({"n": 2}, "n=2 is not supported"),
        ({"logprobs": 3}, "logprobs=3"),
        ({"seed": "x"}, "seed|int|str"),
        ({"temperature": -1}, "from 0 to 100, got -1"),
        ({"top_p": 5}, "from 0 to 1, got 5"),
        ({"prompt": "x" * 100}, "100 tokens, and the model reads at most"),
        ({"messages": [{"role": "user", "content": 5}]}, "."),
    ],
)
def test_bad_requests_are_refused(address: str, fields: dict[str, Any], fact: str) -> None:
    body = {"model": "law", "prompt": PROMPT, "max_tokens": 4, **fields}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), CONTENT)
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    assert error.value.code in (400, 422)
    assert re.search(fact, error.value.read().decode())


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("chat/completions", {"tool_choice": "required"}),
        ("responses", {"previous_response_id": "resp_1"}),
        ("responses", {"text": {"format": {"type": "json_object"}}}),
    ],
)
def test_fields_that_would_be_ignored_are_refused(client: Any, path: str, fields: dict[str, Any]) -> None:
    words = {"input": PROMPT} if path == "responses" else {"messages": [{"role": "user", "content": PROMPT}]}
    with pytest.raises(openai.BadRequestError, match=f"{next(iter(fields))}=.* is not supported"):
        client.post(f"/{path}", body={"model": "law", **words, **fields}, cast_to=object)


def test_a_temperature_samples_where_the_model_does_not(client: Any, expected: Any, model: Any) -> None:
    assert not model.generation_config.do_sample
    for options in ({"temperature": 2.0}, {"top_p": 0.99}):
        found = {completed_with(client, seed=seed, **options) for seed in range(4)}
        assert found != {expected({"law": 1.0})}


def test_a_bias_on_a_token(client: Any, tokenizer: Any) -> None:
    (wanted,) = tokenizer("q")["input_ids"]
    assert completed_with(client, temperature=0.0, logit_bias={str(wanted): 100}) == "qqqqqq"


def completed_with(client: Any, **options: Any) -> str:
    text: str = client.completions.create(model="law", prompt=PROMPT, max_tokens=6, **options).choices[0].text
    return text


def test_as_many_tokens_as_the_model_reads(client: Any) -> None:
    answer = client.completions.create(model="law", prompt="x" * 60, max_tokens=500, temperature=0.0)
    assert answer.usage.total_tokens <= 64


def test_donors_without_a_signature_cannot_choose_themselves(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="transplant-hf sign"):
        completed(client, "auto")


def test_donors_choose_themselves(family: Path, tokenizer: Any, tmp_path: Path) -> None:
    law = copied(family, tmp_path / "family") / "law"
    seeded = torch.Generator().manual_seed(0)
    domain, general = (torch.randint(low, low + 6, (32 * 200,), generator=seeded) for low in (8, 60))
    sign(law, domain, general, quiet=True)
    model = AutoModelWithTransplant.from_pretrained(law)
    with Running(server.build_app(model, tokenizer, "base")) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        for text, right in ((domain, "law"), (general, "base")):
            prompt = tokenizer.decode(text[:32])
            assert completed(client, "auto", prompt) == completed(client, right, prompt)
        prompts = [tokenizer.decode(text[:32]) for text in (domain, general)]
        assert any(completed(client, "law", one) != completed(client, "base", one) for one in prompts)


def test_what_generates_no_text_is_not_served(client: Any) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        client.post("/audio/transcriptions", body={"model": "law"}, cast_to=object)
    assert error.value.status_code == 501


def test_many_clients_at_once_are_not_mixed_up(client: Any, expected: Any, model: Any) -> None:
    prompts = ["The court", "def main", "A", PROMPT]
    work = [(name, prompt) for prompt in prompts for name in CHOICES] * 2
    right = [expected(CHOICES[name], prompt) for name, prompt in work]
    rows: list[int] = []
    layer = model.get_decoder().layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(args[0])), with_kwargs=True)
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(lambda one: completed(client, *one), work)) == right
    hook.remove()
    assert max(rows) > 4  # they ran in batches


def test_a_client_that_leaves_does_not_end_the_others(client: Any, expected: Any) -> None:
    options: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 400, "temperature": 0.0, "stream": True}
    stream = client.completions.create(model="law", **options)
    next(iter(stream))
    stream.close()
    assert completed(client, "law") == expected({"law": 1.0})


def test_donors_are_added_and_removed(family: Path, tokenizer: Any) -> None:
    model = AutoModelWithTransplant.from_pretrained(family / "code")
    with Running(server.build_app(model, tokenizer, "base", TOKEN)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=TOKEN, max_retries=0)
        untouched = completed(client, "base")
        client.post("/donors", body={"donor": f"{family / 'law'}@4", "name": "late", "strength": 0.5}, cast_to=object)
        assert [one.id for one in client.models.list()] == ["base", "code", "late"]
        assert model.transplant_config.donors[1].position == 4
        assert completed(client, "base") == untouched
        assert completed(client, "late") == completed(client, "late@0.5") != untouched
        client.delete("/donors/late", cast_to=object)
        with pytest.raises(openai.NotFoundError):
            completed(client, "late")
        with pytest.raises(openai.NotFoundError, match="no donor 'late' here"):
            client.delete("/donors/late", cast_to=object)
        for name in ("base", "auto"):
            with pytest.raises(openai.BadRequestError, match="cannot be called"):
                client.post("/donors", body={"donor": str(family / "law"), "name": name}, cast_to=object)
        assert completed(client, "base") == untouched


def test_a_donor_that_is_in_use_is_removed_after_that(family: Path, tokenizer: Any) -> None:
    model = AutoModelWithTransplant.from_pretrained(family / "law")
    with Running(server.build_app(model, tokenizer, "base", TOKEN)) as address, ThreadPoolExecutor(1) as other:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=TOKEN, max_retries=0)
        options: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0.0}
        whole = client.completions.create(model="law", **options).choices[0].text
        stream = client.completions.create(model="law", stream=True, **options)
        text = next(iter(stream)).choices[0].text
        removed = other.submit(client.delete, "/donors/law", cast_to=object)
        text += "".join(part.choices[0].text for part in stream)
        assert text.rstrip("\ufffd") == whole.rstrip("\ufffd")
        removed.result()
        with pytest.raises(openai.NotFoundError):
            completed(client, "law")


def test_a_request_that_waits_for_a_donor_that_is_removed(family: Path, tokenizer: Any) -> None:
    """It is not found, as one that comes later."""
    model = AutoModelWithTransplant.from_pretrained(family / "law")
    inside, go_on = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        inside.set()
        go_on.wait()

    with Running(server.build_app(model, tokenizer, "base", TOKEN)) as address, ThreadPoolExecutor(4) as others:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=TOKEN, max_retries=0)
        completed(client, "base")
        hook = model.register_forward_hook(hold)
        running = others.submit(completed, client, "law")
        inside.wait()
        waiting = others.submit(completed, client, "law")
        with pytest.raises(TimeoutError):
            waiting.result(1)
        removed = others.submit(client.delete, "/donors/law", cast_to=object)
        with pytest.raises(TimeoutError):
            removed.result(1)
        hook.remove()
        go_on.set()
        assert running.result() and removed.result()
        with pytest.raises(openai.NotFoundError, match="no model 'law'"):
            waiting.result()


@pytest.mark.parametrize("token", ["", "another", "ä"])
def test_only_the_bearer_of_the_token_changes_donors(address: str, model: Any, token: str) -> None:
    headers = {"Authorization": b"Bearer " + token.encode()} if token else {}
    request = urllib.request.Request(f"{address}/v1/donors/law", method="DELETE", headers=headers)
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    assert error.value.code in (401, 403)
    assert list(model.strengths) == ["law", "code"]


def test_without_a_token_nobody_changes_donors(model: Any, tokenizer: Any) -> None:
    with Running(server.build_app(model, tokenizer, "recipient")) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=TOKEN, max_retries=0)
        with pytest.raises(openai.NotFoundError):
            client.delete("/donors/law", cast_to=object)


def test_a_donor_that_requests_could_not_tell_from_the_recipient(model: Any, tokenizer: Any) -> None:
    with refused(ConfigurationError, "'law'", "--name"):
        server.build_app(model, tokenizer, "law")


def test_a_model_without_donors(family: Path, tokenizer: Any) -> None:
    with refused(ConfigurationError, "base has no donors", "--donor"):
        server.build_app(plain(family / "recipient"), tokenizer, "base")


def test_a_donor_that_no_request_could_leave_out(family: Path, tokenizer: Any) -> None:
    replacing = transplant(plain(family / "recipient"), Donor.from_pretrained(family / "law"), 1, "replace")
    with refused(ConfigurationError, "'law'", "replaces layers"):
        server.build_app(replacing, tokenizer, "recipient")


def test_the_command(family: Path, tmp_path: Path, expected: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transplant_hf", "serve", family / "recipient", "--port", str(port)]
    command += ["--donor", f"{family / 'law'}", "--donor", f"{family / 'code'}@3", "--name", "base"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=100)
            assert [one.id for one in client.models.list()] == ["base", "law", "code"]
            assert completed(client, "law+code") == expected(CHOICES["law+code"])
        finally:
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
    assert process.returncode in (0, 130)
    assert "models: base, law, code" in errors
    assert "Traceback" not in errors


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve", "user/law"]) == 1
    assert "serve needs fastapi, uvicorn, openai: pip install 'transformers[serving]'" in capsys.readouterr().err
