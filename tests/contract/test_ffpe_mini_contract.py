"""The embedded generator keeps the contract; with a small bundle in the place of the packaged weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import generator_contract as contract
import numpy as np
import pytest

from wsi_pipeline.core.protocols import Context, Generator
from wsi_pipeline.errors import CheckpointError, ConfigError
from wsi_pipeline.generators import ffpe_mini, make_generator
from wsi_pipeline.generators.ffpe_mini import PACKAGED, FfpeMini
from wsi_pipeline.models.bundle import load_facts, save_bundle
from wsi_pipeline.models.fresh import from_scratch
from wsi_pipeline.models.mini import MINI_UNET, MINI_VAE

LARGEST = 10_000_000  # bytes of the packaged file


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def mini_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained weights of the real size, one direction, whole tiles only; not to be changed."""
    weights = from_scratch(
        MINI_UNET,
        MINI_VAE,
        {"a2b": "paraffin section"},
        rank_unet=1,
        rank_vae=1,
        multi_view=False,
        seed=0,
        mpp=0.5,
        tile=512,
        licence="untrained",
    )
    path = tmp_path_factory.mktemp("mini") / "mini.safetensors"
    save_bundle(weights, path)
    return path


class TestFfpeMini(contract.GeneratorContract):  # type: ignore[name-defined,misc]
    @pytest.fixture
    def generator(self, mini_bundle: Path) -> Generator:
        return make_generator(
            "ffpe_mini", {"weights": str(mini_bundle), "tile": 64, "device": "cpu", "batch": 3}
        )

    def test_says_what_it_is(self, generator: Generator, context: Context) -> None:
        spec = generator.spec
        assert (spec.kind, spec.stain, spec.mpp, spec.exact) == ("ffpe_mini", "h&e", (0.5, 0.5), True)
        assert spec.cell is None, "it cuts no tile into cells, so it leaves no lines of them"
        assert "ffpe_mini changes structure" in context["notices"][0]

    def test_is_lora_turbo_with_other_weights(
        self, generator: Generator, context: Context, pixels: np.ndarray, mini_bundle: Path
    ) -> None:
        options = {"weights": str(mini_bundle), "tile": 64, "device": "cpu", "batch": 3}
        big = make_generator("lora_turbo", options)
        batch = contract.batch_of(generator, pixels)
        np.testing.assert_array_equal(generator(batch, context), big(batch, context))
        assert big.spec.digest != generator.spec.digest

    def test_its_weights_fit_into_the_package(self, mini_bundle: Path) -> None:
        assert mini_bundle.stat().st_size <= LARGEST


def test_default_tile_has_a_halo_and_whole_strides(mini_bundle: Path) -> None:
    spec = FfpeMini(weights=mini_bundle, device="cpu").spec
    assert (spec.tile, spec.halo) == (512, 16)
    assert (spec.tile - 2 * spec.halo - spec.overlap) % 64 == 0


def test_errors_name_it(mini_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="generator ffpe_mini: tile=500: must be a multiple of 32"):
        make_generator("ffpe_mini", {"weights": str(mini_bundle), "tile": 500})


def test_an_installation_without_weights_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    away = tmp_path / "ffpe_mini.safetensors"
    monkeypatch.setattr(ffpe_mini, "PACKAGED", away)
    with pytest.raises(
        CheckpointError, match=r"weights of ffpe_mini are missing.*scripts/train_ffpe_mini\.sh"
    ):
        FfpeMini(weights=away)


def test_weights_of_another_name_are_the_users(mini_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no_such"):
        FfpeMini(weights=tmp_path / "no_such.safetensors")
    mine = tmp_path / "mine.safetensors"
    shutil.copy(mini_bundle, mine)
    assert FfpeMini(weights=mine).spec.digest == FfpeMini(weights=mini_bundle).spec.digest


@pytest.mark.skipif(not PACKAGED.is_file(), reason="no weights in the package yet")
def test_the_packaged_weights_are_small_and_say_what_they_are() -> None:
    facts = load_facts(PACKAGED)
    assert os.path.getsize(PACKAGED) <= LARGEST
    assert (facts.directions, facts.mpp, facts.tile) == (("a2b",), 0.5, 512)
    assert facts.vaes == ("vae",)
    assert "simulated" in facts.licence and "MIT" in facts.licence
    assert make_generator("ffpe_mini", {}).spec.kind == "ffpe_mini"
