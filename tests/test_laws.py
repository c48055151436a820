"""The seven laws of a Reduction, for every model and guide family, on every device."""

import copy
import random
import warnings
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.poutine.util import prune_subsample_sites

import pyro_bmr as bmr
from pyro_bmr.guides.reading import read_guide
from pyro_bmr.testing import check_guide_family


def drop_some(scores):
    """Drop every second element, from the second on, and all of a site that has only one."""
    return {
        name: (torch.arange(t.numel(), device=t.device) % 2 == (t.numel() == 1)).reshape(t.shape)
        for name, t in scores.delta_f.items()
    }


# Families of which a function is run as it is.
RUN = ["hand-written, other families", "amortised and tempered"]


@pytest.fixture
def result(case):
    return case.reduce(select=drop_some)


def latent_values(trace):
    return {
        name: node["value"]
        for name, node in prune_subsample_sites(trace).iter_stochastic_nodes()
        if not node["infer"].get("is_auxiliary") and not node["infer"].get("_deterministic")
    }


def assert_pruned_are_zero(values, masks):
    assert sum((~mask).sum() for mask in masks.values()) >= 2
    for name, mask in masks.items():
        assert (values[name].masked_select(~mask) == 0).all()
        assert (values[name].masked_select(mask) != 0).all()


def test_law_1_names_and_shapes_stay_and_pruned_elements_are_zero_in_every_draw(case, result):
    x, _ = case.args
    full = latent_values(case.trace())
    reduced = latent_values(poutine.trace(result.guide).get_trace(*case.args))
    assert {n: v.shape for n, v in full.items()} == {n: v.shape for n, v in reduced.items()}
    assert_pruned_are_zero(reduced, result.masks)

    prior = latent_values(poutine.trace(result.model).get_trace(x))
    assert_pruned_are_zero(prior, result.masks)

    draws = Predictive(result.model, guide=result.guide, num_samples=5)(x)
    assert draws["y"].shape == (5, len(x))
    posterior = Predictive(result.guide, num_samples=5)(*case.args)
    assert_pruned_are_zero(posterior, result.masks)
    assert_pruned_are_zero(result.guide.median(), result.masks)
    assert_pruned_are_zero(result.guide.quantiles([0.1, 0.9]), result.masks)


def test_law_1_holds_for_values_that_come_from_elsewhere(case, result):
    """A trace of the full guide, replayed under the reduced model, gives reduced predictions."""
    full = case.trace()
    values = {
        name: torch.where(result.masks[name], value, 0) if name in result.masks else value
        for name, value in latent_values(full).items()
    }
    x, _ = case.args
    expected = poutine.trace(poutine.condition(case.model, values)).get_trace(x)
    conditioned = poutine.condition(result.model, latent_values(full))
    for program in (conditioned, poutine.replay(result.model, full)):
        found = poutine.trace(program).get_trace(x)
        torch.testing.assert_close(found.nodes["y"]["fn"].mean, expected.nodes["y"]["fn"].mean)


def test_law_2_the_loss_is_the_free_energy_of_the_reduced_problem(case, result):
    guide_trace = poutine.trace(result.guide).get_trace(*case.args)
    model_trace = poutine.trace(poutine.replay(result.model, guide_trace)).get_trace(*case.args)
    full_trace = poutine.trace(poutine.replay(case.model, model_trace)).get_trace(*case.args)
    for trace in (guide_trace, model_trace, full_trace):
        trace.compute_log_prob()
    for name, mask in result.masks.items():
        value, node = guide_trace.nodes[name]["value"], full_trace.nodes[name]
        fn = node["fn"].base_dist if node["fn"].event_dim else node["fn"]
        kept = fn.log_prob(value)[mask].sum()
        torch.testing.assert_close(model_trace.nodes[name]["log_prob_sum"], kept)
    torch.testing.assert_close(
        model_trace.nodes["y"]["log_prob_sum"], full_trace.nodes["y"]["log_prob_sum"]
    )

    of_kept = []
    for factor in read_guide(result.guide):
        if isinstance(factor, bmr.extend.IndependentFactor):
            name, kept = factor.site.name, factor.kept()[factor.site.name]
            value = guide_trace.nodes[f"{name}_unconstrained"]["value"][kept]
            marginal = factor.marginals()[name]
            fn = dist.Normal(marginal.loc[kept], marginal.scale[kept])
            of_kept.append(fn.log_prob(value).sum())
    auxiliary = sum(
        node["log_prob_sum"]
        for name, node in guide_trace.nodes.items()
        if name.endswith("_unconstrained")
    )
    torch.testing.assert_close(torch.as_tensor(auxiliary), torch.as_tensor(sum(of_kept)))

    pyro.set_rng_seed(5)
    loss = case.elbo().loss(result.model, result.guide, *case.args)
    pyro.set_rng_seed(5)
    guide_trace = poutine.trace(result.guide).get_trace(*case.args)
    replayed = poutine.replay(result.model, guide_trace)
    expected = guide_trace.log_prob_sum() - summed_log_joint(replayed, case)
    assert loss == pytest.approx(expected.item(), rel=1e-4)


