"""Two donors in one recipient, and a donor in a recipient that was changed after the donor was made.

Composition: donors for two domains, each trained alone at one position, are run together: one after the other, or side
by side. Transfer: the recipient is fine-tuned on a third text, and gets the donor that was made for it before. LoRA
adapters, trained alike, stand beside both.

    python benchmarks/composition.py --recipient FOLDER --text shakespeare.txt --general wikitext-2-test.txt
"""

from __future__ import annotations

import argparse
import copy
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import report
import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from transplant_hf import Donor, transplant
from transplant_hf.comparison.methods import METHODS, Prepared, Setting, donor_of, in_place
from transplant_hf.comparison.runs import Budget, measure, train_once
from transplant_hf.model.load_any_model import load_model
from transplant_hf.texts import Blocks, pack

_RATE = 1e-2


def main() -> None:
    """Measure both and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipient", type=Path, required=True, help="folder of the recipient")
    parser.add_argument("--text", required=True, help="first domain; the second is the standard library's source")
    parser.add_argument("--general", required=True, help="general text, which is measured only")
    parser.add_argument("--position", type=int, default=6)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--held-out-blocks", type=int, default=192)
    options = parser.parse_args()
    logging.disable_progress_bar()
    print(report.header(report.facts(0)), end="\n\n")
    study = Study(options)
    print(study.composition(), end="\n\n")
    print(study.transfer())


class Study:
    """What both measurements share.

    Args:
        options: Of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        tokenizer = AutoTokenizer.from_pretrained(options.recipient)
        library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        source = [path.read_text(encoding="utf-8") for path in library]
        packed = {
            "first": pack(options.text, tokenizer, 128),
            "second": pack(source, tokenizer, 128, max_blocks=4000, name="python source"),
            "general": pack(options.general, tokenizer, 128),
        }
        parts = {name: blocks.split(9, 1) for name, blocks in packed.items()}
        self.learned = {name: _spread(part[0], 1000) for name, part in parts.items()}
        self.held = {name: part[1].part(-options.held_out_blocks) for name, part in parts.items()}
        self.setting = _setting(lambda: load_model(options.recipient))

    def composition(self) -> str:
        """Return the table of two donors together."""
        position = self.options.position
        donors = {name: self._donor(self.setting, name, position) for name in ("first", "second")}
        rows = [self._row("recipient, untouched", self.setting.shared)]
        rows += [self._row(f"donor of the {name} domain", self._grown({name: donors[name]})) for name in donors]
        for names in (("first", "second"), ("second", "first")):
            both = self._grown({name: donors[name] for name in names})
            rows.append(self._row(f"one after the other, the {names[0]} one first", both))
        both.set_composition("side_by_side")
        for strength in (1.0, 0.75, 0.5):
            for name in donors:
                both.set_strength(name, strength)
            rows.append(self._row(f"side by side, strength {strength:g} each", both))
        both.set_composition("stacked")
        rows.append(self._row("one after the other, strength 0.5 each", both))
        adapters = {name: self._adapter(self.setting, name) for name in donors}
        rows += [self._row(f"LoRA of the {name} domain", adapters[name].model) for name in adapters]
        rows.append(self._row("LoRA, half of each added", _added(adapters, self.setting)))
        return report.table([f"two donors at position {position}", "first", "second", "general"], rows)

    def transfer(self) -> str:
        """Return the table of a recipient that was changed."""
        position = self.setting.count - 1
        donor = self._donor(self.setting, "first", position)
        adapter = self._adapter(self.setting, "first")
        changed = METHODS["full"].prepare(self.setting)
        self._train(changed, "second", 3e-4)
        changed.model.eval().requires_grad_(False)
        later = _setting(lambda: copy.deepcopy(changed.model))
        moved = later.load()
        with tempfile.TemporaryDirectory() as folder:
            adapter.save(Path(folder))
            from peft import PeftModel

            adapted = PeftModel.from_pretrained(moved, folder)
        made_for_it = self._donor(later, "first", position)
        rows = [
            self._row("recipient before it was changed", self.setting.shared),
            self._row("recipient after", later.shared),
            self._row("with the donor made before", transplant(later.shared, donor, position, name="first")),
            self._row("with the LoRA made before", adapted),
            self._row("with a donor made for it", transplant(later.shared, made_for_it, position, name="first")),
        ]
        head = [f"fine-tuned on the second domain; donor at {position}", "first", "second", "general"]
        return report.table(head, rows)

    def _donor(self, setting: Setting, name: str, position: int) -> Donor:
        prepared = in_place(setting, position)
        self._train(prepared, name, _RATE)
        return donor_of(prepared.model.eval())

    def _adapter(self, setting: Setting, name: str) -> Prepared:
        prepared = METHODS["lora"].prepare(setting)
        self._train(prepared, name, _RATE)
        return prepared

    def _train(self, prepared: Prepared, name: str, rate: float) -> None:
        print(f"training on the {name} domain", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            train_once(prepared, folder, rate, Budget(self.options.steps, seed=0, bf16=True), self.learned[name], None)

    def _grown(self, donors: Mapping[str, Donor]) -> Any:
        model = self.setting.shared
        for name, donor in donors.items():
            model = transplant(model, donor, self.options.position, name=name)
        return model

    def _row(self, label: str, model: Any) -> list[str]:
        return [label, *(f"{value:.1f}" for value in measure(model.eval(), self.held).values())]


def _setting(load: Any) -> Setting:
    return Setting(load, load().eval().requires_grad_(False), seed=0)


def _spread(blocks: Blocks, count: int) -> Blocks:
    chosen = torch.linspace(0, len(blocks) - 1, min(count, len(blocks))).round().long()
    return Blocks(blocks.tokens[chosen], blocks.name)


def _added(adapters: Mapping[str, Prepared], setting: Setting) -> Any:
    """Half of each adapter in one model."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        for name, prepared in adapters.items():
            prepared.model.save_pretrained(str(Path(folder, name)))
        model: Any = PeftModel.from_pretrained(setting.load(), str(Path(folder, "first")), adapter_name="first")
        model.load_adapter(str(Path(folder, "second")), adapter_name="second")
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    return model


if __name__ == "__main__":
    main()
