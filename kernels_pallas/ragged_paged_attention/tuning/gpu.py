"""Block sizes of the GPU's kernels: from gpu.json where there is an entry, else by a rule that fits every chip."""

from functools import cache
from typing import NamedTuple

from kernels_pallas.ragged_paged_attention.tuning import entry_for, log

ROWS = 64
"""Rows of queries that Hopper's tensor cores take at a time, and that are in shared memory, whatever a share has."""
SHARED_BYTES = ((228 << 9) - (1 << 10), 227 << 10)
"""Shared memory of a block of threads on Hopper: of each of two on a multiprocessor, and of one alone."""
OWN_BYTES = 512
"""Of it, for barriers."""
SCALE_BYTES = 1 << 10
"""Of it, for the scales of a block of kv tokens of an Int8Cache: that is what shared memory is aligned to."""
LARGE = {"8.0": 163 << 10, "8.7": 163 << 10, "9.0": 227 << 10, "10.0": 227 << 10, "10.3": 227 << 10, "11.0": 227 << 10}
"""Shared memory of a block of threads, by compute capability, where it is more than `SMALL`."""
SMALL = 99 << 10
"""Shared memory of a block of threads on all others from 8.0 on, as A10, L4 and consumers' cards are."""


class GpuBlocks(NamedTuple):
    """How a kernel cuts its work."""

    positions: int
    """kv tokens computed with at once: on Hopper a multiple of 64, in Triton a power of two."""
    buffers: int
    """Blocks of them in shared memory: one is computed with while the others are on their way. At least 2. In Triton
    the stages of its pipeline, of which two blocks take five: a block's pages are looked up one stage before."""
    least: int = 4
    """Blocks that a share of a sequence's kv tokens has at least."""
    waves: int = 4
    """Shares a multiprocessor that sequences are cut for, where they are fewer."""
    rows: int = ROWS
    """Rows of queries of a share, at most: in Triton a power of two, at least 16, on Hopper 64."""
    heads: int = 8
    """Heads of a share of several query tokens, at most: more leave room for fewer tokens."""
    warps: int = 4
    """That compute a share in Triton; on Hopper's own body it is a warpgroup."""

    def splits(self, shares: int, cores: int) -> int:
        """Parts to cut each sequence's kv tokens into, with `shares` of them if none is cut. A power of two: what a
        sequence's sum is rounded to changes with it."""
        return 1 << max(0, min(cores * self.waves // shares, 64).bit_length() - 1)


@cache  # one line in the log for each choice
def blocks_for(
    chip: str,
    hopper: bool,
    dtype: str,
    queries: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page: int,
    value_dim: int | None = None,
    capability: str = "",
) -> tuple[GpuBlocks, GpuBlocks]:
    """Blocks for decoding and for everything else, of the body for Hopper or of that in Triton. `dtype` is the cache's,
    `queries` the type of the queries, which differ where the cache is of 8 bits. `value_dim` is given for latents, and
    the chip's compute `capability` tells how much of them it can hold.

    An entry serves where all that it names agrees, and the first such entry is taken.
    """
    asked = dict(
        chip=chip, hopper=hopper, dtype=dtype, queries=queries, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        page=page,
    )  # fmt: skip
    asked |= {} if value_dim is None else dict(value_dim=value_dim)
    entry, source = entry_for("gpu.json", asked)
    if entry is not None:
        found = GpuBlocks(**entry["decode"]), GpuBlocks(**entry["prefill"])
    elif value_dim is not None:
        found = (_of_latents(dtype, queries, LARGE.get(capability, SMALL)),) * 2
    elif not hopper:  # which keeps them in registers, as numbers of the queries' type
        narrow = queries != "float32"  # else multiplied without tensor cores, from registers
        found = (GpuBlocks(64 if head_dim <= 128 and narrow else 32, 2, rows=ROWS if narrow else 16),) * 2
    else:
        result = ROWS * head_dim * 4  # of a part of a sequence, in float32
        found = _by_rule(head_dim, dtype, result), _by_rule(head_dim, dtype, 0)
    log.info("attention blocks for %s: decode %s, prefill %s (%s)", asked, *map(tuple, found), source)
    return found


def _of_latents(dtype: str, queries: str, shared: int) -> GpuBlocks:
    """Of up to 512 + 64 numbers. Queries and two blocks of kv tokens lie in shared memory, the sums of 512 numbers a
    row in registers, of which 64 rows leave few for anything else. With these the compiler spills none (BENCHMARKS.md).
    """
    if queries == "float32":  # multiplied without tensor cores, from registers
        positions, buffers, rows, warps = 16, 2, 16, 8
    elif dtype == "float8_e4m3fn":  # which pass through registers to become numbers of the queries' type
        positions, buffers, rows, warps = 32, 5, 32, 8
    elif shared >= 227 << 10:  # 64 rows would be multiplied by another instruction, for which it does spill
        positions, buffers, rows, warps = 64, 5, 32, 8
    elif shared >= 163 << 10:
        positions, buffers, rows, warps = 32, 5, 64, 8
    else:
        positions, buffers, rows, warps = 32, 5, 16, 4
    return GpuBlocks(positions, buffers, 256 // positions, waves=2, rows=rows, heads=rows // 2, warps=warps)


def _by_rule(head_dim: int, dtype: str, result: int) -> GpuBlocks:
    """As many buffers as leave room for a second block of threads, if that is two; else all that fit one."""
    positions = 64
    queries, block, widened = ROWS * head_dim * 2, positions * head_dim * 4, 0
    if dtype in ("int8", "float8_e4m3fn"):
        block, widened = block // 2 + (SCALE_BYTES if dtype == "int8" else 0), positions * head_dim * 2
    for shared in SHARED_BYTES:
        buffers = min(4, (shared - OWN_BYTES - queries - widened - result) // block)
        if buffers >= 2:
            return GpuBlocks(positions, buffers)
    raise ValueError(f"no blocks fit a head_dim of {head_dim}")
