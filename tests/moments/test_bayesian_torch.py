"""Mean-field layers of bayesian-torch, against draws of their own forward passes."""

import numpy as np
import pytest
import torch
from snippets import run_snippet

import pyro_bmr as bmr

layers = pytest.importorskip("bayesian_torch.layers", reason="reads layers of bayesian-torch")
from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss  # noqa: E402


def network():
    torch.manual_seed(0)
    options = {"prior_mean": 0.5, "prior_variance": 2.0, "posterior_rho_init": -1.0}
    return torch.nn.Sequential(
        layers.Conv1dReparameterization(2, 3, 2, **options),
        layers.LinearReparameterization(4, 2, bias=False, **options),
        torch.nn.Linear(2, 1),
        layers.LinearFlipout(2, 2, **options),
    )


def test_layers_and_their_divergence():
    module = network()
    posterior = bmr.Posterior.from_bayesian_torch(module, free_energy=1.5)
    shapes = {name: tuple(shape) for name, shape in posterior.layout.shapes.items()}
    assert shapes == {
        "0.weight": (3, 2, 2),
        "0.bias": (3,),
        "1.weight": (2, 4),
        "3.weight": (2, 2),
        "3.bias": (2,),
    }
    means = posterior.layout.split(posterior.mean)
    assert (means["0.weight"] == module[0].mu_kernel.detach()).all()
    scales = posterior.layout.split(posterior.covariance.diagonal().sqrt())
    expected = np.log1p(np.exp(module[1].rho_weight.detach().double().numpy()))
    np.testing.assert_allclose(scales["1.weight"], expected, rtol=1e-12)
    assert posterior.prior_mean.tolist() == [0.5] * posterior.layout.size
    assert posterior.prior_covariance.diagonal().tolist() == [4.0] * posterior.layout.size
    assert posterior.free_energy == 1.5

    # The library's divergence is a sum, over weights and biases, of means over their elements.
    q = torch.distributions.Normal(posterior.mean, posterior.covariance.diagonal().sqrt())
    p = torch.distributions.Normal(
        posterior.prior_mean, posterior.prior_covariance.diagonal().sqrt()
    )
    parts = posterior.layout.split(torch.distributions.kl_divergence(q, p))
    divergence = sum(part.mean() for part in parts.values())
    assert float(divergence) == pytest.approx(get_kl_loss(module).item(), rel=1e-5)


def test_the_spread_of_forward_passes():
    module = network()[1]
    posterior = bmr.Posterior.from_bayesian_torch(module)
    assert posterior.names[0] == "weight[0,0]"
    one = torch.eye(4)[1]
    with torch.no_grad():
        outputs = torch.stack([module(one, return_kl=False) for _ in range(4000)])
    column = posterior.layout.split(posterior.covariance.diagonal().sqrt())["weight"][:, 1]
    np.testing.assert_allclose(outputs.std(0), column, rtol=0.06)


def test_a_network_that_was_made_bayesian():
    torch.manual_seed(0)
    module = torch.nn.ModuleDict({"hidden": torch.nn.Linear(3, 2), "lstm": torch.nn.LSTM(2, 2)})
    options = {"prior_mu": 0.0, "prior_sigma": 0.3, "posterior_mu_init": 0.0}
    options |= {"posterior_rho_init": -3.0, "type": "Reparameterization", "moped_enable": False}
    dnn_to_bnn(module, options)
    posterior = bmr.Posterior.from_bayesian_torch(module)
    assert list(posterior.layout.shapes) == [
        "hidden.weight",
        "hidden.bias",
        *(f"lstm.{side}.{part}" for side in ("ih", "hh") for part in ("weight", "bias")),
    ]
    np.testing.assert_allclose(posterior.prior_covariance.diagonal(), 0.09, rtol=1e-6)


def test_what_holds_no_such_layers():
    with pytest.raises(ValueError, match="a Linear without mean-field layers"):
        bmr.Posterior.from_bayesian_torch(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="module=3"):
        bmr.Posterior.from_bayesian_torch(3)


def test_the_snippet_of_the_documentation():
    posterior = run_snippet("bayesian_torch")["posterior"]
    assert list(posterior.layout.shapes) == ["0.weight", "0.bias", "2.weight", "2.bias"]
