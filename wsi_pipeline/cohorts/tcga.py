"""What a TCGA slide barcode says: the patient, and whether the section is frozen or diagnostic FFPE.

TCGA-18-3408-01A-01-BS1        TCGA-A7-A13E-01Z-00-DX1
`--patient-' || |  | `-- number of the section
             || |  `---- BS, MS, TS: bottom, middle, top frozen section; DX: diagnostic (FFPE)
             || `------- portion
             |`--------- vial
             `---------- sample type: 01 to 09 tumour, 10 to 14 normal tissue (11: solid)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["Barcode", "Domain", "parse_barcode"]

Domain: TypeAlias = Literal["FF", "FFPE"]

_BARCODE = re.compile(
    r"(?<![A-Z0-9])(?P<patient>TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})-(?P<sample>\d\d)[A-Z]-[A-Z0-9]{2}-"
    r"(?P<section>BS|MS|TS|DX)[A-Z0-9]{0,2}(?![A-Z0-9])",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Barcode:
    """``patient``: the first 12 characters; ``domain`` of the section; ``normal``: no tumour sample."""

    patient: str
    domain: Domain
    normal: bool


def parse_barcode(name: str) -> Barcode | None:
    """The slide barcode in a file name (with whatever follows it), or None where there is none."""
    found = _BARCODE.search(name)
    if found is None:
        return None
    return Barcode(
        patient=found["patient"].upper(),
        domain="FFPE" if found["section"].upper() == "DX" else "FF",
        normal=10 <= int(found["sample"]) <= 14,
    )
