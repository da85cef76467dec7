"""``report.html`` and ``summary.csv`` of a run over many slides, each replaced in one step."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from wsi_pipeline.runs.records import Record
from wsi_pipeline.runs.report_page import render_page
from wsi_pipeline.runs.report_text import Lying
from wsi_pipeline.runs.run_facts import RunFacts
from wsi_pipeline.runs.summary import summary_bytes
from wsi_pipeline.runs.whole_files import write_whole

__all__ = ["REPORT", "SUMMARY", "RunFacts", "write_report"]

REPORT = "report.html"
SUMMARY = "summary.csv"


def write_report(folder: Path, records: Iterable[Record], facts: RunFacts) -> None:
    """Write both into ``folder``, the run's target, with one row for each record in the order given.

    Pictures (``write_pictures`` with the same folder), outputs and QC pictures are linked where they exist at
    this moment. Raises OutputError.
    """
    rows = list(records)
    page = render_page(rows, facts, Lying(folder))
    write_whole(folder / SUMMARY, summary_bytes(rows))
    write_whole(folder / REPORT, page.encode("utf-8"))
