"""What training on a text does to the chats of a recipient that was trained to chat.

The untouched recipient answers questions, sampled at temperature 1. Each method of `transplant-hf compare` then trains
on the text, and the KL divergence from the recipient is measured on the tokens of these answers, with all and with 0.75
of what was learned.

    python benchmarks/chat.py RECIPIENT german.txt --general wikitext-2-test.txt --methods lora=3e-3 replace-spread=3e-4
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import report
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging

from transplant_hf.comparison.methods import METHODS, Setting
from transplant_hf.comparison.runs import PARTIAL_STRENGTH, Budget, train_once
from transplant_hf.comparison.study import split_texts

_TASKS = (
    "Explain {} to a child.",
    "Write a short poem about {}.",
    "List five facts about {}.",
    "What do people often get wrong about {}?",
    "Give me three pieces of advice about {}.",
    "Write the opening of a story about {}.",
    "Why does {} matter?",
    "Summarize the history of {} in two sentences.",
)
_TOPICS = ("the moon", "bread", "chess", "trains", "rain", "money", "bees", "sleep")
_HELD_OUT = 1  # blocks; texts are not measured
_SHOWN = "How do I boil an egg?"


class Chats(NamedTuple):
    """Questions with answers of the recipient.

    Args:
        tokens: `[chats, tokens]`, padded on the left and on the right.
        mask: What is not padding.
        answers: Which tokens are those of answers.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    answers: torch.Tensor


def main() -> None:
    """Train each method, and print a table and an answer of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipient", help="Hub id or folder of a model with a chat template")
    parser.add_argument("text", help="text to learn; compare's split is used")
    parser.add_argument("--general", required=True, help="general text, in a quarter of the rows")
    parser.add_argument("--methods", nargs="+", required=True, metavar="METHOD=RATE")
    parser.add_argument("--count", type=int, default=10, help="layers of a donor (default: 10)")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=256, help="blocks to train on (default: 256)")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--block-length", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of an answer (default: 64)")
    options = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.recipient, padding_side="left")

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(options.recipient, dtype=torch.float32)

    recipient = load().eval().requires_grad_(False)
    chats = sample_chats(recipient, tokenizer, options.new_tokens)
    texts = split_texts(
        options.text, options.general, [], recipient, tokenizer, options.block_length, options.blocks, _HELD_OUT
    )
    rows = []
    answers = {"untouched": answer(recipient, tokenizer, options.new_tokens)}
    for name, rate in (one.split("=") for one in options.methods):
        setting = Setting(load, recipient, options.count, 16, 0)
        prepared = METHODS[name].prepare(setting)
        budget = Budget(options.steps, options.batch_size, 0.25, 0)
        with tempfile.TemporaryDirectory() as folder:
            train_once(prepared, folder, float(rate), budget, texts.domain, texts.general)
        views: dict[float, Callable[[], Any]] = {1.0: partial(nullcontext, prepared.model)}
        if prepared.at_strength is not None:
            views[PARTIAL_STRENGTH] = partial(prepared.at_strength, PARTIAL_STRENGTH)
        for strength, enter in views.items():
            with enter() as model:
                divergence, same = compare_answers(recipient, model.eval(), chats)
                rows.append([METHODS[name].what, rate, f"{strength:g}", f"{divergence:.3f}", f"{same:.1%}"])
                answers[f"{METHODS[name].what}, {strength:g}"] = answer(model, tokenizer, options.new_tokens)
            print(rows[-1], flush=True)
    head = ["method", "learning rate", "strength", "KL, nats per token", "same most likely token"]
    print(f"{report.header(report.facts(torch.get_num_threads()))}\n\n{report.table(head, rows)}\n")
    for name, text in answers.items():
        print(f"- {name}: {text!r}")


def sample_chats(recipient: Any, tokenizer: Any, new_tokens: int) -> Chats:
    """Let the recipient answer a question about each topic for each task."""
    set_seed(0)
    questions = [task.format(topic) for topic in _TOPICS for task in _TASKS]
    inputs = _prompts(tokenizer, questions)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    tokens = recipient.generate(**inputs, max_new_tokens=new_tokens, **sampling)
    seen = inputs["input_ids"].shape[1]
    # The first end of a turn belongs to an answer, and what follows is padding.
    ends = (tokens[:, seen:] == tokenizer.eos_token_id).long()
    kept = (ends.cumsum(1) - ends == 0).long()
    answers = torch.cat([torch.zeros_like(inputs["attention_mask"]), kept], dim=1)
    return Chats(tokens, torch.cat([inputs["attention_mask"], kept], dim=1), answers.bool())


@torch.no_grad()
def compare_answers(recipient: Any, model: Any, chats: Chats, batch: int = 8) -> tuple[float, float]:
    """Return the mean KL(recipient || model) of the tokens of answers, and how often both prefer the same token."""
    divergence, same, count = 0.0, 0, 0
    for tokens, mask, answers in zip(*(part.split(batch) for part in chats), strict=True):
        predicting = answers[:, 1:]  # a position predicts the token after it
        wanted, found = (
            one(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, :-1][predicting]
            for one in (recipient, model)
        )
        wanted, found = wanted.log_softmax(-1), found.log_softmax(-1)
        divergence += float((wanted.exp() * (wanted - found)).sum())
        same += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        count += len(wanted)
    return divergence / count, same / count


def answer(model: Any, tokenizer: Any, new_tokens: int) -> str:
    """Return the greedy answer to one question."""
    inputs = _prompts(tokenizer, [_SHOWN])
    tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _prompts(tokenizer: Any, questions: Sequence[str]) -> Any:
    chats = [[{"role": "user", "content": question}] for question in questions]
    return tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )


if __name__ == "__main__":
    main()
