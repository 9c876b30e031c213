"""The demo's donor: layers that start as identity and learn Python source in the frozen recipient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from .budget import DemoBudget
from .texts import DemoTexts
from .tokenizer import encode_stream
from .training import draw_blocks, train

__all__ = ["DONOR_NAME", "build_donor"]

DONOR_NAME = "python-source"


def build_donor(texts: DemoTexts, budget: DemoBudget, recipient: Path, target: Path, quiet: bool = False) -> None:
    """Train a donor in a recipient and save it as a donor repo.

    Args:
        texts: Both domains: source code to learn, English text to replay.
        budget: Sizes and steps.
        recipient: The recipient's folder.
        target: The folder to write.
        quiet: Show no progress bar.
    """
    tokenizer = AutoTokenizer.from_pretrained(recipient)
    source = encode_stream(tokenizer, texts.source.train_texts())
    english = encode_stream(tokenizer, texts.english.train_texts())
    replayed = round(budget.batch_size * budget.replay_fraction)

    def draw(generator: torch.Generator) -> torch.Tensor:
        learnt = draw_blocks(source, budget.batch_size - replayed, budget.context, generator)
        return torch.cat([learnt, draw_blocks(english, replayed, budget.context, generator)])

    model = with_untrained_donor(LlamaForCausalLM.from_pretrained(recipient), budget)
    train(
        model,
        draw,
        steps=budget.donor_steps,
        lr=budget.donor_learning_rate,
        seed=budget.seed + 1,
        title="Training donor",
        quiet=quiet,
    )
    save_donor(model, budget.donor_position, target)


def with_untrained_donor(recipient: PreTrainedModel, budget: DemoBudget) -> Any:
    """Insert a donor that does nothing yet, and freeze everything else.

    The donor's layers are those of the recipient before the position, started as the identity: each adds zero to
    the hidden state, so the model starts out as the untouched recipient.

    Args:
        recipient: The loaded recipient.
        budget: Gives number of layers and position.

    Returns:
        The transplanted model, of which only the donor's layers require gradients.
    """
    # Imported late: it brings the whole package with it.
    from .. import Donor, transplant

    last_first = budget.recipient_layers - budget.donor_layers
    first = min(max(budget.donor_position - budget.donor_layers, 0), last_first)
    layers = range(first, first + budget.donor_layers)
    untrained = Donor.from_model(recipient, layers, name=DONOR_NAME, init="identity")
    model = transplant(recipient, untrained, position=budget.donor_position)
    model.requires_grad_(False)
    for number in model.layer_map.layers_of(DONOR_NAME):
        model.model.layers[number].requires_grad_(True)
    return model


def save_donor(model: Any, position: int, target: Path) -> None:
    """Save the trained layers as a donor repo, which `pipeline` loads by its folder.

    Args:
        model: The transplanted model.
        position: Number of recipient layers that run before the donor.
        target: The folder to write.
    """
    from .. import Donor

    trained = Donor.from_model(model, layers=model.layer_map.layers_of(DONOR_NAME), name=DONOR_NAME)
    trained.save_pretrained(target, position=position)
