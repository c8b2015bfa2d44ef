"""Reports: evaluated run directories become tables, figures, one self-contained HTML page, and
Markdown.

runs.py reads them and groups them into models; comparison.py, claims.py and published.py find out
what can be said; figures.py, pictures.py and maps.py draw; document.py puts all of it together out
of elements.py; render.py turns that into a page, Markdown and what a terminal shows; output.py
writes it. Nothing here measures anything, and nothing knows a task, a metric or an objective:
numbers and words come from the files that training and evaluation wrote.
"""

from nextlat.report.claims import Claim, claims
from nextlat.report.comparison import TaskComparison, compare
from nextlat.report.output import terminal_table, write_report
from nextlat.report.runs import Run, read_runs

__all__ = [
    "Claim",
    "Run",
    "TaskComparison",
    "claims",
    "compare",
    "read_runs",
    "terminal_table",
    "write_report",
]
