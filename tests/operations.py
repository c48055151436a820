"""An example of every operation that a table of the package knows."""

import operator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten

MATRIX, BATCH, IMAGE, VOLUME = (4, 6), (2, 3, 4), (2, 3, 4, 4), (1, 2, 4, 4, 4)


def plain(*shape):
    """Constants of the program, of which none is zero."""
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).mul(1.7).sin().reshape(shape)


def calls(home, names, *args, shape=MATRIX):
    """Functions that take the same arguments after the tensor."""

    def run(w, function):
        return function(w, *args)

    return {n: (shape, partial(run, function=getattr(home, n))) for n in names.split()}


C3, C4, C6, C24 = plain(3), plain(4), plain(6), plain(24)
C1_6, C2_4, C3_6, C4_6, C6_3 = plain(1, 6), plain(2, 4), plain(3, 6), plain(4, 6), plain(6, 3)
C2_3_5, C2_4_5, PIXELS = plain(2, 3, 5), plain(2, 4, 5), plain(*IMAGE)
PLACES = torch.tensor([[1, 3]] * 4)
MOMENTS = torch.zeros(3), torch.ones(3)


def norms(names, moments, *args):
    """Batch norms, which may write to the moments."""

    def run(w, function):
        return function(w, C3, C3, *(m.clone() for m in moments), *args, 0.1, 1e-5)[0]

    return {n: (IMAGE, partial(run, function=getattr(aten, n))) for n in names.split()}


