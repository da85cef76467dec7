"""OME-NGFF metadata documents, versions 0.4 and 0.5, as plain JSON values.

Source: the OME-NGFF specification, sections "multiscales", "omero" and "image-label". Level n is the
n-fold 2x2 mean, so its pixels are exactly 2^n times as large and its first pixel's centre lies
``(2^n - 1) / 2`` level-0 pixels further in; the ``translation`` states that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from wsi_pipeline.core.geometry import Mpp

__all__ = ["NgffVersion", "image_attributes", "label_attributes", "labels_attributes"]

NgffVersion: TypeAlias = Literal["0.4", "0.5"]

_CHANNELS = (("Red", "FF0000"), ("Green", "00FF00"), ("Blue", "0000FF"))


def image_attributes(
    name: str, mpp: Mpp, levels: int, version: NgffVersion, translation: bool, extra: dict[str, Any]
) -> dict[str, Any]:
    """Attributes of the image group; ``extra`` goes beside the OME metadata under ``wsi_pipeline``.

    ``translation`` False leaves out the half-pixel shifts, as bioformats2raw does.
    """
    multiscale = _multiscale(name, mpp, levels, "cyx", translation) | {
        "type": "mean2x2",
        "metadata": {"method": "2x2 box mean, round half up, odd sides padded by replication"},
    }
    omero = {
        "name": name,
        "channels": [_channel(label, color) for label, color in _CHANNELS],
        "rdefs": {"defaultT": 0, "defaultZ": 0, "model": "color"},
    }
    return _versioned({"multiscales": [multiscale], "omero": omero}, version) | {"wsi_pipeline": extra}


def labels_attributes(names: Sequence[str], version: NgffVersion) -> dict[str, Any]:
    """Attributes of the ``labels`` group."""
    if version == "0.5":
        return {"ome": {"version": version, "labels": list(names)}}
    return {"labels": list(names)}


def label_attributes(
    name: str,
    mpp: Mpp,
    levels: int,
    version: NgffVersion,
    colors: Sequence[tuple[int, Sequence[int]]],
    method: str,
) -> dict[str, Any]:
    """Attributes of one label image; ``mpp`` is that of its level 0, ``colors`` are (value, RGBA)."""
    multiscale = _multiscale(name, mpp, levels, "yx", translation=True) | {
        "type": "max2x2",
        "metadata": {"method": method},
    }
    label: dict[str, Any] = {
        "colors": [{"label-value": value, "rgba": list(rgba)} for value, rgba in colors],
        "source": {"image": "../../"},
    }
    return _versioned({"multiscales": [multiscale], "image-label": label}, version)


def _multiscale(name: str, mpp: Mpp, levels: int, axes: str, translation: bool) -> dict[str, Any]:
    channel = [{"name": "c", "type": "channel"}] if "c" in axes else []
    space = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]
    leading = [1.0] * len(channel)
    datasets = []
    for level in range(levels):
        factor = float(2**level)
        steps: list[dict[str, Any]] = [
            {"type": "scale", "scale": [*leading, mpp[0] * factor, mpp[1] * factor]}
        ]
        if level and translation:
            shift = [mpp[0] * (factor - 1) / 2, mpp[1] * (factor - 1) / 2]
            steps.append({"type": "translation", "translation": [0.0] * len(channel) + shift})
        datasets.append({"path": str(level), "coordinateTransformations": steps})
    return {"name": name, "axes": channel + space, "datasets": datasets}


def _channel(label: str, color: str) -> dict[str, Any]:
    return {
        "label": label,
        "color": color,
        "active": True,
        "coefficient": 1,
        "family": "linear",
        "inverted": False,
        "window": {"min": 0, "max": 255, "start": 0, "end": 255},
    }


def _versioned(ome: dict[str, Any], version: NgffVersion) -> dict[str, Any]:
    """0.5 has one version in an ``ome`` namespace, 0.4 one in each part."""
    if version == "0.5":
        return {"ome": {"version": version, **ome}}
    ome["multiscales"][0]["version"] = version
    for key in ("omero", "image-label"):
        if key in ome:
            ome[key]["version"] = version
    return ome
