"""Canaries: a clean conversion passes the audit; each text or picture of the slide planted in it is found."""

from __future__ import annotations

import base64
import binascii
import html
import io
import json
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import audit_slide
import cv2
import numpy as np
import pytest
import tensorstore as ts
import tifffile
from audit_slide import CANARIES
from PIL import Image

from wsi_pipeline.audit.audit import audit_output
from wsi_pipeline.audit.result import AuditResult
from wsi_pipeline.audit.texts import slide_texts
from wsi_pipeline.errors import OutputError, SlideError
from wsi_pipeline.pipeline.convert import convert_slide
from wsi_pipeline.pipeline.settings import ConvertConfig, GeneratorConfig, OutputConfig
from wsi_pipeline.readers import open_slide
from wsi_pipeline.writers.omezarr import OmeZarrConfig

CLI = [sys.executable, "-m", "wsi_pipeline.cli"]
NAMES = ("scan.ome.zarr", "scan.ome.tif")


def settings(ngff: str = "0.5") -> ConvertConfig:
    zarr = OmeZarrConfig(block=1024, ngff=ngff)  # type: ignore[arg-type]
    return ConvertConfig(generator=GeneratorConfig(name="identity"), output=OutputConfig(zarr=zarr))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the slide and its clean outputs; not to be changed."""
    folder = tmp_path_factory.mktemp("audit")
    slide = open_slide(audit_slide.write_slide(folder / "scan.svs"))
    (folder / "out").mkdir()
    for name in NAMES:
        convert_slide(slide, folder / "out" / name, settings())
    slide.close()
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A copy of the outputs, to plant something in."""
    shutil.copytree(made / "out", tmp_path / "out")
    return tmp_path / "out"


def audit(out: Path, made: Path) -> AuditResult:
    return audit_output(out, made / "scan.svs")


def test_the_made_slide_shows_its_secrets(made: Path) -> None:
    """The test slide is worth something: every canary is a text of it, and OpenSlide sees label and macro."""
    texts = " ".join(item.text for item in slide_texts(str(made / "scan.svs")))
    for name, canary in CANARIES.items():
        assert canary in texts, name
    openslide = pytest.importorskip("openslide")
    with openslide.OpenSlide(made / "scan.svs") as slide:
        assert {"label", "macro"} <= set(slide.associated_images)


@pytest.mark.parametrize("name", NAMES)
def test_a_clean_output_passes(made: Path, name: str) -> None:
    result = audit(made / "out" / name, made)
    assert result.findings == ()
    assert result.ok
    assert result.texts >= len(CANARIES)
    assert result.pictures == 2
    sizes = [
        path.stat().st_size for path in (made / "out").rglob("*") if path.is_file() and name in str(path)
    ]
    assert result.bytes_searched == sum(sizes)
    assert result.files == len(sizes)


@pytest.mark.slow
def test_a_folder_of_outputs_is_audited_whole(made: Path) -> None:
    result = audit(made / "out", made)
    assert result.findings == ()
    assert result.files == sum(path.is_file() for path in (made / "out").rglob("*"))


@pytest.mark.slow
def test_the_folder_of_a_run_passes(made: Path, tmp_path: Path) -> None:
    """A file that runs begin to write has to be made known to the audit."""
    (tmp_path / "in").mkdir()
    shutil.copy(made / "scan.svs", tmp_path / "in")
    (tmp_path / "in" / "broken.svs").write_bytes(b"II*\0" + bytes(100))
    done = run("convert", tmp_path / "in", "-o", tmp_path / "run", "-g", "identity", "--workers", "1")
    assert done.returncode == 3, done.stderr
    assert audit(tmp_path / "run", made).findings == ()


def test_an_output_of_the_older_layout_passes(made: Path, tmp_path: Path) -> None:
    slide = open_slide(made / "scan.svs")
    convert_slide(slide, tmp_path / "old.ome.zarr", settings("0.4"))
    assert audit(tmp_path / "old.ome.zarr", made).findings == ()


