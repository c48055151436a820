"""Gamma posteriors of positive sites, such as the precision of observations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from operator import attrgetter
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide, AutoGuideList, AutoNormal
from pyro.infer.autoguide.initialization import InitMessenger, init_to_feasible
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pyro_bmr.arguments.checks import check_function, read_names, read_positive, refuse_kind


class AutoGamma(AutoGuide):
    r"""A guide with an independent Gamma posterior for every element of positive sites.

    .. math:: q(\tau) = \text{Gamma}(\alpha, \beta), \qquad E[\tau] = \alpha / \beta

    For the precision of Normal observations it is the family of the exact posterior given the
    mean. Its parameters are :math:`\alpha` (``concentrations``) and :math:`\alpha / \beta`
    (``means``).

    Parameters
    ----------
    model : callable
        A model of which only positive sites are exposed.
    init_loc_fn : callable
        As in `pyro.infer.autoguide.AutoNormal`; gives the means.
    init_concentration : float
        What every :math:`\alpha` starts from.

    Examples
    --------
    >>> guide = AutoGamma(lambda: pyro.sample("tau", dist.Gamma(2.0, 1.0)))
    >>> _ = guide()
    >>> guide.concentrations.tau.item()
    10.0
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        init_loc_fn: Callable[..., Any] = init_to_feasible,
        init_concentration: float = 10.0,
    ) -> None:
        check_function("model", model, "a Pyro model")
        _check_start(init_loc_fn)
        self._init_concentration = read_positive("init_concentration", init_concentration)
        super().__init__(InitMessenger(init_loc_fn)(model))

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        self.concentrations = PyroModule()
        self.means = PyroModule()
        sites = dict(self.prototype_trace.iter_stochastic_nodes())
        if not sites:
            msg = (
                "the model that was given to AutoGamma has no latent site. Expected one or more: "
                "are the names in mean_field(gamma=...) or poutine.block(expose=...) right?"
            )
            raise ValueError(msg)
        for name, site in sites.items():
            _check_site(name, site)
            mean = site["value"].detach().clone()
            concentration = torch.full_like(mean, self._init_concentration)
            for home, value in ((self.concentrations, concentration), (self.means, mean)):
                parameter = PyroParam(value, constraints.positive, site["fn"].event_dim)
                deep_setattr(home, name, parameter)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site.

        Parameters
        ----------
        *args, **kwargs
            Those of the model.

        Returns
        -------
        dict of Tensor
            One value per site.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        result = {}
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                concentration = attrgetter(name)(self.concentrations)
                rate = concentration / attrgetter(name)(self.means)
                fn = dist.Gamma(concentration, rate).to_event(site["fn"].event_dim)
                result[name] = pyro.sample(name, fn)
        return result

    @torch.no_grad()
    def median(self, *_args: Any, **_kwargs: Any) -> dict[str, Tensor]:
        """Return the posterior mean of every site, which is close to the median.

        Parameters
        ----------
        *_args, **_kwargs
            Not used; as in `pyro.infer.autoguide.AutoNormal.median`.

        Returns
        -------
        dict of Tensor
            One value per site.
        """
        names = [name for name, _ in self.prototype_trace.iter_stochastic_nodes()]
        return {name: attrgetter(name)(self.means).clone() for name in names}


def mean_field(
    model: Callable[..., Any],
    *,
    gamma: Iterable[str],
    init_loc_fn: Callable[..., Any] = init_to_feasible,
    init_scale: float = 0.1,
) -> AutoGuideList:
    """Make a guide that is Gamma at some sites and Normal at all others.

    Parameters
    ----------
    model : callable
        A Pyro model.
    gamma : iterable of str
        Positive sites, such as the precision of observations.
    init_loc_fn, init_scale
        As in `pyro.infer.autoguide.AutoNormal`.

    Returns
    -------
    AutoGuideList
        Of an ``AutoNormal`` and an `AutoGamma`.

    Examples
    --------
    >>> def model():
    ...     pyro.sample("w", dist.Normal(0.0, 1.0))
    ...     pyro.sample("tau", dist.Gamma(1.0, 1.0))
    >>> sorted(mean_field(model, gamma=["tau"])())
    ['tau', 'w']
    """
    check_function("model", model, "a Pyro model")
    _check_start(init_loc_fn)
    init_scale = read_positive("init_scale", init_scale)
    names = list(read_names("gamma", gamma) or ())
    guide = AutoGuideList(model)
    normal = poutine.block(model, hide=names)
    guide.append(AutoNormal(normal, init_loc_fn=init_loc_fn, init_scale=init_scale))
    guide.append(AutoGamma(poutine.block(model, expose=names), init_loc_fn=init_loc_fn))
    return guide


def _check_start(init_loc_fn: Any) -> None:
    expected = "a function of pyro.infer.autoguide.initialization"
    check_function("init_loc_fn", init_loc_fn, expected)
    if isinstance(init_loc_fn, torch.nn.Module):
        refuse_kind("init_loc_fn", init_loc_fn, expected)


def _check_site(name: str, site: Any) -> None:
    support = site["fn"].support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support not in (constraints.positive, constraints.nonnegative):
        msg = (
            f"the site {name!r} has the support {support}. Expected positive sites: expose only "
            "those, as in AutoGamma(poutine.block(model, expose=['precision']))"
        )
        raise ValueError(msg)
    if any(frame.full_size not in (None, frame.size) for frame in site["cond_indep_stack"]):
        msg = (
            f"the site {name!r} is in a sub-sampling plate, which AutoGamma does not follow. "
            "Expected a site outside of it, or AutoNormal"
        )
        raise ValueError(msg)
