"""Processes that measure, reduce and prune together do what one does with all rows."""

import re
import sys
from math import log, pi
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributions import Normal, kl_divergence

sys.path.insert(0, str(Path(__file__).parent))
import measured_ranks as program
import ranks
from started_ranks import start_ranks

import pyro_bmr as bmr

LAUNCHES = "measured 1", "measured 2", "measured 4", "measured, killed"

pytestmark = pytest.mark.skipif(
    not distributed.is_gloo_available(), reason="this build of torch has no gloo"
)


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    return start_ranks(tmp_path_factory.mktemp("ranks"), *LAUNCHES)


def free_energy(kept):
    """F of the posterior of the tests in nats, exactly, with some of its elements at zero."""
    x, y = (data.double() for data in ranks.make_data())
    loc = torch.tensor(program.LOCS, dtype=torch.float64)[kept]
    scale = torch.full_like(loc, program.SCALE)
    x = x[:, kept]
    squares = (y - x @ loc).square().sum() + (x.square().sum(0) * scale.square()).sum()
    misfit = (squares / ranks.NOISE**2 + len(y) * log(2 * pi * ranks.NOISE**2)) / 2
    divergence = kl_divergence(Normal(loc, scale), Normal(torch.zeros_like(loc), ranks.PRIOR))
    return float(misfit + divergence.sum())


@pytest.mark.parametrize("how", ["in parts", "plate of all"])
def test_free_energy_is_that_of_all_rows(of_ranks, how):
    """Also where a sub-sampling plate says how many there are, of ranks with unequal numbers."""
    mean, error = of_ranks["measured 2"][0]["measuring"][how]
    assert abs(mean - free_energy([0, 1, 2])) < 4 * error


def test_the_same_draws_give_what_one_process_finds(of_ranks):
    one, two = (of_ranks[one][0]["measuring"]["joint"] for one in LAUNCHES[:2])
    assert two == pytest.approx(one, rel=1e-5)


def test_one_process_drops_the_same(of_ranks):
    x, y = ranks.make_data()
    alone = bmr.reduce(program.make_guide(x, y), x, y)
    found = of_ranks["measured 2"][0]["measuring"]["reduced"]
    assert found["masks"] == alone.masks["w"].tolist()
    assert found["realised"][1] < 2 * alone.realised_error


@pytest.mark.parametrize("how", ["reduced", "reduced in parts"])
def test_what_goes_is_worth_what_exact_regression_says(of_ranks, how):
    found = of_ranks["measured 2"][0]["measuring"][how]
    assert not all(found["masks"])
    kept = [i for i, one in enumerate(found["masks"]) if one]
    mean, error = found["realised"]
    assert abs(mean - (free_energy(kept) - free_energy([0, 1, 2]))) < 4 * error


def test_ranks_end_with_the_same_to_the_last_bit(of_ranks):
    for scenario in ("measuring", "pruned"):
        first, second = (rank[scenario] for rank in of_ranks["measured 2"])
        assert first == second


def test_rounds_go_on_as_if_no_rank_had_been_killed(of_ranks):
    for before, after in zip(of_ranks["measured 2"], of_ranks["measured, killed"], strict=True):
        unhurt, killed = dict(before["pruned"]), dict(after["pruned_killed"])
        assert unhurt.pop("began") == 0
        assert killed.pop("began") == 2
        assert killed == unhurt
    rounds = of_ranks["measured 2"][0]["pruned"]["rounds"]
    assert rounds[1][1] > 0 and rounds[1][2]


def test_other_ranks_go_on_pruning(of_ranks):
    """Of two ranks, which four find after the first round."""
    two, four = (of_ranks[one][0]["pruned"] for one in LAUNCHES[1:3])
    assert four["began"] == 2
    assert four["rounds"][:2] == two["rounds"][:2]
    assert four["masks"] == two["masks"]


ERRORS = {
    "NaN": ("ValueError", "rank 1 of 2: the free energy of the guide is NaN"),
    "model": ("KeyError", "rank 1 of 2: 'no such row'"),
    "other posteriors": ("RuntimeError", "different draws or densities of .*'w' of the guide"),
    "a prior of rows": ("ValueError", "prior of the latent site 'w' depends on the rows"),
    "latent rows": ("ValueError", "the latent site 'z' has a row for each observation"),
    "a selection": ("KeyError", "rank 1 of 2: 'no such mask'"),
    "other masks": ("RuntimeError", r"ranks 0 and 1 have different masks of \['w'\]"),
    "one row": ("ValueError", r"got \[2, 1\] rows in the ranks"),
    "a loader": ("TypeError", "Expected tensors of the rows of this rank"),
    "an estimator": ("ValueError", "got a mesh and an estimator. Expected one of them"),
    "a loss": ("TypeError", "got estimator=RenyiELBO and a mesh"),
    "a callback": ("OSError", "rank 1 of 2: disk full"),
    "a checkpoint": ("IsADirectoryError", "rank 0 of 2: .* is a folder"),
    "no mesh": (None, "one of 2 processes, and measures by itself"),
    "after all": (None, ""),
}


@pytest.mark.parametrize("what", ERRORS)
def test_an_error_of_one_rank_is_that_of_all(of_ranks, what):
    kind, message = ERRORS[what]
    for rank in of_ranks["measured 2"]:
        found, text, seconds = rank["measuring_errors"][what]
        assert found == kind
        assert re.search(message, text)
        assert kind is None or seconds < 10
