"""float32 rows to blocks."""

from collections.abc import Callable

import numpy as np

from jaxserve.formats.fields import (
    CHUNK,
    E2M1_DOUBLED,
    E8M0_HALVED,
    IQ4,
    Integers,
    OutOfRange,
    half,
    half_bytes,
    pack,
    pack_q3_scales,
    pack_scales_and_minima,
    scaled,
)
from jaxserve.formats.fit import dot, extreme, fit_affine, fit_symmetric, inverse, quotient, refit, symmetric_scales
from jaxserve.formats.table import Format


def quantise(format: Format, rows: np.ndarray, *, first: int = 0) -> np.ndarray:
    """uint8 [rows, row_bytes] of `rows`, float32 [rows, K]; temporary memory is some MB.

    Raises ValueError when blocks do not fill a row, and for values that are not finite or beyond the format's range,
    with the row's number, counted from `first`.
    """
    count, k = rows.shape
    nbytes = format.row_bytes(k)
    blocks = np.ascontiguousarray(rows, np.float32).reshape(-1, format.block)
    out = np.empty((len(blocks), format.nbytes), np.uint8)
    encode = _ENCODERS[format.name]
    step = CHUNK // format.block
    for i in range(0, len(blocks), step):
        chunk = blocks[i : i + step]
        finite = np.isfinite(chunk)
        if not finite.all():
            at = i * format.block + int(finite.argmin())
            raise ValueError(f"row {first + at // k} holds {blocks.flat[at]}, which {format.name} cannot store")
        try:
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # a scale shows what was too large
                out[i : i + step] = encode(chunk)
        except OutOfRange as error:
            row = first + (i + error.block) * format.block // k
            raise ValueError(f"row {row} holds numbers too large for {format.name}") from None
    return out.reshape(count, nbytes)


# Encoders: finite float32 [B, block] to blocks, uint8 [B, nbytes]. First the formats whose definition says what the
# codes are: the scale follows from the extremes, the codes are the nearest.


def _encode_f32(x: np.ndarray) -> np.ndarray:
    return x.astype("<f4", copy=False).view(np.uint8)


def _encode_f16(x: np.ndarray) -> np.ndarray:
    return half_bytes(x)


def _encode_bf16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    rounded = bits + 0x7FFF + (bits >> 16 & 1)  # to nearest, ties to even
    infinite = rounded & 0x7F800000 == 0x7F800000
    if infinite.any():
        raise OutOfRange(int(infinite.argmax()))
    return (rounded >> 16).astype("<u2").view(np.uint8)


def _encode_q8_0(x: np.ndarray) -> np.ndarray:
    d = np.abs(x).max(1, keepdims=True) / np.float32(127)
    steps = x * inverse(d)
    whole = np.trunc(steps)
    whole += np.trunc((steps - whole) * 2)  # halves away from zero
    return np.hstack([half_bytes(d), whole.astype(np.int8).view(np.uint8)])


