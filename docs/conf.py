"""Sphinx: ``make docs`` builds docs/_build/html; a warning is an error."""

from __future__ import annotations

from hpcasync import __version__

project = "hpcasync"
author = "The hpcasync developers"
copyright = author
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "examples"]
html_theme = "furo"
html_title = f"hpcasync {version}"

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]
