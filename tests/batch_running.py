"""`jaxserve batch` with the counting engine of fake_engine.py behind it; run as a script, in a process to be killed."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import msgspec
import numpy as np
from fake_engine import FakeEngine, write_tokenizer

from jaxserve import cli
from jaxserve.batch_job import captures
from jaxserve.cli import batch
from jaxserve.request import Delta, TapInfo
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


class Capturing(Counter):
    """The same, which brings of every token that a step reads `pair`, (the token, its position), and `half` of it."""

    def __init__(self, jitter: bool = False):
        super().__init__(jitter, taps=(TapInfo("pair", (2,), "float32"), TapInfo("half", (), "bfloat16")))
        self.tokens_per_delta = 1

    async def generate(self, request):
        read: dict[int, tuple[list[int], int]] = {}
        async for delta in super().generate(request):
            tokens, done = read.get(delta.index, (list(request.prompt_token_ids), 0))
            if not done:  # a prompt comes in pieces
                done = len(tokens) // 2
                yield Delta(request.id, delta.index, captured=self._values(tokens, 0, done))
            yield msgspec.structs.replace(delta, captured=self._values(tokens, done, len(tokens)))
            read[delta.index] = [*tokens, *delta.token_ids], len(tokens)

    @staticmethod
    def _values(tokens: list[int], first: int, end: int) -> tuple[bytes, bytes]:
        pairs = np.array([[token, i] for i, token in enumerate(tokens)], np.float32)[first:end]
        halves = (pairs[:, 0] / 2).view(np.uint32) >> 16
        return pairs.tobytes(), halves.astype(np.uint16).tobytes()


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
    captures.FILE_ROWS = 64
    install(setattr, Capturing(jitter=True) if "--capture=pair" in argv else Counter(jitter=True))
    if float(argv[0]):
        signal.setitimer(signal.ITIMER_REAL, float(argv[0]))
    return cli.call(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
