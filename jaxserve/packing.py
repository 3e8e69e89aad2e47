"""In which order offline prompts are sent: those that begin alike together, of the rest the longest answers first."""

from collections.abc import Sequence
from itertools import groupby


def packed(prompts: Sequence[Sequence[int]], max_tokens: Sequence[int | None], page_size: int) -> list[int]:
    """The places of the prompts in the order to send them.

    Prompts with a common first page follow each other in the order of their tokens, and find each other's pages in the
    prefix cache. Such groups go by their longest answer, None the longest of all: short ones at the end leave less of a
    batch empty, and those that run together end together.
    """

    def first_page(i: int) -> tuple[int, ...]:
        return tuple(prompts[i][:page_size])

    def longest(group: list[int]) -> float:
        return max(float("inf") if (most := max_tokens[i]) is None else most for i in group)

    in_order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
    groups = [list(group) for _, group in groupby(in_order, first_page)]
    return [i for group in sorted(groups, key=longest, reverse=True) for i in group]
