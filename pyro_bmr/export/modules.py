"""Out of Pyro: a trained model as a plain torch module, masks for a module that there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import compress
from operator import itemgetter
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, fx, nn
from torch.nn.utils import prune
from torch.utils import _pytree as pytree

from pyro_bmr.arguments.checks import (
    check_function,
    check_kind,
    read_count,
    read_mapping,
    read_optional,
    read_seed,
    refuse_kind,
)
from pyro_bmr.display import warn
from pyro_bmr.export.agreement import relative_error, tolerance
from pyro_bmr.export.assembly import assemble_module
from pyro_bmr.export.batch_sizes import join
from pyro_bmr.export.outputs import OutputError
from pyro_bmr.export.recording import record, record_many, run
from pyro_bmr.guides.pruned_guide import PrunedGuide
from pyro_bmr.programs.alone import alone
from pyro_bmr.programs.calls import Call, read_call
from pyro_bmr.programs.data import read_data
from pyro_bmr.programs.dry_run import dry_run
from pyro_bmr.programs.given_values import LocalSiteError
from pyro_bmr.programs.handlers import PrunedModel
from pyro_bmr.programs.pairs import check_programs
from pyro_bmr.programs.switching import SwitchedModel
from pyro_bmr.programs.wrappers import unwrap


@alone("to_module")
def to_module(
    model: Callable[..., Any],
    guide: Any,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    num_samples: int | None = None,
    output: str | None = None,
    seed: int = 0,
) -> nn.Module:
    """Make a plain torch module that predicts, with nothing of Pyro in it.

    The model is recorded as a graph of torch operations at given weights: at the posterior's
    location, ``guide.median()``, which is the posterior mean of weights on the real line; or, with
    ``num_samples``, at that many draws, in one batched forward. Pruned elements are zero in both.
    Weights are parameters of the module under the names of their sites, what else the model holds
    keeps its name. The module can be pickled, trained, and taken on by `torch.export`.

    Its inputs are the tensors among the arguments of the model that the output depends on, so that
    ``y`` may be given or not. Their first axis is the data, of which there may be any number.

    The model, the guide, the param store and the random number generators are left as they were.

    Parameters
    ----------
    model, guide : callable
        Of a reduction, or any Pyro model with its trained autoguide.
    *args
        Of the model.
    kwargs : mapping, optional
        Keyword arguments of the model.
    num_samples : int, optional
        How many draws from the posterior; its location if None.
    output : str, optional
        What the model returns if None, where observations (and draws of them) stand for the mean
        of their distribution; this mean, if it returns nothing. Of a categorical distribution it is
        the probabilities. Otherwise the name of a site, also of a deterministic one; a parameter
        of the observed site's distribution, such as ``"logits"``; or both, as in ``"obs.logits"``.
    seed : int
        Of the draws.

    Returns
    -------
    Module
        Takes the inputs; returns the output, with ``num_samples`` as an axis before all others.

    Raises
    ------
    ValueError
        If there is no such output; if it depends on random numbers, such as those of dropout in
        training mode or latent sites that the guide does not hold; or if a latent site belongs to
        single data.

    Warns
    -----
    UserWarning
        If the module takes as many data as were given, and no other number.

    Notes
    -----
    The module does what the model does now: batch norm in training mode takes the statistics of the
    batch. Call ``model.eval()`` before.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x, y=None):
    ...     w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)
    >>> guide = AutoNormal(model)
    >>> x = torch.randn(9, 2)
    >>> _ = guide(x, x[:, 0])
    >>> module = to_module(model, guide, x)
    >>> torch.equal(module(x), x @ guide.median()["w"]), dict(module.named_parameters()).keys()
    (True, dict_keys(['w']))
    >>> to_module(model, guide, x, num_samples=5)(torch.randn(3, 2)).shape
    torch.Size([5, 3])
    """
    check_programs("to_module", model, guide)
    module, _ = export_program(
        model, guide, args, kwargs=kwargs, num_samples=num_samples, output=output, seed=seed
    )
    return module


def apply_masks(
    module: nn.Module,
    masks: Mapping[str, Tensor],
    *,
    rename: Callable[[str], str] | None = None,
) -> nn.Module:
    """Prune a plain torch module as a reduction pruned its model.

    Its parameters become those of `torch.nn.utils.prune`, ``weight_orig`` under ``weight_mask``;
    `torch.nn.utils.prune.remove` writes the zeros for good.

    Parameters
    ----------
    module : Module
        With parameters that have the names of the sites, as before `pyro_bmr.bayesianize`. It is
        changed in place.
    masks : mapping
        By site, True keeps: ``result.model.masks.by_site()``.
    rename : callable, optional
        From the name of a site to that of a parameter. Otherwise they are the same, or all sites
        have one prefix more, such as ``net.``.

    Returns
    -------
    Module
        The same object.

    Raises
    ------
    ValueError
        If a site that has pruned elements is no parameter of the module, or one of another shape.

    Examples
    --------
    >>> layer = nn.Linear(2, 1)
    >>> mask = torch.tensor([[True, False]])
    >>> bool(apply_masks(layer, {"net.weight": mask}).weight[0, 1] == 0)
    True
    """
    check_kind("module", module, nn.Module, "a torch.nn.Module")
    expected = "masks by site, True for what is kept, as result.model.masks.by_site()"
    by_site = read_mapping("masks", masks, expected)
    for mask in by_site.values():
        if not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
            refuse_kind("masks", masks, f"{expected}; torch.bool tensors")
    if rename is not None:
        check_function("rename", rename, "a function from the name of a site to a parameter's")
    pruned = {name: mask for name, mask in by_site.items() if not mask.all()}
    parameters = dict(module.named_parameters())
    names = {name: rename(name) if rename else name for name in pruned}
    prefixes = {name.partition(".")[0] for name in names}
    if rename is None and len(prefixes) == 1 and not names.keys() & parameters.keys():
        names = {name: name.partition(".")[2] for name in names}
    for site, name in names.items():
        shape = tuple(parameters[name].shape) if name in parameters else None
        if shape != tuple(pruned[site].shape):
            msg = (
                f"got a mask of shape {tuple(pruned[site].shape)} for the site {site!r}, where the "
                f"module has {shape or 'no parameter'}. Expected one of its parameters, "
                f"{list(parameters)[:10]}; pass rename= a function from sites to these"
            )
            raise ValueError(msg)
    for site, name in names.items():
        owner, _, key = name.rpartition(".")
        mask = pruned[site].to(parameters[name].device)
        prune.custom_from_mask(module.get_submodule(owner), key, mask)
    return module


def export_program(
    model: Callable[..., Any],
    guide: Any,
    args: Sequence[Any],
    *,
    kwargs: Mapping[str, Any] | None = None,
    num_samples: int | None = None,
    output: str | None = None,
    seed: int = 0,
) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """Do what `to_module` does; also return the tensors among the arguments that it takes."""
    if isinstance(guide, PrunedGuide):
        # Its draws are zero where the model would put a zero.
        model = unwrap(model, (PrunedModel, SwitchedModel))
    expected = "a whole number, 1 or more, or None for the posterior's location"
    num_samples = read_optional(num_samples, read_count, "num_samples", expected=expected)
    seed = read_seed(seed)
    if output is not None:
        check_kind("output", output, str, "the name of a site, or of a parameter of one")
    call = read_call(model, *read_data(model, guide, tuple(args), kwargs))
    values = _location(guide, call)
    _check_numbers(run(model, values, call, call.tensors, output))
    recorded, size = _record_at_any_size(
        lambda inputs: record(
            model, values, call, inputs, output, decompose=num_samples is not None
        ),
        call,
    )
    held: Mapping[str, Tensor] = values
    if num_samples is not None:
        held = _draw(guide, call, values, num_samples, seed)
        many = partial(record_many, recorded, list(held.values()))
        recorded, size = (many(call.tensors), size) if size else _record_at_any_size(many, call)
    module, used = assemble_module(recorded, held, call.names, model)
    inputs = call.inputs(size or _SIZES[-1])
    found = module(*compress(inputs, used))
    for place in [...] if num_samples is None else [0, -1]:
        expected = run(model, {n: v[place] for n, v in held.items()}, call, inputs, output)
        mine = pytree.tree_map_only(Tensor, itemgetter(place), found)
        error = relative_error(expected, mine)
        if not error <= tolerance(expected):
            msg = (
                f"the output of the module differs from that of the model by {error:.1e} of its "
                "size on other data, so that none is returned. Expected a model that runs the same "
                "operations whatever the values of its inputs and weights are"
            )
            raise ValueError(msg)
    return module.eval(), tuple(compress(call.tensors, used))


# How many data a model is recorded with, twice, and how many it is tried on.
_SIZES = (3, 4, 5)


def _record_at_any_size(
    make: Callable[[Sequence[Tensor]], fx.GraphModule], call: Call
) -> tuple[fx.GraphModule, int | None]:
    """Return a graph, and how many data it takes; None for any number."""
    try:
        first, second = (make(call.inputs(size)) for size in _SIZES[:2])
        others = sum(node.op == "placeholder" for node in first.graph.nodes) - len(call.tensors)
        return join(first, second, _SIZES[:2], [False] * others + call.batched), None
    except (OutputError, LocalSiteError):
        raise
    except Exception as error:
        recorded = _record_at_one_size(make, call)
        warn(
            f"the module takes {call.size} data as in the example, and no other number, because "
            f"the model could not be followed at {_SIZES[0]} and {_SIZES[1]} "
            f"({_first_line(error)}). "
            "For any number, let the model take its sizes from its arguments, as in "
            'pyro.plate("data", len(x)), with the data along their first axes'
        )
        return recorded, call.size


def _record_at_one_size(
    make: Callable[[Sequence[Tensor]], fx.GraphModule], call: Call
) -> fx.GraphModule:
    try:
        return make(call.tensors)
    except (OutputError, LocalSiteError):
        raise
    except Exception as error:
        msg = (
            f"the model runs, but could not be recorded ({_first_line(error)}). Expected a model "
            "that runs the same operations whatever the values of its tensors are: "
            "torch.where(x > 0, a, b) in the place of if x > 0, and no numbers read from tensors"
        )
        raise ValueError(msg) from error


def _first_line(error: Exception) -> str:
    # What Pyro adds to messages, the shapes of all sites, comes after.
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _check_numbers(output: Any) -> None:
    """Look for numbers that do not exist."""
    if any(isinstance(t, Tensor) and bool(t.isnan().any()) for t in pytree.tree_leaves(output)):
        msg = (
            "the output of the model holds NaN at the posterior's location. Expected numbers: if "
            "the data are free of NaN, and the output is the mean of a distribution that has none, "
            "such as Cauchy's, pass output= one of its parameters, such as 'loc'"
        )
        raise OutputError(msg)


@torch.no_grad()
def _location(guide: Any, call: Call) -> dict[str, Tensor]:
    if not hasattr(guide, "median"):
        msg = (
            f"got a guide of type {type(guide).__name__} without a median. Expected the guide of a "
            "reduction, or one of Pyro's autoguides; bmr.reduce(guide, x, model=model, "
            "select=lambda scores: scores.kept).guide makes the one from any other"
        )
        raise TypeError(msg)
    args, kwargs = call.arguments(call.tensors)
    with dry_run(guide):
        return {name: value.detach() for name, value in guide.median(*args, **kwargs).items()}


@torch.no_grad()
def _draw(
    guide: Any, call: Call, values: Mapping[str, Tensor], num_samples: int, seed: int
) -> dict[str, Tensor]:
    args, kwargs = call.arguments(call.tensors)
    draws = []
    with dry_run(guide):
        torch.manual_seed(seed)
        for _ in range(num_samples):
            nodes = poutine.trace(guide).get_trace(*args, **kwargs).nodes
            draws.append({name: nodes[name]["value"] for name in values})
    return {name: torch.stack([draw[name] for draw in draws]) for name in values}
