"""The parts of the audit: what counts as a secret, the search for many patterns, the likeness of pictures."""

from __future__ import annotations

import datetime
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from wsi_pipeline.audit.bytes_search import BytesSearch
from wsi_pipeline.audit.containers import foreign_parts
from wsi_pipeline.audit.likeness import Likeness
from wsi_pipeline.audit.own import own_words
from wsi_pipeline.audit.payloads import Piece
from wsi_pipeline.audit.pictures import SidePicture
from wsi_pipeline.audit.pixels import PixelSearch
from wsi_pipeline.audit.result import masked
from wsi_pipeline.audit.search import Searcher, fold, wide_texts
from wsi_pipeline.audit.secrets import Secret, find_secrets
from wsi_pipeline.audit.texts import SlideText, icc_texts
from wsi_pipeline.core.geometry import Region, Size
from wsi_pipeline.readers.array import ArraySlide
from wsi_pipeline.readers.icc import srgb_profile
from wsi_pipeline.readers.synthetic import SyntheticSlide


def searched(*texts: str, name: str = "slide.svs", **options: object) -> set[str]:
    fields = [SlideText("aperio.Note", text) for text in texts]
    return {secret.text for secret in find_secrets(fields, name, **options).searched}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Ottoline Quillfeather", "Quillfeather"),
        ("Quillfeather^Ottoline", "Ottoline"),
        ("Barcode = S19-1234|MPP = 0.25", "S19-1234"),
        ("12/29/09", "12/29/09"),
        ("29.12.2009", "29.12.2009"),
        ("1004486", "1004486"),
        ("1.3.6.1.4.1.5962.99.1.174.3.0", "1.3.6.1.4.1.5962.99.1.174.3.0"),
        ('<Image Name="Frau Przybylski"/>', "Przybylski"),
        ("Kim, Lee and Wu", "Kim, Lee and Wu"),
    ],
)
def test_what_tells_of_a_patient_is_searched_for(text: str, found: str) -> None:
    assert found in searched(text)


@pytest.mark.parametrize(
    "text",
    ["0.499", "240x240", "46000", "-0.000313", "v11.2.1", "12,34567890,5", "Image", "JPEG/RGB", "sRGB"]
    + ["aperio.MPP", "1.2.840.10008.5.1.4.1.1.77.1.6", "Kim", "", "20", "brightfield"],
)
def test_what_every_output_may_hold_is_not(text: str) -> None:
    assert searched(text) == set()


def test_sizes_field_names_and_the_day_are_left_out() -> None:
    assert searched("150000", sizes={150000}) == set()
    texts = [SlideText("aperio.ScanScope ID", "SS7231"), SlideText("tiff.X", "ScanScope ID = SS7231")]
    assert {secret.text for secret in find_secrets(texts, "a.svs").searched} == {"SS7231"}
    today = find_secrets([SlideText("x", "20260131")], "a.svs", (), {datetime.date(2026, 1, 31)})
    assert today.searched == ()
    assert today.today == ("20260131",)


def test_a_text_of_the_file_name_is_set_apart() -> None:
    found = find_secrets([SlideText("x", "CMU-1")], "CMU-1-Small.svs")
    assert [secret.text for secret in found.in_name] == ["CMU-1"]
    assert found.searched == ()


def test_own_words_are_what_the_program_writes() -> None:
    assert {"tissue", "manifest", "omero", "synthetic", "freely"} <= own_words()
    assert not {"quillfeather", "vahadane", "kowalczyk"} & own_words()


def test_a_long_text_is_found_by_a_part() -> None:
    text = "".join(f"{number:04x}" for number in range(1000, 1200))
    windows = searched(text)
    assert len(windows) == 3
    assert all(window in text for window in windows)


patterns = st.lists(st.binary(min_size=4, max_size=12), min_size=1, max_size=20)


@given(patterns, st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_the_search_finds_what_a_plain_search_finds(
    wanted: list[bytes], data: bytes, places: list[int]
) -> None:
    for place, pattern in zip(places, wanted, strict=False):
        data = data[:place] + pattern + data[place:]
    found = {(hit.pattern, hit.start) for hit in Searcher(wanted).find(data)}
    expected = {
        (number, start)
        for number, pattern in enumerate(wanted)
        for start in range(len(data))
        if fold(data)[start : start + len(pattern)] == fold(pattern)
    }
    assert found == expected


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0xFF, exclude_categories=["Cc"]), min_size=4))
def test_utf16_is_read_in_both_orders(text: str) -> None:
    for coding in ("utf-16-le", "utf-16-be"):
        data = b"\x01\x02\x03" + text.encode(coding) + b"\x01\x02\x03"
        assert any(text[:-1] in found.decode() for _, found in wide_texts(data))


