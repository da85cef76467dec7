"""The shipped generators keep the contract; the constructor is strict; each member's own promises."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import generator_contract as contract
import numpy as np
import pytest

from wsi_pipeline.core.protocols import Generator
from wsi_pipeline.errors import ConfigError, GeneratorError
from wsi_pipeline.generators import GENERATORS, describe, make_generator


class TestIdentity(contract.GeneratorContract):
    @pytest.fixture
    def generator(self) -> Generator:
        return make_generator("identity", {"tile": 48, "batch": 3})

    def test_changes_nothing(self, generator: Generator, pixels: np.ndarray) -> None:
        np.testing.assert_array_equal(generator(contract.batch_of(generator, pixels), {}), pixels)


class TestStainTransfer(contract.GeneratorContract):
    @pytest.fixture
    def generator(self) -> Generator:
        return make_generator("stain_transfer", {"tile": 48, "batch": 3})

    def test_context_records_what_was_measured(self, context: dict[str, Any]) -> None:
        assert context["source"]["fallback"] == ""
        np.testing.assert_allclose(context["source"]["white"], (238, 230, 236), atol=2.5)
        assert context["source"]["pixels"] > 400

    def test_fallback_is_recorded(self, generator: Generator) -> None:
        context = generator.prepare(contract.stained(48, 1)[0], np.zeros((48, 48), bool), (8.0, 8.0))
        assert "stained pixels" in context["source"]["fallback"]

    def test_glass_becomes_the_palettes_white(self, generator: Generator, context: dict[str, Any]) -> None:
        glass = np.full((3, 48, 48, 3), np.rint(context["source"]["white"]), np.uint8)
        result = generator(contract.batch_of(generator, glass), context).astype(float)
        np.testing.assert_allclose(result[0, 0, 0], context["target"]["white"], atol=2)

    def test_background_continues_the_tiles(
        self, generator: Generator, context: dict[str, Any], pixels: np.ndarray
    ) -> None:
        tiles = generator(contract.batch_of(generator, pixels), context)
        np.testing.assert_array_equal(generator.background(pixels[1], context), tiles[1])

    def test_strength_zero_changes_nothing(self, context: dict[str, Any], pixels: np.ndarray) -> None:
        generator = make_generator("stain_transfer", {"tile": 48, "batch": 3, "strength": 0.0})
        result = generator(contract.batch_of(generator, pixels), context)
        np.testing.assert_array_equal(result, np.maximum(pixels, 1))

    def test_half_strength_lies_between(self, context: dict[str, Any], pixels: np.ndarray) -> None:
        none, half, full = (
            make_generator("stain_transfer", {"tile": 48, "batch": 3, "strength": share})(
                contract.batch_of(make_generator("stain_transfer", {"tile": 48}), pixels), context
            ).astype(int)
            for share in (0.0, 0.5, 1.0)
        )
        assert (half >= np.minimum(none, full) - 1).all()
        assert (half <= np.maximum(none, full) + 1).all()
        assert np.abs(full - none).mean() > 3

    def test_digest_follows_what_pixels_depend_on(self, tmp_path: Path) -> None:
        shipped = Path(sys.modules["wsi_pipeline.generators"].__file__ or "").with_name("ffpe_palette.json")
        data = json.loads(shipped.read_text())
        data["rungs"][0]["strengths"][0] += 0.1
        (tmp_path / "mine.json").write_text(json.dumps(data))

        def digest(**options: Any) -> str:
            return make_generator("stain_transfer", options).spec.digest

        assert digest(batch=2) == digest(tile=512) == digest()
        changed = {
            digest(),
            digest(strength=0.5),
            digest(palette=tmp_path / "mine.json"),
        }
        assert len(changed) == 3

    @pytest.mark.parametrize(
        "text", ["", "{}", '{"white": [1, 2, 3], "rungs": []}', '{"white": 1, "rungs": [{}]}']
    )
    def test_a_file_that_is_no_palette_is_refused(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "broken.json"
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"broken\.json.*palette"):
            make_generator("stain_transfer", {"palette": str(path)})
        with pytest.raises(ConfigError, match=r"absent\.json.*palette"):
            make_generator("stain_transfer", {"palette": str(tmp_path / "absent.json")})

    def test_a_foreign_context_is_refused(self, generator: Generator, pixels: np.ndarray) -> None:
        with pytest.raises(GeneratorError, match="run prepare again"):
            generator(contract.batch_of(generator, pixels), {})

    def test_finer_thumbnails_get_stronger_reference_strengths(self, generator: Generator) -> None:
        """Averaging lowers the 99th percentile; the palette must know at which resolution it is asked."""
        thumbnail = contract.stained(64, 1)[0]
        tissue = thumbnail.mean(axis=2) < 215
        haematoxylin = [
            generator.prepare(thumbnail, tissue, (mpp, mpp))["target"]["strengths"][0]
            for mpp in (0.1, 0.516, 2.0, 3.0, 8.0, 16.0, 64.0)
        ]
        assert haematoxylin == sorted(haematoxylin, reverse=True)
        assert haematoxylin[0] == haematoxylin[1] > 1.5 * haematoxylin[-1]


@dataclass(frozen=True)
class NoGenerator:
    """A dataclass without the methods."""

    size: int = 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("stain_transfer", {"strenght": 1.0}, "unknown option strenght.*palette, strength"),
        ("stain_transfer", {"strength": "much"}, "strength='much'"),
        ("stain_transfer", {"strength": 1.5}, "between 0 and 1"),
        ("stain_transfer", {"strength": float("nan")}, "between 0 and 1"),
        ("stain_transfer", {"_loaded": 1}, "unknown option _loaded"),
        ("stain_transfer", {"tile": 0}, ">= 1"),
        ("identity", {"batch": 0}, ">= 1"),
        ("identity", {"strength": 1.0}, "unknown option strength; valid options: batch, tile"),
        ("stain-transfer", {}, "no such generator; choose ffpe_mini, identity, lora_turbo, stain_transfer"),
        ("no_such_package.gan:Gan", {}, "cannot be imported.*install"),
        ("wsi_pipeline.generators.identity:Gan", {}, "has no class Gan"),
        ("pathlib:Path", {}, "must be a dataclass"),
        ("wsi_pipeline.core.geometry:Size", {"height": 1}, "width is required"),
        ("wsi_pipeline.core.geometry:Size", {"height": 1, "width": 1}, "lacks spec"),
    ],
)
def test_bad_choices_are_named_with_their_remedy(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_generator(name, options)
    assert "\n" not in str(caught.value)


def test_a_generator_of_somebody_elses_package_works() -> None:
    assert make_generator("wsi_pipeline.generators.identity:Identity", {}).spec.kind == "identity"


def test_specs_are_as_documented() -> None:
    for name, stain in (("identity", "any"), ("stain_transfer", "h&e")):
        spec = make_generator(name, {}).spec
        shape = (spec.kind, spec.tile, spec.halo, spec.align, spec.batch, spec.exact, spec.stain, spec.mpp)
        assert shape == (name, 1088, 0, 1, 4, True, stain, None)
        assert (spec.overlap, spec.cell) == (64, None)


def test_descriptions_name_every_member_and_its_defaults() -> None:
    described = {entry.name: entry for entry in describe()}
    assert set(described) == set(GENERATORS)
    assert all(entry.summary.endswith(".") and not entry.problem for entry in described.values())
    defaults = {option.name: option.default for option in described["stain_transfer"].options}
    assert defaults == {"strength": 1.0, "palette": None, "tile": 1088, "batch": 4}


def test_a_member_that_cannot_be_imported_is_described_with_its_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(GENERATORS, "lost", "no_such_package:Gan")
    assert "cannot be imported" in {entry.name: entry for entry in describe()}["lost"].problem


def test_importing_the_family_loads_no_array_library() -> None:
    heavy = "{'numpy', 'cv2', 'pydantic'} & set(sys.modules)"
    code = f"import sys, wsi_pipeline.generators; found = {heavy}; assert not found, found"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
