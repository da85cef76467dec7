"""The mpp court: who is believed, who is thrown out, and what the errors name."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from wsi_pipeline.core.geometry import Mpp
from wsi_pipeline.errors import ConfigError, MissingMppError, MppConflictError
from wsi_pipeline.readers._tiff_structure import ome_claims
from wsi_pipeline.readers.mpp import (
    MppClaim,
    mpp_from_length,
    mpp_from_objective,
    mpp_from_resolution,
    parse_number,
    plausible,
    read_mpp_table,
    settle_mpp,
)


def settle(*claims: MppClaim, override: MppClaim | None = None) -> tuple[Mpp, str]:
    return settle_mpp(claims, override=override, slide_id="case")


VENDOR = MppClaim("aperio.MPP", (0.25, 0.25))


def test_nothing_is_missing_and_never_a_guess() -> None:
    with pytest.raises(MissingMppError, match=r"^case: no source states .* --mpp") as caught:
        settle()
    assert caught.value.slide_id == "case"


def test_first_measured_claim_wins_with_its_origin() -> None:
    assert settle(VENDOR, MppClaim("TIFF resolution", (0.2501, 0.2501))) == ((0.25, 0.25), "aperio.MPP")


def test_agreement_within_five_percent_is_no_conflict() -> None:
    assert settle(VENDOR, MppClaim("TIFF resolution", (0.262, 0.239)))[1] == "aperio.MPP"


def test_measured_conflict_names_both_numbers_and_origins() -> None:
    with pytest.raises(MppConflictError) as caught:
        settle(VENDOR, MppClaim("TIFF resolution", (0.5, 0.5)))
    for part in ("aperio.MPP = 0.25", "TIFF resolution = 0.5", "--mpp"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_conflict_on_one_axis_is_a_conflict() -> None:
    with pytest.raises(MppConflictError, match="0.25 \\(y\\) x 0.5 \\(x\\)"):
        settle(VENDOR, MppClaim("OME-XML", (0.25, 0.5)))


def test_swapped_axes_are_a_conflict() -> None:
    with pytest.raises(MppConflictError):
        settle(MppClaim("OME-XML", (0.25, 0.5)), MppClaim("TIFF resolution", (0.5, 0.25)))


def test_anisotropic_is_kept_as_y_x() -> None:
    assert settle(MppClaim("OME-XML", (0.25, 0.5)))[0] == (0.25, 0.5)


@pytest.mark.parametrize("um", [352.78, 264.58, 25400.0, 0.0, -0.25, math.nan, math.inf, 0.01])
def test_absurd_values_are_no_claims_but_are_mentioned(um: float) -> None:
    assert settle(MppClaim("TIFF resolution", (um, um)), VENDOR)[1] == "aperio.MPP"
    with pytest.raises(MissingMppError, match="not credible: TIFF resolution"):
        settle(MppClaim("TIFF resolution", (um, um)))


def test_objective_is_used_only_alone_and_says_nominal() -> None:
    objective = MppClaim("objective power", (0.25, 0.25), nominal=True)
    assert settle(objective) == ((0.25, 0.25), "objective power (nominal)")
    assert settle(objective, MppClaim("aperio.MPP", (0.2277, 0.2277))) == ((0.2277, 0.2277), "aperio.MPP")


def test_lying_objective_is_a_conflict() -> None:
    with pytest.raises(MppConflictError, match="objective power = 0.5"):
        settle(VENDOR, MppClaim("objective power", (0.5, 0.5), nominal=True))


@pytest.mark.parametrize("override", [(0.3, 0.3), (0.25, 0.5)])
def test_override_wins_over_conflict_and_absence(override: Mpp) -> None:
    claim = MppClaim("--mpp", override)
    assert settle(override=claim) == (override, "--mpp")
    mpp, origin = settle(VENDOR, MppClaim("TIFF resolution", (0.5, 0.5)), override=claim)
    assert mpp == override
    agrees = max(abs(a / b - 1) for a, b in zip(override, VENDOR.mpp, strict=True)) <= 0.05
    assert origin == ("--mpp" if agrees else f"--mpp (the file says {VENDOR})")


@pytest.mark.parametrize(
    ("per_unit", "unit", "um"),
    [(101600, "inch", 0.25), (40000, "centimeter", 0.25), (4000, "mm", 0.25), (4, "um", 0.25)],
)
def test_resolution_units(per_unit: float, unit: str, um: float) -> None:
    assert mpp_from_resolution(per_unit, unit) == pytest.approx(um)


@pytest.mark.parametrize(("per_unit", "unit"), [(40000, "none"), (0, "inch"), (-1, "inch"), (math.nan, "cm")])
def test_resolution_without_meaning_is_nan(per_unit: float, unit: str) -> None:
    assert math.isnan(mpp_from_resolution(per_unit, unit))


@pytest.mark.parametrize(
    ("length", "unit", "um"), [(252.7, "nm", 0.2527), (0.0002527, "mm", 0.2527), (0.2527, "\u00b5m", 0.2527)]
)
def test_length_units(length: float, unit: str, um: float) -> None:
    assert mpp_from_length(length, unit) == pytest.approx(um)


def test_length_in_pixels_is_nan() -> None:
    assert math.isnan(mpp_from_length(1.0, "pixel"))


@pytest.mark.parametrize(
    ("text", "value"), [("0.4990", 0.499), ("0,2527", 0.2527), (" 40x", 40), ("2.5e-1 um", 0.25)]
)
def test_numbers_as_vendors_write_them(text: str, value: float) -> None:
    assert parse_number(text) == pytest.approx(value)


def test_no_number_is_nan() -> None:
    assert math.isnan(parse_number("n/a")) and math.isnan(parse_number(None))


def test_objective_powers() -> None:
    assert mpp_from_objective(20) == 0.5
    assert math.isnan(mpp_from_objective(0)) and math.isnan(mpp_from_objective(math.nan))


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ('PhysicalSizeX="0.5" PhysicalSizeY="0.25"', (0.25, 0.5)),
        (
            'PhysicalSizeX="500" PhysicalSizeXUnit="nm" PhysicalSizeY="250" PhysicalSizeYUnit="nm"',
            (0.25, 0.5),
        ),
        ('PhysicalSizeX="0.5" PhysicalSizeXUnit="&#181;m" PhysicalSizeY="0.25"', (0.25, 0.5)),
        ('PhysicalSizeX="0,5" PhysicalSizeXUnit="\u00b5m" PhysicalSizeY="0,25"', (0.25, 0.5)),
    ],
)
def test_ome_xml_units(attributes: str, expected: Mpp) -> None:
    xml = (
        f'<OME><Image><ome:Pixels ID="Pixels:0" {attributes} SizeX="9"><TiffData/></ome:Pixels></Image></OME>'
    )
    (claim,) = ome_claims(xml, 0)
    assert claim.mpp == pytest.approx(expected) and plausible(claim.mpp)


def test_ome_xml_takes_the_image_that_is_read() -> None:
    xml = '<Pixels PhysicalSizeX="8" PhysicalSizeY="8"/><Pixels PhysicalSizeX="0.5" PhysicalSizeY="0.5"/>'
    assert [claim.mpp for claim in ome_claims(xml, 1)] == [(0.5, 0.5)]
    assert list(ome_claims(xml, 2)) == [] and list(ome_claims("<Pixels SizeX='3'/>", 0)) == []


def test_table_of_overrides(tmp_path: Path) -> None:
    table = tmp_path / "mpp.csv"
    table.write_text('\ufeffslide,mpp,mpp_y\na.svs,0.25,\n"b, c","0,5",0.4\n', encoding="utf-8")
    assert read_mpp_table(table) == {"a.svs": (0.25, 0.25), "b, c": (0.4, 0.5)}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("slide,um\na,1\n", "needs the columns"),
        ("", "needs the columns"),
        ("slide,mpp\na,fast\n", "line 2: 'fast' is no pixel size"),
        ("slide,mpp\na,0.25\nb,352.78\n", "line 3: '352.78' is no pixel size"),
        ("slide,mpp\na,nan\n", "is no pixel size"),
        ("slide,mpp\n,0.25\n", "line 2: a row is"),
        ("slide,mpp\na,0,25\n", "line 2: a row is"),
        ("slide,mpp\na,0.25\na,0.5\n", "line 3: a is named twice"),
    ],
)
def test_bad_table_names_line_and_remedy(tmp_path: Path, text: str, problem: str) -> None:
    table = tmp_path / "mpp.csv"
    table.write_text(text)
    with pytest.raises(ConfigError, match=problem) as caught:
        read_mpp_table(table)
    assert str(caught.value).startswith("mpp.csv")


def test_missing_table_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.csv"):
        read_mpp_table(tmp_path / "absent.csv")
