"""`jaxserve batch` with the counting engine of fake_engine.py behind it; run as a script, in a process to be killed."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

from fake_engine import FakeEngine, write_tokenizer

from jaxserve import cli
from jaxserve.cli import batch
from jaxserve.text import TextModel


class Counter(FakeEngine):
    """Deltas come in a random order of the requests, so that rows finish out of order."""

    def __init__(self, jitter: bool = False, **info):
        super().__init__(**info)
        self.tokens_per_delta = 64
        self._jitter = jitter

    async def generate(self, request):
        if self._jitter:
            await asyncio.sleep((os.getrandom(1)[0] % 8) * 0.0005)
        async for delta in super().generate(request):
            yield delta
        self.requests.clear()
        self.finished.clear()


def fake_model(path: Path, engine: FakeEngine | None = None) -> TextModel:
    """A model whose answer to "abc" is "def...", and whose files are at `path`."""
    if not (path / "config.json").exists():
        write_tokenizer(path)
    return TextModel.open(path, engine or Counter(), path.name)


def install(monkeypatch_setattr, engine: FakeEngine) -> None:
    """Makes `jaxserve batch IN OUT MODEL` run on `engine`."""

    @contextlib.asynccontextmanager
    async def opened(options, name, *, in_process):
        text = TextModel.open(Path(options.model.model), engine, name)
        yield text

    monkeypatch_setattr(batch, "opened", opened)


def write_rows(path: Path, count: int) -> Path:
    """A job of `count` short rows; every hundredth is not JSON."""
    with path.open("w") as file:
        for i in range(count):
            body = {"prompt": f"row {i % 7} {i}", "max_tokens": 1 + i % 5, "temperature": 1.0}
            row = {"custom_id": f"id-{i}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(("{" if i % 100 == 99 else json.dumps(row)) + "\n")
    return path


def main(argv: list[str]) -> int:
    """argv: the seconds after which this process kills itself (0: never), then those of `jaxserve`."""
    if float(argv[0]):
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    install(setattr, Counter(jitter=True))
    if float(argv[0]):
        signal.setitimer(signal.ITIMER_REAL, float(argv[0]))
    return cli.call(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
