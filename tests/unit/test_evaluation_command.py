"""`gnuq-serve evaluate` from questions to results, over HTTP, with a tiny random model."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny_server import VOCABULARY, TinyServer, encode

from gnuq_serve.cli import main
from gnuq_serve.evaluation.methods import METHODS

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("in_empty_folder")

QUESTIONS = Path(__file__).parents[1] / "questions"
SETS = ("facts:open", "myths:binary", "school:choice", "sums:number")
SMALL = ("--max-tokens", "4", "--samples", "3", "--resamples", "200", "--timed", "2", "--concurrency", "2")


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(
        tied=True, dtype=torch.float32, vocab_size=VOCABULARY, max_position_embeddings=1024, pad_token_id=0
    )


@pytest.fixture
def server(model):
    with TinyServer(model) as running:
        yield running


def evaluate(server, *arguments, data=QUESTIONS):
    return main(["evaluate", "--server", server.url, "--data", str(data), "--out", "out", *SMALL, *arguments])


def read(name):
    text = (Path("out") / name).read_text()
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_questions_to_results(server, saved, capsys):
    assert evaluate(server, "--local-model", saved) == 0
    out = capsys.readouterr().out
    results = read("results.json")
    assert [one["name"] for one in results["sets"]] == list(SETS)
    without = {name for name in METHODS if name.endswith(("_nli", "_encoder"))}
    for one, count in zip(results["sets"], (12, 8, 6, 8), strict=True):
        assert one["answers"] == count
        assert f"{one['name']}: {one['right']} of {count} answers right" in out
        methods = {method["name"]: method for method in one["methods"]}
        assert methods.keys() >= METHODS.keys() - without
        # What is free costs nothing; the rest was timed.
        assert methods["nll"]["cost"] == {"passes": "", "seconds": 0, "samples": 0, "memory": 0}
        assert methods["epistemic"]["cost"]["seconds"] > 0
        assert methods["p_true"]["cost"]["passes"] == "1 forward"
        assert methods["hidden_probe"]["cost"]["memory"] > 0
    choice = results["sets"][2]["methods"]
    assert {method["cost"]["samples"] for method in choice} == {0}
    binary = {method["name"]: method for method in results["sets"][1]["methods"]}
    if 0 < results["sets"][1]["right"] < 8:
        assert binary["nll"]["auroc"]["low"] <= binary["nll"]["auroc"]["value"] <= binary["nll"]["auroc"]["high"]
        assert binary["epistemic"]["auroc_minus"]["mean_nll"]["value"] == pytest.approx(
            binary["epistemic"]["auroc"]["value"] - binary["mean_nll"]["auroc"]["value"]
        )
    page = (Path("out") / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 * len(SETS)
    assert "semantic_entropy" in page


def test_rows_hold_every_value_and_no_text(server):
    assert evaluate(server, data=QUESTIONS / "myths.jsonl") == 0
    rows = read("rows.jsonl")
    assert [row["line"] for row in rows] == list(range(1, 9))
    text = (Path("out") / "rows.jsonl").read_text()
    assert "Wall" not in text
    assert set(rows[0]["values"]) >= {"nll", "epistemic", "semgrad", "p_true"}


def test_the_likeliest_choice_is_the_answer(server, model):
    """Against the model's own log-probabilities of every choice, its end included."""
    assert evaluate(server, "--methods", "nll,self_consistency", data=QUESTIONS / "school.jsonl") == 0
    questions = [json.loads(line) for line in (QUESTIONS / "school.jsonl").open()]
    rows = read("rows.jsonl")
    assert len(rows) == len(questions)
    for row, question in zip(rows, questions, strict=True):
        totals = []
        for choice in question["choices"]:
            prompt, answer = [1, *encode(question["question"]), 2], [*encode(choice), 2]
            logs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            totals.append(sum(logs[len(prompt) - 1 + t, one].item() for t, one in enumerate(answer)))
        best = max(totals)
        assert row["correct"] is (totals.index(best) == question["label"])
        assert row["values"]["nll"] == pytest.approx(-best, rel=1e-4)
        doubt = 1 - 1 / sum(math.exp(total - best) for total in totals)
        assert row["values"]["self_consistency"] == pytest.approx(doubt, abs=1e-5)


