"""Every guide family, against something independent: algebra, draws, exact linear regression."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
import tyxe_guide
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import HMC, MCMC, SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiscreteParallel,
    AutoGaussian,
    AutoGuideList,
    AutoHierarchicalNormalMessenger,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoNormal,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
    AutoStructured,
)
from pyro.infer.autoguide.gaussian import AutoGaussianFunsor
from pyro.infer.mcmc.api import StreamingMCMC
from pyro.nn import PyroModule, PyroParam

import pyro_bmr as bmr
from pyro_bmr.factors.program import ProgramFactor
from pyro_bmr.guides.families import UnregisteredGuideError
from pyro_bmr.guides.pruned_guide import Origin
from pyro_bmr.guides.reading import read_guide
from pyro_bmr.guides.statements import NotGaussianError
from pyro_bmr.testing import check_guide_family

X = torch.linspace(-1, 1, 60).reshape(20, 3) + torch.eye(20, 3)
Y = X @ torch.tensor([1.0, 0.0, -1.0])


def regression(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def hierarchy(n=3):
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", n):
        mid = pyro.sample("mid", dist.Normal(top, 1.0))
        pyro.sample("rate", dist.LogNormal(mid, 0.5))
    pyro.sample("alone", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


def shake(guide, *args):
    """Move every parameter away from where it starts."""
    guide(*args)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return guide


def exact_posterior():
    precision = torch.eye(3).double() + X.double().T @ X.double() / 0.25
    covariance = precision.inverse()
    return covariance @ X.double().T @ Y.double() / 0.25, covariance


def test_laplace_is_exact_for_a_linear_model():
    guide = AutoLaplaceApproximation(regression)
    with pytest.raises(TypeError, match="AutoLaplaceApproximation.*Call it, and reduce"):
        bmr.reduce(guide)
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(150):
        svi.step(X, Y)
    laplace = guide.laplace_approximation(X, Y)
    (factor,) = read_guide(laplace)
    loc, covariance = exact_posterior()
    torch.testing.assert_close(factor.posterior.loc.double(), loc, rtol=0, atol=2e-3)
    torch.testing.assert_close(
        factor.posterior.covariance.double(), covariance, rtol=1e-3, atol=1e-5
    )
    check_guide_family(laplace)
    assert bmr.reduce(laplace).masks["w"].tolist() == [True, False, True]


@pytest.mark.parametrize(
    "family",
    [AutoNormalMessenger, AutoHierarchicalNormalMessenger, AutoStructured, AutoGaussian],
)
def test_hierarchies_keep_their_correlations(family):
    guide = shake(family(hierarchy), 3)
    check_guide_family(guide, 3)
    factors = read_guide(guide, Origin(hierarchy, (3,)))
    groups = {frozenset(site.name for site in factor.sites) for factor in factors}
    joint = frozenset({"top", "mid", "rate"})
    mean_field = {frozenset({name}) for name in joint}
    expected = mean_field if family is AutoNormalMessenger else {joint}
    assert groups == {*expected, frozenset({"alone"})}
    assert isinstance(bmr.reduce(guide, 3).delta_f, float)


def test_the_hierarchical_messenger_by_algebra():
    guide = shake(AutoHierarchicalNormalMessenger(hierarchy), 3)
    joint = read_guide(guide, Origin(hierarchy, (3,)))[0]
    assert [site.name for site in joint.sites] == ["top", "mid", "rate"]
    covariance = joint.posterior.covariance
    top = guide.scales.top.square()
    mid = guide.weights.mid.square() * top + guide.scales.mid.square()
    torch.testing.assert_close(covariance[0, 0], top)
    torch.testing.assert_close(covariance.diagonal()[1:4], mid)
    torch.testing.assert_close(covariance[0, 1:4], guide.weights.mid * top)
    torch.testing.assert_close(
        covariance[1:4, 4:], (guide.weights.rate * covariance[1:4, 1:4]).detach()
    )
    # The mean of LogNormal(m, 0.5) is exp(m + 0.125).
    expected = guide.locs.rate + guide.weights.rate * (joint.posterior.loc[1:4] + 0.125)
    torch.testing.assert_close(joint.posterior.loc[4:], expected.detach())


def left_to_the_guide(guide, origin):
    factors = read_guide(guide, origin)
    return {f.site.name: f.reason for f in factors if isinstance(f, ProgramFactor)}


def test_the_regressive_messenger_where_it_is_gaussian_and_where_not():
    guide = shake(AutoRegressiveMessenger(hierarchy), 3)
    check_guide_family(guide, 3)
    joint = read_guide(guide, Origin(hierarchy, (3,)))[0]
    expected = guide.scales.mid.square() * (1 + guide.scales.top.square())
    torch.testing.assert_close(joint.posterior.covariance.diagonal()[1:4], expected)

    def scaled():
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        pyro.sample("w", dist.Normal(0.0, tau))

    guide = AutoRegressiveMessenger(scaled)
    guide()
    reasons = left_to_the_guide(guide, Origin(scaled))
    assert reasons == {"w": "left to the guide: its covariance depends on 'tau'"}
    guide = AutoRegressiveMessenger(lambda: pyro.sample("w", dist.Laplace(0.0, 1.0)))
    guide()
    with pytest.raises(NotGaussianError, match="'w' is not Gaussian.*it is a Laplace.*AutoNormal"):
        bmr.reduce(guide)


class Overridden(AutoNormalMessenger):
    """Linear in its parent at one site, as in Pyro's documentation."""

    power = 1

    def get_posterior(self, name, prior):
        if name == "mid":
            return dist.Normal(2 * self.upstream_value("top") ** self.power, 0.5)
        return super().get_posterior(name, prior)


