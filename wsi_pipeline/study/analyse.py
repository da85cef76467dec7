"""What the readers of a study could tell: accuracy, AUC, agreement, and equivalence to chance."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import median

from wsi_pipeline.errors import ConfigError, OutputError
from wsi_pipeline.study.pack import KEY_KIND
from wsi_pipeline.study.statistics import Estimate, auc, equivalence_p, kappa, share

__all__ = ["ReaderFigures", "StudyResult", "analyse", "write_table"]

CODE = re.compile(r"(?=.*[0-9])[A-Z][A-Z0-9-]{0,11}")
LIKELY = re.compile(r"[1-5] \d{1,7}([.,]\d{1,6})?")
"""Confidence and seconds; some spreadsheets write a comma."""
SIGN = {"real": -1, "synthetic": 1}
COLUMNS = {"study", "reader", "id", "answer", "confidence", "seconds"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderFigures:
    """One reader. ``sensitivity``: share of synthetic images called synthetic; ``specificity``: share of real
    ones called real; ``auc`` of the signed confidence, -5 (certainly real) to 5 (certainly synthetic);
    ``tost_p``: p of the two tests against chance; ``seconds``: median an image."""

    reader: str
    missing: int
    accuracy: Estimate
    sensitivity: Estimate
    specificity: Estimate
    auc: Estimate
    tost_p: float
    equivalent: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyResult:
    """All readers of a study of ``images``; ``kappa`` of every pair (``R1 R2``) on the images of both."""

    study: str
    images: int
    margin: float
    readers: tuple[ReaderFigures, ...]
    kappa: Mapping[str, float]


def analyse(key: Path, answers: Sequence[Path], *, margin: float = 0.1, alpha: float = 0.05) -> StudyResult:
    """Compare answers with the key; images without an answer are counted and left out.

    Raises ConfigError for another study's answers, an id that the key does not have, one image answered twice
    by a reader, a name in place of a code, or cells that cannot be.
    """
    if not 0 < margin < 0.5:
        raise ConfigError(f"study: the margin {margin:g} has to lie between 0 and 0.5")
    try:
        facts = json.loads(key.read_text("utf-8"))
        truth = {name: SIGN[tile["truth"]] for name, tile in facts["tiles"].items()}
        study = {KEY_KIND: facts["study"]}[facts["kind"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{key}: cannot be read as a study's key ({error}); give NAME.key.json") from error
    found: dict[str, dict[str, tuple[int, float]]] = defaultdict(dict)
    for path in answers:
        _read_answers(path, study, truth, found)
    pairs = {}
    for a, b in combinations(sorted(found), 2):
        both = found[a].keys() & found[b].keys()
        words = ([found[reader][name][0] > 0 for name in both] for reader in (a, b))
        pairs[f"{a} {b}"] = kappa(*words)
    readers = tuple(_figures(reader, found[reader], truth, margin, alpha) for reader in sorted(found))
    return StudyResult(study=study, images=len(truth), margin=margin, readers=readers, kappa=pairs)


def _figures(
    reader: str, found: Mapping[str, tuple[int, float]], truth: Mapping[str, int], margin: float, alpha: float
) -> ReaderFigures:
    synthetic = [score for name, (score, _) in found.items() if truth[name] > 0]
    real = [score for name, (score, _) in found.items() if truth[name] < 0]
    if not synthetic or not real:
        raise ConfigError(f"{reader}: has judged images of one kind only; wait for more answers")
    caught, passed = sum(score > 0 for score in synthetic), sum(score < 0 for score in real)
    p = equivalence_p(caught + passed, len(found), margin)
    return ReaderFigures(
        reader=reader,
        missing=len(truth) - len(found),
        accuracy=share(caught + passed, len(found)),
        sensitivity=share(caught, len(synthetic)),
        specificity=share(passed, len(real)),
        auc=auc(synthetic, real),
        tost_p=p,
        equivalent=p < alpha,
        seconds=median(seconds for _, seconds in found.values()),
    )


def _read_answers(
    path: Path, study: str, truth: Mapping[str, int], found: dict[str, dict[str, tuple[int, float]]]
) -> None:
    try:
        lines = path.read_text("utf-8-sig").splitlines() or [""]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give the CSV that a reader saved") from error
    rows = csv.DictReader(lines, delimiter=";" if ";" in lines[0] else ",")  # some spreadsheets save ;
    if not set(rows.fieldnames or ()) >= COLUMNS or len(lines) < 2:
        raise ConfigError(f"{path}: holds no answers in columns {', '.join(sorted(COLUMNS))}")
    try:
        listed = list(rows)
    except csv.Error as error:
        raise ConfigError(f"{path}: is damaged ({error}); give the CSV that a reader saved") from error
    for number, row in enumerate(listed, 2):
        reader, name, problem = str(row["reader"]), row["id"], ""
        if row["study"] != study or name not in truth:
            problem = f"image {name} of study {row['study']} is not in the key of study {study}"
        elif not CODE.fullmatch(reader):
            problem = f"reader {reader!r} is no code such as R01; names stay out of a study"
        elif name in found[reader]:
            problem = f"{reader} has judged image {name} before; give only the last file of each reader"
        elif row["answer"] not in SIGN or not LIKELY.fullmatch(f"{row['confidence']} {row['seconds']}"):
            problem = f"{row['answer']!r}, confidence {row['confidence']}, {row['seconds']} s is no answer"
        if problem:
            raise ConfigError(f"{path}, line {number}: {problem}")
        seconds = float(row["seconds"].replace(",", "."))
        found[reader][name] = SIGN[row["answer"]] * int(row["confidence"]), seconds


def write_table(path: Path, result: StudyResult) -> None:
    """One row a reader, for a spreadsheet; OutputError where there is a file already."""
    rows: list[dict[str, object]] = []
    for reader in result.readers:
        rows.append({})
        for name, value in asdict(reader).items():
            parts = value if isinstance(value, dict) else {"": value}
            rows[-1] |= {f"{name}_{part}".strip("_"): figure for part, figure in parts.items()}
    try:
        with path.open("x", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})", path=path) from error