def test_every_text_is_found(made: Path, tmp_path: Path) -> None:
    records = tmp_path / ".wsi_run" / "slides"
    records.mkdir(parents=True)
    for name, canary in CANARIES.items():
        (records / f"{name}.json").write_text(json.dumps({"reason": f"so says {canary.lower()}!"}))
    (records / "clean.json").write_text(json.dumps({"reason": "aperio.MPP"}))
    found = audit(tmp_path, made).findings
    assert {finding.where for finding in found} == {f".wsi_run/slides/{name}.json" for name in CANARIES}
    assert {finding.kind for finding in found} == {"text"}
    assert not any(canary.lower() in str(found).lower() for canary in CANARIES.values())


def replace_qc(copy: Path, change: Callable[[bytes], bytes]) -> None:
    path = copy / "scan.ome.zarr.qc.png"
    path.write_bytes(change(path.read_bytes()))


def with_chunk(kind: bytes, body: bytes) -> Callable[[bytes], bytes]:
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", binascii.crc32(kind + body))
    return lambda png: png[:-12] + chunk + png[-12:]


def in_a_compressed_chunk(folder: Path, png: bytes) -> str:
    body = b"Comment\0\0" + zlib.compress(CANARIES["description"].encode())
    (folder / "a.ome.zarr.qc.png").write_bytes(with_chunk(b"zTXt", body)(png))
    return "a.ome.zarr.qc.png, zTXt chunk"


def in_utf16(folder: Path, png: bytes) -> str:
    (folder / "summary.csv").write_bytes(b"a,b\n" + CANARIES["artist"].encode("utf-16-be"))
    return "summary.csv"


def in_html(folder: Path, png: bytes) -> str:
    text = CANARIES["document"].encode("ascii", "xmlcharrefreplace").decode()
    (folder / "report.html").write_text(f"<td>{text}</td>" + "x" * 3_000_000)
    return "report.html"


def across_chunks(folder: Path, png: bytes) -> str:
    (folder / "run.json").write_text("-" * ((1 << 20) - 7) + CANARIES["maker"] + "-" * 100)
    return "run.json"


def in_a_link(folder: Path, png: bytes) -> str:
    (folder / ".wsi_run" / "slides" / "link.json").write_text('"Zbigniew%20Kowalczyk.png"')
    return ".wsi_run/slides/link.json"


def in_json_escapes(folder: Path, png: bytes) -> str:
    (folder / ".wsi_run" / "slides" / "escapes.json").write_text(json.dumps(CANARIES["document"]))
    return ".wsi_run/slides/escapes.json"


def in_a_data_uri(folder: Path, png: bytes) -> str:
    coded = base64.b64encode(html.escape(f"<svg>{CANARIES['host']}</svg>").encode()).decode()
    (folder / ".wsi_run" / "slides" / "uri.json").write_text(f'"data:image/svg+xml;base64,{coded}"')
    return ".wsi_run/slides/uri.json, base64 text 1"


def in_a_name(folder: Path, png: bytes) -> str:
    name = f"{CANARIES['host'].lower()}.ome.zarr.qc.png"
    (folder / name).write_bytes(png)
    return f"{name}, its name"


def in_the_profile(folder: Path, png: bytes) -> str:
    (folder / "b.ome.zarr").mkdir()
    (folder / "b.ome.zarr" / "profile.icc").write_bytes(audit_slide.icc_profile())
    return "b.ome.zarr/profile.icc"


def in_noise(folder: Path, png: bytes) -> str:
    chunk = folder / "b.ome.zarr" / "0" / "c" / "0" / "0" / "0"
    chunk.parent.mkdir(parents=True)
    noise = np.random.default_rng(1).integers(0, 256, 3 << 20, np.uint8).tobytes()
    chunk.write_bytes(noise[: 1 << 20] + CANARIES["barcode"].encode() + noise[1 << 20 :])
    return "b.ome.zarr/0/c/0/0/0"


