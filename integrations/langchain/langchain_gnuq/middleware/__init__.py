"""Agent middleware for langchain 1.x: what becomes of an answer, or a tool call, that the model is unsure of.

Needs the extra ``agents``: ``pip install 'langchain-gnuq[agents]'``.
"""

try:
    import langchain.agents.middleware  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"the agent middleware needs {error.name}, not installed here: pip install 'langchain-gnuq[agents]'"
    ) from error

from langchain_gnuq.middleware.abstain import AbstainWhenUncertain
from langchain_gnuq.middleware.ask_human import AskHumanWhenUncertain
from langchain_gnuq.middleware.escalate import EscalateWhenUncertain

__all__ = ["AbstainWhenUncertain", "AskHumanWhenUncertain", "EscalateWhenUncertain"]
