"""The one-step LoRA generator keeps the contract, and on a CPU its tiles are exact to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import generator_contract as contract
import numpy as np
import pytest
import torch

from wsi_pipeline.core.geometry import Region, TileIndex
from wsi_pipeline.core.protocols import Generator, Tile, TileBatch
from wsi_pipeline.errors import CheckpointError, ConfigError, GeneratorError
from wsi_pipeline.generators import _torch, make_generator
from wsi_pipeline.generators import lora_turbo as module
from wsi_pipeline.generators.lora_turbo import LoraTurbo
from wsi_pipeline.models.bundle import load_facts, save_bundle
from wsi_pipeline.models.layout import DIRECTIONS
from wsi_pipeline.models.random_weights import random_weights
from wsi_pipeline.models.weights import tensors_digest

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS = {
    "float32": {"latent": "mode", "dtype": "float32", "device": "cpu"},
    "sample": {"latent": "sample", "dtype": "float32", "device": "cpu"},
    "auto": {"latent": "sample", "dtype": "auto", "device": "cpu"},
}
if torch.cuda.is_available():
    VARIANTS["cuda"] = {"latent": "sample", "dtype": "auto", "device": "cuda"}


def made(bundle: Path, **options: Any) -> LoraTurbo:
    generator = make_generator("lora_turbo", {"weights": str(bundle), "tile": 64, "device": "cpu", **options})
    assert isinstance(generator, LoraTurbo)
    return generator


def batch_at(pixels_BHWC: np.ndarray, xs: list[int], key: int = 7) -> TileBatch:
    """Tiles of any place on the slide."""
    side = pixels_BHWC.shape[1]
    regions = [Region(128, x, side, side) for x in xs]
    tiles = tuple(Tile(index=TileIndex(0, i), read=r, write=r) for i, r in enumerate(regions))
    return TileBatch(tiles=tiles, pixels_BHWC=pixels_BHWC, noise_key=key)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    options: dict[str, Any] = VARIANTS[request.param]
    return options


class TestLoraTurbo(contract.GeneratorContract):  # type: ignore[name-defined,misc]
    @pytest.fixture
    def generator(self, tiny_bundle: Path, variant: dict[str, Any]) -> Generator:
        return made(tiny_bundle, batch=3, **variant)

    def test_says_what_it_promises(self, generator: Generator, variant: dict[str, Any]) -> None:
        spec = generator.spec
        assert spec.exact == (variant["device"] == "cpu")
        assert (spec.kind, spec.tile, spec.cell, spec.mpp, spec.align) == (
            "lora_turbo",
            64,
            16,
            (0.5, 0.5),
            64,
        )

    def test_context_names_what_made_the_pixels(
        self, generator: Generator, context: dict[str, Any], tiny_bundle: Path, variant: dict[str, Any]
    ) -> None:
        facts = load_facts(tiny_bundle)
        assert (context["weights"], context["base"]) == (facts.identity, facts.base_digest)
        named = ("a2b", facts.prompts["a2b"], variant["latent"], variant["device"])
        assert (context["direction"], context["prompt"], context["latent"], context["device"]) == named
        assert context["dtype"] in ("float32", "bfloat16", "float16")


# Exactness on a CPU


@pytest.fixture(scope="module")
def eight() -> np.ndarray:
    pixels: np.ndarray = contract.stained(64, 8, seed=5)
    return pixels


@pytest.mark.parametrize(
    ("latent", "dtype", "threads"),
    [
        ("mode", "float32", 1),
        ("sample", "float32", 1),
        ("sample", "bfloat16", 1),
        pytest.param("sample", "float32", 2, marks=pytest.mark.slow),
        pytest.param("sample", "bfloat16", 2, marks=pytest.mark.slow),
    ],
)
def test_a_tile_has_the_same_bits_in_any_batch_and_order(
    tiny_bundle: Path, eight: np.ndarray, latent: str, dtype: str, threads: int
) -> None:
    torch.set_num_threads(threads)
    generator = made(tiny_bundle, latent=latent, dtype=dtype)
    xs = [64 * i for i in range(8)]
    whole = generator(batch_at(eight, xs), {})
    assert len({tile.tobytes() for tile in whole}) == 8
    for i in (0, 5, 7):
        np.testing.assert_array_equal(generator(batch_at(eight[i : i + 1], [xs[i]]), {})[0], whole[i])
    for picked in ([1, 6, 4], [4, 1, 6], [6, 4, 1]):
        some = generator(batch_at(eight[picked], [xs[i] for i in picked]), {})
        np.testing.assert_array_equal(some, whole[picked])


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_tile_has_the_same_bits_on_any_number_of_cores(
    tiny_bundle: Path, eight: np.ndarray, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single process has all cores, each of several workers one: their bytes must not differ."""
    batch = batch_at(eight, [64 * i for i in range(8)])
    found = []
    for cores in (1, 2, 5):
        monkeypatch.setattr(_torch, "CORES", cores)
        torch.set_num_threads(cores)
        forget()
        generator = made(tiny_bundle, dtype=dtype)
        assert generator.spec.batch == cores
        found.append(generator(batch, {}))
    forget()
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def forget() -> None:
    """Empty what a process remembers: batch sizes, networks, runners."""
    for remembered in (_torch.batch_for, module._network, module._runner):
        remembered.cache_clear()


