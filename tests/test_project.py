"""The repository itself: set-up scripts, packaging, and that the README speaks of what exists."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jaxserve import cli

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()
SHELL = shutil.which("sh") or "/bin/sh"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The only folder on the PATH of a machine without Python."""
    path = tmp_path / "bin"
    path.mkdir()
    (path / "cat").symlink_to(shutil.which("cat") or "/bin/cat")
    return path


def program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{SHELL}\n{script}\n")
    path.chmod(0o755)


def find_python(machine: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SHELL, str(ROOT / "tools" / "find_python.sh")],
        env={"PATH": str(machine), "HOME": str(machine.parent), **environ},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


WORKS = f'exec "{sys.executable}" "$@"'
SHIM_FAILS = "echo 'pyenv: python3.12: command not found' >&2; exit 127"
TOO_OLD = "exit 1"


def test_no_python_is_told_with_the_cure(machine) -> None:
    program(machine / "python3.12", SHIM_FAILS)
    program(machine / "python3", TOO_OLD)
    done = find_python(machine)
    assert done.returncode == 1
    assert done.stdout == ""
    for cure in ("apt-get install", "brew install", "pyenv install", "make serve PYTHON="):
        assert cure in done.stderr


def test_a_failing_shim_is_passed_over(machine) -> None:
    program(machine / "python3.12", SHIM_FAILS)
    program(machine / "python3", WORKS)
    done = find_python(machine)
    assert (done.returncode, done.stdout.strip()) == (0, sys.executable)


@pytest.mark.parametrize("environ", [{}, {"PYENV_ROOT": "elsewhere"}])
def test_versions_of_pyenv_are_found_without_its_shims(machine, environ) -> None:
    program(machine / "python3.12", SHIM_FAILS)
    root = machine.parent / environ.get("PYENV_ROOT", ".pyenv")
    program(root / "versions" / "3.9.1" / "bin" / "python", TOO_OLD)
    program(root / "versions" / "3.13.0" / "bin" / "python", WORKS)
    done = find_python(machine, **({"PYENV_ROOT": str(root)} if environ else {}))
    assert (done.returncode, done.stdout.strip()) == (0, sys.executable)


def test_uv_is_asked_last_and_may_install(machine) -> None:
    marker = machine.parent / "installed"
    program(
        machine / "uv",
        f'case "$2" in\n  install) echo > "{marker}";;\n'
        f'  find) [ -e "{marker}" ] && echo "{sys.executable}" || exit 2;;\nesac',
    )
    done = find_python(machine)
    assert (done.returncode, done.stdout.strip()) == (0, sys.executable)


def test_a_python_that_was_named_must_work(machine) -> None:
    program(machine / "python3.12", WORKS)
    assert find_python(machine, PYTHON="/no/such/python").returncode == 1
    assert find_python(machine, PYTHON=sys.executable).stdout.strip() == sys.executable


@pytest.mark.parametrize(
    "script",
    ["tools/find_python.sh", "tools/check", "tools/compile_gate", "tools/test_oldest_jax", "tools/test_ray", ".ci/run"],
)
def test_scripts_are_executable_and_parse(script) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    interpreter = path.read_text().split("\n", 1)[0].removeprefix("#!")
    assert subprocess.run([interpreter, "-n", str(path)]).returncode == 0


def test_dependencies() -> None:
    project = PROJECT["project"]
    names = {re.split(r"[<>=\[;! ]", d)[0] for d in project["dependencies"]}
    assert not names & {"torch", "transformers", "tensorflow"}
    assert set(project["optional-dependencies"]) >= {"cuda", "tpu", "dev"}
    assert project["requires-python"] == ">=3.12"
    assert set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == {"jaxserve", "kernels_pallas"}


def test_the_oldest_jax_is_the_one_that_is_tested() -> None:
    (oldest,) = re.findall(r"^JAX=(\S+)$", (ROOT / "tools" / "test_oldest_jax").read_text(), re.MULTILINE)
    assert f"jax>={oldest}" in PROJECT["project"]["dependencies"]


def test_readme_names_targets_and_commands_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([\w-]+)", README)) - {"a"}
    assert {"serve", "test"} <= targets
    for target in targets:
        assert re.search(rf"^(\w+ )*{target}( \w+)*:", makefile, re.MULTILINE), target
    commands = {c for c in cli.make_app() if not c.startswith("-")}
    named = set(re.findall(r"^    jaxserve ([\w-]+)", README, re.MULTILINE))
    assert named <= commands
    assert {"serve", "run", "generate", "bench", "convert"} <= named


def test_readme_maps_every_file() -> None:
    for path in (ROOT / "jaxserve").iterdir():
        if path.name.startswith("_") or not (path.is_dir() or path.suffix == ".py"):
            continue
        name = f"{path.name}/" if path.is_dir() else path.name
        assert f"`{name}`" in README, name


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target.replace("\\", "")).exists(), target


def test_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"
