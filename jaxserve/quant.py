"""How a weight is stored and multiplied: the one place that knows a weight's format.

A weight is a dense array in the checkpoint's layout, outputs first, or a leaf type of its own that these functions
accept as well, so that model files do not change with the format.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxserve.formats import FORMATS, SMALLER_BLOCKS, Blocks, Format, quantise
from jaxserve.native import blocks
from jaxserve.native import linear as dense
from jaxserve.native.memory import aligned
from jaxserve.scaled import Scaled, multiply, take_rows, traced_for
from kernels_pallas.grouped_matmul.contract import (
    GroupedMatmul,
    Quantised,
    Weights,
    validate_for_gpu,
    validate_for_tpu,
)
from kernels_pallas.grouped_matmul.groups import bounds, only
from kernels_pallas.grouped_matmul.reference import grouped_matmul as one_by_one

_STATIC = {"static": True}  # a field that is part of the tree's structure
_OUTPUTS_FIRST = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])  # x [R, I], w [E, O, I]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """A matrix as the C++ kernels for CPU want it, in the format that the checkpoint stores."""

    panels: jax.Array
    """16 rows side by side: [N / 16, K, 16] of plain numbers, or the bytes of quantised ones; a stack's one by one."""
    shape: tuple[int, ...] = field(metadata=_STATIC)
    """What the model sees, outputs first, and before them how many matrices a stack has."""
    outputs: int = field(metadata=_STATIC)
    """N: the product of the leading axes that are outputs."""
    dtype: DTypeLike = field(metadata=_STATIC)
    """Of the activations."""
    format: Format | None = field(default=None, metadata=_STATIC)
    """None for plain numbers."""
    stacked: bool = field(default=False, metadata=_STATIC)

    @property
    def depth(self) -> int:
        """K."""
        return math.prod(self.shape[self.stacked :]) // self.outputs


type Weight = Float[Array, "..."] | Packed | Scaled


