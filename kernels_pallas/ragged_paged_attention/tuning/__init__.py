"""Block sizes of the TPU's kernel: from tpu.json where there is an entry, else by a rule that fits every chip."""

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from kernels_pallas.ragged_paged_attention.contract import latent_row

log = logging.getLogger("jaxserve.attention")

BUFFER_BYTES = 2 << 20
"""By the rule, a fetch of kv tokens takes at most this much of on-chip memory, which is 16 MiB on the smallest chip."""
STATE_BYTES = 3 << 20
"""And so do the sums and maxima of a block of queries."""


class Blocks(NamedTuple):
    """How the kernel cuts its work."""

    queries: int
    """Query tokens of a block: a power of two, at least 16. A block that decodes has one whatever is said here."""
    pages: int
    """Pages fetched at once."""
    buffers: int
    """Fetches in memory: one is computed with while the others are on their way. At least 2."""
    vmem: int | None = None
    """Bytes of on-chip memory that the kernel may use, where the compiler's default is too little."""


@cache  # one line in the log for each choice
def blocks_for(
    chip: str | None, dtype: str, heads: int, kv_heads: int, head_dim: int, page: int, value_dim: int | None = None
) -> tuple[Blocks, Blocks]:
    """Blocks for decoding and for everything else. `dtype` is the cache's, the heads are those of one device;
    `value_dim` is given for latents.

    An entry serves where all that it names agrees, and the first such entry is taken.
    """
    asked = dict(chip=chip, dtype=dtype, heads=heads, kv_heads=kv_heads, head_dim=head_dim, page=page)
    asked |= {} if value_dim is None else dict(value_dim=value_dim)
    entry, source = entry_for("tpu.json", asked)
    if entry is not None:
        found = Blocks(queries=1, **entry["decode"]), Blocks(**entry["prefill"])
    else:
        found = _by_rule(dtype, heads, kv_heads, head_dim, page, value_dim)
    log.info("attention blocks for %s: decode %s, prefill %s (%s)", asked, *map(tuple, found), source)
    return found


def entry_for(file: str, asked: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The first entry of a file of this directory that fits what is asked, if any does; and in words which it is."""
    for number, entry in enumerate(_entries(file)):
        if all(asked[name] == value for name, value in entry.items() if name in asked):
            return entry, f"entry {number} of {file}"
    return None, f"by rule, no entry in {file}"


@cache
def _entries(file: str) -> list[dict[str, Any]]:
    return json.loads((Path(__file__).parent / file).read_text())["entries"]


def _by_rule(
    dtype: str, heads: int, kv_heads: int, head_dim: int, page: int, value_dim: int | None
) -> tuple[Blocks, Blocks]:
    bytes_per = {"float32": 4, "bfloat16": 2, "float16": 2}.get(dtype, 1)
    row, width = kv_heads * 2 * head_dim, -(-head_dim // 128) * 128 * (1 if head_dim % 128 in (0, 64) else 2)
    if value_dim is not None:
        row, width = latent_row(head_dim), latent_row(value_dim)
    fitting = BUFFER_BYTES // (row * bytes_per)
    queries = min(256 * kv_heads // heads, STATE_BYTES // (heads * (256 + width) * 4))
    queries = max(16, 1 << (max(queries, 1).bit_length() - 1))

    def pages(tokens: int) -> int:
        count = max(1, min(tokens, fitting) // page)
        return 1 << (count.bit_length() - 1)

    many = queries * heads // kv_heads > 1024  # rows of scores, of which a fetch has as many columns as tokens
    return Blocks(1, pages(512), 3), Blocks(queries, pages(512), 2, 32 << 20 if many else None)
