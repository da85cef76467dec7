"""The generator against the published program: every case, every intermediate tensor, every fixture set."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from wsi_pipeline.core.geometry import Region, TileIndex
from wsi_pipeline.core.protocols import Tile, TileBatch
from wsi_pipeline.generators import lora_turbo as generator_module
from wsi_pipeline.generators._torch import from_uint8, to_uint8
from wsi_pipeline.generators.lora_turbo import LoraTurbo
from wsi_pipeline.models.assemble import assemble, with_adapters
from wsi_pipeline.models.bundle import save_bundle
from wsi_pipeline.models.hub import load_base
from wsi_pipeline.models.layout import DIRECTIONS, VAES, Direction
from wsi_pipeline.models.lora_turbo import Translator, one_step
from wsi_pipeline.models.prompts import PROMPTS, embed_prompts, token_ids
from wsi_pipeline.models.published import import_checkpoint
from wsi_pipeline.models.weights import TurboWeights

LIMITS = {"x0": 1e-3, "y": 1e-4, "y_unclamped": 1e-4}
"""Largest absolute difference; 5e-5 for every other quantity."""

pytestmark = pytest.mark.usefixtures("one_thread")

ONE_LEVEL_OFF = 1e-3
"""Share of uint8 values that may be one level off."""


@dataclass(frozen=True)
class Fixture:
    """A fixture set: its weights, imported by the code that users run, and its recorded arrays."""

    weights: TurboWeights
    recorded: Mapping[str, np.ndarray]

    @property
    def x(self) -> Tensor:
        return torch.from_numpy(self.recorded["x"])

    @property
    def views(self) -> Iterator[tuple[str, Direction]]:
        """Encoder and direction of the recorded cases."""
        begins = {tuple(name.split(".")[:2]) for name in self.recorded if name.count(".") >= 2}
        known = [(encoder, direction) for encoder in ("multi", "single") for direction in DIRECTIONS]
        assert begins & set(known), "no case was recorded"
        yield from (view for view in known if view in begins)

    def seen_by(self, encoder: str) -> TurboWeights:
        """The weights, for ``single`` without the local encoders."""
        if encoder == "multi":
            return self.weights
        layout = self.weights.layout
        whole = tuple(vae for vae, _ in VAES.values() if vae in layout.vaes)
        return replace(self.weights, layout=replace(layout, vaes=whole))

    def noises(self, encoder: str, direction: str) -> dict[str, Tensor | None]:
        """Recorded cases of an encoder and a direction -> noise of the posterior."""
        prefix = f"{encoder}.{direction}."
        cases = {name.split(".")[2] for name in self.recorded if name.startswith(prefix)}
        noises = {"mode": None} if "mode" in cases else {}
        return noises | ({"noise": torch.from_numpy(self.recorded["noise"])} if "noise" in cases else {})


@functools.cache
def _loaded(folder: Path) -> Fixture:
    base = load_base(folder / "tiny-base")
    found = import_checkpoint(folder / "model.pkl", base)
    captions = list(PROMPTS.items())
    embedded = embed_prompts(folder / "tiny-base", [text for _, text in captions])
    weights = TurboWeights(
        layout=found.layout,
        tensors=found.tensors,
        unet_scale=found.unet_scale,
        vae_scale=found.vae_scale,
        prompts={direction: p for (direction, _), p in zip(captions, embedded, strict=True)},
        base_name=base.name,
        base_digest=base.digest,
        source=found.source,
        licence="",
        mpp=0.5,
        tile=512,
        digest="0" * 64,
    )
    with np.load(folder / "generator_cases.npz") as recorded:
        return Fixture(weights=weights, recorded=dict(recorded))


@pytest.fixture
def fixture(parity_set: Path) -> Fixture:
    if missing := [n for n in ("generator_cases.npz", "model.pkl") if not (parity_set / n).is_file()]:
        pytest.skip(f"{parity_set.name} has no {', '.join(missing)}")
    return _loaded(parity_set)


def computed(net: Translator, x: Tensor, noises: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Every quantity by its recorded name behind ``<encoder>.<direction>.``."""
    with torch.inference_mode():
        features = net.encode(x)
        posterior = net.posterior(features.h)
        made = {"h": features.h, "mean": posterior.mean, "logvar": posterior.logvar}
        made |= {f"skip{k}": skip for k, skip in enumerate(features.skips, start=1)}
        for case, noise in noises.items():
            z = net.latent(posterior, noise)
            eps = net.denoise(z)
            x0 = one_step(z, eps)
            y = net(x, noise)
            steps = {"z": z, "eps": eps, "x0": x0, "y": y, "y_uint8": to_uint8(y, "truncate")}
            steps["y_unclamped"] = net.decode(x0, features.skips)
            made |= {f"{case}.{name}": tensor for name, tensor in steps.items()}
    return made


@functools.cache
def everything(folder: Path, how: str) -> dict[str, Tensor]:
    """What the networks of a set, merged or with live adapters, make of its inputs, by recorded names."""
    fixture, made = _loaded(folder), {}
    for encoder in ("multi", "single"):
        directions = [direction for seen, direction in fixture.views if seen == encoder]
        weights = fixture.seen_by(encoder)
        if how == "merged":
            nets = {direction: assemble(weights, direction) for direction in directions}
        else:
            nets = with_adapters(weights, directions)
        for direction in directions:
            quantities = computed(
                nets[direction].eval(), fixture.x, fixture.noises(encoder, direction)
            ).items()
            made |= {f"{encoder}.{direction}.{name}": tensor for name, tensor in quantities}
    return made