ATEN = {
    **calls(F, "relu gelu silu leaky_relu elu celu mish hardswish softshrink hardshrink glu"),
    **calls(F, "sigmoid softplus hardsigmoid hardtanh"),
    **calls(torch, "tanh sin asin tan atan sinh asinh atanh abs neg sqrt sign erf expm1 log1p"),
    **calls(torch, "round trunc exp exp2 cos cosh rsqrt log log2 reciprocal erfc digamma lgamma"),
    **calls(torch, "detach clone zeros_like ones_like rand_like randn_like tril triu t"),
    **calls(torch, "mean var std prod amax amin argmax argmin all any logsumexp", -1),
    **calls(torch, "logical_not"),
    **calls(torch, "var_mean std_mean", -1),
    **calls(operator, "gt lt ge le eq ne", 0.1),
    **calls(torch, "logical_and logical_or maximum minimum", C6),
    **calls(torch, "flip permute", (1, 0)),
    **calls(torch, "transpose roll", 1, 0),
    **calls(torch, "unsqueeze unbind diagonal", 1),
    **calls(torch, "clamp", -0.5, 0.5),
    **calls(aten, "alias lift_fresh_copy log_sigmoid_forward"),
    **calls(aten, "view _unsafe_view", [2, 2, 6]),
    **calls(aten, "select", 1, 1),
    **calls(aten, "slice", 1, 1, 5),
    **calls(aten, "split unsafe_split", 3, 1),
    **calls(aten, "split_with_sizes unsafe_split_with_sizes", [2, 4], 1),
    **calls(aten, "_softmax _log_softmax", 1, False),
    **calls(aten, "_safe_softmax", 1),
    **calls(aten, "native_dropout", 0.5, True),
    **calls(aten, "unfold", 1, 2, 2),
    **calls(aten, "constant_pad_nd", [0, 1]),
    **calls(aten, "repeat", [2, 1]),
    **calls(aten, "_reshape_alias", [2, 2, 6], [12, 6, 1]),
    **calls(aten, "linalg_vector_norm", 2, [1]),
    **calls(aten, "im2col", [2, 2], [1, 1], [0, 0], [1, 1], shape=IMAGE),
    **calls(F, "pixel_shuffle", 1, shape=IMAGE),
    **calls(aten, "avg_pool2d max_pool2d_with_indices", [2, 2], shape=IMAGE),
    **calls(aten, "_adaptive_avg_pool2d adaptive_max_pool2d", [2, 2], shape=IMAGE),
    **calls(aten, "avg_pool3d max_pool3d_with_indices", [2, 2, 2], shape=VOLUME),
    **calls(aten, "_adaptive_avg_pool3d adaptive_max_pool3d", [2, 2, 2], shape=VOLUME),
    **calls(aten, "upsample_nearest1d", [8], shape=BATCH),
    **calls(aten, "upsample_linear1d", [8], False, shape=BATCH),
    **calls(aten, "upsample_nearest2d", [8, 8], shape=IMAGE),
    **calls(aten, "upsample_bilinear2d upsample_bicubic2d", [8, 8], False, shape=IMAGE),
    **calls(aten, "upsample_nearest3d", [8, 8, 8], shape=VOLUME),
    **calls(aten, "upsample_trilinear3d", [8, 8, 8], False, shape=VOLUME),
    **calls(aten, "reflection_pad1d replication_pad1d", [1, 1], shape=BATCH),
    **calls(aten, "reflection_pad2d replication_pad2d", [1, 1, 1, 1], shape=IMAGE),
    **calls(aten, "native_group_norm", C3, C3, 2, 3, 16, 1, 1e-5, shape=IMAGE),
    **calls(aten, "native_layer_norm", [6], C6, C6, 1e-5),
    **norms("native_batch_norm _native_batch_norm_legit_functional", MOMENTS, True),
    **norms("_native_batch_norm_legit", (), True),
    **norms("_native_batch_norm_legit_no_training", MOMENTS),
    **norms("_batch_norm_with_update _batch_norm_no_update", MOMENTS),
    "max": (MATRIX, lambda w: w.max(-1)),
    "min": (MATRIX, lambda w: w.min(-1)),
    "_to_copy": (MATRIX, Tensor.double),
    "bitwise_not": (MATRIX, lambda w: ~(w > 0)),
    "add": (MATRIX, lambda w: w[:2] + w[2:]),
    "sub": (MATRIX, lambda w: w[:2] - w[2:]),
    "rsub": (MATRIX, lambda w: torch.rsub(w[:2], w[2:])),
    "mul": (MATRIX, lambda w: w[:2] * w[2:]),
    "div": (MATRIX, lambda w: w[:2] / (w[2:] + 2)),
    "pow": (MATRIX, lambda w: w**3),
    "where": (MATRIX, lambda w: torch.where(w[:2] > 0, w[2:], 0.0)),
    "masked_fill": (MATRIX, lambda w: w.masked_fill(w > 0.5, 0.0)),
    "expand": (MATRIX, lambda w: w[:, :1].expand(4, 3)),
    "squeeze": (MATRIX, lambda w: w[:, :1].squeeze(1)),
    "cat": (MATRIX, lambda w: torch.cat([w, C1_6])),
    "stack": (MATRIX, lambda w: torch.stack([w, w])),
    "embedding": (MATRIX, lambda w: F.embedding(torch.tensor([1, 3]), w)),
    "index": (MATRIX, lambda w: w[:, torch.tensor([1, 3])]),
    "index_select": (MATRIX, lambda w: w.index_select(1, torch.tensor([1, 3]))),
    "gather": (MATRIX, lambda w: w.gather(1, PLACES)),
    "copy": (MATRIX, lambda w: torch.zeros(MATRIX).copy_(w)),
    "fill": (MATRIX, lambda w: w + w.clone().fill_(1.0)),
    "zero": (MATRIX, lambda w: w + w.clone().zero_()),
    "_prelu_kernel": (MATRIX, lambda w: F.prelu(w, C6)),
    "bernoulli": (MATRIX, lambda w: torch.bernoulli(w.sigmoid())),
    "poisson": (MATRIX, lambda w: torch.poisson(w.abs())),
    "normal": (MATRIX, lambda w: torch.normal(w, 1.0)),
    "uniform": (MATRIX, lambda w: w + torch.empty_like(w).uniform_()),
    "exponential": (MATRIX, lambda w: w + torch.empty_like(w).exponential_()),
    "_standard_gamma": (MATRIX, lambda w: torch._standard_gamma(1 + w.abs())),
    "zeros": (MATRIX, lambda w: w + torch.zeros(4, 6)),
    "ones": (MATRIX, lambda w: w + torch.ones(4, 6)),
    "full": (MATRIX, lambda w: w + torch.full((4, 6), 2.0)),
    "rand": (MATRIX, lambda w: w + torch.rand(4, 6)),
    "randn": (MATRIX, lambda w: w + torch.randn(4, 6)),
    "empty": (MATRIX, lambda w: w + torch.empty(4, 6).fill_(1.0)),
    "full_like": (MATRIX, lambda w: w + torch.full_like(w, 2.0)),
    "empty_like": (MATRIX, lambda w: w + torch.empty_like(w).fill_(1.0)),
    "new_zeros": (MATRIX, lambda w: w + w.new_zeros(4, 6)),
    "new_ones": (MATRIX, lambda w: w + w.new_ones(4, 6)),
    "new_full": (MATRIX, lambda w: w + w.new_full((4, 6), 2.0)),
    "new_empty": (MATRIX, lambda w: w + w.new_empty(4, 6).fill_(1.0)),
    "sum": (MATRIX, lambda w: (w * C6).sum(-1)),
    "nansum": (MATRIX, lambda w: (w * C6).nansum(-1)),
    "mm": (MATRIX, lambda w: C2_4 @ w),
    "addmm": (MATRIX, lambda w: torch.addmm(w[0, :2], C3_6, w[:2].t())),
    "mv": (MATRIX, lambda w: w @ C6),
    "addmv": (MATRIX, lambda w: torch.addmv(C4, w, C6)),
    "dot": (MATRIX, lambda w: torch.dot(w.flatten(), C24)),
    "bmm": (BATCH, lambda w: torch.bmm(w, C2_4_5)),
    "baddbmm": (BATCH, lambda w: torch.baddbmm(C2_3_5, w, C2_4_5)),
    "convolution": ((5, 3, 2, 2), lambda w: F.conv2d(PIXELS, w)),
}
"""By ATen operation, the shape of a site, and a program that runs the operation on it."""


