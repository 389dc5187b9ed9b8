"""Scorer: order, batches, what is refused and how; loading checkpoints; fingerprints."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import gnuq_serve
from gnuq_serve import Policy, Sample, Scorer, Uncertainty
from gnuq_serve.gradnorm import UnsupportedModelError, runner
from gnuq_serve.scorer import InvalidSampleError
from gnuq_serve.weights import CheckpointError, fingerprint_of, load_checkpoint
from gnuq_serve.weights.checkpoint import check_same_vocabulary

VOCABULARY, CONTEXT = 101, 64
GOOD = Sample([1, 2, 3], [4, 5])


@pytest.fixture(scope="module")
def model(tiny_llama) -> Any:
    return tiny_llama(tied=True, dtype=torch.float32)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(VOCABULARY, (count,), generator=generator).tolist()

    lengths = [(20, 3), (1, 1), (7, 12), (40, 2), (1, 9), (3, 1), (20, 3), (11, 30), (2, 2), (60, 4)]
    return [Sample(ids(prompt), ids(answer)) for prompt, answer in lengths]


@pytest.fixture
def passes(monkeypatch) -> list[list[int]]:
    """The lengths of the samples of each pass."""
    seen: list[list[int]] = []
    real = runner.gradient_pass

    def counted(model: Any, coverage: Any, pairs: list[Any], **options: Any) -> Any:
        seen.append([len(prompt) + len(answer) - 1 for prompt, answer in pairs])
        return real(model, coverage, pairs, **options)

    monkeypatch.setattr(runner, "gradient_pass", counted)
    return seen


class TestBatches:
    def test_order_is_kept_and_equals_one_by_one(self, model, samples):
        batched = Scorer(model).score(samples)
        single = [Scorer(model).score([sample])[0] for sample in samples]
        assert [result.tokens for result in batched] == [len(sample.answer_ids) for sample in samples]
        for a, b in zip(batched, single, strict=True):
            assert a.status == "scored"
            assert a.log_probability == pytest.approx(b.log_probability, rel=1e-5)
            assert a.entropy == pytest.approx(b.entropy, rel=1e-5)
            assert a.log_grad_norm_sq == pytest.approx(b.log_grad_norm_sq, abs=2e-5)

    def test_nothing_to_score(self, model, passes):
        assert Scorer(model).score([]) == []
        assert not passes

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"max_batch_tokens": 0}, "max_batch_tokens=0 must be at least 1"),
            ({"memory_budget": "plenty"}, "memory_budget='plenty' is no amount of memory; give bytes, or a text"),
            ({"memory_budget": 0}, "memory_budget=0 is no amount of memory"),
            ({"mode": "quick"}, "mode='quick' is unknown; use exact or answer_only"),
            ({"hidden_position": 0}, "hidden_position=0 counts from the prompt's end: give -1 or below"),
        ],
    )
    def test_settings_out_of_range(self, model, setting, message):
        with pytest.raises(ValueError, match=message):
            Scorer(model, **setting)

    def test_settings_of_a_cpu(self, model):
        own = Scorer(model)
        assert (own.device, own.dtype, own.max_batch_tokens) == ("cpu", "float32", 2048)
        assert 0 < own.memory_budget <= 2 * 2**30
        assert Scorer(model, memory_budget="1.5MiB").memory_budget == 3 * 2**19

    def test_unknown_mode_before_any_work(self, model, passes):
        with pytest.raises(ValueError, match="mode='fast' is unknown"):
            Scorer(model).score([GOOD], mode="fast")  # type: ignore[arg-type]
        assert not passes

    def test_modes_have_fingerprints_of_their_own(self, model):
        own = Scorer(model, mode="answer_only")
        (default,), (exact,) = own.score([GOOD]), own.score([GOOD], mode="exact")
        assert (default.mode, exact.mode) == ("answer_only", "exact")
        assert default.fingerprint == own.fingerprint == own.fingerprint_in("answer_only")
        assert exact.fingerprint == Scorer(model).fingerprint != own.fingerprint

    def test_hidden_position_stands_on_the_result(self, model):
        for position, name in ((None, "mean"), (-1, "-1"), (-2, "-2")):
            (result,) = Scorer(model, hidden_position=position).score([GOOD], semantic=True)
            assert result.signals.hidden_position == name
            # The last block's output at an earlier position bears on no answer token.
            assert (result.signals.semgrad > 0) == (position != -2)
            assert (result.signals.log_hidden_grad is not None) == (position != -2)

    def test_result(self, model):
        own = Scorer.from_model(model)
        (result,) = own.score([GOOD], progress=True)
        assert result.mode == "exact"
        assert result.span == "answer"
        assert result.fingerprint == own.fingerprint
        assert result.seconds > 0
        assert result.log_epistemic == pytest.approx(2 * result.log_probability + result.log_grad_norm_sq)
        assert Uncertainty.from_dict(json.loads(json.dumps(result.to_dict()))) == result

    def test_ids_as_tuples_and_ranges(self, model):
        (expected,) = Scorer(model).score([GOOD])
        (result,) = Scorer(model).score([Sample(range(1, 4), (4, 5))])
        assert result.log_grad_norm_sq == expected.log_grad_norm_sq


INVALID = {
    "empty answer": (Sample([1], []), r"answer_ids is empty: give at least one token"),
    "empty prompt": (Sample([], [1]), r"prompt_ids is empty: give at least one token"),
    "no integers": (Sample([1.5, 2], [3]), r"prompt_ids holds something that is no integer"),  # type: ignore[list-item]
    "a string": (Sample([1], "ab"), r"answer_ids holds something that is no integer"),  # type: ignore[arg-type]
    "negative id": (Sample([1, -1], [2]), r"prompt_ids holds -1, outside the scorer's vocabulary of 101"),
    "id too large": (Sample([1], [2, VOCABULARY]), r"answer_ids holds 101, outside the scorer's vocabulary"),
    "too long": (Sample([1] * CONTEXT, [1]), r"have 65 tokens, over the model's context of 64: shorten"),
}


class TestInvalidSamples:
    @pytest.mark.parametrize(("sample", "message"), INVALID.values(), ids=INVALID.keys())
    def test_raise_names_sample_and_field_before_any_work(self, model, passes, sample, message):
        with pytest.raises(InvalidSampleError, match=r"^samples\[1\]\..*" + message):
            Scorer(model).score([GOOD, sample, GOOD])
        assert not passes

    @pytest.mark.parametrize(("sample", "message"), INVALID.values(), ids=INVALID.keys())
    def test_fail_scores_the_rest(self, model, sample, message):
        (expected,) = Scorer(model).score([GOOD])
        first, failed, last = Scorer(model).score([GOOD, sample, GOOD], on_invalid="fail")
        assert failed.status == "failed"
        assert failed.log_probability is failed.log_grad_norm_sq is None
        assert re.search(message, failed.reason)
        for result in (first, last):
            assert result.status == "scored"
            assert result.log_grad_norm_sq == pytest.approx(expected.log_grad_norm_sq, abs=2e-5)

    def test_only_invalid_ones(self, model, passes):
        results = Scorer(model).score([sample for sample, _ in INVALID.values()], on_invalid="fail")
        assert [result.status for result in results] == ["failed"] * len(INVALID)
        assert not passes

    def test_context_filled_to_the_last_token(self, model):
        (result,) = Scorer(model).score([Sample([1] * (CONTEXT - 1), [1])])
        assert result.status == "scored"

    def test_numbers_that_overflow_fail_with_a_reason(self, tiny_llama):
        model = tiny_llama(dtype=torch.float32)
        with torch.no_grad():
            model.lm_head.weight.mul_(1e38)
        (result,) = Scorer(model).score([GOOD])
        assert result.status == "failed"
        assert "not finite" in result.reason


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_llama(tied=False, dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def edited(checkpoint, tmp_path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


class TestLoading:
    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [
            ("auto", torch.bfloat16),
            ("float32", torch.float32),
            ("torch.float64", torch.float64),
            ("float16", torch.float16),
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.bfloat16),
        ],
    )
    def test_round_trip(self, tiny_llama, checkpoint, dtype, expected):
        loaded = Scorer.from_pretrained(checkpoint, dtype=dtype, device="cpu")
        assert {parameter.dtype for parameter in loaded.model.parameters()} == {expected}
        original = tiny_llama(tied=False, dtype=torch.float32)
        with torch.no_grad():  # the weights as saved; the rotary table stays as it is
            for parameter in original.parameters():
                parameter.copy_(parameter.bfloat16())
        original.to(expected)
        assert loaded.fingerprint == fingerprint_of(original, "exact")
        if expected in (torch.float32, torch.float64):
            (a,), (b,) = loaded.score([GOOD]), Scorer(original).score([GOOD])
            assert a.log_grad_norm_sq == pytest.approx(b.log_grad_norm_sq, abs=1e-5)

    def test_loaded_model_is_ready_to_score_and_frozen(self, checkpoint):
        model = load_checkpoint(str(checkpoint))
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_options(self, checkpoint):
        loaded = Scorer.from_pretrained(
            str(checkpoint),
            device=torch.device("cpu"),
            config_overrides={"max_position_embeddings": 32},
            max_batch_tokens=7,
        )
        assert loaded.context_length == 32
        assert loaded.max_batch_tokens == 7

    @pytest.mark.parametrize("dtype", ["floaty", "int8", "torch.int64", "nn", torch.int64, torch.complex64])
    def test_wrong_dtype(self, checkpoint, dtype):
        with pytest.raises(CheckpointError, match=r"^dtype=.* is unknown; use auto, float16, bfloat16, float32"):
            Scorer.from_pretrained(checkpoint, dtype=dtype)

    @pytest.mark.parametrize("device", ["cuda:99", "nonsense", "cpu:x", "meta", torch.device("meta")])
    def test_device_that_is_not_there(self, checkpoint, device):
        with pytest.raises(CheckpointError, match=rf"^device='{device}' can't be used here .*; use auto or cpu"):
            Scorer.from_pretrained(checkpoint, device=device)

    def test_unknown_path(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"nowhere' can't be loaded"):
            Scorer.from_pretrained(tmp_path / "nowhere")

    def test_folder_without_a_checkpoint(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"can't be loaded: no usable config\.json"):
            Scorer.from_pretrained(tmp_path)

    def test_folder_without_weights(self, edited):
        (edited / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="can't be loaded"):
            Scorer.from_pretrained(edited)

    def test_quantised_checkpoint(self, edited):
        edit_config(edited, quantization_config={"quant_method": "awq", "bits": 4})
        with pytest.raises(CheckpointError, match="is quantised; its gradient needs plain weights"):
            Scorer.from_pretrained(edited)

    def test_missing_tensor(self, edited):
        tensors = load_file(edited / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, edited / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"lacks tensors .*: model\.layers\.1\.mlp\.up_proj\.weight"):
            Scorer.from_pretrained(edited)

    def test_model_that_is_not_covered(self, tiny_llama):
        model = tiny_llama()
        model.lm_head = torch.nn.Bilinear(32, 32, 101)
        with pytest.raises(UnsupportedModelError, match="Bilinear"):
            Scorer(model)

    @pytest.mark.parametrize(
        "overrides",
        [{"rms_norm_epz": 0.1}, {"max_position_embeddings": 32, "sliding_windows": 4}, {"revision": "main"}],
    )
    def test_override_that_the_configuration_does_not_know(self, checkpoint, overrides):
        name = list(overrides)[-1]
        with pytest.raises(CheckpointError, match=rf"^config_overrides has entries .* does not know: {name}; "):
            Scorer.from_pretrained(checkpoint, config_overrides=overrides)


class TestPlacement:
    """Models whose modules a device map has placed, by accelerate's hooks."""

    @pytest.mark.parametrize("options", [{}, {"trace": True}, {"semantic": True}, {"mode": "answer_only"}])
    @pytest.mark.parametrize("budget", ["1GiB", 1000])
    def test_model_with_the_hooks_of_a_device_map(self, checkpoint, options, budget):
        plain = load_checkpoint(str(checkpoint), dtype="float32", device="cpu")
        split = load_checkpoint(str(checkpoint), dtype="float32", device="cpu")
        accelerate.dispatch_model(split, {"": "cpu"}, force_hooks=True)
        names = [name for name, module in split.named_modules() if "forward" in vars(module)]
        assert "model.layers.0.self_attn.q_proj" in names
        results = [
            Scorer.from_model(model, memory_budget=budget).score([GOOD, GOOD], **options)[1].to_dict()
            for model in (plain, split)
        ]
        for result in results:
            result["seconds"] = None
        assert results[0] == results[1]
        assert names == [name for name, module in split.named_modules() if "forward" in vars(module)]

    def test_device_map(self, checkpoint):
        (expected,) = Scorer.from_pretrained(checkpoint, dtype="float32", device="cpu").score([GOOD])
        own = Scorer.from_pretrained(checkpoint, dtype="float32", device_map={"": "cpu"})
        (result,) = own.score([GOOD])
        assert own.device == "cpu"
        assert result.log_grad_norm_sq == pytest.approx(expected.log_grad_norm_sq, abs=1e-6)
        assert not any(parameter.requires_grad for parameter in own.model.parameters())

    def test_device_and_device_map(self, checkpoint):
        with pytest.raises(
            CheckpointError, match=r"^device='cpu' and device_map=\{'': 'cpu'\} were given: choose one"
        ):
            Scorer.from_pretrained(checkpoint, device="cpu", device_map={"": "cpu"})

    def test_device_map_that_is_none(self, checkpoint):
        with pytest.raises(CheckpointError, match=r"can't be loaded: .*device_map"):
            Scorer.from_pretrained(checkpoint, device_map="here and there")

    @pytest.mark.parametrize("place", ["disk", "meta"])
    def test_offloaded_parameters(self, checkpoint, place):
        message = r"^21 of the model's parameters are not in memory \(model\.embed.*: offloaded.*\): place all"
        with pytest.raises(CheckpointError, match=message):
            Scorer.from_pretrained(checkpoint, device_map={"": place})

    def test_model_whose_parameters_were_offloaded_in_memory(self, checkpoint, tmp_path):
        model = load_checkpoint(str(checkpoint), dtype="float32", device="cpu")
        accelerate.disk_offload(model.model.layers, str(tmp_path), execution_device=torch.device("cpu"))
        message = r"^18 of the model's parameters are not in memory \(model\.layers\.0\..*: offloaded.*\): place"
        with pytest.raises(CheckpointError, match=message):
            Scorer.from_model(model)


