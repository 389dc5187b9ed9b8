"""Results by id and scores of given answers, on a real server."""

import httpx
import pytest
from live_server import (
    CHAT,
    COMPLETION,
    HEADERS,
    NAME,
    ask,
    ask_for,
    scorer_of,
    wait_for_scorer,
)

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

NUMBERS = ("tokens", "log_probability", "log_grad_norm_sq", "entropy")


def same_score(found, expected):
    assert found["status"] == expected["status"] == "scored"
    assert found["fingerprint"] == expected["fingerprint"]
    for name in NUMBERS:
        assert found[name] == pytest.approx(expected[name], abs=1e-4), name


def test_an_answer_given_again_has_the_same_score(server):
    """As messages, as text, and as token ids."""
    body = CHAT | {"return_token_ids": True}
    response = ask(server, "chat/completions", body)
    choice = response["choices"][0]
    assert choice["finish_reason"] == "stop"
    text = choice["message"]["content"]
    same_score(ask(server, "uncertainty", {"messages": CHAT["messages"], "answer": text}), choice["uncertainty"])
    ids = {"prompt_token_ids": response["prompt_token_ids"], "answer_token_ids": choice["token_ids"]}
    same_score(ask(server, "uncertainty", ids), choice["uncertainty"])
    cut = CHAT | {"max_tokens": 3}
    choice = ask(server, "chat/completions", cut)["choices"][0]
    given = {"messages": CHAT["messages"], "answer": choice["message"]["content"], "end_of_turn": False}
    same_score(ask(server, "uncertainty", given), choice["uncertainty"])


def test_a_text_given_again_has_the_same_score(server):
    choice = ask(server, "completions", COMPLETION)["choices"][0]
    given = {"prompt": COMPLETION["prompt"], "answer": choice["text"], "end_of_turn": False, "model": NAME}
    same_score(ask(server, "uncertainty", given), choice["uncertainty"])


def test_a_given_answer_later(server):
    given = {"prompt": COMPLETION["prompt"], "answer": " Paris."}
    response = httpx.post(
        f"{server.base_url}/v1/uncertainty",
        json=given | {"uncertainty": {"wait": False}},
        headers=HEADERS,
    )
    assert response.status_code == 202
    same_score(ask_for(server, response.json()["id"]), ask(server, "uncertainty", given))


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_api_key_guards_results_and_scores(server, method):
    path = "/v1/uncertainty" + ("/unc-1" if method == "GET" else "")
    assert httpx.request(method, f"{server.base_url}{path}", json={}).status_code == 401


def test_unknown_models_and_mistakes(server):
    for body, message in (
        ({"prompt": "a", "answer": "b", "model": "unknown"}, "does not exist"),
        ({"prompt": "a"}, "answer must be a text"),
    ):
        assert message in ask(server, "uncertainty", body)["error"]["message"]
    assert httpx.get(f"{server.base_url}/v1/uncertainty/unc-x", headers=HEADERS).status_code == 404


def test_results_outlive_the_scorer(server):
    pending = ask(server, "chat/completions", CHAT | {"uncertainty": {"wait": False}})["choices"][0][
        "uncertainty"
    ]
    done = ask_for(server, pending["id"])
    scorer_of(server).kill()
    assert ask_for(server, pending["id"]) == done
    wait_for_scorer(server)
