"""Text that grows: ids to text as they come, and the strings that end it; one object a sequence."""

import codecs
from collections.abc import Sequence

from jaxserve.tokenizer.base import Tokenizer, join_bytes


class Detokenizer:
    """Text of a growing sequence of ids, a constant time a token; holds back characters that are not complete.

    However the ids are pushed, the pieces and flush() join to decode(prompt_tail + ids) less decode(prompt_tail):
    a leading space that belongs to the continuation of a text is kept. A character that begins in prompt_tail is
    given whole once its last byte comes. prompt_tail may be the whole prompt; only as much as needed is read.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, prompt_tail: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        for token in reversed(prompt_tail):
            tail = join_bytes(tokenizer, (token,), skip_special_tokens) + tail
            if len(tail) >= 4:  # a character has at most four bytes: nothing before can still be open
                break
        self._decoder.decode(tail)
        self._at_start = tokenizer.strips_leading_space and not tail

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain now."""
        return self._strip(self._decoder.decode(join_bytes(self._tokenizer, ids, self._skip)))

    def flush(self) -> str:
        """What was held back, at the end of the sequence."""
        return self._strip(self._decoder.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text


class StopStrings:
    """Finds the first of several strings in growing text, and holds back what may be its beginning.

    The match that ends first wins; of several that end there, the longest. Nothing of the match is given out, or
    with `include` all of it. However the text is pushed, the result is the same.
    """

    def __init__(self, stop: Sequence[str], include: bool = False):
        self._stop = tuple(stop)
        self._include = include
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str, *, armed: bool = True) -> tuple[str, str | None]:
        """(text to emit, the string that matched). After a match, nothing more is emitted.

        A string that ends in text pushed with armed=False does not match.
        """
        if self._matched is not None:
            return "", self._matched
        if not self._stop:
            return text, None
        window = self._held + text
        if armed and text:
            found = None
            for stop in self._stop:
                start = window.find(stop, max(0, len(self._held) - len(stop) + 1))
                if start >= 0 and (found is None or (start + len(stop), start) < found[:2]):
                    found = (start + len(stop), start, stop)
            if found is not None:
                end, start, self._matched = found
                self._held = ""
                return window[: end if self._include else start], self._matched
        keep = max(self._overlap(window, stop) for stop in self._stop)
        self._held = window[len(window) - keep :]
        return window[: len(window) - keep], None

    def flush(self) -> str:
        """What was held back, when the text ends without a match."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(window: str, stop: str) -> int:
        """Length of the longest proper beginning of `stop` that `window` ends in."""
        for length in range(min(len(window), len(stop) - 1), 0, -1):
            if stop[length - 1] == window[-1] and window.endswith(stop[:length]):
                return length
        return 0
