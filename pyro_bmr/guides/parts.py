"""What a guide is made of: which of it is read from its parameters, and which is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from pyro import poutine
from pyro.infer.autoguide import AutoCallable, AutoGuideList

from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.program import ProgramFactor
from pyro_bmr.guides.autoguides import check_called
from pyro_bmr.guides.copied_guides import is_copied
from pyro_bmr.guides.families import is_refused, is_registered, read_factors
from pyro_bmr.guides.guide_program import GuideProgram
from pyro_bmr.guides.guide_reader import left_alone, read_once
from pyro_bmr.guides.pruned_guide import Origin, PrunedGuide
from pyro_bmr.guides.wrapped_guides import check_seen, find_inner
from pyro_bmr.programs.dry_run import dry_run, find_modules
from pyro_bmr.programs.wrapped import peel

Wrap = Callable[[Any], Any]


def find_parts(guide: Any) -> Iterator[tuple[Any, Wrap]]:
    """Yield the guides that a guide is made of, and what puts its handlers around each."""
    if isinstance(guide, AutoGuideList) and not is_registered(guide):
        check_called(guide)
        for part in guide:
            yield from find_parts(part)
    elif isinstance(guide, AutoCallable) and not is_registered(guide):
        yield from find_parts(guide._guide)
    elif (inner := find_inner(guide)) is not guide:
        wrapped = peel(guide)
        for part, wrap in find_parts(inner):
            if is_registered(part) and not is_refused(part):
                check_seen(guide, (site for factor in read_factors(part) for site in factor.sites))
            yield part, partial(_wrap_twice, wrap, wrapped.around)
    else:
        yield guide, lambda program: program


def find_program(guide: Any, origin: Origin, factors: Iterable[Factor]) -> GuideProgram | None:
    """Copy what has to be run, if some sites are not read, or the guide has factors.

    That is all but autoguides that are read.
    """
    program = take_program(guide, origin.model)
    if program is None:
        return None

    def run(*args: Any, **kwargs: Any) -> set[str]:
        return set(program.run({}, {}, args, kwargs))

    with dry_run(guide, origin.model), left_alone(guide, origin.model, program), poutine.block():
        drawn = run(*origin.args, **origin.kwargs)
        reader = read_once(run, origin)
    factors = (factor for factor in factors if not isinstance(factor, ProgramFactor))
    read = {site.name for factor in factors for site in factor.sites}
    hidden = {source for source, name in reader.sources.items() if name in read}
    left = (drawn - read) | reader.factors.keys()
    return program.of(left, hidden) if left else None


def take_program(guide: Any, model: Any) -> GuideProgram | None:
    """Copy all of a guide that is no autoguide which is read; None if there is nothing else."""
    whole = peel(guide).program
    frames = dict(whole._prototype_frames) if isinstance(whole, AutoGuideList) else {}
    guides: list[Callable[..., Any]] = []
    for part, wrap in find_parts(guide):
        if isinstance(part, PrunedGuide) and part.program is not None:
            guides += map(wrap, part.program.guides)
            frames |= part.program.frames
        elif callable(part) and (is_refused(part) or not is_registered(part)):
            guides.append(wrap(part))
    modules = [module for module in find_modules(model) if model is not None]
    of_model = {id(t) for m in modules for t in (*m.parameters(), *m.buffers())}
    own = [peel(one).program for one in guides if is_copied(one)]
    tensors = (t for module in own for t in (*module.parameters(), *module.buffers()))
    tied = tuple(tensor for tensor in tensors if id(tensor) in of_model)
    return GuideProgram(tuple(guides), frames=frames, tied=tied) if guides else None


def _wrap_twice(inner: Wrap, outer: Wrap, program: Any) -> Any:
    return outer(inner(program))
