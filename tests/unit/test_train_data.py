"""Samples and batches: the same for every rank, worker and order; pairs stay pairs."""

from __future__ import annotations

import os
import pickle
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from wsi_pipeline.cohorts.tiles import load_tiles
from wsi_pipeline.core.frozen import FrozenModel
from wsi_pipeline.errors import ConfigError, SlideError, WsiPipelineError
from wsi_pipeline.training import data as data_module
from wsi_pipeline.training.augment import SYMMETRIES, jitter_stain, turn
from wsi_pipeline.training.data import DataConfig, TileSamples, TrainBatch, batches
from wsi_pipeline.training.workers import load_in_processes

SIDE = 16


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five tiles of domain A, three of B (larger); ``pairs_a`` and ``pairs_b`` show the same places."""
    root = tmp_path_factory.mktemp("cohort")
    rng = np.random.default_rng(0)
    for name, count, size in (("a", 5, 24), ("b", 3, 40), ("pairs_b", 4, 32)):
        (root / name).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 256, (size, size, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    (root / "pairs_a").mkdir()
    for path in sorted((root / "pairs_b").iterdir())[1:]:
        Image.fromarray(255 - np.asarray(Image.open(path))).save(root / "pairs_a" / f"{path.stem}.tif")
    Image.new("RGB", (32, 32)).save(root / "pairs_a" / "alone.png")
    return root


def config(cohort: Path, **options: Any) -> DataConfig:
    values = {"source": str(cohort / "a"), "target": str(cohort / "b"), "crop": SIDE, "augment": "d4+colour"}
    return DataConfig(**(values | options))


def join(parts: list[TrainBatch]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        np.concatenate([part.numbers for part in parts]),
        np.concatenate([part.source_BHWC for part in parts]),
        np.concatenate([part.target_BHWC for part in parts]),
    )


@settings(max_examples=25, deadline=None)
@given(world=st.integers(1, 4), batch=st.integers(1, 3), start=st.integers(0, 40), steps=st.integers(1, 3))
def test_the_slices_of_the_ranks_are_the_batch_of_one(
    cohort: Path, world: int, batch: int, start: int, steps: int
) -> None:
    some = config(cohort)
    one = list(batches(some, seed=5, batch=batch * world, start=start, stop=start + steps))
    ranks = [
        list(batches(some, seed=5, batch=batch, start=start, stop=start + steps, rank=rank, world=world))
        for rank in range(world)
    ]
    for step, whole in enumerate(one):
        joined = join([ranks[rank][step] for rank in range(world)])
        for have, want in zip(joined, join([whole]), strict=True):
            np.testing.assert_array_equal(have, want)
    assert one[0].numbers[0] == start * batch * world


def test_a_sample_does_not_depend_on_what_was_read_before(cohort: Path) -> None:
    samples = TileSamples(config(cohort, mix=1), seed=1)
    numbers = list(range(20))
    first = {number: samples.sample(number) for number in numbers}
    random.Random(0).shuffle(numbers)
    other = pickle.loads(pickle.dumps(TileSamples(config(cohort, mix=1), seed=1)))  # noqa: S301
    for number in numbers:
        for have, want in zip(other.sample(number), first[number], strict=True):
            np.testing.assert_array_equal(have, want)
    different = TileSamples(config(cohort), seed=2)
    assert any((different.sample(number)[0] != first[number][0]).any() for number in numbers)


def test_processes_give_the_batches_of_one_process_and_leave_the_global_noise_alone(cohort: Path) -> None:
    import torch

    before = torch.get_rng_state()
    inline = join(list(batches(config(cohort), seed=5, batch=3, start=2, stop=6)))
    apart = join(list(batches(config(cohort, workers=2), seed=5, batch=3, start=2, stop=6)))
    for have, want in zip(apart, inline, strict=True):
        assert have.dtype == want.dtype
        np.testing.assert_array_equal(have, want)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slide_that_fails_is_named_whoever_reads_it(cohort: Path, tmp_path: Path, workers: int) -> None:
    whole = (cohort / "b" / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    broken = config(cohort, target=str(tmp_path), workers=workers)
    with pytest.raises(SlideError, match=r"cut\.png: the picture cannot be decoded") as caught:
        list(batches(broken, seed=0, batch=1, start=0, stop=2))
    assert caught.value.slide_id == "cut"


def die(step: int, pixels: np.ndarray) -> np.ndarray:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def stumble(step: int, pixels: np.ndarray) -> np.ndarray:
    raise RuntimeError("a bug of ours")


def number_after_a_while(step: int, pixels: np.ndarray) -> np.ndarray:
    time.sleep(0.02 * (step % 3))
    pixels[:] = step
    return np.array([step])


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (2, 3)])
def test_batches_come_in_order_and_stay_what_they_were(workers: int, prefetch: int) -> None:
    steps = range(100, 130)
    made = list(
        load_in_processes(number_after_a_while, steps, shape=(2, 5), workers=workers, prefetch=prefetch)
    )
    assert [int(numbers[0]) for numbers, _ in made] == list(steps)
    assert all((pixels == step).all() for step, (_, pixels) in zip(steps, made, strict=True))


def test_a_process_that_dies_is_told_and_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(WsiPipelineError, match=r"data\.workers: a process that reads tiles died"):
        list(load_in_processes(die, range(3), shape=(2,), workers=1, prefetch=1))
    with pytest.raises(RuntimeError, match=r"in stumble(.|\n)*a bug of ours"):
        list(load_in_processes(stumble, range(3), shape=(2,), workers=1, prefetch=1))


def test_every_tile_comes_once_in_an_epoch(cohort: Path) -> None:
    samples = TileSamples(config(cohort, crop=24, augment="none"), seed=3)
    assert samples.length == 5
    for epoch in range(3):
        seen = {samples.sample(number)[0].tobytes() for number in range(epoch * 5, epoch * 5 + 5)}
        assert len(seen) == 5


def test_without_augmentation_a_whole_tile_is_the_file(cohort: Path) -> None:
    samples = TileSamples(config(cohort, crop=24, augment="none"), seed=3)
    files = {np.asarray(Image.open(path)).tobytes() for path in (cohort / "a").iterdir()}
    assert {samples.sample(number)[0].tobytes() for number in range(5)} == files


def test_crops_and_symmetries_vary(cohort: Path) -> None:
    samples = TileSamples(config(cohort, source=str(cohort / "b"), crop=24, augment="d4"), seed=0)
    assert len({samples.sample(number)[0].tobytes() for number in range(60)}) > 50


@pytest.mark.parametrize("augment", ["none", "d4"])
def test_aligned_tiles_undergo_the_same_geometry(cohort: Path, augment: str) -> None:
    options = {"source": str(cohort / "pairs_a"), "target": str(cohort / "pairs_b"), "pairing": "aligned"}
    samples = TileSamples(config(cohort, augment=augment, **options), seed=4)
    assert samples.length == 3
    assert samples.left_out == 2
    for number in range(12):
        source_HWC, target_HWC = samples.sample(number)
        np.testing.assert_array_equal(source_HWC, 255 - target_HWC)


def test_in_pairs_only_the_sources_colours_change(cohort: Path) -> None:
    options = {"source": str(cohort / "pairs_a"), "target": str(cohort / "pairs_b"), "pairing": "aligned"}
    plain = TileSamples(config(cohort, augment="d4", **options), seed=4)
    coloured = TileSamples(config(cohort, **options), seed=4)
    np.testing.assert_array_equal(plain.sample(0)[1], coloured.sample(0)[1])
    assert (plain.sample(0)[0] != coloured.sample(0)[0]).any()


def test_the_real_model_of_frozen_artefacts_serves(cohort: Path) -> None:
    samples = TileSamples(config(cohort, source="", pairing="simulated", mpp=0.5), seed=0)
    source_HWC, target_HWC = samples.sample(1)
    assert source_HWC.shape == target_HWC.shape == (SIDE, SIDE, 3)
    assert (source_HWC != target_HWC).any()
    np.testing.assert_array_equal(source_HWC, samples.sample(1)[0])


@pytest.fixture
def fake_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of artefacts that adds its severity, the pixel size and a draw: it tells what it was given."""

    def simulate(pixels_HWC: Any, mpp: float, model: FrozenModel, rng: np.random.Generator) -> Any:
        told = np.uint8(10 * model.severity + int(100 * mpp) + rng.integers(20))
        return pixels_HWC // 4 + told, pixels_HWC

    monkeypatch.setattr("wsi_pipeline.training.data.simulate_pair", simulate)


