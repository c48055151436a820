"""Named models: against log evidences of regressions, and averages by hand, in numpy."""

import itertools

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_regression import ObservedRegression
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from scipy.stats import norm

import pyro_bmr as bmr

NAMES = ["A(1,2) × mean", "A(2,1) × mean", "A(1,2) × group", "A(2,1) × group", "C(1,1)", "w[3,1]"]
SIZE, NOISE = len(NAMES), 0.8
NUMPY = {"rtol": 1e-8, "atol": 1e-8}


class Regression:
    """``y ~ N(X w, NOISE²)`` of which every sub-model is solved anew."""

    def __init__(self, correlated=False, size=SIZE, rows=25, seed=0):
        random = np.random.default_rng(seed)
        self.x = random.normal(size=(rows, size)) @ (np.eye(size) + 0.2)
        self.y = self.x @ np.linspace(0.5, 0.0, size) + NOISE * random.normal(size=rows)
        root = random.normal(size=(size, size))
        self.loc = 0.2 * random.normal(size=size)
        self.prior = 0.5 * root @ root.T + np.eye(size) if correlated else np.eye(size)
        if correlated == "singular":
            # The last is the sum of the first two, and the mean is in the subspace.
            basis = np.vstack([np.eye(size - 1), [1.0, 1.0, *[0.0] * (size - 3)]])
            self.prior, self.loc = basis @ self.prior[:-1, :-1] @ basis.T, basis @ self.loc[:-1]

    def solve(self, kept, rest="conditional"):
        """Return log evidence, mean and covariance if all others are zero."""
        drop = ~kept
        loc, prior = self.loc[kept], self.prior[np.ix_(kept, kept)]
        if rest == "conditional" and drop.any():
            across = self.prior[np.ix_(kept, drop)]
            gain = across @ np.linalg.pinv(self.prior[np.ix_(drop, drop)], rcond=1e-10)
            loc, prior = loc - gain @ self.loc[drop], prior - gain @ across.T
        x, count = self.x[:, kept], len(self.y)
        spread = NOISE**2 * np.eye(count) + x @ prior @ x.T
        error = self.y - x @ loc
        evidence = -0.5 * (
            np.linalg.slogdet(2 * np.pi * spread)[1] + error @ np.linalg.solve(spread, error)
        )
        gain = prior @ x.T @ np.linalg.inv(spread)
        covariance = prior - gain @ x @ prior
        mean, variance = np.zeros((2, len(kept)))
        mean[kept], variance[kept] = loc + gain @ error, covariance.diagonal()
        return evidence, mean, variance, covariance

    def posterior(self, **given):
        _, mean, _, covariance = self.solve(np.ones(len(self.loc), dtype=bool))
        prior = {"prior_mean": self.loc, "prior_covariance": self.prior}
        return bmr.Posterior(mean, covariance, **prior, **({"names": NAMES} | given))

    def guide(self):
        loc, prior = torch.tensor(self.loc), torch.tensor(self.prior)
        if (self.prior == np.eye(len(self.loc))).all():
            of_w = dist.Normal(loc, torch.ones_like(loc)).to_event(1)
        else:
            of_w = dist.MultivariateNormal(loc, prior)

        def model(x, y=None):
            w = pyro.sample("w", of_w)
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)

        data = torch.tensor(self.x), torch.tensor(self.y)
        _, mean, _, covariance = self.solve(np.ones(len(self.loc), dtype=bool))
        guide = AutoMultivariateNormal(model, init_loc_fn=lambda _: torch.tensor(mean))
        guide(*data)
        tril = torch.linalg.cholesky(torch.tensor(covariance))
        guide.scale, guide.scale_tril = tril.diagonal(), tril / tril.diagonal()[:, None]
        return guide, data


KEPT = np.array(list(itertools.product([False, True], repeat=SIZE)))[[63, 1, 0, 42, 21, 54]]
TABLE = {f"m{i}": kept for i, kept in enumerate(KEPT)}


def solve_all(problem, kept, rest="conditional"):
    found = [problem.solve(one, rest) for one in kept]
    evidence, mean, variance = (np.array([one[i] for one in found]) for i in range(3))
    return problem.solve(np.ones(kept.shape[1], dtype=bool))[0] - evidence, mean, variance


