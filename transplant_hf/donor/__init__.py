"""Donors: contiguous decoder layers, with what is known of their making."""

from .donor import DONOR_FILES, Donor
from .record import DONOR_CONFIG, DonorRecord

__all__ = ["DONOR_CONFIG", "DONOR_FILES", "Donor", "DonorRecord"]
