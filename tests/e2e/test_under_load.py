"""A short run of what `benchmarks/serving.py` does at length: mixed requests, and a scorer that is killed."""

import asyncio

import pytest
from live_server import HEADERS, scorer_of, wait_for_scorer
from load.client import client_of
from load.kills import kill_under_load
from load.mixture import SHARES
from load.soak import soak

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


def test_mixed_requests_are_all_accounted_for(server):
    wait_for_scorer(server)
    found = asyncio.run(soak(server, HEADERS, requests=80, at_a_time=32, first=30))
    assert set(found["kinds"]) == set(SHARES)
    assert found["first_complaints"] == []
    assert found["statuses"]["scored"] > 0
    assert found["kinds"]["hang-up"] > 3
    assert found["more_fds"] <= 2  # one for each hang-up, if they were left behind


def test_a_scorer_that_is_killed_under_load_costs_no_answer(server):
    wait_for_scorer(server)
    first = scorer_of(server).pid

    async def kill():
        async with client_of(server.base_url, HEADERS) as client:
            return await kill_under_load(client, server, kills=2, at_a_time=8, deadline=30)

    found = asyncio.run(kill())
    assert found["first_lost"] == []
    assert found["late"] == 0
    assert set(found["statuses_afterwards"]) == {"scored"}
    assert any(status.startswith("failed") for status in found["statuses"])
    assert scorer_of(server).pid != first