def test_tiles_that_overlap_see_the_same_noise(tiny_bundle: Path) -> None:
    generator = made(tiny_bundle, latent="sample", tile=128)
    pixels = contract.stained(128, 3)
    noise = generator._noise(batch_at(pixels, [-64, 0, 64]))
    assert noise is not None and noise.shape == (3, 4, 16, 16)
    np.testing.assert_array_equal(noise[0][:, :, 8:], noise[1][:, :, :8])
    np.testing.assert_array_equal(noise[1][:, :, 8:], noise[2][:, :, :8])
    assert abs(noise.std() - 1) < 0.1
    other = generator._noise(batch_at(pixels, [-64, 0, 64], key=8))
    assert other is not None and not np.isclose(noise, other).any()
    assert made(tiny_bundle, latent="mode")._noise(batch_at(pixels, [0])) is None


def test_a_sample_is_another_image_than_the_mode(tiny_bundle: Path, eight: np.ndarray) -> None:
    one, other, moved = (
        made(tiny_bundle, latent=latent, dtype="float32")(batch_at(eight[:1], [x]), {})
        for latent, x in (("mode", 0), ("sample", 0), ("sample", 64))
    )
    assert len({pixels.tobytes() for pixels in (one, other, moved)}) == 3


# Options


def test_options_that_decide_pixels_are_in_the_digest(tiny_bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_bundle(random_weights(seed=1), other)
    base: dict[str, Any] = {"dtype": "float32"}
    changes: list[dict[str, Any]] = [
        {"direction": "b2a"},
        {"prompt": load_facts(tiny_bundle).prompts["b2a"]},
        {"latent": "sample"},
        {"gamma": 0.5},
        {"rounding": "truncate"},
        {"dtype": "bfloat16"},
        {"unet_dtype": "bfloat16"},
        {"tile": 128},
        {"weights": str(other)},
    ]
    digests = [made(tiny_bundle, **base | change).spec.digest for change in ({}, *changes)]
    assert len(set(digests)) == len(digests)
    same = [made(tiny_bundle, **base | change).spec.digest for change in ({"batch": 5}, {"max_vram": 2.0})]
    copy = tmp_path / "copy.safetensors"
    shutil.copy(tiny_bundle, copy)
    assert {*same, made(copy, **base).spec.digest} == {digests[0]}


@pytest.mark.slow
def test_options_reach_the_pixels(tiny_bundle: Path, eight: np.ndarray) -> None:
    def image(**options: Any) -> bytes:
        return made(tiny_bundle, dtype="float32", **options)(batch_at(eight[:1], [0]), {}).tobytes()

    caption = load_facts(tiny_bundle).prompts["b2a"]
    # Skips begin at 1e-5 with random adapters: only a strong gamma shows.
    found = {
        image(**options)
        for options in (
            {},
            {"direction": "b2a"},
            {"prompt": caption},
            {"gamma": 10.0},
            {"rounding": "truncate"},
        )
    }
    assert len(found) == 5
    assert image(prompt=load_facts(tiny_bundle).prompts["a2b"]) == image()


def test_truncation_is_half_a_level_darker(tiny_bundle: Path, eight: np.ndarray) -> None:
    batch = batch_at(eight, [64 * i for i in range(8)])
    rounded, truncated = (
        made(tiny_bundle, dtype="float32", rounding=rounding)(batch, {}).astype(int)
        for rounding in ("round", "truncate")
    )
    assert set(np.unique(rounded - truncated)) == {0, 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 500}, "tile=500: must be a multiple of 32; give 480 or 512"),
        ({"tile": 0}, "tile=0: must be a multiple of 32"),
        ({"tile": -64}, "tile=-64: must be a multiple of 32"),
        ({"halo": 12}, "halo=12: must be a multiple of 8 below 32"),
        ({"halo": 32}, "halo=32: must be a multiple of 8 below 32"),
        ({"halo": -8}, "halo=-8"),
        ({"gamma": -1.0}, "gamma=-1.0: must be between 0 and 10"),
        ({"gamma": float("nan")}, "gamma=nan"),
        ({"batch": 0}, "batch=0: must be above 0"),
        ({"max_vram": 0.0}, "max_vram=0.0: must be above 0"),
        ({"mpp": -0.5}, "mpp=-0.5: must be above 0"),
        ({"mpp": float("nan")}, "mpp=nan"),
        ({"mpp": float("inf")}, "mpp=inf"),
        ({"prompt": "a cat"}, "holds no embedding of 'a cat', only of 'random a2b', 'random b2a'"),
        ({"direction": "c2d"}, "direction='c2d'"),
        ({"latent": "mean"}, "latent='mean'"),
        ({"dtype": "float16"}, "float16.*slow on a CPU"),
        ({"unet_dtype": "float16"}, "float16.*slow on a CPU"),
        ({"device": "tpu"}, "device 'tpu': is not supported"),
    ],
)
def test_options_that_cannot_work(tiny_bundle: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        made(tiny_bundle, **options)
    assert "\n" not in str(caught.value)


def test_a_direction_that_the_weights_lack(tmp_path: Path) -> None:
    weights, bundle = random_weights(), tmp_path / "one.safetensors"
    layout = replace(weights.layout, vaes=("vae", "vae_patch"))
    save_bundle(replace(weights, layout=layout, prompts={"a2b": weights.prompts["a2b"]}), bundle)
    with pytest.raises(ConfigError, match=r"one\.safetensors: has no direction b2a; give a2b"):
        made(bundle, direction="b2a")
    assert made(bundle).spec.cell == 16


def test_weights_of_a_single_view_have_no_cells(tmp_path: Path, eight: np.ndarray) -> None:
    bundle = tmp_path / "single.safetensors"
    save_bundle(random_weights(multi_view=False), bundle)
    generator = made(bundle, dtype="float32")
    assert generator.spec.cell is None
    assert generator(batch_at(eight[:1], [0]), {}).shape == (1, 64, 64, 3)


def test_weights_are_required_and_must_be_a_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weights is required"):
        make_generator("lora_turbo", {})
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(tiny_bundle.read_bytes()[:-1000])
    for path, message in ((cut, "truncated"), (tmp_path / "absent.safetensors", "cannot be read")):
        with pytest.raises(CheckpointError, match=rf"{path.name}: .*{message}"):
            made(path)


def test_weights_that_change_or_vanish_during_a_run(
    tiny_bundle: Path, tmp_path: Path, eight: np.ndarray
) -> None:
    bundle = tmp_path / "moving.safetensors"
    shutil.copy(tiny_bundle, bundle)
    generator, batch = made(bundle), batch_at(eight[:1], [0])
    save_bundle(random_weights(seed=1), bundle, overwrite=True)
    with pytest.raises(CheckpointError, match=r"moving\.safetensors: changed since the run began"):
        generator(batch, {})
    bundle.unlink()
    with pytest.raises(CheckpointError, match=r"moving\.safetensors: cannot be read"):
        generator(batch, {})


# Grid and glass


@pytest.mark.parametrize(
    ("tile", "halo"), [(64, 0), (96, 16), (128, 0), (256, 0), (512, 0), (512, 16), (512, 32)]
)
def test_every_stride_keeps_the_phase_of_the_unet(tiny_bundle: Path, tile: int, halo: int) -> None:
    spec = made(tiny_bundle, tile=tile, halo=halo).spec
    stride = spec.tile - 2 * spec.halo - spec.overlap
    assert stride % 64 == 0
    assert 0 <= spec.overlap <= stride or tile == 128


def test_the_published_tile_has_the_grid_that_measured_best(tiny_bundle: Path) -> None:
    """Stride 384, halo 16: tests/benchmarks/lora_turbo_seams.md."""
    spec = make_generator("lora_turbo", {"weights": str(tiny_bundle), "device": "cpu"}).spec
    assert (spec.tile, spec.halo, spec.overlap, spec.cell) == (512, 16, 96, 128)


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[np.ndarray]]:
    """What the network makes of any tile: the test appends it."""
    colours: list[np.ndarray] = []

    def runner(*_: Any) -> Any:
        return lambda pixels, extra=None: np.broadcast_to(colours[-1], pixels.shape).astype(np.uint8)

    monkeypatch.setattr(module, "_runner", runner)
    yield colours


