"""How an error is told to somebody who does not read tracebacks."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 500 characters; its type where it has no message."""
    text = str(error).strip()
    return text.splitlines()[0][:500] if text else type(error).__name__
