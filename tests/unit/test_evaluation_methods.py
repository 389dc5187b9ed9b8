"""Every method: higher where the answer is less certain; supervised ones see no answer that they judge."""

import dataclasses
import math

import numpy as np
import pytest

from gnuq_serve import Uncertainty
from gnuq_serve.evaluation.answered import Answered
from gnuq_serve.evaluation.clustering import clustered, same_number, same_words
from gnuq_serve.evaluation.costs import PASSES
from gnuq_serve.evaluation.hidden_state import decode, encode
from gnuq_serve.evaluation.methods import METHODS, choose
from gnuq_serve.evaluation.methods.base import Method, Setting, each, named
from gnuq_serve.evaluation.methods.sampling import choice_probabilities, entropy_of
from gnuq_serve.evaluation.metrics import draws, with_intervals
from gnuq_serve.evaluation.steps import HERE, ON_A_SERVER

NAMES = [
    "nll",
    "mean_nll",
    "max_token_nll",
    "mean_entropy",
    "max_entropy",
    "first_entropy",
    "aleatoric",
    "aleatoric_normalized",
    "epistemic",
    "epistemic_normalized",
    "grad_norm",
    "mean_grad_norm",
    "combined",
    "combined_normalized",
    "combined_sum",
    "combined_sum_normalized",
    "free_logistic",
    "gradient_logistic",
    "trace_aleatoric_mean",
    "trace_aleatoric_max",
    "trace_epistemic_mean",
    "trace_epistemic_max",
    "semgrad",
    "exgrad",
    "paragrad",
    "hybridgrad",
    "semgrad_mean",
    "semgrad_last",
    "semgrad_second_last",
    "semgrad_fourth_last",
    "head_grad_norm",
    "p_true",
    "verbalized",
    "self_consistency",
    "semantic_entropy",
    "self_consistency_encoder",
    "semantic_entropy_encoder",
    "self_consistency_nli",
    "semantic_entropy_nli",
    "hidden_probe",
]


def answered(doubt, correct=True, noise=0.0):
    """An answer of two tokens; ``doubt`` in (0, 1): all that can be measured grows with it."""
    log_p = math.log(1 - doubt / 2)
    same = round(10 * (1 - doubt))
    clusters = [0] * same + list(range(1, 11 - same))
    grows = dict.fromkeys(("semgrad", "exgrad", "paragrad", "hybridgrad"), doubt)
    by_samples = {"clusters": clusters, "agrees": [cluster == 0 for cluster in clusters]}
    return Answered(
        key="k",
        correct=correct,
        uncertainty=Uncertainty.scored(
            token_log_probabilities=[log_p, log_p / 2],
            token_entropies=[doubt, doubt / 2],
            grad_norm_sq=1000 * doubt,
            token_grad_norm_sq=[600 * doubt, 400 * doubt],
            prompt_signals={**grows, "log_input_grad_norm_sq": doubt, "log_hidden_grad": doubt},
        ),
        results={
            "p_true": {"p": 1 - doubt},
            "verbalized": {"p": 1 - doubt},
            "same_words": by_samples,
            "encoder": by_samples,
            "nli": by_samples,
            "positions": {"semgrad": dict.fromkeys(("mean", "last", "second_last", "fourth_last"), doubt)},
            "hidden": {
                "head_grad_norm_sq": 10 * doubt,
                "state": encode(np.array([doubt + noise, noise, -noise])),
            },
        },
    )


def test_names_are_stable():
    assert list(METHODS) == NAMES


@pytest.mark.parametrize("method", [m for m in METHODS.values() if not m.supervised], ids=lambda m: m.name)
def test_higher_is_less_certain(method):
    sure, unsure = method.values([answered(0.1), answered(0.6)], Setting())
    assert sure < unsure


@pytest.mark.parametrize("method", [m for m in METHODS.values() if m.supervised], ids=lambda m: m.name)
def test_what_is_learned_is_higher_where_the_answer_is_less_certain(method):
    rng = np.random.default_rng(0)
    doubts = rng.uniform(0.05, 0.95, 150)
    answers = [answered(doubt, correct=rng.random() > doubt, noise=0.1 * rng.normal()) for doubt in doubts]
    values = np.array(method.values(answers, Setting()))
    assert np.corrcoef(values, doubts)[0, 1] > 0.8
    assert ((values > 0) & (values < 1)).all()


def test_a_fit_never_sees_the_answer_that_it_judges():
    """Fifty numbers of pure noise fit any labels; on answers that were not fitted they say nothing."""
    rng = np.random.default_rng(1)
    answers = [
        dataclasses.replace(
            answered(0.5, correct=bool(rng.random() < 0.5)),
            results={"hidden": {"state": encode(rng.normal(size=50))}},
        )
        for _ in range(200)
    ]
    values = np.array(METHODS["hidden_probe"].values(answers, Setting()))
    correct = np.array([answer.correct for answer in answers])
    found, _ = with_intervals(values, correct, draws(200, 50, seed=0))
    assert 0.3 < found["auroc"].value < 0.65


def test_too_few_of_one_class_give_no_fit():
    answers = [answered(0.5, correct=at < 4) for at in range(40)]
    assert METHODS["combined"].values(answers, Setting()) == [None] * 40


