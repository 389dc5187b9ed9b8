"""Covariances on a causal language model, against the scorer, naive sums and made-up answers."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gnuq_serve.evaluation.working_file import EvaluationFile
from gnuq_serve.scorer import Sample, Scorer
from gnuq_serve.validation.answers_study import answers_report, read_items, set_report
from gnuq_serve.validation.language_model import (
    Covariances,
    Item,
    fisher_diagonal,
    own_texts,
    random_texts,
    uncertainties,
)

VOCABULARY = 6
ITEM = Item("a", [1, 2, 3], [4, 5, 1], True)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=None,
        initializer_range=0.6,
    )
    return LlamaForCausalLM(config).eval()


def log_p(model, ids):
    return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def flat(parts):
    return torch.cat([part.flatten() for part in parts])


def test_isotropic_is_the_scorers_norm(model):
    total, norms = Covariances({}).log_norms(model, ITEM)
    scored = Scorer(model).score([Sample(ITEM.prompt_ids, ITEM.answer_ids)])[0]
    model.requires_grad_(True)
    assert norms["isotropic"] == pytest.approx(scored.log_grad_norm_sq, rel=1e-5)
    assert total == pytest.approx(scored.log_probability, rel=1e-5)
    forms = uncertainties(total, 3, norms["isotropic"])
    assert forms["epistemic"] == pytest.approx(scored.log_epistemic, rel=1e-5)
    assert forms["normalized_epistemic"] == pytest.approx(math.log(scored.normalized.epistemic), rel=1e-4)


def test_fisher_diagonal_is_the_expected_square(model):
    """Against the exact expectation over every next token, within five standard errors of the sum."""
    text, parameters = [1, 4, 2], list(model.parameters())
    exact = torch.zeros(sum(part.numel() for part in parameters))
    for at, token in itertools.product(range(len(text)), range(VOCABULARY)):
        value = log_p(model, text)[at, token]
        exact += value.exp().item() * flat(torch.autograd.grad(value, parameters)).square()
    draws = [flat(fisher_diagonal(model, iter([text]), seed=seed)) for seed in range(150)]
    sums = torch.stack(draws).sum(1)
    assert abs(sums.mean() - exact.sum()) < 5 * sums.std() / math.sqrt(len(draws))
    found = torch.stack(draws).mean(0)
    assert np.corrcoef(found, exact)[0, 1] > 0.95


def test_log_norms_are_weighted_sums(model):
    torch.manual_seed(1)
    fisher = [torch.rand_like(part) for part in model.parameters()]
    covariances = Covariances({"own": fisher})
    assert covariances.names == ("isotropic", "own:1", "own:0.01")
    _, norms = covariances.log_norms(model, ITEM)
    ids = [*ITEM.prompt_ids, *ITEM.answer_ids]
    value = sum(log_p(model, ids)[at - 1, ids[at]] for at in (3, 4, 5))
    g = flat(torch.autograd.grad(value, list(model.parameters()))).detach().double()
    relative = flat(fisher).double() / flat(fisher).double().mean()
    for damping in (1.0, 0.01):
        expected = (g.square() / (relative + damping)).sum().log().item()
        assert norms[f"own:{damping:g}"] == pytest.approx(expected, rel=1e-6)


def test_texts(model):
    texts = own_texts(model, 1, 40, length=5)
    assert [len(text) for text in texts] == [5] * 40
    assert {text[0] for text in texts} == {1}
    assert texts == own_texts(model, 1, 40, length=5) != own_texts(model, 1, 40, length=5, seed=1)
    many = own_texts(model, 1, 2000, length=2)
    share = np.bincount([text[1] for text in many], minlength=VOCABULARY) / 2000
    np.testing.assert_allclose(share, log_p(model, [1])[0].exp().detach(), atol=0.06)
    assert set(itertools.chain(*random_texts(VOCABULARY, 50))) == set(range(VOCABULARY))


def test_report_of_a_set():
    rng = np.random.default_rng(0)
    rows = []
    for at in range(60):
        correct = bool(at % 3)
        norms = {"isotropic": rng.standard_normal(), "own:1": -1.0 if correct else 1.0}
        rows.append({"correct": correct, "log_p": -2.0, "tokens": 2, "log_norms": norms})
    found = set_report(rows)
    assert (found["answers"], found["right"]) == (60, 40)
    best, chance = found["auroc"]["own:1"]["log_norm"], found["auroc"]["isotropic"]["log_norm"]
    assert best["value"] == 1.0  # less certain means wrong
    assert chance["low"] < 0.5 < chance["high"]
    assert best["minus_isotropic"]["value"] == pytest.approx(1 - chance["value"])
    assert chance["minus_isotropic"]["high"] == 0.0


def test_answers_of_an_evaluation(tmp_path):
    answer = {"prompt_ids": [1, 2], "answer_ids": [3], "text": "x"}
    with EvaluationFile(tmp_path / "work.jsonl", {}) as file:  # what evaluate itself writes
        file.add("s:open", "a", "answer", answer)
        file.add("s:open", "a", "score", {})
        file.add("s:open", "b", "answer", {"failure": "gone"})
        file.add("s:open", "c", "answer", answer | {"answer_ids": [4, 5]})
        file.note("scorer_bytes", 1000)
    rows = [{"set": "s:open", "key": key, "correct": key == "c"} for key in "abc"]
    with pytest.raises(ValueError, match=r"--evaluation .*: no finished evaluation there"):
        read_items(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    assert read_items(tmp_path) == {
        "s:open": [Item("a", [1, 2], [3], False), Item("c", [1, 2], [4, 5], True)],
    }


@pytest.mark.slow
def test_covariances_on_a_real_models_answers(smollm2, tmp_path):
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    prompt, answers = [*range(100, 120)], {"a": [200, 201], "b": [300], "c": [400, 401, 402], "d": [500]}
    with EvaluationFile(evaluation / "work.jsonl", {}) as file:
        for key, ids in answers.items():
            file.add("s:open", key, "answer", {"prompt_ids": prompt, "answer_ids": ids})
    rows = [{"set": "s:open", "key": key, "correct": key == "a"} for key in answers]
    (evaluation / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    out.mkdir()

    report = answers_report(str(smollm2), str(evaluation), out, limit=2, texts=2)
    assert (report["sets"]["s:open"]["answers"], report["sets"]["s:open"]["right"]) == (2, 1)
    written = (out / "answers.jsonl").read_text()
    samples = [Sample(prompt, answers[key]) for key in "ab"]
    expected = Scorer.from_pretrained(str(smollm2), dtype="float32", device="cpu").score(samples)
    found = [json.loads(line) for line in written.splitlines()[1:]]
    for one, score in zip(found, expected, strict=True):
        assert one["log_p"] == pytest.approx(score.log_probability, rel=1e-4)
        assert one["log_norms"]["isotropic"] == pytest.approx(score.log_grad_norm_sq, abs=1e-3)

    assert answers_report(str(smollm2), str(evaluation), out, limit=2, texts=2) == report
    assert (out / "answers.jsonl").read_text() == written  # nothing was computed again
    with pytest.raises(ValueError, match="limit was 2, is 3"):  # other questions build a covariance then
        answers_report(str(smollm2), str(evaluation), out, limit=3, texts=2)
