"""What tells a gate's program from others: a digest of all that decides what the compiler makes of it and how that is
judged, and of nothing else, so that moved lines, comments and another folder leave it as it is.

Not in it is a machine's own ptxas, by which Triton's kernels are assembled: each machine has another.
"""

import ast
import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt")
SOURCES = (
    "tools/gates_judged.py",
    "jaxserve/planning/topology.py",  # what the compilers are told of devices that are not here
    "jaxserve/planning/chips.py",
)
"""What is no part of any program's text, and has a say all the same."""
SOURCES_OF_LOOKS = ("tools/gates_step_judged.py", "jaxserve/planning/steps.py")
"""The same of gates that have a `look` of their own, besides the file that it stands in: what it may call."""
_MODULE = b"ML\xefR"
"""MLIR's bytecode begins so."""


def digest(lowered: Any, facts: object, look: Callable[..., Any] | None = None) -> str:
    """Of a program that is lowered, of facts about it, whose repr is the same anywhere, and of what judges it besides
    gates_judged.py."""
    found = hashlib.blake2b(digest_size=16)
    judges = [] if look is None else [_source(Path(look.__code__.co_filename)), *map(_source, SOURCES_OF_LOOKS)]
    for part in (repr(facts), surroundings(), *judges, repr(_places(lowered)), *program(lowered)):
        found.update(part.encode() + b"\0")
    return found.hexdigest()


def passed(program: str, limits: dict[str, float]) -> str:
    """What is stored of a program that was compiled, by its digest, and was found to need what the limits say: with
    other limits, as somebody may write them into the file, it has to be compiled again."""
    return hashlib.blake2b(json.dumps([program, limits], sort_keys=True).encode(), digest_size=16).hexdigest()


@cache
def surroundings() -> str:
    """The compilers, their settings and what they are told of devices; and the code that judges what they make."""
    import jax

    settings = {k: repr(v) for k, v in jax.config.values.items() if "cache" not in k}
    flags = os.environ.get("XLA_FLAGS", "")
    return json.dumps([versions(), settings, flags, *map(_source, SOURCES)], sort_keys=True)


def versions() -> dict[str, str | None]:
    """By package; None of one that is not here."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


@cache
def _source(name: str | Path) -> str:
    return without_comments((ROOT / name).read_text())


def without_comments(source: str) -> str:
    """Python's source with its docstrings and comments left out, laid out in one way."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [
                it for it in node.body if not (isinstance(it, ast.Expr) and isinstance(it.value, ast.Constant))
            ]
    return ast.unparse(tree)


def _places(lowered: Any) -> Iterable[object]:
    """The devices of a program in their order, which its text leaves out, where its results are told where to lie."""
    import jax

    found = []
    for leaf in jax.tree.leaves(lowered.out_info):
        if isinstance(leaf.sharding, jax.sharding.NamedSharding):
            mesh = leaf.sharding.mesh
            place = (mesh.device_ids.tolist(), sorted({device.device_kind for device in mesh.devices.flat}))
            if place not in found:
                found.append(place)
    return found


def program(lowered: Any) -> Iterator[str]:
    """A lowered program as text: its operations, their scopes, and the kernels in it. Nothing says where in which
    source any of that was."""
    from jax.extend.mlir import ir

    module = lowered.compiler_ir("stablehlo")
    context = module.context
    scopes: list[str] = []
    kernels: list[str] = []

    def visit(operation: Any) -> Any:
        scopes.append(_scope(operation.location))
        for name in ("backend_config", "mhlo.backend_config"):
            if operation.name == "stablehlo.custom_call" and name in operation.attributes:
                kernels.append(json.dumps(_readable(operation.attributes[name]), sort_keys=True))
                del operation.attributes[name]
        return ir.WalkResult.ADVANCE

    with context, _kernels_dialects(context):
        copy = module.operation.clone()
        copy.walk(visit)
        yield copy.get_asm(enable_debug_info=False)
    yield "\n".join(scopes)
    yield from kernels


def _scope(location: Any) -> str:
    """The names that were given to a place in a program, by which what is found in it is told apart."""
    from jax.extend.mlir import ir

    names = []
    while isinstance(location, ir.NameLoc):
        names.append(location.name_str)
        location = location.child_loc
    return " ".join(names)


def _readable(attribute: Any) -> Any:
    """A custom call's configuration with the kernels in it as text, which bytecode and its places in sources were."""
    from jax.extend.mlir import ir

    if isinstance(attribute, ir.DictAttr):
        entries = (attribute[i] for i in range(len(attribute)))
        return {entry.name: _readable(entry.attr) for entry in entries if entry.name != "kernel_hash"}  # Mosaic GPU's
    if not isinstance(attribute, ir.StringAttr):
        return str(attribute)
    value = attribute.value_bytes
    if value.startswith(_MODULE):
        return _text(value)
    try:
        return _readable_json(json.loads(value))
    except ValueError:
        return repr(value)


def _readable_json(value: Any) -> Any:
    """The same of what Mosaic's kernels for TPU are kept in."""
    if isinstance(value, list):
        return [_readable_json(v) for v in value]
    if not isinstance(value, dict):
        return value
    kept = {k: v for k, v in value.items() if k != "debug_locations"}
    return {k: _text(base64.b64decode(v)) if k == "body" else _readable_json(v) for k, v in kept.items()}


def _text(bytecode: bytes) -> str:
    from jax.extend.mlir import ir

    return str(ir.Module.parse(bytecode).operation.get_asm(enable_debug_info=False))


@contextlib.contextmanager
def _kernels_dialects(context: Any) -> Iterator[None]:
    """`context` takes kernels' modules: Triton's dialect, and any others' operations by their names alone."""
    from jaxlib.triton import dialect

    dialect.register_dialect(context)
    before = context.allow_unregistered_dialects
    context.allow_unregistered_dialects = True
    try:
        yield
    finally:
        context.allow_unregistered_dialects = before
