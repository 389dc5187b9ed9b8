"""What a client of a gating server sees: held streams, replaced answers, refusals."""

import asyncio
import json
import random

import pytest
from gated_client import CHAT, COMPLETION, TEXT, Client, answers_in, chunks, event, received, whole
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from prometheus_client import REGISTRY

from gnuq_serve.service.responses import held_response
from gnuq_serve.service.responses.gate import check_environment, withheld
from gnuq_serve.service.responses.held_response import HeldStream
from gnuq_serve.service.settings.model import Settings
from gnuq_serve.service.settings.sources import SettingsError

POLICY = {"signal": "normalized.probability", "answer": 0.8, "escalate": 0.01, "otherwise": "human"}
GATED = {"on_uncertain": "abstain", "on_failure": "closed", "policy": POLICY, "abstain_text": TEXT}


def settings(**fields):
    return Settings.model_validate({"keep_results": 0, **GATED, **fields})


def ask(outcomes, path=CHAT, *, stream=False, body=None, parts=None, **fields):
    """The messages that the client gets, and the application."""
    client = Client(settings(**fields))
    client.scorer.outcomes = outcomes
    if stream:
        client.upstream.media_type = "text/event-stream"
        usage = {"id": "x-1", "choices": [], "usage": {"n": 7}}
        made = [*chunks(path, len(outcomes), random.Random(0)), usage, "[DONE]"]
        client.upstream.parts = parts or [event(one) for one in made]
    else:
        client.upstream.parts = parts or [json.dumps(whole(path, len(outcomes))).encode()]
    content = {"messages": [{"role": "user", "content": "?"}]} if path == CHAT else {"prompt": "?"}
    request = {"model": "m", "n": len(outcomes), "stream": stream, **content, **(body or {})}
    return asyncio.run(client.ask(path, request)), client


