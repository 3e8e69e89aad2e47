"""The engine process of a host that follows: the same runner as its leader's, and that one's launches.

Started by client/supervise.py; ends with its leader, or when the process that started it goes away.
"""

import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import jax
import msgspec
import numpy as np

from jaxserve.batch import Shape
from jaxserve.client import wire
from jaxserve.client.spanning import CAUSE_S, Finishing, spanning_mesh
from jaxserve.config import EngineOptions
from jaxserve.errors import EngineStopped, JaxserveError
from jaxserve.host_memory import keep_objects
from jaxserve.hosts import CRASHED, GAVE_UP, REFUSED
from jaxserve.hosts.follower import Follower, end_process
from jaxserve.hosts.identity import describe
from jaxserve.hosts.messages import Step
from jaxserve.metrics import EngineMetrics
from jaxserve.runner import Launch, Runner
from jaxserve.step import Sizes, StepOutput, no_binding


class _Following:
    """The leader, to the runner of a follower."""

    def __init__(self, link: Follower):
        self._link, self._finishing = link, Finishing(link.confirm)
        self._number = 0

    def launches(self, sizes: Sizes) -> Iterator[Launch]:
        """The leader's, as they come; never ends."""
        kinds = [np.asarray(array) for array in no_binding(sizes)]
        for step in self._link.steps():
            self._number = step.number
            yield _launch(step, kinds)

    def least(self, pages: int) -> int:
        return self._link.least(pages)

    def known(self, shape: Shape) -> bool:
        return True  # the leader has asked us

    def begin(self, launch: Launch) -> int:
        self._link.begin(self._number)
        return self._number

    def launched(self, number: int, output: StepOutput | jax.Array) -> None:
        self._finishing.wait(number, output)


def _launch(step: Step, kinds: list[np.ndarray]) -> Launch:
    bindings = [
        tuple(np.frombuffer(data, kind.dtype).reshape(kind.shape) for data, kind in zip(binding, kinds, strict=True))
        for binding in step.bindings
    ]
    return Launch(Shape(*step.shape), np.frombuffer(step.buffer, np.int32), bindings)


def _follow(options: EngineOptions, link: Follower, path: Path) -> None:
    """From the first word to the last launch; never returns."""
    said = ""

    def progress(message: str) -> None:
        nonlocal said
        link.doing(message)
        if (kind := re.sub(r"[\d.,]+", "#", message)) != said:
            print(f"jaxserve: {message}", file=sys.stderr, flush=True)
            said = kind

    mesh = spanning_mesh(options, link.welcomed())
    following = _Following(link)
    runner = Runner(options, path, EngineMetrics("follower"), progress, mesh, following)
    keep_objects()
    link.ready(str(runner.sizes), lambda: [(shape.tokens, shape.seqs) for shape in runner.shapes])
    for launch in following.launches(runner.sizes):
        if not runner.is_compiled(launch.shape):
            link.doing(f"compiling a step of {launch.shape.tokens} tokens")
            runner.compiled(launch.shape)
            link.doing("")
        runner.execute(launch)


def main() -> None:
    """Reads a wire.Follow, a line of standard input, and follows until the end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # what started us decides, and may want to wait for the leader
    follow = msgspec.json.decode(sys.stdin.buffer.readline(), type=wire.Follow)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    options, path = follow.options, Path(follow.path)
    assert options.place is not None
    place = options.place
    try:
        link = Follower(place, describe(options, path))
        print(
            f"jaxserve: host {place.index} joins host 0 ({place.coordinator}:{place.port})", file=sys.stderr, flush=True
        )
        link.join()
    except JaxserveError as error:
        end_process(error.message, REFUSED)
    try:
        _follow(options, link, path)
    except JaxserveError as error:
        link.fail(error)
        end_process(error.message, REFUSED)
    except Exception as error:
        time.sleep(CAUSE_S)  # if another host is the cause, the leader says so now, which ends this process
        traceback.print_exc()
        link.fail(EngineStopped(f"the engine failed: {type(error).__name__}: {error}"))
        end_process(f"the engine failed: {type(error).__name__}", CRASHED)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    end_process("what started this process has ended", GAVE_UP)


if __name__ == "__main__":
    main()
