"""Work that stops when the client that waits for it hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

_T = TypeVar("_T")


class ClientGoneError(Exception):
    """The client hung up before its answer was whole."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of ``work``; it is cancelled when the client hangs up, or when the caller is.

    Args:
        receive: the connection's, once the request's body has been read.
        work: what to do.

    Raises:
        ClientGoneError: the client hung up.
    """
    working = asyncio.ensure_future(work)
    tasks = (working, asyncio.ensure_future(_hang_up(receive)))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
