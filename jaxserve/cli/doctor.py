"""`jaxserve doctor` and `jaxserve version`: what is installed, what will be used, and why."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from jaxserve import __version__
from jaxserve.cli import options as cli
from jaxserve.config import DeviceOptions, MeshShape, ServerOptions
from jaxserve.host_memory import host_memory

PACKAGES = (
    "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "orbax-checkpoint", "numpy",
    "ml_dtypes", "safetensors", "tokenizers", "sentencepiece", "huggingface_hub", "jinja2", "grpcio", "protobuf",
    "starlette", "uvicorn", "uvloop", "httptools", "msgspec", "prometheus_client", "cyclopts", "rich",
)  # fmt: skip

# The instruction sets that matter to matrix products.
CPU_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
)


def version() -> int:
    """Print the versions of jaxserve, Python and JAX."""
    print(f"jaxserve {__version__}, Python {platform.python_version()}, jax {importlib.metadata.version('jax')}")
    return 0


def doctor(
    *,
    config: cli.ConfigFile = None,
    models: cli.Models = cli.ModelFlags(),
    device: cli.Device = DeviceOptions(),
    server: cli.Server = ServerOptions(),
) -> int:
    """Print versions, devices, memory, and what would be used and why; the exit code is 1 if something is wrong.

    Parameters
    ----------
    config
        TOML file with any of these settings, flat or in the sections [model], [device], [server].
    """
    problems: list[str] = []
    for title, rows in (
        ("Versions", versions()),
        ("Machine", machine()),
        ("Devices", devices(models, device, problems)),
        ("Files", files(device, problems)),
        ("Ports", ports(server, problems)),
    ):
        print(title)
        for name, value in rows:
            print(f"  {name:<22} {value}")
    print("\n".join(["", *(f"Problem: {p}" for p in problems)]) if problems else "\nNothing is wrong.")
    return 1 if problems else 0


def versions() -> Iterator[tuple[str, str]]:
    yield "jaxserve", __version__
    yield "python", f"{platform.python_version()} ({sys.executable})"
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def machine() -> Iterator[tuple[str, str]]:
    from jaxserve.native.build import cpu_flags, cpu_info

    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    yield "processor", cpu_info().get("model name") or platform.processor() or platform.machine()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "cores", f"{usable} usable of {os.cpu_count()}"
    if flags := cpu_flags():
        yield "instruction sets", " ".join(f for f in CPU_FLAGS if f in flags) or "none of " + " ".join(CPU_FLAGS)
    memory = host_memory()
    yield "memory", f"{_size(memory.total)}, {_size(memory.free)} free"


def devices(models: cli.Models, options: DeviceOptions, problems: list[str]) -> Iterator[tuple[str, str]]:
    import jax

    from jaxserve import native
    from jaxserve.attention import choose
    from jaxserve.errors import ConfigError
    from jaxserve.loading import dtype_for
    from jaxserve.native.build import BuildError
    from jaxserve.sharding import meshes

    try:
        found = jax.devices()
    except RuntimeError as e:
        problems.append(f"JAX finds no device: {e}; unset JAX_PLATFORMS, or install jaxserve[cuda] or jaxserve[tpu]")
        yield "devices", "none"
        return
    yield "JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS") or "not set: JAX takes the best that it finds"
    for d in found:
        stats = d.memory_stats() or {}
        memory = f", {_size(stats['bytes_limit'])}" if "bytes_limit" in stats else ""
        yield f"device {d.id}", f"{d.platform}: {d.device_kind}{memory}"
    shape = MeshShape.parse(options.mesh or "1")
    try:
        rows = [" ".join(str(d.id) for d in mesh.devices.flat) for mesh in meshes(shape, found)]
        yield "mesh", f"{shape}: " + ", ".join(f"replica {i} on device {ids}" for i, ids in enumerate(rows))
    except ConfigError as e:
        problems.append(str(e))
    kind = found[0].platform
    if kind == "cpu" and shutil.which("nvidia-smi") and not importlib.util.find_spec("jax_cuda13_plugin"):
        problems.append("an NVIDIA GPU is here, but JAX lacks its plugin: pip install 'jaxserve[cuda]'")
    if kind == "cpu":
        try:
            native.load(print)
            yield "C++ kernels", str(native.origin())
        except BuildError as e:
            yield "C++ kernels", f"none: {e}"
    reason, dtype = f"auto on {kind}" if models.dtype == "auto" else "asked for by name", dtype_for(models.dtype, kind)
    yield "dtype", f"{dtype} ({reason})"
    try:
        name, reason, _ = choose(
            options.attention, kind, print, devices=shape.per_replica, block_size=options.block_size,
            kv_dtype=dtype if options.kv_dtype == "auto" else options.kv_dtype,
            capability=getattr(found[0], "compute_capability", None),
        )  # fmt: skip
        yield "attention", f"{name} ({reason})"
    except ConfigError as e:
        problems.append(str(e))


def files(options: DeviceOptions, problems: list[str]) -> Iterator[tuple[str, str]]:
    from jaxserve.compile_cache import compile_cache_dir
    from jaxserve.errors import ConfigError
    from jaxserve.hub import resolve_model

    configured = compile_cache_dir(options.compile_cache_dir)
    if not configured:
        yield "compile cache", "off"
    else:
        cache = Path(configured)
        entries = [p.stat().st_size for p in cache.rglob("*") if p.is_file()] if cache.is_dir() else []
        yield "compile cache", f"{cache}: {len(entries)} files, {_size(sum(entries))}"
        if not _writable(cache):
            problems.append(f"{cache} cannot be written; name another one with --compile-cache-dir")
    try:
        model = resolve_model(None)
        yield "embedded model", f"{model}: {_size(sum(p.stat().st_size for p in model.rglob('*') if p.is_file()))}"
    except ConfigError as e:
        problems.append(str(e))
    if _compiled_anew():
        yield "bytecode", f"none of jax, so each start compiles it anew: python -m compileall -q {sys.prefix}"
    from huggingface_hub import constants

    yield (
        "Hugging Face",
        f"{constants.ENDPOINT}, cache {constants.HF_HUB_CACHE}" + (", offline" if constants.is_offline_mode() else ""),
    )


def ports(options: ServerOptions, problems: list[str]) -> Iterator[tuple[str, str]]:
    http = options.port
    grpc = options.grpc_port if options.grpc_port is not None else (http + 1 if http else 0)
    for name, port, must in (("HTTP", http, True), ("gRPC", grpc, options.grpc_port is not None)):
        if port <= 0:
            yield name, "off" if port < 0 else "any free port"
            continue
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind((options.host, port))
                yield name, f"{options.host}:{port} is free"
            except OSError as e:
                yield name, f"{options.host}:{port} is taken" + ("" if must else "; another one will be used")
                if must:
                    flag = "--port" if name == "HTTP" else "--grpc-port"
                    problems.append(f"{name} port {port}: {e.strerror}; choose another one with {flag}")


def _compiled_anew() -> bool:
    """Whether every start compiles JAX's sources: Python is to keep no bytecode, and there is none of them."""
    found = importlib.util.find_spec("jax")
    if found is None or found.origin is None or not sys.dont_write_bytecode:
        return False
    return not Path(importlib.util.cache_from_source(found.origin)).exists()


def _writable(path: Path) -> bool:
    while not path.exists():
        path = path.parent
    return os.access(path, os.W_OK | os.X_OK)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit in ("B", "KiB") else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("the loop returns at its last unit")
