"""Plain modules and ONNX files: the model's own numbers, without the model."""

from __future__ import annotations

import copy
import io
import pickletools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from networks import NETWORKS, Network, Regression
from often import often
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal
from torch import nn
from unit_pruning import prune_units

import pyro_bmr as bmr
from pyro_bmr.compaction import compact


def reduced(net, seed=0):
    """A reduction of a network that was not trained, with half of its elements pruned."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    if isinstance(net.model, nn.Module):
        net.model.eval()
    guide = AutoNormal(net.model, init_scale=0.2)
    guide(*net.args)
    with torch.no_grad():
        for name, value in net.draw(seed).items():
            loc = torch.distributions.biject_to(guide.prototype_trace.nodes[name]["fn"].support)
            parts = name.split(".")
            owner = guide.locs
            for part in parts[:-1]:
                owner = getattr(owner, part)
            getattr(owner, f"{parts[-1]}_unconstrained").copy_(loc.inv(value))
    return bmr.reduce(guide, select=bmr.baselines.random(0.5, seed=seed))


def close(first, second, tolerance=1e-5):
    return (first - second).abs().max() <= tolerance * second.abs().max().clamp(min=1e-3)


OFTEN = ("functional_mlp", "lenet", "gru_cell", "embedding_mlp")


@pytest.mark.parametrize("name", often([*OFTEN, "plated_mlp", "residual_cnn", "vit"], *OFTEN))
def test_same_numbers(name):
    """At the location and in draws, also on other numbers of data."""
    net = NETWORKS[name]()
    result = reduced(net)
    x, y = net.args
    module = bmr.to_module(result.model, result.guide, x, y)
    expected = net.outputs(result.guide.median()).detach()
    assert close(module(x), expected)
    assert close(module(x[:1]), expected[:1])
    assert close(module(torch.cat([x] * 3)), torch.cat([expected] * 3))
    ensemble = bmr.to_module(result.model, result.guide, x, y, num_samples=3, seed=5)
    torch.manual_seed(5)
    each = torch.stack([net.outputs(result.guide(x, y)).detach() for _ in range(3)])
    assert ensemble(x).shape == each.shape
    assert close(ensemble(x), each)
    assert close(ensemble(x[:1]), each[:, :1])
    assert len(each.flatten().unique()) > 3


@pytest.mark.parametrize("name", ["module_mlp", "residual_cnn"])
def test_compacted(name):
    """The module of a compaction is that of its reduction, smaller."""
    net = NETWORKS[name]()
    result = prune_units(reduced(net))
    small = compact(result.model, result.guide)
    x = net.args[0]
    ensemble = bmr.to_module(small.model, small.guide, *net.args, num_samples=2)
    module = bmr.to_module(small.model, small.guide, *net.args)
    whole = bmr.to_module(result.model, result.guide, *net.args)
    assert close(module(x), whole(x))
    assert close(module(x[:1]), whole(x[:1]))
    assert ensemble(x).shape == (2, *net.args[1].shape)
    for smaller, draws in ((module, 1), (ensemble, 2)):
        assert sum(p.numel() for p in smaller.parameters()) < draws * small.elements[0]


def test_plain():
    """A module of torch alone: state under the names of sites, pruned zeros, no aliases."""
    net = NETWORKS["residual_cnn"]()
    result = reduced(net)
    x, _ = net.args
    module = bmr.to_module(result.model, result.guide, *net.args)
    weights = dict(module.named_parameters())
    for name, mask in result.model.masks.by_site().items():
        assert (weights[name][~mask] == 0).all()
    assert any("running_mean" in name for name, _ in module.named_buffers())
    own = {t.data_ptr() for t in [*net.model.parameters(), *net.model.buffers()]}
    assert own.isdisjoint(t.data_ptr() for t in module.state_dict().values())
    assert all("pyro" not in type(part).__module__ for part in module.modules())
    file = io.BytesIO()
    torch.save(module, file)
    assert "pyro" not in "".join(str(arg) for _, arg, _ in pickletools.genops(_pickle(file)))
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
    twice = torch.cat([x, x])
    assert close(program.module()(twice), module(twice))
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def _pickle(file):
    import zipfile

    with zipfile.ZipFile(file) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
        return archive.read(name)


def test_guest():
    """Generators, buffers, parameters and the store are left alone, and so is training mode."""
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    args = (torch.randn(5, 3), torch.randn(5, 2))
    names = tuple(f"net.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias"))
    net = Network(Regression(bmr.bayesianize(network)), args, names)
    result = reduced(net)
    net.model.train()
    before = {k: v.clone() for k, v in net.model.state_dict().items()}
    stored = {k: v.clone() for k, v in pyro.get_param_store().items()}
    random = torch.get_rng_state()
    module = bmr.to_module(result.model, result.guide, *net.args)
    first = bmr.to_module(result.model, result.guide, *net.args, num_samples=2)
    again = bmr.to_module(result.model, result.guide, *net.args, num_samples=2)
    other = bmr.to_module(result.model, result.guide, *net.args, num_samples=2, seed=1)
    module(net.args[0])
    assert torch.equal(torch.get_rng_state(), random)
    after = net.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert stored.keys() == pyro.get_param_store().keys()
    assert net.model.training
    x = net.args[0]
    assert torch.equal(first(x), again(x))
    assert not torch.allclose(first(x), other(x))
    # As the model does it: in training mode a batch norm takes the statistics of the batch.
    assert close(module(x), net.outputs(result.guide.median()).detach())


def classifier(returns):
    """A classifier that returns its logits and labels, or what is no tensor."""
    net = bmr.bayesianize(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)))

    def model(x, y=None):
        logits = net(x)
        pyro.deterministic("twice", 2 * logits)
        with pyro.plate("data", len(x)):
            label = pyro.sample("label", dist.Categorical(logits=logits), obs=y)
        both = {"logits": logits, "label": label, "n": None}
        return both if returns == "both" else dist.Normal(0.0, 1.0)

    x, y = torch.randn(6, 3), torch.randint(4, (6,))
    guide = AutoNormal(model)
    guide(x, y)
    return bmr.reduce(guide, select=bmr.top_k(20)), net, x, y


def test_outputs():
    result, net, x, y = classifier("both")
    values = result.guide.median()
    logits = pyro.poutine.condition(net, values)(x).detach()

    def output(args=(x,), model=result.model, **options):
        return bmr.to_module(model, result.guide, *args, **options)(x)

    for both in (output(), output((x, y))):
        assert close(both["logits"], logits)
        assert close(both["label"], logits.softmax(-1))
        assert both["n"] is None

    def returns_nothing(x, y=None):
        result.model(x, y)

    def returns_labels(x, y=None):
        return result.model(x, y)["label"]

    assert close(output(model=returns_nothing), logits.softmax(-1))
    assert close(output((x, y), model=returns_labels), logits.softmax(-1))
    assert close(output(output="twice"), 2 * logits)
    assert close(output(output="logits"), logits.log_softmax(-1))
    assert close(output((x, y), output="label.logits"), logits.log_softmax(-1))
    module = bmr.to_module(result.model, result.guide, x, output="0.weight")
    assert torch.equal(module(), values["0.weight"])


def test_regression_mean():
    """The mean that Predictive's draws have."""
    net = NETWORKS["functional_mlp"]()
    result = reduced(net)
    x, _ = net.args
    module = bmr.to_module(result.model, result.guide, x)
    values = {name: v.expand(400, *v.shape) for name, v in result.guide.median().items()}
    draws = Predictive(result.model, values)(x)["y"]
    assert (draws.mean(0) - module(x)).abs().max() < 6 * 0.1 / 400**0.5
    scale = bmr.to_module(result.model, result.guide, x, output="scale")
    assert torch.equal(scale(x[:3]), torch.full((3, 2), 0.1))


