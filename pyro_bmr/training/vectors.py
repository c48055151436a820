"""Parameters joined to vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Joining larger parameters with others would cost more than a vector of their own does.
_LARGE = 1 << 20


@dataclass(frozen=True)
class VectorLayout:
    """Which parameters are in which vector: all small ones in the first, each large one in its own.

    ``shapes`` are those of the parameters, by name.
    """

    shapes: Mapping[str, torch.Size]
    vectors: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor]) -> VectorLayout:
        """Lay out parameters."""
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        small = tuple(name for name, shape in shapes.items() if shape.numel() < _LARGE)
        large = tuple((name,) for name in shapes if name not in small)
        return cls(shapes, (small, *large) if small else large)

    def join(self, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the vectors; that of one parameter is a view of it."""
        return [
            parts[0] if len(parts) == 1 else torch.cat(parts)
            for parts in ([parameters[n].reshape(-1) for n in names] for names in self.vectors)
        ]

    def split(self, vectors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return views of the parameters, in their order."""
        views = {
            name: part.view(self.shapes[name])
            for names, vector in zip(self.vectors, vectors, strict=True)
            for name, part in zip(
                names, vector.split([self.shapes[n].numel() for n in names]), strict=True
            )
        }
        return {name: views[name] for name in self.shapes}
