r"""Local reparameterisation: pre-activations are drawn instead of weights.

Where a weight with posterior :math:`N(\mu, \sigma^2)` enters a linear function of the data,
:math:`a = x W`, every row of :math:`a` is drawn by itself,

.. math:: a \sim N(x \mu,\; x^2 \sigma^2)

(Kingma, Salimans & Welling 2015, arXiv:1506.02557, eq. 6). Each row has the distribution that it
has when weights are drawn, and rows no longer share their noise, so that the expected log
likelihood of independent rows is the same and its gradients vary less. The positions of a
convolution are drawn one by one as well, as in the paper, which neglects that they share weights.

Where a row takes a weight more than once, as a recurrent network does, or a layer that is applied
to each element of a sequence, what it takes has to be one and the same weight. Then each row, or a
few rows together, draws weights of its own, once for all of its uses, which leaves the expectation
as it is too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name
from typing_extensions import override

from pyro_bmr.estimators.posteriors import SitePosterior


class LocalWeight(Tensor):
    """A draw of a weight, in whose place linear functions draw their result.

    Anything else sees the draw itself. To ``uses`` is added ``"rows"`` where each row was drawn by
    itself, ``"positions"`` where each position of a convolution was, and else the name of the
    function that took the draw. ``rows`` are possible numbers of observations: a result without
    one row per observation is not drawn, but None takes these for granted. ``draw_rows``, for a
    weight that a row takes more than once, maps the number of rows to draws, each for so many rows
    after the other, the same at every call.

    >>> uses = []
    >>> w = LocalWeight(torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 2), uses)
    >>> torch.nn.functional.linear(torch.ones(3, 2), w).tolist(), uses
    ([[2.0], [2.0], [2.0]], ['rows'])
    """

    loc: Tensor
    variance: Tensor
    uses: list[str]
    rows: Collection[int] | None
    draw_rows: Callable[[int], Tensor] | None

    @staticmethod
    @override
    def __new__(
        cls,
        draw: Tensor,
        loc: Tensor,
        variance: Tensor,
        uses: list[str],
        rows: Collection[int] | None = None,
        draw_rows: Callable[[int], Tensor] | None = None,
    ) -> LocalWeight:
        weight: LocalWeight = draw.as_subclass(cls)
        weight.loc, weight.variance, weight.uses, weight.rows = loc, variance, uses, rows
        weight.draw_rows = draw_rows
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Draw the result of a linear function, or pass the draw on."""
        kwargs = kwargs or {}
        if func is Tensor.__iter__:
            return iter(args[0].unbind())
        name = name_function(func)
        with torch._C.DisableTorchFunctionSubclass():
            if name in _PROPERTIES:
                return func(*args, **kwargs)
            kept = _keep_elements(func, name, args, kwargs)
            if kept is not None:
                return kept
            drawn, use = _draw_result(func, name, args, kwargs) or (None, name)
            for weight in _weights((*args, *kwargs.values())):
                weight.uses.append(use)
            return func(*args, **kwargs) if drawn is None else drawn

    def shift_first_row(self, shift: float) -> None:
        """Move the weights of the first row, if rows draw their own, to see where they end up."""
        draw_rows = self.draw_rows
        if draw_rows is not None:

            @cache
            def shifted(rows: int) -> Tensor:
                draws = draw_rows(rows)
                first = torch.arange(len(draws), device=draws.device) == 0
                return draws + shift * first.reshape(-1, *[1] * (draws.dim() - 1))

            self.draw_rows = shifted


def local_weights(
    posteriors: Mapping[str, SitePosterior],
    rows: Collection[int] | None = None,
    repeated: Collection[str] = (),
    most_sharing: int = 1,
) -> dict[str, LocalWeight]:
    """Wrap the draws of all sites that have independent normal elements.

    A row takes the sites in ``repeated`` more than once, and has a draw of each that it shares with
    at most so many; ``rows`` are those of `LocalWeight`.
    """
    weights = {}
    for name, posterior in posteriors.items():
        if posterior.normal is not None:
            moments = posterior.normal.mean, posterior.normal.variance
            draw_rows = _row_draws(*moments, most_sharing) if name in repeated else None
            weights[name] = LocalWeight(posterior.draw, *moments, [], rows, draw_rows)
    return weights


