"""The tile index: what is measured, kept, resumed, and what reads it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import tifffile

from wsi_pipeline.cohorts import index as index_module
from wsi_pipeline.cohorts.events import Checked, CohortEvent, SlideFailed, SlideTiled
from wsi_pipeline.cohorts.index import make_index
from wsi_pipeline.cohorts.index_file import INDEX_KEY, REASONS, judge
from wsi_pipeline.cohorts.qc_page import KINDS
from wsi_pipeline.cohorts.settings import CohortConfig, FilterConfig, LatticeConfig
from wsi_pipeline.cohorts.tiles import TileReader, load_tiles
from wsi_pipeline.core.geometry import Region
from wsi_pipeline.errors import ConfigError, OutputError, OutputExistsError, SlideError
from wsi_pipeline.readers import open_slide
from wsi_pipeline.readers.lattice import SlideView
from wsi_pipeline.training.data import DataConfig, TileSamples

CONFIG = CohortConfig(
    tiling=LatticeConfig(tile=32), stain="any", filters=FilterConfig(min_sharpness=0.0, max_white=0.5)
)


def write_slide(path: Path, seed: int, *, size: tuple[int, int] = (100, 140), mpp: float = 0.5) -> np.ndarray:
    """A tiled TIFF of noise on its left, glass on its right."""
    pixels = np.random.default_rng(seed).integers(60, 200, (*size, 3), np.uint8)
    pixels[:, size[1] // 2 :] = 245
    path.parent.mkdir(parents=True, exist_ok=True)
    per_cm = (1e4 / mpp, 1e4 / mpp)
    tifffile.imwrite(path, pixels, tile=(64, 64), resolution=per_cm, resolutionunit="CENTIMETER")
    return pixels


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A table of four slides of three patients, tissue everywhere."""
    lines = ["slide,domain,patient,split,mask"]
    for seed, (domain, patient, split) in enumerate(
        [("FF", "a", "train"), ("FFPE", "a", "train"), ("FF", "b", "val"), ("FFPE", "<c>", "test")]
    ):
        write_slide(tmp_path / "slides" / f"s{seed}.tif", seed)
        lines.append(f"slides/s{seed}.tif,{domain},{patient},{split},whole")
    (tmp_path / "cohort.csv").write_text("\n".join(lines))
    return tmp_path


def build(study: Path, config: CohortConfig = CONFIG, **options: Any) -> tuple[Any, list[CohortEvent]]:
    events: list[CohortEvent] = []
    result = make_index(study / "cohort.csv", study / "i.parquet", config, emit=events.append, **options)
    return result, events


def rows(study: Path) -> dict[str, list[Any]]:
    return dict(parquet.read_table(study / "i.parquet").to_pydict())


def test_every_whole_tile_of_the_lattice_is_a_row_with_its_scores(study: Path) -> None:
    result, events = build(study)
    table = rows(study)
    assert (result.tiles, result.slides, result.failed) == (4 * 3 * 4, 4, {})
    assert [(y, x) for y, x in zip(table["y"], table["x"], strict=True)][:5] == [
        (0, 0),
        (0, 32),
        (0, 64),
        (0, 96),
        (32, 0),
    ]
    assert set(table["height"]) == set(table["width"]) == {32}
    assert table["slide"][0] == "slides/s0.tif"
    assert (table["domain"][12], table["patient"][12], table["split"][24]) == ("FFPE", "a", "val")
    assert set(table["tissue"]) == {1.0}
    # x = 64 is 6 of 32 columns of tissue, x = 96 glass alone.
    assert table["white"][:4] == pytest.approx([0, 0, 0.81, 1.0], abs=0.03)
    assert table["keep"][:4] == [True, True, False, False]
    assert table["reason"][:4] == ["", "", "white", "white"]
    assert result.counts == {("FF", "train"): 6, ("FFPE", "train"): 6, ("FF", "val"): 6, ("FFPE", "test"): 6}
    assert events[0] == Checked(slides=4, resumed=0, notices=())
    tiled = [event for event in events if isinstance(event, SlideTiled)]
    assert [(event.slide, event.tiles, event.done) for event in tiled] == [
        (f"s{i}.tif", 12, i + 1) for i in range(4)
    ]


