"""What a person at the terminal sees while a command works; standard error, results go elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable


def progress_bar(what: str, done: int, total: int) -> Callable[[], None]:
    """A bar on a terminal, nothing elsewhere; call what it returns after each further one that is done."""
    from tqdm import tqdm

    bar = tqdm(desc=what, initial=done, total=total, disable=None, file=sys.stderr)

    def step() -> None:
        bar.update()
        if bar.n >= total:
            bar.close()

    return step


def say(text: str) -> None:
    """A line for people."""
    print(text, file=sys.stderr, flush=True)
