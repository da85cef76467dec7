"""A row for every file, and none of the tricks of a hostile or merely untidy folder gets through."""

from __future__ import annotations

import json
import os
import socket
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.runs.dicom import WHOLE_SLIDE, read_instance
from wsi_pipeline.runs.inputs import Found, find_inputs, is_many, stamp
from wsi_pipeline.writers.manifest import SYNTHETIC

TIFF = b"II*\0" + bytes(300)


def put(path: Path, data: bytes = TIFF) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def look(given: Path | str, *, links: bool = False, exclude: Path | None = None) -> dict[str, Found]:
    """All rows by source; their sources are unique and sorted (but for a table's), their texts one line."""
    rows = find_inputs(str(given), links=links, exclude=exclude, may_be_empty=True)
    sources = [row.source for row in rows]
    assert len(set(sources)) == len(sources)
    assert not Path(given).is_dir() or sources == sorted(sources)
    for row in rows:
        assert row.source.isprintable() and row.skip.isprintable()
        json.dumps([row.source, row.skip], ensure_ascii=False).encode("utf-8")
        assert row.skip or not row.unknown
    return {row.source: row for row in rows}


def slides(rows: dict[str, Found]) -> list[str]:
    return [source for source, row in rows.items() if not row.skip]


def zarr(path: Path, *, synthetic: bool = False) -> Path:
    put(path / "zarr.json", b"{}")
    put(path / "0" / "c" / "0", b"chunk")
    if synthetic:
        put(path / "manifest.json", json.dumps({"notice": SYNTHETIC}).encode())
    return path


# --- what is many ---


def test_many_is_a_folder_a_table_or_a_pattern(tmp_path: Path) -> None:
    store, odd = zarr(tmp_path / "a.ome.zarr"), put(tmp_path / "a[1].svs")
    assert is_many(str(tmp_path)) and is_many("x.csv") and is_many("X.TSV") and is_many("list.txt")
    assert is_many(str(tmp_path / "*.svs")) and is_many("**/a?.svs")
    assert not is_many(str(store)) and not is_many(str(odd)) and not is_many("missing.svs")
    assert not is_many("s3://bucket/*.svs")
    (tmp_path / "new.zarr").mkdir()
    assert not is_many(str(tmp_path / "new.zarr"))


# --- kinds ---


def test_every_file_has_a_row_but_the_hidden(tmp_path: Path) -> None:
    for name in ("b.SVS", "sub/deep/c.ndpi", "a.czi", "x/1.2.840.10008"):
        put(tmp_path / name)
    for name in ("letter.docx", "sub/notes.txt", "image.vsi", "raw.dng"):
        put(tmp_path / name)
    for name in (".DS_Store", ".git/x.svs", "Thumbs.db", "sub/._c.ndpi", "@eaDir/b.svs"):
        put(tmp_path / name)
    rows = look(tmp_path)
    assert slides(rows) == ["a.czi", "b.SVS", "sub/deep/c.ndpi", "x/1.2.840.10008"]
    assert {source for source, row in rows.items() if row.unknown} == {
        *("letter.docx", "sub/notes.txt", "image.vsi", "raw.dng")
    }
    assert len(rows) == 8
    assert "export it as a pyramidal OME-TIFF" in rows["image.vsi"].skip


@pytest.mark.parametrize("name", ["a.svs.part", "a.tmp", "a.svs.crdownload", "a.filepart", "a.svs~"])
def test_unfinished_copies_are_no_slides(tmp_path: Path, name: str) -> None:
    put(tmp_path / name)
    row = look(tmp_path)[name]
    assert "unfinished copy" in row.skip and not row.unknown


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("a.zip", b""),
        ("a.tar.gz", b""),
        ("a.7z", b""),
        ("a.svs", b"PK\x03\x04"),
        ("a.tif", b"\x1f\x8b\x08"),
        ("a.ndpi", b"Rar!\x1a\x07\x01\x00"),
        ("a.scn", bytes(257) + b"ustar\x0000"),
    ],
)
def test_archives_are_named_as_such(tmp_path: Path, name: str, head: bytes) -> None:
    put(tmp_path / name, head + b"....")
    assert "an archive" in look(tmp_path)[name].skip
    assert "unpack it first" in look(tmp_path)[name].skip


