"""Reports: evaluated run directories become tables, plots, maps, one self-contained HTML page, and
Markdown.

runs.py and models.py read and order them; comparison.py, solving.py and reproduction.py compare;
glossary.py, published.py, facts.py and wording.py say it; tables.py and pictures.py (drawing.py,
plots.py, task_plots.py) are what there is to show; terminal.py, page.py and markdown.py show it;
writing.py writes it. Nothing here measures anything: all numbers come from the files that
`evaluation` wrote.
"""

from nextlat.report.comparison import Comparison, compare
from nextlat.report.runs import Run, read_runs
from nextlat.report.terminal import terminal_table
from nextlat.report.wording import Claim, claims
from nextlat.report.writing import write_report

__all__ = [
    "Claim",
    "Comparison",
    "Run",
    "claims",
    "compare",
    "read_runs",
    "terminal_table",
    "write_report",
]
