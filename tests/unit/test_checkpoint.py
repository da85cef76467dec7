"""Checkpoints: back bit for bit, all of it or nothing, the one before where the newest is damaged."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from wsi_pipeline.errors import CheckpointError, FingerprintMismatchError, OutputError
from wsi_pipeline.models import tensor_file
from wsi_pipeline.training.checkpoint import (
    Checkpoint,
    State,
    checkpoint_bytes,
    damaged_checkpoints,
    find_checkpoints,
    learned_of,
    load_checkpoint,
    prune,
    save_checkpoint,
)
from wsi_pipeline.training.config import OptimiserConfig
from wsi_pipeline.training.loop import make_optimisers

pytestmark = pytest.mark.usefixtures("one_thread")

NOTES = {"best": {"step": 3, "value": 0.1 + 0.2, "figures": {"fid": float("inf")}}, "quiet": 7}


def state(seed: int, ema: bool = True) -> State:
    """Two groups; ``idle`` never has a gradient, so its optimiser has no moments of it."""
    random = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=random))

    groups = {
        "generator": {
            "unet.a.weight": drawn(3, 4),
            "unet.idle.weight": drawn(2),
            "vae.b.weight": drawn(2, 1, 3),
        },
        "discriminator": {"net_disc_a.c": drawn(5)},
    }
    averages = {name: p.detach() + 1 for name, p in groups["generator"].items()} if ema else {}
    return State(
        groups=groups,
        buffers={"net_disc_a.weight_u": torch.randn(4, generator=random)},
        optimisers=make_optimisers(SimpleNamespace(groups=groups), OptimiserConfig(learning_rate=0.01)),
        ema=averages,
    )


def advance(some: State, steps: int, seed: int = 0) -> None:
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group, parameters in some.groups.items():
            for name, parameter in parameters.items():
                if "idle" not in name:
                    parameter.grad = torch.randn(parameter.shape, generator=random)
            some.optimisers[group].step()
            some.optimisers[group].zero_grad()


def values(some: State) -> dict[str, Tensor]:
    """All that training goes on from."""
    found = {}
    for group, parameters in some.groups.items():
        for name, parameter in parameters.items():
            found[f"{group}/{name}"] = parameter.detach()
            for key, moment in some.optimisers[group].state[parameter].items():
                found[f"{group}/{name}/{key}"] = moment
    return found | dict(some.buffers) | {f"ema/{name}": tensor for name, tensor in some.ema.items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        t.dtype == other[name].dtype and torch.equal(t, other[name]) for name, t in one.items()
    )


def saved(folder: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(folder, step, state(step), "mine")


def stepped(found: list[Checkpoint]) -> list[int]:
    return [checkpoint.step for checkpoint in found]


# There and back


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("ema", [False, True])
def test_a_state_comes_back_bit_for_bit(tmp_path: Path, steps: int, ema: bool) -> None:
    one, other = state(1, ema), state(2, ema)
    advance(one, steps)
    advance(other, 2, seed=5)  # what is there is overwritten
    found = save_checkpoint(tmp_path, 12, one, "mine", NOTES)
    assert (found.path.name, found.step) == ("step-00000012.safetensors", 12)
    if steps == 0:
        other = state(2, ema)
    assert load_checkpoint(found, other, "mine") == NOTES
    assert same(values(one), values(other))
    for some in (one, other):
        advance(some, 2, seed=9)
    assert same(values(one), values(other)), "and goes on alike"


def test_numbers_of_any_size_come_back(tmp_path: Path) -> None:
    one, other = state(1), state(2)
    extremes = torch.tensor([1e-45, -0.0, 3.4e38, 1.1754944e-38, 1 / 3])
    with torch.no_grad():
        one.groups["discriminator"]["net_disc_a.c"].copy_(extremes)
    load_checkpoint(save_checkpoint(tmp_path, 1, one, "mine"), other, "mine")
    back = other.groups["discriminator"]["net_disc_a.c"].detach()
    assert torch.equal(back.view(torch.int32), extremes.view(torch.int32))


def test_the_size_is_known_before(tmp_path: Path) -> None:
    some = state(1)
    advance(some, 1)
    size = save_checkpoint(tmp_path, 1, some, "mine").path.stat().st_size
    idle = 2 * 4 * 2  # moments that the optimiser does not have
    assert 0 <= size - (checkpoint_bytes(some) - idle) < 4096, "a header and no more"


@pytest.mark.parametrize("ema", [False, True])
def test_the_generator_of_a_checkpoint_is_averaged_where_it_can_be(tmp_path: Path, ema: bool) -> None:
    some = state(1, ema)
    advance(some, 1)
    found = learned_of(save_checkpoint(tmp_path, 1, some, "mine"))
    wanted = some.ema if ema else {n: p.detach() for n, p in some.groups["generator"].items()}
    assert same(found, dict(wanted))


# What is not gone on from


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    found, other = save_checkpoint(tmp_path, 1, state(1), "mine"), state(2)
    before = {name: tensor.clone() for name, tensor in values(other).items()}
    with pytest.raises(FingerprintMismatchError, match="other settings"):
        load_checkpoint(found, other, "yours")
    assert same(values(other), before)


def test_a_checkpoint_that_lacks_something_is_refused(tmp_path: Path) -> None:
    found = save_checkpoint(tmp_path, 1, state(1, ema=False), "mine")
    with pytest.raises(CheckpointError, match="lacks ema/unet.a.weight and 2 more"):
        load_checkpoint(found, state(2, ema=True), "mine")


def test_a_damaged_newest_file_is_passed_over(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20, 30, 40)
    newest, next_one = tmp_path / "step-00000040.safetensors", tmp_path / "step-00000030.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    next_one.write_bytes(b"")
    assert stepped(find_checkpoints(tmp_path)) == [10, 20]
    assert damaged_checkpoints(tmp_path) == [next_one, newest]


def test_files_of_other_kinds_are_no_checkpoints(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    for name in ("step-00000020.safetensors.partial", "step-20.safetensors", "best.json"):
        shutil.copy(tmp_path / "step-00000010.safetensors", tmp_path / name)
    assert stepped(find_checkpoints(tmp_path)) == [10]
    assert damaged_checkpoints(tmp_path) == []
    assert find_checkpoints(tmp_path / "absent") == []


def test_a_foreign_safetensors_file_is_no_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(3)}, tmp_path / "step-00000020.safetensors")
    assert find_checkpoints(tmp_path) == []


# All of it or nothing


@pytest.mark.parametrize("before", [False, True])
def test_a_kill_amid_writing_leaves_what_was_there(tmp_path: Path, before: bool) -> None:
    if before:
        saved(tmp_path, 5)
    child = os.fork()
    if child == 0:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        saved(tmp_path, 10)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert (tmp_path / "step-00000010.safetensors.partial").exists(), "it was amid"
    assert stepped(find_checkpoints(tmp_path)) == ([5] if before else [])
    saved(tmp_path, 10)
    assert stepped(find_checkpoints(tmp_path))[-1] == 10


def test_a_checkpoint_takes_the_place_of_a_damaged_one(tmp_path: Path) -> None:
    (tmp_path / "step-00000010.safetensors").write_bytes(b"damaged")
    saved(tmp_path, 10)
    assert stepped(find_checkpoints(tmp_path)) == [10]


def test_a_full_disk_is_told_and_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 10)
    monkeypatch.setattr(tensor_file.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(OutputError, match=r"step-00000020\.safetensors: needs .* free space") as caught:
        saved(tmp_path, 20)
    assert caught.value.exit_code == 5
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010.safetensors"]


def test_a_disk_that_fills_amid_writing_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saved(tmp_path, 10)
    monkeypatch.setattr(tensor_file.os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        saved(tmp_path, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010.safetensors"]


# What is kept


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, None, [30, 40]),
        (1, None, [40]),
        (1, 10, [10, 40]),
        (2, 20, [20, 30, 40]),
        (3, 40, [20, 30, 40]),
        (9, 10, [10, 20, 30, 40]),
    ],
)
def test_the_newest_and_the_best_are_kept(
    tmp_path: Path, keep: int, best: int | None, left: list[int]
) -> None:
    saved(tmp_path, 10, 20, 30, 40)
    prune(tmp_path, keep, best)
    assert stepped(find_checkpoints(tmp_path)) == left


def test_a_file_says_what_it_is(tmp_path: Path) -> None:
    some = state(1)
    advance(some, 1)
    with safe_open(save_checkpoint(tmp_path, 1, some, "mine").path, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert "generator/unet.a.weight/exp_avg_sq" in file.keys()  # noqa: SIM118
        assert "buffer/net_disc_a.weight_u" in file.keys()  # noqa: SIM118