def test_pictures_beside_slides_are_left_unless_they_are_asked_for(tmp_path: Path) -> None:
    put(tmp_path / "a.svs")
    put(tmp_path / "overview.jpg", b"\xff\xd8")
    put(tmp_path / "label.PNG", b"\x89PNG")
    rows = look(tmp_path)
    assert slides(rows) == ["a.svs"]
    assert "name it in a table" in rows["overview.jpg"].skip and not rows["label.PNG"].unknown
    assert slides(look(tmp_path / "*.jpg")) == ["overview.jpg"]
    table = put(tmp_path / "t.csv", b"slide,mpp\noverview.jpg,0.5\n")
    assert slides(look(table)) == ["overview.jpg"]


def test_own_outputs_are_not_translated_again(tmp_path: Path) -> None:
    put(tmp_path / "a.svs")
    zarr(tmp_path / "a.ome.zarr", synthetic=True)
    zarr(tmp_path / "b.ome.zarr.partial")
    zarr(tmp_path / "c.ome.zarr")
    put(tmp_path / "d.ome.tif")
    put(tmp_path / "d.ome.tif.manifest.json", json.dumps({"notice": SYNTHETIC}).encode())
    put(tmp_path / "e.ome.tif")
    put(tmp_path / "e.ome.tif.manifest.json", json.dumps({"notice": "of a study"}).encode())
    for name in ("a.ome.zarr.qc.png", "a.ome.zarr.lock", "f.ome.tif.export", "g.ome.tif.partial"):
        put(tmp_path / name)
    put(tmp_path / "old" / ".wsi_run" / "slides" / "key.json")
    for name in ("run.json", "summary.csv", "report.html", "x.svs"):
        put(tmp_path / "old" / name)
    rows = look(tmp_path)
    assert slides(rows) == ["a.svs", "c.ome.zarr", "e.ome.tif", "old/x.svs"]
    assert "an output of this program" in rows["a.ome.zarr"].skip
    assert "an output of this program" in rows["d.ome.tif"].skip
    assert "earlier run" in rows["old/run.json"].skip and "earlier run" in rows["old/report.html"].skip
    assert not any(row.unknown for row in rows.values())


def test_an_ome_zarr_is_one_row(tmp_path: Path) -> None:
    zarr(tmp_path / "x" / "a.ome.zarr")
    zarr(tmp_path / "no ending")
    assert list(look(tmp_path)) == ["no ending", "x/a.ome.zarr"]


# --- slides in several files ---


def test_mirax_data_belongs_to_its_slide(tmp_path: Path) -> None:
    put(tmp_path / "a.mrxs", b"\xff\xd8")
    put(tmp_path / "a" / "Slidedat.ini", b"[DATAFILE]\r\nFILE_0 = Data0000.dat\r\n")
    put(tmp_path / "a" / "Data0000.dat")
    put(tmp_path / "lost" / "Slidedat.ini")
    rows = look(tmp_path)
    assert slides(rows) == ["a.mrxs"] and rows["a.mrxs"].parts == (str(tmp_path / "a"),)
    assert rows["a/Data0000.dat"].skip == "part of a.mrxs" and not rows["a/Data0000.dat"].unknown
    assert "lost.mrxs" in rows["lost/Slidedat.ini"].skip and rows["lost/Slidedat.ini"].unknown


@pytest.mark.parametrize("part", [b"../secret.dat", b"/etc/passwd", b"..\\x.dat"])
def test_an_index_that_names_files_elsewhere_is_refused(tmp_path: Path, part: bytes) -> None:
    put(tmp_path / "a.mrxs", b"\xff\xd8")
    put(tmp_path / "a" / "Slidedat.ini", b"FILE_0 = " + part + b"\n")
    put(tmp_path / "b.vms", b"[Virtual Microscope Specimen]\nImageFile(1,0)=" + part + b"\n")
    rows = look(tmp_path)
    for name in ("a.mrxs", "b.vms"):
        assert "outside its folder" in rows[name].skip and rows[name].unknown


