"""From the options and a device's memory to an engine's sizes: context, batch, pages of the KV cache. Arithmetic alone.

What a step needs besides weights and cache is not known before it is compiled: `trial` is compiled, and what that took
is given to `fitted`. Sizes are thus the same for a server that starts and for one that is only planned.
"""

from collections.abc import Callable, Sequence

import jax

from jaxserve import attention, batch
from jaxserve.batch import Shape
from jaxserve.captured import token_bytes
from jaxserve.config import EngineOptions
from jaxserve.errors import ConfigError, NoRoom
from jaxserve.loading import memory_share
from jaxserve.page_groups import longest, pages_held
from jaxserve.request import TapInfo
from jaxserve.sharding import bytes_per_device
from jaxserve.step import Programs, Sizes, slot_shapes

CPU_TOKENS_PER_SEQ = 512
"""The default KV cache on CPU holds this many tokens a sequence: host memory is shared with everything else."""

CPU_STEP_FLOPS = 2e11
"""A step's default work on CPU, a third of a second of two cores. Prompts of a model of 0.6 B weights came at 338, 419
and 455 tokens/s, beside answers, in steps of 64, 128 and 256; in steps of 512 each answer waited for over a second."""

MOST_CAPTURED = 2**28
"""Bytes of inner values that a step may bring back: they wait in the host's memory, several times over, to be read."""