class Curved(Overridden):
    power = 2


def test_a_messenger_with_a_posterior_of_its_own_is_not_misread():
    guide = shake(Overridden(hierarchy), 3)
    check_guide_family(guide, 3)
    joint = read_guide(guide, Origin(hierarchy, (3,)))[0]
    top = guide.scales.top.square()
    torch.testing.assert_close(joint.posterior.covariance[0, 1], 2 * top)
    torch.testing.assert_close(joint.posterior.covariance[1, 2], 4 * top)
    reasons = left_to_the_guide(shake(Curved(hierarchy), 3), Origin(hierarchy, (3,)))
    assert reasons["mid"] == "left to the guide: its mean depends in a nonlinear way on 'top'"


def local(x, index=None):
    with pyro.plate("rows", 12, subsample_size=None if index is None else 4, subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=x if index is None else x[index])


@pytest.mark.parametrize("amortized", [(), ("rows",)])
def test_messengers_hold_all_rows_of_a_sub_sampling_plate(amortized):
    data, index = torch.randn(12), torch.arange(4, 8)
    guide = shake(AutoNormalMessenger(local, amortized_plates=amortized), data, index)
    origin = Origin(local, (data, index))
    (factor,) = read_guide(guide, origin)
    assert factor.site.shape == (12,)
    torch.testing.assert_close(factor.loc, guide.locs.z.detach().expand(12))
    torch.testing.assert_close(factor.scale, guide.scales.z.detach().expand(12))
    result = bmr.reduce(guide, data, index, select=bmr.top_k(6))
    assert result.masks["z"].sum() == 6


@pytest.mark.parametrize(
    "family",
    [AutoHierarchicalNormalMessenger, AutoStructured, AutoGaussian, tyxe_guide.AutoNormal],
)
def test_other_guides_of_a_sub_sampling_plate_say_that_they_cannot(family):
    data, index = torch.randn(12), torch.arange(4, 8)
    guide = shake(family(local), data, index)
    with pytest.raises((ValueError, RuntimeError), match="rows.*AutoNormal"):
        bmr.reduce(guide, data, index)


def test_arguments_that_are_needed_and_missing():
    for family in (AutoNormalMessenger, AutoStructured, AutoGaussian):
        pyro.clear_param_store()
        guide = shake(family(regression), X, Y)
        with pytest.raises(
            TypeError,
            match="(?s)missing 1 required positional.*pass (the arguments|those) of the model",
        ):
            bmr.reduce(guide)
        assert bmr.reduce(guide, X, Y).sites[0].total == 3