def name_function(func: Any) -> str:
    """Name a torch function, the same as a method and as a property; ``add_`` is not ``add``."""
    name = resolve_name(func).removesuffix(".__get__").rpartition(".")[2]
    in_place = name.endswith("_") and not name.endswith("__")
    return name if in_place else name.strip("_")


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
    *("is_complex", "type", "is_leaf", "grad_fn", "names", "is_nested", "is_quantized", "is_meta"),
    *("nelement", "ndimension", "get_device"),
}
_VIEWS = {
    *("t", "T", "mT", "transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims"),
    *("adjoint", "reshape", "reshape_as", "view", "view_as", "flatten", "ravel", "unflatten"),
    *("squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to", "contiguous", "clone"),
    *("getitem", "narrow", "select"),
}
_SPLITS = {"chunk", "split", "tensor_split", "unbind"}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
_LAYERS = {"linear", *_CONVOLUTIONS}
# Torch calls its own torch.mm spmm.
_PRODUCTS = {"matmul", "rmatmul", "mm", "spmm", "bmm", "mv", "einsum", "mul", "rmul"}
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


def _keep_elements(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Apply a function that moves, masks or rescales elements, if it is one."""
    weights = list(_weights(args))
    if len(weights) != 1:
        return None
    weight, count = weights[0], 1
    numbers = not kwargs and all(isinstance(a, int | float | LocalWeight) for a in args)
    if name in _SCALINGS and numbers:
        count = 2  # the variance scales by the square
    elif name == "where":
        if not (len(args) == 3 and args[1] is weight):
            return None
    elif not (name in _VIEWS | _SPLITS and args[0] is weight):
        return None
    elif name == "getitem" and not _takes_once(args[1]) and not weight.draw_rows:
        return None

    def apply(part: Tensor, operands: Any = args) -> Any:
        return func(*_map(operands, lambda a: part if a is weight else a), **kwargs)

    draw, loc = apply(weight.as_subclass(Tensor)), apply(weight.loc)
    # What is put in an element's place does not vary from row to row.
    variance = apply(weight.variance, (*args[:2], 0) if name == "where" else args)
    if name not in _SPLITS and draw.numel() > weight.numel() and not weight.draw_rows:
        return None  # elements are repeated, which are not independent
    variance = apply(variance) if count == 2 else variance
    draw_rows = weight.draw_rows
    by_row = draw_rows and cache(lambda rows: torch.vmap(apply)(draw_rows(rows)))
    if name not in _SPLITS:
        return LocalWeight(draw, loc, variance, weight.uses, weight.rows, by_row)
    return tuple(
        LocalWeight(*moments, weight.uses, weight.rows, by_row and partial(_pick, by_row, i))
        for i, moments in enumerate(zip(draw, loc, variance, strict=True))
    )


def _takes_once(index: Any) -> bool:
    """Tell whether no element is taken more than once, as numbers of elements may do."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(
        part is None
        or part is Ellipsis
        or isinstance(part, int | slice)
        or (isinstance(part, Tensor) and (part.dtype == torch.bool or part.dim() == 0))
        for part in parts
    )


def _pick(by_row: Callable[[int], Any], index: int, rows: int) -> Tensor:
    return by_row(rows)[index]


def _one_row_each(name: str, weight: LocalWeight, operands: Any, first: Any) -> bool:
    """Tell whether every row of the result is of another observation, and takes a weight once.

    Otherwise what two elements of the result share would be lost: draw the weight as a whole.
    """
    if weight.rows is None:
        return True
    if weight.draw_rows:
        return _goes_by_row(name, weight, operands, first)
    if name in _CONVOLUTIONS:
        return len(first) in weight.rows
    if name == "linear":
        return first.dim() == 2 and len(first) in weight.rows
    others = [operand for operand in operands if operand is not weight]
    if len(others) != 1 or not isinstance(others[0], Tensor):
        return False
    data, weight_is_first = others[0], operands[0] is weight
    if name == "einsum":
        return _einsum_takes_once(first, weight_is_first, data.shape, weight.rows)
    if name in _PRODUCTS - {"mul", "rmul"}:
        rows_at = 1 if weight_is_first and name != "rmatmul" else 0
        return data.dim() == 2 and data.shape[rows_at] in weight.rows
    shape = torch.broadcast_shapes(data.shape, weight.shape)
    return len(shape) > 0 and shape[0] in weight.rows and shape[1:] == weight.shape


