"""The layouts of a KV cache, one turned into the other: rows as the contract has them, groups as the C++ kernel may."""

import numpy as np

GROUP = 16


def kept_by(body: str, cache: np.ndarray, kv_heads: int) -> np.ndarray:
    """Rows [P, page, K * 2 * H], as `body` keeps them."""
    if body != "cpu" or cache.shape[1] % GROUP:
        return cache
    x = cache.reshape(-1, GROUP, kv_heads, 2, cache.shape[2] // kv_heads // 2)  # [groups, 16, K, 2, H]
    keys, values = (
        x[:, :, :, 0].transpose(0, 2, 3, 1),
        x[:, :, :, 1].transpose(0, 2, 1, 3),
    )  # [.., K, H, 16] and [.., 16, H]
    both = [a.reshape(len(x), kv_heads, -1) for a in (keys, values)]
    return np.concatenate(both, axis=-1).reshape(cache.shape)


def rows_of(body: str, cache: np.ndarray, kv_heads: int) -> np.ndarray:
    """The same back."""
    if body != "cpu" or cache.shape[1] % GROUP:
        return cache
    head_dim = cache.shape[2] // kv_heads // 2
    x = cache.reshape(-1, kv_heads, 2, GROUP * head_dim)
    keys = x[:, :, 0].reshape(-1, kv_heads, head_dim, GROUP).transpose(0, 3, 1, 2)  # [groups, 16, K, H]
    values = x[:, :, 1].reshape(-1, kv_heads, GROUP, head_dim).transpose(0, 2, 1, 3)
    return np.stack([keys, values], axis=3).reshape(cache.shape)
