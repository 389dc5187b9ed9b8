"""The whole thing on one machine without a GPU: a small real model, served, scored, and routed by a chatbot.

Run it with `make demo`. It takes care of the model, starts the server, holds a conversation with it through
`examples/chatbot_routing.py`, and stops the server again.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from gnuq_serve.demo_model import NAME, OFFLINE, DemoModelError, ensure_demo_model
from gnuq_serve.managed_server import CPU_ENVIRONMENT, HOST, ManagedServer, ServerError, free_port

START_TIMEOUT = 300.0
SERVER_OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8"]
READY = {"/health": "vLLM", "/v1/uncertainty/health": "the scorer"}

console = Console(stderr=True)


def main() -> int:
    """Runs the demo; returns the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        model = ensure_demo_model()
    except DemoModelError as error:
        console.print(f"[red]The demo model is not available:[/] {escape(str(error))}")
        return 1

    folder = Path(tempfile.mkdtemp(prefix="gnuq-demo-"))
    failed = False
    try:
        code = serve_and_chat(model, folder / "server.log")
        failed = code != 0
    except ServerError as error:
        failed, code = True, 1
        console.print(f"[red]The server did not start:[/] {escape(str(error))}")
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception:
        failed = True
        raise
    finally:
        if failed:
            console.print(f"The server's log: {folder / 'server.log'}", soft_wrap=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return code


def serve_and_chat(model: Path, log: Path) -> int:
    """Serves the model for as long as the chatbot runs; returns the chatbot's exit code."""
    port = free_port()
    gnuq_serve = Path(sys.executable).with_name("gnuq-serve")
    command = [str(gnuq_serve), "serve", str(model), "--served-model-name", NAME, *SERVER_OPTIONS]
    command += ["--host", HOST, "--port", str(port)]
    with ManagedServer(command, {**CPU_ENVIRONMENT, **OFFLINE}, port, log) as server:
        try:
            wait(server)
        except KeyboardInterrupt:
            console.print("Stopping the server (one that is still loading may take 20 s)")
            raise
        chatbot = Path(__file__).with_name("chatbot_routing.py")
        # A proxy set for this user must not come between the two.
        env = os.environ | {"NO_PROXY": HOST, "no_proxy": HOST}
        arguments = [sys.executable, str(chatbot), "--base-url", f"{server.base_url}/v1"]
        return subprocess.run(arguments, env=env, check=False).returncode


def wait(server: ManagedServer) -> None:
    """Waits for engine and scorer, and shows which of them it waits for."""
    with console.status("Starting the server") as status:
        if not console.is_terminal:
            console.print("Starting the server (about a minute)")
        took = 0.0

        def show(what: str, seconds: float) -> None:
            nonlocal took
            took = seconds
            url, _, state = what.partition(": ")
            status.update(f"Waiting for {READY[url]} ({url}: {escape(state)}), {seconds:.0f} s")

        server.wait_until_ready(list(READY), START_TIMEOUT, show)
    console.print(f"The server is ready at {server.base_url} ({took:.0f} s)", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
