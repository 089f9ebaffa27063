"""Configuration of the documentation.  ``make docs`` builds it, without a network, into build/docs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dydila_kernels import __version__  # noqa: E402 - found through the line above

project = "dydila-kernels"
version = release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
smartquotes_action = "D"  # dashes alone: values of options keep the quotes of the code
nitpicky = True  # a reference that leads nowhere is a warning, and so an error
# But of other packages and of aliases, which have no page here, and of Raises with two errors at once.
nitpick_ignore_regex = [("py:.*", r"(torch|nn|collections)\..*|Tensor|Config|Key|.*\.(Backend|Grid|Module)|.*, .*")]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "force"  # the tutorial runs in every build
nb_execution_raise_on_error = True
nb_execution_timeout = 900  # seconds, for each cell, on a machine that is busy with other things

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"dydila-kernels {__version__}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_show_copyright = False
html_math_renderer = "mathml"

PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/QUESTIONS.md": "questions.md",
    "benchmarks/offline/prediction/README.md": "predictions.md",
    "dydila_kernels/ops/README.md": "kernels.md",
    "examples/dydi_lit/README.md": "dydi_lit.md",
    "tools/ptx/README.md": "emulator.md",
}
"""Files of the repository and the pages that include them."""


def repoint(folder: Path, text: list[str]) -> None:
    """Links to files of the repository, relative to a folder, lead to the page, or else to a copy of the file."""

    def repointed(link: re.Match[str]) -> str:
        target, anchor = link["target"], link["anchor"] or ""
        file = (folder / target).resolve()
        if not file.is_file() or not file.is_relative_to(ROOT):
            return link[0]
        name = file.relative_to(ROOT).as_posix()
        page = name.removeprefix("docs/") if name.startswith("docs/") else PAGES.get(name, f"../{name}")
        return f"](/{page}{anchor})"

    text[0] = re.sub(r"\]\((?P<target>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)", repointed, text[0])


def visit_math(translator: HTML5Translator, node: nodes.Element) -> None:
    """Formulas as MathML, which browsers draw by themselves: no script, no font, no network."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    translator.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    docs = Path(app.srcdir)
    app.connect("source-read", lambda app, name, text: repoint((docs / name).parent, text))
    app.connect("include-read", lambda app, path, parent, text: repoint((docs / path).resolve().parent, text))
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
