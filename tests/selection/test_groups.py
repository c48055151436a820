"""Groups: their joint evidence, the search among them, and what a reduction does with them."""

from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_regression import ExactRegression
from pyro import poutine
from pyro.infer.autoguide import (
    AutoGuideList,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch.distributions import MultivariateNormal, kl_divergence

import pyro_bmr as bmr
from pyro_bmr.demo import Regression
from pyro_bmr.estimators.measurement import free_energy_draws
from pyro_bmr.guides.reading import read_guide
from pyro_bmr.mathematics.gaussian import LowRank
from pyro_bmr.mathematics.group_evidence import Coupling, GroupEvidence, GroupWalk
from pyro_bmr.mathematics.group_search import search_groups
from pyro_bmr.mathematics.group_subsets import search_all_groups
from pyro_bmr.mathematics.membership import Membership
from pyro_bmr.selection.model_units import read_units

SIZES = (3, 4, 3, 2)


class Tied(ExactRegression):
    """Two sites, v of 4 weights and w of 3 × 2, whose columns are nearly collinear."""

    def __init__(self):
        x = torch.randn(30, 10).double()
        x[:, 5] = x[:, 0] + 0.05 * torch.randn(30).double()
        x[:, 7] = x[:, 2] - x[:, 6]
        y = x[:, 0] - 0.7 * x[:, 4] + 0.5 * torch.randn(30).double()
        super().__init__(x, y, 0.5, torch.zeros(10).double(), torch.full((10,), 1.3).double())

    def model(self):
        zero, one = torch.zeros((), dtype=torch.float64), self.scale[0]
        v = pyro.sample("v", dist.Normal(zero, one).expand([4]).to_event(1))
        w = pyro.sample("w", dist.Normal(zero, one).expand([3, 2]).to_event(2))
        with pyro.plate("data", 30):
            weights = torch.cat([v, w.flatten()])
            pyro.sample("y", dist.Normal(self.x @ weights, self.noise), obs=self.y)

    def log_evidence(self, keep):
        x = self.x[:, keep] * self.scale[keep]
        covariance = self.noise**2 * torch.eye(30) + x @ x.mT
        return MultivariateNormal(torch.zeros(30).double(), covariance).log_prob(self.y).item()

    # Group 0 is v[0] and the first row of w, 1 is v[1], 2 is v[2] and w[1, 0], 3 is the last row of
    # w; v[3] and w[1, 1] are in none.
    def labels(self, name, shape):
        if name == "v":
            return torch.tensor([0, 1, 2, -1])
        return torch.tensor([[0, 0], [2, -1], [3, 3]])

    def keep(self, groups_kept):
        labels = torch.cat([self.labels("v", None), self.labels("w", None).flatten()])
        return (labels < 0) | torch.tensor(groups_kept)[labels]


@pytest.mark.parametrize("family", ["dense", "low_rank"])
def test_tied_groups_of_an_exact_regression_have_the_evidence_of_models_without_them(family):
    problem = Tied()
    guide = getattr(problem, family)()
    full = problem.log_evidence(torch.ones(10, dtype=torch.bool))
    exact = {}
    for kept in product([True, False], repeat=4):

        def select(scores, kept=kept):
            for group in range(4):
                alone = [i != group for i in range(4)]
                expected = full - problem.log_evidence(problem.keep(alone))
                delta_f = torch.cat([scores.delta_f["v"], scores.delta_f["w"]])
                assert delta_f[group].item() == pytest.approx(expected, abs=1e-6)
            return {"v": torch.tensor(kept[:3]), "w": torch.tensor(kept[3:])}

        exact[kept] = full - problem.log_evidence(problem.keep(kept))
        result = bmr.reduce(guide, groups=problem.labels, select=select)
        assert result.delta_f == pytest.approx(exact[kept], abs=1e-6)
        flat = torch.cat([result.masks["v"], result.masks["w"].flatten()])
        assert torch.equal(flat, problem.keep(kept))
        assert sum(layer.delta_f for layer in result.layers) == pytest.approx(result.delta_f)
    best = min(exact.values())
    assert best < 0
    for select in (bmr.exhaustive(), bmr.by_evidence()):
        result = bmr.reduce(guide, groups=problem.labels, select=select)
        assert result.delta_f == pytest.approx(best, abs=1e-6)


FAMILIES = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoLowRank": lambda model: AutoLowRankMultivariateNormal(model, rank=3),
}


