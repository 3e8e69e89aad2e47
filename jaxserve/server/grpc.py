"""The gRPC listener: jaxserve.v1 messages to and from a TextModel, with health and reflection; text is not its work."""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from functools import partial

import grpc
from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from jaxserve.client import EngineClient, EngineState
from jaxserve.config import authority
from jaxserve.embedding import check_dimensions, finished
from jaxserve.errors import ConfigError, DeadlineExceeded, InvalidParameter, JaxserveError, ModelNotFound
from jaxserve.request import MAX_TOP_LOGPROBS, SamplingParams, embedding_of
from jaxserve.server.embeddings import check_count, encoded, vectors_of
from jaxserve.server.proto import jaxserve_v1_pb2 as pb
from jaxserve.server.proto import jaxserve_v1_pb2_grpc as pb_grpc
from jaxserve.server.proto.translate import Answer, sampling_params, token_logprob
from jaxserve.server.status import grpc_code, public_message, retry_after_s
from jaxserve.text import SLOW_TO_ENCODE_CHARS, TextModel, TokenLogprob

SERVICE = pb.DESCRIPTOR.services_by_name["Jaxserve"].full_name
MAX_REQUEST_ID_CHARS = 128
MAX_CONTINUATIONS = 4096
_MAX_STATUS_CHARS = 512  # a status travels percent-encoded in HTTP/2 headers, which clients limit to 8 KiB
_HEALTH_POLL_S = 0.2
_LAST_STATUS_S = 0.2
_FOREVER_S = 1e8  # clients that want no deadline often send one years away

_log = logging.getLogger(__name__)


class GrpcServer:
    """A listening gRPC server. `address` is what clients connect to, with the port that was found."""

    def __init__(self, server: grpc.aio.Server, servicer: "JaxserveServicer", follower: "HealthFollower", address: str):
        self.address = address
        self._server = server
        self._servicer = servicer
        self._follower = follower

    async def drain(self) -> None:
        """Turns health to NOT_SERVING, for good. Calls go on being answered."""
        await self._follower.drain()

    async def stop(self, grace: float | None = None) -> None:
        """Takes no new calls, gives those in flight `grace` seconds (None: none), and ends."""
        await self.drain()
        if grace:
            stopping = asyncio.create_task(self._server.stop(grace))
            # A health Watch never ends by itself, so only our own calls are waited for.
            await self._servicer.wait_idle(grace)
            await self._server.stop(min(grace, _LAST_STATUS_S))
            await stopping
        await self._server.stop(None)


async def start_grpc(
    text_model: TextModel, client: EngineClient, *, host: str, port: int, max_message_bytes: int
) -> GrpcServer:
    """Listens on host:port (0: a free one) and answers; UNAVAILABLE until the engine is READY.

    Raises ConfigError if the address cannot be had.
    """
    server = grpc.aio.server(
        interceptors=[Unreadable()],
        options=[
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", -1),  # what we send follows from what we accepted
            ("grpc.so_reuseport", 0),  # else two servers could share a port without knowing
            # A long decode is a quiet connection on which clients ping; the defaults would answer GOAWAY
            # too_many_pings.
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ],
    )
    servicer = JaxserveServicer(text_model, client)
    follower = HealthFollower(client)
    pb_grpc.add_JaxserveServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(follower.servicer, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        bound = server.add_insecure_port(authority(host, port))
    except RuntimeError as error:
        raise ConfigError(
            f"gRPC cannot listen on {authority(host, port)} (port in use, or not an address of this machine); "
            "give another --grpc-port, 0 for a free one, -1 for no gRPC"
        ) from error
    await follower.start()
    await server.start()
    return GrpcServer(server, servicer, follower, authority(host, bound))


class Unreadable(grpc.aio.ServerInterceptor):
    """Answers bytes that are no message of our method's with INVALID_ARGUMENT; gRPC itself would say UNKNOWN."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(details)
        if handler is None or not details.method.startswith(f"/{SERVICE}/"):
            return handler
        streams = handler.response_streaming
        answer = handler.unary_stream if streams else handler.unary_unary

        def read(data: bytes) -> Message | None:
            try:
                return handler.request_deserializer(data)
            except DecodeError:
                return None

        async def call(request: Message | None, context: grpc.aio.ServicerContext) -> Message | None:
            if request is None:
                what = f"the request is not the message that {details.method} takes; see jaxserve_v1.proto"
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, what)
            return await answer(request, context)

        make = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        return make(call, request_deserializer=read, response_serializer=handler.response_serializer)


class HealthFollower:
    """grpc.health.v1 for the server ("") and our service: SERVING while the engine is READY, until drained."""

    def __init__(self, client: EngineClient):
        self.servicer = health.aio.HealthServicer()
        self._client = client
        self._serving: bool | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Sets the present state and follows the engine's from then on."""
        await self._update()
        self._task = asyncio.create_task(self._follow())

    async def drain(self) -> None:
        """NOT_SERVING from now on."""
        if self._task is not None:
            self._task.cancel()
        await self.servicer.enter_graceful_shutdown()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_HEALTH_POLL_S)
            await self._update()

    async def _update(self) -> None:
        serving = self._client.status.state is EngineState.READY
        if serving != self._serving:
            self._serving = serving
            states = health_pb2.HealthCheckResponse
            for name in (health.OVERALL_HEALTH, SERVICE):
                await self.servicer.set(name, states.SERVING if serving else states.NOT_SERVING)


