"""Streams through the middleware: each event as it comes, the scores at the end, a client that hangs up."""

import asyncio
import json

import pytest
from given_scores import REQUEST, SCORED, StandInService, count, scope, vllm_response
from starlette.responses import JSONResponse

from gnuq_serve.service.middleware import UncertaintyMiddleware


def chunk(content, *ids, finish_reason=None, **more):
    choice = {"index": 0, "delta": {"content": content}, "logprobs": None, "finish_reason": finish_reason}
    return {"id": "chatcmpl-1", "choices": [choice | {"token_ids": list(ids)}]} | more


def event(data):
    return f"data: {json.dumps(data)}\n\n".encode()


ROLE = {
    "id": "chatcmpl-1",
    "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None}],
    "prompt_token_ids": [1, 5],
}
USAGE = {"id": "chatcmpl-1", "choices": [], "usage": {"total_tokens": 4}}
EVENTS = [ROLE, chunk("Hi", 7), chunk("", 2, finish_reason="stop"), USAGE]


class Connection:
    """One streamed request whose client can hang up at any time."""

    def __init__(self, messages, service=None, body=REQUEST, listens=True):
        """``listens``: the application cancels itself when the client hangs up, as Starlette does."""
        self.sent, self.service, self.body = [], service or StandInService(), body
        self.messages, self.listens = messages, listens
        self.seen_by_app = []
        self.hung_up = None

    async def app(self, scope, receive, send):
        assert "uncertainty" not in json.loads((await receive())["body"])
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def stream():
            for data in self.messages:
                self.seen_by_app.append(len(self.sent))
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        if not self.listens:
            await stream()
            return
        streaming = asyncio.ensure_future(stream())
        listening = asyncio.ensure_future(receive())
        await asyncio.wait((streaming, listening), return_when=asyncio.FIRST_COMPLETED)
        for task in (streaming, listening):
            task.cancel()
        await asyncio.gather(streaming, listening, return_exceptions=True)

    async def run(self):
        self.hung_up = asyncio.Event()
        body = json.dumps(self.body | {"stream": True}).encode()
        request = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive():
            if (message := next(request, None)) is not None:
                return message
            await self.hung_up.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            self.sent.append(message)

        await UncertaintyMiddleware(self.app, self.service)(scope(), receive, send)

    @property
    def events(self):
        body = b"".join(message.get("body", b"") for message in self.sent)
        parts = body.decode().split("\n\n")
        assert parts.pop() == ""
        return [part if part[6:7] != "{" else json.loads(part.removeprefix("data: ")) for part in parts]


@pytest.mark.parametrize("field", [{}, {"uncertainty": True}])
def test_a_stream_passes_event_by_event_and_ends_with_its_score(field):
    connection = Connection([*map(event, EVENTS), b"data: [DONE]\n\n"], body=REQUEST | field)
    asyncio.run(connection.run())
    # the start, then each event had gone out when the next was made; with the usage went the score
    assert connection.seen_by_app == [1, 2, 3, 4, 6]
    *tokens, closing, usage, done = connection.events
    assert [event["choices"][0].get("token_ids") for event in tokens] == [None] * 3
    assert [event["choices"][0]["delta"]["content"] for event in tokens] == ["", "Hi", ""]
    assert tokens[0]["prompt_token_ids"] is None
    choice = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": None, "uncertainty": SCORED.to_dict()}
    assert closing == {"id": "chatcmpl-1", "choices": [choice]}
    assert usage == USAGE
    assert done == "data: [DONE]"
    ((answer,),) = connection.service.asked
    assert (answer.prompt_ids, answer.answer_ids) == ([1, 5], [7, 2])
    assert not connection.sent[-1].get("more_body")


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_events_may_come_in_any_pieces(size):
    whole = b"".join([*map(event, EVENTS), b": keep-alive\n\n", b"data: [DONE]\n\n"])
    connection = Connection([whole[i : i + size] for i in range(0, len(whole), size)])
    asyncio.run(connection.run())
    events = connection.events
    assert [type(event) for event in events] == [dict] * 5 + [str] * 2
    assert events[3]["choices"][0]["uncertainty"]["status"] == "scored"
    assert events[5:] == [": keep-alive", "data: [DONE]"]


