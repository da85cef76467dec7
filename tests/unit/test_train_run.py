"""A run with a stand-in for the generator: killed at every write it ends as if it had not been; alarms."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wsi_pipeline.errors import CheckpointError, ConfigError, OutputError, TrainingError
from wsi_pipeline.models import tensor_file
from wsi_pipeline.training import folder as folder_module
from wsi_pipeline.training import run as module
from wsi_pipeline.training.config import LoopConfig, OptimiserConfig, TrainConfig
from wsi_pipeline.training.data import DataConfig
from wsi_pipeline.training.events import Event, Finished, Notice, Saved, Started, Stepped, Validated
from wsi_pipeline.training.logs import RunLog
from wsi_pipeline.training.paired import PairedConfig, PairedObjective
from wsi_pipeline.training.validation import ValidationConfig

pytestmark = pytest.mark.usefixtures("one_thread", "stand_in")

SIDE = 32


class Net(nn.Module):
    """Adds a colour to its input; what it learns is which."""

    directions = ("a2b",)
    digest = "0"

    def __init__(self) -> None:
        super().__init__()
        self.colour = nn.Parameter(torch.full((3, 1, 1), 0.3))
        self.learning = {"colour": self.colour}

    def forward(self, x: Tensor, direction: str, noise: Tensor | None = None) -> Tensor:
        return (x + self.colour).clamp(-1, 1)

    def translate(self, image: Tensor, direction: str, number: int) -> Tensor:
        return self(image, direction)

    def save(self, learned: dict[str, Tensor], path: Path) -> None:
        save_file(learned, path)


class Copy(Net):
    """Returns its input."""

    def forward(self, x: Tensor, direction: str, noise: Tensor | None = None) -> Tensor:
        return x + 0.0 * self.colour


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Net)
    monkeypatch.setattr(
        module, "make_objective", lambda _, net, *__: PairedObjective(net, PairedConfig(), None)
    )
    monkeypatch.setattr(module, "load_any_facts", lambda path: SimpleNamespace(path=path))


def use(monkeypatch: pytest.MonkeyPatch, network: type[Net]) -> None:
    monkeypatch.setattr(module, "make_trainee", lambda *_: network())


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    root, rng = tmp_path_factory.mktemp("tiles"), np.random.default_rng(0)
    for name, low in (("a", 60), ("b", 90)):
        (root / name).mkdir()
        for i in range(3):
            pixels = rng.integers(low, low + 100, (SIDE, SIDE, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return TrainConfig(
        data=DataConfig(source=str(root / "a"), target=str(root / "b"), pairing="aligned", crop=SIDE),
        optimiser=OptimiserConfig(learning_rate=0.02, weight_decay=0.0, ema=0.5),
        validation=ValidationConfig(every=3, tiles=2, split=None, metric="psnr", shown=1),
        loop=LoopConfig(
            **{"steps": 11, "log_every": 2, "checkpoint_every": 4, "sample_every": 5, "keep": 1},
            **{"device": "cpu", "tensorboard": False, "batch": 2, "collapse_change": 0.0},
        ),
    )


def results(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("train.yaml", "run.lock")
    }


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def newest(folder: Path) -> Path:
    return sorted((folder / "checkpoints").iterdir())[-1]


def run(config: TrainConfig, out: Path, **options: Any) -> list[Event]:
    events: list[Event] = []
    module.train(config, out, emit=events.append, **options)
    return events


# Killed anywhere


class Killed(BaseException):
    """What a kill is to the code: an end that nothing expects."""


WRITES: list[tuple[Any, str]] = [
    (module, "save_checkpoint"),
    (module, "prune"),
    (module, "save_grid"),
    (Net, "save"),
    (RunLog, "write"),
    (folder_module.RunFolder, "show_best"),
    (folder_module.os, "replace"),
]


def killing(monkeypatch: pytest.MonkeyPatch, at: int) -> list[int]:
    """The ``at``-th moment before something is written is the last; returns the count of moments."""
    moments = [0]

    def around(write: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            moments[0] += 1
            if moments[0] == at:
                raise Killed
            return write(*arguments, **options)

        return called

    for owner, name in WRITES:
        monkeypatch.setattr(owner, name, around(getattr(owner, name)))
    return moments


def test_killed_at_any_write_it_ends_as_if_it_had_not_been(config: TrainConfig, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    with pytest.MonkeyPatch.context() as patch:
        moments = killing(patch, 0)
        run(config, whole)
    wanted = results(whole)
    assert moments[0] > 40
    resumed = set()
    for at in range(1, moments[0] + 1):
        out = tmp_path / f"{at}"
        with pytest.MonkeyPatch.context() as patch:
            killing(patch, at)
            with pytest.raises(Killed):
                run(config, out)
        events = run(config, out)
        assert results(out) == wanted, f"killed at moment {at}"
        resumed.add(next(event.step for event in events if isinstance(event, Started)))
    assert resumed == {0, 3, 4, 6, 8, 11}, "after each checkpoint at least once"


def test_the_log_has_all_iterations_and_averages_end_where_checkpoints_may_be(
    config: TrainConfig, tmp_path: Path
) -> None:
    run(config, tmp_path / "run")
    steps = {
        kind: [line["step"] for line in log_of(tmp_path / "run") if line["kind"] == kind]
        for kind in ("train", "validation")
    }
    assert steps == {"train": [2, 3, 4, 6, 8, 9, 10, 11], "validation": [3, 6, 9, 11]}


# Asked to stop


@pytest.mark.parametrize("kind", [Stepped, Saved, Validated])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_loses_nothing_whenever_it_comes(
    config: TrainConfig, tmp_path: Path, kind: type[Event], number: int
) -> None:
    """Asked while an iteration is logged, saved or validated, the run ends after the next one, saved."""
    rare = replace(config, loop=replace(config.loop, checkpoint_every=1000))
    run(rare, tmp_path / "whole")
    asked: list[int] = []

    def ask(event: Event) -> None:
        if isinstance(event, kind) and not asked:
            asked.append(event.step)
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        module.train(rare, tmp_path / "run", emit=ask)
    assert newest(tmp_path / "run").stem == f"step-{asked[0] + 1:08d}"
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler), "handlers are given back"
    run(rare, tmp_path / "run")
    one, other = (load_file(newest(tmp_path / name)) for name in ("whole", "run"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_who_asks_twice_does_not_wait(config: TrainConfig, tmp_path: Path) -> None:
    def ask(event: Event) -> None:
        if isinstance(event, Stepped):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        module.train(config, tmp_path / "run", emit=ask)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


# What is kept


def test_the_best_stays_although_it_is_old(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([7.0, 9.0, 8.0, 6.0])
    monkeypatch.setattr(
        module.Validation, "figures", lambda *_: {"psnr": next(values), "structure": float("nan")}
    )
    events = run(config, tmp_path / "run")
    assert [event.best for event in events if isinstance(event, Validated)] == [True, True, False, False]
    kept = sorted(path.stem for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000006", "step-00000011"]
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert (finished.step, finished.figures["psnr"]) == (6, 9.0)
    best = load_file(tmp_path / "run" / "checkpoints" / "step-00000006.safetensors")
    made = load_file(tmp_path / "run" / "generator.safetensors")
    assert torch.equal(made["colour"], best["ema/colour"])
    assert not torch.equal(made["colour"], best["generator/colour"])
    last = replace(config, validation=replace(config.validation, choose="last"))
    assert run(last, tmp_path / "run")[-1].step == 11, "another choice needs no training"


@pytest.mark.parametrize("every", [0, 100])
def test_without_a_checkpoint_in_between_the_last_is_saved(
    config: TrainConfig, tmp_path: Path, every: int
) -> None:
    changed = replace(
        config,
        validation=replace(config.validation, every=every),
        loop=replace(config.loop, checkpoint_every=1000, sample_every=1000),
    )
    events = run(changed, tmp_path / "run")
    assert events[-1].step == 11
    assert bool(events[-1].figures) == bool(every)
    assert [path.stem for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000011"]


def test_a_run_can_be_made_longer(config: TrainConfig, tmp_path: Path) -> None:
    """As long as its rate does not depend on its length; then it is the longer run."""
    longer = replace(config, loop=replace(config.loop, steps=14))
    run(longer, tmp_path / "whole")
    run(config, tmp_path / "run")
    events = run(longer, tmp_path / "run")
    assert events[0] == Started(step=11, steps=14, learning={"generator": 3}, device="cpu", processes=1)
    one, other = (
        load_file(tmp_path / name / "checkpoints" / "step-00000014.safetensors") for name in ("whole", "run")
    )
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert run(config, tmp_path / "run")[-1].step == 14, "a shorter one is done"


# Damage


def test_a_damaged_newest_checkpoint_is_told_and_made_again(config: TrainConfig, tmp_path: Path) -> None:
    out, kept = tmp_path / "run", replace(config, loop=replace(config.loop, keep=3))
    run(kept, out)
    wanted = results(out)
    newest(out).write_bytes(newest(out).read_bytes()[:-8])
    events = run(kept, out)
    assert isinstance(events[0], Notice)
    assert "step-00000011.safetensors: is damaged; going on from iteration 8" in events[0].message
    assert results(out) == wanted


def test_where_nothing_whole_is_left_nothing_is_thrown_away(config: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(config, out)
    for path in (out / "checkpoints").iterdir():
        path.write_bytes(b"damaged")
    before = results(out)
    with pytest.raises(CheckpointError, match=r"is damaged, and there is none before it; use --restart"):
        run(config, out)
    assert results(out) == before
    run(config, out, restart=True)


def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_space(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(module, "SPARE", -(2**40))
        patch.setattr(tensor_file.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        with pytest.raises(OutputError, match=r"step-00000003\.safetensors: needs"):
            run(config, tmp_path / "run")
    run(config, tmp_path / "run")
    assert results(tmp_path / "run") == results(tmp_path / "whole")


def test_space_that_will_be_replaced_is_not_asked_for_again(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config, tmp_path / "run")
    monkeypatch.setattr(module, "SPARE", 0)
    monkeypatch.setattr(tensor_file, "SPARE", -(2**40))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    run(config, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"the run needs .* lower loop\.keep"):
        run(config, tmp_path / "another")
    assert not (tmp_path / "another").exists()


def test_data_that_cannot_serve_leave_no_folder(config: TrainConfig, tmp_path: Path) -> None:
    wrong = replace(config, data=replace(config.data, source="/absent"), validation=ValidationConfig(every=0))
    with pytest.raises(ConfigError, match="/absent"):
        run(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_process_that_does_not_see_the_folder_is_told(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_main(values: list[Any]) -> list[Any]:
        if isinstance(values[0], int):
            values[0] = 8
        return values

    monkeypatch.setattr("accelerate.utils.broadcast_object_list", of_main)
    with pytest.raises(
        OutputError, match="does not see the checkpoint of iteration 8; give all processes one"
    ):
        run(config, tmp_path / "run")


def test_an_error_of_the_main_process_ends_the_others_too(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here is process 1 of 2, which is told; it writes nothing and says nothing itself."""
    told = [None, OutputError("the main one cannot write", path=tmp_path)]

    def of_main(values: list[Any]) -> list[Any]:
        values[0] = told.pop(0)
        return values

    other = SimpleNamespace(
        is_main_process=False, num_processes=2, process_index=1, device=torch.device("cpu")
    )
    monkeypatch.setattr(module, "_accelerator", lambda _: other)
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", of_main)
    events: list[Event] = []
    with pytest.raises(OutputError, match="the main one cannot write"):
        module.train(config, tmp_path / "run", emit=events.append)
    assert (told, events, (tmp_path / "run").exists()) == ([], [], False)


