"""The scorer's desk and its clients' links over a real socket; what scores is a thread of the test."""

import asyncio
import threading
import time

import pytest

from gnuq_serve.score_options import ScoreOptions
from gnuq_serve.service.scorer import desk as scorer_desk
from gnuq_serve.service.scorer.desk import Desk
from gnuq_serve.service.scorer.errors import QueueFullError, ScorerLostError, ScorerUnavailableError
from gnuq_serve.service.scorer.link import ScorerLink
from gnuq_serve.service.scorer.messages import ScorerConfig
from gnuq_serve.uncertainty import Uncertainty

SOON = 5.0


class Scoring:
    """Scores in a thread: an answer's tokens are how many it has. It stops where it is told to."""

    def __init__(self, tmp_path, **settings):
        endpoint = f"ipc://{tmp_path}/desk.sock"
        self.desk = Desk(ScorerConfig(endpoint=endpoint, model="m", served_model="m", **settings))
        self.endpoint = endpoint
        self.go = threading.Event()
        self.go.set()
        self.batches = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            batch = self.desk.next_batch()
            self.batches.append([len(entry.request.answer_ids) for entry in batch])
            self.go.wait()
            results = [Uncertainty(status="scored", tokens=len(entry.request.answer_ids)) for entry in batch]
            self.desk.reply(batch, [result.to_dict() for result in results])


@pytest.fixture
def scoring(tmp_path_factory, request):
    return Scoring(tmp_path_factory.mktemp("d"), **getattr(request, "param", {}))


def with_links(number, body):
    """Run ``body(links)`` with as many links as there are processes of a server."""

    def run(scoring):
        async def go():
            links = [ScorerLink(scoring.endpoint, 99) for _ in range(number)]
            try:
                await asyncio.wait_for(body(*links), 4 * SOON)
            finally:
                for link in links:
                    link.close("closed")

        asyncio.run(go())

    return run


def ask(link, tokens, deadline=SOON):
    work = link.score([1, 2], [3] * tokens, time.monotonic() + deadline, ScoreOptions())
    return asyncio.get_running_loop().create_task(work)


async def until(condition):
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def pong(link, *, engine_waits=False):
    link.ping(engine_waits=engine_waits)
    await until(lambda: link.unanswered == 0)
    return link.load


def test_two_clients_get_each_its_own(scoring):
    async def body(one, other):
        asked = [ask(link, tokens) for tokens in range(1, 40) for link in (one, other)]
        assert [(await task).tokens for task in asked] == [tokens for tokens in range(1, 40) for _ in range(2)]

    with_links(2, body)(scoring)


def test_it_answers_while_a_batch_is_scored(scoring):
    async def body(link):
        scoring.go.clear()
        assert (await pong(link)).batch_seconds is None
        first = ask(link, 1)
        await until(lambda: scoring.batches)
        second = ask(link, 2)
        await asyncio.sleep(0.05)
        load = await pong(link)
        assert load.batch_seconds >= 0.05
        assert (load.waiting, load.yielding) == (1, False)
        scoring.go.set()
        assert [(await task).tokens for task in (first, second)] == [1, 2]
        load = await pong(link)
        assert (load.waiting, load.batch_seconds) == (0, None)

    with_links(1, body)(scoring)


@pytest.mark.parametrize("scoring", [{"max_queue": 3}], indirect=True)
def test_the_bound_of_the_queue_is_that_of_all_clients_together(scoring):
    async def body(one, other):
        scoring.go.clear()
        held = [ask(one, 1)]
        await until(lambda: scoring.batches)  # in hand: it counts too
        held += [ask(one, 2), ask(other, 3)]
        await until(lambda: len(one._waiting) == 2)
        assert (await pong(one)).waiting + (await pong(other)).waiting > 0
        for link in (one, other):
            with pytest.raises(QueueFullError, match="max_queue=99"):
                await ask(link, 4)
        held[1].cancel()
        await until(lambda: len(one._waiting) == 1)
        await pong(one)
        held[1] = ask(other, 5)
        scoring.go.set()
        assert [(await task).tokens for task in held] == [1, 5, 3]

    with_links(2, body)(scoring)


@pytest.mark.parametrize("scoring", [{"max_queue": 2, "on_overload": "wait"}], indirect=True)
def test_where_answers_wait_for_a_place_a_batch_is_made_of_those_that_have_one(scoring):
    async def body(link):
        scoring.go.clear()
        held = [ask(link, 1)]
        await until(lambda: scoring.batches)
        held += [ask(link, tokens) for tokens in (2, 3, 4, 5, 6)]
        await until(lambda: len(link._waiting) == 6)
        await pong(link)
        scoring.go.set()
        assert [(await task).tokens for task in held] == [1, 2, 3, 4, 5, 6]
        assert scoring.batches == [[1], [2, 3], [4, 5], [6]]

    with_links(1, body)(scoring)


def test_it_yields_while_any_client_says_that_the_engine_is_busy(scoring):
    async def body(one, other):
        assert not (await pong(one, engine_waits=True)).yielding  # nothing to hold back yet
        held = ask(other, 2)
        await until(lambda: len(other._waiting) == 1)
        for _ in range(3):
            await pong(other)
            await asyncio.sleep(0.05)
        assert other.load.yielding
        assert other.load.batch_seconds is None
        assert scoring.batches == []
        await pong(one)
        assert (await held).tokens == 2
        assert not (await pong(other)).yielding

    with_links(2, body)(scoring)


def test_a_client_that_has_gone_silent_holds_up_nobody(scoring, monkeypatch):
    monkeypatch.setattr(scorer_desk, "ENGINE_REPORT_SECONDS", 0.3)

    async def body(one, other):
        await pong(one, engine_waits=True)
        start = time.monotonic()
        assert (await ask(other, 2)).tokens == 2
        assert time.monotonic() - start > 0.2

    with_links(2, body)(scoring)


def test_late_and_cancelled_answers_are_not_scored(scoring):
    async def body(link):
        await pong(link, engine_waits=True)
        late, given_up, kept = ask(link, 1, deadline=0.05), ask(link, 2), ask(link, 3)
        await until(lambda: len(link._waiting) == 3)
        given_up.cancel()
        await asyncio.sleep(0.1)
        await pong(link)
        assert (await kept).tokens == 3
        assert scoring.batches == [[3]]
        assert not late.done()  # its caller has given it up
        late.cancel()

    with_links(1, body)(scoring)


def test_when_the_scorer_ends_only_what_it_had_in_hand_fails(scoring):
    async def body(link):
        scoring.go.clear()
        in_hand = ask(link, 1)
        await until(lambda: any(one.started for one in link._waiting.values()))
        behind = ask(link, 2)
        await until(lambda: len(link._waiting) == 2)
        await pong(link)
        link.close("it died")
        with pytest.raises(ScorerUnavailableError, match="it died") as caught:
            await in_hand
        assert not isinstance(caught.value, ScorerLostError)
        with pytest.raises(ScorerLostError):
            await behind
        scoring.go.set()

    with_links(1, body)(scoring)
