"""The request bodies that HTTP clients send: their fields and types, and how bytes become one of them."""

import codecs
import functools
import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, get_type_hints

import msgspec

from jaxserve.config import choices_of
from jaxserve.errors import InvalidParameter, UnsupportedParameter


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ModelBody(msgspec.Struct, kw_only=True):
    """What every body that gives the model work has; null means absent."""

    model: str | None = None
    priority: int | None = None
    timeout: float | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    user: str | None = None
    """Written to the access log."""


class SamplingBody(ModelBody, kw_only=True):
    """What /v1/chat/completions and /v1/completions have in common; null means absent."""

    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    banned_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    return_token_ids: bool | None = None


class ChatBody(SamplingBody, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None


class CompletionBody(SamplingBody, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None


class PoolingBody(ModelBody, kw_only=True):
    """What /v1/embeddings and /v1/score have in common."""

    truncate_prompt_tokens: int | None = None
    """Longer texts are cut to so many tokens; -1: to as many as the model takes. Without it they are refused."""


class EmbeddingBody(PoolingBody, kw_only=True):
    """Body of POST /v1/embeddings."""

    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


class ScoreBody(PoolingBody, kw_only=True):
    """Body of POST /v1/score, as vLLM has it."""

    text_1: str | list[str]
    text_2: str | list[str]


class TokenizeBody(msgspec.Struct, kw_only=True):
    """Body of POST /tokenize: vLLM's (`prompt` or `messages`) or llama-server's (`content`)."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    content: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """Body of POST /detokenize, the same for vLLM and llama-server."""

    tokens: list[int]
    model: str | None = None


class UpdateParamsBody(msgspec.Struct, kw_only=True):
    """Body of POST /admin/update_params."""

    path: str
    """A checkpoint directory or GGUF file, as the server sees it."""
    in_flight: Literal["wait", "abort"] = "wait"
    """What becomes of requests that have begun; see request.Update."""


_SCHEMA = "output cannot be constrained to a grammar here; describe the form in the prompt and check the answer"
_SAMPLER = "use temperature, top_k, top_p, min_p and the penalties"
_TEXT_ONLY = "this server takes and gives text only"
_NO_REASONING = "pass what the model's template understands in chat_template_kwargs"

# Fields that other servers have, which change the answer and are not served here: what else they may say without
# changing anything (null, false and empty values never do), and the cure. Any other unknown field is ignored and
# reported in the `warnings` header.
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "suffix": ((), "leave it out and put all of the text into the prompt"),
    "use_beam_search": ((), "leave it out; sample with n > 1 instead"),
    "length_penalty": ((1,), "leave it out; it belongs to beam search"),
    "prompt_logprobs": ((), "use echo and logprobs of /v1/completions"),
    "prompt_logprob_token_ids": ((), "use echo and logprobs of /v1/completions"),
    "logprob_token_ids": ((), "use logprobs or top_logprobs"),
    "prompt_embeds": ((), "send the prompt as text or token ids"),
    "truncate_prompt_tokens": ((), "shorten the prompt before sending it"),
    "return_tokens_as_token_ids": ((), "use return_token_ids"),
    "logits_processors": ((), "use logit_bias, allowed_token_ids or banned_token_ids"),
    "spaces_between_special_tokens": ((True,), "leave it out"),
    "n_predict": ((), "use max_tokens"),
    "repeat_penalty": ((1,), "use repetition_penalty"),
    "functions": ((), "tools are not served yet; remove `functions`"),
    "function_call": (("none", "auto"), "tools are not served yet; remove `function_call`"),
    "documents": ((), "put their text into the messages"),
    "chat_template": ((), "the model's own template is used; render yours and send it to /v1/completions"),
    "reasoning_effort": (("none",), _NO_REASONING),
    "thinking_token_budget": ((), _NO_REASONING),
    "verbosity": (("medium",), "ask for it in a message"),
    "audio": ((), _TEXT_ONLY),
    "modalities": ((["text"],), _TEXT_ONLY),
    "prediction": ((), "leave it out; it changes speed only"),
    "web_search_options": ((), "put what the model should know into the messages"),
    "structured_outputs": ((), _SCHEMA),
    "guided_json": ((), _SCHEMA),
    "guided_regex": ((), _SCHEMA),
    "guided_choice": ((), _SCHEMA),
    "guided_grammar": ((), _SCHEMA),
    "json_schema": ((), _SCHEMA),
    "grammar": ((), _SCHEMA),
    "typical_p": ((1,), _SAMPLER),
    "mirostat": ((0,), _SAMPLER),
    "dry_multiplier": ((0,), _SAMPLER),
    "xtc_probability": ((0,), _SAMPLER),
}

_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NAME = re.compile(rb'[\s,{]*"(?:[^"\\]|\\.)*"\s*:\s*')


def parse_body[Body: msgspec.Struct](data: bytes, kind: type[Body]) -> tuple[Body, list[str]]:
    """The body, and the names of the fields in it that nothing here knows.

    Raises InvalidParameter or UnsupportedParameter, with the field's dotted path as `param`.
    """
    if not data.strip():
        raise InvalidParameter("the request body is empty; send a JSON object")
    if data.startswith(codecs.BOM_UTF8):
        raise InvalidParameter("the request body begins with a byte order mark; JSON is UTF-8 without one")
    try:
        members = _MEMBERS.decode(data)
        _refuse_duplicates(data, members)
        known = _field_names(kind)
        others = [name for name in members if name not in known]
        for name in others:
            _refuse_unsupported(name, members[name])
        body = msgspec.json.decode(data, type=kind)
        if isinstance(getattr(body, "stream_options", None), StreamOptions):
            nested = _MEMBERS.decode(members["stream_options"])
            others += [f"stream_options.{name}" for name in nested if name not in _field_names(StreamOptions)]
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error), kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        reason = str(error).removeprefix("JSON is malformed: ")
        raise InvalidParameter(f"the request body is not valid JSON: {reason}") from None
    except RecursionError:
        raise InvalidParameter("the request body is nested too deeply") from None
    return body, [name for name in others if name not in UNSUPPORTED]


@functools.cache
def _field_names(kind: type[msgspec.Struct]) -> frozenset[str]:
    return frozenset(field.encode_name for field in msgspec.structs.fields(kind))


def _refuse_duplicates(data: bytes, members: Mapping[str, msgspec.Raw]) -> None:
    """Raises if an object's field is there twice, which parsers read differently.

    A decoded dict keeps a name's first place and its last value, so without duplicates, and only then, walking over
    the text in the dict's order meets each value where it must be.
    """
    at = 0
    for raw in members.values():
        name, value = _NAME.match(data, at), bytes(raw)
        if name is None or not data.startswith(value, name.end()):
            break
        at = name.end() + len(value)
    else:
        if data[at:].strip(b" \t\r\n{") == b"}":
            return
    pairs = json.JSONDecoder(object_pairs_hook=list, parse_int=str).decode(data.decode())
    name = Counter(name for name, _ in pairs).most_common(1)[0][0][:64]
    raise InvalidParameter(f"`{name}` is given more than once in the request body", param=name)


def _refuse_unsupported(name: str, raw: msgspec.Raw) -> None:
    if name not in UNSUPPORTED:
        return
    neutral, cure = UNSUPPORTED[name]
    value = msgspec.json.decode(raw)
    if value not in (None, False, "", [], {}) and value not in neutral:
        raise UnsupportedParameter(f"`{name}` is not supported by this server: {cure}.", param=name)


def _wrong_type(message: str, kind: type[msgspec.Struct]) -> InvalidParameter:
    """From msgspec's words, "Expected `int`, got `str` - at `$.messages[0].name`", to ours."""
    what, _, place = message.partition(" - at ")
    path = re.sub(r"\[\.\.\.\]", "", place.replace("`key` in ", "").strip("`")).removeprefix("$").removeprefix(".")
    if missing := re.search(r"missing required field `(\w+)`", what):
        path = f"{path}.{missing[1]}".removeprefix(".")
        return InvalidParameter(f"`{path}` is required", param=path)
    if invalid := re.fullmatch(r"Invalid enum value (.*)", what):
        what = f"it must be one of {choices_of(get_type_hints(kind).get(path))}, got {invalid[1]}"
    what = re.sub(r"^Expected `(.*)`, got", lambda m: f"expected {m[1].replace(' | null', '')}, got", what)
    if path:
        return InvalidParameter(f"`{path}` is wrong: {what}", param=path)
    return InvalidParameter(f"the request body is wrong: {what}")
