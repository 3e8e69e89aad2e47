"""What more is found in a whole step's compiled program, and what is wrong with it: `Look`s of gates_judged.py.

gates_digest.py has this file in the digest of every step: all are judged again where something here has changed.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from gates_judged import Figures


def of_a_step(
    compiled: Any, large: Iterable[str], *, weights: int, row: int, planned: int, messages: dict[str, int]
) -> Figures:
    """Of a step with so many arrays of weights, a cache of rows of so many numbers, arguments that a plan says to take
    so many bytes on a device, and blocks that may have so many messages between devices of each kind."""
    from jaxserve.planning.steps import collectives

    text = compiled.as_text()
    count, blocks = 0, Counter[str]()
    for found in collectives(text):
        count += found.count
        if found.part == "block":
            blocks[found.kind] += found.count
    copied = weight_copies(text, weights)
    problems = [] if blocks == messages else [f"blocks have {dict(blocks)}; they may have {messages}"]
    problems += [f"copies the cache: {what}" for what in large if re.search(rf"^[^\]]*,{row}\]", what)]
    padding = compiled.memory_analysis().argument_size_in_bytes - planned
    if padding < 0:
        problems.append(f"its arguments take {-padding} bytes less than the {planned} that a plan says")
    return {"messages": count, "weight_copy_bytes": sum(copied.values()), "padding_bytes": padding}, problems


_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<result>.*?) (?P<op>[a-z][\w\-]*)\((?P<operands>[^)]*)"
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_SAME = ("bitcast", "get-tuple-element", "opt-barrier", "optimization-barrier")
"""Operations whose result is their argument's memory."""
_MOVES = ("copy", "copy-start", "transpose", "convert", "concatenate", "pad", "slice", "dynamic-slice", "async-start")
_ON_CHIP = "S(1)"
"""In a layout: the array lies in the chip's own memory, where a weight has to come to be multiplied."""


def weight_copies(hlo: str, weights: int, least: int = 2**16) -> dict[str, int]:
    """The instructions of a compiled program that make another whole array of one of its first `weights` arguments, of
    `least` bytes or more, in the device's main memory, and how many bytes. A fusion does if it takes nothing else."""
    from jaxserve.planning.steps import BYTES

    def size(kind: str, dims: str) -> int:
        return BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)

    known: dict[str, int] = {}  # bytes of each name that is a weight
    copied: dict[str, int] = {}
    for line in hlo[hlo.index("\nENTRY") :].splitlines():
        if not (found := _INSTRUCTION.match(line)) or not (arrays := _ARRAY.findall(found["result"])):
            continue
        kind, dims, layout = arrays[0]
        made, operands = size(kind, dims), re.findall(r"%([\w.\-]+)", found["operands"])
        if found["op"] == "parameter":
            if int(found["operands"]) < weights and made >= least:
                known[found["name"]] = made
            continue
        of = [known[name] for name in operands if name in known]
        if of and found["op"] in _SAME:
            known[found["name"]] = of[0]
        moves = found["op"] in _MOVES or (found["op"] == "fusion" and len(operands) == 1)
        if of and moves and made >= max(of) and _ON_CHIP not in layout:
            copied[found["name"]] = made
    return copied