class Sizing:
    """What is known of the sizes before a step is compiled; all bytes are those of one device."""

    def __init__(
        self,
        programs: Programs,
        options: EngineOptions,
        *,
        platform: str,
        kernel: str,
        params: int,
        weights: int,
        memory: int | None,
        taps: Sequence[TapInfo] = (),
        agreed: Callable[[int], int] = lambda pages: pages,
    ):
        """`kernel` is attention's name, `params` the model's number of weights, `weights` their bytes, `memory` those
        of the device; None: it does not say. `taps`: inner values that a step brings back of each token.
        `agreed` makes of the pages that fit here those that fit on every host.

        Raises ConfigError for options that contradict the model or each other.
        """
        self._options, self._programs, self._cpu = options, programs, platform == "cpu"
        self._weights, self._memory, self._agreed = weights, memory, agreed
        self._share = memory_share(options.device, platform)
        wanted, most = options.model.max_model_len, programs.config.max_positions
        if wanted is not None and wanted > most:
            raise ConfigError(f"max_model_len {wanted} exceeds the model's {most} positions")
        self._wanted = wanted or 1
        self.length = length = wanted or most
        """Tokens of the longest sequence, if there is memory for it."""
        self.seqs = seqs = options.schedule.max_num_seqs or (64 if self._cpu else 256)
        whole = 0 if programs.model.causal else length  # a step of an encoder holds prompts whole
        default = max(2 * seqs, _cpu_tokens(params) if self._cpu else 2048, whole)
        tokens = options.schedule.max_num_batched_tokens or default
        values = token_bytes(taps)
        if values and options.schedule.max_num_batched_tokens is None:
            tokens = max(seqs, min(tokens, 1 << (MOST_CAPTURED // values).bit_length() >> 1))
        self.tokens = tokens
        if tokens < seqs:
            raise ConfigError(
                f"max_num_batched_tokens {tokens} is less than max_num_seqs {seqs}: every running sequence needs its "
                "token; raise --max-num-batched-tokens or lower --max-num-seqs"
            )
        if tokens < whole:
            raise ConfigError(
                f"max_num_batched_tokens {tokens} is less than max_model_len {length}: an encoder takes prompts whole; "
                "raise --max-num-batched-tokens or lower --max-model-len"
            )
        least = 1 if self._cpu else 8  # one row is a product of its own on CPU; below 8 no gain elsewhere
        self.shapes = batch.shapes(seqs, tokens, least, singles=programs.pooling is None)
        """Every shape of a step, the smallest first."""
        self.largest: Shape = batch.covering(self.shapes)[0]
        self.captured = self.largest.tokens * values
        """Bytes that what the launch before has captured takes while it is on its way to the host."""
        if self.captured > MOST_CAPTURED:
            raise ConfigError(
                f"capture: {len(taps)} values are {values / 2**10:.1f} KiB a token, in a step of {self.largest.tokens} "
                f"tokens {self.captured / 2**20:.0f} MiB, and {MOST_CAPTURED / 2**20:.0f} MiB may be; capture fewer, "
                "or lower --max-num-batched-tokens and --max-num-seqs"
            )
        self.page = attention.page_size(
            options.device.block_size, kernel, platform, programs.dtype, self.largest.seqs, length
        )
        self.windows = programs.groups.windows
        self.page_bytes = bytes_per_device(programs.state(Sizes(self.page, 1, 1, self.page, 1)).cache)
        self.slots = bytes_per_device(slot_shapes(seqs, length))

    def sizes(self, pages: int) -> Sizes:
        """With so many pages. Raises NoRoom where they do not hold the context that was asked for."""
        fitting = longest(self.windows, pages, self.page, self.length)
        if fitting < self._wanted:
            raise NoRoom(
                f"max_model_len {self._wanted} needs {pages_held(self.windows, self._wanted, self.page)} pages of KV "
                f"cache and {pages} fit; "
                "lower --max-model-len, or raise --memory-utilization or --num-kv-pages"
            )
        steps = 1 if self.captured else self._options.schedule.decode_steps
        return Sizes(fitting, self.seqs, self.tokens, self.page, pages, steps)

    def trial(self) -> Sizes:
        """What to compile `largest` with first. Raises NoRoom for weights that leave no room."""
        pages = self._options.device.num_kv_pages or self._most_pages()
        # Off the CPU a program that cannot fit does not compile: measure with a small cache, then size and compile.
        if not self._cpu and self._options.device.num_kv_pages is None:
            pages = min(pages, pages_held(self.windows, self.length, self.page))
        return self.sizes(pages)

    def fitted(self, workspace: int) -> Sizes:
        """The sizes to serve with, where a step needs `workspace` bytes besides. Raises NoRoom."""
        if (pages := self._options.device.num_kv_pages) is None:
            pages = min(self._most_pages(), self._agreed((self._budget() - workspace) // self.page_bytes))
            if pages < 1:
                raise NoRoom(
                    f"the largest step needs {workspace / 2**30:.2f} GiB of workspace, which leaves no room for the KV "
                    "cache; lower --max-num-batched-tokens or --max-num-seqs"
                )
        return self.sizes(pages)

    def _budget(self) -> int:
        """Bytes for the KV cache and the workspace of a step."""
        if self._memory is None:
            raise ConfigError("the device does not say how much memory it has; give --num-kv-pages")
        return int(self._memory * self._share) - self._weights - self.slots

    def _most_pages(self) -> int:
        pages = self._agreed(self._budget() // self.page_bytes)
        if pages < 1:
            raise NoRoom(
                f"weights of {self._weights / 2**30:.2f} GiB leave no room for the KV cache: {self._share:.0%} of "
                f"{(self._memory or 0) / 2**30:.2f} GiB may be used; raise --memory-utilization"
            )
        if not self._programs.model.causal:  # for two steps: one runs while the next is planned, and nothing stays
            return min(pages, 2 * (-(-self.tokens // self.page) + self.seqs))
        if self._cpu:
            every = len(self.windows) * -(-self.seqs * CPU_TOKENS_PER_SEQ // self.page)
            return min(pages, max(pages_held(self.windows, self.length, self.page), every))
        return pages


def workspace_of(compiled: jax.stages.Compiled) -> int:
    """Bytes a step needs besides its arguments and the state it updates in place."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def _cpu_tokens(params: int) -> int:
    """Tokens of a default step on CPU: 512 of small models, 64 of large ones."""
    return next((n for n in (512, 256, 128) if n * 2 * params <= CPU_STEP_FLOPS), 64)
