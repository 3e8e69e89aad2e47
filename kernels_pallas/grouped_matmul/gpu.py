"""The grouped product for GPU: a Triton kernel over pieces, each up to M rows of one group.

R rows, I inputs, O outputs, E groups, M rows of a piece, N outputs of a block, K inputs of a step

XLA for GPU has no such product: it multiplies every row by every matrix, after it has copied them all into another
order of axes. JAX calls Pallas' way to Triton deprecated; where it is gone, jaxserve.quant takes XLA's.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul.contract import Quantised, Weights, validate
from kernels_pallas.grouped_matmul.groups import bounds, only
from kernels_pallas.quantised_matmul import gpu as quantised
from kernels_pallas.ragged_paged_attention.pieces import pieces


class Blocks(NamedTuple):
    """How the kernel cuts its work: powers of two, 16 at least."""

    rows: int
    """M"""
    outputs: int
    """N"""
    inputs: int
    """K"""

    @classmethod
    def by_rule(cls, rows: int, groups: int, itemsize: int) -> "Blocks":
        """For x [rows, I] and w [groups, O, I]: pieces that hold most groups whole, so that a matrix is read once."""
        twice = 1 << (max(2 * rows // groups, 1) - 1).bit_length()
        most = min(max(twice, 16), 128)
        return cls(most, 128 if most == 128 else 64, 128 // itemsize)


def grouped_matmul(
    x: Float[Array, "R I"],
    w: Weights,
    sizes: Int[Array, " E"],
    first: Int[Array, ""] | None = None,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "R O"]:
    """See contract.py. `blocks` instead of those by rule; `interpret` runs the kernel on a CPU."""
    validate(x, w, sizes, first)
    (rows, _), (groups, outputs, _), itemsize = x.shape, w.shape, x.dtype.itemsize
    blocks = blocks or Blocks.by_rule(rows, groups, itemsize)
    begin, end = bounds(sizes, first)
    nothing = jnp.zeros_like(begin)
    group_of, number_of, count = pieces(nothing, (end - begin - 1) // blocks.rows, rows // blocks.rows + groups)
    if isinstance(w, Quantised):
        body = partial(_quantised_body, blocks=blocks, group=w.group, kind=w.codes.dtype)
        stored = (quantised.in_bytes(w.codes), *w.arrays[1:])
    else:
        body, stored = partial(_body, blocks=blocks), (w,)
    out = pl.pallas_call(
        body,
        grid=(-(-outputs // blocks.outputs), len(group_of)),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), x.dtype),
        compiler_params=plt.CompilerParams(num_warps=8 if blocks.rows == 128 else 4, num_stages=4),
        interpret=interpret,
        name="jaxserve_grouped_matmul",
    )(group_of, number_of, begin, end, count.reshape(1), x, *stored)
    return only(out, begin, end)  # rows of no group were never written


def _body(
    group_of: Any, number_of: Any, begin: Any, end: Any, count: Any, x: Any, w: Any, out: Any, *, blocks: Blocks
) -> None:
    """One piece, N of its outputs."""
    n, i = pl.program_id(0), pl.program_id(1)
    (_, inputs), outputs = x.shape, out.shape[1]

    def lie(shape: tuple[int, int], axis: int, at: Any = 0) -> jax.Array:
        return lax.broadcasted_iota(jnp.int32, shape, axis) + at

    @pl.when(i < count[0])
    def compute() -> None:
        group, left = group_of[i], n * blocks.outputs
        top, bottom = begin[group] + number_of[i] * blocks.rows, end[group]
        of_x, of_w = (blocks.rows, blocks.inputs), (blocks.outputs, blocks.inputs)
        row, output = lie(of_x, 0, top), lie(of_w, 0, left)
        is_row, is_output = row < bottom, output < outputs
        # float32 numbers are not rounded to TF32 on the way
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

        def step(k: jax.Array, acc: jax.Array) -> jax.Array:
            at, own = (lie(of, 1, k * blocks.inputs) for of in (of_x, of_w))
            a = plt.load(x.at[row, at], mask=is_row & (at < inputs), other=0.0)
            b = plt.load(w.at[group, output, own], mask=is_output & (own < inputs), other=0.0)
            return acc + plt.dot(a, b, trans_b=True, precision=precision).astype(jnp.float32)

        of_out = (blocks.rows, blocks.outputs)
        acc = lax.fori_loop(0, -(-inputs // blocks.inputs), step, jnp.zeros(of_out, jnp.float32))
        row, output = lie(of_out, 0, top), lie(of_out, 1, left)
        plt.store(out.at[row, output], acc.astype(out.dtype), mask=(row < bottom) & (output < outputs))


def _quantised_body(
    group_of: Any, number_of: Any, begin: Any, end: Any, count: Any, x: Any, codes: Any, scales: Any, *others: Any,
    blocks: Blocks, group: int, kind: Any,
) -> None:  # fmt: skip
    """The same of codes [E, I, O], of 4 bits in pairs, with scales and, if there are, minima [E, I / G, O]."""
    minima, out = others[0] if len(others) == 2 else None, others[-1]
    n, i = pl.program_id(0), pl.program_id(1)
    outputs = out.shape[1]

    @pl.when(i < count[0])
    def compute() -> None:
        own = group_of[i]
        top, bottom = begin[own] + number_of[i] * blocks.rows, end[own]
        cut = quantised.Blocks(blocks.rows, blocks.outputs, 1)
        sums = quantised.products(
            x, codes, scales, minima, (own,), top, bottom, n, 0, cut, group=group, kind=kind, inputs_first=True
        )
        for total, row, output in sums:
            plt.store(out.at[row, output], total.astype(out.dtype), mask=(row < bottom) & (output < outputs))
