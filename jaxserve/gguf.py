"""Reads GGUF files, single or split, through memory maps; knows the container and nothing of models or tokenizers."""

import math
import mmap
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.formats import BY_CODE, FORMATS, KNOWN_NAMES, Format
from jaxserve.host_memory import drop_pages

MAGIC = b"GGUF"
VERSIONS = (2, 3)

_ALIGNMENT = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 2**20
_MAX_DEPTH = 4  # of arrays in arrays; files in the wild have none
_MAX_RANK = 4
_SHOWN = 5

_OTHER_KINDS = ("model.safetensors", "model.safetensors.index.json", "params")  # the last is Orbax's
SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE | re.DOTALL)

# The types of metadata values: uint8 to float64, without bool, str and array, which have rules of their own.
_NUMBERS: dict[int, np.dtype] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
# What one element takes at the least, so that a count can be held against the bytes that are left.
_LEAST = {kind: dtype.itemsize for kind, dtype in _NUMBERS.items()} | {_BOOL: 1, _STRING: 8, _ARRAY: 12}
_SCALARS = {kind: struct.Struct("<" + dtype.char) for kind, dtype in _NUMBERS.items() if dtype.itemsize < 8}
_SCALARS |= {_BOOL: struct.Struct("<?"), 10: struct.Struct("<Q"), 11: struct.Struct("<q"), 12: struct.Struct("<d")}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_LEAST_ENTRY = 8 + 4 + 1  # key, type, value
_LEAST_TENSOR = 8 + 4 + 8 + 4 + 8  # name, rank, one dimension, type, offset


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor is and how its numbers are packed."""

    format: Format
    shape: tuple[int, ...]
    """In numpy's order, the reverse of the file's: outputs first, the packed rows last."""
    file: Path
    offset: int
    """First byte of the tensor, counted from the start of `file`."""
    nbytes: int


@dataclass(frozen=True)
class _Strings:
    """An array of strings that has been checked, but for what the strings are."""

    data: mmap.mmap
    at: int
    count: int

    def decoded(self) -> list[str]:
        data, at, unpack, found = self.data, self.at, _U64.unpack_from, []
        for _ in range(self.count):  # a hundred thousand of a vocabulary: no more calls than it takes
            end = at + 8 + unpack(data, at)[0]
            found.append(data[at + 8 : end].decode("utf-8", "surrogateescape"))
            at = end
        return found


class Metadata(Mapping[str, Any]):
    """The values of a file by key.

    An array of strings is decoded when it is first asked for, which an engine never does: a large vocabulary takes a
    tenth of a second and tens of megabytes.
    """

    def __init__(self, values: dict[str, Any]):
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, _Strings):
            value = self._values[key] = value.decoded()
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values


class GgufFile:
    """One file or the files of a split: headers are read and checked at once, tensors only when asked for.

    `metadata` maps keys to Python scalars and str; arrays of strings are lists of str, arrays of numbers are numpy
    arrays, arrays of arrays are lists. Bytes that are not UTF-8 stand in values as lone surrogates, as Python's
    "surrogateescape" puts them. `tensors` keeps the files' order.
    """

    def __init__(self, path: Path):
        """`path` is the file, or the first of a split. Raises CheckpointError naming file, byte and key or tensor."""
        self.path = path
        first = _read(path)
        self.version = first.version
        self.metadata = first.metadata
        shards = [first, *_others(first)]
        self.files = tuple(shard.path for shard in shards)
        self._maps = {shard.path: shard.map for shard in shards}
        self.tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            for name, info in shard.tensors.items():
                if name in self.tensors:
                    other = self.tensors[name].file.name
                    raise CheckpointError(f"{shard.path}: tensor {name!r} is in {other} too")
                self.tensors[name] = info
        wanted = first.metadata.get("split.tensors.count")
        if len(shards) > 1 and wanted is not None and wanted != len(self.tensors):
            raise CheckpointError(f"{path}: split.tensors.count is {wanted}, the shards hold {len(self.tensors)}")

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor as uint8 [rows, row_bytes], a read-only view of the map; a vector is one row."""
        info = self.tensors[name]
        data = np.frombuffer(self._maps[info.file], np.uint8, info.nbytes, info.offset)
        return data.reshape(math.prod(info.shape[:-1]), -1)

    def release(self, name: str, part: tuple[int, int] = (0, 1)) -> None:
        """Lets go of what memory holds of a tensor, or of one of so many equal parts of it."""
        info, (i, count) = self.tensors[name], part
        drop_pages(self._maps[info.file], info.offset + i * info.nbytes // count, info.nbytes // count)


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a model path means: a file itself, or the only one, or only split, in a directory.

    A file counts by its name or its first bytes, a directory where it holds no weights of another kind. None where
    there is none. Raises ConfigError where there are several.
    """
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" or _begins(path) == MAGIC else None
    if not path.is_dir() or any((path / other).exists() for other in _OTHER_KINDS):
        return None
    # One of a split, the first where it is there, stands for all.
    found: dict[object, Path] = {}
    for file in sorted(p for p in path.iterdir() if p.suffix.lower() == ".gguf" and p.is_file()):
        shard = SHARD.fullmatch(file.name)
        found.setdefault((shard["stem"], shard["count"]) if shard else file.name, file)
    if len(found) > 1:
        names = [file.name for file in found.values()]
        raise ConfigError(f"{path} holds {len(names)} GGUF models; name one of them: {_listed(names)}")
    return next(iter(found.values()), None)


def _begins(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


@dataclass(frozen=True)
class _Shard:
    path: Path
    map: mmap.mmap
    version: int
    metadata: Metadata
    tensors: dict[str, TensorInfo]


class _BadFile(Exception):
    pass


def _read(path: Path) -> _Shard:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            _check_start(file.read(24), size)
            # The map keeps its own handle on the file.
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _parse(path, data)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except _BadFile as error:
        raise CheckpointError(f"{path}: {error}") from error


def _others(first: _Shard) -> list[_Shard]:
    """The shards after the first. Raises CheckpointError naming every one that is missing."""
    path = first.path
    count, number = _whole(first, "split.count", 1), _whole(first, "split.no", 0)
    if count <= 1:
        return []
    name = SHARD.fullmatch(path.name)
    if name is None or (int(name["number"]), int(name["count"])) != (number + 1, count):
        raise CheckpointError(
            f"{path}: shard {number + 1} of {count} by its metadata, so its name must end in "
            f"-{number + 1:05d}-of-{count:05d}.gguf for the others to be found"
        )
    paths = [path.with_name(f"{name['stem']}-{i + 1:05d}-of-{count:05d}{path.suffix}") for i in range(count)]
    if missing := [p.name for p in paths if not p.is_file()]:
        raise CheckpointError(f"{path}: of its {count} shards are missing: {_listed(missing)}")
    if number:
        raise CheckpointError(f"{path}: shard {number + 1} of {count}; name the first, {paths[0].name}")
    shards = [_read(p) for p in paths[1:]]
    for i, shard in enumerate(shards, start=1):
        found = _whole(shard, "split.no", 0), _whole(shard, "split.count", 1)
        if found != (i, count):
            raise CheckpointError(f"{shard.path}: split.no {found[0]} of {found[1]} where {i} of {count} belongs")
    return shards


def _whole(shard: _Shard, key: str, default: int) -> int:
    value = shard.metadata.get(key, default)
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{shard.path}: {key} is {value!r}, not a count")
    return value


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _check_start(start: bytes, size: int) -> None:
    """Raises _BadFile unless a file of `size` bytes that begins with these 24 is a GGUF of a version that is read."""
    if not start:
        raise _BadFile("the file is empty")
    if start.startswith(b"version https://git-lfs"):
        raise _BadFile("a Git LFS pointer, not the weights; run `git lfs pull` in that directory")
    if start[:4] != MAGIC:
        raise _BadFile(f"not a GGUF file: it begins with {start[:4]!r}, not {MAGIC!r}")
    if len(start) < 24:
        raise _BadFile(f"truncated: {size} bytes, a GGUF header needs 24")
    version = _U32.unpack_from(start, 4)[0]
    if version & 0xFFFF == 0:
        raise _BadFile("a big-endian GGUF file; this version reads little-endian ones, as all common models are")
    if version not in VERSIONS:
        older = "; convert the model again with a newer converter" if version < min(VERSIONS) else ""
        raise _BadFile(f"GGUF version {version}; read are versions {' and '.join(map(str, VERSIONS))}{older}")


class _Cursor:
    """Takes values off a map from front to back; every length is held against what is left before it is used."""

    def __init__(self, data: mmap.mmap, at: int):
        self.data, self.size, self.at = data, len(data), at

    def need(self, nbytes: int, what: str) -> None:
        if nbytes > self.size - self.at:
            raise _BadFile(
                f"truncated or damaged: {what} at byte {self.at} needs {nbytes} bytes, "
                f"so {self.at + nbytes} in all, and the file has {self.size}"
            )

    def one(self, kind: struct.Struct, what: str) -> Any:
        self.need(kind.size, what)
        (value,) = kind.unpack_from(self.data, self.at)
        self.at += kind.size
        return value

    def name(self, what: str) -> str:
        """A string that must be UTF-8."""
        begin, raw = self.at, self.bytes(what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise _BadFile(f"{what} at byte {begin} is not UTF-8: {raw[:64]!r}") from error

    def bytes(self, what: str) -> bytes:
        length = self.one(_U64, what)
        self.need(length, what)
        self.at += length
        return self.data[self.at - length : self.at]

    def strings(self, count: int, what: str) -> _Strings:
        data, begin, size, unpack = self.data, self.at, self.size, _U64.unpack_from
        at = begin
        for i in range(count):  # no more calls than it takes here, too
            end = at + 8
            if end <= size:
                end += unpack(data, at)[0]
            if end > size:
                self.at = at
                self.need(end - at, f"{what}, element {i} of {count},")
            at = end
        self.at = at
        return _Strings(data, begin, count)

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.one(_SCALARS[kind], what)
        if kind == _STRING:
            return self.bytes(what).decode("utf-8", "surrogateescape")
        if kind != _ARRAY:
            raise _BadFile(f"{what} at byte {self.at} has unknown type {kind}")
        begin = self.at
        if depth == _MAX_DEPTH:
            raise _BadFile(f"{what} at byte {begin}: arrays in arrays more than {_MAX_DEPTH} deep")
        of, count = self.one(_U32, what), self.one(_U64, what)
        if of not in _LEAST:
            raise _BadFile(f"{what} at byte {begin} is an array of unknown type {of}")
        self.need(count * _LEAST[of], f"{what}, an array of {count},")
        if of == _STRING:
            strings = self.strings(count, what)
            return strings.decoded() if depth else strings
        if of == _ARRAY:
            return [self.value(_ARRAY, what, depth + 1) for _ in range(count)]
        dtype = _NUMBERS.get(of, np.dtype(np.uint8))
        numbers = np.frombuffer(self.data, dtype, count, self.at).copy() if count else np.empty(0, dtype)
        self.at += count * dtype.itemsize
        return numbers != 0 if of == _BOOL else numbers


def _parse(path: Path, data: mmap.mmap) -> _Shard:
    cursor = _Cursor(data, 4)
    version, tensor_count, entry_count = (cursor.one(kind, "the header") for kind in (_U32, _U64, _U64))
    cursor.need(entry_count * _LEAST_ENTRY, f"the metadata, {entry_count} entries,")
    values: dict[str, Any] = {}
    for i in range(entry_count):
        begin = cursor.at
        key = cursor.name(f"key {i} of the metadata")
        if key in values:
            raise _BadFile(f"key {key!r} at byte {begin} occurs twice")
        kind = cursor.one(_U32, repr(key))
        values[key] = cursor.value(kind, repr(key))
    metadata = Metadata(values)
    alignment = metadata.get(_ALIGNMENT, _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise _BadFile(f"{_ALIGNMENT} is {alignment!r}, not a power of two from 8 to {_MAX_ALIGNMENT}")
    cursor.need(tensor_count * _LEAST_TENSOR, f"the list of tensors, {tensor_count} entries,")
    listed: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for i in range(tensor_count):
        begin = cursor.at
        name = cursor.name(f"name {i} of the tensors")
        if name in listed:
            raise _BadFile(f"tensor {name!r} at byte {begin} occurs twice")
        listed[name] = _tensor(cursor, name)
    _check_types((name, code) for name, (code, _, _) in listed.items())
    start = -(-cursor.at // alignment) * alignment
    tensors = {name: _place(path, name, *entry, start, alignment) for name, entry in listed.items()}
    _check_places(tensors, len(data))
    return _Shard(path, data, version, metadata, tensors)


def _tensor(cursor: _Cursor, name: str) -> tuple[int, tuple[int, ...], int]:
    """The type code, the shape in numpy's order, and the offset among the data, of one entry after its name."""
    what = f"tensor {name!r}"
    rank = cursor.one(_U32, what)
    if not 1 <= rank <= _MAX_RANK:
        raise _BadFile(f"{what} at byte {cursor.at - 4} has {rank} dimensions; the format allows 1 to {_MAX_RANK}")
    dims = [cursor.one(_U64, what) for _ in range(rank)]
    if min(dims) == 0 or math.prod(dims) >= 2**63:
        raise _BadFile(f"{what} at byte {cursor.at - 8 * rank} has impossible dimensions {dims}")
    code, offset = cursor.one(_U32, what), cursor.one(_U64, what)
    return code, tuple(reversed(dims)), offset


def _check_types(types: Iterable[tuple[str, int]]) -> None:
    """Raises _BadFile naming every type that is not computed, with the first tensor that has it."""
    others: dict[int, list[str]] = {}
    for name, code in types:
        if code not in BY_CODE:
            others.setdefault(code, []).append(name)
    if others:
        told = "; ".join(
            f"tensor {names[0]!r}{f' and {len(names) - 1} more' if names[1:] else ''} of type "
            f"{KNOWN_NAMES.get(code, f'number {code}, which is not known')}"
            for code, names in others.items()
        )
        raise _BadFile(f"{told}; take a file of the model in one of the types that are served: {', '.join(FORMATS)}")


def _place(
    path: Path, name: str, code: int, shape: tuple[int, ...], offset: int, start: int, alignment: int
) -> TensorInfo:
    kind = BY_CODE[code]
    try:
        nbytes = math.prod(shape[:-1]) * kind.row_bytes(shape[-1])
    except ValueError as error:
        raise _BadFile(f"tensor {name!r} of shape {list(shape)}: {error}") from error
    if offset % alignment:
        raise _BadFile(f"tensor {name!r} has offset {offset}, which {_ALIGNMENT} {alignment} does not divide")
    return TensorInfo(kind, shape, path, start + offset, nbytes)


def _check_places(tensors: dict[str, TensorInfo], size: int) -> None:
    """Raises _BadFile unless all tensors lie inside the file and none on another."""
    ends = {name: info.offset + info.nbytes for name, info in tensors.items()}
    if tensors and (needed := max(ends.values())) > size:
        cut = [name for name, end in ends.items() if end > size]
        raise _BadFile(f"truncated: {size} bytes, {needed} are needed; incomplete or missing: {_listed(cut)}")
    end, before = 0, ""
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
        if info.offset < end:
            raise _BadFile(f"tensor {name!r} at byte {info.offset} overlaps {before!r}, which ends at byte {end}")
        end, before = ends[name], name
