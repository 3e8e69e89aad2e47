"""The seam between a front end and an engine: what every engine client can do, wherever the engine runs."""

import enum
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from jaxserve.request import Delta, EngineInfo, Request, Update, Updated


class EngineState(enum.StrEnum):
    """LOADING until the first step can run; DRAINING takes no new requests; DEAD restarts or ends."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(frozen=True)
class EngineStatus:
    """The state and, in words, what is going on: 'compiling steps 3/11', 'restarting in 2 s'."""

    state: EngineState
    detail: str = ""


class EngineClient(Protocol):
    """An engine as the front end sees it. All methods belong to the front end's event loop."""

    @property
    def status(self) -> EngineStatus: ...

    @property
    def info(self) -> EngineInfo:
        """What the engine says of itself. Raises EngineStopped until it was READY once."""
        ...

    async def start(self) -> None:
        """Starts the engine and returns at once; `status` tells how far it is."""
        ...

    async def wait_ready(self) -> None:
        """Returns when READY. Raises the error that ended the start (ConfigError, CheckpointError, EngineStopped)."""
        ...

    def generate(self, request: Request) -> AsyncIterator[Delta]:
        """The deltas of a request, until every one of its n sequences has finished.

        An async generator: closing it early (aclose, cancellation) aborts the request. Raises what the engine
        refused it with: RequestError, Overloaded, EngineStopped, DeadlineExceeded.
        """
        ...

    async def update(self, update: Update) -> Updated:
        """Switches the engine to other weights or edited code, while it serves; `info` says the new version then.

        Raises ConfigError or CheckpointError, with everything as it was; EngineStopped.
        """
        ...

    async def metrics_text(self) -> bytes:
        """The engine's own metrics in the Prometheus text format; empty while it is down."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Takes no new requests; returns when those in flight have finished or the time is over."""
        ...

    async def stop(self) -> None:
        """Ends the engine; requests in flight get EngineStopped."""
        ...
