"""``gnuq-serve check``: the account of parameters, the comparison with autograd, what it prints and returns."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from tiny_families import FAMILIES, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gnuq_serve.check import ANSWER, QUESTION, CheckOptions, Comparison, account, check
from gnuq_serve.cli import main
from gnuq_serve.gradnorm import registry

RMS_NORM = "transformers.models.llama.modeling_llama.LlamaRMSNorm"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """``checkpoint(family)``: the folder of a tiny model."""

    def save(family):
        path = tmp_path_factory.mktemp(family)
        tiny(family, tied=True, dtype=torch.float32).save_pretrained(path)
        return str(path)

    return save


@pytest.fixture(scope="module")
def llama(checkpoint):
    return checkpoint("llama")


class TestAccount:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_parameter_once(self, family, tied):
        model = tiny(family, tied=tied)
        report = account("here", model)
        assert report.problem is None
        assert report.architecture == type(model).__name__
        assert report.parameters == sum({id(p): p.numel() for p in model.parameters()}.values())
        assert sum(share.parameters for share in report.rules) == report.parameters
        owners = [m for m in model.modules() if list(m.parameters(recurse=False))]
        assert sum(share.layers for share in report.rules) == len(owners)
        assert (report.tied, report.blocks, report.slow) == (tied, 3, {})

    def test_rules_by_name(self):
        shares = {share.rule: share for share in account("here", tiny("llama", tied=True)).rules}
        # Three blocks of four and three matrices, and the head, whose weight is the embedding's.
        assert shares["linear"].layers == 3 * 7 + 1
        assert shares["linear"].parameters == 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 56)
        assert (shares["embedding"].layers, shares["embedding"].parameters) == (1, 101 * 32)
        assert (shares["scaled_norm"].layers, shares["scaled_norm"].parameters) == (7, 7 * 32)

    def test_slow_layers_and_why(self, monkeypatch):
        monkeypatch.delitem(registry._rules, RMS_NORM)
        model = tiny("llama")
        model.model.layers[1].mlp.up_proj.gate = torch.nn.Parameter(torch.ones(1))
        report = account("here", model)
        assert report.slow["model.norm"] == "no rule for LlamaRMSNorm"
        assert report.slow["model.layers.1.mlp.up_proj"] == "no rule for Linear with gate"
        assert len(report.slow) == 8
        assert next(s.layers for s in report.rules if s.rule == "local_autograd") == 8

    def test_refused(self):
        model = tiny("llama")
        model.lm_head = torch.nn.Bilinear(32, 32, 101)
        report = account("here", model)
        assert "lm_head (Bilinear" in report.problem
        assert report.rules == ()


class TestComparison:
    def test_relative(self):
        assert Comparison.of("x", 11.0, 10.0).difference == pytest.approx(0.1)
        assert Comparison.of("x", -0.5, -0.25, 1.0).difference == 0.25
        assert Comparison.of("x", 0.5, 0.0).difference == 0.5

    @pytest.mark.parametrize("value", [None, math.nan])
    def test_a_number_that_is_not_there_equals_nothing(self, value):
        assert not Comparison.of("x", value, 1.0).difference <= 1e9


class TestCheck:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_equals_autograd_to_rounding(self, checkpoint, family):
        report = check(checkpoint(family), CheckOptions(dtype="float64", trace=True, semantic=True))
        assert report.problem is None
        assert report.tolerance == 1e-9
        assert report.sample == "random tokens, 24 + 8"
        assert [row.quantity for row in report.comparisons[:2]] == ["log-probability", "squared gradient norm"]
        assert "the same of token" in report.comparisons[2].quantity
        assert [row.quantity for row in report.comparisons[-4:]] == [
            "semgrad",
            "exgrad",
            "paragrad",
            "hybridgrad",
        ]
        assert all(row.by_autograd != 0 and row.difference <= 1e-9 for row in report.comparisons)

    def test_answer_only(self, llama):
        report = check(llama, CheckOptions(dtype="float64", mode="answer_only", trace=True))
        assert (report.problem, report.mode) == (None, "answer_only")
        exact = check(llama, CheckOptions(dtype="float64"))
        assert report.comparisons[1].by_autograd < 0.99 * exact.comparisons[1].by_autograd

    @pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.1), ("auto", 1e-3)])
    def test_other_dtypes(self, llama, dtype, tolerance):
        report = check(llama, CheckOptions(dtype=dtype))
        assert (report.problem, report.tolerance) == (None, tolerance)

    def test_slow_layers_are_exact(self, llama, monkeypatch):
        monkeypatch.delitem(registry._rules, RMS_NORM)
        report = check(llama, CheckOptions(dtype="float64"))
        assert report.problem is None
        assert len(report.slow) == 7

    def test_chat_template_of_the_tokenizer(self, checkpoint):
        path = checkpoint("llama")
        words = list(dict.fromkeys(f"[UNK] <|user|> <|end|> {QUESTION} {ANSWER}".split()))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")),
            unk_token="[UNK]",
            eos_token="<|end|>",
        )
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save_pretrained(path)
        plain = check(path)
        tokenizer.chat_template = "<|user|> {{ messages[0]['content'] }} <|end|>"
        tokenizer.save_pretrained(path)
        chat = check(path)
        assert plain.sample == f"{QUESTION!r} / {ANSWER!r}, 6 + 7 tokens"
        assert chat.sample == f"{QUESTION!r} / {ANSWER!r}, 8 + 7 tokens"
        assert plain.problem is chat.problem is None
        assert plain.comparisons != chat.comparisons


class TestCommand:
    def run(self, capsys, *arguments):
        code = main(["check", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    def test_table(self, llama, capsys):
        code, out, _ = self.run(capsys, llama, "--float64", "--trace", "--semantic")
        assert code == 0
        assert "LlamaForCausalLM, float64" in out
        assert "3 blocks; embedding and head: one weight" in out
        assert "scaled_norm" in out
        assert "MiB per 1,000 tokens" in out
        assert "Every parameter is counted, and equal to plain autograd within 1e-09." in out

    def test_json(self, llama, capsys):
        code, out, _ = self.run(capsys, llama, "--json")
        data = json.loads(out)
        assert (code, data["ok"], data["architecture"]) == (0, True, "LlamaForCausalLM")
        assert {row["quantity"] for row in data["comparisons"]} == {"log-probability", "squared gradient norm"}
        assert data["memory"]["bytes_per_token"] > 0

    @pytest.mark.parametrize("json_form", [[], ["--json"]])
    def test_a_rule_that_is_wrong(self, llama, capsys, monkeypatch, json_form):
        def twice(layer, call, delta):
            return 2 * right.function(layer, call, delta)

        right = registry._rules[RMS_NORM]
        monkeypatch.setitem(registry._rules, RMS_NORM, dataclasses.replace(right, function=twice))
        code, out, _ = self.run(capsys, llama, *json_form)
        assert code == 1
        assert "squared gradient norm differs from autograd's by" in out
        if json_form:
            assert json.loads(out)["ok"] is False

    def test_numbers_that_overflow(self, tmp_path, capsys):
        model = tiny("llama", dtype=torch.float32)
        with torch.no_grad():
            model.lm_head.weight.mul_(1e38)
        model.save_pretrained(tmp_path)
        code, _, err = self.run(capsys, str(tmp_path))
        assert code == 1
        assert "the sample could not be scored" in err

    def test_config_only(self, llama, tmp_path, capsys):
        shutil.copy(f"{llama}/config.json", tmp_path)
        code, out, _ = self.run(capsys, str(tmp_path), "--config-only")
        assert code == 0
        assert "Every parameter is counted." in out
        assert "plain autograd" not in out
        assert self.run(capsys, str(tmp_path))[0] == 1  # no weights there

    def test_refused(self, llama, capsys, monkeypatch):
        monkeypatch.delitem(registry._rules, "torch.nn.modules.linear.Linear")
        code, out, _ = self.run(capsys, llama, "--config-only")
        assert code == 1
        assert "no gradient-norm rule for lm_head (Linear: weight)" in out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "model='NOWHERE' can't be loaded"),
            (["--config-only"], "model='NOWHERE' can't be loaded"),
            (["--dtype", "int8"], "dtype='int8' is unknown"),
            (["--device", "moon"], "device='moon' can't be used here"),
            (["--semantic", "--mode", "answer_only"], "semantic gradients do not exist in mode=answer_only"),
        ],
    )
    def test_what_cannot_be_checked(self, tmp_path, capsys, arguments, message):
        nowhere = str(tmp_path / "nowhere")
        code, _, err = self.run(capsys, nowhere, *arguments)
        assert code == 1
        assert err.startswith(f"gnuq-serve: {message.replace('NOWHERE', nowhere)}")

    def test_unknown_argument(self, capsys):
        with pytest.raises(SystemExit) as stopped:
            main(["check", "here", "--fast"])
        assert stopped.value.code == 2
        assert "unrecognized arguments: --fast" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_model(smollm2, capsys):
    assert main(["check", str(smollm2), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["parameters"] == 134_515_008
    assert data["sample"].startswith("'What is the capital of France?' / 'The capital of France is Paris.'")
