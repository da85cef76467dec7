"""What every generator promises; a member's test class inherits this and defines a ``generator`` fixture."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence

import numpy as np
import pytest

from wsi_pipeline.core.geometry import Region, TileIndex
from wsi_pipeline.core.protocols import Context, Generator, Tile, TileBatch

MPP = (8.0, 8.0)


def tiles_of(generator: Generator, columns: Sequence[int]) -> tuple[Tile, ...]:
    """Tiles of one row of the generator's own grid."""
    side, halo = generator.spec.tile, generator.spec.halo
    regions = [Region(0, col * (side - 2 * halo), side, side) for col in columns]
    return tuple(
        Tile(index=TileIndex(0, col), read=region, write=region.grown(-halo))
        for col, region in zip(columns, regions, strict=True)
    )


def batch_of(
    generator: Generator, pixels_BHWC: np.ndarray, columns: Sequence[int] | None = None
) -> TileBatch:
    """``columns``: where on the grid tiles lie (noise belongs to the place); a tail has fewer than pixels."""
    if columns is None:
        columns = range(len(pixels_BHWC))
    return TileBatch(tiles=tiles_of(generator, columns), pixels_BHWC=pixels_BHWC, noise_key=7)


def stained(side: int, count: int, seed: int = 0) -> np.ndarray:
    """[count, side, side, 3] uint8: purple and pink blobs on pale glass, and some pure noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 1, (count, side // 4 + 1, side // 4 + 1, 2)) ** 2
    conc = coarse.repeat(4, axis=1).repeat(4, axis=2)[:, :side, :side]
    od = conc @ np.array([[1.2, 1.3, 0.6], [0.2, 0.9, 0.45]])
    pixels = np.array([238, 230, 236]) * np.exp(-od) + rng.normal(0, 3, od.shape)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


class GeneratorContract:
    """Inherit, and define a ``generator`` fixture that returns a member with small tiles."""

    @pytest.fixture
    def context(self, generator: Generator) -> Context:
        thumbnail = stained(96, 1)[0]
        return generator.prepare(thumbnail, thumbnail.mean(axis=2) < 215, MPP)

    @pytest.fixture
    def pixels(self, generator: Generator) -> np.ndarray:
        return stained(generator.spec.tile, generator.spec.batch)

    def test_is_a_generator(self, generator: Generator) -> None:
        assert isinstance(generator, Generator)

    def test_spec_can_be_planned_with(self, generator: Generator) -> None:
        spec = generator.spec
        assert spec.tile > 2 * spec.halo >= 0
        assert spec.align >= 1
        stride = spec.tile - 2 * spec.halo - spec.overlap
        assert spec.overlap >= 0
        assert stride > 0 and stride % spec.align == 0, "its own overlap fits"
        assert spec.cell is None or 0 < spec.cell < spec.tile
        assert spec.batch >= 1
        assert spec.stain in ("h&e", "any")
        assert spec.mpp is None or all(step > 0 for step in spec.mpp)
        assert len(spec.digest) == 64
        assert set(spec.digest) <= set("0123456789abcdef")

    def test_digest_is_stable(self, generator: Generator) -> None:
        assert pickle.loads(pickle.dumps(generator)).spec == generator.spec  # noqa: S301 (our own bytes)

    def test_context_is_json_and_works_after_the_round_trip(
        self, generator: Generator, context: Context, pixels: np.ndarray
    ) -> None:
        restored = json.loads(json.dumps(context, allow_nan=False))
        batch = batch_of(generator, pixels)
        np.testing.assert_array_equal(generator(batch, context), generator(batch, restored))

    @pytest.mark.parametrize("case", ["no tissue", "one pixel", "black", "white"])
    def test_context_of_a_hopeless_thumbnail_works(
        self, generator: Generator, pixels: np.ndarray, case: str
    ) -> None:
        thumbnail = stained(40, 1)[0]
        tissue = np.ones((40, 40), bool)
        if case == "no tissue":
            tissue[:] = False
        elif case == "one pixel":
            tissue[:] = False
            tissue[20, 20] = True
        else:
            thumbnail[:] = 0 if case == "black" else 255
        context = generator.prepare(thumbnail, tissue, MPP)
        json.dumps(context, allow_nan=False)
        assert generator(batch_of(generator, pixels), context).shape == pixels.shape

    def test_output_has_the_shape_and_type_of_its_input(
        self, generator: Generator, context: Context, pixels: np.ndarray
    ) -> None:
        result = generator(batch_of(generator, pixels), context)
        assert result.shape == pixels.shape
        assert result.dtype == np.uint8

    def test_background_is_pointwise(self, generator: Generator, context: Context) -> None:
        """Any shape, also an empty one; each pixel on its own, so that crops join without a seam."""
        pixels = stained(40, 1)[0][:, :37]
        whole = generator.background(pixels, context)
        assert whole.shape == pixels.shape
        assert whole.dtype == np.uint8
        np.testing.assert_array_equal(generator.background(pixels[3:20, 5:9], context), whole[3:20, 5:9])
        assert generator.background(pixels[:0], context).shape == (0, 37, 3)

    def test_input_is_not_written_to(
        self, generator: Generator, context: Context, pixels: np.ndarray
    ) -> None:
        before = pixels.copy()
        pixels.setflags(write=False)
        generator(batch_of(generator, pixels), context)
        np.testing.assert_array_equal(pixels, before)

    def test_a_tile_does_not_depend_on_its_batch(
        self, generator: Generator, context: Context, pixels: np.ndarray
    ) -> None:
        """Other neighbours, another place in the batch, a padded tail; within one level if not ``exact``."""
        count = len(pixels)
        wanted = generator(batch_of(generator, pixels), context)
        allowed = 0 if generator.spec.exact else 1
        order = range(count)[::-1]
        backwards = generator(batch_of(generator, pixels[::-1], order), context)[::-1]
        padded = generator(batch_of(generator, np.repeat(pixels[:1], count, axis=0), [0]), context)
        others = stained(generator.spec.tile, count, seed=99)
        others[-1] = pixels[0]
        strange = generator(batch_of(generator, others, order), context)
        for result, tile in ((backwards[0], wanted[0]), (padded[0], wanted[0]), (strange[-1], wanted[0])):
            assert np.abs(result.astype(int) - tile).max() <= allowed

    def test_repeats_itself_and_survives_pickling(
        self, generator: Generator, context: Context, pixels: np.ndarray
    ) -> None:
        batch = batch_of(generator, pixels)
        first = generator(batch, context)
        np.testing.assert_array_equal(generator(batch, context), first)
        copy = pickle.loads(pickle.dumps(generator))  # noqa: S301 (our own bytes)
        np.testing.assert_array_equal(copy(batch, context), first)
