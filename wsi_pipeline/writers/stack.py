"""OME-Zarr images with a t or z axis: steps of a sampler, runs that differ in noise, volumes.

Only what is small or already finished is stacked, so it is written in one go: aside, then renamed. Chunks are
those of the slides (``omezarr``), one plane thick.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wsi_pipeline.errors import OutputError, OutputExistsError

__all__ = ["check_stack", "open_stack", "publish_stack", "stack_array"]

CHUNK = 256
SHARD = 2048
_TYPES = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}


def check_stack(out: Path, overwrite: bool) -> None:
    """OutputExistsError where ``out`` is there and must stay: not asked to replace it, or not one of ours."""
    if os.path.lexists(out) and not (overwrite and _ours(out)):
        remedy = "choose another name" if overwrite else "choose another name or use --overwrite"
        raise OutputExistsError(f"{out}: exists already; {remedy}", path=out)


def open_stack(out: Path, overwrite: bool) -> Path:
    """An empty folder aside in which to write; raises as ``check_stack``, and OutputError."""
    check_stack(out, overwrite)
    partial = out.with_name(f"{out.name}.stack.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{partial}: cannot be made ({error.strerror})", path=out) from error
    return partial


def _ours(out: Path) -> bool:
    """Whether this program made a folder: what it did not make it does not throw away."""
    try:
        return "wsi_pipeline" in json.loads((out / "zarr.json").read_text("utf-8"))["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def stack_array(folder: Path, path: str, axes: str, shape: Sequence[int], dtype: Any = np.uint8) -> Any:
    """A new array of the stack (zarr v3, blosc-zstd); t and z are one plane a chunk."""
    import zarr
    from zarr.codecs import BloscCodec

    sides = dict(zip(axes, shape, strict=True))
    chunks, shards = (
        tuple(
            1 if axis in "tz" else side if axis == "c" else min(limit, -(-side // CHUNK) * CHUNK)
            for axis, side in sides.items()
        )
        for limit in (CHUNK, SHARD)
    )
    return zarr.create_array(
        folder / path,
        shape=tuple(shape),
        dtype=dtype,
        chunks=chunks,
        shards=shards,
        compressors=BloscCodec(cname="zstd", clevel=3),
        dimension_names=list(axes),
        zarr_format=3,
    )


def publish_stack(
    folder: Path,
    out: Path,
    *,
    axes: str,
    scale: Mapping[str, float],
    levels: int = 1,
    labels: Mapping[str, str] | None = None,
    extra: Mapping[str, Any],
) -> Path:
    """Write the metadata of NGFF 0.5 and give the folder its name.

    ``scale``: µm along z, y, x (others count by 1); level n is 2^n times as large in y and x. ``labels``:
    name of each label image (axes y, x; same levels) and what it holds; ``extra``: under ``wsi_pipeline``.
    """
    import zarr

    try:
        group = zarr.open_group(folder, mode="a", zarr_format=3)
        image = {"multiscales": [_multiscale(out.name, axes, scale, levels)]}
        group.attrs.update({"ome": {"version": "0.5", **image}, "wsi_pipeline": dict(extra)})
        for name, method in (labels or {}).items():
            named = _multiscale(name, "yx", scale, levels) | {"metadata": {"method": method}}
            ome = {"version": "0.5", "multiscales": [named], "image-label": {"source": {"image": "../../"}}}
            zarr.open_group(folder / "labels" / name, mode="a", zarr_format=3).attrs.update({"ome": ome})
        if labels:
            named_labels = {"ome": {"version": "0.5", "labels": list(labels)}}
            zarr.open_group(folder / "labels", mode="a", zarr_format=3).attrs.update(named_labels)
        if out.exists():
            shutil.rmtree(out)
        os.replace(folder, out)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror}); free space", path=out) from error
    return out


def _multiscale(name: str, axes: str, scale: Mapping[str, float], levels: int) -> dict[str, Any]:
    described = [
        {"name": axis, "type": _TYPES[axis]} | ({"unit": "micrometer"} if axis in "zyx" else {})
        for axis in axes
    ]
    datasets = []
    for level in range(levels):
        factor = {"y": 2.0**level, "x": 2.0**level}
        sizes = [scale.get(axis, 1.0) * factor.get(axis, 1.0) for axis in axes]
        shifts = [scale.get(axis, 1.0) * (factor.get(axis, 1.0) - 1.0) / 2.0 for axis in axes]
        steps: list[dict[str, Any]] = [{"type": "scale", "scale": sizes}]
        steps += [{"type": "translation", "translation": shifts}] if level else []
        datasets.append({"path": str(level), "coordinateTransformations": steps})
    return {"name": name, "axes": described, "datasets": datasets}
