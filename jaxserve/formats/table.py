"""Which block formats of ggml there are: their names, codes and sizes."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Format:
    """How the numbers of a tensor's rows are packed."""

    name: str
    code: int
    """ggml's type id, as GGUF files give it."""
    block: int
    """Weights in a block; 1 for plain numbers."""
    nbytes: int
    """Bytes of a block."""

    @property
    def quantised(self) -> bool:
        return self.block > 1

    @property
    def group(self) -> int:
        """Of a quantised format: weights that share a scale."""
        return 16 if self.name in ("Q2_K", "Q3_K", "Q6_K") else 32

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of `k` weights. Raises ValueError when blocks do not fill the row."""
        if k % self.block:
            raise ValueError(f"a row of {k} is not a multiple of {self.name}'s block of {self.block}")
        return k // self.block * self.nbytes


@dataclass(frozen=True)
class Blocks:
    """A quantised matrix as a file stores it."""

    format: Format
    rows: np.ndarray  # uint8 [N, row_bytes]


FORMATS = {
    name: Format(name, code, block, nbytes)
    for name, code, block, nbytes in [
        ("F32", 0, 1, 4),
        ("F16", 1, 1, 2),
        ("BF16", 30, 1, 2),
        ("Q8_0", 8, 32, 34),
        ("Q4_0", 2, 32, 18),
        ("Q4_1", 3, 32, 20),
        ("Q5_0", 6, 32, 22),
        ("Q5_1", 7, 32, 24),
        ("Q2_K", 10, 256, 84),
        ("Q3_K", 11, 256, 110),
        ("Q4_K", 12, 256, 144),
        ("Q5_K", 13, 256, 176),
        ("Q6_K", 14, 256, 210),
        ("IQ4_NL", 20, 32, 18),
        ("IQ4_XS", 23, 256, 136),
        ("MXFP4", 39, 32, 17),
    ]
}
"""The formats that are computed here, by name."""

BY_CODE = {f.code: f for f in FORMATS.values()}

SMALLER_BLOCKS = {
    "Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
"""What stands in for a format whose blocks do not fill the rows, as in llama.cpp."""

KNOWN_NAMES = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    40: "NVFP4",
}
"""ggml's other types, which error messages name."""