# The identity-collapse alarm


def quiet(config: TrainConfig, **loop: Any) -> TrainConfig:
    values = {
        "collapse_change": 0.01,
        "collapse_steps": 6,
        "log_every": 2,
        "checkpoint_every": 3,
        "steps": 15,
    }
    return replace(
        config,
        loop=replace(config.loop, **(values | loop)),
        validation=replace(config.validation, every=0),
    )


def test_a_generator_that_returns_its_input_stops_the_run(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Copy)
    events: list[Event] = []
    with pytest.raises(
        TrainingError, match=r"iteration 6: .* 6 iterations: the generator returns its input"
    ) as e:
        module.train(quiet(config, on_collapse="stop"), tmp_path / "run", emit=events.append)
    assert e.value.exit_code == 4
    assert max(event.step for event in events if isinstance(event, Stepped)) == 6
    with pytest.raises(TrainingError, match="iteration 12"):
        run(quiet(config, on_collapse="stop"), tmp_path / "run")  # nothing changed, so it stops again


@pytest.mark.parametrize("on_collapse", ["warn", "auto"])
def test_it_may_warn_and_go_on(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_collapse: Any
) -> None:
    """``auto`` stops with bfloat16 only, which is known for it."""
    use(monkeypatch, Copy)
    events = run(quiet(config, on_collapse=on_collapse), tmp_path / "run")
    said = [event.message for event in events if isinstance(event, Notice)]
    assert ["iteration 6" in said[0], "iteration 12" in said[1], len(said)] == [True, True, 2]
    assert events[-1].step == 15


