"""How deltas of text become OpenAI's response bodies and stream events. No I/O."""

import codecs
import math
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from jaxserve.server.status import error_body
from jaxserve.text import TextDelta, TokenLogprob

LOWEST_LOGPROB = -9999.0  # JSON has no -inf

DONE = b"data: [DONE]\n\n"
_encoder = msgspec.json.Encoder()


class CachedTokens(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens | UnsetType = UNSET


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct):
    """/v1/completions' shape: one entry a token; the first token of an echoed prompt has null."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class Message(msgspec.Struct):
    """A whole message, or what a chunk adds to it."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    refusal: None | UnsetType = UNSET


class Choice(msgspec.Struct):
    """`message` in a whole chat answer, `delta` in a chunk of one, `text` in completions."""

    index: int
    message: Message | UnsetType = UNSET
    delta: Message | UnsetType = UNSET
    text: str | UnsetType = UNSET
    logprobs: ChatLogprobs | TextLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None | UnsetType = UNSET
    token_ids: Sequence[int] | UnsetType = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET


class Answer(msgspec.Struct):
    """A whole answer, or one chunk of it."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage | None | UnsetType = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET


class Head(msgspec.Struct, frozen=True):
    """What every part of one answer repeats."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    weights_version: int = 0
    """As far as it is known before the first token."""


class ReplyOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the caller wants to see. top_logprobs None: no logprobs at all.

    cached_tokens: usage says how much of the prompts was cached, which depends on what ran before.
    """

    n: int = 1
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    top_logprobs: int | None = None
    echo: bool = False
    cached_tokens: bool = True


class _Whole:
    """One choice of an answer that is not streamed, as it grows."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: Any = None
        self.finish: str | None = None
        self.stop_reason: int | str | None = None


class Reply:
    """One answer: give it every delta, either through `chunk` (streaming) or through `add` (then `body`).

    Choice k of prompt i has index i * n + k. The methods that stream append server-sent events to `out`.
    """

    whole_object = ""
    chunk_object = ""

    def __init__(self, head: Head, prompts: Sequence[Sequence[int]], options: ReplyOptions):
        self.head = head
        self.prompts = prompts
        self.options = options
        self.completion_tokens = 0
        self.prompt_tokens = sum(map(len, prompts))
        self._versions: dict[int, int] = {}  # by prompt
        self._cached = [0] * len(prompts)
        self._open = len(prompts) * options.n
        self._wholes = [_Whole() for _ in range(self._open)]

    @property
    def complete(self) -> bool:
        """Whether every choice has a finish reason."""
        return not self._open

    @property
    def weights_versions(self) -> list[int]:
        """Of what has been answered so far. Several prompts may be answered by different weights, one never is."""
        return sorted(set(self._versions.values()) or {self.head.weights_version})

    @property
    def system_fingerprint(self) -> str:
        """The head's, which other weights than the first ones change."""
        versions = self.weights_versions
        return self.head.system_fingerprint + "".join(f"-w{v}" for v in versions if versions != [0])

    def opening(self, out: bytearray) -> None:
        """The events that begin the stream."""

    def chunk(self, out: bytearray, prompt: int, delta: TextDelta) -> None:
        """The events for one delta of prompt number `prompt`; none if it has nothing to tell."""
        raise NotImplementedError

    def closing(self, out: bytearray) -> None:
        """The events that end the stream."""
        assert self.complete, "a stream is closed only when every choice has finished"
        if self.options.include_usage:
            self._event(out, [], usage=self.usage())
        out += DONE

    def failing(self, out: bytearray, error: BaseException) -> None:
        """The events that end a stream in which something went wrong."""
        _write(out, error_body(error))
        out += DONE

    def add(self, prompt: int, delta: TextDelta) -> None:
        """Takes in one delta of an answer that is not streamed."""
        index = self._count(prompt, delta)
        whole = self._wholes[index]
        whole.text.append(delta.text)
        whole.token_ids += delta.token_ids
        if self.options.top_logprobs is not None:
            self._add_logprobs(whole, index, delta)
        if delta.finish is not None:
            whole.finish, whole.stop_reason = delta.finish.value, delta.stop_reason

    def body(self) -> bytes:
        """The whole answer as JSON."""
        raise NotImplementedError

    def usage(self) -> Usage:
        total = self.prompt_tokens + self.completion_tokens
        details = CachedTokens(sum(self._cached)) if self.options.cached_tokens else UNSET
        return Usage(self.prompt_tokens, self.completion_tokens, total, details)

    def _add_logprobs(self, whole: _Whole, index: int, delta: TextDelta) -> None:
        raise NotImplementedError

    def _count(self, prompt: int, delta: TextDelta) -> int:
        """The choice that the delta belongs to."""
        self.completion_tokens += len(delta.token_ids)
        if delta.weights_version is not None:
            self._versions[prompt] = delta.weights_version
        if delta.num_cached_tokens:
            self._cached[prompt] = max(self._cached[prompt], delta.num_cached_tokens)
        if delta.finish is not None:
            self._open -= 1
        return prompt * self.options.n + delta.index

    def _event(
        self,
        out: bytearray,
        choices: list[Choice],
        *,
        usage: Usage | None | UnsetType = UNSET,
        prompt_token_ids: Sequence[int] | UnsetType = UNSET,
    ) -> None:
        if usage is UNSET and self.options.include_usage:
            usage = self.usage() if self.options.continuous_usage else None
        head = self.head
        _write(
            out,
            Answer(
                head.id,
                self.chunk_object,
                head.created,
                head.model,
                self.system_fingerprint,
                choices,
                usage,
                prompt_token_ids,
            ),
        )

    def _whole_answer(self, choices: list[Choice], prompt_token_ids: Sequence[int] | UnsetType = UNSET) -> bytes:
        head = self.head
        return _encoder.encode(
            Answer(
                head.id,
                self.whole_object,
                head.created,
                head.model,
                self.system_fingerprint,
                choices,
                self.usage(),
                prompt_token_ids,
            )
        )


