"""Load on a real server: what `benchmarks/serving.py` measures, each kind in a module of its own."""
