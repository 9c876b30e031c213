"""Some layers of a model, from a hidden state that was computed before, against the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM, RwkvConfig, RwkvForCausalLM

from tests.helpers import BUILDERS, NUM_LAYERS, refused, some_ids
from transplant_hf import AutoModelWithTransplant, ConfigurationError
from transplant_hf.partial import PartialRun, hidden_states


@pytest.mark.parametrize("family", sorted(BUILDERS))
@pytest.mark.parametrize("position", range(NUM_LAYERS))
def test_part_of_a_model_gives_the_whole_models_logits(family: str, position: int) -> None:
    model = BUILDERS[family](seed=1)
    ids = some_ids(2, 12)
    wanted = model(input_ids=ids).logits
    before = hidden_states(model, ids, [position])[position]
    with PartialRun(model, range(position, NUM_LAYERS)) as part:
        found = part(input_ids=ids, prefix_states=before, use_cache=False).logits
    assert torch.equal(found, wanted)


def test_no_layer_at_all() -> None:
    model, ids = BUILDERS["llama"](seed=1), some_ids(2, 12)
    after_all = hidden_states(model, ids, [NUM_LAYERS])[NUM_LAYERS]
    with PartialRun(model, [], find_states=lambda given: after_all if torch.equal(given, ids) else None) as part:
        assert torch.equal(part(input_ids=ids, use_cache=False).logits, model.lm_head(model.model.norm(after_all)))
        with refused(ConfigurationError, "need prefix_states="):
            part(input_ids=some_ids(1, 3), use_cache=False)


def test_hidden_states_are_those_that_transformers_reports() -> None:
    model = BUILDERS["llama"](seed=1)
    ids = some_ids(2, 12)
    reported = model(input_ids=ids, output_hidden_states=True).hidden_states
    found = hidden_states(model, ids, range(NUM_LAYERS + 1))
    for position in range(NUM_LAYERS):
        assert torch.equal(found[position], reported[position])
    assert torch.equal(model.model.norm(found[NUM_LAYERS]), reported[-1])


def test_no_layer_runs_beyond_the_last_position_asked_for() -> None:
    model = BUILDERS["llama"](seed=1)
    ran = []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    hidden_states(model, some_ids(1, 4), [2])
    assert ran == [0, 1]


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_layers_are_left_as_they_were(family: str) -> None:
    model = BUILDERS[family](seed=1)
    ids = some_ids(2, 12)
    wanted = model(input_ids=ids).logits
    with pytest.raises(ZeroDivisionError), PartialRun(model, [1]) as part:
        part(input_ids=ids, prefix_states=hidden_states(model, ids, [0])[0], use_cache=False)
        raise ZeroDivisionError
    assert torch.equal(model(input_ids=ids).logits, wanted)
    assert all("forward" not in vars(module) for module in model.modules())


def test_part_of_a_transplant(tiny: Path) -> None:
    model = AutoModelWithTransplant.from_pretrained(tiny / "donor")
    ids = some_ids(2, 12)
    wanted = model(input_ids=ids).logits
    first = model.layer_map.layers_of("donor")[0]
    states = hidden_states(model, ids, [first])[first]
    with PartialRun(model, range(first, len(model.layer_map))) as part:
        assert torch.equal(part(input_ids=ids, prefix_states=states, use_cache=False).logits, wanted)
        with part.without(model.layer_map.layers_of("donor")):
            bare = part(input_ids=ids, prefix_states=states, use_cache=False).logits
    recipient = AutoModelForCausalLM.from_pretrained(tiny / "recipient")
    assert torch.allclose(bare, recipient(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


def test_layers_that_return_tuples() -> None:
    model = OPTForCausalLM(
        OPTConfig(
            hidden_size=16,
            num_hidden_layers=3,
            ffn_dim=16,
            num_attention_heads=2,
            vocab_size=32,
            word_embed_proj_dim=16,
        )
    ).eval()
    rwkv = RwkvForCausalLM(
        RwkvConfig(hidden_size=16, num_hidden_layers=3, attention_hidden_size=16, vocab_size=32, rescale_every=0)
    ).eval()
    ids = torch.randint(0, 32, (2, 5))
    for made in (model, rwkv):
        wanted = made(input_ids=ids).logits
        states = hidden_states(made, ids, [2])[2]
        with PartialRun(made, [2]) as part:
            assert torch.allclose(part(input_ids=ids, prefix_states=states, use_cache=False).logits, wanted, atol=1e-6)


def test_gradients_reach_the_layers_that_run() -> None:
    model = BUILDERS["llama"](seed=1).train()
    model.gradient_checkpointing_enable()
    ids = some_ids(2, 12)
    states = hidden_states(model, ids, [3])[3]
    with PartialRun(model, [3]) as part:
        part(input_ids=ids, prefix_states=states, labels=ids, use_cache=False).loss.backward()
    assert model.model.layers[3].mlp.down_proj.weight.grad is not None
    assert model.model.layers[0].mlp.down_proj.weight.grad is None


def test_what_is_refused() -> None:
    model = BUILDERS["llama"](seed=1)
    ids = some_ids(2, 12)
    with refused(ConfigurationError, "layers [4] cannot run alone", "runs layers 0..3"), PartialRun(model, [4]):
        pass
    with (
        refused(ConfigurationError, "need prefix_states=", "hidden_states(model, input_ids, [2])"),
        PartialRun(model, [2, 3]) as part,
    ):
        part(input_ids=ids, use_cache=False)
    with refused(ConfigurationError, "has shape [2, 3, 32]", "[2, 12, 32]"), PartialRun(model, [2, 3]) as part:
        part(input_ids=ids, prefix_states=torch.zeros(2, 3, 32), use_cache=False)
    with refused(ConfigurationError, "positions [5] are not all in 0..4"):
        hidden_states(model, ids, [5])
