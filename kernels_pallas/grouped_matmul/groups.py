"""Where groups of rows begin and end, and what is left of a result where there is none."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def bounds(sizes: Int[Array, " E"], first: Int[Array, ""] | None) -> tuple[Int[Array, " E"], Int[Array, " E"]]:
    """Rows [begin, end) of each group, int32; the first one begins at row `first` (None: 0)."""
    sizes = sizes.astype(jnp.int32)
    end = jnp.cumsum(sizes) + (0 if first is None else jnp.asarray(first, jnp.int32))
    return end - sizes, end


def only(out: Float[Array, "R O"], begin: Int[Array, " E"], end: Int[Array, " E"]) -> Float[Array, "R O"]:
    """`out` with zeros where no group is, whatever is there."""
    row = jnp.arange(out.shape[0], dtype=jnp.int32)
    its: jax.Array = (row >= begin[0]) & (row < end[-1])
    return jnp.where(its[:, None], out, jnp.zeros((), out.dtype))