@pytest.mark.parametrize("rest", ["conditional", "marginal"])
@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("how", ["moments", "moments by site", "guide"])
def test_log_evidences(how, correlated, rest):
    """ΔF, means and variances are those of the regression with the other columns left out."""
    problem = Regression(correlated)
    guide, data = problem.guide()
    if how == "moments":
        guide, data = problem.posterior(), ()
    elif how == "moments by site":
        _, mean, _, covariance = problem.solve(np.ones(SIZE, dtype=bool))
        prior = {"prior_mean": problem.loc, "prior_covariance": problem.prior}
        guide, data = bmr.Posterior({"w": mean}, covariance, **prior), ()
    spike = bmr.Spike(rest=rest)
    found = bmr.compare_models(guide, TABLE, *data, reduced_prior=spike)
    delta_f, mean, variance = solve_all(problem, KEPT, rest)
    np.testing.assert_allclose(found.delta_f, delta_f, **NUMPY)
    for i, name in enumerate(found.names):
        frame = found.parameters(name)
        np.testing.assert_allclose(frame["mean"], mean[i], **NUMPY)
        np.testing.assert_allclose(frame["sd"] ** 2, variance[i], **NUMPY)
        np.testing.assert_array_equal(frame["presence"], KEPT[i])
    weight = np.exp(-delta_f) / np.exp(-delta_f).sum()
    np.testing.assert_allclose(found.probability, weight, **NUMPY)
    assert found.best == found.names[weight.argmax()]
    frame = found.parameters()
    np.testing.assert_allclose(frame["presence"], weight @ KEPT, **NUMPY)
    np.testing.assert_allclose(frame["mean"], weight @ mean, **NUMPY)
    second = weight @ (variance + mean**2) - (weight @ mean) ** 2
    np.testing.assert_allclose(frame["sd"] ** 2, second, **NUMPY)
    np.testing.assert_allclose(frame["full mean"], mean[0], **NUMPY)


def test_a_singular_prior():
    """What is determined by what is zero is zero, too; and a set that cannot be is impossible."""
    problem = Regression("singular")
    kept = np.ones((5, SIZE), dtype=bool)
    kept[1, [2, 3]] = kept[2, [0, 1, 5]] = kept[3, 5] = kept[4, [0, 4]] = False
    found = bmr.compare_models(problem.posterior(), {str(i): k for i, k in enumerate(kept)})
    delta_f, mean, variance = solve_all(problem, kept)
    np.testing.assert_allclose(found.delta_f, delta_f, **NUMPY)
    np.testing.assert_allclose(found.flatten(found.means), mean, **NUMPY)
    np.testing.assert_allclose(found.flatten(found.variances), variance, **NUMPY)
    never = bmr.Posterior(
        [0.5, 0.5], 0.1 * np.ones((2, 2)), prior_mean=[1.0, 1.0], prior_covariance=np.ones((2, 2))
    )
    # Both are equal: without one the other is gone.
    same = bmr.compare_models(never, {"full": {}, "one": [True, False], "none": {"*": 0}})
    assert same.delta_f[1] == pytest.approx(same.delta_f[2])
    torch.testing.assert_close(same.means["theta"][1:], torch.zeros(2, 2).double())
    apart = bmr.Posterior(
        [0.0, 1.0], 0.1 * np.ones((2, 2)), prior_mean=[0, 1], prior_covariance=np.ones((2, 2))
    )
    impossible = bmr.compare_models(apart, {"none": {"*": False}, "one": [False, True]})
    assert impossible.probability.tolist() == [0.0, 1.0] and impossible.delta_f[0] == torch.inf
    assert all(t.isfinite().all() for t in (impossible.mean["theta"], impossible.variance["theta"]))
    with pytest.raises(ValueError, match="none of which is possible"):
        bmr.compare_models(apart, {"none": {"*": False}})


def test_intervals():
    """At the ends of an interval, the mixture has the levels; at an atom it jumps over them."""
    problem = Regression()
    found = bmr.compare_models(problem.posterior(), TABLE, prior=0.7)
    _, mean, variance = solve_all(problem, KEPT)
    low, high = found.flatten(found.interval(0.8)).numpy()
    weight = found.probability.numpy()
    scale = np.where(KEPT, np.sqrt(variance), 1.0)
    for end, level in ((low, 0.1), (high, 0.9)):
        below = np.where(KEPT, norm.cdf((end - mean) / scale), end > 0)
        upto = np.where(KEPT, below, end >= 0)
        at_zero = end == 0
        np.testing.assert_allclose((weight @ upto)[~at_zero], level, atol=1e-9)
        assert ((weight @ below)[at_zero] <= level).all()
        assert ((weight @ upto)[at_zero] >= level).all()
    assert (low < high).any() and ((low == 0) | (high == 0)).any()
    with pytest.raises(ValueError, match="mass=1.0. Expected a probability between"):
        found.interval(1.0)


