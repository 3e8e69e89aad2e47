"""Which layers share the pages of the KV cache, and how many pages a sequence then holds; arithmetic alone.

A page holds some tokens of one group of layers, and all groups have the same number of layers. So every page serves
every group, and memory is where the sequences need it (as in vLLM's hybrid KV cache manager, 2025). A group with a
window keeps of a sequence only the pages that a token to come can see.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

MOST_GROUPS = 8
"""Every group has a page table in every step, and pages of its own to be taken and given up."""
WORTH = 0.9
"""Layers are divided only where a sequence then takes less than this share of the memory."""


@dataclass(frozen=True)
class PageGroups:
    """The layers of a model, divided."""

    windows: tuple[int | None, ...]
    """Of each group how many tokens its layers see, the token itself included; None: all. Those come first."""
    layers: int
    """Layers of each group: so many have their keys and values in one page."""
    places: tuple[tuple[int, int], ...]
    """Of each layer the group, and its number within the group."""

    @classmethod
    def single(cls, layers: int, window: int | None = None) -> "PageGroups":
        """All layers in one group."""
        return cls((window,), layers, tuple((0, i) for i in range(layers)))

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, windows: tuple[int | None, ...], length: int) -> "PageGroups":
        """The groups in which a sequence of `length` tokens takes the least memory; `windows`: of each layer.

        Layers of one window are divided into groups of equal size, the last of which may have places that no layer
        uses. Where that gains too little, all layers are one group, which keeps what any of them sees.
        """
        kinds: dict[int | None, list[int]] = {}
        for layer, window in enumerate(windows):
            kinds.setdefault(window if window is not None and window < length else None, []).append(layer)
        widest = None if None in kinds else max(w for w in kinds if w is not None)
        best = cls.single(len(windows), widest)
        least = (WORTH * len(windows) * (widest or length), 1)
        for size in range(1, max(map(len, kinds.values())) + 1):
            counts = {window: -(-len(of) // size) for window, of in kinds.items()}
            tokens = sum(size * count * (window or length) for window, count in counts.items())
            groups = sum(counts.values())
            if groups <= MOST_GROUPS and (tokens, groups) < least:
                best, least = cls._divided(kinds, size), (tokens, groups)
        return best

    @classmethod
    def _divided(cls, kinds: dict[int | None, list[int]], size: int) -> "PageGroups":
        places: dict[int, tuple[int, int]] = {}
        windows: list[int | None] = []
        for window in sorted(kinds, key=lambda w: (w is not None, w or 0)):
            for i, layer in enumerate(kinds[window]):
                if i % size == 0:
                    windows.append(window)
                places[layer] = (len(windows) - 1, i % size)
        return cls(tuple(windows), size, tuple(places[layer] for layer in sorted(places)))


def first_block(position: int, window: int | None, page_size: int) -> int:
    """The block of `page_size` tokens that holds the first token which the one at `position` sees."""
    return 0 if window is None else max(0, position - window + 1) // page_size


def pages_held(windows: Sequence[int | None], tokens: int, page_size: int) -> int:
    """Pages that a sequence holds at most while it grows to `tokens` token by token; `windows`: of each group."""
    blocks = -(-tokens // page_size)
    return sum(blocks if w is None else min(blocks, (w - 2 + page_size) // page_size + 1) for w in windows)


def longest(windows: Sequence[int | None], pages: int, page_size: int, limit: int) -> int:
    """Tokens of the longest sequence, up to `limit`, that fits so many pages alone."""
    return bisect_right(range(1, limit + 1), pages, key=lambda tokens: pages_held(windows, tokens, page_size))


def tokens_kept(windows: Sequence[int | None], tokens: int) -> int:
    """Tokens that all groups together keep of a sequence of so many."""
    return sum(tokens if w is None else min(tokens, w) for w in windows)


def capacity(windows: Sequence[int | None], pages: int, page_size: int, length: int) -> str:
    """What so many pages hold, in words; `length` is that of the longest sequence."""
    text = f"{pages} pages of {page_size} tokens"
    if not any(windows):
        return f"{text}: {pages * page_size} tokens"
    fitting = pages * length // pages_held(windows, length, page_size)
    short = pages * page_size // len(windows)
    kinds = f"for {len(windows)} groups of layers, of which {sum(w is not None for w in windows)} keep a window"
    return (
        f"{text} {kinds if len(windows) > 1 else 'that keep a window'}: {fitting} tokens in sequences of {length}, "
        f"{short} in short ones"
    )
