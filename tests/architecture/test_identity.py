"""Output projections are found by trying: on real tiny models, and on layers made to mislead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from tests.helpers import BUILDERS, layers_of, logits_of, refused, tiny_gpt2_model, tiny_llama_model
from transplant_hf import CheckpointError, CompatibilityError, Donor, transplant
from transplant_hf.architecture import decoder_stack, find_stack, identity, output_weights

NAMES = {
    "gpt2": ("attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
    "llama": ("self_attn.o_proj.weight", "mlp.down_proj.weight"),
    "gpt_oss": (
        "self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.experts.down_proj", "mlp.experts.down_proj_bias",
    ),
}  # fmt: skip
WIDTH = 8


def output_projections(model: Any, path: str, number: int) -> tuple[str, ...]:
    return tuple(output_weights(model, path, [number])[number])


def zero_output_projections(model: Any, path: str, numbers: list[int]) -> None:
    with torch.no_grad():
        for number, weights in output_weights(model, path, numbers).items():
            for name, value in weights.items():
                decoder_stack(model, path)[number].get_parameter(name).fill_(value)


def found(model: Any, number: int = 1) -> tuple[str, ...]:
    return output_projections(model, find_stack(model), number)


# -- What is found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", sorted(BUILDERS))
def test_names(kind: str, dtype: torch.dtype) -> None:
    model = BUILDERS[kind](seed=1).to(dtype)
    assert [found(model, number) for number in range(4)] == [NAMES[kind]] * 4


@pytest.mark.parametrize("kind", sorted(BUILDERS))
def test_values_that_are_zero_do_not_change_the_names(kind: str) -> None:
    """Biases at their start are zero, and so are the projections of a donor that has not been trained."""
    model = BUILDERS[kind](seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    zero_output_projections(model, find_stack(model), [1])
    assert found(model) == NAMES[kind]


def test_one_search_for_layers_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []
    called = identity.Replay.called
    monkeypatch.setattr(identity.Replay, "called", lambda self: searched.append(self) or called(self))
    model = tiny_llama_model(seed=1)
    wanted = dict.fromkeys(NAMES["llama"], 0.0)
    assert output_weights(model, "model.layers", [0, 1, 2, 3]) == dict.fromkeys(range(4), wanted)
    assert len(searched) == 1


class Model(PreTrainedModel):
    """Two layers of one class between an embedding and nothing."""

    config_class = LlamaConfig

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__(LlamaConfig(hidden_size=WIDTH, num_attention_heads=2, vocab_size=32))
        self.embed = nn.Embedding(32, WIDTH)
        self.layers = nn.ModuleList([layer(), layer()])

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Layer(GradientCheckpointingLayer):
    def forward(self, hidden: torch.Tensor) -> Any:
        return hidden + self.added(hidden)


class Routed(Layer):
    """Each token goes to one of many experts, of which a few tokens choose a few."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 64)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(WIDTH, 4), "down": nn.Linear(4, WIDTH)}) for _ in range(64)
        )

    def added(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.flatten(0, 1)
        total = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            mine = self.router(flat).argmax(-1) == number
            if mine.any():
                total[mine] = expert["down"](expert["up"](flat[mine]).relu())
        return total.view_as(hidden)


class Gated(Layer):
    """A gate that is called last, and one that is zero at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out, self.gate = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.scale = nn.Parameter(torch.zeros(1))

    def added(self, hidden: torch.Tensor) -> torch.Tensor:
        out = self.out(self.inner(hidden).relu())
        return self.scale.tanh() * out * self.gate(hidden).sigmoid()


class InPlace(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> Any:
        return hidden.add_(self.out(hidden))


class Chain(Layer):
    """Numbered projections that are no experts: one feeds the other."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(WIDTH, WIDTH, bias=False)}) for _ in range(2))

    def added(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.steps[1]["proj"](self.steps[0]["proj"](hidden).relu())


class NormedAfter(Layer):
    """The norm of what is added has a bias, so that it gives something for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.norm = nn.Linear(WIDTH, WIDTH, bias=False), nn.LayerNorm(WIDTH)

    def added(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(self.out(hidden))


class NormedPlainly(Layer):
    """The norm of what is added gives nothing for nothing, and its full size to almost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.norm = nn.Linear(WIDTH, WIDTH, bias=False), nn.RMSNorm(WIDTH)

    def added(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(self.out(hidden))


class NormedFromOne(NormedPlainly):
    """The same, with a weight that counts from one; the outputs of two projections go through it."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.norm = nn.Linear(WIDTH, WIDTH, bias=False), Gemma3RMSNorm(WIDTH)

    def added(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(self.out(hidden) + self.other(hidden))


class Backwards(Layer):
    """One module holds all weights, and those that give its output are not registered side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = Mix()

    def added(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.mix(hidden)


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.out = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.lift = nn.Parameter(torch.ones(WIDTH))
        self.shift = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden @ self.start + self.lift).relu() @ self.out + self.shift


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (Routed, tuple(f"experts.{n}.down.{kind}" for n in range(64) for kind in ("weight", "bias"))),
        (Gated, ("out.weight",)),
        (InPlace, ("out.weight", "out.bias")),
        (Chain, ("steps.1.proj.weight",)),
        (NormedAfter, ("norm.weight", "norm.bias")),
        (NormedPlainly, ("norm.weight",)),
        (NormedFromOne, ("norm.weight",)),
        (Backwards, ("mix.out", "mix.shift")),
    ],
)
def test_layers_made_to_mislead(layer: Callable[[], nn.Module], names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = Model(layer)
    assert output_projections(model, "layers", 0) == names
    zero_output_projections(model, "layers", [0, 1])
    hidden = torch.randn(1, 500, WIDTH)
    assert torch.equal(model.layers[0](hidden.clone()), hidden)


# -- What is left alone ----------------------------------------------------------------------------------------------


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _is_as_it_was(model: Any, before: dict[str, torch.Tensor]) -> bool:
    parts = list(model.modules())
    return (
        all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        and not any(part._forward_hooks or part._forward_pre_hooks for part in parts)
        and [part.training for part in parts].count(False) == 1
        and all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    )


@pytest.mark.parametrize("kind", sorted(BUILDERS))
def test_the_model_stays_as_it_is(kind: str) -> None:
    """Its modes too: it may be in training, a part of it not."""
    model = BUILDERS[kind](seed=1).train()
    model.get_input_embeddings().eval()
    before, drawn = _state(model), torch.get_rng_state()
    assert found(model) == NAMES[kind]
    assert _is_as_it_was(model, before)
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("call", range(6))
def test_the_model_stays_as_it_is_when_a_layer_fails(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    model = tiny_llama_model(seed=1).train()
    model.get_input_embeddings().eval()
    before = _state(model)
    run, calls = type(layers_of(model)[1].mlp).forward, []

    def fails(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 8 + call:  # twice for each layer to see how it is called
            raise KeyboardInterrupt
        return run(self, hidden)

    monkeypatch.setattr(type(layers_of(model)[1].mlp), "forward", fails)
    with pytest.raises(KeyboardInterrupt):
        found(model)
    assert _is_as_it_was(model, before)


def test_zero_in_place() -> None:
    model = tiny_gpt2_model(seed=1)
    zero_output_projections(model, "transformer.h", [1, 2])
    without = tiny_gpt2_model(seed=1)
    del without.transformer.h[1:3]
    without.config.n_layer = 2
    assert torch.equal(logits_of(model), logits_of(without))


def test_a_donor_of_some_strength_in_a_transplant() -> None:
    """Hooks on its first and last layer scale it, and only work together."""
    recipient = tiny_llama_model(seed=1)
    donor = Donor.from_model(tiny_llama_model(seed=2), [1, 2], name="law")
    model = transplant(recipient, donor, 1, strength=0.5)
    wanted = dict.fromkeys(NAMES["llama"], 0.0)
    assert output_weights(model, "model.layers", [0, 1, 2, 3]) == dict.fromkeys(range(4), wanted)


# -- What is refused -------------------------------------------------------------------------------------------------


class Scaled(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> Any:
        return 0.5 * (hidden + self.out(hidden))


class Carrying(Layer):
    """Gives more than the hidden state to the next layer, which uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.tell = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor, told: torch.Tensor) -> Any:
        return hidden + self.out(hidden * told), self.tell(hidden)


class CarryingModel(Model):
    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        hidden = told = self.embed(input_ids)
        for layer in self.layers:
            hidden, told = layer(hidden, told)
        return hidden


class Heedless(Carrying):
    """Is told something, and makes nothing of it."""

    def forward(self, hidden: torch.Tensor, told: torch.Tensor) -> Any:
        return hidden + self.out(hidden), self.tell(hidden)


class NeedsMore(Model):
    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        raise ValueError("you must specify pixel_values")


@pytest.mark.parametrize(
    ("model", "facts"),
    [
        (lambda: Model(Scaled), ("layers.1, Scaled", "normalize or scale")),
        (lambda: CarryingModel(Carrying), ("layers.1, Carrying", "passes 2 values to the next layer")),
        (lambda: NeedsMore(Scaled), ("NeedsMore", "tokens only", "pixel_values")),
    ],
)
def test_layers_that_cannot(model: Callable[[], Any], facts: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    made = model()
    before = _state(made)
    with refused(CompatibilityError, *facts, 'init="copy"'):
        zero_output_projections(made, "layers", [0, 1] if "layers.1" not in facts[0] else [1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())


def test_what_the_next_layer_ignores_may_change() -> None:
    torch.manual_seed(0)
    assert output_projections(CarryingModel(Heedless), "layers", 1) == ("out.weight", "out.bias")


class Moody(Layer):
    """Does something else with some tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.rare = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.seen: list[torch.Tensor] = []

    def added(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self.seen:
            self.seen.append(hidden.clone())
        usual = torch.equal(hidden, self.seen[0])
        return self.out(hidden) if usual else self.rare(hidden)


def test_an_identity_of_some_tokens_only() -> None:
    torch.manual_seed(0)
    with refused(CompatibilityError, "layers.0, Moody", "without out.weight, out.bias", "other tokens", 'init="copy"'):
        output_projections(Model(Moody), "layers", 0)


def test_weights_that_are_not_in_memory() -> None:
    model = tiny_llama_model(seed=1)
    model.model.layers[3].to("meta")
    with refused(CheckpointError, "model.layers.3.self_attn.q_proj.weight", "offloaded", "without offload"):
        found(model)


def test_quantized_weights() -> None:
    model = tiny_gpt2_model(seed=1)
    weight = model.transformer.h[1].mlp.c_fc.weight
    model.transformer.h[1].mlp.c_fc.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with refused(CheckpointError, "transformer.h.1.mlp.c_fc.weight", "quantized", "int8"):
        found(model)
