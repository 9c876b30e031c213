"""Donors that learn in a frozen recipient."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.architectures.tiny_models import tiny_model
from tests.helpers import NUM_LAYERS, copied, logits_of, randomised, refused
from tests.training.helpers import losses, noise, recipient, trainer
from transplant_hf import AutoModelWithTransplant, ConfigurationError, DataError, Donor, DonorSpec
from transplant_hf.partial import PartialRun
from transplant_hf.training.part_trainer import COMPARED_TOKENS


@pytest.mark.parametrize(
    ("family", "position"), [("llama", 0), ("llama", NUM_LAYERS), ("gpt2", 2), ("gpt_oss", 0), ("gpt_oss", NUM_LAYERS)]
)
def test_an_identity_donor_starts_as_the_recipient_and_learns(family: str, position: int, tmp_path: Path) -> None:
    base = recipient(family)
    before = logits_of(base)
    made = trainer(tmp_path, base, position=position)
    assert torch.equal(logits_of(made.model), before)
    made.train()
    assert losses(made)[-1] < losses(made)[0]
    assert torch.equal(logits_of(base), before), "the recipient was changed"
    made.model.eval()
    with made.model.disable_transplants():
        assert torch.equal(logits_of(made.model), before)
    assert not torch.equal(logits_of(made.model), before)


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss", pytest.param("llama", marks=pytest.mark.slow)])
def test_the_cached_prefix_changes_no_loss(family: str, tmp_path: Path) -> None:
    runs, base = {}, recipient(family, **({"attn_pdrop": 0.0, "resid_pdrop": 0.0} if family == "gpt2" else {}))
    for kind in ("off", "memory", "disk"):
        made = trainer(tmp_path / kind, base, cache_prefix=kind, replay_dataset=noise(seed=2, name="general"))
        made.train()
        runs[kind] = losses(made)
        assert (made.cache_seconds > 0) == (kind != "off")
        assert not (tmp_path / kind / "prefix-cache").exists()
    assert runs["memory"] == runs["disk"]
    assert runs["memory"] == pytest.approx(runs["off"], rel=1e-4)


def test_only_the_donor_and_what_follows_runs(tmp_path: Path) -> None:
    made = trainer(tmp_path, position=3)
    ran = []
    for number, layer in enumerate(made.model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    made.train()
    assert set(ran[-3:]) == {3, 4, 5}
    assert ran.count(0) < ran.count(3)


def test_a_replacing_donor_starts_as_what_it_replaces(tmp_path: Path) -> None:
    base = recipient()
    before = logits_of(base)
    made = trainer(tmp_path, base, mode="replace", position=1)
    assert torch.equal(logits_of(made.model), before)
    made.train()
    assert len(made.model.layer_map) == NUM_LAYERS
    with made.model.disable_transplants():
        assert torch.equal(logits_of(made.model), before)


def test_a_donor_beside_one_that_replaces_starts_from_the_recipients_own_layers(
    tiny_llama: Path, tmp_path: Path
) -> None:
    replaced = {"donors": [DonorSpec(str(tiny_llama / "donor"), 0, "replace", layers=[0], name="law")]}
    base = AutoModelWithTransplant.from_pretrained(tiny_llama / "recipient", keep_replaced=True, **replaced)
    before = logits_of(base)
    made = trainer(tmp_path, base, mode="replace", position=2, donor_name="second")
    assert [index for _, index in made.transplant.layer_map] == [1, 1, 2, 3]
    assert torch.equal(logits_of(made.transplant.eval()), before)
    inserted = trainer(tmp_path, base, position=1, donor_layers=1, donor_name="second", start_layers=[1])
    assert inserted.transplant.layer_map[1] == ("second", 1)
    inserted = trainer(tmp_path, base, position=2, donor_layers=1, donor_name="second")
    assert inserted.transplant.layer_map[2] == ("second", 1)
    for fields in ({"position": 0, "mode": "replace"}, {"position": 1}, {"start_layers": [0, 1]}):
        with refused(ConfigurationError, "recipient layers [0] do not run", "1, 2, 3"):
            trainer(tmp_path, base, donor_name="second", **fields)


def test_a_replacing_donor_is_brought_to_its_strength_once(tmp_path: Path) -> None:
    base = recipient()
    made = {
        strength: trainer(
            tmp_path / str(strength),
            base,
            mode="replace",
            position=1,
            strength=strength,
            save_strategy="steps",
            save_steps=4,
        )
        for strength in (None, 0.75)
    }
    for one in made.values():
        one.train()
    assert losses(made[0.75]) == losses(made[None]), "the strength comes after training"
    again = trainer(tmp_path / "0.75", base, mode="replace", position=1, strength=0.75)
    again.train(resume_from_checkpoint=str(tmp_path / "0.75" / "checkpoint-8"))
    made[0.75].finish()
    made[0.75].save(tmp_path / "saved", recipient="recipient")
    saved = Donor.from_pretrained(tmp_path / "saved")
    assert (saved.strength, saved.metadata["interpolation"], saved.metadata["init"]) == (1.0, 0.75, "copy")
    before = Donor.from_model(base, [1, 2]).tensors()
    learned, resumed = made[None].donor.tensors(), again.donor.tensors()
    for name, tensor in saved.tensors().items():
        torch.testing.assert_close(tensor, torch.lerp(before[name], learned[name], 0.75))
        assert torch.equal(resumed[name], tensor), "a checkpoint has the weights of the training"


def test_standalone_is_the_papers_wrapper(tmp_path: Path) -> None:
    made = trainer(tmp_path, method="standalone", init="copy", position=1)
    own = made.model.layer_map.layers_of("law")
    ids = noise().tokens[:4].long()
    with PartialRun(made.model, own, from_embeddings=True) as alone, torch.no_grad():
        wanted = alone(input_ids=ids, labels=ids, use_cache=False).loss.item()
    body = made.model.model
    hidden = body.embed_tokens(ids)
    places = body.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    for number in own:
        hidden = body.layers[number](hidden, position_embeddings=places)
    by_hand = made.model.loss_function(
        made.model.lm_head(body.norm(hidden)), ids, vocab_size=made.model.config.vocab_size
    )
    assert wanted == pytest.approx(by_hand.item(), rel=1e-5)
    made.train()
    assert losses(made)[-1] < losses(made)[0]


def test_frozen_parts_rest_while_the_donor_trains(tmp_path: Path) -> None:
    made = trainer(tmp_path, recipient("gpt2"), position=2)
    seen = {}
    made.model.transformer.h[2].register_forward_hook(lambda module, *_: seen.update(own=module.attn.training))
    made.model.transformer.h[5].register_forward_hook(lambda module, *_: seen.update(frozen=module.attn.training))
    made.train()
    assert seen == {"own": True, "frozen": False}


def test_distillation_holds_the_model_near_the_recipient(tmp_path: Path) -> None:
    base, general = recipient(), noise(seed=2, name="general")
    ids = general.tokens.long()
    wanted = base(input_ids=ids).logits.log_softmax(-1)
    distance = {}
    for weight in (0.0, 20.0):
        made = trainer(tmp_path, base, replay_dataset=general, distillation=weight, max_steps=40)
        made.train()
        found = made.model.eval()(input_ids=ids).logits.log_softmax(-1)
        distance[weight] = torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean").item()
    assert distance[20.0] < 0.7 * distance[0.0]


def test_what_made_a_donor_is_recorded(tiny_llama: Path, tmp_path: Path) -> None:
    family = copied(tiny_llama, tmp_path / "family")
    made = trainer(tmp_path / "out", family / "recipient", replay_dataset=noise(seed=2, name="general"))
    made.train()
    made.save_donor(family / "law")
    donor = Donor.from_pretrained(family / "law")
    told = donor.metadata
    assert (told["method"], told["position"], told["steps"], told["replay_share"]) == ("in_place", 3, 8, 0.25)
    assert told["text_sha256"] == noise().fingerprint and told["seed"] == 42
    assert set(told["versions"]) == {"transplant_hf", "transformers", "torch", "python"}
    model = AutoModelWithTransplant.from_pretrained(family / "law")
    assert torch.allclose(logits_of(model), logits_of(made.model.eval()), atol=1e-6)
    spec = json.loads((family / "law" / "config.json").read_text())["donors"][0]
    assert (spec["position"], spec["mode"], spec.get("strength", 1.0)) == (3, "insert", 1.0)
    assert "law" in (family / "law" / "README.md").read_text()


def test_without_general_text_a_lower_strength_is_recommended(tmp_path: Path) -> None:
    assert trainer(tmp_path).recommended_strength == 0.75
    assert trainer(tmp_path, strength=0.5).recommended_strength == 0.5
    assert trainer(tmp_path, mode="replace").recommended_strength == 1.0
    assert trainer(tmp_path, replay_dataset=noise(seed=2)).recommended_strength == 1.0
    assert trainer(tmp_path, replay_dataset=noise(seed=2), replay_share=0.0).recommended_strength == 0.75


def test_a_donor_beside_another(tiny_llama: Path, tmp_path: Path) -> None:
    model = AutoModelWithTransplant.from_pretrained(tiny_llama / "donor")
    before = logits_of(model)
    made = trainer(tmp_path, model, position=3)
    assert torch.equal(logits_of(made.model), before)
    made.train()
    assert sorted(made.model.layer_map.sources[1:]) == ["donor", "law"]
    with made.model.disable_transplants("law"):
        assert torch.equal(logits_of(made.model), before)


def test_evaluation_while_training_is_of_the_whole_model(tmp_path: Path) -> None:
    made = trainer(tmp_path, position=3, eval_dataset=noise(seed=1), eval_strategy="steps", eval_steps=8)
    made.train()
    told = next(entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry)
    ids = noise(seed=1).tokens.long()
    assert told == pytest.approx(made.model.eval()(input_ids=ids, labels=ids).loss.item(), rel=1e-4)


def test_steps_follow_from_epochs(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=-1, num_train_epochs=2.0, replay_dataset=noise(seed=2), train_dataset=noise(24))
    assert made.args.max_steps == 16  # 48 rows of law, a quarter more rows of general text, four in a step


def test_layers_to_start_from_say_how_many_there_are(tmp_path: Path) -> None:
    made = trainer(tmp_path, donor_layers=None, start_layers=[0, 1], mode="replace")
    assert made.position == 2 and made.transplant.layer_map.layers_of(made.donor_name) == [2, 3]


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"mode": "replace", "init": "identity"}, ("start as copies", 'init="copy"')),
        ({"mode": "replace", "strength": 1.5}, ("from 0 to 1", "1.5")),
        ({"donor_name": ""}, ("name of donor", "empty string")),
        ({"position": 5}, ("position 5 of", "outside 0..4", "4 layers")),
        ({"position": 3, "mode": "replace"}, ("position 3 of", "outside 0..2", "2 are replaced")),
        ({"donor_layers": 5}, ("donor of 5 layers", "4 layers")),
        ({"donor_layers": 2, "start_layers": [1]}, ("start_layers", "names 1 layers, [1]", "donor has 2")),
        ({"donor_layers": None, "position": (1, 3), "start_layers": [1]}, ("1 layers", "2 parts", "[1, 3]")),
        ({"method": "alone"}, ("method must be one of", "'alone'")),
        ({"distillation": -1.0}, ("distillation", "-1.0")),
        ({"distillation": 1.0, "mode": "replace"}, ("distillation", "insert")),
        ({"cache_prefix": "tape"}, ("cache_prefix must be one of", "'tape'")),
        ({"prefix_cache_limit": "much"}, ("prefix_cache_limit", "such as 80GiB", "got 'much'")),
        ({"prefix_cache_dir": "states", "cache_prefix": "off"}, ("prefix_cache_dir", "on disk", "'off'")),
        ({"replay_share": 1.0}, ("replay_share", "below 1")),
        ({"push_to_hub": True}, ("push_to_hub=True would upload checkpoints", "push_donor")),
    ],
)
def test_arguments_that_are_refused(fields: dict[str, object], facts: tuple[str, ...], tmp_path: Path) -> None:
    with refused(ConfigurationError, *facts):
        trainer(tmp_path, **fields)


def test_a_cache_over_its_limit_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, prefix_cache_limit="1KB", position=3)
    with refused(ConfigurationError, "hidden states take 49,152 bytes", "limit of the prefix cache is 1,000"):
        made.train()


def test_blocks_of_two_lengths_are_refused(tmp_path: Path) -> None:
    with refused(DataError, "have 16 tokens", "12"):
        trainer(tmp_path, replay_dataset=noise(length=12, name="general"))


def test_save_model_writes_a_donor_repo(tiny_llama: Path, tmp_path: Path) -> None:
    family = copied(tiny_llama, tmp_path / "family")
    made = trainer(tmp_path / "run", family / "recipient")
    made.save_model(str(family / "law"))
    assert Donor.from_pretrained(family / "law").position == 3


def test_the_part_is_compared_with_the_whole_model_on_a_few_tokens(tmp_path: Path) -> None:
    base = recipient(max_position_embeddings=128)
    made = trainer(tmp_path, base, train_dataset=noise(length=100), max_steps=1)
    lengths = []
    made.model.lm_head.register_forward_hook(
        lambda module, args, output: lengths.append(output.shape[1]) if not torch.is_grad_enabled() else None
    )
    made.train()
    assert lengths.count(COMPARED_TOKENS) == 2  # by the part, and by the whole model
    assert 100 not in lengths


def test_norms_that_start_silent_have_a_learning_rate_of_their_own(tmp_path: Path) -> None:
    """A norm after the projections of Gemma 3 starts at -1; its weights go as far as those in the recipient."""
    model = randomised(tiny_model("gemma3_text", 4, seed=1), 1)
    for layer in model.model.layers:
        layer.post_feedforward_layernorm.weight.data.fill_(99.0)  # multiplies by 100
    made = trainer(tmp_path, model, train_dataset=noise(), learning_rate=1e-3, donor_layers=1, max_steps=3)
    rates = {name: factor for (_, name), factor in made.part.rates.items()}
    assert set(rates) == {"post_attention_layernorm.weight", "post_feedforward_layernorm.weight"}
    width = model.config.hidden_size
    assert rates["post_feedforward_layernorm.weight"] == pytest.approx(0.2 * width**0.5 * 100)
    made.create_optimizer()
    groups = [(group["lr"], len(group["params"])) for group in made.optimizer.param_groups if group["params"]]
    assert (pytest.approx(1e-3 * rates["post_feedforward_layernorm.weight"]), 1) in groups
    trained = sum(parameter.requires_grad for parameter in made.model.parameters())
    assert len(groups) >= 3 and sum(count for _, count in groups) == trained
    made.train()
    donor = made.donor.tensors()
    assert (donor["layers.0.post_feedforward_layernorm.weight"] != -1).any()


def test_the_default_learning_rate_is_lower_where_norms_follow_the_projections(tmp_path: Path) -> None:
    models = (recipient(), randomised(tiny_model("gemma3_text", 4, seed=1), 1))
    for model, factor in zip(models, (1, 3), strict=True):
        made = trainer(
            tmp_path / model.config.model_type, model, train_dataset=noise(), donor_layers=1, learning_rate=None
        )
        width = model.config.hidden_size
        assert made.args.learning_rate == pytest.approx(1e-2 * min(1, 192 / width) / factor)
