"""The table from a checkpoint's architecture name to the one file that computes it."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.model_code import brief, load_model_code, place
from jaxserve.spec import Model

ARCHITECTURES = {
    "DeepseekV2ForCausalLM": "jaxserve.models.deepseek_v2",
    "Gemma2ForCausalLM": "jaxserve.models.gemma2",
    "Gemma3ForCausalLM": "jaxserve.models.gemma3",
    "GraniteForCausalLM": "jaxserve.models.granite",
    "LlamaForCausalLM": "jaxserve.models.llama",
    "MistralForCausalLM": "jaxserve.models.mistral",
    "MixtralForCausalLM": "jaxserve.models.mixtral",
    "Olmo2ForCausalLM": "jaxserve.models.olmo2",
    "Phi3ForCausalLM": "jaxserve.models.phi3",
    "Qwen2ForCausalLM": "jaxserve.models.qwen2",
    "Qwen3ForCausalLM": "jaxserve.models.qwen3",
    "Qwen3MoeForCausalLM": "jaxserve.models.qwen3_moe",
    "SmolLM3ForCausalLM": "jaxserve.models.smollm3",
}
ENCODERS = {"BertModel": "jaxserve.models.bert"}
"""Those that give embeddings only."""


def find_model(hf: Mapping[str, Any], code: str | None = None) -> tuple[Model, Any]:
    """The model and its config for a config.json; `code` names a model of somebody's own, which goes before the table.

    Raises ConfigError for what is not served or not complete.
    """
    if code is not None:
        model = load_model_code(code)
        return model, own_config(model, hf)
    names = hf.get("architectures") or []
    known = ARCHITECTURES | ENCODERS
    module = next((known[n] for n in names if n in known), None)
    if module is None:
        raise ConfigError(
            f"architecture {', '.join(names) or '(none in config.json)'} is not served; "
            f"served are {', '.join(known)}; --model-code serves a model file of your own"
        )
    _refuse_quantised(hf)
    model = Model.of(import_module(module))
    try:
        return model, model.config_from_hf(hf)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"config.json is incomplete for {names[0]}: {error!r}") from error


def own_config(model: Model, hf: Mapping[str, Any]) -> Any:
    """The config that a model of somebody's own makes of a config.json. Raises ConfigError with file and line."""
    _refuse_quantised(hf)
    try:
        return model.config_from_hf(hf)
    except ConfigError:
        raise
    except KeyError as error:
        raise ConfigError(f"{place(error)}config.json has no {error}, which Config.from_hf asks for") from error
    except Exception as error:
        raise ConfigError(f"{place(error)}Config.from_hf does not take this config.json: {brief(error)}") from error


def _refuse_quantised(hf: Mapping[str, Any]) -> None:
    if "quantization_config" in hf:
        raise ConfigError("quantised checkpoints (quantization_config) are not served; use the unquantised one")
