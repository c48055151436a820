"""Guides, and the traps of Pyro around them."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value

import pyro_bmr as bmr
from pyro_bmr.guides.reading import read_guide, read_origin
from pyro_bmr.testing import check_guide_family

X = torch.linspace(-1, 1, 60).reshape(20, 3)
Y = X.sum(1)


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal((x * w).sum(-1), scale), obs=y)


def trained(family=AutoNormal, the_model=model, steps=30, **options):
    guide = family(the_model, **options)
    svi = SVI(the_model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(steps):
        svi.step(X, Y)
    return guide


def drop_first(scores):
    return {
        name: torch.arange(t.numel()).reshape(t.shape) > 0 for name, t in scores.delta_f.items()
    }


def test_trap_a_deep_copy_takes_the_model_from_the_live_guide():
    guide = trained()
    copied = copy.deepcopy(guide)
    for broken in (guide, copied):
        with pytest.raises(ValueError, match="does not know its model.*copy.deepcopy"):
            bmr.reduce(broken)
        assert bmr.reduce(broken, model=model).model.model is model


def test_trap_saving_takes_the_model_from_the_live_guide(tmp_path):
    guide = trained()
    torch.save(guide, tmp_path / "guide.pt", pickle_module=pickle)
    with pytest.raises(ValueError, match="torch.save"):
        bmr.reduce(guide)
    assert bmr.reduce(guide, model=model).delta_f is not None


def test_trap_a_second_guide_of_the_same_name_shares_parameters():
    """Two AutoNormals share entries of the param store; two reduced guides never do."""
    guide = trained()
    results = [bmr.reduce(guide, select=drop_first) for _ in range(2)]
    first, second = (result.guide for result in results)
    first(X), second(X)
    before = {n: v.clone() for n, v in second.state_dict().items()}
    guide_before = {n: v.clone() for n, v in guide.state_dict().items()}
    svi = SVI(results[0].model, first, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(5):
        svi.step(X, Y)
    assert all(torch.equal(v, before[n]) for n, v in second.state_dict().items())
    assert all(torch.equal(v, guide_before[n]) for n, v in guide.state_dict().items())
    assert any(not torch.equal(v, before[n]) for n, v in first.state_dict().items())


def test_trap_names_that_a_loaded_store_holds_are_not_taken():
    result = bmr.reduce(trained())
    result.guide(X)
    taken = {name.split(".")[0] for name in pyro.get_param_store() if name.startswith("Pruned")}
    serial = int(next(iter(taken)).removeprefix("PrunedGuide"))
    pyro.param(f"PrunedGuide{serial + 1}.factors./w.loc", torch.zeros(3))
    fresh = bmr.reduce(result.guide).guide
    assert fresh._pyro_name == f"PrunedGuide{serial + 2}"


def test_trap_the_param_store_and_the_guide_disagree(tmp_path):
    guide = trained()
    pyro.get_param_store().save(tmp_path / "store.pt")
    trained_loc = guide.locs.w.detach().clone()
    pyro.clear_param_store()
    trained(steps=1)
    with pytest.raises(ValueError, match="differs from the entry of that name in Pyro's param"):
        bmr.reduce(guide)
    pyro.clear_param_store()
    torch.testing.assert_close(read_guide(guide)[0].loc, trained_loc)
    guide(X)
    bmr.reduce(guide)


@pytest.mark.parametrize("family", [AutoNormal, AutoMultivariateNormal, AutoGuideList])
def test_trap_a_fresh_guide_beside_a_loaded_store(family, tmp_path):
    def make(the_model):
        guide = family(the_model)
        if family is AutoGuideList:
            guide.append(AutoNormal(poutine.block(the_model, expose=["w"])))
            guide.append(AutoNormal(poutine.block(the_model, expose=["scale"])))
        return guide

    expected = bmr.reduce(trained(make), X, Y, select=drop_first)
    store = pyro.get_param_store()
    store.save(tmp_path / "store.pt")
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="never been called.*pass these arguments"):
        bmr.reduce(make(model), X, Y)
    store.load(tmp_path / "store.pt")
    guide = make(model)
    parts = [(part, part._model, part.master) for part in guide.modules()]
    before, random_state = store.get_state()["params"], torch.get_rng_state()
    result = bmr.reduce(guide, X, Y, select=drop_first)
    assert result.delta_f == expected.delta_f != 0
    assert result.realised == expected.realised
    assert guide.prototype_trace is None and not [*guide.parameters()]
    assert parts == [(part, part._model, part.master) for part, *_ in parts]
    assert store.get_state()["params"] == before
    assert torch.equal(torch.get_rng_state(), random_state)
    with pytest.raises(ValueError, match="never been called"):
        bmr.reduce(guide)


def test_trap_a_fresh_guide_beside_the_store_of_another_model():
    trained()

    def other(x, y=None):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        model(x + b, y)

    with pytest.raises(ValueError, match=r"lacks its parameters \['AutoNormal.locs.b', 'Auto"):
        bmr.reduce(AutoNormal(other), X, Y)


def test_trap_guide_model_draws_initial_values_instead_of_the_prior():
    start = init_to_value(values={"w": torch.full((3,), 7.0), "scale": torch.tensor(1.0)})
    guide = trained(init_loc_fn=start, steps=1)
    draws = [poutine.trace(guide.model).get_trace(X).nodes["w"]["value"] for _ in range(2)]
    assert torch.equal(*draws)
    result = bmr.reduce(guide, select=lambda s: {})
    assert result.model.model is model
    draws = torch.stack(
        [poutine.trace(result.model).get_trace(X).nodes["w"]["value"] for _ in range(500)]
    )
    torch.testing.assert_close(draws.mean((0, 1)), torch.tensor(0.0), rtol=0, atol=0.15)
    torch.testing.assert_close(draws.std(), torch.tensor(1.0), rtol=0, atol=0.1)


def test_trap_a_model_hidden_behind_a_block_is_found():
    guide = AutoNormal(poutine.block(model, hide=["scale"]))
    guide(X, Y)
    assert read_origin(guide).model is model
    guide = AutoNormal(poutine.scale(model, 2.0))
    guide(X, Y)
    assert read_origin(guide).model is not model, "only what concerns the guide is peeled off"


def test_trap_an_outer_trace_sees_the_pruned_values():
    result = bmr.reduce(trained(), select=drop_first)
    for program in (result.model, result.guide):
        with poutine.trace() as outer:
            program(X)
        assert outer.trace.nodes["w"]["value"][0] == 0


@pytest.mark.parametrize("parallel", [False, True])
def test_trap_predictive_adds_a_leading_dimension(parallel):
    """Weights come as (1, 3), or with all draws at once as (6, 1, 3)."""
    result = bmr.reduce(trained(), select=drop_first)
    samples = Predictive(result.guide, num_samples=6)(X)
    assert (samples["w"][:, 0] == 0).all()
    samples = {"w": samples["w"][:, None], "scale": samples["scale"]}
    full = samples | {"w": samples["w"] + 1.0}
    for values in (samples, full):
        predictive = Predictive(result.model, posterior_samples=values, parallel=parallel)
        pyro.set_rng_seed(3)
        draws = predictive(X)["y"]
        values = values | {"w": values["w"] * torch.tensor([0.0, 1.0, 1.0])}
        predictive = Predictive(model, posterior_samples=values, parallel=parallel)
        pyro.set_rng_seed(3)
        torch.testing.assert_close(draws, predictive(X)["y"])


def test_trap_the_prototype_holds_the_size_of_the_first_batch():
    guide = AutoNormal(model)
    guide(X[:4], Y[:4])
    result = bmr.reduce(guide)
    assert Predictive(result.model, guide=result.guide, num_samples=3)(X)["y"].shape == (3, 20)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("family", [AutoNormal, AutoMultivariateNormal])
def test_vectorised_particles_and_mean_field_elbos(elbo, family):
    result = bmr.reduce(trained(family), select=drop_first)
    one = elbo(num_particles=400)
    many = elbo(num_particles=400, vectorize_particles=True, max_plate_nesting=1)
    losses = [e.loss(result.model, result.guide, X, Y) for e in (one, many)]
    assert losses[0] == pytest.approx(losses[1], abs=3.0)


def test_elbo_modules_with_module_local_parameters():
    with pyro.settings.context(module_local_params=True):
        guide = trained()
        result = bmr.reduce(guide, select=drop_first)
        loss = Trace_ELBO()(result.model, result.guide)
        loss(X, Y)
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
        for _ in range(10):
            optimizer.zero_grad()
            loss(X, Y).backward()
            optimizer.step()
        assert result.guide.median()["w"][0] == 0
        assert not any("Pruned" in name for name in pyro.get_param_store())


def test_create_plates_is_honoured():
    data = torch.randn(50)

    def rows(x, index=None):
        return pyro.plate("rows", 50, subsample=index)

    def local_model(x, index=None):
        with rows(x, index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=x)

    index = torch.arange(10, 20)
    guide = AutoNormal(local_model, create_plates=rows)
    guide(data[index], index)
    keep = torch.rand(50) < 0.5
    result = bmr.reduce(guide, select=lambda s: {"z": keep})
    for rows_drawn in (torch.arange(3, 8), torch.arange(30, 45)):
        drawn = result.guide(data[rows_drawn], rows_drawn)["z"]
        assert torch.equal(drawn != 0, keep[rows_drawn])
        Trace_ELBO().loss(result.model, result.guide, data[rows_drawn], rows_drawn)


@pytest.mark.parametrize("count", [3, 40])
def test_many_sites_that_stay_whole_for_the_same_reason_are_one_row_where_printed(count):
    def wide_model():
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        for i in range(count):
            pyro.sample(f"b{i}", dist.Normal(0.0, 1.0).expand([2, i]).to_event(2))
        pyro.sample("tau", dist.Gamma(1.0, 1.0))

    guide = AutoNormal(wide_model)
    guide()
    result = bmr.reduce(guide, sites="w", select=drop_first)
    assert len(result.sites) == len(result.summary()) == count + 2
    for shown in (str(result), result._repr_html_()):
        few = count == 3
        assert ("b0 and 39 others" in shown, "1560" in shown.replace(",", "")) == (not few, not few)
        assert shown.count("not reduced: it is not among") == (3 if few else 1)


def test_a_whole_site_is_conditioned_too_when_it_is_correlated():
    guide = trained(AutoMultivariateNormal)
    result = bmr.reduce(guide, select=drop_first)
    assert not torch.allclose(result.guide.median()["scale"], guide.median()["scale"])


def test_everything_may_be_pruned():
    for family in (AutoNormal, AutoMultivariateNormal):
        pyro.clear_param_store()
        result = bmr.reduce(trained(family), select=bmr.top_k(0))
        assert (result.guide()["w"] == 0).all()
        assert bmr.reduce(result.guide).delta_f == 0

    def only_weights():
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    pyro.clear_param_store()
    guide = AutoMultivariateNormal(only_weights)
    guide()
    result = bmr.reduce(guide, select=bmr.top_k(0))
    assert Trace_ELBO().loss(result.model, result.guide) == 0
    assert bmr.reduce(result.guide).sparsity == 1


def test_sites_leaves_the_others_alone_and_earlier_masks_in_place():
    def two(x, y=None):
        pyro.sample("v", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        return model(x, y)

    guide = trained(the_model=two)
    first = bmr.reduce(guide, sites=["v"], select=drop_first)
    assert set(first.masks) == {"v"}
    assert first.summary().loc["w", "note"] == "not reduced: it is not among sites="
    second = bmr.reduce(first.guide, sites="w", select=drop_first)
    assert set(second.masks) == {"v", "w"}
    assert second.sparsity == 2 / 7
    assert second.summary().loc["v", "kept"] == 2


def test_a_guide_family_can_be_registered():
    class MeanField(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.tensor([0.0, 1.0, 2.0]))
            self.spread = pyro.nn.PyroParam(torch.ones(3) / 2, dist.constraints.positive)

        def forward(self, x, y=None):
            pyro.sample("w", dist.Normal(self.loc, self.spread).to_event(1))
            pyro.sample("scale", dist.Delta(torch.tensor(1.0)))

    @bmr.extend.read_factors.register
    def _(guide: MeanField):
        site = bmr.extend.Site("w", torch.Size([3]), event_dim=1)
        return (bmr.extend.IndependentFactor(site, guide.loc.detach(), guide.spread.detach()),)

    check_guide_family(MeanField(), X, Y)
    result = bmr.reduce(MeanField(), X, Y, model=model)
    assert result.masks["w"].tolist() == [False, True, True]
    assert result.summary().loc["scale", "note"] == "not reduced: the guide does not hold it"


def test_double_precision_and_its_guide_stay_double():
    def double():
        pyro.sample("w", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))

    for family in (AutoNormal, AutoMultivariateNormal):
        pyro.clear_param_store()
        guide = family(double)
        guide()
        result = bmr.reduce(guide)
        assert result.scores["w"].dtype == torch.float64
        assert all(p.dtype == torch.float64 for p in result.guide.parameters())


def test_outer_plates_over_univariate_sites():
    def plain(x, y=None):
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        with pyro.plate("inputs", 3):
            w = pyro.sample("w", dist.Laplace(0.0, 1.0))
        mean = (x * w.unsqueeze(-2)).sum(-1) + bias
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    for family in (AutoNormal, AutoMultivariateNormal):
        pyro.clear_param_store()
        guide = trained(family, plain)
        for select in (drop_first, lambda s: {}):
            result = bmr.reduce(guide, select=select)
            one, many = (
                Trace_ELBO(num_particles=n, vectorize_particles=v, max_plate_nesting=1).loss(
                    result.model, result.guide, X, Y
                )
                for n, v in ((100, False), (400, True))
            )
            assert many == pytest.approx(one, abs=3.0)
            with pyro.plate("outer", 4, dim=-2):
                drawn = poutine.trace(result.guide).get_trace(X).nodes["w"]["value"]
            assert drawn.shape == (4, 3)
            assert torch.equal(drawn == 0, (~result.masks["w"]).expand(4, 3))


def test_names_that_look_alike_stay_apart():
    def similar():
        for name in ("a.b", "a/b", "a+b", "a~b"):
            pyro.sample(name, dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = AutoMultivariateNormal(similar)
    guide()
    masks = {
        name: torch.tensor([i % 2 == 0, i // 2 == 0])
        for i, name in enumerate(("a.b", "a/b", "a+b", "a~b"))
    }
    result = bmr.reduce(guide, select=lambda s: masks)
    for program in (result.model, result.guide):
        trace = poutine.trace(program).get_trace()
        for name, mask in masks.items():
            assert torch.equal(trace.nodes[name]["value"] != 0, mask)


class Wrapped(pyro.nn.PyroModule):
    """A model that is a method, as in Pyro's variational auto-encoder."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)

    def program(self, x, y=None):
        pyro.module("norm", self.norm)
        return model(self.norm(x).detach(), y)


