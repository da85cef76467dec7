"""Sizes and durations: what people write, what they are told."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.runs.sizes import parse_deadline, parse_size, show_size

NOW = datetime(2026, 11, 25, 22, 15)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("64GB", 64 * 10**9),
        ("64G", 64 * 10**9),
        ("500MiB", 500 * 2**20),
        ("1.5 TB", 1_500_000_000_000),
        ("1000000", 10**6),
        (" 2 kb ", 2000),
        ("1KiB", 1024),
        ("0", 0),
        ("7 B", 7),
        ("0.1 GB", 10**8),  # floats would say 100000000.00000001
        ("0.3KB", 300),
    ],
)
def test_sizes_that_people_write(text: str, count: int) -> None:
    assert parse_size(text, "directory.max_disk") == count


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "1,5GB", "1e9", "64 XB", "64GBB", "nan", "1_000", "9e", "٣G"]
)
def test_what_is_no_size_names_the_setting_and_the_remedy(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^directory\.max_ram: .*write it as 64GB"):
        parse_size(text, "directory.max_ram")


def test_a_size_beyond_any_disk_is_refused() -> None:
    with pytest.raises(ConfigError, match="more than any disk"):
        parse_size("99999999999999 PB", "directory.max_disk")


@given(st.integers(0, 10**18 - 1))
def test_a_size_that_is_shown_can_be_given_again(count: int) -> None:
    again = parse_size(show_size(count), "x")
    assert abs(again - count) <= count * 0.005 + 0.5


@given(st.integers(0, 10**15), st.sampled_from(["", "B", "KB", "KiB", "MB", "MiB", "GB", "GiB"]))
def test_whole_numbers_are_exact(count: int, unit: str) -> None:
    factor = {"": 1, "B": 1, "K": 1, "M": 2, "G": 3}[unit[:1]]
    base = 1024 if "i" in unit else 1000
    expected = count * (base**factor if len(unit) > 1 else 1)
    if expected < 2**63:
        assert parse_size(f"{count}{unit}", "x") == expected


@pytest.mark.parametrize(
    ("text", "deadline"),
    [
        ("06:30", datetime(2026, 11, 26, 6, 30)),
        ("23:00", datetime(2026, 11, 25, 23, 0)),
        ("22:15", datetime(2026, 11, 26, 22, 15)),  # now is over
        ("2026-11-26T06:30", datetime(2026, 11, 26, 6, 30)),
        ("2026-11-26 06:30:10", datetime(2026, 11, 26, 6, 30, 10)),
        ("8h", NOW + timedelta(hours=8)),
        ("90m", NOW + timedelta(minutes=90)),
        ("90min", NOW + timedelta(minutes=90)),
        ("1h30m", NOW + timedelta(minutes=90)),
        ("3600s", NOW + timedelta(hours=1)),
        ("1.5 h", NOW + timedelta(minutes=90)),
        ("2d", NOW + timedelta(days=2)),
    ],
)
def test_deadlines_that_people_write(text: str, deadline: datetime) -> None:
    assert parse_deadline(text, NOW) == deadline


def test_a_deadline_with_a_zone_is_taken_in_local_time() -> None:
    local = datetime(2026, 11, 26, 6, 30).astimezone()
    assert parse_deadline(local.isoformat(), NOW) == datetime(2026, 11, 26, 6, 30)


@pytest.mark.parametrize("text", ["", "soon", "25:00", "06:61", "8", "0h", "-8h", "h", "30m1h", "99999999d"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^directory\.deadline: .* is no time; write it as"):
        parse_deadline(text, NOW)


def test_a_time_that_is_over_is_refused() -> None:
    with pytest.raises(ConfigError, match="is over"):
        parse_deadline("2026-11-25T22:14", NOW)


@given(st.floats(0.01, 1e6))
def test_a_duration_always_lies_ahead(hours: float) -> None:
    if hours < 24 * 365 * 100:
        assert parse_deadline(f"{hours:.4f}h", NOW) > NOW


@pytest.mark.parametrize(
    ("count", "text"),
    [(12, "12 B"), (999, "999 B"), (1500, "1.5 kB"), (640 * 10**6, "640 MB"), (1_999_999_999, "2 GB"),
     (999_999, "1 MB"), (64 * 10**9, "64 GB")],
)  # fmt: skip
def test_sizes_as_people_read_them(count: int, text: str) -> None:
    assert show_size(count) == text
