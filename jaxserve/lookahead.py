"""How many decode steps one launch takes: as many as the pages that are there are enough for. No jax."""

from collections.abc import Sequence


def num_steps(starts: Sequence[int], left: Sequence[int], held: Sequence[int], most: int, free: int, size: int) -> int:
    """The steps of a launch, 1 to `most`: until all its sequences have ended, if `free` pages of `size` tokens last.

    By sequence: `starts` is its next position, `left` the tokens that it may still get, `held` the number of its pages,
    which are enough for one step. To end earlier where many of them do gained nothing to speak of (BENCHMARKS.md): a
    step that takes prompts in costs several others.
    """

    def needed(steps: int) -> int:
        return sum(
            max(0, -(-(start + min(steps, tokens)) // size) - pages)
            for start, tokens, pages in zip(starts, left, held, strict=True)
        )

    steps = min(most, max(left))
    while steps > 1 and needed(steps) > free:
        steps -= 1
    return steps
