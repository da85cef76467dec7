"""Which patients train, which validate, which test.

A patient's split is a function of the seed and the patient's name alone. Why not exact shares of the list: a
cohort grows, and a patient that was tested on must not train tomorrow because others joined. All slides of a
patient, of both domains, follow the patient: in published cohorts that were split by domain, 140 of the
training patients of one domain occur among the test patients of the other.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from wsi_pipeline.errors import ConfigError

__all__ = ["SPLITS", "Split", "SplitConfig", "draw_split", "one_spelling"]

Split: TypeAlias = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitConfig:
    """Shares of patients, used where the manifest states no split; they sum to 1."""

    train: float = 0.7
    val: float = 0.15
    test: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        shares = (self.train, self.val, self.test)
        if min(shares) < 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            raise ConfigError(f"split: shares {shares} of train, val and test; give numbers that sum to 1")


def one_spelling(patient: str) -> str:
    """What all spellings of a patient have in common: ``p1`` and ``P1`` of two laboratories are one."""
    return patient.strip().upper()


def draw_split(patient: str, config: SplitConfig) -> Split:
    """The split of a patient, however spelled."""
    digest = hashlib.sha256(f"{config.seed}/{one_spelling(patient)}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2.0**64
    if place < config.train:
        return "train"
    return "val" if place < config.train + config.val else "test"
