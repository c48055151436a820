"""The laws of a reduction, for random models with random guides.

Ten by default; the environment variable FUZZ says how many times as many: `make fuzz` tries 560,
of which Pyro refuses one in ten.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from typing import Any

import pyro
import pytest
import test_laws
import torch
from often import often
from pyro import poutine
from random_models import RandomModel, make
from test_laws import latent_values

import pyro_bmr as bmr
from pyro_bmr.testing import check_guide_family

COUNT = max(1, round(10 * float(os.environ.get("FUZZ", "1"))))
START = 10_000 * int(os.environ.get("FUZZ_SEED", "0"))
# Guides that are run to be read, and that would draw the targets if there were none.
RUN_WITH_TARGETS = ["AutoNormalMessenger"]


@pytest.mark.parametrize("number", often(range(START, START + COUNT), *range(START, START + 5)))
def test_the_laws_hold(number, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            one = make(number)
        except Exception as error:
            if "pyro_bmr" in _last_file(error):
                raise
            pytest.skip(f"Pyro refuses it: {type(error).__name__}: {error}"[:200])
        check_laws(one, tmp_path)


def check_laws(one: RandomModel, folder: Any) -> None:
    told: dict[str, Any] = {"model": one.model}
    before = everything(one)
    try:
        result = bmr.reduce(one.guide, *one.args, **told, select=drop_some)
    except (TypeError, ValueError, RuntimeError) as error:
        assert "Expected" in str(error), f"{one}: {error}"
        assert one.guide_kind != "AutoNormal" or "finite" in str(error), f"{one}: {error}"
        return
    check_composition(one, told)
    check_measured(one, told)
    unchanged(one, before)
    check_zero(one, result)
    check_copies(one, result, folder)
    check_training(one, result)
    loss = one.elbo.loss(result.model, result.guide, *one.args)
    assert math.isfinite(loss), f"{one}: {loss}"
    with torch.no_grad():
        check_guide_family(one.guide, *one.args, model=one.model, num_samples=60)


def everything(one: RandomModel) -> dict[str, torch.Tensor]:
    state = dict(pyro.get_param_store().items())
    if isinstance(one.guide, torch.nn.Module):
        state |= one.guide.state_dict()
    state["generator"] = torch.get_rng_state()
    return {name: value.detach().clone() for name, value in state.items()}


def unchanged(one: RandomModel, before: dict[str, torch.Tensor]) -> None:
    """Law 5."""
    after = everything(one)
    assert after.keys() == before.keys(), f"{one}: {after.keys() ^ before.keys()}"
    for name, value in before.items():
        assert torch.equal(after[name], value), f"{one}: {name}"


def run(program: Any, *args: Any) -> Any:
    """Trace a program, whose parameters the param store of Pyro forgets."""
    with torch.no_grad(), pyro.get_param_store().scope(pyro.get_param_store().get_state()):
        return poutine.trace(program).get_trace(*args)


def check_zero(one: RandomModel, result: bmr.Reduction) -> None:
    """Laws 1 and 2: names and shapes stay, what is pruned is zero and adds nothing."""
    full = latent_values(run(one.guide, *one.args))
    trace = run(result.guide, *one.args)
    reduced = latent_values(trace)
    shapes = {name: value.shape for name, value in reduced.items()}
    for name, mask in result.masks.items():
        assert shapes[name] == full[name].shape, f"{one}: {name}"
        mask = rows_of(mask, reduced[name], trace, name)
        assert (reduced[name].masked_select(~mask) == 0).all(), f"{one}: {name}"
    replayed = run(poutine.replay(result.model, trace=trace), *one.args)
    replayed.compute_log_prob()
    trace.compute_log_prob()
    for traced in (trace, replayed):
        assert traced.log_prob_sum().isfinite(), f"{one}"
    assert repr(result)
    assert result._repr_html_()
    prior = latent_values(run(result.model, one.args[0]))
    for name, mask in result.masks.items():
        if mask.shape == prior[name].shape:
            assert (prior[name].masked_select(~mask) == 0).all(), f"{one}: {name} of the prior"


def rows_of(mask: torch.Tensor, value: torch.Tensor, trace: Any, name: str) -> torch.Tensor:
    """Take of a mask what a plate that takes a part of its rows takes."""
    if mask.shape == value.shape:
        return mask
    return mask[trace.nodes["data"]["value"]]


def drop_some(scores: Any) -> Any:
    """Drop some of what can go."""
    masks, delta_f = test_laws.drop_some(scores), scores.delta_f
    return {name: mask | delta_f[name].isinf() for name, mask in masks.items()}


def drop_first(scores: Any) -> Any:
    return {
        name: (torch.arange(t.numel()).reshape(t.shape) != 0) | t.isinf()
        for name, t in scores.delta_f.items()
    }


def drop_both(scores: Any) -> Any:
    some, first = drop_some(scores), drop_first(scores)
    return {name: some[name] & first[name] for name in some}


def check_composition(one: RandomModel, told: dict[str, Any]) -> None:
    """Law 4, as predicted: without targets nothing is measured."""
    args = one.args if one.guide_kind in RUN_WITH_TARGETS else one.args[:1]
    first = bmr.reduce(one.guide, *args, **told, select=drop_first)
    second = bmr.reduce(first.guide, *args, model=one.model, select=drop_some)
    both = bmr.reduce(one.guide, *args, **told, select=drop_both)
    assert second.masks.keys() == both.masks.keys(), f"{one}"
    for name, mask in both.masks.items():
        assert torch.equal(second.masks[name], mask), f"{one}: {name}"
    if not any("in two steps" in str(row.note) for row in both.sites):
        total, scale = first.delta_f + second.delta_f, 1 + abs(first.delta_f) + abs(both.delta_f)
        assert abs(total - both.delta_f) <= 2e-3 * scale, f"{one}: {total} {both.delta_f}"
    medians = second.guide.median(), both.guide.median()
    for name, median in medians[0].items():
        torch.testing.assert_close(median, medians[1][name], rtol=1e-3, atol=1e-4, msg=f"{one}")


def check_measured(one: RandomModel, told: dict[str, Any]) -> None:
    """Law 7: what is measured does not rise, and all that is told is finite."""
    result = bmr.reduce(one.guide, *one.args, **told)
    if result.realised is not None:
        assert result.realised <= 4 * result.realised_error + 1e-6, f"{one}: {result.realised}"
    for name, scores in result.scores.items():
        assert not scores.isnan().any(), f"{one}: {name}"
    assert result.delta_f == result.delta_f, f"{one}"
    assert result.delta_f < float("inf"), f"{one}"


def check_copies(one: RandomModel, result: bmr.Reduction, folder: Any) -> None:
    """Law 6, and files."""
    copied = copy.deepcopy(result)
    for name, value in result.guide.median().items():
        assert torch.equal(copied.guide.median()[name], value), f"{one}: {name}"
    moved = copied.to("cpu")
    moved.guide.load_state_dict(result.guide.state_dict())
    try:
        result.save(folder / "result", *one.args)
    except (TypeError, ValueError) as error:
        assert "Expected" in str(error), f"{one}: {error}"
        return
    own = one.guide if any(row.note for row in result.sites) else None
    try:
        loaded = bmr.load(folder / "result", one.model, *one.args, guide=own)
    except ValueError as error:
        assert "guide" in str(error), f"{one}: {error}"
        return
    for name, value in result.guide.median().items():
        assert torch.equal(loaded.guide.median()[name], value), f"{one}: {name}"
    for name, mask in result.masks.items():
        assert torch.equal(loaded.masks[name], mask), f"{one}: {name}"


def check_training(one: RandomModel, result: bmr.Reduction) -> None:
    """Law 3."""
    one.train(result.model, result.guide, 5)
    trace = run(result.guide, *one.args)
    draw = latent_values(trace)
    for name, mask in result.masks.items():
        mask = rows_of(mask, draw[name], trace, name)
        assert (draw[name].masked_select(~mask) == 0).all(), f"{one}: {name}"
    assert all(value.isfinite().all() for value in result.guide.median().values()), f"{one}"


def _last_file(error: BaseException) -> str:
    last, files = error.__traceback__, []
    while last is not None:
        files.append(last.tb_frame.f_code.co_filename)
        last = last.tb_next
    return files[-1]
