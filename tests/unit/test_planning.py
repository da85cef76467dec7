"""Working resolution and grid: what a generator asks for, what the user says, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from wsi_pipeline.core.geometry import Mpp, Size
from wsi_pipeline.core.protocols import GeneratorSpec
from wsi_pipeline.errors import ConfigError, GeneratorContractError
from wsi_pipeline.generators import make_generator
from wsi_pipeline.pipeline import planning
from wsi_pipeline.pipeline.settings import ConvertConfig, InputConfig, TilingConfig
from wsi_pipeline.readers.array import ArraySlide
from wsi_pipeline.writers.manifest import environment, manifest, read_manifest, write_manifest

SPEC = GeneratorSpec(
    kind="learned",
    tile=512,
    halo=0,
    align=64,
    mpp=(0.5, 0.5),
    batch=1,
    digest="0" * 64,
    exact=True,
    stain="any",
    overlap=128,
    cell=128,
)
CONTEXT = {
    "weights": "abc",
    "base": "def",
    "direction": "a2b",
    "dtype": "float32",
    "latent": {"kind": "mode"},
}


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Changes nothing, and asks for what a learned generator asks for."""

    spec: GeneratorSpec = SPEC
    context: dict[str, Any] = field(default_factory=CONTEXT.copy)

    def prepare(self, thumbnail_HWC: np.ndarray, tissue_HW: np.ndarray, mpp: Mpp) -> dict[str, Any]:
        return self.context

    def __call__(self, batch: Any, context: Any) -> np.ndarray:
        return np.asarray(batch.pixels_BHWC)

    def background(self, pixels_HWC: np.ndarray, context: Any) -> np.ndarray:
        return pixels_HWC


def planned(
    monkeypatch: pytest.MonkeyPatch,
    *,
    mpp: Mpp = (0.5, 0.5),
    learned: Learned | None = None,
    context: dict[str, Any] | None = None,
    tiling: TilingConfig | None = None,
    **spec: Any,
) -> Any:
    """The plan of a blank slide of about 700 x 900 µm."""
    generator = learned or Learned(spec=replace(SPEC, **spec), context=context or CONTEXT)
    monkeypatch.setattr(planning, "make_generator", lambda *_: generator)
    pixels = np.full((int(700 / mpp[0]), int(900 / mpp[1]), 3), 200, np.uint8)
    config = ConvertConfig(input=InputConfig(mask="whole", stain="any"), tiling=tiling or TilingConfig())
    return planning.survey(ArraySlide(pixels, mpp=mpp), config).plan


@pytest.mark.parametrize(
    ("own", "made_for", "working"),
    [
        ((0.499, 0.499), (0.5, 0.5), (0.499, 0.499)),
        ((0.2527, 0.2525), (0.5, 0.5), (0.5054, 0.505)),
        ((0.13, 0.13), (0.5, 0.5), (0.52, 0.52)),
        ((0.54, 0.54), (0.5, 0.5), (0.54, 0.54)),
        ((0.36, 0.36), (0.5, 0.5), (0.5, 0.5)),
        ((0.22, 0.22), (0.5, 0.5), (0.5, 0.5)),  # 0.44 is 12 % off
        ((0.25, 0.5), (0.5, 0.5), (0.5, 0.5)),
        ((1.0, 1.0), (0.5, 0.5), (0.5, 0.5)),
        ((0.7, 0.7), None, (0.7, 0.7)),
    ],
)
def test_the_slides_own_pixels_are_used_where_they_are_near_enough(
    monkeypatch: pytest.MonkeyPatch, own: Mpp, made_for: Mpp | None, working: Mpp
) -> None:
    learned = Learned(spec=replace(SPEC, mpp=made_for))
    assert planned(monkeypatch, mpp=own, learned=learned).mpp == pytest.approx(working)


def test_the_users_resolution_is_taken_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned(monkeypatch, mpp=(0.499, 0.499), tiling=TilingConfig(mpp=0.5)).mpp == (0.5, 0.5)


