"""The table of a run's report: one row for every file that the run found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wsi_pipeline.runs.pictures import PICTURES, picture_name
from wsi_pipeline.runs.records import Record, SlideResult
from wsi_pipeline.runs.report_text import Lying, cause, elapsed, href, name, size, text
from wsi_pipeline.runs.summary import verdict

__all__ = ["STRONG_DISAGREEMENT", "look_at", "render_table"]

STRONG_DISAGREEMENT = 16.0
"""Grey levels from which overlapping tiles differ so much that somebody should look."""

_HEADS = (
    *(("Slide", "sorts"), ("Source", "pic"), ("Converted", "pic"), ("µm per pixel", "n sorts")),
    *(("Tissue, mm²", "n sorts"), ("Tiles", "n sorts"), ("Time", "n sorts"), ("Size", "n sorts")),
    ("Seams", "seam sorts"),
)
_SEAM_WORDS: Mapping[str, tuple[str, str]] = {
    "border_gradient": ("gradient", "ratio"),
    "line_excess": ("steps", "difference"),
    "sharpness": ("sharpness", "ratio"),
    "grid_shift": ("grid shift", "largest"),
    "cell_gradient": ("cell gradient", "ratio"),
    "cell_excess": ("cell steps", "difference"),
}
_NO_RESULT = "<td></td>" * 6


def look_at(record: Record) -> tuple[str, ...]:
    """Why a finished slide should be looked at before it is used; empty where nothing is odd."""
    result = record.result
    if result is None or record.status != "done":
        return ()
    found = list(result.warnings)
    if verdict(result) == "failed":
        found.insert(0, "the seam figures failed")
    largest = (result.disagreement or {}).get("largest", 0.0)
    if largest >= STRONG_DISAGREEMENT:
        found.insert(0, f"overlapping tiles differ by {STRONG_DISAGREEMENT:g} grey levels or more somewhere")
    return tuple(found)


def render_table(records: Sequence[Record], lying: Lying) -> str:
    """The section with all rows; ``lying`` tells which pictures and outputs there are to link."""
    counts = {status: sum(r.status == status for r in records) for status in ("failed", "done", "skipped")}
    waits = len(records) - sum(counts.values())
    looks = sum(bool(look_at(record)) for record in records)
    choices = (
        *(("all", "All", len(records)), ("failed", "Failed", counts["failed"])),
        *(("look", "Done, to look at", looks), ("done", "Done", counts["done"])),
        *(("skipped", "Skipped", counts["skipped"]), ("waits", "Waiting or running", waits)),
    )
    shown = [choice for choice in choices if choice[2] or choice[0] == "all"]
    radios = "".join(
        f'<input type=radio name=f id="f-{key}"{" checked" if key == "all" else ""}>' for key, _, _ in shown
    )
    labels = "".join(f'<label for="f-{key}">{words} {count:,}</label>' for key, words, count in shown)
    heads = "".join(f'<th scope=col class="{kind}">{words}</th>' for words, kind in _HEADS)
    rows = "\n".join(_row(number_, record, lying) for number_, record in enumerate(records))
    return (
        f"<section id=slides><h2>Every file</h2>{radios}<div class=bar>{labels}"
        '<input type=search id=find hidden placeholder="Search names and reasons" aria-label="Search"></div>'
        f"<table class=slides><thead><tr>{heads}</tr></thead><tbody>\n{rows}\n</tbody></table></section>"
    )


def _row(at: int, record: Record, lying: Lying) -> str:
    kinds = text(f"{record.status} look" if look_at(record) else record.status)
    qc = f"{record.output}.qc.png" if record.output else ""
    link = qc if qc and lying.has(qc) else ""
    first = _first(record, link, lying)
    before = _picture(record, "before", "source", link, lying)
    after = _picture(record, "after", "converted", link, lying)
    head = f'<tr id=row{at} class="{kinds}">'
    if record.result is None and not before and not after:
        return f"{head}<td colspan={len(_HEADS)}>{first}</td></tr>"
    figures = _figures(record.result) if record.result is not None else _NO_RESULT
    return f"{head}<td>{first}</td><td class=pic>{before}</td><td class=pic>{after}</td>{figures}</tr>"


def _first(record: Record, qc: str, lying: Lying) -> str:
    """Name, status, reason or warnings, and links."""
    result, reason = record.result, "; ".join(part for part in cause(record) if part)
    parts = [f"<span class=badge>{text(record.status)}</span>{name(record.source)}"]
    if reason:
        parts.append(f"<p class=why>{text(_capital(reason))}</p>")
    parts += [f"<p class=warned>{text(_capital(words))}</p>" for words in look_at(record)]
    links = []
    if record.output and lying.has(record.output):
        links.append(f'<a href="{href(record.output)}">output</a>')
    if qc:
        links.append(f'<a href="{href(qc)}">QC picture</a>')
    overlay = f"{record.output}.overlay.png"
    if record.status != "done" and record.output and lying.has(overlay):
        links.append(f'<a href="{href(overlay)}">tissue picture</a>')
    notes = list(links)
    if result is not None and result.resumed:
        notes.append(f"{result.resumed:,} blocks kept from an earlier attempt")
    if record.attempts > 1:
        notes.append(f"{record.attempts} attempts")
    if notes:
        parts.append(f"<p class=soft>{' · '.join(notes)}</p>")
    return "".join(parts)


def _picture(record: Record, which: str, words: str, link: str, lying: Lying) -> str:
    path = f"{PICTURES}/{picture_name(record.key, which)}"
    if not lying.has(path):
        return ""
    picture = f'<img src="{href(path)[2:]}" width=128 height=104 loading=lazy alt="{words}">'
    return f'<a href="{href(link)}">{picture}</a>' if link else picture


def _figures(result: SlideResult) -> str:
    mpp_y, mpp_x = result.mpp
    square = abs(mpp_y - mpp_x) <= 1e-3 * max(abs(mpp_y), abs(mpp_x))
    pixel = f"{mpp_x:.4g}" if square else f"{mpp_x:.4g} × {mpp_y:.4g}"
    made = not result.no_tissue
    return (
        f"<td class=n data-v={mpp_x:g}>{pixel}<p class=soft>{text(result.mpp_origin)}</p></td>"
        f"<td class=n data-v={result.tissue_mm2:.6g}>{result.tissue_mm2:,.2f}</td>"
        f"<td class=n data-v={result.tiles}>{result.tiles:,}</td>"
        f"<td class=n data-v={result.seconds:.6g}>{elapsed(result.seconds)}</td>"
        + (f"<td class=n data-v={result.size_bytes}>{size(result.size_bytes)}</td>" if made else "<td></td>")
        + f"<td>{_seams(result) if made else ''}</td>"
    )


def _seams(result: SlideResult) -> str:
    lines = []
    word = verdict(result)
    if word:
        kind = "seams-failed" if word == "failed" else "seams"
        lines.append(f"<b class={kind}>{word}</b>" if word != "too little tissue" else word)
    figures = [
        f"{words} {_seam_value(item, part, word)}"
        for key, (words, part) in _SEAM_WORDS.items()
        if isinstance(item := (result.seams or {}).get(key), Mapping) and item.get(part) is not None
    ]
    if figures:
        lines.append(f"<small>{'<br>'.join(figures)}</small>")
    if result.disagreement is not None:
        mean, largest = (result.disagreement.get(part, 0.0) for part in ("mean", "largest"))
        agree = "tiles agree" if not largest else f"tiles differ {mean:.2f} (most {largest:.0f})"
        lines.append(f"<small>{agree}</small>")
    return "<br>".join(lines)


def _seam_value(item: Mapping[str, Any], part: str, word: str) -> str:
    """One figure. A figure that failed is not called so where the whole passed for a stronger reason."""
    value = float(item[part])
    shown = {"ratio": f"× {value:.3f}", "difference": f"{100 * value:+.2f} %".replace("-", "−")}.get(
        part, f"{value:.3g}"
    )
    return f"{shown} (failed)" if word == "failed" and item.get("pass") is False else shown


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]
