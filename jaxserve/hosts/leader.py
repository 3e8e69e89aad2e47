"""Host 0's end of the streams: lets followers join, tells them the launches, and says which host is late or gone."""

import hmac
import logging
import queue
import secrets
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
import msgspec

from jaxserve.config import HostPlace
from jaxserve.errors import ConfigError, EngineStopped, JaxserveError
from jaxserve.hosts import messages as m
from jaxserve.hosts.identity import differences
from jaxserve.hosts.watch import Watch
from jaxserve.request import ErrorInfo

log = logging.getLogger("jaxserve.hosts")

HANDSHAKE_S = 10.0
LAST_WORDS_S = 3.0
_SPARE_THREADS = 8  # for callers that are refused


@dataclass(eq=False)
class _Follower:
    index: int
    name: str
    chain: m.Chain
    outbox: queue.SimpleQueue[bytes | None] = field(default_factory=queue.SimpleQueue)
    value: int | None = None
    sizes: str | None = None
    shapes: frozenset[tuple[int, int]] = frozenset()
    doing: str = ""
    gone: bool = False


class Leader:
    """The followers of one engine, from their joining to their end.

    Once anything is wrong with a host, `lost` is called with what it is, by a thread of this object, the followers are
    told, and every method raises it. `again`: this engine is started again after it had been ready, and will be.
    """

    def __init__(
        self,
        place: HostPlace,
        identity: Mapping[str, str],
        *,
        lost: Callable[[JaxserveError], None] = lambda error: None,
        again: bool = False,
    ):
        """Raises ConfigError when the port cannot be had."""
        self._place, self._identity, self._lost = place, identity, lost
        self._final = not again
        self._nonce = secrets.token_bytes(m.NONCE_BYTES)
        self._chain = m.Chain(m.derive(place.secret, "leader's messages", self._nonce))
        self._followers: dict[int, _Follower] = {}
        self._changed = threading.Condition()
        self._watch: Watch | None = None
        self._error: JaxserveError | None = None
        self._stopping = False
        self._number = 0
        pool = ThreadPoolExecutor(place.count + _SPARE_THREADS, thread_name_prefix="hosts")
        self._server = grpc.server(pool, options=(*m.OPTIONS, ("grpc.so_reuseport", 0)))
        handler = grpc.stream_stream_rpc_method_handler(self._converse, None, None)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(m.SERVICE, {"Stream": handler}),))
        try:
            self._server.add_insecure_port(listen_at(place, place.port))
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen for the other hosts on port {place.port}: is another server running? give another "
                "port with --coordinator HOST:PORT"
            ) from error
        self._server.start()

    def gather(self, progress: Callable[[str], None]) -> None:
        """Returns when all followers have joined. Raises EngineStopped when that takes too long."""
        start = time.monotonic()
        while True:
            with self._changed:
                self._check()
                missing = [i for i in range(1, self._place.count) if i not in self._followers]
                if not missing:
                    names = {i: follower.name for i, follower in self._followers.items()}
                    self._watch = Watch(names, self._place.start_timeout_s, time.monotonic())
                    break
            if time.monotonic() - start > self._place.start_timeout_s:
                error = EngineStopped(
                    f"{_hosts(missing)} did not join within {self._place.start_timeout_s:g} s; start the same command "
                    "there, or raise --host-start-timeout"
                )
                self._fail(error)
                raise error
            progress(f"waiting for {_hosts(missing)} of {self._place.count} to join at port {self._place.port}")
            with self._changed:
                self._changed.wait(0.5)
        threading.Thread(target=self._look_after, name="hosts watch", daemon=True).start()

    def welcome(self, port: int) -> None:
        """Tells the followers the port of JAX's coordination service."""
        self._tell(m.Welcome(port))

    def least(self, value: int) -> int:
        """The least of the values with which this is called on all hosts."""

        def values() -> list[int | None]:
            return [follower.value for follower in self._followers.values()]

        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or None not in values())
            self._check()
            agreed = min(v for v in (value, *values()) if v is not None)
            for follower in self._followers.values():
                follower.value = None
        self._tell(m.Agreed(agreed))
        return agreed

    def wait_ready(self, sizes: str, progress: Callable[[str], None]) -> None:
        """Returns when every follower can run launches. Raises EngineStopped if one has worked out other sizes."""
        while True:
            with self._changed:
                self._check()
                others = list(self._followers.values())
                waiting = [f for f in others if f.sizes is None]
                if not waiting:
                    break
                self._changed.wait(0.5)
            progress(f"waiting for {_named(waiting[0])}: {waiting[0].doing or 'starting'}")
        for follower in others:
            if follower.sizes != sizes:
                error = EngineStopped(f"{_named(follower)} worked out {follower.sizes}, this host {sizes}")
                self._fail(error)
                raise error
        with self._changed:
            self._check()
            assert self._watch is not None, "all have joined"
            self._watch.hurry(self._place.timeout_s)
            self._final = False
            self._tell(m.Serving())

    def known(self, shape: tuple[int, int]) -> bool:
        """Whether every follower has the program of a shape."""
        return all(shape in follower.shapes for follower in self._followers.values())

    def announce(self, shape: tuple[int, int], buffer: bytes, bindings: list[list[bytes]]) -> int:
        """Tells the followers a launch and returns its number."""
        with self._changed:
            self._check()
            assert self._watch is not None, "all have joined"
            self._number += 1
            self._watch.announced(self._number)
            self._tell(m.Step(self._number, shape, buffer, bindings))
            return self._number

    def finished(self, number: int, tokens: bytes) -> None:
        """This host's devices have finished a launch; `tokens` is a digest of what they sampled."""
        with self._changed:
            if self._watch is not None:
                self._watch.finished_here(number, tokens)

    def failure(self, within_s: float = 0.0) -> JaxserveError | None:
        """What is wrong with a host, if that is found out within some seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None, within_s)
            return self._error

    def stop(self, error: JaxserveError | None = None) -> None:
        """Lets the followers end, with the error that ended this engine, or because it was stopped."""
        with self._changed:
            if not self._stopping:
                self._stopping = True
                info = None if error is None else ErrorInfo.of(error)
                self._tell(m.Stop(info, error is None or self._final))
            for follower in self._followers.values():
                follower.outbox.put(None)
            self._changed.notify_all()
            self._changed.wait_for(lambda: all(f.gone for f in self._followers.values()), LAST_WORDS_S)
        self._server.stop(grace=0.5)

    # The threads of the streams: one answers each follower, another one reads what it says.

    def _converse(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        address = _address(context.peer())
        timer = threading.Timer(HANDSHAKE_S, context.cancel)
        timer.daemon = True
        timer.start()
        try:
            hello = _decoded(next(frames, None), m.Hello)
            parts = (hello.index.to_bytes(8, "little", signed=True), hello.nonce, self._nonce)
            yield m.encode(m.Challenge(self._nonce, m.derive(self._place.secret, "leader", *parts)))
            join = _decoded(next(frames, None), m.Join)
            if not hmac.compare_digest(join.proof, m.derive(self._place.secret, "follower", *parts)):
                raise _Stranger("it does not know the secret")
        except (_Stranger, grpc.RpcError) as stranger:
            log.warning("somebody at %s wanted to join and could not: %s", address, stranger)
            return
        finally:
            timer.cancel()
        chain = m.Chain(m.derive(self._place.secret, "follower's messages", *parts))
        follower = _Follower(hello.index, f"{join.name} {address}", chain)
        if not context.add_callback(lambda: follower.outbox.put(None)):  # so that this thread never waits for ever
            return
        refused = self._admit(follower, join.identity)
        if refused is not None:
            yield m.encode(refused)
            return
        threading.Thread(target=self._read, args=(follower, frames), name="hosts read", daemon=True).start()
        yield m.encode(m.Joined())
        yield from iter(follower.outbox.get, None)

    def _admit(self, follower: _Follower, identity: Mapping[str, str]) -> m.Refused | None:
        """Takes a follower in, or refuses it."""
        with self._changed:
            if self._error is not None or self._stopping:
                return m.Refused("host 0 is about to end", final=False)
            if not 1 <= follower.index < self._place.count:
                last = self._place.count - 1
                return m.Refused(f"host_index {follower.index} is none of a follower, 1 to {last}", final=True)
            known = self._followers.get(follower.index)
            if known is not None:
                return m.Refused(f"there is a host {known.index} already, {known.name}", final=False)
            differs = differences(self._identity, identity)
            if not differs:
                self._followers[follower.index] = follower
                self._changed.notify_all()
                return None
        error = ConfigError(f"{_named(follower)} is not like host 0: {'; '.join(differs)}")
        self._fail(error)
        return m.Refused(error.message, final=True)

    def _read(self, follower: _Follower, frames: Iterator[bytes]) -> None:
        try:
            for frame in frames:
                message = m.decode_to_leader(follower.chain.open(frame))
                if isinstance(message, m.Failed):
                    cause = message.error.rebuild()
                    self._fail(type(cause)(f"{_named(follower)}: {cause.message}"))
                else:
                    self._hear(follower, message)
        except (m.BrokenChain, msgspec.DecodeError) as error:
            self._fail(EngineStopped(f"{_named(follower)}: {error}"))
        except grpc.RpcError:
            pass  # the call was cut off
        with self._changed:
            follower.gone = True
            if self._watch is None:  # it may join anew
                self._followers.pop(follower.index)
            self._changed.notify_all()
        if self._watch is not None and not self._stopping:
            self._fail(EngineStopped(f"{_named(follower)} ended"))

    def _hear(self, follower: _Follower, message: m.ToLeader) -> None:
        with self._changed:
            if self._watch is None:
                return
            self._watch.heard(follower.index)
            match message:
                case m.Confirm(number, tokens):
                    self._watch.confirmed(follower.index, number, tokens)
                case m.Alive(begun, doing, shapes):
                    self._watch.begun(follower.index, begun)
                    self._watch.heard(follower.index, doing)
                    follower.doing, follower.shapes = doing, frozenset(shapes)
                case m.Value(value):
                    follower.value = value
                    self._changed.notify_all()
                case m.Ready(sizes, shapes):
                    follower.sizes, follower.shapes = sizes, frozenset(shapes)
                    self._changed.notify_all()

    def _look_after(self) -> None:
        """Tells the followers that this host is there, and finds out who is late."""
        beat, pinged = self._place.timeout_s / 5, 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._error is not None, beat / 2)
                if self._stopping or self._error is not None:
                    return
                now = time.monotonic()
                assert self._watch is not None
                self._watch.tick(now)
                late = self._watch.late()
                if now - pinged >= beat:
                    pinged = now
                    self._tell(m.Ping())
            if late:
                self._fail(EngineStopped(late))

    def _tell(self, message: m.ToFollower) -> None:
        with self._changed:
            frame = self._chain.seal(m.encode(message))
            for follower in self._followers.values():
                follower.outbox.put(frame)

    def _fail(self, error: JaxserveError) -> None:
        """Only the first error counts: those that it leads to would only hide it."""
        with self._changed:
            if self._error is not None or self._stopping:
                return
            self._error = error
            self._tell(m.Stop(ErrorInfo.of(error), self._final))
            for follower in self._followers.values():
                follower.outbox.put(None)
            self._changed.notify_all()
        self._lost(error)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error


class _Stranger(Exception):
    """A caller that is no follower."""


def _decoded[Message](frame: bytes | None, kind: type[Message]) -> Message:
    try:
        message = None if frame is None else m.decode_to_leader(frame)
    except msgspec.DecodeError:
        message = None
    if not isinstance(message, kind):
        raise _Stranger("it ended the handshake, perhaps because the secret is another one")
    return message


def listen_at(place: HostPlace, port: int) -> str:
    """Where host 0 listens: on all of its interfaces, unless the coordinator is this machine to itself."""
    if place.coordinator in ("localhost", "127.0.0.1"):
        return f"127.0.0.1:{port}"
    return f"[::]:{port}"


def _named(follower: _Follower) -> str:
    return f"host {follower.index} ({follower.name})"


def _hosts(indices: list[int]) -> str:
    numbers = ", ".join(map(str, indices))
    return f"host {numbers}" if len(indices) == 1 else f"hosts {numbers}"


def _address(peer: str) -> str:
    """The IP address of gRPC's ipv4:10.0.0.2:5312 or ipv6:%5B::1%5D:5312."""
    return urllib.parse.unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")
