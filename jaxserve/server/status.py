"""The one table from error classes to what each protocol answers, and OpenAI's error object."""

from typing import NamedTuple

import grpc
import msgspec

from jaxserve import errors


class Status(NamedTuple):
    """What an error class is called on the wire: HTTP status, gRPC code, OpenAI's `type` and `code`."""

    http: int
    grpc: grpc.StatusCode
    type: str
    code: str | None


_BAD, _SERVER, _BUSY = "invalid_request_error", "server_error", "unavailable_error"
_C = grpc.StatusCode

STATUS: dict[type[errors.JaxserveError], Status] = {
    errors.JaxserveError: Status(500, _C.INTERNAL, _SERVER, "internal_error"),
    errors.ConfigError: Status(500, _C.INTERNAL, _SERVER, "internal_error"),
    errors.NoRoom: Status(500, _C.INTERNAL, _SERVER, "internal_error"),
    errors.CheckpointError: Status(500, _C.INTERNAL, _SERVER, "internal_error"),
    errors.RequestError: Status(400, _C.INVALID_ARGUMENT, _BAD, None),
    errors.InvalidParameter: Status(400, _C.INVALID_ARGUMENT, _BAD, "invalid_value"),
    errors.UnsupportedParameter: Status(400, _C.INVALID_ARGUMENT, _BAD, "unsupported_parameter"),
    errors.PromptTooLong: Status(400, _C.INVALID_ARGUMENT, _BAD, "context_length_exceeded"),
    errors.ModelNotFound: Status(404, _C.NOT_FOUND, "not_found_error", "model_not_found"),
    errors.NotAuthorized: Status(401, _C.UNAUTHENTICATED, _BAD, "invalid_api_key"),
    errors.BodyTooLarge: Status(413, _C.RESOURCE_EXHAUSTED, _BAD, "request_too_large"),
    errors.Overloaded: Status(503, _C.RESOURCE_EXHAUSTED, _BUSY, "overloaded"),
    errors.DeadlineExceeded: Status(504, _C.DEADLINE_EXCEEDED, "timeout_error", "deadline_exceeded"),
    errors.EngineStopped: Status(503, _C.UNAVAILABLE, _BUSY, "engine_unavailable"),
    errors.ModelChanged: Status(503, _C.ABORTED, _BUSY, "model_changed"),
    errors.BatchStopped: Status(500, _C.INTERNAL, _SERVER, "internal_error"),
}

INTERNAL_MESSAGE = "internal error: see the server's log"


def status_of(error: BaseException) -> Status:
    """The row of the error's class, or of the nearest base class; whatever is not ours is an internal error."""
    for cls in type(error).__mro__:
        if cls in STATUS:
            return STATUS[cls]
    return STATUS[errors.JaxserveError]


def grpc_code(error: BaseException) -> grpc.StatusCode:
    return status_of(error).grpc


def public_message(error: BaseException) -> str:
    """What a caller may read: internal errors can name files of this machine, so theirs stays in the log."""
    if isinstance(error, errors.JaxserveError) and status_of(error).http != 500:
        return error.message
    return INTERNAL_MESSAGE


def retry_after_s(error: BaseException) -> int | None:
    """Whole seconds after which trying again may help; None where it will not."""
    if isinstance(error, errors.Overloaded):
        return error.retry_after_s
    if isinstance(error, errors.ModelChanged):
        return 1
    return 2 if isinstance(error, errors.EngineStopped) else None


class ErrorObject(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | int | None = None


class ErrorBody(msgspec.Struct):
    """OpenAI's error body: {"error": {message, type, param, code}}."""

    error: ErrorObject


def error_body(error: BaseException) -> ErrorBody:
    """The body that tells a caller of `error`."""
    row = status_of(error)
    param = error.param if isinstance(error, errors.JaxserveError) else None
    return ErrorBody(ErrorObject(public_message(error), row.type, param, row.code))