def test_guides_of_all_kinds():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        problem = ObservedRegression()
        dense, low_rank, diagonal = problem.dense(), problem.low_rank(), problem.diagonal()
        diagonal()
        kept = torch.rand(5, 6) < 0.5
        models = {str(i): {"w": one} for i, one in enumerate(kept)}
        exact, other = (bmr.compare_models(one, models) for one in (dense, low_rank))
        apart = bmr.compare_models(diagonal, models)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(exact.delta_f, other.delta_f)
    torch.testing.assert_close(exact.means, other.means)
    torch.testing.assert_close(exact.variances, other.variances)
    mean, scale = (t.detach().numpy() for t in (diagonal.locs.w, diagonal.scales.w))
    each = norm.logpdf(0.0) - norm.logpdf(0.0, mean, scale)
    np.testing.assert_allclose(apart.delta_f, (~kept).numpy() @ each, **NUMPY)
    np.testing.assert_allclose(apart.means["w"], kept.numpy() * mean, **NUMPY)
    before = apart.full_mean["w"].clone()
    diagonal.locs.w.data += 1.0
    assert torch.equal(apart.full_mean["w"], before)


def test_what_else_is_correlated_moves():
    """A site that cannot be reduced, or is not named, has its moments in each model."""
    problem = Regression()
    guide = problem.posterior(names=["a", "b", "c", "d", "e", "f"])
    found = bmr.compare_models(guide, {"no a": {"a": False}}, sites=["a", "b"])
    _, mean, variance = solve_all(problem, np.array([[False] + [True] * 5]))
    np.testing.assert_allclose(found.means["f"], mean[:, 5], **NUMPY)
    np.testing.assert_allclose(found.variance["f"], variance[0, 5], **NUMPY)
    assert list(found.presence) == ["a", "b"]
    with pytest.raises(ValueError, match=r"'f' off in models\['x'\], which cannot go"):
        bmr.compare_models(guide, {"x": {"f": False}}, sites=["a", "b"])


def test_all_ways_to_say_the_same():
    problem = Regression()
    posterior = problem.posterior()
    result = bmr.reduce(posterior, select=lambda _: {"C(1,1)": torch.tensor(False)})
    kept = np.array([True, True, True, True, False, True])
    models = {
        "element": {"C(1,1)": False},
        "zero": {"C(1,1)": 0},
        "pattern": {"C*": np.False_},
        "letter": {"C(?,1)": torch.tensor(False)},
        "all but": {"*": False, "A*": True, "w[3,1]": True},
        "vector": kept,
        "numbers": kept.astype(float),
        "list": kept.tolist(),
        "tensor": torch.tensor(kept),
        "series": pd.Series(kept, index=NAMES),
        "result": result,
        "selection": lambda scores: {"C(1,1)": torch.zeros_like(scores.kept["C(1,1)"])},
        "grid": bmr.model_grid(one={"a": {"C(1,1)": False}}, two={"b": {}})["a|b"],
    }
    found = bmr.compare_models(posterior, models)
    for name in models:
        assert found.parameters(name)["presence"].tolist() == kept.tolist(), name
    np.testing.assert_allclose(found.delta_f, solve_all(problem, kept[None])[0].item(), **NUMPY)
    np.testing.assert_allclose(found.delta_f, result.delta_f, **NUMPY)
    frame = pd.DataFrame([kept, ~kept], columns=NAMES, index=["in", "out"])
    table = bmr.compare_models(posterior, frame)
    assert table.names == ("in", "out")
    assert table.parameters("out")["presence"].tolist() == (~kept).tolist()
    again = bmr.reduce(posterior, select=lambda _: found.masks("result"))
    assert again.delta_f == pytest.approx(result.delta_f)