class TestFingerprint:
    def test_stable(self, tiny_llama):
        first, second = (Scorer(tiny_llama(dtype=torch.float32)) for _ in range(2))
        assert first.fingerprint == second.fingerprint
        first.score([GOOD])
        assert fingerprint_of(first.model, "exact") == second.fingerprint
        assert len(first.fingerprint) == 12
        assert int(first.fingerprint, 16) >= 0

    def test_differs(self, tiny_llama):
        model = tiny_llama(dtype=torch.float32)
        other_weights = tiny_llama(dtype=torch.float32, seed=1)
        one_weight = tiny_llama(dtype=torch.float32)
        with torch.no_grad():
            one_weight.model.norm.weight[3] += 1e-4
        prints = [
            fingerprint_of(model, "exact"),
            fingerprint_of(model, "answer_only"),
            fingerprint_of(other_weights, "exact"),
            fingerprint_of(one_weight, "exact"),
            fingerprint_of(tiny_llama(dtype=torch.float64), "exact"),
            fingerprint_of(tiny_llama(tied=True, dtype=torch.float32), "exact"),
        ]
        assert len(set(prints)) == len(prints)


def save_tokenizer(path: Path, tokens: list[str]) -> str:
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=tokens[0]).save_pretrained(path)
    return str(path)


