"""The cache of tiles on disk: a quota that holds among processes, and tiles that are right or made again."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from wsi_pipeline.cohorts import cache as cache_module
from wsi_pipeline.cohorts.cache import DiskCache
from wsi_pipeline.cohorts.tiles import TileReader, load_tiles
from wsi_pipeline.core.geometry import Region
from wsi_pipeline.errors import ConfigError
from wsi_pipeline.training.data import DataConfig, TileSamples

SIDE = 16
ENTRY = 3 * SIDE * SIDE + 48
"""Bytes of a tile and its line, nearly."""


def tile(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


class Maker:
    """Makes tiles and counts."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def __call__(self, seed: int) -> Callable[[], np.ndarray]:
        def make() -> np.ndarray:
            self.made.append(seed)
            return tile(seed)

        return make


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("??/*"))


def test_a_tile_is_made_once_and_read_again(tmp_path: Path) -> None:
    make = Maker()
    cache = DiskCache(tmp_path / "new" / "cache", 10 * ENTRY)
    for _ in range(2):
        np.testing.assert_array_equal(cache.get("a", make(1)), tile(1))
        np.testing.assert_array_equal(cache.get("b", make(2)), tile(2))
    again = pickle.loads(pickle.dumps(DiskCache(tmp_path / "new" / "cache", 10 * ENTRY)))  # noqa: S301
    np.testing.assert_array_equal(again.get("a", make(1)), tile(1))
    assert make.made == [1, 2]


@settings(max_examples=20, deadline=None)
@given(names=st.lists(st.integers(0, 12), max_size=60), room=st.integers(1, 8))
def test_the_quota_holds_after_every_step(
    tmp_path_factory: pytest.TempPathFactory, names: list[int], room: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache, make = DiskCache(folder, room * ENTRY), Maker()
    for name in names:
        np.testing.assert_array_equal(cache.get(str(name), make(name)), tile(name))
        assert stored(folder) <= room * ENTRY
    if names:
        assert stored(folder) > 0


def test_what_was_longest_unused_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "TOUCHED_EVERY", -1.0)
    cache, make = DiskCache(tmp_path, 3 * ENTRY), Maker()
    for name in ("a", "b", "c"):
        cache.get(name, make(ord(name)))
        path = cache._path(name)
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 100 + ord(name)))
    cache.get("a", make(ord("a")))
    cache.get("d", make(ord("d")))
    assert [name for name in "abcd" if cache._path(name).exists()] == ["a", "c", "d"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-10],
        lambda content: content[:60] + bytes([content[60] ^ 1]) + content[61:],
        lambda content: b"",
        lambda content: b"no json\n" + content,
        lambda content: b"[1]\n" + content,
        lambda content: content.replace(b"[16, 16, 3]", b"[16, 17, 3]"),
    ],
)
def test_a_damaged_tile_is_made_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    cache, make = DiskCache(tmp_path, 10 * ENTRY), Maker()
    cache.get("a", make(1))
    path = cache._path("a")
    path.write_bytes(damage(path.read_bytes()))
    for _ in range(2):
        np.testing.assert_array_equal(cache.get("a", make(1)), tile(1))
    assert make.made == [1, 1]


def test_leavings_of_a_crash_are_counted_and_removed(tmp_path: Path) -> None:
    cache, make = DiskCache(tmp_path, 3 * ENTRY), Maker()
    cache.get("a", make(1))
    (tmp_path / "00").mkdir(exist_ok=True)
    (tmp_path / "00" / "x.1.partial").write_bytes(b"0" * ENTRY)
    os.utime(tmp_path / "00" / "x.1.partial", (0, 0))
    (tmp_path / cache_module.LEDGER).write_text('{"us')
    cache.get("b", make(2))
    assert json.loads((tmp_path / cache_module.LEDGER).read_text())["used"] == stored(tmp_path)
    cache.get("c", make(3))
    assert not (tmp_path / "00" / "x.1.partial").exists()
    assert stored(tmp_path) <= 3 * ENTRY