def in_a_tiff_tag(folder: Path, png: bytes) -> str:
    pixels = np.zeros((64, 64, 3), np.uint8)
    tifffile.imwrite(folder / "a.ome.tif", pixels, software=CANARIES["model"], metadata=None)
    return "a.ome.tif"


def test_a_text_is_found_however_it_is_written(made: Path, tmp_path: Path) -> None:
    (tmp_path / ".wsi_run" / "slides").mkdir(parents=True)
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "PNG")
    plants = [in_a_compressed_chunk, in_utf16, in_html, across_chunks, in_a_link, in_json_escapes]
    plants += [in_a_data_uri, in_a_name, in_the_profile, in_noise, in_a_tiff_tag]
    expected = {plant(tmp_path, buffer.getvalue()) for plant in plants}
    found = {finding.where for finding in audit(tmp_path, made).findings if finding.kind == "text"}
    assert found == expected


def paste(pixels: np.ndarray, picture: np.ndarray, scale: float, y: int, x: int) -> None:
    height, width = (round(side * scale) for side in picture.shape[:2])
    pixels[y : y + height, x : x + width] = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def as_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def qc_with(picture: np.ndarray, scale: float, made: Path) -> np.ndarray:
    pixels = np.array(Image.open(made / "out" / "scan.ome.zarr.qc.png").convert("RGB"))
    paste(pixels, picture, scale, 90, 40)
    return pixels


def label_in_the_qc(copy: Path, made: Path) -> str:
    coded = as_jpeg(qc_with(audit_slide.label(), 0.5, made), 75)
    Image.open(io.BytesIO(coded)).save(copy / "scan.ome.zarr.qc.png")
    return "scan.ome.zarr.qc.png"


def macro_in_a_thumbnail(copy: Path, made: Path) -> str:
    pictures = copy / ".wsi_run" / "pictures"
    pictures.mkdir(parents=True)
    pixels = np.full((200, 320, 3), 230, np.uint8)
    paste(pixels, audit_slide.macro(), 0.3, 30, 20)
    (pictures / "scan-1.before.jpg").write_bytes(as_jpeg(pixels, 85))
    return ".wsi_run/pictures/scan-1.before.jpg"


def label_in_a_data_uri(copy: Path, made: Path) -> str:
    pixels = np.full((300, 300, 3), 250, np.uint8)
    paste(pixels, np.rot90(audit_slide.label()), 0.6, 20, 30)
    coded = base64.b64encode(as_jpeg(pixels, 85)).decode()
    (copy / "report.html").write_text(f'<img src="data:image/jpeg;base64,{coded}">')
    return "report.html, base64 text 1"


def part_of_a_label_in_a_block(copy: Path, made: Path) -> str:
    kvstore = {"driver": "file", "path": f"{copy / 'scan.ome.zarr' / '0'}/"}
    level = ts.open({"driver": "zarr3", "kvstore": kvstore}).result()
    part = audit_slide.label()[30:130, 10:200].transpose(2, 0, 1)
    level[:, 700:800, 300:490].write(part).result()
    return "scan.ome.zarr, level 0"


def coded_label(copy: Path, made: Path) -> str:
    with tifffile.TiffFile(made / "scan.svs") as tiff:
        page = tiff.pages[2]
        tiff.filehandle.seek(page.dataoffsets[3])
        data = tiff.filehandle.read(page.databytecounts[3])
    with (copy / "scan.ome.zarr" / "profile.icc").open("ab") as file:
        file.write(data)
    return "scan.ome.zarr/profile.icc"


def test_a_picture_is_found_however_it_is_coded(copy: Path, made: Path) -> None:
    plants = [label_in_the_qc, macro_in_a_thumbnail, label_in_a_data_uri]
    plants += [part_of_a_label_in_a_block, coded_label]
    expected = {plant(copy, made) for plant in plants}
    assert {finding.where for finding in audit(copy, made).findings if finding.kind == "picture"} == expected


