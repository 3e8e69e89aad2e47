"""What tests of offline jobs share: rows and files of them, a process to be killed, a disk that dies, a whole job."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from jaxserve.batch_job import BatchOptions, in_one_engine, run_job
from jaxserve.config import EngineOptions
from jaxserve.text import TextModel

ROOT = Path(__file__).parent.parent


def chat_row(name: str, content: str = "ab", **body: Any) -> dict:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 3} | body
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def text_row(name: str, prompt: Any = "ab", **body: Any) -> dict:
    body = {"prompt": prompt, "max_tokens": 3} | body
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}


def write(path: Path, *lines: dict | str | bytes) -> Path:
    raw = [x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode() for x in lines]
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answered(tmp_path: Path, model: TextModel, count: int = 20) -> list[dict]:
    """The records of a job of `count` rows that the model has answered in this process."""
    source = write(tmp_path / "in.jsonl", *(text_row(f"r{i}") for i in range(count)))
    options = BatchOptions(input=str(source), output=str(tmp_path / "out.jsonl"))

    @contextlib.asynccontextmanager
    async def opened():
        yield model

    result = asyncio.run(run_job(options, EngineOptions(), source, "counter", in_one_engine(opened)))
    assert result.complete
    return read(tmp_path / "out.jsonl")


def child(*argv: str, kill_s: float = 0.0, **options: Any) -> subprocess.Popen[str]:
    """`jaxserve batch` with batch_running.py's engine, in a process that kills itself after `kill_s` seconds."""
    command = [sys.executable, str(ROOT / "tests" / "batch_running.py"), str(kill_s), "batch", *argv]
    environ = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ, **options)


class Killed(BaseException):
    """The process is gone: nothing that catches exceptions may go on writing."""


class DyingDisk:
    """`os` for store.py, which ends the process at the `at`th operation on the disk, half of a write being done."""

    def __init__(self, at: int):
        self.left = at

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in ("pwrite", "fsync", "replace", "ftruncate", "unlink"):
            return real

        def operation(*args: Any) -> Any:
            self.left -= 1
            if self.left == 0 and name == "pwrite":
                real(args[0], args[1][: len(args[1]) // 2], args[2])
            if self.left <= 0:
                raise Killed
            return None if name == "fsync" else real(*args)

        return operation