def test_glass_is_scaled_as_the_network_scales_it(tiny_bundle: Path, painted: list[np.ndarray]) -> None:
    painted.append(np.array([230, 220, 241]))
    generator, thumbnail = made(tiny_bundle), np.full((40, 40, 3), 235, np.uint8)
    tissue = np.zeros((40, 40), bool)
    tissue[10:20] = True
    thumbnail[tissue] = (150, 60, 120)
    context = generator.prepare(thumbnail, tissue, (8.0, 8.0))
    assert context["glass"]["source"] == [235, 235, 235]
    ramp = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, axis=2)
    made_of_ramp = generator.background(ramp, context)
    assert made_of_ramp[235, 0].tolist() == [230, 220, 241]
    assert made_of_ramp[0, 0].tolist() == [0, 0, 0]
    assert (np.diff(made_of_ramp[:, 0].astype(int), axis=0) >= 0).all()


@pytest.mark.parametrize(
    ("case", "reason"),
    [("all tissue", "no pixel outside"), ("dark", "not bright"), ("dark output", "does not make bright")],
)
def test_glass_that_cannot_be_measured_is_left_alone(
    tiny_bundle: Path, painted: list[np.ndarray], case: str, reason: str
) -> None:
    painted.append(np.array([90, 90, 90]))
    thumbnail = np.full((40, 40, 3), 60 if case == "dark" else 235, np.uint8)
    tissue = np.full((40, 40), case == "all tissue")
    generator = made(tiny_bundle)
    context = generator.prepare(thumbnail, tissue, (8.0, 8.0))
    assert reason in context["glass"]["reason"]
    np.testing.assert_array_equal(generator.background(thumbnail, context), thumbnail)


