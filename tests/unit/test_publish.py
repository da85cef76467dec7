"""Publishing: nothing half-done under a final name, whatever is interrupted; nothing of others destroyed."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from wsi_pipeline.errors import ConfigError, OutputError, OutputExistsError
from wsi_pipeline.runs import publish as module
from wsi_pipeline.runs import upload
from wsi_pipeline.runs.publish import exists_with, is_url, publish

NAME = "sub/a.ome.zarr"
TIFF = "sub/a.ome.tif"


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def nothing() -> None:
    """No heartbeat."""


def store(folder: Path, fingerprint: str, chunks: int = 3, ngff: str = "0.5") -> Path:
    """Something like a finished OME-Zarr; its bytes follow from its fingerprint."""
    path = folder / "a.ome.zarr"
    (path / "0" / "c").mkdir(parents=True)
    for number in range(chunks):
        (path / "0" / "c" / str(number)).write_text(f"{fingerprint} {number}")
    (path / "manifest.json").write_text(json.dumps({"fingerprint": fingerprint}))
    for root in ("zarr.json",) if ngff == "0.5" else (".zgroup", ".zattrs"):
        (path / root).write_text(json.dumps({"ome": fingerprint}))
    return path


def tiff(folder: Path, fingerprint: str) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    path, manifest = folder / "a.ome.tif", folder / "a.ome.tif.manifest.json"
    path.write_text(f"pixels of {fingerprint}" * len(fingerprint))
    document = {"fingerprint": fingerprint, "tiff": {"bytes": path.stat().st_size}}
    manifest.write_text(json.dumps(document))
    return path, manifest


def tiff_names(paths: tuple[Path, Path]) -> dict[Path, str]:
    return {paths[0]: TIFF, paths[1]: TIFF + ".manifest.json"}


def tree(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): p.read_text() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if work and target were on two file systems."""
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if ("work" in Path(source).parts) != ("work" in Path(target).parts):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)


def test_a_store_moves_to_its_name(tmp_path: Path) -> None:
    source = store(tmp_path / "work", "one")
    before = tree(source)
    publish({source: NAME}, str(tmp_path / "out"), overwrite=False, beat=nothing)
    assert tree(tmp_path / "out" / NAME) == before
    assert not source.exists()
    assert exists_with(str(tmp_path / "out"), NAME, "one") is True
    assert exists_with(str(tmp_path / "out"), NAME, "two") is False
    assert exists_with(str(tmp_path / "out"), "sub/b.ome.zarr", "one") is None


@pytest.mark.usefixtures("apart")
def test_to_another_file_system_whole_copies_are_renamed(tmp_path: Path) -> None:
    source = store(tmp_path / "work", "one")
    before, beats = tree(source), []
    publish({source: NAME}, str(tmp_path / "out"), overwrite=False, beat=lambda: beats.append(1))
    assert tree(tmp_path / "out" / NAME) == before
    assert not source.exists() and beats
    assert os.listdir(tmp_path / "out" / "sub") == ["a.ome.zarr"]


def test_to_a_device_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_apart", lambda source, folder: True)
    paths = tiff(tmp_path / "work", "one")
    publish(tiff_names(paths), str(tmp_path / "out"), overwrite=False, beat=nothing)
    assert sorted(os.listdir(tmp_path / "out" / "sub")) == ["a.ome.tif", "a.ome.tif.manifest.json"]
    assert not any(path.exists() for path in paths)


def test_the_manifest_comes_before_the_tiff_and_pictures_before_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, real = [], os.replace

    def replace(source: Any, target: Any) -> None:
        order.append(Path(target).name)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    paths = tiff(tmp_path / "work", "one")
    picture = tmp_path / "work" / "a.ome.zarr.qc.png"
    picture.write_text("picture")
    publish(tiff_names(paths), str(tmp_path / "out"), overwrite=False, beat=nothing)
    files = {store(tmp_path / "work", "one"): NAME, picture: NAME + ".qc.png"}
    publish(files, str(tmp_path / "out"), overwrite=False, beat=nothing)
    assert order == ["a.ome.tif.manifest.json", "a.ome.tif", "a.ome.zarr.qc.png", "a.ome.zarr"]


