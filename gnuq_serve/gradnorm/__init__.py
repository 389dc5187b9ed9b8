"""Per-sample squared gradient norms without gradients: one rule for each layer type, one pass that applies them.

Knows torch and transformers; knows nothing of serving.
"""

from gnuq_serve.gradnorm.backward import PassResult, gradient_pass
from gnuq_serve.gradnorm.coverage import Coverage, UnsupportedModelError, cover
from gnuq_serve.gradnorm.registry import register
from gnuq_serve.gradnorm.trace import token_grad_norms

__all__ = [
    "Coverage",
    "PassResult",
    "UnsupportedModelError",
    "cover",
    "gradient_pass",
    "register",
    "token_grad_norms",
]