def fill(folder: Path, first: int) -> int:
    """Another process: stores tiles and looks at the folder after each."""
    cache, make = DiskCache(folder, 6 * ENTRY), Maker()
    most = 0
    for name in range(first, first + 40):
        np.testing.assert_array_equal(cache.get(str(name), make(name)), tile(name))
        with cache._locked():  # or we would count a tile and, later in the same look, its successor
            most = max(most, stored(folder))
    return most


def test_the_quota_holds_among_processes(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        most = pool.starmap(fill, [(tmp_path, first) for first in (0, 20)])
    assert 0 < max(most) <= 6 * ENTRY
    assert stored(tmp_path) <= 6 * ENTRY


def test_a_tile_larger_than_the_quota_is_not_kept(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, ENTRY // 2)
    np.testing.assert_array_equal(cache.get("a", Maker()(1)), tile(1))
    assert stored(tmp_path) == 0


def test_somebody_elses_folder_and_no_quota_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("precious")
    with pytest.raises(ConfigError, match="holds other files; give the tile cache a folder of its own"):
        DiskCache(tmp_path, 100)
    with pytest.raises(ConfigError, match=r"data\.cache_gib: a quota of 0 bytes"):
        DiskCache(tmp_path / "cache", 0)
    with pytest.raises(ConfigError, match="the tile cache cannot be made"):
        DiskCache(tmp_path / "thesis.doc" / "cache", 100)


def test_a_disk_that_cannot_be_written_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache, make = DiskCache(tmp_path, 10 * ENTRY), Maker()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_store", full)
    with caplog.at_level(logging.WARNING):
        for name in ("a", "b", "a"):
            cache.get(name, make(ord(name)))
    assert make.made == [97, 98, 97]
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text


def test_a_reader_takes_tiles_from_the_cache_and_not_from_the_slide(tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    for seed in range(2):
        Image.fromarray(tile(seed)).save(slides / f"{seed}.png")
    plain = load_tiles(slides)
    known = replace(plain, slides=tuple(replace(s, identity="") for s in plain.slides))
    reader = TileReader(known, cache=DiskCache(tmp_path / "none", 10 * ENTRY))
    reader.read(0)
    assert stored(tmp_path / "none") == 0  # whoever does not know the content cannot name it

    from wsi_pipeline.readers import open_slide

    identities = [open_slide(s.path, mpp=s.mpp).identity for s in plain.slides]
    known = replace(
        plain, slides=tuple(replace(s, identity=i) for s, i in zip(plain.slides, identities, strict=True))
    )
    cache = DiskCache(tmp_path / "cache", 10 * ENTRY)
    first = TileReader(known, cache=cache)
    first.read(0, Region(2, 3, 4, 5))
    (slides / "0.png").unlink()
    again = TileReader(known, cache=cache)
    np.testing.assert_array_equal(again.read(0), tile(0))
    crop = again.read(0, Region(1, 2, 3, 4))
    np.testing.assert_array_equal(crop, tile(0)[1:4, 2:6])
    assert crop.flags.writeable
    assert not again._open
    coarser = replace(known, slides=tuple(replace(s, lattice=(2.0, 2.0)) for s in known.slides))
    assert TileReader(coarser)._name(0, Region(0, 0, 8, 8)) != first._name(0, Region(0, 0, 8, 8))


def test_training_takes_a_folder_for_its_cache(tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    Image.fromarray(tile(0)).save(slides / "0.png")
    config = DataConfig(source=str(slides), target=str(slides), crop=SIDE, cache=str(tmp_path / "cache"))
    np.testing.assert_array_equal(
        TileSamples(config, 0).sample(3)[0], TileSamples(replace(config, cache=None), 0).sample(3)[0]
    )
    assert (tmp_path / "cache" / cache_module.LEDGER).exists()