@pytest.mark.parametrize("target", ["folder", "memory"])
def test_a_late_second_attempt_is_no_error(tmp_path: Path, target: str, memory: str) -> None:
    out = str(tmp_path / "out") if target == "folder" else memory
    publish({store(tmp_path / "1", "one"): NAME}, out, overwrite=False, beat=nothing)
    late = store(tmp_path / "2", "one")
    publish({late: NAME}, out, overwrite=False, beat=nothing)
    assert not late.exists()
    publish({late: NAME}, out, overwrite=False, beat=nothing)  # its files are gone: a zombie was faster
    publish({late: NAME}, out, overwrite=True, beat=nothing, fingerprint="one")
    assert exists_with(out, NAME, "one") is True
    with pytest.raises(OutputError, match="gone before it was published"):
        publish({late: NAME}, out, overwrite=True, beat=nothing, fingerprint="two")
    with pytest.raises(OutputError, match="gone before it was published"):
        publish({late: "sub/b.ome.zarr"}, out, overwrite=True, beat=nothing)


@pytest.mark.parametrize("target", ["folder", "memory"])
def test_another_output_is_replaced_only_if_wanted(tmp_path: Path, target: str, memory: str) -> None:
    out = str(tmp_path / "out") if target == "folder" else memory
    publish({store(tmp_path / "1", "old", chunks=9): NAME}, out, overwrite=False, beat=nothing)
    publish(tiff_names(tiff(tmp_path / "1", "older")), out, overwrite=False, beat=nothing)
    fresh, pages = store(tmp_path / "2", "new"), tiff(tmp_path / "2", "new")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        publish({fresh: NAME}, out, overwrite=False, beat=nothing)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        publish(tiff_names(pages), out, overwrite=False, beat=nothing)
    assert exists_with(out, NAME, "old") is True
    assert exists_with(out, TIFF, "older") is True
    wanted = tree(fresh)
    publish({fresh: NAME}, out, overwrite=True, beat=nothing)
    publish(tiff_names(pages), out, overwrite=True, beat=nothing)
    assert exists_with(out, NAME, "new") is True
    assert exists_with(out, TIFF, "new") is True
    there = tree(tmp_path / "out" / NAME) if target == "folder" else objects(f"/bucket/{NAME}")
    assert there == wanted, "chunks of the old output must not show through"


@pytest.mark.parametrize("target", ["folder", "memory"])
def test_what_others_made_is_never_replaced(tmp_path: Path, target: str, memory: str) -> None:
    out = str(tmp_path / "out") if target == "folder" else memory
    foreign = store(tmp_path / "foreign", "x")
    (foreign / "manifest.json").unlink()
    fs = fsspec.filesystem("memory" if target == "memory" else "file")
    root = "/bucket" if target == "memory" else out
    fs.makedirs(f"{root}/sub", exist_ok=True)
    fs.put(f"{foreign}/", f"{root}/{NAME}/", recursive=True)
    fs.pipe_file(f"{root}/{TIFF}", b"somebody's slide")
    assert exists_with(out, NAME, "x") is False
    assert exists_with(out, TIFF, "x") is False
    for files in ({store(tmp_path / "1", "one"): NAME}, tiff_names(tiff(tmp_path / "1", "one"))):
        with pytest.raises(OutputExistsError, match="no output of this program"):
            publish(files, out, overwrite=True, beat=nothing)
        assert all(path.exists() for path in files)
    assert fs.cat_file(f"{root}/{TIFF}") == b"somebody's slide"
    assert not fs.exists(f"{root}/{TIFF}.manifest.json"), "it would make the slide look like ours"


