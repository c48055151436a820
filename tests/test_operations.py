"""The tables of operations side by side: what one of them knows, the others know or refuse.

Every operation has an example in `operations`, and every difference between two tables a line that
says why. Who adds an operation to one table has to add an example, and to decide about the others.
"""

import functools
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from networks import _normal, _observe
from operations import ATEN, FUNCTIONS, SIZED
from test_compaction_elsewhere import FIRST_TWO, assert_same, compact, shapes
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from pyro_bmr.cutting import checking
from pyro_bmr.cutting.changes import REWRITING_RULES, change_call
from pyro_bmr.estimators import local_reparameterization as local
from pyro_bmr.estimators.gaussian_tensor import (
    MOMENT_RULES,
    GaussianTensor,
    UnknownOperationError,
    gaussian,
)
from pyro_bmr.estimators.local_reparameterization import LocalWeight, name_function
from pyro_bmr.graphs import sized_calls
from pyro_bmr.graphs.capture import capture
from pyro_bmr.graphs.operations import is_in_place, is_random, name_operation
from pyro_bmr.graphs.sized_calls import SizedCall, SizedCalls
from pyro_bmr.units import axes, influence
from pyro_bmr.units.axes import LABEL_RULES, find_structure
from pyro_bmr.units.components import find_components
from pyro_bmr.units.contractions import CONTRACTIONS
from pyro_bmr.units.influence import find_needed
from pyro_bmr.units.labels import Labels
from pyro_bmr.units.nonzero import NONZERO_RULES
from pyro_bmr.units.operation_calls import OperationCall, create, protect_all
from pyro_bmr.units.reductions import add_up

pytestmark = pytest.mark.filterwarnings("ignore:.* has no rule that says which units")


def name_packet(packet):
    written = any(is_in_place(getattr(packet, overload)) for overload in packet.overloads())
    return packet.__name__.removesuffix("_") if written else packet.__name__


LABELS = {name_packet(packet) for packet in LABEL_RULES}
SUMS = {name_packet(p) for p, rule in LABEL_RULES.items() if p in CONTRACTIONS or rule is add_up}

ONLY_ON_GPUS = {"cudnn_batch_norm", "_fused_rms_norm"}

REFUSED_BY_LABELS = set("diagonal tril triu unfold flip roll pixel_shuffle".split())
"""Which element is where counts in them: they protect all units, and a warning names them."""

UNKNOWN_TO_NONZERO = {
    # Look along an axis that cannot be cut: a zero in it does not stay one.
    *"prod amax amin max min argmax argmin all any var std var_mean std_mean logsumexp".split(),
    *"linalg_vector_norm _safe_softmax native_layer_norm native_group_norm".split(),
    # Twins of batch norm that torch chooses on some devices only.
    *"_native_batch_norm_legit _native_batch_norm_legit_functional".split(),
    *"_batch_norm_with_update _batch_norm_no_update".split(),
    # Made or drawn anew: nothing is known to be zero in all draws, and zeros are read as numbers.
    *"zeros ones full empty rand randn new_zeros new_ones new_full new_empty".split(),
    *"zeros_like ones_like full_like empty_like rand_like randn_like fill zero copy".split(),
    *"bernoulli poisson normal uniform exponential _standard_gamma".split(),
    # Would need rules of their own: images of another size, and rare functions of elements.
    *"upsample_nearest1d upsample_nearest3d upsample_linear1d upsample_bilinear2d".split(),
    *"upsample_bicubic2d upsample_trilinear3d adaptive_max_pool2d adaptive_max_pool3d".split(),
    *"reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d im2col".split(),
    *"_reshape_alias _prelu_kernel log_sigmoid_forward glu".split(),
}
"""Any element of their result is taken to depend on all operands."""


def test_every_operation_has_an_example():
    assert LABELS | NONZERO_RULES.keys() == ATEN.keys() | ONLY_ON_GPUS


