"""One measured load, decoding or training in a fresh process; prints one line of JSON. Started by `gpu.py`.

A process holds one model, so that what fits the device alone can be measured, and peak memory is that model's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from gpu_models import SHAPES, GpuShape
from models import Folders
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from transplant_hf import AutoModelWithTransplant
from transplant_hf.partial import PREFIX_STATES, PartialRun, hidden_states, stack_of

__all__ = ["METHODS", "VARIANTS", "run"]

Row = dict[str, Any]
_PROMPT = 64
_KEPT_LOGITS = 16
_WARM_UP_STEPS = 2
_LEARNING_RATE = 1e-4
_LORA_RANK = 16
# What is loaded, by the folder it is in.
VARIANTS = ("whole", "whole-again", "transplant", "recipient")
METHODS = ("donor", "donor-states", "lora")


class Clock:
    """Times work on one device: by events on a CUDA stream, elsewhere by the processor's clock."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.cuda = torch.device(device).type == "cuda"

    def settle(self) -> float:
        """Wait for all work that was begun; returns the time, in seconds."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Run some work to its end; returns seconds and what it returned."""
        began = self.settle()
        if not self.cuda:
            result = work()
            return self.settle() - began, result
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = work()
        end.record()
        self.settle()
        return start.elapsed_time(end) / 1000, result

    def wake(self) -> None:
        """Do what the device does once in a process, before anything is measured."""
        square = torch.ones(64, 64, dtype=torch.bfloat16, device=self.device)
        (square @ square).sum().item()
        self.forget_peak()

    def forget_peak(self) -> None:
        """Reset the measurement of peak memory."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float | None:
        """Peak memory of the device in GiB; none is known of a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.cuda else None


def _load(shape: GpuShape, variant: str, folders: Folders, device: str, attention: str) -> Any:
    chosen = {"device_map": device, "attn_implementation": attention, "dtype": "auto"}
    if variant == "transplant":
        return AutoModelWithTransplant.from_pretrained(folders.donor, **chosen)
    folder = folders.recipient if variant == "recipient" else folders.whole
    return AutoModelForCausalLM.from_pretrained(folder, **chosen)


def _tokens(shape: GpuShape, rows: int, length: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, shape.build_config().vocab_size, (rows, length), generator=generator).to(device)


@torch.no_grad()
def serve(shape: GpuShape, variant: str, folders: Folders, args: argparse.Namespace) -> Row:
    """Load a model to its first token, then decode with it; a transplant also switched off.

    Args:
        shape: The model.
        variant: One of `VARIANTS`.
        folders: Its files.
        args: The command line.

    Returns:
        Seconds to the first token, peak GiB; and for each state the tokens per second, peak GiB, the tokens, and the
        file with its logits.
    """
    clock = Clock(args.device)
    prompt = _tokens(shape, 1, _PROMPT, args.device)
    clock.wake()
    began = clock.settle()
    model = _load(shape, variant, folders, args.device, args.attention)
    int(model(prompt).logits[0, -1].argmax())
    seconds = clock.settle() - began
    found: Row = {"seconds": seconds, "peak_gib": clock.peak_gib(), "states": {}}
    states: list[tuple[str, Callable[[], AbstractContextManager[Any]]]] = [(variant, nullcontext)]
    if variant == "transplant":
        states.append(("disabled", model.disable_transplants))
    for name, switch in random.sample(states, len(states)):
        with switch():
            file = args.logits / f"{name}.safetensors"
            save_file({"logits": model(prompt).logits[0, -_KEPT_LOGITS:].float().cpu()}, file)
            found["states"][name] = {**_decode(model, prompt, clock, args), "logits": str(file)}
    return found


def _decode(model: Any, prompt: torch.Tensor, clock: Clock, args: argparse.Namespace) -> Row:
    def generate() -> torch.Tensor:
        mask = torch.ones_like(prompt)
        new = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens}
        return model.generate(prompt, attention_mask=mask, do_sample=False, pad_token_id=0, **new)

    generate()  # not counted: kernels are chosen and compiled now
    clock.forget_peak()
    runs = [clock.seconds(generate) for _ in range(args.repeats)]
    return {
        "tokens_per_second": args.tokens / statistics.median(seconds for seconds, _ in runs),
        "peak_gib": clock.peak_gib(),
        "tokens": runs[-1][1][0, _PROMPT:].tolist(),
    }


