"""The loop: change priors, reduce, compact, train what remains; priors are cut with their sites."""

import copy

import networks
import pyro
import pyro.distributions as dist
import pytest
import torch
from often import often
from pyro import poutine
from pyro.infer.autoguide import AutoNormal, init_to_sample
from torch import nn

import pyro_bmr as bmr

FIRST, SECOND, LAST = "net.1", "net.3", "net.5"


def start():
    pyro.clear_param_store()
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 2)
    )
    model = networks.Regression(bmr.bayesianize(net, prior=bmr.nn.fan_in_normal(2.0)))
    args = torch.randn(9, 1, 3, 4), torch.randn(9, 2)
    return model, train(model, trained(model, args), args), args


def trained(model, args):
    guide = AutoNormal(model, init_loc_fn=init_to_sample, init_scale=0.1)
    guide(*args)
    return guide


def train(model, guide, args):
    bmr.fit(
        model, guide, *args, num_epochs=3, batch_size=5, lr=1e-2, estimator="local", progress=False
    )
    return guide


def drop_units(scores):
    """The last unit of each hidden layer, by all that makes and reads it, and some elements."""
    masks = {n: torch.ones(t.shape, dtype=torch.bool) for n, t in scores.delta_f.items()}
    for layer, reader in ((FIRST, SECOND), (SECOND, LAST)):
        masks[f"{layer}.weight"][-1] = False
        masks[f"{layer}.bias"][-1] = False
        masks[f"{reader}.weight"][:, -1] = False
        masks[f"{layer}.weight"][0, ::2] = False
    masks[f"{FIRST}.weight"][:, 3:5] = False
    return masks


def shrink(prior):
    def change(guide):
        # Some elements keep their prior.
        return bmr.reduce(
            guide,
            reduced_prior=prior,
            select=lambda scores: {n: torch.rand(t.shape) < 0.3 for n, t in scores.kept.items()},
        ).guide

    return change


def tune(shared):
    return lambda guide: bmr.tune_prior(guide, shared=shared).guide


CHANGES = {
    "site": tune("site"),
    "layer": tune("layer"),
    "elements": tune(bmr.elements),
    "labels": tune(
        lambda name, shape: torch.arange(shape[0]).reshape([-1] + [1] * (len(shape) - 1))
    ),
    "Gaussian": shrink(bmr.Gaussian(0.0, 0.2)),
    "Laplace": shrink(bmr.Laplace(0.2)),
}


def take(values, kept):
    for dim, index in enumerate(kept):
        values = values if index is None else values.index_select(dim, index)
    return values


def prior_of(model, values, args):
    """By site, the log density of each element under its prior, and the scale if it has one."""
    nodes = poutine.trace(poutine.condition(model, values)).get_trace(*args).nodes
    for name in values:
        core = nodes[name]["fn"]
        while isinstance(core, dist.Independent | dist.MaskedDistribution):
            core = core.base_dist
        yield name, core.log_prob(nodes[name]["value"]), getattr(core, "scale", None)


def loss_at(model, guide, values, args):
    """Minus the evidence lower bound, of the values of the sites."""
    replayed = poutine.trace(poutine.condition(guide, values)).get_trace(*args)
    of_model = poutine.trace(poutine.condition(model, values)).get_trace(*args)
    return float(replayed.log_prob_sum() - of_model.log_prob_sum())


def draw(guide, args):
    nodes = poutine.trace(guide).get_trace(*args).nodes
    auxiliary = {n: x["value"] for n, x in nodes.items() if n.endswith("_unconstrained")}
    return auxiliary, {n: nodes[n]["value"] for n in guide.median()}


def assert_same(result, compaction, args):
    """Same density at draws of the posterior, same priors of what is kept, same output."""
    with torch.no_grad():
        for seed in range(2):
            torch.manual_seed(seed)
            _, values = draw(result.guide, args)
            smaller = {n: take(v, compaction.kept.get(n, ())) for n, v in values.items()}
            means = [
                poutine.trace(poutine.condition(model, at)).get_trace(*args).nodes["y"]["fn"].mean
                for model, at in ((result.model, values), (compaction.model, smaller))
            ]
            torch.testing.assert_close(*means, rtol=1e-4, atol=1e-5)
            priors = {n: rest for n, *rest in prior_of(compaction.model, smaller, args)}
            for name, density, scale in prior_of(result.model, values, args):
                kept = compaction.kept.get(name, ())
                torch.testing.assert_close(priors[name][0], take(density, kept))
                if scale is not None:
                    assert torch.equal(priors[name][1], take(scale, kept))