def pack(w: np.ndarray | Blocks, shape: tuple[int, ...], dtype: DTypeLike) -> Packed:
    """A checkpoint's matrix w [N, K] for the CPU kernels, which must be loaded; on the host still."""
    if isinstance(w, Blocks):
        outputs = w.rows.shape[0]
        panels, format = blocks.pack(w.format, w.rows, math.prod(shape) // outputs), w.format
    else:
        outputs, panels, format = w.shape[0], dense.pack(w), None
    return Packed(panels, shape, outputs, jnp.dtype(dtype), format)  # type: ignore[arg-type]


def stack(matrices: Iterable[Packed], count: int) -> Packed:
    """`count` packed matrices of one kind as one [count, ...]; each is asked for when the one before is copied."""
    given = iter(matrices)
    first = next(given)
    panels = aligned((count, *first.panels.shape), np.dtype(first.panels.dtype))
    panels[0] = first.panels
    for i, matrix in zip(range(1, count), given, strict=True):
        panels[i] = matrix.panels
    return replace(first, panels=panels, shape=(count, *first.shape), stacked=True)  # type: ignore[arg-type]


def quantised(w: np.ndarray, format: str, *, vocabulary: bool) -> np.ndarray | Blocks:
    """A plain matrix w [N, K] in a block format, that of `format_for`; where that is none w stays as it is."""
    found = format_for(format, w.shape[1], vocabulary=vocabulary)
    return w if found is None else Blocks(found, quantise(found, w.astype(np.float32)))


def format_for(format: str, depth: int, *, vocabulary: bool) -> Format | None:
    """What becomes of rows of `depth` plain numbers by a format's name; `vocabulary`: the embedding or the output.

    As in llama.cpp's mixes, a vocabulary's matrix is never below Q6_K. Where blocks do not fill the rows a format with
    smaller ones stands in, or none.
    """
    if vocabulary and format != "Q8_0":
        format = "Q6_K"
    if depth % FORMATS[format].block:
        format = SMALLER_BLOCKS.get(format, format)
    return None if depth % FORMATS[format].block else FORMATS[format]


def linear(x: Float[Array, "T ..."], w: Weight, *, out: int = 1) -> Float[Array, "T ..."]:
    """x [T, inputs...] times w [outputs..., inputs...] over all input axes -> [T, outputs...].

    `out` is how many leading axes of w are outputs. Products are summed in float32 and rounded once to x's dtype.
    Contracting the last axes needs no transposed copy, and is XLA:CPU's fastest layout at batch 1 by far.
    """
    y = _product(x.reshape(x.shape[0], -1), w, out, x.dtype)
    return y if out == 1 else y.reshape(x.shape[0], *w.shape[:out])


def linear_f32(x: Float[Array, "S D"], w: Weight) -> Float[Array, "S V"]:
    """x [S, D] times w [V, D] -> float32 [S, V]: the vocabulary projection, never rounded."""
    return _product(x, w, 1, jnp.float32)


def grouped_linear(
    x: Float[Array, "R I"], w: Weight, sizes: Int[Array, " E"], first: Int[Array, ""] | None = None
) -> Float[Array, "R O"]:
    """Groups of rows of x [R, I], each times a matrix of its own of w [E, O, I] -> [R, O].

    sizes[0] rows from row `first` (None: 0) on are the first matrix's, and so on, and rows of none become zeros; with
    packed weights there may be none. Summed and rounded as by `linear`. Only matrices that have rows are read, but by
    `ragged`. Of a stack that a mesh divides x and w are what one device has.
    """
    if isinstance(w, Packed):
        if not w.stacked:
            raise ValueError(f"a weight {list(w.shape)} is no stack of matrices")
        if first is not None:
            raise ValueError("packed weights are those of one device, and take all rows; leave `first` out")
        if x.shape[1] != w.depth:
            raise ValueError(f"a stack {list(w.shape)} of {w.depth} inputs was multiplied by rows of {x.shape[1]}")
        if w.format is not None:
            return blocks.grouped_linear(x, w.panels, sizes, w.format, w.outputs, x.dtype)
        return dense.grouped_linear(x, w.panels, sizes, w.outputs, x.dtype)
    if isinstance(w, Scaled) and not w.stacked:
        raise ValueError(f"a weight {list(w.shape)} is no stack of matrices")
    if isinstance(w, Scaled):
        stack = Quantised(w.codes, w.scales, w.minima, w.format.group)
        return _grouped_matmul(x.dtype, stack)(x, stack, sizes, first)[:, : w.own_outputs]
    return _grouped_matmul(x.dtype, w)(x, w, sizes, first)


def _grouped_matmul(dtype: np.dtype, w: Weights) -> GroupedMatmul:
    """The body for the devices that are traced for; else XLA's own, by platform."""
    platform, capability = traced_for()
    try:
        if platform == "tpu":
            validate_for_tpu(dtype)
            return import_module("kernels_pallas.grouped_matmul.tpu").grouped_matmul
        if platform == "gpu":
            validate_for_gpu(dtype, capability, w)
            return import_module("kernels_pallas.grouped_matmul.gpu").grouped_matmul
    except (ValueError, ImportError):  # Pallas' GPU backends come and go with JAX
        pass
    return _by_xla


def _by_xla(
    x: Float[Array, "R I"], w: Weights, sizes: Int[Array, " E"], first: Int[Array, ""] | None = None
) -> Float[Array, "R O"]:
    if isinstance(w, Quantised):
        return one_by_one(x, w, sizes, first)
    given = (x, w, sizes) if first is None else (x, w, sizes, first)
    y: jax.Array = jax.lax.platform_dependent(*given, cpu=one_by_one, default=ragged)
    return y


def ragged(
    x: Float[Array, "R I"], w: Float[Array, "E O I"], sizes: Int[Array, " E"], first: Int[Array, ""] | None = None
) -> Float[Array, "R O"]:
    """The product as XLA has it for accelerators: on GPU every row times every matrix, of which it makes a copy."""
    if first is not None:  # its groups begin at row 0
        return jnp.roll(ragged(jnp.roll(x, -first, axis=0), w, sizes), first, axis=0)
    y = jax.lax.ragged_dot_general(x, w, sizes, _OUTPUTS_FIRST, preferred_element_type=jnp.float32)
    return only(y.astype(x.dtype), *bounds(sizes, None))


@jax.named_scope("embed")
def embed(w: Weight, tokens: Int[Array, " T"]) -> Float[Array, "T D"]:
    """Rows of an embedding table: w [V, D], tokens [T] -> [T, D].

    A token below 0 is nobody's, and its row anything finite. The CPU's kernels make it zeros, and do no work for rows
    that stay zeros.
    """
    if isinstance(w, Packed):
        if w.format is not None:
            return blocks.embed(w.panels, tokens, w.format, w.outputs, w.depth, w.dtype)
        return dense.embed(w.panels, tokens, w.outputs, w.depth, w.dtype)
    if isinstance(w, Scaled):
        return take_rows(w, tokens)
    return jnp.take(w, tokens, axis=0, mode="clip")


def _product(x: Float[Array, "T I"], w: Weight, out: int, dtype: DTypeLike) -> Float[Array, "T O"]:
    outputs = math.prod(w.shape[:out])
    if isinstance(w, Packed | Scaled):
        if outputs != w.outputs or getattr(w, "stacked", False):
            raise ValueError(f"a weight {list(w.shape)} of {w.outputs} outputs was multiplied as one of {outputs}")
        if x.shape[1] != w.depth:
            raise ValueError(f"a weight {list(w.shape)} of {w.depth} inputs was multiplied by rows of {x.shape[1]}")
    if isinstance(w, Scaled):
        return multiply(x, w, dtype)
    if isinstance(w, Packed):
        if w.format is not None:
            return blocks.linear(x, w.panels, w.format, outputs, dtype)
        return dense.linear(x, w.panels, outputs, dtype)
    y = jax.lax.dot_general(x, w.reshape(outputs, -1), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return y.astype(dtype)
