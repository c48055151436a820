"""Names, fields and patterns in ``sites=``."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_bmr as bmr

NAMES = ["A(1,1)", "A(2,1)", "A(1,2)", "B(1,2,1)", "C{1}(1)", "C{2}(1)", "A", "decay"]
SCALES = [0.1, 0.1, 0.0, 0.1, 0.1, 0.1, 0.1, 0.1]


def posterior(names=NAMES):
    mean = [0.0, 0.5, 0.0, 0.02, 0.1, 0.2, 0.3, 0.01][: len(names)]
    scale = torch.tensor(SCALES[: len(names)])
    return bmr.Posterior(mean, scale=scale, prior_scale=(scale > 0).double(), names=names)


FREE = [name for name in NAMES if name != "A(1,2)"]


@pytest.mark.parametrize(
    ("sites", "meant"),
    [
        ("A", ["A"]),
        (["A(2,1)"], ["A(2,1)"]),
        (["A(*"], ["A(1,1)", "A(2,1)"]),
        (["B"], ["B(1,2,1)"]),
        (["C"], ["C{1}(1)", "C{2}(1)"]),
        (["C{2}"], ["C{2}(1)"]),
        (["A(?,1)", "decay"], ["A(1,1)", "A(2,1)", "decay"]),
        (["*"], FREE),
    ],
)
def test_a_name_a_field_or_a_pattern_means_the_same_everywhere(sites, meant):
    q = posterior()
    assert set(bmr.reduce(q, sites=sites).masks) == set(meant)
    assert set(bmr.presence(q, sites=sites).probability) == set(meant)
    found = bmr.average(q, sites=sites)
    assert set(found.presence) == set(meant)
    assert len(found.joint_covariance(sites)) == len(meant)
    assert set(bmr.compare_models(q, {"full": {}}, sites=sites).kept) == set(meant)


def test_the_models_to_compare_and_priors_of_presence_take_fields_too():
    q = posterior(NAMES[:6])
    kept = bmr.compare_models(q, {"off": {"A(1,1)": False, "C": False}}).kept
    assert [name for name, one in kept.items() if not one.any()] == ["A(1,1)", "C{1}(1)", "C{2}(1)"]
    found = bmr.presence(q, prior={"C": 0.9}).log_odds
    assert float(found["C{2}(1)"]) == pytest.approx(2.1972, abs=1e-4)
    assert float(found["B(1,2,1)"]) == 0.0


def test_what_cannot_be_reduced_is_left_out_of_a_pattern_and_refused_by_name():
    q = posterior(NAMES[:6])
    assert set(bmr.reduce(q, sites=["A"]).masks) == {"A(1,1)", "A(2,1)"}
    with pytest.raises(ValueError, match=r"'A\(1,2\)': fixed"):
        bmr.reduce(q, sites=["A(1,2)"])
    with pytest.raises(ValueError, match=r"'A\(1,2\)': fixed"):
        bmr.reduce(q, sites=["A(1,2*"])


def test_a_name_that_is_not_known_is_told_what_is_near():
    names = [f"{field}({i},{j})" for field in "AB" for i in range(1, 6) for j in range(1, 6)]
    q = bmr.Posterior(torch.zeros(50), scale=0.1, prior_scale=1.0, names=names)
    with pytest.raises(ValueError, match=r"Did you mean 'B\(5,4\)'") as caught:
        bmr.reduce(q, sites=["B(5.4)"])
    assert len(str(caught.value)) < 300


def model():
    with pyro.plate("rows", 2):
        pyro.sample("layer[0]", dist.Normal(0.0, 1.0))
        pyro.sample("layer[1]", dist.Normal(0.0, 1.0))
    pyro.sample("layer[2]", dist.HalfNormal(1.0))
    pyro.sample("w", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("sites", ["layer", ["layer*"], ["layer[0]", "layer[1]"]])
def test_of_a_pyro_model(sites):
    pyro.clear_param_store()
    guide = AutoNormal(model)
    guide()
    assert set(bmr.reduce(guide, sites=sites).masks) == {"layer[0]", "layer[1]"}
    assert set(bmr.presence(guide, sites=sites).probability) == {"layer[0]", "layer[1]"}


def test_of_draws():
    draws = {
        f"b[{i}]": torch.randn(300, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    }
    draws["c"] = draws["b[0]"] + 1
    q = bmr.Posterior.from_samples(draws, sites=["b"], prior_scale=3.0)
    assert q.names == ("b[0]", "b[1]")