@pytest.mark.parametrize("context", [{}, {"glass": None}, {"glass": {"ratio": ["a", "b", "c"]}}])
def test_a_foreign_context_is_refused(tiny_bundle: Path, context: dict[str, Any]) -> None:
    with pytest.raises(GeneratorError, match="run prepare again"):
        made(tiny_bundle).background(np.zeros((2, 2, 3), np.uint8), context)


def test_both_directions_run_from_one_bundle(tiny_bundle: Path, eight: np.ndarray) -> None:
    results = [made(tiny_bundle, direction=d)(batch_at(eight[:1], [0]), {}) for d in DIRECTIONS]
    assert not np.array_equal(*results)


def test_values_that_are_not_numbers_are_no_pixels(tmp_path: Path, eight: np.ndarray) -> None:
    weights, bundle = random_weights(), tmp_path / "nan.safetensors"
    tensors = dict(weights.tensors)
    tensors["unet.conv_out.bias"] = torch.full((4,), torch.nan)
    save_bundle(replace(weights, tensors=tensors, digest=tensors_digest(tensors)), bundle)
    with pytest.raises(GeneratorError, match="not numbers; .*dtype=float32"):
        made(bundle)(batch_at(eight[:1], [0]), {})


def test_a_bundle_with_one_wrong_byte_is_refused(
    tiny_bundle: Path, tmp_path: Path, eight: np.ndarray
) -> None:
    bundle = tmp_path / "flipped.safetensors"
    content = bytearray(tiny_bundle.read_bytes())
    content[len(content) // 2] ^= 1
    bundle.write_bytes(content)
    with pytest.raises(CheckpointError, match="flipped.safetensors: is damaged, .*copy it again"):
        made(bundle)(batch_at(eight[:1], [0]), {})
