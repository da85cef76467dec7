"""The judge of two generators: figures know better from worse; generators are called as in a conversion."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from wsi_pipeline.core.frozen import FrozenModel
from wsi_pipeline.core.geometry import Mpp, Region
from wsi_pipeline.core.protocols import Context, GeneratorSpec, TileBatch
from wsi_pipeline.evaluation.judge import (
    Closeness,
    closeness,
    freeze_slide,
    prepare_slide,
    summarise,
    tissue_field,
    translate_field,
)
from wsi_pipeline.generators import make_generator

U8 = npt.NDArray[np.uint8]
H, E = np.array([0.562, 0.705, 0.432]), np.array([0.211, 0.890, 0.403])


def section(height: int, width: int, seed: int = 0) -> U8:
    """Nuclei at random places on pink, a quarter of it glass."""
    rng = np.random.default_rng(seed)
    h = np.zeros((height, width), np.float32)
    for y, x in rng.integers(0, (height, width), (height * width // 300, 2)):
        cv2.circle(h, (int(x), int(y)), 5, float(rng.uniform(0.8, 1.8)), -1)
    h = cv2.GaussianBlur(h, (0, 0), 0.8)
    e = cv2.GaussianBlur(rng.standard_normal((height, width)).astype(np.float32), (0, 0), 4.0)
    od = h[..., None] * H + np.clip(0.4 + 2.0 * e, 0.1, None)[..., None] * E
    od[: height // 2, : width // 2] = 0.0
    return np.clip(np.rint(243 * np.exp(-od)), 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Darker:
    """Half the light; notes what it was prepared with."""

    seen: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> GeneratorSpec:
        return GeneratorSpec(
            kind="darker",
            tile=96,
            halo=8,
            align=1,
            mpp=(0.5, 0.5),
            batch=2,
            digest="0" * 64,
            exact=True,
            overlap=16,
        )

    def prepare(self, thumbnail_HWC: U8, tissue_HW: npt.NDArray[np.bool_], mpp: Mpp) -> Context:
        self.seen.update(shape=thumbnail_HWC.shape, tissue=tissue_HW.mean(), mpp=mpp)
        return {"factor": (0.5, 0.5)}

    def __call__(self, batch: TileBatch, context: Context) -> U8:
        assert context["factor"] == [0.5, 0.5], "through JSON, as in a plan"
        return (batch.pixels_BHWC * context["factor"][0]).astype(np.uint8)

    def background(self, pixels_HWC: U8, context: Context) -> U8:
        return pixels_HWC


def test_a_frozen_slide_is_a_slide_of_the_same_size() -> None:
    truth = section(300, 400)
    slide = freeze_slide(truth, 0.5, FrozenModel(), 3, "one")
    assert (slide.levels[0].size.height, slide.levels[0].size.width, slide.mpp) == (300, 400, (0.5, 0.5))
    whole = Region(0, 0, 300, 400)
    again = freeze_slide(truth, 0.5, FrozenModel(), 3, "one").read_level(0, whole)
    np.testing.assert_array_equal(slide.read_level(0, whole), again)
    assert (slide.read_level(0, whole) != truth).any()


def test_generators_prepare_on_the_whole_slide_and_translate_a_field() -> None:
    slide = freeze_slide(section(1024, 1200), 0.5, FrozenModel(severity=0.3), 0, "one")
    darker = Darker()
    context = prepare_slide(slide, darker)
    mpp_y, mpp_x = darker.seen["mpp"]
    assert darker.seen["shape"][0] * mpp_y == pytest.approx(512, rel=0.02)
    assert darker.seen["shape"][1] * mpp_x == pytest.approx(600, rel=0.02)
    assert 0.4 < darker.seen["tissue"] < 0.95
    region = Region(200, 300, 250, 130)
    made = translate_field(slide, (0.5, 0.5), region, darker, context)
    np.testing.assert_allclose(made, slide.read_level(0, region) * 0.5, atol=1)


def test_stain_transfer_runs_through_the_same_door() -> None:
    slide = freeze_slide(section(512, 512), 0.5, FrozenModel(), 0, "one")
    model = make_generator("stain_transfer", {"tile": 256})
    context = prepare_slide(slide, model)
    json.dumps(context)
    assert translate_field(slide, (0.5, 0.5), Region(0, 0, 256, 256), model, context).shape == (256, 256, 3)


def test_the_truth_itself_is_perfect() -> None:
    truth = section(512, 512)
    rows = closeness(truth, truth)
    assert len(rows) == 4
    stained = rows[-1]
    assert stained.psnr == np.inf and stained.edges_lost == pytest.approx(0.0, abs=1e-6)
    assert stained.ssim == pytest.approx(1.0) and stained.structure_ssim == pytest.approx(1.0)
    assert stained.sharpness == pytest.approx(1.0)
    assert np.isnan(rows[0].structure_ssim), "glass has no structure"


def test_figures_tell_blur_from_colour() -> None:
    truth = section(256, 256, 1)
    truth[:128, :128] = section(256, 256, 2)[128:, 128:]
    blurred = cv2.GaussianBlur(truth, (0, 0), 2.5)
    recoloured = np.clip(truth * np.array([0.7, 0.9, 0.8]) + 20, 0, 255).astype(np.uint8)
    (blur,), (colour,) = closeness(truth, blurred), closeness(truth, recoloured)
    assert blur.sharpness < 0.7 < 0.95 < colour.sharpness
    assert blur.structure_ssim < 0.9 < 0.97 < colour.structure_ssim
    assert colour.psnr_recoloured > colour.psnr + 10
    assert colour.psnr_recoloured > blur.psnr_recoloured
    assert blur.psnr_recoloured == pytest.approx(blur.psnr, abs=1.5)
    assert blur.edges_lost > colour.edges_lost


def test_an_even_picture_has_finite_figures() -> None:
    flat = np.full((256, 256, 3), 200, np.uint8)
    (row,) = closeness(section(256, 256), flat)
    assert np.isfinite(row.psnr_recoloured) and row.psnr_recoloured >= row.psnr - 1e-6


def test_a_field_lies_on_tissue() -> None:
    truth = np.full((900, 1300, 3), 240, np.uint8)
    truth[500:900, 600:1200] = section(400, 600)
    for seed in range(5):
        region = tissue_field(truth, 256, seed)
        assert (region.height, region.width) == (256, 256)
        assert region.bottom <= 900 and region.x + region.width <= 1300
        assert region.y > 400 and region.x > 500
    small = tissue_field(section(100, 180), 512, 0)
    assert (small.y, small.height, small.width) == (0, 100, 100)


def row(**figures: float) -> Closeness:
    names = (
        "psnr",
        "psnr_recoloured",
        "ssim",
        "structure_ssim",
        "shift_p95",
        "edges_lost",
        "edges_added",
        "sharpness",
    )
    return Closeness(**{name: figures.get(name, 1.0) for name in names})


def test_summary_is_paired_and_by_group() -> None:
    better = [row(psnr=20.0 + i + 1.0) for i in range(6)]
    worse = [row(psnr=20.0 + i) for i in range(6)]
    groups = ["a", "a", "b", "b", "c", "c"]
    alone = summarise(better, groups)["psnr"]
    assert alone.value == pytest.approx(23.5) and alone.windows == 6
    assert alone.interval is not None and alone.interval.groups == 3
    assert alone.interval.low < 23.0 < 24.0 < alone.interval.high
    paired = summarise(better, groups, against=worse)["psnr"]
    assert paired.value == pytest.approx(1.0)
    assert paired.interval is not None
    assert paired.interval.low == pytest.approx(1.0) and paired.interval.high == pytest.approx(1.0)


def test_windows_without_structure_do_not_count() -> None:
    rows = [row(structure_ssim=0.5), row(structure_ssim=float("nan")), row(structure_ssim=0.7)]
    found = summarise(rows, ["a", "b", "b"])
    assert found["structure_ssim"].value == pytest.approx(0.6)
    assert (found["structure_ssim"].windows, found["psnr"].windows) == (2, 3)
    assert summarise(rows[:1], ["a"])["psnr"].interval is None
