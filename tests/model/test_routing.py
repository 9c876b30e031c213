"""`using("auto")`: each row uses the donor whose domain its prompt looks like, and keeps it."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache, pipeline

from tests.helpers import BUILDERS, edit_json, generated, logits_of, make_family, plain, refused, tiny_llama_model
from transplant_hf import AutoModelWithTransplant, CheckpointError, ConfigurationError, Donor, DonorSpec, sign
from transplant_hf.donor.signature import Discriminant, Signature, describe_rows
from transplant_hf.model import routing
from transplant_hf.partial import hidden_states

# The tokens of each kind of text.
KINDS = {"low": range(8, 14), "high": range(60, 66), "general": range(120, 126)}


def text_of(kind: str, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    first, last = KINDS[kind][0], KINDS[kind][-1]
    return torch.randint(first, last + 1, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipient and two signed donors, `low` and `high`, for position 1."""
    folder = make_family(tmp_path_factory.mktemp("signed"), tiny_llama_model)
    source = tiny_llama_model(seed=2)
    with torch.no_grad():  # donors that change little, so that signatures decide
        for layer in source.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.05)
            layer.mlp.down_proj.weight.mul_(0.05)
    for number, name in enumerate(("low", "high")):
        donor = Donor.from_model(source, [1, 2], name=name)
        donor.save_pretrained(folder / name, position=1, recipient=str(folder / "recipient"))
        text, general = (text_of(kind, 1, 32 * 200, seed).flatten() for kind, seed in ((name, number), ("general", 7)))
        report = sign(folder / name, text, general, quiet=True)
        assert report.position == 1 and report.rows == (160, 160) and min(report.right) > 0.95
    return folder


def both(folder: Path, **kwargs: Any) -> Any:
    specs = [DonorSpec(str(folder / "low"), 1, name="low"), DonorSpec(str(folder / "high"), 2, name="high")]
    if kwargs.pop("one_place", True):
        specs[1] = DonorSpec(str(folder / "high"), 1, name="high")
    return AutoModelWithTransplant.from_pretrained(folder / "recipient", donors=specs, **kwargs)


def mixed(length: int = 32) -> tuple[torch.Tensor, list[str | None]]:
    kinds = ["high", "general", "low", "high"]
    ids = torch.cat([text_of(kind, 1, length, seed=50 + n) for n, kind in enumerate(kinds)])
    return ids, [None if kind == "general" else kind for kind in kinds]


def names(model: Any) -> list[str | None]:
    return [route.donor for route in model.routes]


# -- What rows get -------------------------------------------------------------------------------------------------


def test_rows_go_to_their_donors(signed: Path) -> None:
    model, (ids, wanted) = both(signed), mixed()
    assert model.routes == ()
    with model.using("auto"):
        found = logits_of(model, ids)
        assert names(model) == wanted
        assert [route.score > 0 for route in model.routes] == [name is not None for name in wanted]
        tokens = generated(model, ids)
        assert names(model) == wanted
    with model.using(rows=wanted):
        torch.testing.assert_close(found, logits_of(model, ids))
        assert torch.equal(tokens, generated(model, ids))
        assert torch.equal(generated(model, ids, num_beams=2), routed(model, ids, num_beams=2))


