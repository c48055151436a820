"""Compacted models compute what masked ones do on calls unlike that which they were made with."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from networks import Regression, _normal, _observe
from pyro import poutine
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal, init_to_sample
from torch import nn
from torch.nn import functional as F

import pyro_bmr as bmr
from pyro_bmr.nn import bayesianize


def compact(model, args, pruned, guide_type=AutoNormal):
    torch.manual_seed(0)
    guide = guide_type(model, init_loc_fn=init_to_sample, init_scale=0.1)
    guide(*args)

    def select(scores):
        masks = {n: torch.ones(t.shape, dtype=torch.bool) for n, t in scores.delta_f.items()}
        for name, index in pruned:
            masks[name][index] = False
        return masks

    result = bmr.reduce(guide, select=select)
    return result, result.compact()


def shapes(compaction):
    return {name: tuple(value.shape) for name, value in compaction.guide.median().items()}


def mean_at(model, values, args):
    with torch.no_grad():
        trace = poutine.trace(poutine.condition(model, values)).get_trace(*args)
    return trace.nodes["y"]["fn"].mean


def assert_same(result, compaction, *args):
    values = result.guide.median()
    left = compaction.guide.median()
    torch.testing.assert_close(
        mean_at(compaction.model, left, args), mean_at(result.model, values, args)
    )


def read(x):
    return torch.tanh(x @ _normal("w1", 3, 6)) @ _normal("w2", 6, 2)


FIRST_TWO = [("w2", slice(2))]
"""Units 0 and 1 of `read` are read by nothing."""


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integers_that_are_zero_in_the_example(dtype):
    def model(x, y=None):
        return _observe(torch.tanh(x.float() @ _normal("w1", 3, 6)) @ _normal("w2", 6, 2), y)

    x = torch.tensor([[1, 1, 0]] * 4).to(dtype)
    result, compaction = compact(model, (x, torch.randn(4, 2)), [("w1", (slice(2), 0))])
    assert shapes(compaction)["w1"] == (3, 6)
    assert_same(result, compaction, torch.ones_like(x))


@pytest.mark.parametrize("look_up", [
    lambda table, x: F.embedding(x, table),
    lambda table, x: table[x],
    lambda table, x: table.index_select(0, x.flatten()).view(4, 3, 4),
    lambda table, x: table[:, None].expand(-1, 3, -1).gather(0, x[..., None].expand(-1, -1, 4)),
])  # fmt: skip
def test_tokens_that_are_not_in_the_example(look_up):
    def model(x, y=None):
        return _observe(look_up(_normal("table", 7, 4), x).sum(1) @ _normal("w", 4, 2), y)

    x, y = torch.randint(6, (4, 3)), torch.randn(4, 2)
    # One column lives for the last token only, and one for none.
    pruned = [("table", (slice(6), 1)), ("table", (slice(7), 2))]
    result, compaction = compact(model, (x, y), pruned)
    assert shapes(compaction) == {"table": (7, 3), "w": (3, 2)}
    assert_same(result, compaction, torch.full((4, 3), 6), y)


def test_a_draw_that_may_be_zero_is_not():
    def model(x, y=None):
        return _observe(read(x * torch.randint(1, (1, 1))), y)

    _, compaction = compact(model, (torch.randn(4, 3), torch.randn(4, 2)), FIRST_TWO)
    assert shapes(compaction)["w1"] == (3, 4)


def test_batch_norm_in_training_and_after():
    net = nn.Sequential(
        nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 2)
    )
    model = Regression(bayesianize(net)).train()
    args = torch.randn(4, 3), torch.randn(4, 2)
    result, compaction = compact(model, args, [("net.0.weight", slice(2))])
    # Zero in training, but minus what the channel once was on average after it.
    assert shapes(compaction)["net.0.weight"] == (6, 3)
    assert_same(result, compaction, *args)
    model.eval()
    assert_same(result, compaction, *args)


def test_dropout_is_the_same_for_any_number_of_units():
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 2))
    model = Regression(bayesianize(net)).train()
    args = torch.randn(4, 3), torch.randn(4, 2)
    result, compaction = compact(model, args, [("net.3.weight", (slice(2), [1, 4]))])
    assert shapes(compaction)["net.0.weight"] == (4, 3)
    model.eval()
    assert_same(result, compaction, *args)


def test_sizes_of_the_data_that_are_those_of_units():
    def model(x, y=None):
        batch, steps, _ = x.shape
        h = torch.relu(x @ _normal("w1", 3, 6)).reshape(batch * steps, 6)
        h = h + torch.zeros(batch * steps, 6)
        each = (h @ _normal("w2", 6, 2)).reshape(batch, steps, 2)
        return _observe((each * torch.ones(batch, steps)[..., None]).sum(1), y)

    result, compaction = compact(model, (torch.randn(4, 5, 3), torch.randn(4, 2)), FIRST_TWO)
    assert shapes(compaction)["w1"] == (3, 4)
    for batch, steps in ((4, 6), (6, 6), (1, 6)):
        assert_same(result, compaction, torch.randn(batch, steps, 3), torch.randn(batch, 2))


def test_slices_of_the_data_that_are_those_of_units():
    def model(x, count, y=None):
        w = _normal("w1", 12, 3)
        h = torch.relu(x @ w[:6].T) * torch.tanh(x @ w[6:].T)
        return _observe(h @ _normal("w2", 6, 2) + x[:count].mean(0) @ _normal("w3", 3, 2), y)

    x, y = torch.randn(8, 3), torch.randn(8, 2)
    result, compaction = compact(model, (x, 5, y), FIRST_TWO)
    assert shapes(compaction)["w1"] == (8, 3)
    assert_same(result, compaction, x, 6, y)


@pytest.mark.parametrize("steps", [2, 6, 9])
def test_sequences_of_another_length(steps):
    def model(x, y=None):
        w, u, z = _normal("w1", 3, 6), _normal("u", 6, 6), torch.zeros(len(x), 6)
        h = torch.zeros(len(x), 6)
        for t in range(x.shape[1]):
            h = torch.tanh(x[:, t] @ w + h @ u + torch.zeros(len(x), 6))
        z = torch.zeros(len(x), 6) + x.mean(1) @ _normal("w3", 3, 6)
        return _observe(h @ _normal("w2", 6, 2) + torch.relu(z) @ _normal("w4", 6, 2), y)

    pruned = [("w2", slice(2)), ("u", slice(2))]
    result, compaction = compact(model, (torch.randn(4, 5, 3), torch.randn(4, 2)), pruned)
    assert shapes(compaction)["u"] == (4, 4)
    assert_same(result, compaction, torch.randn(3, steps, 3), torch.randn(3, 2))


def test_every_second_unit_is_taken_by_position():
    def model(x, y=None):
        h = torch.relu(x @ _normal("w1", 3, 6))
        return _observe((h[:, ::2] * h[:, 1::2]) @ _normal("w2", 3, 2), y)

    args = torch.randn(4, 3), torch.randn(4, 2)
    result, compaction = compact(model, args, [("w2", slice(1))])
    assert shapes(compaction)["w1"] == (3, 6)
    assert_same(result, compaction, *args)


def test_slices_that_are_written_to():
    def model(x, y=None):
        h, out = torch.relu(x @ _normal("w1", 3, 6)), torch.zeros(len(x), 8)
        out[:, :3], out[:, 3:6], out[:, 6:] = h[:, :3], 2 * h[:, 3:], x[:, :2]
        return _observe(out @ _normal("w2", 8, 2), y)

    result, compaction = compact(model, (torch.randn(4, 3), torch.randn(4, 2)), FIRST_TWO)
    assert shapes(compaction)["w1"] == (3, 4)
    assert_same(result, compaction, torch.randn(6, 3))


def test_products_with_integers_of_the_program():
    counts = torch.tensor([[1, 0, 2], [0, 1, 1], [3, 0, 1]])

    def model(x, y=None):
        return _observe(read((x.long() @ counts).float()), y)

    result, compaction = compact(model, (4 * torch.randn(4, 3), torch.randn(4, 2)), FIRST_TWO)
    assert shapes(compaction)["w1"] == (3, 4)
    assert_same(result, compaction, 4 * torch.randn(5, 3))


def test_shapes_that_change_in_place():
    def model(x, y=None):
        h = torch.relu(x @ _normal("w1", 3, 6))
        return _observe(h.t_().unsqueeze_(0).squeeze_(0).t() @ _normal("w2", 6, 2), y)

    result, compaction = compact(model, (torch.randn(4, 3), torch.randn(4, 2)), FIRST_TWO)
    assert shapes(compaction)["w1"] == (3, 4)
    assert_same(result, compaction, torch.randn(5, 3))


def test_what_is_computed_and_not_used():
    def model(x, y=None):
        h = torch.relu(x @ _normal("w1", 3, 6))
        h @ _normal("aside", 6, 5)
        return _observe(h @ _normal("w2", 6, 2), y)

    result, compaction = compact(model, (torch.randn(4, 3), torch.randn(4, 2)), FIRST_TWO)
    assert shapes(compaction)["w1"] == (3, 4)
    assert_same(result, compaction, torch.randn(5, 3))


def test_priors_of_whole_vectors():
    def model(x, y=None):
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(6, 4)).to_event(1))
        h = torch.tanh(torch.tanh(x @ _normal("w1", 3, 6)) @ shares)
        return _observe(h @ _normal("w2", 4, 2), y)

    args = torch.randn(4, 3), torch.randn(4, 2)
    result, compaction = compact(model, args, [("w1", (slice(3), 0)), ("w2", 1)])
    assert shapes(compaction) == {"shares": (5, 4), "w1": (3, 5), "w2": (4, 2)}
    torch.testing.assert_close(
        compaction.guide.median()["shares"], result.guide.median()["shares"][1:]
    )
    assert_same(result, compaction, *args)


def test_low_rank_guides_go_round_again():
    def model(x, y=None):
        return _observe(read(x), y)

    args = torch.randn(4, 3), torch.randn(4, 2)
    _, compaction = compact(model, args, FIRST_TWO, AutoLowRankMultivariateNormal)
    bmr.fit(compaction.model, compaction.guide, *args, num_epochs=2, batch_size=4, lr=0.01)
    third = {"w2": (torch.arange(4) != 2)[:, None].expand(4, 2)}
    result = bmr.reduce(compaction.guide, select=lambda scores: third)
    again = result.compact()
    assert shapes(again) == {"w1": (3, 3), "w2": (3, 2)}
    values, left = result.guide.median(), again.guide.median()
    torch.testing.assert_close(
        mean_at(again.model, left, args), mean_at(result.model, values, args)
    )


def test_a_positive_element_that_is_pruned_is_one():
    def model(x, y=None):
        gain = pyro.sample("gain", dist.LogNormal(torch.zeros(6), 1.0).to_event(1))
        h = torch.tanh(x @ _normal("w1", 3, 6) * gain)
        return _observe(h @ _normal("w2", 6, 2), y)

    args = torch.randn(4, 3), torch.randn(4, 2)
    guide = AutoNormal(model, init_loc_fn=init_to_sample, init_scale=0.1)
    guide(*args)
    cut = {"gain": torch.arange(6) > 2, "w2": (torch.arange(6) != 4)[:, None].expand(6, 2)}
    spikes = {"gain": bmr.Spike(loc=1.0), "w2": bmr.Spike()}
    result = bmr.reduce(guide, reduced_prior=spikes, select=lambda scores: cut)
    compaction = result.compact()
    assert shapes(compaction)["gain"] == (5,)
    assert_same(result, compaction, *args)


def test_latent_variables_of_single_data_in_a_subsampled_plate():
    def plate(x):
        return pyro.plate("data", len(x), subsample_size=4)

    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([6, 3]).to_event(2))
        v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([6]).to_event(1))
        with plate(x) as rows:
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            mean = (x[rows] @ w.mT).tanh() @ v + shift
            pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.ones(4))

    x = torch.randn(12, 3)
    guide = AutoNormal(model, create_plates=plate)
    guide(x)
    result = bmr.reduce(guide, groups=bmr.units, sites=["w", "v"], select=bmr.top_k(2))
    small = result.compact()
    assert {name: value.shape for name, value in small.guide.median().items()} == {
        "w": (2, 3), "v": (2,), "shift": (12,)
    }  # fmt: skip


def pixels(lay_out, size):
    def model(x, y=None):
        return _observe(torch.tanh(lay_out(x) @ _normal("w1", size, 6)) @ _normal("w2", 6, 2), y)

    return model


LAYOUTS = {
    "flatten": (lambda x: x.flatten(1), 24),
    "written": (lambda x: x.view(-1, 24), 24),
    "permuted": (lambda x: x.permute(0, 2, 3, 1).reshape(len(x), 24), 24),
    "cropped": (lambda x: x[:, :, 1:, :2].flatten(1), 8),
    "padded": (lambda x: F.pad(x, (1, 1)).flatten(1), 36),
    "padded vector": (lambda x: F.pad(x.flatten(1), (1, 1)), 26),
    "sliced": (lambda x: x.flatten(1)[:, 2:21], 19),
    "shifted": (lambda x: x.flatten(1) - torch.arange(24.0), 24),
    "scaled": (lambda x: (x * torch.arange(1.0, 5.0)).flatten(1), 24),
    "normed": (lambda x: F.layer_norm(x.flatten(1), (24,)), 24),
    "pooled": (lambda x: F.avg_pool2d(x, (1, 2)).flatten(1), 12),
    "beside its mean": (lambda x: torch.cat([x.flatten(1), x.mean((2, 3))], 1), 26),
    "twice": (lambda x: x.flatten(1).view(-1, 6, 4).transpose(1, 2).flatten(1), 24),
    "products": (lambda x: (x[:, 0, 0, :, None] * x[:, 1, 0, None]).flatten(1), 16),
}


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pixels_that_nothing_reads_stay_where_a_view_merges_them(layout, inputs):
    lay_out, size = LAYOUTS[layout]
    pyro.set_rng_seed(0)
    args = torch.randn(7, 2, 3, 4), torch.randn(7, 2)
    unread = [("w1", slice(None, None, 3)), ("w2", slice(2))]
    result, _ = compact(pixels(lay_out, size), args, unread)
    compaction = result.compact(inputs=inputs)
    assert not compaction.inputs
    assert shapes(compaction) == {"w1": (size, 4), "w2": (4, 2)}
    assert_same(result, compaction, *args)


def test_rows_of_an_image_go_with_what_is_padded_along_them():
    model = pixels(lambda x: F.pad(x, (1, 1)).flatten(1), 18)
    args = torch.randn(7, 3, 4), torch.randn(7, 2)
    result, compaction = compact(model, args, [("w1", slice(6)), ("w2", slice(2))])
    assert shapes(compaction)["w1"] == (18, 4)
    smaller = result.compact(inputs=True)
    assert shapes(smaller)["w1"] == (12, 4)
    (x, y), _ = smaller.take_inputs(*args)
    assert x.shape == (7, 2, 4)
    torch.testing.assert_close(
        mean_at(smaller.model, smaller.guide.median(), (x, y)),
        mean_at(result.model, result.guide.median(), args),
    )


def test_two_inputs_of_which_one_is_flattened_and_meets_units():
    def model(x, z, y=None):
        h = torch.tanh(z @ _normal("w1", 3, 12)) * x.flatten(1)
        return _observe((h @ _normal("w2", 12, 6)).tanh() @ _normal("w3", 6, 2), y)

    args = torch.randn(7, 1, 3, 4), torch.randn(7, 3), torch.randn(7, 2)
    result, compaction = compact(model, args, [("w2", slice(5)), ("w3", slice(2))])
    # Units that are multiplied by pixels stay with them.
    assert shapes(compaction) == {"w1": (3, 12), "w2": (12, 4), "w3": (4, 2)}
    assert_same(result, compaction, *args)


def test_channels_of_a_convolution_over_a_view_of_the_image():
    def model(x, y=None):
        images = x.flatten(1, 2).unsqueeze(-1)
        h = F.conv2d(images, _normal("w1", 5, 6, 1, 1)).relu().flatten(1)
        return _observe(h @ _normal("w2", 20, 2), y)

    args = torch.randn(7, 2, 3, 4), torch.randn(7, 2)
    pruned = [("w1", (slice(None), slice(2))), ("w2", slice(8))]
    result, compaction = compact(model, args, pruned)
    assert shapes(compaction) == {"w1": (3, 6, 1, 1), "w2": (12, 2)}
    assert "2 unused, kept: a view merges" in str(compaction)
    assert_same(result, compaction, *args)
