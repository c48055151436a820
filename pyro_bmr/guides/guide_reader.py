"""A run of a guide that tells the statements of its sites, which it puts at given values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.nn import PyroModule
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from pyro_bmr.guides.pruned_guide import Origin
from pyro_bmr.guides.statements import (
    NotGaussianError,
    PartialRowsError,
    Statement,
    read_statement,
    site_refusal,
)
from pyro_bmr.programs.distributions import find_core, find_support
from pyro_bmr.programs.dry_run import check_owned, find_modules
from pyro_bmr.programs.given_values import PriorMessenger
from pyro_bmr.programs.site_kinds import is_data, is_likelihood
from pyro_bmr.programs.sites import is_scaled

Failure = NotGaussianError | PartialRowsError
FullRows = Callable[[str], tuple[Tensor, Tensor] | None]


class GuideReader(Messenger):
    """Put latent sites at given values, or else at their means, and read their statements."""

    def __init__(
        self,
        values: Mapping[str, Tensor],
        rows: dict[str, Tensor],
        sources: dict[str, str],
        held: frozenset[str],
        supports: Mapping[str, constraints.Constraint],
        full_rows: FullRows,
    ) -> None:
        super().__init__()
        self.values, self.rows, self.sources, self.held = values, rows, sources, held
        self.supports, self.full_rows = supports, full_rows
        self.statements: dict[str, Statement] = {}
        self.leaves: dict[str, Tensor] = {}
        self.unread: dict[str, Failure] = {}
        self.order: list[str] = []
        self.factors: dict[str, Tensor] = {}
        self.auxiliary: dict[str, Statement | None] = {}
        self.in_messenger = self.observes = False

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            if name in self.rows:
                msg["value"], msg["done"] = self.rows[name], True
            return
        if msg["is_observed"]:
            if is_likelihood(msg) and not self.in_messenger:
                self._look_at_observed(msg)
            return
        if msg["infer"].get("is_auxiliary"):
            self._put_at_mean(msg)
            return
        if name in self.held:
            return
        self.order.append(name)
        self.in_messenger |= "prior" in msg["infer"]
        if is_scaled(msg) or msg["mask"] is not None:
            self.unread[name] = site_refusal(name, "it is scaled or masked there")
            return
        own = find_support(msg["infer"].get("prior", msg["fn"]))
        support = self.supports.get(name, own)
        try:
            if isinstance(find_core(msg["fn"]), dist.Delta) and self._read_source(msg, support):
                return
            statement = read_statement(msg, support, self.full_rows)
        except (NotGaussianError, PartialRowsError) as error:
            self.unread[name] = error
            return
        leaf = self.values.get(name, statement.loc).detach().clone().requires_grad_()
        self.statements[name], self.leaves[name] = statement, leaf
        msg["value"], msg["done"] = statement.site.constrain(leaf), True

    def _look_at_observed(self, msg: Any) -> None:
        if is_data(msg):
            self.observes = True
        else:
            self.factors[msg["name"]] = msg["fn"].log_factor

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.rows[msg["name"]] = msg["value"]
        elif msg["name"] in self.auxiliary:
            leaf = msg["value"].detach().clone().requires_grad_()
            self.leaves[msg["name"]] = msg["value"] = leaf

    def _put_at_mean(self, msg: Any) -> None:
        """Read an auxiliary statement; it is drawn at random unless it is known as a source."""
        name, core = msg["name"], find_core(msg["fn"])
        if isinstance(core, dist.Delta) or not core.has_rsample:
            return
        try:
            statement = read_statement(msg, constraints.real, self.full_rows)
        except (NotGaussianError, ValueError):
            statement = None
        self.auxiliary[name] = statement
        if statement is not None and name in self.sources:
            value = self.values.get(self.sources[name], statement.loc)
            msg["value"], msg["done"] = value.detach(), True

    def _read_source(self, msg: Any, support: constraints.Constraint) -> bool:
        """Read a Delta at the value of an auxiliary site, as autoguides have them."""
        name, value = msg["name"], find_core(msg["fn"]).v
        sources = [n for n in self.auxiliary if _depends(value, self.leaves[n])]
        if not sources:
            return False
        leaf, statement = self.leaves[sources[0]], self.auxiliary[sources[0]]
        unshared = len(sources) == 1 and self.sources.get(sources[0], name) == name
        if unshared and statement is not None:
            site = replace(statement.site, name=name, support=support)
            whole = site.constrain(leaf)
            if whole.shape == value.shape and torch.allclose(whole, value, rtol=1e-4):
                self.statements[name] = replace(statement, site=site)
                self.leaves[name], self.sources[sources[0]] = leaf, name
                return True
        refusal = self.unread[name] = site_refusal(name, _THROUGH.format(sources))
        # Sites that share a source are not independent of each other.
        for other in {self.sources[source] for source in sources if source in self.sources}:
            self.unread.setdefault(other, site_refusal(other, _SHARED.format(name)))
        raise refusal

    def parents(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the sites before one that a tensor depends on, by its gradients."""
        names = list(self.statements)
        return self._find_leaves(tensor, names[: names.index(name)])

    def find_in_factors(self) -> dict[str, str]:
        """Return the sites that factors of the density depend on, each with one of these."""
        names = list(self.statements)
        factors = self.factors.items()
        return {n: factor for factor, value in factors for n in self._find_leaves(value, names)}

    def _find_leaves(self, tensor: Tensor, names: list[str]) -> dict[str, Tensor]:
        leaves = {name: self.leaves[name] for name in names}
        if not leaves or not tensor.requires_grad:
            return {}
        gradients = torch.autograd.grad(
            tensor.sum(), [*leaves.values()], allow_unused=True, retain_graph=True
        )
        return {
            name: leaf
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
            if gradient is not None
        }

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return the Jacobian of a site's mean by the sites before it."""
        loc = self.statements[name].loc
        parents = self.parents(name, loc)
        if not parents:
            return {}
        rows = [
            torch.autograd.grad(element, [*parents.values()], retain_graph=True)
            for element in loc.reshape(-1)
        ]
        jacobians = {
            parent: torch.stack([row[i].reshape(-1) for row in rows])
            for i, parent in enumerate(parents)
        }
        return {parent: jacobian for parent, jacobian in jacobians.items() if jacobian.any()}


