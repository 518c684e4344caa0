"""Losses on tensors, pure torch: no Ray, no transformers. Formulas and conventions: each function's own page.

Each divergence takes student logits [tokens, vocab] and a teacher (logits, or a `SignalBatch`) and returns nats per
token; `token_mean` and `sequence_mean` make one number of them. The `linear_*` forms start from hidden states instead.
"""

from rayk.losses.chunked import (
    linear_cross_entropy,
    linear_divergence,
    linear_log_probs,
)
from rayk.losses.cross_tokenizer import universal_logit_distance
from rayk.losses.decoupled import adaptive_teaching, decoupled_kl, gold_uncertainty
from rayk.losses.divergences import (
    DIVERGENCES,
    LOG_FLOOR,
    adaptive_kl,
    divergence,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    symmetric_kl,
    total_variation,
)
from rayk.losses.reductions import kl_estimate, sequence_mean, token_mean

__all__ = [
    "DIVERGENCES",
    "LOG_FLOOR",
    "adaptive_kl",
    "adaptive_teaching",
    "decoupled_kl",
    "divergence",
    "forward_kl",
    "gold_uncertainty",
    "jensen_shannon",
    "kl_estimate",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_log_probs",
    "reverse_kl",
    "sequence_mean",
    "skew_forward_kl",
    "skew_reverse_kl",
    "symmetric_kl",
    "token_mean",
    "total_variation",
    "universal_logit_distance",
]
