"""Many slides, one command: every file has its row, the same bytes everywhere, and a run goes on."""

from __future__ import annotations

import csv
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from run_helpers import EVIL, contents, document, make_slide, records, run

from wsi_pipeline.errors import ConfigError, FingerprintMismatchError, OutputError
from wsi_pipeline.pipeline.verify import verify_output
from wsi_pipeline.runs.folder import RunFolder


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good slides in folders, one without tissue, a broken one, and what is no slide."""
    folder = tmp_path_factory.mktemp("slides")
    make_slide(folder / "a" / "one.ome.tif", 1)
    make_slide(folder / "b" / "one.ome.tif", 2, side=2300)
    make_slide(folder / "glass.ome.tif", 3, tissue=0.0)
    (folder / "broken.svs").write_bytes(b"II*\0" + bytes(60))
    (folder / "notes.docx").write_bytes(b"words")
    return folder


@pytest.fixture(scope="module")
def done(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The slides, converted in this process; not to be changed."""
    out = tmp_path_factory.mktemp("done")
    assert run(slides, out).exit_code == 3
    return out


def test_every_file_has_a_row_with_its_reason(done: Path) -> None:
    found = records(done)
    status = {name: record.status for name, record in found.items()}
    assert status == {
        "a/one.ome.tif": "done",
        "b/one.ome.tif": "done",
        "glass.ome.tif": "skipped",
        "broken.svs": "failed",
        "notes.docx": "skipped",
    }
    assert "no tissue" in found["glass.ome.tif"].reason
    assert "broken.svs" in found["broken.svs"].reason
    assert found["notes.docx"].reason
    with (done / "summary.csv").open(encoding="utf-8-sig", newline="") as file:
        assert sorted(row["source"] for row in csv.DictReader(file)) == sorted(status)
    page = (done / "report.html").read_text(encoding="utf-8")
    assert all(Path(name).name in page for name in status)
    for name in ("a", "b"):
        assert verify_output(done / name / "one.ome.zarr").ok
        assert (done / name / "one.ome.zarr.qc.png").exists()
    assert not list((done / ".wsi_run" / "work").iterdir())
    assert not list((done / ".wsi_run" / "beats").iterdir())
    assert document(done)["counts"] == {"done": 2, "failed": 1, "skipped": 2}


@pytest.mark.parametrize("executor", ["processes", "dask"])
def test_executors_make_the_same_bytes(slides: Path, done: Path, tmp_path: Path, executor: str) -> None:
    result = run(slides, tmp_path, f"directory.executor={executor}", "run.workers=2")
    assert result.counts == {"done": 2, "failed": 1, "skipped": 2}
    assert contents(tmp_path) == contents(done)


@pytest.mark.parametrize("executor", ["processes", "dask"])
def test_a_slide_is_split_where_workers_outnumber_slides(
    slides: Path, done: Path, tmp_path: Path, executor: str
) -> None:
    run(slides / "b" / "*.tif", tmp_path, f"directory.executor={executor}", "run.workers=2")
    assert list(contents(tmp_path).values()) == [contents(done)["b/one.ome.tif"]]
    result = records(tmp_path)["one.ome.tif"].result
    assert result is not None
    assert result.resumed > 0, "the bands were made by other calls than the one that finished the slide"


def test_tiffs_are_the_same_too(slides: Path, tmp_path: Path) -> None:
    for name, executor in (("one", "inline"), ("two", "processes")):
        chosen = ("directory.format=tiff", f"directory.executor={executor}", "run.workers=2")
        assert run(slides / "a", tmp_path / name, *chosen).exit_code == 0
        assert verify_output(tmp_path / name / "one.ome.tif").ok
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_same_command_goes_on_and_redoes_nothing(slides: Path, done: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(done, out)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("zarr.json")}
    shutil.rmtree(out / "a" / "one.ome.zarr")
    assert run(slides, out).exit_code == 3
    assert contents(out) == contents(done)
    kept = {path: path.stat().st_mtime_ns for path in (out / "b").rglob("zarr.json")}
    assert kept == {path: stamps[path] for path in kept}
    assert verify_output(out / "a" / "one.ome.zarr").ok


