"""A server as a child process: started in a group of its own, waited for, and stopped without a trace."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

HOST = "127.0.0.1"
# For vLLM on a CPU with few cores. Engine and scorer take one thread each: OpenMP threads spin, more would fight.
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


class ServerError(RuntimeError):
    """The server died, or was not ready in time, or lacks a route. The message ends with the log."""


class ManagedServer:
    """Runs a server for the length of a `with` block.

    Leaving the block, for whatever reason, stops the server and every process it started that is still in its
    process group.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], port: int, log_path: Path) -> None:
        """Describes the server; entering the context starts it.

        Args:
            command: The whole command line, port included.
            env: Variables to add to this process's environment.
            port: Where it will listen, on 127.0.0.1.
            log_path: The file that takes its output.
        """
        self.command = list(command)
        self.env = dict(env)
        self.base_url = f"http://{HOST}:{port}"
        self.log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603
                self.command,
                env=os.environ | self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Process id of the running server."""
        return None if self._process is None else self._process.pid

    def wait_until_ready(
        self,
        urls: Sequence[str],
        timeout: float = 300.0,
        on_wait: Callable[[str, float], None] = lambda _what, _seconds: None,
    ) -> None:
        """Waits for each URL in turn to answer 200 and, where it answers JSON with a "status", "ready".

        Args:
            urls: Paths on the server, such as `/health`.
            timeout: Seconds for all of them together.
            on_wait: Called several times a second with what is waited for and the seconds since the start.

        Raises:
            ServerError: The server died, has no such route, or the time is over.
        """
        start = time.monotonic()
        for url in urls:
            # Alive first: another server may answer on the port that ours failed to get.
            while self._check_alive() and (state := self._state(url)) != "ready":
                seconds = time.monotonic() - start
                if seconds > timeout:
                    raise ServerError(f"{url} was still {state} after {timeout:.0f} s.\n{self.log_tail()}")
                on_wait(f"{url}: {state}", seconds)
                time.sleep(0.25)

    def stop(self, grace: float = 20.0) -> None:
        """Asks the process group to end, and kills what has not ended after `grace` seconds."""
        process, self._process = self._process, None
        if process is None:
            return
        deadline = time.monotonic() + grace
        try:
            _signal_group(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
            # The server is gone; its own children have had the same signal and may need a moment more.
            deadline = min(deadline, time.monotonic() + 3)
            while _signal_group(process.pid, 0) and time.monotonic() < deadline:
                time.sleep(0.05)
        finally:  # also when a second Ctrl-C cuts the wait short
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()

    def log_tail(self, lines: int = 30) -> str:
        """The end of the server's log."""
        text = self.log_path.read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def _check_alive(self) -> bool:
        if self._process is None:
            raise ServerError("the server was not started")
        if (code := self._process.poll()) is not None:
            raise ServerError(f"the server ended with exit code {code}.\n{self.log_tail()}")
        return True

    def _state(self, url: str) -> str:
        # No proxy, whatever the environment says: this is our own machine.
        opener = build_opener(ProxyHandler({}))
        try:
            with opener.open(self.base_url + url, timeout=5) as response:
                body = response.read()
        except HTTPError as error:
            if error.code == HTTPStatus.NOT_FOUND:  # no waiting will bring a route
                raise ServerError(f"the server has no route {url}.\n{self.log_tail()}") from None
            return self._status_in(error.read(), url) or f"HTTP {error.code}"
        except (OSError, HTTPException):
            return "not answering yet"
        return self._status_in(body, url) or "ready"

    def _status_in(self, body: bytes, url: str) -> str | None:
        try:
            answer = json.loads(body)
        except ValueError:
            return None
        if not isinstance(answer, dict) or "status" not in answer:
            return None
        if answer["status"] == "failed":  # nor will waiting mend this
            raise ServerError(f"{url} says: {answer.get('reason')}\n{self.log_tail()}")
        return str(answer["status"])


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _signal_group(group: int, number: int) -> bool:
    """Signals a process group; says whether it still existed."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
