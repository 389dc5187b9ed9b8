"""Routing in LCEL chains: answer with one runnable, and go another way where it is uncertain."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.runnables.base import RunnableLike, coerce_to_runnable
from langchain_core.runnables.config import merge_configs, patch_config

from gnuq_serve.policy import Action, Decision, Policy
from gnuq_serve.uncertainty import Uncertainty
from langchain_gnuq.gate import ABSTAIN_TEXT, Gate, OnUnscored
from langchain_gnuq.message import uncertainty_of


@dataclass(frozen=True, slots=True, kw_only=True)
class UncertainAnswer:
    """What a person, or an abstention, gets to see: the chain's input, the draft, and why it was held back.

    ``draft`` is what the answering runnable gave: a message, or the dict of a structured output with
    ``include_raw=True``.
    """

    input: Any
    draft: Any
    uncertainty: Uncertainty
    decision: Decision


def route_by_uncertainty(
    answer: Runnable[Any, Any],
    *,
    escalate: RunnableLike[Any, Any] | None = None,
    human: RunnableLike[UncertainAnswer, Any] | None = None,
    abstain: RunnableLike[UncertainAnswer, Any] | str = ABSTAIN_TEXT,
    policy: Policy | None = None,
    on_unscored: OnUnscored = "uncertain",
) -> Runnable[Any, Any]:
    """A runnable that answers with ``answer``, and hands on what is uncertain as the policy decides.

    Put it where the model stood: ``prompt | route_by_uncertainty(small, escalate=large) | StrOutputParser()``.
    Drafts never come out: a stream begins once the decision is there, with the pieces of the draft or with the
    other branch's stream, and LangGraph's ``messages`` stream does not show them. Callbacks and
    ``astream_events`` do.

    An answer without a score counts as uncertain (``on_unscored="uncertain"``, the default) and goes where the
    policy's ``otherwise`` says: a gate that opens whenever the scorer is down guards nothing.
    ``on_unscored="pass"`` lets it through. What the other branches give is not looked at.

    Args:
        answer: gives a message that carries its uncertainty (a chat model, or a chain that ends in one), or the
            dict of ``with_structured_output(…, include_raw=True)``.
        escalate: gets the same input as ``answer``.
        human: gets an `UncertainAnswer`.
        abstain: gets an `UncertainAnswer`; or a text, which becomes a message. An action without a branch ends
            here.
        policy: decides; None: the decision that came with the answer counts.
        on_unscored: see above.

    Raises:
        ValueError: ``on_unscored`` is unknown.
        TypeError: in a call, ``answer`` gave something that carries no message.
    """
    return _Router(answer, escalate, human, abstain, Gate(policy, on_unscored))


class _Router(Runnable[Any, Any]):
    name = "route_by_uncertainty"  # of its runs

    def __init__(self, answer: Any, escalate: Any, human: Any, abstain: Any, gate: Gate) -> None:
        self.answer: Runnable[Any, Any] = coerce_to_runnable(answer)
        branches = {"escalate": escalate, "human": human, "abstain": _text(abstain)}
        self.branches: dict[str, Runnable[Any, Any]] = {
            action: coerce_to_runnable(branch) for action, branch in branches.items() if branch is not None
        }
        self.gate = gate

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:  # noqa: A002
        def route(value: Any, run_manager: CallbackManagerForChainRun, config: RunnableConfig) -> Any:
            draft = self.answer.invoke(value, _drafting(config, run_manager), **kwargs)
            if (way := self._way(value, draft)) is None:
                return draft
            branch, branch_input, name = way
            return branch.invoke(branch_input, patch_config(config, callbacks=run_manager.get_child(name)))

        return self._call_with_config(route, input, config)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:  # noqa: A002
        async def route(value: Any, run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig) -> Any:
            draft = await self.answer.ainvoke(value, _drafting(config, run_manager), **kwargs)
            if (way := self._way(value, draft)) is None:
                return draft
            branch, branch_input, name = way
            return await branch.ainvoke(branch_input, patch_config(config, callbacks=run_manager.get_child(name)))

        return await self._acall_with_config(route, input, config)

    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:  # noqa: A002
        def route(
            values: Iterator[Any], run_manager: CallbackManagerForChainRun, config: RunnableConfig
        ) -> Iterator[Any]:
            for value in values:
                pieces = list(self.answer.stream(value, _drafting(config, run_manager), **kwargs))
                if (way := self._way(value, _sum(pieces))) is None:
                    yield from pieces
                    continue
                branch, branch_input, name = way
                yield from branch.stream(
                    branch_input, patch_config(config, callbacks=run_manager.get_child(name))
                )

        yield from self._transform_stream_with_config(iter([input]), route, config)

    async def astream(
        self,
        input: Any,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[Any]:
        async def route(
            values: AsyncIterator[Any], run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
        ) -> AsyncIterator[Any]:
            async for value in values:
                drafting = _drafting(config, run_manager)
                pieces = [piece async for piece in self.answer.astream(value, drafting, **kwargs)]
                if (way := self._way(value, _sum(pieces))) is None:
                    for piece in pieces:
                        yield piece
                    continue
                branch, branch_input, name = way
                child = patch_config(config, callbacks=run_manager.get_child(name))
                async for piece in branch.astream(branch_input, child):
                    yield piece

        async def once() -> AsyncIterator[Any]:
            yield input

        async for piece in self._atransform_stream_with_config(once(), route, config):
            yield piece

    def _way(self, value: Any, draft: Any) -> tuple[Runnable[Any, Any], Any, Action] | None:
        """Branch, its input and the action; None where the draft is the answer."""
        message = _message_of(draft)
        decision = self.gate.decide(message)
        if decision.action == "answer":
            return None
        action: Action = decision.action if decision.action in self.branches else "abstain"
        held = UncertainAnswer(input=value, draft=draft, uncertainty=uncertainty_of(message), decision=decision)
        return self.branches[action], value if action == "escalate" else held, action


def _drafting(config: RunnableConfig, run_manager: Any) -> RunnableConfig:
    hidden = merge_configs(config, {"tags": ["nostream"]})
    return patch_config(hidden, callbacks=run_manager.get_child("answer"))


def _text(abstain: Any) -> Any:
    if not isinstance(abstain, str):
        return abstain

    def say(held: UncertainAnswer) -> AIMessage:
        metadata = {"uncertainty": held.uncertainty.to_dict()}
        return AIMessage(abstain, response_metadata=metadata)

    return RunnableLambda(say)


def _message_of(draft: Any) -> BaseMessage:
    message = draft.get("raw") if isinstance(draft, Mapping) else draft
    if not isinstance(message, BaseMessage):
        raise TypeError(
            f"route_by_uncertainty: answer gave {type(draft).__name__}, which carries no uncertainty; let it end "
            "in the chat model, put output parsers behind the route, and use "
            "with_structured_output(…, include_raw=True)"
        )
    return message


def _sum(pieces: list[Any]) -> Any:
    total = None
    for piece in pieces:
        total = piece if total is None else total + piece
    return total


__all__ = ["UncertainAnswer", "route_by_uncertainty"]
