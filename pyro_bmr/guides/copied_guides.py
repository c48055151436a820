"""Copies of guides that are modules; what they do not own stays shared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyro_bmr.programs.wrapped import peel

Guides = tuple[Callable[..., Any], ...]

# What a guide knows of its model, and of its last run.
_NOT_OWNED = ("_model", "prototype_trace", "trace")


def copy_guides(
    guides: Guides, memo: dict[int, Any] | None = None, tied: Iterable[Tensor] = ()
) -> Guides:
    """Copy guides that are modules, also inside of handlers and of bound arguments.

    Functions are shared, and so are models, data, and the ``tied`` parameters. `copy.deepcopy`
    would take the model away from an autoguide, and from the original as well.
    """
    memo = {} if memo is None else memo
    roots = [peel(guide).program for guide in guides if is_copied(guide)]
    modules = [module for root in roots for module in root.modules()]
    before = [dict(vars(module)) for module in modules]
    for one in (*tied, *_find_not_owned(roots, before)):
        memo.setdefault(id(one), one)
    try:
        copies = iter(copy.deepcopy(roots, memo))
    except (TypeError, RuntimeError) as error:
        names = " or ".join(type(root).__name__ for root in roots)
        msg = (
            f"could not copy the {names} that draws sites which are not read "
            f"({type(error).__name__}: {error}). Expected a guide that copy.deepcopy takes; or a "
            "function that calls it, lambda *args: guide(*args), which shares its parameters with "
            "the result"
        )
        raise ValueError(msg) from error
    finally:
        for module, state in zip(modules, before, strict=True):
            vars(module).update(state)
    for module, state in zip(modules, before, strict=True):
        vars(memo[id(module)]).update({n: state[n] for n in _NOT_OWNED if n in state})
    return tuple(
        peel(guide).around(next(copies)) if is_copied(guide) else guide for guide in guides
    )


def is_copied(guide: Callable[..., Any]) -> bool:
    """Tell whether a guide is a module that has its parameters by itself."""
    return isinstance(peel(guide).program, PyroModule)


def _find_not_owned(roots: list[nn.Module], states: list[dict[str, Any]]) -> Iterator[Any]:
    own = {id(t) for root in roots for t in (*root.parameters(), *root.buffers())}
    for state in states:
        yield from (state[name] for name in _NOT_OWNED if name in state)
        # Data, or what a run left behind.
        for value in state.values():
            leaves = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
            yield from (leaf for leaf in leaves if id(leaf) not in own)
