"""Runs the Hopper kernel in Pallas' GPU interpreter, sound and with planted bugs; prints a line of JSON for each run.

A program of its own: a kernel that waits for what never comes hangs its process.
"""

import contextlib
import io
import json
from functools import partial
from unittest import mock

import jax
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from test_int8_cache import int8_batch
from test_kernels import oracle, random_batch

from kernels_pallas.ragged_paged_attention import gpu, gpu_hopper
from kernels_pallas.ragged_paged_attention.tuning.gpu import GpuBlocks

SIZES = dict(heads=2, kv_heads=1, head_dim=64, page=32, pages=40)
DECODE = dict(q_lens=[1, 1], pasts=[40, 150], tokens=2, seqs_total=2)
MIXED = dict(q_lens=[1, 37], pasts=[70, 33], tokens=40, seqs_total=3)
SMALL = gpu.Chip("a GPU of one core", "9.0", 1)

wgmma = plgpu.wgmma


def reads_first(product, a, b):
    """The interpreter looks for races in loads, and not in what wgmma reads."""
    plgpu.load(a)
    plgpu.load(b)
    plgpu.commit_smem()  # unlike loads, wgmma reads as the copy engine writes
    wgmma(product, a, b)


def never_waits(barrier):
    """Reads what may not have come."""


class OneBuffer:
    """What a kernel sees of jax.lax, but that all blocks go to the first of two buffers."""

    def __getattr__(self, name):
        return getattr(jax.lax, name)

    def rem(self, x, n):
        return jax.lax.rem(x, n) * (n != 2)


batch_of_floats = partial(random_batch, np.random.default_rng(0))
batch_of_bytes = partial(int8_batch, 0, body="gpu")
BUGS = {
    "no wait": lambda: mock.patch.object(plgpu, "barrier_wait", never_waits),
    "buffer filled while read": lambda: mock.patch.object(gpu_hopper, "lax", OneBuffer()),
}
RUNS = {
    "mixed, with a window, decoding in parts": (MIXED, dict(window=40, waves=8)),
    "page of nobody": (DECODE, {}),
    **{bug: (DECODE, {}) for bug in BUGS},
    "int8": (DECODE, dict(batch=batch_of_bytes)),
    "int8, no wait": (DECODE, dict(batch=batch_of_bytes)),
}


def run(name):
    case, options = RUNS[name]
    waves, window = options.get("waves", 0), options.get("window")
    args, kv = options.get("batch", batch_of_floats)(**SIZES, **case)
    args[5] = args[5][:, :7]
    if name == "page of nobody":
        args[5] = args[5].at[1, 2].set(5000)
    blocks = GpuBlocks(64, 2, 1, waves)
    kernel = partial(gpu.ragged_paged_attention, decode=blocks, prefill=blocks, chip=SMALL, scale=0.3, window=window)
    said, raised, error = io.StringIO(), None, None
    with (
        mock.patch.object(plgpu, "wgmma", reads_first),
        BUGS.get(name.removeprefix("int8, "), contextlib.nullcontext)(),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        try:
            out, _ = kernel(*args, interpret=plgpu.InterpretGPUParams(detect_races=True))
            want = oracle([*args[:3], 0, *args[4:]], kv, 0.3, window)
            error = float(np.abs(np.asarray(out, np.float32)[: len(want)] - want).max())
        except Exception as e:  # whatever the interpreter raises is what is asked for
            raised = str(e)[-5000:]
    found = dict(name=name, error=error, finite=bool(error is not None and np.isfinite(error)), raised=raised)
    print(json.dumps(found | dict(race="RACE DETECTED" in said.getvalue() + str(raised))))


if __name__ == "__main__":
    assert jax.devices()[0].platform == "cpu"
    for name in RUNS:
        run(name)
