"""The HTTP front end as one ASGI application: routes, server-sent events, hang-ups and limits."""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.routing import Route, Router

from jaxserve import __version__
from jaxserve.client import EngineClient, EngineState
from jaxserve.config import ServerOptions
from jaxserve.errors import EngineStopped, JaxserveError
from jaxserve.metrics import FrontMetrics
from jaxserve.server import about, admin
from jaxserve.server.embeddings import Pooling, read_embeddings, read_score
from jaxserve.server.events import Ended, Mailbox, Signal, under_way
from jaxserve.server.exchange import CLIENT_GONE, ClientGone, Exchange
from jaxserve.server.generation import (
    Collecting,
    Generation,
    in_thread_if,
    read_chat,
    read_completion,
    system_fingerprint,
)
from jaxserve.server.openai import check_model
from jaxserve.server.replies import Head, Reply
from jaxserve.server.wire import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    ModelBody,
    ScoreBody,
    TokenizeBody,
    UpdateParamsBody,
    parse_body,
)
from jaxserve.text import SLOW_TO_ENCODE_CHARS, TextDelta, TextModel

FIRST_DELTA_S = 5.0  # how long the status waits for the first delta, which may yet be an error

_SSE_HEADERS = (
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
_KEEP_ALIVE = b": keep-alive\n\n"
_METHODS = ("GET", "HEAD", "POST")
_QUIET = ("/health", "/livez", "/readyz", "/metrics")


class HttpApp:
    """The ASGI application. Set `draining` to refuse new work and report ill health; answers under way go on."""

    def __init__(self, options: ServerOptions, model: TextModel, client: EngineClient, metrics: FrontMetrics):
        self.draining = False
        self._options = options
        self._model = model
        self._client = client
        self._metrics = metrics
        self._created = int(time.time())
        self._router = Router(
            [
                self._route("/v1/chat/completions", self._chat, "POST"),
                self._route("/v1/completions", self._completion, "POST"),
                self._route("/v1/embeddings", self._embeddings, "POST"),
                self._route("/v1/score", self._score, "POST"),
                self._route("/score", self._score, "POST"),
                self._route("/v1/models", self._models),
                self._route("/v1/models/{name:path}", self._models),
                self._route("/tokenize", self._tokenize, "POST"),
                self._route("/detokenize", self._detokenize, "POST"),
                self._route("/tokenizer_info", self._tokenizer_info),
                self._route("/health", self._health),
                self._route("/readyz", self._health),
                self._route("/livez", self._livez),
                self._route("/metrics", self._metrics_text),
                self._route("/version", self._version),
                *([self._route("/admin/update_params", self._update_params, "POST")] if options.admin_key else []),
            ],
            redirect_slashes=False,
        )

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[..., Any]) -> None:
        assert scope["type"] == "http", "the server is configured without lifespan and websockets"
        exchange, arrival = Exchange(scope, receive, send), time.monotonic()
        scope["app"], scope["exchange"] = self, exchange
        try:
            await self._router(scope, receive, send)
        except HTTPException as error:
            await self._refuse(exchange, error)
        except ClientGone:
            exchange.status = CLIENT_GONE
        except Exception as error:
            await exchange.reply_error(error)
        finally:
            endpoint = scope.get("endpoint")
            route = endpoint.path if isinstance(endpoint, _Endpoint) else "none"
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.http(route, method, exchange.status or CLIENT_GONE, time.monotonic() - arrival)
            exchange.log(quiet=route in _QUIET)

    def _route(self, path: str, handle: Callable[[Exchange], Awaitable[None]], method: str = "GET") -> Route:
        return Route(path, _Endpoint(path, handle), methods=[method])

    async def _refuse(self, exchange: Exchange, error: HTTPException) -> None:
        """The error object for a path or method that there is none of."""
        method, path = exchange.scope["method"], exchange.scope["path"][:200]
        allowed = (error.headers or {}).get("Allow", "")
        if error.status_code == 405:
            message, kind, code = f"{method} is not served at {path}; use {allowed}", "invalid_request_error", None
        else:
            message, kind, code = f"unknown request URL: {method} {path}", "not_found_error", "unknown_url"
        if allowed:
            exchange.headers.append((b"allow", allowed.encode()))
        body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
        await exchange.reply_json(body, error.status_code)

    # Generation

    async def _chat(self, exchange: Exchange) -> None:
        body = await self._read(exchange, ChatBody)
        await self._answer(exchange, await read_chat(body, self._model, self._head("chatcmpl", body)))

    async def _completion(self, exchange: Exchange) -> None:
        body = await self._read(exchange, CompletionBody)
        await self._answer(exchange, await read_completion(body, self._model, self._head("cmpl", body)))

    async def _embeddings(self, exchange: Exchange) -> None:
        body = await self._read(exchange, EmbeddingBody)
        await self._answer_pooled(exchange, await read_embeddings(body, self._model, self._head("embd", body)))

    async def _score(self, exchange: Exchange) -> None:
        body = await self._read(exchange, ScoreBody)
        await self._answer_pooled(exchange, await read_score(body, self._model, self._head("score", body)))

    async def _read[Body: ModelBody](self, exchange: Exchange, kind: type[Body]) -> Body:
        """The body of a request for the model, if there is an engine to do it and it is asked for by its name."""
        data = await exchange.body(self._options.max_body_bytes)
        if self.draining:
            raise EngineStopped("the server is shutting down")
        status = self._client.status
        if status.state is not EngineState.READY:
            doing = "loading the model" if status.state is EngineState.LOADING else status.state.value
            raise EngineStopped(f"the engine is {doing}" + (f": {status.detail}" if status.detail else ""))
        body, ignored = parse_body(data, kind)
        exchange.warn_of(ignored)
        check_model(body.model, self._model.name)
        if body.user is not None:
            exchange.notes["user"] = ascii(body.user[:64])
        return body

    def _head(self, prefix: str, body: ModelBody) -> Head:
        name = body.request_id or uuid.uuid4().hex
        info = self._client.info
        fingerprint = system_fingerprint(info)
        return Head(f"{prefix}-{name}", int(time.time()), self._model.name, fingerprint, info.weights_version)

    async def _answer_pooled(self, exchange: Exchange, asked: Pooling) -> None:
        sources = asked.start(self._model, uuid.uuid4().hex)
        exchange.notes |= {"reply": asked.reply.head.id, "prompt_tokens": asked.reply.prompt_tokens}
        async with under_way(sources, exchange.receive, self._client.info.max_num_seqs) as mailbox:
            await self._collect(asked.reply, mailbox)
        await exchange.reply(200, asked.reply.body(), headers=(_version_header(asked.reply.weights_versions),))

    async def _answer(self, exchange: Exchange, asked: Generation) -> None:
        reply, stream = asked.reply, bool(asked.body.stream)
        sources = asked.start(self._model, uuid.uuid4().hex)  # a client may give two requests one request_id
        exchange.notes["reply"] = reply.head.id
        try:
            # As many prompts at once as the engine computes at once: one request cannot fill the queue by itself.
            async with under_way(sources, exchange.receive, self._client.info.max_num_seqs) as mailbox:
                if stream:
                    await self._stream(exchange, reply, mailbox)
                else:
                    await self._collect(reply, mailbox)
            if not stream:
                await exchange.reply(200, reply.body(), headers=(_version_header(reply.weights_versions),))
        finally:
            exchange.notes |= {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}

    async def _collect[Delta](self, reply: Collecting[Delta], mailbox: Mailbox[Delta]) -> None:
        left = len(reply.prompts)
        while left:
            for event in await mailbox.take():
                match event:
                    case Signal.DISCONNECTED:
                        raise ClientGone
                    case Ended(error=Exception() as error):
                        raise error
                    case Ended():
                        left -= 1
                    case (prompt, delta):
                        reply.add(prompt, delta)
        _check_complete(reply)

    async def _stream(self, exchange: Exchange, reply: Reply, mailbox: Mailbox[TextDelta]) -> None:
        """Writes events as they come, all that are ready at once; an error before the first still sets the status.

        Headers that go out before the first token say the weights' version of that moment; the events know better.
        """
        left = len(reply.prompts)
        out = bytearray()
        reply.opening(out)
        now = asyncio.get_running_loop().time
        silence_s = self._options.sse_keep_alive_interval
        started, last_write = False, now()
        mailbox.tick_after(FIRST_DELTA_S)
        while left:
            ticked = False
            try:
                for event in await mailbox.take():
                    match event:
                        case Signal.DISCONNECTED:
                            raise ClientGone
                        case Signal.TICK:
                            ticked = True
                        case Ended(error=Exception() as error):
                            raise error
                        case Ended():
                            left -= 1
                        case (prompt, delta):
                            reply.chunk(out, prompt, delta)
                if not left:
                    _check_complete(reply)
                    reply.closing(out)
            except Exception as error:
                if not started or isinstance(error, ClientGone):
                    raise
                exchange.note_failure(error)
                reply.failing(out, error)
                left = 0
            if not started and (out or ticked):
                await exchange.start(200, (*_SSE_HEADERS, _version_header(reply.weights_versions)))
                started, last_write, ticked = True, now(), True
            if ticked and silence_s:
                silent_s = 0 if out else now() - last_write
                if silent_s >= silence_s:
                    out += _KEEP_ALIVE
                    silent_s = 0
                mailbox.tick_after(silence_s - silent_s)
            if out:
                await exchange.send(bytes(out), more=left > 0)
                out.clear()
                last_write = now()

    # Everything else

    async def _models(self, exchange: Exchange) -> None:
        info = self._client.info
        card = about.model_card(self._model.name, info, self._created)
        exchange.headers.append(_version_header([info.weights_version]))
        name = exchange.scope["path_params"].get("name")
        if name is None:
            await exchange.reply_json({"object": "list", "data": [card]})
        else:
            check_model(name, self._model.name)
            await exchange.reply_json(card)

    async def _tokenize(self, exchange: Exchange) -> None:
        body, ignored = parse_body(await exchange.body(self._options.max_body_bytes), TokenizeBody)
        exchange.warn_of(ignored)
        check_model(body.model, self._model.name)
        info = self._client.info
        size = len(body.prompt or "") + len(body.content or "") + sum(len(str(m)) for m in body.messages or ())
        answer = await in_thread_if(size > SLOW_TO_ENCODE_CHARS, lambda: about.tokenize(body, self._model, info))
        await exchange.reply_json(answer)

    async def _detokenize(self, exchange: Exchange) -> None:
        body, ignored = parse_body(await exchange.body(self._options.max_body_bytes), DetokenizeBody)
        exchange.warn_of(ignored)
        check_model(body.model, self._model.name)
        info = self._client.info
        slow = len(body.tokens) > SLOW_TO_ENCODE_CHARS
        await exchange.reply_json(await in_thread_if(slow, lambda: about.detokenize(body, self._model, info)))

    async def _tokenizer_info(self, exchange: Exchange) -> None:
        await exchange.reply_json(about.tokenizer_info(self._model, self._client.info))

    async def _health(self, exchange: Exchange) -> None:
        status, body = about.health(self._client.status, self.draining)
        await exchange.reply_json(body, status)

    async def _livez(self, exchange: Exchange) -> None:
        await exchange.reply_json({"status": "ok"})

    async def _metrics_text(self, exchange: Exchange) -> None:
        text = self._metrics.text() + await self._client.metrics_text()
        await exchange.reply(200, text, CONTENT_TYPE_LATEST.encode())

    async def _update_params(self, exchange: Exchange) -> None:
        assert self._options.admin_key is not None, "there is no such route without a key"
        admin.check_key(exchange, self._options.admin_key)
        body, ignored = parse_body(await exchange.body(self._options.max_body_bytes), UpdateParamsBody)
        exchange.warn_of(ignored)
        await exchange.reply_json(await admin.update_params(body, self._client))

    async def _version(self, exchange: Exchange) -> None:
        await exchange.reply_json({"version": __version__})


class _Endpoint:
    """A handler as Starlette wants it, an ASGI application that is no function; knows its path for the metrics."""

    def __init__(self, path: str, handle: Callable[[Exchange], Awaitable[None]]):
        self.path = path
        self._handle = handle

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._handle(scope["exchange"])


def _version_header(versions: Sequence[int]) -> tuple[bytes, bytes]:
    return b"x-jaxserve-weights-version", ", ".join(map(str, versions)).encode()


def _check_complete(reply: Collecting[Any]) -> None:
    if not reply.complete:
        raise JaxserveError("the engine ended a request without finishing all of its sequences")