def test_names():
    """Of a site with an array, elements have indices; brackets are no classes of letters."""
    shaped = bmr.Posterior(
        {"w": np.ones((2, 3)), "w[": np.zeros(2), "b": 0.0}, scale=1.0, prior_scale=2.0
    )

    def off(what):
        presence = bmr.compare_models(shaped, {"one": what}).presence
        return {n: (p == 0).int().tolist() for n, p in presence.items() if (p == 0).any()}

    assert off({"w[1,2]": False}) == {"w": [[0, 0, 0], [0, 0, 1]]}
    assert off({"w[*,2]": False}) == {"w": [[0, 0, 1], [0, 0, 1]]}
    assert off({"w[?,0]": False, "b": 0}) == {"w": [[1, 0, 0], [1, 0, 0]], "b": 1}
    assert off({"w[": [1, 0]}) == {"w[": [0, 1]}
    assert off({"w[[0]": False}) == {"w[": [1, 0]}
    assert off({"w": [True, False, True]}) == {"w": [[0, 1, 0], [0, 1, 0]]}
    assert off({"*[*": False, "w": True}) == {"w[": [1, 1]}
    assert off({"w": False, "w[0,0]": True}) == {"w": [[0, 1, 1], [1, 1, 1]]}


def test_families_and_their_prior():
    problem = Regression()
    delta_f, *_ = solve_all(problem, KEPT)
    likelihood = np.exp(-delta_f)
    families = {"many": ["m0", "m1", "m2", "m3"], "few": "m[45]", "one": "m5"}
    with pytest.raises(ValueError, match=r"got 'm\[45\]' in families\['few'\]"):
        bmr.compare_models(problem.posterior(), TABLE, families=families)
    families = {"many": ["m0", "m1", "m2", "m3"], "few": ("m4",), "one": "m5"}
    found = bmr.compare_models(problem.posterior(), TABLE, families=families)
    prior = np.array([1 / 12] * 4 + [1 / 3] * 2)
    weight = prior * likelihood / (prior @ likelihood)
    np.testing.assert_allclose(found.prior, prior)
    np.testing.assert_allclose(found.probability, weight, **NUMPY)
    expected = {"many": weight[:4].sum(), "few": weight[4], "one": weight[5]}
    assert found.family_probability == {"family": pytest.approx(expected)}
    assert found.best_family == {"family": max(expected, key=expected.get)}
    summary = found.family_summary().loc["family"]
    np.testing.assert_allclose(summary["prior"], 1 / 3)
    assert summary["models"].tolist() == [4, 1, 1]
    inside = found.within("many")
    np.testing.assert_allclose(inside.prior, 0.25)
    within = likelihood[:4] / likelihood[:4].sum()
    np.testing.assert_allclose(inside.probability, within, **NUMPY)
    np.testing.assert_allclose(inside.parameters()["presence"], within @ KEPT[:4], **NUMPY)
    table = found.summary()
    assert table.index[0] == found.best and table["probability"].is_monotonic_decreasing
    assert table.loc["m4", "family"] == "few" and table.loc["m1", "kept"] == 1
    equal = bmr.compare_models(problem.posterior(), TABLE, families=families, prior=0.5)
    np.testing.assert_allclose(equal.prior, 1 / 6)
    # A partition for the first element and one for the last: three combinations share.
    several = {
        "first": {"on": ["m0", "m3", "m5"], "off": ["m1", "m2", "m4"]},
        "last": {"on": ["m0", "m1", "m4"], "off": ["m2", "m3", "m5"]},
    }
    found = bmr.compare_models(problem.posterior(), TABLE, families=several)
    np.testing.assert_allclose(found.prior, [1 / 4, 1 / 8, 1 / 4, 1 / 8, 1 / 8, 1 / 8])
    both = found.within({"first": "on", "last": "off"})
    assert both.names == ("m3", "m5") and both.families["last"] == {"off": ("m3", "m5")}


def test_priors_over_models():
    posterior = Regression().posterior()

    def prior(**given):
        return bmr.compare_models(posterior, TABLE, **given).prior.numpy()

    def normalised(weight):
        return weight / weight.sum()

    weights = {name: i + 1.0 for i, name in enumerate(TABLE)}
    np.testing.assert_allclose(prior(), 1 / 6)
    np.testing.assert_allclose(prior(prior=weights), normalised(np.arange(1.0, 7.0)))
    size = KEPT.sum(1)
    np.testing.assert_allclose(prior(prior=0.2), normalised(0.25**size))
    np.testing.assert_allclose(prior(expected=2), normalised((2 / 4.0) ** size))
    # Odds of 1 : 3 for the first four, 4 : 1 for one.
    odds = np.array([1 / 3] * 4 + [4.0, 1.0])
    expected = normalised(np.prod(np.where(KEPT, odds, 1.0), 1))
    np.testing.assert_allclose(prior(prior={"A*": 0.25, "C(1,1)": 0.8}), expected)
    # Of what all models have, or none has, the prior does not speak.
    few = {"one": {"C(1,1)": False, "w[3,1]": False}, "two": {"C(1,1)": False}}
    found = bmr.compare_models(posterior, few, prior=0.1)
    np.testing.assert_allclose(found.prior, [0.9, 0.1])
    # Over a whole table, as many are present as expected.
    whole = {str(i): kept for i, kept in enumerate(itertools.product([0, 1], repeat=SIZE))}
    found = bmr.compare_models(posterior, whole, expected=1.5)
    present = sum(k.double() for k in found.kept.values())
    assert float(found.prior @ present) == pytest.approx(1.5)
    against = bmr.presence(posterior, prior=1.5 / SIZE).probability
    for name, probability in against.items():
        assert float(found.presence[name]) == pytest.approx(float(probability), abs=1e-9)


