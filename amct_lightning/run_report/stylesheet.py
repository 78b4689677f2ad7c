"""The style sheet of the page: light and dark, for screens of any width and for paper."""

from __future__ import annotations

from amct_lightning.run_report.style import COLOURS

_RULES = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2.2rem 1.4rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 0 0 .4rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .2rem; }
p { margin: .4rem 0; max-width: 50rem; }
a { color: var(--blue); }
code { font-family: ui-monospace, "SF Mono", Consolas, monospace; font-size: .88em; overflow-wrap: anywhere; }
header p { color: var(--muted); }
section { border-top: 1px solid var(--grid); margin-top: 2.2rem; padding-top: 1.6rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; margin: 1.2rem 0 0; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.4rem 0 0; }
dl div { border: 1px solid var(--grid); border-radius: .5rem; padding: .55rem .8rem; }
dt { color: var(--muted); font-size: .8rem; overflow-wrap: anywhere; }
dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
dd small { display: block; color: var(--muted); font-weight: 400; }
figure { margin: 1.1rem 0 .4rem; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 38rem; height: auto; }
figcaption { color: var(--muted); font-size: .85rem; margin-top: .3rem; max-width: 50rem; }
.missing { color: var(--muted); border-left: 3px solid var(--grid); padding-left: .8rem; }
.note { border-left: 3px solid var(--orange); padding-left: .8rem; }
.scroll { overflow: auto; max-height: 31rem; margin-top: 1rem; border: 1px solid var(--grid); border-radius: .5rem; }
.scroll:focus-visible { outline: 2px solid var(--blue); }
table { border-collapse: collapse; width: 100%; font-size: .84rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .5rem .7rem; }
th, td { text-align: left; padding: .3rem .7rem; border-top: 1px solid var(--grid); vertical-align: top; }
thead th { position: sticky; top: 0; background: var(--paper); color: var(--muted); font-weight: 600;
  box-shadow: inset 0 -1px var(--grid); vertical-align: bottom; }
tbody th { font-weight: 500; overflow-wrap: break-word; min-width: 9rem; }
td.number, th.number { text-align: right; }
td.number { white-space: nowrap; }
tr.dim { color: var(--muted); }
ul.files { padding-left: 1.2rem; font-size: .85rem; color: var(--muted); overflow-wrap: anywhere; }
@media print {
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  figure svg { min-width: 0; }
  .scroll { max-height: none; overflow: visible; border: 0; }
  thead th { position: static; }
  tr, figure { break-inside: avoid; }
  h2, section > p { break-after: avoid; }
}
"""


def stylesheet() -> str:
    """Return the style sheet with the colours of the figures as variables.

    Example:
        >>> "--ink: #1f2328" in stylesheet()
        True
    """
    light = " ".join(f"--{colour.name}: {colour.light};" for colour in COLOURS)
    dark = " ".join(f"--{colour.name}: {colour.dark};" for colour in COLOURS)
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}{_RULES}"
    )
