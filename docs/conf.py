"""Sphinx, offline: `sphinx-build -W -n docs docs/_build`. GitHub shows the same pages."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

project = "safereg_dist"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "safereg_dist"
myst_heading_anchors = 4
autodoc_typehints = "description"
autodoc_member_order = "bysource"
# Types of other libraries, whose pages are not here; none of ours is missing among them.
nitpick_ignore_regex = [(r"py:.*", r".*")]
