"""What a learned generator needs of the pipeline: the slide's noise, a halo, signs of life, an estimate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import learned_toy
import numpy as np
import pytest
from convert_helpers import digests, settings

from wsi_pipeline import api
from wsi_pipeline.core.geometry import Region, Size
from wsi_pipeline.pipeline import estimate
from wsi_pipeline.pipeline.events import Event, Notice, Planned, Progress
from wsi_pipeline.pipeline.settings import (
    ConvertConfig,
    ExecutionConfig,
    GeneratorConfig,
    InputConfig,
    TilingConfig,
)
from wsi_pipeline.readers import open_slide
from wsi_pipeline.readers.array import ArraySlide
from wsi_pipeline.readers.synthetic import SyntheticSlide

SLIDE = SyntheticSlide(size=Size(1900, 2300), mpp=(0.499, 0.499), tissue_share=0.4, seed=3)


def toy(**options: Any) -> ConvertConfig:
    return replace(settings(), generator=GeneratorConfig(name="learned_toy:Toy", options=options))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "a.ome.zarr"
    api.convert(SLIDE, out, toy(), seams=True)
    return out


def test_shifted_grids_and_single_blocks_draw_the_same_noise(converted: Path) -> None:
    document = json.loads((converted / "manifest.json").read_text())
    run = document["run"]
    assert run["disagreement"]["largest"] == 0, "neighbours see the same noise and enough context"
    assert run["seams"]["grid_shift"]["largest"] == 0
    assert run["seams"]["grid_shift"]["n"] > 0
    assert run["seams"]["roi_equality"]["pass"] is True
    assert {"cell_gradient", "cell_excess"} <= set(run["seams"]), "the cells of the spec are measured"
    assert document["config"]["tiling"]["overlap"] is None
    assert (document["plan"]["overlap"], document["plan"]["halo"]) == (32, 16)
    assert document["slide"]["mpp"] == [0.499, 0.499]
    assert document["generator"]["context"] == {"weights": "none", "latent": "noise"}


@pytest.mark.parametrize("batch", [1, 7])
def test_noise_does_not_depend_on_the_batch(tmp_path: Path, converted: Path, batch: int) -> None:
    api.convert(SLIDE, tmp_path / "a.ome.zarr", replace(toy(), run=ExecutionConfig(batch=batch)))
    assert digests(tmp_path / "a.ome.zarr") == digests(converted)


def test_two_processes_draw_the_same_noise_and_report_blocks(tmp_path: Path, converted: Path) -> None:
    events: list[Event] = []
    config = replace(toy(), run=ExecutionConfig(workers=2, threads=1))
    api.convert(SLIDE, tmp_path / "a.ome.zarr", config, emit=events.append)
    assert digests(tmp_path / "a.ome.zarr") == digests(converted)
    planned = next(event for event in events if isinstance(event, Planned))
    steps = [event for event in events if isinstance(event, Progress)]
    assert planned.blocks in {step.total for step in steps}
    assert steps[-1].done == steps[-1].total


def test_another_seed_and_another_slide_have_other_noise(tmp_path: Path, converted: Path) -> None:
    class Copy(SyntheticSlide):
        """The same pixels in another file."""

        @property
        def identity(self) -> str:
            return "another"

    copy = Copy(size=SLIDE.size, mpp=SLIDE.mpp, tissue_share=SLIDE.tissue_share, seed=SLIDE.seed)
    api.convert(copy, tmp_path / "slide.ome.zarr", toy())
    api.convert(SLIDE, tmp_path / "seed.ome.zarr", replace(toy(), tiling=TilingConfig(seed=1)))
    outputs = [converted, tmp_path / "slide.ome.zarr", tmp_path / "seed.ome.zarr"]
    pixels = [open_slide(out).read_level(0, Region.of(SLIDE.size)) for out in outputs]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        differs = (pixels[one] != pixels[other]).any(axis=2)
        assert differs.mean() > 0.1, "wherever there is tissue"


def test_progress_counts_tiles_and_blocks(tmp_path: Path) -> None:
    events: list[Event] = []
    api.convert(SLIDE, tmp_path / "a.ome.zarr", toy(batch=2), emit=events.append)
    planned = next(event for event in events if isinstance(event, Planned))
    steps = [event for event in events if isinstance(event, Progress)]
    assert {step.total for step in steps} == {planned.tiles + planned.blocks}
    done = [step.done for step in steps]
    assert done == sorted(set(done))
    assert done[-1] == steps[-1].total
    assert done[0] == 2, "the first sign comes with the first batch"


@pytest.mark.parametrize(
    ("batch", "enough", "calls"),
    [(1, 100.0, [1] * 6), (1, 0.0, [1, 1]), (2, 100.0, [2, 2, 2]), (8, 100.0, [3, 3]), (8, 0.0, [3, 3])],
)
def test_an_estimate_generates_few_tiles_and_no_glass(
    monkeypatch: pytest.MonkeyPatch, batch: int, enough: float, calls: list[int]
) -> None:
    monkeypatch.setattr(estimate, "ENOUGH_SECONDS", enough)
    learned_toy.CALLS.clear()
    cost = api.plan(SLIDE, toy(batch=batch)).estimate
    assert calls == learned_toy.CALLS
    assert 0 < cost.seconds < 60
    assert cost.size_bytes > SLIDE.size.area / 100


def test_a_slide_without_tissue_asks_nothing_of_its_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a model would be loaded for nothing")

    for method in ("prepare", "__call__", "background"):
        monkeypatch.setattr(learned_toy.Toy, method, refuse)
    cost = api.plan(ArraySlide(np.full((900, 900, 3), 240, np.uint8), mpp=0.5), toy()).estimate
    assert (cost.tiles, cost.blocks, cost.size_bytes, cost.seconds) == (0, 0, 0, 0.0)


def test_the_estimate_of_bytes_is_near_the_truth(converted: Path) -> None:
    cost = api.plan(SLIDE, toy()).estimate
    written = [p.stat().st_size for level in "0123" for p in (converted / level).rglob("*") if p.is_file()]
    assert cost.size_bytes == pytest.approx(sum(written), rel=0.4)


def test_an_enlarged_slide_is_said(tmp_path: Path) -> None:
    events: list[Event] = []
    coarse = ArraySlide(np.full((300, 400, 3), 200, np.uint8), mpp=0.9)
    config = replace(toy(), input=InputConfig(mask="whole", stain="any"))
    api.convert(coarse, tmp_path / "a.ome.zarr", config, emit=events.append)
    notices = [event.message for event in events if isinstance(event, Notice)]
    assert notices == ["enlarged 1.8 times, to 0.5 µm per pixel: this adds no detail"]
    assert np.allclose(open_slide(tmp_path / "a.ome.zarr").mpp, 0.5)
