"""Folders of pictures as tiles, and reading rows: crops, limits on open slides, threads, processes."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsi_pipeline.cohorts import tiles as tiles_module
from wsi_pipeline.cohorts.tiles import IndexedSlide, TileIndex, TileReader, load_tiles
from wsi_pipeline.core.geometry import Region
from wsi_pipeline.errors import ConfigError, SlideError


def picture(path: Path, seed: int, size: tuple[int, int] = (40, 48)) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(["b.png", "a/2.png", "a/1.tif", "c.PNG"]):
        picture(tmp_path / name, seed)
    (tmp_path / "notes.txt").write_text("no picture")
    picture(tmp_path / ".hidden" / "d.png", 9)
    (tmp_path / "._b.png").write_bytes(b"resource fork")
    return tmp_path


def test_a_folder_is_an_index_of_whole_pictures_sorted_by_relative_name(folder: Path) -> None:
    tiles = load_tiles(folder, mpp=0.5)
    assert [tiles.slide(row).name for row in range(len(tiles))] == ["a/1", "a/2", "b", "c"]
    assert tiles.mpp == (0.5, 0.5)
    assert tiles.tile == 0
    assert {tiles.region(row) for row in range(4)} == {Region(0, 0, 40, 48)}
    np.testing.assert_array_equal(TileReader(tiles).read(2), picture(folder / "again.png", 0))


def test_the_stated_pixel_size_changes_no_pixel(folder: Path) -> None:
    read = [TileReader(load_tiles(folder, mpp=mpp)).read(1) for mpp in (None, 0.25, (0.5, 1.0))]
    np.testing.assert_array_equal(read[0], read[1])
    np.testing.assert_array_equal(read[0], read[2])


def test_folder_names_state_domain_split_and_pair(tmp_path: Path) -> None:
    for name in ("trainA/1.png", "trainB/1.jpg", "valB/TCGA-A7-A13E-01Z-00-DX1_3.png"):
        picture(tmp_path / name, 0)
    tiles = load_tiles(tmp_path)
    assert tiles.domain_N.tolist() == ["FF", "FFPE", "FFPE"]
    assert tiles.split_N.tolist() == ["train", "train", "val"]
    assert tiles.patient_N.tolist() == ["trainA/1", "trainB/1", "TCGA-A7-A13E"]
    assert tiles.slides[0].pair == tiles.slides[1].pair == "train/1"
    assert load_tiles(tmp_path / "trainB").slides[0].pair == "1"
    assert len(tiles.select("FFPE", "val")) == 1


def test_links_are_followed_but_not_in_circles(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("linked")
    (root / "there").symlink_to(folder, target_is_directory=True)
    (folder / "back").symlink_to(root, target_is_directory=True)
    assert len(load_tiles(root)) == 4


def test_the_orientation_of_a_photograph_counts(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    tiles = load_tiles(tmp_path)
    assert tiles.region(0) == Region(0, 0, 30, 20)
    assert TileReader(tiles).read(0).shape == (30, 20, 3)


def test_pictures_that_cannot_be_opened_are_all_named(folder: Path) -> None:
    (folder / "x.png").write_bytes(b"no picture")
    (folder / "y.jpg").write_bytes(b"")
    (folder / "z.png").write_bytes((folder / "b.png").read_bytes()[:20])
    with pytest.raises(ConfigError, match=r"x\.png.*y\.jpg.*z\.png") as caught:
        load_tiles(folder)
    assert "\n" not in str(caught.value)


def test_what_holds_no_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no picture"):
        load_tiles(tmp_path)
    with pytest.raises(ConfigError, match="no such folder or tile index"):
        load_tiles(tmp_path / "absent")
    (tmp_path / "a.bmp").write_bytes(b"BM")
    with pytest.raises(ConfigError, match=r"\.bmp.*convert them to PNG"):
        load_tiles(tmp_path)


def test_a_crop_is_the_part_of_the_tile(folder: Path) -> None:
    reader = TileReader(load_tiles(folder))
    np.testing.assert_array_equal(reader.read(0, Region(5, 7, 20, 30)), reader.read(0)[5:25, 7:37])
    for outside in (Region(-1, 0, 5, 5), Region(0, 40, 5, 9)):
        with pytest.raises(ValueError, match="not inside a tile of 40 x 48"):
            reader.read(0, outside)


def test_no_more_slides_stay_open_than_allowed(folder: Path) -> None:
    tiles = load_tiles(folder)
    reader = TileReader(tiles, open_slides=2)
    whole = [reader.read(row) for row in range(4)]
    assert list(reader._open) == [2, 3]
    reader.read(2)
    reader.read(0)
    assert list(reader._open) == [2, 0]
    reader.close()
    assert not reader._open
    np.testing.assert_array_equal(reader.read(1), whole[1])
    with pytest.raises(ConfigError, match="open_slides"):
        TileReader(tiles, open_slides=0)


def test_decoded_pictures_leave_when_they_take_too_much(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles_module, "PICTURE_BYTES", 2 * 40 * 48 * 3 - 1)
    (folder / "a" / "1.tif").unlink()  # another reader's
    reader = TileReader(load_tiles(folder))
    for row in range(3):
        reader.read(row)
    assert list(reader._open) == [2]


def test_it_pickles_without_its_open_slides_and_threads_agree(folder: Path) -> None:
    reader = TileReader(load_tiles(folder), open_slides=1)
    whole = [reader.read(row) for row in range(4)]
    again = pickle.loads(pickle.dumps(reader))  # noqa: S301
    assert not again._open
    rows = [row for row in range(4)] * 20
    with ThreadPoolExecutor(4) as pool:
        for row, pixels in zip(rows, pool.map(again.read, rows), strict=True):
            np.testing.assert_array_equal(pixels, whole[row])


def test_a_file_that_changed_since_the_index_was_made_is_refused(folder: Path) -> None:
    tiles = load_tiles(folder)
    slide = replace(tiles.slides[0], identity="0" * 64)
    with pytest.raises(SlideError, match=r"1\.tif: is not the file.*wsi-pipeline tile"):
        TileReader(replace(tiles, slides=(slide, *tiles.slides[1:]))).read(0)


def test_rows_are_selected_by_domain_and_split() -> None:
    slides = tuple(
        IndexedSlide(path=f"{i}.svs", name=str(i), domain=domain, split=split, patient=patient)
        for i, (domain, split, patient) in enumerate(
            [("FF", "train", "p"), ("FFPE", "train", ""), ("FFPE", "test", "q")]
        )
    )
    tiles = TileIndex(
        origin="index.parquet",
        slides=slides,
        slide_N=np.array([0, 0, 1, 2, 2], np.int32),
        region_N4=np.zeros((5, 4), np.int64),
    )
    assert tiles.patient_N.tolist() == ["p", "p", "1", "q", "q"]
    assert tiles.select("FFPE").slide_N.tolist() == [1, 2, 2]
    assert tiles.select("FFPE", "train").domain_N.tolist() == ["FFPE"]
    assert tiles.select(split="train").split_N.tolist() == ["train"] * 3
    assert len(tiles.select()) == 5
    with pytest.raises(
        ConfigError, match=r"index\.parquet: no tile has domain 'FF' and split 'test'.*FFPE/test"
    ):
        tiles.select("FF", "test")
