"""Names in docstrings: each must exist. One that has an entry in the reference leads there."""

import pkgutil
import re

from sphinx.util.nodes import make_refnode


def setup(app):
    """Look at the names that Sphinx finds no entry for."""
    app.connect("missing-reference", find)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def find(app, env, node, content):
    """Return a link, or the name as it is if it exists; None, and so a warning, if it does not."""
    if node.get("refdomain") != "py":
        return None
    name = node["reftarget"]
    entry = env.domains.python_domain.objects.get(f"pyro_bmr.{name}")
    if entry is not None:
        source = node["refdoc"]
        return make_refnode(app.builder, source, entry.docname, entry.node_id, content, name)
    return content if any(exists(f"{scope}{name}") for scope in scopes(node)) else None


def scopes(node):
    """Yield what a name may be relative to: nothing, or what encloses the docstring."""
    yield ""
    place = re.search(r"docstring of ([\w.]+)", str(node.source or "")) if node.source else None
    parts = place[1].split(".") if place else []
    for end in range(len(parts), 0, -1):
        yield ".".join(parts[:end]) + "."


def exists(name):
    """Import what can be imported."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError):
        return False
    return True