def test_a_slide_that_is_too_coarse_is_refused_with_the_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"2 µm.*learned, made for 0\.5.*4 times.*--set tiling\.mpp=2 "
    ) as caught:
        planned(monkeypatch, mpp=(2.0, 2.0))
    assert "\n" not in str(caught.value)
    assert planned(monkeypatch, mpp=(2.0, 2.0), tiling=TilingConfig(mpp=2.0)).mpp == (2.0, 2.0)
    assert planned(monkeypatch, mpp=(2.0, 2.0), tiling=TilingConfig(mpp=0.5)).mpp == (0.5, 0.5)


def test_the_overlap_is_the_generators_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert planned(monkeypatch).grid.overlap == 128
    assert planned(monkeypatch, tiling=TilingConfig(overlap=64)).grid.overlap == 64
    assert planned(monkeypatch, halo=32, overlap=0).grid.stride == 448


@pytest.mark.parametrize(
    ("overlap", "spec", "message"),
    [
        (100, {}, r"tiling\.overlap: 100 leaves a stride of 412 px.*multiple of 64.*fit: 64 and 128$"),
        (600, {}, "fit: 384 and 448$"),
        (-10, {}, "overlap of 0 or more.*fit: 0 and 64$"),
        (448, {"halo": 16}, "halo 16.*fit: 352 and 416$"),
        (64, {"halo": 16}, "fit: 32 and 96$"),
        (None, {"overlap": 30}, "tiling.overlap: 30.*fit: 0 and 64$"),
        (9, {"tile": 64}, "fit: 0$"),
        (0, {"halo": 240}, "halo of 240 px leaves 32 px of a tile of 512.*at least 64"),
        (0, {"halo": 300}, "leaves -88 px of a tile of 512"),
    ],
)
def test_an_overlap_that_does_not_fit_names_those_that_do(
    monkeypatch: pytest.MonkeyPatch, overlap: int | None, spec: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(monkeypatch, tiling=TilingConfig(overlap=overlap), **spec)


def test_every_slide_and_seed_has_its_own_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(monkeypatch)
    assert plan.noise_key == replace(plan, slide_id="renamed").noise_key
    others = [replace(plan, identity="other"), replace(plan, seed=1)]
    assert len({plan.noise_key, *(other.noise_key for other in others)}) == 3


def test_the_fingerprint_knows_the_context_and_the_grid_but_no_wishes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = planned(monkeypatch)
    same = [replace(SPEC, batch=7), replace(SPEC, overlap=64), replace(SPEC, cell=None)]
    assert {replace(plan, generator=spec).fingerprint for spec in same} == {plan.fingerprint}
    assert planned(monkeypatch, context=CONTEXT | {"dtype": "bfloat16"}).fingerprint != plan.fingerprint
    assert planned(monkeypatch, tiling=TilingConfig(overlap=64)).fingerprint != plan.fingerprint
    assert planned(monkeypatch, digest="1" * 64).fingerprint != plan.fingerprint


def test_the_manifest_holds_what_the_generator_prepared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    plan = planned(monkeypatch)
    document = manifest(plan, {}, {}, {})
    write_manifest(tmp_path / "manifest.json", document)
    assert read_manifest(tmp_path / "manifest.json") == document
    made_by = {"kind": "learned", "digest": "0" * 64, "exact": True, "mpp": [0.5, 0.5], "cell": 128}
    assert document["generator"] == made_by | {"context": CONTEXT}
    assert document["plan"]["overlap"] == 128
    assert document["fingerprint"] == plan.fingerprint
    assert {"torch", "diffusers", "safetensors", "numpy"} <= set(environment())


def test_a_context_is_json_or_the_generator_is_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned(monkeypatch, context={"sides": (1, 2)}).context == {"sides": [1, 2]}
    for wrong in ({"dtype": object()}, {"mean": float("nan")}):
        with pytest.raises(GeneratorContractError, match="learned: prepared a context that is no JSON"):
            planned(monkeypatch, context=wrong)


@pytest.mark.parametrize("name", ["identity", "stain_transfer"])
def test_pointwise_generators_ask_for_an_overlap_that_fits_their_tile(name: str) -> None:
    for tile, overlap in ((1088, 64), (128, 64), (48, 24), (1, 0)):
        assert make_generator(name, {"tile": tile}).spec.overlap == overlap


def test_sizes_follow_the_working_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned(monkeypatch, mpp=(0.25, 0.25)).grid.size == Size(1400, 1800)
