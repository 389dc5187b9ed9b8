"""Where gnuq-serve keeps files that it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache() -> Path:
    """The cache directory of gnuq-serve for this user."""
    if cache := os.environ.get("GNUQ_CACHE"):
        return Path(cache)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "gnuq-serve"
    return Path.home() / ".cache" / "gnuq-serve"
