"""Each kind of accelerator: its memory and speeds by its maker's public figures, and the slices that there are."""

from dataclasses import dataclass
from typing import Literal

from jaxserve.gpu_memory import POOL

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device of a kind."""

    name: str
    platform: Literal["tpu", "gpu", "cpu"]
    memory: int
    """Bytes that programs may have: of a TPU what its compiler grants them, of a GPU what JAX takes in an engine's."""
    bandwidth: float
    """Bytes a second between that memory and the chip."""
    bf16: float
    """Floating-point operations a second of dense products of bfloat16, summed in float32."""
    float32: float
    """The same of float32 arrays at JAX's default precision: one pass of bfloat16 on TPU, TF32 on GPU."""
    int8: float | None
    """Operations a second of dense products of int8; None: there are none."""
    sizes: tuple[str, ...]
    """The slices that can be had, as they are written after the chip's name; of GPUs, how many a host has."""
    host: int
    """Most devices of a host in a slice of several hosts."""
    alone: int
    """Most devices of a slice that is one host."""
    source: str

    @property
    def estimated(self) -> bool:
        """Whether its speeds are known."""
        return self.bandwidth > 0


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_GPUS = ("1", "2", "4", "8")
_TPU_DOCS = "https://cloud.google.com/tpu/docs"
_NVIDIA = "https://www.nvidia.com/en-us/data-center"


def _gpu(name: str, memory: float, bandwidth: float, bf16: float, page: str) -> Chip:
    """By the data sheet of the SXM form; its figures "with sparsity" are halved."""
    usable = int(memory * POOL)
    return Chip(
        name, "gpu", usable, bandwidth, bf16, bf16 / 2, 2 * bf16, _GPUS, host=8, alone=8, source=f"{_NVIDIA}/{page}/"
    )


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", int(15.75 * GIB), 819e9, 197e12, 197e12, 394e12, _FLAT, 4, 8, f"{_TPU_DOCS}/v5e"),
        Chip("v6e", "tpu", int(31.24 * GIB), 1640e9, 918e12, 918e12, 1836e12, _FLAT, 4, 8, f"{_TPU_DOCS}/v6e"),
        Chip("v5p", "tpu", int(95.73 * GIB), 2765e9, 459e12, 459e12, 918e12, _CUBES, 4, 4, f"{_TPU_DOCS}/v5p"),
        _gpu("a100", 80 * GIB, 2039e9, 312e12, "a100"),
        _gpu("h100", 80 * GIB, 3.35e12, 989e12, "h100"),
        _gpu("h200", 141e9, 4.8e12, 989e12, "h200"),
    )
}
"""By name."""


def accepted() -> str:
    """Every topology that there is, in words."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for chip in CHIPS.values():
        kinds.setdefault(chip.sizes, []).append(chip.name)
    each = [f"{', '.join(names)} with :{', :'.join(sizes)}" for sizes, names in kinds.items()]
    return "; ".join([*each, "cpu with how many devices, as cpu:8"])
