"""Reading foreign checkpoint files: what is accepted, and that nothing in a file is ever run."""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.errors import CheckpointError
from wsi_pipeline.models.checkpoint_file import read_checkpoint

BENIGN = {
    "rank_unet": 4,
    "modules": ["conv1", "conv2"],
    "half": {f"layer{i}.weight": torch.arange(12.0).reshape(3, 4).half() + i for i in range(3)},
    "rest": OrderedDict(a=torch.ones(2, dtype=torch.bfloat16), b=torch.nn.Parameter(torch.eye(3))),
}


class Calls:
    """Unpickled by plain pickle, it calls ``function``."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[object, ...]:
        return self.reduced


def message(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    assert caught.value.exit_code == 2
    return text


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_values_types_and_order_are_kept(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.pkl"
    torch.save(BENIGN, path, _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(str(path))
    assert list(read) == list(BENIGN)
    assert read["rank_unet"] == 4 and read["modules"] == ["conv1", "conv2"]
    for entry in ("half", "rest"):
        assert list(read[entry]) == list(BENIGN[entry])
        for key, tensor in BENIGN[entry].items():
            assert read[entry][key].dtype == tensor.dtype
            assert torch.equal(read[entry][key], tensor)


def test_a_compressed_archive_is_read_right(tmp_path: Path) -> None:
    stored, packed = tmp_path / "stored.pkl", tmp_path / "packed.pkl"
    torch.save(BENIGN, stored)
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    assert torch.equal(read_checkpoint(packed)["half"]["layer1.weight"], BENIGN["half"]["layer1.weight"])


def test_the_prefix_of_data_parallel_training_goes(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    torch.save(
        {
            "module.all": {"module.conv.weight": torch.zeros(1), "module.conv.module.bias": torch.zeros(1)},
            "module.some": {"module.conv.weight": torch.zeros(1), "conv.bias": torch.zeros(1)},
        },
        path,
    )
    read = read_checkpoint(path)
    assert {entry: list(keys) for entry, keys in read.items()} == {
        "all": ["conv.weight", "conv.module.bias"],
        "some": ["module.conv.weight", "conv.bias"],  # a mixture means something else than a wrapper
    }


def test_the_payload_of_these_tests_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Calls(os.mkdir, str(tmp_path / "marker"))))  # noqa: S301 (our own bytes)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("form", ["pickle", "zip", "legacy"])
def test_code_in_a_file_is_refused_and_never_run(tmp_path: Path, form: str, protocol: int) -> None:
    marker, path = tmp_path / "marker", tmp_path / "model.pkl"
    evil = {"rank_unet": 4, "sd_encoder": Calls(os.system, f"touch {marker}")}
    if form == "pickle":
        path.write_bytes(pickle.dumps(evil, protocol))
    else:
        torch.save(evil, path, pickle_protocol=protocol, _use_new_zipfile_serialization=form == "zip")
    text = message(path)
    assert "nothing of it was run" in text
    if protocol == 2:  # that of torch.save; others stop the reader before it comes to the call
        assert f"({os.system.__module__}.system)" in text
    assert not marker.exists()


@pytest.mark.parametrize(
    "function",
    [eval, exec, open, os.mkdir, torch.load, torch.hub.load],
    ids=lambda function: function.__qualname__,
)
def test_other_calls_are_refused_too(tmp_path: Path, function: object) -> None:
    path = tmp_path / "model.pkl"
    torch.save({"a": Calls(function, str(tmp_path / "marker"))}, path)
    assert "nothing of it was run" in message(path)
    assert not (tmp_path / "marker").exists()


def test_the_environment_cannot_switch_the_check_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = tmp_path / "model.pkl"
    torch.save({"a": Calls(os.mkdir, str(tmp_path / "marker"))}, path)
    assert "nothing of it was run" in message(path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n", "git-LFS pointer"),
        (b"\n\n<!DOCTYPE html><html><title>Sign in</title></html>", "web page"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>", "web page"),
        (b'{"error": "quota exceeded"}', "text file"),
        (b"Entry not found", "text file"),
        (b'\x12\x00\x00\x00\x00\x00\x00\x00{"a": {}}        ', "safetensors"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "no PyTorch checkpoint"),
        (bytes(5000), "no PyTorch checkpoint"),
        (pickle.dumps({"rank_unet": 4}, 2), "no PyTorch checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(content)
    assert said in message(path)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    assert "is a folder" in message(tmp_path)
    assert "No such file" in message(tmp_path / "absent.pkl")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "no regular file" in message(pipe)  # reading it would wait for ever


@pytest.mark.parametrize("value", [torch.zeros(2), [1, 2], 3], ids=["tensor", "list", "int"])
def test_what_is_no_dictionary_is_refused(tmp_path: Path, value: object) -> None:
    path = tmp_path / "model.pkl"
    torch.save(value, path)
    assert f"holds a {type(value).__name__} instead of a dictionary" in message(path)


def test_an_archive_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY")
    assert "no PyTorch checkpoint" in message(path)


def test_a_damaged_weight_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    torch.save({"a": torch.full((1000,), 3.0)}, path)
    content = path.read_bytes()
    weights = torch.full((1000,), 3.0).numpy().tobytes()
    assert content.count(weights) == 1
    path.write_bytes(content.replace(weights, weights[:2000] + b"\xff" + weights[2001:]))
    assert "damaged" in message(path)


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0.0, 1.0, exclude_max=True), zipped=st.booleans())
def test_a_truncated_file_is_one_clear_line(
    tmp_path_factory: pytest.TempPathFactory, cut: float, zipped: bool
) -> None:
    path = tmp_path_factory.mktemp("cut") / "model.pkl"
    torch.save(BENIGN, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(cut * len(content))])
    message(path)


@settings(max_examples=60, deadline=None)
@given(
    where=st.floats(0.0, 1.0, exclude_max=True), byte=st.binary(min_size=1, max_size=8), zipped=st.booleans()
)
def test_flipped_bytes_never_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, where: float, byte: bytes, zipped: bool
) -> None:
    path = tmp_path_factory.mktemp("flip") / "model.pkl"
    torch.save(BENIGN, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    at = int(where * len(content))
    path.write_bytes(content[:at] + byte + content[at + len(byte) :])
    with contextlib.suppress(CheckpointError):
        read_checkpoint(path)
