"""A wheel with compiled kernels: what it holds, that it serves without a compiler, and what happens if XLA refuses."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import pytest
from tool_files import load_tool

from jaxserve.native import TARGETS, build

ROOT = Path(__file__).parent.parent

# XLA asks a handler for the version that it was compiled for; this one is from the future.
FROM_THE_FUTURE = """
#include "xla/ffi/api/c_api.h"
extern "C" XLA_FFI_Error* HANDLER(XLA_FFI_CallFrame* frame) {
  auto* metadata = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start)->metadata;
  metadata->api_version.major_version = 99;
  return nullptr;
}
"""


@pytest.fixture(scope="module")
def wheel(compiler: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel with the library of this processor alone, which is compiled already."""
    pytest.importorskip("hatchling", reason="hatchling builds wheels: pip install '.[dev]'")
    tool = load_tool("build_wheel")
    folder = tmp_path_factory.mktemp("libraries")
    shutil.copy(build.library(prebuilt=False).path, folder / build.file_name(build.best_isa()))
    return tool.pack(folder, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(path)
    return path


def python(*arguments: str, path: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Another Python, which finds jaxserve in `path`, where it keeps its caches too, and no compiler."""
    nothing = {"PYTHONPATH": str(path), "CXX": "/no/such/compiler", "XDG_CACHE_HOME": str(path / "cache")}
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | nothing | environ, cwd=path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip


def test_the_wheel_says_what_it_holds(wheel) -> None:
    assert re.fullmatch(r"jaxserve-[\d.a-z]+-py3-none-[a-z]\w+\.whl", wheel.name) and "none-any" not in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(n).decode() for n in names if n.endswith(".dist-info/WHEEL"))
        (record,) = (archive.read(n).decode() for n in names if n.endswith(".dist-info/RECORD"))
    library = f"jaxserve/native/prebuilt/{build.file_name(build.best_isa())}"
    assert [n for n in names if n.endswith(".so")] == [library] and library in record
    assert "Root-Is-Purelib: false" in metadata and f"Tag: {wheel.stem.split('-', 2)[2]}" in metadata
    assert "jaxserve/native/csrc/norm.cc" in names, "where the library is refused, another one is built"


def test_it_serves_without_a_compiler(installed) -> None:
    small = ["--max-num-seqs=2", "--max-num-batched-tokens=32", "--num-kv-pages=32", "--temperature=0"]
    question = "What is the capital of France?"
    done = python("-m", "jaxserve", "run", question, "--attention=cpu", *small, path=installed)
    assert "Paris" in done.stdout, done.stderr
    doctor = python("-m", "jaxserve", "doctor", path=installed).stdout
    library = installed / "jaxserve" / "native" / "prebuilt" / build.file_name(build.best_isa())
    assert f"{build.best_isa().name}: {library} (came with the package)" in doctor


def test_a_plain_wheel_is_for_any_machine(tmp_path) -> None:
    pytest.importorskip("hatchling", reason="hatchling builds wheels: pip install '.[dev]'")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (plain,) = tmp_path.iterdir()
    assert plain.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(plain) as archive:
        assert not [n for n in archive.namelist() if n.endswith(".so")]


def test_a_library_of_other_sources_is_not_taken(monkeypatch, compiler, tmp_path) -> None:
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "build", lambda isa, compiler, path: None)
    library = tmp_path / "prebuilt" / build.file_name(build.best_isa())
    library.parent.mkdir()
    library.touch()
    assert (build.library().path, build.library().prebuilt) == (library, True)
    assert str(build.library(prebuilt=False)).endswith("(built here: the package's is refused)")
    shutil.copytree(build.SOURCES, tmp_path / "csrc")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    assert build.library().prebuilt
    (tmp_path / "csrc" / "simd.h").write_text("// another")
    assert not build.library().prebuilt and "the package's are of other sources" in str(build.library())
    shutil.rmtree(tmp_path / "prebuilt")
    assert str(build.library()).endswith("(built here: the package brings none)")


LOAD = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from jaxserve import native
from jaxserve.native import build, norm
build.PREBUILT = Path(sys.argv[1])
try:
    native.load(print)
    print(native.origin(), norm.rms_norm(jnp.ones((2, 8)), jnp.ones(8), 0.0).sum())
except build.BuildError as error:
    print("BuildError:", error)
"""


@pytest.mark.parametrize("reason", ["API version", "file too short|invalid ELF|not a mach-o"])
def test_where_the_packages_library_is_refused_one_is_built(compiler, tmp_path, reason) -> None:
    library = tmp_path / build.file_name(build.best_isa())
    if reason == "API version":
        (tmp_path / "future.cc").write_text(FROM_THE_FUTURE)
        flags = ["-shared", "-fPIC", f"-DHANDLER={TARGETS[0]}", "-isystem", jax.ffi.include_dir()]
        subprocess.run([*compiler, *flags, "-o", str(library), str(tmp_path / "future.cc")], check=True)
    else:
        library.write_bytes(b"no library")
    done = python("-c", LOAD, str(tmp_path), path=ROOT, CXX=" ".join(compiler), XDG_CACHE_HOME=str(build_cache()))
    said, last = done.stdout.strip().rsplit("\n", 1)
    assert re.search(f"not using a library that came with the package: .*({reason})", said), done.stderr
    assert last.endswith("(built here: the package's is refused) 16.0")
    without = python("-c", LOAD, str(tmp_path), path=ROOT, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert without.stdout.strip().split("\n")[-1].startswith("BuildError: no C++ compiler was found"), without.stderr


def build_cache() -> Path:
    """Where this process keeps what it builds: compiling it once is enough."""
    return build.library(prebuilt=False).path.parents[2]
