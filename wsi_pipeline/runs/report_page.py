"""The page of a run: what a reader in the morning asks, in that order.

How did it go; which slides failed, why, and what is to be done; which finished slides should be looked at;
then every file. Equal causes stand together: 300 slides without a pixel size are one line to read.

Why nothing from outside but the pictures beside it: it has to open in a hospital without a network. Names of
files are of unknown origin: they are escaped, and a policy forbids all style and script but the page's own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from wsi_pipeline.runs.records import Record
from wsi_pipeline.runs.report_rows import look_at, render_table
from wsi_pipeline.runs.report_style import CSS, POLICY, SCRIPT
from wsi_pipeline.runs.report_text import Lying, cause, clock, elapsed, name, number, plural, size, span, text
from wsi_pipeline.runs.run_facts import RunFacts
from wsi_pipeline.writers.manifest import SYNTHETIC

__all__ = ["render_page"]

_REFRESH = 60
_SHOWN = 8  # names of one cause that are not folded away
_ORDER = ("done", "failed", "skipped", "running", "queued")


def render_page(records: Sequence[Record], facts: RunFacts, lying: Lying) -> str:
    """The whole page. Rows come in the order of ``records``; ``lying`` is the folder of the page."""
    title = f"Conversion of {facts.title}"
    refresh = f'<meta http-equiv=refresh content="{_REFRESH}">' if facts.state == "running" else ""
    table = render_table(records, lying) if records else "<p>No file was found.</p>"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">{refresh}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{text(title)}</title><style>{CSS}</style></head>\n<body><main>\n"
        f"<h1>{text(title)}</h1>\n{_head(records, facts)}\n{_failures(records)}\n{_to_look_at(records)}\n"
        f"{table}\n{_foot(facts)}\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def _head(records: Sequence[Record], facts: RunFacts) -> str:
    counts = {status: sum(record.status == status for record in records) for status in _ORDER}
    return "\n".join(
        part
        for part in (
            f"<p class=lead>{_outcome(counts, len(records))}</p>",
            f"<p class=synthetic>Converted slides are {text(SYNTHETIC)}</p>",
            _state(counts, facts),
            _notices(facts.notices),
            _counts(records, counts, facts),
            _facts(facts),
        )
        if part
    )


def _outcome(counts: Mapping[str, int], total: int) -> str:
    """The first line: it has to tell the whole truth to who reads no further."""
    slides = total - counts["skipped"]
    if not total:
        return "No file was found."
    if slides and counts["done"] == slides:
        said = "The slide is converted" if slides == 1 else f"All {slides:,} slides are converted"
    else:
        said = f"{counts['done']:,} of {plural(slides, 'slide', 'slides')} converted"
    if counts["failed"]:
        said += f", {counts['failed']:,} failed"
    waiting = counts["queued"] + counts["running"]
    if waiting:
        said += f", {waiting:,} not finished"
    if counts["skipped"]:
        said += f"; {plural(counts['skipped'], 'file', 'files')} skipped"
    return said + "."


def _state(counts: Mapping[str, int], facts: RunFacts) -> str:
    waiting = counts["queued"] + counts["running"]
    updated = text(clock(facts.updated))
    why = f" ({text(facts.why)})" if facts.why else ""
    if facts.state == "running":
        return (
            f"<div class=box><p><b>The run goes on.</b> This is its state of {updated}; the page renews "
            f'itself every minute.</p><p id=age hidden data-updated="{text(facts.updated)}">Last written '
            "<b></b> ago. If no slide takes that long, the run has ended unseen: run the same command "
            "again, and it continues.</p></div>"
        )
    if facts.state == "stopped":
        left = f" {plural(waiting, 'slide is', 'slides are')} left." if waiting else ""
        return (
            f"<div class=box><p><b>The run was stopped{why} at {updated}.</b>{left} Run the same command "
            "again to continue; what is finished is kept.</p></div>"
        )
    return f"<p class=soft>{_capital(text(facts.why))}</p>" if facts.why else ""


def _notices(notices: Sequence[str]) -> str:
    lines = "".join(f"<p>{text(_capital(words))}</p>" for words in notices)
    return f"<div class=box>{lines}</div>" if lines else ""


def _counts(records: Sequence[Record], counts: Mapping[str, int], facts: RunFacts) -> str:
    done = [record.result for record in records if record.status == "done" and record.result is not None]
    figures = [(status, f"{counts[status]:,}", status) for status in _ORDER if counts[status]]
    figures += [
        ("", number(sum(one.tissue_mm2 for one in done)), "mm² of tissue"),
        ("", f"{sum(one.tiles for one in done):,}", "tiles"),
    ]
    took = span(facts.started, facts.updated)
    if took is not None:
        figures.append(("", elapsed(took), "since the start" if facts.state == "running" else "in all"))
    items = "".join(f'<li class="{kind}"><b>{value}</b>{words}</li>' for kind, value, words in figures)
    return f"<ul class=counts>{items}</ul>"


def _facts(facts: RunFacts) -> str:
    workers = plural(facts.workers, "worker", "workers")
    ended = "last written" if facts.state == "running" else facts.state
    lines = [
        ("Time", f"started {clock(facts.started)}, {ended} {clock(facts.updated)}"),
        ("Generator", facts.generator),
        ("Executor", f"{facts.executor}, {workers}"),
    ]
    if facts.peak_ram_bytes:
        lines.append(("Peak memory", f" {size(facts.peak_ram_bytes)}, all processes together"))
    if facts.disk_bytes:
        lines.append(("Written", size(facts.disk_bytes)))
    lines += [(_capital(budget), words) for budget, words in facts.budgets.items()]
    items = "".join(f"<dt>{text(key)}</dt><dd>{text(words)}</dd>" for key, words in lines)
    return f"<dl class=facts>{items}</dl>"


def _failures(records: Sequence[Record]) -> str:
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for at, record in enumerate(records):
        if record.status == "failed":
            groups[cause(record)].append(at)
    if not groups:
        return ""
    rows = "".join(
        f"<tr><td><b>{text(_capital(what) or 'No reason was recorded')}</b></td>"
        f"<td>{text(_capital(remedy))}</td><td>{_names(records, places)}</td></tr>"
        for (what, remedy), places in sorted(groups.items(), key=lambda group: -len(group[1]))
    )
    count = sum(len(places) for places in groups.values())
    return (
        f"<section><h2>Failed: {count:,}</h2><p class=soft>Mend the cause, then run the same command with "
        "<code>--retry-failed</code>; what is done is not made again.</p><table class=causes><thead><tr>"
        f"<th>Why</th><th>What to do</th><th>Slides</th></tr></thead><tbody>{rows}</tbody></table></section>"
    )


def _to_look_at(records: Sequence[Record]) -> str:
    groups: dict[str, list[int]] = defaultdict(list)
    for at, record in enumerate(records):
        for words in dict.fromkeys(look_at(record)):
            groups[words].append(at)
    if not groups:
        return ""
    rows = "".join(
        f"<tr><td><b>{text(_capital(words))}</b></td><td>{_names(records, places)}</td></tr>"
        for words, places in sorted(groups.items(), key=lambda group: -len(group[1]))
    )
    count = len({at for places in groups.values() for at in places})
    return (
        f"<section><h2>Done, but to look at: {count:,}</h2><table class='causes look'><thead><tr><th>What "
        f"was noticed</th><th>Slides</th></tr></thead><tbody>{rows}</tbody></table></section>"
    )


def _names(records: Sequence[Record], places: Sequence[int]) -> str:
    """Links to the rows; what goes beyond a handful is folded away, and still on the page."""
    items = [f"<li><a href=#row{at}>{name(records[at].source)}</a></li>" for at in places]
    if len(items) <= _SHOWN:
        return f"<ul>{''.join(items)}</ul>"
    return (
        f"{len(items):,} slides<ul>{''.join(items[: _SHOWN - 2])}</ul><details><summary>"
        f"{len(items) - _SHOWN + 2:,} more</summary><ul>{''.join(items[_SHOWN - 2 :])}</ul></details>"
    )


def _foot(facts: RunFacts) -> str:
    return (
        "<footer><small>The same figures as a table: <a href=summary.csv>summary.csv</a>. Seams: output "
        "against source on the borders of tiles; gradient and sharpness are best near × 1, steps near 0 %; "
        "tiles differ: grey levels by which overlapping tiles disagree before they are blended. "
        f"wsi-pipeline {text(facts.version)}.</small></footer>"
    )


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]
