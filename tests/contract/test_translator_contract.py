"""Translators of the other systems keep the contract of generators."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from tiny_translators import SYSTEMS, bundle

from wsi_pipeline.core.protocols import Generator
from wsi_pipeline.generators import make_generator


def _beside(name: str) -> ModuleType:
    # pytest runs with --import-mode=importlib, which puts no test folder on sys.path.
    spec = spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


contract = _beside("generator_contract")

pytestmark = pytest.mark.usefixtures("one_thread")


class TestTranslators(contract.GeneratorContract):  # type: ignore[name-defined,misc]
    @pytest.fixture(params=[*SYSTEMS, "pix2pix"])
    def generator(self, request: pytest.FixtureRequest, tmp_path: Path) -> Generator:
        weights = bundle(tmp_path, request.param, tile=64)
        return make_generator("translator", {"weights": weights, "batch": 3, "halo": 16})
