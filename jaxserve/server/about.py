"""What clients can ask about the server without generating: health, the model's card, its tokenizer. No I/O."""

from typing import Any

from jaxserve.client import EngineState, EngineStatus
from jaxserve.errors import InvalidParameter
from jaxserve.request import EngineInfo
from jaxserve.server.openai import chat_messages, template_arguments
from jaxserve.server.wire import DetokenizeBody, TokenizeBody
from jaxserve.text import TextModel

_HEALTH_WORDS = {
    EngineState.LOADING: "Loading model",
    EngineState.DRAINING: "Shutting down",
    EngineState.DEAD: "Engine is down",
}


def health(status: EngineStatus, draining: bool) -> tuple[int, dict[str, Any]]:
    """llama-server's answer: (HTTP status, body)."""
    state = EngineState.DRAINING if draining else status.state
    if state is EngineState.READY:
        return 200, {"status": "ok"}
    detail = f": {status.detail}" if status.detail else ""
    message = _HEALTH_WORDS[state] + ("" if draining else detail)
    return 503, {"error": {"code": 503, "message": message, "type": "unavailable_error"}}


def model_card(name: str, info: EngineInfo, created: int) -> dict[str, Any]:
    """An entry of /v1/models: OpenAI's fields, vLLM's and llama-server's."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "jaxserve",
        "root": name,
        "parent": None,
        "max_model_len": info.max_model_len,
        "permission": [],
        "meta": {
            "architecture": info.architecture,
            "n_vocab": info.vocab_size,
            "n_ctx_train": info.max_positions,
            "n_params": info.num_params,
            "size": info.device_bytes.get("weights", 0),
            "weights_version": info.weights_version,
        },
    }


def tokenize(body: TokenizeBody, model: TextModel, info: EngineInfo) -> dict[str, Any]:
    """The answer of /tokenize, in vLLM's shape, or in llama-server's if the body has `content`.

    Raises InvalidParameter.
    """
    given = [name for name in ("prompt", "messages", "content") if getattr(body, name) is not None]
    if len(given) != 1:
        raise InvalidParameter("give exactly one of prompt, messages and content", param="prompt")
    if body.content is not None:
        return _tokenize_content(body, model)
    if body.messages is not None:
        ids = model.encode_chat(chat_messages(body.messages), **template_arguments(body))
    elif body.add_special_tokens is False:
        ids = tuple(model.tokenizer.encode(body.prompt or "", add_special_tokens=False, parse_special=True))
    else:
        ids = model.encode_prompt(body.prompt or "")
    strings = [model.tokenizer.token_str(i) for i in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": info.max_model_len, "tokens": ids, "token_strs": strings}


def _tokenize_content(body: TokenizeBody, model: TextModel) -> dict[str, Any]:
    ids = model.tokenizer.encode(
        body.content or "",
        add_special_tokens=bool(body.add_special),
        parse_special=body.parse_special is not False,
    )
    if not body.with_pieces:
        return {"tokens": ids}
    return {"tokens": [{"id": i, "piece": _piece(model.tokenizer.token_bytes(i))} for i in ids]}


def _piece(token: bytes) -> str | list[int]:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return list(token)


def detokenize(body: DetokenizeBody, model: TextModel, info: EngineInfo) -> dict[str, Any]:
    """The answer of /detokenize: the text as vLLM's `prompt` and as llama-server's `content`.

    Raises InvalidParameter.
    """
    if bad := [i for i in body.tokens if not 0 <= i < info.vocab_size]:
        raise InvalidParameter(
            f"token id {bad[0]} is out of range: the vocabulary has {info.vocab_size} ids", param="tokens"
        )
    text = model.tokenizer.decode(body.tokens, skip_special_tokens=False)
    return {"prompt": text, "content": text}


def tokenizer_info(model: TextModel, info: EngineInfo) -> dict[str, Any]:
    """What a client that has no copy of the tokenizer needs to know of it, under the names Hugging Face uses."""
    tokenizer = model.tokenizer

    def name(token_id: int | None) -> str | None:
        return None if token_id is None else tokenizer.token_str(token_id)

    templates = model.template.sources if model.template is not None else {}
    eos = next(iter(tokenizer.eos_token_ids or model.eos_token_ids), None)
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": info.max_model_len,
        "bos_token": name(tokenizer.bos_token_id),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token": name(eos),
        "eos_token_id": eos,
        "eos_token_ids": list(model.eos_token_ids),
        "pad_token": name(eos),
        "additional_special_tokens": [tokenizer.token_str(i) for i in sorted(tokenizer.special_ids)],
        "chat_template": templates.get("default") or next(iter(templates.values()), None),
    }
