"""What leader and followers say to each other, how it is encoded, and how each knows that it is the other.

They prove to each other that they have the secret (challenge and response, HMAC-SHA256), and sign all that follows.
"""

import hashlib
import hmac

import msgspec

from jaxserve.request import ErrorInfo

SERVICE = "jaxserve.hosts.Hosts"
STREAM = f"/{SERVICE}/Stream"
OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)
"""A step's arrays are as large as they are; a network that has gone away is noticed before all hosts have joined."""
NONCE_BYTES = 16
_HASH_BYTES = 16


class Hello(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A follower's first word."""

    index: int
    nonce: bytes


class Challenge(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The leader's answer, with its proof."""

    nonce: bytes
    proof: bytes


class Join(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The follower's proof, what it is called, and what it is like (identity.py)."""

    proof: bytes
    name: str
    identity: dict[str, str]


class Joined(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The leader's answer; from here on all messages are signed."""


class Refused(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The same, where the follower is none; `final`: nor will it be when it asks again."""

    message: str
    final: bool


class Welcome(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """All have joined; `port` is that of JAX's coordination service, on host 0."""

    port: int


class Value(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A follower's figure of something on which all hosts must agree."""

    value: int


class Agreed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The least of all figures."""

    value: int


class Ready(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A follower can run launches; `sizes` says what it worked out."""

    sizes: str
    shapes: list[tuple[int, int]]


class Serving(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """All hosts are ready; who is silent from here on is lost."""


class Step(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A launch: the shape of its program (tokens, sequences), int32 [Layout.size] of its input, and the bytes of each
    array of each slot that is bound first."""

    number: int
    shape: tuple[int, int]
    buffer: bytes
    bindings: list[list[bytes]]


class Confirm(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A follower's devices have finished a launch; `tokens` is a digest of what they sampled."""

    number: int
    tokens: bytes


class Alive(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A follower's heartbeat: the last launch that it has begun, what it is doing, where that may take its time, and
    the shapes that it may be told."""

    begun: int
    doing: str
    shapes: list[tuple[int, int]]


class Failed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A follower's last word before its process ends."""

    error: ErrorInfo


class Ping(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The leader's heartbeat."""


class Stop(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The leader's last word: what went wrong, if anything did, and whether it will not start again."""

    error: ErrorInfo | None
    final: bool


type ToLeader = Hello | Join | Value | Ready | Confirm | Alive | Failed
type ToFollower = Challenge | Joined | Refused | Welcome | Agreed | Serving | Step | Ping | Stop

encode = msgspec.msgpack.Encoder().encode
decode_to_leader = msgspec.msgpack.Decoder(Hello | Join | Value | Ready | Confirm | Alive | Failed).decode
decode_to_follower = msgspec.msgpack.Decoder(
    Challenge | Joined | Refused | Welcome | Agreed | Serving | Step | Ping | Stop
).decode


def derive(secret: str, purpose: str, *parts: bytes) -> bytes:
    """A proof that its maker has the secret, or a key, for one purpose and one conversation (`parts`)."""
    return hmac.digest(secret.encode(), b"\0".join([purpose.encode(), *parts]), "sha256")


class BrokenChain(Exception):
    """A message is not the next one of those that were sent."""


class Chain:
    """Signs what goes one way, or checks it: a message's hash is over its key and all messages before it, too."""

    def __init__(self, key: bytes):
        self._key, self._last, self._count = key, b"", 0

    def seal(self, message: bytes) -> bytes:
        """The message with its hash."""
        return self._next(message) + message

    def open(self, frame: bytes) -> memoryview:
        """The message of a frame. Raises BrokenChain unless it is the next one, as it was sent."""
        message = memoryview(frame)[_HASH_BYTES:]
        if not hmac.compare_digest(self._next(message), frame[:_HASH_BYTES]):
            raise BrokenChain(f"message {self._count} is not the one that was sent: its hash is another")
        return message

    def _next(self, message: bytes | memoryview) -> bytes:
        found = hashlib.blake2b(self._last, key=self._key, digest_size=_HASH_BYTES)
        found.update(message)
        self._last, self._count = found.digest(), self._count + 1
        return self._last
