"""Where the scorer's tensors come from."""

from gnuq_serve.weights.checkpoint import CheckpointError, check_in_memory, load_checkpoint
from gnuq_serve.weights.fingerprint import fingerprint_of

__all__ = ["CheckpointError", "check_in_memory", "fingerprint_of", "load_checkpoint"]
