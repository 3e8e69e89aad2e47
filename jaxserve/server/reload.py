"""Watches the file of a model's code, and has the engine switch to what was edited. The file is not executed here."""

import asyncio
import logging

from jaxserve.client import EngineClient, EngineState
from jaxserve.errors import ConfigError, EngineStopped, JaxserveError
from jaxserve.model_code import code_digest, code_file
from jaxserve.request import Update

POLL_S = 0.25

_log = logging.getLogger("jaxserve.reload")


class Reloader:
    """Reads `code`, PATH.py[:NAME], now, and from then on again and again. Raises ConfigError for what is no file."""

    def __init__(self, code: str | None):
        file = None if code is None else code_file(code)
        if code is None or file is None:
            raise ConfigError("reload watches a file: give --model-code FILE.py, not the name of a module")
        self._code, self._file = code, file
        self._known = code_digest(code)

    async def follow(self, client: EngineClient) -> None:
        """Switches the engine to every edit, and logs how that went. Never returns."""
        last: str | None = self._known
        while True:
            await asyncio.sleep(POLL_S)
            found = self._digest()
            still, last = found == last, found  # somebody may be writing just now
            if found is None or found == self._known or not still or client.status.state is not EngineState.READY:
                continue
            self._known = found
            await self._switch(client)

    async def _switch(self, client: EngineClient) -> None:
        try:
            updated = await client.update(Update(code=True))
        except EngineStopped:
            return  # an engine that is started again reads the file
        except JaxserveError as error:
            _log.error("%s was edited, and the code before it goes on being served: %s", self._file, error.message)
        else:
            seconds, version = updated.load_s + updated.wait_s, updated.info.weights_version
            _log.info("%s was edited: switched to it after %.1f s, weights version %d", self._file, seconds, version)

    def _digest(self) -> str | None:
        try:
            return code_digest(self._code)
        except ConfigError:  # an editor may write a new file and rename it
            return None
