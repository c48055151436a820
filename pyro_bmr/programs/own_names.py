"""Names in the param store that nothing else has."""

from __future__ import annotations

from itertools import count
from typing import Any

import pyro
from pyro.nn import PyroModule


class OwnNames(PyroModule):
    """A module whose copies have names of their own in the param store."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give a copy its own names in the param store, so that it does not share parameters."""
        super().__setstate__(state)
        self.rename(unused_name(self._pyro_name.rstrip("0123456789")))

    def rename(self, name: str) -> None:
        """Give all modules inside names that begin with this one, and one context."""
        context = type(self._pyro_context)()
        for path, module in self.named_modules():
            module._pyro_name = f"{name}.{path}" if path else name
            module._pyro_context = context


_serial = count()
_kinds: set[str] = set()


def unused_name(kind: str) -> str:
    """Name a module so that nothing in the param store is taken for its parameters."""
    _kinds.add(kind)
    taken = tuple(pyro.get_param_store().keys())
    names = (f"{kind}{i}" for i in _serial)
    return next(n for n in names if not any(key.startswith(f"{n}.") for key in taken))


def shared_name(name: str) -> str:
    """Name a parameter as other processes do, each of which has a count of its own."""
    first, _, rest = name.partition(".")
    kind = first.rstrip("0123456789")
    return f"{kind}.{rest}" if kind in _kinds else name