def events(sent):
    return [json.loads(line[6:]) for line in received(sent).decode().splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize(
    ("status", "decision", "verdicts"),
    # by (on_uncertain, on_failure): (pass, open), (pass, closed), (abstain, open), (abstain, closed)
    [
        ("scored", "answer", (None, None, None, None)),
        ("scored", "escalate", (None, None, "uncertain", "uncertain")),
        ("scored", "human", (None, None, "uncertain", "uncertain")),
        ("scored", "abstain", (None, None, "uncertain", "uncertain")),
        ("scored", None, (None, None, None, "unscored")),
        ("skipped", None, (None, "unscored", None, "unscored")),
        ("failed", None, (None, "unscored", None, "unscored")),
        ("pending", None, (None, "unscored", None, "unscored")),
        (None, None, (None, "unscored", None, "unscored")),
        ("failed", "answer", (None, "unscored", None, "unscored")),  # there is no such thing; it does not pass
    ],
)
def test_the_gate(status, decision, verdicts):
    result = None if status is None else {"status": status, "decision": decision}
    made = [
        settings(on_uncertain=uncertain, on_failure=failure)
        for uncertain in ("pass", "abstain")
        for failure in ("open", "closed")
    ]
    assert tuple(withheld(one, result) for one in made) == verdicts


def test_a_replaced_chat_answer():
    sent, _ = ask(["uncertain"])
    response = json.loads(received(sent))
    (choice,) = response["choices"]
    uncertainty = choice.pop("uncertainty")
    assert choice.pop("logprobs") == {"content": None, "uncertainty": uncertainty}
    message = {"role": "assistant", "content": TEXT, "refusal": None}
    assert choice == {"index": 0, "message": message, "finish_reason": "content_filter"}
    assert {name: response[name] for name in response if name != "choices"} == {
        "id": "x-1",
        "object": "o",
        "created": 1,
        "model": "m",
        "usage": {"n": 7},
    }
    assert (uncertainty["status"], uncertainty["decision"], uncertainty["withheld"]) == (
        "scored",
        "escalate",
        "uncertain",
    )
    assert dict(sent[0]["headers"])[b"content-length"] == str(len(received(sent))).encode()
    ChatCompletion.model_validate(response | {"object": "chat.completion", "usage": None}, strict=True)


def test_a_replaced_completion():
    sent, _ = ask(["dead"], COMPLETION, mirror_in_logprobs=False)
    response = json.loads(received(sent))
    (choice,) = response["choices"]
    uncertainty = choice.pop("uncertainty")
    assert (uncertainty["status"], uncertainty["reason"], uncertainty["withheld"]) == (
        "failed",
        "the scorer process died",
        "unscored",
    )
    assert choice == {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "content_filter"}
    Completion.model_validate(response | {"object": "text_completion", "usage": None}, strict=True)


def test_of_several_answers_only_the_uncertain_one_is_replaced():
    def count(reason):
        labels = {"route": "chat", "reason": reason}
        return REGISTRY.get_sample_value("gnuq_withheld_answers_total", labels) or 0

    before = count("uncertain"), count("unscored")
    ask(["certain", "uncertain", "dead", "uncertain"])
    assert (count("uncertain"), count("unscored")) == (before[0] + 2, before[1] + 1)
    for stream in (False, True):
        sent, _ = ask(["certain", "uncertain", "certain"], stream=stream)
        assert answers_in(sent) == {0, 2}
        assert received(sent).count(TEXT.encode()) == 1


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_a_replaced_stream(path):
    sent, _ = ask(["uncertain"], path, stream=True)
    opening, end, closing, usage = events(sent)
    around = {"id": "x-1", "object": "o", "created": 1, "model": "m"}
    nothing = {"logprobs": None, "finish_reason": None}
    text, empty = ({"text": TEXT}, {"text": ""})
    if path == CHAT:
        text, empty = {"delta": {"role": "assistant", "content": TEXT}}, {"delta": {}}
    assert opening == around | {"choices": [{"index": 0, **text, **nothing}]}
    assert end == around | {"choices": [{"index": 0, **empty, **nothing, "finish_reason": "content_filter"}]}
    (choice,) = closing["choices"]
    assert choice["uncertainty"]["withheld"] == "uncertain"
    assert choice["logprobs"]["uncertainty"] == choice["uncertainty"]
    assert usage == {"id": "x-1", "choices": [], "usage": {"n": 7}}
    assert received(sent).endswith(b"data: [DONE]\n\n")
    assert not sent[-1].get("more_body")
    if path == CHAT:
        for one in (opening, end, closing):
            ChatCompletionChunk.model_validate(one | {"object": "chat.completion.chunk"}, strict=True)


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_a_certain_stream_is_what_it_would_be_without_a_gate(path):
    def shown(sent):
        return [
            {**one, "choices": [{**c, "uncertainty": 0, "logprobs": 0} for c in one["choices"]]}
            for one in events(sent)
        ]

    held, _ = ask(["certain", "certain"], path, stream=True)
    passed, _ = ask(["certain", "certain"], path, stream=True, on_uncertain="pass", on_failure="open")
    assert shown(held) == shown(passed)
    assert answers_in(held) == {0, 1}


def test_a_stream_is_held_until_it_is_judged():
    """Its headers go out at once, its events only after the score."""

    async def go():
        client = Client(settings())
        client.scorer.outcomes = ["certain"]
        asked, judged, sent_before = asyncio.Event(), asyncio.Event(), []
        score = client.scorer.score

        async def slow(*arguments):
            sent_before.extend(sent)
            asked.set()
            await judged.wait()
            return await score(*arguments)

        client.scorer.score = slow
        client.upstream.media_type = "text/event-stream"
        client.upstream.parts = [event(one) for one in [*chunks(CHAT, 1, random.Random(0)), "[DONE]"]]
        sent = []

        async def keep(message):
            sent.append(message)

        body = json.dumps({"messages": [], "stream": True}).encode()
        request = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive():
            return next(request, None) or await asyncio.sleep(3600)

        scope = {"type": "http", "method": "POST", "path": CHAT, "root_path": "", "headers": []}
        running = asyncio.create_task(client.app(scope, receive, keep))
        await asked.wait()
        judged.set()
        await running
        return sent_before, sent

    before, after = asyncio.run(go())
    assert [message["type"] for message in before] == ["http.response.start"]
    assert answers_in(after) == {0}


def test_while_it_is_held_a_comment_keeps_the_connection_alive(monkeypatch):
    monkeypatch.setattr(held_response, "_WAITING_SECONDS", 0.0)
    sent, _ = ask(["certain"], stream=True)
    comments = [line for line in received(sent).decode().splitlines() if line.startswith(":")]
    assert len(comments) == 5  # one for each event before the last
    assert answers_in(sent) == {0}


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_read_becomes_an_error(stream):
    sent, _ = ask(["certain"], stream=stream, parts=[b"data: S3CRET0\n\n"])
    body = events(sent)[0] if stream else json.loads(received(sent))
    assert sent[0]["status"] == (200 if stream else 500)  # a stream has begun
    assert body["error"]["type"] == "InternalServerError"
    assert "on_failure: closed" in body["error"]["message"]
    assert answers_in(sent) == set()


def test_vllms_own_error_in_a_stream_passes():
    error = {"error": {"message": "the engine died", "code": 500}}
    first = [event(one) for one in chunks(CHAT, 1, random.Random(0))[:2]]
    sent, _ = ask(["certain"], stream=True, parts=[*first, event(error), event("[DONE]")])
    assert events(sent) == [error]


@pytest.mark.parametrize("status", [400, 404, 500, 503])
def test_errors_pass_as_they_are(status):
    client = Client(settings())
    client.upstream.status, client.upstream.parts = status, [b'{ "error":  1 }']
    sent = asyncio.run(client.ask(CHAT, {"messages": []}))
    assert (sent[0]["status"], received(sent)) == (status, b'{ "error":  1 }')


@pytest.mark.parametrize("fields", [{}, {"on_uncertain": "pass"}, {"on_failure": "open"}], ids=str)
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (False, "uncertainty: false is not allowed on this server"),
        ({"wait": False}, "uncertainty.wait: false is not allowed on this server"),
        ({"calibration": "law"}, "uncertainty.calibration='law' is unknown; known: none is loaded here"),
        ({"calibration": 7}, "uncertainty.calibration must be a name, not 7"),
    ],
)
def test_what_would_get_round_the_gate_is_refused(fields, asked, said):
    sent, client = ask(["certain"], body={"uncertainty": asked}, **fields)
    error = json.loads(received(sent))["error"]
    assert (sent[0]["status"], error["param"]) == (400, "uncertainty")
    assert said in error["message"]
    assert client.upstream.bodies == []


