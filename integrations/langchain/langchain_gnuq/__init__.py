"""The uncertainty of a gnuq-serve answer, and a decision about it, in LangChain.

Agent middleware is in `langchain_gnuq.middleware`, which needs ``pip install 'langchain-gnuq[agents]'``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from langchain_gnuq.callback import UncertaintyCallbackHandler
from langchain_gnuq.errors import UnscoredAnswerError
from langchain_gnuq.message import uncertainty_of
from langchain_gnuq.version import __version__

if TYPE_CHECKING:
    from langchain_gnuq.chat_models import ChatGnuq
    from langchain_gnuq.route import UncertainAnswer, route_by_uncertainty

__all__ = [
    "ChatGnuq",
    "UncertainAnswer",
    "UncertaintyCallbackHandler",
    "UnscoredAnswerError",
    "__version__",
    "route_by_uncertainty",
    "uncertainty_of",
]

# The OpenAI client and LangChain's runnables take a second to import, which the handler does without.
_LATER = {"ChatGnuq": "chat_models", "UncertainAnswer": "route", "route_by_uncertainty": "route"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"langchain_gnuq.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
