"""How the documentation is built: `python -m sphinx -W -b html docs build/docs`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cachepolicy
from cachepolicy.language.pygments_lexer import CachePolicyLexer

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "cachepolicy"
author = "the cachepolicy authors"
copyright = f"2026, {author}"  # noqa: A001 (Sphinx's name)
version = release = cachepolicy.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sphinxcontrib.mermaid"]
exclude_patterns = ["conf.py"]
myst_enable_extensions = ["colon_fence", "attrs_inline"]
myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]

html_theme = "furo"
html_title = "cachepolicy"
html_copy_source = False

autodoc_typehints = "signature"
napoleon_use_ivar = True  # an `Attributes:` section does not describe anew what autodoc finds in the class
autodoc_member_order = "bysource"


def setup(app: Sphinx) -> None:
    """Policies are coloured in a checkout too, where the lexer's entry point is not installed."""
    app.add_lexer("cachepolicy", CachePolicyLexer)