@pytest.mark.parametrize("body", [b"{not json", b"[1]", b"\xff\xfe{\x00}\x00"])
def test_a_body_that_only_the_server_behind_might_understand_is_refused(body):
    async def go():
        client, sent = Client(settings()), []

        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": CHAT, "root_path": "", "headers": []}
        await client.app(scope, receive, send)
        return sent, client

    sent, client = asyncio.run(go())
    if body.startswith(b"\xff"):  # UTF-16, which JSON's reader knows
        assert json.loads(client.upstream.bodies[0])["return_token_ids"] is True
    else:
        assert sent[0]["status"] == 400
        assert client.upstream.bodies == []


def test_opting_out_can_be_forbidden_without_a_gate():
    open_ = {"on_uncertain": "pass", "on_failure": "open", "allow_opt_out": False}
    sent, _ = ask(["certain"], body={"uncertainty": False}, **open_)
    assert sent[0]["status"] == 400
    sent, _ = ask(["certain"], body={"uncertainty": {"wait": False}}, **open_)
    assert sent[0]["status"] == 200


@pytest.mark.parametrize(("asked", "scored"), [(None, False), (True, True), ({}, True), (False, False)])
def test_scoring_only_on_request(asked, scored):
    quiet = {"on_uncertain": "pass", "on_failure": "open", "score_by_default": False}
    sent, _ = ask(["certain"], body={} if asked is None else {"uncertainty": asked}, **quiet)
    assert ("uncertainty" in json.loads(received(sent))["choices"][0]) == scored


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"policy": None}, "on_uncertain: abstain needs a decision on each answer: name a file in calibrations"),
        ({"score_by_default": False}, "on_uncertain: abstain needs every answer scored: set score_by_default"),
        ({"score_fraction": 0.5}, "set score_fraction to 1"),
        ({"on_uncertain": "pass", "score_fraction": 0.5}, "on_failure: closed needs every answer scored"),
        ({"allow_opt_out": False, "score_by_default": False}, "set one of them to true"),
        ({"default_calibration": "law"}, "default_calibration: 'law' is not among calibrations (none)"),
        ({"calibration_by_key": {"0" * 64: "law"}}, "calibration_by_key.000"),
        (
            {"calibrations": {"faq": "x"}, "calibration_by_key": {"sk-secret": "faq"}},
            "SHA-256 digests in lower-case hexadecimal",
        ),
        ({"max_error": 0.1}, "max_error is kept by a calibration"),
        ({"abstain_text": ""}, "at least 1 character"),
    ],
)
def test_settings_that_cannot_hold_their_promise(fields, said):
    with pytest.raises(ValueError, match="Settings") as error:
        settings(**fields)
    assert said in str(error.value)


