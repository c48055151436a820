"""What each rank does in the tests of measuring and pruning by many processes."""

import os
import shutil
import signal

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value
from ranks import NOISE, PRIOR, fails, make_data, model

import pyro_bmr as bmr
from pyro_bmr.training import keeping
from pyro_bmr.training.checkpoints import Checkpoint

LOCS, SCALE = (0.9, 0.3, 0.02), 0.12


def make_guide(x, y, family=AutoNormal, program=model, locs=LOCS):
    pyro.clear_param_store()
    start = init_to_value(values={"w": torch.tensor(locs)})
    guide = family(program, init_loc_fn=start, init_scale=SCALE)
    guide(x, y)
    return guide


def read(result):
    return {
        "masks": result.masks["w"].tolist(),
        "parameters": {
            n: p.detach().flatten().tolist() for n, p in result.guide.named_parameters()
        },
        "realised": [result.realised, result.realised_error],
    }


def subsampling(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, PRIOR).expand([3]).to_event(1))
    with pyro.plate("data", len(make_data()[0]), subsample=torch.arange(len(x))):
        pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def measuring(ranks, folder):
    x, y = ranks.own_rows()
    guide = make_guide(x, y)
    rows = {"mesh": ranks.mesh}
    in_parts = bmr.by_free_energy(batch_size=3, effort=12, progress=False)
    found = {
        "in parts": bmr.free_energy(model, guide, x, y, num_samples=40, batch_size=3, **rows),
        "reduced": read(bmr.reduce(guide, x, y, **rows)),
        "reduced in parts": read(bmr.reduce(guide, x, y, select=in_parts, **rows)),
    }
    scaled = make_guide(x, y, program=subsampling)
    found["plate of all"] = bmr.free_energy(subsampling, scaled, x, y, num_samples=40, **rows)
    torch.manual_seed(ranks.rank)
    # Of correlated weights these are drawn, and not what is computed from them for each row.
    joint = make_guide(x, y, AutoMultivariateNormal)
    return found | {"joint": bmr.free_energy(model, joint, x, y, num_samples=20, **rows)}


def measuring_errors(ranks, folder):
    """What goes wrong in the last rank alone, or ranks that differ."""
    here = ranks.rank == ranks.size - 1
    x, y = ranks.own_rows()
    bad = y.index_fill(0, torch.tensor([1]), torch.nan) if here else y
    calls = iter(range(10**6))

    def reduce(x=x, y=y, program=model, locs=LOCS, guide=None, **options):
        guide = make_guide(x, y, program=program, locs=locs) if guide is None else guide
        bmr.reduce(guide, x, y, **{"mesh": ranks.mesh} | options)

    def failing(x, y=None):
        if here and next(calls) > 40:
            raise KeyError("no such row")
        model(x, y)

    def prior_of_rows(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, x.abs().mean()).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)

    def latent_rows(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, PRIOR).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x @ w, NOISE))
            pyro.sample("y", dist.Normal(z, NOISE), obs=y)

    def select(scores):
        if here:
            raise KeyError("no such mask")
        return bmr.by_free_energy(progress=False)(scores)

    def unlike(scores):
        return {"w": torch.arange(3) != ranks.rank}

    def callback(epoch):
        if here and epoch.round == 1:
            raise OSError("disk full")

    def prune(**options):
        given = {"num_epochs": 2, "max_rounds": 1, "num_samples": 4, "progress": False}
        given |= {"select": bmr.by_evidence(), "compile": False, "mesh": ranks.mesh}
        bmr.prune(model, make_guide(x, y), x, y, **given | options)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    other = (0.9, 0.3, 0.02 + 0.01 * here)
    cases = {
        "NaN": lambda: reduce(y=bad),
        "model": lambda: reduce(program=failing),
        "other posteriors": lambda: reduce(locs=other),
        "a prior of rows": lambda: reduce(program=prior_of_rows),
        "latent rows": lambda: bmr.free_energy(
            latent_rows, AutoNormal(latent_rows), x, y, mesh=ranks.mesh
        ),
        "a selection": lambda: reduce(select=select),
        "other masks": lambda: reduce(select=unlike),
        "one row": lambda: reduce(x=x[: 2 - here], y=y[: 2 - here]),
        "a loader": lambda: bmr.reduce(make_guide(x, y), loader, mesh=ranks.mesh),
        "an estimator": lambda: bmr.free_energy(
            model, make_guide(x, y), x, y, estimator=Trace_ELBO(), mesh=ranks.mesh
        ),
        "a loss": lambda: prune(estimator=RenyiELBO()),
        "a callback": lambda: prune(callback=callback),
        "a checkpoint": lambda: prune(checkpoint=folder if ranks.rank == 0 else folder / "x"),
        "no mesh": lambda: reduce(mesh=None, select=bmr.by_evidence()),
        "after all": prune,
    }
    return {name: fails(ranks, call) for name, call in cases.items()}


def pruned(ranks, folder, kill=False):
    """From a checkpoint if there is one; the one after the first round is kept as it is then."""
    keeping._LEAST_APART, keeping._MOST_WRITING = 0.0, 1.0
    x, y = ranks.own_rows()
    path, early = folder / f"{ranks.size}.prune", folder / "early.prune"
    if ranks.size == 4 and ranks.rank == 0:
        shutil.copy(early, path)
    write, states, epochs = Checkpoint.write, [], []

    def spying(self, last, ahead):
        write(self, last, ahead)
        states.append(last)
        if len(states) == 2:
            if ranks.rank == 0 and ranks.size == 2:
                shutil.copy(path, early)
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)

    Checkpoint.write = spying
    torch.manual_seed(ranks.rank)
    if ranks.rank == 0:
        # What one process has done before is nothing to the others.
        bmr.reduce(make_guide(x, y), select=bmr.by_evidence())
    given = {"num_epochs": 15, "lr": 0.05, "seed": 1, "num_samples": 20, "progress": False}
    try:
        result = bmr.prune(
            *(model, make_guide(x, y), x, y),
            **given,
            compile=False,
            mesh=ranks.mesh,
            checkpoint=path,
            callback=lambda epoch: epochs.append(epoch.round),
        )
    finally:
        Checkpoint.write = write
    rounds = [[one.free_energy, one.sparsity, one.counts] for one in result.rounds]
    return {**read(result), "rounds": rounds, "began": epochs[0] if epochs else None}


def pruned_killed(ranks, folder):
    """The last rank is killed after the first round, if it runs for the first time."""
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    return pruned(ranks, folder, kill=first and ranks.rank == ranks.size - 1)