def make_network(sizes, activation=torch.relu):
    """Weights w0, w1, ... and biases b0, b1, ... of layers of these sizes."""

    def model(x, y):
        for i, shape in enumerate(zip(sizes[1:], sizes, strict=False)):
            weight = pyro.sample(f"w{i}", dist.Normal(0.0, 1.0).expand(shape).to_event(2))
            bias = pyro.sample(f"b{i}", dist.Normal(0.0, 1.0).expand(shape[:1]).to_event(1))
            x = activation(x) @ weight.mT + bias
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    return model


def make_guide(family, sizes=SIZES, seed=0, model=None):
    """Draw a posterior that has been nowhere near data, but looks as if it had."""
    torch.manual_seed(seed)
    guide = FAMILIES[family](model or make_network(sizes))
    guide(torch.randn(6, sizes[0]), torch.randn(6, sizes[-1]))
    if family == "AutoNormal":
        for name, loc in dict(guide.locs.named_parameters()).items():
            name = name.removesuffix("_unconstrained")
            setattr(guide.locs, name, 0.8 * torch.randn(loc.shape) * torch.rand(loc.shape))
            setattr(guide.scales, name, 0.2 + 0.6 * torch.rand(loc.shape))
        return guide
    count = len(guide.loc)
    guide.loc.data.copy_(0.8 * torch.randn(count) * torch.rand(count))
    guide.scale = 0.2 + 0.6 * torch.rand(count)
    if family == "AutoLowRank":
        guide.cov_factor.data.copy_(torch.randn(count, 3))
    else:
        tril = torch.linalg.cholesky(torch.randn(count, 3 * count).corrcoef())
        guide.scale_tril = tril / tril.diagonal()[:, None]
    return guide


def moments(guide):
    """Mean and covariance of all elements, site by site, by the distributions of torch."""
    if isinstance(guide, AutoNormal):
        names = [s.name for factor in read_guide(guide) for s in factor.sites]
        loc = torch.cat([getattr(guide.locs, name).flatten() for name in names])
        scale = torch.cat([getattr(guide.scales, name).flatten() for name in names])
        return loc.double().detach(), scale.double().square().diag().detach()
    posterior = guide.get_posterior()
    return posterior.mean.double().detach(), posterior.covariance_matrix.double().detach()


def joint_delta_f(posterior, dropped):
    """Savage and Dickey: ln p(θ_S = 0) - ln q(θ_S = 0), with unit priors."""
    loc, covariance = posterior
    count = int(dropped.sum())
    if not count:
        return 0.0
    q = MultivariateNormal(loc[dropped], covariance[dropped][:, dropped])
    p = MultivariateNormal(torch.zeros(count).double(), torch.eye(count).double())
    zero = torch.zeros(count).double()
    return (p.log_prob(zero) - q.log_prob(zero)).item()


def unit_masks(sizes, gone):
    """By site, True where no unit that is gone produces or reads an element."""
    masks = {}
    for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        masks[f"w{i}"] = torch.ones(outputs, inputs, dtype=torch.bool)
        masks[f"b{i}"] = torch.ones(outputs, dtype=torch.bool)
    for layer, unit in gone:
        masks[f"w{layer}"][unit] = False
        masks[f"b{layer}"][unit] = False
        masks[f"w{layer + 1}"][:, unit] = False
    return masks


def units_delta_f(posterior, sizes, gone):
    """Spikes at what reads units that are gone; what produces them is at its prior, at no cost.

    In a correlated posterior, spikes at all of it.
    """
    dropped = ~flat(unit_masks(sizes, gone))
    loc, covariance = posterior
    if covariance.count_nonzero() > len(loc):
        return joint_delta_f(posterior, dropped)
    produced = torch.cat(
        [
            torch.isin(
                torch.arange(outputs), torch.tensor([u for i, u in gone if i == layer])
            ).repeat_interleave(count)
            for layer, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False))
            for count in (inputs, 1)
        ]
    )
    q = dist.Normal(loc, covariance.diagonal().sqrt())
    divergence = kl_divergence(q, dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)))
    return joint_delta_f(posterior, dropped & ~produced) - divergence[produced].sum().item()