def test_the_rust_frontend_knows_no_gate():
    rust = {"VLLM_USE_RUST_FRONTEND": "1"}
    for fields in (
        {},
        {"on_uncertain": "pass"},
        {"on_uncertain": "pass", "on_failure": "open", "unscored_routes": "block"},
    ):
        with pytest.raises(SettingsError, match="VLLM_USE_RUST_FRONTEND=1 answers without coming past us"):
            check_environment(settings(**fields), rust)
    check_environment(settings(), {"VLLM_USE_RUST_FRONTEND": "0"})
    check_environment(settings(on_uncertain="pass", on_failure="open"), rust)


def test_the_held_stream_never_counts_an_error_of_ours_as_a_pass(monkeypatch):
    """Whatever breaks while the answers are put in their places, an uncertain one does not go out."""

    def broken(*_arguments, **_options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(held_response, "withhold_events", broken)
    monkeypatch.setattr(held_response, "withhold", broken)
    for stream in (False, True):
        for failure in ("open", "closed"):
            sent, _ = ask(["uncertain", "certain"], stream=stream, on_failure=failure)
            assert answers_in(sent) == set()
    monkeypatch.setattr(HeldStream, "_judged", broken)
    sent, _ = ask(["certain"], stream=True)
    assert answers_in(sent) == {0}  # it was judged, and may go out as it is


def test_a_choice_that_goes_on_after_its_end_is_judged_as_a_whole():
    """No vLLM does that; its first part alone would have been certain."""
    late = {
        "choices": [{"index": 0, "delta": {"content": "S3CRET0c"}, "token_ids": [5], "finish_reason": "stop"}]
    }
    asked = []

    async def score(prompt_ids, answer_ids, *more):
        asked.append(list(answer_ids))
        return await real(prompt_ids, [987_660 if len(answer_ids) > 2 else 987_650], *more)

    client = Client(settings())
    client.scorer.outcomes = ["certain", "uncertain"]
    real, client.scorer.score = client.scorer.score, score
    client.upstream.media_type = "text/event-stream"
    client.upstream.parts = [event(one) for one in [*chunks(CHAT, 1, random.Random(0)), late, "[DONE]"]]
    sent = asyncio.run(client.ask(CHAT, {"messages": [], "stream": True}))
    assert asked[-1] == [987_650, 987_651, 5]
    assert answers_in(sent) == set()
