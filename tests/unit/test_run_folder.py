"""The folder of a run: whose it is, who may write into it, and what a kill may leave behind."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from wsi_pipeline.config import load_settings
from wsi_pipeline.core.frozen_model import Chromatin, FrozenModel
from wsi_pipeline.errors import ConfigError, FingerprintMismatchError, OutputError
from wsi_pipeline.training import folder as module
from wsi_pipeline.training.adversarial import AdversarialConfig
from wsi_pipeline.training.config import LoopConfig, ObjectiveConfig, OptimiserConfig, TrainConfig
from wsi_pipeline.training.data import DataConfig
from wsi_pipeline.training.folder import Best, RunFolder
from wsi_pipeline.training.paired import PairedConfig
from wsi_pipeline.training.validation import ValidationConfig

CONFIG = TrainConfig(data=DataConfig(source="a", target="b"))


def folder(path: Path, config: TrainConfig = CONFIG, digest: str = "0", processes: int = 1) -> RunFolder:
    return RunFolder(path, config, digest, processes)


def opened(path: Path, restart: bool = False, **options: Any) -> RunFolder:
    some = folder(path, **options)
    some.open(restart)
    some.close()
    return some


def fingerprint(**changes: Any) -> str:
    processes = changes.pop("processes", 1)
    return folder(Path("x"), replace(CONFIG, **changes), processes=processes).fingerprint


def test_its_settings_lie_in_it_ready_to_be_used(tmp_path: Path) -> None:
    run = opened(tmp_path / "new" / "run")
    assert load_settings(TrainConfig, run.path / "train.yaml") == CONFIG
    assert run.checkpoints.is_dir()


# Whose it is


def test_a_run_goes_on_in_its_own_folder(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    (run.checkpoints / "kept").touch()
    opened(tmp_path / "run")
    assert (run.checkpoints / "kept").exists()


@pytest.mark.parametrize("check", [False, True])
def test_other_settings_are_refused_and_change_nothing(tmp_path: Path, check: bool) -> None:
    opened(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    other = folder(tmp_path / "run", replace(CONFIG, optimiser=OptimiserConfig(learning_rate=1.0)))
    with pytest.raises(FingerprintMismatchError, match=r"other settings .*--restart"):
        other.check(False) if check else other.open(False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*")} == before


def test_other_weights_to_begin_with_are_another_run(tmp_path: Path) -> None:
    opened(tmp_path / "run")
    with pytest.raises(FingerprintMismatchError):
        opened(tmp_path / "run", digest="1")


SAME = {
    "speed": {"data": replace(CONFIG.data, workers=2, prefetch=5)},
    "pictures": {"loop": LoopConfig(sample_every=3, log_every=2, checkpoint_every=7, keep=1)},
    "longer": {"loop": LoopConfig(steps=200_000)},
    "two processes of half": {"processes": 2, "loop": LoopConfig(batch=2)},
    "two halves": {"loop": LoopConfig(batch=2, accumulate=2)},
    "validation": {"validation": ValidationConfig(every=10, shown=1, choose="last")},
    "what is not used": {
        "data": replace(CONFIG.data, frozen=FrozenModel(chromatin=Chromatin(leak_um=9.0))),
        "objective": ObjectiveConfig(paired=PairedConfig(l1=3.0)),
    },
}
OTHER = {
    "seed": {"loop": LoopConfig(batch=4, seed=1)},
    "batch": {"loop": LoopConfig(batch=3)},
    "more processes": {"processes": 2, "loop": LoopConfig(batch=4)},
    "precision": {"loop": LoopConfig(batch=4, precision="bf16")},
    "tiles": {"data": replace(CONFIG.data, crop=64)},
    "losses": {"objective": ObjectiveConfig(adversarial=AdversarialConfig(gan=1.0))},
    "schedule": {"optimiser": OptimiserConfig(schedule="linear")},
}


@pytest.mark.parametrize("name", [*SAME, *OTHER])
def test_the_fingerprint_holds_what_decides_weights_and_no_more(name: str) -> None:
    whole = {"loop": LoopConfig(batch=4)}
    changes = (SAME | OTHER)[name]
    if "loop" in changes and name in ("pictures", "longer"):
        changes = {"loop": replace(changes["loop"], batch=4)}
    assert (fingerprint(**(whole | changes)) == fingerprint(**whole)) == (name in SAME)


def test_what_is_free_is_a_setting() -> None:
    known = asdict(CONFIG)
    for part, names in module._FREE.items():
        assert set(names) <= known[part].keys()


def test_the_length_decides_where_a_schedule_follows_it() -> None:
    linear = OptimiserConfig(schedule="linear")
    one, other = (fingerprint(optimiser=linear, loop=LoopConfig(steps=steps)) for steps in (100, 200))
    assert one != other


# What is not a run's


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", ["slide.svs", "train.yaml", "checkpoints"])
def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path, name: str, restart: bool) -> None:
    (tmp_path / name).write_text("mine")
    for call in (folder(tmp_path).check, folder(tmp_path).open):
        with pytest.raises(ConfigError, match="is no training run and not empty"):
            call(restart)
    assert (tmp_path / name).read_text() == "mine"


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    opened(tmp_path)
    assert (tmp_path / "run.json").exists()


def test_a_file_in_its_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    for call in (folder(tmp_path / "run").check, folder(tmp_path / "run").open):
        with pytest.raises(OutputError, match="cannot be written"):
            call(False)


@pytest.mark.parametrize("record", ["", "[]", "{}", "\x00"])
def test_a_damaged_record_is_told(tmp_path: Path, record: str) -> None:
    opened(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(record)
    with pytest.raises(ConfigError, match="is damaged .*--restart"):
        opened(tmp_path / "run")
    opened(tmp_path / "run", restart=True)
    opened(tmp_path / "run")


# Starting again


def test_restart_throws_away_what_is_ours_and_nothing_else(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    ours = ["best.json", "log.jsonl", "generator.safetensors"]
    for name in [*ours, "notes.txt"]:
        (run.path / name).write_text(name)
    (run.checkpoints / "step-00000010.safetensors").touch()
    (run.samples).mkdir()
    other = replace(CONFIG, optimiser=OptimiserConfig(learning_rate=1.0))
    opened(run.path, restart=True, config=other)
    assert not any((run.path / name).exists() for name in [*ours, "samples"])
    assert list(run.checkpoints.iterdir()) == []
    assert (run.path / "notes.txt").read_text() == "notes.txt"
    assert load_settings(TrainConfig, run.path / "train.yaml") == other


def test_a_restart_that_was_killed_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened(tmp_path / "run")
    (run.path / "log.jsonl").touch()
    remove, gone = module._remove, []

    def killed(path: Path) -> None:
        if len(gone) == 3:
            raise KeyboardInterrupt
        gone.append(path)
        remove(path)

    monkeypatch.setattr(module, "_remove", killed)
    with pytest.raises(KeyboardInterrupt):
        folder(run.path).open(True)
    monkeypatch.undo()
    opened(run.path, restart=True)
    assert not (run.path / "log.jsonl").exists()


@pytest.mark.parametrize("names", [["run.json.partial"], ["run.lock"], []])
def test_a_run_that_was_killed_as_it_began_can_begin_again(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text("{")
    opened(tmp_path)


def test_halves_of_checkpoints_are_cleared_away(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    (run.checkpoints / "step-00000010.safetensors.partial").touch()
    opened(run.path)
    assert list(run.checkpoints.iterdir()) == []


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    first, second = folder(tmp_path / "run"), folder(tmp_path / "run")
    first.open(False)
    for restart in (False, True):
        with pytest.raises(OutputError, match="another process trains in it"):
            second.open(restart)
    assert (tmp_path / "run" / "train.yaml").exists()
    first.close()
    second.open(False)
    second.close()


# The best


def test_the_best_is_shown_to_people(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    run.show_best(Best(step=30, value=1.5, figures={"fid": 1.5, "structure": 0.9}))
    shown = json.loads((run.path / "best.json").read_text())
    assert shown == {"step": 30, "value": 1.5, "figures": {"fid": 1.5, "structure": 0.9}}
    run.show_best(None)
    assert not (run.path / "best.json").exists()
    run.show_best(None)


def test_used_counts_what_will_be_replaced(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    assert run.used == 0
    run.open(False)
    run.close()
    (run.checkpoints / "step-00000010.safetensors").write_bytes(bytes(100))
    run.bundle.write_bytes(bytes(20))
    assert run.used == 120


def test_a_refusal_names_the_settings_that_differ(tmp_path: Path) -> None:
    opened(tmp_path / "run")
    other = replace(CONFIG, optimiser=OptimiserConfig(learning_rate=1e-4))
    with pytest.raises(FingerprintMismatchError, match=r"other settings \(optimiser\.learning_rate\)"):
        folder(tmp_path / "run", other).check(False)
    with pytest.raises(FingerprintMismatchError, match="other tiles, or other weights"):
        folder(tmp_path / "run", digest="1").check(False)
