"""What an administrator may ask a running server for, and how it knows one. No transport."""

import hmac
from typing import Any

from jaxserve.client import EngineClient
from jaxserve.errors import CheckpointError, ConfigError, InvalidParameter, NotAuthorized
from jaxserve.request import Update
from jaxserve.server.exchange import Exchange
from jaxserve.server.wire import UpdateParamsBody


def check_key(exchange: Exchange, key: str) -> None:
    """Raises NotAuthorized unless the request has `Authorization: Bearer KEY`."""
    scheme, _, given = (exchange.header(b"authorization") or b"").partition(b" ")
    if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), key.encode()):
        exchange.headers.append((b"www-authenticate", b"Bearer"))
        raise NotAuthorized("this needs the server's admin key: send it as `Authorization: Bearer KEY`")


async def update_params(body: UpdateParamsBody, client: EngineClient) -> dict[str, Any]:
    """Switches to the weights at `body.path`; answers when the next step runs on them.

    Raises InvalidParameter for a checkpoint that is none or does not fit, naming what is wrong; EngineStopped.
    """
    try:
        updated = await client.update(Update(path=body.path, in_flight=body.in_flight))
    except (ConfigError, CheckpointError) as error:
        raise InvalidParameter(error.message, param="path") from error
    return {
        "weights_version": updated.info.weights_version,
        "load_s": round(updated.load_s, 3),
        "wait_s": round(updated.wait_s, 3),
    }
