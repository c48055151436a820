"""Every message says what came in, what was expected, and what to do."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, config_enumerate
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

import pyro_bmr as bmr


def model(n=3):
    pyro.sample("w", dist.Normal(0.0, 1.0).expand([n]).to_event(1))
    pyro.sample("tau", dist.Gamma(1.0, 1.0))


@pytest.fixture
def guide():
    guide = AutoNormal(model)
    guide()
    return guide


@pytest.mark.parametrize(
    "family", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoGuideList]
)
def test_a_guide_that_was_never_called(family):
    with pytest.raises(ValueError, match=f"this {family.__name__} has never been called.*train it"):
        bmr.reduce(family(model))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("family", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal])
def test_a_guide_that_is_not_finite(family, bad):
    guide = family(model)
    guide()
    loc = guide.locs.w_unconstrained if family is AutoNormal else guide.loc
    loc.data[:2] = bad
    before = {n: v.clone() for n, v in guide.state_dict().items()}
    with pytest.raises(ValueError, match="location of the site 'w' is NaN or infinite in 2 of 3"):
        bmr.reduce(guide)
    for name, value in guide.state_dict().items():
        torch.testing.assert_close(value, before[name], equal_nan=True)


def test_a_scale_that_is_not_finite_or_vanishes(guide):
    guide.scales.w_unconstrained.data[1] = math.nan
    with pytest.raises(ValueError, match="scale of the site 'w' is NaN or infinite in 1 of 3"):
        bmr.reduce(guide)
    guide.scales.w_unconstrained.data[1] = -200.0
    with pytest.raises(ValueError, match="scale of the site 'w' is zero or negative in 1 of 3"):
        bmr.reduce(guide)


def test_a_bad_value_at_a_site_that_is_not_reduced(guide):
    guide.locs.tau_unconstrained.data.fill_(math.nan)
    with pytest.raises(ValueError, match="the site 'tau' is NaN"):
        bmr.reduce(guide)


@pytest.mark.parametrize("family", [AutoDelta, AutoIAFNormal])
def test_a_guide_family_that_is_not_known(family):
    guide = family(model)
    with pytest.raises(TypeError, match=f"guide of type {family.__name__}.*rain AutoNormal"):
        bmr.reduce(guide)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ([], "empty sites="),
        (["v"], r"names \['v'\]. Expected some of \['tau', 'w'\]"),
        (["w", "tau"], "cannot be reduced: 'tau': it is positive"),
    ],
)
def test_sites(guide, sites, message):
    with pytest.raises(ValueError, match=message):
        bmr.reduce(guide, sites=sites)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"w": torch.ones(2, dtype=torch.bool)}, r"shape \(2,\).*'w'.*shape \(3,\)"),
        ({"w": torch.ones(3)}, "dtype torch.float32.*torch.bool"),
        ({"v": torch.ones(3, dtype=torch.bool)}, r"masks for \['v'\].*\['w'\]"),
        ({"tau": torch.tensor(True)}, r"masks for \['tau'\]"),
    ],
)
def test_masks_that_do_not_fit(guide, masks, message):
    with pytest.raises(ValueError, match=message):
        bmr.reduce(guide, select=lambda scores: masks)


def test_a_pruned_model_with_a_mask_of_the_wrong_shape():
    pruned = bmr.extend.PrunedModel(model, {"w": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"mask of shape \(2,\) does not fit.*\(3,\)"):
        pruned()


def test_elements_that_are_not_independent_cannot_be_pruned():
    def shares():
        pyro.sample("w", dist.Dirichlet(torch.ones(2)))

    pruned = bmr.extend.PrunedModel(shares, {"w": torch.tensor([True, False])})
    with pytest.raises(ValueError, match="elements of a Dirichlet"):
        pruned()


def test_a_model_whose_site_disappeared(guide):
    def other():
        pyro.sample("v", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"the site 'w', which is now not in the model.*\['v'\]"):
        bmr.reduce(guide, model=other)

    def observed():
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=torch.zeros(3))

    with pytest.raises(ValueError, match="the site 'w', which is now observed"):
        bmr.reduce(guide, model=observed)


def test_a_model_whose_site_has_another_shape(guide):
    with pytest.raises(ValueError, match=r"shape \(3,\) in the guide and \(5,\) in the model"):
        bmr.reduce(guide, 5)


def test_a_model_that_does_not_run(guide):
    with pytest.raises(TypeError, match="(?s)3 were given.*could not be run.*pass the arguments"):
        bmr.reduce(guide, 1, 2, 3)


def test_reduced_priors_that_do_not_exist(guide):
    with pytest.raises(TypeError, match=r"Expected pyro_bmr.Spike\(\)"):
        bmr.reduce(guide, reduced_prior=0.1)


@pytest.mark.parametrize(
    ("select", "error", "message"),
    [
        (0.5, TypeError, "got select=0.5. Expected a selection"),
        (lambda scores: bmr.by_evidence(), TypeError, r"returned a ByEvidence.*by_evidence\(\)"),
        (bmr.top_k, ValueError, r"select=top_k\(100\)"),
        (bmr.baselines.snr, ValueError, r"select=snr\(0.5\)"),
        (lambda scores: None, TypeError, "returned a NoneType"),
        (lambda scores: scores.delta_f["w"] > 0, TypeError, "returned a Tensor"),
    ],
)
def test_selections_that_are_none(guide, select, error, message):
    with pytest.raises(error, match=message):
        bmr.reduce(guide, select=select)


@pytest.mark.filterwarnings("ignore:no site")
def test_halves_of_different_pairs(guide):
    result = bmr.reduce(guide)
    with pytest.raises(ValueError, match="use result.model with result.guide"):
        Trace_ELBO().loss(result.model, guide)
    pyro.clear_param_store()
    fresh = AutoNormal(result.model)
    fresh()
    with pytest.raises(ValueError, match="use result.model with result.guide"):
        Trace_ELBO().loss(result.model, fresh)
    assert r"reduce(result.guide)" in bmr.reduce(fresh).summary().loc["w", "note"]


@pytest.mark.parametrize(
    "selection",
    [bmr.baselines.snr, bmr.baselines.spr, bmr.baselines.magnitude, bmr.baselines.random],
)
@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_fractions(selection, fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        selection(fraction)


def test_a_negative_number_of_elements():
    with pytest.raises(ValueError, match="how many elements to keep"):
        bmr.top_k(-1)


@pytest.mark.parametrize("family", [AutoDiagonalNormal, AutoMultivariateNormal])
def test_a_guide_that_holds_only_one_batch_of_a_site(family):
    def local():
        with pyro.plate("rows", 40, subsample_size=8):
            pyro.sample("w", dist.Normal(0.0, 1.0))

    guide = family(local)
    guide()
    with pytest.raises(ValueError, match="8 rows of the site 'w', whose plate 'rows' has 40"):
        bmr.reduce(guide)


@pytest.mark.parametrize(
    "select", [bmr.baselines.snr, bmr.baselines.random, bmr.top_k, bmr.by_evidence]
)
def test_a_selection_that_was_not_called(guide, select):
    with pytest.raises((ValueError, TypeError), match="first|the scores themselves"):
        bmr.reduce(guide, select=select)


@pytest.mark.parametrize("selection", [bmr.by_evidence, bmr.exhaustive])
@pytest.mark.parametrize("margin", ["a", None, math.nan])
def test_margins(selection, margin):
    with pytest.raises(ValueError, match="Expected a number of nats"):
        selection(margin)


@pytest.mark.parametrize("size", [0, 17, 2.0])
def test_blocks_are_small(size):
    with pytest.raises(ValueError, match="between 1 and 16"):
        bmr.by_blocks(size)


def test_what_is_not_a_guide_but_has_one(guide):
    with pytest.raises(TypeError, match=r"got a Reduction. Pass its guide"):
        bmr.reduce(bmr.reduce(guide))
    x = torch.ones(2)
    with pytest.raises(TypeError, match=r"reduce\(result.guide, x, y\)$"):
        bmr.reduce(bmr.reduce(guide), x)
    with pytest.raises(TypeError, match=r"presence\(result.guide, x, y, kwargs=\{...\}\)$"):
        bmr.presence(bmr.reduce(guide), x, kwargs={"y": x})
    with pytest.raises(TypeError, match="the AveragedGuide is a mixture"):
        bmr.reduce(bmr.average(guide).guide)


def test_a_guide_function_without_its_model():
    def written(n=3):
        pyro.sample("w", dist.Normal(torch.zeros(n), 1.0).to_event(1))

    verbs = [bmr.reduce, bmr.presence, bmr.average, bmr.tune_prior, bmr.measure_sparsities]
    for verb in verbs:
        call = rf"written does not know its model.* {verb.__name__}\(guide, x, y, model=model\)"
        with pytest.raises(ValueError, match=call):
            verb(written)


MODELS = {
    "the model": lambda model: model,
    "bound": partial,
    "blocked": lambda model: poutine.block(model, hide=["y"]),
    "enumerated": config_enumerate,
    "reduced": lambda model: bmr.extend.PrunedModel(model, {"w": torch.ones(3) > 0}),
    "blocked and reduced": lambda model: poutine.block(
        bmr.extend.PrunedModel(model, {"w": torch.ones(3) > 0}), hide=["y"]
    ),
}
OF_BOTH = {
    "fit": lambda model, guide: bmr.fit(model, guide, 3, num_epochs=1, progress=False),
    "prune": lambda model, guide: bmr.prune(model, guide, 3, num_epochs=1, progress=False),
    "free_energy": lambda model, guide: bmr.free_energy(model, guide, 3),
    "to_arviz": lambda model, guide: bmr.to_arviz(model, guide, 3),
    "compare": lambda model, guide: bmr.compare((model, guide), 3),
    "reduce": lambda model, guide: bmr.reduce(guide, 3, model=model),
    "presence": lambda model, guide: bmr.presence(guide, 3, model=model),
}


@pytest.mark.parametrize("wrap", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("verb", OF_BOTH.values(), ids=OF_BOTH)
def test_a_model_in_the_place_of_the_guide(verb, wrap):
    with pytest.raises(TypeError, match="the model in the place of the guide.*Expected a guide"):
        verb(model, wrap(model))


@pytest.mark.parametrize("verb", OF_BOTH.values(), ids=OF_BOTH)
def test_a_guide_in_the_place_of_the_model(verb, guide):
    with pytest.raises(TypeError, match="got an AutoNormal in the place of the model. Expected"):
        verb(guide, model)
    reduced = bmr.reduce(guide)
    with pytest.raises(TypeError, match="the model in the place of the guide"):
        verb(reduced.guide, reduced.model)


def test_what_observes_data_is_no_guide():
    def observing(y=None):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    y = torch.tensor(1.0)
    with pytest.raises(TypeError, match="Expected a guide that was trained"):
        bmr.reduce(lambda y: observing(y), y, model=observing)
    with pytest.raises(TypeError, match="Expected a guide that was trained"):
        bmr.reduce(partial(observing, y), model=observing)

    def weighted(y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.deterministic("double", 2 * w)
        pyro.factor("penalty", torch.tensor(0.0), has_rsample=True)

    assert bmr.reduce(weighted, y, model=observing).masks["w"].shape == ()


def test_programs_that_share_code_are_not_the_same(guide):
    """One function is model and guide, by what is bound to it."""

    def program(role):
        scale = 1.0 if role == "model" else pyro.param("scale", torch.tensor(0.1))
        pyro.sample("v", dist.Normal(torch.zeros(2), scale).to_event(1))

    as_model, as_guide = (partial(program, role) for role in ("model", "guide"))
    as_guide()
    assert bmr.free_energy(as_model, as_guide)[0] > 0
    assert bmr.reduce(as_guide, model=as_model).masks["v"].tolist() == [False, False]