def test_the_index_reads_the_pixels_that_the_slide_shows(study: Path) -> None:
    build(study)
    tiles = load_tiles(study / "i.parquet")
    assert (len(tiles), tiles.tile, tiles.mpp, tiles.icc) == (24, 32, (0.5, 0.5), "srgb")
    assert len(load_tiles(study / "i.parquet", everything=True)) == 48
    ffpe = tiles.select("FFPE", "test")
    assert (len(ffpe), set(ffpe.patient_N)) == (6, {"<c>"})
    reader = TileReader(tiles, open_slides=1)
    for row in (0, 7, 23):
        y, x, height, width = tiles.region_N4[row]
        whole = tifffile.imread(tiles.slide(row).path)
        np.testing.assert_array_equal(reader.read(row), whole[y : y + height, x : x + width])
    assert reader.read(3, Region(1, 2, 5, 7)).shape == (5, 7, 3)


def test_other_filters_may_be_asked_of_the_same_index(study: Path) -> None:
    build(study)
    strict = FilterConfig(max_white=0.0, min_sharpness=0.0)
    assert len(load_tiles(study / "i.parquet", filters=strict)) == 24
    assert len(load_tiles(study / "i.parquet", filters=FilterConfig(max_white=1.0, min_sharpness=0.0))) == 48
    with pytest.raises(ConfigError, match="no tile has"):
        load_tiles(study / "i.parquet").select("FF", "test")
    with pytest.raises(ConfigError, match=r"its tiles have 0.5 µm per pixel, not 0.25"):
        load_tiles(study / "i.parquet", mpp=0.25)
    assert load_tiles(study / "i.parquet", mpp=0.49).mpp == (0.5, 0.5)


def test_training_takes_its_tiles_from_the_index(study: Path) -> None:
    build(study)
    index = str(study / "i.parquet")
    config = DataConfig(source=index, target=index, source_domain="FF", target_domain="FFPE", split="train")
    samples = TileSamples(replace(config, crop=32, augment="none"), seed=0)
    assert samples.length == 6
    assert {samples.sample(number)[1].tobytes() for number in range(6)} <= {
        TileReader(tiles).read(row).tobytes()
        for tiles in [load_tiles(index).select("FFPE", "train")]
        for row in range(6)
    }


def test_registered_slides_are_aligned_by_pair_and_region(study: Path) -> None:
    table = (
        (study / "cohort.csv")
        .read_text()
        .replace("slide,", "pair,slide,")
        .replace("\nslides", "\nP,slides", 2)
    )
    (study / "cohort.csv").write_text(table.replace("\nslides", "\n,slides"))
    build(study)
    index = str(study / "i.parquet")
    config = DataConfig(
        source=index, target=index, source_domain="FF", target_domain="FFPE", pairing="aligned"
    )
    samples = TileSamples(replace(config, split=None, crop=32, augment="none"), seed=0)
    assert (samples.length, samples.left_out) == (6, 12)


def test_the_lattice_is_the_slides_own_where_that_is_near_enough(study: Path) -> None:
    for name, mpp in (("near", 0.26), ("far", 0.36), ("coarse", 1.0)):
        write_slide(study / f"{name}.tif", 7, size=(200, 280), mpp=mpp)
    lines = ["slide,domain,mask", "near.tif,FF,whole", "far.tif,FFPE,whole", "coarse.tif,FF,whole"]
    (study / "cohort.csv").write_text("\n".join(lines))
    result, events = build(study)
    tiles = load_tiles(study / "i.parquet", everything=True)
    lattices = {slide.name: slide.lattice for slide in tiles.slides}
    assert lattices == {"near.tif": pytest.approx((0.52, 0.52)), "far.tif": (0.5, 0.5)}
    for row in (0, len(tiles) - 1):
        entry = tiles.slide(row)
        view = SlideView(open_slide(entry.path), entry.lattice)
        np.testing.assert_array_equal(TileReader(tiles).read(row), view.read(tiles.region(row)))
    assert "too coarse for tiles of 0.5" in result.failed["coarse.tif"]
    failures = [event for event in events if isinstance(event, SlideFailed)]
    assert [event.slide for event in failures] == ["coarse.tif"]
    exact = replace(CONFIG, tiling=LatticeConfig(tile=32, tolerance=0.0))
    make_index(study / "cohort.csv", study / "exact.parquet", exact)
    assert {slide.lattice for slide in load_tiles(study / "exact.parquet").slides} == {(0.5, 0.5)}


