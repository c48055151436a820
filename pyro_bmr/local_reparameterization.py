r"""Local reparameterisation: pre-activations are drawn instead of weights.

Where a weight with posterior :math:`N(\mu, \sigma^2)` enters a linear function of the data,
:math:`a = x W`, every row of :math:`a` is drawn by itself,

.. math:: a \sim N(x \mu,\; x^2 \sigma^2)

(Kingma, Salimans & Welling 2015, arXiv:1506.02557, eq. 6). Each row has the distribution that it
has when weights are drawn, and rows no longer share their noise, so that the expected log
likelihood of independent rows is the same and its gradients vary less. The positions of a
convolution are drawn one by one as well, as in the paper, which neglects that they share weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name
from typing_extensions import override

from pyro_bmr.posteriors import SitePosterior


class LocalWeight(Tensor):
    """A draw of a weight, in whose place linear functions draw their result.

    Anything else sees the draw itself. What happened to it is noted in ``uses``.

    Parameters
    ----------
    draw : Tensor
        The value.
    loc, variance : Tensor
        Posterior mean and variance, of the same shape.
    uses : list of str
        Is appended ``"rows"`` where each row was drawn by itself, ``"positions"`` where each
        position of a convolution was, and else the name of the function that took the draw.
    rows : collection of int, optional
        Numbers of observations; what is not one row an observation is not replaced. None takes
        that for granted.

    Examples
    --------
    >>> uses = []
    >>> w = LocalWeight(torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 2), uses)
    >>> torch.nn.functional.linear(torch.ones(3, 2), w).tolist(), uses
    ([[2.0], [2.0], [2.0]], ['rows'])
    """

    loc: Tensor
    variance: Tensor
    uses: list[str]
    rows: Collection[int] | None

    @staticmethod
    @override
    def __new__(
        cls,
        draw: Tensor,
        loc: Tensor,
        variance: Tensor,
        uses: list[str],
        rows: Collection[int] | None = None,
    ) -> LocalWeight:
        weight: LocalWeight = draw.as_subclass(cls)
        weight.loc, weight.variance, weight.uses, weight.rows = loc, variance, uses, rows
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Draw the result of a linear function, or pass the draw on."""
        kwargs = kwargs or {}
        name = resolve_name(func).removesuffix(".__get__").rpartition(".")[2].strip("_")
        with torch._C.DisableTorchFunctionSubclass():
            if name in _PROPERTIES:
                return func(*args, **kwargs)
            kept = _keep_elements(func, name, args, kwargs)
            if kept is not None:
                return kept
            drawn = _draw_result(func, name, args, kwargs)
            use = "positions" if name in _CONVOLUTIONS else "rows"
            for weight in _weights((*args, *kwargs.values())):
                weight.uses.append(name if drawn is None else use)
            return func(*args, **kwargs) if drawn is None else drawn


def local_weights(
    posteriors: Mapping[str, SitePosterior], rows: Collection[int] | None = None
) -> dict[str, LocalWeight]:
    """Wrap the draws of all sites that have independent normal elements.

    Parameters
    ----------
    posteriors : mapping
        By site.
    rows : collection of int, optional
        See `LocalWeight`.

    Returns
    -------
    dict of LocalWeight
        By site.

    Examples
    --------
    >>> from pyro.distributions import Normal
    >>> draw = torch.zeros(2)
    >>> weights = local_weights({"w": SitePosterior(Normal(draw, 1.0), draw, ())})
    >>> weights["w"].variance
    tensor([1., 1.])
    """
    return {
        name: LocalWeight(
            posterior.draw, posterior.normal.mean, posterior.normal.variance, [], rows
        )
        for name, posterior in posteriors.items()
        if posterior.normal is not None
    }


_PROPERTIES = {
    *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_sparse"),
    *(
        "dim",
        "size",
        "numel",
        "len",
        "element_size",
        "is_floating_point",
        "is_contiguous",
        "stride",
    ),
    *("is_complex", "type", "is_leaf", "grad_fn", "names", "is_nested", "is_quantized"),
}
_VIEWS = {
    *("t", "T", "mT", "transpose", "permute", "movedim", "swapaxes", "reshape", "view", "flatten"),
    *("unflatten", "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to", "getitem"),
    *("contiguous", "clone", "narrow", "select", "view_as", "reshape_as"),
}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
_LAYERS = {"linear", *_CONVOLUTIONS}
_PRODUCTS = {"matmul", "rmatmul", "mm", "bmm", "mv", "einsum", "mul", "rmul"}
_SUMS = {"add", "radd", "sub", "rsub"}
_SCALINGS = {"mul", "rmul", "div", "truediv"}


