"""A follower's end of the stream: joins its leader, hands on its launches, and ends the process when it is gone."""

import hmac
import os
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

import grpc
import msgspec

from jaxserve.config import HostPlace, authority
from jaxserve.errors import CheckpointError, ConfigError, JaxserveError
from jaxserve.hosts import DONE, GAVE_UP, LOST, REFUSED
from jaxserve.hosts import messages as m
from jaxserve.hosts.watch import Watch
from jaxserve.request import ErrorInfo

_LAST_WORDS_S = 2.0


def end_process(message: str, code: int) -> NoReturn:
    """Ends this process whatever its threads, those of a collective above all, are in the middle of."""
    print(f"jaxserve: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


class Follower:
    """The leader, as a follower knows it.

    When the leader is gone, or tells to stop, `end(message, code)` is called by a thread of this object, with a code of
    hosts/__init__.py: it must end the process, which may be blocked in a collective by then.
    """

    def __init__(self, place: HostPlace, identity: Mapping[str, str], end: Callable[[str, int], None] = end_process):
        self._place, self._identity, self._end = place, identity, end
        self._leader = authority(place.coordinator, place.port)
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[m.Welcome | m.Agreed] = queue.SimpleQueue()
        self._steps: queue.SimpleQueue[m.Step] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._watch: Watch | None = None
        self._begun, self._doing = 0, ""
        self._shapes: Callable[[], list[tuple[int, int]]] = list
        again = (
            ("grpc.enable_http_proxy", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
        )
        self._channel = grpc.insecure_channel(self._leader, options=(*m.OPTIONS, *again))

    def join(self) -> None:
        """Joins, once there is a leader. Raises ConfigError if refused."""
        try:
            grpc.channel_ready_future(self._channel).result(self._place.start_timeout_s)
        except grpc.FutureTimeoutError:
            self._end(f"host 0 ({self._leader}) did not answer for {self._place.start_timeout_s:g} s", GAVE_UP)
        frames = self._channel.stream_stream(m.STREAM, None, None)(iter(self._outbox.get, None))
        try:
            self._shake_hands(frames)
        except (grpc.RpcError, StopIteration):
            self._end(f"host 0 ({self._leader}) ended while this host joined", LOST)
        threading.Thread(target=self._read, args=(frames,), name="hosts read", daemon=True).start()

    def welcomed(self) -> int:
        """Returns when all hosts have joined: the port of JAX's coordination service."""
        return self._reply(m.Welcome).port

    def least(self, value: int) -> int:
        """The least of the values with which this is called on all hosts."""
        self._tell(m.Value(value))
        return self._reply(m.Agreed).value

    def ready(self, sizes: str, shapes: Callable[[], list[tuple[int, int]]]) -> None:
        """Tells that launches can come, of `shapes()`, which may grow."""
        self._doing, self._shapes = "", shapes
        self._tell(m.Ready(sizes, shapes()))

    def steps(self) -> Iterator[m.Step]:
        """The launches, as they come; never ends."""
        while True:
            yield self._steps.get()

    def begin(self, number: int) -> None:
        """A launch is about to begin; the next heartbeat says so."""
        self._begun = number

    def confirm(self, number: int, tokens: bytes) -> None:
        """Tells that a launch has finished, and the digest of its tokens."""
        self._tell(m.Confirm(number, tokens))

    def doing(self, what: str) -> None:
        """Tells what may take its time from now on, '' for nothing any more."""
        self._doing = what
        self._tell(m.Alive(self._begun, what, self._shapes()))

    def fail(self, error: JaxserveError) -> None:
        """Tells what ends this process, which may end when this returns."""
        self._tell(m.Failed(ErrorInfo.of(error)))
        time.sleep(_LAST_WORDS_S)  # the leader answers with Stop, whereupon this process ends

    # The handshake, and the threads.

    def _shake_hands(self, frames: Iterator[bytes]) -> None:
        secret, nonce = self._place.secret, secrets.token_bytes(m.NONCE_BYTES)
        self._outbox.put(m.encode(m.Hello(self._place.index, nonce)))
        challenge = m.decode_to_follower(next(frames))
        assert isinstance(challenge, m.Challenge)
        parts = (self._place.index.to_bytes(8, "little", signed=True), nonce, challenge.nonce)
        if not hmac.compare_digest(challenge.proof, m.derive(secret, "leader", *parts)):
            raise ConfigError(
                f"host 0 ({self._leader}) has another host_secret; set JAXSERVE_HOST_SECRET to the same value on each"
            )
        proof = m.derive(secret, "follower", *parts)
        self._outbox.put(m.encode(m.Join(proof, socket.gethostname(), dict(self._identity))))
        answer = m.decode_to_follower(next(frames))
        if isinstance(answer, m.Refused):
            if not answer.final:
                self._end(answer.message, LOST)
            raise ConfigError(answer.message)
        self._inbound = m.Chain(m.derive(secret, "leader's messages", challenge.nonce))
        self._outbound = m.Chain(m.derive(secret, "follower's messages", *parts))

    def _tell(self, message: m.ToLeader) -> None:
        with self._lock:
            self._outbox.put(self._outbound.seal(m.encode(message)))

    def _reply[Reply: (m.Welcome, m.Agreed)](self, kind: type[Reply]) -> Reply:
        reply = self._replies.get()
        assert isinstance(reply, kind), "one question at a time"
        return reply

    def _read(self, frames: Iterator[bytes]) -> None:
        try:
            for frame in frames:
                message = m.decode_to_follower(self._inbound.open(frame))
                with self._lock:
                    if self._watch is not None:
                        self._watch.heard(0)
                match message:
                    case m.Welcome():
                        self._watch = Watch({0: self._leader}, self._place.start_timeout_s, time.monotonic())
                        threading.Thread(target=self._look_after, name="hosts watch", daemon=True).start()
                        self._replies.put(message)
                    case m.Agreed():
                        self._replies.put(message)
                    case m.Serving():
                        with self._lock:
                            assert self._watch is not None, "welcomed before"
                            self._watch.hurry(self._place.timeout_s)
                    case m.Step():
                        self._steps.put(message)
                    case m.Stop(error, final):
                        self._stop(error, final)
                        return
        except (m.BrokenChain, msgspec.DecodeError) as error:
            self._end(f"host 0 ({self._leader}): {error}", LOST)
        except grpc.RpcError:
            pass
        self._end(f"host 0 ({self._leader}) ended", LOST)

    def _stop(self, error: ErrorInfo | None, final: bool) -> None:
        if error is None:
            self._end("host 0 has stopped", DONE)
        elif not final:
            self._end(f"host 0 starts again: {error.message}", LOST)
        elif isinstance(error.rebuild(), ConfigError | CheckpointError):
            self._end(f"host 0 has ended: {error.message}", REFUSED)
        else:
            self._end(f"host 0 has ended: {error.message}", GAVE_UP)

    def _look_after(self) -> None:
        """Tells the leader that this host is there, and finds out when the leader is not."""
        beat, told = self._place.timeout_s / 5, 0.0
        assert self._watch is not None
        while True:
            time.sleep(beat / 2)
            now = time.monotonic()
            with self._lock:
                self._watch.tick(now)
                late = self._watch.late()
            if late:
                self._end(late, LOST)
                return
            if now - told >= beat:
                told = now
                self._tell(m.Alive(self._begun, self._doing, self._shapes()))
