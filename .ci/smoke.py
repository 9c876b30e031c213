"""A short test of an installed transplant_hf, with nothing but what it depends on; run by `release`."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import subprocess
import sys
import tempfile
import time
from importlib import metadata, resources
from pathlib import Path

# Beyond what Transformers itself takes, on a machine that is busy.
MOST_SECONDS = 1.5
TEST_TOOLS = ("pytest", "mypy", "ruff")


def check_import() -> None:
    """Import from the environment, quickly."""
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

    assert AutoConfig and AutoModelForCausalLM and PreTrainedConfig
    began = time.perf_counter()
    import transplant_hf

    seconds = time.perf_counter() - began
    assert Path(transplant_hf.__file__).is_relative_to(sys.prefix), transplant_hf.__file__
    assert seconds < MOST_SECONDS, f"import transplant_hf took {seconds:.2f} s beside Transformers' own"
    version = metadata.version("transplant_hf")
    assert transplant_hf.__version__ == version, (transplant_hf.__version__, version)
    missing = [name for name in transplant_hf.__all__ if not hasattr(transplant_hf, name)]
    assert not missing, missing
    print(f"transplant_hf {version}: imported in {seconds:.2f} s beside Transformers' own, every public name there")


def check_files() -> None:
    """The files that are no Python came along; the tools of development did not."""
    package = resources.files("transplant_hf")
    for name in ("py.typed", "cards/templates/donor.md", "cards/templates/full_export.md"):
        assert package.joinpath(name).is_file(), f"transplant_hf/{name} is missing"
    there = [name for name in TEST_TOOLS if importlib.util.find_spec(name) is not None]
    assert not there, f"the environment is not empty: {there}"


def check_commands() -> None:
    """Every console command has help; so has every command of transplant-hf."""
    scripts = [e.name for e in metadata.distribution("transplant_hf").entry_points if e.group == "console_scripts"]
    assert scripts
    for script in scripts:
        path = Path(sys.executable).with_name(script)
        shown = subprocess.run([path, "--help"], capture_output=True, text=True, check=True).stdout
        assert "usage:" in shown, shown
    from transplant_hf.cli import main

    listed = [line.split()[0] for line in shown.splitlines() if line.startswith("    ") and line[4:5].isalpha()]
    assert {"demo", "convert", "inspect", "check"} <= set(listed), listed
    for command in listed:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            try:
                main([command, "--help"])
            except SystemExit as end:
                assert end.code == 0, command
        assert f"transplant-hf {command}" in out.getvalue() and "example:" in out.getvalue(), out.getvalue()
    print(f"help of {', '.join(scripts)}, and of {', '.join(listed)}")


def check_transplant(folder: Path) -> None:
    """Build a transplant from its configuration, and another from a donor's folder; generate with both."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    from transplant_hf import AutoModelWithTransplant, Donor, DonorSpec, TransplantConfig

    sizes = {"n_layer": 3, "n_embd": 8, "n_head": 2, "vocab_size": 16, "n_positions": 32}
    recipient = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    recipient.save_pretrained(folder / "recipient")
    donor = Donor.from_model(recipient, layers=[0, 1], name="law")
    donor.save_pretrained(folder / "donor", position=2, recipient=str(folder / "recipient"))
    assert "import transplant_hf" in (folder / "donor" / "README.md").read_text(encoding="utf-8")

    config = TransplantConfig(recipient=str(folder / "recipient"), donors=[DonorSpec(str(folder / "donor"), 2)])
    built = AutoModelWithTransplant.from_config(config)
    read = AutoModelForCausalLM.from_pretrained(folder / "donor")
    ids = torch.tensor([[1, 2, 3]])
    for model in (built, read):
        assert isinstance(model, GPT2LMHeadModel) and model.config.n_layer == 5
        made = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
        assert made.shape == (1, 7)
    with torch.no_grad(), read.disable_transplants():
        assert torch.equal(read(ids).logits, recipient(ids).logits)
    print("a transplant was built, loaded, generated with, and switched off")


def main() -> None:
    """Run every check."""
    check_import()
    from transformers.utils import logging

    logging.disable_progress_bar()
    check_files()
    check_commands()
    with tempfile.TemporaryDirectory() as folder:
        check_transplant(Path(folder))


if __name__ == "__main__":
    main()
