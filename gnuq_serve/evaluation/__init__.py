"""``gnuq-serve evaluate``: does it work, on this model and these questions, and what do the rivals find?"""
