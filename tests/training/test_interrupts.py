"""Ctrl-C, threads, and what stands around a call: nothing is left behind, nothing goes wrong."""

import gc
import os
import random
import signal
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from pyro.util import set_rng_state
from torch._C import _functorch
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode, _len_torch_function_stack, _pop_mode, _push_mode
from torch.utils._python_dispatch import _len_torch_dispatch_stack

import pyro_bmr as bmr
from pyro_bmr.programs import dry_run as module

QUIET = {"compile": False, "progress": False}
# Where a run is interrupted: at so many functions that it calls, from few to all.
POINTS = 300 if "FUZZ" in os.environ else 8


class Regression(PyroModule):
    """With a parameter and a buffer of its own, which is counted in every run."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = torch.nn.Parameter(torch.tensor(0.1))
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x, y=None):
        self.runs += 1
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            mean = (x * w).sum(-1) + self.offset
            return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


@pytest.fixture
def problem():
    x = torch.randn(12, 3)
    y = 2 * x[:, 0] + 0.3 * torch.randn(12)
    model = Regression()
    guide = AutoNormal(model)
    bmr.fit(model, guide, x, y, num_epochs=30, lr=0.05, **QUIET)
    return model, guide, x, y


def fit(model, guide, x, y):
    bmr.fit(model, guide, x, y, num_epochs=6, batch_size=5, lr=0.01, **QUIET)


def prune(model, guide, x, y):
    bmr.prune(model, guide, x, y, num_epochs=2, max_rounds=2, num_samples=4, **QUIET)


def reduce(model, guide, x, y):
    bmr.reduce(guide, x, y)


def compare(model, guide, x, y):
    bmr.compare((model, guide), x, y, num_samples=25, progress=False)


def state_outside():
    """What no verb changes, whatever stops it."""
    return {
        "handlers": list(_PYRO_STACK),
        "plates": list(_DIM_ALLOCATOR._stack),
        "levels of vmap": _functorch.get_dynamic_layer_stack_depth(),
        "function modes": _len_torch_function_stack(),
        "dispatch modes": _len_torch_dispatch_stack(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "validation": torch.distributions.Distribution._validate_args,
        "hooks": len(torch_module._global_forward_pre_hooks),
        "filters": len(warnings.filters),
        "signal": signal.getsignal(signal.SIGINT),
        "default dtype": torch.get_default_dtype(),
    }


def generators():
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
    )


def values(program):
    return {name: value.detach().clone() for name, value in program.state_dict().items()}


class Interrupt:
    """Raises KeyboardInterrupt when the so-manieth function is called; counts them without.

    Not where what is in the process is written BY_HALVES, but at the next function. Some of what is
    raised is ``lost``: Python throws away what comes of a generator that it throws away, and where
    torch sets a mode aside or ends a level of vmap, its own clean-up fails in its place.
    """

    def __init__(self, at=None):
        self.at, self.count, self.lost = at, 0, False

    def __enter__(self):
        self.hook, sys.unraisablehook = sys.unraisablehook, self.lose
        sys.settrace(self)
        return self

    def __exit__(self, *exc):
        sys.settrace(None)
        sys.unraisablehook = self.hook

    def lose(self, unraisable):
        assert unraisable.exc_type is KeyboardInterrupt
        self.lost = True

    def __call__(self, frame, event, arg):
        self.count += 1
        if self.count == self.at:
            callers = set(names_of_callers(frame))
            if callers & BY_HALVES:
                self.at += 1
                return
            self.lost = bool(callers & FAIL_THEMSELVES)
            sys.settrace(None)
            raise KeyboardInterrupt


# Pyro's store has a parameter without its constraint, `warnings` a filter more.
BY_HALVES = {"pyro.params.param_store", "warnings"}
FAIL_THEMSELVES = {"vmap_increment_nesting", "handle_torch_function"}


def names_of_callers(frame):
    """Names of the functions that run, and of their modules."""
    while frame is not None:
        yield frame.f_code.co_name
        yield frame.f_globals.get("__name__", "")
        frame = frame.f_back


@pytest.mark.parametrize("verb", [fit, prune, reduce, compare])
def test_an_interrupt_leaves_everything_as_it_should_be(problem, verb):
    verb(*problem)  # imports what is imported late, which may filter warnings
    model, guide, x, y = problem
    before, model_before, outside = values(guide), values(model), state_outside()
    stored = sorted(pyro.get_param_store())
    with Interrupt() as whole:
        verb(*problem)
    changed = verb in (fit, prune)
    for i in range(POINTS):
        guide.load_state_dict(before)
        model.load_state_dict(model_before)
        at = 1 + (whole.count - 1) * i // POINTS
        torch.manual_seed(0)
        random_before = generators()
        interrupt = Interrupt(at)
        try:
            with interrupt:
                verb(*problem)
            # What is kept for later runs makes them shorter.
            assert interrupt.lost or interrupt.count < interrupt.at
        except KeyboardInterrupt:
            pass
        except RuntimeError:
            assert interrupt.lost, at
        assert state_outside() == outside, at
        if changed:
            assert all(value.isfinite().all() for value in values(guide).values())
        else:
            assert generators() == random_before, at
            assert sorted(pyro.get_param_store()) == stored
            for program, old in ((guide, before), (model, model_before)):
                now = values(program)
                assert all(torch.equal(now[name], value) for name, value in old.items()), at
    # All works again.
    torch.manual_seed(0)
    verb(*problem)


class Mode(TorchFunctionMode):
    """Fails once its block should have ended, as one does that holds a level of vmap."""

    over = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert not Mode.over
        return func(*args, **kwargs or {})


@pytest.fixture(autouse=True)
def no_mode_is_over(monkeypatch):
    monkeypatch.setattr(Mode, "over", False)


LEFT = {
    "handler": lambda: poutine.trace().__enter__(),
    "plate": lambda: pyro.plate("left", 3).__enter__(),
    "validation": lambda: pyro.enable_validation(False),
    "gradients": lambda: torch.set_grad_enabled(False),
    "level": lambda: _functorch._vmap_increment_nesting(3, "error"),
    "mode": lambda: Mode().__enter__(),
    "hook": lambda: torch_module.register_module_forward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_has_begun_ends_with_the_verb(problem, what):
    """As if its own end had been interrupted."""
    outside = state_outside()

    def stop(_):
        LEFT[what]()
        assert state_outside() != outside
        Mode.over = True
        raise KeyboardInterrupt

    # Ends of torch's own blocks, on the way out, ask the mode and fail.
    with pytest.raises(AssertionError if what == "mode" else KeyboardInterrupt):
        bmr.reduce(problem[1], select=stop)
    assert state_outside() == outside
    reduce(*problem)


def test_a_block_that_is_ended_late_changes_nothing_later(problem):
    """A generator that stays in a frame of the traceback, until the error is forgotten."""
    outside = state_outside()

    @contextmanager
    def aside():
        _pop_mode()
        try:
            yield
        finally:
            _push_mode(Mode())

    def stop(_):
        Mode().__enter__()
        block = aside()
        block.__enter__()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        bmr.reduce(problem[1], select=stop)
    assert state_outside() == outside
    del caught
    gc.collect()
    assert state_outside() == outside


def test_what_is_put_back_is_put_back_also_when_that_is_interrupted(problem, monkeypatch):
    model, guide, x, y = problem
    before, random_before, calls = values(model), generators(), []

    def interrupted(state):
        calls.append(state)
        if len(calls) == 1:
            raise KeyboardInterrupt
        set_rng_state(state)

    monkeypatch.setattr(module, "set_rng_state", interrupted)
    with pytest.raises(KeyboardInterrupt), module.dry_run(model):
        model(x, y)
        torch.randn(3), random.random()
        pyro.param("mine", torch.ones(2))
    assert len(calls) == 2
    assert generators() == random_before
    assert "mine" not in pyro.get_param_store()
    assert all(torch.equal(values(model)[name], value) for name, value in before.items())


def test_an_interrupted_step_leaves_the_parameters_of_the_one_before(problem):
    """Not some of them moved, and others not."""
    model, guide, x, y = problem
    start, model_start = values(guide), values(model)
    seen = []

    class Watched(torch.optim.Adam):
        def step(self):
            for group in self.param_groups:
                group["params"], rest = group["params"][:1], group["params"][1:]
                super().step()
                group["params"] += rest
            seen.append(1)
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "Adam", Watched)
        with pytest.raises(KeyboardInterrupt):
            fit(*problem)
    assert seen
    for program, before in ((guide, start), (model, model_start)):
        after = values(program)
        assert all(torch.equal(after[n], v) for n, v in before.items() if n != "runs")


def test_an_interrupted_round_of_prune_leaves_the_model_as_it_was_before_it(problem, monkeypatch):
    model, guide, x, y = problem
    import pyro_bmr.training.pruning as pruning

    calls, offsets = [], []

    def train_and_stop(*args, **options):
        offsets.append(problem[0].offset.item())
        train(*args, **options)
        calls.append(problem[0].offset.item())
        if len(calls) == 2:
            raise KeyboardInterrupt

    train = pruning.run_training
    monkeypatch.setattr(pruning, "run_training", train_and_stop)
    with pytest.raises(KeyboardInterrupt):
        bmr.prune(model, guide, x, y, num_epochs=5, num_samples=4, **QUIET)
    assert calls[1] != offsets[1]
    assert model.offset.item() == pytest.approx(offsets[1])


@pytest.mark.parametrize("verb", [fit, reduce])
def test_threads_take_turns(verb):
    """Pyro's handlers and its param store belong to the process."""

    def run(seed):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        model = Regression()
        guide = AutoNormal(model)
        bmr.fit(model, guide, x, x[:, 0], num_epochs=3, lr=0.1, **QUIET)
        verb(model, guide, x, x[:, 0])
        return values(guide).keys()

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(8)))
    assert all(one == results[0] for one in results)
    assert not _PYRO_STACK


