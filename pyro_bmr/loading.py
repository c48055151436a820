"""Results from files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyro_bmr.arguments.checks import check_function, check_path
from pyro_bmr.compaction import Compaction
from pyro_bmr.cutting.planning import LayerCut
from pyro_bmr.files.contents import check_result
from pyro_bmr.files.moments import unpack_moments
from pyro_bmr.files.packing import check_program, unpack_program
from pyro_bmr.files.plans import UnreadableError, read_plan
from pyro_bmr.guides.parts import take_program
from pyro_bmr.guides.pruned_guide import Origin
from pyro_bmr.moments.no_program import NoProgram
from pyro_bmr.programs.alone import alone
from pyro_bmr.programs.data import convert_data
from pyro_bmr.programs.undoing import undone_on_error
from pyro_bmr.results import Reduction
from pyro_bmr.selection.summaries import LayerSummary, Round, SiteSummary


@alone("load")
def load(
    path: str | Path,
    model: Callable[..., Any] | None = None,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    create_plates: Callable[..., Any] | None = None,
    guide: Callable[..., Any] | None = None,
) -> Reduction | Compaction:
    """Read what `Reduction.save` or `Compaction.save` wrote.

    Draws, free energies and further training go on as without the detour: the guide has the same
    parameters, bit for bit, and ``model`` gets those that it had, with the statistics of its
    batch norms. They are set in place, and values of ``pyro.param`` in the param store, where they
    replace those of the same names. Nothing in the file is run; a file that is refused changes
    nothing.

    Parameters
    ----------
    path : str or Path
        The file.
    model : callable
        The user's model, built by the same code as the one that was reduced; None for the
        reduction of a `pyro_bmr.Posterior`.
    *args
        Of the model, as in `reduce`. With them its sites are checked at once, otherwise when the
        result's model is called for the first time; the data are not in the file.
    kwargs : mapping, optional
        Keyword arguments of the model.
    create_plates : callable, optional
        As given to the autoguide that was reduced.
    guide : callable, optional
        The guide that was reduced, made by the same code and called once, if some of its sites
        were not read but are drawn by itself. What its modules had learnt is in the file; what
        functions keep in Pyro's param store is not.

    Returns
    -------
    Reduction or Compaction
        On the CPU.

    Raises
    ------
    ValueError
        If the file is cut off, damaged, of another kind, from a newer version, or for another
        model or other arguments; if the path is empty, a FIFO or a device.
    TypeError
        If ``model`` is no function, or the path no path.

    Examples
    --------
    >>> import tempfile, torch, pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from pyro_bmr import reduce
    >>> def model():
    ...     pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    >>> guide = AutoNormal(model)
    >>> _ = guide()
    >>> result, path = reduce(guide), tempfile.mkdtemp() + "/result.bmr"
    >>> result.save(path)
    >>> str(load(path, model)) == str(result)
    True
    """
    check_path(path)
    if model is not None:
        check_function("model", model, "the Pyro model that was reduced, a function")
    if guide is not None:
        check_function("guide", guide, "the guide that was reduced, a function")
    if create_plates is not None:
        check_function("create_plates", create_plates, "the function given to the autoguide")
    args, keywords = convert_data(model, guide, args, kwargs)
    plan = read_plan(path, check_result)
    if plan["kind"] == "moments":
        return _reduction(plan, NoProgram(), unpack_moments(plan["moments"]))
    check_function("model", model, "the Pyro model that was reduced, a function")
    program = None if guide is None else take_program(guide, model)
    origin = Origin(model, args, keywords, create_plates, program)
    with undone_on_error(model):
        pair = _unpack(path, plan, origin)
        check_program(plan, *pair, args, origin.kwargs)
    return _RESULTS[plan["kind"]](plan, *pair)


def _unpack(path: str | Path, plan: Mapping[str, Any], origin: Origin) -> tuple[Any, Any]:
    try:
        return unpack_program(plan, origin)
    except ValueError:
        raise
    except Exception as error:
        raise UnreadableError(path, f"{type(error).__name__}: {error}") from error


def _reduction(plan: Mapping[str, Any], model: Any, guide: Any) -> Reduction:
    rows = [{**row, "shape": tuple(row["shape"])} for row in plan["rows"]]
    return Reduction(
        model=model,
        guide=guide,
        masks=plan["masks"],
        scores=plan["scores"],
        sites=tuple(SiteSummary(**row) for row in rows),
        naive_delta_f=plan["naive_delta_f"],
        layers=tuple(LayerSummary(**layer) for layer in plan["layers"]),
        realised=plan.get("realised"),
        realised_error=plan.get("realised_error"),
        notes=tuple(plan.get("notes", ())),
        rounds=tuple(Round(**one) for one in plan.get("rounds", ())),
    )


def _compaction(plan: Mapping[str, Any], model: Any, guide: Any) -> Compaction:
    indices = {
        name: {key: tuple(kept) for key, kept in plan[name].items()}
        for name in ("kept", "inputs", "used_inputs")
    }
    return Compaction(
        model=model,
        guide=guide,
        layers=tuple(LayerCut(**layer) for layer in plan["layers"]),
        kept=indices["kept"],
        inputs=indices["inputs"],
        used_inputs=indices["used_inputs"],
        elements=tuple(plan["elements"]),
    )


# By the kind of a plan: from the plan, its model and its guide to the result.
_RESULTS: dict[str, Callable[[Mapping[str, Any], Any, Any], Any]] = {
    "reduction": _reduction,
    "compaction": _compaction,
}
