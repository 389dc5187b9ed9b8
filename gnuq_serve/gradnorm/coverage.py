"""The account of parameters: each one is counted by exactly one rule, or the model is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# Imported for what they register.
from gnuq_serve.gradnorm import embedding as _embedding  # noqa: F401
from gnuq_serve.gradnorm import experts as _experts  # noqa: F401
from gnuq_serve.gradnorm import linear as _linear  # noqa: F401
from gnuq_serve.gradnorm import norm as _norm  # noqa: F401
from gnuq_serve.gradnorm import sinks as _sinks  # noqa: F401
from gnuq_serve.gradnorm.adapters import adapter_obstacle, inactive_adapters
from gnuq_serve.gradnorm.local_autograd import slow_rule
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
        blocks: the decoder blocks in their order; empty where the model shows none.
        inactive: (name, module) for the layers of adapters that are not in use as the model is set now: their
            gradient is zero. After switching adapters, cover the model again.
    """

    rules: tuple[tuple[str, nn.Module, Rule], ...]
    head: nn.Module
    head_rule: Rule
    embedding: nn.Module
    tied: bool
    blocks: tuple[nn.Module, ...] = ()
    inactive: tuple[tuple[str, nn.Module], ...] = ()

    @property
    def slow(self) -> list[str]:
        """Names of the layers that go the slow exact way, for want of a rule."""
        return [name for name, _, rule in self.rules if rule.every_output]

    @property
    def slow_layers(self) -> set[nn.Module]:
        """Those layers."""
        return {module for _, module, rule in self.rules if rule.every_output}

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

    A layer without a rule, or with parameters that its rule does not count, goes the slow exact way.

    Raises:
        UnsupportedModelError: a parameter shared by modules other than embedding and head, a head that no rule
            knows, or no embedding or head to be found; a layer whose rule does not hold as it is set up; an
            adapter on the embedding or the head, or of a kind that uses its parameters in another way.
    """
    find_head = getattr(model, "get_output_embeddings", lambda: None)
    find_embedding = getattr(model, "get_input_embeddings", lambda: None)
    head, embedding = find_head(), find_embedding()
    if head is None or embedding is None:
        missing = "output" if head is None else "input"
        raise UnsupportedModelError(
            f"{type(model).__name__} has no {missing} embeddings: not a causal language model?"
        )

    unused = inactive_adapters(model)
    inactive: list[tuple[str, nn.Module]] = []
    rules: list[tuple[str, nn.Module, Rule]] = []
    owners: dict[int, str] = {}
    head_rule: Rule | None = None
    tied = head is not embedding and getattr(head, "weight", None) is getattr(embedding, "weight", None)
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if module in unused:
            inactive += [(name, module)] if own else []
            continue
        if (problem := adapter_obstacle(module, head, embedding)) is not None:
            raise UnsupportedModelError(f"{name or type(module).__name__}: {problem}")
        if not own:
            continue
        if getattr(module, "max_norm", None) is not None:
            raise UnsupportedModelError(
                f"{name} has max_norm, so that reading it rewrites its weights: set max_norm=None"
            )
        rule = rule_for(module)
        if rule is None or set(own) - rule.parameters:
            # What the model or its body returns is no tensor, and to run either again is to run the whole model.
            if module in (head, embedding, model, getattr(model, "base_model", None)):
                raise UnsupportedModelError(
                    f"{type(model).__name__}: no gradient-norm rule for {name or 'the root'} "
                    f"({type(module).__name__}: {', '.join(sorted(own))}). "
                    "Register one for its type with gnuq_serve.gradnorm.register"
                )
            rule = slow_rule(frozenset(own))
        if rule.obstacle is not None and (problem := rule.obstacle(module)) is not None:
            raise UnsupportedModelError(f"{name}: {problem}")
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
    if head_rule is None:
        raise UnsupportedModelError(f"{type(model).__name__}: the head is not one of the model's modules")
    return Coverage(tuple(rules), head, head_rule, embedding, tied, _blocks(model), tuple(inactive))


def _blocks(model: nn.Module) -> tuple[nn.Module, ...]:
    config: Any = model.config
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return tuple(lists[0]) if lists else ()
