"""Guides inside of other things: handlers, bound arguments, functions, Gaussian processes."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib import gp
from pyro.infer import config_enumerate
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)
from pyro.infer.autoguide.initialization import init_to_value
from pyro.nn import PyroSample, pyro_method
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.guides.pruned_guide import Origin
from pyro_bmr.guides.reading import read_guide

X = torch.linspace(-1, 1, 80).reshape(20, 4)
Y = 2 * X[:, 0]
LOC = torch.tensor([1.5, 0.02, -0.03, 0.5])


def model(x, y=None, width=0.5):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, noise + width), obs=y)


def trained(family=AutoNormal, the_model=model):
    start = init_to_value(values={"w": LOC, "noise": torch.tensor(0.4)})
    guide = family(the_model, init_loc_fn=start, init_scale=0.1)
    guide(X, Y)
    return guide


class Inside(nn.Module):
    """A module of the user's, which calls an autoguide."""

    def __init__(self, guide):
        super().__init__()
        self.inner = guide

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def draw(self, *args, **kwargs):
        return self(*args, **kwargs)


TRANSPARENT = {
    "partial": partial,
    "block": lambda guide: poutine.block(guide, hide=["y"]),
    "block of a type": lambda guide: poutine.block(guide, hide_types=["param"]),
    "block by a function": lambda guide: poutine.block(
        guide, hide_fn=lambda msg: isinstance(msg["fn"], dist.Gamma)
    ),
    "enumerated": config_enumerate,
    "nested": lambda guide: partial(poutine.block(partial(guide), expose=["w", "noise"])),
}
RUN = {
    "function": lambda guide: lambda *args, **kwargs: guide(*args, **kwargs),
    "module": Inside,
    "method": lambda guide: Inside(guide).draw,
    "trace": poutine.trace,
    "condition": lambda guide: poutine.condition(guide, data={}),
    "blocked function": lambda guide: poutine.block(RUN["function"](guide), hide=["y"]),
}


def check_same(result, expected):
    torch.testing.assert_close(result.scores, expected.scores, rtol=1e-4, atol=1e-4)
    assert result.masks["w"].equal(expected.masks["w"]) and 0 < expected.sparsity < 1


@pytest.mark.parametrize("wrap", TRANSPARENT.values(), ids=TRANSPARENT)
@pytest.mark.parametrize("family", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal])
def test_what_hides_nothing_is_looked_through(family, wrap):
    guide = trained(family)
    result = bmr.reduce(wrap(guide))
    check_same(result, bmr.reduce(guide))
    assert result.model.model is model


@pytest.mark.parametrize("wrap", RUN.values(), ids=RUN)
def test_an_autoguide_that_something_else_runs_is_read(wrap):
    guide = trained()
    result = bmr.reduce(wrap(guide), X, model=model, select=bmr.by_evidence())
    check_same(result, bmr.reduce(guide))
    found = {s.name: f for f in read_guide(wrap(guide), Origin(model, (X,))) for s in f.sites}
    for factor in read_guide(guide):
        (site,) = factor.sites
        (other,) = found[site.name].sites
        assert (other.shape, other.event_dim) == (site.shape, site.event_dim)
        two = found[site.name].marginals()[site.name]
        for one in factor.marginals().values():
            torch.testing.assert_close((one.loc, one.scale), (two.loc, two.scale))