def halves(parts):
    first, *rest = parts
    return torch.cat([first, *(2 * part for part in rest)], -1)


def fill(h):
    out = torch.zeros_like(h)
    out[:, :3], out[:, 3:] = h[:, :3], 2 * h[:, 3:]
    return out


def convolve(name):
    """A convolution of each of six channels by itself."""
    axes = (None,) * int(name[-2])
    weight = torch.ones(6, 1, *(1 for _ in axes))
    return lambda h: getattr(F, name)(h[(..., *axes)], weight, groups=6).flatten(1)


SIZED = {
    "view": lambda h: h.view(4, 6, 1).view(4, 6),
    "reshape": lambda h: h.reshape(2, 2, 6).flatten(0, 1),
    "expand": lambda h: h + C4[:, None].expand(4, 6),
    "broadcast_to": lambda h: h + torch.broadcast_to(C4[:, None], (4, 6)),
    "unflatten": lambda h: h.unflatten(-1, (6, 1))[..., 0],
    "repeat": lambda h: h + C4[:, None].repeat(1, 6),
    "tile": lambda h: h + C4[:, None].tile(1, 6),
    "narrow": lambda h: halves([h.narrow(1, 0, 3), h.narrow(1, 3, 3)]),
    "split": lambda h: halves(h.split((4, 2), -1)),
    "split_with_sizes": lambda h: halves(h.split_with_sizes((4, 2), -1)),
    "chunk": lambda h: halves(h.chunk(2, -1)),
    "unsafe_split": lambda h: halves(h.unsafe_split(3, -1)),
    "unsafe_split_with_sizes": lambda h: halves(h.unsafe_split_with_sizes((4, 2), -1)),
    "unsafe_chunk": lambda h: halves(h.unsafe_chunk(2, -1)),
    "tensor_split": lambda h: halves(h.tensor_split((1, 4), dim=-1)),
    "hsplit": lambda h: halves(h.hsplit(2)),
    "vsplit": lambda h: halves(part.t() for part in h.t().vsplit((4,))),
    "dsplit": lambda h: halves(part[0] for part in h[None].dsplit((1, 4))),
    "__getitem__": lambda h: halves([h[:, :4], h[:, 4:]]),
    "__setitem__": fill,
    "zeros": lambda h: h + torch.zeros(4, 6),
    "ones": lambda h: h + torch.ones((4, 6)),
    "full": lambda h: h + torch.full((4, 6), 2.0),
    "empty": lambda h: h + torch.empty(4, 6).zero_(),
    "rand": lambda h: h + 0 * torch.rand(4, 6),
    "randn": lambda h: h + 0 * torch.randn(4, 6),
    "normal": lambda h: h + 0 * torch.normal(0.0, 1.0, (4, 6)),
    "new_zeros": lambda h: h + h.new_zeros(4, 6),
    "new_ones": lambda h: h + h.new_ones((4, 6)),
    "new_full": lambda h: h + h.new_full((4, 6), 2.0),
    "new_empty": lambda h: h + h.new_empty(4, 6).zero_(),
    "layer_norm": lambda h: F.layer_norm(h.t(), (4,)).t(),
    "rms_norm": lambda h: F.rms_norm(h.t(), (4,)).t(),
    **{f"conv{t}{n}d": convolve(f"conv{t}{n}d") for t in ("", "_transpose") for n in (1, 2, 3)},
}
"""By function that says sizes, a program that says them of six units in four rows."""

IN_EVAL = (0.5, False)