def test_a_verb_waits_for_that_of_another_thread(problem):
    model, guide, x, y = problem
    order, inside = [], threading.Event()

    def slow(scores):
        inside.set()
        order.append("first")
        other.join(0.2)
        order.append("first again")
        return dict(scores.kept)

    def second():
        inside.wait(10)
        bmr.free_energy(model, guide, x, y, num_samples=2)
        order.append("second")

    other = threading.Thread(target=second)
    other.start()
    bmr.reduce(guide, x, y, select=slow)
    other.join()
    assert order == ["first", "first again", "second"]


@pytest.mark.parametrize("verb", [fit, prune, reduce, compare])
@pytest.mark.parametrize("handler", [poutine.trace, poutine.block], ids=["trace", "block"])
def test_handlers_that_watch_see_nothing_and_do_no_harm(problem, verb, handler):
    around = handler()
    with around:
        outer = list(_PYRO_STACK)
        verb(*problem)
        assert list(_PYRO_STACK) == outer
    if handler is poutine.trace:
        assert set(around.trace.nodes) <= {"_INPUT", "_RETURN"}


@pytest.mark.parametrize("verb", [fit, prune, reduce, compare])
def test_handlers_that_change_programs_are_refused(problem, verb):
    for around in (
        poutine.scale(scale=0.5),
        poutine.mask(mask=False),
        poutine.condition(data={"w": torch.zeros(3)}),
        pyro.plate("outer", 3),
    ):
        with around, pytest.raises(ValueError, match=f"got {verb.__name__} inside of .*Expected"):
            verb(*problem)
    assert not _PYRO_STACK


