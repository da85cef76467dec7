"""The ledger survives torn lines, refuses other fingerprints and damaged lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from wsi_pipeline.core.geometry import BlockIndex
from wsi_pipeline.errors import FingerprintMismatchError, LedgerCorruptError, OutputError
from wsi_pipeline.writers.ledger import Ledger, merge_ledgers, read_ledgers

A, B = (0, BlockIndex(0, 1)), (2, BlockIndex(3, 4))


def begin(path: Path, fingerprint: str = "f" * 64) -> Ledger:
    return Ledger.open(path / "ledger" / "band.jsonl", fingerprint, {"numpy": "2"})


def test_records_come_back_and_a_reopened_ledger_goes_on(tmp_path: Path) -> None:
    ledger = begin(tmp_path)
    ledger.record(A, 7)
    ledger.close()
    ledger = begin(tmp_path)
    ledger.record(B, 0xFFFFFFFF)
    ledger.close()
    assert read_ledgers(tmp_path / "ledger", "f" * 64) == {A: {7}, B: {0xFFFFFFFF}}


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_last_line_is_cut_away(tmp_path: Path, cut: int) -> None:
    ledger = begin(tmp_path)
    ledger.record(A, 7)
    ledger.record(B, 8)
    ledger.close()
    path = tmp_path / "ledger" / "band.jsonl"
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    path.write_bytes(whole[: len(whole) - 1 - cut % (last - 1)])
    ledger = begin(tmp_path)
    assert read_ledgers(tmp_path / "ledger") == {A: {7}}
    ledger.record(B, 9)
    ledger.close()
    assert read_ledgers(tmp_path / "ledger") == {A: {7}, B: {9}}


def test_a_torn_header_starts_again(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "band.jsonl").write_bytes(b'{"finger')
    ledger = begin(tmp_path)
    ledger.record(A, 7)
    ledger.close()
    assert read_ledgers(tmp_path / "ledger", "f" * 64) == {A: {7}}


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    ledger = begin(tmp_path)
    ledger.record(A, 7)
    ledger.record(B, 8)
    ledger.close()
    path = tmp_path / "ledger" / "band.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"col": 1', b'"col: 1'))
    with pytest.raises(LedgerCorruptError, match="line 2 is damaged"):
        read_ledgers(tmp_path / "ledger")


def test_another_fingerprint_is_refused(tmp_path: Path) -> None:
    begin(tmp_path).close()
    with pytest.raises(FingerprintMismatchError, match="--restart"):
        begin(tmp_path, "0" * 64)
    with pytest.raises(FingerprintMismatchError):
        read_ledgers(tmp_path / "ledger", "0" * 64)


def test_merging_leaves_one_sorted_ledger(tmp_path: Path) -> None:
    for name, key in (("band-0-1", B), ("band-1-2", A)):
        ledger = Ledger.open(tmp_path / f"{name}.jsonl", "f" * 64, {})
        ledger.record(key, 5)
        ledger.close()
    merge_ledgers(tmp_path, "f" * 64, {B: 5, A: 5})
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.jsonl"]
    assert list(read_ledgers(tmp_path, "f" * 64)) == [A, B]


def test_a_folder_that_cannot_be_written_gives_one_clear_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(OutputError, match="ledger cannot be written"):
        Ledger.open(blocked / "ledger" / "band.jsonl", "f" * 64, {})