def test_vms_parts_belong_to_their_index(tmp_path: Path) -> None:
    put(
        tmp_path / "a.vms",
        b"[V]\r\nNoLayers=1\r\nImageFile=a.jpg\r\nImageFile(1,0)=a(1,0).jpg\r\nMapFile=m.jpg\r\n",
    )
    for name in ("a.jpg", "a(1,0).jpg", "m.jpg", "other.jpg"):
        put(tmp_path / name, b"\xff\xd8")
    rows = look(tmp_path)
    assert slides(rows) == ["a.vms"]
    assert [s for s, row in rows.items() if row.skip == "part of a.vms"] == ["a(1,0).jpg", "a.jpg", "m.jpg"]
    assert rows["a.vms"].parts == tuple(str(tmp_path / n) for n in ("a(1,0).jpg", "a.jpg", "m.jpg"))
    assert "a picture" in rows["other.jpg"].skip


def test_an_index_of_a_million_blanks_costs_no_time(tmp_path: Path) -> None:
    put(tmp_path / "a.vms", b"ImageFile=x" + b" " * 1_000_000 + b"y\nMapFile=" + b"\n" * 1_000_000)
    assert slides(look(tmp_path)) == ["a.vms"]


def test_annotations_and_foreign_folders(tmp_path: Path) -> None:
    for name in ("a.svs", "a.xml", "a.svs.geojson", "b.xml", "d.dzi", "d_files/0/0_0.jpg"):
        put(tmp_path / name)
    rows = look(tmp_path)
    assert "annotations" in rows["a.xml"].skip and "annotations" in rows["a.svs.geojson"].skip
    assert rows["b.xml"].unknown and rows["d.dzi"].unknown
    assert rows["d_files/0/0_0.jpg"].skip == "part of d.dzi"


def element(tag: int, kind: bytes, value: bytes, *, implicit: bool = False) -> bytes:
    value += b"\0" * (len(value) % 2)
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    if implicit:
        return head + struct.pack("<I", len(value)) + value
    if kind in (b"SQ", b"OB", b"UN"):
        return head + kind + bytes(2) + struct.pack("<I", len(value)) + value
    return head + kind + struct.pack("<H", len(value)) + value


def open_sequence(tag: int, *items: bytes) -> bytes:
    """A sequence and items of undefined length, which only their ends delimit."""
    head = struct.pack("<HH2s2xI", tag >> 16, tag & 0xFFFF, b"SQ", 0xFFFFFFFF)
    inner = b"".join(
        struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + item + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
        for item in items
    )
    return head + inner + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)


def dicom(series: str, flavour: str = "VOLUME", *, sop: str = WHOLE_SLIDE, implicit: bool = False) -> bytes:
    syntax = b"1.2.840.10008.1.2" + (b"" if implicit else b".1")

    def value(tag: int, kind: bytes, text: str) -> bytes:
        return element(tag, kind, text.encode(), implicit=implicit)

    nested = value(0x0020000E, b"UI", "6.6.6") + value(0x00080008, b"CS", "A\\B\\LABEL")
    return (
        bytes(128) + b"DICM" + element(0x00020001, b"OB", b"\0\1") + element(0x00020010, b"UI", syntax)
        + value(0x00080008, b"CS", f"DERIVED\\PRIMARY\\{flavour}\\NONE") + value(0x00080016, b"UI", sop)
        + (b"" if implicit else open_sequence(0x00081140, nested, nested))
        + value(0x0020000E, b"UI", series) + value(0x00280010, b"US", "xx")
    )  # fmt: skip