def test_overlapping_tiles_by_stride(study: Path) -> None:
    result, _ = build(study, replace(CONFIG, tiling=LatticeConfig(tile=32, stride=16)))
    assert result.tiles == 4 * 5 * 7
    assert sorted(set(rows(study)["x"])) == [0, 16, 32, 48, 64, 80, 96]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the slides that are measured."""
    measured: list[str] = []
    real = index_module.tile_slide

    def tile_slide(job: Any) -> None:
        measured.append(job.slide.name)
        real(job)

    monkeypatch.setattr(index_module, "tile_slide", tile_slide)
    return measured


def test_a_run_that_was_stopped_goes_on_with_what_is_missing(study: Path, counted: list[str]) -> None:
    def stop(event: CohortEvent) -> None:
        if isinstance(event, SlideTiled) and event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_index(study / "cohort.csv", study / "i.parquet", CONFIG, emit=stop)
    assert not (study / "i.parquet").exists()
    _, events = build(study)
    assert counted == ["s0.tif", "s1.tif", "s2.tif", "s3.tif"]
    assert isinstance(events[0], Checked)
    assert events[0].resumed == 2
    first = (study / "i.parquet").read_bytes()
    build(study)
    assert len(counted) == 4
    assert (study / "i.parquet").read_bytes() == first


def test_a_damaged_part_is_measured_again(study: Path, counted: list[str]) -> None:
    build(study)
    first = rows(study)
    parts = sorted((study / "i.parts").iterdir())
    parts[0].write_bytes(parts[0].read_bytes()[:200])
    parts[1].write_bytes(b"")
    build(study)
    assert len(counted) == 6
    assert rows(study) == first


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda c: replace(c, filters=FilterConfig(max_white=1.0)), 0),
        (lambda c: replace(c, split=replace(c.split, seed=3)), 0),
        (lambda c: replace(c, tiling=LatticeConfig(tile=48)), 4),
        (lambda c: replace(c, frozen=replace(c.frozen, low_od=0.03)), 2),
        (lambda c: replace(c, icc="ignore"), 4),
    ],
    ids=["filters", "split", "tile", "tissue of one domain", "icc"],
)
def test_only_what_a_setting_changes_is_measured_again(
    study: Path, counted: list[str], change: Callable[[CohortConfig], CohortConfig], again: int
) -> None:
    build(study)
    with pytest.raises(OutputExistsError, match="other settings; use --overwrite"):
        build(study, change(CONFIG))
    build(study, change(CONFIG), overwrite=True)
    assert len(counted) == 4 + again


def test_a_full_disk_ends_the_run_with_its_name(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parquet, "write_table", full)
    with pytest.raises(OutputError, match=r"i\.parts.*cannot be written \(No space left on device\)"):
        build(study)


def test_a_changed_slide_or_mask_is_measured_again(study: Path, counted: list[str]) -> None:
    polygon = {"type": "Polygon", "coordinates": [[[0, 0], [60, 0], [60, 60], [0, 60], [0, 0]]]}
    (study / "m.geojson").write_text(json.dumps(polygon))
    text = (study / "cohort.csv").read_text()
    (study / "cohort.csv").write_text(text.replace("val,whole", "val,m.geojson"))
    build(study)
    write_slide(study / "slides" / "s0.tif", 77)
    polygon["coordinates"][0][1] = [40, 0]  # type: ignore[index]
    (study / "m.geojson").write_text(json.dumps(polygon))
    build(study, overwrite=True)
    assert counted[4:] == ["s0.tif", "s2.tif"]


def test_processes_make_the_same_index(study: Path) -> None:
    build(study)
    one = parquet.read_table(study / "i.parquet")
    result = make_index(study / "cohort.csv", study / "two.parquet", CONFIG, workers=2)
    assert result.kept == 24
    assert parquet.read_table(study / "two.parquet").equals(one)


def test_the_index_moves_with_its_slides(study: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    build(study)
    moved = tmp_path_factory.mktemp("moved") / "study"
    study.rename(moved)
    assert TileReader(load_tiles(moved / "i.parquet")).read(0).shape == (32, 32, 3)


def test_a_slide_that_changed_since_is_refused_when_it_is_read(study: Path) -> None:
    build(study)
    write_slide(study / "slides" / "s0.tif", 78)
    with pytest.raises(SlideError, match=r"s0\.tif: is not the file of which .*i\.parquet was made"):
        TileReader(load_tiles(study / "i.parquet")).read(0)


def test_what_is_no_index_of_ours_is_never_replaced_and_never_read(study: Path) -> None:
    parquet.write_table(pyarrow.table({"a": [1]}), study / "i.parquet")
    with pytest.raises(OutputExistsError, match="is no tile index; choose another name"):
        build(study)
    with pytest.raises(ConfigError, match="is no tile index; make one"):
        load_tiles(study / "i.parquet")
    (study / "text.csv").write_text("slide")
    with pytest.raises(ConfigError, match="is no tile index"):
        load_tiles(study / "text.csv")
    with pytest.raises(ConfigError, match=r"name a \.parquet file"):
        make_index(study / "cohort.csv", study / "i.csv", CONFIG)


def test_a_page_of_somebody_else_is_not_replaced_unasked(study: Path, counted: list[str]) -> None:
    page = study / "i.html"
    page.write_text("<!doctype html><html lang='en'>my own page")
    with pytest.raises(OutputExistsError, match=r"i\.html: exists and is no quality page"):
        build(study)
    assert (counted, (study / "i.parts").exists()) == ([], False)
    assert page.read_text().endswith("my own page")
    build(study, overwrite=True)
    assert "my own page" not in page.read_text()
    build(study)  # our own page is


@pytest.mark.parametrize(
    "damage",
    [
        lambda t, about: (t.drop(["y"]), about),
        lambda t, about: (t.drop(["keep"]), about),
        lambda t, about: (t.set_column(t.column_names.index("x"), "x", [pyarrow.nulls(48)]), about),
        lambda t, about: (t, {name: about[name] for name in about if name != "mpp"}),
        lambda t, about: (t, about | {"mpp": [0.5, 0.5]}),
        lambda t, about: (t, about | {"mpp": -1.0}),
        lambda t, about: (t, about | {"icc": "other"}),
    ],
    ids=["no y", "no keep", "empty x", "no mpp", "two mpp", "negative mpp", "icc"],
)
def test_an_index_that_lacks_something_is_refused_by_name(study: Path, damage: Callable[..., Any]) -> None:
    build(study)
    table = parquet.read_table(study / "i.parquet")
    table, about = damage(table, json.loads(table.schema.metadata[INDEX_KEY]))
    metadata = {INDEX_KEY: json.dumps(about).encode()}
    parquet.write_table(table.replace_schema_metadata(metadata), study / "bad.parquet")
    with pytest.raises(ConfigError, match=r"bad\.parquet: the tile index is damaged") as caught:
        load_tiles(study / "bad.parquet")
    assert "wsi-pipeline tile" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_index_with_bad_bytes_is_refused_by_name(study: Path) -> None:
    build(study)
    content = bytearray((study / "i.parquet").read_bytes())
    content[40:400] = b"\xff" * 360
    (study / "i.parquet").write_bytes(content)
    with pytest.raises(ConfigError, match=r"i\.parquet: the tile index is damaged"):
        load_tiles(study / "i.parquet")


def test_an_index_of_nothing_is_an_error(study: Path) -> None:
    write_slide(study / "coarse.tif", 1, mpp=4.0)
    (study / "cohort.csv").write_text("slide,domain\ncoarse.tif,FF")
    with pytest.raises(SlideError, match="no slide could be tiled; the first: coarse: 4 µm"):
        build(study)
    assert sorted(path.name for path in study.iterdir() if path.name.startswith("i.")) == ["i.parts"]


def test_normal_tissue_may_be_left_out(study: Path) -> None:
    for name in ("TCGA-18-3408-11A-01-TS1.tif", "TCGA-18-3408-01A-01-TS1.tif"):
        write_slide(study / name, len(name) + int(name[13:15]))
    lines = ["slide,mask", "TCGA-18-3408-11A-01-TS1.tif,whole", "TCGA-18-3408-01A-01-TS1.tif,whole"]
    (study / "cohort.csv").write_text("\n".join(lines))
    result, events = build(study, replace(CONFIG, normal="drop"))
    assert result.slides == 1
    assert isinstance(events[0], Checked)
    assert "left out, for they are normal tissue: 1" in events[0].notices


def test_another_stain_is_refused_unless_the_user_says_so(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "cohort.csv").write_text(f"slide,domain,mpp\n{data_dir / 'ihc' / 'skimage_ihc.png'},FFPE,0.5")
    with pytest.raises(SlideError, match="does not look like H&E.*stain=any"):
        build(tmp_path, replace(CONFIG, stain="h&e"))
    assert build(tmp_path)[0].slides == 1


def test_the_first_reason_that_applies_is_given() -> None:
    good = {"tissue": 1.0, "pen": 0.0, "white": 0.0, "black": 0.0, "sharpness": 1.0}
    good |= {"red": 180.0, "green": 120.0, "blue": 160.0}
    cases = [
        ({}, ""),
        ({"tissue": 0.4, "pen": 1.0}, "tissue"),
        ({"pen": 0.1, "white": 1.0}, "pen"),
        ({"white": 0.9, "sharpness": 0.0}, "white"),
        ({"black": 0.2}, "black"),
        ({"red": 217.0, "sharpness": 0.0}, "colour"),
        ({"green": 79.0}, "colour"),
        ({"sharpness": 0.1}, "blur"),
    ]
    columns = {name: np.array([(good | case)[name] for case, _ in cases], np.float32) for name in good}
    found = judge(pyarrow.table(columns), FilterConfig(preset="ai-ffpe"))
    assert [REASONS[number] for number in found] == [reason for _, reason in cases]
    without = judge(pyarrow.table(columns), FilterConfig(min_sharpness=0.0))
    assert [REASONS[number] for number in without[5:]] == ["", "", ""]
    assert judge(pyarrow.table(columns), FilterConfig(red=(0.0, 100.0)))[0] == REASONS.index("colour")
    assert [kind for kind, _, _ in KINDS] == list(REASONS)


def test_the_page_is_one_file_without_patients(study: Path) -> None:
    os.rename(study / "slides" / "s3.tif", study / "slides" / "s<b>3.tif")
    text = (study / "cohort.csv").read_text().replace("s3.tif", "s<b>3.tif").replace(",b,val", ",SECRET,val")
    (study / "cohort.csv").write_text(text)
    result, _ = build(study)
    page = result.page.read_text()
    assert "s&lt;b&gt;3.tif" in page
    assert "<b>3" not in page
    assert "SECRET" not in page
    assert not re.search(r"(src|href)=['\"](?!data:)", page)
    assert "24 of 48 tiles serve, from 4 slides; 32 px at 0.5 µm" in page
    assert page.count("<article>") == 4
    assert page.count("data:image/jpeg") == 12


def test_settings_that_cannot_work_are_refused() -> None:
    for settings in ({"mpp": 0.0}, {"tile": 0}, {"stride": 0}, {"tolerance": 1.0}):
        with pytest.raises(ConfigError, match="tiling"):
            LatticeConfig(**settings)  # type: ignore[arg-type]
