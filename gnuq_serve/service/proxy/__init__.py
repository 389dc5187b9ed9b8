"""``gnuq-serve proxy``: the same service in front of a vLLM server that knows nothing of us."""
