"""The direction of imports: `RANKS` is the architecture, and every file is held to it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A file imports only from lower ranks, or from its own package.
RANKS = {
    "errors": -1,
    "request": 0, "metrics": 0, "host_memory": 0, "config": 0, "formats": 0, "page_groups": 0,
    "fingerprint": 0, "gpu_memory": 0,
    "engine_process": 1, "spec": 1, "native": 1, "gguf": 1, "embedding": 1, "captured": 1, "scaled": 1,
    "quant": 2, "compile_cache": 2, "model_code": 2, "taps": 2,
    "layers": 3, "sharding": 3, "dry_run": 3, "baked": 3, "hosts": 3,
    "models": 4, "attention": 4, "sampling": 4, "weights": 4, "hub": 4, "tokenizer": 4, "chat": 4, "pages": 4,
    "embedded": 4, "lookahead": 4, "packing": 4, "pooling": 4,
    "plans": 5, "loading": 5, "perplexity": 5, "logits_file": 5, "random_weights": 5,
    "scheduler": 6, "batch": 6, "conformance": 6, "update": 6,
    "step": 7, "evaluate": 7, "conformance_mesh": 7,
    "sizing": 8,
    "runner": 9,
    "engine": 10, "planning": 10,
    "client": 11,
    "text": 12,
    "score": 13, "bench": 13,
    "llm": 14, "server": 14, "profile": 14,
    "batch_job": 15, "lm_eval": 15,
    "ray": 16,
    "cli": 17,
    "__init__": 18,  # the public names
    "__main__": 18,
}  # fmt: skip

# What the front-end process loads; it must not pay for JAX.
JAX_FREE = [
    "errors", "request", "metrics", "host_memory", "gpu_memory", "config", "tokenizer", "chat", "hub", "page_groups",
    "pages", "lookahead", "packing", "plans", "scheduler", "embedding", "captured", "perplexity", "logits_file",
    "client",
    "client.remote", "client.routing", "client.supervise", "engine_process", "fingerprint", "hosts.leader",
    "hosts.follower", "hosts.places", "text", "score", "server", "batch_job", "ray", "cli", "cli.plan",
    "planning.topology",
]  # fmt: skip


def modules(package: Path) -> list[Path]:
    return [p for p in sorted(package.rglob("*.py")) if not p.stem.endswith(("_pb2", "_pb2_grpc"))]


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, those inside functions too; `package` resolves relative ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], *base.split(".")])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}".strip(".")


def upward_imports(source: str, path: Path) -> list[str]:
    """What is wrong with the imports of `source`, as if it lay at `path` (relative to the repository)."""
    problems = []
    own = path.parts[1].removesuffix(".py")
    if own not in RANKS:
        return [f"{path}: {own} has no rank"]
    for line, name in imported(ast.parse(source), ".".join(path.parts[:-1])):
        parts = name.split(".")
        if parts[0] != "jaxserve":
            continue
        target = parts[1] if len(parts) > 1 else "__init__"
        if target == "__version__":  # the one name that everyone may take from the package itself
            continue
        if target not in RANKS:
            problems.append(f"{path}:{line}: {name} has no rank")
        elif target != own and RANKS[target] >= RANKS[own]:
            problems.append(f"{path}:{line}: {own} (rank {RANKS[own]}) imports {target} (rank {RANKS[target]})")
    return problems


def test_imports_go_down() -> None:
    problems = [
        problem
        for path in modules(ROOT / "jaxserve")
        for problem in upward_imports(path.read_text(), path.relative_to(ROOT))
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("jaxserve/pages.py", "from jaxserve.scheduler import Scheduler", "pages (rank 4) imports scheduler (rank 6)"),
        ("jaxserve/pages.py", "def f():\n    import jaxserve.engine", "pages.py:2: pages (rank 4) imports engine"),
        ("jaxserve/weights/load.py", "from jaxserve import hub", "weights (rank 4) imports hub (rank 4)"),
        ("jaxserve/weights/load.py", "from ..runner import Runner", "weights (rank 4) imports runner (rank 9)"),
        ("jaxserve/weights/load.py", "from .orbax import save_orbax", None),
        ("jaxserve/server/http.py", "from jaxserve.text import TextModel", None),
        ("jaxserve/utils.py", "", "utils has no rank"),
    ],
)
def test_a_planted_import_is_caught(path: str, source: str, wrong: str | None) -> None:
    problems = upward_imports(source, Path(path))
    assert len(problems) == (wrong is not None)
    assert wrong is None or wrong in problems[0]


def test_kernels_know_only_jax() -> None:
    allowed = {"jax", "jaxtyping", "numpy", "kernels_pallas"} | set(sys.stdlib_module_names)
    problems = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in modules(ROOT / "kernels_pallas")
        for line, name in imported(ast.parse(path.read_text()), ".".join(path.relative_to(ROOT).parts[:-1]))
        if name.split(".")[0] not in allowed
    ]
    assert not problems, "\n".join(problems)


def test_no_private_jax_no_torch_at_run_time() -> None:
    problems = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for package in ("jaxserve", "kernels_pallas")
        for path in modules(ROOT / package)
        for line, name in imported(ast.parse(path.read_text()), "")
        if name.startswith("jax._src") or name.split(".")[0] in ("torch", "transformers")
    ]
    assert not problems, "\n".join(problems)


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for package in ("jaxserve", "kernels_pallas", "tools")
        for path in modules(ROOT / package)
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent, "\n".join(silent)


def test_no_name_that_says_nothing() -> None:
    assert not [p for p in modules(ROOT / "jaxserve") if p.stem in ("utils", "helpers", "common", "misc")]


def test_front_end_does_not_load_jax() -> None:
    names = ["jaxserve", *(f"jaxserve.{name}" for name in JAX_FREE)]
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'jax' not in sys.modules, f'{name} loads jax'\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
