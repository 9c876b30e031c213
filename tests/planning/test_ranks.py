"""Two processes that hold a transplant between them: what each holds and reads is what the plan says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ecosystem.cases import Case, make_case
from tests.planning.ranks import RANKS, run_ranks
from transplant_hf.planning import plan


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Three of the architectures, their recipients in many shards."""
    made = {}
    for name in ("llama", "gemma3", "gpt_oss"):
        case = made[name] = make_case(name, tmp_path_factory.mktemp(name))
        recipient = case.recipient_model()
        (case.recipient / "model.safetensors").unlink()
        recipient.save_pretrained(case.recipient, max_shard_size=20_000)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "job", "parallel"),
    [
        ("llama", "tensor", "tensor"),
        ("gemma3", "tensor", "tensor"),
        ("gpt_oss", "tensor", "tensor"),
        ("gpt_oss", "expert", "expert"),
        ("llama", "fsdp_loaded", "fsdp"),
    ],
)
def test_a_rank_holds_and_reads_what_is_planned(
    cases: dict[str, Case], architecture: str, job: str, parallel: str
) -> None:
    case = cases[architecture]
    batch, context = case.ids.shape
    found = plan(
        case.recipient, {str(case.donor): 1}, devices=RANKS, parallel=parallel, batch=batch, context=context
    ).after
    (share,) = found.shares
    for _, said in run_ranks(job, case):
        assert share.weights == sum(said["held"].values()) + said["buffers"]
        assert share.cache == said["cache"]
        assert found.reading.bytes == sum(said["read"].values())
        # Each process opens every file, reads its part of each tensor, and compares the donor's sha256 by itself.
        files = {*case.recipient.glob("*.safetensors"), case.donor / "donor.safetensors"}
        assert {Path(path) for path in said["read"]} == files
        assert len(files) > 5
        assert all(0 < size < Path(path).stat().st_size for path, size in said["read"].items())
        (donor,) = said["hashed"].values()
        assert 0 < donor - found.reading.hashed < 10_000  # the file's header is hashed too