def test_a_dicom_series_is_one_slide(tmp_path: Path) -> None:
    put(tmp_path / "0.dcm", dicom("1.2", "LABEL"))
    put(tmp_path / "1.dcm", dicom("1.2", implicit=True))
    put(tmp_path / "2.dcm", dicom("1.2"))
    put(tmp_path / "3.dcm", dicom("1.3"))
    put(tmp_path / "4.dcm", dicom("1.4", "OVERVIEW"))
    put(tmp_path / "5.dcm", dicom("1.5", sop="1.2.840.10008.5.1.4.1.1.66.4"))
    put(tmp_path / "6.dcm", b"no DICOM")
    put(tmp_path / "DCM0007", dicom("1.2"))
    put(tmp_path / "DICOMDIR", b"index")
    put(tmp_path / "sub" / "2.dcm", dicom("1.2"))
    rows = look(tmp_path)
    assert slides(rows) == ["1.dcm", "3.dcm", "6.dcm", "sub/2.dcm"]
    assert {rows[name].skip for name in ("0.dcm", "2.dcm", "DCM0007")} == {"part of 1.dcm"}
    assert rows["1.dcm"].parts == tuple(str(tmp_path / n) for n in ("0.dcm", "2.dcm", "DCM0007"))
    assert "whose slide is not in this folder" in rows["4.dcm"].skip
    assert rows["5.dcm"].unknown and not rows["DICOMDIR"].unknown
    assert slides(look(tmp_path / "[02].dcm")) == ["2.dcm"]  # the slide is not lost with its first file


@given(st.binary(max_size=400))
def test_no_bytes_upset_the_dicom_reader(tmp_path_factory: pytest.TempPathFactory, tail: bytes) -> None:
    path = put(tmp_path_factory.getbasetemp() / "any.dcm", bytes(128) + b"DICM" + tail)
    read_instance(str(path))


def test_a_damaged_dicom_file_is_left_to_the_reader(tmp_path: Path) -> None:
    whole = dicom("1.2")
    for cut in range(132, len(whole) - 10, 7):
        assert read_instance(str(put(tmp_path / "a.dcm", whole[:cut]))) is None
    assert slides(look(tmp_path)) == ["a.dcm"]


def test_real_dicom_files(data_dir: Path) -> None:
    rows = look(data_dir / "slides" / "*.dcm")
    assert slides(rows) == ["boxes_0.dcm", "sm_image.dcm"]
    assert rows["boxes_1.dcm"].skip == "part of boxes_0.dcm"


# --- links and special files ---


def test_links_are_duplicates_or_stay_inside(tmp_path: Path) -> None:
    root, other = tmp_path / "in", tmp_path / "elsewhere"
    put(root / "a.svs")
    put(root / ".store" / "key", b"II*\0")
    put(other / "b.svs")
    (root / "again.svs").symlink_to(root / "a.svs")
    (root / "stored.svs").symlink_to(root / ".store" / "key")
    (root / "out.svs").symlink_to(other / "b.svs")
    (root / "folder").symlink_to(other)
    (root / "broken.svs").symlink_to(other / "missing.svs")
    (root / "circle.svs").symlink_to(root / "circle.svs")
    (root / "up").symlink_to(tmp_path)
    (root / "self").symlink_to(root)
    rows = look(root)
    assert slides(rows) == ["a.svs", "stored.svs"]
    assert rows["again.svs"].skip == "a link to a.svs"
    assert "directory.links=true" in rows["out.svs"].skip and "directory.links=true" in rows["folder"].skip
    assert "leads nowhere" in rows["broken.svs"].skip and "back to itself" in rows["circle.svs"].skip
    assert "contains it" in rows["up"].skip and "contains it" in rows["self"].skip
    followed = look(root, links=True)
    assert slides(followed) == ["a.svs", "folder/b.svs", "stored.svs"]
    assert followed["out.svs"].skip == "a link to folder/b.svs"
    assert followed["folder/b.svs"].path == str(root / "folder" / "b.svs")
    assert "contains it" in followed["up"].skip