def test_a_stream_ends_in_order_when_scoring_breaks(caplog):
    service = StandInService(error=RuntimeError("boom"))
    connection = Connection([*map(event, EVENTS), b"data: [DONE]\n\n"], service)
    asyncio.run(connection.run())
    assert connection.events[3:] == [USAGE, "data: [DONE]"]
    assert "boom" in caplog.text


@pytest.mark.parametrize("broken", [{"error": {"message": "out"}}, {"neither": 1}, {"choices": [{"text": "x"}]}])
def test_after_an_error_the_stream_passes_as_it_is(broken):
    before = count("gnuq_unscored_requests_total", route="chat", reason="incomplete")
    connection = Connection([*map(event, [ROLE, chunk("Hi", 7), broken]), b"data: [DONE]\n\n"])
    asyncio.run(connection.run())
    assert connection.events[2:] == [broken, "data: [DONE]"]
    assert connection.service.asked == []
    assert count("gnuq_unscored_requests_total", route="chat", reason="incomplete") == before + 1


@pytest.mark.parametrize("listens", [True, False], ids=["the app listens", "only we listen"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_while_it_is_scored_frees_everything(listens, stream):
    async def go():
        service = StandInService()
        service.ready = asyncio.Event()
        if stream:
            connection = Connection([*map(event, EVENTS), b"data: [DONE]\n\n"], service, listens=listens)
        else:
            connection = Connection([], service)

            async def app(scope, receive, send):
                await receive()
                await JSONResponse(vllm_response())(scope, receive, send)

            connection.app = app
        running = asyncio.ensure_future(connection.run())
        await service.was_asked.wait()
        sent = len(connection.sent)
        connection.hung_up.set()
        await asyncio.wait_for(running, 5)
        return service, connection.sent[sent:], [task for task in asyncio.all_tasks() if not task.done()]

    before = count("gnuq_unscored_requests_total", route="chat", reason="incomplete")
    service, sent_after, tasks = asyncio.run(go())
    assert service.given_up == 1
    assert not any(b"uncertainty" in message.get("body", b"") for message in sent_after)
    assert len(tasks) == 1  # this one
    assert count("gnuq_unscored_requests_total", route="chat", reason="incomplete") == before + 1


def of_choice(index, data):
    return data | {"choices": [data["choices"][0] | {"index": index}]}


def test_a_choice_is_scored_as_soon_as_it_has_finished():
    """The first one's score is asked for while the second goes on; each gets its own."""
    service = StandInService()
    scored = {7: SCORED.replace(id="unc-7"), 8: SCORED.replace(id="unc-8")}
    asked_then = []

    async def score(answers, options, context):
        service.asked.append(answers)
        return [scored[answer.answer_ids[0]].to_dict() for answer in answers]

    service.score = score
    end = chunk("", 2, finish_reason="stop")
    messages = [of_choice(0, ROLE), of_choice(1, ROLE), of_choice(1, chunk("Ho", 8)), of_choice(1, end)]
    messages += [of_choice(0, chunk("Hi", 7)), of_choice(0, end), USAGE]
    connection = Connection([*map(event, messages), b"data: [DONE]\n\n"], service, REQUEST | {"n": 2})

    async def go():
        app = connection.app

        async def slowly(scope, receive, send):
            async def send_on(message):
                await send(message)
                await asyncio.sleep(0)
                asked_then.append(len(service.asked))

            await app(scope, receive, send_on)

        connection.app = slowly
        await connection.run()

    asyncio.run(go())
    assert asked_then == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
    closing = connection.events[-3]
    assert [choice["uncertainty"]["id"] for choice in closing["choices"]] == ["unc-7", "unc-8"]
