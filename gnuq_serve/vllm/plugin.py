"""The endpoint plugin: what ``VLLM_PLUGINS=gnuq vllm serve MODEL`` loads."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from gnuq_serve.service.middleware import UncertaintyMiddleware
from gnuq_serve.service.routes import routes
from gnuq_serve.service.service import UncertaintyService
from gnuq_serve.service.settings import load_settings
from gnuq_serve.vllm.served_model import served_model, server


class GnuqPlugin:
    """vLLM's ``EndpointPlugin`` protocol. Middleware added here stands inside vLLM's API-key check."""

    name = "gnuq"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._service = UncertaintyService(load_settings())

    def attach_router(self, app: Any) -> None:
        """Called once while vLLM builds its application."""
        app.router.routes.extend(routes(self._service))
        app.add_middleware(UncertaintyMiddleware, service=self._service)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Called once when the engine has loaded its model."""
        if engine_client is None:  # a server that only renders prompts
            return
        self._service.start(served_model(engine_client.model_config, state), server(state, args))
