"""Train donors inside a frozen recipient, or alone between its embeddings and head; and recover transplants."""

from .arguments import DonorTrainingArguments, RecoveryArguments
from .data import Rows
from .donor_trainer import DonorTrainer
from .part_trainer import Part, PartTrainer
from .prefix import CachePlan
from .recovery import RecoveryTrainer
from .runs import TrainingReport, recover, train

# Old names, for one release.
train_donor = train
recover_transplant = recover

__all__ = [
    "CachePlan",
    "DonorTrainer",
    "DonorTrainingArguments",
    "Part",
    "PartTrainer",
    "RecoveryArguments",
    "RecoveryTrainer",
    "Rows",
    "TrainingReport",
    "recover",
    "recover_transplant",
    "train",
    "train_donor",
]