@pytest.mark.parametrize("verb", [fit, prune, reduce, compare])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients_do_no_harm(problem, verb, mode):
    model, guide, x, y = problem
    with mode():
        verb(model, guide, x + 0, y + 0)
        assert not torch.is_grad_enabled()
    fit(*problem)


def test_parameters_of_inference_mode_are_refused_by_name():
    x = torch.randn(6, 3)
    model = Regression()
    guide = AutoNormal(model)
    with torch.inference_mode():
        guide(x, x[:, 0])
    with pytest.raises((RuntimeError, ValueError), match=r"got .* made in torch.inference_mode"):
        fit(model, guide, x, x[:, 0])


@pytest.mark.parametrize("verb", [fit, prune])
def test_handlers_inside_of_a_callback_are_refused_too(problem, verb):
    model, guide, x, y = problem
    measured = []

    def measure(_):
        measured.append(bmr.free_energy(model, guide, x, y, num_samples=2))
        with poutine.trace(), poutine.scale(scale=100.0):
            bmr.free_energy(model, guide, x, y, num_samples=2)

    train = {"fit": bmr.fit, "prune": bmr.prune}[verb.__name__]
    with poutine.trace(), pytest.raises(ValueError, match="got free_energy inside of Scale"):
        train(model, guide, x, y, num_epochs=2, callback=measure, **QUIET)
    assert len(measured) == 1 and not _PYRO_STACK


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_forked_during_a_verb_of_another_thread(problem):
    model, guide, x, y = problem

    def fork(_):
        other = threading.Thread(target=in_thread)
        other.start()
        other.join()

    def in_thread():
        child = os.fork()
        if not child:
            signal.alarm(20)
            try:
                bmr.free_energy(model, guide, x, y, num_samples=2)
                os._exit(7)
            finally:
                os._exit(8)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    codes = []
    bmr.fit(model, guide, x, y, num_epochs=1, callback=fork, **QUIET)
    assert codes == [7]


def user_errors():
    class OwnError(ValueError):
        pass

    return [OwnError("a user's own"), ValueError("nan is what it says"), TypeError("own")]


@pytest.mark.parametrize("error", user_errors(), ids=lambda error: type(error).__name__)
def test_an_error_of_the_model_in_mid_training_stays_what_it_is(problem, error):
    own, _, x, y = problem
    calls = []

    def model(x, y=None):
        calls.append(0)
        if len(calls) > 6:
            raise error
        return own(x, y)

    with pytest.raises(type(error)) as caught:
        bmr.fit(model, AutoNormal(model), x, y, num_epochs=10, **QUIET)
    # Pyro makes another error of the same type, with the shapes of its trace.
    assert type(caught.value) is type(error) and str(caught.value).startswith(str(error))
    assert "the model and its guide could not be run" in caught.value.__notes__[0]


def test_an_error_of_a_learning_rate_stays_what_it_is(problem):
    model, guide, x, y = problem
    with pytest.raises(ZeroDivisionError) as caught:
        bmr.fit(model, guide, x, y, num_epochs=2, lr=lambda done: 1 / done, **QUIET)
    assert "which fails at 0" in caught.value.__notes__[0]