def _weights(tree: Any) -> Iterator[LocalWeight]:
    if isinstance(tree, LocalWeight):
        yield tree
    elif isinstance(tree, tuple | list):
        for branch in tree:
            yield from _weights(branch)


def _map(tree: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(tree, tuple | list):
        return type(tree)(_map(branch, change) for branch in tree)
    return change(tree)


def _keep_elements(func: Any, name: str, args: Any, kwargs: Any) -> LocalWeight | None:
    """Apply a function that moves, masks or rescales elements, if it is one."""
    weights = list(_weights(args))
    if len(weights) != 1:
        return None
    weight, count = weights[0], 1
    if name in _SCALINGS and all(isinstance(a, int | float | LocalWeight) for a in args):
        count = 2  # the variance scales by the square
    elif name == "where":
        if not (len(args) == 3 and args[1] is weight and args[2] in (0, 0.0)):
            return None
    elif not (name in _VIEWS and args[0] is weight):
        return None

    def apply(part: Tensor) -> Tensor:
        return func(*_map(args, lambda a: part if a is weight else a), **kwargs)

    variance = apply(weight.variance)
    variance = apply(variance) if count == 2 else variance
    return LocalWeight(
        apply(weight.as_subclass(Tensor)), apply(weight.loc), variance, weight.uses, weight.rows
    )


def _one_row_each(name: str, weight: LocalWeight, operands: Any, first: Any) -> bool:
    """Tell whether every row of the result is of another observation, and takes a weight once.

    Otherwise what two elements of the result share would be lost.

    Returns
    -------
    bool
        False if the weight has to be drawn as a whole.
    """
    if weight.rows is None:
        return True
    if name in _CONVOLUTIONS:
        return len(first) in weight.rows
    if name == "linear":
        return first.dim() == 2 and len(first) in weight.rows
    others = [operand for operand in operands if operand is not weight]
    if len(others) != 1 or not isinstance(others[0], Tensor):
        return False
    if name in _PRODUCTS - {"mul", "rmul"}:
        return others[0].dim() == 2 and bool(set(others[0].shape) & set(weight.rows))
    shape = torch.broadcast_shapes(others[0].shape, weight.shape)
    return len(shape) > 0 and shape[0] in weight.rows and shape[1:] == weight.shape


def _draw_result(func: Any, name: str, args: Any, kwargs: Any) -> Tensor | None:
    """Draw the result of a function that is linear in its weights, if it is one."""
    first, *rest = args if args else (kwargs.get("input"),)
    operands = args[1:] if name == "einsum" else args
    operands = operands[0] if operands and isinstance(operands[0], tuple | list) else operands
    if name in _LAYERS:
        linear = not isinstance(first, LocalWeight)
    else:
        linear = name in _PRODUCTS | _SUMS and len(operands) == 2 and not kwargs
        linear = linear and len(list(_weights(operands))) == 1
    weights = list(_weights((*operands, *kwargs.values())))
    if not (linear and all(_one_row_each(name, weight, operands, first) for weight in weights)):
        return None

    def second_moment(argument: Any) -> Any:
        if isinstance(argument, LocalWeight):
            return argument.variance
        is_factor = name in _PRODUCTS or (name in _LAYERS and argument is first)
        if isinstance(argument, Tensor) and is_factor:
            return argument.square()
        if isinstance(argument, Tensor) or name in _SUMS:
            return argument * 0
        return argument

    def location(argument: Any) -> Any:
        return argument.loc if isinstance(argument, LocalWeight) else argument

    def apply(change: Callable[[Any], Any]) -> Tensor:
        return func(*_map(args, change), **{key: change(value) for key, value in kwargs.items()})

    loc, variance = apply(location), apply(second_moment).abs()
    # The square root has no gradient at 0, which is the variance of a unit without weights.
    scale = torch.where(variance > 0, torch.where(variance > 0, variance, 1).sqrt(), 0)
    return loc + scale * torch.randn_like(loc)
