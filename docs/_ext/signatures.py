"""Signatures in the reference: a function that is registered for many types has one."""


def setup(app):
    """Look at each entry of the reference."""
    app.connect("object-description-transform", keep_the_first)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def keep_the_first(_app, _domain, kind, content):
    """Remove the signatures of what is registered, which only repeat that of the function."""
    if kind == "function":
        entry = content.parent
        del entry[1 : entry.index(content)]
