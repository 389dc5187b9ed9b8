"""A scorer that reads its vLLM server's weights: same scores, no second copy, never two sets of weights mixed."""

import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from live_server import CHAT, ENV, GNUQ_SERVE, HEADERS, OPTIONS, ask, scorer_of, wait_for_scorer
from shared_load import checksum

from gnuq_serve.scorer import Sample, Scorer

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

WEIGHTS = 134_515_008 * 4  # bytes of SmolLM2-135M's parameters in float32
PROMPT, ANSWER = [504, 3575, 282, 4649, 314], [7042, 30]


@pytest.fixture(scope="module")
def shared_server(smollm2, start):
    command = [GNUQ_SERVE, "serve", str(smollm2), *OPTIONS, "--gnuq-scorer-weights", "shared"]
    with start(command, ENV | {"VLLM_SERVER_DEV_MODE": "1"}) as running:
        running.wait_until_ready(["/health"])
        assert wait_for_scorer(running)["weights"] == "shared"
        yield running


def regions(process):
    """What /proc says of the shared file in a process, in bytes, by name."""
    found, inside = {}, False
    for line in Path(f"/proc/{process.pid}/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            inside = "memfd:gnuq-weights" in line
        elif inside and rest and rest[-1] == "kB":
            found[name.rstrip(":")] = found.get(name.rstrip(":"), 0) + int(rest[0]) * 1024
    return found


def test_scores_are_those_of_a_checkpoint(shared_server, server):
    for body in (CHAT, CHAT | {"messages": [{"role": "user", "content": "Name three colours."}]}):
        ours, theirs = (ask(one, "chat/completions", body)["choices"][0] for one in (shared_server, server))
        assert ours["message"] == theirs["message"]
        assert ours["uncertainty"]["warnings"] == theirs["uncertainty"]["warnings"] == []
        assert ours["uncertainty"]["fingerprint"] == theirs["uncertainty"]["fingerprint"]
        for name in ("log_probability", "log_epistemic", "log_grad_norm_sq"):
            assert ours["uncertainty"][name] == pytest.approx(theirs["uncertainty"][name], rel=1e-6), name


def test_the_scorer_has_no_copy(shared_server):
    before = checksum(psutil.Process(shared_server.pid))
    for _ in range(3):
        ask(shared_server, "chat/completions", CHAT)
    found = regions(scorer_of(shared_server))
    assert found["Rss"] > 0.9 * WEIGHTS  # it has read them
    assert found["Private_Clean"] + found["Private_Dirty"] < 0.01 * WEIGHTS
    assert checksum(psutil.Process(shared_server.pid)) == before


def rpc(running, method, **call):
    """What a worker's method returns; vLLM offers this route to developers."""
    url = f"{running.base_url}/collective_rpc"
    response = httpx.post(url, json={"method": method, **call}, headers=HEADERS, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()["results"][0]


def test_the_worker_scores_itself(shared_server):
    """As offline use has it."""
    (here,) = rpc(shared_server, "gnuq_score", args=[[[PROMPT, ANSWER]], {}])
    there = ask(shared_server, "uncertainty", {"prompt_token_ids": PROMPT, "answer_token_ids": ANSWER})
    for name in ("log_probability", "log_grad_norm_sq"):
        assert here[name] == pytest.approx(there[name], rel=1e-6)


def test_no_score_mixes_two_sets_of_weights(shared_server, smollm2, tmp_path):
    first = Scorer.from_pretrained(str(smollm2), dtype="float32", device="cpu")
    (expected_first,) = first.score([Sample(PROMPT, ANSWER)])
    with torch.no_grad():
        for parameter in first.model.parameters():
            parameter.mul_(1.01)
    first.model.save_pretrained(tmp_path)
    first.weights_changed()
    (expected_second,) = first.score([Sample(PROMPT, ANSWER)])
    expected = [expected_first, expected_second]
    results, stop = [], threading.Event()

    def load():
        body = {"prompt_token_ids": PROMPT, "answer_token_ids": ANSWER}
        while not stop.is_set():
            results.append(ask(shared_server, "uncertainty", body))

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for path in (tmp_path, smollm2, tmp_path):
            time.sleep(1)
            rpc(shared_server, "reload_weights", kwargs={"weights_path": str(path)})
        time.sleep(2)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    seen = []
    for result in results:
        if result["status"] == "failed":
            assert "the engine's weights" in result["reason"]
            continue
        near = [
            abs(result["log_probability"] - one.log_probability) < 1e-4
            and abs(result["log_grad_norm_sq"] - one.log_grad_norm_sq) < 1e-4
            for one in expected
        ]
        assert sum(near) == 1, result
        seen.append(near.index(True))
    assert seen[0] == 0
    assert seen[-1] == 1
    assert len({result["fingerprint"] for result in results if result["status"] == "scored"}) == 2
