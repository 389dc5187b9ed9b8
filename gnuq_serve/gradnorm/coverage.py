"""The account of parameters: each one is counted by exactly one rule, or the model is refused."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

# Imported for what they register.
from gnuq_serve.gradnorm import embedding as _embedding  # noqa: F401
from gnuq_serve.gradnorm import linear as _linear  # noqa: F401
from gnuq_serve.gradnorm import norm as _norm  # noqa: F401
from gnuq_serve.gradnorm.registry import Rule, rule_for


class UnsupportedModelError(ValueError):
    """The model has parameters that no rule counts; leaving them out would make the number wrong."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which module is counted by which rule.

    Attributes:
        rules: (name, module, rule) for every module that owns parameters, the head left out.
        head: the module that turns hidden states into logits, and its rule.
        embedding: the module that reads the token ids.
        tied: head and embedding share one weight.
    """

    rules: tuple[tuple[str, nn.Module, Rule], ...]
    head: nn.Module
    head_rule: Rule
    embedding: nn.Module
    tied: bool

    @property
    def embedding_weight(self) -> Tensor:
        """The embedding's (V, d) matrix."""
        weight = self.embedding.weight
        assert isinstance(weight, Tensor)
        return weight


def cover(model: nn.Module) -> Coverage:
    """Find the rule of every module.

    Args:
        model: a Hugging Face causal language model.

    Raises:
        UnsupportedModelError: a module without a rule, a parameter that its module's rule does not count, a
            parameter shared by modules other than embedding and head, or no embedding or head to be found.
    """
    find_head = getattr(model, "get_output_embeddings", lambda: None)
    find_embedding = getattr(model, "get_input_embeddings", lambda: None)
    head, embedding = find_head(), find_embedding()
    if head is None or embedding is None:
        missing = "output" if head is None else "input"
        raise UnsupportedModelError(
            f"{type(model).__name__} has no {missing} embeddings: not a causal language model?"
        )

    rules: list[tuple[str, nn.Module, Rule]] = []
    without_rule: list[str] = []
    owners: dict[int, str] = {}
    head_rule: Rule | None = None
    tied = head is not embedding and getattr(head, "weight", None) is getattr(embedding, "weight", None)
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        if getattr(module, "max_norm", None) is not None:
            raise UnsupportedModelError(
                f"{name} has max_norm, so that reading it rewrites its weights: set max_norm=None"
            )
        rule = rule_for(module)
        uncounted = set(own) if rule is None else set(own) - rule.parameters
        if rule is None or uncounted:
            without_rule.append(f"{name or '(root)'} ({type(module).__name__}: {', '.join(sorted(uncounted))})")
            continue
        for parameter_name, parameter in own.items():
            first_owner = owners.setdefault(id(parameter), name)
            is_tie = tied and module in (head, embedding) and parameter_name == "weight"
            if first_owner != name and not is_tie:
                raise UnsupportedModelError(
                    f"{name}.{parameter_name} is shared with {first_owner}: no rule for that"
                )
        if module is head:
            head_rule = rule
        else:
            rules.append((name, module, rule))
    if without_rule:
        shown = "; ".join(without_rule[:3]) + (
            f"; and {len(without_rule) - 3} more" if len(without_rule) > 3 else ""
        )
        raise UnsupportedModelError(
            f"{type(model).__name__}: no gradient-norm rule for {shown}. "
            "Register one for the layer's type with gnuq_serve.gradnorm.register"
        )
    if head_rule is None:
        raise UnsupportedModelError(f"{type(model).__name__}: the head is not one of the model's modules")
    return Coverage(tuple(rules), head, head_rule, embedding, tied)
