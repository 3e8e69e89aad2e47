"""The block formats of ggml: their sizes, float32 rows to and from their bytes; knows nothing of files or models."""

from jaxserve.formats.decode import dequantise, parts
from jaxserve.formats.encode import quantise
from jaxserve.formats.table import BY_CODE, FORMATS, KNOWN_NAMES, SMALLER_BLOCKS, Blocks, Format

__all__ = [
    "BY_CODE",
    "FORMATS",
    "KNOWN_NAMES",
    "SMALLER_BLOCKS",
    "Blocks",
    "Format",
    "dequantise",
    "parts",
    "quantise",
]
