"""Copies of SubIFD records in the main chain: bytes of the structure, no pixel twice, bad input refused."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import tifffile

from wsi_pipeline.writers.tiff_hybrid import chain_subifds


def _pyramid(
    levels: int, *, byteorder: str = "<", bigtiff: bool = True, extra_page: bool = False
) -> io.BytesIO:
    file = io.BytesIO()
    with tifffile.TiffWriter(file, bigtiff=bigtiff, byteorder=byteorder) as tiff:
        for level in range(levels):
            pixels = np.full((64 >> level, 96 >> level, 3), 40 * level, np.uint8)
            tiff.write(
                pixels,
                photometric="rgb",
                tile=(16, 16),
                subifds=levels - 1 if level == 0 else None,
                subfiletype=0 if level == 0 else 1,
                metadata=None,
            )
        if extra_page:
            tiff.write(np.full((32, 32, 3), 9, np.uint8), photometric="rgb", metadata=None)
    return file


@pytest.mark.parametrize("levels", [1, 2, 3, 4])  # one SubIFD is stored inside its tag, more are out of line
def test_the_main_chain_gets_every_level_once(levels: int) -> None:
    file = _pyramid(levels)
    before = file.getvalue()
    assert chain_subifds(file) == levels - 1
    after = file.getvalue()
    with tifffile.TiffFile(io.BytesIO(after)) as tiff:
        assert [page.shape[:2] for page in tiff.pages] == [(64 >> n, 96 >> n) for n in range(levels)]
        subifds = tiff.pages[0].pages or []
        for number, (page, subifd) in enumerate(zip(list(tiff.pages)[1:], subifds, strict=True), start=1):
            assert page.dataoffsets == subifd.dataoffsets
            assert page.offset % 8 == 0 and page.offset >= len(before)
            assert (page.asarray() == 40 * number).all()
    changed = [i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b]
    assert len(changed) <= 8  # one pointer; everything else of the old file stays
    assert len(after) - len(before) < levels * 500


def test_copies_follow_pages_that_are_already_in_the_chain() -> None:
    file = _pyramid(3, extra_page=True)
    chain_subifds(file)
    with tifffile.TiffFile(io.BytesIO(file.getvalue())) as tiff:
        assert [page.shape[:2] for page in tiff.pages] == [(64, 96), (32, 32), (32, 48), (16, 24)]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"II\x2b\x00",
        b"not a tiff at all, but long enough",
        _pyramid(2, bigtiff=False).getvalue(),
        _pyramid(2, byteorder=">").getvalue(),
    ],
)
def test_other_files_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="BigTIFF"):
        chain_subifds(io.BytesIO(content))


def test_a_cut_off_record_is_refused() -> None:
    whole = _pyramid(2).getvalue()
    (first,) = struct.unpack_from("<Q", whole, 8)
    with pytest.raises(ValueError, match="cut off"):
        chain_subifds(io.BytesIO(whole[: first + 40]))
