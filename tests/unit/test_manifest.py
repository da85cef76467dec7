"""The table of a study: everything wrong with it is told at once, nothing else is assumed silently."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from wsi_pipeline.cohorts.manifest import Cohort, read_cohort
from wsi_pipeline.cohorts.names import place_of
from wsi_pipeline.cohorts.splits import SplitConfig, draw_split
from wsi_pipeline.errors import ConfigError


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Six small pictures, named like slides; each needs its mpp from the table."""
    (tmp_path / "slides").mkdir()
    for seed in range(6):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "slides" / f"s{seed}.png")
    barcode = "TCGA-18-3408-{}.png"
    shutil.copy(tmp_path / "slides" / "s0.png", tmp_path / "slides" / barcode.format("11A-01-TS1"))
    return tmp_path


def table(study: Path, *lines: str, name: str = "cohort.csv", encoding: str = "utf-8") -> Path:
    path = study / name
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def problems(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_cohort(path)
    text = str(caught.value)
    assert "\n" not in text
    assert path.name in text
    return text


def test_a_full_table_is_taken_as_it_is(study: Path) -> None:
    (study / "m.geojson").write_text("{}")
    path = table(
        study,
        "Slide, domain ,patient,split,mpp,mpp_y,mask,pair,stage",
        'slides/s0.png,FF,"p, 1",train,0.5,,,a,IV',
        "slides/s1.png,ffpe,p2,validation,0.25,0.5,m.geojson,a,",
        f"{study}/slides/s2.png,paraffin,p3,test,0.5,,whole,,",
        ",,,,,,,,",
    )
    cohort = read_cohort(path)
    first, second, third = cohort.slides
    assert cohort.notices == ()
    assert (first.name, first.domain, first.patient, first.split) == ("s0.png", "FF", "p, 1", "train")
    assert first.path == str(study / "slides" / "s0.png")
    assert (first.mpp, first.mask, first.pair, first.normal) == ((0.5, 0.5), "detect", "a", False)
    assert (second.domain, second.split, second.mpp) == ("FFPE", "val", (0.5, 0.25))
    assert (second.mask, third.mask, third.domain) == (str(study / "m.geojson"), "whole", "FFPE")
    assert len({slide.identity for slide in cohort.slides}) == 3


@pytest.mark.parametrize(("delimiter", "encoding"), [(";", "utf-8-sig"), ("\t", "utf-8")])
def test_what_spreadsheets_write_is_read(study: Path, delimiter: str, encoding: str) -> None:
    lines = [("slide", "domain", "mpp"), ("slides/s0.png", "FF", "0,5"), ("slides/s1.png", "FF", "0,25")]
    path = table(study, *(delimiter.join(cells) for cells in lines), encoding=encoding)
    assert [slide.mpp for slide in read_cohort(path).slides] == [(0.5, 0.5), (0.25, 0.25)]


def test_parquet_and_csv_are_the_same_table(study: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = {"slide": ["slides/s0.png", "slides/s1.png"], "domain": ["FF", "FFPE"], "mpp": [0.5, 0.25]}
    rows |= {"patient": ["a", None], "split": ["train", "val"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), study / "cohort.parquet")
    lines = ["slide,domain,mpp,patient,split", "slides/s0.png,FF,0.5,a,train", "slides/s1.png,FFPE,0.25,,val"]
    assert read_cohort(study / "cohort.parquet").slides == read_cohort(table(study, *lines)).slides


def test_every_problem_is_told_with_its_row(study: Path) -> None:
    (study / "broken.svs").write_bytes(b"no slide")
    text = problems(
        table(
            study,
            "slide,domain,patient,split,mpp,mask",
            "slides/s0.png,FF,p1,train,0.5,",
            "slides/absent.svs,FF,p2,train,0.5,",
            "slides/s1.png,frosted,p3,train,0.5,",
            "slides/s2.png,FF,p4,trian,0.5,",
            "slides/s3.png,FF,p5,train,-1,",
            "slides/s4.png,FF,p6,train,,",
            "broken.svs,FF,p7,train,0.5,none.geojson",
            "slides/../slides/s0.png,FF,p1,train,0.5,",
            "slides/s5.png,FFPE,p1,test,0.5,",
            ",FF,p8,train,0.5,",
        )
    )
    for expected in (
        "line 3: slides/absent.svs: no such file",
        "line 4: domain 'frosted' is neither FF nor FFPE",
        "line 5: split 'trian' is none of train, val, test",
        "line 6: mpp '-1' is no pixel size",
        "line 7: s4.png: no source states the pixel size; give it in the column mpp",
        "line 8: mask none.geojson: no such file",
        "line 8: broken.svs: no reader opens it",
        "line 9: s0.png is the same slide of line 2; keep one row",
        "patient p1 is in several splits: train (line 2, FF), train (line 9, FF), test (line 10, FFPE)",
        "line 11: no slide",
    ):
        assert expected in text
    assert "11 problems: " in text  # s3 has no usable mpp either


def test_only_so_many_problems_are_spelled_out(study: Path) -> None:
    text = problems(table(study, "slide", *(f"absent{i}.svs" for i in range(60))))
    assert "120 problems" in text
    assert text.count("no such file") <= 20
    assert "and 100 more" in text


def test_the_same_file_under_two_names_is_told(study: Path) -> None:
    shutil.copy(study / "slides" / "s1.png", study / "copy.png")
    lines = ["slide,domain,mpp", "slides/s1.png,FF,0.5", "copy.png,FFPE,0.5"]
    assert "line 3: copy.png is the same file as s1.png, of line 2" in problems(table(study, *lines))


def test_a_split_for_some_rows_is_a_problem(study: Path) -> None:
    lines = ["slide,domain,mpp,split", "slides/s1.png,FF,0.5,train", "slides/s2.png,FF,0.5,"]
    assert "line 3: no split, where others have one" in problems(table(study, *lines))


def test_a_barcode_fills_in_what_the_table_leaves_out(study: Path) -> None:
    path = table(study, "slide,mpp", "slides/TCGA-18-3408-11A-01-TS1.png,0.5")
    slide = read_cohort(path).slides[0]
    assert (slide.domain, slide.patient, slide.normal) == ("FF", "TCGA-18-3408", True)
    assert "states no domain" in problems(table(study, "slide,mpp", "slides/s1.png,0.5"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file,domain", "a,FF"], "has no column slide"),
        (["slide,domian", "a,FF"], "column 'domian' is unknown; is it 'domain'?"),
        (["slide,domain", "a,FF,train"], "line 2: has more cells than the first line"),
        (["slide,domain"], "names no slide"),
        ([""], "has no column slide"),
        (["slide,domain,mpp,MPP ", "slides/s0.png,FF,0.25,"], "column 'mpp' is there 2 times; keep one"),
    ],
)
def test_a_table_that_is_none_is_refused(study: Path, lines: list[str], message: str) -> None:
    assert message in problems(table(study, *lines))


def test_files_that_are_no_table_are_refused(study: Path) -> None:
    assert "cannot be read" in problems(study / "absent.csv")
    (study / "text.csv").write_bytes(b"slide\n\xff\xfe")
    assert "not a UTF-8 text" in problems(study / "text.csv")
    (study / "no.parquet").write_bytes(b"PAR1")
    assert "no Parquet file" in problems(study / "no.parquet")


def test_a_parquet_table_with_a_doubled_or_damaged_column_is_refused_as_such(study: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = [pyarrow.array(["slides/s0.png"] * 400), *[pyarrow.array(["a"] * 400)] * 2]
    doubled = pyarrow.Table.from_arrays(columns, ["slide", "patient", "Patient"])
    for names in (["slide", "patient", "Patient"], ["slide", "patient", "patient"]):
        pyarrow.parquet.write_table(doubled.rename_columns(names), study / "two.parquet")
        assert "column 'patient' is there 2 times; keep one" in problems(study / "two.parquet")
    content = bytearray((study / "two.parquet").read_bytes())
    content[20:60] = b"\xff" * 40
    (study / "bad.parquet").write_bytes(content)
    problems(study / "bad.parquet")


def test_columns_without_a_name_may_be_several(study: Path) -> None:
    cohort = read_cohort(table(study, "slide,domain,mpp,,", "slides/s0.png,FF,0.5,,"))
    assert [slide.name for slide in cohort.slides] == ["s0.png"]


def test_another_spelling_is_no_other_patient(study: Path) -> None:
    rows = ["slides/s0.png,FF,p1,train,0.5", "slides/s1.png,FFPE,P1 ,val,0.5"]
    text = problems(table(study, "slide,domain,patient,split,mpp", *rows))
    assert "patient p1 or P1 is in several splits: train (line 2, FF), val (line 3, FFPE)" in text
    for number in range(40):
        one, other = (draw_split(name, SplitConfig()) for name in (f"case {number}", f" CASE {number}"))
        assert one == other


def test_a_link_that_leads_back_ends_the_walk(study: Path) -> None:
    root = study / "loop" / "FF"
    root.mkdir(parents=True)
    for seed, name in enumerate(["b.tif", "a.tif"]):
        pixels = np.full((32, 32, 3), seed, np.uint8)
        tifffile.imwrite(root / name, pixels, resolution=(20000, 20000), resolutionunit="CENTIMETER")
    (root / "again").symlink_to("..")
    found = read_cohort(study / "loop").slides
    assert [slide.path for slide in found] == [str(root / "a.tif"), str(root / "b.tif")]


def slides_of(cohort: Cohort) -> list[tuple[str, str, str]]:
    return [(slide.name, slide.domain, slide.split) for slide in cohort.slides]


def test_a_folder_of_slides_is_a_cohort(study: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("slides")
    for seed, name in enumerate(["trainA/x.tif", "FFPE/test/y.tif", ".trash/z.tif"]):
        (root / name).parent.mkdir(parents=True)
        pixels = np.full((32, 32, 3), seed, np.uint8)
        tifffile.imwrite(root / name, pixels, resolution=(20000, 20000), resolutionunit="CENTIMETER")
    assert slides_of(read_cohort(root)) == [("y.tif", "FFPE", "test"), ("x.tif", "FF", "train")]
    assert "holds pictures, no slides" in problems(study / "slides")
    (study / "empty").mkdir()
    assert "holds no slide" in problems(study / "empty")


@pytest.mark.parametrize(
    ("folders", "place"),
    [
        (("trainA",), ("FF", "train", ())),
        (("Valid_b", "case 1"), ("FFPE", "val", ("case 1",))),
        (("ffpe", "TEST"), ("FFPE", "test", ())),
        (("frozen",), ("FF", "", ())),
        (("training",), ("", "", ("training",))),
        ((), ("", "", ())),
    ],
)
def test_folder_names_state_domain_and_split(folders: tuple[str, ...], place: Any) -> None:
    assert place_of(folders) == place


def test_splits_are_drawn_by_patient_over_both_domains(study: Path) -> None:
    rows = [f"slides/s{i}.png,{domain},p{i // 2},0.5" for i, domain in enumerate(["FF", "FFPE"] * 3)]
    cohort = read_cohort(table(study, "slide,domain,patient,mpp", *rows))
    by_patient = {slide.patient: slide.split for slide in cohort.slides}
    assert all(slide.split == by_patient[slide.patient] for slide in cohort.slides)
    assert "patients were drawn with seed 0" in cohort.notices[0]
    other = read_cohort(study / "cohort.csv", split=SplitConfig(train=0, val=1, test=0))
    assert {slide.split for slide in other.slides} == {"val"}


def test_slides_without_patient_are_patients_of_their_own(study: Path) -> None:
    cohort = read_cohort(table(study, "slide,domain,mpp", "slides/s1.png,FF,0.5", "slides/s2.png,FF,0.5"))
    assert [slide.patient for slide in cohort.slides] == ["s1.png", "s2.png"]
    assert "2 slides state no patient" in cohort.notices[0]


def test_shares_of_patients_are_as_asked_and_nobody_moves_when_others_join() -> None:
    config = SplitConfig(train=0.6, val=0.3, test=0.1, seed=4)
    drawn = {f"p{i}": draw_split(f"p{i}", config) for i in range(4000)}
    for name, share in (("train", 0.6), ("val", 0.3), ("test", 0.1)):
        assert list(drawn.values()).count(name) / 4000 == pytest.approx(share, abs=0.03)
    moved = {name for name in drawn if draw_split(name, SplitConfig(seed=5)) != drawn[name]}
    assert 1000 < len(moved) < 3000


@given(patient=st.text(max_size=20), seed=st.integers(0, 99))
def test_a_share_of_nothing_gets_nobody(patient: str, seed: int) -> None:
    assert draw_split(patient, SplitConfig(train=0.5, val=0.5, test=0.0, seed=seed)) != "test"
    assert draw_split(patient, SplitConfig(train=1.0, val=0.0, test=0.0, seed=seed)) == "train"


def test_shares_that_do_not_sum_to_one_are_refused() -> None:
    for shares in ((0.5, 0.2, 0.2), (1.2, -0.2, 0.0)):
        with pytest.raises(ConfigError, match="numbers that sum to 1"):
            SplitConfig(train=shares[0], val=shares[1], test=shares[2])