class ChatReply(Reply):
    """The answer of /v1/chat/completions."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, out: bytearray) -> None:
        ids = self.prompts[0] if self.options.return_token_ids else UNSET
        for index in range(self.options.n):
            self._event(out, [Choice(index, delta=Message(role="assistant", content=""))], prompt_token_ids=ids)

    def chunk(self, out: bytearray, prompt: int, delta: TextDelta) -> None:
        index = self._count(prompt, delta)
        logprobs = self._logprobs(delta)
        ids = delta.token_ids if self.options.return_token_ids else UNSET
        if delta.text or logprobs or ids:
            self._event(out, [Choice(index, delta=Message(content=delta.text), logprobs=logprobs, token_ids=ids)])
        if delta.finish is not None:
            reason = delta.finish.value
            self._event(
                out, [Choice(index, delta=Message(), finish_reason=reason, stop_reason=_or_unset(delta.stop_reason))]
            )

    def body(self) -> bytes:
        choices = [
            Choice(
                index,
                message=Message("assistant", "".join(whole.text), None),
                logprobs=whole.logprobs if self.options.top_logprobs is None else whole.logprobs or ChatLogprobs([]),
                finish_reason=whole.finish,
                stop_reason=whole.stop_reason,
                token_ids=whole.token_ids if self.options.return_token_ids else UNSET,
            )
            for index, whole in enumerate(self._wholes)
        ]
        return self._whole_answer(choices, self.prompts[0] if self.options.return_token_ids else UNSET)

    def _add_logprobs(self, whole: _Whole, index: int, delta: TextDelta) -> None:
        if logprobs := self._logprobs(delta):
            if whole.logprobs is None:
                whole.logprobs = logprobs
            else:
                whole.logprobs.content += logprobs.content

    def _logprobs(self, delta: TextDelta) -> ChatLogprobs | None:
        k = self.options.top_logprobs
        if k is None or not delta.logprobs:
            return None
        return ChatLogprobs(
            [
                ChatLogprob(t.token, _finite(t.logprob), list(t.bytes), [_top_logprob(x) for x in t.top[:k]])
                for t in delta.logprobs
            ]
        )


class Echo(msgspec.Struct, frozen=True):
    """What `echo` and `text_offset` need to know of the prompts.

    texts and first_tokens: one a prompt, empty without echo; of a first token only the name counts. hidden_ids are not
    in the text. dropped_chars: how many characters of the first token are not in the text.
    """

    texts: Sequence[str] = ()
    first_tokens: Sequence[TokenLogprob] = ()
    hidden_ids: frozenset[int] = frozenset()
    dropped_chars: int = 0


class CompletionReply(Reply):
    """The answer of /v1/completions."""

    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, head: Head, prompts: Sequence[Sequence[int]], options: ReplyOptions, echo: Echo):
        super().__init__(head, prompts, options)
        self._echo = echo
        self._offsets = [_Offsets(echo.dropped_chars) for _ in self._wholes]
        self._fresh = [True] * len(self._wholes)  # no chunk of this choice was sent yet
        # An echoed prompt's logprobs come with the first delta of index 0; until then a prompt's deltas wait here.
        self._scored = options.echo and options.top_logprobs is not None
        self._held: list[list[TextDelta] | None] = [[] if self._scored else None for _ in prompts]

    def opening(self, out: bytearray) -> None:
        if self.options.echo and not self._scored:
            for index in range(len(self._wholes)):
                self._send(out, index, self._echo.texts[index // self.options.n])

    def chunk(self, out: bytearray, prompt: int, delta: TextDelta) -> None:
        held = self._held[prompt]
        if held is None:
            self._chunk(out, prompt, delta)
            return
        held.append(delta)
        if delta.prompt_logprobs is None:
            return
        self._held[prompt] = None
        for index in range(prompt * self.options.n, (prompt + 1) * self.options.n):
            self._send(out, index, self._echo.texts[prompt], self._prompt_logprobs(index, delta.prompt_logprobs))
        for waiting in held:
            self._chunk(out, prompt, waiting)

    def _chunk(self, out: bytearray, prompt: int, delta: TextDelta) -> None:
        index = self._count(prompt, delta)
        logprobs = None
        if self.options.top_logprobs is not None and delta.logprobs:
            logprobs = self._block(index, delta.logprobs)
        if delta.text or logprobs or (delta.token_ids and self.options.return_token_ids):
            self._send(out, index, delta.text, logprobs, token_ids=delta.token_ids)
        if delta.finish is not None:
            self._send(out, index, "", finish_reason=delta.finish.value, stop_reason=_or_unset(delta.stop_reason))

    def _send(
        self,
        out: bytearray,
        index: int,
        text: str,
        logprobs: TextLogprobs | None = None,
        *,
        token_ids: Sequence[int] = (),
        finish_reason: str | None = None,
        stop_reason: int | str | UnsetType = UNSET,
    ) -> None:
        choice = Choice(index, text=text, logprobs=logprobs, finish_reason=finish_reason, stop_reason=stop_reason)
        if self.options.return_token_ids:
            choice.token_ids = token_ids
            if self._fresh[index]:
                choice.prompt_token_ids = self.prompts[index // self.options.n]
        self._fresh[index] = False
        self._event(out, [choice])

    def body(self) -> bytes:
        n, wanted = self.options.n, self.options
        choices = [
            Choice(
                index,
                text=(self._echo.texts[index // n] if wanted.echo else "") + "".join(whole.text),
                logprobs=whole.logprobs
                if wanted.top_logprobs is None
                else whole.logprobs or TextLogprobs([], [], [], []),
                finish_reason=whole.finish,
                stop_reason=whole.stop_reason,
                token_ids=whole.token_ids if wanted.return_token_ids else UNSET,
                prompt_token_ids=self.prompts[index // n] if wanted.return_token_ids else UNSET,
            )
            for index, whole in enumerate(self._wholes)
        ]
        return self._whole_answer(choices)

    def add(self, prompt: int, delta: TextDelta) -> None:
        held = self._held[prompt]
        if held is None:
            super().add(prompt, delta)
            return
        held.append(delta)
        if delta.prompt_logprobs is None:
            return
        self._held[prompt] = None
        for index in range(prompt * self.options.n, (prompt + 1) * self.options.n):
            self._wholes[index].logprobs = self._prompt_logprobs(index, delta.prompt_logprobs)
        for waiting in held:
            super().add(prompt, waiting)

    def _add_logprobs(self, whole: _Whole, index: int, delta: TextDelta) -> None:
        if not delta.logprobs:
            return
        block = self._block(index, delta.logprobs)
        if whole.logprobs is None:
            whole.logprobs = block
            return
        for name in TextLogprobs.__struct_fields__:
            getattr(whole.logprobs, name).extend(getattr(block, name))

    def _prompt_logprobs(self, index: int, tokens: Sequence[TokenLogprob | None]) -> TextLogprobs:
        first = self._echo.first_tokens[index // self.options.n]
        head = TextLogprobs([self._place(index, first)], [None], [_name(first)], [None])
        rest = self._block(index, [t for t in tokens[1:] if t is not None])
        for name in TextLogprobs.__struct_fields__:
            getattr(head, name).extend(getattr(rest, name))
        return head

    def _block(self, index: int, tokens: Sequence[TokenLogprob]) -> TextLogprobs:
        k = self.options.top_logprobs or 0
        return TextLogprobs(
            [self._place(index, t) for t in tokens],
            [_finite(t.logprob) for t in tokens],
            [_name(t) for t in tokens],
            [_top_by_name(t, k) for t in tokens],
        )

    def _place(self, index: int, token: TokenLogprob) -> int:
        return self._offsets[index].place(b"" if token.token_id in self._echo.hidden_ids else token.bytes)


class _Offsets:
    """Where in the text each token begins, in characters; part of a character begins where the character does."""

    def __init__(self, dropped_chars: int) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._chars = -dropped_chars

    def place(self, token: bytes) -> int:
        start = max(0, self._chars)
        self._chars += len(self._decoder.decode(token))
        return start


def _name(token: TokenLogprob) -> str:
    """A token's text, or OpenAI's `bytes:\\xe2\\x80` for part of a character, so that no two are confused."""
    try:
        token.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in token.bytes)
    return token.token


def _top_by_name(token: TokenLogprob, k: int) -> dict[str, float]:
    """The k best by name, and the token itself. Of two ids with one name the other one is called `token_id:ID`."""
    found = {_name(token): _finite(token.logprob)}
    for other in token.top[:k]:
        if other.token_id != token.token_id:
            name = _name(other)
            found[f"token_id:{other.token_id}" if name in found else name] = _finite(other.logprob)
    return found


def _top_logprob(token: TokenLogprob) -> TopLogprob:
    return TopLogprob(token.token, _finite(token.logprob), list(token.bytes))


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB


def _or_unset(value: int | str | None) -> int | str | UnsetType:
    return UNSET if value is None else value


def _write(out: bytearray, event: msgspec.Struct) -> None:
    out += b"data: "
    _encoder.encode_into(event, out, len(out))
    out += b"\n\n"
