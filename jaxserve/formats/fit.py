"""Which scales a block gets where its format leaves the choice to whoever writes it.

Of several scales near that of the extremes, each with the least-squares fit to the codes that it gives, the one with
the smallest error is taken. Large weights count for more, as they do in the products.
"""

import numpy as np

from jaxserve.formats.fields import Codebook, Integers, half, half_bytes

_TRIES = 6
"""Scales that are tried for a group: about twice as many."""
_NOTHING = 1e-12
"""A group of smaller numbers is stored as zeros: no scale of float16 comes near it."""


def inverse(d: np.ndarray) -> np.ndarray:
    """1 / d; 0 where that is not a finite number."""
    with np.errstate(divide="ignore"):
        exact = np.float32(1) / d
    return np.where(np.isfinite(exact), exact, np.float32(0))


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("...n,...n->...", a, b)


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), np.float32), where=b != 0)


def extreme(x: np.ndarray) -> np.ndarray:
    """The number of largest magnitude of each row, with its sign: [B, 1]."""
    return np.take_along_axis(x, np.abs(x).argmax(1, keepdims=True), 1)


def _weights(y: np.ndarray) -> np.ndarray:
    """What an error in each of y, [G, n], of the order of 1, counts."""
    return np.abs(y) + np.sqrt(np.mean(np.square(y), 1, keepdims=True))