def test_a_short_word_in_noise_is_chance_and_in_text_is_none() -> None:
    search = BytesSearch([Secret("meier", "x", True)], (), ())
    noise = np.random.default_rng(0).integers(128, 256, 1000, np.uint8).tobytes()
    assert not list(search.findings([Piece("a", noise + b"Meier" + noise, text=False)]))
    assert list(search.findings([Piece("a", b"Herr Meier, Station 7, links", text=True)]))
    assert list(search.findings([Piece("a", noise + b"Herr Meier, Station 7, links" + noise, text=False)]))
    assert not list(search.findings([Piece("a", b"Meierhof", text=True)]))


def test_the_texts_of_a_profile() -> None:
    assert any("sRGB" in text for text in icc_texts(srgb_profile()))


def test_foreign_parts_of_pictures() -> None:
    buffer = io.BytesIO()
    image = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    image.save(buffer, "JPEG")
    assert list(foreign_parts(buffer.getvalue())) == []
    assert list(foreign_parts(buffer.getvalue() + b"more")) == ["a after EOI segment"]
    image.save(buffer := io.BytesIO(), "JPEG", comment=b"a comment")
    assert list(foreign_parts(buffer.getvalue())) == ["a COM segment"]
    exif = Image.Exif()
    exif[315] = "somebody"
    image.save(buffer := io.BytesIO(), "PNG", exif=exif)
    assert list(foreign_parts(buffer.getvalue())) == ["a eXIf chunk"]


def test_a_mask_shows_two_characters() -> None:
    assert masked("Quillfeather") == "Qu... (12 characters)"


def lettering(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.choice([20, 240], (24, 18), p=[0.4, 0.6]).astype(np.uint8)
    return np.repeat(np.kron(coarse, np.ones((12, 12), np.uint8))[..., None], 3, axis=2)


@pytest.mark.parametrize(("scale", "turns"), [(1.0, 0), (0.43, 0), (0.3, 1)])
def test_a_scaled_copy_is_found_and_another_label_is_not(scale: float, turns: int) -> None:
    scene = np.array(SyntheticSlide(size=Size(500, 600), seed=1).read_level(0, Region(0, 0, 500, 600)))
    own, other = (Likeness([SidePicture("label", lettering(seed))]) for seed in (1, 2))
    assert own.in_picture(scene) == []
    picture = Image.fromarray(np.rot90(lettering(1), turns))
    small = picture.resize((round(picture.width * scale), round(picture.height * scale)))
    scene[50 : 50 + small.height, 120 : 120 + small.width] = np.asarray(small)
    buffer = io.BytesIO()
    Image.fromarray(scene).save(buffer, "JPEG", quality=70)
    coded = np.asarray(Image.open(buffer).convert("RGB"))
    assert [match.name for match in own.in_picture(coded)][:1] == ["label"]
    assert other.in_picture(coded) == []


def test_a_copy_is_found_in_a_level_that_is_read_in_windows() -> None:
    size = Size(2300, 2000)
    scan = SyntheticSlide(size=size, seed=4)
    pixels = np.array(scan.read_level(0, Region.of(size)))
    search = PixelSearch([SidePicture("label", lettering(1))], scan)
    assert search.left_out == ()
    assert list(search.in_level(ArraySlide(pixels, mpp=(1.0, 1.0)), 0)) == []
    pixels[1500:1730, 900:1073] = np.asarray(Image.fromarray(lettering(1)).resize((173, 230)))
    found = list(search.in_level(ArraySlide(pixels, mpp=(1.0, 1.0)), 0))
    assert {name for name, _ in found} == {"label"}
    assert search.pixels > 2 * size.area


def test_what_the_scan_shows_itself_is_left_out() -> None:
    size = Size(900, 700)
    scan = SyntheticSlide(size=size, seed=4)
    macro = SidePicture("macro", scan.read_level(0, Region.of(size))[::2, ::2])
    assert PixelSearch([macro], scan).left_out == ("macro",)
    assert list(PixelSearch([], scan).in_level(scan, 0)) == []


@pytest.mark.benchmark
def test_the_speed_of_the_search(capsys: pytest.CaptureFixture[str]) -> None:
    import time

    rng = np.random.default_rng(0)
    wanted = [rng.integers(97, 123, 12, np.uint8).tobytes() for _ in range(3000)]
    search = Searcher(wanted)
    data = rng.integers(0, 256, 1 << 20, np.uint8).tobytes()
    started = time.process_time()
    for _ in range(100):
        list(search.find(data))
    with capsys.disabled():
        print(f"3000: {100 * len(data) / 1e6 / (time.process_time() - started):.0f} MB/s (processor time)")
