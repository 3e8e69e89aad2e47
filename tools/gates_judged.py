"""What a compiler made of a gate's program, and what is wrong with that: of a compiled program and plain facts only.

gates_digest.py has this file in the digest of every gate: all are judged again where something here has changed.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

type Figures = tuple[dict[str, float], list[str]]
"""Figures that are held to limits, by name, and what is wrong besides."""

type Look = Callable[..., Figures]
"""(compiled program, the instructions of it that may copy the cache or a weight, and facts by name) -> what is found"""

BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
# What moves data without computing. A scatter is not among them: the cache's own is done in place.
COPIES = "copy|copy-start|transpose|dynamic-slice|slice|slice-start|concatenate|pad|convert|gather|async-start"


@dataclass
class Found:
    """What the compiler made of a gate's program."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of all cores; other work on the machine adds little to it."""
    program: str = ""
    """The program's digest."""
    same: bool = False
    """It is the one that was compiled before, and was not compiled now: nothing else is found."""
    temp_bytes: int = 0
    code_bytes: int = 0
    bundles: dict[str, int] = field(default_factory=dict)
    """By kernel: all of its instructions."""
    inner: dict[str, list[int]] = field(default_factory=dict)
    """By kernel: its two longest stretches without a branch, which are its computing on whole and on cut kv blocks."""
    registers: dict[str, int] = field(default_factory=dict)
    """By attention kernel for GPU: of each thread."""
    by_machine: list[str] = field(default_factory=list)
    """Kernels of Triton's. Theirs is the ptxas of this machine, so registers, which change with it, have no limit."""
    spills: dict[str, int] = field(default_factory=dict)
    """By kernel: instructions for TPU, bytes of a thread for GPU."""
    others: dict[str, float] = field(default_factory=dict)
    """What else is held to limits, by name."""
    problems: list[str] = field(default_factory=list)

    def limits(self) -> dict[str, float]:
        """The figures that are held to limits, by name."""
        found: dict[str, float] = {"temp_bytes": self.temp_bytes} | self.others
        for kernel in self.bundles:
            found[f"{kernel}.bundles"], found[f"{kernel}.spills"] = self.bundles[kernel], self.spills[kernel]
        for kernel in self.registers:
            found[f"{kernel}.spills"] = self.spills[kernel]
            if kernel not in self.by_machine:
                found[f"{kernel}.registers"] = self.registers[kernel]
        return found


def judged(
    compiled: Any, dump: Path, said: str, cache: int, weights: int, look: Look | None, facts: dict[str, Any]
) -> Found:
    """What is found in a program that updates `cache` bytes in place or, having no cache, may not copy `weights` bytes;
    its compilers have left their listings in `dump` and `said` something. `look` finds more, given the facts; then no
    listing is read."""
    memory = compiled.memory_analysis()
    found = Found(temp_bytes=memory.temp_size_in_bytes, code_bytes=memory.generated_code_size_in_bytes)
    if memory.alias_size_in_bytes < cache:
        found.problems.append(f"{memory.alias_size_in_bytes} bytes are updated in place; the cache has {cache}")
    copied = copies(compiled.as_text(), (weights or cache) // 8)
    if look is not None:
        found.others, problems = look(compiled, copied, **facts)
        found.problems += problems
        return found
    found.problems += [f"copies the {'weight' if weights else 'cache'}: {what}" for what in copied]
    for path in sorted(dump.glob("*-final_bundles.txt")):
        kernel = re.search(r"jaxserve_(\w+)[\w.]*-\d+-final_bundles", path.name)
        if kernel and "schedule-analysis" not in path.name:
            name, listing = kernel[1], path.read_text(errors="replace")
            found.bundles[name], found.inner[name], found.spills[name] = schedule(listing)
    by_mosaic = list(registers("".join(path.read_text() for path in dump.glob("*.ptxas"))))
    by_triton = list(registers(said))
    for kernel, used, spilled in [*by_mosaic, *by_triton]:
        found.registers[kernel], found.spills[kernel] = used, spilled
    found.by_machine = [kernel for kernel, *_ in by_triton]
    return found


def copies(hlo: str, least: int) -> Iterator[str]:
    """The instructions of a compiled program that move `least` bytes or more without computing anything."""
    for text in hlo.splitlines():
        found = re.search(rf"= \(?(\w+)\[([\d,]*)\].* ({COPIES})\(", text)
        if found and BYTES.get(found[1], 4) * math.prod(int(n) for n in found[2].split(",") if n) >= least:
            yield text.strip()[:160]


def schedule(listing: str) -> tuple[int, list[int], int]:
    """Of a kernel's final listing: its bundles, the two longest stretches without a label, and spills to memory."""
    count, stretch, stretches = 0, 0, []
    for text in listing.splitlines():
        bundle = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+((?:[A-Z]{2}\s?)*):", text)
        if bundle:
            if bundle[1].strip():
                stretches.append(stretch)
                stretch = 0
            count, stretch = count + 1, stretch + 1
    longest = sorted([*stretches, stretch], reverse=True)[:2]
    return count, sorted(longest), sum("_spill]" in text for text in listing.splitlines())


def registers(said: str) -> Iterator[tuple[str, int, int]]:
    """(kernel, registers a thread, bytes a thread spills) of our kernels, by what ptxas has `said`."""
    for part in said.split("Compiling entry function ")[1:]:
        kernel = re.match(r"'jaxserve_(attention_\w+?)(_mosaic_gpu_kernel)?'", part)
        spilled = re.search(r"stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        if kernel and spilled and used:  # what warns of spills stands before, among what is said of another kernel
            yield kernel[1], int(used[1]), int(spilled[1]) + int(spilled[2])
