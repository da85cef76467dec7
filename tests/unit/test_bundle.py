"""The bundle: what goes in comes out, every shared tensor once; anything else is refused in one line."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from wsi_pipeline.errors import CheckpointError, ConfigError
from wsi_pipeline.models import tensor_file
from wsi_pipeline.models.bundle import KEY, load_bundle, load_facts, save_bundle
from wsi_pipeline.models.random_weights import random_weights
from wsi_pipeline.models.tensor_file import StoredTensors, read_header, stored_once, write_file
from wsi_pipeline.models.weights import Prompt, TurboWeights, tensors_digest


@pytest.fixture(scope="module")
def weights() -> TurboWeights:
    made = random_weights(rank_unet=2)
    return dataclasses.replace(made, tensors=dict(made.tensors), digest=tensors_digest(made.tensors))


@pytest.fixture(scope="module")
def bundle(weights: TurboWeights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "w.safetensors"
    save_bundle(weights, path)
    return path


def edited(bundle: Path, out: Path, change: Any) -> Path:
    """A copy whose header was changed: ``change(table)`` edits it in place."""
    content = bundle.read_bytes()
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    change(table)
    text = json.dumps(table).encode()
    out.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return out


def of_document(change: Any) -> Any:
    def edit(table: dict[str, Any]) -> None:
        document = json.loads(table["__metadata__"][KEY])
        change(document)
        table["__metadata__"][KEY] = json.dumps(document)

    return edit


def refusal(read: Any, path: Path) -> str:
    """The message of the error, which names the file first and is one line."""
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert "; " in message, "no remedy"
    return message


def test_what_goes_in_comes_out(weights: TurboWeights, bundle: Path) -> None:
    read = load_bundle(bundle)
    assert read.layout.canonical() == weights.layout.canonical()
    assert list(read.tensors) == list(weights.layout.canonical())
    assert len(read.tensors) == len(weights.tensors)
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in weights.tensors.items())
    assert tensors_digest(read.tensors) == read.digest == weights.digest
    assert "unet.nothing" not in read.tensors
    for direction, prompt in weights.prompts.items():
        assert read.prompts[direction].text == prompt.text
        assert torch.equal(read.prompts[direction].embedding, prompt.embedding)
    others = {f.name for f in dataclasses.fields(TurboWeights)} - {"layout", "tensors", "prompts"}
    assert all(getattr(read, name) == getattr(weights, name) for name in others)


def test_facts_are_those_of_the_weights(weights: TurboWeights, bundle: Path) -> None:
    facts = load_facts(bundle)
    assert facts.directions == ("a2b", "b2a")
    assert facts.prompts == {d: p.text for d, p in weights.prompts.items()}
    assert (facts.mpp, facts.tile, facts.rank_unet, facts.rank_vae) == (0.5, 512, 2, 4)
    assert facts.size_bytes == bundle.stat().st_size
    assert facts.digest == weights.digest
    assert facts.created_by.startswith("wsi-pipeline ")


def test_tensors_of_equal_content_are_stored_once(weights: TurboWeights, bundle: Path) -> None:
    stored = load_file(bundle)
    distinct = {tensors_digest({"": t}) for t in weights.tensors.values()}
    assert len(stored) == len(distinct) + len(weights.prompts)
    assert "vae.encoder.conv_in.weight" in stored
    assert "vae_patch.encoder.conv_in.weight" not in stored
    assert "vae_patch.encoder.conv_in.lora_A.weight" in stored
    data = sum(t.nbytes for t in stored.values())
    header = read_header(bundle, "")
    assert header.size_bytes - data < 2**20
    assert header.metadata["notice"].endswith(weights.licence)


def test_the_same_weights_give_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    again = save_bundle(load_bundle(bundle), tmp_path / "again.safetensors")
    assert again.path.read_bytes() == bundle.read_bytes()


def test_identity_follows_everything_that_decides_a_pixel(
    weights: TurboWeights, bundle: Path, tmp_path: Path
) -> None:
    def identity(**changes: Any) -> str:
        changed = dataclasses.replace(weights, **changes)
        return save_bundle(changed, tmp_path / "x.safetensors", overwrite=True).identity

    same = load_facts(bundle).identity
    assert identity(mpp=0.25, licence="another", base_name="another") == same
    prompt = Prompt(text="random a2b", embedding=weights.prompts["a2b"].embedding + 1)
    layout = dataclasses.replace(
        weights.layout, vae_config={**weights.layout.vae_config, "scaling_factor": 0.2}
    )
    changes: list[dict[str, Any]] = [
        {"prompts": {**weights.prompts, "a2b": prompt}},
        {"vae_scale": 1.0},
        {"layout": layout},
        {"tensors": {**weights.tensors, "unet.conv_out.bias": torch.ones(4)}},
    ]
    assert len({same, *(identity(**change) for change in changes)}) == 5


def test_folders_of_the_machine_are_not_written(weights: TurboWeights, tmp_path: Path) -> None:
    config = {**weights.layout.unet_config, "_name_or_path": "/home/somebody/unet"}
    layout = dataclasses.replace(weights.layout, unet_config=config)
    facts = save_bundle(dataclasses.replace(weights, layout=layout), tmp_path / "x.safetensors")
    assert b"somebody" not in facts.path.read_bytes()


def test_facts_are_read_without_torch(bundle: Path) -> None:
    code = (
        "import sys; from wsi_pipeline.models.bundle import load_facts; "
        "print(load_facts(sys.argv[1]).tile, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, bundle], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["512", "False"]


def test_missing_and_foreign_files(bundle: Path, tmp_path: Path) -> None:
    assert "No such file" in refusal(load_facts, tmp_path / "absent.safetensors")
    assert "directory" in refusal(load_facts, tmp_path)
    for name, content in {"empty": b"", "text": b"Not weights, but a text.\n" * 9, "short": b"\x02"}.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert "another kind of file" in refusal(load_facts, path)
    torch.save({"a": torch.zeros(2)}, tmp_path / "model.pkl")
    (tmp_path / "old.pkl").write_bytes(pickle.dumps({"a": 1}))
    for name in ("model.pkl", "old.pkl"):
        assert "pickled checkpoint" in refusal(load_bundle, tmp_path / name)
        assert "models import" in refusal(load_facts, tmp_path / name)
    save_file({"conv_in.weight": torch.zeros(3)}, tmp_path / "unet.safetensors")
    assert "another program" in refusal(load_facts, tmp_path / "unet.safetensors")


@pytest.mark.parametrize("kept", [9, 1000, -100_000, -1])
def test_a_truncated_file(bundle: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(bundle.read_bytes()[:kept])
    assert "truncated" in refusal(load_facts, path)
    assert "truncated" in refusal(load_bundle, path)


def test_a_file_that_is_too_long(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes(bundle.read_bytes() + b"\0")
    assert "damaged" in refusal(load_facts, path)


def test_a_newer_format(bundle: Path, tmp_path: Path) -> None:
    def newer(document: dict[str, Any]) -> None:
        document.clear()
        document.update(format=2, created_by="wsi-pipeline 9.0.0", something={"else": 1})

    message = refusal(load_facts, edited(bundle, tmp_path / "new.safetensors", of_document(newer)))
    assert "wsi-pipeline 9.0.0" in message
    assert message.endswith("update wsi-pipeline")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("digest"),
        lambda d: d.update(tile="wide"),
        lambda d: d.update(vaes=3),
        lambda d: d.update(aliases=[]),
        lambda d: d.update(format=None),
    ],
)
def test_damaged_metadata(bundle: Path, tmp_path: Path, change: Any) -> None:
    assert "metadata is damaged" in refusal(load_facts, edited(bundle, tmp_path / "x", of_document(change)))


def test_metadata_that_is_no_document(bundle: Path, tmp_path: Path) -> None:
    for text in ("[1, 2]", "{", "null", "[" * 100_000):
        path = edited(
            bundle, tmp_path / "x", lambda table, text=text: table["__metadata__"].update({KEY: text})
        )
        assert "metadata is damaged" in refusal(load_facts, path)


def test_missing_and_misshapen_tensors(bundle: Path, tmp_path: Path) -> None:
    def rename(table: dict[str, Any]) -> None:
        table["unet.gone"] = table.pop("unet.conv_in.weight")

    assert "lacks 1 tensors (unet.conv_in.weight)" in refusal(
        load_bundle, edited(bundle, tmp_path / "x", rename)
    )

    def reshape(table: dict[str, Any]) -> None:
        table["unet.conv_in.bias"]["shape"] = [2, 8]

    assert "1 tensors of another shape (unet.conv_in.bias)" in refusal(
        load_bundle, edited(bundle, tmp_path / "x", reshape)
    )
    no_aliases = of_document(lambda document: document.update(aliases={}))
    assert "lacks" in refusal(load_bundle, edited(bundle, tmp_path / "x", no_aliases))
    no_prompt = of_document(lambda document: document["prompts"].pop("b2a"))
    assert "no prompt for b2a" in refusal(load_bundle, edited(bundle, tmp_path / "x", no_prompt))
    impossible = of_document(lambda document: document["unet_config"].update(block_out_channels=[7]))
    assert "cannot be built" in refusal(load_bundle, edited(bundle, tmp_path / "x", impossible))


def test_nothing_is_replaced_unasked(bundle: Path, weights: TurboWeights, tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        save_bundle(weights, path)
    assert path.read_text() == "mine"
    assert save_bundle(weights, path, overwrite=True).digest == weights.digest


def test_a_name_that_cannot_be_a_bundle(weights: TurboWeights, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must end in .safetensors"):
        save_bundle(weights, tmp_path / "model.pkl")
    with pytest.raises(ConfigError, match="no folder"):
        save_bundle(weights, tmp_path / "absent" / "x.safetensors")


def test_a_full_disk_is_noticed_before_writing(
    weights: TurboWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(ConfigError, match="GB free"):
        save_bundle(weights, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_the_old_file(
    bundle: Path, weights: TurboWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    shutil.copy(bundle, path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_bundle(weights, path, overwrite=True)
    assert path.read_bytes() == bundle.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_weights_without_a_tensor_are_not_written(weights: TurboWeights, tmp_path: Path) -> None:
    tensors = {k: v for k, v in weights.tensors.items() if k != "unet.conv_in.bias"}
    with pytest.raises(CheckpointError, match="unet.conv_in.bias"):
        save_bundle(dataclasses.replace(weights, tensors=tensors), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
TENSORS = st.builds(
    lambda dtype, shape, fill: torch.full(shape, fill, dtype=dtype),
    DTYPES,
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 2),
)


@given(tensors=st.dictionaries(st.text(min_size=1, max_size=5), TENSORS, min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_any_floating_point_tensors_round_trip(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]
) -> None:
    tensors.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("any") / "t.safetensors"
    entries, aliases = stored_once(tensors, tensors.__getitem__)
    write_file(path, entries, tensors.__getitem__, {"a": "ä"})
    theirs = load_file(path)  # the library validates the file
    assert entries.keys() == theirs.keys()
    assert entries.keys() | aliases.keys() == tensors.keys()
    ours = StoredTensors({name: (path, aliases.get(name, name)) for name in tensors})
    for name, tensor in tensors.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)
    header = read_header(path, "")
    assert header.metadata == {"a": "ä"}
    assert header.shapes == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


def test_a_view_is_written_as_what_it_shows(tmp_path: Path) -> None:
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tensors = {"view": torch.arange(12.0).reshape(3, 4).T, "image": image, "part": torch.arange(9.0)[2:5]}
    entries, _ = stored_once(tensors, tensors.__getitem__)
    write_file(tmp_path / "t", entries, tensors.__getitem__, {})
    assert all(torch.equal(load_file(tmp_path / "t")[name], tensor) for name, tensor in tensors.items())


def test_integers_are_no_weights() -> None:
    with pytest.raises(CheckpointError, match="int64"):
        stored_once(["a"], lambda _: torch.zeros(2, dtype=torch.int64))


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=64))
def test_arbitrary_bytes_are_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.safetensors"
    for prefix in (b"", len(content).to_bytes(8, "little") + b"{"):
        path.write_bytes(prefix + content)
        refusal(load_facts, path)


def test_a_header_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    path.write_bytes((tensor_file.MAX_HEADER + 1).to_bytes(8, "little") + b"{}")
    assert "another kind of file" in refusal(load_facts, path)
