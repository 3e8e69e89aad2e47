"""What a row becomes: a record of OpenAI's batch output, with the server's answer in it or what was wrong."""

import hashlib

import msgspec

from jaxserve.batch_job.rows import Row
from jaxserve.errors import JaxserveError
from jaxserve.server.status import error_body, public_message, status_of

_encoder = msgspec.json.Encoder()


class Response(msgspec.Struct):
    """What the server would have answered."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class RecordError(msgspec.Struct):
    """What was wrong with a row, and where it stands. `code` is that of the server's error objects."""

    code: str | None
    message: str
    param: str | None
    line: int


class Record(msgspec.Struct):
    """One line of output. A row that is no request at all has no response; one that failed has an error as well."""

    id: str
    custom_id: str | None
    response: Response | None = None
    error: RecordError | None = None


class Names:
    """What is made up for a row: ids and seeds that depend on the input, the row's number and the job's seed only."""

    def __init__(self, input_digest: str, seed: int):
        self._input, self._seed = input_digest, seed

    def id(self, row: Row) -> str:
        return hashlib.blake2b(f"{self._input} {row.number}".encode(), digest_size=12).hexdigest()

    def seed(self, row: Row, prompt: int) -> int:
        """For prompt number `prompt` of the row; 63 bits."""
        key = f"{self._seed} {self._input} {row.number} {prompt}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1


def answered(row: Row, name: str, body: bytes) -> bytes:
    """The record of a row that the server would have answered with 200."""
    return _encoder.encode(Record(f"batch_req_{name}", row.custom_id, Response(200, name, msgspec.Raw(body))))


def refused(row: Row, name: str, error: Exception, *, asked: bool) -> bytes:
    """The record of a row that failed; with the server's answer, if the server would have been asked at all."""
    status = status_of(error)
    param = error.param if isinstance(error, JaxserveError) else None
    what = RecordError(status.code or status.type, f"{row.place}: {public_message(error)}", param, row.line)
    body = msgspec.Raw(_encoder.encode(error_body(error)))
    response = Response(status.http, name, body) if asked else None
    return _encoder.encode(Record(f"batch_req_{name}", row.custom_id, response, what))
