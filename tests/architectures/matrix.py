"""Transplant into a tiny random model of one type and check everything that is promised of every type.

`python -m tests.architectures.matrix [type ...]` prints a line for each type; `--json FILE` keeps the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from tests.architectures.reference import layers_of, reference_logits
from tests.architectures.tiny_models import (
    CANNOT_BUILD,
    CAUSAL_LM_TYPES,
    NOT_DECODER_ONLY,
    tiny_config,
    tiny_inputs,
    tiny_model,
)
from tests.architectures.tiny_overrides import CACHE_DIFFERS
from transplant_hf import AutoModelWithTransplant, Donor, DonorSpec, TransplantError
from transplant_hf.model.native_methods import recipient_class

__all__ = [
    "CHECKED_TYPES",
    "LEFT_OUT",
    "NOT_AT",
    "REFUSED",
    "VARIANTS",
    "Checked",
    "Pair",
    "check",
    "places",
    "prepare",
]

# Types that Transformers' own Auto class cannot load from a checkpoint.
NO_AUTO_CLASS = {
    "musicgen": "AutoModelForCausalLM of Transformers hands the decoder class the whole configuration and fails",
    "musicgen_melody": "AutoModelForCausalLM of Transformers hands the decoder class the whole configuration and fails",
}
LEFT_OUT = {**NOT_DECODER_ONLY, **CANNOT_BUILD, **NO_AUTO_CLASS}
CHECKED_TYPES = [name for name in CAUSAL_LM_TYPES if name not in LEFT_OUT]

# Refused by name, and a part of what the user reads.
REFUSED = {
    "blt": "several",
    "dory": "n_recurrent_loops",
    "gemma3n_text": "hidden_size_per_layer_input|num_kv_shared_layers",
    "gemma4": "hidden_size_per_layer_input|num_kv_shared_layers",
    "gemma4_text": "hidden_size_per_layer_input",
    "glm_moe_dsa": "indexer",
    "hrm_text": "several",
    "hy_v4": "indexer",
    "inkling2_loop_text": "number is computed while loading",
    "inkling2_text": "number is computed while loading",
    "xlm": "no list of layers",
}
# Types that work, but not at every position.
NOT_AT = {"rwkv": {0: "normalizes the embeddings"}}

# Configurations of a type beside the one that is checked by its name.
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2:inverse": {"scale_attn_by_inverse_layer_idx": True},
    "gemma4_text:plain": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    "glm_moe_dsa:full": {"indexer_types": ["full"] * 4},
    "hy_v4:full": {"indexer_types": ["full"] * 4},
}
DONOR_LAYERS = (1, 2)
# Types of which those layers cannot leave their model, and layers that can.
OTHER_LAYERS: dict[str, tuple[int, ...]] = {"zamba": (2,), "zamba2": (2,)}
TOLERANCE = 2e-4


@dataclasses.dataclass(frozen=True)
class Pair:
    """A recipient and a donor of one type on disk, and the models they were made of."""

    folder: Path
    recipient: PreTrainedModel
    source: PreTrainedModel
    ids: torch.Tensor
    layers: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        """L."""
        return len(layers_of(self.recipient))


@dataclasses.dataclass
class Checked:
    """What was seen of one type at one position."""

    native: bool = False
    difference: float = 0.0
    failures: list[str] = dataclasses.field(default_factory=list)


def prepare(model_type: str, folder: Path, num_layers: int = 4) -> Pair:
    """Save a tiny recipient and a donor of two of another model's layers."""
    changes = VARIANTS.get(model_type, {})
    model_type = model_type.partition(":")[0]
    made = tiny_model(model_type, num_layers, seed=1, **changes)
    made.save_pretrained(folder / "recipient")
    if type(made.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        # Published under the composite configuration; the Auto class takes the text part out of it.
        tiny_config(model_type, num_layers).save_pretrained(folder / "recipient")
    recipient = AutoModelForCausalLM.from_pretrained(folder / "recipient", dtype=torch.float32)
    source = tiny_model(model_type, num_layers, seed=2, **changes)
    layers = OTHER_LAYERS.get(model_type, DONOR_LAYERS)
    donor = Donor.from_model(source, list(layers), name="donor")
    donor.save_pretrained(folder / "donor", position=1, recipient=str(folder / "recipient"))
    return Pair(folder, recipient, source, tiny_inputs(recipient.config), layers)


@torch.no_grad()
def check(pair: Pair, position: int, replace: bool = False) -> Checked:
    """Load a transplant and compare it with the reference, itself and the recipient."""
    spec = DonorSpec(str(pair.folder / "donor"), position, mode="replace" if replace else "insert")
    model = AutoModelWithTransplant.from_pretrained(
        pair.folder / "recipient", donors=[spec], keep_replaced=replace, dtype=torch.float32
    )
    seen = Checked(native=model._transplant.blueprint.native)
    ids, own = pair.ids, pair.recipient
    expected = reference_logits(own, pair.source, ids, layers=pair.layers, position=position, replace=replace)
    logits = model(ids, use_cache=False).logits
    seen.difference = float((logits - expected).abs().max())
    untouched = own(ids, use_cache=False).logits
    if seen.difference > TOLERANCE * max(1.0, float(expected.abs().max())):
        seen.failures.append(f"logits differ from the reference by {seen.difference:.2g}")
    if float((logits - untouched).abs().max()) < 1e-4:
        seen.failures.append("the donor changes nothing")
    _check_generation(model, own, ids, seen)
    _check_switch(model, own, ids, seen)
    _check_saved(model, pair.folder, ids, seen)
    return seen


def _generate(model: Any, ids: torch.Tensor, **kwargs: Any) -> Any:
    return model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=1, **kwargs)


