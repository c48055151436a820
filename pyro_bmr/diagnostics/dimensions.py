"""Names for the axes of arrays, and xarray data sets of arrays with such names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    import xarray as xr

_SAMPLE_DIMS = ("chain", "draw")


@dataclass(frozen=True, eq=False)
class Dimensions:
    """How the axes of variables are called, and what stands along them.

    An axis has the name that the caller gives, else that of its plate, else
    ``{variable}_dim_{i}``. ``dims`` names the first axes of variables, None for one that stays as
    it is; ``coords`` has by dimension a value per index. No dimension is called
    like one of ``variables``.
    """

    dims: Mapping[str, Sequence[str | None]]
    coords: Mapping[str, Any]
    variables: Collection[str]

    def name_dims(self, variable: str, plates: Sequence[str | None]) -> tuple[str, ...]:
        """Name the axes of a variable, given the plate of each, or None."""
        given = self.dims.get(variable, ())
        given = (given,) if isinstance(given, str) else tuple(given)
        if len(given) > len(plates):
            msg = (
                f"got dims={list(given)} for {variable!r}, which has {len(plates)} axes beside "
                "chain and draw. Expected a name for each, or for the first of them"
            )
            raise ValueError(msg)
        given += (None,) * (len(plates) - len(given))
        return tuple(
            name or self._of_plate(plate) or f"{variable}_dim_{i}"
            for i, (name, plate) in enumerate(zip(given, plates, strict=True))
        )

    def dataset(
        self, variables: Mapping[str, tuple[tuple[str, ...], Tensor]], *, drawn: bool = True
    ) -> xr.Dataset:
        """Put tensors into a data set, without copies of those on the CPU.

        Where they are ``drawn``, an axis of draws, one chain, is before those that are named.
        """
        import xarray as xr

        arrays, sizes = {}, dict[str, int]()
        for name, (dims, tensor) in variables.items():
            array = _as_array(tensor)
            if drawn:
                dims, array = _SAMPLE_DIMS + dims, array[None]
            for dim, size in zip(dims, array.shape, strict=True):
                if sizes.setdefault(dim, size) != size:
                    msg = (
                        f"the dimension {dim!r} has the size {size} in {name!r} and {sizes[dim]} "
                        "before. Expected one size: pass dims= other names"
                    )
                    raise ValueError(msg)
            arrays[name] = (dims, array)
        return xr.Dataset(arrays, {dim: self._along(dim, size) for dim, size in sizes.items()})

    def _along(self, dim: str, size: int) -> Any:
        values = self.coords.get(dim)
        if values is None:
            return np.arange(size)
        if len(values) != size:
            msg = (
                f"got {len(values)} coords for the dimension {dim!r}, which has the size {size}. "
                "Expected one for each index"
            )
            raise ValueError(msg)
        return _as_array(values) if isinstance(values, Tensor) else np.asarray(values)

    def _of_plate(self, plate: str | None) -> str | None:
        clash = plate in self.variables or plate in _SAMPLE_DIMS
        return f"{plate}_dim" if clash else plate


def _as_array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    # NumPy has no bfloat16.
    known = tensor if not tensor.dtype.is_floating_point or tensor.element_size() > 2 else None
    return (tensor.float() if known is None else known).numpy()
