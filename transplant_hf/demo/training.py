"""The training loop that recipient and donor share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ..errors import TransplantError
from .optimizer import learning_rate_factor, make_optimizers
from .threads import quickest_threads

__all__ = ["draw_blocks", "loss_of", "train"]


def draw_blocks(stream: torch.Tensor, count: int, context: int, generator: torch.Generator) -> torch.Tensor:
    """Draw blocks that start anywhere in a stream of tokens.

    Args:
        stream: Token numbers of shape (tokens,).
        count: Number of blocks.
        context: Number of tokens to predict in each block.
        generator: Source of the random starts.

    Returns:
        Token numbers of shape (count, context + 1): each block's inputs, and its targets one to the right.

    Raises:
        TransplantError: The stream is shorter than one block.
    """
    if len(stream) <= context:
        raise TransplantError(f"The demo's text has {len(stream)} tokens, too few for blocks of {context + 1}.")
    starts = torch.randint(0, len(stream) - context, (count,), generator=generator)
    return stream[starts[:, None] + torch.arange(context + 1)]


def train(
    model: PreTrainedModel,
    draw: Callable[[torch.Generator], torch.Tensor],
    *,
    steps: int,
    lr: float,
    seed: int,
    title: str,
    quiet: bool = False,
) -> float:
    """Train the parameters of a model that require gradients.

    Args:
        model: The model; changed in place, and left in evaluation mode.
        draw: Returns one batch of shape (blocks, context + 1).
        steps: Number of steps.
        lr: Peak learning rate.
        seed: Seed of the batches.
        title: What the progress bar says.
        quiet: Show no progress bar.

    Returns:
        Training loss, smoothed over the last steps, in nats per token.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizers = make_optimizers(model.named_parameters(), lr)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    trained = [parameter for group in groups for parameter in group["params"]]
    smoothed = float("nan")
    model.train()
    sample = draw(torch.Generator().manual_seed(seed))
    with (
        quickest_threads(lambda: loss_of(model, sample).backward()),
        tqdm(total=steps, desc=title, unit="step", disable=quiet) as progress,
    ):
        model.zero_grad()
        for step in range(steps):
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * learning_rate_factor(step, steps)
            loss = loss_of(model, draw(generator))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            value = loss.item()
            smoothed = value if step == 0 else 0.98 * smoothed + 0.02 * value
            progress.set_postfix(loss=f"{smoothed:.2f}", refresh=False)
            progress.update()
    model.eval()
    return smoothed


def loss_of(model: PreTrainedModel, blocks: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the last `context` tokens of each block.

    Args:
        model: A causal language model.
        blocks: Token numbers of shape (blocks, context + 1).

    Returns:
        A scalar, in nats per token.
    """
    logits = model(input_ids=blocks[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), blocks[:, 1:].flatten())
