"""What makes two sides a bad comparison: other compression, other magnification, no patients."""

from __future__ import annotations

from wsi_pipeline.evaluation.statistics_file import StoredStatistics
from wsi_pipeline.evaluation.tile_sets import TileSet

__all__ = ["side_warnings"]

_MPP_TOLERANCE = 0.05
_STATED = ("TCGA barcode", "patient column of the index")
"""Rules by which patients are read; by the others they are guessed."""


def side_warnings(generated: TileSet | StoredStatistics, *others: TileSet | StoredStatistics) -> list[str]:
    """One line for each thing that a reader of the figures has to know about the inputs."""
    said = []
    for other in others:
        is_slide = isinstance(other, TileSet) and other.role == "source" and other.mpp is not None
        if not is_slide:  # a slide is stored as its scanner wrote it, and nobody can change that
            said += _encodings(generated, other)
        if isinstance(generated, TileSet) and isinstance(other, TileSet):
            said += _magnification(generated, other)
    for side in (generated, *others):
        if isinstance(side, TileSet) and side.role != "source":  # its patients are the generated side's
            said += _patients(side)
    return said


def _encodings(a: TileSet | StoredStatistics, b: TileSet | StoredStatistics) -> list[str]:
    first, second = _encoding(a), _encoding(b)
    if not first or not second or first == second:
        return []
    if isinstance(a, TileSet) and isinstance(b, TileSet) and a.is_lossless and b.is_lossless:
        return []
    return [
        f"encodings differ ({_role(a)} {first}, {_role(b)} {second}): compression alone changes FID, KID and "
        "similarity; store both alike"
    ]


def _encoding(side: TileSet | StoredStatistics) -> str:
    return side.encoding if isinstance(side, TileSet) else side.statistics.encoding


def _role(side: TileSet | StoredStatistics) -> str:
    return side.role if isinstance(side, TileSet) else "statistics file"


def _magnification(a: TileSet, b: TileSet) -> list[str]:
    if a.size != b.size:
        return [
            f"{a.role} tiles have {a.size[0]} x {a.size[1]} px, {b.role} tiles {b.size[0]} x {b.size[1]}: "
            "features depend on it; cut both alike"
        ]
    if a.mpp and b.mpp and abs(a.mpp[1] / b.mpp[1] - 1.0) > _MPP_TOLERANCE:
        return [
            f"{a.role} tiles have {a.mpp[1]:.3g} µm per pixel, {b.role} tiles {b.mpp[1]:.3g}: another "
            "magnification is another picture"
        ]
    return []


def _patients(side: TileSet) -> list[str]:
    count = len(set(side.groups))
    if count == len(side) and count > 1 and not side.group_rule.startswith(("slide", *_STATED)):
        return [
            f"{side.role}: every tile counts as a patient of its own (by {side.group_rule}); if there are "
            "fewer, intervals are too narrow: put patients into sub-folders, or use a tile index"
        ]
    if 1 < count < 10:
        each = ", one tile of each," if count == len(side) else ""
        return [f"{side.role}: {count} patients (by {side.group_rule}){each} make a rough interval"]
    return []