def test_what_failed_is_tried_again_when_asked_or_when_it_changed(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    make_slide(source / "good.ome.tif")
    broken = source / "bad.ome.tif"
    broken.write_bytes(b"II*\0" + bytes(60))
    assert run(source, out).counts == {"done": 1, "failed": 1}
    assert run(source, out).exit_code == 3
    attempts = records(out)["bad.ome.tif"].attempts
    assert run(source, out, "directory.retry_failed=true").counts == {"done": 1, "failed": 1}
    assert attempts == records(out)["bad.ome.tif"].attempts == 1
    make_slide(tmp_path / "mended.ome.tif", 5).replace(broken)
    assert run(source, out).counts == {"done": 2}


def test_a_slide_that_changed_is_not_passed_off_as_done(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    slide = make_slide(source / "a.ome.tif", 1)
    run(source, out)
    before = contents(out)
    make_slide(tmp_path / "new.ome.tif", 2).replace(slide)
    assert run(source, out).counts == {"failed": 1}
    assert "--overwrite" in records(out)["a.ome.tif"].reason
    assert run(source, out, overwrite=True).exit_code == 0
    assert contents(out) != before
    assert verify_output(out / "a.ome.zarr").ok


def test_other_settings_are_refused_by_name_and_restart_keeps_outputs(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    make_slide(source / "a.ome.tif")
    run(source, out)
    with pytest.raises(FingerprintMismatchError, match=r"output\.background.*--restart"):
        run(source, out, "output.background=white")
    assert run(source, out, "run.threads=1", "directory.timeout=100").exit_code == 0
    assert (out / "a.ome.zarr").exists()
    result = run(source, out, "output.background=white", restart=True)
    assert result.counts == {"failed": 1}, "an output of other settings stands there"
    assert "--overwrite" in records(out)["a.ome.tif"].reason


def test_strict_makes_unknown_files_errors(slides: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    make_slide(tmp_path / "in" / "a.ome.tif")
    (tmp_path / "in" / "b.docx").write_bytes(b"words")
    assert run(tmp_path / "in", tmp_path / "out").exit_code == 0
    assert run(tmp_path / "in", tmp_path / "out", "directory.strict=true").exit_code == 3
    assert records(tmp_path / "out")["b.docx"].status == "failed"


def test_nothing_can_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        run(tmp_path / "absent" / "*.svs", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError):
        run(tmp_path / "empty", tmp_path / "out")
    make_slide(tmp_path / "in" / "a.ome.tif")
    with pytest.raises(ConfigError, match="cyclegan"):
        run(tmp_path / "in", tmp_path / "out", "generator.name=cyclegan")
    with pytest.raises(ConfigError, match="does not answer"):
        run(
            tmp_path / "in",
            tmp_path / "out2",
            "directory.executor=dask",
            "directory.scheduler=tcp://127.0.0.1:9",
        )


def test_a_second_run_in_the_same_folder_is_refused(slides: Path, tmp_path: Path) -> None:
    with RunFolder(tmp_path).taken(), pytest.raises(OutputError, match="another run"):
        run(slides, tmp_path)


def test_a_table_says_its_own_pixel_size(tmp_path: Path) -> None:
    make_slide(tmp_path / "in" / "a.ome.tif")
    table = tmp_path / "slides.csv"
    table.write_text("slide,mpp,mask\nin/a.ome.tif,0.25,whole\nin/gone.svs,,\n")
    run(table, tmp_path / "out")
    found = records(tmp_path / "out")
    result = found["in/a.ome.tif"].result
    assert result is not None
    assert result.mpp == (0.25, 0.25)
    assert found["in/gone.svs"].status == "failed"


def test_a_deadline_is_kept_and_the_next_run_goes_on(slides: Path, done: Path, tmp_path: Path) -> None:
    result = run(slides, tmp_path, "directory.deadline=11s", "directory.executor=processes")
    assert result.why == "deadline"
    assert result.exit_code == 3
    assert result.seconds < 11
    assert not list(tmp_path.glob("*/*.ome.zarr"))
    assert run(slides, tmp_path).counts == {"done": 2, "failed": 1, "skipped": 2}
    assert contents(tmp_path) == contents(done)


@pytest.mark.slow
def test_watch_takes_what_is_complete_and_survives_the_folder_going_away(tmp_path: Path) -> None:
    source, told = tmp_path / "in", []
    make_slide(source / "a.ome.tif", 1)
    whole = make_slide(tmp_path / "b.ome.tif", 2).read_bytes()

    def scanner() -> None:
        time.sleep(8)
        source.rename(tmp_path / "away")
        time.sleep(6)
        (tmp_path / "away").rename(source)
        with (source / "b.ome.tif").open("wb") as file:
            for start in range(0, len(whole), len(whole) // 6 + 1):
                file.write(whole[start : start + len(whole) // 6 + 1])
                file.flush()
                time.sleep(0.5)

    thread = threading.Thread(target=scanner)
    thread.start()
    chosen = ("directory.watch=true", "directory.settle=2", "directory.deadline=42s")
    result = run(source, tmp_path / "out", *chosen, emit=told.append)
    thread.join()
    assert result.why == "deadline"
    assert result.counts == {"done": 2}
    assert result.exit_code == 0
    assert any("looked at again" in str(event) for event in told)


def test_what_failed_before_is_told_again(slides: Path, tmp_path: Path) -> None:
    told: list[object] = []
    run(slides, tmp_path)
    run(slides, tmp_path, emit=told.append)
    assert any("--retry-failed" in str(event) for event in told)
    with pytest.raises(FingerprintMismatchError, match="another input"):
        run(slides / "a", tmp_path)


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two good slides and one of each kind of bad one, for ``evil_reader``."""
    folder = tmp_path / "evil"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))
    for seed, name in enumerate(("crash", "good1", "hang", "hog", "once", "good2")):
        (folder / f"{name}.svs").write_text(str(seed))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("executor", "slots"), [("processes", 1), ("processes", 2), ("dask", 1)])
def test_a_bad_slide_fails_alone(evil: Path, tmp_path: Path, executor: str, slots: int) -> None:
    chosen = [EVIL, f"directory.executor={executor}", f"directory.slots={slots}", "run.workers=2"]
    run(evil, tmp_path / "out", *chosen, "directory.timeout=20", "directory.max_ram=4GB")
    found = records(tmp_path / "out")
    status = {Path(name).stem: record.status for name, record in found.items()}
    assert status == {
        "good1": "done",
        "good2": "done",
        "once": "done",
        "crash": "failed",
        "hang": "failed",
        "hog": "failed",
    }
    if executor == "processes":
        assert "SIGSEGV" in found["crash.svs"].reason
        assert "no progress" in found["hang.svs"].reason
        assert "MiB" in found["hog.svs"].reason
    for name in ("crash.svs", "hang.svs", "hog.svs"):
        assert found[name].attempts == 2 or slots > 1, "one more attempt; beside others it may be disturbed"