def test_structured_guides_by_algebra_and_those_that_are_not_gaussian():
    kinds = {"top": "mvn", "mid": "normal", "rate": "normal", "alone": "mvn"}
    links = {"mid": {"top": "linear"}, "rate": {"mid": "linear", "top": "linear"}}
    guide = shake(AutoStructured(hierarchy, conditionals=kinds, dependencies=links), 3)
    check_guide_family(guide)
    alone, joint = read_guide(guide)
    weight, scale = guide.deps.mid.top.weight.detach(), guide.scales.mid.detach()
    top = joint.posterior.covariance[:1, :1]
    torch.testing.assert_close(
        joint.posterior.covariance[1:4, 1:4], weight @ top @ weight.T + scale.square().diag()
    )
    assert [site.name for site in alone.sites] == ["alone"]
    for bad in ("delta", lambda: pyro.sample("noise", dist.Normal(0.0, 1.0))):
        guide = AutoStructured(hierarchy, conditionals={**kinds, "mid": bad}, dependencies={})
        guide(3)
        with pytest.raises(NotGaussianError, match="'mid'. Expected the conditionals 'normal'"):
            bmr.reduce(guide, 3)


def written(core):
    def guide(x, y=None):
        pyro.sample("w", core())

    return guide


LOC = torch.tensor([0.5, 0.0, -0.5])
TRIL = torch.tensor([[0.5, 0.0, 0.0], [0.4, 0.3, 0.0], [-0.2, 0.1, 0.6]])
WRITTEN = {
    "dense": lambda: dist.MultivariateNormal(LOC, scale_tril=TRIL),
    "low rank": lambda: dist.LowRankMultivariateNormal(LOC, TRIL[:, :1], TRIL.diagonal() ** 2),
    "affine": lambda: dist.TransformedDistribution(
        dist.Normal(LOC, 0.5).to_event(1), dist.transforms.AffineTransform(1.0, -2.0)
    ),
    "masked": lambda: dist.Normal(LOC, 0.5).to_event(1).mask(True),
}


@pytest.mark.parametrize("core", WRITTEN.values(), ids=WRITTEN)
def test_hand_written_gaussians(core):
    check_guide_family(written(core), X, Y)
    (factor,) = read_guide(written(core), Origin(regression, (X, Y)))
    fn = core()
    if isinstance(fn, torch.distributions.TransformedDistribution):
        torch.testing.assert_close(factor.scale, torch.ones(3))
        torch.testing.assert_close(factor.loc, 1 - 2 * LOC)
    else:
        torch.testing.assert_close(factor.locations()["w"], fn.mean)
    if hasattr(fn, "covariance_matrix"):
        posterior = getattr(factor.posterior, "dense", lambda: factor.posterior)()
        torch.testing.assert_close(posterior.covariance, fn.covariance_matrix)
    result = bmr.reduce(written(core), X, Y, model=regression, select=bmr.top_k(2))
    assert result.masks["w"].sum() == 2


REFUSED = {
    "it is a StudentT": lambda: dist.StudentT(3.0, LOC, 1.0).to_event(1),
    "point mass": lambda: dist.Delta(LOC).to_event(1),
    "discrete": lambda: dist.Poisson(LOC.exp()).to_event(1),
    "seen through AbsTransform": lambda: dist.HalfNormal(LOC.exp()).to_event(1),
    "seen through TanhTransform": lambda: dist.TransformedDistribution(
        dist.Normal(LOC, 1.0).to_event(1), dist.transforms.TanhTransform()
    ),
    "something that changes from run to run": lambda: dist.Normal(torch.rand(3), 1.0).to_event(1),
}


@pytest.mark.parametrize("why", REFUSED)
def test_hand_written_guides_that_are_not_gaussian(why):
    with pytest.raises(NotGaussianError, match=f"site 'w'.*{why}"):
        bmr.reduce(written(REFUSED[why]), X, Y, model=regression)


def test_hidden_dependencies_are_found():
    def guide(how):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(how(a), 1.0))

    hidden = [lambda a: a.detach(), lambda a: torch.tensor(a.item()), lambda a: (a > 0).float()]
    for how in hidden:
        (why,) = left_to_the_guide(guide, Origin(None, (how,))).values()
        assert "its mean depends in a nonlinear way" in why
    (joint,) = read_guide(guide, Origin(None, (lambda a: 3 * a,)))
    torch.testing.assert_close(joint.posterior.covariance, torch.tensor([[1.0, 3.0], [3.0, 10.0]]))


