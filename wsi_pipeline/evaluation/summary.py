"""The figures in a few plain sentences, for a reader who knows tissue and not FID.

The words for similarity rest on 17 real tiles (core/structure.py): recolouring alone 0.95 to 1, blur of 1 px
0.96 to 0.99, of 2 px 0.77 to 0.90, of 3 px 0.57 to 0.79; another tile 0.
"""

from __future__ import annotations

from pathlib import PurePath

import numpy as np

from wsi_pipeline.evaluation.figures import Figure
from wsi_pipeline.evaluation.result import EvaluationResult

__all__ = ["in_short", "side_names"]

KEPT, CHANGED = 0.9, 0.7
STILL = 0.5  # px
RUINED = 0.7
FEW = "rank-deficient"
"""What the warning of ``evaluate`` says where tiles are too few for FID."""


def in_short(result: EvaluationResult) -> list[str]:
    """One sentence for each question that was measured."""
    answers = (_closer(result), _unshown(result), _nuclei(result), _moved(result), _ruined(result))
    return [sentence for sentence in answers if sentence]


def side_names(result: EvaluationResult) -> dict[str, str]:
    """Role -> name of its folder or file, with the folders above as far as it takes to tell sides apart."""
    parts = {side.role: PurePath(side.origin).parts for side in result.sides}
    names = {side.role: side.origin for side in result.sides}
    for count in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {role: str(PurePath(*found[-count:])) for role, found in parts.items()}
        if len(set(names.values())) == len(set(parts.values())):
            break
    return names


def _closer(result: EvaluationResult) -> str:
    name = "fid" if result.figure("fid") is not None else "kid"
    after, before = result.figure(name), result.figure(f"{name}_source")
    if after is None:
        return ""
    few = name == "fid" and any(FEW in warning for warning in result.warnings)
    if before is None:
        means = "of so few tiles, which raise it by themselves: it says little" if few else "0: equal sets"
        return f"Distance to the reference set: {name.upper()} {after.text} ({means})."
    caution = "; so few tiles raise both figures by themselves" if few else ""
    closer = "closer to" if after.value < before.value else "no closer to"
    return (
        f"As a set, the generated tiles look {closer} the reference set than their sources do: "
        f"{name.upper()} {after.text} against {before.text}{_overlap(after, before)}{caution}."
    )


def _unshown(result: EvaluationResult) -> str:
    """KID is unbiased: an interval with 0 in it is what two halves of one set have."""
    figure = result.figure("kid")
    if figure is None or figure.interval is None or not figure.interval.low <= 0.0 <= figure.interval.high:
        return ""
    return (
        f"KID {figure.text} has 0 in its interval ({figure.interval_text}): no difference from the reference "
        "set is shown, which does not say that there is none."
    )


def _overlap(after: Figure, before: Figure) -> str:
    a, b = after.interval, before.interval
    if a is None or b is None or a.high < b.low or b.high < a.low:
        return ""
    return " (the intervals overlap: more patients are needed to be sure)"


def _nuclei(result: EvaluationResult) -> str:
    figure = result.figure("structure_ssim")
    if figure is None:
        return ""
    if figure.value >= KEPT:
        words = "The nuclei were kept"
    elif figure.value >= CHANGED:
        words = "Outlines of nuclei changed (blur, sharpening or redrawing)"
    else:
        words = "The structure of the source was not kept"
    return f"{words}: haematoxylin similarity {figure.text} (1: nothing but the staining changed)."


def _moved(result: EvaluationResult) -> str:
    figure = result.figure("shift_p95")
    if figure is None:
        return ""
    words = "The tissue did not move" if figure.value < STILL else "Parts of the tissue moved"
    return f"{words}: {figure.text} in the worst twentieth of a tile."


def _ruined(result: EvaluationResult) -> str:
    values_N = None if result.tiles is None else result.tiles.values.get("structure_ssim")
    if values_N is None or not np.isfinite(values_N).any():
        return ""
    known = int(np.isfinite(values_N).sum())
    bad = int((values_N < RUINED).sum())  # NaN is not less than anything
    if not bad:
        return f"No tile of {known} has a similarity below {RUINED:g}."
    have = "has" if bad == 1 else "have"
    return f"{bad} of {known} tiles {have} a similarity below {RUINED:g}: look at the worst tiles."
