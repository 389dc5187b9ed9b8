"""Verbalised confidence (Tian et al. 2023, arXiv:2305.14975): the model names a percentage; one more answer."""

from gnuq_serve.evaluation.methods.base import doubt

METHODS = (doubt("verbalized", "1 - stated confidence"),)