def released_gain(loc, scale):
    """What ΔF of an element at its prior is less than that of a spike, with a unit prior."""
    q, p, zero = dist.Normal(loc, scale), dist.Normal(0.0, 1.0), torch.zeros(())
    spike = p.log_prob(zero) - q.log_prob(zero)
    return (-kl_divergence(q, p) - spike).item()


def count_dropped(sizes, gone):
    return int((~flat(unit_masks(sizes, gone))).sum())


@pytest.fixture
def one_structure(monkeypatch):
    """Find the units of the model of a test once."""
    found = []

    def read(*arguments):
        found[:] = found or [read_units(*arguments)]
        return found[0]

    monkeypatch.setattr("pyro_bmr.selection.model_units.read_units", read)


def flat(masks):
    return torch.cat([mask.flatten() for mask in masks.values()])


def keep_but(gone):
    def select(scores):
        masks = {name: torch.ones_like(t, dtype=torch.bool) for name, t in scores.delta_f.items()}
        for layer, unit in gone:
            masks[f"w{layer}"][unit] = False
        return masks

    return select


@pytest.mark.parametrize("family", FAMILIES)
def test_units_go_with_all_that_produces_and_reads_them_and_overlaps_count_once(family):
    guide = make_guide(family)
    gone = [(0, 0), (0, 2), (1, 1)]
    result = bmr.reduce(guide, groups=bmr.units, select=keep_but(gone))
    expected = unit_masks(SIZES, gone)
    assert result.masks.keys() == expected.keys()
    assert all(torch.equal(result.masks[name], mask) for name, mask in expected.items())
    exact = units_delta_f(moments(guide), SIZES, gone)
    assert result.delta_f == pytest.approx(exact, rel=1e-4, abs=1e-4)
    assert [(x.name, x.kind, x.groups, x.kept) for x in result.layers] == [
        ("w0", "unit", 4, 2),
        ("w1", "unit", 3, 2),
    ]
    first = units_delta_f(moments(guide), SIZES, gone[:2])
    assert result.layers[0].delta_f == pytest.approx(first, rel=1e-4, abs=1e-4)
    assert sum(x.delta_f for x in result.layers) == pytest.approx(exact, rel=1e-4, abs=1e-4)
    # ΔF of elements stays what it is without groups.
    alone = bmr.reduce(guide).scores
    assert all(torch.equal(result.scores[name], scores) for name, scores in alone.items())


def test_a_unit_that_nothing_reads_costs_its_divergence_from_the_prior():
    """The bias that holds a unit shut is far from zero, and of no use once nothing reads it."""
    guide = make_guide("AutoNormal")
    guide.locs.b0 = torch.tensor([-8.0, 0.0, 0.0, 0.0])
    data = torch.randn(6, SIZES[0]), torch.randn(6, SIZES[-1])
    unread = unit_masks(SIZES, [])
    unread["w1"][:, 0] = False
    before = bmr.reduce(guide, select=lambda scores: unread)
    after = bmr.reduce(before.guide, groups=bmr.units, select=keep_but([(0, 0)]))
    spikes = bmr.reduce(before.guide, select=lambda scores: after.masks)
    # The divergence is exact in each, and what is left has the same posterior.
    full, reduced = (
        free_energy_draws(pair.model, pair.guide, data, {}, 50, bmr.LocalELBO())
        for pair in (before, after)
    )
    realised = (reduced.mean() - full.mean()).item()
    error = (reduced.var() + full.var()).div(50).sqrt().item()
    assert error < 1.5
    assert abs(after.delta_f - realised) < 4 * error
    assert abs(spikes.delta_f - realised) > 20 * error


def depend_on_the_sum(x):
    return x * x.sum(-1, keepdim=True)


