"""Draws of a model and its guide in the format of ArviZ, for any guide of SVI."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_bmr.arguments.checks import check_switch, read_mapping
from pyro_bmr.arguments.columns import find_axis, read_columns
from pyro_bmr.diagnostics.dimensions import Dimensions
from pyro_bmr.diagnostics.draws import Draws, Observed, draw
from pyro_bmr.diagnostics.prior_draws import draw_prior
from pyro_bmr.display import warn
from pyro_bmr.programs.alone import alone
from pyro_bmr.programs.calls import read_call
from pyro_bmr.programs.data import read_data
from pyro_bmr.programs.distributions import find_element_support
from pyro_bmr.programs.pairs import check_programs
from pyro_bmr.versions import __version__

if TYPE_CHECKING:
    import xarray as xr


def to_arviz(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    seed: int = 0,
    prior: bool = True,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str | None]] | None = None,
) -> Any:
    r"""Draw from a guide, and put all that ArviZ looks at into its format.

    The draws :math:`\theta_s \sim q(\theta)` of the guide are one chain. All of them are taken at
    once, and so is :math:`\ln p(y_i \mid \theta_s)`. The groups are

    - ``posterior``: the latent sites, a pruned element at 0, and computed ones, of
      `pyro.deterministic` and `pyro.poutine.reparam`;
    - ``unconstrained_posterior``: the latent sites on the real line, where there is such a map;
    - ``prior``: the same sites, drawn from the model;
    - ``posterior_predictive``, ``log_likelihood`` (of each datum, in nats) and ``observed_data``:
      the observed sites; the first also sites without data that the guide does not hold;
    - ``constant_data``: the other tensors among the arguments, named by the model's parameters.

    A dimension has the name of its plate, else ``{variable}_dim_{i}``. A datum is what the plates,
    or the batch shape, of an observed site count: of a site that is one event, as
    ``Normal(...).to_event(1)`` outside of plates, the log likelihood is one number per draw.

    The model, the guide, the param store and the random number generators are left as they were.

    Parameters
    ----------
    model, guide : callable
        A Pyro model and its trained guide: those of a reduction, or any others.
    *args
        Of both: all of the data.
    kwargs : mapping, optional
        Keyword arguments of both.
    num_samples : int
        How many draws.
    seed : int
        Of the draws. Two guides of the same kind share their random numbers.
    prior : bool
        Whether to draw from the prior too.
    coords : mapping, optional
        By dimension, a value for each of its indices.
    dims : mapping, optional
        By variable, names for its axes after chain and draw, instead of the default ones.

    Returns
    -------
    InferenceData or DataTree
        ``arviz.InferenceData`` with ArviZ before 1.0, ``xarray.DataTree`` since.

    Raises
    ------
    ValueError
        If ``coords`` or ``dims`` do not fit, if the guide was never called or does not fit the
        model, or if a plate takes a part of the data.

    Warns
    -----
    UserWarning
        As `pyro_bmr.diagnostics.draws.draw`.

    Notes
    -----
    The scale of `pyro.poutine.scale` is not in the log likelihood, nor are `pyro.factor`
    statements. Where a mask is False, it is 0. Discrete sites that the model marks by
    ``infer={"enumerate": "parallel"}``, and that the guide does not sample, are summed out of it;
    where several rows share one, it is left out, with a warning.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x, y=None):
    ...     w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)
    >>> guide = AutoNormal(model)
    >>> x = torch.randn(7, 2)
    >>> _ = guide(x, x[:, 0])
    >>> data = to_arviz(model, guide, x, x[:, 0], coords={"w_dim_0": ["slope", "other"]})
    >>> dict(data.posterior["w"].sizes)
    {'chain': 1, 'draw': 1000, 'w_dim_0': 2}
    >>> dict(data.log_likelihood["y"].sizes)
    {'chain': 1, 'draw': 1000, 'data': 7}
    """
    check_programs("to_arviz", model, guide)
    options: dict[str, Any] = {"num_samples": num_samples, "seed": seed, "prior": prior}
    data = read_data(model, guide, args, kwargs)
    options |= {"coords": coords, "dims": dims, "columns": read_columns(args)}
    return convert(model, guide, *data, **options)


@alone("to_arviz")
def convert(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    num_samples: int,
    seed: int,
    prior: bool,
    coords: Mapping[str, Any] | None,
    dims: Mapping[str, Sequence[str | None]] | None,
    elements: Mapping[str, Mapping[str, Tensor]] | None = None,
    attributes: Mapping[str, float] | None = None,
    columns: tuple[str, ...] = (),
) -> Any:
    """Do what `to_arviz` does, and add a group ``bmr`` of what is known of single elements.

    ``elements`` has by latent site tensors of its shape, by what they are; ``attributes`` are
    numbers that go with the group. ``columns`` are names that stand along the axis of the data, and
    of the one site, that has as many entries.
    """  # noqa: DOC201, DOC501
    check_switch("prior", prior)
    coords = read_mapping("coords", coords, "a mapping from dimensions to a value for each index")
    dims = read_mapping("dims", dims, "a mapping from variables to names for their axes")
    draws = draw(model, guide, args, kwargs, num_samples, seed=seed)
    constants = _constants(model, args, kwargs, draws)
    names = {*draws.axes, *constants}
    dimensions = Dimensions(dims, coords, names)
    unknown = sorted(dimensions.dims.keys() - names)
    if unknown:
        msg = f"got dims= for {unknown}. Expected variables of the model, of {sorted(names)}"
        raise ValueError(msg)
    axes = {name: dimensions.name_dims(name, plates) for name, plates in draws.axes.items()}
    latent = {**draws.latent, **draws.deterministic}
    plates = {name: _plates_of(tensor, draws) for name, tensor in constants.items()}
    inputs = {name: dimensions.name_dims(name, own) for name, own in plates.items()}
    shapes = {name: values.shape[1:] for name, values in draws.latent.items()}
    found = find_axis(shapes, columns, draws.axes)
    named = _name_columns(columns, constants, inputs)
    if found is not None:
        named[axes[found[0]][found[1]]] = columns
    dimensions = replace(dimensions, coords={**named, **coords})
    groups = {"posterior": _label(latent, axes)}
    groups["unconstrained_posterior"] = dict(_unconstrained(draws, axes))
    if prior:
        drawn = draw_prior(model, args, kwargs, num_samples, list(latent), seed=seed)
        groups["prior"] = _label({name: drawn[name] for name in latent}, axes)
    observed = draws.observed
    predictive = {name: one.draws for name, one in observed.items()} | dict(draws.predicted)
    groups["posterior_predictive"] = _label(predictive, axes)
    groups["log_likelihood"] = _label(_log_likelihoods(observed), axes)
    datasets = {group: dimensions.dataset(tensors) for group, tensors in groups.items() if tensors}
    fixed = {
        "observed_data": {n: (axes[n], one.value) for n, one in observed.items()},
        "constant_data": {name: (inputs[name], tensor) for name, tensor in constants.items()},
        "bmr": {
            f"{site}_{what}": (axes[site], tensor)
            for site, tensors in (elements or {}).items()
            for what, tensor in tensors.items()
        },
    }
    for group, variables in fixed.items():
        if variables:
            datasets[group] = dimensions.dataset(variables, drawn=False)
    _check_coords(dimensions, datasets)
    for dataset in datasets.values():
        dataset.attrs |= _attributes()
    if "bmr" in datasets:
        datasets["bmr"].attrs |= dict(attributes or {})
    return join_groups(datasets)


def _name_columns(
    columns: tuple[str, ...],
    constants: Mapping[str, Tensor],
    inputs: Mapping[str, tuple[str, ...]],
) -> dict[str, tuple[str, ...]]:
    """Put the names of columns along the data."""
    return {
        inputs[name][1]: columns
        for name, tensor in constants.items()
        if columns and tensor.dim() == 2 and tensor.shape[1] == len(columns)
    }


def _log_likelihoods(observed: Mapping[str, Observed]) -> dict[str, Tensor]:
    """Take those of sites whose rows are independent given the draws."""
    coupled = [name for name, one in observed.items() if one.coupling]
    if coupled:
        warn(
            f"the log likelihood of {coupled} is left out, since it is not a sum over rows: "
            f"{observed[coupled[0]].coupling}. bmr.free_energy and audit sum all of it"
        )
    return {name: one.log_prob for name, one in observed.items() if not one.coupling}


def _label(
    tensors: Mapping[str, Tensor], axes: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    # A log likelihood has the axes of the batch, which are the first of a site's.
    return {name: (axes[name][: tensor.dim() - 1], tensor) for name, tensor in tensors.items()}


def _unconstrained(
    draws: Draws, axes: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[str, tuple[tuple[str, ...], Tensor]]]:
    for name, value in draws.latent.items():
        support = draws.supports[name]
        if find_element_support(support) is constraints.real:
            yield name, (axes[name], value)
            continue
        try:
            transform = biject_to(support)
        except NotImplementedError:
            continue  # there is no such map, for the site is discrete
        free = transform.inv(value)
        if free.shape == value.shape:
            yield name, (axes[name], free)
            continue
        # A map of whole events, such as that of a simplex, keeps the axes of the batch only.
        own = [f"{name}_unconstrained_dim_{i}" for i in range(free.dim() - 1)]
        batch = axes[name][: len(axes[name]) - support.event_dim]
        yield name, ((*batch, *own[len(batch) :]), free)


def _constants(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], draws: Draws
) -> dict[str, Tensor]:
    """Find the tensors among the arguments that are not observations."""
    call = read_call(model, args, kwargs)
    values = [one.value for one in draws.observed.values()]
    return {
        name: tensor.detach()
        for name, tensor in zip(call.names, call.tensors, strict=True)
        if not any(_same(tensor, value) for value in values)
    }


def _same(tensor: Tensor, value: Tensor) -> bool:
    return tensor.shape == value.shape and torch.allclose(
        tensor.double(), value.double(), equal_nan=True
    )


def _plates_of(tensor: Tensor, draws: Draws) -> list[str | None]:
    """Say which plate the first axis of an argument runs over, if only one has its size."""
    sizes = {
        plate: size
        for name, one in draws.observed.items()
        for plate, size in zip(draws.axes[name], one.value.shape, strict=True)
        if plate is not None
    }
    fit = [plate for plate, size in sizes.items() if tensor.dim() and size == len(tensor)]
    first = fit[0] if len(fit) == 1 else None
    return [first, *[None] * (tensor.dim() - 1)][: tensor.dim()]


def _check_coords(dimensions: Dimensions, datasets: Mapping[str, xr.Dataset]) -> None:
    found = set(chain.from_iterable(dataset.dims for dataset in datasets.values()))
    unknown = sorted(dimensions.coords.keys() - found)
    if unknown:
        msg = (
            f"got coords= for {unknown}. Expected dimensions, of {sorted(map(str, found))}; dims= "
            "gives them other names"
        )
        raise ValueError(msg)


def _attributes() -> dict[str, str]:
    return {
        "creation_library": "pyro_bmr",
        "creation_library_version": __version__,
        "inference_library": "pyro",
        "inference_library_version": version("pyro-ppl"),
    }


def is_arviz_1() -> bool:
    """Tell whether the installed ArviZ works on a ``DataTree``."""
    return int(version("arviz").partition(".")[0]) >= 1


def join_groups(datasets: Mapping[str, xr.Dataset]) -> Any:
    """Make an ``InferenceData`` or a ``DataTree``, whichever the installed ArviZ works on."""
    import xarray as xr

    if is_arviz_1():
        return xr.DataTree.from_dict(dict(datasets))
    with warnings.catch_warnings():
        # ArviZ 0.23 announces ArviZ 1.0 when it is imported. That takes seconds, which those who
        # do not come here should not wait for.
        warnings.simplefilter("ignore", FutureWarning)
        from arviz import InferenceData
    return InferenceData(warn_on_custom_groups=False, **datasets)
