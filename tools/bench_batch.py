"""What `jaxserve batch` costs the host: rows a second and memory, with a model that answers at once.

    python tools/bench_batch.py --rows 1000000

Prints the process's resident memory as rows go by: it must not grow with them.
"""

import argparse
import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from jaxserve.batch_job import BatchOptions, in_one_engine, run_job
from jaxserve.client import EngineState, EngineStatus
from jaxserve.config import EngineOptions
from jaxserve.hub import resolve_model
from jaxserve.request import Delta, EngineInfo, FinishReason, Request
from jaxserve.text import TextModel

INFO = EngineInfo(
    model="instant",
    architecture="none",
    vocab_size=512,
    max_model_len=512,
    max_positions=512,
    max_num_seqs=64,
    max_num_batched_tokens=512,
    page_size=16,
    num_pages=1,
    dtype="float32",
    num_params=0,
    platform="cpu",
    attention="none",
    device_bytes={},
)


class Instant:
    """An EngineClient whose answer is the prompt's last token, over and over, all of it at once.

    Prints the process's memory after every `every` rows: by rows and not by time, so that a fast machine prints as
    many lines as a slow one.
    """

    status = EngineStatus(EngineState.READY)
    info = INFO

    def __init__(self, every: int) -> None:
        self.every = every
        self.answered = 0
        self.begun_cpu = 0.0

    def begin(self) -> None:
        """Prints the memory that every later line is compared with."""
        self.begun_cpu = time.process_time()
        print(f"{0:>9} rows  {resident_mib():7.1f} MiB")

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        await asyncio.sleep(0)
        tokens = (request.prompt_token_ids[-1],) * (request.params.max_tokens or 1)
        self.answered += 1
        if self.answered % self.every == 0:
            cpu_s = time.process_time() - self.begun_cpu
            a_row = f"{1e6 * cpu_s / self.answered:6.1f} us of CPU a row"
            print(f"{self.answered:>9} rows  {resident_mib():7.1f} MiB  {a_row}")
        yield Delta(request.id, token_ids=tokens, finish=FinishReason.LENGTH)


def write_input(path: Path, rows: int) -> None:
    """A file of `rows` short completion requests."""
    with path.open("wb") as file:
        for i in range(rows):
            body = {"prompt": f"What is {i} plus {i % 17}?", "max_tokens": 8, "temperature": 0.7}
            row = {"custom_id": f"row-{i}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(msgspec.json.encode(row) + b"\n")


def resident_mib() -> float:
    """This process's resident memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Writes the input, runs the job, prints a line every tenth of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    rows = parser.parse_args().rows
    path = resolve_model(None)

    @contextlib.asynccontextmanager
    async def opened() -> AsyncIterator[TextModel]:
        instant = Instant(max(rows // 10, 1))
        text = TextModel.open(path, instant, "instant")  # type: ignore[arg-type]
        instant.begin()
        yield text

    with tempfile.TemporaryDirectory() as folder:
        write_input(Path(folder, "in.jsonl"), rows)
        options = BatchOptions(input=f"{folder}/in.jsonl", output=f"{folder}/out.jsonl")
        begun, begun_cpu = time.perf_counter(), time.process_time()
        result = asyncio.run(run_job(options, EngineOptions(), path, "instant", in_one_engine(opened)))
        elapsed, cpu_s = time.perf_counter() - begun, time.process_time() - begun_cpu
        assert result.complete and not result.failed and result.rows == rows
        size = Path(folder, "out.jsonl").stat().st_size
        print(
            f"{rows} rows in {elapsed:.1f} s, {cpu_s:.1f} s of CPU: {rows / cpu_s:.0f} rows/s; {size / 2**20:.0f} MiB"
        )
        print(f"resident: {resident_mib():.1f} MiB")


if __name__ == "__main__":
    main()
