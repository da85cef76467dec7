"""Budgets of a run: promises that hold for any sequence of slides, and a bound that noise does not break."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.core.geometry import Region, Size
from wsi_pipeline.core.protocols import U8_HWC, Level
from wsi_pipeline.errors import ConfigError, OutputError
from wsi_pipeline.pipeline.convert import convert_slide
from wsi_pipeline.pipeline.planning import survey
from wsi_pipeline.pipeline.settings import ConvertConfig, GeneratorConfig, InputConfig, OutputConfig
from wsi_pipeline.runs import budgets
from wsi_pipeline.runs.budgets import (
    BURST,
    DiskBudget,
    DiskGuard,
    folder_bytes,
    rss,
    total_rss,
    upper_bound,
    worker_limit,
)
from wsi_pipeline.writers.ometiff import TiffConfig
from wsi_pipeline.writers.omezarr import OmeZarrConfig

GB = 10**9


def test_without_a_limit_everything_fits() -> None:
    budget = DiskBudget(None, 5 * GB)
    admission = budget.admit("a", 10**15)
    assert not budget.limited
    assert (admission.allowance, admission.wait) == (None, False)


def test_a_slide_waits_for_another_one_and_then_fits() -> None:
    budget = DiskBudget(100 * GB, 10 * GB)
    assert budget.admit("a", 60 * GB).allowance == 60 * GB
    second = budget.admit("b", 60 * GB)
    assert second.allowance is None and second.wait
    budget.settle("a", 15 * GB)
    assert budget.used == 25 * GB
    assert budget.admit("b", 60 * GB).allowance == 60 * GB


def test_alone_a_slide_may_try_with_what_is_left_less_a_burst() -> None:
    budget = DiskBudget(20 * GB, 5 * GB)
    assert budget.admit("a", 60 * GB).allowance == 15 * GB - BURST
    assert budget.promised == 20 * GB
    assert budget.admit("b", 1).wait


def test_what_never_fits_is_told_with_figures() -> None:
    budget = DiskBudget(2 * GB, 1 * GB)
    admission = budget.admit("a", 60 * GB)
    assert admission.allowance is None and not admission.wait
    assert "60 GB" in admission.reason and "1 GB" in admission.reason and "--max-disk" in admission.reason


def test_work_that_an_earlier_run_left_is_counted_once() -> None:
    budget = DiskBudget(10 * GB, 8 * GB, {"a": 6 * GB})
    assert budget.admit("a", 7 * GB).allowance == 7 * GB
    assert budget.promised == 9 * GB
    budget.settle("a", 3 * GB)
    assert budget.used == 5 * GB


def test_left_work_stays_counted_where_its_slide_does_not_fit() -> None:
    budget = DiskBudget(10 * GB, 8 * GB, {"a": 6 * GB})
    assert budget.admit("a", 9 * GB).allowance is None
    assert budget.used == 8 * GB
    budget.settle("a", 6 * GB)  # it was given up, and its work still lies there
    assert budget.used == 8 * GB


@settings(max_examples=300)
@given(
    limit=st.integers(0, 50 * GB),
    used=st.integers(0, 20 * GB),
    steps=st.lists(
        st.tuples(st.sampled_from("abcd"), st.integers(0, 30 * GB), st.floats(0, 1), st.booleans()),
        max_size=40,
    ),
)
def test_no_sequence_of_slides_breaks_the_promise(
    limit: int, used: int, steps: list[tuple[str, int, float, bool]]
) -> None:
    """Slides come and go in any order, and each takes anything up to its allowance and one burst."""
    budget, flying = DiskBudget(limit, used), {}
    start = max(limit, used)
    for key, upper, share, ends in steps:
        if key in flying:
            if ends:
                budget.settle(key, int(flying.pop(key) * share))
        else:
            admission = budget.admit(key, upper)
            if admission.allowance is not None:
                reduced = admission.allowance < upper
                flying[key] = admission.allowance + (BURST if reduced else 0)
            else:
                assert admission.wait == bool(flying)
        assert budget.promised <= start
        assert budget.used + sum(flying.values()) <= start


class Noise:
    """A slide of pixels that no codec makes smaller."""

    slide_id, identity, mpp, mpp_origin = "noise", "noise", (0.5, 0.5), "given"
    icc_profile, reader, path = None, "noise", "noise"

    def __init__(self, size: Size) -> None:
        self.levels = (Level(size=size, downsample=(1.0, 1.0)),)
        generator = np.random.default_rng(7)
        self._pixels = generator.integers(0, 256, (size.height, size.width, 3), np.uint8)

    def read_level(self, level: int, region: Region) -> U8_HWC:
        pixels = np.full((region.height, region.width, 3), 255, np.uint8)
        inside = region.intersect(Region.of(self.levels[0].size))
        if inside is not None:
            pixels[inside.slices(region)] = self._pixels[inside.slices(Region(0, 0, 0, 0))]
        return pixels

    def close(self) -> None:
        """Nothing to close."""


def noisy(ngff: str, tiff: TiffConfig) -> ConvertConfig:
    zarr = OmeZarrConfig(block=1024, ngff=ngff)  # type: ignore[arg-type]
    return ConvertConfig(
        input=InputConfig(stain="any", mask="whole"),
        generator=GeneratorConfig(name="identity"),
        output=OutputConfig(background="source", zarr=zarr, tiff=tiff),
    )


@pytest.mark.parametrize(
    ("ngff", "ending", "tiff", "size"),
    [
        ("0.5", ".ome.zarr", TiffConfig(), Size(1600, 1100)),
        ("0.4", ".ome.zarr", TiffConfig(), Size(1600, 1100)),
        ("0.5", ".ome.zarr", TiffConfig(), Size(2048, 1024)),
        ("0.5", ".ome.tif", TiffConfig(quality=100, subsampling="4:4:4"), Size(1600, 1100)),
        ("0.5", ".ome.tif", TiffConfig(tile=400), Size(1600, 1100)),
    ],
)
def test_noise_stays_below_the_bound_while_it_is_made(
    tmp_path: Path, ngff: str, ending: str, tiff: TiffConfig, size: Size, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "_FIXED", 1 << 20)  # else it would hide what is forgotten
    slide, config = Noise(size), noisy(ngff, tiff)
    bound = upper_bound(survey(slide, config).plan, tiff if ending == ".ome.tif" else False)  # type: ignore[arg-type]
    most = 0

    def look(event: object) -> None:
        nonlocal most
        most = max(most, folder_bytes(tmp_path))

    convert_slide(slide, tmp_path / f"noise{ending}", config, emit=look)  # type: ignore[arg-type]
    most = max(most, folder_bytes(tmp_path))
    raw = size.height * size.width * 3 * 4 / 3
    assert raw < most <= bound
    assert bound < 3.2 * most, "a bound that is far too wide keeps slides waiting"


def test_the_bound_counts_planned_blocks_only() -> None:
    slide = Noise(Size(4096, 4096))
    whole = noisy("0.5", TiffConfig())
    part = replace(whole, input=replace(whole.input, roi="0,0,1000,1000"))
    full = upper_bound(survey(slide, whole).plan, False)  # type: ignore[arg-type]
    less = upper_bound(survey(slide, part).plan, False)  # type: ignore[arg-type]
    assert full - less > 0.8 * (4096 * 4096 - 1024 * 1024) * 3
    assert upper_bound(survey(slide, whole).plan, True) > full + 4096 * 4096 * 3  # type: ignore[arg-type]


def test_the_guard_stops_where_the_allowance_is_used_up(tmp_path: Path) -> None:
    guard = DiskGuard(tmp_path / "work", 100_000, 0, interval=0.0)
    guard.check()  # no folder yet
    deep = tmp_path / "work" / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(bytes(60_000))
    guard.check()
    (deep / "other").write_bytes(bytes(60_000))
    with pytest.raises(OutputError, match="disk budget is used up.*--max-disk"):
        guard.check()


def test_the_guard_stops_before_the_disk_is_full(tmp_path: Path) -> None:
    DiskGuard(tmp_path, None, 1, interval=0.0).check()
    with pytest.raises(OutputError, match="almost full.*free space"):
        DiskGuard(tmp_path, None, 10**18, interval=0.0).check()


def test_the_guard_looks_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr(budgets, "folder_bytes", lambda folder: looks.append(folder) or 0)
    guard = DiskGuard(tmp_path, 10, 0, interval=60.0)
    for _ in range(1000):
        guard.check()
    assert len(looks) == 1


def test_links_out_of_a_folder_are_not_counted(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(1_000_000))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "big")
    (folder / "loop").symlink_to(tmp_path)
    assert folder_bytes(folder) < 20_000


def test_resident_memory_of_a_process_that_lives_and_one_that_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    assert rss(child.pid) == 0
    assert rss(os.getpid()) > 10 << 20
    assert total_rss([os.getpid(), child.pid]) > 10 << 20


@given(st.integers(1, 64), st.integers(1, 512 * GB), st.integers(0, 2 * GB))
def test_workers_and_parent_together_stay_below_the_memory_budget(
    workers: int, max_ram: int, parent: int
) -> None:
    try:
        limit = worker_limit(max_ram, workers, parent)
    except ConfigError:
        assert max_ram < workers * 800 * 2**20 + parent + 2**28
        return
    assert limit is not None and limit >= 600 << 20
    assert workers * limit + parent < max_ram


def test_too_little_memory_says_how_many_workers_fit() -> None:
    with pytest.raises(ConfigError, match=r"directory.max_ram: 2 GB .* 4 workers.*--workers 2"):
        worker_limit(2 * GB, 4, 300 * 10**6)
    with pytest.raises(ConfigError, match="for 1 workers.*; raise it"):
        worker_limit(500 * 10**6, 1, 300 * 10**6)
    assert worker_limit(None, 4, GB) is None