def assert_same_free_energy(result, compaction, args):
    """At draws: what was cut is all pruned, which adds nothing to either."""
    with torch.no_grad():
        for seed in range(3):
            torch.manual_seed(seed)
            auxiliary, values = draw(result.guide, args)
            at = auxiliary or values
            kept = {n: compaction.kept.get(n.removesuffix("_unconstrained"), ()) for n in at}
            full = loss_at(result.model, result.guide, at | values, args)
            smaller = {n: take(v, kept[n]) for n, v in at.items()}
            smaller |= {n: take(v, compaction.kept.get(n, ())) for n, v in values.items()}
            small = loss_at(compaction.model, compaction.guide, smaller, args)
            assert small == pytest.approx(full, rel=1e-5, abs=1e-3)


@pytest.mark.parametrize("change", often(CHANGES, "Gaussian", "Laplace"))
def test_priors_change_units_go_and_what_is_left_is_trained_again_and_again(change):
    _, guide, args = start()
    for units in (6, 5, 4):
        result = bmr.reduce(CHANGES[change](guide), select=drop_units)
        compaction = result.compact()
        # Pixels stay, though nothing reads two of them.
        assert compaction.guide.median()[f"{FIRST}.weight"].shape == (units, 12)
        assert compaction.guide.median()[f"{SECOND}.weight"].shape == (units - 1, units)
        assert_same(result, compaction, args)
        assert_same_free_energy(result, compaction, args)
        guide = train(compaction.model, compaction.guide, args)


@pytest.mark.rare
def test_measured_free_energies_agree():
    _, guide, args = start()
    result = bmr.reduce(bmr.tune_prior(guide, shared="layer").guide, select=drop_units)
    compaction = result.compact()
    (full, error), (small, other) = (
        bmr.free_energy(pair.model, pair.guide, *args, num_samples=400)
        for pair in (result, compaction)
    )
    assert abs(full - small) < 5 * (error**2 + other**2) ** 0.5


@pytest.mark.rare
def test_groups_coarse_to_fine():
    _, guide, args = start()
    for _ in range(2):
        tuned = bmr.tune_prior(guide, shared="layer")
        result = bmr.reduce(
            tuned.guide, *args, groups=[bmr.units, bmr.elements], select=bmr.by_evidence(-0.2)
        )
        compaction = result.compact()
        assert_same(result, compaction, args)
        guide = train(compaction.model, compaction.guide, args)


@pytest.mark.parametrize("change", often(["elements", "Laplace"], "Laplace"))
def test_copies_and_files(change, tmp_path):
    model, guide, args = start()
    compaction = bmr.reduce(CHANGES[change](guide), select=drop_units).compact()
    again = bmr.reduce(CHANGES[change](compaction.guide), select=drop_units).compact()
    for number, one in enumerate((compaction, again)):
        one.save(tmp_path / str(number))
        for other in (copy.deepcopy(one), bmr.load(tmp_path / str(number), model)):
            with torch.no_grad():
                _, values = draw(one.guide, args)
                for before, after in zip(
                    prior_of(one.model, values, args),
                    prior_of(other.model, values, args),
                    strict=True,
                ):
                    torch.testing.assert_close(before[1], after[1])
            third = bmr.reduce(other.guide, *args, select=drop_units)
            assert_same(third, third.compact(*args), args)


def test_a_switched_prior_whose_parents_are_cut():
    network = networks.hierarchical()
    pyro.clear_param_store()
    torch.manual_seed(0)
    guide = trained(network.model, network.args)
    switched = torch.rand(5, 7) < 0.5
    shrunk = bmr.reduce(
        guide,
        reduced_prior=bmr.Gaussian(0.0, torch.rand(5, 7) + 0.1),
        sites=["w1"],
        select=lambda scores: {"w1": switched | scores.delta_f["w1"].isinf()},
    )

    def unit_gone(scores):
        masks = {n: torch.ones(t.shape, dtype=torch.bool) for n, t in scores.delta_f.items()}
        masks["w1"][:, ::3] = False
        masks["w2"][::3] = False
        return masks

    result = bmr.reduce(shrunk.guide, select=unit_gone)
    compaction = result.compact()
    assert compaction.guide.median()["w1"].shape == (5, 4)
    assert_same(result, compaction, network.args)


def test_a_guide_made_for_the_model_of_a_reduction():
    _, guide, args = start()
    tuned = bmr.tune_prior(guide, shared="layer")
    first = bmr.reduce(tuned.guide, sites=[f"{LAST}.weight"], select=lambda scores: scores.kept)

    def drop_unit(scores):
        masks = {n: torch.ones(t.shape, dtype=torch.bool) for n, t in scores.delta_f.items()}
        masks[f"{SECOND}.weight"][-1] = False
        masks[f"{SECOND}.bias"][-1] = False
        return masks

    second = bmr.reduce(trained(first.model, args), select=drop_unit)
    compaction = second.compact()
    assert compaction.guide.median()[f"{LAST}.weight"].shape == (2, 5)
    assert_same(second, compaction, args)
    train(compaction.model, compaction.guide, args)
