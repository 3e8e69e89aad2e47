"""Reads safetensors files, single or sharded, through memory maps; knows the format and nothing of models."""

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.errors import CheckpointError
from jaxserve.host_memory import drop_pages
from jaxserve.weights.problems import Problems

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_RANK = 32
_DTYPES = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}


@dataclass(frozen=True)
class _Entry:
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    """First byte of the tensor, counted from the start of the file."""
    nbytes: int


class SafetensorsFile:
    """One file: its header is read and checked at once, its tensors only when asked for."""

    def __init__(self, path: Path):
        """Raises CheckpointError, which names the file, unless the header and the file's size agree in every byte."""
        self.path = path
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                self.entries = _parse_header(file.read(8), file.read, size)
                # The map keeps its own handle on the file.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        except _BadHeader as error:
            raise CheckpointError(f"{path}: {error}") from error

    def read(self, name: str) -> np.ndarray:
        """A read-only view of one tensor; the operating system reads its bytes when they are touched."""
        entry = self.entries[name]
        if entry.nbytes == 0:
            return np.empty(entry.shape, entry.dtype)
        count = math.prod(entry.shape)
        return np.frombuffer(self._map, entry.dtype, count, entry.begin).reshape(entry.shape)

    def release(self, name: str) -> None:
        """Lets go of what memory holds of a tensor."""
        drop_pages(self._map, self.entries[name].begin, self.entries[name].nbytes)


class SafetensorsCheckpoint:
    """The tensors of one or several files under one set of names."""

    def __init__(self, path: Path, config: dict[str, Any], owners: Mapping[str, SafetensorsFile]):
        self.path = path
        self.config = config
        self._owners = owners

    def names(self) -> frozenset[str]:
        return frozenset(self._owners)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._owners[name].entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._owners[name].entries[name].dtype

    def read(self, name: str) -> np.ndarray:
        return self._owners[name].read(name)

    def blocks(self, name: str) -> None:
        return None

    def release(self, name: str) -> None:
        self._owners[name].release(name)

    def nbytes(self, name: str) -> int:
        return self._owners[name].entries[name].nbytes


def open_single(path: Path, config: dict[str, Any]) -> SafetensorsCheckpoint:
    """The checkpoint of a directory that holds model.safetensors."""
    file = SafetensorsFile(path / SINGLE)
    return SafetensorsCheckpoint(path, config, dict.fromkeys(file.entries, file))


def open_sharded(path: Path, config: dict[str, Any]) -> SafetensorsCheckpoint:
    """The checkpoint of a directory that holds model.safetensors.index.json and its shards.

    Raises one CheckpointError with all that is wrong with the index and with every shard.
    """
    weight_map = _read_index(path / INDEX)
    problems = Problems(path)
    files: dict[str, SafetensorsFile] = {}
    for shard in sorted(set(weight_map.values())):
        if PurePosixPath(shard).name != shard or "\\" in shard:
            problems.add("shard outside the directory", repr(shard))
        elif not (path / shard).is_file():
            problems.add("missing shard", shard)
        else:
            try:
                files[shard] = SafetensorsFile(path / shard)
            except CheckpointError as error:
                problems.add("unreadable shard", error.message)
    owners: dict[str, SafetensorsFile] = {}
    for shard, file in files.items():
        for name in file.entries:
            if name in owners:
                problems.add("tensor in two shards", f"{name} in {owners[name].path.name} and {shard}")
            owners[name] = file
    for name, shard in weight_map.items():
        if shard in files and name not in files[shard].entries:
            found = f"it is in {owners[name].path.name}" if name in owners else "it is in no shard"
            problems.add("tensor not where the index says", f"{name} not in {shard}, {found}")
    problems.raise_any()
    return SafetensorsCheckpoint(path, config, owners)


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_bytes())
        weight_map = index["weight_map"]
        if not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise TypeError("weight_map must give each tensor's file")
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a safetensors index: {type(error).__name__}: {error}") from error
    return weight_map


class _BadHeader(Exception):
    pass


def _parse_header(first: bytes, read: Any, size: int) -> dict[str, _Entry]:
    """The entries of a file of `size` bytes that begins with `first`; `read(n)` continues it."""
    if first == b"version ":
        raise _BadHeader("a Git LFS pointer, not the weights; run `git lfs pull` in that directory")
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > size - 8:
        raise _BadHeader(f"truncated or not a safetensors file ({size} bytes, header of {length})")
    if length > _MAX_HEADER_BYTES:
        raise _BadHeader(f"header of {length} bytes; the format allows {_MAX_HEADER_BYTES}")
    try:
        header = json.loads(read(length).decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _BadHeader(f"header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise _BadHeader("header is not a JSON object")
    header.pop("__metadata__", None)
    start = 8 + length
    entries = {name: _parse_entry(name, value, start, size) for name, value in header.items()}
    # The format leaves no byte unowned, so an overlap, a gap and a wrong size all show as a break in the chain.
    end, before = start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if entry.begin != end:
            fault = "overlaps" if entry.begin < end else f"leaves {entry.begin - end} bytes unused after"
            raise _BadHeader(f"tensor {name!r} {fault} {before}")
        end, before = entry.begin + entry.nbytes, repr(name)
    if end != size:
        raise _BadHeader(f"{size - end} bytes after the last tensor belong to none")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _parse_entry(name: str, value: Any, start: int, size: int) -> _Entry:
    try:
        code, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _BadHeader(f"tensor {name!r} lacks dtype, shape or two data_offsets") from error
    dtype = _DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise _BadHeader(f"tensor {name!r} has unknown dtype {code!r}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in [*shape, begin, end]):
        raise _BadHeader(f"tensor {name!r} has shape {shape!r} and offsets [{begin!r}, {end!r}]")
    # Zero-sized axes do not excuse the others: numpy must be able to hold the shape.
    if len(shape) > _MAX_RANK or math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 2**63:
        raise _BadHeader(f"tensor {name!r} has an impossible shape {shape!r}")
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise _BadHeader(f"tensor {name!r} of {nbytes} bytes has offsets [{begin}, {end}]")
    if start + end > size:
        raise _BadHeader(f"truncated: tensor {name!r} ends at byte {start + end} of {size}")
    return _Entry(dtype, tuple(shape), start + begin, nbytes)
