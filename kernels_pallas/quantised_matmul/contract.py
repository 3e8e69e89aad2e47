"""The one signature of a product with a quantised matrix, and what every body may assume of its arguments.

    x       [T, K]            bfloat16, float16 or float32
    codes   [K, N] or [N, K]  int8, int4 or uint4: inputs first, or outputs first as checkpoints have them
    scales  [K / G, N]        float32: one for each G inputs of an output, whichever way the codes lie
    minima  [K / G, N]        float32, or None: zeros

    -> [T, N] of `dtype` (None: x's), summed in float32 and rounded once

A weight is code * scale - minimum, which is computed in float32 and rounded to x's type: the numbers that a matrix has
whose blocks were dequantised when it was loaded. G is a power of two. Inputs first is what a TPU multiplies best, for
then a scale belongs to whole lanes; outputs first is what an embedding table needs, of which rows are taken.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

LEAST_GROUP, MOST_GROUP = 16, 256


class QuantisedMatmul(Protocol):
    """What every body implements."""

    def __call__(
        self,
        x: Float[Array, "T K"],
        codes: Int[Array, "A B"],
        scales: Float[Array, "G N"],
        minima: Float[Array, "G N"] | None = None,
        *,
        inputs_first: bool,
        dtype: DTypeLike | None = None,
    ) -> Float[Array, "T N"]: ...


def group_of(x: jax.Array, codes: jax.Array, scales: jax.Array, minima: jax.Array | None, *, inputs_first: bool) -> int:
    """G, after shapes and types are checked at trace time. Raises ValueError saying what was found and expected."""
    order = "[K, N]" if inputs_first else "[N, K]"
    if x.ndim != 2 or codes.ndim != 2 or x.shape[1] != codes.shape[0 if inputs_first else 1]:
        raise ValueError(f"x must be [T, K] and codes {order}; found {list(x.shape)} and {list(codes.shape)}")
    if 0 in (*x.shape, *codes.shape):
        raise ValueError(f"nothing to multiply: x is {list(x.shape)} and codes {list(codes.shape)}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floats; found {x.dtype}")
    if codes.dtype not in (jnp.int8, jnp.int4, jnp.uint4):
        raise ValueError(f"codes must be int8, int4 or uint4; found {codes.dtype}")
    inputs, outputs = x.shape[1], codes.shape[1 if inputs_first else 0]
    if scales.ndim != 2 or scales.shape[1] != outputs or scales.dtype != jnp.float32:
        raise ValueError(f"scales must be float32 [K / G, {outputs}]; found {scales.dtype} {list(scales.shape)}")
    if minima is not None and (minima.shape != scales.shape or minima.dtype != scales.dtype):
        raise ValueError(
            f"minima must be like scales, {scales.dtype} {list(scales.shape)}; found {minima.dtype} "
            f"{list(minima.shape)}"
        )
    group, rest = divmod(inputs, scales.shape[0])
    if rest or not LEAST_GROUP <= group <= MOST_GROUP or group & (group - 1):
        raise ValueError(
            f"{inputs} inputs have {scales.shape[0]} scales an output: not one for each group of a power of two from "
            f"{LEAST_GROUP} to {MOST_GROUP}"
        )
    return group


def validate_for_tpu(dtype: np.dtype, inputs: int, *, inputs_first: bool) -> None:
    """What the TPU's kernel multiplies. Raises ValueError."""
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"it multiplies bfloat16 or float32, not {dtype.name}")
    if not inputs_first and inputs % 128:
        raise ValueError(f"outputs first, inputs must fill a TPU's 128 lanes; found {inputs}")


def validate_for_gpu(dtype: np.dtype, capability: str, code: np.dtype, inputs: int, outputs: int) -> None:
    """What the GPU's kernel multiplies, and on chips of which compute capability. Raises ValueError."""
    if int(capability.partition(".")[0]) < 8:
        raise ValueError(f"it needs NVIDIA's compute capability 8.0 or above; the device has {capability}")
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"it multiplies bfloat16, float16 or float32, not {dtype.name}")
    if code != jnp.int8 and (inputs % 2 or outputs % 2):
        raise ValueError(f"4 bits lie in pairs; found {inputs} inputs and {outputs} outputs")
