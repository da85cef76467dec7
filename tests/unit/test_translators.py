"""Every other translator through one trainer, one weights file and one generator."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_translators import SIDE, SYSTEMS, TINY, bundle

from wsi_pipeline.config import load_settings
from wsi_pipeline.core.geometry import Region, TileIndex
from wsi_pipeline.core.protocols import Tile, TileBatch
from wsi_pipeline.errors import CheckpointError, ConfigError
from wsi_pipeline.generators import make_generator
from wsi_pipeline.training.config import TrainConfig
from wsi_pipeline.training.run import train
from wsi_pipeline.translators.bundle import (
    KEY,
    TranslatorSpec,
    build_translator,
    is_translator,
    load_translator,
    save_translator,
)
from wsi_pipeline.translators.settings import ConditionConfig, DiffusionConfig, PathConfig

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def tiles(*places: tuple[int, int]) -> TileBatch:
    """Tiles of one slide that all show the same pixels."""
    pixels_HWC = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3)).astype(np.uint8)
    made = [
        Tile(index=TileIndex(i, 0), read=Region(y, x, SIDE, SIDE), write=Region(y, x, SIDE, SIDE))
        for i, (y, x) in enumerate(places)
    ]
    return TileBatch(tiles=tuple(made), pixels_BHWC=np.stack([pixels_HWC] * len(places)), noise_key=7)


@pytest.mark.parametrize("system", [*SYSTEMS, "pix2pix"])
def test_a_tile_does_not_depend_on_its_batch(system: str, tmp_path: Path) -> None:
    weights = bundle(tmp_path, system)
    one, four = (
        make_generator("translator", {"weights": weights, "batch": batch, "halo": 0}) for batch in (1, 4)
    )
    places = [(0, 0), (64, 32), (0, 0)]
    together = four(tiles(*places), {})
    alone = np.concatenate([one(tiles(place), {}) for place in places])
    assert np.array_equal(together, alone)
    assert np.array_equal(together[0], together[2])
    drawn = system in SYSTEMS  # noise belongs to the place
    assert np.array_equal(together[0], together[1]) == (not drawn)


def test_runs_differ_and_stops_lead_from_source_to_result(tmp_path: Path) -> None:
    options = {"weights": bundle(tmp_path, "i2sb"), "halo": 0}
    batch = tiles((0, 0))
    result, other, start, last = (
        make_generator("translator", options | more)(batch, {})
        for more in ({}, {"run": 1}, {"stop_after": 0}, {"stop_after": 3})
    )
    assert not np.array_equal(result, other)
    assert np.array_equal(start, batch.pixels_BHWC)
    assert np.array_equal(last, result)


def test_what_sees_no_slide_is_refused_for_slides(tmp_path: Path) -> None:
    spec = TranslatorSpec(
        network=TINY,
        diffusion=DiffusionConfig(path=PathConfig(kind="vp"), condition=ConditionConfig(classes=2)),
        classes=("a", "b"),
        tile=SIDE,
    )
    path = tmp_path / "labels.safetensors"
    save_translator(spec, build_translator(spec, None).state_dict(), path)
    with pytest.raises(ConfigError, match="sees no source image.*wsi-pipeline sample"):
        make_generator("translator", {"weights": path})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tile": 33}, "must be a multiple of 2"),
        ({"halo": 16}, "leave nothing to write"),
        ({"stop_after": 9}, "give 0 to 3"),
        ({"label": 1}, "label=1: choose from none"),
    ],
)
def test_options_that_cannot_work_are_named(options: dict[str, int], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        make_generator("translator", {"weights": bundle(tmp_path, "i2sb"), **options})


def test_a_weights_file_is_whole_or_refused(tmp_path: Path, tiny_bundle: Path) -> None:
    path = bundle(tmp_path, "cwdm")
    facts, tensors = load_translator(path)
    assert facts.spec.diffusion == SYSTEMS["cwdm"]
    assert is_translator(path) and not is_translator(tiny_bundle) and not is_translator(tmp_path / "none")
    with pytest.raises(CheckpointError, match="no translator, but weights of lora_turbo"):
        load_translator(tiny_bundle)
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    with pytest.raises(CheckpointError, match="is damaged, its tensors"):
        load_translator(path)
    with pytest.raises(CheckpointError, match="do not fit the network"):
        build_translator(replace(facts.spec, network=replace(TINY, base=16)), tensors)


def edited(path: Path, change: dict[str, object]) -> Path:
    """A copy of a weights file with other metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    document = json.loads(metadata[KEY])
    document["spec"] |= change
    out = path.with_name("edited.safetensors")
    save_file(load_file(path), out, metadata | {KEY: json.dumps(document)})
    return out


