"""The audit: it passes what is right, and finds what is wrong."""

import copy
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_regression import ExactRegression
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.demo import Regression
from pyro_bmr.diagnostics.audit import Audit, Check
from pyro_bmr.training.pruning import fit


class TwoSites(ExactRegression):
    """Weights of two sites, some of them nearly collinear, of which half matter."""

    def __init__(self):
        torch.manual_seed(3)
        x = torch.randn(40, 6).double()
        x[:, 1] = x[:, 0] + 0.1 * torch.randn(40)
        y = x @ torch.tensor([1.0, 0.0, 0.0, -1.0, 0.0, 0.05]).double() + 0.3 * torch.randn(40)
        super().__init__(x, y, 0.3, torch.zeros(6).double(), torch.full((6,), 1.2).double())

    def model(self):
        scale = self.scale.view(2, 3)
        a, b = (
            pyro.sample(name, dist.Normal(torch.zeros(3).double(), s).to_event(1))
            for name, s in zip("ab", scale, strict=True)
        )
        with pyro.plate("data", len(self.x)):
            pyro.sample("y", dist.Normal(self.x @ torch.cat([a, b]), self.noise), obs=self.y)


def rows(audit):
    return {check.name: check for check in (*audit.sites, audit.total, *audit.later)}


@pytest.mark.parametrize("family", ["dense", "low_rank"])
@pytest.mark.parametrize("prior", [bmr.Spike(), bmr.Gaussian(0.0, 0.1)])
def test_exact_posteriors_pass(family, prior):
    guide = getattr(TwoSites(), family)()
    result = bmr.reduce(guide, reduced_prior=prior)
    audit = result.audit(num_samples=10)
    assert audit.passed and [check.name for check in audit.sites] == ["a", "b"]
    assert min(abs(check.predicted) for check in rows(audit).values()) > 0.3
    for check in rows(audit).values():
        assert abs(check.excess) < 1e-6 and check.error < 1e-6


def test_a_second_reduction_passes():
    first = bmr.reduce(TwoSites().dense(), select=bmr.top_k(4))
    second = bmr.reduce(first.guide)
    assert first.sparsity < second.sparsity
    audit = second.audit(num_samples=10)
    assert audit.passed and abs(audit.total.excess) < 1e-6 and audit.total.error < 1e-6


def test_wrong_signs_are_found():
    result = bmr.reduce(TwoSites().dense())
    predicted = {name: -delta_f for name, delta_f in result.decision.predicted.items()}
    decision = replace(result.decision, predicted=predicted)
    audit = replace(result, decision=decision).audit(num_samples=10)
    assert {check.verdict for check in rows(audit).values()} == {"wrong sign"}
    assert not audit.passed and "wrong sign" in str(audit) and "wrong sign" in audit._repr_html_()


def test_narrow_guides_are_found():
    guide = TwoSites().dense()
    guide.scale = guide.scale.detach() / 3
    audit = bmr.reduce(guide, select=bmr.top_k(2)).audit(num_samples=50)
    assert not audit.passed
    # The posterior is exact but for its width, so that all is in the Savage-Dickey ratio.
    assert all(abs(check.excess) > 10 * check.error for check in rows(audit).values())


@pytest.mark.parametrize("what", ["both", "model"])
def test_masks_that_were_not_applied_are_found(what):
    result = bmr.reduce(TwoSites().dense())
    model, guide, _ = result.decision.restrict(["a"]).assemble()
    spoilt = {"both": {"model": model, "guide": guide}, "model": {"model": model}}
    audit = replace(result, **spoilt[what]).audit(num_samples=10)
    assert not audit.passed and audit.notes[0].startswith("b: the masks of the model or")
    assert "b: the masks" in str(audit) and "b: the masks" in audit._repr_html_()
    a, b = audit.sites
    assert a.verdict == "within error" and abs(b.excess) > 0.3
    if what == "both":
        assert b.realised == pytest.approx(0, abs=1e-6) and b.verdict.startswith("optimistic by")


def test_a_mask_that_the_guide_does_not_know():
    result = bmr.reduce(TwoSites().dense())
    _, guide, _ = result.decision.restrict(["a"]).assemble()
    with pytest.raises(ValueError, match="b: the guide draws . elements that the model holds at"):
        replace(result, guide=guide).audit()


def test_training_since():
    problem = TwoSites()
    guide = problem.dense()
    result = bmr.reduce(guide)
    with torch.no_grad():
        result.guide.factors.get_submodule("/a+/b").loc_unconstrained.add_(0.1)
    audit = result.audit(num_samples=10)
    found = rows(audit)
    assert audit.passed and found["total"].error < 1e-6
    assert found["after training"].realised > found["total"].realised + 1
    with torch.no_grad():
        guide.loc.add_(0.1)
    with pytest.raises(ValueError, match="trained on since"):
        result.audit()


@pytest.fixture(scope="module")
def trained():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    x = torch.randn(60, 4)
    y = x[:, 0] - 2 * x[:, 1].relu() + 0.1 * torch.randn(60)
    model = Regression(4, hidden=6)
    guide = AutoNormal(model, init_scale=0.1)
    fit(model, guide, x, y, num_epochs=100, lr=0.05, compile=False)
    return model, guide, (x, y), pyro.get_param_store().get_state()


