"""Names made from names: unique, harmless, and the same every time."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_pipeline.runs.names import OutputNames, key_of, output_name, shown

ZARR, TIFF = ".ome.zarr", ".ome.tif"
# What a file name can be: any character but zero and slash, and bytes that are no UTF-8.
PIECES = st.one_of(
    st.text(st.characters(exclude_characters="\0/", exclude_categories=("Cs",)), max_size=12),
    st.sampled_from(
        ["..", ".", "CON", "nul.svs", "com1", "a.ome.zarr", "a\n", "\udcff", "\\xff", " ", "x" * 300]
    ),
)
SOURCES = st.lists(PIECES, min_size=1, max_size=4).map("/".join).filter(bool)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a.svs", "a.ome.zarr"),
        ("sub/a.svs", "sub/a.ome.zarr"),
        ("a.ome.tif", "a.ome.zarr"),
        ("S12.345.ndpi", "S12.345.ome.zarr"),
        ("../../etc/a.svs", "etc/a.ome.zarr"),
        ("/mnt/scanner/a.svs", "a.ome.zarr"),
        ("s3://bucket/x/a.svs?versionId=1", "a.ome.zarr"),
        ("con.svs", "con_.ome.zarr"),
        ("NUL/a.svs", "NUL_/a.ome.zarr"),
        ("a?b:c.svs", "a_b_c.ome.zarr"),
        ("x./a.svs", "x_/a.ome.zarr"),
        (".hidden/.a.svs", "_hidden/_a.ome.zarr"),
        ("a.ome.zarr/b.svs", "a.ome.zarr_/b.ome.zarr"),
        ("a.ome.zarr.partial/b.svs", "a.ome.zarr.partial_/b.ome.zarr"),
    ],
)
def test_an_output_is_named_after_its_slide(source: str, expected: str) -> None:
    assert output_name(source, ZARR, ()) == expected


def test_a_taken_name_is_given_to_nobody_else_whatever_its_case() -> None:
    names = OutputNames(["sub/A.ome.zarr"])
    assert names.add("sub/a.svs", ZARR) == "sub/a.svs.ome.zarr"
    assert names.add("sub/a.ndpi", ZARR) == "sub/a.ndpi.ome.zarr"
    assert names.add("sub/a.SVS", ZARR) == "sub/a.SVS-2.ome.zarr"
    composed, decomposed = "M\u00fcller.svs", unicodedata.normalize("NFD", "M\u00fcller.svs")
    assert names.add(composed, ZARR) == "M\u00fcller.ome.zarr"
    assert names.add(decomposed, ZARR) == "M\u00fcller.svs.ome.zarr"


def test_long_names_are_cut_and_stay_apart() -> None:
    first, second = (output_name(f"{'é' * 150}{end}.svs", TIFF, ()) for end in "ab")
    assert first != second
    assert len(first.encode()) <= 200 and first.endswith(TIFF)


@given(st.lists(SOURCES, max_size=8), st.sampled_from([ZARR, TIFF]))
def test_outputs_are_safe_and_apart(sources: list[str], ending: str) -> None:
    names = OutputNames()
    found = [names.add(shown(source), ending) for source in sources]
    folded = [unicodedata.normalize("NFC", name).casefold() for name in found]
    assert len(set(folded)) == len(folded)
    for name in found:
        assert name.endswith(ending) and not name.startswith("/")
        *folders, last = name.split("/")
        for part in (*folders, last):
            assert part and part.isprintable() and not part.startswith((".", " "))
            assert len(part.encode()) <= 200 and not part.endswith((" ", "."))
            assert not re.search(r'[<>:"|?*\\]', part)
            assert not re.match(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\.|$)", part)
        assert not any(folder.lower().endswith((".zarr", ".tif", ".tiff", ".partial")) for folder in folders)
    assert [OutputNames().add(shown(source), ending) for source in sources[:1]] == found[:1]


@given(st.text(max_size=20), st.text(max_size=20))
def test_shown_is_one_printable_line_and_tells_names_apart(one: str, other: str) -> None:
    assert shown(one).isprintable()
    assert (shown(one) == shown(other)) == (one == other)


def test_shown_leaves_readable_names_alone() -> None:
    assert shown("Müller 12 (a).svs") == "Müller 12 (a).svs"
    assert shown("a\n\udcffb\u202e.svs") == r"a\n\xffb\u202e.svs"


@given(SOURCES, SOURCES)
def test_keys_are_short_safe_and_apart(one: str, other: str) -> None:
    key = key_of(one)
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key)
    assert (key == key_of(other)) == (one == other)
    assert key == key_of(one)


def test_a_key_ends_in_what_tells_its_source() -> None:
    assert re.fullmatch(r"sub_a_svs-[0-9a-f]{12}", key_of("sub/a.svs"))
    assert re.fullmatch(r"svs-[0-9a-f]{12}", key_of("切片.svs"))