def test_an_edited_file_is_another_translator(tmp_path: Path) -> None:
    path = bundle(tmp_path, "pix2pix")
    other = edited(path, {"value_range": [-2.0, 2.0]})
    assert load_translator(path)[0].identity != load_translator(other)[0].identity
    digests = {make_generator("translator", {"weights": weights}).spec.digest for weights in (path, other)}
    assert len(digests) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"value_range": [0, 0]},
        {"value_range": [1, -1]},
        {"mpp": float("nan")},
        {"mpp": 0},
        {"tile": 10**9},
        {"channels": 5},
        {"network": {"family": "pix2pix", "base": 10**9}},
        {"network": {"family": "pix2pix", "blocks": 10**7}},
        {"network": {"family": "unknown"}},
    ],
    ids=str,
)
def test_metadata_that_cannot_be_are_one_clear_error(change: dict[str, object], tmp_path: Path) -> None:
    path = edited(bundle(tmp_path, "pix2pix"), change)
    with pytest.raises((CheckpointError, ConfigError)):
        facts, tensors = load_translator(path)
        make_generator("translator", {"weights": path})
        build_translator(facts.spec, tensors)


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    facts, tensors = load_translator(bundle(tmp_path, "pix2pix"))
    name = next(iter(tensors))
    save_translator(facts.spec, tensors | {name: tensors[name] * np.inf}, tmp_path / "inf.safetensors")
    with pytest.raises(CheckpointError, match="values that are not numbers"):
        load_translator(tmp_path / "inf.safetensors")


def test_tiles_of_a_network_as_large_as_they_are_overlap_all_the_same(tmp_path: Path) -> None:
    """U-Net-256 takes 256 px at once: neighbours have to overlap at places that it does not divide."""
    spec = make_generator("translator", {"weights": bundle(tmp_path, "pix2pix", tile=16)}).spec
    assert spec.overlap > 0
    assert (spec.tile - 2 * spec.halo - spec.overlap) % spec.align == 0


# One training run of each system; what they learn is measured in tests/e2e/test_translators_learn.py.

RUNS = {
    "train_i2sb.yaml": ("aligned", ["objective.diffusion.sampling.nfe=2"]),
    "train_cwdm.yaml": ("aligned", ["objective.diffusion.sampling.nfe=2"]),
    "train_wdm.yaml": (
        "labelled",
        ["objective.diffusion.sampling.nfe=2", "objective.diffusion.measure_bands=2"],
    ),
    "train_ddpm_p2.yaml": ("labelled", ["objective.diffusion.sampling.nfe=2"]),
    "train_pix2pix.yaml": ("aligned", []),
    "train_rough_pairs.yaml": ("rough", []),
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of both sides, and of three classes."""
    root, rng = tmp_path_factory.mktemp("cohort"), np.random.default_rng(0)
    for folder in ("a", "b", "c/one", "c/two", "c/three"):
        (root / folder).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 255, (SIDE, SIDE, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{i}.png")
    return root


@pytest.mark.parametrize("name", RUNS)
def test_every_recipe_trains_and_leaves_weights(name: str, cohort: Path, tmp_path: Path) -> None:
    pairing, more = RUNS[name]
    ends = [f"data.source={cohort}/a", f"data.target={cohort}/b", "data.labels=null"]
    if pairing == "labelled":
        ends = [f"data.target={cohort}/c", "data.labels=null"]
    small = [
        "data.crop=32",
        "data.workers=0",
        "model.tile=32",
        "loop.steps=2",
        "loop.batch=2",
        "loop.accumulate=1",
    ]
    small += ["loop.device=cpu", "loop.tensorboard=false", "validation.every=2", "validation.tiles=2"]
    small += ["loop.log_every=1", "data.split=null", "validation.split=null", "loop.sample_every=2"]
    network = "model.network.base=8", "model.network.groups=4", "model.network.mult=[1,2]"
    if name == "train_pix2pix.yaml":
        network = "model.network.base=4", "model.network.groups=4", "model.network.mult=[1,1,1,1]"
    if name in ("train_i2sb.yaml", "train_ddpm_p2.yaml"):
        network = (*network, "model.network.attention=[]")
    if name == "train_rough_pairs.yaml":
        more = [*more, *(f"objective.aligned.networks.{name}=[4,8]" for name in ("rigid", "fields", "judge"))]
    config = load_settings(TrainConfig, CONFIGS / name, [*ends, *small, *network, *more])
    result = train(config, tmp_path / "run")
    facts, tensors = load_translator(result.bundle.path)
    assert facts.spec.translates == (pairing != "labelled")
    assert (facts.spec.classes == ("one", "three", "two")) == (pairing == "labelled")
    build_translator(facts.spec, tensors)


@pytest.mark.parametrize("name", RUNS)
def test_a_recipe_is_short_and_leads_to_its_formulae(name: str) -> None:
    text = (CONFIGS / name).read_text()
    assert len(text.splitlines()) <= 40
    named = re.findall(r"[\w/]+\.py", text)
    package = CONFIGS.parent / "wsi_pipeline"
    assert named and all(any(package.rglob(Path(each).name)) for each in named), named


@pytest.mark.parametrize(
    ("name", "pairing", "said"),
    [
        ("train_i2sb.yaml", "rough", "the pairs are not aligned; train with objective.kind=aligned"),
        ("train_pix2pix.yaml", "rough", "the pairs are not aligned"),
        ("train_cwdm.yaml", "unpaired", "needs data.pairing aligned or simulated"),
    ],
)
def test_pairs_that_an_objective_cannot_learn_from_are_refused(name: str, pairing: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_settings(TrainConfig, CONFIGS / name, [f"data.pairing={pairing}"])


def test_a_bridge_with_its_source_beside_it_is_not_run_without_noise() -> None:
    with pytest.raises(ConfigError, match="collapses to the conditional mean"):
        load_settings(TrainConfig, CONFIGS / "train_i2sb.yaml", ["objective.diffusion.path.ode=true"])
