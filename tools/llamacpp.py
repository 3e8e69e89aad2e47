"""Builds llama.cpp's programs from the source package of llama-cpp-python and runs servers; measures nothing."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from gguf_vocab_goldens import PACKAGE

PROGRAMS = ("llama-server", "llama-quantize", "llama-perplexity", "llama-bench")
_SOURCES = "llama_cpp_python-*/vendor/llama.cpp"
_SETTINGS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "GGML_CCACHE": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    # Nothing that would fetch a page or a library from the network.
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
_WITHOUT_AMX = {
    "GGML_NATIVE": "OFF",
    **{f"GGML_{name}": "ON" for name in ("AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16", "AVX_VNNI", "BMI2")},
}
"""As an AVX-512 processor of before 2023 has it, and AMD's."""


# GCC 12 takes only the first 8 of the 64 bytes of a configuration of tile registers to be read, and leaves out what
# writes the others: where the processor has AMX llama.cpp then ends on an illegal instruction.
_WHOLE_TILE_CONFIG = """#if defined(__AMX_TILE__)
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(config)) : "memory")
#endif
"""


def default_folder() -> Path:
    """Where sources, programs and models are kept unless another folder is given."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "jaxserve", "llama.cpp")


def build(folder: Path, jobs: int = 2, *, amx: bool = True) -> Path:
    """The folder of the programs; they are built, which takes ten minutes on two cores, unless they are there.

    They use what this processor has, or, without `amx`, AVX-512.

    A llama_cpp_python-*.tar.gz that lies in `folder` is used, otherwise one is downloaded. Raises SystemExit with the
    cure when a tool is missing, CalledProcessError when a command fails.
    """
    into = folder / ("build" if amx else "build-without-amx")
    programs = into / "bin"
    if all((programs / name).is_file() for name in PROGRAMS):
        return programs
    for tool in ("cmake", "ninja", "c++"):
        if shutil.which(tool) is None:
            raise SystemExit(f"building llama.cpp needs {tool}: apt-get install g++, pip install cmake ninja")
    folder.mkdir(parents=True, exist_ok=True)
    header = folder / "whole_tile_config.h"
    header.write_text(_WHOLE_TILE_CONFIG)
    settings = [f"-D{name}={value}" for name, value in (_SETTINGS | ({} if amx else _WITHOUT_AMX)).items()]
    settings.append(f"-DCMAKE_CXX_FLAGS=-include {header}")
    configure = ["cmake", "-G", "Ninja", "-S", str(_source(folder)), "-B", str(into), *settings]
    subprocess.run(configure, check=True, stdout=sys.stderr)
    make = ["cmake", "--build", str(into), "-j", str(jobs), "--target", *PROGRAMS]
    subprocess.run(make, check=True, stdout=sys.stderr)
    return programs


def _source(folder: Path) -> Path:
    found = sorted(folder.glob(_SOURCES))
    if not found:
        packages = sorted(folder.glob("llama_cpp_python-*.tar.gz"))
        if not packages:
            pip = [sys.executable, "-m", "pip", "download", "--no-binary", ":all:", "--no-deps", "-d", str(folder)]
            subprocess.run([*pip, PACKAGE], check=True, stdout=sys.stderr)
            packages = sorted(folder.glob("llama_cpp_python-*.tar.gz"))
        with tarfile.open(packages[-1]) as archive:
            archive.extractall(folder, filter="data")
        found = sorted(folder.glob(_SOURCES))
    return found[-1]


def vocabulary(folder: Path, name: str) -> Path:
    """The GGUF file without weights that llama.cpp keeps of a tokenizer."""
    return _source(folder) / "models" / f"ggml-vocab-{name}.gguf"


def version(programs: Path) -> str:
    """What llama-server calls itself."""
    done = subprocess.run([programs / "llama-server", "--version"], capture_output=True, text=True, check=True)
    return next(line for line in (done.stdout + done.stderr).splitlines() if "version" in line)


class Server:
    """A running server. `url`, and what its processes have used so far."""

    def __init__(self, process: asyncio.subprocess.Process, port: int):
        self.url = f"http://127.0.0.1:{port}"
        self.process = process

    def pids(self) -> list[int]:
        """The process and all its descendants."""
        found, new = [], [self.process.pid]
        while new:
            pid = new.pop()
            found.append(pid)
            with contextlib.suppress(OSError):
                for children in Path(f"/proc/{pid}/task").glob("*/children"):
                    new += [int(child) for child in children.read_text().split()]
        return found

    def peak_bytes(self) -> int:
        """The sum of the largest resident sizes: pages that two processes share count twice."""
        peak = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("VmHWM:"):
                        peak += 1024 * int(line.split()[1])
        return peak

    def cpu_seconds(self) -> float:
        ticks = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    async def settled(self, timeout: float = 600.0) -> None:
        """Waits until it computes nothing: compilations in the background are over."""
        used, quiet = self.cpu_seconds(), 0
        for _ in range(round(timeout / 0.25)):
            await asyncio.sleep(0.25)
            before, used = used, self.cpu_seconds()
            quiet = quiet + 1 if used - before <= 0.03 else 0
            if quiet == 4:
                return


@contextlib.asynccontextmanager
async def running(argv: Sequence[Any], port: int, cores: int | None = None) -> AsyncIterator[Server]:
    """Starts a server on the first `cores` processors that this process may use; ends it at last.

    It may not answer yet. Raises RuntimeError with the end of what it printed if it ends by itself meanwhile.
    """
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *map(str, argv), stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
            preexec_fn=lambda: os.sched_setaffinity(0, allowed),
        )  # fmt: skip
        try:
            yield Server(process, port)
        finally:
            if ended := process.returncode is not None:
                log.seek(0)
                said = log.read().decode(errors="replace")[-4000:]
            else:
                process.send_signal(signal.SIGTERM)
                try:
                    await asyncio.wait_for(process.wait(), 60)
                except TimeoutError:
                    process.kill()
                    await process.wait()
            if ended:
                raise RuntimeError(f"{Path(argv[0]).name} ended with {process.returncode}; it said:\n{said}")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def server_argv(programs: Path, model: Path, port: int, *options: Any) -> list[Any]:
    """llama-server's command line: no page, no prefix cache, so that each prompt is computed."""
    fixed = ["--no-webui", "--no-cache-prompt", "-cram", 0, "--host", "127.0.0.1", "--port", port]
    return [programs / "llama-server", "-m", model, *fixed, *options]
