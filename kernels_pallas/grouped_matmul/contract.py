"""The one signature of a grouped matrix product, and what every body may assume of its arguments.

    x      [R, I]     rows: those of a group lie side by side, the groups in their order
    w      [E, O, I]  a matrix for each group, outputs first, as checkpoints have them; or Quantised
    sizes  [E]        rows of each group, 0 or more
    first  [] or None the row where the first group begins; None: row 0

    -> [R, O] of x's type: each row times the matrix of its group, summed in float32 and rounded once

The groups must end at row R or before. Rows of none are zeros: where each device has some of the matrices, the results
of all add up to the whole. A row depends on no other, and nothing that a matrix without rows holds shows.
"""

from dataclasses import dataclass, field
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.quantised_matmul import contract as quantised


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantised:
    """A stack of quantised matrices, each as quantised_matmul's contract has one whose inputs lie first. Rows are
    multiplied by the numbers that they stand for, rounded to the rows' type.

    For a TPU axes should fill its tiles, O whole 128s and S whole 8s: else XLA may lay a stack out matrices last, and
    copy it before each product. So there may be more scales than I / G, the last of them nobody's.
    """

    codes: jax.Array
    """int8, int4 or uint4 [E, I, O]"""
    scales: jax.Array
    """float32 [E, S, O]"""
    minima: jax.Array | None
    """As the scales, or None: zeros."""
    group: int = field(metadata={"static": True})
    """G: inputs that share a scale."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(E, O, I)"""
        return self.codes.shape[:1] + self.codes.shape[:0:-1]

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """Those that there are."""
        return (self.codes, self.scales) if self.minima is None else (self.codes, self.scales, self.minima)


type Weights = Float[Array, "E O I"] | Quantised


class GroupedMatmul(Protocol):
    """What every body implements."""

    def __call__(
        self,
        x: Float[Array, "R I"],
        w: Weights,
        sizes: Int[Array, " E"],
        first: Int[Array, ""] | None = None,
    ) -> Float[Array, "R O"]: ...


def validate(x: jax.Array, w: Weights, sizes: jax.Array, first: jax.Array | None) -> None:
    """Checks shapes and types at trace time. Raises ValueError saying what was found and what is expected."""
    if x.ndim != 2 or len(w.shape) != 3 or x.shape[1] != w.shape[2]:
        raise ValueError(f"x must be [R, I] and w [E, O, I]; found {list(x.shape)} and {list(w.shape)}")
    if 0 in (*x.shape, *w.shape):
        raise ValueError(f"nothing to multiply: x is {list(x.shape)} and w {list(w.shape)}")
    if isinstance(w, Quantised):
        if any(a.shape[:1] != w.shape[:1] for a in w.arrays):
            raise ValueError(f"codes, scales and minima must be of {w.shape[0]} matrices each")
        codes, *others = (jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in w.arrays)
        used = [jax.ShapeDtypeStruct((w.shape[2] // w.group, *a.shape[1:]), a.dtype) for a in others]
        scales, minima = used[0], used[1] if len(used) == 2 else None
        if any(a.shape[0] < b.shape[0] for a, b in zip(others, used, strict=True)):
            raise ValueError(f"{w.shape[2]} inputs have {others[0].shape[0]} scales an output, not one for {w.group}")
        # Shapes and types are all that it asks for.
        found = quantised.group_of(x, codes, scales, minima, inputs_first=True)  # type: ignore[arg-type]
        if found != w.group:
            raise ValueError(f"{w.shape[2]} inputs are no whole groups of {w.group}")
    elif not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != w.dtype:
        raise ValueError(f"x and w must be floats of one type; found {x.dtype} and {w.dtype}")
    if sizes.shape != w.shape[:1] or not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ValueError(f"sizes must be whole numbers [{w.shape[0]}]; found {sizes.dtype} {list(sizes.shape)}")
    if first is not None and (first.shape != () or not jnp.issubdtype(first.dtype, jnp.integer)):
        raise ValueError(f"first must be one whole number; found {first.dtype} {list(first.shape)}")


def validate_for_tpu(dtype: np.dtype) -> None:
    """What the TPU's kernel multiplies. Raises ValueError."""
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"it multiplies bfloat16 or float32, not {dtype.name}")


def validate_for_gpu(dtype: np.dtype, capability: str, w: Weights) -> None:
    """What the GPU's kernel multiplies, and on chips of which compute capability. Raises ValueError."""
    if isinstance(w, Quantised):
        return quantised.validate_for_gpu(dtype, capability, w.codes.dtype, w.shape[2], w.shape[1])
    if int(capability.partition(".")[0]) < 8:
        raise ValueError(f"it needs NVIDIA's compute capability 8.0 or above; the device has {capability}")
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"it multiplies bfloat16, float16 or float32, not {dtype.name}")
