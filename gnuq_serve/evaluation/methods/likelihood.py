"""Free: the answer's log-probability, which every server can give."""

from gnuq_serve.evaluation.methods.base import of_feature

METHODS = (
    of_feature("nll", "-l", feature="log_probability", sign=-1.0),
    of_feature("mean_nll", "-l/T", feature="mean_log_probability", sign=-1.0),
    of_feature(
        "max_token_nll",
        "-log of the lowest token probability",
        feature="min_token_log_probability",
        sign=-1.0,
    ),
)
