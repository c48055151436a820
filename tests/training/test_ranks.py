"""Processes that train together do what one does with all rows, and fail together."""

import re
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.nn.functional import softplus

sys.path.insert(0, str(Path(__file__).parent))
import ranks as program
from started_ranks import start_ranks

import pyro_bmr as bmr
from pyro_bmr.programs.fingerprints import fingerprint_rows
from pyro_bmr.programs.ranks import Ranks

SIZES = [1, 2, 4]

pytestmark = pytest.mark.skipif(
    not distributed.is_gloo_available(), reason="this build of torch has no gloo"
)


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    return start_ranks(tmp_path_factory.mktemp("ranks"), "1", "2", "4", "killed")


def flatten(parameters):
    return torch.tensor([value for name in sorted(parameters) for value in parameters[name]])


@pytest.mark.parametrize(
    ("size", "steps"),
    [*product(SIZES, ["compiled", "eager"]), *product(SIZES[:2], ["scaled"])],
)
def test_with_the_same_noise_any_number_does_what_one_does(of_ranks, steps, size):
    (one,) = of_ranks["1"]
    losses, parameters = one["same_noise"][steps]
    for rank in of_ranks[str(size)]:
        own_losses, own = rank["same_noise"][steps]
        torch.testing.assert_close(flatten(own), flatten(parameters), atol=1e-6, rtol=1e-6)
        assert own_losses == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    ("size", "how", "within"),
    [
        *product(SIZES, ["whole"], [0.02]),
        *product(SIZES, ["noise"], [0.15]),
        *product(SIZES[:2], ["batches"], [0.1]),
    ],
)
def test_scales_are_those_of_exact_regression(of_ranks, how, within, size):
    """A likelihood that counted wrongly would be off by the root of the number of ranks."""
    x, y = program.make_data()
    precision = 1 / program.PRIOR**2 + x.square().sum(0) / program.NOISE**2
    scale, mean = precision.rsqrt(), (x.T @ y) / program.NOISE**2 / precision
    found = {
        name.split(".")[0]: torch.tensor(v)
        for name, v in of_ranks[str(size)][0]["exact"][how].items()
    }
    torch.testing.assert_close(softplus(found["scales"]), scale, rtol=within, atol=0)
    assert ((found["locs"] - mean).abs() < 3 * within * scale.clamp(min=0.1)).all()


@pytest.mark.parametrize("size", SIZES)
def test_ranks_are_the_same_to_the_last_bit(of_ranks, size):
    first, *others = of_ranks[str(size)]
    for other in others:
        assert other["exact"] == first["exact"]
        assert other["same_noise"] == first["same_noise"]


ERRORS = {
    "other rows": ("ValueError", "rank 0 of 2: .*of another run"),
    "one checkpoint": ("RuntimeError", "different options, checkpoint: False and True"),
    "NaN": ("ValueError", "rank 1 of 2: got 1 NaN or inf in argument 1"),
    "model": ("KeyError", "rank 1 of 2: 'no such row'"),
    "callback": ("OSError", "rank 1 of 2: disk full"),
    "option": ("ValueError", "rank 1 of 2: got lr=-1.0"),
    "other options": ("RuntimeError", "ranks 0 and 1 have different options, num_epochs: 3 and 4"),
    "other parameters": ("RuntimeError", "ranks 0 and 1 have different parameters"),
    "blown up": ("FloatingPointError", "blew up"),
    "no compiler": (None, "without compiling.*rank 1 of 2: the compiler is missing"),
    "a plate of the rank": ("ValueError", "rank 0 of 2: at 'y'.*to 26 rows.*Expected the 48"),
    "data of a closure": ("ValueError", "ranks 0 and 1 have different models.*'y'"),
    "other priors": ("ValueError", "ranks 0 and 1 have different models.*'w'"),
    "a mean of rows": ("ValueError", "rank 0 of 2: at 'y' the log density of 8 rows"),
    "a bound": ("TypeError", "got estimator=RenyiELBO and a mesh"),
    "one changes": (None, "without compiling.*Does the program change between steps"),
    "one fails": ("KeyError", "rank 1 of 2: 'no such row'"),
    "one row": ("ValueError", r"got \[1, 1\] rows in the ranks"),
    "a large batch": ("ValueError", "got batch_size=49. Expected 48 at most"),
    "a loader": ("TypeError", "Expected tensors of the rows of this rank"),
    "no mesh": (None, "one of 2 processes, and trains by itself"),
    "after all": (None, ""),
}


@pytest.mark.parametrize("what", ERRORS)
def test_an_error_of_one_rank_is_that_of_all(of_ranks, what):
    """In time, and the ranks can train after it."""
    kind, message = ERRORS[what]
    for rank in of_ranks["2"]:
        found, text, seconds = rank["errors"][what]
        assert found == kind
        assert re.search(message, text)
        assert kind is None or seconds < 10


def test_a_killed_rank_is_started_again_and_all_go_on(of_ranks):
    for before, after in zip(of_ranks["2"], of_ranks["killed"], strict=True):
        assert after["killed"].pop("began") > 5
        assert before["unhurt"].pop("began") == 0
        assert after["killed"] == before["unhurt"]


def test_other_ranks_go_on_from_a_checkpoint(of_ranks):
    """Of two ranks, which four find."""
    for rank in of_ranks["4"]:
        assert rank["unhurt"]["began"] is None
        assert rank["unhurt"]["parameters"] == of_ranks["2"][0]["unhurt"]["parameters"]


def test_rows_are_told_from_others_in_any_order():
    x, y = program.make_data()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    whole = fingerprint_rows([x, y])
    halves = [
        fingerprint_rows([x[order[part]], y[order[part]]]) for part in (slice(9), slice(9, 48))
    ]
    assert sum(halves) % 2**64 == whole
    others = [x, y[order]], [x[order], y], [x, -y], [x[1:], y[1:]], [y, x], [x, y.double()]
    assert whole not in {fingerprint_rows(other) for other in others}


def test_signs_of_rows_that_cancel_in_a_sum_are_told():
    """Of the last column, whose sign is the first bit of a word; half of them up, half down."""
    for seed in range(40):
        rows = torch.randn(48, 2, generator=torch.Generator().manual_seed(seed))
        other = rows * torch.tensor([1.0, -1.0])
        assert fingerprint_rows([rows]) != fingerprint_rows([other]), seed


def test_seeds():
    own, same = (
        [Ranks(rank=rank, size=2, noise=noise).draw_seeds() for rank in range(2)]
        for noise in ("own", "same")
    )
    assert own[0][0] != own[1][0]
    assert own[0][1] != own[1][1]
    assert same[0][0] != same[1][0]
    assert same[0][1] == same[1][1]


@pytest.mark.parametrize(
    ("mesh", "noise", "error"), [(3, "own", TypeError), (None, "no", ValueError)]
)
def test_what_is_no_mesh(mesh, noise, error):
    with pytest.raises(error, match="got (mesh=3|noise='no')"):
        bmr.fit(program.model, program.model, num_epochs=1, mesh=mesh, noise=noise)
