"""From the C++ sources to a library for this machine: what came with the package, or which compiler and where kept."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax.ffi
import jaxlib

from jaxserve.config import cache_home

SOURCES = Path(__file__).parent / "csrc"
PREBUILT = Path(__file__).parent / "prebuilt"
"""Libraries that a wheel of tools/build_wheel.py brings; there is no such folder otherwise."""
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-pthread",
    # Results may not depend on which products the compiler chose to fuse: the code says where it fuses.
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
TIMEOUT_S = 600


class BuildError(Exception):
    """The kernels could not be built or loaded; says why, and the cure."""


@dataclass(frozen=True)
class Isa:
    """An instruction set that the sources have a body for."""

    name: str
    machines: tuple[str, ...]
    cpu_flags: tuple[str, ...]
    """What the processor must have, by Linux's names."""
    compiler_flags: tuple[str, ...]
    vendor: str | None = None
    """Whose processors it is best for, as Linux names them; on others that run it the next one is faster."""

    def runs_here(self) -> bool:
        """Whether this process may run it; asks Linux for what has to be asked for."""
        if platform.machine().lower() not in self.machines or not set(self.cpu_flags) <= cpu_flags():
            return False
        return "amx_tile" not in self.cpu_flags or tiles_granted()

    def pays_here(self) -> bool:
        """Whether it is better than those after it on this processor."""
        return self.vendor in (None, cpu_info().get("vendor_id"))


_X86, _ARM = ("x86_64", "amd64"), ("aarch64", "arm64")
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c")
_AVX512_FLAGS = tuple(f"-m{name}" for name in _AVX512)
ISAS = (
    Isa(
        "amx",
        _X86,
        ("amx_tile", "amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", *_AVX512),
        ("-mamx-tile", "-mamx-bf16", "-mamx-int8", "-mavx512bf16", "-mavx512vnni", *_AVX512_FLAGS),
    ),
    Isa(
        "avx512bf16",
        _X86,
        ("avx512_bf16", "avx512_vnni", *_AVX512),
        ("-mavx512bf16", "-mavx512vnni", *_AVX512_FLAGS),
        vendor="AuthenticAMD",
    ),
    Isa("avx512vnni", _X86, ("avx512_vnni", *_AVX512), ("-mavx512vnni", *_AVX512_FLAGS)),
    Isa("avx512", _X86, _AVX512, _AVX512_FLAGS),
    Isa("avx2vnni", _X86, ("avx_vnni", "avx2", "fma", "f16c"), ("-mavxvnni", "-mavx2", "-mfma", "-mf16c")),
    Isa("avx2", _X86, ("avx2", "fma", "f16c"), ("-mavx2", "-mfma", "-mf16c")),
    Isa("neoni8mm", _ARM, ("i8mm", "asimddp", "atomics"), ("-march=armv8.2-a+dotprod+i8mm",)),
    Isa("neondotprod", _ARM, ("asimddp", "atomics"), ("-march=armv8.2-a+dotprod",)),
    Isa("neon", _ARM, (), ()),  # on a Mac the compiler's default has products of bytes, too
    Isa("scalar", (*_X86, *_ARM), (), ("-DJAXSERVE_SCALAR",)),
)
"""Best first. `scalar` uses no vectors at all: it is the oracle of the others.

AVX512-BF16's product of vectors does 32 multiplications a cycle on an EPYC of 2022, where a fused one of float32 does
16; on a Xeon of 2023 it is 15 and 26. Left out, by measurements on the latter: AMX's products of bytes for formats
whose blocks of 32 have scales of their own, since sums must leave the tiles after each.
"""


def best_isa(compiler: list[str] | None = None) -> Isa:
    """The best instruction set of this processor that `compiler` knows, if one is given. Raises BuildError for none."""
    for isa in ISAS:
        if isa.runs_here() and isa.pays_here() and (compiler is None or knows(compiler, isa)):
            return isa
    raise BuildError(f"no kernels are written for {platform.machine()}")


