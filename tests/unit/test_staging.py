"""Staging: whole copies, a quota that holds among processes, and nothing left by those that were killed."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from wsi_pipeline.core.geometry import Size
from wsi_pipeline.readers import open_slide
from wsi_pipeline.readers.synthetic import SyntheticSlide
from wsi_pipeline.runs import staging
from wsi_pipeline.runs.staging import clean_staging, staged
from wsi_pipeline.writers.ometiff import TiffConfig, export_ometiff

MIB = 1 << 20


def nothing() -> None:
    """No heartbeat."""


def slide_file(folder: Path, name: str = "slide.svs", size: int = MIB) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(os.urandom(size))
    return path


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    return tmp_path / "stage"


def test_a_copy_has_name_and_bytes_of_its_slide_and_goes_away(tmp_path: Path, stage: Path) -> None:
    source = slide_file(tmp_path / "share")
    with staged(str(source), stage, 2 * MIB, beat=nothing) as path:
        assert Path(path).name == source.name and path != str(source)
        assert Path(path).read_bytes() == source.read_bytes()
        assert len(left(stage)) == 1
    assert left(stage) == []
    assert source.exists()


def test_a_copy_goes_away_after_an_error_too(tmp_path: Path, stage: Path) -> None:
    source = slide_file(tmp_path / "share")
    with pytest.raises(ValueError, match="decoder"), staged(str(source), stage, 2 * MIB, beat=nothing):
        raise ValueError("decoder")
    assert left(stage) == []


def test_a_staged_slide_is_the_same_slide(tmp_path: Path, stage: Path) -> None:
    source = tmp_path / "share" / "a.ome.tif"
    source.parent.mkdir()
    export_ometiff(SyntheticSlide(size=Size(700, 900), seed=1), source, TiffConfig(workers=1))
    there = open_slide(source)
    with staged(str(source), stage, 100 * MIB, beat=nothing) as path:
        here = open_slide(path)
        assert (here.slide_id, here.identity, here.mpp) == (there.slide_id, there.identity, there.mpp)
        here.close()
    there.close()


def test_the_folder_of_a_mirax_slide_goes_along(tmp_path: Path, stage: Path) -> None:
    source = slide_file(tmp_path / "share", "a.mrxs", 100)
    slide_file(tmp_path / "share" / "a", "Slidedat.ini", 50)
    slide_file(tmp_path / "share" / "a" / "deep", "Data0001.dat", 5000)
    slide_file(tmp_path / "share", "b.mrxs", 100)
    with staged(str(source), stage, MIB, beat=nothing) as path:
        found = {str(p.relative_to(Path(path).parent)) for p in Path(path).parent.rglob("*") if p.is_file()}
        assert found == {"a.mrxs", "a/Slidedat.ini", "a/deep/Data0001.dat"}


def test_a_whole_zarr_folder_goes_along_empty_names_and_all(tmp_path: Path, stage: Path) -> None:
    store = tmp_path / "share" / "a.ome.zarr"
    slide_file(store, "zarr.json", 100)
    slide_file(store / "0" / "c" / "0" / "1", "2", 5000)
    with staged(f"{store}/", stage, MIB, beat=nothing) as path:
        assert Path(path).name == "a.ome.zarr"
        assert (Path(path) / "0/c/0/1/2").read_bytes() == (store / "0/c/0/1/2").read_bytes()


def test_real_slides_of_several_files(data_dir: Path, stage: Path) -> None:
    """All files of a DICOM series, and not the other series in the folder."""
    source = data_dir / "slides" / "boxes_0.dcm"
    if not source.exists():
        pytest.skip("no DICOM slide among the test data")
    with staged(str(source), stage, 100 * MIB, beat=nothing) as path:
        assert "sm_image.dcm" not in os.listdir(Path(path).parent)
        assert Path(path).read_bytes() == source.read_bytes()


def test_a_folder_with_links_is_read_where_it_lies(tmp_path: Path, stage: Path) -> None:
    """A copy that leaves a chunk out would silently be white there."""
    store = tmp_path / "share" / "a.ome.zarr"
    slide_file(store, "zarr.json", 100)
    (store / "0").symlink_to(slide_file(tmp_path, "secret"))
    with staged(str(store), stage, MIB, beat=nothing) as path:
        assert path == str(store)


@pytest.mark.parametrize("path", ["s3://bucket/a.svs", "https://host/a.svs"])
def test_a_url_is_read_where_it_lies(stage: Path, path: str) -> None:
    with staged(path, stage, MIB, beat=nothing) as given:
        assert given == path


def test_without_a_folder_nothing_is_copied(tmp_path: Path) -> None:
    with staged(str(tmp_path / "a.svs"), None, MIB, beat=nothing) as path:
        assert path == str(tmp_path / "a.svs")


def test_a_slide_that_is_gone_is_the_readers_affair(tmp_path: Path, stage: Path) -> None:
    with staged(str(tmp_path / "a.svs"), stage, MIB, beat=nothing) as path:
        assert path == str(tmp_path / "a.svs")


def test_what_exceeds_the_quota_is_read_where_it_lies_and_said_so(
    tmp_path: Path, stage: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first, second = slide_file(tmp_path / "a"), slide_file(tmp_path / "b", "other.svs")
    with staged(str(first), stage, MIB, beat=nothing) as path:
        assert path != str(first)
        with staged(str(second), stage, MIB, beat=nothing) as other:
            assert other == str(second)
    assert "other.svs" in caplog.text and "quota" in caplog.text
    with staged(str(second), stage, MIB, beat=nothing) as other:
        assert other != str(second)


def test_a_full_disk_costs_the_copy_and_not_the_slide(
    tmp_path: Path, stage: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(staging, "_copy", full)
    source = slide_file(tmp_path / "share")
    with staged(str(source), stage, 2 * MIB, beat=nothing) as path:
        assert path == str(source)
    assert left(stage) == []
    assert "staging disk is full" in caplog.text


def test_a_disk_that_is_nearly_full_gets_no_copy(
    tmp_path: Path, stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "SPARE_BYTES", 10**18)
    source = slide_file(tmp_path / "share")
    with staged(str(source), stage, 2 * MIB, beat=nothing) as path:
        assert path == str(source)


def test_a_slide_that_grows_while_it_is_copied_is_read_where_it_lies(tmp_path: Path, stage: Path) -> None:
    source = slide_file(tmp_path / "share")
    files = {str(source): source.stat().st_size - 10}
    with pytest.raises(OSError, match="changed while it was copied"):
        staging._copy(files, str(source.parent), tmp_path / "copy", nothing)


def test_copying_is_a_sign_of_life_and_can_be_stopped(
    tmp_path: Path, stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "BEAT_BYTES", MIB)
    monkeypatch.setattr(staging, "_PIECE", MIB // 2)
    source, beats = slide_file(tmp_path / "share", size=4 * MIB), []
    with staged(str(source), stage, 8 * MIB, beat=lambda: beats.append(1)):
        assert len(beats) == 4

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), staged(str(source), stage, 8 * MIB, beat=stop):
        pytest.fail("the copy was finished")
    assert left(stage) == []


def test_a_folder_of_others_is_left_alone(tmp_path: Path, stage: Path) -> None:
    stage.mkdir()
    (stage / "my-own-folder-1-2").mkdir()
    (stage / "notes.txt").write_text("mine")
    with staged(str(slide_file(tmp_path / "share")), stage, 2 * MIB, beat=nothing):
        pass
    clean_staging(stage)
    assert left(stage) == ["my-own-folder-1-2", "notes.txt"]


HOLD = """
import sys, time
from pathlib import Path
from wsi_pipeline.runs.staging import staged
source, stage, quota = sys.argv[1:]
with staged(source, Path(stage), int(quota), beat=lambda: None) as path:
    print("in place" if path == source else "copied", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holders() -> Iterator[ExitStack]:
    """Ends the processes that a test started."""
    with ExitStack() as stack:
        yield stack


def hold(holders: ExitStack, source: Path, stage: Path, quota: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(source), str(stage), str(quota)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    holders.enter_context(child)
    holders.callback(child.kill)
    return child


def said(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def test_the_quota_holds_among_processes(tmp_path: Path, stage: Path, holders: ExitStack) -> None:
    """Five begin at once, three fit; each copy reserves its room before its first byte."""
    source = slide_file(tmp_path / "share", size=4 * MIB)
    children = [hold(holders, source, stage, 13 * MIB) for _ in range(5)]
    assert sorted(said(child) for child in children) == ["copied"] * 3 + ["in place"] * 2
    assert len(left(stage)) == 3
    for child in children:
        child.communicate("\n")
    assert left(stage) == []


def test_what_killed_processes_left_makes_room_for_the_next(
    tmp_path: Path, stage: Path, holders: ExitStack
) -> None:
    source = slide_file(tmp_path / "share")
    dead, alive = (hold(holders, source, stage, 2 * MIB) for _ in range(2))
    assert said(dead) == said(alive) == "copied"
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert len(left(stage)) == 2
    with staged(str(source), stage, 2 * MIB, beat=nothing) as path:
        assert path != str(source)
        assert len(left(stage)) == 2
    alive.communicate("\n")
    assert left(stage) == []


def test_cleaning_removes_the_dead_and_counts_their_bytes(
    tmp_path: Path, stage: Path, holders: ExitStack
) -> None:
    assert clean_staging(stage) == 0
    source = slide_file(tmp_path / "share")
    dead, alive = (hold(holders, source, stage, 4 * MIB) for _ in range(2))
    assert said(dead) == said(alive) == "copied"
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert clean_staging(stage) == MIB
    assert clean_staging(stage) == 0
    (left_over,) = left(stage)
    assert f"-{alive.pid}-" in left_over
    alive.communicate("\n")
    assert alive.returncode == 0


def test_a_process_killed_before_its_first_byte_leaves_no_reservation(stage: Path) -> None:
    (stage / "host-4242-7-0-1000000" / "slide").mkdir(parents=True)
    assert clean_staging(stage) == 1000000
    assert left(stage) == []
