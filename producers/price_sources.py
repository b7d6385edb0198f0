"""Where a newer price list comes from: a file, the network, or the installed `genai-prices`.

Nothing here is called but for a command: prices are refreshed only when somebody asks.
"""

from __future__ import annotations

import json
import ssl
import time
from decimal import Decimal
from pathlib import Path
from typing import Final
from urllib.error import HTTPError, URLError
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
)

from sluicegate.shared.errors import SettingsError, SluiceError
from sluicegate.shared.price_lists import PriceList, bundled

#: The whole list of all providers takes 2 MB.
_MAX_BYTES: Final = 32 * 1024 * 1024
_PIECE_BYTES: Final = 64 * 1024
#: For each read, and for all of it.
_READ_DEADLINE_S: Final = 10.0
_TOTAL_DEADLINE_S: Final = 60.0


def read_source(*, file: Path | None, url: str | None, installed: bool) -> PriceList:
    """Read a list from the one source that is named; none: from where genai-prices keeps its own.

    Raises SettingsError for two sources, SluiceError where there is no list, in one sentence.
    """
    if sum((file is not None, url is not None, installed)) > 1:
        raise SettingsError("name one of --file, --url and --bundled")
    if installed:
        return bundled()
    if file is not None:
        return _decode(str(file), _read_file(file))
    if url is None:
        from genai_prices.update_prices import DEFAULT_UPDATE_URL  # noqa: PLC0415 - slow

        url = DEFAULT_UPDATE_URL
    return _decode(url, _read_url(url))


def _decode(name: str, data: bytes) -> PriceList:
    try:
        raw = json.loads(data, parse_float=Decimal)
    except (ValueError, RecursionError) as error:
        raise SluiceError(f"{name} holds no JSON: {error}") from error
    return PriceList.of(name, raw)


def _read_file(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            data = opened.read(_MAX_BYTES + 1)
    except OSError as error:
        raise SluiceError(f"--file: {file} cannot be read: {error.strerror}") from error
    return _bounded(str(file), data)


def _read_url(url: str) -> bytes:
    if not url.startswith("https://"):
        raise SettingsError("--url: must be https://…")
    # Nothing is followed elsewhere: a redirect is an answer without a list.
    opener = OpenerDirector()
    for handler in (
        ProxyHandler(),
        HTTPSHandler(context=ssl.create_default_context()),
        HTTPErrorProcessor(),
        HTTPDefaultErrorHandler(),
    ):
        opener.add_handler(handler)
    give_up_at = time.monotonic() + _TOTAL_DEADLINE_S
    data = bytearray()
    try:
        with opener.open(Request(url), timeout=_READ_DEADLINE_S) as response:  # noqa: S310 - https
            while piece := response.read1(_PIECE_BYTES):
                data += piece
                if len(data) > _MAX_BYTES:
                    break
                if time.monotonic() > give_up_at:
                    raise TimeoutError(f"not all had come after {_TOTAL_DEADLINE_S:g} s")
    except HTTPError as error:
        with error:
            raise SluiceError(f"{url} answered {error.code}, which is no price list") from error
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise SluiceError(
            f"{url} did not answer ({reason}); fetch the list elsewhere and name it with --file"
        ) from error
    return _bounded(url, bytes(data))


def _bounded(name: str, data: bytes) -> bytes:
    if len(data) > _MAX_BYTES:
        raise SluiceError(f"{name} is longer than {_MAX_BYTES // 1024 // 1024} MB: no price list")
    return data
