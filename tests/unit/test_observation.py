import asyncio
import hashlib

import pytest

from gnuq_serve.service.answer import Answer
from gnuq_serve.service.requests.request_plan import RequestOptions
from gnuq_serve.service.scorer.client import QueueFullError
from gnuq_serve.service.seeing.observation import Observation, Observers, RequestContext
from gnuq_serve.service.served import ServedModel
from gnuq_serve.service.service import UncertaintyService
from gnuq_serve.service.settings.model import load_settings
from gnuq_serve.uncertainty import Uncertainty

SCORED = Uncertainty(status="scored", mode="exact", span="answer", tokens=2, log_probability=-1.5, seconds=0.25)
ANSWER = Answer([1, 2, 3], [4, 5, 6], logprobs=[-0.25, -0.5, -1.0], thinking=1, finish_reason="length")
CONTEXT = RequestContext(route="chat", turns=2)


class StandInClient:
    """A scorer in this process that answers at once."""

    def __init__(self, outcome):
        self.outcome = outcome
        self.state = ServedModel(model="m", dtype="float32")  # something with a dtype

    async def score(self, *_):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@pytest.fixture
def service(tmp_path):
    service = UncertaintyService(load_settings().model_copy(update={"results_path": str(tmp_path / "results")}))
    service.served = ServedModel(model="m", dtype="float32")
    service._store = service._new_store()
    service.told = []
    service.observers.append(service.told.append)
    return service


def score(service, outcome, answers=(ANSWER,), **options):
    service._client = StandInClient(outcome)

    async def go():
        results = await service.score(answers, RequestOptions(**options), CONTEXT)
        await asyncio.gather(*service._background)
        return results, [await service.result(one["id"]) for one in results]

    return asyncio.run(go())


def test_a_scored_answer_is_told_with_all_that_is_known(service):
    (result,), _ = score(service, SCORED)
    (told,) = service.told
    assert told.result == result
    assert (told.context, told.options, told.finish_reason) == (CONTEXT, RequestOptions(), "length")
    # the span that was scored begins after the thinking
    assert (told.prompt_tokens, told.answer_tokens, told.engine_log_probability) == (3, 3, -1.5)
    assert told.pass_seconds == 0.25
    assert told.result["seconds"] != 0.25


def test_a_pending_answer_is_told_once_when_it_has_come(service):
    (pending,), (kept,) = score(service, SCORED, wait=False)
    assert pending["status"] == "pending"
    (told,) = service.told
    assert told.result == kept
    assert (told.result["status"], told.result["id"]) == ("scored", pending["id"])


@pytest.mark.parametrize("outcome", [QueueFullError("full"), RuntimeError("x")])
def test_what_is_not_scored_is_told_too(service, outcome):
    (result, nothing), _ = score(service, outcome, answers=(ANSWER, None))
    assert {told.result["id"] for told in service.told} == {result["id"], nothing["id"]}
    assert all(
        told.result["status"] in {"skipped", "failed"} and told.context == CONTEXT for told in service.told
    )


def test_a_pending_answer_that_cannot_be_kept_is_told(service):
    service._store = None
    service._client = StandInClient(SCORED)
    (result,) = asyncio.run(service.score([ANSWER], RequestOptions(wait=False), CONTEXT))
    assert [told.result for told in service.told] == [result]
    assert result["status"] == "failed"


def test_logprobs_of_another_kind_are_not_compared(service):
    service.served = ServedModel(model="m", dtype="float32", raw_logprobs=False)
    score(service, SCORED)
    assert service.told[0].engine_log_probability is None


def test_an_observer_that_fails_costs_nothing_and_is_logged_once(caplog):
    seen, observers = [], Observers()
    observers.append(lambda observation: 1 / 0)
    observers.append(seen.append)
    for _ in range(3):
        observers.tell(Observation(result={}))
    assert len(seen) == 3
    assert len(caplog.records) == 1
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], (None, {})),
        ([(b"authorization", b"Basic abc")], (None, {})),
        ([(b"authorization", b"Bearer ")], (None, {})),
        ([(b"authorization", b"bearer k\xff")], (hashlib.sha256(b"k\xff").hexdigest(), {})),
        (
            [(b"traceparent", b"a"), (b"tracestate", b"b"), (b"x", b"y")],
            (None, {"traceparent": "a", "tracestate": "b"}),
        ),
    ],
)
def test_the_context_of_a_request(headers, expected):
    messages = [{"role": "system"}, {"role": "user"}, {"role": "assistant"}, {"role": "user"}, "odd"]
    context = RequestContext.of("chat", headers, {"messages": messages})
    assert (context.api_key_hash, context.trace_headers) == expected
    assert context.turns == 2
    assert RequestContext.of("completion", headers, {"prompt": "x"}).turns is None
