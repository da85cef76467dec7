"""One slide many times, as one OME-Zarr with a t axis: the way from one domain to the other, or several
draws.

Each member is an ordinary conversion with another option of the generator (``stop_after``, ``run``): it is
tiled, stitched and resumed like any other, and members that an interrupted series finished are taken as they
are. The label ``spread`` of several draws is their standard deviation at each pixel, in grey levels.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wsi_pipeline.core.protocols import Slide
from wsi_pipeline.errors import ConfigError
from wsi_pipeline.generators import make_generator
from wsi_pipeline.pipeline.convert import convert_slide
from wsi_pipeline.pipeline.events import Emit, ignore
from wsi_pipeline.pipeline.outputs import sidecar
from wsi_pipeline.pipeline.settings import ConvertConfig
from wsi_pipeline.writers.manifest import MANIFEST, read_manifest
from wsi_pipeline.writers.stack import SHARD, check_stack, open_stack, publish_stack, stack_array

__all__ = ["convert_series"]


def convert_series(
    slide: Slide,
    out: Path,
    config: ConvertConfig,
    option: Literal["stop_after", "run"],
    values: Sequence[int],
    *,
    overwrite: bool = False,
    restart: bool = False,
    emit: Emit = ignore,
) -> Path | None:
    """Convert ``slide`` once for each value of the generator's ``option``, and stack the results along t.

    ``restart`` throws members of an interrupted series away. None where the slide has no tissue. Raises as
    ``convert_slide``, and ConfigError for fewer than two values or a name that does not end in .ome.zarr."""
    if len(values) < 2 or len(set(values)) < len(values) or not out.name.endswith(".ome.zarr"):
        raise ConfigError(f"{out}: a series has two different values or more, and a name ending in .ome.zarr")
    check_stack(out, overwrite)
    work, members = sidecar(out, ".members"), []
    chosen = [_member(config, option, value) for value in values]
    for each in chosen:  # what cannot be made is told before the first is
        make_generator(each.generator.name, each.generator.options)
    if restart:
        shutil.rmtree(work, ignore_errors=True)
    for value, each in zip(values, chosen, strict=True):
        member = work / f"{option}-{value}.ome.zarr"
        if convert_slide(slide, member, each, shared=True, emit=emit).path is None:
            return None
        members.append(member)
    partial = open_stack(out, overwrite)
    document = read_manifest(members[0] / MANIFEST)
    levels = _stack(members, partial, spread=option == "run")
    mpp = document["slide"]["mpp"]
    made = publish_stack(
        partial,
        out,
        axes="tcyx",
        scale={"y": mpp[0], "x": mpp[1]},
        levels=levels,
        labels={"spread": "standard deviation over the runs, grey levels"} if option == "run" else None,
        extra={"series": {"option": option, "values": list(values)}, **_kept(document)},
    )
    shutil.rmtree(work)
    return made


def _member(config: ConvertConfig, option: str, value: int) -> ConvertConfig:
    generator = replace(config.generator, options={**config.generator.options, option: value})
    return replace(config, generator=generator, output=replace(config.output, qc=False))


def _kept(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says that holds for all members."""
    return {key: document[key] for key in ("notice", "generator") if key in document}


def _stack(members: Sequence[Path], folder: Path, *, spread: bool) -> int:
    """Copy all levels, a shard at a time; returns their number."""
    import zarr

    level = 0
    while (members[0] / str(level)).is_dir():
        sources = [zarr.open_array(member / str(level), mode="r") for member in members]
        _, height, width = sources[0].shape
        image = stack_array(folder, str(level), "tcyx", (len(members), 3, height, width))
        label = stack_array(folder, f"labels/spread/{level}", "yx", (height, width)) if spread else None
        for y in range(0, height, SHARD):
            for x in range(0, width, SHARD):
                place = (slice(y, y + SHARD), slice(x, x + SHARD))
                pixels_TCHW = np.stack([np.asarray(source[:, *place]) for source in sources])
                for t, plane_CHW in enumerate(pixels_TCHW):
                    image[t, :, *place] = plane_CHW
                if label is not None:
                    deviation_HW = pixels_TCHW.std(axis=0, dtype=np.float32).mean(axis=0)
                    label[place] = np.rint(deviation_HW).astype(np.uint8)
        level += 1
    return level
