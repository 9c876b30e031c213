"""The demo from start to end: train a recipient, train a donor inside it, and show what the donor changes."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Any

from ..display import align_table
from ..errors import CheckpointError
from ..evaluation import perplexity
from ..storage import check_output_folder, read_json, write_json
from ..texts import TextSource, documents, pack
from ..training import train
from .texts import write_texts

_RECORD = "demo.json"
_PROMPTS = {"English": "If the value of the expression is", "Python source": "class Message:\n    def __init__(self,"}
_NAMES = {"English": "english", "Python source": "source"}


@dataclass(frozen=True)
class DemoSettings:
    """Sizes and numbers of steps; the defaults take about four minutes on two CPU cores."""

    train_characters: int = 1_500_000  # of each text
    test_characters: int = 40_000
    vocab_size: int = 2048  # at least 258
    hidden_size: int = 128
    num_layers: int = 6
    block_length: int = 128
    batch_size: int = 8
    recipient_steps: int = 800
    donor_layers: int = 2
    donor_steps: int = 400
    new_tokens: int = 60


@dataclass(frozen=True)
class DemoReport:
    """What the demo made and measured; prints as a report."""

    recipient: str  # its folder
    donor: str
    recipient_parameters: int
    donor_parameters: int
    layer_map: str
    perplexities: Mapping[str, Mapping[str, float]]  # by model, then by test text
    samples: Mapping[str, tuple[str, str, str]]  # by text: a prompt, its continuation by the recipient, with the donor
    seconds: Mapping[str, float]  # of training, also of earlier runs that were reused

    @property
    def recipient_unchanged(self) -> bool:
        """Whether the model with its donor switched off gives exactly the recipient's perplexities."""
        return self.perplexities["recipient, untouched"] == self.perplexities["donor switched off"]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return {**dataclasses.asdict(self), "recipient_unchanged": self.recipient_unchanged}

    def __str__(self) -> str:
        lines = []
        for text, (prompt, before, after) in self.samples.items():
            lines += _heading(f"{text}, prompt: {prompt!r}")
            lines += ["Recipient alone:", indent(prompt + before, "    ", lambda line: True), ""]
            lines += ["With the donor:", indent(prompt + after, "    ", lambda line: True)]
        lines += _heading("Perplexity on held-out text (lower is better)")
        rows = [[model, *(f"{value:.2f}" for value in row.values())] for model, row in self.perplexities.items()]
        lines += [align_table([["", *_PROMPTS], *rows]), ""]
        verdict = "equals" if self.recipient_unchanged else "DIFFERS FROM"
        lines += [f"With its donor switched off, the model {verdict} the recipient."]
        lines += [*_heading("Layers, in running order"), self.layer_map, ""]
        lines += [f"recipient  {self.recipient_parameters:,} parameters, trained in {self.seconds['recipient']:.0f} s"]
        lines += [f"donor      {self.donor_parameters:,} parameters, trained in {self.seconds['donor']:.0f} s"]
        lines += [*_heading("Files"), f"recipient  {self.recipient}", f"donor      {self.donor}", ""]
        lines += ["Use the donor from Python:", "", "    import transplant_hf", "    from transformers import pipeline"]
        return "\n".join([*lines, f'    generate = pipeline("text-generation", model={self.donor!r})'])


def run_demo(
    folder: Path,
    *,
    fresh: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    settings: DemoSettings | None = None,
) -> DemoReport:
    """Train a recipient and a donor on this machine and measure what the donor changes.

    What an earlier run with the same settings and texts finished is reused.
    """
    settings = settings or DemoSettings()
    folder = Path(folder).expanduser().resolve()
    record_file = folder / _RECORD
    check_output_folder(folder, overwrite or record_file.is_file())
    texts = write_texts(folder / "texts", settings.train_characters, settings.test_characters)
    content = b"".join(path.read_bytes() for path in texts.values())
    fingerprint = hashlib.sha256(repr(settings).encode() + content).hexdigest()
    # `made` names the finished parts and their training times; it is written after each, so that a killed run resumes.
    made = {} if fresh else _finished(record_file, fingerprint)
    recipient, donor = folder / "recipient", folder / "donor"
    if "recipient" not in made:
        record_file.unlink(missing_ok=True)
        made = {"recipient": train_recipient(texts, settings, recipient, quiet)}
        write_json(record_file, {"fingerprint": fingerprint, "seconds": made})
    if "donor" not in made:
        made["donor"] = _train_donor(texts, settings, recipient, donor, quiet)
        write_json(record_file, {"fingerprint": fingerprint, "seconds": made})
    return _measure(texts, settings, recipient, donor, made)


