"""The report of a run over many slides: every file has its row, and no name of a file acts on the reader."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from wsi_pipeline.api import convert
from wsi_pipeline.config import load_config
from wsi_pipeline.core.geometry import Size
from wsi_pipeline.errors import OutputError
from wsi_pipeline.readers import open_slide
from wsi_pipeline.readers.synthetic import SyntheticSlide
from wsi_pipeline.runs.pictures import PICTURES, after_thumbnail, write_pictures
from wsi_pipeline.runs.records import Record, SlideResult, Status
from wsi_pipeline.runs.report import RunFacts, write_report
from wsi_pipeline.runs.report_page import render_page
from wsi_pipeline.runs.report_text import Lying, cause, elapsed, size
from wsi_pipeline.runs.summary import COLUMNS, summary_bytes, visible
from wsi_pipeline.writers.manifest import SYNTHETIC

FACTS = RunFacts(
    title="frozen sections",
    started="2026-11-24T22:00:00",
    updated="2026-11-25T06:30:00",
    state="finished",
    generator="stain_transfer",
    executor="processes",
    workers=2,
    version="1.2.3",
)
RESULT = SlideResult(
    slide_id="a",
    identity="i",
    fingerprint="f00d",
    reader="tiff",
    stain="h&e",
    mpp=(0.5, 0.25),
    mpp_origin="aperio.MPP",
    tissue_mm2=123.456789,
    tiles=4321,
    blocks=17,
    resumed=0,
    seconds=75.0,
    size_bytes=1_940_000,
    content="ab" * 32,
    disagreement={"largest": 3.0, "mean": 0.25},
)
NASTY = (
    "<img src=x onerror=alert(1)>.svs",
    "javascript:alert(1).svs",
    "\"'><script>alert(1)</script>.svs",
    "a\nb\r\tc\x00\x1b[31m\x85\u2028.svs",
    "invoice\u202egpj.svs",
    "=cmd|'/c calc'!A0.svs",
    "&amp;&#60;b&#62;.svs",
    "\udcff\udc80.svs",
    " 日本 \u3000 عربي.svs",
    "//evil.example/x.svs",
)


class Page(HTMLParser):
    """What a browser would make of a page: its tags with their attributes, and each row's name and text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.rows: dict[str, str] = {}
        self.names: dict[str, str] = {}
        self.words = ""
        self._row = ""
        self._in_name = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.tags.append((tag, values))
        if tag == "tr":
            self._row = values.get("id", "")
        self._in_name |= tag == "bdi"

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr":
            self._row = ""
        self._in_name &= tag != "bdi"

    def handle_data(self, data: str) -> None:
        self.words += data
        if self._row:
            self.rows[self._row] = self.rows.get(self._row, "") + data
            if self._in_name:
                self.names[self._row] = self.names.get(self._row, "") + data

    def values(self, tag: str, attribute: str) -> list[str]:
        return [values[attribute] for name, values in self.tags if name == tag and attribute in values]


def rendered(records: list[Record], folder: Path, facts: RunFacts = FACTS) -> Page:
    return Page(render_page(records, facts, Lying(folder)))


def lines_of(records: list[Record]) -> list[dict[str, str]]:
    text = summary_bytes(records).decode("utf-8-sig")
    assert len(text.splitlines()) == len(records) + 1, "one line a record"
    return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))


def record(source: str, status: Status = "done", **values: object) -> Record:
    return replace(Record(key="k", source=source, status=status), **values)


records_of_any_kind = st.lists(
    st.builds(
        Record,
        key=st.text("abcdef0123456789-_", min_size=1, max_size=12),
        source=st.one_of(st.sampled_from(NASTY), st.text(st.characters(), min_size=1, max_size=40)),
        status=st.sampled_from(["queued", "running", "done", "failed", "skipped"]),
        reason=st.one_of(st.just(""), st.sampled_from(NASTY), st.text(st.characters(), max_size=60)),
        output=st.one_of(st.just(""), st.text(st.characters(), max_size=20)),
        attempts=st.integers(0, 5),
        result=st.one_of(
            st.none(),
            st.builds(
                lambda **values: replace(RESULT, **values),
                slide_id=st.text(st.characters(), max_size=20),
                mpp_origin=st.text(st.characters(), max_size=20),
                warnings=st.lists(st.sampled_from(NASTY), max_size=2).map(tuple),
                no_tissue=st.sampled_from(["", "<b>glass</b>"]),
                seams=st.sampled_from([None, {"pass": True}, {"pass": False}, {"pass": None}]),
                tissue_mm2=st.floats(),
                seconds=st.floats(0, 1e7),
            ),
        ),
    ),
    max_size=6,
)