@pytest.mark.parametrize(
    "name", ["../a.ome.zarr", "/etc/a.ome.zarr", "a/../../b.ome.zarr", "", "a\\b.ome.zarr"]
)
def test_a_name_never_leaves_the_target(tmp_path: Path, name: str) -> None:
    source = store(tmp_path / "work", "one")
    with pytest.raises(OutputError, match="leaves the output folder"):
        publish({source: name}, str(tmp_path / "out"), overwrite=True, beat=nothing)
    with pytest.raises(OutputError, match="leaves the output folder"):
        exists_with(str(tmp_path / "out"), name, "one")


def crash_at(monkeypatch: pytest.MonkeyPatch, number: int, *, after: bool) -> None:
    """A kill at the n-th rename, right before or after it is done."""
    count, real = 0, os.replace

    def replace(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count == number and not after:
            raise Killed
        real(source, target)
        if count == number:
            raise Killed

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("number", range(1, 6))
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("kind", ["zarr", "tiff"])
def test_a_crash_leaves_the_old_or_the_new_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, far: bool, number: int, after: bool
) -> None:
    out = tmp_path / "out"

    def made(folder: str, fingerprint: str) -> dict[Path, str]:
        if kind == "tiff":
            return tiff_names(tiff(tmp_path / folder, fingerprint))
        picture = tmp_path / folder / "a.ome.zarr.qc.png"
        files = {store(tmp_path / folder, fingerprint): NAME, picture: f"{NAME}.qc.png"}
        picture.write_text(fingerprint)
        return files

    name = NAME if kind == "zarr" else TIFF
    if far:
        monkeypatch.setattr(module, "_is_apart", lambda source, folder: True)
    publish(made("old", "old"), str(out), overwrite=False, beat=nothing)
    old = content(out / name)
    files = made("new", "newer")
    new = content(next(path for path in files if path.name == Path(name).name))
    with monkeypatch.context() as patch:
        crash_at(patch, number, after=after)
        try:
            publish(files, str(out), overwrite=True, beat=nothing)
        except Killed:
            aside = (out / name).with_name(f"{Path(name).name}.old")
            assert content(out / name) in (old, new) or content(aside) == old
        else:
            assert number > (3 if kind == "zarr" else 2)
    publish(files, str(out), overwrite=True, beat=nothing)
    assert content(out / name) == new
    assert exists_with(str(out), name, "newer") is True
    side = "a.ome.zarr.qc.png" if kind == "zarr" else "a.ome.tif.manifest.json"
    assert sorted(os.listdir(out / "sub")) == sorted([Path(name).name, side])
    assert not any(path.exists() for path in files)


def content(path: Path) -> object:
    if path.is_dir():
        return tree(path)
    return path.read_text() if path.exists() else None


def test_a_crash_while_copying_leaves_nothing_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_is_apart", lambda source, folder: True)
    source = store(tmp_path / "work", "one")
    real, count = module._copy, 0

    def copy(source: Path, copy: Path, beat: Callable[[], None]) -> None:
        nonlocal count
        count += 1
        if count == 3:
            os._exit(9)
        real(source, copy, beat)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(module, "_copy", copy)
        publish({source: NAME}, str(tmp_path / "out"), overwrite=False, beat=nothing)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    (half,) = os.listdir(tmp_path / "out" / "sub")
    assert half.startswith(".a.ome.zarr.")
    assert exists_with(str(tmp_path / "out"), NAME, "one") is None
    publish({source: NAME}, str(tmp_path / "out"), overwrite=False, beat=nothing)
    assert os.listdir(tmp_path / "out" / "sub") == ["a.ome.zarr"]


@pytest.mark.parametrize("target", ["folder", "memory"])
def test_a_new_manifest_beside_an_old_tiff_is_no_finished_output(
    tmp_path: Path, target: str, memory: str
) -> None:
    out = str(tmp_path / "out") if target == "folder" else memory
    publish(tiff_names(tiff(tmp_path / "1", "old")), out, overwrite=False, beat=nothing)
    _, manifest = tiff(tmp_path / "2", "newer")
    publish({manifest: TIFF + ".manifest.json"}, out, overwrite=True, beat=nothing)
    assert exists_with(out, TIFF, "newer") is False
    assert exists_with(out, TIFF, "old") is False


