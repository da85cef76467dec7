"""Outputs to a server that speaks S3: whole, in the right order, and as a slide that the reader opens."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from convert_helpers import settings

from wsi_pipeline.core.geometry import Region, Size
from wsi_pipeline.errors import OutputError, OutputExistsError, SlideError
from wsi_pipeline.pipeline.convert import convert_slide
from wsi_pipeline.readers import open_slide
from wsi_pipeline.readers.synthetic import SyntheticSlide
from wsi_pipeline.runs import upload
from wsi_pipeline.runs.publish import exists_with, publish
from wsi_pipeline.writers.manifest import MANIFEST, read_manifest

s3fs = pytest.importorskip("s3fs", reason="no S3 client; pip install s3fs")
server_module = pytest.importorskip("moto.server", reason="no local S3 server; pip install moto flask")

NAME = "night/slide.ome.zarr"


def nothing() -> None:
    """No heartbeat."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A local S3 server, which the client knows by fsspec's configuration, as any S3-compatible server."""
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fsspec.config.conf, "s3", {"endpoint_url": url, "key": "test", "secret": "test"})
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield url
        forget_clients()
    server.stop()


def forget_clients() -> None:
    """Close the connections of all clients; collected open, they would warn in whatever test comes then."""
    for client in list(s3fs.S3FileSystem._cache.values()):
        creator = getattr(client, "_s3creator", None)
        if creator is not None:
            asyncio.run_coroutine_threadsafe(creator.__aexit__(None, None, None), _loop_of(client)).result(10)
    s3fs.S3FileSystem.clear_instance_cache()


def _loop_of(client: Any) -> asyncio.AbstractEventLoop:
    if not client.asynchronous:
        return client.loop
    from zarr.core.sync import _get_loop

    return _get_loop()


@pytest.fixture
def bucket(endpoint: str, request: pytest.FixtureRequest) -> str:
    """An empty bucket."""
    name = f"b{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}"
    filesystem().mkdir(name)
    return name


def filesystem() -> Any:
    return fsspec.filesystem("s3")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished output and its picture; tests take copies."""
    folder = tmp_path_factory.mktemp("finished")
    slide = SyntheticSlide(size=Size(1500, 1300), tissue_share=0.5, seed=2)
    convert_slide(slide, folder / "slide.ome.zarr", settings(background="source"))
    return folder / "slide.ome.zarr"


def copy_of(finished: Path, folder: Path) -> Path:
    return Path(shutil.copytree(finished, folder / finished.name))


def fingerprint_of(finished: Path) -> str:
    return str(read_manifest(finished / MANIFEST)["fingerprint"])


def files_of(finished: Path) -> dict[str, bytes]:
    return {p.relative_to(finished).as_posix(): p.read_bytes() for p in finished.rglob("*") if p.is_file()}


def objects(bucket: str) -> dict[str, bytes]:
    fs = filesystem()
    fs.invalidate_cache()
    prefix = f"{bucket}/{NAME}/"
    return {key[len(prefix) :]: fs.cat_file(key) for key in fs.find(f"{bucket}/{NAME}")}


def test_an_output_in_a_bucket_is_the_output_of_a_folder(finished: Path, tmp_path: Path, bucket: str) -> None:
    source, target = copy_of(finished, tmp_path), f"s3://{bucket}"
    assert exists_with(target, NAME, fingerprint_of(finished)) is None
    publish({source: NAME}, target, overwrite=False, beat=nothing)
    assert objects(bucket) == files_of(finished)
    assert exists_with(target, NAME, fingerprint_of(finished)) is True
    assert exists_with(target, NAME, "another") is False
    assert not source.exists()
    there, here = open_slide(f"{target}/{NAME}"), open_slide(finished)
    assert there.mpp == here.mpp and there.levels == here.levels
    region = Region(200, 300, 700, 800)
    assert (there.read_level(0, region) == here.read_level(0, region)).all()
    there.close(), here.close()


def test_after_a_kill_only_what_is_missing_is_sent(
    finished: Path, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after each of some uploads; no reader opens the half, and equal objects are not sent again."""
    source, target, fs = copy_of(finished, tmp_path), f"s3://{bucket}", filesystem()
    sent: list[str] = []
    real = upload.Upload._send

    def send(self: upload.Upload, path: Path, key: str, callback: Any) -> None:
        if len(sent) >= most:
            raise KeyboardInterrupt
        real(self, path, key, callback)
        sent.append(key.removeprefix(f"{bucket}/{NAME}/"))

    monkeypatch.setattr(upload, "WIDTH", 1)
    monkeypatch.setattr(upload.Upload, "_send", send)
    count = len(files_of(finished))
    most = count // 2
    with pytest.raises(KeyboardInterrupt):
        publish({source: NAME}, target, overwrite=False, beat=nothing)
    before = list(sent)
    assert exists_with(target, NAME, fingerprint_of(finished)) is None
    with pytest.raises(SlideError):
        open_slide(f"{target}/{NAME}")
    fs.pipe_file(f"{bucket}/{NAME}/{before[0]}", b"damaged")
    sent.clear()
    most = count
    publish({source: NAME}, target, overwrite=False, beat=nothing)
    assert objects(bucket) == files_of(finished)
    assert sorted(sent) == sorted((files_of(finished).keys() - set(before)) | {before[0]})
    assert sent[-1] == "zarr.json"


def test_a_tiff_goes_after_its_manifest_and_another_one_stays(tmp_path: Path, bucket: str) -> None:
    slide = SyntheticSlide(size=Size(1100, 900), tissue_share=0.5, seed=4)
    target, name = f"s3://{bucket}/outputs", "a.ome.tif"

    def made(folder: str, background: Any) -> tuple[dict[Path, str], str]:
        path = tmp_path / folder / name
        convert_slide(slide, path, settings(background=background))
        manifest = path.with_name(f"{name}.{MANIFEST}")
        return {path: name, manifest: manifest.name}, str(read_manifest(manifest)["fingerprint"])

    files, fingerprint = made("1", "source")
    data = (tmp_path / "1" / name).read_bytes()
    publish(files, target, overwrite=False, beat=nothing)
    assert exists_with(target, name, fingerprint) is True
    other, _ = made("2", "white")
    with pytest.raises(OutputExistsError, match="another output stands there"):
        publish(other, target, overwrite=False, beat=nothing)
    assert filesystem().cat_file(f"{bucket}/outputs/{name}") == data


def test_a_bucket_that_is_missing_is_told_with_the_remedy(
    finished: Path, tmp_path: Path, endpoint: str
) -> None:
    source = copy_of(finished, tmp_path)
    with pytest.raises(OutputError, match=r"^s3://no-such-bucket/night/slide.ome.zarr: .*check address"):
        publish({source: NAME}, "s3://no-such-bucket", overwrite=False, beat=nothing)
    assert source.exists()


def test_missing_credentials_are_told_with_the_remedy(
    finished: Path, tmp_path: Path, bucket: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint})
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    with pytest.raises(OutputError, match="credentials.*run the same command again"):
        publish({copy_of(finished, tmp_path): NAME}, f"s3://{bucket}", overwrite=False, beat=nothing)
