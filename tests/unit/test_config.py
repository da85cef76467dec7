"""Configuration: strict, explained by path, and the manifest's own config is accepted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from wsi_pipeline.config import load_config, load_run_config, to_yaml
from wsi_pipeline.errors import ConfigError
from wsi_pipeline.pipeline.settings import ConvertConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_defaults_survive_the_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(to_yaml(ConvertConfig()))
    assert load_config(path) == ConvertConfig()


def test_overrides_are_typed_and_win(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text("tiling: {overlap: 32}\ngenerator: {name: identity}\n")
    config = load_config(path, ["tiling.overlap=96", "output.zarr.ngff=0.4", "input.mpp=0.25"])
    assert config.tiling.overlap == 96
    assert load_config(path, ["tiling.overlap=null"]).tiling.overlap is None
    assert config.generator.name == "identity"
    assert config.output.zarr.ngff == "0.4"
    assert config.input.mpp == 0.25


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tiling.overlapp=96", r"tiling\.overlapp: no such setting"),
        ("output.zarr.blocks=1024", r"output\.zarr\.blocks: no such setting"),
        ("tisue.preset=ffpe", "tisue: no such setting"),
        ("tissue.presett=ffpe", r"tissue\.presett: no such setting"),
        ("tiling.overlap=wide", r"tiling\.overlap: .*got 'wide'"),
        ("output.background=pink", r"output\.background: .*got 'pink'"),
        ("output.zarr.block=1000", "not a multiple of 1024"),
        ("run.workers=0", "not a positive number"),
        ("tissue.preset=oak", "oak"),
        ("overlap", "write it as key.path=value"),
        ("tiling=3", "tiling"),
    ],
)
def test_a_wrong_setting_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [\n", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="bad.yaml"):
        load_config(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "absent.yaml")


def test_a_manifest_is_a_config(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    config = yaml.safe_load(to_yaml(load_config(None, ["tiling.overlap=48"])))
    path.write_text(json.dumps({"fingerprint": "f", "config": config}))
    assert load_config(path).tiling.overlap == 48


CONVERSIONS = [path for path in sorted(CONFIGS.glob("*.yaml")) if not path.stem.startswith("train_")]


@pytest.mark.parametrize("path", CONVERSIONS, ids=lambda p: p.stem)
def test_shipped_configs_are_complete(path: Path) -> None:
    given = yaml.safe_load(path.read_text())
    load = load_run_config if "directory" in given else load_config
    full = yaml.safe_load(to_yaml(load(path)))

    def keys(tree: object) -> object:
        return {k: keys(v) for k, v in tree.items()} if isinstance(tree, dict) else None

    assert keys(given) == keys(full), "a shipped config spells out every setting"


def test_the_config_of_the_learned_generator_spells_out_every_option() -> None:
    from wsi_pipeline.generators.lora_turbo import LoraTurbo

    given = load_config(CONFIGS / "diffusion_ffpe.yaml").generator
    defaults = {field.name: field.default for field in dataclasses.fields(LoraTurbo) if field.init}
    assert given.name == "lora_turbo"
    assert dict(given.options) == {**defaults, "weights": "ffpe.safetensors"}
