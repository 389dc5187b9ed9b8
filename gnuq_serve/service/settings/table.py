"""The docs' table of settings, from the model: ``python -m gnuq_serve.service.settings.table FILE``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from gnuq_serve.service.settings.model import Settings
from gnuq_serve.service.settings.sources import default_of

_BETWEEN = re.compile(r"(?<=<!-- settings -->\n).*?(?=<!-- /settings -->)", re.DOTALL)


def settings_table() -> str:
    """One row for each setting, in Markdown."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        rows.append(f"| `{name}` | `{default_of(field)}` | {field.description} |")
    return "\n".join(rows) + "\n"


def with_table(page: str) -> str:
    """A page with the table between the comments ``settings`` and ``/settings``.

    Raises:
        ValueError: the page has no such comments.
    """
    if not _BETWEEN.search(page):
        raise ValueError("no <!-- settings --> and <!-- /settings --> in the page")
    return _BETWEEN.sub(lambda _: settings_table(), page)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
