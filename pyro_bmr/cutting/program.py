"""The user's own program on smaller tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.nn import PyroParam
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints, transform_to
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from pyro_bmr.cutting.originals import Original, find_original
from pyro_bmr.cutting.rewriting import Rewriter, Rewrites
from pyro_bmr.cutting.sites import cut_distribution
from pyro_bmr.graphs.sized_calls import SizedCalls
from pyro_bmr.programs.handlers import SiteBuffers, module_key
from pyro_bmr.programs.own_names import OwnNames, unused_name
from pyro_bmr.programs.sites import Indices, take
from pyro_bmr.programs.wrappers import ModelWrapper


@dataclass(frozen=True)
class Parameter:
    """A parameter of the param store that the program uses."""

    name: str
    unconstrained: Tensor
    constraint: constraints.Constraint = constraints.real


@dataclass(frozen=True)
class Cut:
    """What of a program stays: by latent site and by plate that is cut, the indices.

    ``shapes`` are those of the sites before; ``tensors``, what the program uses beside its sites;
    ``parameters``, those of the param store whose unconstrained value is among these tensors.
    """

    shapes: Mapping[str, torch.Size] = field(default_factory=dict)
    sites: Mapping[str, Indices] = field(default_factory=dict)
    plates: Mapping[str, Tensor] = field(default_factory=dict)
    tensors: tuple[tuple[Tensor, Indices], ...] = ()
    parameters: tuple[Parameter, ...] = ()
    rewrites: Rewrites = field(default_factory=dict)


class CompactedModel(ModelWrapper):
    """A Pyro model without the units that it can do without.

    Called like the model that it wraps, which runs as it is: its sites, plates, parameters,
    buffers and constants are smaller. The model itself is shared, not copied; what is cut of its
    parameters and buffers is held here.
    """

    def __init__(self, model: Callable[..., Any], cut: Cut) -> None:
        super().__init__(model)
        self.shapes = dict(cut.shapes)
        self.cut_axes = {
            name: tuple(index is not None for index in kept) for name, kept in cut.sites.items()
        }
        self.kept = SiteBuffers(
            {
                _axis(name, axis): index
                for name, kept in cut.sites.items()
                for axis, index in enumerate(kept)
                if index is not None
            }
        )
        self.plates = SiteBuffers(cut.plates)
        self.rewrites = cut.rewrites
        self.parameter_names = tuple(parameter.name for parameter in cut.parameters)
        self.own = OwnNames(unused_name("CompactedModel"))
        self.constants = nn.Module()
        self.originals: dict[str, Original] = {}
        parameters = {id(p.unconstrained): p for p in cut.parameters}
        for number, (tensor, kept) in enumerate(cut.tensors):
            smaller = take(tensor.detach(), kept).clone()
            parameter = parameters.get(id(tensor))
            if parameter is None:
                key = str(number)
                self.constants.register_buffer(key, smaller)
            else:
                key = module_key(parameter.name)
                value = transform_to(parameter.constraint)(smaller)
                setattr(self.own, key, PyroParam(value, parameter.constraint))
                _unconstrained(self.own, key).data = smaller
            self.originals[key] = find_original(model, tensor)

    def sites(self) -> dict[str, Indices]:
        """Return which indices of the sites that are cut are left."""
        kept = self.kept.by_site()
        return {
            name: tuple(kept[_axis(name, axis)] if cut else None for axis, cut in enumerate(axes))
            for name, axes in self.cut_axes.items()
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        replacements = {id(original): smaller for original, smaller in self._pairs()}
        with ExitStack() as stack:
            stack.enter_context(self.own._pyro_context)
            swap = _Swap(replacements)
            if replacements:
                stack.enter_context(swap)
            if self.rewrites:
                stack.enter_context(SizedCalls(Rewriter(self.rewrites)))
            stack.enter_context(_CutMessenger(self, swap))
            return self.model(*args, **kwargs)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        held: dict[str, Any] = self.constants._buffers
        return [
            (original(self.model), held[key] if key in held else _unconstrained(self.own, key))
            for key, original in self.originals.items()
        ]


class _CutMessenger(Messenger):
    """Cuts the distributions of latent sites, the plates around them, and parameters.

    It stands inside all that is around the compacted model: what others do to a site (pruning,
    replaying, more particles) they do to the smaller one.
    """

    def __init__(self, model: CompactedModel, swap: _Swap) -> None:
        super().__init__()
        self.model, self.swap = model, swap
        self.sites = model.sites()
        self.plates = model.plates.by_site()

    def _pyro_sample(self, msg: Any) -> None:
        self.swap.paused = True
        name = msg["name"]
        if type(msg["fn"]).__name__ == "_Subsample":
            if name in self.plates:
                kept, before = self.plates[name], msg["value"]
                msg["value"] = kept if before is None else before[kept]
            return
        if any(frame.name in self.plates for frame in msg["cond_indep_stack"]):
            self._cut_plates(msg)
        if name in self.sites and not msg["is_observed"]:
            try:
                msg["fn"] = cut_distribution(msg["fn"], self.model.shapes[name], self.sites[name])
            except ValueError as error:
                what = f"the prior of the site {name!r} cannot be cut: {error}"
                raise ValueError(what) from error

    def _pyro_post_sample(self, _msg: Any) -> None:
        self.swap.paused = False

    def _pyro_post_subsample(self, msg: Any) -> None:
        """Keep plates from taking a part of what is known of the smaller site."""
        value, event_dim = msg["value"], msg["kwargs"]["event_dim"]
        if event_dim is None:
            return
        frames = [frame for frame in msg["cond_indep_stack"] if frame.size != frame.full_size]
        dims = [frame.dim - event_dim for frame in frames if frame.name in self.plates]
        sizes = [len(self.plates[frame.name]) for frame in frames if frame.name in self.plates]
        inside = all(-dim <= value.dim() for dim in dims)
        if dims and inside and [value.shape[dim] for dim in dims] == sizes:
            if len(dims) < len(frames):
                names = ", ".join(frame.name for frame in frames)
                msg = f"cannot take a part of the data in a plate that was cut (plates {names})"
                raise NotImplementedError(msg)
            msg["kwargs"]["event_dim"] = None

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self.model.parameter_names:
            # A statement of its own, for the parameter that is trained in the place of this one.
            msg["value"] = getattr(self.model.own, module_key(msg["name"]))
            msg["done"] = msg["stop"] = True
            # Plates around it take no part of what is smaller already.
            msg["kwargs"] = msg["kwargs"] | {"event_dim": None}

    def _cut_plates(self, msg: Any) -> None:
        msg["cond_indep_stack"] = tuple(
            self._cut_plate(frame, msg) if frame.name in self.plates else frame
            for frame in msg["cond_indep_stack"]
        )

    def _cut_plate(self, frame: Any, msg: Any) -> Any:
        # Pyro takes what is left for a subsample, and scales it up.
        msg["scale"] = msg["scale"] * (frame.size / frame.full_size)
        whole = frame.size == frame.full_size
        size = len(self.plates[frame.name]) if whole else frame.size
        return frame._replace(size=size, full_size=size)


class _Swap(TorchFunctionMode):
    """Puts smaller tensors in the place of those that the program uses, by their identity."""

    def __init__(self, replacements: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.replacements = replacements
        self.paused = False

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.paused:
            return func(*args, **(kwargs or {}))
        kwargs = {key: self._swapped(value) for key, value in kwargs.items()} if kwargs else {}
        return func(*[self._swapped(value) for value in args], **kwargs)

    def _swapped(self, value: Any) -> Any:
        if type(value) in _SEQUENCES:
            return type(value)(self._swapped(one) for one in value)
        return self.replacements.get(id(value), value)


_SEQUENCES = (list, tuple)


def _axis(site: str, axis: int) -> str:
    return f"{site}[{axis}]"


def _unconstrained(module: Any, key: str) -> Tensor:
    return module._parameters[f"{key}_unconstrained"]
