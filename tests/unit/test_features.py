"""Feature extractors: what they promise, and what they refuse."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageEnhance, ImageFilter

from wsi_pipeline.core.fid import frechet_distance, statistics
from wsi_pipeline.errors import CheckpointError, ConfigError
from wsi_pipeline.models.dino import keys_of, make_dino_structure
from wsi_pipeline.models.features import FeatureExtractor, clean_resize, make_extractor
from wsi_pipeline.models.inception import INCEPTION_URL
from wsi_pipeline.models.vit_features import DINO_URL

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


class _Network(torch.nn.Module):
    """Stands for Inception: a part ``layers`` that makes 2048 numbers an image."""

    def __init__(self, dims: int = 2048) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(192, dims)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def scripted(network: torch.nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(network).save(str(path))
    return path


def test_inception_sees_what_clean_fid_shows_it(tmp_path: Path, tiles_BHWC: np.ndarray) -> None:
    network = _Network()
    extract = make_extractor("inception", weights=scripted(network, tmp_path / "i.pt"), trust=True)
    assert (extract.dims, extract.side) == (2048, 299)
    found = extract(tiles_BHWC[:2])
    resized = torch.from_numpy(np.stack([clean_resize(tile, 299) for tile in tiles_BHWC[:2]]))
    with torch.no_grad():
        wanted = network.layers((resized.permute(0, 3, 1, 2) - 128) / 128)
    assert found.shape == (2, 2048)
    assert np.abs(found - wanted.numpy()).max() < 1e-5


def test_an_unknown_torchscript_file_is_not_run(tmp_path: Path) -> None:
    path = scripted(_Network(), tmp_path / "i.pt")
    with pytest.raises(CheckpointError, match="SHA-256 .* runs its code; .*--trust-weights"):
        make_extractor("inception", weights=path)


def test_missing_and_damaged_weights_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no such file.*{INCEPTION_URL}"):
        make_extractor("inception", weights=tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="needs a weights file"):
        make_extractor("inception")
    noise = tmp_path / "noise.pt"
    noise.write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(CheckpointError, match="no TorchScript file"):
        make_extractor("inception", weights=noise, trust=True)
    with pytest.raises(CheckpointError, match="no part 'layers'"):
        make_extractor(
            "inception", weights=scripted(torch.nn.Linear(2, 2), tmp_path / "other.pt"), trust=True
        )
    few = make_extractor("inception", weights=scripted(_Network(64), tmp_path / "few.pt"), trust=True)
    with pytest.raises(CheckpointError, match="not 2048"):
        few(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(CheckpointError, match=DINO_URL):
        make_extractor("dino")


@pytest.fixture(scope="module")
def small_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of timm's smallest ViT, with a classifier."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), path)
    return path


def test_a_timm_network_by_name(small_vit: Path, tiles_BHWC: np.ndarray) -> None:
    extract = make_extractor("timm", model="test_vit", weights=small_vit)
    assert isinstance(extract, FeatureExtractor)
    assert (extract.name, extract.dims, extract.side) == ("timm test_vit", 64, 160)
    assert extract.digest == hashlib.sha256(small_vit.read_bytes()).hexdigest()
    found = extract(tiles_BHWC[:4])
    assert found.shape == (4, 64)
    assert np.abs(found[2] - extract(tiles_BHWC[2:3])[0]).max() < 1e-4
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_weights_of_another_network_are_named(small_vit: Path, tmp_path: Path) -> None:
    state = torch.load(small_vit)
    del state["blocks.3.norm1.weight"]
    state["norm.bias"] = torch.zeros(7)
    path = tmp_path / "wrong.pth"
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"1 missing \(blocks.3.norm1.weight\), 1 of another shape"):
        make_extractor("timm", model="test_vit", weights=path)
    with pytest.raises(ConfigError, match="timm has no 'no_such_net'"):
        make_extractor("timm", model="no_such_net", weights=small_vit)
    with pytest.raises(ConfigError, match="--model"):
        make_extractor("timm", weights=small_vit)


def test_an_open_clip_tower_by_name(tmp_path: Path, tiles_BHWC: np.ndarray) -> None:
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }
    (tmp_path / "wsi-test-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    path = tmp_path / "clip.pt"
    torch.save(open_clip.create_model("wsi-test-tiny", load_weights=False).state_dict(), path)
    extract = make_extractor("open_clip", model="wsi-test-tiny", weights=path)
    assert (extract.dims, extract.side) == (24, 64)
    assert extract(tiles_BHWC[:2]).shape == (2, 24)
    with pytest.raises(ConfigError, match="no model 'ViT-none'"):
        make_extractor("open_clip", model="ViT-none", weights=path)


def test_dino_features_and_structure(small_vit: Path, tiles_BHWC: np.ndarray) -> None:
    assert make_extractor("dino", model="test_vit", weights=small_vit)(tiles_BHWC[:1]).shape == (1, 64)
    score = make_dino_structure(small_vit, model="test_vit")
    same = score(tiles_BHWC[:3], tiles_BHWC[:3])
    assert np.array_equal(same, np.zeros(3))
    blurred = [
        changed(tiles_BHWC[:3], lambda im, s=s: im.filter(ImageFilter.GaussianBlur(s))) for s in (1, 3, 9)
    ]
    scores = [score(tiles_BHWC[:3], output).mean() for output in blurred]
    assert scores == sorted(scores)
    assert scores[0] > 0.0
    with pytest.raises(ConfigError, match="square"):
        score(tiles_BHWC[:1, :40], tiles_BHWC[:1, :40])


def test_keys_are_those_of_the_last_block(small_vit: Path, tiles_BHWC: np.ndarray) -> None:
    """The hook's projection, split by hand: queries, keys, values, each head beside the next."""
    score = make_dino_structure(small_vit, model="test_vit")
    qkv = torch.randn(2, 5, 3 * 2 * 4)
    keys = keys_of(qkv, heads=2)
    assert torch.equal(keys[1, 1, 3], qkv[1, 3, 8 + 4 : 8 + 8])
    assert score.side == 160
