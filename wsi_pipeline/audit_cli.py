"""``wsi-pipeline audit``: parse, call one library function, render."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from wsi_pipeline.audit.result import AuditResult

__all__ = ["audit"]

_SHOWN = 5
"""Findings that an error names."""

OutputArg = Annotated[
    Path, typer.Argument(metavar="OUT", help="An .ome.zarr, an .ome.tif, or the folder of a run.")
]
AgainstOpt = Annotated[str, typer.Option("--against", metavar="SLIDE", help="The slide that it was made of.")]
LogOpt = Annotated[
    Literal["text", "json"], typer.Option(help="text, or json for one JSON object a line on stdout.")
]


def audit(output: OutputArg, against: AgainstOpt, log_format: LogOpt = "text") -> None:
    """Search every byte of an output for texts, label and macro of its slide."""
    from wsi_pipeline.audit.audit import audit_output
    from wsi_pipeline.console import show_result
    from wsi_pipeline.errors import OutputError

    result = audit_output(output, against)
    if not result.ok:
        if log_format == "json":
            show_result(_values(result), "", log_format)
        named = "; ".join(str(finding) for finding in result.findings[:_SHOWN])
        more = len(result.findings) - _SHOWN
        raise OutputError(
            f"{output}: {len(result.findings)} findings: {named}{f'; and {more} more' if more > 0 else ''}; "
            "do not hand it on",
            path=output,
        )
    show_result(_values(result), _text(result), log_format)


def _values(result: AuditResult) -> dict[str, Any]:
    status = "clean" if result.ok else "findings"
    return {"status": status, **asdict(result), "output": str(result.output)}


def _text(result: AuditResult) -> str:
    head = (
        f"{result.output}: nothing of {result.slide} was found: {result.texts} texts and {result.pictures} "
        f"pictures searched for in {result.files} files, {result.bytes_searched / 1e6:.1f} MB"
    )
    lines = [f"Note: {remark}" for remark in result.remarks]
    lines += [f"Not proven: {limit}" for limit in result.not_proven]
    return "\n".join([head, *lines])
