"""A host that follows, from the outside: runs its engine process, and again whenever all hosts start again. No jax."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path

import msgspec

from jaxserve.client import wire
from jaxserve.client.remote import FIRST_BACK_OFF_S, HEALTHY_AFTER_S, LAST_BACK_OFF_S
from jaxserve.config import EngineOptions
from jaxserve.gpu_memory import pool_variables
from jaxserve.hosts import DONE, GAVE_UP, REFUSED

log = logging.getLogger("jaxserve.hosts")

SLACK_S = 10.0
"""More than host 0 needs to end once its requests have."""


async def follow(options: EngineOptions, path: Path, drain_s: float) -> int:
    """Follows host 0 until that has stopped; the exit code: 0, 2 for what starting again does not cure, or 1.

    SIGTERM and SIGINT usually reach all hosts: host 0 then has `drain_s` seconds to finish its requests, with this
    one's devices. A second signal ends it at once.
    """
    assert options.place is not None
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, number)
    back_off = 0.0
    while True:
        started = time.monotonic()
        code = await _run_once(options, path, signals, drain_s)
        if code is None or code == DONE:
            return 0
        if code in (REFUSED, GAVE_UP):
            return 2 if code == REFUSED else 1
        healthy = time.monotonic() - started > HEALTHY_AFTER_S
        back_off = FIRST_BACK_OFF_S if healthy or not back_off else min(2 * back_off, LAST_BACK_OFF_S)
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        log.error("the engine process of host %d %s; starting it again in %g s", options.place.index, how, back_off)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(signals.get(), back_off)
            return 0


async def _run_once(options: EngineOptions, path: Path, signals: "asyncio.Queue[int]", drain_s: float) -> int | None:
    """One engine process from start to end; its exit code, or None once there was a signal."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "jaxserve.client.follower",
        stdin=asyncio.subprocess.PIPE,  # stays open: when it closes, so has this process
        env=os.environ | pool_variables(),
        start_new_session=True,  # a terminal's Ctrl-C is for this process to act on
    )
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(msgspec.json.encode(wire.Follow(options, str(path))) + b"\n")
            await process.stdin.drain()
        ended = asyncio.ensure_future(process.wait())
        for wait_s in (None, drain_s + SLACK_S):
            signalled = asyncio.ensure_future(signals.get())
            await asyncio.wait({ended, signalled}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            told = signalled.done()
            signalled.cancel()
            if ended.done():
                return ended.result() if wait_s is None and not told else None
            if wait_s is None:
                log.info("waiting for host 0 to stop; a second signal ends this host at once")
        return None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