class JaxserveServicer(pb_grpc.JaxserveServicer):
    """jaxserve.v1.Jaxserve on one TextModel. Method names are the proto's."""

    def __init__(self, text_model: TextModel, client: EngineClient):
        self._model = text_model
        self._client = client
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self, timeout_s: float) -> None:
        """Returns when no call is in flight, or after timeout_s."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            _log.warning("%d gRPC calls are cut off", self._calls)

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        async with self._call(context):
            self._check_model(request.model)
            request_id, engine_id = _request_ids(request.request_id)
            params = sampling_params(request.params, self._model.defaults)
            prompt = await self._prompt_ids(request.prompt)
            about = pb.PromptInfo(request_id=request_id, model=self._model.name)
            if request.response.prompt_token_ids:
                about.token_ids.extend(prompt)
            answer = Answer(self._model.tokenizer, request.response, about, prompt, params.n)
            deltas = self._model.generate(
                prompt,
                params,
                request_id=engine_id,
                priority=request.priority,
                timeout_s=_time_left(context),
                cache_salt=request.cache_salt,
            )
            # Written here rather than yielded: a cancelled call then closes `deltas` at once, which aborts the work.
            async with aclosing(deltas):
                async for delta in deltas:
                    if delta.weights_version is not None:
                        context.set_trailing_metadata(_version_metadata([delta.weights_version]))
                    for message in answer.messages(delta):
                        await context.write(message)

    async def Score(self, request: pb.ScoreRequest, context: grpc.aio.ServicerContext) -> pb.ScoreResponse:
        async with self._call(context):
            self._check_model(request.model)
            request_id, engine_id = _request_ids(request.request_id)
            if not 0 < len(request.continuations) <= MAX_CONTINUATIONS:
                raise InvalidParameter(
                    f"continuations takes 1 to {MAX_CONTINUATIONS} entries, got {len(request.continuations)}",
                    param="continuations",
                )
            if request.top_logprobs > MAX_TOP_LOGPROBS:
                raise InvalidParameter(
                    f"top_logprobs must be in [0, {MAX_TOP_LOGPROBS}], got {request.top_logprobs}", param="top_logprobs"
                )
            prompt = await self._prompt_ids(request.prompt)
            versions: set[int] = set()

            async def score(i: int) -> pb.ContinuationScore:
                return await self._score(request, prompt, i, f"{engine_id}-{i}", context, versions)

            scores = await self._each(len(request.continuations), score)
            context.set_trailing_metadata(_version_metadata(versions))
            return pb.ScoreResponse(request_id=request_id, model=self._model.name, scores=scores)

    async def Embed(self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext) -> pb.EmbedResponse:
        async with self._call(context):
            self._check_model(request.model)
            request_id, engine_id = _request_ids(request.request_id)
            if not request.prompts:
                raise InvalidParameter("prompts is missing: give at least one", param="prompts")
            check_count(len(request.prompts), "prompts")
            info = embedding_of(self._client.info)
            dimensions = request.dimensions if request.HasField("dimensions") else None
            check_dimensions(dimensions, info)
            given = [self._to_embed(prompt, f"prompts[{i}]") for i, prompt in enumerate(request.prompts)]
            longest = request.truncate_prompt_tokens if request.HasField("truncate_prompt_tokens") else None
            fields = ["prompts"] * len(given)
            prompts = await encoded(given, longest, self._model, fields)
            vectors = vectors_of(
                prompts, self._model, fields, engine_id,
                priority=request.priority, timeout_s=_time_left(context), cache_salt=request.cache_salt,
            )  # fmt: skip
            versions: set[int] = set()

            async def embed(i: int) -> pb.Embedding:
                async with aclosing(vectors[i]) as deltas:
                    (delta,) = [delta async for delta in deltas]
                versions.add(delta.weights_version)
                usage = pb.Usage(prompt_tokens=len(prompts[i]), cached_tokens=delta.num_cached_tokens)
                return pb.Embedding(values=finished(delta.pooled, info, dimensions), usage=usage)

            embeddings = await self._each(len(prompts), embed)
            context.set_trailing_metadata(_version_metadata(versions))
            return pb.EmbedResponse(request_id=request_id, model=self._model.name, embeddings=embeddings)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        async with self._call(context):
            info = self._client.info
            context.set_trailing_metadata(_version_metadata([info.weights_version]))
            model = pb.Model(
                name=self._model.name,
                architecture=info.architecture,
                max_model_len=info.max_model_len,
                vocab_size=info.vocab_size,
                dtype=info.dtype,
                num_params=info.num_params,
            )
            return pb.ListModelsResponse(models=[model])

    async def Tokenize(self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext) -> pb.TokenizeResponse:
        async with self._call(context):
            self._check_model(request.model)
            max_model_len = self._client.info.max_model_len
            ids = await self._prompt_ids(request.prompt, to_compute=False)
            tokens = [
                pb.Token(
                    token_id=i, token=self._model.tokenizer.token_str(i), bytes=self._model.tokenizer.token_bytes(i)
                )
                for i in ids
            ]
            return pb.TokenizeResponse(tokens=tokens, max_model_len=max_model_len)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        async with self._call(context):
            self._check_model(request.model)
            ids = self._checked_ids(request.token_ids, "token_ids")
            skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
            return pb.DetokenizeResponse(text=self._model.tokenizer.decode(ids, skip_special_tokens=skip))

    @asynccontextmanager
    async def _call(self, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        """Counts a call in flight and turns the errors of its body into the call's status."""
        self._calls += 1
        self._idle.clear()
        try:
            yield
        except Exception as error:
            code = grpc_code(error)
            if code is grpc.StatusCode.INTERNAL:
                _log.exception("a gRPC call failed")
            await context.abort(code, _shortened(public_message(error)), _trailing_metadata(error))
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    async def _each[Result](self, count: int, work: Callable[[int], Awaitable[Result]]) -> list[Result]:
        """What `work` makes of each number below `count`; raises the first error, and the others' work is aborted.

        As many at once as the engine computes at once: one call cannot fill the queue by itself.
        """
        turns = asyncio.Semaphore(self._client.info.max_num_seqs)

        async def turn(i: int) -> Result:
            async with turns:
                return await work(i)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(turn(i)) for i in range(count)]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    def _check_model(self, name: str) -> None:
        if name and name != self._model.name:
            raise ModelNotFound(
                f"The model `{name[:200]}` does not exist; this server serves `{self._model.name}`.", param="model"
            )

    def _checked_ids(self, ids: Iterable[int], param: str) -> tuple[int, ...]:
        vocab_size = self._client.info.vocab_size
        if bad := [i for i in ids if i >= vocab_size]:
            raise InvalidParameter(
                f"{param} holds {bad[0]}, which is out of range: the vocabulary has {vocab_size} ids", param=param
            )
        return tuple(ids)

    async def _prompt_ids(self, prompt: pb.Prompt, *, to_compute: bool = True) -> tuple[int, ...]:
        kind = prompt.WhichOneof("kind")
        if kind == "token_ids":
            return self._checked_ids(prompt.token_ids.ids, "prompt")
        if kind == "text":
            text = prompt.text
            encode = partial(self._model.encode_prompt, text)
        elif kind == "chat":
            chat = prompt.chat
            text = "".join(m.content for m in chat.messages)
            generation_prompt = not chat.continue_final_message
            if chat.HasField("add_generation_prompt"):
                generation_prompt = chat.add_generation_prompt
            encode = partial(
                self._model.encode_chat,
                [{"role": m.role, "content": m.content} for m in chat.messages],
                add_generation_prompt=generation_prompt,
                continue_final_message=chat.continue_final_message,
                template_kwargs=json_format.MessageToDict(chat.chat_template_kwargs),
            )
        else:
            raise InvalidParameter("prompt is missing: give text, token_ids or chat", param="prompt")
        if prompt.ByteSize() > SLOW_TO_ENCODE_CHARS:  # other calls go on meanwhile

            def checked() -> tuple[int, ...]:
                if to_compute:
                    self._model.check_length(text, "prompt")
                return encode()

            return await asyncio.to_thread(checked)
        return encode()

    def _to_embed(self, prompt: pb.Prompt, param: str) -> str | tuple[int, ...]:
        kind = prompt.WhichOneof("kind")
        if kind == "text":
            return prompt.text
        if kind == "token_ids":
            return self._checked_ids(prompt.token_ids.ids, param)
        found = "is missing" if kind is None else "is a chat, which is not embedded"
        raise InvalidParameter(f"{param} {found}: give text or token_ids", param="prompts")

    async def _sequence(self, request: pb.ScoreRequest, prompt: tuple[int, ...], i: int) -> tuple[tuple[int, ...], int]:
        """Prompt and continuation i as one sequence of ids, and where the part to score begins."""
        continuation, param = request.continuations[i], f"continuations[{i}]"
        kind = continuation.WhichOneof("kind")
        if kind is None:
            raise InvalidParameter(f"{param} is missing: give text or token_ids", param="continuations")
        if kind == "token_ids":
            ids, start = prompt + self._checked_ids(continuation.token_ids.ids, param), len(prompt)
        elif request.prompt.WhichOneof("kind") == "text":
            # The tokenizer may join the two at the seam, as it would when it reads them in one text.
            ids = await self._prompt_ids(pb.Prompt(text=request.prompt.text + continuation.text))
            start = next(
                (k for k, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids))
            )
        else:
            encode = self._model.tokenizer.encode
            ids = prompt + tuple(encode(continuation.text, add_special_tokens=False, parse_special=True))
            start = len(prompt)
        if start == len(ids):
            raise InvalidParameter(f"{param} is empty: there is no token to score", param="continuations")
        if start == 0:
            raise InvalidParameter(
                f"no token precedes {param}, so its first token has no probability; give a longer prompt",
                param="prompt",
            )
        return ids, start

    async def _score(
        self,
        request: pb.ScoreRequest,
        prompt: tuple[int, ...],
        i: int,
        engine_id: str,
        context: grpc.aio.ServicerContext,
        versions: set[int],
    ) -> pb.ContinuationScore:
        """The score of continuation i; adds the version of the weights that it is of to `versions`."""
        ids, start = await self._sequence(request, prompt, i)
        params = SamplingParams(
            max_tokens=0, temperature=0.0, prompt_logprobs=request.top_logprobs, prompt_logprobs_from=start
        )
        deltas = self._model.generate(
            ids,
            params,
            request_id=engine_id,
            priority=request.priority,
            timeout_s=_time_left(context),
            cache_salt=request.cache_salt,
        )
        scored: list[TokenLogprob] = []
        cached_tokens = 0
        async with aclosing(deltas):
            async for delta in deltas:
                scored += (entry for entry in (delta.prompt_logprobs or ())[start:] if entry is not None)
                cached_tokens = delta.num_cached_tokens or cached_tokens
                if delta.weights_version is not None:
                    versions.add(delta.weights_version)
        assert len(scored) == len(ids) - start, "the engine scores every prompt token from `start` on"
        return pb.ContinuationScore(
            log_likelihood=sum(entry.logprob for entry in scored),
            is_greedy=all(entry.rank == 1 for entry in scored),
            tokens=map(token_logprob, scored),
            usage=pb.Usage(prompt_tokens=len(ids), cached_tokens=cached_tokens),
        )


