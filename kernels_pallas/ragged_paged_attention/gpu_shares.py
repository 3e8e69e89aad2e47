"""What gpu.py and its bodies have in common: the shares that they attend."""

from typing import NamedTuple

import jax

MASKED = -1e30
"""A score that no score is below, and from which another one can be subtracted."""


class Shares(NamedTuple):
    """What each share reads, int32 [I] each."""

    row: jax.Array
    """Of the flat page table, where the sequence's begins."""
    start: jax.Array
    """Position of the first kv token; the multiple of a block, or of a page."""
    end: jax.Array
    """Position after the last one. A share that ends before it starts is none: what it gives is not written."""
    first: jax.Array
    """Position of the first query token."""
