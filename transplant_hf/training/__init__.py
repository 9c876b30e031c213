"""Making donors: trained in the frozen recipient, or alone between its embeddings and its head."""

from .arguments import DonorTrainingArguments
from .donor_trainer import DonorTrainer
from .part_trainer import CachePlan, Part, PartTrainer
from .recovery import RecoveryArguments, RecoveryTrainer
from .rows import Rows
from .run import TrainingReport, recover_transplant, train_donor

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
    "recover_transplant",
    "train_donor",
]
