"""The uncertainty of a gnuq-serve answer, and a decision about it, in LangChain."""

from langchain_gnuq.callback import UncertaintyCallbackHandler, UnscoredAnswerError

__all__ = ["UncertaintyCallbackHandler", "UnscoredAnswerError"]
