"""How much of an NVIDIA GPU's memory JAX sets aside: variables for a process that is to hold an engine. No JAX."""

import os
from collections.abc import Mapping

POOL = 0.88
"""The share that an engine's process gets, where JAX by itself would take 0.75. Arrays and what steps compute in come
from it, CUDA's context, NCCL's buffers and captured graphs from the rest.

An engine fills 0.9 of it by default, 0.792 of the GPU: where a program's arguments are more than 0.8, XLA takes it that
nothing is left to compute in, reports an error for each program, and schedules for the least memory (its
gpu_hlo_schedule.cc). No JAX option tells it otherwise."""

_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""The second is the older name. JAX refuses both together, and takes '' for not set."""


def pool_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What an environment lacks for that, to be set before JAX looks for devices; nothing where a share is set already.

    https://docs.jax.dev/en/latest/201/gpu-memory.html
    """
    return {} if any(environ.get(name) for name in _NAMES) else {_NAMES[0]: str(POOL)}