def symmetric_scales(x: np.ndarray, grid: Integers | Codebook, reach: float) -> np.ndarray:
    """Scales [G] with which numbers of `grid` best give x, [G, n]; the extreme falls by `reach` around its ends."""
    peak = extreme(x)
    peak[np.abs(peak) < _NOTHING] = 0
    y = quotient(x, peak)  # the extreme is now 1
    weights = _weights(y)
    weighted = weights * y
    best = np.zeros(len(x), np.float32)
    scale = np.zeros(len(x), np.float32)

    def try_codes(q: np.ndarray) -> None:
        # The error is what the fit leaves of sum(w * y**2): the larger this quotient, the smaller.
        product = dot(weighted, q)
        fit = quotient(product, dot(weights * q, q))
        better = product * fit > best
        np.copyto(best, product * fit, where=better)
        np.copyto(scale, fit, where=better)

    for ratio in np.linspace(1 - reach, 1 + reach, _TRIES, dtype=np.float32):
        try_codes(grid.nearest(y * (grid.low * ratio)))
    for ratio in np.linspace(1 - reach, 1 + reach, _TRIES // 2, dtype=np.float32):
        try_codes(grid.nearest(y * (grid.high * ratio)))
    try_codes(grid.nearest(y * inverse(scale)[:, None]))
    return scale * peak[:, 0]


def fit_symmetric(
    x: np.ndarray, n: int, grid: Integers | Codebook, reach: float, bound: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Block scale in bytes [B, 2], group scales -bound .. bound - 1, int8 [B, block / n], and codes [B, block]."""
    scales = symmetric_scales(x.reshape(-1, n), grid, reach).reshape(len(x), -1)
    d = half(half_bytes(extreme(scales) / np.float32(-bound)))
    whole = np.clip(np.rint(quotient(scales, d)), -bound, bound - 1)
    codes = grid.codes(x.reshape(*whole.shape, n) * inverse(d * whole)[..., None])
    # The group scales have been rounded: the block's own scale takes the value that is best for them.
    q = (grid.values(codes) * whole[..., None]).reshape(x.shape)
    d *= refit(quotient(x, d), q)
    return half_bytes(d), whole.astype(np.int8), codes.reshape(x.shape)


def refit(y: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The factor [B, 1] that q needs to be nearest to y, both [B, n]; 1 where any will do."""
    weighted = _weights(y) * q
    squares = dot(weighted, q)[:, None]
    return np.where(squares > 0, quotient(dot(weighted, y)[:, None], squares), np.float32(1))


def _affine_scales(x: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """(scale, offset), both [G] and not negative, with which scale * (0 .. top) - offset best gives x, [G, n]."""
    low = np.minimum(x.min(1, keepdims=True), 0)
    span = x.max(1, keepdims=True) - low
    span[span < _NOTHING] = 0
    y = quotient(x - low, span)  # 0 .. 1, of which sums lose no digits to a common offset
    weights = _weights(quotient(x, np.maximum(span, -low)))
    weighted = weights * y
    w, wy = weights.sum(1), weighted.sum(1)
    highest = quotient(-low, span)[:, 0]  # what keeps the offset from being negative
    best, scale, shift = np.zeros((3, len(x)), np.float32)

    def try_codes(q: np.ndarray) -> None:
        np.clip(np.rint(q, out=q), 0, top, out=q)
        wq, wyq = dot(weights, q), dot(weighted, q)
        wqq = dot(weights * q, q)
        c = quotient(wqq * wy - wq * wyq, wqq * w - wq * wq)
        c = np.minimum(c, highest)
        a = np.maximum(quotient(wyq - c * wq, wqq), 0)
        # By how much the weighted squares of y fall when the fit is taken off.
        gain = 2 * (a * wyq + c * wy) - a * a * wqq - 2 * a * c * wq - c * c * w
        better = gain > best
        for kept, new in ((best, gain), (scale, a), (shift, c)):
            np.copyto(kept, new, where=better)

    for steps in top + np.linspace(-1, 1, 2 * _TRIES, dtype=np.float32):
        try_codes(y * steps)
    try_codes((y - shift[:, None]) * inverse(scale)[:, None])
    span, low = span[:, 0], low[:, 0]
    return scale * span, np.maximum(-(low + shift * span), 0)


def fit_affine(
    x: np.ndarray, n: int, top: int, levels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Block scale and offset in bytes [B, 2], those of the groups, uint8 [B, block / n], and codes [B, block]."""
    scales, offsets = (f.reshape(len(x), -1) for f in _affine_scales(x.reshape(-1, n), top))
    parts, wholes = [], []
    for factors in (scales, offsets):
        d = half(half_bytes(factors.max(1, keepdims=True) / np.float32(levels)))
        parts.append(d)
        wholes.append(np.clip(np.rint(quotient(factors, d)), 0, levels))
    d, low = parts
    groups = x.reshape(*scales.shape, n)
    steps = (groups + (low * wholes[1])[..., None]) * inverse(d * wholes[0])[..., None]
    codes = np.clip(np.rint(steps, out=steps), 0, top, out=steps)
    d, low = _refit_pair(groups, codes * wholes[0][..., None], wholes[1], d, low)
    whole = [w.astype(np.uint8) for w in wholes]
    return half_bytes(d), half_bytes(low), *whole, codes.astype(np.uint8).reshape(x.shape)


def _refit_pair(
    groups: np.ndarray, q: np.ndarray, minima: np.ndarray, d: np.ndarray, low: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """d and low, [B, 1], with which d * q - low * minima is nearest to groups, [B, groups, n]; unsure, as given."""
    unit = np.abs(groups).max((1, 2), keepdims=True)
    y = quotient(groups, unit).reshape(len(groups), -1).astype(np.float64)
    a, b = q.reshape(y.shape), np.repeat(minima, groups.shape[2], 1)
    weights = _weights(y)
    aa, ab, bb = dot(weights * a, a), dot(weights * a, b), dot(weights * b, b)
    ya, yb = dot(weights * y, a), dot(weights * y, b)
    with np.errstate(divide="ignore"):
        both = np.stack([ya * bb - yb * ab, ya * ab - yb * aa]) / (aa * bb - ab * ab)
        alone = np.stack([ya / aa, np.zeros_like(ya)])
    fit = np.where(bb > 0, both, alone) * unit[:, 0, 0]
    # Nearly parallel a and b leave the two undetermined; what the search found is near the truth.
    given = np.stack([d[:, 0], low[:, 0]])
    sure = (np.abs(fit - given) <= 0.1 * given).all(0)
    fitted = np.where(sure, fit, given).astype(np.float32)
    return fitted[0, :, None], fitted[1, :, None]
