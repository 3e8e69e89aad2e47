"""Builds a wheel for users without a compiler: its C++ kernels are compiled for every instruction set of a machine.

python tools/build_wheel.py [--output dist]

Linux; needs a C++ compiler and hatchling. XLA takes libraries of older FFI versions, not of newer ones: build where the
oldest JAX that is supported is installed. `auditwheel repair` gives the wheel the tag of the oldest glibc it runs on.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from jaxserve.native import build

ROOT = Path(__file__).parent.parent


def compile_libraries(folder: Path) -> None:
    """One library for each instruction set, with its own flags and no others. Raises BuildError."""
    compiler = build.find_compiler()
    for isa in build.ISAS:
        if platform.machine().lower() in isa.machines:
            print(f"compiling for {isa.name}", flush=True)
            build.build(isa, compiler, folder / build.file_name(isa))


def pack(libraries: Path, output: Path) -> Path:
    """The wheel in `output`, with the libraries that lie in `libraries`."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", directory]
        environ = os.environ | {"JAXSERVE_WHEEL_LIBRARIES": str(libraries.resolve())}
        subprocess.run(command, check=True, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL)
        (built,) = Path(directory).glob("*.whl")
        output.mkdir(parents=True, exist_ok=True)
        (output / built.name).write_bytes(built.read_bytes())
        return output / built.name


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds a wheel with compiled CPU kernels.")
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    output = parser.parse_args().output
    if sys.platform != "linux":
        parser.error(f"libraries for {sys.platform} are built by their users; this is for Linux")
    with tempfile.TemporaryDirectory() as directory:
        compile_libraries(Path(directory))
        print(pack(Path(directory), output))


if __name__ == "__main__":
    main()