def test_a_run_that_was_cut_short_goes_on(server, capsys):
    arguments = ("--methods", "nll,epistemic,p_true")
    server.fail_after = 25
    assert evaluate(server, *arguments, data=QUESTIONS / "facts.jsonl") == 1
    assert "set OPENAI_API_KEY" in capsys.readouterr().err
    done = len(Path("out/work.jsonl").read_text().splitlines())
    assert done > 5
    with Path("out/work.jsonl").open("a") as file:
        file.write('{"set": "facts:open", "key"')  # killed in the middle of a line
    server.fail_after = None
    before = len(server.requests)
    assert evaluate(server, *arguments, data=QUESTIONS / "facts.jsonl") == 0
    asked = len(server.requests)
    assert read("results.json")["sets"][0]["answers"] == 12
    scored = [request for path, request in server.requests[before:] if path == "/v1/uncertainty"]
    assert len(scored) <= 12 + 2  # none twice but for the two that are timed
    # Nothing is left to ask, also for fewer methods; more methods ask only for what they need.
    assert evaluate(server, "--methods", "nll", data=QUESTIONS / "facts.jsonl") == 0
    assert len(server.requests) == asked
    assert evaluate(server, "--methods", "nll,semgrad", data=QUESTIONS / "facts.jsonl") == 0
    again = [request["uncertainty"] for path, request in server.requests[asked:] if path == "/v1/uncertainty"]
    assert all(options["semantic"] for options in again)
    assert len(again) >= 12


def test_other_settings_want_another_folder(server, capsys):
    arguments = ("--methods", "nll")
    assert evaluate(server, *arguments, data=QUESTIONS / "school.jsonl") == 0
    assert evaluate(server, *arguments, "--seed", "1", data=QUESTIONS / "school.jsonl") == 1
    assert "seed was 0, is 1. Set them back, or name another --out" in capsys.readouterr().err


def test_a_base_model_is_asked_by_a_text_with_examples(server):
    assert evaluate(server, "--few-shot", "2", "--methods", "nll,p_true", data=QUESTIONS / "facts.jsonl") == 0
    assert read("results.json")["sets"][0]["answers"] == 10
    prompts = [request["prompt"] for path, request in server.requests if path == "/tokenize"]
    assert all(text.count("Question: ") == 3 for text in prompts if text.endswith("Answer:"))
    assert {" True", " False"} <= set(prompts)
    greedy = [request for path, request in server.requests if path == "/v1/completions" and "stop" in request]
    assert {request["stop"] for request in greedy} == {"\n"}


def test_a_method_that_cannot_run_here_says_what_it_needs(server, capsys):
    assert evaluate(server, "--methods", "hidden_probe") == 1
    assert "--local-model" in capsys.readouterr().err
    assert evaluate(server, "--methods", "semantic_entropy_nli") == 1
    assert "--nli" in capsys.readouterr().err
    assert server.requests == []


def test_samples_are_compared_by_a_sentence_encoder(server, tmp_path):
    """A random encoder; equal texts mean the same, whatever it is."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "encoder"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    methods = ("--methods", "semantic_entropy_encoder,self_consistency_encoder", "--same-meaning", "0.9999")
    assert evaluate(server, *methods, "--encoder", str(folder), data=QUESTIONS / "facts.jsonl") == 0
    (one,) = read("results.json")["sets"]
    assert [method["missing"] for method in one["methods"]] == [0, 0]
    assert one["methods"][0]["cost"]["samples"] == 3
    entropies = [row["values"]["semantic_entropy_encoder"] for row in read("rows.jsonl")]
    assert all(0 <= entropy <= math.log(3) + 1e-9 for entropy in entropies)


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM, though it starts none")
def test_the_server_of_a_model_gets_the_engines_flags(tmp_path):
    from gnuq_serve.evaluation.own_server import OwnServer

    arguments = ["dtype=float32", "enforce_eager=true", "gnuq-deadline-seconds=60"]
    command = OwnServer("some/model", arguments, tmp_path / "log").command
    assert command[3:5] == ["serve", "some/model"]
    assert command[-5:] == ["--dtype", "float32", "--enforce-eager", "--gnuq-deadline-seconds", "60"]
    with pytest.raises(ValueError, match="write NAME=VALUE"):
        OwnServer("some/model", ["float32"], tmp_path / "log")