def _signed_codes(x: np.ndarray, bound: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale [B, 1] and codes 0 .. 2 * bound - 1; the extreme has code 0."""
    d = extreme(x) / np.float32(-bound)
    codes = np.trunc(x * inverse(d) + np.float32(bound + 0.5))
    return d, np.minimum(codes, 2 * bound - 1).astype(np.uint8)


def _ranged_codes(x: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale and minimum [B, 1] and codes 0 .. top."""
    low = x.min(1, keepdims=True)
    d = (x.max(1, keepdims=True) - low) / np.float32(top)
    codes = np.trunc((x - low) * inverse(d) + np.float32(0.5))
    return d, low, np.minimum(codes, top).astype(np.uint8)


def _encode_q4_0(x: np.ndarray) -> np.ndarray:
    d, codes = _signed_codes(x, 8)
    return np.hstack([half_bytes(d), pack(codes, 4, 16)])


def _encode_q4_1(x: np.ndarray) -> np.ndarray:
    d, low, codes = _ranged_codes(x, 15)
    return np.hstack([half_bytes(d), half_bytes(low), pack(codes, 4, 16)])


def _encode_q5_0(x: np.ndarray) -> np.ndarray:
    d, codes = _signed_codes(x, 16)
    return np.hstack([half_bytes(d), pack(codes >> 4, 1, 1), pack(codes, 4, 16)])


def _encode_q5_1(x: np.ndarray) -> np.ndarray:
    d, low, codes = _ranged_codes(x, 31)
    return np.hstack([half_bytes(d), half_bytes(low), pack(codes >> 4, 1, 1), pack(codes, 4, 16)])


def _encode_mxfp4(x: np.ndarray) -> np.ndarray:
    # The exponent that puts the largest number into [4, 8) clips what is above 6; the next one never clips and has
    # coarser steps. The smaller error decides.
    _, exponent = np.frexp(np.abs(x).max(1, keepdims=True))

    def at(e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes = E2M1_DOUBLED.codes(np.ldexp(x, 128 - e))
        left = np.float64(x) - scaled(E2M1_DOUBLED.values(codes), E8M0_HALVED[e])
        return codes, dot(left, left)[:, None]

    low = np.clip(exponent + 124, 0, 254)
    high = np.minimum(low + 1, 254)
    (codes, error), (coarse, coarse_error) = at(low), at(high)
    use = coarse_error < error
    return np.hstack([np.where(use, high, low).astype(np.uint8), pack(np.where(use, coarse, codes), 4, 16)])


# Then those that leave the scales to fit.py.


def _encode_q2_k(x: np.ndarray) -> np.ndarray:
    d, low, scales, minima, codes = fit_affine(x, 16, 3, 15)
    return np.hstack([scales | minima << 4, pack(codes, 2, 32), d, low])


def _encode_q3_k(x: np.ndarray) -> np.ndarray:
    d, scales, codes = fit_symmetric(x, 16, Integers(4), 0.25, 32)
    return np.hstack([pack(codes >> 2, 1, 32), pack(codes, 2, 32), pack_q3_scales(scales), d])


def _encode_q4_k(x: np.ndarray) -> np.ndarray:
    d, low, scales, minima, codes = fit_affine(x, 32, 15, 63)
    return np.hstack([d, low, pack_scales_and_minima(scales, minima), pack(codes, 4, 32)])


def _encode_q5_k(x: np.ndarray) -> np.ndarray:
    d, low, scales, minima, codes = fit_affine(x, 32, 31, 63)
    return np.hstack([d, low, pack_scales_and_minima(scales, minima), pack(codes >> 4, 1, 32), pack(codes, 4, 32)])


def _encode_q6_k(x: np.ndarray) -> np.ndarray:
    d, scales, codes = fit_symmetric(x, 16, Integers(32), 0.03, 128)
    return np.hstack([pack(codes, 4, 64), pack(codes >> 4, 2, 32), scales.view(np.uint8), d])


def _encode_iq4_nl(x: np.ndarray) -> np.ndarray:
    d = symmetric_scales(x, IQ4, 0.08)[:, None]
    codes = IQ4.codes(x * inverse(half(half_bytes(d))))
    d *= refit(quotient(x, d), IQ4.values(codes))
    return np.hstack([half_bytes(d), pack(codes, 4, 16)])


def _encode_iq4_xs(x: np.ndarray) -> np.ndarray:
    d, scales, codes = fit_symmetric(x, 32, IQ4, 0.08, 32)
    raised = (scales + np.int8(32)).view(np.uint8)
    return np.hstack([d, pack(raised >> 4, 2, 1), pack(raised, 4, 1), pack(codes, 4, 16)])


_ENCODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": _encode_f32,
    "F16": _encode_f16,
    "BF16": _encode_bf16,
    "Q8_0": _encode_q8_0,
    "Q4_0": _encode_q4_0,
    "Q4_1": _encode_q4_1,
    "Q5_0": _encode_q5_0,
    "Q5_1": _encode_q5_1,
    "Q2_K": _encode_q2_k,
    "Q3_K": _encode_q3_k,
    "Q4_K": _encode_q4_k,
    "Q5_K": _encode_q5_k,
    "Q6_K": _encode_q6_k,
    "IQ4_NL": _encode_iq4_nl,
    "IQ4_XS": _encode_iq4_xs,
    "MXFP4": _encode_mxfp4,
}