def off_by(found: np.ndarray, wanted: np.ndarray) -> tuple[int, float]:
    """Largest difference in grey levels, and the share of values that differ."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype == np.uint8
    difference = np.abs(found.astype(int) - wanted)
    return int(difference.max()), float((difference > 0).mean())


def test_parity_inputs_are_normalised_alike(fixture: Fixture) -> None:
    x = from_uint8(torch.from_numpy(fixture.recorded["x_uint8"]))
    torch.testing.assert_close(x, fixture.x, rtol=0, atol=1e-6)


def test_parity_token_ids_and_embeddings(fixture: Fixture, parity_set: Path) -> None:
    recorded = {name for name in fixture.recorded if name.startswith(("token_ids_", "text_emb_"))}
    for direction, text in PROMPTS.items():
        if not {f"token_ids_{direction}", f"text_emb_{direction}"} <= recorded:
            continue
        ids = token_ids(parity_set / "tiny-base", [text])[0]
        np.testing.assert_array_equal(ids.numpy(), fixture.recorded[f"token_ids_{direction}"])
        prompt = fixture.weights.prompts[direction]
        wanted = fixture.recorded[f"text_emb_{direction}"]  # once, or for each sample
        assert (prompt.text, tuple(prompt.embedding.shape)) == (text, (1, *wanted.shape[1:]))
        difference = np.abs(prompt.embedding.numpy() - wanted).max()
        assert difference <= 5e-5


def test_parity_noise_can_be_replayed_from_its_seed(fixture: Fixture) -> None:
    if "noise_seed" not in fixture.recorded:
        pytest.skip("no seed was recorded")
    noise = fixture.recorded["noise"]
    generator = torch.Generator().manual_seed(int(fixture.recorded["noise_seed"]))
    np.testing.assert_array_equal(torch.randn(noise.shape, generator=generator).numpy(), noise)


@pytest.mark.parametrize("how", ["merged", pytest.param("unmerged", marks=pytest.mark.slow)])
def test_parity_of_every_quantity(fixture: Fixture, parity_set: Path, how: str) -> None:
    checked, wrong = 0, []
    for name, tensor in everything(parity_set, how).items():
        wanted, quantity = fixture.recorded.get(name), name.rpartition(".")[2]
        if wanted is None:
            continue
        checked += 1
        if quantity == "y_uint8":
            most, share = off_by(tensor.numpy(), wanted)
            fits, said = most <= 1 and share < ONE_LEVEL_OFF, f"{most} levels on {share:.2%}"
        else:
            assert tensor.shape == wanted.shape, name
            difference = np.abs(tensor.numpy().astype(np.float64) - wanted).max()
            fits, said = difference <= LIMITS.get(quantity, 5e-5), f"{difference:.2g}"  # NaN does not fit
        if not fits:
            wrong.append(f"{name}: off by {said}")
    assert not wrong
    assert checked, "nothing was compared"


def test_parity_merged_equals_unmerged(fixture: Fixture, parity_set: Path) -> None:
    merged, unmerged = (everything(parity_set, how) for how in ("merged", "unmerged"))
    assert merged.keys() == unmerged.keys()
    for name in merged:
        if not name.endswith("y_uint8"):
            limit = LIMITS.get(name.rpartition(".")[2], 1e-4)
            torch.testing.assert_close(
                merged[name], unmerged[name], rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}"
            )


def tiles(pixels_BHWC: np.ndarray) -> TileBatch:
    """The recorded images side by side on a slide."""
    side = pixels_BHWC.shape[1]
    regions = [Region(0, i * side, side, side) for i in range(len(pixels_BHWC))]
    return TileBatch(
        tiles=tuple(Tile(index=TileIndex(0, i), read=r, write=r) for i, r in enumerate(regions)),
        pixels_BHWC=pixels_BHWC,
        noise_key=0,
    )


def test_parity_of_the_generator_that_users_run(
    fixture: Fixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = fixture.recorded["x_uint8"]
    side, width = pixels.shape[1:3]
    if side != width:
        pytest.skip("tiles of a slide are square")

    def recorded_noise(cells: Region, *, key: int, channels: int) -> np.ndarray:
        noise: np.ndarray = fixture.recorded["noise"][cells.x // (side // 8)]
        assert noise.shape == (channels, cells.height, cells.width)
        return noise

    monkeypatch.setattr(generator_module, "lattice_normal", recorded_noise)
    for encoder in sorted({encoder for encoder, _ in fixture.views}):
        bundle = tmp_path / f"{encoder}.safetensors"
        save_bundle(fixture.seen_by(encoder), bundle)
        for _, direction in (view for view in fixture.views if view[0] == encoder):
            for case in fixture.noises(encoder, direction):
                options: dict[str, Any] = {"latent": "sample"} if case == "noise" else {}
                generator = LoraTurbo(
                    weights=bundle,
                    direction=direction,
                    device="cpu",
                    dtype="float32",
                    rounding="truncate",
                    tile=side,
                    **options,
                )
                wanted = fixture.recorded[f"{encoder}.{direction}.{case}.y_uint8"]
                most, share = off_by(generator(tiles(pixels), {}), wanted)
                assert most <= 1 and share < ONE_LEVEL_OFF, (encoder, direction, case, most, share)
