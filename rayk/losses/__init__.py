"""Distillation losses in plain PyTorch, without Ray and transformers; each docstring gives the formula and the paper.

Each divergence takes student logits [tokens, vocab] and a teacher (logits, or a `SignalBatch`) and returns nats per
token; `token_mean`, `sequence_mean` and `group_mean` reduce them to one number. The `linear_*` functions start from
hidden states and never store the logits of a whole batch. Policy gradients (MiniLLM, on-policy distillation) are in
`policy_gradient`, preference losses (DPO) in `preference`, distances of layers in `features`, and retriever losses in
`retrieval`.
"""

from rayk.losses.chunked import Match, linear_divergence, linear_match, linear_outcomes
from rayk.losses.cross_tokenizer import AlignedLoss, aligned_divergence, universal_logit_distance
from rayk.losses.decoupled import adaptive_teaching, decoupled_kl, gold_uncertainty
from rayk.losses.divergences import (
    DIVERGENCES,
    LOG_FLOOR,
    adaptive_kl,
    divergence,
    find_divergence,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    symmetric_kl,
    total_variation,
)
from rayk.losses.features import FEATURE_DISTANCES, cosine_distance, relation_divergence, squared_distance
from rayk.losses.label_words import label_word_loss
from rayk.losses.linear import linear_cross_entropy, linear_log_probs
from rayk.losses.linear_decoupled import DecoupledTerms, linear_decoupled_terms
from rayk.losses.policy_gradient import (
    cumulative_log_weights,
    importance_log_weights,
    log_ratio_policy_loss,
    moment_sums,
    policy_loss,
    prefix_log_weights,
    returns_to_go,
    token_rewards,
    unbiased_sequence_kl_loss,
    whiten,
)
from rayk.losses.preference import dpo_loss, implicit_rewards
from rayk.losses.reductions import group_mean, kl_estimate, sequence_mean, sequence_sum, token_mean
from rayk.losses.retrieval import full_contrastive_loss, no_negatives, reward_distillation

__all__ = [
    "DIVERGENCES",
    "FEATURE_DISTANCES",
    "LOG_FLOOR",
    "AlignedLoss",
    "DecoupledTerms",
    "Match",
    "adaptive_kl",
    "adaptive_teaching",
    "aligned_divergence",
    "cosine_distance",
    "cumulative_log_weights",
    "decoupled_kl",
    "divergence",
    "dpo_loss",
    "find_divergence",
    "forward_kl",
    "full_contrastive_loss",
    "gold_uncertainty",
    "group_mean",
    "implicit_rewards",
    "importance_log_weights",
    "jensen_shannon",
    "kl_estimate",
    "label_word_loss",
    "linear_cross_entropy",
    "linear_decoupled_terms",
    "linear_divergence",
    "linear_log_probs",
    "linear_match",
    "linear_outcomes",
    "log_ratio_policy_loss",
    "moment_sums",
    "no_negatives",
    "policy_loss",
    "prefix_log_weights",
    "relation_divergence",
    "returns_to_go",
    "reverse_kl",
    "reward_distillation",
    "sequence_mean",
    "sequence_sum",
    "skew_forward_kl",
    "skew_reverse_kl",
    "squared_distance",
    "symmetric_kl",
    "token_mean",
    "token_rewards",
    "total_variation",
    "unbiased_sequence_kl_loss",
    "universal_logit_distance",
    "whiten",
]