def _finished(record_file: Path, fingerprint: str) -> dict[str, float]:
    """The parts that an earlier run with the same settings and texts finished, with their training times."""
    try:
        record = read_json(record_file, "the demo's record")
    except CheckpointError:  # missing, of another version, or damaged: train again
        return {}
    return dict(record.get("seconds", {})) if record.get("fingerprint") == fingerprint else {}


def train_recipient(texts: Mapping[str, Path], settings: DemoSettings, target: Path, quiet: bool) -> float:
    """Pretrain a small Llama on English with Transformers' own `Trainer`."""
    from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

    from ..training.progress import StderrProgress

    tokenizer = _train_tokenizer(texts, settings)
    config = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.hidden_size * 11 // 4,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=max(settings.hidden_size // 32, 1),
        num_key_value_heads=max(settings.hidden_size // 32, 1),
        max_position_embeddings=settings.block_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    blocks = pack(texts["english-train"], tokenizer, settings.block_length, quiet=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".recipient-", dir=target.parent) as temporary:
        args = TrainingArguments(
            temporary,
            max_steps=settings.recipient_steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=settings.recipient_steps // 20,
            weight_decay=0.1,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        trainer: Any = Trainer(
            args=args,
            model_init=lambda: LlamaForCausalLM(config),  # called after the Trainer has set its seed
            train_dataset=blocks,
            callbacks=[StderrProgress(quiet)],
        )
        trainer.remove_callback(PrinterCallback)  # standard output is for the report
        seconds: float = trainer.train().metrics["train_runtime"]
        trainer.model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        shutil.copytree(temporary, target, dirs_exist_ok=True)  # other files in the folder stay
    return seconds


def _train_tokenizer(texts: Mapping[str, Path], settings: DemoSettings) -> Any:
    """Train a byte-level BPE tokenizer on English, and on some source so that indentation has tokens of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end, padding = "<|endoftext|>", "<|pad|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[end, padding],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # so that no text needs an unknown token
        show_progress=False,
    )
    english, source = (list(documents(TextSource(str(texts[f"{name}-train"])))) for name in ("english", "source"))
    tokenizer.train_from_iterator([*english, "\n".join(source)[: sum(map(len, english)) // 3]], trainer=trainer)
    # clean_up_tokenization_spaces would join " ." and "(" to the words before, which is wrong for source code.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token=padding,
        model_max_length=settings.block_length,
        clean_up_tokenization_spaces=False,
    )


def _train_donor(
    texts: Mapping[str, Path], settings: DemoSettings, recipient: Path, target: Path, quiet: bool
) -> float:
    """Train a donor on Python source, with a quarter of English replayed; return the seconds it took."""
    report = train(
        recipient,
        texts["source-train"],
        target,
        general=texts["english-train"],
        overwrite=True,
        donor_name="python-source",
        donor_layers=settings.donor_layers,
        block_length=settings.block_length,
        max_steps=settings.donor_steps,
        per_device_train_batch_size=settings.batch_size,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=quiet,
    )
    return report.seconds + report.cache_seconds


def _measure(
    texts: Mapping[str, Path], settings: DemoSettings, recipient: Path, donor: Path, seconds: Mapping[str, float]
) -> DemoReport:
    """Load the donor as a user would, and compare it with its recipient."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    untouched = AutoModelForCausalLM.from_pretrained(recipient)
    tokenizer = AutoTokenizer.from_pretrained(recipient)
    generate: Any = pipeline("text-generation", model=str(donor))
    model = generate.model
    tests = {
        text: pack(texts[f"{name}-test"], tokenizer, settings.block_length, quiet=True) for text, name in _NAMES.items()
    }

    def measured(of: Any) -> dict[str, float]:
        return {text: perplexity(of, blocks, quiet=True).value for text, blocks in tests.items()}

    def continued(prompt: str) -> str:
        # Small models repeat themselves in greedy decoding, hence the penalty.
        options = {"do_sample": False, "repetition_penalty": 1.15, "return_full_text": False}
        return str(generate(prompt, max_new_tokens=settings.new_tokens, **options)[0]["generated_text"])

    perplexities = {"recipient, untouched": measured(untouched), "recipient with donor": measured(model)}
    after = {text: continued(prompt) for text, prompt in _PROMPTS.items()}
    with model.disable_transplants():
        perplexities["donor switched off"] = measured(model)
        before = {text: continued(prompt) for text, prompt in _PROMPTS.items()}
    return DemoReport(
        recipient=str(recipient),
        donor=str(donor),
        recipient_parameters=untouched.num_parameters(),
        donor_parameters=model.num_parameters() - untouched.num_parameters(),
        layer_map=str(model.layer_map),
        perplexities=perplexities,
        samples={text: (prompt, before[text], after[text]) for text, prompt in _PROMPTS.items()},
        seconds=dict(seconds),
    )


def _heading(text: str) -> list[str]:
    return ["", text, "-" * len(text)]
