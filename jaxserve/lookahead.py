"""How many decode steps one launch takes, from what its sequences have left and the pages there are. No jax."""

from collections.abc import Sequence

LAUNCH_STEPS = 1.0
"""What a launch costs besides its steps, in steps: the host's part, and the step that waits for a commit before a slot
that has become free is filled."""


def most_per_step(left: Sequence[int], most: int) -> int:
    """The number of steps, 1 to `most`, in which sequences with `left` tokens to go get most tokens for the time.

    A sequence that has ended keeps its place in the batch, empty, until the launch has.
    """
    ends = [0] * (most + 1)
    for tokens in left:
        ends[min(tokens, most)] += 1
    best, best_rate = 1, 0.0
    live, said = len(left), 0
    for steps in range(1, most + 1):
        said += live
        live -= ends[steps]
        rate = said / (steps + LAUNCH_STEPS)
        if rate > best_rate:
            best, best_rate = steps, rate
    return best


def fitting(starts: Sequence[int], left: Sequence[int], held: Sequence[int], steps: int, free: int, size: int) -> int:
    """As many of `steps` as `free` pages of `size` tokens are enough for, at least one, which has its page.

    By sequence: `starts` is its next position, `left` as above, `held` the number of its pages.
    """

    def needed(steps: int) -> int:
        return sum(
            max(0, -(-(start + min(steps, most)) // size) - pages)
            for start, most, pages in zip(starts, left, held, strict=True)
        )

    while steps > 1 and needed(steps) > free:
        steps -= 1
    return steps