def summed_log_joint(program, case):
    """ln p of all that is sampled, where that of each row is summed over what is discrete of it."""
    by_value = []
    for values in case.summed:
        trace = poutine.trace(poutine.condition(program, values)).get_trace(*case.args)
        trace.compute_log_prob()
        of_rows = sum(trace.nodes[name]["log_prob"] for name in ("y", *values))
        rest = trace.log_prob_sum() - of_rows.sum()
        by_value.append(of_rows)
    return rest + torch.stack(by_value).logsumexp(0).sum()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_law_3_no_gradient_step_brings_a_pruned_element_back(case, result, weight_decay):
    before = {n: v.clone() for n, v in result.guide.median().items()}
    case.train(result.model, result.guide, 15, weight_decay=weight_decay)
    after = result.guide.median()
    draw = latent_values(poutine.trace(result.guide).get_trace(*case.args))
    for name, mask in result.masks.items():
        assert (after[name][~mask] == 0).all()
        assert (draw[name][~mask] == 0).all()
        assert (after[name][mask] != before[name][mask]).all()


def test_law_4_reductions_compose(case):
    def drop_first(scores):
        return {
            name: torch.arange(t.numel(), device=t.device).reshape(t.shape) != 0
            for name, t in scores.delta_f.items()
        }

    def drop_both(scores):
        some, first = drop_some(scores), drop_first(scores)
        return {name: some[name] & first[name] for name in some}

    one = case.reduce(select=drop_first)
    two = bmr.reduce(one.guide, select=drop_some, groups=case.groups)
    both = case.reduce(select=drop_both)
    assert two.sparsity == both.sparsity
    assert one.delta_f + two.delta_f == pytest.approx(both.delta_f, rel=1e-4)
    for name, mask in both.masks.items():
        assert torch.equal(two.masks[name], mask)
    for composed, direct in zip(read_guide(two.guide), read_guide(both.guide), strict=True):
        marginals = direct.marginals()
        for name, marginal in composed.marginals().items():
            torch.testing.assert_close(marginal.loc, marginals[name].loc)
            torch.testing.assert_close(marginal.scale, marginals[name].scale)
    unchanged = bmr.reduce(two.guide, select=lambda scores: dict(scores.kept))
    assert unchanged.delta_f == 0
    assert unchanged.sparsity == two.sparsity


def test_law_5_the_guide_that_came_in_is_left_as_it_was(case, guide_name):
    before = case.state()
    module = isinstance(case.model, torch.nn.Module)
    model_before = {n: v.clone() for n, v in case.model.state_dict().items()} if module else {}
    random_before = torch.get_rng_state()
    python_before, numpy_before = random.getstate(), np.random.get_state()[1].copy()

    result = case.reduce()
    print(result, result.summary(), result.delta_f)

    assert torch.equal(torch.get_rng_state(), random_before)
    assert random.getstate() == python_before
    assert (np.random.get_state()[1] == numpy_before).all()
    after = case.state()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for name, value in model_before.items():
        assert torch.equal(case.model.state_dict()[name], value)
    case.train(result.model, result.guide, 20)
    after = case.state()
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    # The parameters of functions that are run are shared, and are trained on.
    assert bool(changed) == (guide_name in RUN)
    assert not any(site in name for name in changed for site in result.masks)
    if guide_name not in ("MCMC", "AutoLaplaceApproximation"):
        case.train(case.model, case.guide, 1)
        after = case.state()
        assert any(not torch.equal(after[name], value) for name, value in before.items())


def test_law_6_copies_are_independent_and_states_can_be_saved(case, result, device, tmp_path):
    case.train(result.model, result.guide, 2)
    copied = copy.deepcopy(result)
    before = {n: v.clone() for n, v in result.guide.state_dict().items()}
    case.train(copied.model, copied.guide, 20)
    for name, value in result.guide.state_dict().items():
        assert torch.equal(value, before[name])
    again = bmr.reduce(copied.guide)
    assert again.scores.keys() == result.scores.keys()
    assert again.model.model is copied.guide.model

    masks_before = {n: mask.clone() for n, mask in result.masks.items()}
    everything = {
        n: torch.ones_like(v) if v.dtype == torch.bool else v
        for n, v in result.guide.state_dict().items()
    }
    unchanged = bmr.reduce(result.guide, select=lambda scores: dict(scores.kept))
    unchanged.guide.load_state_dict(everything)
    result.guide.load_state_dict(everything)
    assert all(torch.equal(mask, masks_before[n]) for n, mask in result.masks.items())

    torch.save(copied.guide.state_dict(), tmp_path / "guide.pt")
    torch.save(copied.model.state_dict(), tmp_path / "model.pt")
    result.guide.load_state_dict(torch.load(tmp_path / "guide.pt", weights_only=True))
    result.model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    for name, value in result.guide.median().items():
        torch.testing.assert_close(value, copied.guide.median()[name])

    moved = result.to(device)
    assert all(t.device.type == device for t in moved.guide.state_dict().values())
    assert all(t.device.type == device for t in moved.masks.values())
    assert torch.isfinite(torch.tensor(case.elbo().loss(moved.model, moved.guide, *case.args)))


def test_law_7_what_is_measured_does_not_rise(case):
    unchanged = case.reduce(select=lambda scores: dict(scores.kept))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="moment matching")
        result = bmr.reduce(case.guide, *case.args, **case.told, groups=case.groups)
    measure = partial(bmr.free_energy, estimator=case.elbo(), num_samples=60)
    before, its_error = measure(unchanged.model, unchanged.guide, *case.args)
    after, error = measure(result.model, result.guide, *case.args)
    assert after <= before + 4 * (error**2 + its_error**2) ** 0.5


def test_the_guide_family_obeys_its_law(case, result):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="moment matching")
        check_guide_family(case.guide, *case.given, **case.told, num_samples=150)
    check_guide_family(result.guide, num_samples=150)