def test_a_simulated_source_is_made_of_its_target(cohort: Path, fake_frozen: None) -> None:
    options = {
        "source": "",
        "pairing": "simulated",
        "mpp": 0.5,
        "augment": "d4",
        "frozen": FrozenModel(severity=0.3),
    }
    samples = TileSamples(config(cohort, **options), seed=0)
    assert samples.length == 3
    shifts = set()
    for number in range(10):
        source_HWC, target_HWC = samples.sample(number)
        shift = source_HWC - target_HWC // 4
        assert shift.min() == shift.max()
        shifts.add(int(shift.min()))
    assert len(shifts) > 2
    assert 53 <= min(shifts) <= max(shifts) < 73
    with pytest.raises(ConfigError, match=r"data\.mpp: state the pixel size"):
        TileSamples(config(cohort, **(options | {"mpp": None})), seed=0)


def test_tiles_smaller_than_the_crop_are_named(cohort: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.crop: 30 px is larger than .*0\.png is 24 x 24 px.*"
    ) as caught:
        TileSamples(config(cohort, crop=30), seed=0)
    assert "4.png" in str(caught.value)


def test_settings_that_cannot_work_are_refused(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.source: name a tile index"):
        TileSamples(config(cohort, source=""), seed=0)
    with pytest.raises(ConfigError, match=r"data\.pairing: no tile of .* has a partner"):
        TileSamples(
            config(cohort, source=str(cohort / "pairs_a" / ".." / "a" / ".."), pairing="aligned"), seed=0
        )
    for name, value in (("crop", 0), ("workers", -1), ("prefetch", 0), ("mix", 0)):
        with pytest.raises(ConfigError, match=rf"data\.{name}: {value} is too small"):
            replace(config(cohort), **{name: value})
    Image.new("RGB", (33, 32)).save(tmp_path / "1.png")
    with pytest.raises(ConfigError, match="are a pair but differ in size"):
        TileSamples(
            config(cohort, source=str(tmp_path), target=str(cohort / "pairs_b"), pairing="aligned"), seed=0
        )
    (tmp_path / "1.tif").write_bytes((tmp_path / "1.png").read_bytes())
    with pytest.raises(ConfigError, match=r"1\.tif: the same pair as .*1\.png"):
        TileSamples(
            config(cohort, source=str(tmp_path), target=str(cohort / "pairs_b"), pairing="aligned"), seed=0
        )
    for wrong in ({"batch": 0}, {"rank": 2}, {"start": -1}):
        with pytest.raises(ValueError, match="rank"):
            batches(config(cohort), **({"seed": 0, "batch": 1, "start": 0, "stop": 1, "world": 2} | wrong))


def test_the_symmetries_are_the_eight_of_the_square() -> None:
    pixels = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 3)
    turned = [turn(pixels, symmetry) for symmetry in range(SYMMETRIES)]
    assert len({one.tobytes() for one in turned}) == 8
    np.testing.assert_array_equal(turned[0], pixels)
    for one in turned:  # neighbours stay neighbours: the corners keep their cyclic order or reverse it
        ring = [int(one[y, x, 0]) for y, x in ((0, 0), (0, 1), (1, 1), (1, 0))]
        start = ring.index(0)
        assert [*ring[start:], *ring[:start]] in ([0, 3, 9, 6], [0, 6, 9, 3])