def test_bad_outputs():
    result, _, x, y = classifier("object")
    with pytest.raises(ValueError, match="returns a Normal. Expected tensors"):
        bmr.to_module(_with_tensor(result.model), result.guide, x)
    with pytest.raises(ValueError, match=r"output='elbow'.*'label', 'twice'.*'logits', 'probs'"):
        bmr.to_module(result.model, result.guide, x, output="elbow")
    with pytest.raises(ValueError, match="num_samples=0"):
        bmr.to_module(result.model, result.guide, x, num_samples=0)
    with pytest.raises(TypeError, match="without a median"):
        bmr.to_module(result.model, lambda x: None, x)

    def two(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("a", dist.Normal(w * x, 1.0).to_event(1), obs=x)
        pyro.sample("b", dist.Cauchy(w * x, 1.0).to_event(1), obs=x)

    guide = AutoNormal(two)
    guide(torch.ones(3))
    with pytest.raises(ValueError, match="2 observed sites"):
        bmr.to_module(two, guide, torch.ones(3))
    assert bmr.to_module(two, guide, torch.ones(3), output="b.loc")(torch.ones(2)).shape == (2,)


def _with_tensor(model):
    return lambda *args: (torch.zeros(1), model(*args))


def test_random_outputs():
    """Dropout in training mode, and sites that the guide does not hold."""
    net = bmr.bayesianize(nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 1)))

    def model(x, y=None):
        mean = net(x)[:, 0]
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    x = torch.randn(6, 3)
    guide = AutoNormal(model)
    guide(x, x[:, 0])
    with pytest.raises(ValueError, match=r"random numbers.*dropout.*model.eval\(\)"):
        bmr.to_module(model, guide, x)
    net.eval()
    assert bmr.to_module(model, guide, x)(x).shape == (6,)

    def partial(x, y=None):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        return model(x, y) + z

    with pytest.raises(ValueError, match="random numbers"):
        bmr.to_module(partial, guide, x)


