"""Translators of the other systems keep the contract of generators."""

from __future__ import annotations

from pathlib import Path

import generator_contract as contract
import pytest
from tiny_translators import SYSTEMS, bundle

from wsi_pipeline.core.protocols import Generator
from wsi_pipeline.generators import make_generator

pytestmark = pytest.mark.usefixtures("one_thread")


class TestTranslators(contract.GeneratorContract):  # type: ignore[name-defined,misc]
    @pytest.fixture(params=[*SYSTEMS, "pix2pix"])
    def generator(self, request: pytest.FixtureRequest, tmp_path: Path) -> Generator:
        weights = bundle(tmp_path, request.param, tile=64)
        return make_generator("translator", {"weights": weights, "batch": 3, "halo": 16})
