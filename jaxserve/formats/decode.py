"""Blocks to float32 rows, and to the codes, scales and minima that they are made of."""

from collections.abc import Callable

import numpy as np

from jaxserve.formats.fields import (
    CHUNK,
    E2M1_DOUBLED,
    E8M0_HALVED,
    IQ4,
    half,
    scaled,
    unpack,
    unpack_q3_scales,
    unpack_scales_and_minima,
)
from jaxserve.formats.table import Blocks, Format

type _Parts = tuple[np.ndarray, np.ndarray] | tuple[np.ndarray, np.ndarray, np.ndarray]


def dequantise(format: Format, raw: np.ndarray) -> np.ndarray:
    """float32 [rows, K] of `raw`, uint8 [rows, row_bytes], in the arithmetic of the format's definition.

    Temporary memory is some MB, whatever the size. Raises ValueError when the bytes are no whole blocks.
    """
    rows, width = raw.shape
    if width % format.nbytes:
        raise ValueError(f"rows of {width} bytes are no whole blocks of {format.name}, which have {format.nbytes}")
    blocks = np.ascontiguousarray(raw).reshape(-1, format.nbytes)
    out = np.empty((len(blocks), format.block), np.float32)
    plain, step = _PLAIN.get(format.name), CHUNK // format.block
    with np.errstate(invalid="ignore", over="ignore"):  # bytes may say that a scale is infinite or NaN
        for i in range(0, len(blocks), step):
            some = blocks[i : i + step]
            out[i : i + step] = plain(some) if plain is not None else scaled(*_DECODERS[format.name](some))
    return out.reshape(rows, width // format.nbytes * format.block)


def parts(blocks: Blocks) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """What a quantised matrix is made of: codes, int8 [N, K], scales and minima, float32 [N, K / G].

    `dequantise` gives scale * code - minimum, computed in float32; minima are None where all are zero. Raises
    ValueError when the bytes are no whole blocks.
    """
    format, (rows, width) = blocks.format, blocks.rows.shape
    if width % format.nbytes:
        raise ValueError(f"rows of {width} bytes are no whole blocks of {format.name}, which have {format.nbytes}")
    raw = np.ascontiguousarray(blocks.rows).reshape(-1, format.nbytes)
    decode, groups = _DECODERS[format.name], format.block // format.group
    codes = np.empty((len(raw), format.block), np.int8)
    scales = np.empty((2, len(raw), groups), np.float32)
    found = 0
    step = CHUNK // format.block
    with np.errstate(invalid="ignore", over="ignore"):
        for i in range(0, len(raw), step):
            codes[i : i + step], *others = decode(raw[i : i + step])
            found = len(others)
            for to, numbers in zip(scales, others, strict=False):
                to[i : i + step] = numbers
    per_row = [a.reshape(rows, -1) for a in (codes, *scales)]
    return per_row[0], per_row[1], per_row[2] if found == 2 else None


# Decoders: blocks, uint8 [B, nbytes], of plain numbers to float32 [B, block], of others to whole numbers [B, block] and
# the scales and, unless they are zero, minima [B, groups] with which they are numbers: scale * code - minimum.


def _decode_f32(b: np.ndarray) -> np.ndarray:
    return b.view("<f4")


def _decode_f16(b: np.ndarray) -> np.ndarray:
    return b.view("<f2").astype(np.float32)


def _decode_bf16(b: np.ndarray) -> np.ndarray:
    return (b.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _decode_q8_0(b: np.ndarray) -> _Parts:
    return b[:, 2:].view(np.int8), half(b[:, :2])


def _decode_q4_0(b: np.ndarray) -> _Parts:
    return unpack(b[:, 2:], 4, 16).view(np.int8) - np.int8(8), half(b[:, :2])


def _decode_q4_1(b: np.ndarray) -> _Parts:
    return unpack(b[:, 4:], 4, 16), half(b[:, :2]), -half(b[:, 2:4])


def _decode_q5_0(b: np.ndarray) -> _Parts:
    codes = unpack(b[:, 6:], 4, 16) | unpack(b[:, 2:6], 1, 1) << 4
    return codes.view(np.int8) - np.int8(16), half(b[:, :2])


def _decode_q5_1(b: np.ndarray) -> _Parts:
    codes = unpack(b[:, 8:], 4, 16) | unpack(b[:, 4:8], 1, 1) << 4
    return codes, half(b[:, :2]), -half(b[:, 2:4])


def _decode_q2_k(b: np.ndarray) -> _Parts:
    scales, minima = b[:, :16] & 15, b[:, :16] >> 4
    return unpack(b[:, 16:80], 2, 32), half(b[:, 80:82]) * scales, half(b[:, 82:84]) * minima


def _decode_q3_k(b: np.ndarray) -> _Parts:
    codes = unpack(b[:, 32:96], 2, 32) | unpack(b[:, :32], 1, 32) << 2
    return codes.view(np.int8) - np.int8(4), half(b[:, 108:110]) * unpack_q3_scales(b[:, 96:108])


def _decode_q4_k(b: np.ndarray) -> _Parts:
    scales, minima = unpack_scales_and_minima(b[:, 4:16])
    return unpack(b[:, 16:], 4, 32), half(b[:, :2]) * scales, half(b[:, 2:4]) * minima


def _decode_q5_k(b: np.ndarray) -> _Parts:
    scales, minima = unpack_scales_and_minima(b[:, 4:16])
    codes = unpack(b[:, 48:], 4, 32) | unpack(b[:, 16:48], 1, 32) << 4
    return codes, half(b[:, :2]) * scales, half(b[:, 2:4]) * minima


def _decode_q6_k(b: np.ndarray) -> _Parts:
    codes = unpack(b[:, :128], 4, 64) | unpack(b[:, 128:192], 2, 32) << 4
    return codes.view(np.int8) - np.int8(32), half(b[:, 208:210]) * b[:, 192:208].view(np.int8)


def _decode_iq4_nl(b: np.ndarray) -> _Parts:
    return IQ4.values(unpack(b[:, 2:], 4, 16)), half(b[:, :2])


def _decode_iq4_xs(b: np.ndarray) -> _Parts:
    scales = (unpack(b[:, 4:8], 4, 1) | unpack(b[:, 2:4], 2, 1) << 4).view(np.int8) - np.int8(32)
    return IQ4.values(unpack(b[:, 8:], 4, 16)), half(b[:, :2]) * scales


def _decode_mxfp4(b: np.ndarray) -> _Parts:
    return E2M1_DOUBLED.values(unpack(b[:, 1:], 4, 16)), E8M0_HALVED[b[:, :1]]


_PLAIN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": _decode_f32,
    "F16": _decode_f16,
    "BF16": _decode_bf16,
}

_DECODERS: dict[str, Callable[[np.ndarray], _Parts]] = {
    "Q8_0": _decode_q8_0,
    "Q4_0": _decode_q4_0,
    "Q4_1": _decode_q4_1,
    "Q5_0": _decode_q5_0,
    "Q5_1": _decode_q5_1,
    "Q2_K": _decode_q2_k,
    "Q3_K": _decode_q3_k,
    "Q4_K": _decode_q4_k,
    "Q5_K": _decode_q5_k,
    "Q6_K": _decode_q6_k,
    "IQ4_NL": _decode_iq4_nl,
    "IQ4_XS": _decode_iq4_xs,
    "MXFP4": _decode_mxfp4,
}