def test_a_network_by_units_and_elements(trained):
    """Against free energies that are measured without common random numbers."""
    model, guide, data, _ = trained
    result = bmr.reduce(guide, groups=[bmr.units, bmr.elements])
    audit = result.audit(*data, num_samples=40)
    # What produces a unit comes after what reads it.
    assert [check.name for check in audit.sites][:1] == ["fc2.weight"]
    parts = [sum(getattr(c, what) for c in audit.sites) for what in ("predicted", "realised")]
    total = audit.total
    assert parts == pytest.approx([total.predicted, total.realised])
    assert total.predicted == pytest.approx(result.delta_f)
    before = bmr.free_energy(model, guide, *data, num_samples=200)
    after = bmr.free_energy(result.model, result.guide, *data, num_samples=200)
    error = (before[1] ** 2 + after[1] ** 2) ** 0.5
    assert abs(total.realised - (after[0] - before[0])) < 4 * (error**2 + total.error**2) ** 0.5
    # 40 draws in common tell more than 100 of its own for each.
    assert total.error < error * 2**0.5
    frame = audit.summary()
    assert list(frame.index)[-1] == "total" and frame.loc["total", "verdict"] == audit.verdict


def test_what_nothing_reads_any_more_is_exact(trained):
    _, guide, data, _ = trained
    audit = bmr.reduce(guide, groups=bmr.units, select=bmr.top_k(3)).audit(*data, num_samples=3)
    assert [check.name for check in audit.sites] == ["fc2.weight", "fc1.weight", "fc1.bias"]
    for check in audit.sites[1:]:
        assert check.predicted < -0.01 and abs(check.excess) < 1e-3 and check.error < 1e-3


def test_a_refit_leaves_all_as_it_was(trained):
    _, guide, data, store = trained
    pyro.get_param_store().set_state(store)
    result = bmr.reduce(guide)
    state = copy.deepcopy([p.state_dict() for p in (guide, result.model, result.guide)])
    before = {name: value.clone() for name, value in store["params"].items()}
    random = torch.get_rng_state()
    seen = []

    def refit(model, guide):
        seen.append((model, guide))
        fit(model, guide, *data, num_epochs=40, lr=0.02, compile=False)

    audit = result.audit(*data, num_samples=20, refit=refit)
    later = rows(audit)["after refit"]
    assert later.realised < audit.total.realised - 5 * later.error
    assert audit.summary()["verdict"].eq("").tolist() == [False] * (len(audit.sites) + 1) + [True]
    (printed,) = (line for line in str(audit).splitlines() if "after refit" in line)
    assert "istic" not in printed and f"{audit.total.predicted:+.2f}" not in printed
    assert seen[0][0] is not result.model and seen[0][1] is not result.guide
    torch.testing.assert_close(
        [p.state_dict() for p in (guide, result.model, result.guide)], state, rtol=0, atol=0
    )
    assert torch.equal(torch.get_rng_state(), random)
    now = dict(pyro.get_param_store().named_parameters())
    assert now.keys() == before.keys()
    assert all(torch.equal(value, now[name]) for name, value in before.items())
    assert result.audit(*data, num_samples=20).total == audit.total


def test_models_that_keep_parameters_elsewhere(trained):
    """A refit moves what a model function refers to; afterwards it is back."""
    data = trained[2]
    net = nn.Linear(4, 1)

    def model(x, y):
        offset = pyro.param("offset", torch.zeros(()))
        pyro.module("net", net)
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x), subsample_size=30) as index:
            mean = net(x[index])[:, 0] + offset + x[index] @ w
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y[index])

    guide = AutoNormal(model)
    fit(model, guide, *data, num_epochs=100, lr=0.05, compile=False)
    before = net.weight.detach().clone(), pyro.param("offset").item()
    result = bmr.reduce(guide)

    def refit(model, guide):
        fit(model, guide, *data, num_epochs=5, lr=0.05, compile=False)
        assert pyro.param("offset").item() != before[1]

    audit = result.audit(*data, num_samples=50, refit=refit)
    assert torch.equal(net.weight, before[0]) and pyro.param("offset").item() == before[1]
    # The same rows on both sides.
    assert audit.total.error < 1


def test_calls_that_cannot_be_audited(trained, tmp_path):
    model, guide, data, _ = trained
    result = bmr.reduce(guide)
    with pytest.raises(TypeError, match="got 0 arguments .* Expected all of its data"):
        result.audit()
    for few in (1, 2.5):
        with pytest.raises(ValueError, match=f"num_samples={few}"):
            result.audit(*data, num_samples=few)
    with pytest.raises(ValueError, match="NaN or infinite in 3 of 3 draws"):
        result.audit(data[0], data[1] * torch.nan, num_samples=3)
    result.save(tmp_path / "result.bmr")
    with pytest.raises(ValueError, match="reduce the trained guide again"):
        bmr.load(tmp_path / "result.bmr", model).audit(*data)


def test_few_draws_make_wide_bounds():
    values = {"w": torch.tensor([0.0, 3.0])}

    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("y", dist.StudentT(2.0, w.sum(), 1.0), obs=torch.tensor(3.0))

    guide = AutoMultivariateNormal(model, init_loc_fn=init_to_value(values=values), init_scale=0.5)
    guide()
    result = bmr.reduce(guide)
    few, many = (result.audit(num_samples=n).total for n in (3, 300))
    assert few.bound > 9 * few.error and many.bound == pytest.approx(
        3 * many.error + 0.05, rel=0.02
    )
    assert abs(few.realised - many.realised) < few.bound + many.bound


@pytest.mark.parametrize(
    ("realised", "conclusion"),
    [(-127.0, "F fell: the reduced"), (5.0, "F rose: the full"), (0.2, "F changed by no more")],
)
def test_what_became_of_the_free_energy_is_said(realised, conclusion):
    audit = Audit((), Check("total", -159.0, realised, 0.1, 0.3))
    assert audit.conclusion.startswith(conclusion) and not audit.passed
    assert conclusion in str(audit) and conclusion in audit._repr_html_()
