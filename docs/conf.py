"""Sphinx configuration of the site. `make docs` builds it and fails on any warning."""

project = "Mezzotint"
author = "The Mezzotint authors"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "Mezzotint"
myst_heading_anchors = 3
nitpicky = True