def test_a_grid():
    problem = Regression()

    def options(covariate):
        return {
            "both": {},
            "one": {f"A(1,2) × {covariate}": False},
            "none": {f"A* × {covariate}": False},
        }

    grid = bmr.model_grid(commonalities=options("mean"), differences=options("group"))
    assert len(grid) == len(list(grid)) == 9 and "none|one" in grid and "none|two" not in grid
    found = bmr.compare_models(problem.posterior(), grid)
    kept = np.array(
        [
            [*one, *two, True, True]
            for one in ([1, 1], [0, 1], [0, 0])
            for two in ([1, 1], [0, 1], [0, 0])
        ],
        dtype=bool,
    )
    delta_f, *_ = solve_all(problem, kept)
    np.testing.assert_allclose(found.delta_f, delta_f, **NUMPY)
    weight = np.exp(-delta_f).reshape(3, 3) / np.exp(-delta_f).sum()
    for partition, sums in (("commonalities", weight.sum(1)), ("differences", weight.sum(0))):
        expected = dict(zip(("both", "one", "none"), sums, strict=True))
        assert found.family_probability[partition] == pytest.approx(expected)
    assert found.families == grid.families
    winner = found.within({"differences": "none"})
    assert winner.names == ("both|none", "one|none", "none|none")
    with pytest.raises(ValueError, match="of which partition, as in {'commonalities': 'none'}"):
        found.within("none")
    only = bmr.compare_models(problem.posterior(), grid, families=grid.families)
    assert torch.equal(only.probability, found.probability)
    callables = bmr.model_grid(search={"yes": bmr.by_evidence(), "no": {}}, c={"off": {"C*": 0}})
    found = bmr.compare_models(problem.posterior(), callables)
    chosen = bmr.reduce(problem.posterior(), select=bmr.by_evidence()).masks
    expected = [bool(chosen[name]) and name != "C(1,1)" for name in NAMES]
    assert found.parameters("yes|off")["presence"].tolist() == expected
    with pytest.raises(ValueError, match="got factors={}"):
        bmr.model_grid()
    with pytest.raises(ValueError, match="Expected a name without '|'"):
        bmr.model_grid(one={"a|b": {}})
    with pytest.raises(TypeError, match="got one=3. Expected a mapping"):
        bmr.model_grid(one=3)


def test_thousands_of_models():
    names = [f"A({i},{j})" for i in range(8) for j in range(5)]
    problem = Regression(size=40, rows=50)
    kept = np.ones((4096, 40), dtype=bool)
    kept[:, 5:17] = list(itertools.product([False, True], repeat=12))
    models = {str(i): dict(zip(names[5:17], row[5:17], strict=True)) for i, row in enumerate(kept)}
    found = bmr.compare_models(problem.posterior(names=names), models, expected=4)
    some = [0, 4095, 7, 700, 3210]
    delta_f, mean, variance = solve_all(problem, kept[some])
    np.testing.assert_allclose(found.delta_f[some], delta_f, **NUMPY)
    means = found.flatten(found.means)[some]
    np.testing.assert_allclose(means, mean, **NUMPY)
    np.testing.assert_allclose(found.flatten(found.variances)[some], variance, **NUMPY)
    # Of all subsets of twelve, what presence sums is the same.
    exact = bmr.presence(problem.posterior(names=names), prior=4 / 12, sites=names[5:17])
    for name in names[5:17]:
        assert float(found.presence[name]) == pytest.approx(float(exact.probability[name]))
    assert len(str(found).splitlines()) < 30 and "4,076 less probable" in str(found)


