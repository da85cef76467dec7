"""``wsi-pipeline register`` on files: what is written, what is refused, tiles that are read through it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from registration_pairs import MPP, known, landmark_errors_px, restained, section, through, tissue

from wsi_pipeline.cohorts.index import make_index
from wsi_pipeline.cohorts.settings import CohortConfig, LatticeConfig
from wsi_pipeline.cohorts.tiles import TileIndex, TileReader, load_tiles
from wsi_pipeline.core.geometry import Region
from wsi_pipeline.core.protocols import U8_HWC
from wsi_pipeline.core.transform import pull_back
from wsi_pipeline.errors import ConfigError, OutputExistsError, RegistrationError, SlideError
from wsi_pipeline.readers.warped import load_pair
from wsi_pipeline.registration.run import register_slides

CLI = [sys.executable, "-m", "wsi_pipeline.cli"]
AT_8 = ("--fixed-mpp", "8", "--moving-mpp", "8")


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


def save(path: Path, rgb_HWC: U8_HWC) -> Path:
    Image.fromarray(rgb_HWC).save(path)
    return path


def picture_of(path: Path) -> U8_HWC:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def made(folder: Path, **moved: Any) -> Any:
    """Two made sections as PNG files; the truth is returned."""
    moving = tissue()
    truth = known(moving.shape[:2], 20, 1.02, (8, 15), 5)
    save(folder / "fixed.png", through(moving, truth))
    save(folder / "moving.png", restained(moving, **moved))
    return truth


def index(folder: Path) -> TileIndex:
    """The index of ``c.csv``, tiles of 64 px at 8 µm, of any stain."""
    config = CohortConfig(tiling=LatticeConfig(mpp=8.0, tile=64), stain="any")
    make_index(folder / "c.csv", folder / "c.parquet", config)
    return load_tiles(folder / "c.parquet", everything=True)


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("register")
    truth = made(folder)
    done = run("register", "fixed.png", "moving.png", "-o", "pair.json", *AT_8, cwd=folder)
    return folder, truth, done


def test_two_sections_become_a_transform_a_field_and_a_picture(registered: tuple[Path, Any, Any]) -> None:
    folder, truth, done = registered
    assert done.returncode == 0, done.stderr
    assert "not fitted" in done.stdout and "pair.png" in done.stdout
    assert {path.name for path in folder.glob("pair*")} == {"pair.json", "pair.field.zarr", "pair.png"}
    about = json.loads((folder / "pair.json").read_text())
    assert (about["from"], about["to"], about["units"]) == ("fixed", "moving", "micrometer")
    assert set(about["landmark_error_um"]) == {"median", "p90", "n"} and about["gates"]["agreeing"] == 0.6
    assert str(folder) not in json.dumps(about)
    sections = [section(picture_of(folder / f"{name}.png")) for name in ("fixed", "moving")]
    errors = landmark_errors_px(load_pair(folder / "pair.json").transform, truth, *sections)
    assert np.median(errors) <= 0.5 and np.quantile(errors, 0.9) <= 1.5
    assert min(picture_of(folder / "pair.png").shape[:2]) > 600
    with pytest.raises(OutputExistsError, match="--overwrite"):
        register_slides(folder / "fixed.png", folder / "moving.png", folder / "pair.json")


def test_a_cohort_is_paired_through_it(registered: tuple[Path, Any, Any]) -> None:
    folder, truth, _ = registered
    rows = ["slide,domain,patient,split,mpp,pair,transform", "fixed.png,FF,p,train,8,a,"]
    (folder / "c.csv").write_text("\n".join([*rows, "moving.png,FFPE,p,train,8,a,pair.json"]))
    tiles = index(folder)
    corners = tiles.region_N4[:, :2]
    pairs = {tiles.slide(row).domain: row for row in np.flatnonzero((corners == 192).all(axis=1)).tolist()}
    reader = TileReader(tiles)
    region = Region(192, 192, 64, 64)
    moving = picture_of(folder / "moving.png")
    expected = pull_back(
        moving, load_pair(folder / "pair.json").transform.grid(region, (MPP, MPP)), (MPP, MPP)
    )
    tile = reader.read(pairs["FFPE"])
    np.testing.assert_array_equal(tile, expected)  # one resampling of the file's own pixels
    crop = Region(9, 21, 30, 17)
    np.testing.assert_array_equal(reader.read(pairs["FFPE"], crop), tile[9:39, 21:38])
    assert reader.inside(pairs["FFPE"], crop).all() and reader.inside(pairs["FF"]).shape == (64, 64)
    # In register: the red density of the pair agrees, and does not without the transform.
    source, target, unmoved = (
        cv2.GaussianBlur(np.log(picture[..., 0] + 1.0), (0, 0), 1.0).ravel()
        for picture in (reader.read(pairs["FF"]), tile, moving[region.slices(Region(0, 0, 448, 448))])
    )
    assert np.corrcoef(source, target)[0, 1] > 0.8 > 0.4 > np.corrcoef(source, unmoved)[0, 1]


def test_a_new_transform_makes_the_index_stale_and_a_strange_one_is_told(
    registered: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    folder = registered[0]
    for name in ("fixed.png", "moving.png"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    about = json.loads((folder / "pair.json").read_text()) | {"field": None}
    (tmp_path / "pair.json").write_text(json.dumps(about))
    rows = [
        "slide,domain,patient,mpp,pair,transform",
        "fixed.png,FF,p,8,a,",
        "moving.png,FFPE,p,8,a,pair.json",
    ]
    (tmp_path / "c.csv").write_text("\n".join(rows))
    tiles = index(tmp_path).select("FFPE")
    TileReader(tiles).read(0)
    moved = np.array(about["affine"]) + [[0, 0, 1.0], [0, 0, 0]]
    (tmp_path / "pair.json").write_text(json.dumps(about | {"affine": moved.tolist()}))
    with pytest.raises(SlideError, match="make the index again"):
        TileReader(tiles).read(0)
    (tmp_path / "pair.json").write_text(json.dumps(about | {"from_identity": "0" * 64, "from": "another"}))
    with pytest.raises(ConfigError, match="line 3: pair.json maps from another"):
        index(tmp_path)
    (tmp_path / "c.csv").write_text("\n".join([*rows[:2], "moving.png,FFPE,p,8,a,absent.json"]))
    with pytest.raises(ConfigError, match="absent.json"):
        index(tmp_path)


@pytest.mark.slow
def test_no_tiles_of_a_piece_that_moved_on_its_own(tmp_path: Path) -> None:
    still = np.full((480, 720, 3), 244, np.uint8)
    still[40:424, 20:404] = tissue(384, seed=1)
    alone, slid = np.full_like(still, 244), np.full_like(still, 244)
    alone[110:366, 424:680] = slid[160:416, 454:710] = tissue(256, seed=2)
    save(tmp_path / "fixed.png", np.minimum(still, alone))
    save(tmp_path / "moving.png", restained(np.minimum(still, slid), hole=False))
    done = run("register", "fixed.png", "moving.png", "-o", "pair.json", *AT_8, cwd=tmp_path)
    assert done.returncode == 0 and "not in register (red in pair.png): no tiles" in done.stdout
    lost = int(done.stdout.partition("Warning: ")[2].partition("%")[0])
    assert 20 < lost < 40
    picture = picture_of(tmp_path / "pair.png").astype(int)
    red_HW = picture[..., 0] - picture[..., 1:].max(axis=-1) > 80
    assert red_HW.any(axis=0).nonzero()[0].min() > picture.shape[1] * 0.8  # right piece of the last panel
    rows = ["slide,domain,patient,split,mpp,pair,transform", "fixed.png,FF,p,train,8,a,"]
    (tmp_path / "c.csv").write_text("\n".join([*rows, "moving.png,FFPE,p,train,8,a,pair.json"]))
    told = run("tile", "c.csv", "-o", "d.parquet", "--set", "tiling.mpp=8", "--set", "tiling.tile=32",
               "--set", "stain=any", cwd=tmp_path)  # fmt: skip
    assert told.returncode == 0 and "moving.png: " in told.stderr
    assert "tiles not made, their tissue is not in register" in told.stderr
    tiles = load_tiles(tmp_path / "d.parquet", everything=True)
    x_N = {domain: tiles.select(domain).region_N4[:, 1] for domain in ("FF", "FFPE")}
    assert (x_N["FF"] > 404).sum() > 30 and (x_N["FF"] < 404).sum() > 60
    assert x_N["FFPE"].max() < 404 and len(x_N["FFPE"]) > 60


def test_points_of_another_program_pass_the_same_gates(registered: tuple[Path, Any, Any]) -> None:
    folder, truth, _ = registered
    y, x = np.meshgrid(np.arange(5, 448, 16.0), np.arange(5, 448, 16.0), indexing="ij")
    fixed = np.column_stack([y.ravel(), x.ravel()])
    for name, moving in (("good", truth.points(fixed * MPP) / MPP), ("half turn", 447 - fixed)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["fixed_x", "fixed_y", "moving_x", "moving_y"])
            writer.writerows(np.column_stack([fixed[:, ::-1], moving[:, ::-1]]).tolist())
    slides = (folder / "fixed.png", folder / "moving.png")
    about = register_slides(
        *slides, folder / "v.json", points=folder / "good.csv", mpps=(8, 8), picture=False
    )
    assert about["landmark_error_um"]["median"] < MPP / 2 and about["method"] == "given points at 8 um"
    with pytest.raises(RegistrationError, match=r"fixed\.png and .*moving\.png: do not register"):
        register_slides(
            *slides, folder / "w.json", points=folder / "half turn.csv", mpps=(8, 8), picture=False
        )
    assert not list(folder.glob("w*"))
    (folder / "bad.csv").write_text("fixed_x,fixed_y\n1,2\n")
    with pytest.raises(ConfigError, match=r"bad\.csv.*moving_y"):
        register_slides(*slides, folder / "w.json", points=folder / "bad.csv", mpps=(8, 8))


def test_what_does_not_register_is_one_error_and_at_most_a_picture(tmp_path: Path) -> None:
    save(tmp_path / "a.png", tissue(320, seed=1))
    save(tmp_path / "b.png", tissue(320, seed=2))
    save(tmp_path / "blank.png", np.full((300, 300, 3), 243, np.uint8))
    done = run("register", "a.png", "b.png", "-o", "no.json", *AT_8, cwd=tmp_path)
    assert done.returncode == 5 and "Traceback" not in done.stderr
    for word in ("a.png", "b.png", "needed", "mm²", "--mpp 4", "no.refused.png"):
        assert word in done.stderr
    assert [path.name for path in tmp_path.glob("no*")] == ["no.refused.png"]
    a, b, blank = (tmp_path / name for name in ("a.png", "b.png", "blank.png"))
    with pytest.raises(RegistrationError, match="there is no tissue.* and 0 mm²"):
        register_slides(a, blank, tmp_path / "x.json", mpps=(8, 8), picture=False)
    with pytest.raises(ConfigError, match="json"):
        register_slides(a, b, tmp_path / "x.txt", mpps=(8, 8))
    with pytest.raises(ConfigError, match="--mpp 200"):
        register_slides(a, b, tmp_path / "x.json", mpp=200.0, mpps=(8, 8))
    with pytest.raises(ConfigError, match="--fixed-mpp"):
        register_slides(a, b, tmp_path / "x.json")
    assert not list(tmp_path.glob("x*"))


# ---- real tissue -----------------------------------------------------------------------------------------


def real(data_dir: Path, name: str, mpp: float) -> U8_HWC:
    """A real section at 8 µm."""
    rgb_HWC = cv2.imread(str(next(data_dir.rglob(name))))[..., ::-1]
    return np.ascontiguousarray(
        cv2.resize(rgb_HWC, None, fx=mpp / MPP, fy=mpp / MPP, interpolation=cv2.INTER_AREA)
    )


REAL = {
    "her2st": ("5714_HE_BT_C2.jpg", 0.687),
    "lung": ("lung-squamous*.jpg", 2.0),
    "skin": ("scc_P2_1.jpg", 8.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(("degrees", "scale"), [(28, 0.97), (-15, 1.03), (90, 1.01), (180, 0.99)])
def test_a_real_section_is_found_again_in_another_stain(
    data_dir: Path, tmp_path: Path, name: str, degrees: float, scale: float
) -> None:
    moving = real(data_dir, *REAL[name])
    truth = known(moving.shape[:2], degrees, scale, (20, -14), 5)
    files = save(tmp_path / "f.png", through(moving, truth)), save(tmp_path / "m.png", restained(moving))
    about = register_slides(*files, tmp_path / "p.json", mpps=(8, 8), picture=False)
    sections = [section(picture_of(path)) for path in files]
    errors = landmark_errors_px(load_pair(tmp_path / "p.json").transform, truth, *sections)
    assert np.median(errors) <= 0.5 and np.quantile(errors, 0.9) <= 1.5
    assert about["landmark_error_um"]["median"] >= 0.7 * np.median(errors) * MPP


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fixed", "moving", "mpps"),
    [("scc_P2_1.jpg", "scc_P2_2.jpg", (8, 8)), ("MOB1.jpg", "MOB2.jpg", (3.6, 3.6))],
)
def test_real_serial_sections_register_the_same_way_forth_and_back(
    data_dir: Path, tmp_path: Path, fixed: str, moving: str, mpps: tuple[float, float]
) -> None:
    files = [next(data_dir.rglob(name)) for name in (fixed, moving)]
    forth = register_slides(*files, tmp_path / "f.json", mpps=mpps)
    back = register_slides(*files[::-1], tmp_path / "b.json", mpps=mpps)
    for about in (forth, back):
        assert about["landmark_error_um"]["median"] < 16 and about["figures"]["agreeing"] > 0.7
    picture = picture_of(files[0])
    points = (
        np.argwhere(section(cv2.resize(picture, None, fx=mpps[0] / MPP, fy=mpps[0] / MPP)).tissue_HW) + 0.5
    ) * MPP
    there = load_pair(tmp_path / "f.json").transform.points(points)
    again = load_pair(tmp_path / "b.json").transform.points(there)
    assert np.median(np.linalg.norm(again - points, axis=1)) < 40  # µm; two measurements of their own


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["her2st", "mirror", "noise", "distant"])
def test_what_only_looks_alike_is_refused(data_dir: Path, tmp_path: Path, wrong: str) -> None:
    fixed = real(data_dir, *REAL["skin"])
    if wrong == "mirror":
        moving = np.ascontiguousarray(restained(fixed)[:, ::-1])
    elif wrong == "noise":  # its own colours in its own outline, in any order
        moving, inside = fixed.copy(), section(fixed).tissue_HW
        moving[inside] = np.random.default_rng(0).permutation(moving[inside])
        moving = cv2.GaussianBlur(moving, (0, 0), 1.0)
    elif wrong == "distant":  # two sections of one tumour, too far apart to share more than the outline
        fixed, moving = (real(data_dir, f"5714_HE_BT_{name}.jpg", 0.687) for name in ("C2", "D2"))
    else:
        moving = real(data_dir, *REAL["her2st"])
    files = save(tmp_path / "f.png", fixed), save(tmp_path / "m.png", moving)
    with pytest.raises(RegistrationError, match="do not register"):
        register_slides(*files, tmp_path / "p.json", mpps=(8, 8))
    assert [path.name for path in tmp_path.glob("p*")] == ["p.refused.png"]
