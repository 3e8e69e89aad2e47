"""Compiled programs kept between runs, under a key that is had without tracing them; or in JAX's own cache."""

import hashlib
import logging
import os
import pickle
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding

import kernels_pallas
from jaxserve import native
from jaxserve.config import cache_home
from jaxserve.errors import ConfigError
from jaxserve.native.build import cpu_flags

log = logging.getLogger("jaxserve.compile_cache")

NOT_IN_PROGRAMS = (
    "baked",
    "batch_job",
    "bench",
    "chat",
    "cli",
    "client",
    "conformance",
    "conformance_mesh",
    "dry_run",
    "embedded",
    "fingerprint",
    "hosts",
    "hub",
    "llm",
    "model_code",
    "planning",
    "random_weights",
    "server",
    "sizing",
    "text",
    "tokenizer",
    "update",
    "weights",
)
"""Parts of the package that no program is made from, so that they may change and the programs stay."""
UNUSED_DAYS = 30
"""A program that nobody has loaded for so long is deleted when another one is stored."""
MANIFEST = "manifest.json"
"""In a directory that `jaxserve compile` has filled; nothing of it is ever deleted. See baked.py."""


def compile_cache_dir(option: str | None) -> str:
    """Where compiled steps are kept; '' for nowhere. The option goes before JAX's own setting, that before ours."""
    if option is not None:
        return os.path.expanduser(option)
    if jax.config.jax_compilation_cache_dir:
        return str(jax.config.jax_compilation_cache_dir)
    home = cache_home()
    return "" if home is None else str(home / "xla")


class Kept(NamedTuple):
    """A program, and where it is from."""

    program: jax.stages.Compiled
    compiled: bool
    """Whether XLA made it just now; otherwise it was loaded."""


class CompileCache:
    """The cache that an option asks for. Threads may share it.

    With `whole`, programs are kept here, to be loaded without being traced; without it JAX's own cache is used, which
    knows a program by what tracing it gave. With `must_keep`, one that cannot be kept is a ConfigError, not a warning.
    """

    def __init__(
        self,
        option: str | None,
        *,
        whole: bool,
        progress: Callable[[str], None] = lambda message: None,
        must_keep: bool = False,
    ):
        self.whole, self._must_keep = whole, must_keep
        self.directory = directory = compile_cache_dir(option)
        progress(f"compile cache: {directory or 'off'}")
        if not whole:
            _use_jax_cache(directory)
        elif option is not None:
            _use_jax_cache("")
        self._directory = Path(directory, "programs") if directory and whole else None
        _watch_jax_cache()

    def get(
        self,
        what: object,
        function: Callable[..., Any],
        *arguments: Any,
        donate: int | None = None,
        out_shardings: Any = None,
    ) -> jax.stages.Compiled:
        """The program of `find`, wherever it is from."""
        return self.find(what, function, *arguments, donate=donate, out_shardings=out_shardings).program

    def find(
        self,
        what: object,
        function: Callable[..., Any],
        *arguments: Any,
        donate: int | None = None,
        out_shardings: Any = None,
    ) -> Kept:
        """`function` compiled for `arguments`, shapes or values alike; `donate` is the number of one that is donated.

        It runs on the devices that the arguments' shardings name, and leaves its results as `out_shardings` says, a
        tree, or None for wherever they are. The repr of `what` names the function and holds whatever its program
        depends on besides the arguments. The code in this package, the versions, the device and JAX's settings are
        looked after here.
        """
        if self._directory is None:
            return _compile(function, arguments, donate, out_shardings)
        shapes = jax.tree.map(lambda a: (a.shape, str(a.dtype)), arguments)
        shardings = [getattr(a, "sharding", None) for a in jax.tree.leaves(arguments)]
        places = [_place(s) for s in (*shardings, *jax.tree.leaves(out_shardings))]
        key = repr((what, shapes, places, donate, surroundings()))
        path = self._directory / hashlib.blake2b(key.encode(), digest_size=20).hexdigest()
        try:
            serialized, arguments_tree, results_tree = pickle.loads(path.read_bytes())
            program = serialize_executable.deserialize_and_load(
                serialized, arguments_tree, results_tree, execution_devices=_devices((shardings, out_shardings))
            )
            with suppress(OSError):  # of an image's layer, which cannot be written
                os.utime(path)
            return Kept(program, compiled=False)
        except FileNotFoundError:
            pass
        except Exception as error:  # it can be anything: the file is what some other process left
            log.warning("%s is of no use and made again: %s", path, error)
        kept = _compile(function, arguments, donate, out_shardings)
        if not kept.compiled:  # XLA:CPU writes a program that it has loaded without its code
            return kept
        try:
            data = pickle.dumps(serialize_executable.serialize(kept.program))
            if jax.local_devices()[0].platform == "cpu" and sys.platform == "linux" and b"\x7fELF" not in data:
                raise ValueError("there is no code in it")
            _write(path, data)
            _delete_unused(self._directory)
        except Exception as error:
            if self._must_keep:
                raise ConfigError(f"a compiled program cannot be kept in {self._directory}: {error}") from error
            log.warning("a compiled program is not kept: %s", error)
        return kept


