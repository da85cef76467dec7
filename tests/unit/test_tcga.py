"""TCGA barcodes in file names."""

from __future__ import annotations

import pytest

from wsi_pipeline.cohorts.tcga import Barcode, parse_barcode


@pytest.mark.parametrize(
    ("name", "patient", "domain", "normal"),
    [
        ("TCGA-18-3408-01A-01-BS1.6da3d3b3-e891-4922-9135-70fc9cf8959f.svs", "TCGA-18-3408", "FF", False),
        ("TCGA-69-7764-01A-01-TS1.tif", "TCGA-69-7764", "FF", False),
        ("TCGA-FG-A4MU-01B-01-MSA.svs", "TCGA-FG-A4MU", "FF", False),
        ("TCGA-A7-A13E-01Z-00-DX1.tif", "TCGA-A7-A13E", "FFPE", False),
        ("TCGA-AD-6964-01Z-00-DX1_Tile__16896_20480_.jpg", "TCGA-AD-6964", "FFPE", False),
        ("lung_TCGA-18-3408-11A-01-TS1.svs", "TCGA-18-3408", "FF", True),
        ("tcga-18-3408-11a-01-bs1", "TCGA-18-3408", "FF", True),
    ],
)
def test_a_barcode_states_patient_domain_and_sample(
    name: str, patient: str, domain: str, normal: bool
) -> None:
    assert parse_barcode(name) == Barcode(patient=patient, domain=domain, normal=normal)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    [
        "CMU-1.svs",
        "TCGA-18-3408.svs",
        "TCGA-18-3408-01A-01-XX1.svs",
        "TCGA-18-3408-01A-01-BS1234.svs",
        "XTCGA-18-3408-01A-01-BS1.svs",
        "TCGA-18-34081-01A-01-BS1.svs",
        "",
    ],
)
def test_what_is_no_slide_barcode_is_none(name: str) -> None:
    assert parse_barcode(name) is None