class TestVocabulary:
    def test_same(self, tmp_path):
        scored = save_tokenizer(tmp_path / "scored", ["?", "a", "b"])
        check_same_vocabulary(scored, save_tokenizer(tmp_path / "served", ["?", "a", "b"]))

    @pytest.mark.parametrize("tokens", [["?", "b", "a"], ["?", "a", "b", "c"]])
    def test_different(self, tmp_path, tokens):
        scored = save_tokenizer(tmp_path / "scored", ["?", "a", "b"])
        served = save_tokenizer(tmp_path / "served", tokens)
        message = rf"scored' \(3 tokens\) and the served model .*served' \({len(tokens)} tokens\) have different"
        with pytest.raises(CheckpointError, match=message):
            check_same_vocabulary(scored, served)

    def test_no_tokenizer(self, tmp_path):
        scored = save_tokenizer(tmp_path / "scored", ["?", "a", "b"])
        (tmp_path / "empty").mkdir()
        with pytest.raises(CheckpointError, match=r"the tokenizer of .*empty' can't be loaded"):
            check_same_vocabulary(scored, str(tmp_path / "empty"))


class TestPackage:
    def test_public_names(self):
        assert {Sample, Scorer, Uncertainty, Policy} <= {getattr(gnuq_serve, name) for name in gnuq_serve.__all__}
        with pytest.raises(AttributeError, match="no attribute 'Nonesuch'"):
            _ = gnuq_serve.Nonesuch

    def test_import_is_light(self):
        code = (
            "import sys, gnuq_serve; from gnuq_serve import Policy, Uncertainty; "
            "print([m for m in ('torch', 'transformers', 'vllm', 'tqdm') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


def test_fingerprint_differs_for_another_configuration(model, tiny_llama, tmp_path):
    model.save_pretrained(tmp_path)
    same = Scorer.from_pretrained(str(tmp_path))
    other = Scorer.from_pretrained(str(tmp_path), config_overrides={"rms_norm_eps": 0.1})
    assert same.fingerprint == Scorer(model).fingerprint
    assert other.fingerprint != same.fingerprint


@pytest.mark.parametrize("damage", [b"", b"not safetensors at all"])
def test_damaged_checkpoint_is_refused(model, tmp_path, damage):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(damage)
    with pytest.raises(CheckpointError, match="can't be loaded"):
        load_checkpoint(str(tmp_path))


def test_configuration_of_other_shapes_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    for overrides in ({"intermediate_size": 40}, {"hidden_size": "wide"}):
        with pytest.raises(CheckpointError, match="can't be loaded"):
            load_checkpoint(str(tmp_path), config_overrides=overrides)