def test_buffers_of_wrapped_modules_and_all_generators_are_put_back():
    owner = Wrapped()

    def recursive(x, y=None, again=False):
        return recursive(x, y) if again else owner.program(x, y)

    for wrapped in (owner.program, recursive):
        pyro.clear_param_store()
        guide = trained(the_model=wrapped, steps=3)
        before = {n: b.clone() for n, b in owner.named_buffers()}
        bmr.reduce(guide)
        assert all(torch.equal(b, before[n]) for n, b in owner.named_buffers())


def test_a_model_that_writes_to_its_samples():
    def writes(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        w = w if w.is_leaf else w.clone()
        w[0] = 0.0

    guide = AutoNormal(writes)
    with torch.no_grad():
        guide(X)
    before = guide.median()["w"]
    bmr.reduce(guide)
    assert torch.equal(guide.median()["w"], before)


def test_empty_sites():
    def empty():
        pyro.sample("w", dist.Normal(torch.zeros(0), 1.0).to_event(1))

    guide = AutoNormal(empty)
    guide()
    result = bmr.reduce(guide)
    assert result.sparsity == 0
    assert "w" in str(result)
    assert set(result.masks) == {"w"}


def test_inference_mode():
    guide = trained()
    with torch.inference_mode():
        result = bmr.reduce(guide)
    svi = SVI(result.model, result.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(X, Y)


def test_a_gamma_posterior_is_carried_along():
    def precise(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        tau = pyro.sample("tau", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            mean = (x * w).sum(-1, keepdim=True).expand(-1, 2)
            pyro.sample("y", dist.Normal(mean, tau.rsqrt()).to_event(1), obs=y)

    guide = bmr.mean_field(precise, gamma="tau")
    svi = SVI(precise, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(50):
        svi.step(X, Y[:, None].expand(-1, 2))
    check_guide_family(guide)
    result = bmr.reduce(guide, select=drop_first)
    assert [row.note for row in result.sites if row.name == "tau"] == [
        "not reduced: it is positive"
    ]
    draws = torch.stack([result.guide(X)["tau"] for _ in range(2000)]).detach()
    torch.testing.assert_close(draws.mean(0), guide[1].means.tau.detach(), rtol=0.05, atol=0)
    low, high = result.guide.quantiles([0.05, 0.95])["tau"]
    assert ((draws > low) & (draws < high)).float().mean() == pytest.approx(0.9, abs=0.03)
    assert (result.guide.median()["tau"] > 0).all()
    assert (guide.median()["tau"] > 0).all()


def test_gamma_posteriors_are_for_positive_sites():
    with pytest.raises(ValueError, match="the site 'w' has the support.*expose only"):
        bmr.AutoGamma(model)(X)

    def in_a_plate():
        with pyro.plate("rows", 10, subsample_size=2):
            pyro.sample("tau", dist.Gamma(1.0, 1.0))

    with pytest.raises(ValueError, match="'tau' is in a sub-sampling plate"):
        bmr.AutoGamma(in_a_plate)()