def test_labels_and_nonzero_know_or_refuse_the_same():
    graphs = {name: captured(name)[0].graph for name in ATEN}
    absent = {n for n in ATEN if n not in map(name_operation, graphs[n].graph.nodes)}
    assert absent <= {"detach"}, "which torch 2.15 does not capture"
    assert set().union(*map(find_refused, graphs.values())) == REFUSED_BY_LABELS
    assert ATEN.keys() - NONZERO_RULES.keys() == UNKNOWN_TO_NONZERO


@functools.cache
def captured(name):
    """The graph of an example, the value of its site, its structure, and values in a run."""
    shape, function = ATEN[name]
    prior = dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))
    value = 1.8 * torch.rand(shape) - 0.9

    def model():
        # Views of sites are no outputs.
        return pytree.tree_map(torch.clone, function(pyro.sample("w", prior)))

    graph = capture(model, (), {}, {"w": value})
    return graph, value, find_structure(graph), influence._read_values(graph, [value])


def find_refused(graph):
    """The operations of a graph for which there are no labels."""
    like = OperationCall("", "", {"self": Labels().create((2,))}, ())
    nodes = [n for n in graph.graph.nodes if n.all_input_nodes and hasattr(n.target, "_schema")]
    return {name_operation(n) for n in nodes if axes._find_rule(n.target, like) is protect_all}


def run(name, value):
    """All elements of the results of an example."""
    torch.manual_seed(0)
    leaves = pytree.tree_leaves(ATEN[name][1](value.clone()))
    return torch.cat([leaf.flatten().double() for leaf in leaves])


def changed_by(name, value, elements):
    """Which elements of the results change when some of the site do."""
    after = run(name, torch.where(elements, 0.3 - value, value))
    return ~torch.isclose(at_value(name), after, rtol=0, atol=0, equal_nan=True)


@functools.cache
def at_value(name):
    return run(name, captured(name)[1])


def result_nodes(graph):
    return pytree.tree_leaves(graph.graph.graph.output_node().args)


def find_nonzero(name, first, second):
    """Of the results, the first of their pairs, from those of the site."""
    graph, _, structure, values = captured(name)
    pairs = influence._Run(values, structure, 100)
    pairs.start(graph, {})
    pairs.pairs[graph.sites["w"]] = first, second
    for node in graph.graph.graph.nodes:
        pairs.visit(node)
    return torch.cat([pairs.read(node)[0].flatten() for node in result_nodes(graph)])


@pytest.mark.parametrize("name", ATEN)
def test_what_is_said_to_be_zero_is(name):
    """Against the operation itself, on numbers that are zero there."""
    mask = (torch.rand(ATEN[name][0]) < 0.5).double()
    zero = find_nonzero(name, mask, torch.ones_like(mask)) == 0
    for _ in range(3):
        assert (run(name, mask.float() * torch.randn(mask.shape))[zero] == 0).all()


@pytest.mark.parametrize("name", ATEN)
def test_what_depends_on_an_element_is_said_to(name):
    """Against the operation itself, with one element changed after the other."""
    value = captured(name)[1]
    positive = torch.ones(value.shape, dtype=torch.float64, requires_grad=True)
    result = find_nonzero(name, positive, positive)
    some = torch.randperm(value.numel())[:12]
    each = F.one_hot(some, value.numel()).bool().reshape(-1, *value.shape)
    changed = torch.stack([changed_by(name, value, one) for one in each])
    for place in torch.randperm(len(result))[:3]:
        total = result[place] + 0 * positive.sum()
        (slope,) = torch.autograd.grad(total, positive, retain_graph=True)
        assert (slope.flatten()[some][changed[:, place]] > 0).all()


# Which random numbers they use up depends on their arguments.
REJECTING = {"poisson", "_standard_gamma"}


@pytest.mark.parametrize("name", sorted(ATEN.keys() - SUMS - REJECTING))
def test_units_are_kept_apart(name):
    """Against the operation itself: what is of other units stays when those of one change."""
    graph, value, *_ = captured(name)
    labelling = label(graph)
    components, site = find_components(labelling.labels), labelling.sites["w"]
    results = [labelling.nodes[node.name] for node in result_nodes(graph)]
    found = 0
    for dim, axis in enumerate(site.axes):
        units = components.of[axis]
        for unit in sorted(set(units[~components.protected[units]]))[:3]:
            changed = changed_by(name, value, belongs(site, components, unit, dim))
            own = [belongs(x, components, unit).flatten() for x in results]
            assert not (changed & ~torch.cat(own)).any()
            found += 1
    assert (found == 0) == (name in REFUSED_BY_LABELS)


