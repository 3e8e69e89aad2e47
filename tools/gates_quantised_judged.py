"""What more is found in the compiled program of a step with quantised weights, and what is wrong with it: a `Look` of
gates_judged.py, in the digest of every gate that has it."""

import re
from collections.abc import Iterable, Iterator
from itertools import permutations
from typing import Any

from gates_judged import Figures
from gates_step_judged import weight_copies


def of_a_quantised_step(
    compiled: Any, large: Iterable[str], *, shapes: list[tuple[int, ...]], products: int, weights: int
) -> Figures:
    """Of a step with quantised matrices of these shapes, which so many products are to be the kernels' of, and so many
    arrays of weights in all."""
    text = compiled.as_text()
    problems = [f"makes a quantised matrix anew: {what}" for what in made_anew(text, set(shapes))]
    kernel = re.compile(r" custom-call\(.*jaxserve_(quantised|grouped)_matmul")
    calls = sum(kernel.search(line) is not None for line in text.splitlines())
    if calls != products:
        problems.append(f"{calls} products call a kernel; of quantised matrices there are {products}")
    return {"weight_copy_bytes": sum(weight_copies(text, weights).values())}, problems


def made_anew(hlo: str, shapes: set[tuple[int, ...]]) -> Iterator[str]:
    """The instructions of a compiled program, those inside its fusions apart, that make an array of floating-point
    numbers of one of the shapes, or of one with its axes in another order."""
    wanted = {order for shape in shapes for order in permutations(shape)}
    for line in hlo[hlo.index("\nENTRY") :].splitlines():
        found = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (?:bf16|f16|f32)\[([\d,]+)\]\S* (?!parameter)", line)
        if found and tuple(map(int, found[1].split(","))) in wanted:
            yield line.strip()[:160]
