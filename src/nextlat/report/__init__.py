"""Reports: evaluated run directories become tables, plots, maps and one self-contained HTML page.

runs.py and models.py read and order them, comparison.py and solving.py compare, glossary.py and wording.py say it, terminal.py,
plots.py and page.py show it, writing.py writes it. Nothing here measures anything: all numbers come from the files that
`evaluation` wrote.
"""

from nextlat.report.comparison import Comparison, compare
from nextlat.report.runs import Run, read_runs
from nextlat.report.terminal import terminal_table
from nextlat.report.wording import Claim, claims
from nextlat.report.writing import write_report

__all__ = ["Claim", "Comparison", "Run", "claims", "compare", "read_runs", "terminal_table", "write_report"]
