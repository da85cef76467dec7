"""Volumes in files: NIfTI (``.nii``, ``.nii.gz``) and OME-Zarr with a z axis.

Order. In memory planes come first, [C, D, H, W]; NIfTI counts x, y, z and OME-Zarr z, y, x, and each is
turned on its way. NIfTI speaks of millimetres, so its voxels are um / 1000.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_pipeline.errors import ConfigError, OutputError, SlideError
from wsi_pipeline.readers.mpp import mpp_from_length
from wsi_pipeline.writers.manifest import SYNTHETIC
from wsi_pipeline.writers.stack import open_stack, publish_stack, stack_array

__all__ = ["ENDINGS", "Volume", "read_volume", "write_volume"]

ENDINGS = (".nii.gz", ".nii", ".ome.zarr", ".zarr")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Volume:
    """``values_CDHW`` of any number type; ``um``: size of a voxel along z, y, x; ``affine``: NIfTI's, from
    voxels (x, y, z) to millimetres of the patient, None where nobody states it."""

    values_CDHW: npt.NDArray[Any]
    um: tuple[float, float, float]
    affine: npt.NDArray[np.float64] | None = None


def read_volume(path: Path) -> Volume:
    """A volume of a file; SlideError where it cannot be read or is none, ConfigError for another ending."""
    if not path.name.endswith(ENDINGS):
        raise ConfigError(f"{path}: volumes end in {', '.join(ENDINGS)}")
    try:
        volume = _read_zarr(path) if path.name.endswith(".zarr") else _read_nifti(path)
        if not (all(0 < um < math.inf for um in volume.um) and np.isfinite(volume.values_CDHW).all()):
            raise ValueError(f"voxels of {volume.um} um, or values that are not finite")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise SlideError(f"{path}: cannot be read as a volume ({error})", slide_id=path.name) from error
    return volume


def write_volume(path: Path, volume: Volume) -> None:
    """Write a volume, all of it or nothing: NIfTI keeps its numbers, OME-Zarr gets grey levels (0 to 1 become
    0 to 255). Raises OutputExistsError, OutputError, and ConfigError for another ending."""
    if path.name.endswith(".ome.zarr"):
        values_CDHW = volume.values_CDHW
        if values_CDHW.dtype != np.uint8:
            values_CDHW = np.rint(255 * values_CDHW.clip(0, 1)).astype(np.uint8)
        folder, scale = open_stack(path, overwrite=False), dict(zip("zyx", volume.um, strict=True))
        stack_array(folder, "0", "czyx", values_CDHW.shape)[:] = values_CDHW
        publish_stack(folder, path, axes="czyx", scale=scale, extra={"notice": SYNTHETIC})
        return
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ConfigError(f"{path}: volumes are written as .nii.gz, .nii or .ome.zarr")
    nibabel = _nibabel()
    affine = np.diag([*np.divide(volume.um[::-1], 1000), 1.0]) if volume.affine is None else volume.affine
    values_XYZC = volume.values_CDHW.transpose(3, 2, 1, 0)
    picture = nibabel.Nifti1Image(values_XYZC[..., 0] if values_XYZC.shape[-1] == 1 else values_XYZC, affine)
    picture.header.set_xyzt_units("mm")
    picture.header["descrip"] = SYNTHETIC.encode()
    fresh = path.with_name(f".partial.{path.name}")
    try:
        nibabel.save(picture, fresh)
        fresh.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})", path=path) from error


def _read_nifti(path: Path) -> Volume:
    nibabel = _nibabel()
    try:
        picture = nibabel.load(path)
        values = np.asanyarray(picture.dataobj)
    except nibabel.filebasedimages.ImageFileError as error:
        raise ValueError(error) from error
    values_CDHW = values.reshape(*values.shape[:3], -1).transpose(3, 2, 1, 0)
    mm = {"micron": 1e-3, "meter": 1e3}.get(picture.header.get_xyzt_units()[0], 1.0)
    x, y, z = (1000 * mm * float(zoom) for zoom in picture.header.get_zooms()[:3])
    affine = np.diag([mm, mm, mm, 1.0]) @ picture.affine
    return Volume(values_CDHW=values_CDHW, um=(z, y, x), affine=affine)


def _read_zarr(path: Path) -> Volume:
    import zarr

    group = zarr.open_group(path, mode="r")
    multiscale = group.attrs.get("ome", group.attrs)["multiscales"][0]
    level = multiscale["datasets"][0]
    names = [axis["name"] for axis in multiscale["axes"]]
    (scale,) = (step["scale"] for step in level["coordinateTransformations"] if step["type"] == "scale")
    units = [axis.get("unit", "micrometer") for axis in multiscale["axes"]]
    um = {name: mpp_from_length(*pair) for name, *pair in zip(names, scale, units, strict=True)}
    values = np.asarray(group[level["path"]])
    values = values.transpose(sorted(range(values.ndim), key=lambda place: "tczyx".index(names[place])))
    return Volume(values_CDHW=values.reshape(-1, *values.shape[-3:]), um=(um["z"], um["y"], um["x"]))


def _nibabel() -> Any:
    try:
        import nibabel
    except ImportError as error:
        raise ConfigError("NIfTI files need nibabel: pip install 'wsi-pipeline[volume]'") from error
    return nibabel
