"""Scores with LoRA adapters that share one base model, against a model of its own for each adapter."""

import copy
from pathlib import Path

import pytest
import torch

from gnuq_serve.adapters import AdapterError, AdapterScorers
from gnuq_serve.gradnorm.oracle import Oracle
from gnuq_serve.scorer import Sample, Scorer

peft = pytest.importorskip("peft")

PROMPT, ANSWER = [3, 4, 5, 5, 9], [7, 8, 9]


@pytest.fixture(scope="module")
def base_model(tiny_llama):
    return tiny_llama()


@pytest.fixture(scope="module")
def saved(base_model, tmp_path_factory):
    """``saved(name, **settings)``: the folder of an adapter, and a model of its own that has it."""

    def save(name, seed=1, **settings):
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **settings})
        model = peft.get_peft_model(copy.deepcopy(base_model), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_" in parameter_name:
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
        path = tmp_path_factory.mktemp(name)
        model.save_pretrained(path)
        return str(path), model.double().eval()

    return save


@pytest.fixture(scope="module")
def pair(saved):
    return [saved("one", r=2, target_modules=["q_proj", "down_proj"], use_rslora=True), saved("all", seed=2)]


@pytest.fixture
def scorers(base_model):
    return AdapterScorers(Scorer.from_model(copy.deepcopy(base_model)))


def score(scorer, **options):
    (result,) = scorer.score([Sample(PROMPT, ANSWER)], **options)
    return result


def assert_score_of(result, model):
    log_probability, norm = Oracle(model).score(PROMPT, ANSWER)
    assert result.log_probability == pytest.approx(log_probability, rel=1e-6)
    assert result.log_grad_norm_sq == pytest.approx(torch.tensor(norm).log().item(), rel=1e-6)


def test_each_is_scored_with_its_own_whatever_was_scored_before(scorers, base_model, pair):
    models = {None: base_model} | dict(pair)
    (one, _), (every, _) = pair
    for path in (None, one, None, every, one, every, None):
        assert_score_of(score(scorers.of(path)), models[path])
    only = score(scorers.of(one), mode="answer_only")
    assert only.log_probability == pytest.approx(score(scorers.of(one)).log_probability, rel=1e-9)


def test_fingerprints_tell_them_apart_and_do_not_depend_on_what_else_is_loaded(scorers, base_model, pair):
    (one, _), (every, _) = pair
    plain = Scorer.from_model(copy.deepcopy(base_model)).fingerprint
    names = {path: scorers.of(path).fingerprint for path in (one, every, None)}
    assert names[None] == plain
    assert len({*names.values(), scorers.of(one).fingerprint_in("answer_only")}) == 4
    again = AdapterScorers(Scorer.from_model(copy.deepcopy(base_model)))
    assert {path: again.of(path).fingerprint for path in (every, one, None)} == names


def test_the_ones_used_last_are_kept(base_model, saved, pair):
    scorers = AdapterScorers(Scorer.from_model(copy.deepcopy(base_model)), keep=2)
    (one, one_model), (every, _) = pair
    third, third_model = saved("third", seed=3)
    first, second = scorers.of(one), scorers.of(every)
    assert scorers.of(one) is first
    assert_score_of(score(scorers.of(third)), third_model)
    assert scorers.of(one) is first
    assert scorers.of(every) is not second
    assert_score_of(score(scorers.of(one)), one_model)
    assert sorted(scorers.of(None).model.peft_config) == sorted(
        scorers._loaded[key][0] for key in scorers._loaded
    )


def test_another_adapter_at_the_same_place_is_loaded_anew(scorers, saved):
    path, model = saved("place")
    assert_score_of(score(scorers.of(path)), model)
    other, other_model = saved("other", seed=9)
    for file in Path(other).iterdir():
        file.replace(Path(path) / file.name)
    assert_score_of(score(scorers.of(path)), other_model)


def test_changed_base_weights_are_scored_under_another_name(base_model, saved):
    base, changed = copy.deepcopy(base_model), copy.deepcopy(base_model)
    path, model = saved("on_changed")
    scorers = AdapterScorers(Scorer.from_model(base))
    before = {name: scorers.of(name).fingerprint for name in (path, None)}
    with torch.no_grad():
        for each in (base, changed, model):
            for name, parameter in each.named_parameters():
                if "lora_" not in name:
                    parameter.mul_(1.1)
    scorers.weights_changed()
    fresh = AdapterScorers(Scorer.from_model(copy.deepcopy(changed)))
    for name, expected in ((None, changed), (path, model), (None, changed)):
        assert_score_of(score(scorers.of(name)), expected)
        assert scorers.of(name).fingerprint == fresh.of(name).fingerprint != before[name]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "an adapter on the head"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "an adapter on the head"),
        ({"target_modules": ["embed_tokens"]}, "an adapter on the embedding"),
        ({"target_modules": ["q_proj"], "use_dora": True}, "DoRA"),
        (None, "nowhere"),
    ],
    ids=str,
)
def test_one_that_cannot_be_scored_is_refused_and_the_others_stay(
    scorers, base_model, pair, saved, settings, message
):
    (one, one_model), _ = pair
    path = "/nowhere" if settings is None else saved("bad", **settings)[0]
    for first in (None, one):
        scorers.of(first)
        for _ in range(2):
            with pytest.raises(AdapterError, match=message):
                scorers.of(path)
        assert_score_of(score(scorers.of(None)), base_model)
        assert_score_of(score(scorers.of(one)), one_model)
