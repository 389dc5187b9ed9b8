"""The endpoint plugin: what ``VLLM_PLUGINS=gnuq vllm serve MODEL`` loads."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import msgspec

from gnuq_serve.service.middleware import UncertaintyMiddleware
from gnuq_serve.service.responses.gate import check_environment
from gnuq_serve.service.routes import routes
from gnuq_serve.service.seeing.logs import configure_logging
from gnuq_serve.service.seeing.telemetry import span_observer
from gnuq_serve.service.service import UncertaintyService
from gnuq_serve.service.settings.model import load_settings
from gnuq_serve.vllm.served_model import served_model, server
from gnuq_serve.vllm.weights_choice import not_shared

logger = logging.getLogger(__name__)


class GnuqPlugin:
    """vLLM's ``EndpointPlugin`` protocol. Middleware added here stands inside vLLM's API-key check."""

    name = "gnuq"

    def __init__(self) -> None:
        """Read the settings.

        Raises:
            SystemExit: they can't be used. Of any other exception vLLM would make a line in its log, and serve
                without us, whatever the settings promise.
        """
        try:
            settings = load_settings()
            check_environment(settings)
            configure_logging(settings.log_level, settings.log_format)
            self._service = UncertaintyService(settings)
        except Exception as error:
            raise SystemExit(f"gnuq: {error}") from error
        if settings.gates and not settings.blocks_unscored_routes:
            logger.warning("unscored_routes: pass lets answers out that nothing judges, such as /v1/responses")

    @property
    def required_tasks(self) -> tuple[str, ...] | None:
        """Of which one must be served for us to be there; None: we are there in any case, to refuse routes."""
        return None if self._service.settings.blocks_unscored_routes else ("generate",)

    def attach_router(self, app: Any) -> None:
        """Called once while vLLM builds its application."""
        app.router.routes.extend(routes(self._service))
        app.add_middleware(UncertaintyMiddleware, service=self._service)
        app.router.lifespan_context = self._until_stopped(app.router.lifespan_context)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Called once when the engine has loaded its model."""
        if engine_client is None:  # a server that only renders prompts
            return
        if "generate" not in await engine_client.get_supported_tasks():  # one that transcribes, say
            return
        if await engine_client.is_tracing_enabled():
            self._service.observers.append(span_observer())
        workers = engine_client.vllm_config.parallel_config.world_size
        served = served_model(engine_client.model_config, state, workers)
        shared, refused = await self._shared_weights(engine_client, args)
        served = msgspec.structs.replace(served, shared=shared, shared_refused=refused)
        self._service.start(served, server(state, args))

    async def _shared_weights(self, engine_client: Any, args: Namespace) -> tuple[str | None, str | None]:
        """As ``share_weights``; None twice where the scorer has a checkpoint of its own by choice."""
        settings = self._service.settings
        if settings.scorer_weights == "auto":
            if engine_client.vllm_config.device_config.device_type != "cuda":
                return None, None
            if (refused := not_shared(args, settings)) is not None:
                return None, refused
        elif settings.scorer_weights == "checkpoint":
            return None, None
        # Here: vLLM imports this file in each of its processes, and torch comes along.
        from gnuq_serve.vllm.sharing import share_weights

        return await share_weights(engine_client)

    def _until_stopped(self, lifespan: Callable[[Any], AbstractAsyncContextManager[Any]]) -> Any:
        """The application's own lifespan, at whose end the scorer ends too."""

        @asynccontextmanager
        async def ours(app: Any) -> AsyncIterator[Any]:
            try:
                async with lifespan(app) as state:
                    yield state
            finally:
                await self._service.stop()

        return ours
