"""Labelled rows in, a calibration and its evidence out."""

import dataclasses
import math

import numpy as np
import pytest

from gnuq_serve import Calibration, Policy, Uncertainty
from gnuq_serve.calibration import Row, calibrate
from gnuq_serve.calibration.features import read_features
from gnuq_serve.calibration.metrics import auroc


def rows(count, seed=0, *, base=0.6, free=1.5, gradient=0.0, group_of=1):
    """Answers whose log-odds of being right are linear in a free quality and in one that the gradient sees."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        tokens = int(rng.integers(3, 40))
        surety, hidden = rng.normal(size=2)
        odds = math.log(base / (1 - base)) + free * surety + gradient * hidden
        each = math.exp(-1.0 - 0.6 * surety)
        uncertainty = Uncertainty.scored(
            token_log_probabilities=[-each * rng.exponential() for _ in range(tokens)],
            token_entropies=[each * rng.exponential() for _ in range(tokens)],
            grad_norm_sq=math.exp(9.0 - hidden + 0.2 * rng.normal()),
            fingerprint="3f9c2a",
        )
        made.append(
            Row(
                uncertainty=uncertainty,
                correct=bool(rng.random() < 1 / (1 + math.exp(-odds))),
                prompt_tokens=int(rng.integers(20, 200)),
                turns=1,
                finish_reason="stop",
                group=None if group_of == 1 else f"talk {index // group_of}",
                key=str(index),
            )
        )
    return made


SEED = 1


def run(data, **settings):
    return calibrate(data, **{"resamples": 50, **settings})


@pytest.fixture(scope="module")
def outcome():
    return run(rows(1200, SEED, base=0.8), max_error=(0.1, 0.2), name="faq", fingerprint={"chat_template": "a1"})


def test_the_artefact_says_of_held_out_rows_what_the_outcome_says(outcome, tmp_path):
    data = rows(1200, SEED, base=0.8)
    outcome.calibration.save(tmp_path / "c.json")
    loaded = Calibration.load(tmp_path / "c.json")
    answered = wrong = 0
    for held in outcome.held_out:
        row = data[held.index]
        found = loaded.apply(
            row.uncertainty, prompt_tokens=row.prompt_tokens, turns=1, finish_reason="stop", max_error=0.1
        )
        assert (found.p_correct, held.correct, held.key) == (held.p_correct, row.correct, row.key)
        answered += found.decision == "answer"
        wrong += found.decision == "answer" and not row.correct
    promise = outcome.guarantee.promises[0]
    assert (answered, wrong) == (promise.answered, promise.errors)
    assert answered > 100
    assert loaded == outcome.calibration


def test_rows_are_split_in_half_and_none_is_used_twice(outcome):
    assert len(outcome.held_out) == 600 == outcome.fit.cross_validated.size
    assert outcome.calibration.data.rows == 1200
    assert len({held.index for held in outcome.held_out}) == 600


def test_what_is_seen_and_bound(outcome):
    data = rows(1200, SEED, base=0.8)
    tokens = [row.uncertainty.tokens for row in data]
    seen = outcome.calibration.seen
    assert seen.answer_tokens == (min(tokens), max(tokens))
    assert (seen.turns, seen.finish_reasons, seen.tool_calls) == ((1, 1), ("stop",), False)
    assert outcome.calibration.fingerprint == {
        "chat_template": "a1",
        "scorer": "3f9c2a",
        "mode": "exact",
        "span": "answer",
    }


def test_the_evidence_is_complete(outcome):
    assert outcome.kept
    assert outcome.quality.count == 600
    assert outcome.quality.ece < 0.08
    assert outcome.quality.brier_skill > 0.05
    assert sum(part.quality.count for part in outcome.by_length) == 600
    assert [part.low for part in outcome.by_length] == sorted(part.low for part in outcome.by_length)
    assert outcome.signals[-1].name == "p_correct"
    for signal in outcome.signals:
        assert signal.auroc.low <= signal.auroc.value <= signal.auroc.high
    assert len(outcome.calibration.reference_scores) == 600


def test_a_gradient_that_says_nothing_is_not_asked_for(outcome):
    assert outcome.verdict.earns == "no"
    assert not outcome.calibration.requires.gradient
    assert "needs no gradient pass" in outcome.verdict.sentence
    assert outcome.verdict.gain.low < 0.02


def test_a_gradient_that_says_something_is():
    found = run(rows(600, gradient=1.5, free=0.5))
    assert found.verdict.earns == "yes"
    assert found.calibration.requires.gradient
    assert found.verdict.gain.low > 0.0
    assert "the calibration uses it" in found.verdict.sentence


def test_without_gradient_signals_the_verdict_is_unknown():
    data = [
        dataclasses.replace(row, uncertainty=row.uncertainty.replace(log_grad_norm_sq=None)) for row in rows(100)
    ]
    assert run(data).verdict.earns == "unknown"


def test_the_policy_takes_the_promised_threshold(outcome):
    policy = Policy.from_calibration(outcome.calibration, max_error=0.1, escalate=0.3, otherwise="human")
    assert policy.answer == outcome.guarantee.promises[0].threshold
    data = rows(1200, SEED, base=0.8)
    decided = [policy.apply(outcome.calibration.apply(data[held.index].uncertainty)) for held in outcome.held_out]
    assert sum(u.decision == "answer" for u in decided) == outcome.guarantee.promises[0].answered
    assert {u.decision for u in decided} == {"answer", "escalate", "human"}


def test_fifty_questions_work_and_say_what_they_support():
    data = [dataclasses.replace(row, correct=True) for row in rows(50)]
    found = run(data)
    assert found.guarantee.units == 30
    assert found.guarantee.promises[0].answered == 30
    assert found.kept
    assert any("nothing can be learned" in note for note in found.notes)
    some = run(rows(50, base=0.5))
    assert not some.kept
    assert "No threshold keeps errors under 0.1" in some.guarantee.promises[0].sentence


def test_groups_are_split_together_and_count_once():
    data = rows(600, group_of=6)
    found = run(data)
    held = {data[row.index].group for row in found.held_out}
    fitted = {row.group for index, row in enumerate(data) if index not in {row.index for row in found.held_out}}
    assert not held & fitted
    assert len(held) == found.guarantee.units == 50
    assert len(found.held_out) == 300


def test_what_cannot_be_used_is_left_out_and_said():
    data = rows(300)
    data[0] = dataclasses.replace(data[0], uncertainty=Uncertainty.skipped("echo"))
    for index in range(1, 20):
        bare = data[index].uncertainty
        data[index] = dataclasses.replace(data[index], uncertainty=bare.replace(entropy=None))
    data[20] = dataclasses.replace(data[20], uncertainty=data[20].uncertainty.replace(log_grad_norm_sq=None))
    found = run(data)
    assert "1 of 300 rows have no score and were left out: no promise covers such answers" in found.notes
    assert "entropy is missing on 19 rows and was left out" in found.notes
    assert "1 rows lack a signal that the others have and were left out" in found.notes
    assert found.calibration.data.rows == 298
    assert 20 not in {held.index for held in found.held_out}


def test_the_same_seed_gives_the_same_calibration():
    assert run(rows(120), seed=1).calibration.id == run(rows(120), seed=1).calibration.id
    assert run(rows(120), seed=1).calibration.id != run(rows(120), seed=2).calibration.id


def test_answers_of_one_length_work():
    data = rows(200)
    same = [
        dataclasses.replace(row, uncertainty=row.uncertainty.replace(tokens=1), prompt_tokens=None)
        for row in data
    ]
    found = run(same)
    assert "log_tokens is the same on all rows and was left out" in found.notes
    assert found.calibration.seen.prompt_tokens is None
    assert len(found.by_length) == 1


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (rows(9), {}, "9 independent scored rows; at least 10"),
        (rows(40, group_of=8), {}, "5 independent scored rows"),
        ([], {}, "0 independent scored rows"),
        (rows(20), {"max_error": (0,)}, "max_error=0 must lie"),
        (rows(20), {"held_out": 1.5}, "held_out=1.5 must lie"),
    ],
)
def test_mistakes_are_named(data, settings, message):
    with pytest.raises(ValueError, match=message):
        run(data, **settings)


def test_rows_of_two_models_do_not_mix():
    data = rows(40)
    data[3] = dataclasses.replace(data[3], uncertainty=data[3].uncertainty.replace(fingerprint="other"))
    with pytest.raises(ValueError, match=r"differ in scorer \(3f9c2a, other\)"):
        run(data)


@pytest.mark.slow
def test_fifty_thousand_questions_work():
    found = run(rows(50_000, base=0.8), resamples=1000)
    assert found.kept
    assert found.guarantee.units == 25_000
    assert found.quality.ece < 0.05
    assert len(found.calibration.reference_scores) == 1000


@pytest.mark.slow
def test_it_does_not_lose_to_the_best_single_signal():
    """Best on the rows of the fit; with about 44 right answers there."""
    lost = []
    for seed in range(10):
        data = rows(800, seed, base=0.11, free=0.8, gradient=0.2)
        found = run(data, resamples=2, seed=seed)
        held = {row.index for row in found.held_out}
        fitted = [row for index, row in enumerate(data) if index not in held]
        free = {signal.name: signal.auroc.value for signal in found.signals if signal.kind == "free"}
        ranked = {
            name: auroc(
                np.array([read_features(row.uncertainty, [name])[0] for row in fitted]),
                np.array([row.correct for row in fitted]),
            )
            for name in free
        }
        best = max(ranked, key=lambda name: abs(ranked[name] - 0.5))
        lost.append(free[best] - found.quality.auroc.value)
    assert np.mean(lost) < 0.01
    assert sorted(lost)[-2] < 0.03
