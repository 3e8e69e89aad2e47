"""A decoder's checkpoint without its output matrix, as embedding models are published, under the names of the whole."""

import numpy as np

from jaxserve.embedding import HEADLESS
from jaxserve.formats import Blocks
from jaxserve.weights import Checkpoint

_PREFIX = "model."
_FIRST, _HEAD = "embed_tokens.weight", "lm_head.weight"
_SUFFIXES = ("Model", "ForCausalLM")


def with_head_names(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint under the names of XForCausalLM, if it is one of transformers with those of XModel; any other as
    it is."""
    names, architectures = checkpoint.names(), checkpoint.config.get("architectures") or []
    theirs = [name for name in architectures if isinstance(name, str) and name.endswith(_SUFFIXES)]
    return _Headless(checkpoint) if theirs and _FIRST in names and _HEAD not in names else checkpoint


def as_stored(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint under the names that are in its files."""
    return checkpoint.whole if isinstance(checkpoint, _Headless) else checkpoint


class _Headless:
    """A Checkpoint. Its config says `headless`, and tied embeddings, so that nobody looks for the output matrix."""

    def __init__(self, whole: Checkpoint):
        self.path = whole.path
        names = [name.removesuffix("Model") for name in whole.config.get("architectures") or []]
        names = [name if name.endswith("ForCausalLM") else f"{name}ForCausalLM" for name in names]
        self.config = whole.config | {"architectures": names, "tie_word_embeddings": True, HEADLESS: True}
        self.whole = whole

    def names(self) -> frozenset[str]:
        return frozenset(_PREFIX + name for name in self.whole.names())

    def shape(self, name: str) -> tuple[int, ...]:
        return self.whole.shape(name.removeprefix(_PREFIX))

    def dtype(self, name: str) -> np.dtype:
        return self.whole.dtype(name.removeprefix(_PREFIX))

    def read(self, name: str) -> np.ndarray:
        return self.whole.read(name.removeprefix(_PREFIX))

    def blocks(self, name: str) -> Blocks | None:
        return self.whole.blocks(name.removeprefix(_PREFIX))

    def release(self, name: str) -> None:
        self.whole.release(name.removeprefix(_PREFIX))

    def nbytes(self, name: str) -> int:
        return self.whole.nbytes(name.removeprefix(_PREFIX))
