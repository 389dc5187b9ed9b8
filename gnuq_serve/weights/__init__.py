"""Where the scorer's tensors come from."""

from gnuq_serve.weights.checkpoint import CheckpointError, load_checkpoint
from gnuq_serve.weights.fingerprint import fingerprint_of

__all__ = ["CheckpointError", "fingerprint_of", "load_checkpoint"]
