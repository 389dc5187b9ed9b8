"""A service with a real scorer process, as in a server; and what tests ask of it."""

import asyncio
import contextlib
import threading
import time

import psutil
import pytest

from gnuq_serve.service.requests.request_plan import RequestOptions
from gnuq_serve.service.service import UncertaintyService
from gnuq_serve.service.settings.model import load_settings
from gnuq_serve.uncertainty import Uncertainty

VOCABULARY = 97
START_SECONDS = 90  # importing torch and transformers on a busy machine
SAMPLES = [
    ([1, 5, 9], [7, 2]),
    ([1], [3]),
    ([4, 4, 4, 96, 0, 11, 12], [5, 5, 6, 2, 90]),
    ([8, 9], [10, 11, 12, 13, 14, 15, 16, 2]),
]


class Running:
    """A service on an event loop in a thread of its own, as in a server."""

    def __init__(self, served, server=None, **settings):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.before = set(scorers())
        settings = {"scorer_device": "cpu"} | settings
        self.service = UncertaintyService(load_settings().model_copy(update=settings))
        self.call(self._start(served, server))

    async def _start(self, served, server):
        self.service.start(served, server)

    def call(self, coroutine, timeout=START_SECONDS):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def ask(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def score(self, *answers, **options):
        results = self.call(self.service.score(list(answers), RequestOptions(**options)))
        return [Uncertainty.from_dict(result) for result in results]

    def wait_for(self, *states):
        wait_until(lambda: self.service.state.status in states, START_SECONDS)
        return self.service.state

    @property
    def process(self):
        (process,) = set(scorers()) - self.before
        return process

    @property
    def folder(self):
        return self.service._client._folder.path

    @property
    def held(self):
        """Answers of this service that the scorer has."""
        link = self.service._client._link
        return {} if link is None else link._waiting

    def stop(self):
        self.call(self.service.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


class Stopped:
    """The scorer held up while the test fills its queue."""

    def __init__(self, running):
        self.process = running.process

    def __enter__(self):
        self.process.suspend()

    def __exit__(self, *_):
        with contextlib.suppress(psutil.NoSuchProcess):
            self.process.resume()


def scorers():
    found = []
    for process in psutil.Process().children():
        try:
            if "scorer" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(condition, seconds=START_SECONDS):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.02)


def left_in(folder):
    """What scorers have left of their folders."""
    return list(folder.glob("gnuq-serve-*/scorer-*"))


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def close_to(expected):
    same = ("status", "mode", "span", "tokens", "fingerprint")
    numbers = ("log_probability", "entropy", "aleatoric", "epistemic", "log_epistemic", "log_grad_norm_sq")

    def check(result):
        assert [getattr(result, name) for name in same] == [getattr(expected, name) for name in same]
        for name in numbers:
            assert getattr(result, name) == pytest.approx(getattr(expected, name), rel=1e-6, abs=1e-6), name
        for part in ("normalized", "signals"):
            for name in getattr(expected, part).__slots__:
                got, wanted = getattr(getattr(result, part), name), getattr(getattr(expected, part), name)
                if isinstance(wanted, float):
                    wanted = pytest.approx(wanted, rel=1e-6, abs=1e-6)
                assert got == wanted, name

    return check