def test_the_logarithm_ranks_like_the_epistemic_uncertainty_itself():
    answers = [answered(doubt) for doubt in (0.05, 0.3, 0.6)]
    raw = [answer.uncertainty.normalized.epistemic for answer in answers]
    logs = METHODS["epistemic_normalized"].values(answers, Setting())
    assert np.exp(logs) == pytest.approx(raw)


def test_the_sum_weighs_the_epistemic_part():
    (one,), (ten,) = (METHODS["combined_sum"].values([answered(0.4)], Setting(s)) for s in (1.0, 10.0))
    score = answered(0.4).uncertainty
    assert one == pytest.approx(score.aleatoric + score.epistemic)
    assert ten == pytest.approx(score.aleatoric + 10 * score.epistemic)


def test_choices_need_no_samples():
    """Probabilities of three choices: 1/2, 1/4, 1/4 among themselves."""
    answer = dataclasses.replace(
        answered(0.5), choice=0, choice_log_probabilities=[math.log(0.02), math.log(0.01), math.log(0.01)]
    )
    assert choice_probabilities(answer) == pytest.approx([0.5, 0.25, 0.25])
    values = {
        name: METHODS[name].values([answer], Setting())[0] for name in ("self_consistency", "semantic_entropy")
    }
    assert values == {
        "self_consistency": pytest.approx(0.5),
        "semantic_entropy": pytest.approx(1.5 * math.log(2)),
    }


def test_what_was_not_measured_has_no_value():
    bare = Answered(key="k", uncertainty=answered(0.5).uncertainty.replace(trace=None))
    for name in (
        "p_true",
        "verbalized",
        "semantic_entropy",
        "self_consistency",
        "head_grad_norm",
        "trace_epistemic_max",
    ):
        assert METHODS[name].values([bare], Setting()) == [None], name


def test_samples_are_clustered_by_meaning():
    samples = ["Paris", "It is Paris.", "the city of Rome", "paris!", "Rome"]
    found = clustered("The capital is Paris.", samples, same_words)
    assert found["clusters"] == [0, 0, 1, 0, 1]
    assert found["agrees"] == [True, False, False, True, False]  # "It is Paris." stands in neither
    assert clustered("It is 1,000.", ["1000", "it is 999", "a thousand"], same_number) == {
        "clusters": [0, 1, 2],
        "agrees": [True, False, False],
    }
    assert entropy_of([1.0]) == 0
    assert entropy_of([0.25] * 4) == pytest.approx(math.log(4))


def test_needs_and_costs_are_known_steps():
    for method in METHODS.values():
        assert set(method.needs) <= {*ON_A_SERVER, *HERE}
        assert set(method.pays) <= set(PASSES)


def test_methods_are_chosen_by_name():
    assert [method.name for method in choose("p_true,nll,p_true", ON_A_SERVER)] == ["p_true", "nll"]
    assert {m.name for m in choose("all", (*ON_A_SERVER, *HERE))} == set(NAMES)
    assert "hidden_probe" not in {m.name for m in choose("all", ON_A_SERVER)}
    with pytest.raises(ValueError, match="guess: no such method"):
        choose("nll,guess", ON_A_SERVER)
    with pytest.raises(ValueError, match=r"hidden_probe reads hidden states: name .* --local-model"):
        choose("hidden_probe", ON_A_SERVER)
    twice = Method(name="nll", title="", values=each(lambda _answer: None))
    with pytest.raises(ValueError, match="two methods"):
        named([twice, twice])


def test_a_hidden_state_keeps_half_precision():
    state = np.array([0.0, 1.5, -2.25, 1e9])
    assert decode(encode(state)).tolist() == [0.0, 1.5, -2.25, 65504.0]


def test_the_heads_gradient_is_autograds(tiny_llama):
    torch = pytest.importorskip("torch")
    from gnuq_serve.evaluation.local_model import DEPTH, LocalModel

    model = tiny_llama(dtype=torch.float32)
    prompt, answer = [3, 7, 11, 2], [9, 4, 30]
    state, norm = LocalModel.of(model).read(prompt, answer)

    head = model.get_output_embeddings().weight.requires_grad_()
    found = model(torch.tensor([[*prompt, *answer]]), output_hidden_states=True)
    logs = found.logits[0].log_softmax(-1)
    total = sum(logs[len(prompt) - 1 + t, token] for t, token in enumerate(answer))
    (gradient,) = torch.autograd.grad(total, head)
    assert norm == pytest.approx(gradient.square().sum().item(), rel=1e-4)
    layers = found.hidden_states
    wanted = layers[round(DEPTH * (len(layers) - 1))][0, len(prompt) + len(answer) - 2]
    assert torch.allclose(state, wanted, atol=1e-5)


def test_semgrad_at_each_position_is_the_scorers(tiny_llama):
    torch = pytest.importorskip("torch")
    from gnuq_serve.evaluation.prompt_positions import POSITIONS, PromptPositions
    from gnuq_serve.scorer import Sample, Scorer

    model = tiny_llama(dtype=torch.float32, num_hidden_layers=4).requires_grad_(False)
    prompt, answer = [3, 7, 11, 2, 20], [9, 4, 30]
    found = PromptPositions(model).measure(prompt, answer)["semgrad"]
    assert len(set(found.values())) == len(POSITIONS)
    for name, position in POSITIONS.items():
        scorer = Scorer.from_model(model, hidden_position=position)
        (score,) = scorer.score([Sample(prompt, answer)], semantic=True)
        assert found[name] == pytest.approx(score.signals.semgrad, rel=1e-4), name
