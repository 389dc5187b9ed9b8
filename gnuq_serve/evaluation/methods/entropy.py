"""Free on a server that sees its logits: entropies of the tokens' predictive distributions."""

from gnuq_serve.evaluation.methods.base import of_feature

METHODS = (
    of_feature("mean_entropy", "mean token entropy", feature="entropy"),
    of_feature("max_entropy", "largest token entropy", feature="max_entropy"),
    of_feature("first_entropy", "entropy of the first token", feature="first_entropy"),
)
