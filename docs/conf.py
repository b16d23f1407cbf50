"""How Sphinx makes the site of the pages that scripts/docs_site.py writes. It asks the network nothing."""

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx import addnodes
from sphinx.application import Sphinx

project = "CertiPatch"
copyright = "Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # as GitHub names them
nitpicky = True  # a name of ours that a docstring refers to and that is nowhere is an error
nitpick_ignore_regex = [("py:class", r"(?!certipatch\.\w+$).*"), ("py:(exc|obj)", r"(?!certipatch\b).*")]
default_role = "code"
smartquotes = False  # -- is no dash here

autodoc_class_signature = "mixed"
autodoc_default_options = {
    "members": True,
    "inherited-members": "BaseException,tuple,Module",
    "member-order": "bysource",
}
autodoc_typehints_format = "short"
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "CertiPatch"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_search_summary = (
    False  # which a page opened from a folder may not fetch; titles and sections are found
)
html_search_scorer = str(Path(__file__).parent / "static/scorer.js")
html_math_renderer = "mathml"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

NAMES = re.compile(r"^( *)(\w+(?:, \w+)+): (.*)")


def one_name_a_line(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Split several arguments that a docstring explains on one line."""
    split = [
        f"{found[1]}{name}: {found[3]}" if found else line
        for line in lines
        for found in [NAMES.match(line)]
        for name in (found[2].split(", ") if found else [""])
    ]
    lines[:] = split


def opened(app: Sphinx, page: nodes.document, name: str) -> None:
    """Let a link to a picture show it, in place of saving it."""
    for link in list(page.findall(addnodes.download_reference)):
        to = "../" * name.count("/") + "_downloads/" + link["filename"]
        link.replace_self(nodes.reference("", "", *link.children, refuri=to))


def formula(display: str) -> Any:
    """Write a formula as MathML, which browsers draw by themselves."""

    def visit(writer: Any, node: nodes.Element) -> None:
        writer.body.append(convert(node.astext().strip(), display=display))
        raise nodes.SkipNode

    return visit


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (formula("inline"), None), (formula("block"), None))
    app.connect("autodoc-process-docstring", one_name_a_line, priority=400)  # before napoleon reads it
    app.connect("doctree-resolved", opened)