def test_draws_that_happen_to_be_equal_are_not_confused():
    """Two sites of the same mean and shape, of which each has its own scale."""

    def twins():
        for name in ("a", "b"):
            pyro.sample(name, dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = AutoNormal(twins, init_loc_fn=lambda _: torch.zeros(2))
    guide()
    guide.scales.b_unconstrained.data -= 1.0
    found = {f.site.name: f.scale for f in read_guide(lambda: guide(), Origin(twins))}
    torch.testing.assert_close(found, {n: getattr(guide.scales, n).detach() for n in ("a", "b")})


def test_arguments_that_are_bound_are_bound_to_the_model_too():
    guide = trained()
    bound = partial(guide, X, width=0.1)
    bound(Y)
    result = bmr.reduce(bound, Y)
    assert (result.model.model.func, result.model.model.args) == (model, (X,))
    assert result.model.model.keywords == {"width": 0.1}
    given = bmr.reduce(bound, Y, model=partial(model, X, width=0.1))
    remembered = bmr.reduce(guide, X, Y, kwargs={"width": 0.1})
    for other in (given, remembered):
        assert result.masks["w"].equal(other.masks["w"])
        assert result.realised == pytest.approx(other.realised, abs=1e-3)
    assert bmr.free_energy(result.model, result.guide, Y, num_samples=5)[0] < 1e3
    # Without arguments, those of the first call that are not bound.
    assert len(bmr.reduce(bound).decision.origin.args) == 1


def test_a_guide_function_keeps_what_is_bound_to_it():
    def written(shift, x, y=None):
        pyro.sample("w", dist.Normal(LOC + shift, 0.1).to_event(1))
        pyro.sample("noise", dist.LogNormal(-1.0, 0.1))

    shift = torch.tensor([0.0, 3.0, 0.0, 0.0])
    bound = partial(written, shift)
    with pytest.raises(ValueError, match=r"written does not know its model.*model=model"):
        bmr.reduce(bound, X)
    masks = bmr.reduce(bound, X, model=model, select=bmr.by_evidence()).masks["w"]
    assert masks.tolist() == [True, True, False, True]


def test_a_list_of_wrapped_parts():
    guide = AutoGuideList(model)
    guide.append(partial(trained(the_model=poutine.block(model, expose=["w"]))))
    guide.append(AutoNormal(poutine.block(model, expose=["noise"])))
    guide(X, Y)
    assert bmr.reduce(guide).masks["w"].tolist() == [True, False, False, True]
    guide[0]._guide = poutine.block(guide[0]._guide, hide=["w"])
    with pytest.raises(ValueError, match=r"poutine.block, which hides the sites \['w'\]"):
        bmr.reduce(guide)


def test_messengers_inside_of_others_are_run():
    guide = AutoNormalMessenger(model)
    guide(X, Y)
    factors = read_guide(partial(guide, X), Origin(partial(model, X), (Y,)))
    names = {site.name for factor in factors for site in factor.sites}
    assert names == {"w", "noise"}


@pytest.mark.parametrize("family", [AutoNormal, AutoMultivariateNormal])
@pytest.mark.parametrize(
    ("name", "wrap"),
    {
        "scale": lambda guide: poutine.scale(guide, scale=0.01),
        "mask": lambda guide: poutine.mask(guide, mask=torch.tensor(False)),
    }.items(),
)
@pytest.mark.parametrize("around", [lambda guide: guide, partial, TRANSPARENT["block"], "written"])
def test_what_changes_the_free_energy_is_refused(family, name, wrap, around):
    if around == "written":
        wrapped, inside = wrap(RUN["function"](trained(family))), "lambda"
    else:
        wrapped, inside = around(wrap(trained(family))), family.__name__
    with pytest.raises(ValueError, match=f"poutine.{name}, which.*Expected.*{inside}.* inside"):
        bmr.reduce(wrapped, X, Y, model=wrap(model))


def test_prune_refuses_before_it_trains():
    guide = trained()
    before = guide.locs.w.detach().clone()
    with pytest.raises(ValueError, match="inside of poutine.scale"):
        bmr.prune(model, poutine.scale(guide, scale=0.5), X, Y, num_epochs=3)
    assert guide.locs.w.equal(before)


def test_prune_takes_a_guide_that_is_looked_through():
    guide = partial(trained(), width=0.1)
    result = bmr.prune(
        partial(model, width=0.1), guide, X, Y, num_epochs=5, max_rounds=1, progress=False
    )
    assert result.masks["w"].shape == (4,)


@pytest.mark.parametrize(
    "options", [{"hide": ["w"]}, {}, {"expose": ["noise"]}, {"hide_fn": lambda m: m["name"] == "w"}]
)
def test_a_block_that_hides_a_site_is_refused(options):
    with pytest.raises(ValueError, match=r"poutine.block, which hides the sites \['w'.*Expected"):
        bmr.reduce(poutine.block(trained(), **options))


@pytest.mark.parametrize("wrap", [RUN["function"], RUN["module"], RUN["condition"]])
def test_an_autoguide_that_cannot_be_read_by_running_it_is_named(wrap):
    guide = wrap(trained(AutoMultivariateNormal))
    with pytest.raises(TypeError, match="'_AutoMultivariateNormal_latent'.*pass that one"):
        bmr.reduce(guide, X, model=model)
    reduced = wrap(bmr.reduce(trained()).guide)
    with pytest.raises(TypeError, match="auxiliary sites .'w_unconstrained'"):
        bmr.reduce(reduced, X, model=model)


def test_auxiliary_draws_that_are_no_sites_stay_random():
    def hidden():
        u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("w", dist.Normal(u, 1.0))

    def shifted():
        u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("w", dist.Delta(2 * u))

    def shared():
        u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("w", dist.Delta(u))
        pyro.sample("v", dist.Delta(u))

    def one():
        pyro.sample("w", dist.Normal(0.0, 1.0))

    def two():
        one()
        pyro.sample("v", dist.Normal(0.0, 1.0))

    with pytest.raises(TypeError, match="something that changes from run to run"):
        bmr.reduce(hidden, model=one)
    with pytest.raises(TypeError, match="it is computed from the auxiliary sites .'u'"):
        bmr.reduce(shifted, model=one)
    with pytest.raises(TypeError, match="site 'v'.*the auxiliary sites .'u'"):
        bmr.reduce(shared, model=two)


def gaussian_process(family):
    kernel = gp.kernels.RBF(4, lengthscale=torch.ones(4))
    kernel.lengthscale = PyroSample(dist.LogNormal(torch.zeros(4), 1.0).to_event(1))
    kernel.autoguide("lengthscale", family)
    return gp.models.GPRegression(X, Y, kernel, noise=torch.tensor(0.1))


@pytest.mark.parametrize("family", [dist.Normal, dist.MultivariateNormal])
def test_the_autoguide_of_a_kernel_is_read(family):
    process = gaussian_process(family)
    (factor,) = read_guide(process.guide, Origin(process.model))
    (site,) = factor.sites
    assert (site.name, site.shape) == ("kernel.lengthscale", (4,))
    assert site.constrain(torch.zeros(4)).equal(torch.ones(4))
    torch.testing.assert_close(
        factor.marginals()[site.name].loc.reshape(4), process.kernel.lengthscale_loc.detach()
    )
    spike = {"kernel.lengthscale": bmr.Spike(loc=1.0)}
    result = bmr.reduce(process.guide, model=process.model, reduced_prior=spike)
    full, error = bmr.free_energy(process.model, process.guide, num_samples=200)
    found, other = bmr.free_energy(result.model, result.guide, num_samples=200)
    assert result.sparsity == 0 and abs(found - full) < 4 * (error**2 + other**2) ** 0.5
    with pytest.raises(TypeError, match="'kernel.lengthscale'.*point mass"):
        bmr.reduce(gaussian_process(dist.Delta).guide, model=process.model)


class Line(gp.Parameterized):
    """A module of Pyro's GPs that is no process: a real site, and a positive one."""

    def __init__(self):
        super().__init__()
        self.slope = PyroSample(dist.Normal(torch.zeros(4), 1.0).to_event(1))
        self.noise = PyroSample(dist.Gamma(2.0, 2.0))
        for name in ("slope", "noise"):
            self.autoguide(name, dist.Normal)
        self.slope_loc.data, self.slope_scale = LOC.clone(), torch.full((4,), 0.1)

    @pyro_method
    def model(self, x, y=None):
        self.set_mode("model")
        mean, noise = x @ self.slope, self.noise
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, noise), obs=y)

    @pyro_method
    def guide(self, *_):
        self.set_mode("guide")
        self._load_pyro_samples()


def test_the_autoguides_of_a_parameterized_module():
    line = Line()
    result = bmr.reduce(line.guide, X, model=line.model, select=bmr.by_evidence())
    assert result.masks["slope"].tolist() == [True, False, False, True]
    assert "positive" in result.summary().loc["noise", "note"]


def test_handlers_around_a_guide_stay_out_of_the_way_elsewhere():
    guide = trained()
    plain, error = bmr.free_energy(model, guide, X, Y, num_samples=200)
    scaled = (poutine.scale(program, scale=0.01) for program in (model, guide))
    found, other = bmr.free_energy(*scaled, X, Y, num_samples=200)
    assert abs(100 * found - plain) < 4 * (error**2 + (100 * other) ** 2) ** 0.5
