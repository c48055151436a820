"""What each rank does in the tests of training by many processes."""

import os
import signal
import time
import warnings

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import RenyiELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributed.device_mesh import init_device_mesh

import pyro_bmr as bmr
from pyro_bmr.training import fitting, keeping, step_functions
from pyro_bmr.training.compilation import NotStaticError
from pyro_bmr.training.rates import hold_and_fall

NOISE, PRIOR = 0.5, 1.0
WEIGHTS = [1.0, 0.0, -1.0]


def make_data(count=48):
    """Columns that are orthogonal, so that the posterior has independent elements."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(count, 3, generator=generator))[0] * torch.tensor([3.0, 4, 5])
    return x, x @ torch.tensor(WEIGHTS) + NOISE * torch.randn(count, generator=generator)


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, PRIOR).expand([3]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def scaled_to_all(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, PRIOR).expand([3]).to_event(1))
    with pyro.plate("data", len(x)), pyro.poutine.scale(scale=48 / len(x)):
        pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


class Ranks:
    def __init__(self):
        self.size, self.rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        self.mesh = init_device_mesh("cpu", (self.size,))

    def own_rows(self):
        """The first rank has more than its share."""
        cuts = [0, *(4 + 44 * (i + 1) // self.size for i in range(self.size))]
        return [data[cuts[self.rank] : cuts[self.rank + 1]] for data in make_data()]

    def train(self, compile, *, data=None, program=model, guide=None, **options):
        pyro.clear_param_store()
        torch.manual_seed(self.rank)
        fitting._COMPILE_FROM = 0
        guide = AutoNormal(program, init_scale=0.1) if guide is None else guide
        given = {"num_epochs": 60, "lr": 0.02, "seed": 1, "progress": False, "mesh": self.mesh}
        losses = bmr.fit(
            program, guide, *(data or self.own_rows()), compile=compile, **given | options
        )
        return losses, {name: p.detach().flatten().tolist() for name, p in guide.named_parameters()}


def same_noise(ranks, folder):
    found = {
        "compiled": ranks.train(True, noise="same"),
        "eager": ranks.train(False, noise="same"),
    }
    if ranks.size < 4:
        found["scaled"] = ranks.train(False, noise="same", program=scaled_to_all, num_epochs=20)
    return found


def exact(ranks, folder):
    """Without noise; with it, another one in each rank; in batches of seven rows of all ranks."""
    options = {"num_epochs": 100, "lr": hold_and_fall(0.1), "estimator": "moments"}
    noisy = {"num_epochs": 150, "lr": hold_and_fall(0.03)}
    found = {
        "whole": ranks.train(False, **options)[1],
        "noise": ranks.train(True, **noisy)[1],
    }
    if ranks.size < 4:
        # Compiled once for all numbers of ranks, for compiling takes most of the time.
        batches = options | {"batch_size": 7, "num_epochs": 30}
        found["batches"] = ranks.train(ranks.size == 2, **batches)[1]
    return found


def fails(ranks, call):
    begin = time.monotonic()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        found = [None, " ".join(str(one.message) for one in caught)]
    except Exception as error:
        found = [type(error).__name__, str(error)]
    return [*found, time.monotonic() - begin]


def errors(ranks, folder):
    """What goes wrong in the last rank alone."""
    here = ranks.rank == ranks.size - 1
    x, y = ranks.own_rows()
    bad = y.index_fill(0, torch.tensor([1]), torch.nan) if here else y
    steps = iter(range(10**6))

    def failing(x, y=None):
        if here and torch.is_grad_enabled() and next(steps) == 5:
            raise KeyError("no such row")
        model(x, y)

    def callback(epoch):
        if here and epoch.epoch == 3:
            raise OSError("disk full")

    def wider(x, y=None):
        with pyro.poutine.reparam(config={}):
            w = pyro.sample("w", dist.Normal(0.0, PRIOR).expand([3 + here]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w[:3], NOISE), obs=y)

    def subsampling(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, PRIOR).expand([3]).to_event(1))
        with pyro.plate("data", len(ranks.own_rows()[0]), subsample=torch.arange(len(x))):
            pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)

    def closing(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, PRIOR).expand([3]).to_event(1))
        x, y = ranks.own_rows()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)

    def centering(x, y=None):
        return model(x - x.mean(0), y)

    def prior_of_own(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0 + ranks.rank).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)

    def changing():
        """Only in the last rank, between tracing and comparing."""
        runs = iter(range(10**6))

        def program(x, y=None):
            return model(x * (1.0 + here * (torch.is_grad_enabled() and next(runs))), y)

        ranks.train(True, program=program, num_epochs=1)

    def failing_later():
        runs = iter(range(10**6))

        def program(x, y=None):
            # As it is compared, with gradients, for the first time after it is traced.
            if here and torch.is_grad_enabled() and next(runs) == 3:
                raise KeyError("no such row")
            model(x, y)

        ranks.train(True, program=program)

    compile_step = step_functions.compile_step

    def no_compiler(*args):
        if here:
            raise NotStaticError("the compiler is missing")
        return compile_step(*args)

    def without_compiler():
        step_functions.compile_step = no_compiler
        try:
            ranks.train(True)
        finally:
            step_functions.compile_step = compile_step

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    kept = {"num_epochs": 2, "checkpoint": folder / "errors.fit"}
    ranks.train(False, **kept)
    return {
        "other rows": fails(ranks, lambda: ranks.train(False, data=(x, y.flip(0)), **kept)),
        "one checkpoint": fails(
            ranks, lambda: ranks.train(False, checkpoint=kept["checkpoint"] if here else None)
        ),
        "NaN": fails(ranks, lambda: ranks.train(False, data=(x, bad))),
        "model": fails(ranks, lambda: ranks.train(False, program=failing)),
        "callback": fails(ranks, lambda: ranks.train(False, callback=callback)),
        "option": fails(ranks, lambda: ranks.train(False, lr=-1.0 if here else 1.0)),
        "other options": fails(ranks, lambda: ranks.train(False, num_epochs=3 + here)),
        "other parameters": fails(ranks, lambda: ranks.train(False, program=wider)),
        "blown up": fails(ranks, lambda: ranks.train(False, lr=1e30)),
        "no compiler": fails(ranks, without_compiler),
        "a plate of the rank": fails(
            ranks, lambda: ranks.train(False, program=subsampling, batch_size=6)
        ),
        "data of a closure": fails(ranks, lambda: ranks.train(False, program=closing)),
        "other priors": fails(ranks, lambda: ranks.train(False, program=prior_of_own)),
        "a mean of rows": fails(ranks, lambda: ranks.train(False, program=centering)),
        "a bound": fails(
            ranks, lambda: ranks.train(False, estimator=RenyiELBO(alpha=0.5, num_particles=2))
        ),
        "one changes": fails(ranks, changing),
        "one fails": fails(ranks, failing_later),
        "one row": fails(ranks, lambda: ranks.train(False, data=(x[:1], y[:1]))),
        "a large batch": fails(ranks, lambda: ranks.train(False, batch_size=49)),
        "a loader": fails(ranks, lambda: ranks.train(False, data=(loader,))),
        "no mesh": fails(ranks, lambda: ranks.train(False, mesh=None, num_epochs=1)),
        "after all": fails(ranks, lambda: ranks.train(False, num_epochs=2)),
    }


def killed(ranks, folder):
    """The last rank is killed in the eighth epoch, if it runs for the first time."""
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    return unhurt(ranks, folder, kill_at=8 if first and ranks.rank == ranks.size - 1 else None)


def unhurt(ranks, folder, kill_at=None):
    keeping._LEAST_APART, keeping._MOST_WRITING = 0.0, 1.0
    epochs = []

    def callback(epoch):
        epochs.append(epoch.epoch)
        if epoch.epoch == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    options = {"num_epochs": 12, "callback": callback, "checkpoint": folder / "run.fit"}
    losses, parameters = ranks.train(False, **options)
    return {"losses": losses, "parameters": parameters, "began": epochs[0] if epochs else None}
