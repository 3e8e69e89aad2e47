"""One HTTP request and its answer over raw ASGI: limits on what is read, errors, headers, access log."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import msgspec

from jaxserve.errors import BodyTooLarge, UnsupportedParameter
from jaxserve.server.openai import REQUEST_ID
from jaxserve.server.status import error_body, retry_after_s, status_of

type Scope = MutableMapping[str, Any]
type Headers = Iterable[tuple[bytes, bytes]]

JSON = b"application/json"
CLIENT_GONE = 499  # what nginx calls it; nobody receives it
_MAX_WARNED_NAMES = 10
_LINGER_S = 2.0

_log = logging.getLogger("jaxserve.http")


class ClientGone(Exception):
    """The client hung up before its answer was complete."""


class Exchange:
    """One request and its answer. `notes` go into the access log line; `headers` into every answer."""

    def __init__(
        self,
        scope: Scope,
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
    ):
        self.scope = scope
        self.receive = receive
        self._send = send
        self._arrival = time.monotonic()
        given = (self.header(b"x-request-id") or b"").decode("latin-1")
        self.request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.headers = [(b"x-request-id", self.request_id.encode())]
        self.status: int | None = None
        self.notes: dict[str, Any] = {}

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.scope["headers"] if key == name), None)

    async def body(self, limit: int) -> bytes:
        """The request's body. Raises BodyTooLarge as soon as it is known to exceed `limit` bytes, ClientGone.

        UnsupportedParameter for one that is compressed.
        """
        coding = (self.header(b"content-encoding") or b"identity").decode("latin-1").strip()
        if coding.lower() != "identity":
            raise UnsupportedParameter(
                f"content-encoding {ascii(coding[:40])} is not supported by this server: send the body uncompressed"
            )
        too_large = BodyTooLarge(f"the request body is larger than {limit} bytes (--max-body-bytes)")
        declared = self.header(b"content-length") or b"0"
        if declared.isdigit() and int(declared[:20]) > limit:
            raise too_large
        parts, size, more = [], 0, True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            more = message.get("more_body", False)
            size += len(part)
            if size > limit:
                raise too_large
            parts.append(part)
        return b"".join(parts)

    def warn_of(self, ignored: list[str]) -> None:
        """Names the fields that were ignored in the `warnings` header."""
        if ignored:
            names = [re.sub(r"[^A-Za-z0-9_.-]", "?", name[:64]) for name in ignored[:_MAX_WARNED_NAMES]]
            more = f" and {len(ignored) - len(names)} more" if len(ignored) > len(names) else ""
            self.headers.append((b"warnings", f"ignored fields: {', '.join(names)}{more}".encode()))

    async def start(self, status: int, headers: Headers) -> None:
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *self.headers]})

    async def send(self, data: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def reply(self, status: int, data: bytes, content_type: bytes = JSON, headers: Headers = ()) -> None:
        """The whole answer at once."""
        await self.start(status, _entity(data, content_type, headers))
        await self.send(data, more=False)

    async def reply_json(self, value: Any, status: int = 200) -> None:
        await self.reply(status, msgspec.json.encode(value))

    async def reply_error(self, error: Exception) -> None:
        """The error object of `error`; raises it again if the answer has begun already."""
        self.note_failure(error)
        row = status_of(error)
        if self.status is not None:
            raise error
        headers = []
        if (wait := retry_after_s(error)) is not None:
            headers.append((b"retry-after", str(wait).encode()))
        data = msgspec.json.encode(error_body(error))
        if not isinstance(error, BodyTooLarge):
            await self.reply(row.http, data, headers=headers)
            return
        # Closing at once could reset the connection before the client, still sending, has read the answer.
        await self.start(row.http, _entity(data, JSON, [*headers, (b"connection", b"close")]))
        await self.send(data, more=True)
        try:
            async with asyncio.timeout(_LINGER_S):
                while (message := await self.receive())["type"] == "http.request" and message.get("more_body"):
                    pass
        except TimeoutError:
            pass
        await self.send(b"", more=False)

    def note_failure(self, error: Exception) -> None:
        """Notes what went wrong for the access log line; a fault of ours gets its traceback logged."""
        self.notes["error"] = type(error).__name__
        if status_of(error).http == 500:
            _log.error("%s failed (id=%s)", self._line(), self.request_id, exc_info=error)

    def log(self, *, quiet: bool) -> None:
        """One line for the finished exchange, at DEBUG level if it is of a kind that nobody wants to read."""
        level = logging.DEBUG if quiet else logging.INFO
        if _log.isEnabledFor(level):
            duration_ms = 1000 * (time.monotonic() - self._arrival)
            notes = "".join(f" {name}={value}" for name, value in self.notes.items())
            _log.log(level, "%s %s %.1f ms id=%s%s", self._line(), self.status, duration_ms, self.request_id, notes)

    def _line(self) -> str:
        client = self.scope.get("client")
        path = self.scope["path"][:200].encode("unicode_escape").decode()
        return f'{client[0] if client else "-"} "{self.scope["method"]} {path}"'


def _entity(data: bytes, content_type: bytes, headers: Headers) -> list[tuple[bytes, bytes]]:
    return [(b"content-type", content_type), (b"content-length", str(len(data)).encode()), *headers]
