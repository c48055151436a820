"""Large posteriors go through torch.compile, and give the same numbers without it."""

import pytest
import torch

from pyro_bmr.mathematics import sweep as sweep_module
from pyro_bmr.mathematics.evidence import delta_f_spike, total_dropped
from pyro_bmr.mathematics.gaussian import Diagonal


@pytest.fixture
def fresh_compiler():
    sweep_module._can_compile.cache_clear()
    yield
    sweep_module._can_compile.cache_clear()


def score(monkeypatch, compile_from):
    monkeypatch.setattr(sweep_module, "_COMPILE_FROM", compile_from)
    torch.manual_seed(0)
    q = Diagonal(torch.randn(300, 300), torch.randn(300, 300))
    scores = delta_f_spike(q, torch.tensor(-1.0), torch.nn.functional.softplus)
    return scores, total_dropped(scores, scores > 0)


def test_compiled_and_eager_kernels_agree(monkeypatch, fresh_compiler):
    if not sweep_module._can_compile("cpu"):
        pytest.skip("torch.compile does not work here")
    scores, total = score(monkeypatch, 1 << 20)
    compiled_scores, compiled_total = score(monkeypatch, 1)
    torch.testing.assert_close(compiled_scores, scores, rtol=1e-6, atol=1e-6)
    assert compiled_total == pytest.approx(total, rel=1e-6)


def test_without_a_compiler_it_works_and_says_so_once(monkeypatch, fresh_compiler):
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler")

    scores, total = score(monkeypatch, 1 << 20)
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="torch.compile does not work here.*g\\+\\+") as caught:
        eager_scores, eager_total = score(monkeypatch, 1)
    assert len(caught) == 1
    assert torch.equal(eager_scores, scores)
    assert eager_total == total
