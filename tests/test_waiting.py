"""How often the host waits for an accelerator, and how much it asks of it.

Tensors on a pretended accelerator count what brings a number to the host.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any

import accelerator
import pyro
import pyro.distributions as dist
import pytest
import torch
from accelerator import DEVICE, OnAccelerator, pretended_accelerator
from pyro.infer.autoguide import AutoNormal

import pyro_bmr as bmr
from pyro_bmr.mathematics.elimination import eliminate
from pyro_bmr.mathematics.gaussian import Dense
from pyro_bmr.mathematics.transfers import find_extremes, to_host, to_numbers

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.allclose.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Count:
    def __init__(self):
        self.waits = self.operations = 0

    def __call__(self, func: Any, args: Any, kwargs: Any) -> None:
        if not any(isinstance(one, OnAccelerator) for one in accelerator._leaves(args)):
            return
        self.operations += 1
        by_mask = func in INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1])
        device = kwargs.get("device")
        leaves = func is aten._to_copy.default and device is not None and device.type == "cpu"
        is_read = func is aten.copy_.default and not isinstance(args[0], OnAccelerator)
        self.waits += func in WAITS or by_mask or leaves or is_read


@contextmanager
def counted(monkeypatch):
    count, run = Count(), accelerator._run

    def counting(func: Any, args: Any, kwargs: Any) -> Any:
        count(func, args, kwargs)
        return run(func, args, kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(accelerator, "_run", counting)
        yield count


def count_reduce(monkeypatch, sites: int, width: int) -> Count:
    """Reduce a network of half dead weights, with no dead unit."""
    pyro.clear_param_store()
    generator = torch.Generator(device="cpu").manual_seed(0)
    with pretended_accelerator():
        one = torch.ones((), device=DEVICE)

        def model():
            prior = dist.Normal(0 * one, one).expand([width, 20]).to_event(2)
            total = sum(pyro.sample(f"w{i}", prior).sum() for i in range(sites))
            pyro.sample("y", dist.Normal(total, one), obs=0 * one)

        guide = AutoNormal(model)
        guide()
        for name, parameter in guide.named_parameters():
            noise = torch.rand(parameter.shape, generator=generator)
            start = 2 * noise if "locs" in name else noise - 1
            parameter.data.copy_(start)
        with counted(monkeypatch) as count:
            result = bmr.reduce(guide)
        assert 0.1 < result.sparsity < 0.9
    return count


def test_the_counter_sees_what_waits(monkeypatch):
    with pretended_accelerator(), counted(monkeypatch) as count:
        vector = torch.ones(3, device=DEVICE)
        for look in (
            lambda: float(vector[0]),
            lambda: bool((vector > 0).all()),
            lambda: vector[vector > 0],
            lambda: vector.nonzero(),
            lambda: vector.tolist(),
            lambda: torch.equal(vector, vector),
        ):
            before = count.waits
            look()
            assert count.waits == before + 1
        before = count.waits
        vector[torch.zeros(1, dtype=torch.long, device=DEVICE)].exp_()
        assert count.waits == before


def test_reduce_waits_as_often_for_many_large_sites_as_for_few_small_ones(monkeypatch):
    few, many, large = (count_reduce(monkeypatch, *one) for one in [(2, 20), (6, 20), (2, 8_000)])
    assert few.waits == many.waits == large.waits <= 12
    # A site of 160,000 elements is not worked on in chunks.
    assert few.operations == large.operations
    assert (many.operations - few.operations) / 4 <= 130


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_reduce_takes_one_launch_a_kernel_whatever_the_size():
    def launches(width: int) -> int:
        pyro.clear_param_store()
        one = torch.ones((), device="cuda")

        def model():
            prior = dist.Normal(0 * one, one).expand([width, 1000]).to_event(2)
            pyro.sample("y", dist.Normal(pyro.sample("w", prior).sum(), one), obs=0 * one)

        guide = AutoNormal(model)
        guide()
        bmr.reduce(guide)
        with torch.profiler.profile() as profile:
            bmr.reduce(guide)
        return sum(one.count for one in profile.key_averages() if one.key == "cudaLaunchKernel")

    assert launches(100_000) <= launches(2_000) + 5


@pytest.mark.parametrize("stop", [0.0, math.inf])
def test_elimination_waits_less_and_less(monkeypatch, stop):
    def waits(size: int) -> tuple[int, int]:
        generator = torch.Generator(device="cpu").manual_seed(0)
        root = torch.randn(size, size, generator=generator, dtype=torch.float64)
        covariance = root @ root.mT / size + torch.eye(size, dtype=torch.float64)
        tril = torch.linalg.cholesky(0.2 * covariance)
        loc = 0.3 * torch.randn(size, generator=generator, dtype=torch.float64)
        posterior = Dense(loc.to(DEVICE), tril.to(DEVICE))
        log_prior = torch.full_like(posterior.loc, -0.92)
        with counted(monkeypatch) as count:
            path = eliminate(posterior, log_prior, stop)
        return count.waits, int(path.isfinite().sum())

    with pretended_accelerator():
        (few, first), (many, second) = waits(50), waits(400)
    assert second > 6 * first > 60
    assert many <= few + 14 < second / 4


def test_numbers_of_many_tensors():
    tensors = [torch.tensor(2**53 + 1), torch.tensor(0.1), torch.tensor(True), torch.tensor(7)]
    assert to_numbers(tensors) == [2**53 + 1, tensors[1].item(), True, 7]
    assert to_numbers([]) == [] and find_extremes([]) == []
    low, high = find_extremes([torch.tensor([[1.0, -2.0], [3.0, 0.5]])])[0]
    assert (low, high) == (-2.0, 3.0)
    assert all(map(math.isnan, find_extremes([torch.tensor([1.0, math.nan])])[0]))
    assert [one.shape for one in to_host([torch.ones(1, 1), torch.ones(())])] == [(1, 1), ()]