_SHARED = "it is the value of an auxiliary site, from which {!r} is computed, too"
_THROUGH = (
    "it is computed from the auxiliary sites {}, and is not one of them, element by element and "
    "alone; if an autoguide inside of this guide draws them, pass that one"
)


def _depends(value: Tensor, leaf: Tensor) -> bool:
    if not value.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True, retain_graph=True)
    return gradient is not None


def read_once(guide: Callable[..., Any], origin: Origin) -> GuideReader:
    """Run a guide in a `dry_run`, and look at what it does."""
    supports = find_supports(guide, origin)
    reader = GuideReader({}, {}, {}, frozenset(), supports, lambda _: None)
    with reader:
        call_program("guide", guide, origin)
    return reader


@contextmanager
def left_alone(guide: Any, *others: Any) -> Iterator[None]:
    """Check that a guide has all its parameters, and put back what it changes of itself.

    It runs inside, in a `dry_run`; parameters that are made there are a ValueError, unless they are
    those of other programs.
    """
    roots = [root for program in (guide, *others) for root in find_modules(program)]
    modules = [module for root in find_modules(guide) for module in root.modules()]
    attributes = [dict(vars(module)) for module in modules]
    contents = [{k: dict(v) for k, v in a.items() if isinstance(v, dict)} for a in attributes]
    # By name, since the copy of a guide takes the tensors that the store has under its names.
    named = [set(dict(root.named_parameters())) for root in roots]
    own = {id(p) for root in roots for p in root.parameters()}
    for root in find_modules(guide):
        if isinstance(root, PyroModule):
            for path, parameter in root.named_parameters():
                check_owned(".".join(filter(None, (root._pyro_name, path))), parameter)
    stored = set(pyro.get_param_store().keys())
    try:
        yield
        made = [
            name
            for name, p in pyro.get_param_store().named_parameters()
            if name not in stored and id(p) not in own
        ]
        for root, names in zip(roots, named, strict=True):
            made += dict(root.named_parameters()).keys() - names
    finally:
        for module, before, inside in zip(modules, attributes, contents, strict=True):
            for key, content in inside.items():
                before[key].clear()
                before[key].update(content)
            vars(module).clear()
            vars(module).update(before)
    if made:
        msg = (
            f"the guide has no parameters {sorted(set(made))} before it runs: it was never called, "
            "or Pyro's param store was cleared since. Expected a trained guide: train it by SVI, "
            "or load the param store"
        )
        raise ValueError(msg)


def find_supports(guide: Callable[..., Any], origin: Origin) -> dict[str, constraints.Constraint]:
    """Find the supports of the model's sites, for a guide that does not read them itself."""
    if origin.model is None or isinstance(guide, GuideMessenger):
        return {}
    drawn = PriorMessenger(*origin.args, **origin.kwargs)
    with poutine.block(), drawn, poutine.trace() as traced:
        call_program("model", origin.model, origin)
    latent = prune_subsample_sites(traced.trace).iter_stochastic_nodes()
    return {name: find_support(node["fn"]) for name, node in latent}


def call_program(what: str, program: Callable[..., Any], origin: Origin) -> None:
    """Run a program with the arguments of the origin; its errors get a note."""
    try:
        program(*origin.args, **origin.kwargs)
    except NotGaussianError:
        raise
    except Exception as error:
        error.add_note(
            f"the {what} could not be run to read the posterior. Expected it to run with the "
            "arguments given; pass those of the model, as when it was trained, on the device of "
            "the guide"
        )
        raise
