"""The benchmark's own judgement: what it calls a whole answer."""

import dataclasses
from collections import Counter
from itertools import islice

import pytest
from load.client import Reply
from load.figures import percentile, ratio_interval, statuses
from load.mixture import SHARES, Request, complaint, mixture

SCORED = {"status": "scored", "reason": None, "log_grad_norm_sq": 1.0, "log_probability": -1.0}
SKIPPED = SCORED | {"status": "skipped", "reason": "the scoring queue is full", "log_grad_norm_sq": None}


def reply(**changes):
    whole = Reply(sent=0.0, status=200, complete=True, completion_tokens=8, uncertainties=[SCORED])
    return dataclasses.replace(whole, **changes)


def test_the_mixture_has_its_shares_and_can_be_had_again():
    requests = list(islice(mixture(seed=3), 4000))
    counts = Counter(request.kind for request in requests)
    for kind, share in SHARES.items():
        assert counts[kind] / 4000 == pytest.approx(share, abs=0.03), kind
    assert requests == list(islice(mixture(seed=3), 4000))
    assert sum(SHARES.values()) == pytest.approx(1)


@pytest.mark.parametrize("good", [reply(), reply(uncertainties=[SKIPPED])])
def test_a_whole_answer_with_a_score_or_a_reason(good):
    assert complaint(Request("whole", {}, 8, 1), good) is None


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (reply(status=500, error="x", complete=False), "no whole answer"),
        (reply(complete=False), "no whole answer"),
        (reply(error="RemoteProtocolError"), "no whole answer"),
        (reply(completion_tokens=7), "7 tokens instead of 8"),
        (reply(completion_tokens=None), "None tokens"),
        (reply(uncertainties=[]), "0 uncertainties instead of 1"),
        (reply(uncertainties=[SCORED, SCORED]), "2 uncertainties instead of 1"),
        (reply(uncertainties=[SKIPPED | {"reason": None}]), "skipped without a reason"),
        (reply(uncertainties=[SCORED | {"log_grad_norm_sq": None}]), "scored without"),
        (reply(uncertainties=[SCORED | {"status": "pending"}]), "pending"),
    ],
    ids=str,
)
def test_what_is_missing_is_told(bad, text):
    assert text in complaint(Request("whole", {}, 8, 1), bad)


def test_malformed_requests_want_an_error():
    request = Request("malformed", b"{")
    assert complaint(request, reply(status=400, error='{"error": {}}')) is None
    assert complaint(request, reply(status=500, error='{"error": {}}')) is not None
    assert complaint(request, reply()) is not None


def test_hang_ups_may_end_either_way():
    request = Request("hang-up", {}, hang_up_after=1.0)
    assert complaint(request, reply(status=0, complete=False, hung_up=True)) is None
    assert complaint(request, reply()) is None
    assert complaint(request, reply(complete=False, error="broken")) is not None


def test_small_statistics():
    assert percentile(range(1, 101), 50) == 51
    assert percentile([3.0, 1.0, 2.0], 99) == 3.0
    assert percentile([], 50) is None
    low, high = ratio_interval([2.0, 2.1, 2.2] * 20, [1.0, 1.05, 1.1] * 20)
    assert 1.8 < low <= 2.0 <= high < 2.2
    assert statuses([reply(), reply(uncertainties=[SCORED, SKIPPED])]) == {
        "scored": 2,
        "skipped: the scoring queue is full": 1,
    }