def test_a_target_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    source = store(tmp_path / "work", "one")
    with pytest.raises(OutputError, match="cannot be written .*permissions"):
        publish({source: NAME}, str(tmp_path / "file"), overwrite=False, beat=nothing)
    assert source.exists()


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/out"
    assert is_url(url) and not is_url(str(tmp_path))
    publish({store(tmp_path / "work", "one"): NAME}, url, overwrite=False, beat=nothing)
    assert exists_with(url, NAME, "one") is True
    assert exists_with(str(tmp_path / "out"), NAME, "one") is True


@pytest.fixture
def memory() -> Iterator[str]:
    """An empty file system in memory."""
    wipe()
    yield "memory://bucket"
    wipe()


def wipe() -> None:
    fs = fsspec.filesystem("memory")
    if fs.exists("/bucket"):
        fs.rm("/bucket", recursive=True)


def objects(prefix: str) -> dict[str, str]:
    fs = fsspec.filesystem("memory")
    return {key[len(prefix) + 1 :]: fs.cat_file(key).decode() for key in fs.find(prefix)}


@pytest.mark.parametrize("ngff", ["0.5", "0.4"])
def test_a_store_is_uploaded_whole(tmp_path: Path, memory: str, ngff: str) -> None:
    source = store(tmp_path / "work", "one", ngff=ngff)
    before, beats = tree(source), []
    publish({source: NAME}, memory, overwrite=False, beat=lambda: beats.append(1))
    assert objects(f"/bucket/{NAME}") == before
    assert exists_with(memory, NAME, "one") is True
    assert exists_with(memory, NAME, "two") is False
    assert exists_with(memory, "sub/b.ome.zarr", "one") is None
    assert not source.exists() and beats


@pytest.mark.parametrize("ngff", ["0.5", "0.4"])
@pytest.mark.parametrize("old", [False, True])
def test_an_upload_that_is_killed_is_no_store_for_any_reader(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch, ngff: str, old: bool
) -> None:
    """Killed at each write in turn: what is there opens as the old output or not at all, then as the new."""
    for number in itertools.count(1):
        wipe()
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        if old:
            source = store(tmp_path / "work", "old", chunks=9, ngff=ngff)
            publish({source: NAME}, memory, overwrite=False, beat=nothing)
        before = objects(f"/bucket/{NAME}")
        source = store(tmp_path / "work", "one", ngff=ngff)
        wanted = tree(source)
        with monkeypatch.context() as patch:
            kill_upload_at(patch, number)
            try:
                publish({source: NAME}, memory, overwrite=old, beat=nothing)
            except Killed:
                pass
            else:
                break
        there = {n: text for n, text in objects(f"/bucket/{NAME}").items() if upload.NOTE not in n}
        readable = "zarr.json" in there or ".zattrs" in there
        assert not readable or there in (before, wanted)
        assert readable == (exists_with(memory, NAME, "one") is not None)
        publish({source: NAME}, memory, overwrite=old, beat=nothing)
        assert objects(f"/bucket/{NAME}") == wanted
    assert number > 12, "every change of the file system was a place to be killed"


def kill_upload_at(patch: pytest.MonkeyPatch, number: int) -> None:
    """The n-th change of the file system does not happen, nor any later one."""
    count, kind = 0, type(fsspec.filesystem("memory"))

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count >= number:
                raise Killed
            return real(*arguments, **named)

        return call

    for change in ("put_file", "pipe_file", "mv", "rm_file"):
        patch.setattr(kind, change, counted(getattr(kind, change)))


