"""A guide that looks from outside like TyXe's ``AutoNormal``, written anew for these tests.

What is alike: an `AutoGuide` over a model with initial values; a parameter ``<site>.loc`` without a
constraint and ``<site>.scale``, positive or in an interval, or plain tensors where they are not
trained; and sites drawn from a Normal, transformed where the prior is not over the real line.
"""

from contextlib import ExitStack
from operator import attrgetter

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn import PyroParam
from torch.distributions import biject_to

from pyro_bmr.programs.distributions import find_core


class AutoNormal(AutoGuide):
    def __init__(self, module, train_loc=True, train_scale=True, max_guide_scale=None):
        super().__init__(InitMessenger(init_to_median)(module))
        self.trained = {"loc": train_loc, "scale": train_scale}
        self.scale_constraint = constraints.positive
        if max_guide_scale is not None:
            self.scale_constraint = constraints.interval(0.0, max_guide_scale)

    def _setup_prototype(self, *args, **kwargs):
        super()._setup_prototype(*args, **kwargs)
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            value = site["value"]
            self._hold(name, "loc", self._bijection(site).inv(value), constraints.real)
            self._hold(name, "scale", torch.full_like(value, 0.1), self.scale_constraint)

    def _hold(self, name, what, value, constraint):
        held = PyroParam(value, constraint) if self.trained[what] else value
        deep_setattr(self, f"{name}.{what}", held)

    @staticmethod
    def _bijection(site):
        return biject_to(find_core(site["fn"]).support)

    def get_loc(self, site_name):
        return attrgetter(f"{site_name}.loc")(self)

    def get_scale(self, site_name):
        return attrgetter(f"{site_name}.scale")(self)

    def forward(self, *args, **kwargs):
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates()
        return {
            name: self._draw(name, site, plates)
            for name, site in self.prototype_trace.iter_stochastic_nodes()
        }

    def _draw(self, name, site, plates):
        normal = dist.Normal(self.get_loc(name), self.get_scale(name))
        fn = normal.to_event(site["fn"].event_dim)
        if find_core(site["fn"]).support is not constraints.real:
            fn = dist.TransformedDistribution(fn, self._bijection(site))
        with ExitStack() as inside:
            for frame in site["cond_indep_stack"]:
                inside.enter_context(plates[frame.name])
            return pyro.sample(name, fn)
