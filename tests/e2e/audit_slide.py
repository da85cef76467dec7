"""A made-up Aperio slide with a canary in every text and a label and a macro that nobody can mistake."""

from __future__ import annotations

import struct
from pathlib import Path

import cv2
import numpy as np
import tifffile

from wsi_pipeline.core.geometry import Region, Size
from wsi_pipeline.core.protocols import U8_HWC
from wsi_pipeline.readers.icc import srgb_profile
from wsi_pipeline.readers.synthetic import SyntheticSlide

SCAN = SyntheticSlide(size=Size(1700, 1500), tissue_share=0.4, seed=5)

CANARIES = {
    "description": "Quillfeather^Ottoline",
    "barcode": "S26-7731984",
    "artist": "Zbigniew Kowalczyk",
    "host": "SCANHOST-PATH07",
    "copyright": "Klinikum Rechts der Yssel",
    "document": "Überweisung Jürgensmeyer",
    "maker": "Vexelmatic",
    "model": "VX-9000-PROTO",
    "date": "2031:04:17 08:15:42",
    "xp": "Nadelbiopsie Frau Przybylski",
    "icc": "Monitor of Doctor Wintergreenberg",
}


def label() -> U8_HWC:
    """White paper with lettering and a bar code, [360, 300, 3]."""
    paper = np.full((360, 300, 3), 236, np.uint8)
    for row, text in enumerate(("QUILLFEATHER", "S26-7731984", "HE 17.04.31", "KLINIKUM")):
        place = (14 + 9 * row, 60 + 55 * row)
        cv2.putText(paper, text, place, cv2.FONT_HERSHEY_SIMPLEX, 1.0 + 0.1 * row, (30, 20, 60), 3)
    rng = np.random.default_rng(7)
    for x in range(20, 280, 6):
        paper[270:340, x : x + int(rng.integers(1, 5))] = 15
    noise = rng.normal(0, 4, paper.shape)
    return np.clip(paper + noise, 0, 255).astype(np.uint8)


def macro() -> U8_HWC:
    """The whole glass: label at the left, a blurred copy of the tissue at the right, [300, 900, 3]."""
    glass = np.full((300, 900, 3), 205, np.uint8)
    glass[:, :250] = cv2.resize(label(), (250, 300), interpolation=cv2.INTER_AREA)
    scan = SCAN.read_level(0, Region.of(SCAN.size))
    glass[20:280, 500:730] = cv2.resize(scan, (230, 260), interpolation=cv2.INTER_AREA)
    noise = np.random.default_rng(8).normal(0, 3, glass.shape)
    return np.clip(glass + noise, 0, 255).astype(np.uint8)


def icc_profile() -> bytes:
    """An sRGB profile whose copyright is a canary."""
    profile = bytearray(srgb_profile())
    (count,) = struct.unpack_from(">I", profile, 128)
    for entry in range(132, 132 + 12 * count, 12):
        if profile[entry : entry + 4] == b"cprt":
            text = CANARIES["icc"].encode("utf-16-be")
            body = b"mluc" + struct.pack(">IIIHHII", 0, 1, 12, 0x656E, 0x5553, len(text), 28) + text
            struct.pack_into(">II", profile, entry + 4, len(profile), len(body))
            profile += body + bytes(-len(body) % 4)
    struct.pack_into(">I", profile, 0, len(profile))
    return bytes(profile)


def write_slide(path: Path) -> Path:
    """Write the slide as an SVS that OpenSlide and our TIFF reader open."""
    scan = SCAN.read_level(0, Region.of(SCAN.size))
    head = "Aperio Image Library v12.0.15\r\n"
    fields = f"|AppMag = 20|MPP = 0.5000|User = {CANARIES['description']}|Barcode = {CANARIES['barcode']}"
    extra = [
        (315, "s", 0, CANARIES["artist"], True),
        (316, "s", 0, CANARIES["host"], True),
        (33432, "s", 0, CANARIES["copyright"], True),
        (269, "s", 0, CANARIES["document"].encode(), True),
        (271, "s", 0, CANARIES["maker"], True),
        (272, "s", 0, CANARIES["model"], True),
        (40092, "B", 0, CANARIES["xp"].encode("utf-16-le"), True),
    ]
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            scan,
            tile=(256, 256),
            compression="jpeg",
            photometric="rgb",
            description=f"{head}1500x1700 [0,0 1500x1700] (256x256) JPEG/RGB Q=90{fields}",
            datetime=CANARIES["date"],
            software=False,
            iccprofile=icc_profile(),
            extratags=extra,
            metadata=None,
        )
        small = cv2.resize(scan, (375, 425), interpolation=cv2.INTER_AREA)
        beside = {"": small, "label 300x360": label(), "macro 900x300": macro()}
        for number, (name, pixels) in enumerate(beside.items()):
            tiff.write(
                pixels,
                compression="lzw" if name.startswith("label") else "jpeg",
                predictor=name.startswith("label"),
                rowsperstrip=pixels.shape[0] if number != 1 else 40,
                photometric="rgb",
                subfiletype={0: 0, 1: 1, 2: 9}[number],
                description=f"{head}{name or '1500x1700 -> 375x425 - '}",
                software=False,
                metadata=None,
            )
    return path