class Written(PyroModule):
    """A Gamma beside a Normal on an interval."""

    def __init__(self, linked=False):
        super().__init__()
        self.loc = PyroParam(torch.zeros(2))
        self.width = PyroParam(torch.tensor([0.3, 0.6]), constraints.positive)
        self.linked = linked

    def forward(self):
        tau = pyro.sample("tau", dist.Gamma(20.0, 4.0))
        inside = dist.transforms.biject_to(constraints.interval(-1.0, 2.0))
        fn = dist.Normal(self.loc + self.linked * tau.log(), self.width).to_event(1)
        pyro.sample("v", dist.TransformedDistribution(fn, inside))


def bounded():
    pyro.sample("tau", dist.Gamma(1.0, 1.0))
    pyro.sample("v", dist.Uniform(-torch.ones(2), 2 * torch.ones(2)).to_event(1))


def test_written_modules():
    check_guide_family(Written(), model=bounded)
    normal, gamma = read_guide(Written(), Origin(bounded))
    torch.testing.assert_close(normal.scale, torch.tensor([0.3, 0.6]))
    torch.testing.assert_close(gamma.concentration, torch.tensor(20.0))
    reasons = left_to_the_guide(Written(linked=True), Origin(bounded))
    assert reasons["v"] == "left to the guide: it depends on 'tau', and one of the two is Gamma"
    guide = Written()
    guide()
    pyro.get_param_store()["loc"] = torch.ones(2)
    with pytest.raises(ValueError, match="parameter 'loc' differs from the entry"):
        bmr.reduce(guide, model=bounded)
    torch.testing.assert_close(guide.loc.detach(), torch.zeros(2))


