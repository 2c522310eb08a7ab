"""How Sphinx makes the site of these documents; CONTRIBUTING.md has the command.

The source is the whole checkout, of which the files below are pages: links between them, and to other files, are the
same in the checkout and in the site.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from apex_opt import __version__

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "apex_opt"
author = copyright = "apex_opt contributors"
release = version = __version__

root_doc = "docs/index"
include_patterns = ["docs/**", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "traces/README.md", "profiles/README.md"]
exclude_patterns = [".*", "site", "build", "dist"]
extensions = ["myst_nb", "numpydoc", "sphinx.ext.autodoc"]

myst_heading_anchors = 4
myst_enable_extensions: list[str] = []
highlight_language = "none"

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300

autodoc_member_order = "bysource"
autodoc_typehints = "none"
numpydoc_show_class_members = False

html_theme = "sphinx_book_theme"
html_title = f"apex_opt {__version__}"
html_extra_path = ["static/index.html"]
html_static_path = ["static/wide.css"]
html_css_files = ["wide.css"]
html_copy_source = False
html_theme_options = {"show_toc_level": 2, "use_download_button": False, "navbar_persistent": []}
html_context = {"default_mode": "auto"}


def columns(app: object, what: str, name: str, of: object, options: object, lines: list[str]) -> None:
    """Set what stands in a second column of a section under what it is said of, where numpydoc looks for it."""
    set_, below = [], False
    for line in lines:
        entry = re.fullmatch(r"(\S.*?) {3,}(\S.*)", line)
        below = bool(entry) or (below and line.startswith("     "))
        set_ += [entry[1], f"    {entry[2]}"] if entry else [f"    {line.strip()}" if below else line]
    lines[:] = set_


def without_arguments(app: object, what: str, name: str, *_: object) -> tuple[str, str] | None:
    """Leave the arguments of commands to their descriptions, which have the defaults too."""
    return ("(...)", "") if what == "function" and name.count(".") == 1 else None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", columns, priority=400)  # before numpydoc
    app.connect("autodoc-process-signature", without_arguments)
