"""Feature extractors: what they promise, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from wsi_pipeline.core.fid import frechet_distance, statistics
from wsi_pipeline.errors import ConfigError
from wsi_pipeline.models.features import FeatureExtractor, clean_resize, make_extractor

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiles_BHWC() -> np.ndarray:
    """Sixty tiles of purple and pink spots on pink ground, each with colours of its own."""
    rng = np.random.default_rng(0)
    tiles = []
    for _ in range(60):
        tile = np.full((64, 64, 3), rng.normal((225, 180, 210), 6), np.float64)
        for _ in range(25):
            y, x = rng.integers(0, 64, 2)
            near = np.hypot(*np.ogrid[-y : 64 - y, -x : 64 - x]) < rng.uniform(2, 5)
            tile[near] = rng.normal((110, 70, 150), 12)
        tiles.append(np.clip(tile + rng.normal(0, 4, tile.shape), 0, 255).astype(np.uint8))
    return np.stack(tiles)


def changed(tiles_BHWC: np.ndarray, change) -> np.ndarray:  # type: ignore[no-untyped-def]
    return np.stack([np.asarray(change(Image.fromarray(tile))) for tile in tiles_BHWC])


def test_tiny_is_an_extractor_with_stated_facts(tiles_BHWC: np.ndarray) -> None:
    extract = make_extractor("tiny")
    assert isinstance(extract, FeatureExtractor)
    assert (extract.name, extract.dims, extract.side) == ("tiny", 64, None)
    # The weights are part of the definition: another digest would mean another FID.
    assert extract.digest == "9a9f2b5c8b754592359536c45879d5140be76f7def94586a67e94bf5a7e63368"
    found = extract(tiles_BHWC[:3])
    assert found.shape == (3, 64)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()


def test_features_do_not_depend_on_the_batch(tiles_BHWC: np.ndarray) -> None:
    extract = make_extractor("tiny")
    assert np.array_equal(extract(tiles_BHWC[:5])[3:4], extract(tiles_BHWC[3:4]))


def test_tiny_orders_known_degradations(tiles_BHWC: np.ndarray) -> None:
    extract = make_extractor("tiny")
    base = statistics(extract(tiles_BHWC))
    changes = {
        "blur": [lambda im, s=s: im.filter(ImageFilter.GaussianBlur(s)) for s in (0.5, 1.0, 2.0, 4.0)],
        "contrast": [lambda im, s=s: ImageEnhance.Contrast(im).enhance(s) for s in (0.9, 0.7, 0.5, 0.3)],
        "colour": [lambda im, s=s: ImageEnhance.Color(im).enhance(s) for s in (0.9, 0.7, 0.4, 0.1)],
        "brightness": [lambda im, s=s: ImageEnhance.Brightness(im).enhance(s) for s in (0.97, 0.9, 0.8)],
    }
    for name, steps in changes.items():
        distances = [frechet_distance(statistics(extract(changed(tiles_BHWC, step))), base) for step in steps]
        assert distances == sorted(distances), name
        assert distances[-1] > 20 * max(distances[0], 1e-4), name


def test_small_tiles_and_foreign_options_are_refused(tiles_BHWC: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="24 px or more"):
        make_extractor("tiny")(tiles_BHWC[:, :20])
    with pytest.raises(ConfigError, match="takes no weights"):
        make_extractor("tiny", weights="x.pt")
    with pytest.raises(ConfigError, match="choose from tiny, inception"):
        make_extractor("inceptoin")


def test_resize_keeps_flat_colour_and_fractions() -> None:
    flat = np.full((40, 70, 3), (10, 128, 255), np.uint8)
    resized = clean_resize(flat, 299)
    assert resized.shape == (299, 299, 3)
    assert resized.dtype == np.float32
    assert np.allclose(resized, flat[0, 0], atol=1e-3)
    rough = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    fine = clean_resize(rough, 299)
    assert fine.min() >= 0.0
    assert fine.max() <= 255.0
    assert (np.abs(fine - np.rint(fine)) > 0.1).mean() > 0.5, "not rounded to grey levels"


def test_resize_shrinks_without_aliasing() -> None:
    """A checkerboard of single pixels becomes grey, not stripes."""
    board = ((np.indices((598, 598)).sum(axis=0) % 2) * 255).astype(np.uint8)
    small = clean_resize(np.repeat(board[..., None], 3, axis=2), 299)
    assert np.ptp(small[8:-8, 8:-8]) < 1.0
