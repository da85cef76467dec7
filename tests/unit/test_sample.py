"""Drawing tiles and volumes: pure functions of (seed, number), files that are read again, what is refused."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from typer.testing import CliRunner

from wsi_pipeline.cli import app
from wsi_pipeline.cohorts.tiles import load_tiles
from wsi_pipeline.errors import ConfigError, OutputExistsError, SlideError
from wsi_pipeline.models.network_config import NetworkConfig
from wsi_pipeline.training.labels import read_labels
from wsi_pipeline.translators.bundle import TranslatorSpec, build_translator, save_translator
from wsi_pipeline.translators.settings import (
    ConditionConfig,
    DiffusionConfig,
    PathConfig,
    RepresentationConfig,
    SamplingConfig,
)
from wsi_pipeline.volumes.draw import Drawer, draw_images, open_drawer, translate_volume
from wsi_pipeline.volumes.files import Volume, read_volume, write_volume
from wsi_pipeline.volumes.sample import sample_folder

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def bundle(path: Path, spec: TranslatorSpec) -> Path:
    """Weights of a fresh network whose zeros are shaken, so that step and class matter."""
    torch.manual_seed(3)
    tensors = build_translator(spec, None).state_dict()
    for name, tensor in tensors.items():
        tensors[name] = tensor + 0.1 * torch.randn(tensor.shape) if tensor.is_floating_point() else tensor
    save_translator(spec, tensors, path)
    return path


def tiles_spec(**options: Any) -> TranslatorSpec:
    condition = ConditionConfig(classes=2, drop=0.1)
    path = PathConfig(kind="vp", prediction="sample", variance="fixed_large")
    network = NetworkConfig(base=8, mult=(1, 2), blocks=1, groups=4)
    return TranslatorSpec(
        network=network,
        diffusion=DiffusionConfig(path=path, condition=condition),
        sampling=SamplingConfig(nfe=2),
        tile=32,
        classes=("lobular", "ductal (NST)"),
        **options,
    )


def volumes_spec(
    *, sources: int = 0, axes: tuple[Any, ...] = ("z", "y", "x"), tile: int = 16, **network: Any
) -> TranslatorSpec:
    return TranslatorSpec(
        network=NetworkConfig(family="unet3d", base=8, mult=(1, 2), blocks=1, groups=4, **network),
        diffusion=DiffusionConfig(
            path=PathConfig(kind="vp", prediction="sample", variance="fixed_large"),
            representation=RepresentationConfig(kind="haar", axes=axes),
            condition=ConditionConfig(concat=sources > 0, sources=max(1, sources)),
        ),
        sampling=SamplingConfig(nfe=2),
        axes="zyx",
        channels=1,
        value_range=(0.0, 1.0) if sources else (-1.0, 1.0),
        mpp=0.5,
        tile=tile,
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    return {
        "tiles": bundle(folder / "tiles.safetensors", tiles_spec()),
        "wdm": bundle(folder / "wdm.safetensors", volumes_spec()),
        "cwdm": bundle(folder / "cwdm.safetensors", volumes_spec(sources=2)),
    }


def opened(path: Path, *labels: str) -> Drawer:
    return open_drawer(path, labels, None, None, CPU)


def test_a_tile_depends_on_seed_number_and_class_and_on_nothing_else(weights: dict[str, Path]) -> None:
    drawer = opened(weights["tiles"])
    alone = draw_images(drawer, [3], seed=1)
    assert alone.shape == (1, 3, 32, 32)
    assert 0 <= alone.min() < alone.max() <= 1
    together = draw_images(drawer, [2, 3, 4], seed=1)
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)
    assert not torch.allclose(draw_images(drawer, [3], seed=2), alone, atol=0.02)
    assert not torch.allclose(draw_images(drawer, [4], seed=1), alone, atol=0.02)
    other = draw_images(opened(weights["tiles"], "lobular"), [3], seed=1)  # in turn, number 3 is of class 1
    assert not torch.allclose(other, alone, atol=1e-3)
    torch.testing.assert_close(draw_images(opened(weights["tiles"], "1"), [3], seed=1), alone)


def test_a_folder_of_tiles_can_be_trained_on(weights: dict[str, Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app,
        ["sample", "--weights", str(weights["tiles"]), "-o", str(tmp_path / "out"), "--count", "5"]
        + ["--label", "ductal (NST)", "--label", "0", "--nfe", "1", "--guidance", "2", "--mosaic"],
    )
    assert done.exit_code == 0, done.output
    assert "5 synthetic images, not for diagnosis" in done.output
    tiles = load_tiles(tmp_path / "out" / "images")
    assert [slide.name for slide in tiles.slides] == [
        *(f"ductal_NST_/ductal_NST__{number:05d}" for number in (0, 2, 4)),
        *(f"lobular/lobular_{number:05d}" for number in (1, 3)),
    ]
    assert read_labels(None, tiles).of_row == (0, 0, 0, 1, 1)
    by_table = read_labels(str(tmp_path / "out" / "samples.csv"), tiles)
    assert by_table.names == ("ductal (NST)", "lobular")
    rows = list(csv.DictReader((tmp_path / "out" / "samples.csv").read_text().splitlines()))
    assert rows[1] == {"slide": "lobular_00001.png", "label": "lobular", "seed": "0"}
    with Image.open(tiles.slides[0].path) as picture:
        assert "not for primary diagnosis" in picture.info["Comment"]
    with Image.open(tmp_path / "out" / "mosaic.png") as picture:
        assert picture.size == (3 * 36 - 4, 2 * 36 - 4)
        assert picture.getpixel((33, 10)) == (255, 255, 255)
        cell = np.asarray(picture)[:32, 36:68]
    with Image.open(tmp_path / "out" / "images" / "lobular" / "lobular_00001.png") as tile:
        np.testing.assert_array_equal(cell, np.asarray(tile))


def test_what_cannot_be_drawn_is_told(weights: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--label mucinous: .* knows lobular, ductal"):
        opened(weights["tiles"], "mucinous")
    with pytest.raises(ConfigError, match="--label 2"):
        opened(weights["tiles"], "2")
    with pytest.raises(ConfigError, match="follow a source image; use --source"):
        sample_folder(opened(weights["cwdm"]), tmp_path / "new", count=1)
    with pytest.raises(ConfigError, match="--depth"):
        sample_folder(opened(weights["wdm"]), tmp_path / "new", count=1, depth=6)
    with pytest.raises(OutputExistsError):
        sample_folder(opened(weights["tiles"]), tmp_path, count=1)
    with pytest.raises(ConfigError, match="sections lie 5 um apart"):
        sample_folder(opened(weights["wdm"]), tmp_path / "new", count=1, z_um=5.0)
    assert not (tmp_path / "new").exists()
    network = NetworkConfig(family="unet", base=8, mult=(1, 2), groups=4)
    save = build_translator(TranslatorSpec(network=network), None).state_dict()
    save_translator(TranslatorSpec(network=network), save, tmp_path / "once.safetensors")
    with pytest.raises(ConfigError, match="translates at once"):
        opened(tmp_path / "once.safetensors")


@pytest.mark.parametrize("ending", ["nii.gz", "ome.zarr"])
def test_drawn_volumes_are_read_again(weights: dict[str, Path], tmp_path: Path, ending: Any) -> None:
    drawer = opened(weights["wdm"])
    (path,) = sample_folder(drawer, tmp_path / "out", count=1, depth=12, mosaic=True, ending=ending)
    volume = read_volume(path)
    assert volume.values_CDHW.shape == (1, 12, 16, 16)
    assert volume.um == pytest.approx((0.5, 0.5, 0.5))
    drawn = draw_images(drawer, [0], 0, 12)[0].numpy()
    values = volume.values_CDHW / 255 if ending == "ome.zarr" else volume.values_CDHW
    np.testing.assert_allclose(values, drawn, atol=0.51 / 255 if ending == "ome.zarr" else 1e-6)
    assert np.abs(np.diff(drawn, axis=1)).mean() > 0.01  # planes have noise of their own
    if ending == "nii.gz":
        assert nibabel.load(path).header["descrip"].item().startswith(b"synthetic")
    else:
        assert "synthetic" in zarr.open_group(path).attrs["wsi_pipeline"]["notice"]
    with Image.open(tmp_path / "out" / "mosaic.png") as picture:
        assert picture.size == (16, 16)


def head(shape: tuple[int, ...], seed: int) -> Volume:
    """Intensities of a scanner, half of them nothing."""
    values_CDHW = np.random.default_rng(seed).uniform(200, 900, (1, *shape)).astype(np.float32)
    values_CDHW[:, : shape[0] // 2] = 0
    return Volume(values_CDHW=values_CDHW, um=(1000.0, 1000.0, 1000.0))


def test_a_translated_volume_keeps_size_place_and_nothingness(
    weights: dict[str, Path], tmp_path: Path
) -> None:
    affine = np.array([[-1.0, 0, 0, 90], [0, -1.0, 0, 126], [0, 0, 1.0, -72], [0, 0, 0, 1]])
    for number in range(2):
        values_XYZ = head((9, 14, 16), number).values_CDHW[0].T
        nibabel.save(nibabel.Nifti1Image(values_XYZ, affine), tmp_path / f"{number}.nii.gz")
    command = ["sample", "--weights", str(weights["cwdm"]), "-o", str(tmp_path / "made.nii.gz")]
    command += [part for number in range(2) for part in ("--source", str(tmp_path / f"{number}.nii.gz"))]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    made = nibabel.load(tmp_path / "made.nii.gz")
    assert made.shape == (16, 14, 9)
    np.testing.assert_array_equal(made.affine, affine)
    values_XYZ = np.asarray(made.dataobj)
    assert not values_XYZ[..., :4].any()
    assert (values_XYZ[..., 4:] > 0).mean() > 0.5
    assert 0 <= values_XYZ.min() < values_XYZ.max() <= 1
    swapped = translate_volume(opened(weights["cwdm"]), [head((9, 14, 16), n) for n in (1, 0)], 0)
    assert not np.allclose(swapped.values_CDHW[0].T, values_XYZ, atol=1e-3)
    with pytest.raises(OutputExistsError):
        CliRunner().invoke(app, command, catch_exceptions=False)


def test_sources_that_do_not_fit_are_refused(weights: dict[str, Path], tmp_path: Path) -> None:
    drawer = opened(weights["cwdm"])
    one, two = head((8, 16, 16), 0), head((8, 16, 12), 1)
    rgb = Volume(values_CDHW=np.repeat(one.values_CDHW, 3, axis=0), um=one.um)
    for sources in ([one], [one, two], [one, one, one], [rgb, rgb]):
        with pytest.raises(ConfigError, match="these weights take 2 images of one shape"):
            translate_volume(drawer, sources, 0)
    with pytest.raises(ConfigError, match="follow no source"):
        translate_volume(opened(weights["wdm"]), [one], 0)
    with pytest.raises(ConfigError, match="axes yx"):
        translate_volume(opened(weights["tiles"]), [one], 0)
    far = Volume(values_CDHW=one.values_CDHW, um=(5.0, 0.5, 0.5))
    with pytest.raises(ConfigError, match="halving z would mix"):
        translate_volume(drawer, [far, far], 0)


def test_sections_far_apart_go_through_where_z_is_not_halved(tmp_path: Path) -> None:
    spec = volumes_spec(sources=1, axes=("y", "x"), halve_depth=False)
    drawer = opened(bundle(tmp_path / "stack.safetensors", spec))
    assert drawer.multiples == (1, 4, 4)
    grey = np.random.default_rng(0).integers(1, 256, (1, 3, 10, 16), np.uint8)
    made = translate_volume(drawer, [Volume(values_CDHW=grey, um=(5.0, 0.5, 0.5))], 0)
    assert made.values_CDHW.shape == (1, 3, 10, 16)
    assert made.um == (5.0, 0.5, 0.5)


def test_volume_files_keep_axes_units_and_colours(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 6), np.uint8)
    volume = Volume(values_CDHW=rgb, um=(4.0, 0.5, 0.25))
    for name in ("a.nii", "a.nii.gz", "a.ome.zarr"):
        write_volume(tmp_path / name, volume)
        found = read_volume(tmp_path / name)
        np.testing.assert_array_equal(found.values_CDHW, rgb)
        assert found.um == pytest.approx(volume.um)
    assert nibabel.load(tmp_path / "a.nii").shape == (6, 5, 4, 3)
    picture = nibabel.Nifti1Image(rgb[0].T, np.diag([0.25, 0.5, 4.0, 1.0]))
    picture.header.set_xyzt_units("micron")
    nibabel.save(picture, tmp_path / "micron.nii")
    assert read_volume(tmp_path / "micron.nii").um == pytest.approx(volume.um)
    with pytest.raises(ConfigError, match="end in"):
        read_volume(tmp_path / "a.tif")
    (tmp_path / "b.nii.gz").write_bytes(b"no volume")
    zarr.open_group(tmp_path / "c.zarr", mode="w")
    for name in ("b.nii.gz", "c.zarr", "absent.nii"):
        with pytest.raises(SlideError, match="cannot be read as a volume"):
            read_volume(tmp_path / name)
    with pytest.raises(ConfigError, match="written as"):
        write_volume(tmp_path / "a.tif", volume)
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.slow
def test_a_volume_of_128(tmp_path: Path) -> None:
    spec = volumes_spec(sources=1, tile=128)
    drawer = open_drawer(bundle(tmp_path / "large.safetensors", spec), (), 1, None, CPU)
    made = translate_volume(drawer, [head((128, 128, 128), 0)], 0)
    assert made.values_CDHW.shape == (1, 128, 128, 128)
    assert not made.values_CDHW[:, :64].any()