FUNCTIONS = {
    **calls(torch, "ravel t adjoint clone detach neg negative square exp relu tanh sigmoid sum"),
    **calls(torch, "flatten unbind mean broadcast_tensors zeros_like ones_like"),
    **calls(Tensor, "contiguous cpu float double half bfloat16"),
    **calls(Tensor, "to type", torch.float64),
    **calls(Tensor, "expand_as view_as reshape_as", C4_6),
    **calls(Tensor, "view reshape expand new_zeros new_ones", 4, 6),
    **calls(torch, "transpose swapaxes swapdims movedim moveaxis", 0, 1),
    **calls(torch, "permute flip", (1, 0)),
    **calls(torch, "broadcast_to", (4, 6)),
    **calls(torch, "unflatten", 1, (2, 3)),
    **calls(torch, "squeeze unsqueeze logsumexp", 1),
    **calls(torch, "select", 1, 0),
    **calls(torch, "narrow", 1, 0, 2),
    **calls(torch, "index_select", 1, PLACES[0]),
    **calls(torch, "chunk split tensor_split", 2),
    **calls(torch, "add sub subtract rsub mul multiply div divide true_divide", 2.0),
    **calls(torch, "pow", 2),
    **calls(torch, "lerp", C4_6, 0.3),
    **calls(torch, "inner", C3_6),
    **calls(torch, "tensordot", C6_3, 1),
    **calls(torch, "matmul", C6_3),
    **calls(Tensor, "mm", C6_3),
    **calls(torch, "mv", C6),
    **calls(torch, "dot outer", C6, shape=(6,)),
    **calls(torch, "bmm", C2_4_5, shape=BATCH),
    **calls(F, "softplus gelu silu mish elu leaky_relu logsigmoid"),
    **calls(F, "log_softmax", 1),
    **calls(F, "dropout alpha_dropout", *IN_EVAL),
    **calls(F, "dropout1d", *IN_EVAL, shape=BATCH),
    **calls(F, "dropout2d", *IN_EVAL, shape=IMAGE),
    **calls(F, "dropout3d", *IN_EVAL, shape=VOLUME),
    **calls(F, "batch_norm", torch.zeros(3), torch.ones(3), shape=BATCH),
    **calls(F, "avg_pool1d max_pool1d", 2, shape=BATCH),
    **calls(F, "avg_pool2d max_pool2d", 2, shape=IMAGE),
    **calls(F, "avg_pool3d max_pool3d", 2, shape=VOLUME),
    **calls(F, "adaptive_avg_pool1d", 1, shape=BATCH),
    **calls(F, "adaptive_avg_pool2d", 1, shape=IMAGE),
    **calls(F, "adaptive_avg_pool3d", 1, shape=VOLUME),
    **calls(F, "conv_transpose1d", plain(3, 3, 2), shape=BATCH),
    **calls(F, "conv_transpose2d", plain(3, 3, 2, 2), shape=IMAGE),
    **calls(F, "conv_transpose3d", plain(2, 2, 2, 2, 2), shape=VOLUME),
    "conv1d": (BATCH, lambda w: F.conv1d(C2_3_5, w)),
    "conv2d": ((5, 3, 2, 2), lambda w: F.conv2d(PIXELS, w)),
    "conv3d": ((2, 3, 1, 2, 2), lambda w: F.conv3d(PIXELS[:, :, None], w)),
    "linear": (MATRIX, lambda w: F.linear(C3_6, w)),
    # So torch calls its own torch.mm.
    "spmm": (MATRIX, lambda w: torch.mm(w, C6_3)),
    "T": (MATRIX, lambda w: w.T),
    "mT": (MATRIX, lambda w: w.mT),
    "getitem": (MATRIX, lambda w: w[:, 1:]),
    "iter": (MATRIX, lambda w: list(iter(w))),
    "new_full": (MATRIX, lambda w: w.new_full((4, 6), 2.0)),
    "new_empty": (MATRIX, lambda w: w.new_empty(4, 6).zero_()),
    "new_tensor": (MATRIX, lambda w: w.new_tensor([1.0, 2.0])),
    "radd": (MATRIX, lambda w: 2.0 + w),
    "rmul": (MATRIX, lambda w: 2.0 * w),
    "truediv": (MATRIX, lambda w: w / 2.0),
    "where": (MATRIX, lambda w: torch.where(C6 > 0, w, 0.0)),
    "einsum": (MATRIX, lambda w: torch.einsum("bi,oi->bo", C3_6, w)),
    "rmatmul": (MATRIX, lambda w: w.__rmatmul__(C2_4)),
    "addmm": (MATRIX, lambda w: torch.addmm(C3, w, C6_3)),
    "addmv": (MATRIX, lambda w: torch.addmv(C4, w, C6)),
    "baddbmm": (BATCH, lambda w: torch.baddbmm(C2_3_5, w, C2_4_5)),
    "cat": (MATRIX, lambda w: torch.cat([w, C4_6])),
    "concat": (MATRIX, lambda w: torch.concat([w, C4_6])),
    "concatenate": (MATRIX, lambda w: torch.concatenate([w, C4_6])),
    "stack": (MATRIX, lambda w: torch.stack([w, C4_6])),
}
"""By function that an estimator knows, the shape of a weight, and a program that calls it."""
