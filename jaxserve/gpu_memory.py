"""How much of an NVIDIA GPU's memory JAX sets aside: variables for a process that is to hold an engine. No JAX."""

import os
from collections.abc import Mapping

POOL = 0.92
"""The share that an engine's process gets, where JAX by itself would take 0.75. Arrays and programs live in it; CUDA's
context, NCCL's buffers and captured graphs take theirs from the rest."""

_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""The second is the older name. JAX refuses both together, and takes '' for not set."""


def pool_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What an environment lacks for that, to be set before JAX looks for devices; nothing where a share is set already.

    https://docs.jax.dev/en/latest/201/gpu-memory.html
    """
    return {} if any(environ.get(name) for name in _NAMES) else {_NAMES[0]: str(POOL)}
