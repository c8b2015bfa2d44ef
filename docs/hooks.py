"""What `mkdocs build` does beyond Markdown: it fills in what is generated, and renders equations.

A page asks for a generated part by a comment of its own line, `<!-- generated: NAME -->`. Equations
become MathML, which browsers draw themselves: no script and no network.
"""

import html
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))

import generate  # noqa: E402  # it lies beside this file, which mkdocs loads by its path

EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([\[(])(.*?)\\[\])]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the two pages that lie in the root of the repository, where people look for them, and the
    font of the equations."""
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name.lower(), content=text))
    package = find_spec("ziamath")  # found without importing it: only its font is wanted
    assert package is not None and package.origin is not None
    font = str(Path(package.origin).parent / "fonts" / "STIXTwoMath-Regular.ttf")
    files.append(File.generated(config, "assets/STIXTwoMath-Regular.ttf", abs_src_path=font))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the generated parts where the page asks for them."""
    return generate.filled(markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Render the equations that arithmatex has marked."""

    def render(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        return convert(html.unescape(match[3]).strip(), display=display)

    return EQUATION.sub(render, content)
