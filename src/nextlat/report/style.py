"""The look of the page: one column, light or dark as the reader has it, readable on a phone.

In the dark, pictures are inverted with their hues kept: their white becomes the colour of the page,
so that they need no second version.
"""

STYLE = """
:root { --paper: #fff; --ink: #1a1a1a; --quiet: #666; --line: #e2e2e2; --good: #00694f; --bad: #a63c00; --shade: #f6f6f4; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #1a1a1a; --ink: #e8e8e6; --quiet: #a0a09c; --line: #383838; --good: #4fd0aa; --bad: #ff9a5c; --shade: #242423; }
  img { filter: invert(0.898) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.015em; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.75rem 0 .75rem; }
h2.task { font-size: 1.5rem; margin-top: 3.5rem; padding-top: 1.25rem; border-top: 2px solid var(--ink); }
header p { color: var(--quiet); margin: 0; max-width: 42rem; }
ul.findings { list-style: none; padding: 0; margin: 0; }
ul.findings li { display: flex; gap: .75rem; align-items: baseline; padding: .6rem 0; border-top: 1px solid var(--line); }
ul.findings li:last-child { border-bottom: 1px solid var(--line); }
.mark { font-size: .78rem; white-space: nowrap; color: var(--quiet); }
.mark.better { color: var(--good); font-weight: 600; }
.mark.worse { color: var(--bad); font-weight: 600; }
ul.findings .mark { flex: 0 0 6.2rem; }
ul.findings b { font-weight: 600; }
li.noise { color: var(--quiet); font-size: .92rem; }
ul.findings li.noise b { font-weight: 400; color: var(--ink); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .75rem; border-top: 1px solid var(--line); vertical-align: top; text-align: right; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
th[scope=row] { font-weight: 400; }
thead th, thead td { border-top: 0; border-bottom: 1px solid var(--ink); }
tbody tr:first-child > * { border-top: 0; }
td .value, th .change { display: block; }
.value { white-space: nowrap; }
.change { color: var(--quiet); font-size: .82rem; white-space: nowrap; }
td .mark { margin-left: .5rem; }
table.facts td { overflow-wrap: anywhere; }
table.words th, table.words td { text-align: left; }
table.facts .value, table.words .value { white-space: normal; }
ul.notes { color: var(--quiet); font-size: .85rem; padding-left: 1.1rem; margin: .9rem 0 0; }
.quiet { color: var(--quiet); }
figure { margin: 2rem 0 0; }
figure img { display: block; width: 100%; max-width: 46rem; height: auto; margin: 0 auto; }
figcaption { color: var(--quiet); font-size: .85rem; margin-top: .4rem; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 1rem; }
.maps figure { margin: .5rem 0 0; }
details { margin-top: 1rem; border-top: 1px solid var(--line); padding-top: .6rem; }
summary { cursor: pointer; font-weight: 600; font-size: .95rem; }
pre { background: var(--shade); padding: .9rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .82rem; line-height: 1.5; }
dt { font-weight: 600; margin-top: .8rem; }
dd { margin: 0; }
@media (max-width: 34rem) {
  main { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.5rem; }
  table { font-size: .85rem; }
  th, td { padding: .45rem .3rem; }
  td .mark { display: block; }
  ul.findings li { display: block; }
  ul.findings .mark { display: block; }
}
"""