def test_files_of_an_upload_that_was_killed_are_kept_only_if_they_are_surely_equal(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without checksums: all is sent again, for sizes prove nothing."""
    source = store(tmp_path / "work", "one")
    wanted = tree(source)
    fs = fsspec.filesystem("memory")
    fs.pipe_file(f"/bucket/{NAME}/.publishing", b'{"fingerprint": "one"}')
    fs.pipe_file(f"/bucket/{NAME}/0/c/0", b"XXX 0")
    fs.pipe_file(f"/bucket/{NAME}/0/c/77", b"of an older attempt")
    publish({source: NAME}, memory, overwrite=False, beat=nothing)
    assert objects(f"/bucket/{NAME}") == wanted


def test_a_url_that_no_package_serves_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="check the address"):
        exists_with("nonsense://bucket", NAME, "one")
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match="pip install s3fs"):
        exists_with("s3://bucket", NAME, "one")


def test_errors_of_the_server_become_one_line(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise PermissionError(errno.EACCES, "Forbidden\nby policy")

    source = store(tmp_path / "work", "one")
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "put_file", refuse)
    with pytest.raises(
        OutputError, match=r"^memory://bucket/sub/a.ome.zarr: .*Forbidden by policy.*credentials"
    ):
        publish({source: NAME}, memory, overwrite=False, beat=nothing)
    assert source.exists()


def test_a_stop_ends_an_upload(tmp_path: Path, memory: str) -> None:
    def stop() -> None:
        raise Killed

    source = store(tmp_path / "work", "one", chunks=50)
    with pytest.raises(Killed):
        publish({source: NAME}, memory, overwrite=False, beat=stop)
    assert exists_with(memory, NAME, "one") is None
    assert source.exists()


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["zarr", "tiff"])
def test_two_attempts_at_once_both_end_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, overwrite: bool, far: bool
) -> None:
    """A worker that counted as dead publishes the very files that its successor publishes."""
    if far:
        monkeypatch.setattr(module, "_is_apart", lambda source, folder: os.stat(source) is not None)
    for number in range(15):
        work, out = tmp_path / f"work{number}", tmp_path / f"out{number}"
        if kind == "zarr":
            source = store(work, "one", chunks=20)
            files, name, before = {source: NAME}, NAME, tree(source)
        else:
            paths = tiff(work, "one")
            files, name, before = tiff_names(paths), TIFF, {"": paths[0].read_text()}
        together = threading.Barrier(2)

        def attempt(files: dict[Path, str], out: Path, together: threading.Barrier) -> None:
            together.wait()
            publish(files, str(out), overwrite=overwrite, beat=nothing, fingerprint="one")

        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(attempt, files, out, together) for _ in range(2)]
            for future in both:
                future.result()
        assert exists_with(str(out), name, "one") is True
        there = tree(out / name) if kind == "zarr" else {"": (out / name).read_text()}
        assert there == before
        assert not [left for left in os.listdir(out / "sub") if left.startswith(".")]


def test_half_copies_of_others_go_only_when_their_process_has(tmp_path: Path) -> None:
    sub = tmp_path / "sub"
    sub.mkdir()
    alive, dead, far, old = (
        sub / f".a.ome.zarr.{owner}-abcd.publishing"
        for owner in (
            f"{module._host()}-{os.getpid()}",
            f"{module._host()}-99999999",
            "elsewhere-99999999",
            "longago-1",
        )
    )
    for copy in (alive, dead, far, old):
        copy.write_text("")
    os.utime(old, (0, 0))
    publish({store(tmp_path / "work", "one"): NAME}, str(tmp_path), overwrite=False, beat=nothing)
    assert alive.exists() and far.exists()
    assert not dead.exists() and not old.exists()


def test_a_copy_whose_source_goes_away_is_no_copy(tmp_path: Path) -> None:
    source = store(tmp_path / "work", "one")
    (tmp_path / "out").mkdir()

    def beat() -> None:
        module._discard(source)

    with pytest.raises(FileNotFoundError):
        module._beside(source, tmp_path / "out" / "a.ome.zarr", beat)
    assert os.listdir(tmp_path / "out") == []
