"""The mpp court: which of the statements about a slide's pixel size is believed.

Why a court. A wrong pixel size silently ruins everything downstream (the generator sees nuclei of the
wrong size), and slide files contradict themselves often enough: a TIFF re-saved at "72 dpi", a vendor tag
that survived a down-sampling, an objective power that ignores the camera adapter. So each reader files
every statement that it finds as an ``MppClaim``; ``settle_mpp`` judges:

1. An override (``--mpp`` or a row of the table) wins and is recorded as the origin.
2. Claims outside ``PLAUSIBLE`` are thrown out (352.78 um is 72 dpi, 264.58 um is 96 dpi, 25400 um is
   "1 per inch"): they describe paper, not glass. So are pixels more than four times as long as wide. The
   error says what they were.
3. *Measured* claims (vendor property, OME-XML, TIFF resolution) must agree within 5 % on both axes.
4. *Nominal* claims (objective power P, taken as 10/P um) are used only when nothing measured exists. 40x
   scanners span 0.22 to 0.28 um and 20x scanners 0.45 to 0.55, so a nominal claim contradicts a measured
   one only when the ratio exceeds 1.4, that is, when it is clearly another magnification (the next one
   is a factor 2 away).
5. Nothing left: ``MissingMppError``. The pipeline never guesses.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from wsi_pipeline.core.geometry import Mpp
from wsi_pipeline.errors import ConfigError, MissingMppError, MppConflictError

__all__ = [
    "MppClaim",
    "mpp_from_length",
    "mpp_from_objective",
    "mpp_from_resolution",
    "mpp_of_cells",
    "parse_number",
    "plausible",
    "read_mpp_table",
    "settle_mpp",
]

PLAUSIBLE = (0.02, 20.0)
MAX_STRETCH = 4.0
MEASURED_TOLERANCE = 0.05
NOMINAL_RATIO = 1.4

# Micrometres per unit. Keys are lower case; OME writes the micro sign as U+00B5 and some tools as U+03BC.
_UM_PER_UNIT = {
    "µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0, "micrometre": 1.0,
    "nm": 1e-3, "nanometer": 1e-3, "nanometre": 1e-3, "mm": 1e3, "millimeter": 1e3, "millimetre": 1e3,
    "cm": 1e4, "centimeter": 1e4, "centimetre": 1e4, "m": 1e6, "meter": 1e6, "metre": 1e6,
    "pm": 1e-6, "picometer": 1e-6, "å": 1e-4, "angstrom": 1e-4, "in": 25400.0, "inch": 25400.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class MppClaim:
    """One statement about the pixel size: who says it, what, and whether it is only a nominal value.

    ``mpp`` is (y, x) in micrometres per level-0 pixel and may be nonsense (zero, NaN, 72 dpi): judging is
    the court's work, not the witness's.
    """

    origin: str
    mpp: Mpp
    nominal: bool = False

    def __str__(self) -> str:
        stated = not any(math.isnan(value) for value in self.mpp)
        return f"{self.origin} = {_show(self.mpp)}" if stated else self.origin


def parse_number(text: object) -> float:
    """First number of a text, decimal point or comma (``"0,2527 um"`` is 0.2527); NaN where there is none."""
    match = re.search(r"[-+]?\d*[.,]?\d+(?:[eE][-+]?\d+)?", str(text))
    return float(match.group().replace(",", ".")) if match else math.nan


def mpp_from_resolution(pixels_per_unit: float, unit: str) -> float:
    """Micrometres per pixel of a resolution (pixels per inch, centimeter ...); NaN for none or no unit."""
    um = _UM_PER_UNIT.get(unit.strip().lower())
    return um / pixels_per_unit if um is not None and pixels_per_unit > 0 else math.nan


def mpp_from_length(length: float, unit: str) -> float:
    """Micrometres of a physical pixel size with its unit (OME-XML, NGFF); NaN for unknown units."""
    return length * _UM_PER_UNIT.get(unit.strip().lower(), math.nan)


def mpp_from_objective(power: float) -> float:
    """Nominal micrometres per pixel of an objective: 20x is 0.5, 40x is 0.25; NaN for no power."""
    return 10.0 / power if power > 0 else math.nan


def plausible(mpp: Mpp) -> bool:
    """Whether both axes lie in the range of microscopes (0.02 to 20 um per pixel) and near each other."""
    inside = all(math.isfinite(value) and PLAUSIBLE[0] <= value <= PLAUSIBLE[1] for value in mpp)
    return inside and max(mpp) <= MAX_STRETCH * min(mpp)


def mpp_of_cells(x: str, y: str) -> Mpp | None:
    """Pixel size from the cells ``mpp`` and ``mpp_y`` of a table, decimal point or comma; None where both are
    empty, and for both axes where ``y`` is. Raises ValueError for what is no pixel size."""
    if not x and not y:
        return None
    pair = (float((y or x).replace(",", ".")), float(x.replace(",", ".")))
    if not plausible(pair):
        raise ValueError("no slide has such a pixel size")
    return pair


def settle_mpp(claims: Iterable[MppClaim], *, override: MppClaim | None, slide_id: str) -> tuple[Mpp, str]:
    """The (y, x) mpp that is believed, and its origin; ``claims`` come in order of trust.

    Raises MppConflictError where measured claims differ by more than 5 %, or a nominal one is clearly
    another magnification; MissingMppError where no plausible claim exists.
    """
    claims = list(claims)
    heard = [claim for claim in claims if plausible(claim.mpp)]
    if override is not None:
        stated = next((c for c in heard if not c.nominal), None)
        if stated is not None and _ratio(stated.mpp, override.mpp) > 1 + MEASURED_TOLERANCE:
            return override.mpp, f"{override.origin} (the file says {stated})"
        return override.mpp, override.origin
    measured = [claim for claim in heard if not claim.nominal]
    nominal = [claim for claim in heard if claim.nominal]
    believed = next(iter(measured or nominal), None)
    if believed is None:
        raise MissingMppError(_missing(claims, slide_id), slide_id=slide_id)
    for claims_of_kind, limit in ((measured, 1 + MEASURED_TOLERANCE), (nominal, NOMINAL_RATIO)):
        for claim in claims_of_kind:
            if _ratio(believed.mpp, claim.mpp) > limit:
                raise MppConflictError(
                    f"{slide_id}: pixel sizes contradict each other: {believed}, but {claim}; "
                    "state the right one with --mpp or in the mpp table",
                    slide_id=slide_id,
                )
    return believed.mpp, f"{believed.origin} (nominal)" if believed.nominal else believed.origin


def _ratio(first: Mpp, second: Mpp) -> float:
    return max(max(a / b, b / a) for a, b in zip(first, second, strict=True))


def _missing(claims: Sequence[MppClaim], slide_id: str) -> str:
    rejected = ", ".join(map(str, claims))
    seen = f" (found, but not credible: {rejected})" if rejected else ""
    return f"{slide_id}: no source states the pixel size{seen}; give it with --mpp or in the mpp table"


def _show(mpp: Mpp) -> str:
    y, x = (f"{value:.6g}" for value in mpp)
    return f"{x} um/px" if y == x else f"{y} (y) x {x} (x) um/px"


def read_mpp_table(path: str | Path) -> dict[str, Mpp]:
    """Overrides from a CSV with the columns ``slide,mpp[,mpp_y]``; keys are file names or stems as written.

    ``mpp`` is the x value, and the y value too where ``mpp_y`` is empty. Raises ConfigError for a table that
    cannot be read, a missing column, a value that is no plausible pixel size, or a slide named twice.
    """
    name = Path(path).name
    table: dict[str, Mpp] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            if not {"slide", "mpp"} <= set(rows.fieldnames or ()):
                raise ConfigError(
                    f"{name}: an mpp table needs the columns slide,mpp[,mpp_y] in its first line"
                )
            for row in rows:
                slide, mpp = _table_row(row, f"{name}, line {rows.line_num}")
                if slide in table:
                    raise ConfigError(f"{name}, line {rows.line_num}: {slide} is named twice; keep one row")
                table[slide] = mpp
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"{name}: the mpp table cannot be read ({error}); it must be a UTF-8 CSV"
        ) from error
    return table


def _table_row(row: dict[str | None, str | None], where: str) -> tuple[str, Mpp]:
    slide = (row.get("slide") or "").strip()
    if not slide or None in row:
        raise ConfigError(f"{where}: a row is slide,mpp[,mpp_y]; quote values that contain a comma")
    values = [(row.get(column) or "").strip() for column in ("mpp", "mpp_y")]
    try:
        x = float(values[0].replace(",", "."))
        y = float(values[1].replace(",", ".")) if values[1] else x
    except ValueError:
        x = y = math.nan
    if not plausible((y, x)):
        shown = values[0] if not values[1] else ",".join(values)
        raise ConfigError(f"{where}: {shown!r} is no pixel size in um; give a number from 0.02 to 20")
    return slide, (y, x)
