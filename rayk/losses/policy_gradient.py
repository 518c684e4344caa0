"""Policy gradients for distillation: MiniLLM (arXiv 2306.08543) and on-policy distillation by per-token log-ratios.

The student q samples y_1…y_T, alone or mixed with the teacher p, and its reward is the log-ratio of p to q. In
MiniLLM's terms, minimizing KL(q‖p) over whole sequences:

    r_t      = log p(y_t) − log q(y_t)                                   `token_rewards`
    R_{t+1}  = 1/(T − t) Σ_{s>t} r_s                                     `returns_to_go`
    p̃        = αp + (1 − α)q,  w_t = q(y_t) / p̃(y_t)                     `importance_log_weights`
    L_long   = −Σ_t w_t R_{t+1} log q(y_t), as ratios, clipped as in PPO  `policy_loss`
    L_single = Σ_t w_t Σ_v q(v) (log q(v) − log p(v))                    `reverse_kl`, `linear_divergence`

The gradient of L_long + L_single is biased by design; that of `unbiased_sequence_kl_loss` is unbiased. LMOps, the
authors' code, combines the same parts in another way; the docstrings name the differences.

Functions that work along a sequence take values [rows, length] and `counted`, bool [rows, length], which is True at the
tokens of the completion. Values at other positions have no effect, even NaN. Functions that work token by token take
any shape; pass them counted tokens only. Computations are in float32 (float64 stays float64), and log-probs are floored
at `LOG_FLOOR`. Rewards, returns and weights carry no gradient. Weights are kept as logarithms, because a token that
only the teacher would sample has a q too small for float32.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rayk.errors import InputError
from rayk.losses.divergences import LOG_FLOOR
from rayk.losses.precision import upcast

# e^60 times any reward is finite in float32. The weights have mean 1, so one exceeds e^60 with probability below e^-60.
_MAX_LOG_WEIGHT = 60.0


def token_rewards(
    student_logprobs: Tensor, teacher_logprobs: Tensor, *, scaling: float = 1.0, clip: float | None = None
) -> Tensor:
    """Return r_t = (log p(y_t) − log q(y_t)) / scaling, clipped to ±clip; without gradient.

    LMOps uses `scaling` 0.5 (doubled rewards) and `clip` 100; the paper uses neither.

    Args:
        student_logprobs: log q of the sampled tokens, of the student alone even if the teacher was mixed in.
        teacher_logprobs: log p of the same tokens.

    Returns:
        Nats (divided by `scaling`), same shape as the inputs.

    Raises:
        InputError: shapes differ, `scaling` or `clip` is not positive.
    """
    _check_shapes(student_logprobs=student_logprobs, teacher_logprobs=teacher_logprobs)
    _check_positive(scaling=scaling, clip=clip)
    rewards = (_floor(teacher_logprobs) - _floor(student_logprobs)).detach() / scaling
    return rewards if clip is None else rewards.clamp(-clip, clip)


def returns_to_go(
    rewards: Tensor, counted: Tensor, *, include_current: bool = False, discount: float = 1.0, length_norm: bool = True
) -> Tensor:
    """Return the sum of later rewards, Σ_s γ^(s − first) r_s over s > t, or over s ≥ t with `include_current`.

    The paper (§2.2) leaves out r_t, which the single-step part contains exactly, and divides by the number T − t of
    summed rewards (0 at t = T); without `length_norm` the result is the R_{t+1} of its derivation. LMOps uses
    `include_current`, `discount` 0.95 and always the division, so it counts r_t twice, together with the single-step
    part.

    Args:
        rewards: [rows, length].
        counted: bool [rows, length]; only counted tokens have rewards, cause discounting and add to the length.
        include_current: include r_t in the return at t.
        discount: γ from 0 to 1. The first reward of the sum is not discounted.
        length_norm: divide by the number of summed rewards.

    Returns:
        [rows, length], 0 at uncounted positions, without gradient.

    Raises:
        InputError: shapes differ, or `discount` is outside 0 to 1.
    """
    _check_shapes(rewards=rewards, counted=counted)
    _check_share(discount=discount)
    returns = _discounted_suffix_sums(upcast(rewards).detach(), counted, discount)
    remaining = counted.flip(-1).cumsum(-1).flip(-1)
    if not include_current:
        returns, remaining = _shift_left(returns), _shift_left(remaining)
    if length_norm:
        returns = returns / remaining.clamp(min=1)
    return torch.where(counted, returns, 0.0)


def importance_log_weights(student_logprobs: Tensor, teacher_logprobs: Tensor, alpha: float) -> Tensor:
    """Return log w_t = log q(y_t) − log p̃(y_t) for tokens sampled from p̃ = αp + (1 − α)q (MiniLLM §2.2).

    log w_t is at most −log(1 − α), and the mean of w_t over p̃ is 1. With `alpha` 1 (the teacher alone) there is no
    bound.

    Args:
        student_logprobs: log q of the sampled tokens at the time of sampling, of the student alone.
        teacher_logprobs: log p of the same tokens.
        alpha: α, the share of the teacher in the mixture, 0 to 1.

    Returns:
        Same shape as the inputs, without gradient.

    Raises:
        InputError: shapes differ, or `alpha` is outside 0 to 1.
    """
    _check_shapes(student_logprobs=student_logprobs, teacher_logprobs=teacher_logprobs)
    _check_share(alpha=alpha)
    # Computed as log(p̃/q), which has no cancellation: the bound holds to the last bit.
    log_ratio = (_floor(teacher_logprobs) - _floor(student_logprobs)).detach()
    student_share, teacher_share = log_ratio.new_tensor([1 - alpha, alpha]).log()
    return -torch.logaddexp(student_share, teacher_share + log_ratio)


def cumulative_log_weights(log_weights: Tensor, counted: Tensor) -> Tensor:
    """Return log Π_{u≤t} w_u, [rows, length]: the log-ratio of q to p̃ for the sequence up to and including y_t.

    These are the weights of per-decision importance sampling (Precup et al. 2000): applied to each *reward*, they make
    the long part exact. The paper's derivation applies them to log q(y_t) instead, so the tokens between t and a later
    reward stay unweighted.

    Args:
        log_weights: [rows, length], from `importance_log_weights`.
        counted: bool [rows, length].

    Raises:
        InputError: shapes differ.
    """
    _check_shapes(log_weights=log_weights, counted=counted)
    return torch.where(counted, upcast(log_weights).detach(), 0.0).cumsum(-1)


def prefix_log_weights(log_weights: Tensor, counted: Tensor) -> Tensor:
    """Return log Π_{u<t} w_u, [rows, length], 0 at the first token: the weight that makes the single-step part exact.

    The single-step part sums over the vocabulary at t, so only the prefix needs a weight. Arguments and errors: as
    `cumulative_log_weights`.
    """
    return F.pad(cumulative_log_weights(log_weights, counted), (1, 0))[..., :-1]


def moment_sums(values: Tensor, counted: Tensor, *, include_padding: bool = False) -> Tensor:
    """Return (n, Σx, Σx²) of the counted values, float64 [3], to be summed over micro-batches and workers for `whiten`.

    `include_padding` counts every other position as a value of 0, as LMOps does; the result then depends on the
    padding.

    Raises:
        InputError: shapes differ.
    """
    _check_shapes(values=values, counted=counted)
    chosen = values.detach()[counted].double()
    count = counted.numel() if include_padding else len(chosen)
    return torch.stack([chosen.new_tensor(count), chosen.sum(), chosen.square().sum()])


def whiten(values: Tensor, sums: Tensor, *, epsilon: float = 1e-8) -> Tensor:
    """Return (x − mean) / sqrt(variance + epsilon) with the population variance (over n, not n − 1); without gradient.

    Args:
        values: any shape.
        sums: float64 [3], `moment_sums` of the *global* batch.
    """
    count, total, squares = sums.to(values.device).unbind()
    mean = total / count.clamp(min=1)
    variance = (squares / count.clamp(min=1) - mean.square()).clamp(min=0)
    return ((values.detach().double() - mean) * (variance + epsilon).rsqrt()).to(upcast(values).dtype)


def policy_loss(
    student_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    *,
    log_weights: Tensor | None = None,
    clip: float | None = None,
) -> Tensor:
    """Return −A_t·ρ_t with ρ_t = w_t·q(y_t)/q_rollout(y_t), or PPO's max(−A·ρ, −A·clip(ρ, 1±ε)) (arXiv 1707.06347 §3).

    The weight is inside the clip, as in LMOps: with α = 0.2, w_t can be 1.25, which ε = 0.2 clips even for an unchanged
    student. For an unchanged student the unclipped gradient is −Σ_t w_t·A_t·∇log q(y_t).

    Args:
        student_logprobs: log q of the sampled tokens by the current student; the only input with gradient.
        rollout_logprobs: log q of the same tokens at the time of sampling, of the student alone.
        advantages: returns, whitened or not.
        log_weights: log w_t; None means w_t = 1.
        clip: ε; None means no clipping.

    Returns:
        One value per token, same shape as the inputs; only the gradient is meaningful.

    Raises:
        InputError: shapes differ, or `clip` is not positive.
    """
    _check_shapes(student_logprobs=student_logprobs, rollout_logprobs=rollout_logprobs, advantages=advantages)
    _check_positive(clip=clip)
    log_ratio = _floor(student_logprobs) - _floor(rollout_logprobs).detach()
    if log_weights is not None:
        _check_shapes(student_logprobs=student_logprobs, log_weights=log_weights)
        log_ratio = log_ratio + upcast(log_weights).detach()
    ratio = log_ratio.clamp(max=_MAX_LOG_WEIGHT).exp()
    advantages = upcast(advantages).detach()
    loss = -advantages * ratio
    return loss if clip is None else torch.maximum(loss, -advantages * ratio.clamp(1 - clip, 1 + clip))


def log_ratio_policy_loss(
    student_logprobs: Tensor,
    rollout_logprobs: Tensor,
    teacher_logprobs: Tensor,
    *,
    coefficient: float = 1.0,
    clip: float | None = None,
    rewards: Tensor | None = None,
) -> Tensor:
    """Distillation by per-token log-ratios: `policy_loss` with A_t = R_t − c·(log q_rollout(y_t) − log p(y_t)).

    As in tinker-cookbook (Thinking Machines, `distillation/train_on_policy.py`): no return-to-go (discount 0), no clip
    by default. On fresh rollouts, the expected gradient at each token, given the prefix, is c times the gradient of its
    reverse KL; effects of a token on later tokens are ignored.

    Args:
        student_logprobs: log q of the sampled tokens by the current student.
        rollout_logprobs: log q of the same tokens at the time of sampling.
        teacher_logprobs: log p of the same tokens.
        coefficient: c, `kl_penalty_coef` in tinker-cookbook.
        clip: as in `policy_loss`.
        rewards: R_t, further advantages of the same tokens, such as a task's reward; None: 0.

    Returns:
        One value per token, same shape as the inputs.

    Raises:
        InputError: as `policy_loss`.
    """
    advantages = coefficient * token_rewards(rollout_logprobs, teacher_logprobs)
    if rewards is not None:
        advantages = advantages + rewards
    return policy_loss(student_logprobs, rollout_logprobs, advantages, clip=clip)


def unbiased_sequence_kl_loss(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    reverse_kl: Tensor,
    counted: Tensor,
    *,
    log_weights: Tensor | None = None,
) -> Tensor:
    """A loss whose sum, divided by the number of *rollouts*, has the expected gradient ∇KL(q‖p) over whole sequences.

        Σ_t Π_{u<t} w_u · KL(q‖p | y_<t)  −  Σ_t Σ_{s>t} (Π_{u≤s} w_u) · r_s · log q(y_t)

    This holds for rollouts of the current student at temperature 1, without top-k or top-p and without dropout.
    Division by the number of tokens, length normalization, a discount, whitening and clipping each introduce a bias, as
    the tests show by enumeration. The variance grows with the length, which is why MiniLLM uses the biased forms.

    Args:
        student_logprobs: [rows, length], log q of the sampled tokens, with gradient.
        teacher_logprobs: [rows, length], log p of the same tokens.
        reverse_kl: [rows, length], Σ_v q(v)·(log q(v) − log p(v)) over the whole vocabulary, with gradient.
        counted: bool [rows, length].
        log_weights: [rows, length], from `importance_log_weights`; None for rollouts of the student alone.

    Returns:
        [rows, length], 0 at uncounted positions. Only the gradient is meaningful; the value is not the KL.

    Raises:
        InputError: shapes differ.
    """
    _check_shapes(student_logprobs=student_logprobs, reverse_kl=reverse_kl, counted=counted)
    # Before any other operation, because 0 times the gradient of a NaN is NaN.
    student_logprobs = torch.where(counted, student_logprobs, 0.0)
    rewards = token_rewards(student_logprobs, teacher_logprobs)
    if log_weights is None:
        log_weights = torch.zeros_like(rewards)
    weighted = cumulative_log_weights(log_weights, counted).clamp(max=_MAX_LOG_WEIGHT).exp() * rewards
    returns = returns_to_go(weighted, counted, length_norm=False)
    prefix_weights = prefix_log_weights(log_weights, counted).clamp(max=_MAX_LOG_WEIGHT).exp()
    single_step = prefix_weights * torch.where(counted, upcast(reverse_kl), 0.0)
    return single_step + policy_loss(student_logprobs, student_logprobs, returns)


def _discounted_suffix_sums(values: Tensor, counted: Tensor, discount: float) -> Tensor:
    """Return G_t = x_t + γ·G_next over counted positions; an uncounted position has the G of the next counted one.

    Computed by doubling: after k rounds each position contains the sum over its next 2^k positions and their discount.
    """
    sums = torch.where(counted, values, 0.0)
    decay = torch.ones_like(sums).masked_fill(counted, discount)
    span = 1
    while span < values.shape[-1]:
        sums = sums + decay * F.pad(sums[..., span:], (0, span))
        decay = decay * F.pad(decay[..., span:], (0, span))
        span *= 2
    return sums


def _shift_left(values: Tensor) -> Tensor:
    """Move values one position to the left, with 0 at the end; [..., length]."""
    return F.pad(values, (0, 1))[..., 1:]


def _floor(logprobs: Tensor) -> Tensor:
    return upcast(logprobs).clamp(min=LOG_FLOOR)


def _check_shapes(**tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise InputError(f"Shapes differ: {shapes}; pass all tensors for the same tokens.")


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise InputError(f"'{name}' is {value:g}; give a number above 0.")


def _check_share(**values: float) -> None:
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise InputError(f"'{name}' is {value:g}; give a number from 0 to 1.")
