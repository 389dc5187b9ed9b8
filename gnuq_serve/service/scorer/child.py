"""One life of the scorer process, from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from gnuq_serve.service.scorer.messages import ScorerConfig, ScorerState


class ScorerChild:
    """The scorer as a child process. It ends when this process does, since its standard input closes then."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._killed_because: str | None = None

    @classmethod
    async def start(cls, config: ScorerConfig, folder: Path) -> ScorerChild:
        """Start one.

        Args:
            config: what it loads and where it listens.
            folder: the scorer's; it is removed by the process when nobody else is left to do so.

        Raises:
            OSError: no memory for it, say.
        """
        threads = str(config.threads)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "gnuq_serve.service.scorer.process",
            str(folder),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            start_new_session=True,  # a Ctrl-C in the terminal is the server's; we follow by the closed pipe
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(config) + b"\n")
        return cls(process)

    async def states(self) -> AsyncIterator[ScorerState]:
        """What it reports, to its end.

        Raises:
            msgspec.MsgspecError: a report that can't be read.
        """
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            yield msgspec.json.decode(line, type=ScorerState)

    def kill(self, reason: str) -> None:
        """End it now.

        Args:
            reason: why, for ``ended``.
        """
        self._killed_because = self._killed_because or reason
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def ended(self) -> str:
        """Wait for its end; why it ended."""
        code = await self._process.wait()
        if self._killed_because is not None:
            return f"the scorer process was killed: {self._killed_because}"
        return f"the scorer process died (exit code {code})"
