"""The messages of the one stream between a front end and its engine process, and their encoding."""

import msgspec

from jaxserve.client import EngineState
from jaxserve.config import EngineOptions
from jaxserve.request import Delta, EngineInfo, ErrorInfo, Request, Update, Updated

SERVICE = "jaxserve.engine.Engine"
STREAM = f"/{SERVICE}/Stream"
METRICS = f"/{SERVICE}/Metrics"
UPDATE = f"/{SERVICE}/Update"
UNLIMITED = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
"""The front end has limited what a client may send; a step's deltas are as large as they are."""


class Launch(msgspec.Struct, frozen=True):
    """How an engine process is to start; comes on its standard input."""

    options: EngineOptions
    path: str
    model_name: str
    socket: str
    weights_version: int = 0
    again: bool = False
    """After it had been ready, and it will be once more, whatever ends it."""


class Follow(msgspec.Struct, frozen=True):
    """How the engine process of another host than the first is to start; a line of JSON on its standard input."""

    options: EngineOptions
    path: str


class Submit(msgspec.Struct, frozen=True, tag=True, array_like=True):
    request: Request


class Abort(msgspec.Struct, frozen=True, tag=True, array_like=True):
    request_id: str


class Stop(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """End after the step that is running."""


class Step(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The deltas of a step: one message a step, not one a token."""

    deltas: list[Delta]


class Status(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A change of state; `info` comes with READY, `error` with DEAD."""

    state: EngineState
    detail: str
    info: EngineInfo | None = None
    error: ErrorInfo | None = None


class UpdateReply(msgspec.Struct, frozen=True, array_like=True):
    """What became of an Update: one of the two."""

    updated: Updated | None = None
    error: ErrorInfo | None = None


type ToEngine = Submit | Abort | Stop
type FromEngine = Step | Status

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(Submit | Abort | Stop).decode
decode_update = msgspec.msgpack.Decoder(Update).decode
decode_update_reply = msgspec.msgpack.Decoder(UpdateReply).decode
decode_from_engine = msgspec.msgpack.Decoder(Step | Status).decode
