"""A watched file is handed out when it stopped changing, once, and again after a change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wsi_pipeline.runs.found import Found, stamp
from wsi_pipeline.runs.settle import Settled


def found(path: Path, skip: str = "", parts: tuple[str, ...] = ()) -> Found:
    return Found(source=path.name, path=str(path), skip=skip, parts=parts)


def names(files: list[Found]) -> list[str]:
    return [file.source for file in files]


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    path = tmp_path / "a.svs"
    path.write_bytes(b"one")
    return path


def test_a_file_must_stand_still_for_the_whole_time(slide: Path) -> None:
    watch = Settled(10)
    assert watch.update([found(slide)], 0) == [] and watch.waiting == 1
    assert watch.update([found(slide)], 9) == []
    slide.write_bytes(b"one and more")
    assert watch.update([found(slide)], 11) == []
    assert watch.update([found(slide)], 20) == []
    assert names(watch.update([found(slide)], 21)) == ["a.svs"] and watch.waiting == 0
    assert watch.update([found(slide)], 99) == []


def test_two_looks_are_needed_however_late_the_first(slide: Path) -> None:
    watch = Settled(0)
    assert watch.update([found(slide)], 1000) == []
    assert names(watch.update([found(slide)], 1000)) == ["a.svs"]


def test_a_changed_file_comes_again(slide: Path) -> None:
    watch = Settled(5)
    watch.update([found(slide)], 0)
    assert names(watch.update([found(slide)], 5)) == ["a.svs"]
    slide.write_bytes(b"another slide under the same name")
    assert watch.update([found(slide)], 6) == [] and watch.waiting == 1
    assert names(watch.update([found(slide)], 11)) == ["a.svs"]


def test_size_and_date_that_stand_still_are_not_enough(slide: Path) -> None:
    watch = Settled(5)
    watch.update([found(slide)], 0)
    state = slide.stat()
    slide.write_bytes(b"two")
    os.utime(slide, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert stamp(str(slide), ()) == f"3-{state.st_mtime_ns}"
    assert watch.update([found(slide)], 6) == []


def test_a_file_that_vanished_starts_anew(slide: Path) -> None:
    watch = Settled(5)
    watch.update([found(slide)], 0)
    assert watch.update([], 3) == [] and watch.waiting == 0
    assert watch.update([found(slide)], 6) == []
    assert names(watch.update([found(slide)], 11)) == ["a.svs"]


def test_a_slide_waits_for_its_other_files(tmp_path: Path) -> None:
    slide, data = tmp_path / "a.mrxs", tmp_path / "a"
    slide.write_bytes(b"index")
    data.mkdir()
    (data / "Data0000.dat").write_bytes(b"1")
    watch = Settled(5)
    watch.update([found(slide, parts=(str(data),))], 0)
    (data / "Data0001.dat").write_bytes(b"2")
    assert watch.update([found(slide, parts=(str(data),))], 6) == []
    assert names(watch.update([found(slide, parts=(str(data),))], 11)) == ["a.mrxs"]


def test_a_zarr_waits_for_its_chunks_not_its_metadata(tmp_path: Path) -> None:
    store = tmp_path / "a.zarr"
    (store / "0" / "c").mkdir(parents=True)
    (store / "zarr.json").write_text("{}")
    watch = Settled(5)
    watch.update([found(store)], 0)
    (store / "0" / "c" / "0").write_bytes(b"chunk")
    assert watch.update([found(store)], 6) == []
    assert names(watch.update([found(store)], 11)) == ["a.zarr"]


def test_skipped_files_are_handed_out_too_but_nobody_waits_for_them(slide: Path) -> None:
    watch = Settled(5)
    assert watch.update([found(slide, skip="no slide")], 0) == [] and watch.waiting == 0
    assert names(watch.update([found(slide, skip="no slide")], 5)) == ["a.svs"]
    assert watch.update([found(slide)], 6) == [] and watch.waiting == 1  # now it is a slide
    assert names(watch.update([found(slide)], 11)) == ["a.svs"]


def test_a_file_that_goes_between_two_looks_is_no_error(slide: Path) -> None:
    watch = Settled(5)
    slide.unlink()
    watch.update([found(slide)], 0)
    slide.write_bytes(b"back")
    assert watch.update([found(slide)], 5) == []
