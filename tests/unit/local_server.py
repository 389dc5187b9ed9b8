"""An ASGI application on a port of this machine, in a thread."""

import threading
import time
from contextlib import contextmanager

import uvicorn

from gnuq_serve.managed_server import HOST, free_port


@contextmanager
def serving(app, **options):
    """The application's URL while it is served."""
    port = free_port()
    config = uvicorn.Config(app, host=HOST, port=port, log_level="error", server_header=False, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://{HOST}:{port}"
    finally:
        server.should_exit = True
        thread.join()
