"""The quantised product for GPU: a Triton kernel that makes weights of a tile of codes in registers.

T rows, K inputs, N outputs, G inputs of a group

XLA makes the whole matrix in main memory first. Where a matrix has too few outputs to busy a chip, several programs
share its inputs and XLA adds up what they give. JAX calls Pallas' way to Triton deprecated; where it is gone,
jaxserve.quant takes XLA's.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels_pallas.quantised_matmul.contract import group_of

CORES = 132
"""Programs that should at least run at once: an H100's cores."""


class Blocks(NamedTuple):
    """How the kernel cuts its work: powers of two."""

    rows: int
    """16 at least."""
    outputs: int
    """32 at least: two halves of 16 where codes of 4 bits lie in pairs."""
    shares: int
    """Programs that share the inputs of an output."""

    @classmethod
    def by_rule(cls, rows: int, inputs: int, outputs: int) -> "Blocks":
        """Rows in one tile where they are few, for then a matrix is read once."""
        tile = min(max(1 << (rows - 1).bit_length(), 16), 128)
        width = 128 if tile == 128 else 64
        programs = -(-rows // tile) * -(-outputs // width)
        shares = 1
        while shares < 8 and programs * shares < CORES and inputs // (2 * shares) >= 512:
            shares *= 2
        return cls(tile, width, shares)


def quantised_matmul(
    x: Float[Array, "T K"],
    codes: Int[Array, "A B"],
    scales: Float[Array, "G N"],
    minima: Float[Array, "G N"] | None = None,
    *,
    inputs_first: bool,
    dtype: DTypeLike | None = None,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "T N"]:
    """See contract.py. `blocks` instead of those by rule; `interpret` runs the kernel on a CPU."""
    group = group_of(x, codes, scales, minima, inputs_first=inputs_first)
    (rows, inputs), outputs = x.shape, scales.shape[1]
    blocks = blocks or Blocks.by_rule(rows, inputs, outputs)
    kind, codes = codes.dtype, in_bytes(codes)
    given = (x, codes, scales) if minima is None else (x, codes, scales, minima)
    out_dtype = jnp.dtype(dtype or x.dtype)
    out = pl.pallas_call(
        partial(_body, group=group, blocks=blocks, kind=kind, inputs_first=inputs_first),
        grid=(-(-outputs // blocks.outputs), -(-rows // blocks.rows), blocks.shares),
        out_shape=jax.ShapeDtypeStruct(
            (blocks.shares, rows, outputs), out_dtype if blocks.shares == 1 else jnp.float32
        ),
        compiler_params=plt.CompilerParams(num_warps=8 if blocks.rows == 128 else 4, num_stages=4),
        interpret=interpret,
        name="jaxserve_quantised_matmul",
    )(*given)
    return out[0] if blocks.shares == 1 else jnp.sum(out, axis=0).astype(out_dtype)


def _body(
    x: Any, codes: Any, scales: Any, *others: Any, group: int, blocks: Blocks, kind: Any, inputs_first: bool
) -> None:
    """One tile of outputs, of one share of the inputs."""
    minima, out = others[0] if len(others) == 2 else None, others[-1]
    rows, outputs = out.shape[1:]
    n, top, share = pl.program_id(0), pl.program_id(1) * blocks.rows, pl.program_id(2)
    sums = products(
        x, codes, scales, minima, (), top, rows, n, share, blocks, group=group, kind=kind, inputs_first=inputs_first
    )
    for total, row, output in sums:
        plt.store(out.at[share, row, output], total.astype(out.dtype), mask=(row < rows) & (output < outputs))


def products(
    x: Any,
    codes: Any,
    scales: Any,
    minima: Any,
    of: tuple[Any, ...],
    top: Any,
    bottom: Any,
    n: Any,
    share: Any,
    blocks: Blocks,
    *,
    group: int,
    kind: Any,
    inputs_first: bool,
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """Rows [top, bottom) of x, as many as a block has, times the n-th block of outputs, over one share of the inputs.

    `of` says which matrix it is of a stack's. Gives sums in float32, and the row and the output of each.
    """
    inputs, outputs, left = x.shape[1], scales.shape[-1], n * blocks.outputs
    pair = 1 if kind == jnp.int8 else 2
    # The other code of a byte is another output where inputs lie first, else another input.
    wide, deep = (pair, 1) if inputs_first else (1, pair)
    depth = min(group, 64) if inputs_first else 64  # inputs of a turn; inputs first they are of one group
    lines, places = depth // deep, blocks.outputs // wide
    shape, one = ((lines, places), (1, places)) if inputs_first else ((places, lines), (places, lines))
    of_k, of_n = (0, 1) if inputs_first else (1, 0)
    all_turns = pl.cdiv(inputs, depth)
    turns = pl.cdiv(all_turns, blocks.shares)
    program_left = n * places
    # float32 numbers are not rounded to TF32 on the way
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def lie(of: tuple[int, int], axis: int, begin: Any, step: int = 1) -> jax.Array:
        return lax.broadcasted_iota(jnp.int32, of, axis) * step + begin

    def step(turn: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        first = turn * depth
        line, place = lie(shape, of_k, turn * lines), lie(shape, of_n, program_left)
        there = (line * deep < inputs) & (place * wide < outputs)
        found = plt.load(codes.at[(*of, *((line, place) if inputs_first else (place, line)))], mask=there, other=0)
        for half in range(pair):
            i, j = (half, 0) if deep == 2 else (0, half)
            k = lie((blocks.rows, lines), 1, first + i, deep)
            row = lie((blocks.rows, lines), 0, top)
            a = plt.load(x.at[row, k], mask=(row < bottom) & (k < inputs), other=0.0)
            own_k, own_n = lie(one, of_k, first + i, deep), lie(one, of_n, left + j, wide)
            at, its = (*of, lax.div(own_k, group), own_n), (own_k < inputs) & (own_n < outputs)
            w = _number(found, half, kind) * plt.load(scales.at[at], mask=its, other=0.0)
            if minima is not None:
                w -= plt.load(minima.at[at], mask=its, other=0.0)
            y = plt.dot(a, w.astype(x.dtype), trans_b=not inputs_first, precision=precision).astype(jnp.float32)
            sums = (*sums[:j], sums[j] + y, *sums[j + 1 :])
        return sums

    end = lax.min((share + 1) * turns, all_turns)
    zeros = (jnp.zeros((blocks.rows, places), jnp.float32),) * wide
    sums = lax.fori_loop(share * turns, end, step, zeros)
    return [(total, lie(total.shape, 0, top), lie(total.shape, 1, left + j, wide)) for j, total in enumerate(sums)]


def in_bytes(codes: Int[Array, "... N"]) -> Int[Array, "..."]:
    """Codes of 4 bits two in a byte, as they lie: the first is the low half."""
    if codes.dtype == jnp.int8:
        return codes
    return lax.bitcast_convert_type(codes.reshape(*codes.shape[:-1], -1, 2), jnp.uint8)


def _number(codes: jax.Array, half: int, kind: Any) -> jax.Array:
    """In float32; of codes of 4 bits the lower or the upper half of a byte."""
    if kind == jnp.int8:
        return codes.astype(jnp.float32)
    nibble = lax.shift_right_logical(codes.astype(jnp.int32), 4 * half) & 15
    return ((nibble ^ 8) - 8 if kind == jnp.int4 else nibble).astype(jnp.float32)
