"""How fast steps could be at best: the bytes a device must read and the operations it must do, over what it can.

A step takes at least max(bytes / bandwidth, operations / peak). That leaves out the messages between devices, what the
host does, the sampling, and how far programs are from either bound; a mixture's experts are taken to be chosen evenly,
and only those that are chosen to be read.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import msgspec

from jaxserve.page_groups import PageGroups, longest, tokens_kept
from jaxserve.planning.chips import Chip
from jaxserve.scaled import leaves_of
from jaxserve.sharding import Partition, bytes_per_device
from jaxserve.spec import Model, Params, ParamSpec

FORMULA = (
    "step = max(bytes / bandwidth, operations / peak) of a device; tokens/s = tokens of the step * replicas / step"
)
LEFT_OUT = "left out: messages between devices, the host, sampling, and how far programs stay below these bounds"


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A step at its best. Bytes and operations are those of one device."""

    users: int
    """Sequences that are being decoded in all replicas; for a prefill those whose prompts are taken in at once."""
    context: int
    """Tokens of each that are in the KV cache."""
    bytes: int
    flops: int
    seconds: float
    tokens_per_second: float
    """Of all replicas together."""
    bound: Literal["bandwidth", "compute"]


@dataclass(frozen=True)
class Work:
    """What a device reads and computes of a model that is divided over several."""

    fixed: int
    """Bytes of weights that every step reads."""
    experts: int
    """Bytes of all experts' weights."""
    chosen: float
    """The share of the experts that a token goes through."""
    per_token: float
    """Operations of a token, but for attention and logits."""
    per_row: float
    """Operations of a row of logits."""
    kv_row: float
    """Bytes that a token has in the KV cache of one group of layers."""
    attention: float
    """Operations of a query for each key that it meets in one layer."""
    windows: tuple[int | None, ...]
    """Of each group of layers."""
    layer_windows: tuple[int | None, ...]
    """Of each layer."""
    causal: bool

    @classmethod
    def of(
        cls,
        model: Model,
        config: Any,
        partition: Partition,
        dtype: Any,
        params: Params,
        groups: PageGroups,
        kv_row: float,
    ) -> "Work":
        """Of a model on a partition, computed in `dtype`; `params` are its weights, or their shapes, some of which may
        be quantised, and `kv_row` as below."""
        fixed = experts = expert_numbers = per_token = per_row = 0
        named = jax.tree_util.tree_leaves_with_path(model.param_specs(config))
        last = {_name(path) for path, _ in named}
        for (path, spec), stored in zip(named, leaves_of(params), strict=True):
            nbytes = bytes_per_device(stored)
            leaf = partition.leaf(spec, dtype)
            cut = math.prod(leaf.sharding.shard_shape(leaf.shape) if partition.mesh.size > 1 else leaf.shape)
            name = _name(path)
            if name == "embed" and "unembed" in last:  # a row of it is looked up
                continue
            if _one_of_experts(spec):
                experts += nbytes
                expert_numbers += cut
            else:
                fixed += nbytes
                if name in ("embed", "unembed"):
                    per_row += 2 * cut
                elif spec.matrix or len(spec.shape) > 2:  # or a matrix a head
                    per_token += 2 * cut
        values = getattr(config, "value_dim", None) or config.head_dim
        count = getattr(config, "experts", 1)
        chosen = getattr(config, "experts_used", count) / count
        return cls(
            fixed=fixed,
            experts=experts,
            chosen=chosen,
            per_token=per_token + 2 * expert_numbers * chosen,
            per_row=per_row,
            kv_row=kv_row,
            attention=2 * partition.config.heads * (config.head_dim + values) / partition.mesh.size,
            windows=groups.windows,
            layer_windows=tuple(getattr(config, "windows", ())) or (None,) * config.layers,
            causal=model.causal,
        )

    def read(self, tokens: int) -> float:
        """Bytes of weights that a step of so many tokens reads."""
        return self.fixed + self.experts * (1 - (1 - self.chosen) ** tokens)

    def met(self, first: int, count: int) -> float:
        """Operations of attention of `count` tokens that follow `first` others."""
        total = 0
        for window in self.layer_windows:
            if not self.causal:
                total += count * (first + count)
                continue
            growing = min(max((window or first + count) - first, 0), count)  # tokens that see all before them
            total += growing * first + growing * (growing + 1) // 2 + (count - growing) * (window or 0)
        return self.attention * total

    def decode(self, chip: Chip, peak: float, users: int, replicas: int, context: int) -> Estimate:
        """A step of one token a user, each with `context` tokens before it, by the replica that has most of them."""
        mine = -(-users // replicas)
        kv = mine * tokens_kept(self.windows, context) * self.kv_row
        flops = mine * (self.per_token + self.per_row + self.met(context, 1))
        return _bounded(chip, peak, self.read(mine) + kv, flops, users, users=users, context=context)

    def prefill(self, chip: Chip, peak: float, tokens: int, replicas: int) -> Estimate:
        """A step that takes in `tokens` tokens of one new prompt, in each replica."""
        kv = tokens_kept(self.windows, tokens) * self.kv_row
        flops = tokens * self.per_token + self.per_row + self.met(0, tokens)
        return _bounded(chip, peak, self.read(tokens) + kv, flops, tokens * replicas, users=replicas, context=tokens)


def fitting_context(groups: PageGroups, pages: int, page: int, users: int, wanted: int) -> int:
    """Tokens that each of so many users of a replica can have in the KV cache, up to `wanted`; 0 if not even one."""
    return longest(groups.windows, pages // users, page, wanted)


def _bounded(
    chip: Chip, peak: float, nbytes: float, flops: float, tokens: int, *, users: int, context: int
) -> Estimate:
    reading, computing = nbytes / chip.bandwidth, flops / peak
    seconds = max(reading, computing)
    return Estimate(
        users=users,
        context=context,
        bytes=round(nbytes),
        flops=round(flops),
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        bound="bandwidth" if reading >= computing else "compute",
    )


def _one_of_experts(spec: ParamSpec) -> bool:
    return spec.spread and spec.axes[0] == "experts"


def _name(path: Any) -> str:
    """The last name on a leaf's way from the root."""
    return next((key.key for key in reversed(path) if isinstance(key, jax.tree_util.DictKey)), "")