def _request_ids(given: str) -> tuple[str, str]:
    """The id the caller knows and the one the engine gets, which no other caller's choice can meet."""
    if len(given) > MAX_REQUEST_ID_CHARS:
        raise InvalidParameter(f"request_id is longer than {MAX_REQUEST_ID_CHARS} characters", param="request_id")
    if given:
        return given, f"{given}-{uuid.uuid4().hex[:8]}"
    made = f"grpc-{uuid.uuid4().hex}"
    return made, made


def _time_left(context: grpc.aio.ServicerContext) -> float | None:
    """Seconds until the call's deadline; None without one. Raises DeadlineExceeded when it has passed."""
    left = context.time_remaining()
    if left is None or left >= _FOREVER_S:
        return None
    if left <= 0:
        raise DeadlineExceeded("the call's deadline has passed")
    return left


def _shortened(message: str) -> str:
    return message if len(message) <= _MAX_STATUS_CHARS else message[:_MAX_STATUS_CHARS] + "..."


def _version_metadata(versions: Iterable[int]) -> tuple[tuple[str, str], ...]:
    return (("jaxserve-weights-version", ", ".join(map(str, sorted(versions)))),)


def _trailing_metadata(error: Exception) -> tuple[tuple[str, str], ...]:
    """What a program can read of an error, besides its status code."""
    metadata = []
    if isinstance(error, JaxserveError):
        metadata.append(("jaxserve-error", type(error).__name__))
        if error.param is not None:
            metadata.append(("jaxserve-param", error.param))
    if (seconds := retry_after_s(error)) is not None:
        metadata.append(("grpc-retry-pushback-ms", str(1000 * seconds)))
    return tuple(metadata)