def linear(likelihood):
    """A model of one linear map, its guide, and data."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        mean = x @ w
        with pyro.plate("data", len(x)):
            pyro.sample("y", likelihood(mean), obs=y)

    x = torch.randn(6, 3)
    guide = AutoNormal(model)
    guide(x, torch.full((6,), 0.5))
    return model, guide, x


def test_moments_that_do_not_exist():
    """A Student's t has a mean with three degrees of freedom, none with one: no NaN gets out."""
    model, guide, x = linear(lambda mean: dist.StudentT(3.0, mean, 1.0))
    module = bmr.to_module(model, guide, x)
    assert close(module(x[:2]), x[:2] @ guide.median()["w"])
    for without in (lambda m: dist.Cauchy(m, 1.0), lambda m: dist.StudentT(1.0, m, 1.0)):
        model, guide, x = linear(without)
        with pytest.raises(ValueError, match=r"holds NaN .*pass output="):
            bmr.to_module(model, guide, x)
        assert bmr.to_module(model, guide, x, output="loc")(x).shape == (6,)
    logistic = dist.transforms.SigmoidTransform()
    model, guide, x = linear(
        lambda m: dist.TransformedDistribution(dist.Normal(m, 1.0), [logistic])
    )
    with pytest.raises(ValueError, match="has no mean. Expected the model to return"):
        bmr.to_module(model, guide, x)


def test_branches_on_values():
    model, guide, x = linear(lambda mean: dist.Normal(mean if mean.sum() > 0 else 2 * mean, 1.0))
    with pytest.raises(ValueError, match=r"could not be recorded .*torch.where\(x > 0, a, b\)"):
        bmr.to_module(model, guide, x)


def test_positive_sites_and_own_parameters():
    """A LogNormal site pruned at 1, a Gamma posterior, `pyro.param`, a frozen parameter."""
    frozen = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]), requires_grad=False)

    def model(x, y=None):
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(3), 1.0).to_event(1))
        precision = pyro.sample("precision", dist.Gamma(2.0, 2.0))
        shift = pyro.param("shift", torch.tensor(0.5))
        gain = pyro.param("gain", torch.tensor(2.0), constraint=dist.constraints.positive)
        mean = (x * scale) @ frozen * gain + shift
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, precision.rsqrt()), obs=y)

    x = torch.randn(5, 3)
    guide = bmr.mean_field(model, gamma=["precision"])
    guide(x, x[:, 0])
    model(x)
    keep = {"scale": torch.tensor([True, False, True])}
    at_one = {"scale": bmr.Spike(loc=1.0)}
    result = bmr.reduce(guide, reduced_prior=at_one, select=lambda scores: keep)
    module = result.to_module(x, num_samples=3, seed=2)
    assert (module.scale[:, 1] == 1).all()
    assert len(module.scale[:, 0].unique()) == 3
    torch.manual_seed(2)
    draws = [result.guide(x)["scale"] for _ in range(3)]
    assert close(module(x), torch.stack([2 * (x * scale) @ frozen + 0.5 for scale in draws]))
    trained = {name: p.requires_grad for name, p in module.named_parameters()}
    assert trained.pop("shift")
    assert trained.pop("gain_unconstrained")
    assert trained.pop("scale")
    assert list(trained.values()) == [False]
    noise = result.to_module(x, output="y.scale")
    assert close(noise(x[:2]), result.guide.median()["precision"].rsqrt().expand(2))


