"""A head tied to the embedding: one weight, two gradients, and so a cross term.

``W`` (V x d) gets ``sum_s delta_head_s (x) h_s`` from the head and ``c sum_t e_{id_t} (x) delta_emb_t`` from the
embedding (``c``: the embedding's scale, 1 mostly). Both squared norms are counted by their own rules; what is
left of ``||sum||^2`` is::

    2 c sum_{s,t} delta_head_s[id_t] (h_s . delta_emb_t)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gnuq_serve.gradnorm.layer_call import accumulation_dtype


@dataclass(frozen=True, slots=True)
class TiedHead:
    """One sample's half of the cross term, kept from the head until the backward pass reaches the embedding.

    Attributes:
        hidden: (S, d) inputs of the head.
        delta_at_ids: (S, T) gradients at its output, at the columns of the T ids that the embedding read: only
            these can meet the embedding's gradient.
    """

    hidden: Tensor
    delta_at_ids: Tensor

    @classmethod
    def of(cls, hidden: Tensor, delta: Tensor, ids: Tensor) -> TiedHead:
        """From the head's inputs (S, d), the gradients at its output (S, V), and the ids read (T,)."""
        dtype = accumulation_dtype(delta)
        return cls(hidden.to(dtype), delta[:, ids.to(delta.device)].to(dtype))

    def row(self, s: Tensor) -> TiedHead:
        """The half that belongs to one answer position alone; ``s`` is a scalar index."""
        return TiedHead(self.hidden.index_select(0, s[None]), self.delta_at_ids.index_select(0, s[None]))

    def cross_term(self, delta_embedding: Tensor) -> Tensor:
        """The cross term, a scalar, from ``c`` times the gradient at the embedding's output, (T, d)."""
        hidden = self.hidden.to(delta_embedding.device)
        products = hidden @ delta_embedding.mT
        return 2 * (self.delta_at_ids.to(products.device) * products).sum()
