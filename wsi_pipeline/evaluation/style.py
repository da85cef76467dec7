"""The style sheet of the report."""

__all__ = ["CSS"]

CSS = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; --pale: #f5f7f9; --accent: #3b5b92; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 27px; margin: 0 0 4px; }
h2 { font-size: 20px; margin: 34px 0 8px; padding-top: 10px; border-top: 1px solid var(--line); }
small { color: var(--soft); font-size: 13px; }
.lead { margin: 0 0 12px; font-size: 17px; }
.synthetic { display: inline-block; margin: 0; padding: 5px 12px; border-radius: 4px; background: #7a1f2b;
  color: #fff; font-weight: 600; }
.short { margin-top: 18px; padding: 2px 18px 6px; background: #eef3fb; border: 1px solid #b9cbe8;
  border-radius: 6px; }
.short h2 { border: 0; margin: 6px 0 0; padding: 4px 0 0; font-size: 17px; }
.short ul { margin: 4px 0 8px; padding-left: 22px; }
.warnings { margin-top: 18px; padding: 2px 18px 6px; background: #fff6e0; border: 1px solid #e6c77a;
  border-radius: 6px; }
.warnings h2 { border: 0; margin: 6px 0 0; padding: 4px 0 0; font-size: 17px; }
.warnings ul { margin: 4px 0 8px; padding-left: 22px; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 8px 12px 8px 0;
  border-bottom: 1px solid var(--line); }
th { font-size: 13px; color: var(--soft); font-weight: 600; }
.figures td:first-child { min-width: 200px; font-weight: 600; }
.figures td:first-child small { font-weight: 400; }
.value { font-size: 18px; font-weight: 700; color: var(--accent); white-space: nowrap; }
.interval { min-width: 172px; }
.meaning { color: #39424e; font-size: 14.5px; }
.facts td { font-size: 14.5px; }
.origin { word-break: break-all; }
code { font-size: 12px; word-break: break-all; }
.row { margin: 0 0 22px; }
.panels { display: flex; flex-wrap: wrap; gap: 14px; }
figure { margin: 0; }
figure img { display: block; width: 340px; max-width: 100%; height: auto; border: 1px solid var(--line); }
figcaption { font-size: 14px; color: var(--soft); padding-top: 3px; }
.rowname { margin: 4px 0 0; font-size: 14px; word-break: break-all; }
.limits { margin-top: 30px; padding: 2px 18px 8px; background: var(--pale); border-radius: 6px; }
.limits h2 { border: 0; margin: 6px 0 0; }
svg rect { fill: var(--accent); } svg line { stroke: var(--ink); }
svg text { font-size: 12px; fill: var(--soft); }
@media print { main { max-width: none; padding: 0; } .row, tr { break-inside: avoid; } }
"""