def test_averaging_guides():
    model, guide, x = linear(lambda mean: dist.Normal(mean, 1.0))
    mixture = bmr.average(guide, x)
    for options in ({}, {"num_samples": 2}):
        with pytest.raises(TypeError, match="AveragedGuide without a median"):
            bmr.to_module(mixture.model, mixture.guide, x, **options)


def test_local_sites():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            return pyro.sample("y", dist.Normal(x * w + z, 1.0), obs=y)

    x = torch.randn(6)
    guide = AutoNormal(model)
    guide(x, x)
    with pytest.raises(ValueError, match=r"site 'z' has the shape .* single data"):
        bmr.to_module(model, guide, x, x)


def test_one_size_only():
    """A model with the number of data written in it."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 6):
            return pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    x = torch.randn(6, 2)
    guide = AutoNormal(model)
    guide(x, x[:, 0])
    for options in ({}, {"num_samples": 2}):
        with pytest.warns(UserWarning, match="takes 6 data as in the example, and no other"):
            module = bmr.to_module(model, guide, x, **options)
        assert module(x).shape[-1] == 6


def test_writing_in_place_and_keyword_arguments():
    def model(x, *, mask, scale=2.0, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        out = torch.zeros(x.shape[0], 2)
        out[:, 0] = x @ w
        out[:, 1].add_(scale)
        return out * mask

    x, mask = torch.randn(5, 3), torch.tensor([1.0, 3.0])
    guide = AutoNormal(model)
    guide(x, mask=mask)
    options = {"kwargs": {"mask": mask, "scale": 4.0}}
    module = bmr.to_module(model, guide, x, **options)
    expected = torch.stack([x @ guide.median()["w"], torch.full((5,), 12.0)], 1)
    assert close(module(x, mask), expected)
    ensemble = bmr.to_module(model, guide, x, num_samples=2, **options)
    assert ensemble(x[:2], mask).shape == (2, 2, 2)
    assert (ensemble(x, mask)[..., 1] == 12).all()


ALONE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "pyro", "pyro_bmr"}:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import numpy, onnxruntime
for path in sys.argv[1:]:
    session = onnxruntime.InferenceSession(path + ".onnx")
    (place,) = session.get_inputs()
    x = numpy.load(path + ".npy")
    numpy.save(path + ".out.npy", session.run(None, {place.name: x})[0])
assert not {"torch", "pyro", "pyro_bmr"} & set(sys.modules)
"""