def train(shape: GpuShape, method: str, folders: Folders, args: argparse.Namespace) -> Row:
    """Take training steps by one method: forward, backward and AdamW, all in bf16.

    Args:
        shape: The model.
        method: "donor", in place in the frozen recipient; "donor-states", the same from hidden states that were
            computed before, as `DonorTrainer` does; "lora", rank 16 on all linear layers, by PEFT.
        folders: Its files.
        args: The command line.

    Returns:
        Seconds of a step (the median), the first loss, what that must be where it is known, how many numbers are
        trained, and peak GiB.
    """
    clock = Clock(args.device)
    clock.wake()
    tokens = _tokens(shape, args.batch, args.length, args.device)
    with _trainee(shape, method, folders, args, tokens) as (model, more):
        return _steps(model, {"input_ids": tokens, "labels": tokens, "use_cache": False, **more}, clock, args.steps)


def _steps(model: Any, inputs: Row, clock: Clock, count: int) -> Row:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_LEARNING_RATE, fused=clock.cuda)

    def step() -> torch.Tensor:
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    with torch.no_grad():
        first = float(model(**inputs).loss)
        expected = _expected_loss(model, inputs)
    clock.forget_peak()
    for _ in range(_WARM_UP_STEPS):
        step()
    runs = [clock.seconds(step) for _ in range(count)]
    return {
        "seconds": statistics.median(seconds for seconds, _ in runs),
        "first_loss": first,
        "expected_loss": expected,
        "last_loss": float(runs[-1][1]),
        "trained": sum(parameter.numel() for parameter in trained),
        "peak_gib": clock.peak_gib(),
    }


@contextmanager
def _trainee(
    shape: GpuShape, method: str, folders: Folders, args: argparse.Namespace, tokens: torch.Tensor
) -> Iterator[tuple[Any, Row]]:
    """Load a model of which only what the method trains requires a gradient; and what else it is called with."""
    variant = "recipient" if method == "lora" else "transplant"
    model = _load(shape, variant, folders, args.device, args.attention).requires_grad_(False)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        rank = {"r": _LORA_RANK, "lora_alpha": 2 * _LORA_RANK}
        yield get_peft_model(model, LoraConfig(**rank, target_modules="all-linear", task_type="CAUSAL_LM")), {}
        return
    own = [number for number, (source, _) in enumerate(model.layer_map) if source != "recipient"]
    for layer in own:
        stack_of(model)[layer].requires_grad_(True)
    if method == "donor":
        yield model, {}
        return
    states = hidden_states(model, tokens, [own[0]])[own[0]]
    with PartialRun(model, range(own[0], len(model.layer_map))):
        yield model, {PREFIX_STATES: states}


def _expected_loss(model: Any, inputs: Row) -> float | None:
    """What the first loss must be, where it is known: LoRA starts as the recipient."""
    if not hasattr(model, "disable_adapter"):
        return None
    with model.disable_adapter():
        return float(model(**inputs).loss)


def run(words: Sequence[str] | None = None) -> Row:
    """Measure what the command line names.

    Args:
        words: The command line; by default the process's own.
    """
    args = _parser().parse_args(words)
    shape = SHAPES[args.shape]
    name = shape.kind.model_type
    importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    importlib.import_module("transformers.generation")
    folders = Folders(args.folder / shape.name)
    measure = serve if args.what in VARIANTS else train
    return measure(shape, args.what, folders, args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python benchmarks/one_gpu.py tiny transplant FOLDER --device cpu"
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("what", choices=[*VARIANTS, *METHODS])
    parser.add_argument("folder", type=Path, help="the work folder of gpu.py")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens (default: 128)")
    parser.add_argument("--repeats", type=int, default=3, help="times they are generated (default: 3)")
    parser.add_argument("--logits", type=Path, default=Path(), help="where logits are written")
    parser.add_argument("--steps", type=int, default=10, help="training steps (default: 10)")
    parser.add_argument("--batch", type=int, default=4, help="rows of a training step (default: 4)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (default: 512)")
    return parser


def main() -> None:
    """Measure what the command line names."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    print(json.dumps(run()))


if __name__ == "__main__":
    main()
