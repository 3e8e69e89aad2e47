"""Every error that a caller of jaxserve can meet, and nothing else.

JaxserveError
├── ConfigError             a flag, file or mesh is wrong; raised before any device work
│   └── NoRoom                  the model or its context does not fit the device's memory; says how much it has
├── CheckpointError         a checkpoint and the model file disagree; lists every mismatch
├── RequestError            the caller's fault; nothing was computed
│   ├── InvalidParameter        a value is out of range or of the wrong type
│   ├── UnsupportedParameter    a value is legal elsewhere and not served here; says the cure
│   ├── PromptTooLong           prompt plus max_tokens exceed the context
│   ├── ModelNotFound           the request names a model that is not served
│   ├── NotAuthorized           the key of an administrator's request is missing or wrong
│   └── BodyTooLarge            the request body exceeds the limit
├── Overloaded              the queue is full; try again after `retry_after_s`
├── DeadlineExceeded        the request's own deadline passed
├── EngineStopped           the engine is loading, draining or gone
├── ModelChanged            weights or code were switched while the request was in flight; send it again
└── BatchStopped            an offline job ended before its last row; says how to go on
"""


class JaxserveError(Exception):
    """Root of the tree. `param` names the request field at fault, where there is one."""

    param: str | None = None

    def __init__(self, message: str, *, param: str | None = None):
        super().__init__(message)
        self.message = message
        if param is not None:
            self.param = param


class ConfigError(JaxserveError):
    """A flag, environment variable, configuration file or mesh is wrong."""


class NoRoom(ConfigError):
    """The weights, a step or the context do not fit the device's memory."""


class CheckpointError(JaxserveError):
    """A checkpoint does not fit the model file. The message lists everything that is wrong."""


class RequestError(JaxserveError):
    """The caller's fault; other requests are untouched."""


class InvalidParameter(RequestError):
    """A request value has the wrong type or lies out of range."""


class UnsupportedParameter(RequestError):
    """A request value that is not served here. The message names the cure."""


class PromptTooLong(RequestError):
    """The prompt and the tokens asked for do not fit the context."""


class ModelNotFound(RequestError):
    """The request names a model that this server does not serve."""


class NotAuthorized(RequestError):
    """The request lacks the key that its route asks for."""


class BodyTooLarge(RequestError):
    """The request body is larger than the server's limit."""


class Overloaded(JaxserveError):
    """The queue is full; nothing was queued."""

    retry_after_s = 1


class DeadlineExceeded(JaxserveError):
    """The request's own deadline passed before it finished; its work was aborted."""


class EngineStopped(JaxserveError):
    """The engine is loading, draining or gone; the request was not served."""


class ModelChanged(JaxserveError):
    """Weights or model code were switched before the request had finished, which was told not to wait for it."""


class BatchStopped(JaxserveError):
    """An offline job ended before its last row. What was done is kept; the message says how to go on."""


def error_classes(root: type[JaxserveError] = JaxserveError) -> dict[str, type[JaxserveError]]:
    """Every class of the tree by name, the root included."""
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= error_classes(child)
    return found


def rebuild(kind: str, message: str, param: str | None = None) -> JaxserveError:
    """The error that crossed a process boundary as (class name, message, param)."""
    return error_classes().get(kind, JaxserveError)(message, param=param)
