"""Mixtures of distributions over the real line as priors, under guides that users write."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

import pyro_bmr as bmr

LOC, SCALE = torch.tensor([0.05, 0.9, -0.02]), torch.tensor([0.2, 0.2, 0.3])
WIDTHS = torch.tensor([0.1, 1.0])
ZERO = torch.zeros(3)


def mixture(components):
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), components)


NORMALS = mixture(dist.Normal(torch.zeros(2), WIDTHS))
PRIORS = {
    "normals": (NORMALS.expand([3]).to_event(1), NORMALS),
    "normals apart": (
        mixture(dist.Normal(torch.tensor([0.0, 1.0]), WIDTHS)).expand([3]).to_event(1),
        mixture(dist.Normal(torch.tensor([0.0, 1.0]), WIDTHS)),
    ),
    "Laplaces": (
        mixture(dist.Laplace(0.0, WIDTHS)).expand([3]).to_event(1),
        mixture(dist.Laplace(0.0, WIDTHS)),
    ),
    "StudentTs": (
        mixture(dist.StudentT(3.0, 0.0, WIDTHS)).expand([3]).to_event(1),
        mixture(dist.StudentT(3.0, 0.0, WIDTHS)),
    ),
    "by logits": (
        dist.MixtureSameFamily(
            dist.Categorical(logits=torch.zeros(3, 2)), dist.Normal(torch.zeros(3, 2), WIDTHS)
        ).to_event(1),
        dist.MixtureSameFamily(
            dist.Categorical(logits=torch.zeros(2)), dist.Normal(torch.zeros(2), WIDTHS)
        ),
    ),
    "masked by True": (NORMALS.expand([3]).mask(True).to_event(1), NORMALS),
}


def guide():
    scale = pyro.param("scale", SCALE, constraint=constraints.positive)
    pyro.sample("w", dist.Normal(pyro.param("loc", LOC), scale).to_event(1))


def model_of(prior):
    def model():
        w = pyro.sample("w", prior)
        pyro.sample("y", dist.Normal(w[1], 0.2), obs=torch.tensor(0.9))

    return model


@pytest.mark.parametrize(("prior", "of_one"), PRIORS.values(), ids=PRIORS)
def test_the_density_at_zero_is_all_that_it_takes(prior, of_one):
    expected = of_one.log_prob(ZERO) - dist.Normal(LOC, SCALE).log_prob(ZERO)
    guide()
    result = bmr.reduce(guide, model=model_of(prior))
    torch.testing.assert_close(result.scores["w"], expected, rtol=0, atol=1e-5)
    assert result.masks["w"].tolist() == (expected > 0).tolist()


def test_a_mixture_in_a_plate_and_in_sub_sampled_rows():
    def model():
        with pyro.plate("rows", 3, subsample_size=2):
            pyro.sample("w", NORMALS)

    def own():
        scale = pyro.param("scale", SCALE, constraint=constraints.positive)
        with pyro.plate("rows", 3):
            pyro.sample("w", dist.Normal(pyro.param("loc", LOC), scale))

    def whole():
        with pyro.plate("rows", 3):
            pyro.sample("w", NORMALS)

    own()
    expected = NORMALS.log_prob(ZERO) - dist.Normal(LOC, SCALE).log_prob(ZERO)
    for program in (model, whole):
        result = bmr.reduce(own, model=program)
        torch.testing.assert_close(result.scores["w"], expected, rtol=0, atol=1e-5)


def test_a_mixture_goes_all_the_way(tmp_path):
    model = model_of(NORMALS.expand([3]).to_event(1))
    bmr.fit(model, guide, num_epochs=5)
    result = bmr.reduce(guide, model=model)
    data = result.to_arviz(num_samples=20)
    assert list(data["unconstrained_posterior"].data_vars) == ["w"]
    assert result.audit(num_samples=10).total.predicted == pytest.approx(result.delta_f)
    result.save(tmp_path / "result.bmr")
    again = bmr.load(tmp_path / "result.bmr", model)
    assert torch.equal(again.masks["w"], result.masks["w"])
    assert again.delta_f == result.delta_f


def test_posterior_samples_under_a_mixture():
    draws = {"w": LOC + SCALE * torch.randn(4000, 3)}
    with pytest.warns(UserWarning, match="moment"):
        result = bmr.reduce(draws, model=model_of(NORMALS.expand([3]).to_event(1)))
    expected = NORMALS.log_prob(ZERO) - dist.Normal(LOC, SCALE).log_prob(ZERO)
    assert result.masks["w"].tolist() == (expected > 0).tolist()


def test_a_mixture_of_vectors_stays_whole():
    components = dist.Normal(torch.zeros(2, 3), WIDTHS[:, None]).to_event(1)
    guide()
    with pytest.warns(UserWarning, match="a mixture of vectors"):
        assert not bmr.reduce(guide, model=model_of(mixture(components))).masks
