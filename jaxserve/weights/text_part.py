"""The text part of a checkpoint that holds a vision tower as well, seen as a checkpoint of its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.formats import Blocks
from jaxserve.weights import Checkpoint


@dataclass(frozen=True)
class _Layout:
    """Where an architecture keeps its text part."""

    text: str
    """The architecture of that part alone, whose config is `text_config`."""
    prefix: str
    others: tuple[str, ...]
    """Prefixes of the tensors that text does not need, which are passed over."""


_LAYOUTS = {
    "Gemma3ForConditionalGeneration": _Layout(
        "Gemma3ForCausalLM", "language_model.", ("vision_tower.", "multi_modal_projector.")
    ),
}


def text_part(checkpoint: Checkpoint) -> Checkpoint:
    """The text part of a checkpoint that has several, any other as it is. Raises ConfigError without a text_config."""
    layout = _layout(checkpoint.config)
    return checkpoint if layout is None else _TextPart(checkpoint, layout)


def text_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The config of that part. Raises ConfigError without a text_config."""
    layout = _layout(config)
    if layout is None:
        return config
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise ConfigError(f"{path}: config.json has no text_config, which tells the sizes of its text part")
    outer = {key: config[key] for key in ("tie_word_embeddings", "quantization_config") if key in config}
    return text | outer | {"architectures": [layout.text]}


def _layout(config: dict[str, Any]) -> _Layout | None:
    return next((_LAYOUTS[name] for name in config.get("architectures") or [] if name in _LAYOUTS), None)


class _TextPart:
    """A Checkpoint. Tensors of no known part keep their names, so that whoever asks for names meets them."""

    def __init__(self, whole: Checkpoint, layout: _Layout):
        self.path = whole.path
        self.config = text_config(whole.config, whole.path)
        self._whole = whole
        self._names = {
            name.removeprefix(layout.prefix): name for name in whole.names() if not name.startswith(layout.others)
        }

    def names(self) -> frozenset[str]:
        return frozenset(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._whole.shape(self._names[name])

    def dtype(self, name: str) -> np.dtype:
        return self._whole.dtype(self._names[name])

    def read(self, name: str) -> np.ndarray:
        return self._whole.read(self._names[name])

    def blocks(self, name: str) -> Blocks | None:
        return self._whole.blocks(self._names[name])

    def release(self, name: str) -> None:
        self._whole.release(self._names[name])

    def nbytes(self, name: str) -> int:
        return self._whole.nbytes(self._names[name])
