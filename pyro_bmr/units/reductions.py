"""Rules of sums, means, norms and pooling: operations that look along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pyro_bmr.units.labelled import Labelled
from pyro_bmr.units.labels import Labels
from pyro_bmr.units.operation_calls import OperationCall, Result, Rule, aten


def add_up(labels: Labels, call: OperationCall) -> Labelled:
    """Sum over axes: what is cut must have been zero."""
    x: Labelled = call["self"]
    dims = _dims(call, len(x.axes))
    for i in dims:
        labels.sum_over(x, i)
    return _drop(labels, x, dims, call.shapes[0])


def _mix(labels: Labels, call: OperationCall) -> Result:
    """Compute what depends on how many indices an axis has: a mean, a softmax, a maximum."""
    x = call.tensors[0]
    dims = _dims(call, len(x.axes))
    for i in dims:
        labels.protect(x.axes[i], f"{call.operation} over its axis")
    results = tuple(
        x if shape == x.shape else _drop(labels, x, dims, shape) for shape in call.shapes
    )
    return results[0] if len(results) == 1 else results


def _normalize_batch(labels: Labels, call: OperationCall) -> Result:
    """Normalise each channel by itself: batch norm, and its statistics per channel."""
    x, *others = call.tensors
    if call.arguments.get("training", "with_update" in call.operation):
        for axis in (*x.axes[:1], *x.axes[2:]):
            labels.protect(axis, f"{call.operation} over its axis")
    channels, sources = x.axes[1], x.sources[1]
    for other in others:
        channels = labels.join(channels, other.axes[0])
        sources |= other.sources[0]
    depth = max(tensor.depth for tensor in call.tensors)
    result = replace(x.put(1, channels, sources), depth=depth)
    statistics = Labelled((channels,), (sources,), depth)
    results = tuple(
        result if i == 0 else (statistics if shape == statistics.shape else labels.create(shape))
        for i, shape in enumerate(call.shapes)
    )
    return results[0] if len(results) == 1 else results


def _normalize_layer(labels: Labels, call: OperationCall) -> Result:
    """Normalise over the last axes: layer norm."""
    x, *affine = call.tensors
    for i in range(-len(call["normalized_shape"]), 0):
        for tensor in (x, *affine):
            labels.protect(tensor.axes[i], f"{call.operation} over its axis")
    dims = range(len(x.axes) - len(call["normalized_shape"]), len(x.axes))
    results = tuple(
        x if shape == x.shape else _drop(labels, x, dims, shape) for shape in call.shapes
    )
    return results[0] if len(results) == 1 else results


def _normalize_groups(labels: Labels, call: OperationCall) -> Result:
    """Normalise over groups of channels, and all that they hold: group norm."""
    x, *affine = call.tensors
    for axis in (*x.axes[1:], *(tensor.axes[0] for tensor in affine)):
        labels.protect(axis, f"{call.operation} over its axis")
    groups = labels.fixed(call["group"])
    statistics = Labelled((x.axes[0], groups), (x.sources[0], frozenset()), x.depth)
    return (x, statistics, statistics)


def _pool(labels: Labels, call: OperationCall) -> Result:
    """Compute for each channel by itself an image of another size; positions are fixed."""
    x = call.tensors[0]
    spatial = next(n for n in (1, 2, 3) if f"{n}d" in call.operation)
    for axis in x.axes[-spatial:]:
        labels.protect(axis)
    kept = x.pick(range(len(x.axes) - spatial))
    results = tuple(
        replace(
            kept,
            axes=(*kept.axes, *map(labels.fixed, shape[-spatial:])),
            sources=(*kept.sources, *(frozenset[int]() for _ in range(spatial))),
        )
        for shape in call.shapes
    )
    return results[0] if len(results) == 1 else results


def _take_patches(labels: Labels, call: OperationCall) -> Labelled:
    """Lay the patches of an image side by side: `torch.nn.functional.unfold`.

    A channel comes as many times as a patch has positions; patches are fixed.
    """
    x: Labelled = call["self"]
    for axis in x.axes[-2:]:
        labels.protect(axis)
    *_, columns, patches = call.shapes[0]
    channels = x.axes[-3].repeat(columns // len(x.axes[-3]))
    kept = x.pick(range(len(x.axes) - 2)).put(-1, channels)
    return replace(
        kept,
        axes=(*kept.axes, labels.fixed(patches)),
        sources=(*kept.sources, frozenset()),
    )


REDUCTIONS: dict[Any, Rule] = {
    **dict.fromkeys((aten.sum, aten.nansum), add_up),
    **dict.fromkeys(
        (
            aten.mean,
            aten.var,
            aten.std,
            aten.var_mean,
            aten.std_mean,
            aten.prod,
            aten.amax,
            aten.amin,
            aten.max,
            aten.min,
            aten.argmax,
            aten.argmin,
            aten.all,
            aten.any,
            aten.logsumexp,
            aten.linalg_vector_norm,
            aten._softmax,
            aten._safe_softmax,
            aten._log_softmax,
        ),
        _mix,
    ),
    **dict.fromkeys(
        (
            aten.native_batch_norm,
            aten._native_batch_norm_legit,
            aten._native_batch_norm_legit_no_training,
            aten._native_batch_norm_legit_functional,
            aten._batch_norm_with_update,
            aten._batch_norm_no_update,
            aten.cudnn_batch_norm,
        ),
        _normalize_batch,
    ),
    **dict.fromkeys((aten.native_layer_norm, aten._fused_rms_norm), _normalize_layer),
    aten.native_group_norm: _normalize_groups,
    **{
        getattr(aten, f"{name}{n}d{end}"): _pool
        for n in (2, 3)
        for name, end in (
            ("max_pool", "_with_indices"),
            ("avg_pool", ""),
            ("_adaptive_avg_pool", ""),
            ("adaptive_max_pool", ""),
        )
    },
    **dict.fromkeys(
        (
            aten.upsample_nearest1d,
            aten.upsample_nearest2d,
            aten.upsample_nearest3d,
            aten.upsample_linear1d,
            aten.upsample_bilinear2d,
            aten.upsample_bicubic2d,
            aten.upsample_trilinear3d,
            aten.reflection_pad1d,
            aten.reflection_pad2d,
            aten.replication_pad1d,
            aten.replication_pad2d,
        ),
        _pool,
    ),
    aten.im2col: _take_patches,
}


def _dims(call: OperationCall, count: int) -> list[int]:
    dims = call.arguments.get("dim")
    if dims is None or (isinstance(dims, Sequence) and not dims):
        return list(range(count))
    return [i % count for i in ([dims] if isinstance(dims, int) else dims)] if count else []


def _drop(labels: Labels, x: Labelled, dims: Sequence[int], shape: tuple[int, ...]) -> Labelled:
    if len(shape) == len(x.axes):
        for i in dims:
            x = x.put(i, labels.fixed(1), frozenset())
        return x
    return x.pick(i for i in range(len(x.axes)) if i not in dims)