def _check_generation(model: Any, own: Any, ids: torch.Tensor, seen: Checked) -> None:
    if not model.can_generate() or own.config.model_type in CACHE_DIFFERS:
        return
    if not torch.equal(_generate(model, ids, use_cache=True), _generate(model, ids, use_cache=False)):
        seen.failures.append("cached generate differs from uncached")


def _check_switch(model: Any, own: Any, ids: torch.Tensor, seen: Checked) -> None:
    with model.disable_transplants():
        if not torch.equal(model(ids, use_cache=False).logits, own(ids, use_cache=False).logits):
            seen.failures.append("switched off, logits are not the recipient's")
        if model.can_generate() and not torch.equal(_generate(model, ids), _generate(own, ids)):
            seen.failures.append("switched off, generate is not the recipient's")


def _check_saved(model: Any, folder: Path, ids: torch.Tensor, seen: Checked) -> None:
    logits = model(ids, use_cache=False).logits
    model.save_pretrained(folder / "full")
    # Text parts of some composite models are no type of their own for the Auto class; their class loads them.
    plain = AutoModelForCausalLM if type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING else recipient_class(type(model))
    loader: Any = plain if seen.native else AutoModelForCausalLM
    again, info = loader.from_pretrained(folder / "full", dtype=torch.float32, output_loading_info=True)
    if seen.native and hasattr(again, "transplant_config"):
        seen.failures.append("saved in full, it is not a plain native checkpoint")
    if info["missing_keys"] or info["unexpected_keys"]:
        seen.failures.append(f"saved in full, keys are off: {str(info)[:100]}")
    # Transposing converters lay the same numbers out in another order, which changes the last bit of a sum.
    if not torch.allclose(again(ids, use_cache=False).logits, logits, rtol=1e-5, atol=1e-5):
        seen.failures.append("saved in full and reloaded, logits differ")
    model.save_pretrained(folder / "thin", thin=True)
    again = AutoModelForCausalLM.from_pretrained(folder / "thin", dtype=torch.float32)
    if not torch.allclose(again(ids, use_cache=False).logits, logits, rtol=1e-5, atol=1e-5):
        seen.failures.append("saved thin and reloaded, logits differ")


def places(pair: Pair) -> list[tuple[int, bool]]:
    """Positions 0, 1, middle and L, and a replacement of the recipient's layers of the same numbers."""
    inserted = dict.fromkeys((0, 1, pair.num_layers // 2, pair.num_layers))
    return [*((position, False) for position in inserted), (pair.layers[0], True)]


def survey(model_type: str) -> dict[str, Any]:
    """Check one type at every position, and say what happened."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            pair = prepare(model_type, Path(folder))
        except TransplantError as error:
            return {"refused": str(error)}
        for position, replace in places(pair):
            name = "replace" if replace else f"insert {position}"
            try:
                results[name] = dataclasses.asdict(check(pair, position, replace))
            except TransplantError as error:
                results[name] = {"failures": [f"{type(error).__name__}: {error}"]}
            except Exception as error:  # noqa: BLE001 - a survey lists whatever happened
                where = traceback.extract_tb(error.__traceback__)[-1]
                text = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
                results[name] = {"failures": [text]}
    reasons = [seen["failures"][0] for seen in results.values() if seen["failures"]]
    if len(reasons) == len(results) and all("CompatibilityError" in reason for reason in reasons):
        return {"refused": reasons[0].partition(": ")[2].replace(folder, "")}
    return results


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each type."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", default=[], help="model types; all by default")
    parser.add_argument("--json", type=Path, help="where to keep the results")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    results = {}
    for model_type in tqdm(options.types or [*CHECKED_TYPES, *VARIANTS], file=sys.stderr):
        start = time.perf_counter()
        try:
            found = survey(model_type)
        except Exception as error:  # noqa: BLE001
            found = {"crash": f"{type(error).__name__}: {error}"}
        results[model_type] = found
        bad = {name: seen["failures"] for name, seen in found.items() if isinstance(seen, dict) and seen["failures"]}
        bad |= {name: seen for name, seen in found.items() if not isinstance(seen, dict)}
        kinds = "".join("N" if isinstance(s, dict) and s.get("native") else "s" for s in found.values())
        print(f"{model_type:28s} {kinds:6s} {bad or 'ok'} {time.perf_counter() - start:.1f}s", flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
