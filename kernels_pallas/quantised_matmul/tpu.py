"""The quantised product for TPU: a block of codes becomes a block of weights on the chip, and meets the matrix unit.

T rows, K inputs, N outputs, G inputs of a group

XLA writes the whole matrix as bfloat16 to main memory before it multiplies one with a scale for each group. Here main
memory is read once for each tile of rows, and holds nothing besides. Inputs first a scale is spread over rows of
registers, which costs nothing; outputs first it is gathered along lanes, which takes about twice as long.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels_pallas.quantised_matmul.contract import group_of, validate_for_tpu

LANES = 128
LEAST_ROWS = 16
"""A tile of bfloat16."""
MOST_ROWS = 512
"""Of a tile: codes are made weights again for each, which then takes less time than the products do."""
MOST_OUTPUTS = 512
MOST_INPUTS = 2048
COLUMNS = 256
"""How many outputs are computed at once: the program is as long as they are many."""
USUAL_VMEM = 14 << 20
"""What a kernel may use on every chip unless it says more: 16 MiB, less what the compiler needs itself."""
type Interpret = bool | pltpu.InterpretParams


class Blocks(NamedTuple):
    """How the kernel cuts its work."""

    rows: int
    """A multiple of LEAST_ROWS."""
    outputs: int
    """A multiple of LANES, or all."""
    inputs: int
    """A multiple of LANES and of 8 groups, or all."""

    @classmethod
    def by_rule(cls, rows: int, inputs: int, outputs: int, group: int, itemsize: int) -> "Blocks":
        """Fits every chip's on-chip memory; of K as few turns as possible, and little beyond its end."""
        tile = min(-(-rows // LEAST_ROWS) * LEAST_ROWS, MOST_ROWS)
        most = MOST_INPUTS // (1 if tile <= 128 else 2) * 2 // itemsize
        step = math.lcm(8 * group, LANES)

        def cost(depth: int) -> int:
            turns = -(-inputs // depth)
            return turns * (depth + LANES)  # a turn costs something of its own

        depth = inputs if inputs <= max(most, step) else min(range(step, max(most, step) + 1, step), key=cost)
        return cls(tile, min(outputs, MOST_OUTPUTS), depth)

    def vmem(self, group: int, itemsize: int, code_bits: int) -> int:
        """Bytes of on-chip memory that they take: two of each that is moved, and what is on its way."""
        depth, width = (-(-n // LANES) * LANES for n in (self.inputs, self.outputs))
        moved = self.rows * depth * itemsize + width * depth * code_bits // 8 + self.rows * width * 4
        scales = 2 * -(-self.inputs // group // 8) * 8 * width * 4
        columns = min(width, COLUMNS)
        split = 6 * (self.rows + columns) * depth if itemsize == 4 else 0  # float32 is multiplied as three of bfloat16
        return 2 * (moved + scales) + self.rows * width * 4 + columns * depth * (4 + itemsize) + split


def quantised_matmul(
    x: Float[Array, "T K"],
    codes: Int[Array, "A B"],
    scales: Float[Array, "G N"],
    minima: Float[Array, "G N"] | None = None,
    *,
    inputs_first: bool,
    dtype: DTypeLike | None = None,
    blocks: Blocks | None = None,
    interpret: Interpret = False,
) -> Float[Array, "T N"]:
    """See contract.py. `blocks` instead of those by rule; `interpret` runs the kernel on a CPU."""
    group = group_of(x, codes, scales, minima, inputs_first=inputs_first)
    (rows, inputs), outputs, itemsize = x.shape, scales.shape[1], x.dtype.itemsize
    validate_for_tpu(x.dtype, inputs, inputs_first=inputs_first)
    blocks = blocks or Blocks.by_rule(rows, inputs, outputs, group, itemsize)
    tiles, turns = -(-rows // blocks.rows), -(-inputs // blocks.inputs)
    # Where a block hangs over the inputs' end x is zero, and so are the scales: see `_spread`.
    x = jnp.pad(x, ((0, tiles * blocks.rows - rows), (0, turns * blocks.inputs - inputs)))
    of_scales = pl.BlockSpec((blocks.inputs // group, blocks.outputs), lambda t, n, k: (k, n))
    of_codes = (
        pl.BlockSpec((blocks.inputs, blocks.outputs), lambda t, n, k: (k, n))
        if inputs_first
        else pl.BlockSpec((blocks.outputs, blocks.inputs), lambda t, n, k: (n, k))
    )
    stored: tuple[jax.Array, ...] = (codes, scales) if minima is None else (codes, scales, minima)
    if not interpret:  # else small ones are fetched whole before the kernel starts
        stored = tuple(pltpu.with_memory_space_constraint(a, pltpu.HBM) for a in stored)
    code_bits = 8 if codes.dtype == jnp.int8 else 4
    vmem = blocks.vmem(group, itemsize, code_bits)
    out = pl.pallas_call(
        partial(_body, group=group, groups=inputs // group, inputs_first=inputs_first),
        grid=(tiles, -(-outputs // blocks.outputs), turns),
        in_specs=[
            pl.BlockSpec((blocks.rows, blocks.inputs), lambda t, n, k: (t, k)),
            of_codes,
            *[of_scales] * (len(stored) - 1),
        ],
        out_specs=pl.BlockSpec((blocks.rows, blocks.outputs), lambda t, n, k: (t, n)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], outputs), dtype or x.dtype),
        scratch_shapes=[pltpu.VMEM((blocks.rows, blocks.outputs), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),  # chips with two cores share the outputs
            vmem_limit_bytes=vmem + (2 << 20) if vmem > USUAL_VMEM else None,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inputs * outputs,
            bytes_accessed=rows * (inputs + outputs) * itemsize
            + inputs * outputs * code_bits // 8
            + 4 * scales.size * (len(stored) - 1),
            transcendentals=0,
        ),
        interpret=interpret,
        name="jaxserve_quantised_matmul",
    )(x, *stored)
    return out[:rows]


def _body(x: Any, codes: Any, scales: Any, *others: Any, group: int, groups: int, inputs_first: bool) -> None:
    """One block: x [T, K], codes [K, N] or [N, K], scales and minima [K / G, N], out [T, N], sums [T, N]."""
    minima, (out, sums) = others[0] if len(others) == 3 else None, others[-2:]
    k = pl.program_id(2)
    outputs = out.shape[1]
    columns = next((n for n in (COLUMNS, LANES) if outputs % n == 0), outputs)
    first_group = k * scales.shape[0]
    # float32 numbers are not rounded to bfloat16 on the way
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    @pl.when(k == 0)
    def begin() -> None:
        sums[...] = jnp.zeros_like(sums)

    def own(of: Any, at: Any) -> jax.Array:
        """Scales or minima [K / G, columns], zeros beyond the last group."""
        found = of[:, at]
        if groups % scales.shape[0] == 0:
            return found
        group_at = lax.broadcasted_iota(jnp.int32, found.shape, 0) + first_group
        return jnp.where(group_at < groups, found, 0.0)

    def compute(at: Any) -> None:
        spread = weights if inputs_first else _across
        lowest = None if minima is None else own(minima, at)
        w = spread(codes[:, at] if inputs_first else codes[at, :], group, own(scales, at), lowest)
        axes = (((1,), (0 if inputs_first else 1,)), ((), ()))
        w = w.astype(x.dtype)
        sums[:, at] += lax.dot_general(x[...], w, axes, precision=precision, preferred_element_type=jnp.float32)

    if columns == outputs:
        compute(slice(None))
    else:
        pl.loop(0, outputs // columns)(lambda n: compute(pl.ds(pl.multiple_of(n * columns, columns), columns)))

    @pl.when(k == pl.num_programs(2) - 1)
    def end() -> None:
        out[...] = sums[...].astype(out.dtype)


def weights(codes: jax.Array, group: int, scales: jax.Array, minima: jax.Array | None) -> jax.Array:
    """Weights [K, N] in float32 of codes [K, N]."""
    depth, width = codes.shape
    w = codes.astype(jnp.float32).reshape(depth // group, group, width) * scales[:, None, :]
    if minima is not None:
        w -= minima[:, None, :]
    return w.reshape(depth, width)


def _across(codes: jax.Array, group: int, scales: jax.Array, minima: jax.Array | None) -> jax.Array:
    """Weights [N, K] in float32 of codes [N, K]; K is a multiple of 128."""
    width, depth = codes.shape
    lane = lax.broadcasted_iota(jnp.int32, (width, LANES), 1)
    within = min(group, LANES).bit_length() - 1
    own_scales, own_minima = _turned(scales), None if minima is None else _turned(minima)

    def spread(a: jax.Array, begin: int) -> jax.Array:
        """Of LANES inputs from `begin` on, each with its group's."""
        g = begin // group
        there = a[:, g // LANES * LANES : g // LANES * LANES + LANES]
        return jnp.take_along_axis(there, lax.shift_right_logical(lane, within) + g % LANES, axis=1)

    parts = []
    for begin in range(0, depth, LANES):
        part = codes[:, begin : begin + LANES].astype(jnp.float32) * spread(own_scales, begin)
        parts.append(part if own_minima is None else part - spread(own_minima, begin))
    return jnp.concatenate(parts, axis=1)


def _turned(a: jax.Array) -> jax.Array:
    """[N, K / G] of [K / G, N], filled up to whole lanes."""
    short = -a.shape[0] % LANES
    return (jnp.concatenate([a, jnp.zeros((short, a.shape[1]), a.dtype)]) if short else a).T
