"""Policy gradients for distillation: MiniLLM (arXiv 2306.08543) and on-policy distillation by per-token log-ratios.

The student q writes y_1…y_T, alone or mixed with the teacher p, and is rewarded for what p finds likely. In MiniLLM's
terms, with KL(q‖p) over whole sequences to be minimised:

    r_t      = log p(y_t) − log q(y_t)                                   `token_rewards`
    R_{t+1}  = 1/(T − t) Σ_{s>t} r_s                                     `returns_to_go`
    p̃        = αp + (1 − α)q,  w_t = q(y_t) / p̃(y_t)                     `importance_log_weights`
    L_long   = −Σ_t w_t R_{t+1} log q(y_t), as ratios, clipped as in PPO  `policy_loss`
    L_single = Σ_t w_t Σ_v q(v) (log q(v) − log p(v))                    `reverse_kl`, `linear_divergence`

The gradient of this is biased on purpose; `unbiased_sequence_kl_loss` has the one that is not. What LMOps (the authors'
code) runs is another combination of the same parts; each function's page says where.

Whatever looks along a sequence takes [rows, length] and `counted`, bool [rows, length]: which positions hold a token of
the completion. Others may hold anything, NaN included, and change nothing, wherever they stand. What works token by
token takes any shape; give it the counted tokens alone. float32 inside (float64 stays float64), log-probs floored at
`LOG_FLOOR`. Rewards, returns and weights carry no gradient. Weights stay logarithms until they are used, since a
token that only the teacher would say has a q too small for float32.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rayk.errors import InputError
from rayk.losses.divergences import LOG_FLOOR

# e^60 times any reward is still a float32. The weights' mean is 1, so they get there with probability below e^-60.
_MAX_LOG_WEIGHT = 60.0


def token_rewards(
    student_logprobs: Tensor, teacher_logprobs: Tensor, *, scaling: float = 1.0, clip: float | None = None
) -> Tensor:
    """r_t = (log p(y_t) − log q(y_t)) / scaling, then cut to ±clip; without gradient.

    LMOps runs `scaling` 0.5 (so it doubles the rewards) and `clip` 100; the paper has neither.

    Args:
        student_logprobs: log q of the sampled tokens, under the student alone even where the teacher was mixed in.
        teacher_logprobs: log p of the same tokens.

    Returns:
        Nats (over `scaling`), the inputs' shape.

    Raises:
        InputError: shapes differ, `scaling` or `clip` is not positive.
    """
    _check_shapes(student_logprobs=student_logprobs, teacher_logprobs=teacher_logprobs)
    _check_positive(scaling=scaling, clip=clip)
    rewards = (_floored(teacher_logprobs) - _floored(student_logprobs)).detach() / scaling
    return rewards if clip is None else rewards.clamp(-clip, clip)


def returns_to_go(
    rewards: Tensor, counted: Tensor, *, include_current: bool = False, discount: float = 1.0, length_norm: bool = True
) -> Tensor:
    """The rewards still to come at each token, Σ_s γ^(s − first) r_s over s > t, or s ≥ t with `include_current`.

    The paper (§2.2) leaves r_t out, since the single-step part has it exactly, and divides by the T − t rewards summed
    (0 at t = T); `length_norm` off gives the R_{t+1} of its derivation. LMOps instead has `include_current`,
    `discount` 0.95 and always the division, so r_t counts twice beside the single-step part.

    Args:
        rewards: [rows, length].
        counted: bool [rows, length]; only counted tokens have rewards, discount and add to a length.
        include_current: r_t is part of its own token's return.
        discount: γ from 0 to 1. The first reward of the sum is never discounted.
        length_norm: divide by how many rewards were summed.

    Returns:
        [rows, length], 0 at uncounted positions, without gradient.

    Raises:
        InputError: shapes differ, or `discount` is outside 0 to 1.
    """
    _check_shapes(rewards=rewards, counted=counted)
    _check_share(discount=discount)
    returns = _discounted_suffix_sums(_wide(rewards).detach(), counted, discount)
    remaining = counted.flip(-1).cumsum(-1).flip(-1)
    if not include_current:
        returns, remaining = _shifted_left(returns), _shifted_left(remaining)
    if length_norm:
        returns = returns / remaining.clamp(min=1)
    return torch.where(counted, returns, 0.0)


def importance_log_weights(student_logprobs: Tensor, teacher_logprobs: Tensor, alpha: float) -> Tensor:
    """log w_t = log q(y_t) − log p̃(y_t), p̃ = αp + (1 − α)q: for tokens drawn from the mixture (MiniLLM §2.2).

    At most −log(1 − α), and w_t averages to 1 over p̃. With `alpha` 1 (the teacher alone) there is no such bound.

    Args:
        student_logprobs: log q of the sampled tokens when they were sampled, under the student alone.
        teacher_logprobs: log p of the same tokens.
        alpha: the teacher's share of the mixture, 0 to 1.

    Returns:
        The inputs' shape, without gradient.

    Raises:
        InputError: shapes differ, or `alpha` is outside 0 to 1.
    """
    _check_shapes(student_logprobs=student_logprobs, teacher_logprobs=teacher_logprobs)
    _check_share(alpha=alpha)
    # As log(p̃/q), which never cancels: the bound holds to the last bit.
    log_ratio = (_floored(teacher_logprobs) - _floored(student_logprobs)).detach()
    student_share, teacher_share = log_ratio.new_tensor([1 - alpha, alpha]).log()
    return -torch.logaddexp(student_share, teacher_share + log_ratio)


def cumulative_log_weights(log_weights: Tensor, counted: Tensor) -> Tensor:
    """log Π_{u≤t} w_u, [rows, length]: how much likelier the sequence up to and with y_t is under q than under p̃.

    These are the weights of per-decision importance sampling (Precup et al. 2000): multiplied onto each *reward* they
    make the long part exact. The paper's derivation multiplies them onto log q(y_t) instead, which leaves the tokens
    between t and a later reward unweighted.

    Args:
        log_weights: [rows, length], from `importance_log_weights`.
        counted: bool [rows, length].

    Raises:
        InputError: shapes differ.
    """
    _check_shapes(log_weights=log_weights, counted=counted)
    return torch.where(counted, _wide(log_weights).detach(), 0.0).cumsum(-1)


def prefix_log_weights(log_weights: Tensor, counted: Tensor) -> Tensor:
    """log Π_{u<t} w_u, [rows, length], 0 at the first token: the weight that makes the single-step part exact.

    That part sums over all tokens at t, so only how its prefix came about needs weighing. As `cumulative_log_weights`.
    """
    return F.pad(cumulative_log_weights(log_weights, counted), (1, 0))[..., :-1]


def moment_sums(values: Tensor, counted: Tensor, *, include_padding: bool = False) -> Tensor:
    """(n, Σx, Σx²) of the counted values, float64 [3]: to be added up over micro-batches and workers for `whiten`.

    `include_padding` counts every other position as a value of 0, as LMOps does; its whitening then depends on how the
    batch was padded.

    Raises:
        InputError: shapes differ.
    """
    _check_shapes(values=values, counted=counted)
    chosen = values.detach()[counted].double()
    count = counted.numel() if include_padding else len(chosen)
    return torch.stack([chosen.new_tensor(count), chosen.sum(), chosen.square().sum()])


def whiten(values: Tensor, sums: Tensor, *, epsilon: float = 1e-8) -> Tensor:
    """(x − mean) / sqrt(variance + epsilon), with the population variance (over n, not n − 1); without gradient.

    Args:
        values: any shape.
        sums: float64 [3], the `moment_sums` of the *global* batch.
    """
    count, total, squares = sums.to(values.device).unbind()
    mean = total / count.clamp(min=1)
    variance = (squares / count.clamp(min=1) - mean.square()).clamp(min=0)
    return ((values.detach().double() - mean) * (variance + epsilon).rsqrt()).to(_wide(values).dtype)


def policy_loss(
    student_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    *,
    log_weights: Tensor | None = None,
    clip: float | None = None,
) -> Tensor:
    """−A_t·ρ_t with ρ_t = w_t·q(y_t)/q_rollout(y_t), or PPO's max(−A·ρ, −A·clip(ρ, 1 ± ε)) (arXiv 1707.06347 §3).

    The weight sits inside the clip, as in LMOps: with α = 0.2 a w_t can be 1.25, which ε = 0.2 cuts before the student
    has moved at all. While the student has not moved, the unclipped gradient is −Σ_t w_t·A_t·∇log q(y_t).

    Args:
        student_logprobs: log q of the sampled tokens, now; the only input that learns.
        rollout_logprobs: the same when they were sampled, under the student alone.
        advantages: returns, whitened or not.
        log_weights: log w_t; none means 1.
        clip: ε; none means no clipping.

    Returns:
        One value a token, the inputs' shape; its gradient is what matters.

    Raises:
        InputError: shapes differ, or `clip` is not positive.
    """
    _check_shapes(student_logprobs=student_logprobs, rollout_logprobs=rollout_logprobs, advantages=advantages)
    _check_positive(clip=clip)
    log_ratio = _floored(student_logprobs) - _floored(rollout_logprobs).detach()
    if log_weights is not None:
        _check_shapes(student_logprobs=student_logprobs, log_weights=log_weights)
        log_ratio = log_ratio + _wide(log_weights).detach()
    ratio = log_ratio.clamp(max=_MAX_LOG_WEIGHT).exp()
    advantages = _wide(advantages).detach()
    loss = -advantages * ratio
    return loss if clip is None else torch.maximum(loss, -advantages * ratio.clamp(1 - clip, 1 + clip))


def log_ratio_policy_loss(
    student_logprobs: Tensor,
    rollout_logprobs: Tensor,
    teacher_logprobs: Tensor,
    *,
    coefficient: float = 1.0,
    clip: float | None = None,
) -> Tensor:
    """On-policy distillation by per-token log-ratios: `policy_loss` with A_t = −c·(log q_rollout(y_t) − log p(y_t)).

    As Thinking Machines run it (tinker-cookbook `distillation/train_on_policy.py`): no return-to-go (discount 0), no
    clip by default. On fresh rollouts each token's expected gradient is c times that of its reverse KL, given the
    prefix; what a token does to later ones is not seen.

    Args:
        student_logprobs: log q of the sampled tokens, now.
        rollout_logprobs: the same when they were sampled.
        teacher_logprobs: log p of the same tokens.
        coefficient: c, `kl_penalty_coef` there.
        clip: as in `policy_loss`.

    Returns:
        One value a token, the inputs' shape.

    Raises:
        InputError: as `policy_loss`.
    """
    advantages = coefficient * token_rewards(rollout_logprobs, teacher_logprobs)
    return policy_loss(student_logprobs, rollout_logprobs, advantages, clip=clip)


def unbiased_sequence_kl_loss(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    reverse_kl: Tensor,
    counted: Tensor,
    *,
    log_weights: Tensor | None = None,
) -> Tensor:
    """Summed over rollouts and divided by *their* number, its gradient averages to ∇KL(q‖p) over whole sequences.

        Σ_t Π_{u<t} w_u · KL(q‖p | y_<t)  −  Σ_t Σ_{s>t} (Π_{u≤s} w_u) · r_s · log q(y_t)

    Only with rollouts of the present student at temperature 1, without top-k or top-p, and dropout off; dividing by the
    tokens, length norm, a discount, whitening or clipping each make it biased (ALGORITHMS §26). Its variance grows
    with the length, which is why MiniLLM chose the biased forms.

    Args:
        student_logprobs: [rows, length], log q of the sampled tokens, with gradient.
        teacher_logprobs: [rows, length], log p of the same.
        reverse_kl: [rows, length], Σ_v q(v)·(log q(v) − log p(v)) over the whole vocabulary, with gradient.
        counted: bool [rows, length].
        log_weights: [rows, length], from `importance_log_weights`; none means the student alone wrote the rollouts.

    Returns:
        [rows, length], 0 at uncounted positions. Not the KL itself: only the gradient means something.

    Raises:
        InputError: shapes differ.
    """
    _check_shapes(student_logprobs=student_logprobs, reverse_kl=reverse_kl, counted=counted)
    student_logprobs = torch.where(counted, student_logprobs, 0.0)  # before the graph: 0 times a NaN's gradient is NaN
    rewards = token_rewards(student_logprobs, teacher_logprobs)
    if log_weights is None:
        log_weights = torch.zeros_like(rewards)
    weighted = cumulative_log_weights(log_weights, counted).clamp(max=_MAX_LOG_WEIGHT).exp() * rewards
    returns = returns_to_go(weighted, counted, length_norm=False)
    prefix_weights = prefix_log_weights(log_weights, counted).clamp(max=_MAX_LOG_WEIGHT).exp()
    single_step = prefix_weights * torch.where(counted, _wide(reverse_kl), 0.0)
    return single_step + policy_loss(student_logprobs, student_logprobs, returns)


def _discounted_suffix_sums(values: Tensor, counted: Tensor, discount: float) -> Tensor:
    """G_t = x_t + γ·G_next over counted positions; an uncounted one holds the G of the next counted one.

    By doubling: after k rounds each position holds the sum over its next 2^k, and the discount across them.
    """
    sums = torch.where(counted, values, 0.0)
    decay = torch.ones_like(sums).masked_fill(counted, discount)
    span = 1
    while span < values.shape[-1]:
        sums = sums + decay * F.pad(sums[..., span:], (0, span))
        decay = decay * F.pad(decay[..., span:], (0, span))
        span *= 2
    return sums


def _shifted_left(values: Tensor) -> Tensor:
    """What stands one position later, 0 after the last; [..., length]."""
    return F.pad(values, (0, 1))[..., 1:]


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _floored(logprobs: Tensor) -> Tensor:
    return _wide(logprobs).clamp(min=LOG_FLOOR)


def _check_shapes(**tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise InputError(f"These should have one shape but have {shapes}; give all of them for the same tokens.")


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise InputError(f"'{name}' is {value:g}; give a number above 0.")


def _check_share(**values: float) -> None:
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise InputError(f"'{name}' is {value:g}; give a number from 0 to 1.")
