"""What OpenAI's request bodies mean here: which model, prompts, sampling and reply they ask for. No I/O."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from jaxserve.errors import InvalidParameter, ModelNotFound, RequestError, UnsupportedParameter
from jaxserve.request import MAX_N, MAX_TOP_LOGPROBS, SamplingParams
from jaxserve.server.replies import ReplyOptions
from jaxserve.server.wire import ChatBody, CompletionBody, ModelBody, SamplingBody, TokenizeBody
from jaxserve.tokenizer import Tokenizer

MAX_PROMPTS = 1024
MAX_CHOICES = 4096
DEFAULT_COMPLETION_TOKENS = 16
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

# Fields that go into SamplingParams under their own name, as they are.
_PLAIN = (
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "seed",
)
_TAKEN_NAMES = {"self", "tokenizer", "messages", "tools", "add_generation_prompt", "continue_final_message"}
_ID_LISTS = ("allowed_token_ids", "stop_token_ids")


def check_model(name: str | None, served: str) -> None:
    """Raises ModelNotFound unless the name is the served model's, or absent."""
    if name is not None and name != served:
        raise ModelNotFound(f"The model `{name[:200]}` does not exist; this server serves `{served}`.", param="model")


def chat_params(body: ChatBody, defaults: SamplingParams, tokenizer: Tokenizer) -> tuple[SamplingParams, ReplyOptions]:
    """How a chat request wants to be sampled and answered. Raises RequestError."""
    _check_common(body)
    _check_tools(body)
    k = body.top_logprobs
    if k is not None and not 0 <= k <= MAX_TOP_LOGPROBS:
        raise InvalidParameter(f"top_logprobs must be in [0, {MAX_TOP_LOGPROBS}], got {k}", param="top_logprobs")
    if k is not None and not body.logprobs:
        raise InvalidParameter("top_logprobs needs logprobs to be true", param="top_logprobs")
    shown = (k or 0) if body.logprobs else None
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    try:
        params = _params(body, defaults, tokenizer, max_tokens=getattr(body, limit), logprobs=shown)
    except RequestError as error:
        if error.param != "max_tokens":
            raise
        raise type(error)(error.message.replace("max_tokens", limit), param=limit) from error
    return params, _reply_options(body, shown)