def label(graph):
    """The labels of a graph whose outputs may be cut."""
    decisions = {}
    while True:
        labelling = axes._Pass(graph, Labels(decisions)).run()
        if not labelling.labels.moved:
            labelling.labels.outputs.clear()
            return labelling
        decisions |= {name: decisions.get(name, 0) + 1 for name in labelling.labels.moved}


def belongs(x, components, unit, dim=None):
    """Which elements of a tensor are of a unit, along one axis or any."""
    found = torch.zeros(x.shape, dtype=torch.bool)
    for i, axis in enumerate(x.axes):
        if dim in (None, i):
            own = torch.as_tensor(components.of[axis] == unit)
            found |= own.reshape(-1, *[1] * (len(x.axes) - i - 1))
    return found


@pytest.mark.parametrize("name", sorted(SUMS))
def test_units_that_are_summed_are_needed(name):
    graph, value, structure, _ = captured(name)
    needed = find_needed(graph, [value], structure, {})
    assert len(needed) > 0
    assert needed.all()


def test_draws_that_have_labels_are_the_same_where_programs_are_compared():
    drawn = [p for p in LABEL_RULES if any(is_random(getattr(p, o)) for o in p.overloads())]
    # Dropout keeps everything there.
    assert set(map(name_packet, drawn)) <= checking._NOISE | {"native_dropout"}


SEEN = {
    *(sized_calls._SHAPING | sized_calls.MAKING),
    *(function.__name__ for function in sized_calls._CONVOLUTIONS | sized_calls._NORMS),
    *("__getitem__", "__setitem__"),
}
"""Functions by which a program says sizes."""

NOT_REWRITTEN = set("resize_ as_strided repeat_interleave eye arange group_norm".split())
"""An error names them where units go."""


def test_every_size_that_a_program_says_is_rewritten_or_refused():
    assert REWRITING_RULES.keys() | NOT_REWRITTEN == SEEN
    assert REWRITING_RULES.keys() & NOT_REWRITTEN == set()
    assert REWRITING_RULES.keys() == SIZED.keys()


def test_tensors_with_labels_that_are_made_anew_are_made_smaller():
    made = {name_packet(packet) for packet, rule in LABEL_RULES.items() if rule is create}
    # Torch draws normal numbers of a written size by the operation that takes tensors.
    assert made | {"normal"} == sized_calls.MAKING & REWRITING_RULES.keys()


@pytest.mark.parametrize("name", sorted(NOT_REWRITTEN))
def test_sizes_that_cannot_be_rewritten_are_an_error(name):
    function = next(f for home in (torch, F, Tensor) if (f := getattr(home, name, None)))
    call = SizedCall(function, (), {}, ("result",), (), "")
    with pytest.raises(ValueError, match=f"calls {name} on units that go"):
        change_call(call, lambda node: (torch.tensor([True, False]),))


@pytest.mark.parametrize("name", SIZED)
def test_programs_that_say_sizes_run_without_some_units(name):
    """Against the masked program."""
    seen = []

    def note(function, args, kwargs, where):
        seen.append(function.__name__)
        return function(*args, **kwargs)

    def model(x, y=None):
        h = torch.relu(x @ _normal("w1", 3, 6))
        with SizedCalls(note):
            h = SIZED[name](h)
        return _observe(h @ _normal("w2", 6, 2), y)

    result, compaction = compact(model, (torch.randn(4, 3), torch.randn(4, 2)), FIRST_TWO)
    assert name in seen
    assert shapes(compaction)["w1"] == (3, 4)
    assert_same(result, compaction, torch.randn(4, 3))


