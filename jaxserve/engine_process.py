"""The process of an engine, as whoever starts it sees it: begun at once, told later what to serve. No event loop."""

import contextlib
import os
import subprocess
import sys

from jaxserve.gpu_memory import pool_variables


class EngineProcess:
    """A process that imports all that an engine needs and then waits to be told what to serve (client/host.py).

    The imports take it longer than a command needs to find out what it was asked, so a command may begin one first.
    """

    def __init__(self) -> None:
        """Begins it. Raises OSError."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jaxserve.client.host"],
            stdin=subprocess.PIPE,
            # It may have to compile the kernels when gRPC runs already, which else logs that it does not mind.
            env={"GRPC_ENABLE_FORK_SUPPORT": "0"} | os.environ | pool_variables(),
            start_new_session=True,  # a terminal's Ctrl-C is for the front end to act on
        )

    @property
    def pid(self) -> int | None:
        """None once it has ended."""
        return self._process.pid if self._process.poll() is None else None

    def tell(self, launch: bytes) -> None:
        """Says what to serve: a wire.Launch. One that has ended meanwhile is not told; `wait` says so."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(launch)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def kill(self) -> None:
        """Ends it, if it has not ended."""
        self._process.kill()

    def wait(self) -> None:
        """Returns when it has ended."""
        self._process.wait()

    def dismiss(self) -> None:
        """Ends one that was not told anything, and waits for that."""
        assert self._process.stdin is not None
        if not self._process.stdin.closed:
            self.kill()
            self._process.stdin.close()
            self.wait()