def test_guides_without_their_parameters_are_left_without():
    def guide(x, y=None):
        pyro.sample("w", dist.Normal(pyro.param("loc", torch.zeros(3)), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"no parameters \['loc'\].*never called"):
        bmr.reduce(guide, X, Y, model=regression)
    assert "loc" not in pyro.get_param_store()
    messenger = AutoNormalMessenger(regression)
    with pytest.raises(ValueError, match="locs.w.*never called"):
        bmr.reduce(messenger, X, Y)
    assert not list(messenger.parameters())
    assert not hasattr(messenger, "locs")
    with pytest.raises(ValueError, match="AutoNormal has never been called"):
        bmr.reduce(tyxe_guide.AutoNormal(regression))


@pytest.mark.parametrize(
    "options", [{"train_loc": False}, {"train_scale": False}, {"max_guide_scale": 0.4}]
)
def test_tyxe_guides_and_their_options(options):
    guide = tyxe_guide.AutoNormal(hierarchy, **options)
    guide(3)
    check_guide_family(guide)
    by_name = {factor.site.name: factor for factor in read_guide(guide)}
    torch.testing.assert_close(by_name["rate"].loc, guide.get_loc("rate").detach())
    torch.testing.assert_close(by_name["rate"].scale, guide.get_scale("rate").detach())


def gaussian_samples(num):
    """Draws of two correlated sites, one of them positive."""
    fn = dist.MultivariateNormal(LOC, scale_tril=TRIL)
    draws = fn.sample((num,))
    return fn, {"a": draws[:, :2], "b": draws[:, 2].exp(), "k": torch.ones(num)}


def sampled(n=2):
    pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("a", dist.Normal(0.0, 1.0).expand([n]).to_event(1))
    pyro.sample("b", dist.LogNormal(0.0, 1.0))


def test_the_moments_of_posterior_samples():
    fn, samples = gaussian_samples(4000)
    with pytest.warns(UserWarning, match="moment matching.*mean and covariance .4000 draws"):
        result = bmr.reduce(samples, 2, model=sampled)
    with pytest.warns(UserWarning, match="moment matching"):
        (factor,) = read_guide(samples, Origin(sampled))
    torch.testing.assert_close(factor.posterior.loc, fn.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(
        factor.posterior.covariance, fn.covariance_matrix, rtol=0.1, atol=0.02
    )
    notes = {site.name: site.note for site in result.sites}
    assert notes["k"] == "not reduced: it is discrete"
    assert "positive" in notes["b"]
    with pytest.warns(UserWarning, match="moment matching"):
        check_guide_family(samples, model=sampled)

    _, few = gaussian_samples(20)
    with pytest.warns(UserWarning, match="all 3 elements are taken as independent"):
        a, b = read_guide(few, Origin(sampled))
    torch.testing.assert_close(a.scale, few["a"].std(0))
    torch.testing.assert_close(b.loc, few["b"].log().mean())


def test_samples_that_do_not_fit():
    _, samples = gaussian_samples(50)
    with pytest.raises(ValueError, match="posterior samples without the model"):
        bmr.reduce(samples)
    for bad, args, message in [
        (samples, (3,), "'a' have the shape .50, 2.. Expected"),
        ({"c": samples["a"]}, (), r"samples of \['c'\], but the model has"),
        ({"a": samples["a"] / 0}, (), "50 are not finite"),
        ({"a": samples["a"][:2]}, (), "got 2 draws"),
    ]:
        with pytest.raises(ValueError, match=message):
            bmr.reduce(bad, *args, model=sampled)


def test_mcmc_of_a_linear_model():
    kernel = HMC(regression, step_size=0.2, num_steps=5)
    mcmc = MCMC(kernel, 300, warmup_steps=50, disable_progbar=True)
    with pytest.raises(ValueError, match="no samples yet.*mcmc.run"):
        bmr.reduce(mcmc)
    mcmc.run(X, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (factor, *_) = read_guide(mcmc)
    loc, covariance = exact_posterior()
    marginal = factor.marginals()["w"]
    error = 4 * covariance.diagonal().sqrt() / 30**0.5
    assert ((marginal.loc - loc).abs() < error).all()
    torch.testing.assert_close(
        marginal.scale.double(), covariance.diagonal().sqrt(), rtol=0.4, atol=0
    )


def discrete():
    pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})


def test_families_that_cannot_be_reduced_say_what_to_do():
    for family, remedy in [
        (AutoDelta, "Train AutoNormal instead"),
        (AutoIAFNormal, "flow is not Gaussian. Train AutoNormal"),
        (AutoDiscreteParallel, "sum them out"),
    ]:
        with pytest.raises(NotGaussianError, match=f"type {family.__name__}.*{remedy}"):
            bmr.reduce(family(discrete))
    funsor = AutoGaussianFunsor.__new__(AutoGaussianFunsor)
    with pytest.raises(NotGaussianError, match='backend="dense".*load_state_dict'):
        bmr.extend.read_factors(funsor)
    for thing in (3, StreamingMCMC(HMC(regression), 3)):
        with pytest.raises(UnregisteredGuideError, match="finished pyro.infer.MCMC"):
            bmr.reduce(thing)


def test_a_list_with_nothing_but_a_point_estimate():
    guide = AutoGuideList(regression)
    guide.append(AutoDelta(poutine.block(regression, expose=["w"])))
    guide.append(AutoNormal(poutine.block(regression, expose=["none"])))
    guide(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(NotGaussianError, match="type AutoDelta.*Train AutoNormal instead"):
        bmr.reduce(guide)


def test_a_list_of_a_function_and_an_autoguide():
    def top_guide(n):
        loc = pyro.param("top_loc", torch.tensor(0.7))
        pyro.sample("top", dist.Normal(loc, 0.2))

    guide = AutoGuideList(hierarchy)
    guide.append(top_guide)
    guide.append(AutoNormal(pyro.poutine.block(hierarchy, hide=["top"])))
    guide(3)
    check_guide_family(guide)
    assert {s.name for f in read_guide(guide) for s in f.sites} == {"top", "mid", "rate", "alone"}


def test_the_law_finds_a_reader_that_is_wrong():
    class Wrong(Written):
        pass

    @bmr.extend.read_factors.register
    def _(guide: Wrong):
        normal, gamma = read_guide(Written(), Origin(bounded))
        return bmr.extend.IndependentFactor(normal.site, normal.loc, 1.5 * normal.scale), gamma

    with pytest.raises(AssertionError, match="draws of the guide do not agree.*variance"):
        check_guide_family(Wrong(), model=bounded)
