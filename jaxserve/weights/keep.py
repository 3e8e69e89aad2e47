"""Which matrices stay quantised on devices without the CPU's kernels, in which form, and how they get there."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxserve import quant
from jaxserve.config import ModelOptions
from jaxserve.errors import ConfigError
from jaxserve.formats import Blocks, Format, dequantise, quantise
from jaxserve.scaled import Scaled, leaves_of
from jaxserve.sharding import Partition
from jaxserve.spec import Params, ParamSpec
from jaxserve.weights import Checkpoint

type Matrix = Callable[[int], np.ndarray | Blocks]
"""A matrix as the checkpoint stores it, by its number in a stack; 0 of one that is in none."""
type Keeper = Callable[[Matrix, ParamSpec], Scaled | jax.Array | None]

SCALED = ("q8_0", "q4_k", "q4_0")
"""What --quantization makes of matrices here: other formats would take more memory than the first."""


def keeper(options: ModelOptions, partition: Partition, dtype: np.dtype) -> Keeper:
    """Puts matrices and stacks of them on the devices of `partition` as the checkpoint stores them, or as the option
    says, quantised; None for those that are to be plain numbers.

    Raises ConfigError for what is quantised for the CPU's kernels only.
    """
    if options.quantization is not None:
        check_scaled(options.quantization)

    def keep(matrix: Matrix, spec: ParamSpec) -> Scaled | jax.Array | None:
        first = matrix(0)
        if options.quantization is None or spec.precise:
            return partition.put_scaled(matrix, spec, dtype) if isinstance(first, Blocks) else None  # type: ignore[arg-type]
        rows, depth = only_plain(first, spec).shape
        format = format_of(None, options, spec, depth, packs=False)
        if format is None:
            return None

        def made(i: int) -> Blocks:
            return Blocks(format, quantise(format, only_plain(matrix(i), spec).astype(np.float32)))

        if partition.mesh.size == 1 or partition.scaled(spec, format, rows, dtype) is not None:
            return partition.put_scaled(made, spec, dtype)
        plain = [dequantise(format, made(i).rows).astype(dtype) for i in range(len(spec.names))]
        return partition.put(plain, spec, dtype)  # the same numbers on every mesh

    return keep


def check_scaled(quantization: str) -> None:
    """Raises ConfigError for a quantisation that is the CPU's kernels' only."""
    if quantization not in SCALED:
        raise ConfigError(
            f"quantization {quantization} needs the CPU and its C++ kernels, and one device of it (see `jaxserve "
            f"doctor`); elsewhere give {', '.join(SCALED)}, which take less memory there"
        )


def only_plain(w: np.ndarray | Blocks, spec: ParamSpec) -> np.ndarray:
    """w. Raises ConfigError for a matrix that is quantised already."""
    if isinstance(w, Blocks):
        raise ConfigError(f"quantization: {spec.name} is {w.format.name} already; leave the option out")
    return w


def format_of(
    checkpoint: Checkpoint | None, options: ModelOptions, spec: ParamSpec, depth: int, *, packs: bool
) -> Format | None:
    """In which a matrix of rows of `depth` is on the devices; None: in none. Without a checkpoint it is a plain one."""
    blocks = None if checkpoint is None else checkpoint.blocks(spec.names[0])
    if blocks is not None or options.quantization is None or spec.precise:
        return None if blocks is None else blocks.format
    vocabulary = spec.axes[0] == "vocab"
    return quant.format_for(_wanted(options.quantization, vocabulary, packs), depth, vocabulary=vocabulary)


def _wanted(quantization: str, vocabulary: bool, packs: bool) -> str:
    """What --quantization makes of a matrix. Where the CPU's kernels are not Q6_K would take more memory than Q8_0."""
    return "Q8_0" if vocabulary and not packs else quantization.upper()


def scaled_leaf(
    checkpoint: Checkpoint | None, options: ModelOptions, partition: Partition, dtype: np.dtype
) -> Callable[[ParamSpec], Any]:
    """The shape of a weight on devices for which there is no packing, and where it lies. Without a checkpoint's tensors
    its matrices are taken to be plain and [outputs, inputs] as `stored_shape` has them."""
    held = checkpoint.names() if checkpoint is not None else ()

    def leaf(spec: ParamSpec) -> Any:
        plain = partition.leaf(spec, dtype)
        if not spec.matrix:
            return plain
        known = spec.names[0] in held
        stored = checkpoint.shape(spec.names[0]) if checkpoint is not None and known else spec.stored_shape
        if len(stored) != 2:
            return plain
        outputs = stored[0] if spec.rows is None else spec.rows[1] - spec.rows[0]
        format = format_of(checkpoint if known else None, options, spec, stored[1], packs=False)
        return (format and partition.scaled(spec, format, outputs, dtype)) or plain

    return leaf


def left_plain(checkpoint: Checkpoint, specs: Sequence[ParamSpec], params: Params, options: ModelOptions) -> int:
    """How many matrices that are quantised in the checkpoint, or should have been, are plain numbers on the devices."""

    def meant(spec: ParamSpec) -> bool:
        if checkpoint.blocks(spec.names[0]) is not None:
            return True
        return options.quantization is not None and spec.matrix and not spec.precise

    found = zip(specs, leaves_of(params), strict=True)
    return sum(len(spec.names) for spec, leaf in found if not isinstance(leaf, Scaled) and meant(spec))
