"""The table from a checkpoint's architecture name to the one file that computes it."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.spec import Model

ARCHITECTURES = {
    "Gemma2ForCausalLM": "jaxserve.models.gemma2",
    "Gemma3ForCausalLM": "jaxserve.models.gemma3",
    "GraniteForCausalLM": "jaxserve.models.granite",
    "LlamaForCausalLM": "jaxserve.models.llama",
    "MistralForCausalLM": "jaxserve.models.mistral",
    "Olmo2ForCausalLM": "jaxserve.models.olmo2",
    "Phi3ForCausalLM": "jaxserve.models.phi3",
    "Qwen2ForCausalLM": "jaxserve.models.qwen2",
    "Qwen3ForCausalLM": "jaxserve.models.qwen3",
    "SmolLM3ForCausalLM": "jaxserve.models.smollm3",
}


def find_model(hf: Mapping[str, Any]) -> tuple[Model, Any]:
    """The model and its config for a config.json. Raises ConfigError for what is not served or not complete."""
    names = hf.get("architectures") or []
    module = next((ARCHITECTURES[n] for n in names if n in ARCHITECTURES), None)
    if module is None:
        raise ConfigError(
            f"architecture {', '.join(names) or '(none in config.json)'} is not served; "
            f"served are {', '.join(ARCHITECTURES)}"
        )
    if "quantization_config" in hf:
        raise ConfigError("quantised checkpoints (quantization_config) are not served; use the unquantised one")
    model = Model.of(import_module(module))
    try:
        return model, model.config_from_hf(hf)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"config.json is incomplete for {names[0]}: {error!r}") from error