def _goes_by_row(name: str, weight: LocalWeight, operands: Any, first: Any) -> bool:
    """Tell whether rows come first, in the data and in the result; each may take a weight often."""
    rows: Collection[int] = weight.rows or ()
    if name in _LAYERS:
        return first.dim() >= (2 if name == "linear" else weight.dim()) and len(first) in rows
    others = [operand for operand in operands if operand is not weight]
    if len(others) != 1 or not isinstance(others[0], Tensor) or name == "bmm":
        return False
    data = others[0]
    if data.dim() == 0 or len(data) not in rows:
        return False
    weight_is_first = operands[0] is weight
    if name == "einsum":
        own, letters, output = _read_einsum(first, weight_is_first, data.dim())
        return data.dim() >= 2 and letters[:1] == output[:1] and letters[:1] not in own
    # What has an axis for rows itself has other elements for each of them.
    shared = weight.dim() < data.dim() or (weight.dim() == data.dim() and len(weight) == 1)
    if name in _PRODUCTS - {"mul", "rmul"}:
        rows_first = not weight_is_first or name == "rmatmul"
        return data.dim() >= 2 and rows_first and (weight.dim() <= 2 or shared)
    return shared and len(torch.broadcast_shapes(data.shape, weight.shape)) == data.dim()


def _einsum_takes_once(
    equation: str, weight_is_first: bool, sizes: Collection[int], rows: Collection[int]
) -> bool:
    """Tell whether all axes of the data but one, of rows that stay, meet an axis of the weight."""
    own, letters, output = _read_einsum(equation, weight_is_first, len(sizes))
    if not len(letters) == len(sizes) == 2:
        return False
    stay = [i for i, size in zip(letters, sizes, strict=True) if size in rows and i in output]
    return any(set(letters) - {i} <= set(own) for i in stay)


def _read_einsum(equation: str, weight_is_first: bool, dims: int) -> tuple[str, str, str]:
    """Read the letters of a weight, of data, and of the result, with ``.`` for an ellipsis."""
    terms, arrow, output = equation.replace(" ", "").replace("...", ".").partition("->")
    left, _, right = terms.partition(",")
    if not arrow:
        once = [i for i in left + right if i == "." or (left + right).count(i) == 1]
        output = "".join(sorted(set(once)))
    weight, data = (left, right) if weight_is_first else (right, left)
    if len(data) > dims:
        data, output = data.replace(".", ""), output.replace(".", "")
    return weight, data, output


def _draw_result(func: Any, name: str, args: Any, kwargs: Any) -> tuple[Tensor, str] | None:
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

    def apply(change: Callable[[Any], Any]) -> Tensor:
        return func(*_map(args, change), **{key: change(value) for key, value in kwargs.items()})

    if any(weight.draw_rows for weight in weights):
        data = first if name in _LAYERS else next(o for o in operands if o is not weights[0])
        return _draw_by_row(apply, data, weights), "rows"

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

    drawn = _draw_normal(apply(location), apply(second_moment).abs())
    return drawn, "positions" if name in _CONVOLUTIONS else "rows"


def _draw_by_row(
    apply: Callable[[Callable[[Any], Any]], Tensor], data: Tensor, weights: list[LocalWeight]
) -> Tensor:
    """Apply a function to the rows that share a draw as to a batch, with the weights of these."""

    def apply_to(rows: Tensor, *draws: Tensor) -> Tensor:
        values = {id(data): rows}
        values |= {id(weight): draw for weight, draw in zip(weights, draws, strict=True)}
        return apply(lambda argument: values.get(id(argument), argument))

    count = next(len(weight.draw_rows(len(data))) for weight in weights if weight.draw_rows)
    draws = [
        weight.draw_rows(len(data)) if weight.draw_rows else _draw(weight, count)
        for weight in weights
    ]
    return torch.vmap(apply_to)(data.unflatten(0, (count, -1)), *draws).flatten(0, 1)


def _draw(weight: LocalWeight, count: int) -> Tensor:
    return _draw_normal(weight.loc.expand(count, *weight.loc.shape), weight.variance)


def _row_draws(loc: Tensor, variance: Tensor, most_sharing: int) -> Callable[[int], Tensor]:
    """Draw for as many rows at a time as divide their number."""

    def draw(rows: int) -> Tensor:
        sharing = max(n for n in range(1, most_sharing + 1) if rows % n == 0)
        return _draw_normal(loc.expand(rows // sharing, *loc.shape), variance)

    return cache(draw)


def _draw_normal(loc: Tensor, variance: Tensor) -> Tensor:
    # The square root has no gradient at 0, which is the variance of a unit without weights.
    scale = torch.where(variance > 0, torch.where(variance > 0, variance, 1).sqrt(), 0)
    return loc + scale * torch.randn_like(loc)