@given(records=records_of_any_kind, title=st.sampled_from(NASTY))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_text_becomes_markup(tmp_path: Path, records: list[Record], title: str) -> None:
    """A page has no tag, attribute or link but its own, and the names read as they are."""
    facts = replace(FACTS, title=title, why=title, notices=(title,), budgets={title: title})
    facts = replace(facts, state="running", started=title, updated=title)
    page = rendered(records, tmp_path, facts)
    allowed = {"img", "a", "script", "style", "meta", "input", "label", "table", "tr", "td", "th", "bdi", "b"}
    allowed |= {"html", "head", "title", "body", "main", "h1", "h2", "p", "div", "ul", "li", "dl", "dt", "dd"}
    allowed |= {"section", "thead", "tbody", "span", "small", "br", "footer", "details", "summary", "code"}
    counts = Counter(tag for tag, _ in page.tags)
    assert set(counts) <= allowed
    assert counts["script"] == counts["style"] == 1
    assert page.values("p", "data-updated") == [visible(title)]
    assert not page.values("img", "src"), "nothing lies in the folder"
    assert not [key for _, values in page.tags for key in values if key.startswith("on")]
    assert all(link.startswith(("#row", "summary.csv")) for link in page.values("a", "href"))
    found = {row: name for row, name in page.names.items() if row}
    assert found == {f"row{at}": visible(one.source) for at, one in enumerate(records)}
    assert not any(char in page.words for char in "\u202e\x00\x1b\u2028\x85")


@given(records=records_of_any_kind)
@settings(deadline=None)
def test_summary_reads_back(records: list[Record]) -> None:
    for one, line in zip(records, lines_of(records), strict=True):
        assert tuple(line) == COLUMNS
        assert None not in line.values()
        assert line["source"].lstrip("'") == visible(one.source).lstrip("'") or ";" in one.source
        assert line["status"] == one.status
        assert line["attempts"] == str(one.attempts)
        for cell in line.values():
            assert all(not part.lstrip().startswith(("=", "+", "@")) for part in cell.split(";"))


def test_summary_keeps_numbers_and_defuses_formulas() -> None:
    seams = {"pass": None}
    result = replace(RESULT, seams=seams, warnings=("-1 is no pixel size", "b"), disagreement=None)
    texts = ["=1+1", "+1", "-1", "@x", "\t=1", "a;=1", "  =1", "\uff1d1", "plain", "a;b - c", "x\ny", '"q",r']
    lines = lines_of([record(text, result=result) for text in texts])
    shown = ["'=1+1", "'+1", "'-1", "'@x", "\\t=1", "a;'=1", "'  =1", "'\uff1d1", "plain", "a;b - c"]
    assert [line["source"] for line in lines] == [*shown, "x\\ny", '"q",r']
    line = lines[0]
    assert (line["mpp_x"], line["mpp_y"]) == ("0.25", "0.5"), "the record has y before x"
    assert float(line["tissue_mm2"]) == pytest.approx(RESULT.tissue_mm2, abs=1e-4)
    assert [line[key] for key in ("tiles", "blocks", "size_bytes")] == ["4321", "17", "1940000"]
    assert line["content_sha256"] == RESULT.content
    assert line["disagreement_mean"] == ""
    assert line["seams"] == "too little tissue"
    assert line["warnings"] == "'-1 is no pixel size | b"


def test_summary_has_a_mark_for_excel_and_its_line_ends() -> None:
    content = summary_bytes([record("a")])
    assert content.startswith(b"\xef\xbb\xbfsource,status,reason,output,slide_id,mpp_x,mpp_y,")
    assert content.count(b"\r\n") == content.count(b"\n") == 2


@pytest.mark.parametrize("verdict", [(True, "passed"), (False, "failed"), (None, "too little tissue")])
def test_seams_are_told_in_words(verdict: tuple[bool | None, str], tmp_path: Path) -> None:
    figure = {"out": 1.0, "src": 1.0, "ratio": 0.9876, "pass": False}
    result = replace(RESULT, seams={"pass": verdict[0], "border_gradient": figure})
    one = record("a.svs", result=result)
    assert lines_of([one])[0]["seams"] == verdict[1]
    words = rendered([one], tmp_path).rows["row0"]
    assert verdict[1] in words
    assert "gradient × 0.988" in words
    assert ("(failed)" in words) == (verdict[0] is False)


