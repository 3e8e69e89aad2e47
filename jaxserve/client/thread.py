"""An engine in a thread of this process: loading, the loop, and what both have to say. No event loop."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxserve.client import EngineState, EngineStatus
from jaxserve.client.replicas import Replicas, open_engine
from jaxserve.config import EngineOptions
from jaxserve.engine import Engine
from jaxserve.errors import ConfigError, EngineStopped, JaxserveError
from jaxserve.host_memory import give_back
from jaxserve.model_code import brief, place
from jaxserve.request import Delta, EngineInfo, Request, Update, Updated
from jaxserve.runner import give_way
from jaxserve.spec import Params

log = logging.getLogger("jaxserve.engine")


class EngineThread:
    """Loads and runs an Engine in a thread of its own.

    `deliver` and `changed` are called by that thread: with the deltas of a step, and with every new status. Another
    thread says that a host is lost. `error` holds what ended the engine, if it was not `stop`.
    """

    def __init__(
        self,
        options: EngineOptions,
        path: Path,
        *,
        model_name: str,
        deliver: Callable[[list[Delta]], None],
        changed: Callable[[EngineStatus], None] = lambda status: None,
        weights_version: int = 0,
        again: bool = False,
    ):
        self.status = EngineStatus(EngineState.LOADING, "starting")
        self.error: JaxserveError | None = None
        self.engine: Engine | Replicas | None = None
        self._options, self._path, self._model_name = options, path, model_name
        self._deliver, self._changed = deliver, changed
        self._weights_version, self._again = weights_version, again
        self._ending = threading.Lock()
        self._updating = threading.Lock()
        self._stopping = threading.Event()
        self._settled = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def info(self) -> EngineInfo:
        """Raises EngineStopped until the engine was ready."""
        if self.engine is None:
            raise self.error or EngineStopped("the model is loading")
        return self.engine.info

    def start(self) -> None:
        """Starts loading and returns at once."""
        self._thread.start()

    def wait_ready(self) -> None:
        """Returns when the engine takes requests. Raises what ended it instead."""
        self._settled.wait()
        if self.error is not None:
            raise self.error

    def submit(self, request: Request) -> None:
        """Queues a request. Raises EngineStopped when no engine runs."""
        if self.engine is None or self.status.state is not EngineState.READY:
            raise self.error or EngineStopped(self.status.detail or "the model is loading")
        self.engine.submit(request)

    def abort(self, request_id: str) -> None:
        if self.engine is not None:
            self.engine.abort(request_id)

    def update(self, update: Update, params: Params | None = None) -> Updated:
        """Switches to what `update` or the tree `params` says, and returns once it has; requests are served meanwhile.

        One after the other; not for the engine's own thread. Raises ConfigError or CheckpointError, with everything as
        it was; EngineStopped when no engine runs.
        """
        with self._updating, ThreadPoolExecutor(1, "update", initializer=give_way) as background:
            if self.engine is None or self.status.state is not EngineState.READY:
                raise self.error or EngineStopped(self.status.detail or "the model is loading")
            start = time.monotonic()
            try:
                prepared = background.submit(self.engine.prepare, update, params).result()
            except JaxserveError:
                raise
            except Exception as error:
                log.exception("an update failed; everything is as it was")
                raise ConfigError(f"the update failed: {place(error)}{brief(error)}") from error
            ready = time.monotonic()
            for done in self.engine.switch(prepared, abort=update.in_flight == "abort"):
                done.result()
            ended = time.monotonic()
            give_back()  # the weights before
            return Updated(info=self.engine.info, load_s=ready - start, wait_s=ended - ready)

    def metrics_text(self) -> bytes:
        return b"" if self.engine is None else self.engine.metrics.text()

    def stop(self) -> None:
        """Ends the engine after the step that is running, and waits for that."""
        self._stopping.set()
        if self.engine is not None:
            self.engine.stop()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            engine = open_engine(
                self._options,
                self._path,
                model_name=self._model_name,
                deliver=self._deliver,
                progress=self._progress,
                weights_version=self._weights_version,
                lost=self._die,
                again=self._again,
            )
            self.engine = engine
            if self._stopping.is_set():
                engine.stop()
            self._set(EngineState.READY, "")
            self._settled.set()
            engine.run()
            ended: JaxserveError = EngineStopped("the engine was stopped")
        except JaxserveError as error:
            ended = error
        except Exception as error:
            # Not the caller's business, and not to be swallowed: the traceback goes where all tracebacks go.
            threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, self._thread)))
            ended = EngineStopped(f"the engine failed: {type(error).__name__}: {error}")
        self._die(ended)

    def _die(self, error: JaxserveError) -> None:
        """What ended the engine; only the first such error counts. Any thread, the loop's may be blocked for ever."""
        with self._ending:
            if self.error is not None:
                return
            self.error = error
        self.status = EngineStatus(EngineState.DEAD, error.message)
        self._changed(self.status)
        self._settled.set()

    def _progress(self, message: str) -> None:
        if self._stopping.is_set():
            raise EngineStopped("the engine was stopped while it was loading")
        self._set(EngineState.LOADING, message)

    def _set(self, state: EngineState, detail: str) -> None:
        if self.error is None:
            self.status = EngineStatus(state, detail)
            self._changed(self.status)
