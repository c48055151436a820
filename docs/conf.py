"""How Sphinx makes the documentation: `make docs` writes it to build/docs.

The source directory is the root of the repository, so that notebooks, changelog and pages link to
each other by the same paths here, on the site, and where the repository is browsed.
"""

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "pyro-bmr"
author = "The pyro-bmr developers"
project_copyright = author
release = metadata.version("pyro-bmr")

extensions = [
    "mathml",
    "myst_nb",
    "names",
    "numpydoc",
    "signatures",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_copybutton",
]
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "notebooks/*.ipynb",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "RELEASING.md",
    "SECURITY.md",
]
exclude_patterns = ["build", ".*", "**/.*"]

nitpicky = True
default_role = "py:obj"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"
autosummary_generate = False
numpydoc_show_class_members = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
add_module_names = False

html_theme = "furo"
html_title = "pyro-bmr"
pygments_dark_style = "github-dark-colorblind"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "start.html"}
templates_path = ["_templates"]
html_copy_source = False
