"""Runs the TPU kernel in Pallas' TPU interpreter, sound and with planted bugs; prints a line of JSON for each run.

A program of its own: a kernel that waits for what never comes hangs its process, and the interpreter says only in words
that it found a race or a semaphore that is not zero at the end.
"""

import contextlib
import io
import json
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from test_int8_cache import int8_batch
from test_kernels import oracle, random_batch
from test_latent_attention import latent_batch

from kernels_pallas.ragged_paged_attention import tpu
from kernels_pallas.ragged_paged_attention.tuning import Blocks

copy = pltpu.make_async_copy


class NeverWaits:
    """A copy that nobody waits for."""

    def __init__(self, *args):
        self._copy = copy(*args)
        self.start = self._copy.start

    def wait(self):
        pass


class FillsWhatIsRead(NeverWaits):
    """A copy into memory that was just waited for and is about to be read."""

    def wait(self):
        self._copy.wait()
        self._copy.start()


class NeverWaitsForScales(NeverWaits):
    """Of a cache of bytes the bytes alone are waited for."""

    def __init__(self, source, to, semaphore):
        super().__init__(source, to, semaphore)
        self._wanted = to.dtype == jnp.int8

    def wait(self):
        if self._wanted:
            self._copy.wait()


BUGS = {
    "none": contextlib.nullcontext,
    "no wait": lambda: mock.patch.object(pltpu, "make_async_copy", NeverWaits),
    "buffer filled while read": lambda: mock.patch.object(pltpu, "make_async_copy", FillsWhatIsRead),
    "no wait for scales": lambda: mock.patch.object(pltpu, "make_async_copy", NeverWaitsForScales),
    "page of nobody": contextlib.nullcontext,
}

batch_of_floats = partial(random_batch, np.random.default_rng(0))
batch_of_bytes = partial(int8_batch, 0, body="tpu")


def batch_of_latents(kv_heads, **sizes):
    return latent_batch(np.random.default_rng(0), **sizes)


DECODE = dict(q_lens=[1, 1, 1], pasts=[3, 25, 0], tokens=3, seqs_total=3)
MIXED = dict(q_lens=[1, 1, 7, 12], pasts=[9, 1, 6, 0], tokens=24, seqs_total=5)


def run(name, case, bug="none", window=None, batch=batch_of_floats, value_dim=None, **interpreter):
    args, kv = batch(heads=2, kv_heads=1, head_dim=8, pages=100, **case)
    args[5] = args[5][:, :9]
    table = args[5]
    if bug == "page of nobody":
        table = table.at[1, 2].set(5000)
    blocks = dict(decode=Blocks(1, 2, 2), prefill=Blocks(16, 2, 3))
    kernel = partial(tpu.ragged_paged_attention, scale=0.3, window=window, value_dim=value_dim, **blocks)
    said, raised, error = io.StringIO(), None, None
    pltpu.reset_tpu_interpret_mode_state()
    with BUGS[bug](), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            interpret = pltpu.InterpretParams(**interpreter)
            out, _ = kernel(*args[:5], table, *args[6:], interpret=interpret)
            want = oracle([*args[:3], 0, *args[4:]], kv, 0.3, window)[..., :value_dim]
            error = float(np.abs(np.asarray(out, np.float32)[: len(want)] - want).max())
            jax.effects_barrier()  # what it says at the end
        except Exception as e:  # whatever the interpreter raises is what is asked for
            raised = str(e)[-5000:]
    found = dict(name=name, error=error, finite=bool(error is not None and np.isfinite(error)), raised=raised)
    print(
        json.dumps(
            found
            | dict(race="RACE DETECTED" in said.getvalue() + str(raised), left="non-zero count" in said.getvalue())
        )
    )


if __name__ == "__main__":
    assert jnp.zeros(1).devices().pop().platform == "cpu"
    at_once = dict(detect_races=True, dma_execution_mode="eager")
    run("decode", DECODE)
    run("decode, copies at once", DECODE, **at_once)
    run("mixed", MIXED)
    run("mixed, copies at once", MIXED, window=5, **at_once)
    run("no wait", DECODE, "no wait")
    run("no wait, copies at once", DECODE, "no wait", dma_execution_mode="eager")
    run("buffer filled while read", DECODE, "buffer filled while read", **at_once)
    run("page of nobody", DECODE, "page of nobody")
    of_bytes = dict(batch=batch_of_bytes)
    run("int8", MIXED, **of_bytes)
    run("int8, copies at once", DECODE, window=5, **of_bytes, **at_once)
    run("int8, no wait for scales", DECODE, "no wait for scales", **of_bytes)
    run("int8, buffer filled while read", DECODE, "buffer filled while read", **of_bytes, **at_once)
    of_latents = dict(batch=batch_of_latents, value_dim=6)
    run("latents, copies at once", MIXED, **of_latents, **at_once)
    run("latents, buffer filled while read", DECODE, "buffer filled while read", **of_latents, **at_once)
