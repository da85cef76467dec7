"""``summary.csv``: one line for every file that a run found, for spreadsheets and for programs.

RFC 4180, UTF-8 with a byte order mark (without it Excel takes UTF-8 for something else), a head line, and one
line a file whatever its name holds. Empty cells are unknown or do not apply. Columns:

``source`` (as found), ``status`` (queued, running, done, failed, skipped), ``reason``, ``output`` (relative
to this file), ``slide_id``, ``mpp_x``, ``mpp_y`` (µm per pixel of the output), ``mpp_origin``,
``tissue_mm2``, ``tiles``, ``blocks``, ``seconds``, ``size_bytes`` (of the output), ``content_sha256``,
``disagreement_mean``, ``disagreement_largest`` (grey levels), ``seams`` (passed, failed, too little tissue),
``warnings`` (joined by `` | ``), ``attempts``, ``reader``, ``stain``, ``fingerprint``.

Why text is changed: a name may hold what a spreadsheet takes for a formula, which would then run on
somebody's desk; such text gets a leading apostrophe. Characters that do not show are spelled as ``\\u202e``,
in the page too: they can make a name look like another one.
"""

from __future__ import annotations

import csv
import io
import math
import re
import unicodedata
from collections.abc import Iterable
from typing import TypeAlias

from wsi_pipeline.runs.records import Record, SlideResult

__all__ = ["COLUMNS", "Cell", "reason_of", "summary_bytes", "summary_row", "verdict", "visible"]

Cell: TypeAlias = str | int | float

COLUMNS = (
    *("source", "status", "reason", "output", "slide_id", "mpp_x", "mpp_y", "mpp_origin", "tissue_mm2"),
    *("tiles", "blocks", "seconds", "size_bytes", "content_sha256", "disagreement_mean"),
    *("disagreement_largest", "seams", "warnings", "attempts", "reader", "stain", "fingerprint"),
)
# After a semicolon too: where the decimal sign is a comma, Excel splits lines there, quoted or not. The last
# four are the wide forms of = + - @, which some spreadsheets take for the narrow ones.
_FORMULA = re.compile("(^|;)(?=\\s*[=+\\-@\uff1d\uff0b\uff0d\uff20])")
_SHORT = {9: "\\t", 10: "\\n", 13: "\\r"}
_VERDICTS = {True: "passed", False: "failed", None: "too little tissue"}


def summary_bytes(records: Iterable[Record]) -> bytes:
    """The whole file."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    writer.writerows(summary_row(record) for record in records)
    return text.getvalue().encode("utf-8-sig")


def summary_row(record: Record) -> list[Cell]:
    """One line, in the order of ``COLUMNS``; numbers are numbers, texts safe in a spreadsheet."""
    head = [record.source, record.status, reason_of(record), record.output]
    result = record.result
    if result is None:
        gap = [""] * (len(COLUMNS) - len(head) - 4)
        return [*map(_safe, head), *gap, record.attempts, "", "", ""]
    mpp_y, mpp_x = result.mpp
    disagreement = result.disagreement or {}
    return [
        *map(_safe, head),
        _safe(result.slide_id),
        _number(mpp_x),
        _number(mpp_y),
        _safe(result.mpp_origin),
        _number(round(result.tissue_mm2, 4)),
        result.tiles,
        result.blocks,
        _number(round(result.seconds, 2)),
        result.size_bytes,
        _safe(result.content),
        _number(disagreement.get("mean")),
        _number(disagreement.get("largest")),
        verdict(result),
        _safe(" | ".join(result.warnings)),
        record.attempts,
        _safe(result.reader),
        _safe(result.stain),
        _safe(result.fingerprint),
    ]


def reason_of(record: Record) -> str:
    """Why a file failed, was skipped or waits; "" where there is nothing to say."""
    nothing = record.result.no_tissue if record.result is not None else ""
    return record.reason or (f"no tissue: {nothing}" if nothing else "")


def verdict(result: SlideResult) -> str:
    """``passed``, ``failed``, ``too little tissue`` to tell, or "" where seams were not measured."""
    return "" if result.seams is None else _VERDICTS.get(result.seams.get("pass"), "")


def visible(text: str) -> str:
    """The text with every character that does not show spelled out, e.g. ``\\u202e``, on one line.

    Spelled as ``names.shown`` does, a byte that is no UTF-8 as ``\\xff``; but wide spaces stay, backslashes
    are not doubled, and doing it twice changes nothing. The result can always be encoded.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or unicodedata.category(char) == "Zs" else _spelled(ord(char))
        for char in text
    )


def _spelled(code: int) -> str:
    if code in _SHORT:
        return _SHORT[code]
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _safe(text: str) -> str:
    return _FORMULA.sub(r"\1'", visible(text))


def _number(value: float | None) -> Cell:
    return "" if value is None or not math.isfinite(value) else value
