"""Names in docstrings: each must exist. One that has an entry in the reference leads there."""

import pkgutil
import re

from sphinx.util.nodes import make_refnode

# Where what users call has its entries.
PUBLIC = (
    "pyro_bmr.",
    *(f"pyro_bmr.{name}." for name in ("baselines", "extend", "nn", "plots", "types")),
)


def setup(app):
    """Look at the names that Sphinx finds no entry for."""
    app.connect("missing-reference", find)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def find(app, env, node, content):
    """Return a link, or the name as it is if it exists; None, and so a warning, if it does not."""
    if node.get("refdomain") != "py":
        return None
    name = node["reftarget"]
    known = [f"{place}{name}" for place in (*scopes(node), *PUBLIC) if exists(f"{place}{name}")]
    entries = env.domains.python_domain.objects
    for full_name in (*known, *map(home, known)):
        if full_name in entries:
            entry, source = entries[full_name], node["refdoc"]
            return make_refnode(app.builder, source, entry.docname, entry.node_id, content, name)
    return content if known else None


def scopes(node):
    """Yield what a name may be relative to: what encloses the docstring, there or at home."""
    place = re.search(r"docstring of ([\w.]+)", str(node.source or "")) if node.source else None
    parts = place[1].split(".") if place else []
    for end in range(len(parts), 0, -1):
        scope = ".".join(parts[:end])
        yield f"{scope}."
        if exists(scope) and (module := getattr(pkgutil.resolve_name(scope), "__module__", None)):
            yield f"{module}."
    yield ""


def exists(name):
    """Import what can be imported."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError):
        return False
    return True


def home(name):
    """Return the name under which something is defined."""
    found = pkgutil.resolve_name(name)
    return f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
