"""A head tied to the embedding: one weight, two gradients, and so a cross term.

``W`` (V x d) gets ``sum_s delta_head_s (x) h_s`` from the head and ``sum_t e_{id_t} (x) delta_emb_t`` from the
embedding. Both squared norms are counted by their own rules; what is left of ``||sum||^2`` is::

    2 sum_{s,t} delta_head_s[id_t] (h_s . delta_emb_t)
"""

from __future__ import annotations

from torch import Tensor

from gnuq_serve.gradnorm.layer_input import accumulation_dtype


class TiedHead:
    """One sample's half of the cross term, kept from the head until the backward pass reaches the embedding."""

    def __init__(self, hidden: Tensor, delta: Tensor, ids: Tensor) -> None:
        """Keep the head's side.

        Args:
            hidden: (S, d) inputs of the head.
            delta: (S, V) gradients at its output.
            ids: (T,) ids that the embedding read.
        """
        self._hidden = hidden
        # Only the columns of tokens that occur in the input can meet the embedding's gradient.
        self._delta_at_ids = delta[:, ids].to(accumulation_dtype(delta))

    def cross_term(self, delta_embedding: Tensor) -> Tensor:
        """The cross term, a scalar, from the gradient at the embedding's output, (T, d)."""
        dtype = self._delta_at_ids.dtype
        products = self._hidden.to(dtype) @ delta_embedding.to(dtype).mT
        return 2 * (self._delta_at_ids * products).sum()