def test_what_we_do_not_write_is_a_finding(copy: Path, made: Path) -> None:
    store, tiff = copy / "scan.ome.zarr", copy / "scan.ome.tif"
    with tifffile.TiffWriter(tiff, append="force") as writer:
        writer.write(np.zeros((64, 64, 3), np.uint8), photometric="rgb", metadata=None, software="x")
    with tiff.open("ab") as file:
        file.write(bytes(range(40)))
    shutil.copytree(store / "0", store / "7")
    (store / "thumbnail.jpg").write_bytes(as_jpeg(np.zeros((8, 8, 3), np.uint8), 90))
    (store / "source").symlink_to("/nowhere")
    outside = store / "0" / "c" / "0" / "99" / "0"
    outside.parent.mkdir()
    outside.write_bytes(b"x")
    shard = store / "1" / "c" / "0" / "0" / "0"
    shard.write_bytes(b"hidden" + shard.read_bytes())
    replace_qc(copy, with_chunk(b"tEXt", b"Comment\0by nobody"))
    found = {finding.where for finding in audit(copy, made).findings if finding.kind == "unknown"}
    assert found >= {
        "scan.ome.tif, page 3",
        "scan.ome.tif, file",
        "scan.ome.zarr/7",
        "scan.ome.zarr/thumbnail.jpg",
        "scan.ome.zarr/source",
        "scan.ome.zarr/0/c/0/99/0",
        "scan.ome.zarr/1/c/0/0/0",
        "scan.ome.zarr.qc.png",
    }


def test_the_file_name_is_kept_and_told(made: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{CANARIES['host']}.svs"
    shutil.copy(made / "scan.svs", path)
    convert_slide(open_slide(path), tmp_path / "named.ome.zarr", settings())
    result = audit_output(tmp_path / "named.ome.zarr", path)
    assert result.findings == ()
    assert any("file name" in remark for remark in result.remarks)
    assert CANARIES["host"] not in str(result.remarks)


def test_what_cannot_be_audited_is_an_error(made: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such output"):
        audit_output(tmp_path / "none.ome.zarr", made / "scan.svs")
    with pytest.raises(SlideError, match="no such file"):
        audit_output(made / "out", tmp_path / "none.svs")


def in_manifest(text: str, path: Path) -> None:
    document = json.loads(path.read_text())
    document["slide"]["mpp_origin"] = f"so says {text}"
    path.write_text(json.dumps(document))


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_says_clean_or_fails_with_5(copy: Path, made: Path) -> None:
    store = copy / "scan.ome.zarr"
    clean = run("audit", store, "--against", made / "scan.svs")
    assert clean.returncode == 0, clean.stderr
    assert "Not proven" in clean.stdout
    in_manifest(CANARIES["barcode"], store / "manifest.json")
    leaky = run("audit", store, "--against", made / "scan.svs", "--log-format", "json")
    assert leaky.returncode == 5
    lines = [json.loads(line) for line in leaky.stdout.splitlines()]
    assert lines[0]["status"] == "findings"
    assert lines[-1]["event"] == "error"
    assert CANARIES["barcode"] not in leaky.stdout + leaky.stderr
    assert "manifest.json" in leaky.stderr


@pytest.mark.parametrize(
    "name", ["CMU-1-Small-Region.svs", pytest.param("test3-DAPI-2-(387).ndpi", marks=pytest.mark.slow)]
)
def test_outputs_of_real_slides_pass(data_dir: Path, tmp_path: Path, name: str) -> None:
    path = data_dir / "slides" / name
    slide = open_slide(path)
    config = settings()
    any_stain = {"input": type(config.input)(stain="any")}
    config = type(config)(**any_stain, generator=config.generator, output=config.output)
    result = convert_slide(slide, tmp_path / "real.ome.zarr", config)
    slide.close()
    found = audit_output(tmp_path / ("real.ome.zarr" if result.path else ""), path)
    assert found.findings == ()
    assert found.pictures >= 1
