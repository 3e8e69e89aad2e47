"""The grouped product for TPU: a Pallas kernel over pieces, each the rows that one tile has of one group.

R rows, I inputs, O outputs, E groups, M rows of a tile, N outputs of a block

XLA's ragged_dot wants all weights inputs first and makes a copy of those that are not; of those that are XLA fetches
whole stacks to the chip before it, rows or none. Here a block of a matrix is fetched as it lies, once, and of a matrix
without rows nothing; a block of codes becomes weights on the chip. That groups are listed ahead and chosen by
prefetched scalars is the idea of MegaBlocks (Gale et al. 2022), as JAX's own megablox kernel has it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul.contract import Quantised, Weights, validate, validate_for_tpu
from kernels_pallas.grouped_matmul.groups import bounds, only
from kernels_pallas.quantised_matmul.tpu import weights
from kernels_pallas.ragged_paged_attention.pieces import pieces

LANES = 128
LEAST_ROWS = 16
"""A tile of bfloat16."""
LEAST_QUANTISED = 32
"""Rows of a tile, where making weights takes longer than multiplying by them, and fewer save little."""
WEIGHT_BYTES = 4 << 20
"""A block of a matrix takes at most this much of on-chip memory, twice; large enough that its copy takes longer than a
turn of the kernel does."""
ROW_BYTES = 2 << 20
"""And so does a tile of rows."""
MOST_OUTPUTS = 2048
MOST_INPUTS = 2048
"""Of which codes are made weights at once."""
USUAL_VMEM = 14 << 20
"""What a kernel may use on every chip unless it says more: 16 MiB, less what the compiler needs itself."""
type Interpret = bool | pltpu.InterpretParams


class Blocks(NamedTuple):
    """How the kernel cuts its work."""

    rows: int
    """M, a multiple of LEAST_ROWS."""
    outputs: int
    """N: a multiple of LANES, or all of O."""

    @classmethod
    def by_rule(
        cls, rows: int, inputs: int, groups: int, outputs: int, itemsize: int, quantised: bool = False
    ) -> "Blocks":
        """For x [rows, inputs] and w [groups, outputs, inputs]: fits every chip's on-chip memory where 128 outputs do.

        With tiles of 128 rows the matrix unit computes for as long as it loads weights; more pays only where groups are
        several tiles long. Quantised weights come faster than that, so for short groups fewer do.
        """
        depth = -(-inputs // LANES) * LANES * itemsize  # bytes of a row as it lies on the chip
        if itemsize == 4:
            depth *= 2  # and while it is multiplied
        most = 256 if rows >= 512 * groups else 128
        while quantised and most > LEAST_QUANTISED and most * groups > 4 * rows:
            most //= 2
        while most > LEAST_ROWS and most * depth > ROW_BYTES:
            most //= 2
        fitting = min(max(WEIGHT_BYTES // depth // LANES * LANES, LANES), MOST_OUTPUTS)
        count = -(-outputs // fitting)
        even = -(-outputs // count // LANES) * LANES
        return cls(min(most, -(-rows // LEAST_ROWS) * LEAST_ROWS), outputs if count == 1 else even)

    def vmem(self, inputs: int, itemsize: int, quantised: int = 0) -> int:
        """Bytes of on-chip memory that they take: two of each, and what is on its way. `quantised`: bytes of a block of
        codes, scales and minima, of which weights are made."""
        depth, width = (-(-n // LANES) * LANES for n in (inputs, self.outputs))
        moved = (self.rows + self.outputs) * depth + self.rows * width
        columns = min(width, _columns(self.outputs))
        split = 6 * (self.rows + columns) * depth if itemsize == 4 else 0  # float32 is multiplied as three of bfloat16
        if quantised:
            moved -= self.outputs * depth
            split += 2 * quantised + min(depth, MOST_INPUTS) * columns * (4 + itemsize)
        return 2 * moved * itemsize + split + 3 * self.rows * columns * 4


def grouped_matmul(
    x: Float[Array, "R I"],
    w: Weights,
    sizes: Int[Array, " E"],
    first: Int[Array, ""] | None = None,
    *,
    blocks: Blocks | None = None,
    interpret: Interpret = False,
) -> Float[Array, "R O"]:
    """See contract.py. `blocks` instead of those by rule; `interpret` runs the kernel on a CPU."""
    validate(x, w, sizes, first)
    validate_for_tpu(x.dtype)
    (rows, inputs), (groups, outputs, _), itemsize = x.shape, w.shape, x.dtype.itemsize
    blocks = blocks or Blocks.by_rule(rows, inputs, groups, outputs, itemsize, isinstance(w, Quantised))
    tiles = -(-rows // blocks.rows)
    x = jnp.pad(x, ((0, tiles * blocks.rows - rows), (0, 0)))
    begin, end = bounds(sizes, first)
    last = jnp.where(end > begin, (end - 1) // blocks.rows, -1)
    group_of, tile_of, count = pieces(begin // blocks.rows, last, tiles + groups - 1)
    tile_of = jnp.minimum(tile_of, tiles - 1)  # where no group has a row
    if isinstance(w, Quantised):
        stored = w.arrays
        body = partial(_quantised_body, rows=blocks.rows, group=w.group)
        in_block = [pl.BlockSpec((None, a.shape[1], blocks.outputs), _inputs_first) for a in stored]
        quantised = sum(_padded(a.shape[1], blocks.outputs) * _bits(a.dtype) // 8 for a in stored)
    else:
        turned, quantised = _turned(outputs, inputs), 0
        stored = (w.swapaxes(1, 2) if turned else w,)  # [E, I, O] where that is how it lies
        body = partial(_body, rows=blocks.rows, turned=turned)
        in_block = [_of_matrix(blocks.outputs, inputs, turned)]
    vmem = blocks.vmem(inputs, itemsize, quantised)
    if not interpret:
        stored = tuple(pltpu.with_memory_space_constraint(a, pltpu.HBM) for a in stored)
    # A matrix's pieces follow each other, so each block of it is fetched once; so do a tile's, which stays meanwhile.
    out = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(-(-outputs // blocks.outputs), jnp.maximum(count, 1)),
            in_specs=[
                pl.BlockSpec((blocks.rows, inputs), lambda n, i, group, tile, *_: (tile[i], 0)),
                *in_block,
            ],
            out_specs=pl.BlockSpec((blocks.rows, blocks.outputs), lambda n, i, group, tile, *_: (tile[i], n)),
        ),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], outputs), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),  # chips with two cores share the outputs
            vmem_limit_bytes=vmem + (2 << 20) if vmem > USUAL_VMEM else None,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inputs * outputs,
            bytes_accessed=rows * (inputs + outputs) * itemsize
            + min(groups, rows) * sum(a.size // groups * _bits(a.dtype) // 8 for a in stored),
            transcendentals=0,
        ),
        interpret=interpret,
        name="jaxserve_grouped_matmul",
    )(group_of, tile_of, begin, end, x, *stored)
    return only(out[:rows], begin, end)  # tiles of no group were never written


def _turned(outputs: int, inputs: int) -> bool:
    """Whether XLA lays matrices [outputs, inputs] out inputs first, as it does where that fills whole tiles better."""

    return _padded(inputs, outputs) < _padded(outputs, inputs)


def _of_matrix(outputs: int, inputs: int, turned: bool) -> pl.BlockSpec:
    if turned:
        return pl.BlockSpec((None, inputs, outputs), _inputs_first)
    return pl.BlockSpec((None, outputs, inputs), lambda n, i, group, *_: (group[i], n, 0))


def _inputs_first(n: Any, i: Any, group: Any, *_: Any) -> tuple[Any, ...]:
    return group[i], 0, n


def _padded(inputs: int, outputs: int) -> int:
    return -(-inputs // 8) * 8 * -(-outputs // LANES) * LANES


def _bits(dtype: Any) -> int:
    return 4 if dtype in (jnp.int4, jnp.uint4) else 8 * dtype.itemsize


def _columns(outputs: int) -> int:
    """How many outputs are computed at once, in a loop: the program is as long as they are many."""
    return next((n for n in (256, LANES) if outputs % n == 0), outputs)


def _body(
    group_of: Any, tile_of: Any, begin: Any, end: Any, x: Any, w: Any, out: Any, *, rows: int, turned: bool
) -> None:
    """One piece: x [M, I], w [N, I] or `turned` [I, N], out [M, N], of which only its own rows are written."""
    # float32 numbers are not rounded to bfloat16 on the way
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def product(at: Any) -> jax.Array:
        own, axis = (w[:, at], 0) if turned else (w[at, :], 1)
        axes = (((1,), (axis,)), ((), ()))
        return lax.dot_general(x[...], own, axes, precision=precision, preferred_element_type=jnp.float32)

    _write(group_of, tile_of, begin, end, out, product, rows)


def _write(
    group_of: Any, tile_of: Any, begin: Any, end: Any, out: Any, product: Callable[[Any], jax.Array], rows: int
) -> None:
    """A piece's products, some outputs after the other, to its own rows."""
    i = pl.program_id(1)
    group, top = group_of[i], tile_of[i] * rows
    columns = _columns(out.shape[1])
    row = lax.broadcasted_iota(jnp.int32, (rows, columns), 0) + top
    its = (row >= begin[group]) & (row < end[group])

    def compute(at: Any) -> None:
        # Not every chip chooses among numbers of 16 bits.
        out[:, at] = jnp.where(its, product(at), out[:, at].astype(jnp.float32)).astype(out.dtype)

    if columns == out.shape[1]:
        compute(slice(None))
    else:
        pl.loop(0, out.shape[1] // columns)(lambda n: compute(pl.ds(pl.multiple_of(n * columns, columns), columns)))


def _quantised_body(
    group_of: Any, tile_of: Any, begin: Any, end: Any, x: Any, codes: Any, scales: Any, *others: Any, rows: int,
    group: int,
) -> None:  # fmt: skip
    """The same with codes [I, N], and with scales and, if there are, minima [I / G, N].

    Weights are made anew for each tile of rows, while the matrix unit multiplies those before them.
    """
    minima, out = others[0] if len(others) == 2 else None, others[-1]
    inputs, unit = x.shape[1], max(2 * LANES, 8 * group)
    turns = -(-inputs // max(MOST_INPUTS, unit))
    depth = inputs if turns == 1 else -(-inputs // turns // unit) * unit
    # float32 numbers are not rounded to bfloat16 on the way
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def some(first: Any, depth: int, at: Any) -> jax.Array:
        own, its = pl.ds(first, depth), pl.ds(lax.div(first, group), depth // group)
        w = weights(codes[own, at], group, scales[its, at], None if minima is None else minima[its, at])
        axes = (((1,), (0,)), ((), ()))
        return lax.dot_general(
            x[:, own], w.astype(x.dtype), axes, precision=precision, preferred_element_type=jnp.float32
        )

    def product(at: Any) -> jax.Array:
        if turns == 1:
            return some(0, inputs, at)
        rest = inputs % depth
        y = some(inputs - rest, rest, at) if rest else some(0, depth, at)

        def more(k: Any, y: jax.Array) -> jax.Array:
            return y + some(pl.multiple_of(k * depth, depth), depth, at)

        return lax.fori_loop(0 if rest else 1, inputs // depth, more, y)

    _write(group_of, tile_of, begin, end, out, product, rows)
