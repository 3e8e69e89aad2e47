"""The files of a job, on this disk or wherever fsspec reaches: finding, opening, digesting and copying them."""

import contextlib
import glob
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from jaxserve.errors import ConfigError

EXTRA = "pip install 'jaxserve[offline]'"

_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "abfs": "adlfs", "az": "adlfs"}
_BLOCK = 2**20


class Source(NamedTuple):
    """An input file. `label` tells it from the job's others, wherever they all lie."""

    path: str
    label: str


class Digest(NamedTuple):
    """What the input holds, and about how many lines that is."""

    hex: str
    lines: int


def kind_of(path: str) -> str:
    """jsonl, parquet, arrow, or text for every other suffix. Raises ConfigError for what must be unpacked first."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in _PACKED:
        raise ConfigError(f"{path} is compressed; unpack it first")
    return _KINDS.get(suffix, "text")


def is_remote(path: str) -> bool:
    """Whether it is fsspec's to open: PROTOCOL://..."""
    return "://" in path


def find(pattern: str, without: str) -> list[Source]:
    """The files that a path or a glob means, in the order of their names; the job's own output is not among them.

    Raises ConfigError if there is none, or if they are of several kinds.
    """
    if pattern == "-":
        raise ConfigError("a job that can be resumed reads a file, not standard input; write that to a file first")
    magic = glob.has_magic(pattern)
    if is_remote(pattern):
        system, path = _system(pattern)
        with explained(pattern):
            plain = sorted(system.glob(path)) if magic else [path] if system.isfile(path) else []
        paths = [system.unstrip_protocol(p) for p in plain]
        without = system.unstrip_protocol(_system(without)[1]) if is_remote(without) else without
    else:
        paths = sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
        if not paths and os.path.isfile(pattern):  # a name with brackets in it
            paths = [pattern]
    own = {
        os.path.basename(without) + end for end in (".job", ".job.new", ".rows", ".rows.job", ".rows.job.new", ".new")
    }
    place, folder = _absolute(without), os.path.basename(without) + ".capture"
    found = [
        p for p in paths if _absolute(p) != place and os.path.basename(p) not in own and folder not in p.split("/")
    ]
    if not found:
        raise ConfigError(
            f"{pattern} is the output, and nothing else is there to read"
            if paths
            else f"cannot open {pattern}: no such file"
        )
    kinds = {kind_of(p): p for p in found}
    if len(kinds) > 1:
        raise ConfigError(
            f"{pattern} means files of several kinds: {', '.join(kinds.values())}; run a job for each kind"
        )
    folder = os.path.commonpath([os.path.dirname(p) for p in found])
    return [Source(p, p[len(folder) :].lstrip("/") if folder else p) for p in found]


def _absolute(path: str) -> str:
    return path if is_remote(path) else os.path.abspath(path)


def open_read(path: str) -> IO[bytes]:
    """A buffered, seekable file. Raises ConfigError."""
    with explained(path):
        if is_remote(path):
            system, name = _system(path)
            return io.BufferedReader(system.open(name, "rb"), _BLOCK)
        return open(path, "rb", buffering=_BLOCK)


def digest(sources: list[Source]) -> Digest:
    """A digest of all that is in the files, and of their labels if they are several. Raises ConfigError."""
    found, lines = hashlib.blake2b(digest_size=20), 0
    for source in sources:
        size, last = 0, b"\n"
        with open_read(source.path) as file, explained(source.path):
            while block := file.read(_BLOCK):
                found.update(block)
                lines += block.count(b"\n")
                size += len(block)
                last = block[-1:]
        lines += last != b"\n"
        if len(sources) > 1:  # records say which file a row is from
            found.update(f"\0{source.label}\0{size}\0".encode())
    return Digest(found.hexdigest(), lines)


def remote_size(path: str) -> int | None:
    """The bytes of a remote file; None if there is none. Raises ConfigError."""
    system, name = _system(path)
    with explained(path):
        return int(system.size(name)) if system.exists(name) else None


def upload(local: Path, path: str) -> None:
    """Copies a file to a remote place. Raises ConfigError."""
    system, name = _system(path)
    with explained(path):
        system.put_file(os.fspath(local), name)


def _system(path: str) -> tuple[Any, str]:
    """fsspec's file system for a path, and the path inside it."""
    protocol = path.partition("://")[0]
    try:
        import fsspec
    except ImportError:
        raise ConfigError(f"{path} needs fsspec: {EXTRA}") from None
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        cure = f"pip install {package}" if package else str(error)
        raise ConfigError(f"{protocol}:// needs one package more: {cure}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """What goes wrong with a file becomes a ConfigError that names it; remote errors come in all classes."""
    try:
        yield
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"cannot open {path}: {error.strerror or error}") from error
    except Exception as error:
        if not is_remote(path):
            raise
        raise ConfigError(f"cannot open {path}: {type(error).__name__}: {error}") from error