def completion_params(
    body: CompletionBody, defaults: SamplingParams, tokenizer: Tokenizer
) -> tuple[SamplingParams, ReplyOptions]:
    """How a completion request wants to be sampled and answered. Raises RequestError."""
    _check_common(body)
    n = 1 if body.n is None else body.n
    if body.best_of is not None and body.best_of != n:
        raise UnsupportedParameter(
            f"best_of={body.best_of} with n={n} is not supported: ask for n={body.best_of} and choose among them",
            param="best_of",
        )
    params = _params(
        body,
        defaults,
        tokenizer,
        max_tokens=DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    return params, _reply_options(body, body.logprobs, echo=bool(body.echo))


def texts_or_ids(given: str | Sequence[str | int | Sequence[int]], param: str) -> list[str | tuple[int, ...]]:
    """What a field may hold: a text, texts, token ids, or lists of token ids. Raises InvalidParameter."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise InvalidParameter(f"the {param} is empty", param=param)
    kinds = {type(p) for p in given}
    if len(kinds) > 1:
        raise InvalidParameter(f"{param} mixes texts, token ids and lists of token ids", param=param)
    if kinds == {int}:
        return [tuple(given)]  # type: ignore[arg-type]
    return [p if isinstance(p, str) else tuple(p) for p in given]  # type: ignore[arg-type]


def completion_prompts(prompt: str | Sequence[str | int | Sequence[int]], n: int) -> list[str | tuple[int, ...]]:
    """The prompts of a completion request, as `texts_or_ids` takes them. Raises InvalidParameter."""
    prompts = texts_or_ids(prompt, "prompt")
    if len(prompts) == 1:
        return prompts
    if len(prompt) > MAX_PROMPTS or len(prompt) * n > MAX_CHOICES:
        raise InvalidParameter(
            f"{len(prompt)} prompts with n={n}: at most {MAX_PROMPTS} prompts and {MAX_CHOICES} choices are served "
            "in one request; send several requests",
            param="prompt",
        )
    return prompts


def chat_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages, if they hold text and nothing else. Raises InvalidParameter or UnsupportedParameter."""
    if not messages:
        raise InvalidParameter("messages is empty: at least one message is needed", param="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def template_arguments(body: ChatBody | TokenizeBody) -> dict[str, Any]:
    """The arguments of TextModel.encode_chat besides the messages. Raises InvalidParameter."""
    if body.add_generation_prompt and body.continue_final_message:
        raise InvalidParameter(
            "add_generation_prompt and continue_final_message exclude each other", param="continue_final_message"
        )
    if taken := sorted(_TAKEN_NAMES & (body.chat_template_kwargs or {}).keys()):
        raise InvalidParameter(
            f"chat_template_kwargs may not hold {taken[0]!r}; it has a meaning of its own", param="chat_template_kwargs"
        )
    return {
        "add_generation_prompt": not body.continue_final_message and body.add_generation_prompt is not False,
        "continue_final_message": bool(body.continue_final_message),
        "template_kwargs": body.chat_template_kwargs,
    }


def _message(message: Mapping[str, Any], path: str) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidParameter(f"`{path}.role` must be a text", param=f"{path}.role")
    for name in ("tool_calls", "function_call", "tool_call_id", "audio"):
        if message.get(name):
            raise UnsupportedParameter(
                f"`{path}.{name}` is not supported by this server: tools and media are not served yet; "
                "say it in the message's text",
                param=f"{path}.{name}",
            )
    if role in ("tool", "function"):
        raise UnsupportedParameter(
            f"role {role!r} is not supported by this server: tools are not served yet; use role 'user'",
            param=f"{path}.role",
        )
    content = message.get("content")
    if isinstance(content, list):
        for i, part in enumerate(content):
            _check_part(part, f"{path}.content[{i}]")
    elif not isinstance(content, str):
        raise InvalidParameter(f"`{path}.content` must be a text or a list of parts", param=f"{path}.content")
    return dict(message)


def _check_part(part: Any, path: str) -> None:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise InvalidParameter(f"`{path}` must be an object with a `type`", param=path)
    if part["type"] != "text":
        raise UnsupportedParameter(
            f"`{path}`: parts of type {part['type'][:40]!r} are not supported by this server; send 'text' parts",
            param=path,
        )
    if not isinstance(part.get("text"), str):
        raise InvalidParameter(f"`{path}.text` must be a text", param=f"{path}.text")


def _check_common(body: SamplingBody) -> None:
    n = body.n
    if n is not None and not 1 <= n <= MAX_N:
        raise InvalidParameter(f"n must be in [1, {MAX_N}], got {n}", param="n")
    if body.stream_options is not None and not body.stream:
        raise InvalidParameter("stream_options needs stream to be true", param="stream_options")
    check_request_fields(body)
    kind = (body.response_format or {"type": "text"}).get("type")
    if kind != "text":
        raise UnsupportedParameter(
            f"response_format of type {str(kind)[:40]!r} is not supported by this server: use type 'text', describe "
            "the form in the prompt and check the answer",
            param="response_format",
        )


def check_request_fields(body: ModelBody) -> None:
    """Raises InvalidParameter for what no request may have, whatever it asks for."""
    if body.priority is not None and not -(2**31) <= body.priority < 2**31:
        raise InvalidParameter("priority must fit in 32 bits", param="priority")
    if body.request_id is not None and not REQUEST_ID.fullmatch(body.request_id):
        raise InvalidParameter("request_id must be 1 to 128 letters, digits or any of . _ : -", param="request_id")


def _check_tools(body: ChatBody) -> None:
    if body.tools is not None and not body.tools:
        raise InvalidParameter("tools is empty: leave it out to use none", param="tools")
    if body.tools:
        raise UnsupportedParameter(
            "tools are not supported by this server: they are not served yet; remove `tools`", param="tools"
        )
    if body.tool_choice not in (None, "none", "auto"):
        raise InvalidParameter("tool_choice needs tools: leave it out", param="tool_choice")


def _params(
    body: SamplingBody,
    defaults: SamplingParams,
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    wanted: dict[str, Any] = {name: value for name in _PLAIN if (value := getattr(body, name)) is not None}
    wanted |= {name: tuple(ids) for name in _ID_LISTS if (ids := getattr(body, name)) is not None}
    if body.n is not None:
        wanted["n"] = body.n
    if body.stop is not None:
        wanted["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.banned_token_ids or body.bad_words:
        words = [i for word in body.bad_words or () for i in _ids_of_word(word, tokenizer)]
        wanted["banned_token_ids"] = (*(body.banned_token_ids or ()), *words)
    return msgspec.structs.replace(
        defaults, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs, **wanted
    )


def _ids_of_word(word: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens that are the word, with and without a space before it."""
    found = []
    for text in (word, " " + word.lstrip(" ")):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1:
            found.append(ids[0])
    if not found or len(tokenizer.encode(word, add_special_tokens=False)) != 1:
        raise UnsupportedParameter(
            f"bad_words entry {word[:40]!r} is not one token of this model, and only single tokens can be banned; "
            "use banned_token_ids or logit_bias",
            param="bad_words",
        )
    return found


def _reply_options(body: SamplingBody, top_logprobs: int | None, echo: bool = False) -> ReplyOptions:
    usage = body.stream_options
    return ReplyOptions(
        n=1 if body.n is None else body.n,
        include_usage=bool(usage and usage.include_usage),
        continuous_usage=bool(usage and usage.include_usage and usage.continuous_usage_stats),
        return_token_ids=bool(body.return_token_ids),
        top_logprobs=top_logprobs,
        echo=echo,
    )