def test_links_between_folders_end(tmp_path: Path) -> None:
    root, one, two = tmp_path / "in", tmp_path / "one", tmp_path / "two"
    put(one / "a.svs")
    put(two / "b.svs")
    root.mkdir()
    (one / "to two").symlink_to(two)
    (two / "to one").symlink_to(one)
    (root / "x").symlink_to(one)
    (root / "y").symlink_to(two)
    rows = look(root, links=True)
    assert sorted(Path(source).name for source in slides(rows)) == ["a.svs", "b.svs"]


def test_a_link_to_the_output_is_not_followed(tmp_path: Path) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    put(root / "a.svs")
    put(out / "b.svs")
    (root / "b.svs").symlink_to(out / "b.svs")
    assert slides(look(root, links=True, exclude=out)) == ["a.svs"]
    assert slides(look(root, links=True)) == ["a.svs", "b.svs"]


def test_a_zarr_with_links_out_of_it_is_refused(tmp_path: Path) -> None:
    secret = put(tmp_path / "secret.bin")
    store = zarr(tmp_path / "in" / "a.zarr")
    (store / "0" / "c" / "inside").symlink_to(store / "0" / "c" / "0")
    assert slides(look(tmp_path / "in")) == ["a.zarr"]
    (store / "0" / "c" / "1").symlink_to(secret)
    row = look(tmp_path / "in")["a.zarr"]
    assert "0/c/1 is a link that leaves it" in row.skip and row.unknown
    assert slides(look(tmp_path / "in", links=True)) == ["a.zarr"]


@pytest.mark.parametrize("links", [False, True])
def test_pipes_and_sockets_are_never_opened(tmp_path: Path, links: bool) -> None:
    root = tmp_path / "in"
    put(root / "a.svs")
    os.mkfifo(root / "pipe.svs")
    os.mkfifo(tmp_path / "pipe")
    (root / "to pipe.svs").symlink_to(tmp_path / "pipe")
    (root / "null.svs").symlink_to("/dev/null")
    os.mkfifo(zarr(root / "b.zarr") / "0" / "c" / "1")
    os.mkfifo(zarr(root / "c.zarr") / "manifest.json")
    put(root / "d.mrxs", b"\xff\xd8")
    (root / "d").mkdir()
    os.mkfifo(root / "d" / "Slidedat.ini")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(root / "s.svs"))
        rows = look(root, links=links)
    assert slides(rows) == ["a.svs"]
    assert len(rows) == 9 and all("pipe" in row.skip for source, row in rows.items() if source != "a.svs")


def test_hard_links_are_one_slide(tmp_path: Path) -> None:
    put(tmp_path / "a.svs")
    os.link(tmp_path / "a.svs", tmp_path / "b.svs")
    rows = look(tmp_path)
    assert slides(rows) == ["a.svs"] and rows["b.svs"].skip == "the same file as a.svs"


def test_strange_names_are_shown_safely_and_opened_truly(tmp_path: Path) -> None:
    names = [b"line\nbreak.svs", b"\xff\xfe.svs", b"turn\xe2\x80\xae.svs", b"\\xff.svs", "é.svs".encode()]
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(TIFF)
    rows = look(tmp_path)
    assert len(slides(rows)) == len(names)
    assert {os.fsencode(os.path.basename(row.path)) for row in rows.values()} == set(names)
    assert all(stamp(row.path) for row in rows.values())
    assert r"line\nbreak.svs" in rows and r"\xff\xfe.svs" in rows and r"\\xff.svs" in rows


