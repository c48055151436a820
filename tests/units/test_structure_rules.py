"""Rules of single operations: what they join, protect and read."""

import warnings

import pytest
import torch
from networks import _normal
from test_structure import IMAGE, X, layers, structure_of
from torch.nn import functional as F


def around(operation):
    """Put an operation between two layers."""
    return lambda x: operation(x @ _normal("w1", 5, 7)) @ _normal("w2", 7, 2)


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("cumsum", lambda h: h.cumsum(-1)),
        ("sort", lambda h: h.sort(-1)[0]),
        ("_linalg_solve_ex", lambda h: torch.linalg.solve(torch.eye(4), h)),
        ("flip", lambda h: h.flip(-1)),
    ],
)
def test_unknown_operations_protect_and_name_themselves(name, operation):
    with pytest.warns(UserWarning, match=rf"aten\.{name}.*w1, w2"):
        structure = structure_of(
            lambda x: operation(x @ _normal("w1", 5, 7)) @ _normal("w2", 7, 2), X
        )
    assert (structure.sites["w1"][1].units == -1).all()
    assert (structure.sites["w2"][0].units == -1).all()
    assert name in structure.protected["w1"]
    assert layers(structure) == [("w1", "input", 5)]


@pytest.mark.parametrize(
    ("reason", "operation"),
    [
        ("mean", lambda h: h.mean(-1, keepdim=True) + h),
        ("softmax", lambda h: h.softmax(-1)),
        ("norm", lambda h: F.layer_norm(h, (7,))),
        ("amax", lambda h: h - h.amax(-1, keepdim=True)),
        ("one index", lambda h: h[:, 2:3] + h[:, 3].unsqueeze(-1) * h),
        ("looked up", lambda h: h[:, torch.tensor([0, 2, 4, 6, 1, 3, 5])]),
        ("constant", lambda h: h * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])),
        ("constant", lambda h: h * torch.arange(7)),
        ("constant", lambda h: h @ torch.eye(7)),
        ("padded", lambda h: F.pad(h, (0, 2))[:, :7]),
    ],
)
def test_what_needs_an_axis_whole_protects_it(reason, operation):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        structure = structure_of(
            lambda x: operation(x @ _normal("w1", 5, 7)) @ _normal("w2", 7, 2), X
        )
    assert (structure.sites["w1"][1].units == -1).all()
    assert reason in structure.protected["w1"]


def read_pixels(image):
    return F.conv2d(image.relu(), _normal("v", 2, 6, 1, 1))


def lay_out_patches(image):
    return image.view(2, 3, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 12)


CASES = {
    # A tied weight is produced in one role and read in the other.
    "tied": (
        lambda x: (x @ (w := _normal("w", 5, 7))).tanh() @ w.T,
        (X,),
        {"w": ([-1] * 5, [*range(7)])},
        {"w": (False, False)},
    ),
    "low rank": (
        lambda x: (x @ (_normal("a", 5, 3) @ _normal("b", 3, 7))).tanh() @ _normal("out", 7, 2),
        (X,),
        {"a": ([*range(5)], [5, 6, 7]), "b": ([5, 6, 7], [*range(8, 15)])},
        {"a": (True, False), "b": (True, False)},
    ),
    "laid out inputs": (
        lambda x: (x * _normal("w", 5)).sum(-1),
        (X,),
        {"w": ([*range(5)],)},
        {"w": (True,)},
    ),
    "depthwise": (
        lambda x: F.conv2d(
            F.conv2d(x, _normal("w", 6, 1, 3, 3), groups=3), _normal("v", 2, 6, 1, 1)
        ),
        (IMAGE,),
        {"w": ([0, 0, 1, 1, 2, 2], [-1], [-1] * 3, [-1] * 3)},
        {"w": (False,) * 4, "v": (False, True, False, False)},
    ),
    "transposed": (
        lambda x: read_pixels(F.conv_transpose2d(x, _normal("w", 3, 6, 2, 2), stride=2)),
        (IMAGE,),
        {"w": ([0, 1, 2], [3, 4, 5, 6, 7, 8], [-1] * 2, [-1] * 2)},
        {"w": (True, False, False, False)},
    ),
    "patches": (
        lambda x: (F.unfold(x, 2, stride=2).transpose(1, 2) @ _normal("w", 12, 7)).sum(1),
        (IMAGE,),
        {"w": ([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2], [-1] * 7)},
        {"w": (True, False)},
    ),
    "patches by views": (
        lambda x: (lay_out_patches(x) @ _normal("w", 12, 7)).sum(1),
        (IMAGE,),
        {"w": ([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2], [-1] * 7)},
        {"w": (True, False)},
    ),
    "pixels": (
        lambda x: x.flatten(1) @ _normal("w", 192, 7),
        (IMAGE,),
        {"w": ([*range(192)], [-1] * 7)},
        {"w": (True, False)},
    ),
    "heads in einsum": (
        lambda x: torch.einsum(
            "bhd,hde->be",
            torch.einsum("bi,hdi->bhd", x, _normal("w", 3, 7, 5)),
            _normal("v", 3, 7, 2),
        ),
        (X,),
        {"w": ([0, 1, 2], [-1] * 7, [3, 4, 5, 6, 7]), "v": ([0, 1, 2], [-1] * 7, [-1, -1])},
        {"w": (False, False, True), "v": (True, True, False)},
    ),
    "halves": (
        lambda x: F.glu(x @ _normal("w", 5, 14)) @ _normal("v", 7, 2),
        (X,),
        {"w": ([*range(5)], [*range(5, 12)] * 2)},
        {"w": (True, False)},
    ),
    "larger images": (
        lambda x: read_pixels(F.interpolate(F.conv2d(x, _normal("w", 6, 3, 1, 1)), scale_factor=2)),
        (IMAGE,),
        {"w": ([*range(6)], [6, 7, 8], [-1], [-1])},
        {"w": (False, True, False, False)},
    ),
    "gates beside": (
        lambda x: (
            (lambda g: g[:, 0].sigmoid() * g[:, 1].tanh())((x @ _normal("w", 5, 14)).view(4, 2, 7))
            @ _normal("v", 7, 2)
        ),
        (X,),
        {"w": ([*range(5)], [*range(5, 12)] * 2)},
        {"v": (True, False)},
    ),
    "side by side": (
        lambda x: (
            torch.cat([x @ _normal("a", 5, 2), x @ _normal("b", 5, 3)], -1) @ _normal("v", 5, 2)
        ),
        (X,),
        {"v": ([5, 6, 7, 8, 9], [-1, -1])},
        {"v": (True, False)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_by_hand(case):
    run, args, units, reads = CASES[case]
    structure = structure_of(run, *args)
    for name, expected in units.items():
        assert [axis.units.tolist() for axis in structure.sites[name]] == list(map(list, expected))
    for name, expected in reads.items():
        assert tuple(axis.reads for axis in structure.sites[name]) == expected
