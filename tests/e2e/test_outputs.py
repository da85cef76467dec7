"""What comes out opens elsewhere: OME-Zarr in four libraries, OME-TIFF in four readers, with equal facts."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import numpy as np
import openslide
import pytest
import pyvips
import tensorstore as ts
import tifffile
import tiffslide
import zarr
from convert_helpers import SLIDE, settings

from wsi_pipeline.core.geometry import Region
from wsi_pipeline.core.pyramid import halve
from wsi_pipeline.pipeline.convert import convert_slide
from wsi_pipeline.readers import open_slide

LEVELS = 5


@pytest.fixture(scope="module", params=["0.5", "0.4"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("zarr") / "slide.ome.zarr"
    convert_slide(SLIDE, out, settings(ngff=request.param))
    return out, request.param


def test_the_store_validates(store: tuple[Path, str]) -> None:
    from ome_zarr_models import open_ome_zarr
    from ome_zarr_models.v04.image import Image as Image04
    from ome_zarr_models.v05.image import Image as Image05

    out, version = store
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the validator's own dependencies
        image = open_ome_zarr(zarr.open_group(out, mode="r"))
        labels = [
            open_ome_zarr(zarr.open_group(out / "labels" / n, mode="r")) for n in ("tissue", "disagreement")
        ]
    assert isinstance(image, {"0.4": Image04, "0.5": Image05}[version])
    scales = image.ome_attributes if version == "0.5" else image.attributes
    assert len(scales.multiscales[0].datasets) == LEVELS
    for label in labels:
        attributes = label.ome_attributes if version == "0.5" else label.attributes
        assert len(attributes.multiscales[0].datasets) == LEVELS
        assert type(label).__name__ == "ImageLabel"


@pytest.mark.slow
def test_zarr_ome_zarr_and_tensorstore_read_the_same_pixels(store: tuple[Path, str]) -> None:
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    out, version = store
    ours = open_slide(out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        location = parse_url(str(out))
        assert location is not None
        node = next(iter(Reader(location)()))
    assert len(node.data) == LEVELS
    assert [list(c) for c in node.metadata["colormap"]] or node.metadata["channel_names"]
    for level in range(LEVELS):
        size = ours.levels[level].size
        expected = ours.read_level(level, Region.of(size)).transpose(2, 0, 1)
        by_zarr = zarr.open_array(out / str(level), mode="r")
        np.testing.assert_array_equal(by_zarr[:], expected)
        np.testing.assert_array_equal(np.asarray(node.data[level]), expected)
        driver = "zarr3" if version == "0.5" else "zarr"
        spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{out / str(level)}/"}}
        np.testing.assert_array_equal(ts.open(spec, open=True).result().read().result(), expected)
    if version == "0.5":
        assert by_zarr.metadata.dimension_names == ("c", "y", "x")  # type: ignore[union-attr]


def test_metadata_says_where_every_level_lies(store: tuple[Path, str]) -> None:
    out, version = store
    name = {"0.5": "zarr.json", "0.4": ".zattrs"}[version]
    document = json.loads((out / name).read_text())
    ome = document["attributes"]["ome"] if version == "0.5" else document
    for level, dataset in enumerate(ome["multiscales"][0]["datasets"]):
        steps = dataset["coordinateTransformations"]
        assert steps[0]["scale"] == [1.0, 0.5 * 2**level, 0.5 * 2**level]
        if level:
            assert steps[1]["translation"] == [0.0, 0.25 * (2**level - 1), 0.25 * (2**level - 1)]
    assert [c["color"] for c in ome["omero"]["channels"]] == ["FF0000", "00FF00", "0000FF"]
    assert all(axis.get("unit", "micrometer") == "micrometer" for axis in ome["multiscales"][0]["axes"])


def test_every_level_is_the_mean_of_the_one_below(store: tuple[Path, str]) -> None:
    slide = open_slide(store[0])
    assert len(slide.levels) == LEVELS
    below = slide.read_level(0, Region.of(slide.levels[0].size))
    for level in range(1, LEVELS):
        here = slide.read_level(level, Region.of(slide.levels[level].size))
        np.testing.assert_array_equal(here, halve(below))
        below = here


def test_a_dot_stays_in_its_place_on_every_level(tmp_path: Path) -> None:
    from wsi_pipeline.readers.array import ArraySlide
    from wsi_pipeline.readers.lattice import SlideView

    pixels = np.full((2300, 1900, 3), 255, np.uint8)
    y, x = 1337, 641
    pixels[y - 12 : y + 13, x - 12 : x + 13] = (120, 40, 140)
    slide = ArraySlide(pixels, mpp=0.5)
    config = settings(generator="identity")
    config = type(config)(
        **{
            **{f: getattr(config, f) for f in ("tissue", "tiling", "generator", "output", "run")},
            "input": type(config.input)(mask="whole"),
        }
    )
    convert_slide(slide, tmp_path / "a.ome.zarr", config)
    output = open_slide(tmp_path / "a.ome.zarr")
    for level, native in enumerate(output.levels):
        image = 255.0 - output.read_level(level, Region.of(native.size))[..., 1]
        rows, cols = np.indices(image.shape)
        centre_y = ((rows + 0.5) * image).sum() / image.sum() * 2**level
        centre_x = ((cols + 0.5) * image).sum() / image.sum() * 2**level
        assert abs(centre_y - (y + 0.5)) <= 0.5
        assert abs(centre_x - (x + 0.5)) <= 0.5
    view = SlideView(output, (0.73, 0.61))
    image = 255.0 - view.read(Region.of(view.size))[..., 1]
    rows, cols = np.indices(image.shape)
    assert abs(((rows + 0.5) * image).sum() / image.sum() * 0.73 / 0.5 - (y + 0.5)) <= 0.5
    assert abs(((cols + 0.5) * image).sum() / image.sum() * 0.61 / 0.5 - (x + 0.5)) <= 0.5


@pytest.fixture(scope="module")
def tiff(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    out = tmp_path_factory.mktemp("tiff") / "cmu.ome.tif"
    slide = open_slide(data_dir / "slides" / "CMU-1-Small-Region.svs")
    convert_slide(slide, out, settings())
    assert sorted(p.name for p in out.parent.iterdir()) == ["cmu.ome.tif", "cmu.ome.tif.manifest.json"]
    return out


def test_four_readers_agree_on_levels_mpp_and_pixels(tiff: Path) -> None:
    with tifffile.TiffFile(tiff) as by_tifffile:
        levels = [level.asarray() for level in by_tifffile.series[0].levels]
        xml = by_tifffile.ome_metadata or ""
        assert len(by_tifffile.series) == 1
    sizes = [(w, h) for h, w, _ in (level.shape for level in levels)]
    assert sizes == [(2220, 2967), (1110, 1484), (555, 742), (278, 371)]
    for axis in "XY":
        found = re.search(rf'PhysicalSize{axis}="([\d.eE+-]+)"', xml)
        assert found
        assert float(found[1]) == pytest.approx(0.499, rel=1e-6)
    for reader in (openslide.OpenSlide(str(tiff)), tiffslide.TiffSlide(str(tiff))):
        with reader:
            assert list(reader.level_dimensions) == sizes
            assert float(reader.properties[f"{_prefix(reader)}.mpp-x"]) == pytest.approx(0.499, rel=1e-6)
            assert float(reader.properties[f"{_prefix(reader)}.mpp-y"]) == pytest.approx(0.499, rel=1e-6)
            for level, expected in enumerate(levels):
                image = np.asarray(reader.read_region((0, 0), level, sizes[level]))[..., :3]
                assert np.abs(image.astype(int) - expected).max() <= 2
    for level, expected in enumerate(levels):
        image = pyvips.Image.new_from_file(str(tiff), page=level).numpy()
        assert np.abs(image[..., :3].astype(int) - expected).max() <= 2


def _prefix(reader: object) -> str:
    return "openslide" if isinstance(reader, openslide.OpenSlide) else "tiffslide"


def test_no_word_of_the_vendor_and_no_path_reaches_an_output(
    tiff: Path, data_dir: Path, tmp_path: Path
) -> None:
    source = data_dir / "slides" / "CMU-1-Small-Region.svs"
    slide = open_slide(source)
    convert_slide(slide, tmp_path / "cmu.ome.zarr", settings())
    with openslide.OpenSlide(str(source)) as original:
        texts = {str(v) for k, v in original.properties.items() if k.startswith(("aperio.", "tiff."))}
    canaries = {text.encode() for text in texts if len(text) >= 6 and not text.replace(".", "").isdigit()}
    canaries |= {b"ScanScope", b"Filename", b"User", str(data_dir).encode(), str(tmp_path).encode()}
    assert len(canaries) > 8
    for path in [tiff, *(p for p in tmp_path.rglob("*") if p.is_file())]:
        data = path.read_bytes()
        assert not [c for c in canaries if c in data], path


def test_our_output_is_an_input(store: tuple[Path, str], tmp_path: Path) -> None:
    again = open_slide(store[0])
    result = convert_slide(again, tmp_path / "b.ome.zarr", settings(generator="identity"))
    assert result.status == "converted"
    region = Region(2000, 1500, 700, 900)
    np.testing.assert_array_equal(
        open_slide(tmp_path / "b.ome.zarr").read_level(0, region), again.read_level(0, region)
    )
