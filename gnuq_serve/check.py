"""``gnuq-serve check MODEL``: is every parameter counted, by which rule, and is the number autograd's?"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from gnuq_serve.gradnorm import UnsupportedModelError, cover, token_grad_norms
from gnuq_serve.gradnorm.oracle import Oracle
from gnuq_serve.gradnorm.prefix import PrefixCache
from gnuq_serve.gradnorm.registry import rule_for
from gnuq_serve.gradnorm.runner import is_out_of_memory
from gnuq_serve.scorer import Sample, Scorer
from gnuq_serve.uncertainty import Mode, exp_or_none
from gnuq_serve.weights.checkpoint import load_checkpoint, load_config, parse_dtype
from gnuq_serve.weights.empty import empty_model

# What rounding explains: autograd runs in float64 beside a float64 pass, in float32 beside any other.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """What to load, and what to compare beside ``l`` and ``||grad l||^2``.

    Attributes:
        dtype: in which the pass runs; this and the next three as in ``Scorer.from_pretrained``.
        device: where.
        revision: of the checkpoint.
        trust_remote_code: run code that comes with it.
        mode: see ``ScoreOptions``.
        trace: also each answer token by itself.
        semantic: also the gradients at hidden states, and SemGrad and its relatives; not in ``answer_only``.
        config_only: read the configuration alone, load no weights and compare nothing.
    """

    dtype: str = "float32"
    device: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    mode: Mode = "exact"
    trace: bool = False
    semantic: bool = False
    config_only: bool = False

    def __post_init__(self) -> None:
        if self.semantic and self.mode != "exact":
            raise ValueError(f"semantic gradients do not exist in mode={self.mode}: use exact")


@dataclass(frozen=True, slots=True)
class RuleShare:
    """The layers and parameters of one rule; a head tied to the embedding is a layer without any of its own."""

    rule: str
    layers: int
    parameters: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """One number of the pass beside autograd's, and their difference in relation to ``scale``."""

    quantity: str
    by_pass: float
    by_autograd: float
    difference: float

    @classmethod
    def of(
        cls, quantity: str, by_pass: float | None, by_autograd: float, scale: float | None = None
    ) -> Comparison:
        """The scale is autograd's number where none is given."""
        value = math.nan if by_pass is None else by_pass
        unit = abs(by_autograd) if scale is None else scale
        return cls(quantity, value, by_autograd, abs(value - by_autograd) / (unit or 1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was found.

    Attributes:
        problem: why the model can't be scored, or that it differs; None where all is well.
        blocks: decoder blocks found; without any there are no hidden-state gradients.
        rules: the account of parameters.
        inactive: parameters of adapters not in use, whose gradient is zero.
        slow: layers without a rule of their own and the reason; exact, but slow and one sample at a time.
        memory: bytes of a pass beyond the weights: for a token, for a pair of tokens (0 with fused attention),
            and for the logits of an answer token.
        sample: what was compared.
        tolerance: largest difference allowed.
    """

    model: str
    architecture: str
    dtype: str
    parameters: int
    problem: str | None = None
    tied: bool | None = None
    blocks: int | None = None
    rules: tuple[RuleShare, ...] = ()
    inactive: int = 0
    slow: dict[str, str] = dataclasses.field(default_factory=dict)
    memory: dict[str, float] | None = None
    sample: str | None = None
    mode: Mode | None = None
    tolerance: float | None = None
    comparisons: tuple[Comparison, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a number that is not finite becomes None."""
        data = {"ok": self.problem is None, **dataclasses.asdict(self)}
        for row in data["comparisons"]:
            row |= {k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
        return data


def check(path: str, options: CheckOptions | None = None) -> Report:
    """Account for the parameters of a model, and compare one sample with plain autograd.

    Raises:
        CheckpointError: the model can't be loaded.
        RuntimeError: memory does not suffice for autograd.
    """
    options = options or CheckOptions()
    model = _without_weights(path, options) if options.config_only else _loaded(path, options)
    report = account(path, model)
    if report.problem is not None or options.config_only:
        return report
    scorer = Scorer(model, mode=options.mode)
    sample, described = _sample(path, scorer, options)
    try:
        comparisons = compare(scorer, sample, options)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RuntimeError(
            "out of memory: plain autograd takes three times the weights; --config-only checks the coverage alone"
        ) from error
    tolerance = TOLERANCE[scorer.dtype]
    off = [c for c in comparisons if not c.difference <= tolerance]  # not a number is off, too
    memory = scorer.memory
    return dataclasses.replace(
        report,
        problem=f"{off[0].quantity} differs from autograd's by {off[0].difference:.1e}" if off else None,
        memory={
            "bytes_per_token": memory.per_token,
            "bytes_per_pair": memory.per_pair,
            "bytes_per_answer_token": memory.head_bytes(100) / 100,
        },
        sample=described,
        mode=options.mode,
        tolerance=tolerance,
        comparisons=tuple(comparisons),
    )


def account(path: str, model: Any) -> Report:
    """Which rule counts how many layers and parameters."""
    total = sum(p.numel() for p in model.parameters())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    report = Report(model=path, architecture=type(model).__name__, dtype=dtype, parameters=total)
    try:
        coverage = cover(model)
    except UnsupportedModelError as error:
        return dataclasses.replace(report, problem=str(error))
    layers: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    seen: set[int] = set()
    slow = {}
    # The head last: its weight may be the embedding's.
    for name, module, rule in (*coverage.rules, ("the head", coverage.head, coverage.head_rule)):
        own = dict(module.named_parameters(recurse=False))
        layers[rule.name] += 1
        parameters[rule.name] += sum(p.numel() for p in own.values() if id(p) not in seen)
        seen |= set(map(id, own.values()))
        if rule.every_output:
            usual = rule_for(module)
            extra = sorted(set(own) - usual.parameters) if usual else []
            slow[name] = f"no rule for {type(module).__name__}" + (f" with {', '.join(extra)}" if extra else "")
    inactive = sum(
        p.numel() for _, m in coverage.inactive for p in m.parameters(recurse=False) if id(p) not in seen
    )
    left = total - inactive - sum(parameters.values())
    return dataclasses.replace(
        report,
        problem=f"{left} of {total} parameters are counted by no rule" if left else None,
        tied=coverage.tied,
        blocks=len(coverage.blocks),
        rules=tuple(RuleShare(rule, layers[rule], count) for rule, count in parameters.most_common()),
        inactive=inactive,
        slow=slow,
    )


def compare(scorer: Scorer, sample: Sample, options: CheckOptions) -> list[Comparison]:
    """The numbers of one sample beside those of plain autograd.

    Raises:
        RuntimeError: the sample could not be scored.
    """
    prompt, answer = list(sample.prompt_ids), list(sample.answer_ids)
    (ours,) = scorer.score([sample], semantic=options.semantic)
    if ours.log_probability is None or ours.log_grad_norm_sq is None:
        raise RuntimeError(f"the sample could not be scored: {ours.reason or 'its gradient is zero'}")
    tokens: list[float] = []
    answer_only = options.mode == "answer_only"
    if options.trace:
        prefixes = [PrefixCache(scorer.model, 0).keys_and_values(prompt[:-1])] if answer_only else None
        ids = (prompt, answer)
        tokens = token_grad_norms(scorer.model, cover(scorer.model), ids, prefixes=prefixes).tolist()

    oracle = Oracle(scorer.model, torch.float64 if scorer.dtype == "float64" else torch.float32)
    log_p, norm_sq = (oracle.answer_only if answer_only else oracle.score)(prompt, answer)
    rows = [
        Comparison.of("log-probability", ours.log_probability, log_p, max(1.0, abs(log_p))),
        Comparison.of("squared gradient norm", exp_or_none(ours.log_grad_norm_sq), norm_sq),
    ]
    if options.trace:
        exact = (oracle.answer_only_tokens if answer_only else oracle.token_grad_norms)(prompt, answer)
        # In relation to the largest: of a nearly certain token little more than rounding is left.
        each = [
            Comparison.of(f"the same of token {t}", ours_t, exact_t, max(exact))
            for t, (ours_t, exact_t) in enumerate(zip(tokens, exact, strict=True))
        ]
        rows.append(max(each, key=lambda row: row.difference))
    if options.semantic:
        at_input, at_blocks = oracle.hidden_gradients(prompt, answer)
        signals = ours.signals
        rows += [
            Comparison.of("at input embeddings, squared", _exp(signals.log_input_grad_norm_sq), at_input),
            Comparison.of("at hidden states", _exp(signals.log_hidden_grad), at_blocks),
        ]
        for name, value in dataclasses.asdict(oracle.semantic(prompt, answer)).items():
            rows.append(Comparison.of(name, getattr(signals, name), value))
    return rows


def _exp(value: float | None) -> float | None:
    return None if value is None else exp_or_none(value)


def _loaded(path: str, options: CheckOptions) -> nn.Module:
    model: Any = load_checkpoint(
        path,
        dtype=options.dtype,
        device=options.device,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    if options.dtype.endswith("float64") and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the usual one refuses float64
    loaded: nn.Module = model
    return loaded


def _without_weights(path: str, options: CheckOptions) -> nn.Module:
    dtype = parse_dtype(options.dtype)
    config = load_config(path, revision=options.revision, trust_remote_code=options.trust_remote_code)
    model: nn.Module = empty_model(config, dtype=dtype, trust_remote_code=options.trust_remote_code)
    return model


def _sample(path: str, scorer: Scorer, options: CheckOptions) -> tuple[Sample, str]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": QUESTION}]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        else:
            prompt = tokenizer.encode(f"{QUESTION}\n")
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        answer = tokenizer.encode(ANSWER, add_special_tokens=False)
        sample = Sample(prompt, [*answer, *end])
        # Where its files are missing, transformers may make a tokenizer that knows no word.
        if len(answer) >= 4 and scorer.problem_with(sample) is None:
            return sample, f"{QUESTION!r} / {ANSWER!r}, {len(prompt)} + {len(sample.answer_ids)} tokens"
    except (OSError, ValueError, ImportError):  # no tokenizer, or one whose packages are missing
        pass
    count = min(32, scorer.context_length or 32)
    ids = torch.randint(scorer.vocabulary_size, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    split = len(ids) * 3 // 4
    return Sample(ids[:split], ids[split:]), f"random tokens, {split} + {len(ids) - split}"