def test_every_record_has_one_row_in_the_given_order(tmp_path: Path) -> None:
    states: list[Status] = ["queued", "running", "done", "failed", "skipped"]
    records = [record(f"s{i}.svs", states[i % 5], key=f"k{i}") for i in range(23)]
    page = rendered(records, tmp_path)
    assert [page.names[f"row{i}"] for i in range(23)] == [one.source for one in records]
    assert [values["id"] for tag, values in page.tags if tag == "tr" and "id" in values] == [
        f"row{i}" for i in range(23)
    ]
    assert "5 of 19 slides converted, 4 failed, 10 not finished; 4 files skipped." in page.words
    classes = Counter(values["class"] for tag, values in page.tags if tag == "tr" and "id" in values)
    assert classes == Counter(one.status for one in records)


def test_no_records(tmp_path: Path) -> None:
    write_report(tmp_path, [], FACTS)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "No file was found." in page.words
    assert SYNTHETIC in page.words
    assert page.rows == {}
    assert lines_of([]) == []


def test_pictures_and_links_appear_only_where_the_files_are(tmp_path: Path) -> None:
    gray_HWC = np.full((40, 60, 3), 128, np.uint8)
    strange = "a b#?%&\"'javascript:x\udcff.ome.zarr"
    one = record("one.svs", key="one", output="sub/one.ome.zarr", result=RESULT)
    two = record("two.svs", key="two", output=strange, result=RESULT)
    out = record("out.svs", key="../../../x", output="../outside.zarr", result=RESULT)
    nothing = record("glass.svs", "skipped", key="no", output="glass.ome.zarr", reason="no tissue: glass")
    folder = tmp_path / "out"
    (folder / "sub" / "one.ome.zarr").mkdir(parents=True)
    (folder / "sub" / "one.ome.zarr.qc.png").touch()
    (folder / strange).mkdir()
    (folder / "glass.ome.zarr.overlay.png").touch()
    (tmp_path / "outside.zarr").touch()
    (tmp_path / "x.before.jpg").touch()
    write_pictures(folder, "one", gray_HWC, gray_HWC)
    write_pictures(folder, "no", gray_HWC, None)
    write_report(folder, [one, two, out, nothing], FACTS)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    names = ("one.before.jpg", "one.after.jpg", "no.before.jpg")
    assert page.values("img", "src") == [f"{PICTURES}/{name}" for name in names]
    assert set(page.values("img", "loading")) == {"lazy"}
    links = [link for link in page.values("a", "href") if link.startswith("./")]
    assert "./sub/one.ome.zarr" in links
    assert "./sub/one.ome.zarr.qc.png" in links
    assert "./glass.ome.zarr.overlay.png" in links
    assert not [link for link in links if ".." in link or "outside" in link]
    assert all(":" not in link and '"' not in link for link in links)
    assert b"./" + strange.encode("utf-8", "surrogateescape") in [unquote_to_bytes(link) for link in links]


def test_failures_with_one_cause_stand_together_with_their_remedy(tmp_path: Path) -> None:
    reason = "{}: no source states the pixel size (found: 0; 0); give it with --mpp"
    records = [record(f"in/s{i}.svs", "failed", reason=reason.format(f"s{i}")) for i in range(30)]
    page = rendered([*records, record("x.svs", "failed", reason="x.svs: is empty")], tmp_path)
    assert page.words.count("No source states the pixel size (found: 0; 0)Give it with --mpp") == 1
    assert "30 slides" in page.words
    assert "--retry-failed" in page.words
    targets = [link for link in page.values("a", "href") if link.startswith("#")]
    assert sorted(targets) == sorted(f"#row{i}" for i in range(31))


@pytest.mark.parametrize(
    ("source", "reason", "expected"),
    [
        ("d/a.svs", "a.svs: is empty; copy it again", ("is empty", "copy it again")),
        ("d/a.ome.tif", "a: is empty (x; y)", ("is empty (x; y)", "")),
        ("d/a.svs", "/in/d/a.svs: no such file", ("no such file", "")),
        ("d/a.svs", "/out/a.ome.zarr: disk full; free some", ("/out/a.ome.zarr: disk full", "free some")),
        ("d/a.svs", "codec: a: bad", ("codec: a: bad", "")),
        ("a.svs", "", ("", "")),
        (".svs", "x; y); z", ("x; y)", "z")),
    ],
)
def test_a_reason_is_taken_apart(source: str, reason: str, expected: tuple[str, str]) -> None:
    assert cause(record(source, "failed", reason=reason)) == expected