def test_the_change_of_stain_is_mild_and_keeps_white_nearly_white() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    for seed in range(50):
        changed = jitter_stain(ramp, np.random.default_rng(seed)).astype(int)
        assert (np.diff(changed[0], axis=0) >= 0).all()
        assert changed[0, 255].min() >= 248
        assert np.abs(changed - ramp).max() <= 16


def test_density_without_change_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from wsi_pipeline.training import augment

    monkeypatch.setattr(augment, "GAIN", 0.0)
    monkeypatch.setattr(augment, "OFFSET", 0.0)
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    np.testing.assert_array_equal(jitter_stain(ramp, np.random.default_rng(0)), ramp)


def test_sides_take_their_domain_and_the_training_split_where_there_are_several(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("trainA", "trainB", "valA", "valB"):
        (tmp_path / name).mkdir()
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(tmp_path / name / f"{name}.png")
    both = config(tmp_path, source=str(tmp_path), target=str(tmp_path), augment="none")
    source_HWC, target_HWC = TileSamples(both, seed=0).sample(0)
    for pixels_HWC, name in ((source_HWC, "trainA"), (target_HWC, "trainB")):
        np.testing.assert_array_equal(pixels_HWC, np.asarray(Image.open(tmp_path / name / f"{name}.png")))


def test_pairs_on_lattices_of_other_pixel_sizes_are_refused(cohort: Path) -> None:
    index = load_tiles(str(cohort / "pairs_b"), mpp=0.5)
    slides = tuple(replace(slide, lattice=(0.46, 0.46)) for slide in index.slides)
    with pytest.raises(ConfigError, match=r"tiling\.tolerance=0"):
        data_module._pairs(load_tiles(str(cohort / "pairs_b"), mpp=0.5), replace(index, slides=slides))


def test_the_pixel_size_of_both_sides_is_one(cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert data_module.tiles_mpp(config(cohort, mpp=0.25)) == pytest.approx(0.25)
    assert data_module.tiles_mpp(config(cohort)) is None
    sizes = {str(cohort / "a"): 0.5, str(cohort / "b"): 0.25}
    monkeypatch.setattr(data_module, "load_tiles", lambda path, mpp: load_tiles(path, mpp=sizes[path]))
    with pytest.raises(ConfigError, match="0.5 µm per pixel and target tiles 0.25"):
        data_module.tiles_mpp(config(cohort))
