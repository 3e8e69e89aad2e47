"""What the GPU benchmark measures and how much of it, and a line of its table; imports JAX only where it is called."""

import math
import time
from dataclasses import dataclass
from typing import Any

REPEATS = 10
"""Each repeats its work so often inside one program, so that launching it does not count."""


@dataclass(frozen=True)
class Scale:
    """How much is measured; a dry run's is small."""

    dry: bool
    users: tuple[int, ...]
    context: int
    """Prompt tokens of a user."""
    answer: int
    prompt: int
    """Tokens of the prompts whose prefill is measured."""
    attention: tuple[tuple[int, int], ...]
    """(sequences, context) of the attention kernel alone."""
    copy_bytes: int
    matrix: int
    """Rows, columns and depth of the matrix product that the peak is measured with."""
    rounds: int


REAL = Scale(
    False, (1, 4, 16, 64, 256), 1024, 256, 4096, ((1, 8192), (4, 8192), (16, 4096), (64, 2048), (256, 1024)), 8 << 30,
    8192, 20,
)  # fmt: skip
DRY = Scale(True, (1, 2), 32, 4, 64, ((2, 70),), 1 << 20, 64, 2)


@dataclass
class Figure:
    """A line of the table. With a target, `value` is a share in percent."""

    name: str
    value: float
    unit: str
    target: str = ""
    """As `> 85` or `< 5`."""

    def line(self) -> str:
        return f"{self.name:<52} {self.value:>12.2f} {self.unit:<8} {self._verdict()}"

    def _verdict(self) -> str:
        if not self.target:
            return ""
        sign, bound = self.target.split()
        met = self.value >= float(bound) if sign == ">" else self.value <= float(bound)
        return f"target {self.target} %: {'met' if met else 'MISSED'}"


def fastest(run: Any, rounds: int) -> float:
    """Seconds of the fastest of some runs, after one that may compile. `run` gives an array to wait for."""
    import jax

    jax.block_until_ready(run())
    best = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, time.perf_counter() - start)
    return best


def check_device(scale: Scale) -> None:
    """Ends the program where it would measure another device."""
    import jax

    if jax.default_backend() != ("cpu" if scale.dry else "gpu"):
        raise SystemExit(f"this is {jax.default_backend()}; the benchmark is for a GPU (--dry-run is for a CPU)")
