"""What a reduction does to its model, and the model's own tensors, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_bmr.cutting.program import CompactedModel
from pyro_bmr.display import a_or_an
from pyro_bmr.files.centers import pack_center, unpack_center
from pyro_bmr.files.compacted import pack_compacted, unpack_compacted
from pyro_bmr.files.supports import pack_support, unpack_support
from pyro_bmr.programs.distributions import find_core, is_pruned
from pyro_bmr.programs.dry_run import dry_run, find_modules
from pyro_bmr.programs.given_values import ValueMessenger, take_rows
from pyro_bmr.programs.handlers import PrunedModel
from pyro_bmr.programs.overwriting import overwrite
from pyro_bmr.programs.sites import find_full_shape
from pyro_bmr.programs.switching import NewPrior, SwitchedModel
from pyro_bmr.programs.wrappers import find_wrappers, unwrap


def pack_handlers(model: Any) -> tuple[list[dict[str, Any]], Any]:
    """Describe what stands around the user's model, from the outside in; also return that model."""
    packed: list[dict[str, Any]] = []
    for wrapper in find_wrappers(model):
        if isinstance(wrapper, PrunedModel):
            centers = {name: pack_center(center) for name, center in wrapper.centers.items()}
            masks = wrapper.masks.by_site()
            marginal = list(wrapper.marginal)
            packed.append(
                {"kind": "pruned", "masks": masks, "centers": centers, "marginal": marginal}
            )
        elif isinstance(wrapper, CompactedModel):
            packed.append({"kind": "compacted", "cut": pack_compacted(wrapper)})
        elif isinstance(wrapper, SwitchedModel):
            priors = {
                name: {
                    "mask": new.mask,
                    "family": new.family.__name__,
                    "parameters": dict(new.parameters),
                }
                for name, new in wrapper.new_priors().items()
            }
            packed.append({"kind": "switched", "priors": priors})
        else:
            msg = f"cannot save {a_or_an(wrapper)} around the model"
            raise TypeError(msg)
    return packed, unwrap(model)


def unpack_handlers(packed: list[dict[str, Any]], model: Callable[..., Any]) -> Any:
    """Put around the user's model what `pack_handlers` described."""
    for one in reversed(packed):
        if one["kind"] == "pruned":
            centers = {
                name: unpack_center(center) for name, center in one.get("centers", {}).items()
            }
            model = PrunedModel(model, one["masks"], centers, one.get("marginal", ()))
        elif one["kind"] == "compacted":
            model = unpack_compacted(one["cut"], model)
        else:
            priors = {
                name: NewPrior(new["mask"], _FAMILIES[new["family"]], new["parameters"])
                for name, new in one["priors"].items()
            }
            model = SwitchedModel(model, priors)
    return model