def test_automatic_stops_with_bfloat16(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Copy)
    with pytest.raises(TrainingError, match=r"train with loop\.precision=float32"):
        run(quiet(config, precision="bf16"), tmp_path / "run")


def test_a_generator_that_works_raises_no_alarm(config: TrainConfig, tmp_path: Path) -> None:
    events = run(quiet(config, on_collapse="stop"), tmp_path / "run")
    assert not any(isinstance(event, Notice) for event in events)


def test_a_kill_does_not_silence_the_alarm(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Copy)

    def stop(event: Event) -> None:
        if isinstance(event, Saved):
            raise Killed

    settings = quiet(config, on_collapse="stop", checkpoint_every=2, sample_every=1000)
    for _ in range(2):
        with pytest.raises(Killed):
            module.train(settings, tmp_path / "run", emit=stop)
    with pytest.raises(TrainingError, match="iteration 6"):
        run(settings, tmp_path / "run")


def test_iterations_are_counted_and_not_log_lines(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints cut the averages short; that must not bring the alarm forward."""
    use(monkeypatch, Copy)
    with pytest.raises(TrainingError, match="iteration 6"):
        run(quiet(config, on_collapse="stop", log_every=5, checkpoint_every=1), tmp_path / "run")


@pytest.fixture(autouse=True)
def _no_state_is_left() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before), "training draws from no global generator"


def test_an_interrupt_cuts_validation_short_and_the_next_run_makes_it_good(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a sampler of many steps, which would validate for minutes after a scheduler's warning."""
    module.train(config, tmp_path / "whole")
    calls = [0]

    def translate(self: Net, image: Tensor, direction: str, number: int) -> Tensor:
        calls[0] += 1
        if calls[0] == 1:
            signal.raise_signal(signal.SIGTERM)
        return self(image, direction)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Net, "translate", translate)
        module.train(config, tmp_path / "cut")
    assert calls[0] == 1
    assert not any(entry["kind"] == "validation" for entry in log_of(tmp_path / "cut"))
    module.train(config, tmp_path / "cut")
    whole, cut = results(tmp_path / "whole"), results(tmp_path / "cut")
    # Checkpoints of the interruption are one more; all that a run leaves behind in the end is equal.
    assert {k: v for k, v in cut.items() if "checkpoints" not in k} == {
        k: v for k, v in whole.items() if "checkpoints" not in k
    }
