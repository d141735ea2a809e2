"""The documentation site: pages in Markdown (MyST), notebooks that the build runs, a reference from the docstrings.

`make docs` builds it (`scripts/docs.py` gathers the pages); warnings are errors.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from monobath import __version__

project = "monobath"
author = copyright = "The monobath authors"
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "attrs_inline", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "cache"  # a notebook that has not changed is not run again
nb_execution_cache_path = str(Path(__file__).resolve().parent.parent / "notebooks")
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"  # warnings of the machine that built the site
suppress_warnings = ["mystnb.unknown_mime_type"]

autodoc_typehints = "none"  # signatures say them
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
default_role = "code"

html_theme = "furo"
html_title = "monobath"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["extra"]  # the gallery
exclude_patterns = ["extra"]


def shown(app: Any, kind: str, name: str, what: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with code in backticks: nothing else in them is markup."""
    for number, line in enumerate(lines):
        lines[number] = re.sub(r"(?<!`)([*|])(?!`)", r"\\\1", line) if "`" not in line else line


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", shown, priority=900)
