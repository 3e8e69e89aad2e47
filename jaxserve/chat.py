"""Messages to a prompt through a checkpoint's chat template; knows templates, not what tokens mean.

Templates are the model owner's and messages are anybody's: only the template may write control tokens. Before
rendering, each control token's text inside a message is broken by a character that occurs nowhere else; after
rendering, whatever still reads as a control token came from the template, and the breaks are taken out again.
A template could still join what it cuts out of messages into a control token. So a second rendering, of messages in
which no control token can even begin, must show the same control tokens; if it does not, it is the one that counts.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec

from jaxserve.errors import ConfigError, InvalidParameter, UnsupportedParameter

_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_USUAL_ROLES = ("system", "user", "assistant")
_ROLE = re.compile(r"[A-Za-z0-9_.\- ]{1,64}")
_PRIVATE_USE = range(0xE100, 0xF8FF)  # E000 and E001 are the tokenizer's


class ControlEncoder(Protocol):
    """What of a tokenizer a template needs; see jaxserve.tokenizer.Tokenizer."""

    @property
    def control_tokens(self) -> Mapping[str, int]: ...
    def split_control(self, text: str) -> list[str | int]: ...
    def encode_parts(self, parts: Sequence[str | int]) -> list[int]: ...


class ChatTemplate:
    """A Jinja template with the variables and functions that transformers gives it, in a sandbox.

    `sources` holds the template under "default" and, where the checkpoint has one, another under "tool_use" for
    requests with tools. `tokens` are the special tokens by name (`bos_token`, ...).
    """

    def __init__(self, sources: str | Mapping[str, str], tokens: Mapping[str, Any] | None = None):
        """Raises ConfigError when a template does not compile."""
        self.sources = {"default": sources} if isinstance(sources, str) else dict(sources)
        if not self.sources:
            raise ConfigError("the chat template is empty")
        self._default = "default" if "default" in self.sources else next(iter(self.sources))
        self._tokens = dict(tokens or {})
        environment = _environment()
        self._templates: dict[str, jinja2.Template] = {}
        self._takes_parts: dict[str, bool] = {}
        for name, source in self.sources.items():
            try:
                self._takes_parts[name] = _loops_over_content(environment.parse(source))
                self._templates[name] = environment.from_string(source)
            except jinja2.TemplateError as error:
                raise ConfigError(f"chat template {name!r} does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt as text, for display: in it, control tokens of the template and of a message look the same.

        Content may be a string or OpenAI's list of text parts. continue_final_message leaves the last message open.
        The role developer is system's to a template that does not name it. `kwargs` are further variables of the
        template. Raises InvalidParameter for messages that the template refuses, UnsupportedParameter for content that
        is not text.
        """
        (end,) = _unused_characters([messages], 1)
        return self._render(
            messages, str, end, add_generation_prompt, continue_final_message, tools=tools, variables=kwargs
        )

    def encode(
        self,
        tokenizer: ControlEncoder,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """The prompt's ids. Only the template's own control tokens become control ids.

        No bos is added beyond the template's. Arguments and errors as for render.
        """
        # Letters and digits are in every word: a control token that begins with one is only broken.
        begins = sorted({t[0] for t in tokenizer.control_tokens if t and not t[0].isalnum()})
        mark, end, *others = _unused_characters([messages, tools, kwargs], 2 + len(begins))
        hidden = str.maketrans(dict(zip(begins, others, strict=True)))
        shown = str.maketrans(dict(zip(others, begins, strict=True)))

        def rendered(guard: Callable[[str], str]) -> list[str | int]:
            text = self._render(
                messages, guard, end, add_generation_prompt, continue_final_message, tools=tools, variables=kwargs
            )
            return tokenizer.split_control(text)

        parts = rendered(_breaker(tokenizer, mark))
        if any(begin in text for text in _strings([messages, tools, kwargs]) for begin in begins):
            strict = rendered(lambda text: text.translate(hidden))
            if [p for p in strict if isinstance(p, int)] != [p for p in parts if isinstance(p, int)]:
                parts = strict
        plain = [p if isinstance(p, int) else p.replace(mark, "").translate(shown) for p in parts]
        try:
            return tokenizer.encode_parts([p for p in plain if p != ""])
        except InvalidParameter as error:
            raise InvalidParameter(error.message, param="messages") from error

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        guard: Callable[[str], str],
        end: str,
        add_generation_prompt: bool,
        continue_final_message: bool,
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        """`guard` changes every string that the caller gave; `end` is a character that none of them holds."""
        if add_generation_prompt and continue_final_message:
            raise InvalidParameter(
                "add_generation_prompt and continue_final_message exclude each other; set one of them to false",
                param="continue_final_message",
            )
        name = "tool_use" if tools and "tool_use" in self.sources else self._default
        plain = [_checked_message(m, self._takes_parts[name]) for m in _checked_messages(messages)]
        if "developer" not in self.sources[name]:  # OpenAI's later name for system
            plain = [m | {"role": "system"} if m["role"] == "developer" else m for m in plain]
        if continue_final_message:
            plain[-1] = _with_end(plain[-1], end)
        context = {
            **self._tokens,
            "documents": None,
            **{k: _map_strings(v, guard) for k, v in variables.items()},
            "tools": _map_strings(list(tools), guard) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        # transformers' templates expect the arguments of a tool call as an object, some as OpenAI's JSON string.
        parsed = [_parsed_arguments(m) for m in plain]
        for variant in [parsed, plain] if parsed != plain else [plain]:
            try:
                text = self._templates[name].render(context, messages=_map_strings(variant, guard))
                break
            except Exception as error:  # whatever a template raises is the messages' fault
                if variant is plain or not isinstance(error, TypeError):
                    raise InvalidParameter(
                        f"the chat template refuses these messages: {error}", param="messages"
                    ) from error
        self._refuse_unseen(name, context, _map_strings(variant, guard), end)
        if not continue_final_message:
            return text
        cut = text.rfind(end)
        if cut < 0:
            raise InvalidParameter(
                "the chat template does not show the final message, so it cannot be continued",
                param="continue_final_message",
            )
        # A template that trims content has also taken the space behind the marker.
        return text[:cut] if text[cut + 1 : cut + 2] == " " else text[:cut].rstrip()

    def _refuse_unseen(self, name: str, context: Mapping[str, Any], messages: list[dict[str, Any]], end: str) -> None:
        """Many templates pass over a role that they do not know: are marks in place of its words shown?"""
        marks = {
            i: f"{end}{i}{end}" for i, m in enumerate(messages) if m["role"] not in _USUAL_ROLES and m.get("content")
        }
        if not marks:
            return
        marked = [dict(message) for message in messages]
        for i, mark in marks.items():
            marked[i]["content"] = [{"type": "text", "text": mark}] if self._takes_parts[name] else mark
        try:
            text = self._templates[name].render(context, messages=marked)
        except Exception:  # the words matter to it, so it does not pass over them
            return
        unseen = [messages[i]["role"] for i, mark in marks.items() if mark not in text]
        if unseen:
            raise InvalidParameter(
                f"the chat template does not show messages of role {unseen[0]!r}; use system, user or assistant",
                param="messages",
            )


def load_chat_template(path: Path) -> ChatTemplate | None:
    """The chat template of a checkpoint directory; None when there is none.

    chat_template.jinja goes before chat_template.json before tokenizer_config.json. Raises ConfigError.
    """
    config = _read_json(path / "tokenizer_config.json")
    other = _read_json(path / "special_tokens_map.json")
    named = {n: config.get(n) or other.get(n) for n in _TOKENS}
    tokens = {n: t["content"] if isinstance(t, dict) else t for n, t in named.items() if t}
    sources: Any = None
    if (path / "chat_template.jinja").is_file():
        sources = {"default": (path / "chat_template.jinja").read_text()}
        sources |= {f.stem: f.read_text() for f in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    else:
        sources = _read_json(path / "chat_template.json").get("chat_template") or config.get("chat_template")
        if isinstance(sources, list):
            sources = {entry["name"]: entry["template"] for entry in sources}
    if not sources:
        return None
    try:
        return ChatTemplate(sources, tokens)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it shows them."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' templates expect it: no HTML escapes. Private-use letters stay, to be found again."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if ensure_ascii:
        return re.sub(r"[^\x00-\x7f\ue100-\uf8fe]", lambda m: json.dumps(m[0])[1:-1], text)
    return text


def _loops_over_content(tree: jinja2.nodes.Template) -> bool:
    """Whether a template loops over a message's content, so that it understands a list of parts."""

    def is_content(node: jinja2.nodes.Node | None) -> bool:
        match node:
            case jinja2.nodes.Filter():
                return is_content(node.node)
            case jinja2.nodes.Getattr():
                return node.attr == "content"
            case jinja2.nodes.Getitem():
                return isinstance(node.arg, jinja2.nodes.Const) and node.arg.value == "content"
            case jinja2.nodes.Name():
                return node.name == "content"
        return False

    return any(is_content(loop.iter) for loop in tree.find_all(jinja2.nodes.For))


def _checked_messages(messages: Any) -> Sequence[Mapping[str, Any]]:
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise InvalidParameter("messages must be a list of at least one message", param="messages")
    return messages


def _checked_message(message: Mapping[str, Any], takes_parts: bool) -> dict[str, Any]:
    """A message with its content as the template takes it: text, or a list of text parts."""
    if not isinstance(message, Mapping):
        raise InvalidParameter("each message must be an object", param="messages")
    role = message.get("role")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise InvalidParameter(f"a message's role must be a short name such as 'user', got {role!r}", param="messages")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return dict(message)
    if not isinstance(content, Sequence):
        raise InvalidParameter("a message's content must be a string or a list of parts", param="messages")
    texts = [_part_text(part) for part in content]
    if takes_parts:
        return {**message, "content": [{"type": "text", "text": t} for t in texts]}
    return {**message, "content": "\n".join(texts)}


def _part_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind is not None and kind not in ("text", "refusal"):
        raise UnsupportedParameter(
            f"content parts of type {str(kind)[:100]!r} are not served: this model reads text; "
            "send parts of type 'text'",
            param="messages",
        )
    text = part.get(kind) if kind is not None else part
    if not isinstance(text, str):
        raise InvalidParameter("a content part must be {'type': 'text', 'text': '...'}", param="messages")
    return text


def _parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the arguments of its tool calls as objects, where they are JSON objects in a string."""
    calls = message.get("tool_calls")
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        return message

    def parsed(call: Any) -> Any:
        try:
            arguments = msgspec.json.decode(call["function"]["arguments"], type=dict[str, Any])
        except (msgspec.DecodeError, TypeError, KeyError):
            return call
        return {**call, "function": {**call["function"], "arguments": arguments}}

    return {**message, "tool_calls": [parsed(call) for call in calls]}


def _with_end(message: dict[str, Any], end: str) -> dict[str, Any]:
    """The message with a marker behind its text: the character and a space, which a trim would take."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + end + " "}
    if isinstance(content, list) and content:
        return {**message, "content": [*content[:-1], {**content[-1], "text": content[-1]["text"] + end + " "}]}
    raise InvalidParameter("the final message has no content that could be continued", param="continue_final_message")


def _breaker(tokenizer: ControlEncoder, mark: str) -> Callable[[str], str]:
    """Puts `mark` behind the first character of every control token in a string."""
    texts = {i: text for text, i in tokenizer.control_tokens.items()}

    def guard(text: str) -> str:
        parts = tokenizer.split_control(text)
        if parts == [text]:
            return text
        # The rest of a control token may hold a shorter one.
        return "".join(p if isinstance(p, str) else texts[p][0] + mark + guard(texts[p][1:]) for p in parts)

    return guard


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every string in it, keys too, changed; mappings become dicts and sequences lists."""
    match value:
        case str():
            return change(value)
        case Mapping():
            return {_map_strings(k, change): _map_strings(v, change) for k, v in value.items()}
        case list() | tuple():
            return [_map_strings(v, change) for v in value]
    return value


def _strings(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case Mapping():
            for key, entry in value.items():
                yield from _strings(key)
                yield from _strings(entry)
        case list() | tuple():
            for entry in value:
                yield from _strings(entry)


def _unused_characters(value: Any, count: int) -> list[str]:
    """Private-use characters that occur in none of the strings."""
    used = set().union(*map(set, _strings(value)))
    free = list(itertools.islice((chr(c) for c in _PRIVATE_USE if chr(c) not in used), count))
    if len(free) < count:
        raise InvalidParameter("the messages hold too many private-use characters", param="messages")
    return free


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty when the file is absent. Raises ConfigError."""
    if not file.is_file():
        return {}
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"{file} is not a JSON object: {error}") from error
