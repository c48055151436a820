"""Laplace approximations of laplace-torch, against linear regression and their own draws."""

import numpy as np
import pytest
import torch
from snippets import run_snippet
from torch.utils.data import DataLoader, TensorDataset

import pyro_bmr as bmr

laplace = pytest.importorskip("laplace", reason="reads posteriors of laplace-torch")

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(60, 3, generator=GENERATOR)
Y = torch.sin(X[:, :1]) + 0.1 * torch.randn(60, 1, generator=GENERATOR)
LOADER = DataLoader(TensorDataset(X, Y), batch_size=20)


def network():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))


def fit(module, weights="all", structure="full", **options):
    options = {"prior_precision": 2.0, "sigma_noise": 0.5} | options
    la = laplace.Laplace(
        module, "regression", subset_of_weights=weights, hessian_structure=structure, **options
    )
    la.fit(LOADER)
    return la


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize("weights", ["all", "last_layer"])
def test_structures(weights, structure):
    """Against the covariance of many draws that the library makes of the same posterior."""
    module = network()
    la = fit(module, weights, structure)
    posterior = bmr.Posterior.from_laplace(la, free_energy=-la.log_marginal_likelihood().item())
    named = dict(module.named_parameters())
    held = ["0.weight", "0.bias", "2.weight", "2.bias"][0 if weights == "all" else 2 :]
    assert posterior.layout.shapes == {name: named[name].shape for name in held}
    means = posterior.layout.split(posterior.mean)
    for name in held:
        assert (means[name] == named[name].detach()).all()
    draws = la.sample(20_000, generator=torch.Generator().manual_seed(2)).double().numpy()
    scale = draws.std(0)
    error = (posterior.covariance.numpy() - np.cov(draws.T)) / np.outer(scale, scale)
    assert abs(error).max() < 0.05
    if structure == "diag":
        assert (posterior.covariance == posterior.covariance.diagonal().diag()).all()
    torch.testing.assert_close(
        posterior.prior_covariance, 0.5 * torch.eye(len(scale), dtype=torch.float64)
    )
    assert posterior.free_energy == -la.log_marginal_likelihood().item()


def test_a_linear_model():
    module = torch.nn.Linear(3, 1, bias=False)
    precision = torch.tensor([1.0, 2.0, 4.0])
    posterior = bmr.Posterior.from_laplace(fit(module, prior_precision=precision, prior_mean=0.5))
    exact = np.linalg.inv(np.diag(precision) + (X.T @ X).double().numpy() / 0.25)
    np.testing.assert_allclose(posterior.covariance, exact, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(posterior.prior_covariance, np.diag(1 / precision), rtol=1e-6)
    assert posterior.prior_mean.tolist() == [0.5] * 3
    assert posterior.names == ("weight[0,0]", "weight[0,1]", "weight[0,2]")


def test_a_precision_for_each_layer_and_frozen_weights():
    module = network()
    module[0].bias.requires_grad_(False)
    la = fit(module, structure="kron", prior_precision=torch.tensor([1.0, 4.0, 16.0]))
    posterior = bmr.Posterior.from_laplace(la)
    assert list(posterior.layout.shapes) == ["0.weight", "2.weight", "2.bias"]
    scales = posterior.prior_covariance.diagonal().sqrt().tolist()
    assert scales == [1.0] * 12 + [0.5] * 4 + [0.25]


def test_a_subnetwork():
    places = torch.tensor([16, 0, 5])
    module = network()
    la = fit(module, "subnetwork", subnetwork_indices=places)
    posterior = bmr.Posterior.from_laplace(la)
    assert posterior.names == ("2.weight[0,0]", "0.weight[0,0]", "0.weight[1,2]")
    weights = [module[2].weight[0, 0], module[0].weight[0, 0], module[0].weight[1, 2]]
    assert posterior.mean.tolist() == [weight.item() for weight in weights]
    np.testing.assert_allclose(posterior.covariance, la.posterior_covariance, rtol=1e-4, atol=1e-6)


class OfLowRank:
    """What `laplace.LowRankLaplace` holds; it needs a package that pip does not have."""

    def __init__(self, module):
        self.model, self.params, self.n_data = module, list(module.parameters()), 9
        self.mean = torch.nn.utils.parameters_to_vector(self.params).detach()
        self.prior_mean, self.prior_precision_diag = torch.zeros(()), torch.full((3,), 2.0)
        self.backend = None

    @property
    def posterior_precision(self):
        vectors = torch.linalg.qr(torch.arange(6.0).reshape(3, 2) + 1).Q
        return (vectors, torch.tensor([3.0, 5.0])), self.prior_precision_diag


def test_a_precision_of_low_rank():
    la = OfLowRank(torch.nn.Linear(3, 1, bias=False))
    posterior = bmr.Posterior.from_laplace(la)
    values = np.sort(1 / np.linalg.eigvalsh(posterior.covariance))
    np.testing.assert_allclose(values, [2.0, 5.0, 7.0], rtol=1e-5)


def test_what_is_no_fitted_approximation():
    module = network()
    unfitted = laplace.Laplace(module, "regression", hessian_structure="full")
    with pytest.raises(ValueError, match="seen no data"):
        bmr.Posterior.from_laplace(unfitted)
    with pytest.raises(TypeError, match="a Laplace approximation of weights"):
        bmr.Posterior.from_laplace(module)
    la = fit(module)
    la.prior_precision = torch.zeros(1)
    with pytest.raises(ValueError, match="a prior precision that is not positive"):
        bmr.Posterior.from_laplace(la)


def test_the_snippet_of_the_documentation():
    posterior = run_snippet("laplace")["posterior"]
    assert list(posterior.layout.shapes) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert posterior.free_energy > 0