def routed(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with model.using("auto"):
        return generated(model, ids, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("kind", sorted(BUILDERS))
def test_what_a_score_is(kind: str, tmp_path: Path) -> None:
    """That of the signature; where it is not sure, at most 8 of it and how much less the donor loses on 32 tokens."""
    folder = make_family(tmp_path, BUILDERS[kind])
    sign(folder / "donor", *(text_of(text, 1, 32 * 60).flatten() for text in ("low", "general")), quiet=True)
    model: Any = AutoModelWithTransplant.from_pretrained(folder / "donor").eval()
    ids, mask = torch.full((3, 40), 3), torch.zeros(3, 40, dtype=torch.long)
    lengths = [40, 36, 20]
    for row, (text, length) in enumerate(zip(("low", "general", "high"), lengths, strict=True)):
        ids[row, 40 - length :], mask[row, 40 - length :] = text_of(text, 1, length, seed=row)[0], 1
    signature = Signature.from_dict(Donor.from_pretrained(folder / "donor").record.signature or {}, "it")
    odds, gains = [], []
    for row, length in enumerate(lengths):
        seen = ids[row : row + 1, 40 - length :][:, :32]
        losses = []
        for donors in ((), "donor"):
            with model.using(donors):
                losses.append(torch.nn.functional.cross_entropy(logits_of(model, seen)[0, :-1], seen[0, 1:]))
        with model.disable_transplants():
            states = hidden_states(model, seen, [signature.position])[signature.position]
        odds.append(0.2 * float(Discriminant([signature]).scores(describe_rows(states))))
        gains.append(float((losses[0] - losses[1]) * (seen.shape[1] - 1)))
        assert abs(gains[row]) > 0.05
    for threshold in (0, *odds):
        with model.using("auto", threshold=threshold):
            generated(model, ids, attention_mask=mask)
        sure = [abs(one - threshold) > 8 for one in odds]
        for route, one, gain, alone in zip(model.routes, odds, gains, sure, strict=True):
            assert route.score == pytest.approx(one + gain * (not alone), rel=1e-3, abs=1e-2)
            assert route.donor == ("donor" if route.score > threshold else None)
    # A donor that is there twice: the signature cannot be sure which.
    specs = [DonorSpec(str(folder / "donor"), signature.position, name=name) for name in ("one", "two")]
    twice = AutoModelWithTransplant.from_pretrained(folder / "recipient", donors=specs, strength="auto").eval()
    generated(twice, ids, attention_mask=mask)
    for route, one, gain in zip(twice.routes, odds, gains, strict=True):
        if one > 0:
            assert route.score == pytest.approx(min(one, 8) + gain, rel=1e-3, abs=1e-2)


@torch.no_grad()
def test_embeddings_are_routed_by_their_signature(signed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tokens are not known, and a decoder has no head: what each donor would lose cannot be measured."""
    monkeypatch.setattr(routing, "_SURE", 1e9)
    model, (ids, wanted) = both(signed), mixed()
    with model.using("auto"):
        logits_of(model, ids)
        scores = [route.score for route in model.routes]
        model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=False)
        assert names(model) == wanted
        assert all(abs(route.score - score) > 1e-3 for route, score in zip(model.routes, scores, strict=True))
    alone, decoder = (kind.from_pretrained(signed / "low").eval() for kind in (AutoModelForCausalLM, AutoModel))
    with alone.using("auto"), decoder.using("auto"):
        alone(inputs_embeds=alone.get_input_embeddings()(ids), use_cache=False)
        decoder(ids, use_cache=False)
    assert decoder.routes[2].score == pytest.approx(alone.routes[2].score, rel=1e-3)


@torch.no_grad()
def test_only_rows_that_are_not_sure_are_measured(signed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, wanted) = both(signed), mixed()
    measured: list[Any] = []
    original = routing._beginning
    monkeypatch.setattr(routing, "_beginning", lambda *args: measured.append(original(*args)[0]) or original(*args))
    with model.using("auto"):
        logits_of(model, ids)
        assert names(model) == wanted and not measured
    with model.using("auto", threshold=model.routes[2].score):
        logits_of(model, ids)
    assert len(measured) == 1 and torch.equal(measured[0], ids[2:3])


@torch.no_grad()
def test_measuring_a_prompt_changes_nothing(signed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the call records of layers is its own, and modules keep their hooks and layers."""
    monkeypatch.setattr(routing, "_SURE", 1e9)
    model, (ids, wanted) = both(signed), mixed()
    with model.using(rows=wanted):
        logits_of(model, ids)  # from the second call on, layers are left out
        named = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    calls: list[int] = []
    model.register_forward_hook(lambda *call: calls.append(1))

    def held() -> Any:
        return [*model.model.layers], {name: [*vars(part)] for name, part in model.named_modules()}

    before = held()
    with model.using("auto"):
        for _ in range(2):
            found = model(ids, output_hidden_states=True, use_cache=False).hidden_states
            assert len(found) == len(named) and names(model) == wanted
            for one, other in zip(found, named, strict=True):
                torch.testing.assert_close(one, other)
        assert model.train()(ids, use_cache=False).logits.shape[:2] == ids.shape
    model.eval()
    assert calls == [1, 1, 1] and held() == before


@torch.no_grad()
def test_the_choice_stays_with_the_cache(signed: Path) -> None:
    """Also where what follows looks like another domain."""
    model, (ids, wanted) = both(signed), mixed()
    more = text_of("low", 4, 40, seed=9)
    with model.using("auto"):
        cache = model(ids, use_cache=True).past_key_values
        copied = copy.deepcopy(cache)
        found = model(more, past_key_values=cache).logits
        assert names(model) == wanted
        logits_of(model, more)
        assert names(model) == ["low"] * 4
    with model.using("auto"):  # in another block, too
        torch.testing.assert_close(model(more, past_key_values=copied).logits, found)
        assert names(model) == wanted
        copied.reset()
        if not copied.get_seq_length():  # Transformers 5.17 keeps its length, and zeros
            model(more, past_key_values=copied)
            assert names(model) == ["low"] * 4
    with model.using(rows=wanted):
        torch.testing.assert_close(found, logits_of(model, torch.cat([ids, more], 1))[:, 32:], rtol=1e-4, atol=1e-5)
    with refused(ConfigurationError, "other donors"):
        model(more, past_key_values=cache)


def test_padding_and_short_prompts(signed: Path) -> None:
    model = both(signed)
    ids, mask = torch.full((3, 32), 257), torch.zeros(3, 32, dtype=torch.long)
    for row, (kind, length) in enumerate((("high", 20), ("low", 32), ("low", 7))):
        ids[row, 32 - length :] = text_of(kind, 1, length, seed=row)[0]
        mask[row, 32 - length :] = 1
    with model.using("auto"):
        tokens = generated(model, ids, attention_mask=mask)
        assert names(model) == ["high", "low", None]
        score = model.routes[0].score
        assert model.routes[2].score != model.routes[2].score
        logits_of(model, ids[:1, 12:])
        assert model.routes[0].score == pytest.approx(score, rel=1e-3)
        short = generated(model, ids[2:, 25:])
        assert names(model) == [None]
    assert torch.equal(short, generated(plain(signed / "recipient"), ids[2:, 25:]))
    with model.using(rows=["high", "low", None]):
        assert torch.equal(tokens, generated(model, ids, attention_mask=mask))


def test_threshold_and_strength(signed: Path) -> None:
    model, (ids, _) = both(signed), mixed()
    model.set_strength("high", 0.5)
    with model.using("auto", threshold=1e9):
        assert torch.equal(logits_of(model, ids), logits_of(plain(signed / "recipient"), ids))
    with model.using("auto"):
        found = logits_of(model, ids)
    with model.using({"high": [0.5, 0, 0, 0.5], "low": [0, 0, 1, 0]}):
        torch.testing.assert_close(found, logits_of(model, ids))
    with refused(ConfigurationError, "threshold", "finite number"), model.using("auto", threshold=float("nan")):
        pass


def test_what_each_thread_saw(signed: Path) -> None:
    model, (ids, wanted) = both(signed), mixed()

    def serve(row: int) -> list[str | None]:
        with model.using("auto"):
            generated(model, ids[row : row + 1])
            return names(model)

    with ThreadPoolExecutor(4) as pool:
        assert [found[0] for found in pool.map(serve, range(4))] == wanted
    assert model.routes == ()


# -- At load -------------------------------------------------------------------------------------------------------


def test_at_load(signed: Path, tmp_path: Path) -> None:
    both(signed).save_pretrained(tmp_path / "thin", thin=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "thin", strength="auto")
    ids, wanted = mixed()
    found = logits_of(model, ids)
    assert names(model) == wanted
    with model.using(rows=wanted):
        torch.testing.assert_close(logits_of(model, ids), found)
    with model.using("low"):
        assert not torch.equal(logits_of(model, ids), found)
    with model.disable_transplants("low"):
        logits_of(model, ids)
        assert {*names(model)} <= {"high", None}
    with model.disable_transplants():
        assert torch.equal(logits_of(model, ids), logits_of(plain(signed / "recipient"), ids))
        with refused(ConfigurationError, "all of them are switched off"), model.using("auto"):
            pass
    logits_of(model, ids)
    again = copy.deepcopy(model)
    torch.testing.assert_close(logits_of(again, ids), found)
    scores = [[route.score for route in one.routes] for one in (again, model)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    model.remove_donor("high")
    logits_of(model, ids)
    assert names(model)[2] == "low" and "high" not in names(model)
    model.move_donor("low", 2)
    with refused(ConfigurationError, "position 1", "position 2", "--position 2"):
        logits_of(model, ids)
    model.remove_donor("low")
    assert torch.equal(logits_of(model, ids), logits_of(plain(signed / "recipient"), ids))


def test_in_a_pipeline(signed: Path) -> None:
    run = pipeline("text-generation", model=str(signed / "low"), model_kwargs={"strength": "auto"})
    run("a text of several words", max_new_tokens=2)
    assert len(run.model.routes) == 1


def test_other_strengths_at_load(signed: Path) -> None:
    with refused(ConfigurationError, "strength=0.5", '"auto"', "DonorSpec"):
        both(signed, strength=0.5)


# -- Refusals ------------------------------------------------------------------------------------------------------


def using_auto(model: Any) -> None:
    with model.using("auto"):
        logits_of(model, mixed()[0])


def test_donors_without_a_signature(signed: Path) -> None:
    specs = [DonorSpec(str(signed / "low"), 1), DonorSpec(str(signed / "donor"), 1, name="plain")]
    model = AutoModelWithTransplant.from_pretrained(signed / "recipient", donors=specs)
    with refused(ConfigurationError, "'plain' has no signature", "transplant-hf sign", str(signed / "donor")):
        using_auto(model)
    with refused(ConfigurationError, "'plain' has no signature"):
        AutoModelWithTransplant.from_pretrained(signed / "recipient", donors=specs, strength="auto")
    with model.disable_transplants("plain"):
        using_auto(model)
        assert names(model)[2] == "low"


def test_another_position(signed: Path) -> None:
    model = both(signed)
    model.move_donor("high", 3)  # the first donor still runs at 1
    using_auto(model)
    assert names(model) == mixed()[1]
    model.move_donor("low", 3)
    with refused(ConfigurationError, "position 1", "position 3", "--position 3"):
        using_auto(model)


def test_another_recipient(signed: Path, tmp_path: Path) -> None:
    tiny_llama_model(seed=5).save_pretrained(tmp_path / "other")
    model = AutoModelWithTransplant.from_pretrained(tmp_path / "other", donors={str(signed / "low"): 1})
    for _ in range(2):
        with refused(ConfigurationError, "'low'", "other hidden states", "another recipient"):
            using_auto(model)


def test_a_replacing_donor(signed: Path) -> None:
    model = AutoModelWithTransplant.from_pretrained(
        signed / "recipient", donors=[DonorSpec(str(signed / "low"), 1, mode="replace")]
    )
    with refused(ConfigurationError, "'low' replaces recipient layers"):
        using_auto(model)


def broken(change: dict[str, Any], signed: Path, tmp_path: Path) -> Any:
    AutoModelWithTransplant.from_pretrained(signed / "low").save_pretrained(tmp_path / "broken", thin=True)
    record = tmp_path / "broken" / "donor_config.json"
    edit_json(record, signature=json.loads(record.read_text())["signature"] | change)
    return AutoModelWithTransplant.from_pretrained(tmp_path / "broken")


def test_signatures_that_cannot_be_read(signed: Path, tmp_path: Path) -> None:
    with refused(ConfigurationError, "version 2", "reads version 1"):
        using_auto(broken({"version": 2}, signed, tmp_path))
    for change in ({"domain": "!"}, {"domain": "AAAA"}, {"hidden": 7}, {"factor": None}, {"rest": "x"}):
        with refused(CheckpointError, "signature of donor", "malformed", "Sign the donor again"):
            using_auto(broken(change, signed, tmp_path))


def test_generate_with_a_static_cache(signed: Path) -> None:
    ids, wanted = mixed()
    model, by_itself = both(signed), both(signed, strength="auto")
    with model.using(rows=wanted):
        tokens = generated(model, ids)
    for _ in range(2):  # Transformers keeps the cache of a model for its next text
        assert torch.equal(routed(model, ids, cache_implementation="static"), tokens)
        assert torch.equal(generated(by_itself, ids, cache_implementation="static"), tokens)
    assert names(model) == names(by_itself) == wanted


def test_a_prompt_that_is_read_in_pieces_is_refused(signed: Path) -> None:
    ids, wanted = mixed()
    for name, value in {"prefill_chunk_size": 4, "guidance_scale": 1.5}.items():
        with refused(ConfigurationError, f"Leave out {name}"):
            routed(both(signed), ids, **{name: value})
    unguided = both(signed)
    routed(unguided, ids, guidance_scale=1)
    assert names(unguided) == wanted
    model = both(signed, strength="auto")
    model.generation_config.prefill_chunk_size = 4
    with refused(ConfigurationError, "prefill_chunk_size"):
        generated(model, ids)
    with model.using("low"):
        generated(model, ids)


def test_calls_that_cannot_be_routed(signed: Path) -> None:
    model, (ids, wanted) = both(signed), mixed()
    with model.using("auto"):
        with refused(ConfigurationError, "several texts"):
            model(ids, position_ids=torch.arange(16).repeat(2)[None].expand(4, -1), use_cache=False)
        with refused(ConfigurationError, "another kind", "rows="):
            model(ids, attention_mask=torch.zeros(4, 1, 32, 32), use_cache=False)
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=40))
        assert names(model) == wanted
    for named in ({"donors": "low"}, {"rows": wanted}):
        with refused(ConfigurationError, 'threshold=3 is for using("auto")'), model.using(threshold=3, **named):
            logits_of(model, ids)
    with torch.no_grad():
        model.model.embed_tokens.weight[ids[1, 3]] = torch.nan
    with model.using("auto"), refused(ConfigurationError, "not finite in rows [1]"):
        logits_of(model, ids)
    fresh = both(signed)
    cache = fresh(ids, past_key_values=DynamicCache(config=fresh.config)).past_key_values
    with fresh.using("auto"), refused(ConfigurationError, "other donors", "new cache"):
        fresh(ids[:, :1], past_key_values=cache)


@pytest.mark.slow
@pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="torch 2.10 cannot trace a thread's choice")
def test_compiled(signed: Path) -> None:
    for model, block in ((both(signed), True), (both(signed, strength="auto"), False)):
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager")
        with refused(ConfigurationError, "compiled call cannot"):
            if block:
                with model.using("auto"):
                    logits_of(compiled, mixed()[0])
            else:
                logits_of(compiled, mixed()[0])
    torch.compiler.reset()
