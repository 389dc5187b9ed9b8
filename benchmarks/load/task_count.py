"""`--middleware load.task_count.TaskCount`: the number of asyncio tasks of the API server, at `/tasks`."""

from __future__ import annotations

import asyncio
import json
from typing import Any


class TaskCount:
    """Plain ASGI middleware."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["path"] != "/tasks":
            await self._app(scope, receive, send)
            return
        body = json.dumps(len(asyncio.all_tasks())).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})