def test_only_what_a_unit_alone_needs_goes_to_its_prior():
    """Otherwise ΔF is that of spikes at all of it."""
    gone = [(0, 0)]

    def spikes_only(guide, **options):
        result = bmr.reduce(guide, groups=bmr.units, select=keep_but(gone), **options)
        same = bmr.reduce(guide, select=lambda scores: dict(result.masks), **options)
        assert any(not mask.all() for mask in result.masks.values())
        return result.delta_f == pytest.approx(same.delta_f, rel=1e-5)

    guide = make_guide("AutoNormal")
    assert not spikes_only(guide)
    # What reads it cannot become zero, or takes a prior that is no spike.
    assert spikes_only(guide, sites=["w0", "b0"])
    narrow = {"w0": bmr.Spike(), "b0": bmr.Spike(), "w1": bmr.Gaussian(0.0, 0.1)}
    assert spikes_only(guide, reduced_prior=narrow)
    # All units of a layer depend on each, though nothing does once nothing reads any of them.
    assert spikes_only(make_guide("AutoNormal", model=make_network(SIZES, depend_on_the_sum)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_search_against_all_subsets_of_groups(family):
    units = [(0, i) for i in range(SIZES[1])] + [(1, i) for i in range(SIZES[2])]
    subsets = [
        [unit for unit, kept in zip(units, keep, strict=True) if not kept]
        for keep in product([True, False], repeat=len(units))
    ]
    missed = []
    for seed in range(3):
        guide = make_guide(family, seed=seed)
        posterior = moments(guide)
        exact = torch.tensor([units_delta_f(posterior, SIZES, gone) for gone in subsets])
        size = torch.tensor([count_dropped(SIZES, gone) for gone in subsets])
        found = []

        def search(scores, found=found):
            for margin, choose in product([0.0, 0.1], [bmr.exhaustive, bmr.by_evidence]):
                masks = choose(margin)(scores)
                kept = torch.cat([masks["w0"], masks["w1"]]).tolist()
                gone = [unit for unit, stays in zip(units, kept, strict=True) if not stays]
                found.append((margin, choose, subsets.index(gone)))
            return masks

        result = bmr.reduce(guide, groups=bmr.units(at_least=0), select=search)
        assert result.delta_f == pytest.approx(exact[found[-1][-1]].item(), rel=1e-4, abs=1e-4)
        for margin, choose, which in found:
            price = exact + margin * size
            gap = (price[which] - price.min()).item()
            if choose is bmr.exhaustive:
                assert gap < 1e-3
            missed.append(gap)
    assert sum(gap > 1e-3 for gap in missed) <= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_no_single_flip_lowers_what_the_search_has_found(family):
    sizes = (2, 16, 10, 1)
    guide = make_guide(family, sizes)
    if family == "AutoNormal":
        guide.locs.w2 = 4 * guide.locs.w2.detach()
    posterior, gone = moments(guide), []

    def keep(scores):
        masks = bmr.by_evidence()(scores)
        gone.extend((i, int(u)) for i in range(2) for u in (~masks[f"w{i}"]).nonzero()[:, 0])
        return masks

    result = bmr.reduce(guide, groups=bmr.units(at_least=0), select=keep)
    assert 3 < len(gone) < 26
    assert result.delta_f < 0
    for unit in [(0, i) for i in range(16)] + [(1, i) for i in range(10)]:
        flipped = [other for other in gone if other != unit] + [unit] * (unit not in gone)
        changed = units_delta_f(posterior, sizes, flipped)
        assert changed > result.delta_f - 1e-3 - 1e-5 * abs(changed)


@pytest.mark.parametrize("family", FAMILIES)
def test_top_k_follows_the_greedy_path(family):
    guide = make_guide(family)
    posterior = moments(guide)
    units = [(0, i) for i in range(4)] + [(1, i) for i in range(3)]
    masks = {}

    def select(scores):
        masks.update({kept: bmr.top_k(kept)(scores) for kept in range(1, 7)})
        return masks[5]

    result = bmr.reduce(guide, groups=bmr.units(at_least=0), select=select)
    gone = []
    for kept in range(6, 0, -1):
        left = [unit for unit in units if unit not in gone]
        price = {u: units_delta_f(posterior, SIZES, [*gone, u]) for u in left}
        gone.append(min(price, key=price.__getitem__))
        stays = torch.cat([masks[kept]["w0"], masks[kept]["w1"]])
        assert int(stays.sum()) == kept
        if kept > 4:
            assert {unit for unit, stay in zip(units, stays, strict=True) if not stay} == set(gone)
        if kept == 5:
            assert torch.equal(flat(result.masks), flat(unit_masks(SIZES, gone)))


def random_evidence(seed, kinds):
    """Units of two hidden layers, posteriors of these kinds for parts of the elements."""
    torch.manual_seed(seed)
    sizes = [1, *(int(size) for size in torch.randint(2, 6, (2,))), 1]
    masks = [
        unit_masks(sizes, [(layer, unit)]) for layer in (0, 1) for unit in range(sizes[layer + 1])
    ]
    group, element = torch.stack([~flat(mask) for mask in masks]).nonzero(as_tuple=True)
    count = flat(masks[0]).numel()
    loc = 0.8 * torch.randn(count).double() * torch.rand(count).double()
    cost, couplings = torch.zeros(count).double(), []
    for kind, part in zip(kinds, torch.randperm(count).tensor_split(len(kinds)), strict=True):
        size, diagonal = len(part), 0.02 + 0.2 * torch.rand(len(part)).double().square()
        factor = 0.3 * torch.randn(size, 4).double()
        if kind == "independent":
            whitened = loc[part].square() / diagonal
            cost[part] = 0.5 * (diagonal.log() + whitened)
        else:
            posterior = LowRank(loc[part], factor, diagonal)
            couplings.append(Coupling(part, posterior if kind == "low rank" else posterior.dense()))
    members = Membership(group, element, len(masks), count)
    able = torch.rand(len(masks)) < 0.95
    return GroupEvidence(members, cost, tuple(couplings), able)


KINDS = [["independent"], ["dense"], ["low rank"], ["independent", "dense", "low rank"]]


@pytest.mark.parametrize("kinds", KINDS, ids=" and ".join)
def test_a_walk_knows_the_price_of_every_flip(kinds):
    evidence = random_evidence(1, kinds)
    dropped = torch.rand(len(evidence.able)) < 0.5
    walk = GroupWalk(evidence, dropped)
    for step in range(120):
        group = step * 5 % len(dropped)
        here = evidence.delta_f(walk.dropped)
        walk.look(torch.tensor([group]))
        change = walk.changes()[group].item()
        walk.flip(group)
        assert change == pytest.approx(evidence.delta_f(walk.dropped) - here, abs=1e-7)


@pytest.mark.parametrize("kinds", KINDS, ids=" and ".join)
def test_the_search_finds_the_best_set_of_groups_nearly_always(kinds):
    gaps = []
    for seed in range(15):
        evidence = random_evidence(seed, kinds)
        best, found = search_all_groups(evidence), search_groups(evidence)
        assert not (found & ~evidence.able).any()
        gaps.append(evidence.delta_f(found) - evidence.delta_f(best))
    print(f"missed by {[round(gap, 3) for gap in gaps if gap > 1e-6]} nats")
    assert min(gaps) > -1e-6
    assert sum(gap > 1e-6 for gap in gaps) <= 1


def test_factors_of_several_kinds_share_groups():
    torch.manual_seed(3)
    model, args = make_network(SIZES), (torch.randn(6, 3), torch.randn(6, 2))
    guide = AutoGuideList(model)
    guide.append(AutoMultivariateNormal(poutine.block(model, expose=["w0", "w1"])))
    low_rank = AutoLowRankMultivariateNormal(poutine.block(model, expose=["b0", "w2"]), rank=2)
    guide.append(low_rank)
    guide.append(AutoNormal(poutine.block(model, expose=["b1", "b2"])))
    guide(*args)
    result = bmr.reduce(guide, groups=bmr.units, select=keep_but([(0, 0), (1, 1)]))
    same = bmr.reduce(guide, select=lambda scores: unit_masks(SIZES, [(0, 0), (1, 1)]))
    # Of what produces units only the bias in AutoNormal is known to be at its prior then.
    released = released_gain(guide[2].locs.b1[1], guide[2].scales.b1[1])
    assert result.delta_f == pytest.approx(same.delta_f + released, rel=1e-6)
    assert sum(x.delta_f for x in result.layers) == pytest.approx(result.delta_f, rel=1e-5)


@pytest.mark.usefixtures("one_structure")
def test_what_selections_see_of_groups():
    guide = make_guide("AutoNormal")
    seen = []

    def look(scores):
        seen.append(scores)
        return bmr.baselines.snr(0.5)(scores)

    result = bmr.reduce(guide, groups=bmr.units, select=look)
    (scores,) = seen
    locs, scales = guide.locs, guide.scales
    ratios = []
    for layer, unit in [(0, i) for i in range(4)] + [(1, i) for i in range(3)]:
        gone = unit_masks(SIZES, [(layer, unit)])
        members = [(getattr(locs, n)[~m], getattr(scales, n)[~m]) for n, m in gone.items()]
        loc, scale = (torch.cat(part).square().mean().sqrt() for part in zip(*members, strict=True))
        torch.testing.assert_close(scores.loc[f"w{layer}"][unit], loc.double())
        torch.testing.assert_close(scores.scale[f"w{layer}"][unit], scale.double())
        ratios.append(loc / scale)
    kept = torch.cat([scores.kept["w0"], scores.kept["w1"]])
    assert kept.all()
    assert sum(x.kept for x in result.layers) == 7 - round(3.5)
    for select in (
        bmr.baselines.spr(0.3),
        bmr.baselines.magnitude(0.3),
        bmr.baselines.random(0.3, seed=2),
    ):
        some = bmr.reduce(guide, groups=bmr.units, select=select)
        assert sum(x.kept for x in some.layers) == 5
    with pytest.raises(ValueError, match="searches sets of elements only"):
        bmr.reduce(guide, groups=bmr.units, select=bmr.by_blocks())


@pytest.mark.usefixtures("one_structure")
def test_options_of_unit_groupings():
    sizes = (5, 20, 12, 1)
    guide = make_guide("AutoNormal", sizes)

    def kept(grouping, select=lambda s: {n: t < -torch.inf for n, t in s.delta_f.items()}):
        return {x.name: x.kept for x in bmr.reduce(guide, groups=grouping, select=select).layers}

    assert kept(bmr.units) == {"w0": 1, "w1": 1}
    assert kept(bmr.units(at_least=0)) == {"w0": 0, "w1": 0}
    assert kept(bmr.units(at_least=13)) == {"w0": 13, "w1": 12}
    assert kept(bmr.units(round_to=8)) == {"w0": 8, "w1": 8}
    assert kept(bmr.units(at_least=9, round_to=8)) == {"w0": 16, "w1": 12}
    assert kept(bmr.inputs(at_least=2)) == {"w0": 2}
    assert kept(bmr.units(ignore="w1")) == {"w0": 1}
    assert kept(bmr.units(ignore=["b0"])) == {"w1": 1}
    plain, rounded = (bmr.reduce(guide, groups=g) for g in (bmr.units, bmr.units(round_to=8)))
    for one, other in zip(plain.layers, rounded.layers, strict=True):
        assert other.kept == min(one.groups, -(-one.kept // 8) * 8)
    # What comes back is the dearest to have dropped.
    first = bmr.reduce(guide, groups=bmr.units(ignore="w1"), select=bmr.top_k(13))
    again = bmr.reduce(guide, groups=bmr.units(ignore="w1", at_least=13), select=bmr.top_k(0))
    assert again.delta_f == pytest.approx(first.delta_f, rel=1e-5)


def test_a_user_labels_elements_over_sites():
    guide = make_guide("AutoNormal")

    def labels(name, shape):
        return {"w0": torch.arange(4)[:, None], "b0": torch.arange(4), "w1": None}.get(
            name, torch.tensor(-1)
        )

    def select(scores):
        assert {name: t.numel() for name, t in scores.delta_f.items()} == {"w0": 4, "w1": 12}
        return {"w0": torch.arange(4) != 2, "w1": torch.arange(12) != 5}

    result = bmr.reduce(guide, groups=labels, select=select)
    expected = unit_masks(SIZES, [])
    expected["w0"][2] = expected["b0"][2] = False
    expected["w1"].view(-1)[5] = False
    assert torch.equal(flat(result.masks), flat(expected))
    assert result.delta_f == pytest.approx(joint_delta_f(moments(guide), ~flat(expected)), rel=1e-5)
    assert [x.kind for x in result.layers] == ["group", "element"]


def test_none_for_every_site_is_elements():
    guide = make_guide("AutoMultivariateNormal")
    result, same = (bmr.reduce(guide, groups=g) for g in (bmr.elements, lambda name, shape: None))
    assert torch.equal(flat(result.masks), flat(same.masks))
    assert result.layers == same.layers == ()
    assert result.layer_summary().empty


@pytest.mark.parametrize("family", FAMILIES)
def test_reductions_of_groups_compose(family):
    guide = make_guide(family)
    one = bmr.reduce(guide, groups=bmr.units, select=keep_but([(0, 1)]))
    two = bmr.reduce(one.guide, groups=bmr.units, select=keep_but([(1, 2)]))
    both = bmr.reduce(guide, groups=bmr.units, select=keep_but([(0, 1), (1, 2)]))
    assert torch.equal(flat(two.masks), flat(both.masks))
    # What reads one and produces the other was a spike, and then went to its prior.
    extra = (
        -released_gain(guide.locs.w1[2, 1], guide.scales.w1[2, 1]) if family == "AutoNormal" else 0
    )
    assert one.delta_f + two.delta_f == pytest.approx(both.delta_f + extra, rel=1e-4, abs=1e-4)
    assert [(x.groups, x.kept) for x in two.layers] == [(4, 3), (3, 2)]
    again = bmr.reduce(both.guide, groups=bmr.units, select=lambda scores: dict(scores.kept))
    assert again.delta_f == 0
    # Units that are gone cannot be taken back, and count as gone.
    rest = bmr.reduce(both.guide, groups=bmr.units(at_least=4), select=bmr.top_k(0))
    assert [x.kept for x in rest.layers] == [3, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_reduce_what_those_before_have_left(family):
    guide = make_guide(family)
    stages = bmr.reduce(guide, groups=[bmr.units, bmr.elements])
    first = bmr.reduce(guide, groups=bmr.units)
    second = bmr.reduce(first.guide)
    assert 0 < first.sparsity < second.sparsity == stages.sparsity
    assert torch.equal(flat(stages.masks), flat(second.masks))
    expected = first.delta_f + second.delta_f
    assert stages.delta_f == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert stages.layers == first.layers
    both, units = (joint_delta_f(moments(guide), ~flat(r.masks)) for r in (second, first))
    assert second.delta_f == pytest.approx(both - units, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("family", ["AutoNormal", "AutoMultivariateNormal"])
def test_groups_may_be_shrunk_instead(family):
    guide, narrow = make_guide(family), bmr.Gaussian(0.0, 0.1)
    result = bmr.reduce(guide, groups=bmr.units, reduced_prior=narrow)
    same = bmr.reduce(guide, select=lambda scores: dict(result.masks), reduced_prior=narrow)
    assert result.delta_f == pytest.approx(same.delta_f, rel=1e-5) and result.delta_f < 0
    assert sum(x.delta_f for x in result.layers) == pytest.approx(result.delta_f, rel=1e-4)
    assert result.shrunk == int((~flat(result.masks)).sum()) > 0
    with pytest.raises(ValueError, match="2 groupings and a reduced prior other than Spike"):
        bmr.reduce(guide, groups=[bmr.units, bmr.elements], reduced_prior=narrow)


def test_only_reducible_elements_are_members_and_those_without_a_prior_keep_their_group():
    guide = make_guide("AutoNormal")
    gone = [(0, 0), (1, 1)]
    result = bmr.reduce(guide, sites=["w1", "b0"], groups=bmr.units, select=keep_but_known(gone))
    assert result.masks.keys() == {"w1", "b0"}
    expected = unit_masks(SIZES, gone)
    for name, mask in result.masks.items():
        assert torch.equal(mask, expected[name])
    hidden = torch.ones(4, 3, dtype=torch.bool)
    hidden[1, 2] = False

    def masked():
        pyro.sample("w0", dist.Normal(0.0, 1.0).expand([4, 3]).mask(hidden).to_event(2))

    partly = AutoNormal(masked, init_scale=0.9)
    partly()
    partly.locs.w0 = torch.zeros(4, 3)
    rows = {"groups": lambda name, shape: torch.arange(4)[:, None]}
    kept = bmr.reduce(partly, **rows).masks["w0"].all(-1)
    assert kept.tolist() == [False, True, False, False]
    with pytest.raises(ValueError, match="some of 'w0' that cannot go: groups with an element"):
        bmr.reduce(partly, select=lambda s: {"w0": torch.arange(4) > 1}, **rows)


def keep_but_known(gone):
    """Layers have the name of the first site that is there."""

    def select(scores):
        names = list(scores.delta_f)
        masks = {name: torch.ones_like(t, dtype=torch.bool) for name, t in scores.delta_f.items()}
        for layer, unit in gone:
            masks[names[layer]][unit] = False
        return masks

    return select


def test_what_a_result_shows_of_groups():
    result = bmr.reduce(make_guide("AutoNormal"), groups=[bmr.inputs, bmr.units])
    table = result.layer_summary()
    assert list(table.columns) == ["kind", "groups", "kept", "pruned %", "delta_f"]
    assert list(zip(table.index, table["kind"], strict=True)) == [
        ("w0", "input"),
        ("w0", "unit"),
        ("w1", "unit"),
    ]
    assert table["delta_f"].sum() == pytest.approx(result.delta_f, rel=1e-5)
    text = str(result)
    assert "groups" in text and "input" in text and "site" in text
    assert result._repr_html_().count("<table") == 3  # one is the picture


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ("units", TypeError, "got groups='units'. Expected pyro_bmr.elements, units"),
        ([], ValueError, r"got groups=\[\]. Expected one grouping"),
        ([bmr.units, None], TypeError, "Expected pyro_bmr.elements, units"),
        (
            lambda n, s: torch.zeros(7, dtype=torch.long),
            ValueError,
            r"shape \(7,\).*'w0'.*\(4, 3\)",
        ),
        (lambda n, s: torch.zeros(s), ValueError, "dtype torch.float32 for the site 'w0'"),
        (lambda n, s: [1], ValueError, "returned a list for the site 'w0'"),
        (bmr.units(ignore="fc9"), ValueError, r"'fc9' is no layer.*w0 \(4 units\), w1 \(3 units"),
        (bmr.units(ignore="w2"), ValueError, "'w2' is no layer and produces none"),
    ],
)
def test_groupings_that_cannot_be(groups, error, message):
    with pytest.raises(error, match=message):
        bmr.reduce(make_guide("AutoNormal"), groups=groups)


def test_options_that_cannot_be():
    with pytest.raises(ValueError, match="got at_least=-1. Expected a whole number of units, 0"):
        bmr.units(at_least=-1)
    with pytest.raises(ValueError, match="got round_to=0.5. Expected a whole number of units, 1"):
        bmr.channels(round_to=0.5)


def test_a_grouping_without_groups_says_so():
    with pytest.warns(UserWarning, match="has no groups in this model"):
        result = bmr.reduce(make_guide("AutoNormal"), groups=bmr.heads)
    assert result.sparsity == 0
    with pytest.warns(UserWarning, match="has no groups in this model"):
        bmr.reduce(make_guide("AutoNormal"), groups=lambda name, shape: torch.tensor(-1))


def three_units(x):
    """What a network with three hidden units can do."""
    bends = (x[:, 0] - x[:, 1]).relu() - 2 * (x[:, 1] + 0.5).relu()
    return bends + 1.5 * (x[:, 2] - x[:, 0]).relu()


@pytest.mark.rare
def test_of_ten_hidden_units_those_stay_that_are_needed(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(200, 5)
    data = x, three_units(x) + 0.05 * torch.randn(200)
    model = Regression(5, hidden=10)
    guide = AutoNormal(model, init_scale=0.05)
    options = {"lr": 0.03, "estimator": "local", "compile": False, "progress": False}
    bmr.fit(model, guide, *data, num_epochs=500, seed=0, **options)
    result = bmr.reduce(guide, groups=[bmr.inputs, bmr.units, bmr.elements])
    inputs, hidden = result.layers
    assert (inputs.kind, inputs.kept) == ("input", 3)
    assert (hidden.kind, hidden.groups, hidden.kept) == ("unit", 10, 3)
    assert not result.masks["fc1.weight"][:, 3:].any()
    gone = ~result.masks["fc2.weight"][0]
    assert int(gone.sum()) == 7
    assert not (result.masks["fc1.weight"][gone].any() or result.masks["fc1.bias"][gone].any())
    before, after = (
        bmr.free_energy(*pair, *data)[0] for pair in ((model, guide), (result.model, result.guide))
    )
    assert after < before

    # prune() passes groups on, and a checkpoint knows them.
    rounds = {"num_epochs": 5, "max_rounds": 1, "num_samples": 2, "checkpoint": tmp_path / "run.pt"}
    groups = [bmr.units(at_least=4), bmr.elements]
    pruned = bmr.prune(model, guide, *data, **rounds, **options, groups=groups, algorithm="paper")
    (layer,) = pruned.layers
    assert (layer.name, layer.kept) == ("fc1.weight", 4)
    again = bmr.prune(model, guide, *data, **rounds, **options, groups=groups, algorithm="paper")
    assert again.layers == pruned.layers
    with pytest.raises(ValueError, match="groups"):
        bmr.prune(model, guide, *data, **rounds, **options, groups=[bmr.units], algorithm="paper")