def _compile(function: Callable[..., Any], arguments: tuple[Any, ...], donate: int | None, out_shardings: Any) -> Kept:
    _found.by_jax = False
    # A new function each time: JAX would answer with a program that this process has loaded for the same one.
    donated = () if donate is None else donate
    lowered = jax.jit(partial(function), donate_argnums=donated, out_shardings=out_shardings).lower(*arguments)
    return Kept(lowered.compile(compiler_options=_compiler_options()), compiled=not _found.by_jax)


def _compiler_options() -> dict[str, bool] | None:
    """Of several hosts each compiles by itself: XLA:GPU would divide the search for fast kernels between them, and wait
    for a host that had the program already."""
    several = jax.process_count() > 1 and jax.local_devices()[0].platform == "gpu"
    return {"xla_gpu_shard_autotuning": False} if several else None


def _place(sharding: Any) -> object:
    """What tells a sharding from others: how it divides, and the devices in their order, which its repr leaves out."""
    if isinstance(sharding, NamedSharding):
        mesh = sharding.mesh
        return str(sharding.spec), tuple(mesh.shape.items()), mesh.device_ids.tolist(), str(sharding.memory_kind)
    return None if sharding is None else (type(sharding).__name__, sorted(d.id for d in sharding.device_set))


def _devices(shardings: Any) -> list[jax.Device] | None:
    """The devices of a program, in the order of its mesh; None where no sharding says."""
    for sharding in jax.tree.leaves(shardings):
        if isinstance(sharding, NamedSharding):
            return list(sharding.mesh.devices.flat)
        return list(sharding.device_set)
    return None


class _Found(threading.local):
    by_jax = False
    """Whether JAX took a program of this thread from its own cache."""


_found = _Found()


@cache
def _watch_jax_cache() -> None:
    def note(event: str, **_: object) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            _found.by_jax = True

    jax.monitoring.register_event_listener(note)


def _use_jax_cache(directory: str) -> None:
    """Turns JAX's cache on or off; what JAX was told of it before stays, if it is the same directory."""
    if directory == (jax.config.jax_compilation_cache_dir or ""):
        return
    jax.config.update("jax_compilation_cache_dir", directory or None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # a process that has compiled before would go on with the old directory


def surroundings() -> dict[str, object]:
    """What the machine code of a program depends on besides the program, by names for people."""
    device = jax.local_devices()[0]
    settings = {k: repr(v) for k, v in jax.config.values.items() if "cache" not in k}
    flags = {k: os.environ.get(k, "") for k in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    return {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "compiler": device.client.platform_version,
        **_host(device.platform),
        "C++ kernels": native.loaded(),
        "jaxserve's code": _code(),
        **flags,
        **settings,
    }


@cache
def _host(platform_name: str) -> dict[str, object]:
    found: dict[str, object] = {"machine": platform.machine(), "Python": platform.python_version()}
    if platform_name == "cpu":  # elsewhere no code of a program runs on the processor
        found["processor's features"] = " ".join(sorted(cpu_flags()))
    return found


@cache
def _code() -> str:
    """A digest of every source that a program may have been made from."""
    digest = hashlib.blake2b(digest_size=20)
    for root in (Path(__file__).parent, *map(Path, kernels_pallas.__path__)):
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".cc", ".h") or p.name == "tpu.json"):
            name = path.relative_to(root)
            if name.parts[0].removesuffix(".py") not in NOT_IN_PROGRAMS:
                digest.update(str(name).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-", delete=False) as file:
        file.write(data)
    os.replace(file.name, path)  # whoever finds it finds all of it


def _delete_unused(directory: Path) -> None:
    if (directory.parent / MANIFEST).exists():
        return
    oldest = time.time() - UNUSED_DAYS * 86400
    for path in directory.iterdir():
        if path.stat().st_mtime < oldest:
            path.unlink(missing_ok=True)
