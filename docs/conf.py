"""Sphinx settings for the documentation site: `make docs`."""

import os
from importlib.metadata import version as installed
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

os.environ["KERAS_BACKEND"] = "jax"  # needed to import jax_bce.keras for its docstrings

project = "jax_bce"
author = copyright = "The jax_bce developers"
version = release = installed("jax-bce")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
myst_heading_anchors = 3  # lets pages link to each other's headings

autodoc_typehints = "none"  # the docstrings say what an argument may be
autodoc_member_order = "bysource"
highlight_language = "none"  # for blocks that name no language
default_role = "py:obj"  # for `loss` in a docstring
napoleon_custom_sections = ["Derivatives", "Several devices", "Source", "State"]
napoleon_numpy_docstring = False
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_title = f"jax_bce {release}"
html_static_path = ["static"]
html_extra_path = sorted(path.name for path in Path(__file__).parent.glob("*.png"))
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
pygments_dark_style = "github-dark"
html_math_renderer = "mathml"


def _formula(translator: nodes.NodeVisitor, node: nodes.Node) -> None:
    if isinstance(node, nodes.math_block):
        formula = f'<div class="math">{convert(node.astext(), display="block")}</div>'
    else:
        formula = convert(node.astext())
    translator.body.append(formula)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Renders formulas as MathML, which browsers display without scripts, also offline."""
    app.add_html_math_renderer("mathml", (_formula, None), (_formula, None))