def test_a_folder_that_cannot_be_listed_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a.svs")
    put(tmp_path / "closed" / "b.svs")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if path == str(tmp_path / "closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    rows = look(tmp_path)
    assert slides(rows) == ["a.svs"]
    assert "cannot be listed (Permission denied)" in rows["closed"].skip and rows["closed"].unknown


# --- folders, patterns, tables ---


def test_the_output_folder_is_not_looked_into(tmp_path: Path) -> None:
    put(tmp_path / "a.svs")
    put(tmp_path / "out" / "b.svs")
    assert list(look(tmp_path, exclude=tmp_path / "out")) == ["a.svs"]
    assert list(look(tmp_path, exclude=tmp_path / "not there yet")) == ["a.svs", "out/b.svs"]
    with pytest.raises(ConfigError, match="input and output folder at once"):
        find_inputs(str(tmp_path), links=False, exclude=tmp_path)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.svs", ["a.svs"]),
        ("*/*.svs", ["x/b.svs", "y/b.svs"]),
        ("**/*.svs", ["a.svs", "x/b.svs", "x/deep/c.svs", "y/b.svs"]),
        ("x/**/*.svs", ["b.svs", "deep/c.svs"]),
        ("[xy]/b.*", ["x/b.svs", "y/b.svs"]),
        ("x/../?.svs", ["a.svs"]),
        ("**", ["a.svs", "x/b.svs", "x/deep/c.svs", "y/b.svs"]),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    for name in ("a.svs", "x/b.svs", "x/deep/c.svs", "y/b.svs"):
        put(tmp_path / name)
    assert slides(look(f"{tmp_path}/{pattern}")) == expected


def test_a_relative_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a.svs")
    (tmp_path / "sub").mkdir()
    for folder, pattern in ((tmp_path, "*.svs"), (tmp_path / "sub", "../*.svs")):
        monkeypatch.chdir(folder)
        rows = look(pattern)
        assert rows["a.svs"].path == str(tmp_path / "a.svs")


def test_a_pattern_does_not_lose_what_a_link_alone_matches(tmp_path: Path) -> None:
    put(tmp_path / "store" / "deep" / "a.svs")
    (tmp_path / "b.svs").symlink_to(tmp_path / "store" / "deep" / "a.svs")
    assert slides(look(tmp_path / "*.svs")) == ["b.svs"]


def test_inputs_without_a_slide_are_an_error(tmp_path: Path) -> None:
    for named in (str(tmp_path), f"{tmp_path}/*.svs", f"{tmp_path}/no/*.svs", f"{tmp_path}/no"):
        with pytest.raises(ConfigError):
            find_inputs(named, links=False, exclude=None)
    put(tmp_path / "a.docx")
    put(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="holds no slide to convert, of 2 files: 1 x"):
        find_inputs(str(tmp_path), links=False, exclude=None)
    assert len(look(tmp_path)) == 2


def test_a_table_tells_what_to_do_with_each_slide(tmp_path: Path) -> None:
    put(tmp_path / "data" / "a.svs")
    mask = put(tmp_path / "data" / "tissue.geojson", b"{}")
    table = put(
        tmp_path / "list.csv",
        "\ufeffSlide;mpp;mpp_y;mask;roi;stain batch\r\n"
        "data/a.svs;0,25;0,26;data/tissue.geojson;0,0,100,200;7\r\n"
        "data/missing.svs;;;whole;;\r\n"
        ";;;;;\r\n"
        "s3://bucket/b.svs;;;;data/tissue.geojson;\r\n"
        "./data/a.svs;;;;;\r\n"
        "data/a.svs;;;;;\r\n".encode(),
    )
    rows = find_inputs(str(table), links=False, exclude=None)
    first, missing, remote, again, twice = rows
    assert first == Found(
        source="data/a.svs",
        path=str(tmp_path / "data" / "a.svs"),
        mpp=(0.26, 0.25),
        mask=str(mask),
        roi="0,0,100,200",
    )
    assert missing.path == str(tmp_path / "data" / "missing.svs") and missing.mask == "whole"
    assert not missing.skip
    assert remote.path == "s3://bucket/b.svs" and remote.roi == str(mask) and not remote.skip
    assert again.skip == twice.skip == "the same file as data/a.svs"
    assert twice.source == "data/a.svs (line 7)"


def test_all_problems_of_a_table_are_told_at_once(tmp_path: Path) -> None:
    table = put(
        tmp_path / "list.csv",
        b"slide,mpp,mpp_y,mask,roi\n"
        b"a.svs,250,,,\n"
        b",0.25,,,\n"
        b"b.svs,,,no.geojson,\n"
        b"c.svs,,,,here\n"
        b"d.svs,0.25,,,,,,\n"
        b"e.svs,,0.25,,\n",
    )
    with pytest.raises(ConfigError) as told:
        find_inputs(str(table), links=False, exclude=None)
    message = str(told.value)
    assert message.startswith("list.csv: 6 problems: ") and "\n" not in message
    for number, what in enumerate(
        ("mpp 250", "no slide", "no.geojson", "roi here", "more cells", "mpp 0.25"), 2
    ):
        assert f"line {number}: " in message and what in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "no column slide"),
        (b"slide\n", "names no slide"),
        (b"slides,mpp\na.svs,1\n", "is it 'slide'"),
        (b"slide,mppx\na.svs,1\n", "is it 'mpp'"),
        (b"slide,mpp,MPP\na.svs,1,1\n", "is there twice"),
        (b"slide\n\xff.svs\n", "not a UTF-8 text"),
        (b"slide\na\0.svs\n", "line 2"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, text: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_inputs(str(put(tmp_path / "t.csv", text)), links=False, exclude=None)
    with pytest.raises(ConfigError, match="no such file"):
        find_inputs(str(tmp_path / "missing.csv"), links=False, exclude=None)


def test_a_text_file_lists_paths(tmp_path: Path) -> None:
    put(tmp_path / "a, b.svs")
    table = put(tmp_path / "list.txt", b"# tonight\n\na, b.svs\r\n/mnt/c.svs\n")
    assert slides(look(table)) == ["a, b.svs", "/mnt/c.svs"]
    headed = put(tmp_path / "head.txt", b"slide\tmpp\na, b.svs\t0.5\n")
    assert look(headed)["a, b.svs"].mpp == (0.5, 0.5)


def test_a_table_is_no_way_around_the_rules(tmp_path: Path) -> None:
    store = zarr(tmp_path / "a.zarr")
    (store / "0" / "c" / "1").symlink_to(put(tmp_path / "secret"))
    zarr(tmp_path / "ours.ome.zarr", synthetic=True)
    put(tmp_path / "out" / "b.svs")
    os.mkfifo(tmp_path / "pipe.svs")
    put(tmp_path / "1.dcm", dicom("1.2"))
    put(tmp_path / "2.dcm", dicom("1.2"))
    names = ["a.zarr", "ours.ome.zarr", "out/b.svs", "pipe.svs", "2.dcm", "1.dcm", "x.docx", "y.docx"]
    put(tmp_path / "y.docx")
    table = put(tmp_path / "t.txt", "\n".join(names).encode())
    rows = look(table, exclude=tmp_path / "out")
    assert slides(rows) == ["1.dcm", "x.docx"]  # what is not there fails when it is opened
    assert rows["2.dcm"].skip == "part of 1.dcm" and "output folder" in rows["out/b.svs"].skip
    assert rows["y.docx"].unknown and "refused" in rows["a.zarr"].skip


# --- stamps ---


def test_a_stamp_is_size_and_date_of_all_that_a_slide_is(tmp_path: Path) -> None:
    slide = put(tmp_path / "a.svs", b"four")
    os.utime(slide, ns=(5, 7))
    assert stamp(str(slide)) == "4-7"
    assert stamp(str(tmp_path / "missing.svs")) == stamp("s3://bucket/a.svs") == ""
    mirax = put(tmp_path / "m.mrxs", b"1")
    part = put(tmp_path / "m" / "Data0000.dat", b"22")
    os.utime(mirax, ns=(5, 7))
    os.utime(part, ns=(5, 9))
    assert stamp(str(mirax)) == stamp(str(mirax), (str(tmp_path / "m"),)) == "3-9"
    store = zarr(tmp_path / "z.zarr")
    os.utime(store / "zarr.json", ns=(5, 11))
    assert stamp(str(store)) == "2-11"
    first, second = put(tmp_path / "1.dcm", dicom("1.2")), put(tmp_path / "2.dcm", dicom("1.2"))
    assert stamp(str(first)).startswith(f"{first.stat().st_size + second.stat().st_size}-")