def test_what_to_look_at_is_told_apart_from_what_is_fine(tmp_path: Path) -> None:
    records = [
        record("fine.svs", result=replace(RESULT, seams={"pass": True})),
        record("warned.svs", result=replace(RESULT, warnings=("pale stain",))),
        record("seams.svs", result=replace(RESULT, seams={"pass": False})),
        record("tiles.svs", result=replace(RESULT, disagreement={"largest": 40.0, "mean": 2.0})),
        record("failed.svs", "failed", result=replace(RESULT, warnings=("pale stain",))),
    ]
    page = rendered(records, tmp_path)
    assert "Done, but to look at: 3" in page.words
    looked = [values["id"] for tag, values in page.tags if tag == "tr" and "look" in values.get("class", "")]
    assert looked == ["row1", "row2", "row3"]


def test_only_a_running_page_renews_itself(tmp_path: Path) -> None:
    def refreshes(facts: RunFacts) -> bool:
        return "refresh" in rendered([], tmp_path, facts).values("meta", "http-equiv")

    assert refreshes(replace(FACTS, state="running"))
    assert not refreshes(FACTS)
    stopped = replace(FACTS, state="stopped", why="deadline", budgets={"memory": "8 GB promised"})
    assert not refreshes(stopped)
    page = rendered([record("a.svs", "queued")], tmp_path, stopped)
    assert "stopped (deadline) at 2026-11-25 06:30" in page.words
    assert "1 slide is left. Run the same command again" in page.words
    assert "Memory8 GB promised" in page.words
    assert "8 h 30 min" in page.words


def test_the_policy_allows_this_style_and_script_and_no_other(tmp_path: Path) -> None:
    text = render_page([record("a.svs")], FACTS, Lying(tmp_path))
    policy = Page(text).values("meta", "content")[0]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        inside = text.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_thumbnails_are_small_and_hold_pixels_only(tmp_path: Path) -> None:
    before_HWC = np.random.default_rng(0).integers(0, 256, (1000, 500, 3), np.uint8)
    write_pictures(tmp_path, "k", before_HWC, before_HWC[:100, :50])
    for name, expected in (("k.before.jpg", (160, 320)), ("k.after.jpg", (50, 100))):
        content = (tmp_path / PICTURES / name).read_bytes()
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.size == expected
            assert not picture.getexif()
            assert set(picture.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        assert b"\xff\xfe" not in content[: content.index(b"\xff\xda")], "a comment"
    write_pictures(tmp_path, "k", before_HWC, None)
    assert sorted(path.name for path in (tmp_path / PICTURES).iterdir()) == ["k.before.jpg"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / ".wsi_run").touch()
    with pytest.raises(OutputError, match="pictures"):
        write_pictures(tmp_path, "k", np.zeros((1, 1, 3), np.uint8), None)
    with pytest.raises(OutputError, match="summary.csv"):
        write_report(tmp_path / "none", [], FACTS)
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match="report.html"):
        write_report(tmp_path, [], FACTS)
    assert not list(tmp_path.glob(".*.new")), "nothing half-done stays"


def test_after_thumbnail_is_the_smallest_level_that_is_large_enough(tmp_path: Path) -> None:
    slide = SyntheticSlide(size=Size(1200, 1600), tissue_share=0.4)
    config = load_config(None, ["generator.name=identity", "run.threads=1", "output.qc=false"])
    made = convert(slide, tmp_path / "a.ome.zarr", config)
    assert made.path is not None
    finished = open_slide(made.path)
    sizes = [(level.size.height, level.size.width) for level in finished.levels]
    finished.close()
    shown = [(height, width) for height, width in sizes if max(height, width) >= 320][-1]
    thumbnail_HWC = after_thumbnail(made.path)
    assert thumbnail_HWC.shape == (*shown, 3)
    assert len(sizes) > 1
    assert thumbnail_HWC.dtype == np.uint8
    assert thumbnail_HWC.std() > 5, "tissue is on it"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.6, "1 min 0 s"), (3599.7, "1 h 0 min"), (360000, "100 h 0 min")],
)
def test_times_for_people(seconds: float, shown: str) -> None:
    assert elapsed(seconds) == shown


def test_sizes_for_people() -> None:
    assert [size(n) for n in (0, 999, 1_940_000, 81_400_000_000, 2 * 10**15)] == [
        *("0 B", "999 B", "1.94 MB", "81.4 GB", "2,000 TB")
    ]