def knows(compiler: list[str], isa: Isa) -> bool:
    """Whether the compiler, which may be older than the processor, takes the instruction set's flags."""
    command = [*compiler, *isa.compiler_flags, "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


@dataclass(frozen=True)
class Library:
    """A library for this machine, and where it is from."""

    path: Path
    isa: Isa
    prebuilt: bool
    reason: str
    """Why this one."""

    def __str__(self) -> str:
        return f"{self.isa.name}: {self.path} ({self.reason})"


def library(progress: Callable[[str], None] = lambda message: None, *, prebuilt: bool = True) -> Library:
    """The library for this machine: the package's if it is of these sources, else one built here. Raises BuildError.

    `prebuilt`: the package's may be taken.
    """
    isa = best_isa()
    path = PREBUILT / file_name(isa)
    if not prebuilt:
        reason = "built here: the package's is refused"
    elif path.exists():
        return Library(path, isa, True, "came with the package")
    elif PREBUILT.exists():
        reason = f"built here: the package's are of other sources, or not for {isa.name}"
    else:
        reason = "built here: the package brings none"
    compiler = find_compiler()
    if (known := best_isa(compiler)) != isa:
        reason += f"; {compiler[0]} is too old for {isa.name}"
        isa = known
    version = subprocess.run([*compiler, "--version"], capture_output=True).stdout
    name = file_name(isa, version.decode(errors="replace"), jaxlib.__version__)
    path = (cache_home() or _temporary_home()) / "native" / name
    if not path.exists():
        progress(f"compiling the CPU kernels for {isa.name}; this is done once")
        build(isa, compiler, path)
    return Library(path, isa, False, reason)


def file_name(isa: Isa, *tools: str) -> str:
    """A name that changes with everything that went into a library: the sources, the flags, and what `tools` say.

    A prebuilt one goes by the sources alone: whether its XLA FFI is this JAX's is XLA's to say, when it is registered.
    """
    digest = hashlib.blake2b(repr((FLAGS, isa, *tools)).encode(), digest_size=10)
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return f"kernels-{isa.name}-{digest.hexdigest()}.so"


def find_compiler() -> list[str]:
    """The C++ compiler's command: $CXX, or the first of the usual names that runs. Raises BuildError."""
    chosen = os.environ.get("CXX")
    for command in [shlex.split(chosen)] if chosen else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]) and subprocess.run([*command, "--version"], capture_output=True).returncode == 0:
            return command
    raise BuildError(
        f"no C++ compiler was found ({f'CXX is {chosen!r}' if chosen else 'tried c++, g++ and clang++'}); "
        "install one, for example with: apt install g++"
    )


def build(isa: Isa, compiler: list[str], path: Path, extra: tuple[str, ...] = ()) -> None:
    """Compiles the sources into the library `path`. Raises BuildError with the compiler's words."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = [*compiler, *FLAGS, *isa.compiler_flags, *extra]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as directory:
        objects = {source: Path(directory) / f"{source.stem}.o" for source in sorted(SOURCES.glob("*.cc"))}
        compiles = [
            [*flags, "-c", "-isystem", jax.ffi.include_dir(), "-o", str(object_), str(source)]
            for source, object_ in objects.items()
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, compiles))
        new = Path(directory) / path.name  # whoever finds the library finds all of it
        _run([*flags, "-shared", "-o", str(new), *map(str, objects.values())])
        os.replace(new, path)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"compiling the CPU kernels failed: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"compiling the CPU kernels failed: {shlex.join(command)}\n{done.stderr.strip()}")


@cache
def _temporary_home() -> Path:
    """For a user without a home: a folder that nobody else could have filled before us, for this process alone."""
    return Path(tempfile.mkdtemp(prefix="jaxserve-"))


@cache
def tiles_granted() -> bool:
    """Whether Linux gives this process AMX's tile registers: 8 KiB more of each thread's state, so it wants asking."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    libc = ctypes.CDLL(None)
    return sys.platform == "linux" and libc.syscall(arch_prctl, request_permission, tile_data) == 0


def cpu_info() -> dict[str, str]:
    """What Linux says of the first processor; empty elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {k.strip(): v.strip() for k, v in (line.split(":", 1) for line in first.splitlines() if ":" in line)}


def cpu_flags() -> set[str]:
    """The processor's features, by Linux's names."""
    info = cpu_info()
    return set((info.get("flags") or info.get("Features") or "").split())
