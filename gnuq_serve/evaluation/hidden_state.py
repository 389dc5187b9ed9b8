"""A hidden state as text for the working file: little-endian float16, base64."""

from __future__ import annotations

import base64

import numpy as np

from gnuq_serve.calibration.arrays import FloatArray


def encode(state: FloatArray) -> str:
    """``(d,)`` numbers as text."""
    limit = float(np.finfo(np.float16).max)
    return base64.b64encode(np.clip(state, -limit, limit).astype("<f2").tobytes()).decode()


def decode(text: str) -> FloatArray:
    """The numbers of `encode`."""
    return np.frombuffer(base64.b64decode(text), dtype="<f2").astype(np.float64)
