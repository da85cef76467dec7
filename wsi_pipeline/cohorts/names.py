"""What people call domains and splits, in tables and as folder names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from wsi_pipeline.cohorts.splits import Split
from wsi_pipeline.cohorts.tcga import Domain

__all__ = ["DOMAINS", "SPLIT_NAMES", "Place", "place_of"]

DOMAINS: Mapping[str, Domain] = MappingProxyType(
    {"ff": "FF", "frozen": "FF", "fresh-frozen": "FF", "ffpe": "FFPE", "paraffin": "FFPE"}
)
SPLIT_NAMES: Mapping[str, Split] = MappingProxyType(
    {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
)
_CYCLEGAN = re.compile(r"(train|val|valid|test)[_-]?(a|b)")


class Place(NamedTuple):
    """Domain and split that folder names state (empty where they do not), and the other folders."""

    domain: str
    split: str
    rest: tuple[str, ...]


def place_of(folders: Sequence[str]) -> Place:
    """Read ``FF``, ``FFPE``, ``train``, ``val``, ``test`` or ``trainA`` ... ``testB`` among folder names.

    A is frozen and B is FFPE, as in the data sets of CycleGAN and of AI-FFPE.
    """
    domain = split = ""
    rest = []
    for folder in folders:
        name = folder.lower()
        both = _CYCLEGAN.fullmatch(name)
        if both is not None:
            split, domain = SPLIT_NAMES[both[1]], "FF" if both[2] == "a" else "FFPE"
        elif name in DOMAINS:
            domain = DOMAINS[name]
        elif name in SPLIT_NAMES:
            split = SPLIT_NAMES[name]
        else:
            rest.append(folder)
    return Place(domain, split, tuple(rest))