ATTRIBUTES = {
    *"device dim dtype element_size get_device is_complex is_contiguous is_cuda is_meta".split(),
    *"is_floating_point is_sparse layout len ndim ndimension nelement numel requires_grad".split(),
    *"shape size stride".split(),
}
"""What both estimators know of a tensor without its values."""

LOCAL = {
    *(local._VIEWS | local._SPLITS | local._LAYERS | local._PRODUCTS | local._SUMS),
    *(local._SCALINGS | local._PROPERTIES | {"where"}),
}
MOMENTS = {name_function(function) for function in MOMENT_RULES}

REFUSED_BY_MOMENTS = set("grad_fn is_leaf is_nested is_quantized names".split())
"""An error names them."""

DRAWN_WHOLE = {
    # Not linear.
    *"relu leaky_relu tanh sigmoid softplus gelu silu mish elu logsigmoid exp square pow".split(),
    *"max_pool1d max_pool2d max_pool3d logsumexp log_softmax".split(),
    # Linear, but sums of elements of one weight or joins of several.
    *"sum mean avg_pool1d avg_pool2d avg_pool3d cat concat concatenate stack lerp".split(),
    *"adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d".split(),
    *"addmm addmv baddbmm dot inner outer tensordot broadcast_tensors batch_norm".split(),
    *"conv_transpose1d conv_transpose2d conv_transpose3d index_select flip".split(),
    *"dropout dropout1d dropout2d dropout3d alpha_dropout neg negative".split(),
    # Other names of what goes by one of its own.
    *"subtract multiply divide true_divide".split(),
    # Tensors of another kind, or made anew.
    *"detach to cpu cuda float double half bfloat16 zeros_like ones_like".split(),
    *"new_zeros new_ones new_full new_empty new_tensor".split(),
}
"""Local reparameterisation passes the draw on to them, which is exact, and says so."""


def test_estimators_know_or_refuse_the_same():
    assert LOCAL - MOMENTS == REFUSED_BY_MOMENTS
    assert MOMENTS - LOCAL - {"iter"} == DRAWN_WHOLE
    assert LOCAL & MOMENTS >= ATTRIBUTES
    # There is no CUDA device to move to.
    assert (LOCAL | MOMENTS) - ATTRIBUTES - REFUSED_BY_MOMENTS - {"cuda"} == FUNCTIONS.keys()


@pytest.mark.parametrize("name", [n for n in sorted(REFUSED_BY_MOMENTS) if hasattr(Tensor, n)])
def test_what_moments_do_not_know_is_an_error_that_names_it(name):
    x = gaussian(torch.zeros(2), torch.ones(2))
    with pytest.raises(UnknownOperationError, match=name):
        getattr(x, name)


# By name in some versions of torch only: 2 + w is torch.add in others.
OTHERWISE_CALLED = {"radd", "rmul", "truediv", "iter"}


class Named(Tensor):
    """A tensor that notes the names of the functions that it goes into."""

    seen: ClassVar = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(name_function(func))
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_estimators_agree_where_nothing_is_uncertain(name):
    """Against the function itself; local reparameterisation notes what it draws as a whole."""
    shape, function = FUNCTIONS[name]
    value, zero = torch.rand(shape), torch.zeros(shape)
    Named.seen.clear()
    expected = pytree.tree_leaves(function(value.as_subclass(Named)))
    assert name in Named.seen or name in OTHERWISE_CALLED
    weight = LocalWeight(value.clone(), value, zero, [])
    for result in (function(weight), function(gaussian(value, zero))):
        for one, other in zip(pytree.tree_leaves(result), expected, strict=True):
            one = one.loc if isinstance(one, GaussianTensor) else one.as_subclass(Tensor)
            torch.testing.assert_close(one, other.as_subclass(Tensor))
    assert set(weight.uses) - {"rows", "positions"} == ({name} & DRAWN_WHOLE)


def test_labels_know_or_refuse_what_estimators_know():
    refused = set()
    for shape, function in FUNCTIONS.values():
        leaves = functools.partial(lambda f, w: pytree.tree_leaves(f(w)), function)
        refused |= find_refused(make_fx(leaves)(torch.rand(shape)))
    assert refused == {"flip"} <= REFUSED_BY_LABELS
