"""Writes GGUF files, version 3, one tensor after the other; knows the container and nothing of models."""

import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.formats import Format
from jaxserve.gguf import MAGIC

_VERSION = 3
_ALIGNMENT = 32
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64, _I64, _F64 = 4, 5, 6, 7, 8, 9, 10, 11, 12
_NUMBERS = {
    np.dtype(dtype): code
    for dtype, code in {
        "u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": _U32, "i4": _I32, "f4": _F32, "?": _BOOL, "u8": _U64, "i8": _I64,
        "f8": _F64,
    }.items()
}  # fmt: skip


@dataclass(frozen=True)
class TensorToWrite:
    """One tensor of a file that is to be."""

    name: str
    format: Format
    shape: tuple[int, ...]
    """In numpy's order; the last axis is the packed one."""
    rows: Callable[[], Iterable[np.ndarray]]
    """Gives the bytes, uint8 [some rows, row_bytes], from the first row to the last; called when their turn comes."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.format.row_bytes(self.shape[-1])


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[TensorToWrite],
    *,
    progress: Callable[[int, str], None] | None = None,
) -> None:
    """Writes a file that takes its name only when it is complete and on the disk.

    `metadata` keeps its order. Its values are Python scalars, str, numpy arrays, lists of str and lists of those; a
    whole number is stored as uint32 where it fits, as int32 below 0, a float as float32 where that can hold it.
    `progress(bytes of tensors written, name)` is called as the file grows. Raises ConfigError if `path` is taken, or
    `path`.tmp, ValueError for metadata that has no type and for rows that do not add up to their tensor.
    """
    if path.exists():
        raise ConfigError(f"{path} exists; remove it or name another")
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    head = _head(metadata, tensors, alignment)
    staging = path.with_name(path.name + ".tmp")
    try:
        file = staging.open("xb")
    except FileExistsError as error:
        raise ConfigError(f"{staging} exists: another run is writing it, or one was killed; then remove it") from error
    except OSError as error:
        raise ConfigError(f"{staging} cannot be written: {error.strerror or error}") from error
    try:
        with file:
            file.write(head)
            written = 0
            for tensor in tensors:
                written = _write_tensor(file, tensor, written, progress)
                file.write(bytes(-tensor.nbytes % alignment))
            file.flush()
            os.fsync(file.fileno())
        staging.rename(path)
    finally:
        staging.unlink(missing_ok=True)


def _write_tensor(
    file: BinaryIO, tensor: TensorToWrite, written: int, progress: Callable[[int, str], None] | None
) -> int:
    end = written + tensor.nbytes
    for rows in tensor.rows():
        written += file.write(np.ascontiguousarray(rows).data)
        if progress:
            progress(written, tensor.name)
    if written != end:
        raise ValueError(f"tensor {tensor.name} got {written - end + tensor.nbytes} of its {tensor.nbytes} bytes")
    return written


def _head(metadata: Mapping[str, Any], tensors: Sequence[TensorToWrite], alignment: int) -> bytes:
    """Everything before the first tensor."""
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        try:
            code, content = _value(value)
        except (ValueError, struct.error) as error:
            raise ValueError(f"{key}: {error}") from error
        parts += [_string(key), struct.pack("<I", code), content]
    offset = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        parts += [
            _string(tensor.name),
            struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.format.code, offset),
        ]
        offset += -(-tensor.nbytes // alignment) * alignment
    head = b"".join(parts)
    return head + bytes(-len(head) % alignment)


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> tuple[int, bytes]:
    """Type code and bytes."""
    match value:
        case bool():
            return _BOOL, struct.pack("<?", value)
        case int() if value < 0:
            return (_I32, struct.pack("<i", value)) if value >= -(2**31) else (_I64, struct.pack("<q", value))
        case int():
            return (_U32, struct.pack("<I", value)) if value < 2**32 else (_U64, struct.pack("<Q", value))
        case float():
            with np.errstate(over="ignore"):
                short = float(np.float32(value))
            held = math.isclose(short, value, rel_tol=1e-6)  # neither infinite nor gone
            return (_F32, struct.pack("<f", value)) if held else (_F64, struct.pack("<d", value))
        case str():
            return _STRING, _string(value)
        case np.ndarray():
            return _ARRAY, _array(value)
        case list() if all(isinstance(item, str) for item in value):
            return _ARRAY, struct.pack("<IQ", _STRING, len(value)) + b"".join(map(_string, value))
        case list() if all(isinstance(item, list | np.ndarray) for item in value):
            return _ARRAY, struct.pack("<IQ", _ARRAY, len(value)) + b"".join(_value(item)[1] for item in value)
    raise ValueError(f"a {type(value).__name__} has no type in GGUF: {str(value)[:100]}")


def _array(numbers: np.ndarray) -> bytes:
    kind = numbers.dtype.newbyteorder("=")
    if numbers.ndim != 1 or kind not in _NUMBERS:
        raise ValueError(f"an array {list(numbers.shape)} of {numbers.dtype} has no type in GGUF")
    little = numbers.astype(numbers.dtype.newbyteorder("<"), copy=False)
    return struct.pack("<IQ", _NUMBERS[kind], len(numbers)) + little.tobytes()