def pack_state(
    model: Callable[..., Any],
    inner: Callable[..., Any],
    values: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """Read the sites of a model, its parameters and its buffers, from a run at ``values``.

    ``model`` is that of the reduction, ``inner`` the user's inside it. Read are the shapes and
    families of the latent sites, all tensors of the modules that ``inner`` is or refers to, and the
    values of ``pyro.param``.
    """
    recorder, params = run_recorded(model, values, args, kwargs, "save(path, x, y)")
    modules = [_tensors(module) for module in find_modules(inner)]
    # Those of the handlers around it are saved with these.
    others = set(map(id, model.parameters())) if isinstance(model, nn.Module) else set()
    owners = {id(t): [i, name] for i, own in enumerate(modules) for name, t in own.items()}
    packed = {}
    for name, (value, constraint) in (params | _cut_params(model)).items():
        place = owners.get(id(value))
        if place is None and id(value) in others:
            continue
        packed[name] = {
            "constraint": pack_support(constraint, f"the parameter {name!r}"),
            **({"value": value} if place is None else {"place": place}),
        }
    sites = {"sites": recorder.sites, "families": recorder.families}
    return {**sites, "modules": modules, "params": packed}


@torch.no_grad()
def load_state(packed: Mapping[str, Any], model: Callable[..., Any]) -> None:
    """Give the user's model the parameters and buffers that `pack_state` read.

    Values of ``pyro.param`` go to the param store. If anything does not fit, nothing is changed and
    a ValueError is raised.
    """
    modules = [_tensors(module) for module in find_modules(model)]
    check_equal("modules", {"number": len(packed["modules"])}, {"number": len(modules)})
    for own, saved in zip(modules, packed["modules"], strict=True):
        check_equal("parameters and buffers", *(_described(t) for t in (saved, own)))
    store = pyro.get_param_store()
    stored = dict(store.named_parameters())
    fresh, held = {}, {}
    for name, one in packed["params"].items():
        i, key = one.get("place", (0, ""))
        value = one["value"] if "value" in one else packed["modules"][i][key]
        if name in stored:
            held[name] = value
        elif "value" in one:
            fresh[name] = value.clone().requires_grad_()
    described = _described(held), _described({name: stored[name] for name in held})
    check_equal("entries of the param store", *described)
    known = store.get_state()["constraints"]
    check_equal(
        "constraints of the param store",
        {name: repr(unpack_support(packed["params"][name]["constraint"])) for name in held},
        {name: repr(known[name]) for name in held},
    )
    for own, saved in zip(modules, packed["modules"], strict=True):
        for name, tensor in own.items():
            overwrite(tensor, saved[name])
    for name, value in held.items():
        stored[name].data.copy_(value)
    constraints = {name: unpack_support(packed["params"][name]["constraint"]) for name in fresh}
    store.set_state({"params": fresh, "constraints": constraints})


class SiteRecorder(Messenger):
    """Effect handler that writes down the latent sites of a model.

    ``sites`` holds the shapes of those in ``names``, the sites of the guide, at the full size of
    plates, and for all others whether they are observed; ``families`` holds the families of the
    priors of the former.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = names
        self.sites: dict[str, list[int] | str] = {}
        self.families: dict[str, str] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.names:
            self.sites[name] = list(find_full_shape(msg))
            core = find_core(msg["fn"])
            own = find_core(core.base_dist) if is_pruned(core) else core
            self.families[name] = type(own).__name__
        elif type(msg["fn"]).__name__ != "_Subsample":
            # What the guide does not hold may have as many elements as there are data.
            self.sites[name] = "observed" if msg["is_observed"] else "not in the guide"

    def compare(self, saved: Mapping[str, Any]) -> None:
        """Raise a ValueError if the sites are not those that another recorder saved."""
        own = {
            name: found
            for name, found in self.sites.items()
            # Observed or not, or not there at all: that depends on the arguments.
            if isinstance(found, list) or (found != "observed" and name not in saved)
        }
        of_guide = {name: shape for name, shape in saved.items() if isinstance(shape, list)}
        for name, shape in of_guide.items():
            found = own.get(name)
            # Draws that are vectorised have dimensions to the left.
            if isinstance(found, list) and found[len(found) - len(shape) :] == shape:
                own[name] = shape
        check_equal("latent sites", of_guide, own)


_FAMILIES = {"Normal": dist.Normal, "Laplace": dist.Laplace}


def run_recorded(
    model: Callable[..., Any],
    values: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    call: str,
) -> tuple[SiteRecorder, dict[str, tuple[Tensor, Any]]]:
    """Run a model; return its sites, and its parameters, unconstrained, with constraints."""
    recorder = SiteRecorder(values)
    try:
        with dry_run(model), torch.no_grad(), recorder, ValueMessenger(values, take_rows):
            nodes = poutine.trace(model).get_trace(*args, **kwargs).nodes
            store = pyro.get_param_store().get_state()
    except Exception as error:
        msg = (
            f"the model could not be run to find its sites and parameters ({type(error).__name__}: "
            f"{error}). Expected arguments that it can be run with, as in {call}"
        )
        raise RuntimeError(msg) from error
    names = [name for name, node in nodes.items() if node["type"] == "param"]
    return recorder, {n: (store["params"][n], store["constraints"][n]) for n in names}


def _cut_params(model: Any) -> dict[str, tuple[Tensor, Any]]:
    """Return the entries of the param store that only a smaller copy of is used."""
    store = pyro.get_param_store().get_state()
    names: list[str] = []
    for wrapper in find_wrappers(model):
        names += wrapper.parameter_names if isinstance(wrapper, CompactedModel) else ()
    return {n: (store["params"][n], store["constraints"][n]) for n in names if n in store["params"]}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    # Also the buffers that a state dict leaves out.
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _described(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{t.dtype} {tuple(t.shape)}" for name, t in tensors.items()}


def check_equal(what: str, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise a ValueError if a model differs in ``what`` from the one that was saved."""
    differences = [
        f"{name}: {saved.get(name, 'none')} in the file, {own.get(name, 'none')} here"
        for name in sorted({*saved, *own})
        if saved.get(name) != own.get(name)
    ]
    if differences:
        msg = (
            f"the file was saved for another model: its {what} differ "
            f"({'; '.join(differences[:5])}). Expected the model that the result was made with, "
            "built by the same code"
        )
        raise ValueError(msg)
