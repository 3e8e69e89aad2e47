"""Which format each tensor of a GGUF file gets under a type's name; knows names and shapes, no files and no weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxserve.formats import FORMATS, SMALLER_BLOCKS, Format

_Rule = Callable[[int, int, int], str | None]
"""(layer, layers, query heads of a key-value head) to a format's name; None for the mix's own."""


def _spread(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers and every third one between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _always(name: str) -> _Rule:
    return lambda layer, layers, sharing: name


def _at_spread(name: str) -> _Rule:
    return lambda layer, layers, sharing: name if _spread(layer, layers) else None


def _in_first_eighth(name: str) -> _Rule:
    return lambda layer, layers, sharing: name if layer < layers // 8 else None


def _where_shared(name: str, otherwise: str | None = None) -> _Rule:
    """Values that four or more query heads share are few and worth more."""
    return lambda layer, layers, sharing: name if sharing >= 4 else otherwise


def _q3_values(layer: int, layers: int, sharing: int) -> str | None:
    return "Q5_K" if layer < 2 else "Q4_K"


def _q3_down(layer: int, layers: int, sharing: int) -> str | None:
    return "Q5_K" if layer < layers // 16 else "Q4_K"


def _q4_values(layer: int, layers: int, sharing: int) -> str | None:
    return "Q5_K" if layer < 4 else None


@dataclass(frozen=True)
class Mix:
    """A type: the format of most matrices, and what differs from it."""

    file_type: int
    """general.file_type, by which llama.cpp names it."""
    base: str
    output: str | None = "Q6_K"
    """Of the matrix that gives the logits; None for `base`."""
    attn_v: _Rule | None = None
    ffn_down: _Rule | None = None
    attn_output: _Rule | None = None


_MIXES = {
    "F32": Mix(0, "F32", output=None),
    "F16": Mix(1, "F16", output=None),
    "BF16": Mix(32, "BF16", output=None),
    "Q8_0": Mix(7, "Q8_0", output=None),
    "Q4_0": Mix(2, "Q4_0"),
    "Q4_1": Mix(3, "Q4_1"),
    "Q5_0": Mix(8, "Q5_0"),
    "Q5_1": Mix(9, "Q5_1"),
    "Q2_K": Mix(
        10, "Q2_K", attn_v=_where_shared("Q4_K", "Q3_K"), ffn_down=_always("Q3_K"), attn_output=_always("Q3_K")
    ),
    "Q3_K_M": Mix(12, "Q3_K", attn_v=_q3_values, ffn_down=_q3_down, attn_output=_always("Q4_K")),
    "Q4_K_S": Mix(14, "Q4_K", attn_v=_q4_values, ffn_down=_in_first_eighth("Q5_K")),
    "Q4_K_M": Mix(15, "Q4_K", attn_v=_at_spread("Q6_K"), ffn_down=_at_spread("Q6_K")),
    "Q5_K_S": Mix(16, "Q5_K"),
    "Q5_K_M": Mix(17, "Q5_K", attn_v=_at_spread("Q6_K"), ffn_down=_at_spread("Q6_K")),
    "Q6_K": Mix(18, "Q6_K"),
    "IQ4_NL": Mix(25, "IQ4_NL", attn_v=_where_shared("Q5_K"), ffn_down=_in_first_eighth("Q5_K")),
    "IQ4_XS": Mix(30, "IQ4_XS", attn_v=_where_shared("Q5_K"), ffn_down=_in_first_eighth("Q5_K")),
    "MXFP4": Mix(38, "MXFP4", output="Q8_0"),
}
MIXES = _MIXES | {name: _MIXES[f"{name}_M"] for name in ("Q3_K", "Q4_K", "Q5_K")}
"""By the names that are given on a command line; a K format's own name means its _M, as for llama.cpp."""

# Matrices that are small, and of which every digit counts: a router, positions, convolutions, biases by distance.
_KEPT = ("ffn_gate_inp", "position_embd", "token_types", "conv1d", "shortconv", "attn_rel_b", "_norm")


def _beside_eight_experts(base: str) -> dict[str, _Rule]:
    """The rules for attention where it is a small part of the model, as llama.cpp has them."""
    output = "Q5_K" if base in ("Q2_K", "Q3_K", "Q4_K", "IQ4_NL", "IQ4_XS") else base
    return {"attn_k": _always("Q8_0"), "attn_v": _always("Q8_0"), "attn_output": _always(output)}


@dataclass(frozen=True)
class Choice:
    """What one tensor becomes."""

    format: Format
    instead_of: Format | None
    """The format that its rows were too short for."""


def choose(
    mix: Mix, tensors: Mapping[str, tuple[Format, tuple[int, ...]]], *, layers: int, sharing: int, experts: int = 0
) -> dict[str, Choice]:
    """Each tensor's format, from its present one and its shape (last axis packed), under GGUF names.

    Vectors become F32, matrices that are no weights of a product stay what they are. `sharing`: query heads of a
    key-value head. `experts`: of a layer.
    """
    return {
        name: _choice(mix, name, *tensor, layers, sharing, experts, tied="output.weight" not in tensors)
        for name, tensor in tensors.items()
    }


def _choice(
    mix: Mix, name: str, format: Format, shape: tuple[int, ...], layers: int, sharing: int, experts: int, *, tied: bool
) -> Choice:
    if len(shape) < 2:
        return Choice(FORMATS["F32"], None)
    if not name.endswith(".weight") or any(part in name for part in _KEPT):
        return Choice(format, None)
    wanted = mix.base
    if name == ("token_embd.weight" if tied else "output.weight"):
        wanted = mix.output or mix.base
    elif name.startswith("blk."):
        layer, part = name.split(".")[1:3]
        rule: _Rule | None = {
            "attn_v": mix.attn_v, "attn_qkv": mix.attn_v, "ffn_down": mix.ffn_down, "ffn_down_exps": mix.ffn_down,
            "attn_output": mix.attn_output,
        }.get(part)  # fmt: skip
        if experts == 8 and FORMATS[mix.base].quantised:
            rule = _beside_eight_experts(mix.base).get(part, rule)
        wanted = (rule and rule(int(layer), layers, sharing)) or mix.base
    found = wanted
    while shape[-1] % FORMATS[found].block:
        found = SMALLER_BLOCKS.get(found, "F16")
    return Choice(FORMATS[found], FORMATS[wanted] if found != wanted else None)
