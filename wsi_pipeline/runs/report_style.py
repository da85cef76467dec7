"""Style sheet and script of a run's report, and the policy that lets nothing else act on the page.

The script only sorts, searches and says how old the page is; filtering by status needs no script.
"""

from __future__ import annotations

import base64
import hashlib

__all__ = ["CSS", "POLICY", "SCRIPT"]

CSS = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; --pale: #f5f7f9; --accent: #3b5b92;
  --red: #9b1c1c; --green: #1d6b3a; --amber: #8a5a00; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", "Liberation Sans", Arial, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 24px 24px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 32px 0 8px; }
h2 small { font-weight: 400; }
small, .soft { color: var(--soft); font-size: 13px; }
a { color: var(--accent); }
.lead { margin: 0 0 10px; font-size: 17px; }
.synthetic { display: inline-block; margin: 0; padding: 4px 12px; border-radius: 4px; background: #7a1f2b;
  color: #fff; font-weight: 600; }
.box { margin: 14px 0 0; padding: 9px 14px; border-radius: 6px; background: #fff6e0;
  border: 1px solid #e6c77a; }
.box p { margin: 2px 0; }
.counts { display: flex; flex-wrap: wrap; gap: 10px; margin: 18px 0 0; padding: 0; list-style: none; }
.counts li { min-width: 104px; padding: 7px 14px 8px; border: 1px solid var(--line); border-radius: 6px;
  background: var(--pale); }
.counts b { display: block; font-size: 23px; line-height: 1.2; }
.counts .failed b { color: var(--red); } .counts .done b { color: var(--green); }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 1px 16px; margin: 16px 0 0;
  font-size: 14px; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 8px 10px; border-bottom: 1px solid var(--line); }
th { font-size: 13px; color: var(--soft); font-weight: 600; }
.causes td { width: 34%; overflow-wrap: anywhere; }
.causes td:last-child { width: 32%; }
.causes ul { margin: 0; padding: 0; list-style: none; }
.causes b { color: var(--red); } .causes.look b { color: var(--amber); }
.name { font-weight: 600; overflow-wrap: anywhere; white-space: pre-wrap; }
.causes .name { font-weight: 400; }
.dir { font-weight: 400; color: var(--soft); }
.slides { table-layout: fixed; } .slides th.n { white-space: normal; }
th button { text-align: inherit; }
.slides th.n { width: 100px; } .slides th.n:nth-child(4) { width: 128px; }
.slides th.n:nth-child(5) { width: 98px; }
.slides th.n:nth-child(6) { width: 70px; } .slides th.seam { width: 176px; }
.slides small { display: inline-block; line-height: 1.3; }
.slides p { margin: 3px 0 0; overflow-wrap: anywhere; }
.slides .n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.slides .pic { width: 136px; padding-left: 4px; padding-right: 4px; }
.slides img { display: block; width: 128px; height: 104px; object-fit: contain; background: var(--pale);
  border: 1px solid var(--line); }
.slides .n p { white-space: normal; }
.slides thead th { position: sticky; top: 0; background: #fff; z-index: 1; }
.slides tr:target td { background: #eef3fb; } .slides tr { scroll-margin-top: 36px; }
.badge { display: inline-block; min-width: 62px; margin-right: 8px; padding: 0 7px; border-radius: 3px;
  border: 1px solid currentColor; font-size: 12.5px; font-weight: 600; text-align: center; }
.failed .badge, .why, .seams-failed { color: var(--red); } .done .badge { color: var(--green); }
.running .badge { color: var(--accent); } .skipped .badge, .queued .badge { color: var(--soft); }
.warned { color: var(--amber); }
.skipped .why, .queued .why, .running .why { color: var(--soft); }
.filters input[type=radio], #slides > input { position: absolute; opacity: 0; pointer-events: none; }
.bar { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; margin: 0 0 8px; }
.bar label { padding: 3px 11px; border: 1px solid var(--line); border-radius: 14px; font-size: 14px;
  cursor: pointer; }
.bar input { padding: 4px 10px; min-width: 230px; font: inherit; border: 1px solid var(--line);
  border-radius: 6px; }
#slides > input:focus-visible ~ .bar { outline: 2px solid var(--accent); outline-offset: 3px; }
#f-all:checked ~ .bar [for=f-all], #f-failed:checked ~ .bar [for=f-failed],
#f-done:checked ~ .bar [for=f-done], #f-look:checked ~ .bar [for=f-look],
#f-skipped:checked ~ .bar [for=f-skipped], #f-waits:checked ~ .bar [for=f-waits]
  { background: var(--accent); border-color: var(--accent); color: #fff; }
#f-failed:checked ~ table tbody tr:not(.failed), #f-done:checked ~ table tbody tr:not(.done),
#f-look:checked ~ table tbody tr:not(.look), #f-skipped:checked ~ table tbody tr:not(.skipped),
#f-waits:checked ~ table tbody tr:not(.queued):not(.running), tr[hidden] { display: none; }
th button { padding: 0; border: 0; background: none; font: inherit; color: inherit; cursor: pointer;
  text-decoration: underline dotted; text-underline-offset: 3px; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
footer { margin-top: 34px; padding-top: 10px; border-top: 1px solid var(--line); }
@page { size: A4 landscape; margin: 12mm; }
@media (max-width: 1280px), print { .slides { min-width: 1000px; }
  .slides .pic { width: 104px; } .slides img { width: 96px; height: 78px; }
  .slides th, .slides td { padding-left: 6px; padding-right: 6px; }
  .slides th.n { width: 84px; } .slides th.n:nth-child(4) { width: 104px; }
  .slides th.n:nth-child(5) { width: 86px; } .slides th.n:nth-child(6) { width: 56px; }
  .slides th.seam { width: 158px; } }
@media print { main { max-width: none; padding: 0; } body { font-size: 12px; } .bar { display: none; }
  .slides thead th { position: static; } tr, li, .box { break-inside: avoid; }
  .synthetic { color: #7a1f2b; background: #fff; border: 2px solid #7a1f2b; }
  a { color: inherit; text-decoration: none; } }
"""

SCRIPT = """
'use strict';
(() => {
  const store = (name, value) => {
    try {
      if (value === undefined) return sessionStorage.getItem('wsi ' + location.pathname + name);
      sessionStorage.setItem('wsi ' + location.pathname + name, value);
    } catch { return null; }
  };
  const age = document.getElementById('age');
  if (age) {
    const minutes = Math.floor((Date.now() - Date.parse(age.dataset.updated)) / 60000);
    if (minutes >= 30) {
      age.hidden = false;
      age.querySelector('b').textContent =
        minutes < 120 ? minutes + ' minutes' : Math.floor(minutes / 60) + ' hours';
    }
  }
  const body = document.querySelector('.slides tbody');
  if (!body) return;
  const rows = Array.from(body.rows);
  const find = document.getElementById('find');
  const search = () => {
    const wanted = find.value.toLowerCase();
    for (const row of rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
    store('find', find.value);
  };
  const value = (row, column) => {
    const cell = row.cells[column];
    if (!cell) return '';
    return cell.dataset.v === undefined ? cell.textContent.trim().toLowerCase() : Number(cell.dataset.v);
  };
  const sort = (head, down) => {
    const column = head.cellIndex;
    const keyed = rows.map((row, i) => [value(row, column), i, row]);
    keyed.sort(([a, i], [b, j]) => {
      if (a === '' || b === '') return (a === '') - (b === '') || i - j;
      return (a < b ? -1 : a > b ? 1 : 0) * (down ? -1 : 1) || i - j;
    });
    body.append(...keyed.map(entry => entry[2]));
    for (const other of head.parentNode.cells) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
    store('sort', column + (down ? ' down' : ''));
  };
  const heads = document.querySelectorAll('.slides th.sorts');
  for (const head of heads) {
    const button = document.createElement('button');
    button.textContent = head.textContent;
    button.addEventListener('click', () => sort(head, head.getAttribute('aria-sort') === 'ascending'));
    head.replaceChildren(button);
  }
  for (const radio of document.querySelectorAll('#slides > input')) {
    radio.addEventListener('change', () => store('filter', radio.id));
  }
  find.hidden = false;
  find.addEventListener('input', search);
  if (document.querySelector('meta[http-equiv=refresh]')) {
    const chosen = document.getElementById(store('filter') || '');
    if (chosen) chosen.checked = true;
    find.value = store('find') || '';
    if (find.value) search();
    const [column, down] = (store('sort') || '').split(' ');
    for (const head of heads) if (String(head.cellIndex) === column) sort(head, down === 'down');
  }
  const show = () => {
    const row = document.getElementById(location.hash.slice(1));
    if (row && row.matches('.slides tr') && !row.offsetParent) {
      document.getElementById('f-all').checked = true;
      find.value = '';
      search();
      row.scrollIntoView();
    }
  };
  addEventListener('hashchange', show);
})();
"""


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


# file: because browsers do not agree on whether 'self' covers a page that was opened from a disk.
POLICY = (
    f"default-src 'none'; img-src 'self' file:; style-src {_hash(CSS)}; script-src {_hash(SCRIPT)}; "
    "base-uri 'none'; form-action 'none'"
)
