"""P(True) (Kadavath et al. 2022, arXiv:2207.05221): the model says whether its answer is true; one more pass."""

from gnuq_serve.evaluation.methods.base import doubt

METHODS = (doubt("p_true", "1 - P(True)"),)