def test_what_cannot_go_or_has_gone():
    posterior = bmr.Posterior(
        [0.3, 0.5, 1.0, 0.0], scale=[0.2, 0.2, 0.0, 0.0], prior_scale=1.0, names=list("abcd")
    )
    found = bmr.compare_models(posterior, {"none": {"*": False}, "mask": [False] * 4})
    assert list(found.presence) == ["a", "b"] and found.delta_f[0] == found.delta_f[1]
    assert found.parameters("none")["presence"].tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"'c' off in models\['no c'\], which cannot go: fixed"):
        bmr.compare_models(posterior, {"no c": {"c": False}})
    after = bmr.reduce(posterior, select=lambda _: {"a": torch.tensor(False)}).guide
    again = bmr.compare_models(after, {"all": {}, "no b": {"b": False}})
    assert again.presence["a"] == 0 and again.delta_f[0] == 0


def test_errors():
    posterior = Regression().posterior()

    def refused(error, match, models=TABLE, **given):
        with pytest.raises(error, match=match):
            bmr.compare_models(posterior, models, **given)

    one = lambda value: {"H1": value}  # noqa: E731
    refused(ValueError, r"got 'A\(1,2\)' in models\['H1'\].*mean.*Did you mean", one({"A(1,2)": 0}))
    refused(ValueError, "got 'B.' in models.* Expected a site, an element, or a", one({"B*": 0}))
    refused(ValueError, r"got models\['H1'\]='C\(1,1\)'. Expected what it keeps", one("C(1,1)"))
    refused(ValueError, r"models\['H1'\].*2.5. Expected True", one({"C*": 2.5}))
    refused(ValueError, "Expected a mask of all 6 elements in order", one([True, False]))
    refused(TypeError, "Expected what it keeps, True", one(3))
    refused(TypeError, "Expected names of sites", one({3: True}))
    refused(TypeError, "select returned a NoneType", one(lambda _: None))
    refused(ValueError, "a mask that broadcasts to", one({"C(1,1)": [True, False]}))
    refused(ValueError, "got models={}. Expected sub-models by name", {})
    refused(TypeError, "got models=3. Expected sub-models by name", 3)
    refused(ValueError, "Expected Spike\\(\\) at zero", reduced_prior=bmr.Gaussian(0.0, 1.0))
    refused(ValueError, "Expected Spike\\(\\) at zero", reduced_prior=bmr.Spike(loc=1.0))
    refused(ValueError, "'m1', 'm2', 'm3'.*each model in one family", families={"a": "m0"})
    refused(ValueError, "'m0' in 'a' and 'b'", families={"a": "m*", "b": ["m0"]})
    refused(ValueError, "got 'm01' in families.*Did you mean 'm1' or", families={"a": ["m01"]})
    refused(ValueError, "none for 'm1'", prior={"m0": 0.5})
    refused(ValueError, "names of models, or of elements", prior={"m0": 0.5, "C(1,1)": 0.5})
    refused(ValueError, "got prior=1.0. Expected the probability", prior=1.0)
    refused(ValueError, "either prior= or expected=", prior=0.5, expected=2)
    refused(ValueError, "fewer than the 6 elements that some models have", expected=6)
    found = bmr.compare_models(posterior, TABLE, families={"all": "m*"})
    with pytest.raises(ValueError, match="got 'm9' in model. Expected a model, of 'm0'"):
        found.masks("m9")
    with pytest.raises(ValueError, match="got 'al' in family. Expected a family,.*mean 'all'"):
        found.within("al")


def test_a_network():
    """Many elements, some of which a name is enough for; a guide in float32."""

    def model():
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([300, 200]).to_event(2))
        pyro.sample("b", dist.Normal(0.0, 1.0).expand([200]).to_event(1))

    torch.manual_seed(0)
    guide = AutoNormal(model, init_scale=0.3)
    guide()
    found = bmr.compare_models(guide, {"no b": {"b": False}, "one": {"w[2,1]": False}, "full": {}})
    scores = bmr.reduce(guide).scores
    expected = [float(scores["b"].double().sum()), float(scores["w"][2, 1]), 0.0]
    np.testing.assert_allclose(found.delta_f, expected, rtol=1e-6)
    assert found.elements[401] == "w[2,1]"


def test_what_was_pruned_before_may_be_off():
    q = bmr.Posterior([0.01, 2.0], scale=0.5, prior_scale=1.0, names=["a", "b"])
    guide = bmr.reduce(q).guide
    assert guide.kept.tolist() == [False, True]
    found = bmr.compare_models(guide, {"off": {"a": False}, "full": {}, "none": {"b": False}})
    assert found.delta_f[:2].tolist() == [0.0, 0.0]
    assert found.delta_f[2] > 1