@pytest.mark.rare
@pytest.mark.parametrize(("name", "num_samples"), [("lenet", 3), ("gru_cell", None)])
def test_onnx_without_torch(name, num_samples, tmp_path):
    """A process with numpy and ONNX Runtime alone gives the outputs of the masked network."""
    net = NETWORKS[name]()
    if name == "gru_cell":
        net = replace(net, args=(net.args[0][:, :2], net.args[1]))
    result = prune_units(reduced(net))
    small = compact(result.model, result.guide)
    x = net.args[0].repeat(3, *[1] * (net.args[0].dim() - 1))
    whole = bmr.to_module(result.model, result.guide, *net.args)
    module = small.to_module(num_samples=num_samples) if num_samples else whole
    small.export_onnx(tmp_path / "net.onnx", num_samples=num_samples)
    np.save(tmp_path / "net.npy", x.numpy())
    expected = module(x).detach()
    command = [sys.executable, "-c", ALONE, str(tmp_path / "net")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert close(torch.from_numpy(np.load(tmp_path / "net.out.npy")), expected)
    assert expected.flatten().unique().numel() > 3
    assert not list(tmp_path.glob("*.data"))


def test_onnx_of_model_and_guide(tmp_path, monkeypatch):
    result, _, x, y = classifier("object")
    path = tmp_path / "classifier.onnx"
    monkeypatch.setattr("pyro_bmr.export.onnx_files.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install pyro-bmr\[export\]"):
        bmr.export_onnx((result.model, result.guide), path, x, y)
    monkeypatch.undo()
    path.write_text("before")
    monkeypatch.setattr("pyro_bmr.export.onnx_files.relative_error", lambda *_: 1e-4)
    with pytest.raises(ValueError, match="differ from those of torch by 1.0e-04"):
        bmr.export_onnx((result.model, result.guide), path, x, y, output="logits")
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["classifier.onnx"]


def test_masks_of_a_plain_module():
    plain = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    net = bmr.bayesianize(plain)
    guide = AutoNormal(net, init_loc_fn=bmr.init_to_pretrained(net))
    x = torch.randn(6, 3)
    guide(x)
    result = bmr.reduce(guide, x, select=bmr.baselines.random(0.5, seed=0))
    masks = result.model.masks.by_site()
    expected = bmr.to_module(result.model, result.guide, x)(x)
    pruned = bmr.apply_masks(copy.deepcopy(plain), masks)
    assert close(pruned(x), expected)
    prefixed = {f"net.{name}": mask for name, mask in masks.items()}
    assert close(bmr.apply_masks(copy.deepcopy(plain), prefixed)(x), expected)
    renamed = {f"site {name}": mask for name, mask in masks.items()}
    module = bmr.apply_masks(
        copy.deepcopy(plain), renamed, rename=lambda n: n.removeprefix("site ")
    )
    assert close(module(x), expected)
    with pytest.raises(ValueError, match=r"site 'site 0.weight'.* no parameter.*rename="):
        bmr.apply_masks(copy.deepcopy(plain), renamed)
    wrong = {"0.weight": torch.zeros(5, 2, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"\(5, 2\) for the site '0.weight'.*\(5, 3\)"):
        bmr.apply_masks(plain, wrong)
    assert [*plain.state_dict()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    whole = {"noise": torch.ones(2, dtype=torch.bool)}
    assert bmr.apply_masks(plain, whole) is plain


LAYOUTS = {
    "turned": lambda x: x.rot90(1, (2, 3)),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "every second": lambda x: x[::2],
    "repeated": lambda x: x[:1].expand(3, -1, -1, -1),
}


@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("example", ["contiguous", *LAYOUTS])
def test_inputs_in_any_layout(example, num_samples):
    """Views that were recorded are right for inputs whose elements lie otherwise in memory."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4), nn.Tanh(), nn.Linear(4, 2)
    )
    model = Regression(bmr.bayesianize(net))
    images = torch.randn(4, 2, 6, 6)
    x = images if example == "contiguous" else LAYOUTS[example](images)
    guide = AutoNormal(model, init_scale=0.2)
    guide(x, torch.randn(len(x), 2))
    module = bmr.to_module(model, guide, x, num_samples=num_samples)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(72, 2))
    plain = Regression(bmr.bayesianize(flat))
    plain_guide = AutoNormal(plain, init_scale=0.2)
    plain_guide(x, torch.randn(len(x), 2))
    plain_module = bmr.to_module(plain, plain_guide, x, num_samples=num_samples)
    for one in (module, plain_module):
        for change in LAYOUTS.values():
            assert torch.equal(one(change(images)), one(change(images).contiguous()))


def test_float64():
    torch.manual_seed(0)
    net = bmr.bayesianize(nn.Linear(3, 2, dtype=torch.float64))
    guide = AutoNormal(net)
    x = torch.randn(4, 3, dtype=torch.float64)
    guide(x)
    module = bmr.to_module(net, guide, x, num_samples=2)
    assert module(x).dtype == torch.float64
    assert {p.dtype for p in module.parameters()} == {torch.float64}
