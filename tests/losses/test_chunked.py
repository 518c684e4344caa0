"""The chunked functions equal the dense ones in values and gradients, for any head, chunk size and dtype."""

import pytest
import torch
from loss_cases import random_head, random_logits, signals_of

from rayk import losses
from rayk.errors import InputError
from rayk.losses import head_product
from rayk.models import Head

N, D, V, K = 9, 5, 23, 4
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "all": {"bias": True, "scale": 1.7, "softcap": 3.0},
}
TARGETS = torch.arange(N) * 2


def dense_logits(hidden, head):
    logits = hidden @ head.weight.t() + (0 if head.bias is None else head.bias)
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def dense_log_probs(hidden, head, ids, targets, temperature):
    logits = dense_logits(hidden, head)
    log_q = (logits / temperature).log_softmax(1)
    tail = log_q.scatter(1, ids, -torch.inf).logsumexp(1)
    return log_q.gather(1, ids), tail, logits.log_softmax(1).gather(1, targets[:, None])[:, 0]


def some_ids(k=K):
    ids = random_logits(N, V, 5).argsort(1)[:, :k]
    ids[0, 0] = TARGETS[0] if TARGETS[0] not in ids[0] else ids[0, 0]  # one target among the ids, at least
    return ids


def gradients(outputs, inputs, weights_seed=9):
    """Gradients of a random combination of all outputs."""
    total = sum(
        (output * random_logits(output.numel(), 1, weights_seed + i)[:, 0].view_as(output).to(output.dtype)).sum()
        for i, output in enumerate(outputs)
    )
    return torch.autograd.grad(total, inputs)


def inputs_of(hidden, head):
    return [part for part in (hidden, head.weight, head.bias) if part is not None and part.requires_grad]


@pytest.fixture(params=["kept", "recomputed", "partly kept"])
def memory(request, monkeypatch):
    """The amount of the forward pass that is kept for the backward pass."""
    kept = {"kept": 1 << 20, "recomputed": 0, "partly kept": 4 * V * 8}[request.param]
    monkeypatch.setitem(head_product.KEPT_BYTES, "cpu", kept)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("parts", HEADS)
def test_log_probs_and_gradients_are_those_of_dense_autograd(parts, temperature, memory):
    hidden, head, ids = random_logits(N, D).requires_grad_(), random_head(V, D, **HEADS[parts]), some_ids()
    ours = losses.linear_log_probs(hidden, head, ids, TARGETS, temperature, chunk_tokens=4)
    dense = dense_log_probs(hidden, head, ids, TARGETS, temperature)
    for own, other in zip(ours, dense, strict=True):
        torch.testing.assert_close(own, other)
    inputs = inputs_of(hidden, head)
    for own, other in zip(gradients(ours, inputs), gradients(dense, inputs), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("parts", HEADS)
def test_the_gradient_agrees_with_finite_differences(parts, temperature):
    hidden, head, ids = random_logits(3, 4).requires_grad_(), random_head(7, 4, **HEADS[parts]), some_ids(2)[:3] % 7
    ids[:, 1] = (ids[:, 0] + 1) % 7

    def of(hidden, weight, bias=None):
        return losses.linear_log_probs(
            hidden, Head(weight, bias, head.scale, head.softcap), ids, TARGETS[:3], temperature, chunk_tokens=2
        )

    assert torch.autograd.gradcheck(of, tuple(inputs_of(hidden, head)))


@pytest.mark.parametrize("teacher_kind", ["dense", "sparse"])
@pytest.mark.parametrize("name", list(losses.DIVERGENCES))
def test_every_divergence_equals_its_dense_function(name, teacher_kind, memory):
    hidden = random_logits(N, D, dtype=torch.float32).requires_grad_()
    head = random_head(V, D, dtype=torch.float32, bias=True, scale=0.5)
    teacher = random_logits(N, V - 2, 7, dtype=torch.float32)
    said = teacher if teacher_kind == "dense" else signals_of(teacher, K, temperatures=(1.0, 2.0))
    inputs = inputs_of(hidden, head)
    for temperature in (1.0, 2.0):
        ours, cross_entropy = losses.linear_divergence(
            hidden, head, said, name, temperature=temperature, targets=TARGETS, chunk_tokens=4
        )
        logits = dense_logits(hidden, head)
        dense = losses.divergence(name, logits, said, temperature=temperature)
        dense_ce = torch.nn.functional.cross_entropy(logits, TARGETS, reduction="none")
        torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(cross_entropy, dense_ce, atol=1e-5, rtol=1e-5)
        for own, other in zip(
            gradients((ours, cross_entropy), inputs), gradients((dense, dense_ce), inputs), strict=True
        ):
            torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)
        alone = losses.linear_divergence(hidden, head, said, name, temperature=temperature)
        torch.testing.assert_close(alone, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_hard", [False, True], ids=["divergence alone", "with cross-entropy"])
@pytest.mark.parametrize("parts", HEADS)
def test_gradients_of_full_distributions_are_those_of_dense_autograd(parts, is_hard, memory):
    hidden, head, teacher = random_logits(N, D).requires_grad_(), random_head(V, D, **HEADS[parts]), random_logits(N, V)
    for temperature in (1.0, 2.0):
        ours = losses.linear_divergence(
            hidden, head, teacher, "reverse_kl", temperature=temperature, targets=TARGETS, chunk_tokens=4
        )
        logits = dense_logits(hidden, head)
        dense = losses.reverse_kl(logits, teacher, temperature=temperature)
        pair = dense, torch.nn.functional.cross_entropy(logits, TARGETS, reduction="none")
        torch.testing.assert_close(ours, pair)
        inputs, count = inputs_of(hidden, head), 1 + is_hard
        for own, other in zip(gradients(ours[:count], inputs), gradients(pair[:count], inputs), strict=True):
            torch.testing.assert_close(own, other)


def test_full_distributions_in_bfloat16_stay_near_float32(memory):
    hidden = random_logits(N, D, dtype=torch.float32).requires_grad_()
    teacher = random_logits(N, V, dtype=torch.float32)
    head = random_head(V, D, dtype=torch.float32, **HEADS["all"])
    inputs = inputs_of(hidden, head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = losses.linear_divergence(hidden, head, teacher, chunk_tokens=4)
    exact = losses.linear_divergence(hidden, head, teacher, chunk_tokens=4)
    torch.testing.assert_close(ours, exact, atol=0.1, rtol=0.02)
    for own, other in zip(gradients([ours], inputs), gradients([exact], inputs), strict=True):
        assert own.dtype == torch.float32
        assert (own - other).norm() < 0.03 * other.norm()


def test_stored_gradients_are_not_computed_again(monkeypatch):
    calls = 0

    def counted(log_p, log_q):
        nonlocal calls
        calls += 1
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    hidden, head, teacher = random_logits(8, D).requires_grad_(), random_head(V, D), random_logits(8, V, 3)
    for kept, expected in ((4 * 2 * V * 8, 4), (2 * 2 * V * 8, 6), (0, 8)):
        monkeypatch.setitem(head_product.KEPT_BYTES, "cpu", kept)
        calls = 0
        values = losses.linear_divergence(hidden, head, teacher, counted, targets=TARGETS[:8], chunk_tokens=2)
        values[0].sum().backward()
        assert calls == expected


def test_finite_differences_of_the_divergence_itself():
    hidden, head, teacher = random_logits(3, 4).requires_grad_(), random_head(7, 4), random_logits(3, 7, 3)
    for said in (teacher, signals_of(teacher, 2)):
        assert torch.autograd.gradcheck(
            lambda h, w, said=said: losses.linear_divergence(h, Head(w), said, "jensen_shannon", targets=TARGETS[:3]),
            (hidden, head.weight),
        )


def test_options_reach_the_divergence():
    hidden, head, teacher = random_logits(N, D), random_head(V, D), random_logits(N, V, 3)
    ours = losses.linear_divergence(hidden, head, signals_of(teacher, K), "jensen_shannon", beta=0.2)
    dense = losses.jensen_shannon(dense_logits(hidden, head), signals_of(teacher, K), beta=0.2)
    torch.testing.assert_close(ours, dense)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 5, 8, 9, 100, None])
def test_the_chunk_size_changes_nothing(chunk_tokens, memory):
    hidden, head = random_logits(N, D).requires_grad_(), random_head(V, D, bias=True)
    ours = losses.linear_log_probs(hidden, head, some_ids(), TARGETS, chunk_tokens=chunk_tokens)
    whole = losses.linear_log_probs(hidden, head, some_ids(), TARGETS, chunk_tokens=N)
    inputs = inputs_of(hidden, head)
    for own, other in zip((*ours, *gradients(ours, inputs)), (*whole, *gradients(whole, inputs)), strict=True):
        torch.testing.assert_close(own, other)
    teacher = random_logits(N, V, 3)
    torch.testing.assert_close(
        losses.linear_divergence(hidden, head, teacher, chunk_tokens=chunk_tokens),
        losses.forward_kl(dense_logits(hidden, head), teacher),
    )


def test_cross_entropy_is_torchs(memory):
    hidden, head = random_logits(N, D).requires_grad_(), random_head(V, D, bias=True)
    ours = losses.linear_cross_entropy(hidden, head, TARGETS, chunk_tokens=4)
    dense = torch.nn.functional.cross_entropy(dense_logits(hidden, head), TARGETS, reduction="none")
    torch.testing.assert_close(ours, dense)
    inputs = inputs_of(hidden, head)
    for own, other in zip(gradients([ours], inputs), gradients([dense], inputs), strict=True):
        torch.testing.assert_close(own, other)


def test_ids_that_are_the_whole_vocabulary_leave_a_floored_tail(memory):
    hidden, head = random_logits(N, D).requires_grad_(), random_head(V, D)
    ids = torch.arange(V).repeat(N, 1)
    log_q, tail, _ = losses.linear_log_probs(hidden, head, ids)
    assert (tail == losses.LOG_FLOOR).all()
    dense = dense_logits(hidden, head).log_softmax(1)
    torch.testing.assert_close(log_q, dense)
    inputs = inputs_of(hidden, head)
    for own, other in zip(gradients([log_q, tail], inputs), gradients([dense], inputs), strict=True):
        torch.testing.assert_close(own, other)


def test_only_inputs_that_require_gradients_receive_them():
    ids, teacher = some_ids(), signals_of(random_logits(N, V, 3), K)
    hidden, head = random_logits(N, D), random_head(V, D)
    losses.linear_divergence(hidden, head, teacher).sum().backward()
    only_weight = head.weight.grad
    frozen, leaf = Head(head.weight.detach()), hidden.clone().requires_grad_()
    losses.linear_divergence(leaf, frozen, teacher).sum().backward()
    reference = hidden.clone().requires_grad_()
    losses.forward_kl(reference @ head.weight.t(), teacher).sum().backward()
    torch.testing.assert_close(leaf.grad, reference.grad)
    assert only_weight is not None
    assert not losses.linear_log_probs(hidden, frozen, ids)[0].requires_grad
    with torch.no_grad():
        assert not losses.linear_log_probs(leaf, head, ids)[0].requires_grad


def test_a_head_tied_to_the_embedding_gathers_both_gradients():
    tokens = torch.arange(N)
    embedding = random_logits(V, D, 4).requires_grad_()
    teacher = signals_of(random_logits(N, V, 3), K)
    ours = losses.linear_divergence(torch.tanh(embedding[tokens]), Head(embedding), teacher).sum()
    dense = losses.forward_kl(torch.tanh(embedding[tokens]) @ embedding.t(), teacher).sum()
    torch.testing.assert_close(torch.autograd.grad(ours, embedding), torch.autograd.grad(dense, embedding))


def test_a_backward_pass_can_be_run_again():
    hidden, head = random_logits(N, D).requires_grad_(), random_head(V, D)
    value = losses.linear_divergence(hidden, head, signals_of(random_logits(N, V, 3), K), targets=TARGETS)[0].sum()
    first = torch.autograd.grad(value, head.weight, retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(value, head.weight))


@pytest.mark.parametrize("parts", ["plain", "all"])
def test_bfloat16_inputs_stay_near_float32(parts, memory):
    hidden = random_logits(N, D, dtype=torch.bfloat16).requires_grad_()
    head = random_head(V, D, dtype=torch.bfloat16, **HEADS[parts])
    ours = losses.linear_log_probs(hidden, head, some_ids(), TARGETS, chunk_tokens=4)
    assert all(output.dtype == torch.float32 for output in ours)
    wide = [part.detach().float().requires_grad_() for part in inputs_of(hidden, head)]
    wide_head = Head(wide[1], wide[2] if head.bias is not None else None, head.scale, head.softcap)
    dense = dense_log_probs(wide[0], wide_head, some_ids(), TARGETS, 1.0)
    for own, other in zip(ours, dense, strict=True):
        torch.testing.assert_close(own, other, atol=0.15, rtol=0.02)
    for own, other in zip(gradients(ours, inputs_of(hidden, head)), gradients(dense, wide), strict=True):
        assert own.dtype == torch.bfloat16
        assert (own.float() - other).norm() < 0.02 * other.norm()


def test_autocast_runs_the_product_in_bfloat16_and_gives_float32_gradients():
    hidden = random_logits(N, D, dtype=torch.float32).requires_grad_()
    head = random_head(V, D, dtype=torch.float32, bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = losses.linear_log_probs(hidden, head, some_ids(), TARGETS)
        product = torch.nn.functional.linear(hidden, head.weight, head.bias)
    assert product.dtype == torch.bfloat16
    expected = product.float().log_softmax(1).gather(1, some_ids())
    torch.testing.assert_close(ours[0], expected)
    inputs = inputs_of(hidden, head)
    exact = losses.linear_log_probs(hidden, head, some_ids(), TARGETS)
    for own, other in zip(gradients(ours, inputs), gradients(exact, inputs), strict=True):
        assert own.dtype == torch.float32
        assert (own - other).norm() < 0.02 * other.norm()


def test_a_backward_pass_inside_autocast_keeps_the_forward_passes_precision(memory):
    hidden = random_logits(N, D, dtype=torch.float32).requires_grad_()
    head = random_head(V, D, dtype=torch.float32)
    inputs = inputs_of(hidden, head)
    outputs = losses.linear_log_probs(hidden, head, some_ids(), TARGETS)
    exact = gradients(outputs, inputs)
    again = losses.linear_log_probs(hidden, head, some_ids(), TARGETS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gradients(again, inputs)
    for own, other in zip(inside, exact, strict=True):
        torch.testing.assert_close(own, other)


def test_ids_that_are_all_a_mask_leaves_give_finite_gradients(memory):
    """Every token outside the ids has probability 0: the tail is empty though the vocabulary is not."""
    masked = torch.full((V,), -torch.inf)
    masked[:K] = 0.0
    head = Head(random_head(V, D, dtype=torch.float32).weight, masked)
    hidden = random_logits(N, D, dtype=torch.float32).requires_grad_()
    ids = torch.arange(K).repeat(N, 1)
    log_q, tail, _ = losses.linear_log_probs(hidden, head, ids)
    dense = torch.nn.functional.linear(hidden, head.weight[:K]).log_softmax(1)
    torch.testing.assert_close(log_q, dense)
    assert (tail == losses.LOG_FLOOR).all()
    inputs = [hidden, head.weight]
    for own, other in zip(gradients([log_q, tail], inputs), gradients([dense], inputs), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("name", list(losses.DIVERGENCES))
def test_extreme_heads_give_finite_values_and_gradients(name):
    teacher = random_logits(N, V, 3, 200.0, torch.float32)
    masked = torch.zeros(V)
    masked[::2] = -torch.inf
    for said in (teacher, signals_of(teacher, K), signals_of(teacher, V)):
        for head in (random_head(V, D, dtype=torch.float32, scale=100.0),
                     Head(random_head(V, D, dtype=torch.float32).weight, masked)):  # fmt: skip
            hidden = random_logits(N, D, dtype=torch.float32).requires_grad_()
            values = losses.linear_divergence(hidden, head, said, name, targets=TARGETS)
            sum(value.sum() for value in values).backward()
            assert all(value.isfinite().all() for value in values)
            assert hidden.grad.isfinite().all()
            assert head.weight.grad.isfinite().all()


def test_a_tail_far_below_the_ids_is_small_and_not_gone():
    head = Head(torch.tensor([[0.0], [-300.0], [-301.0]]).requires_grad_())
    hidden = torch.ones(1, 1, requires_grad=True)
    _, tail, _ = losses.linear_log_probs(hidden, head, torch.tensor([[0]]))
    assert tail.item() == pytest.approx(-300 + torch.tensor(-1.0).exp().log1p().item(), abs=1e-3)
    tail.backward()
    torch.testing.assert_close(head.weight.grad[:, 0], torch.tensor([-1.0, 0.7310586, 0.2689414]))


def test_the_logits_are_the_heads_own():
    hidden = random_logits(N, D, dtype=torch.float32)
    for parts in HEADS.values():
        head = random_head(V, D, dtype=torch.float32, **parts)
        ours = losses.linear_log_probs(hidden, head, torch.arange(V).repeat(N, 1))[0]
        torch.testing.assert_close(ours, head.logits(hidden).log_softmax(1))


def test_full_logits_are_never_stored(monkeypatch):
    """No operation creates a tensor as large as [tokens, vocab], with either kind of teacher."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    monkeypatch.setitem(head_product.KEPT_BYTES, "cpu", 0)
    tokens, vocab = 64, 50
    hidden, head = random_logits(tokens, D).requires_grad_(), random_head(vocab, D)
    teacher = random_logits(tokens, vocab, 3)
    signals = signals_of(teacher, 2)
    with Watch():
        losses.linear_divergence(hidden, head, signals, targets=torch.zeros(tokens, dtype=torch.long),
                                 chunk_tokens=8)[0].sum().backward()  # fmt: skip
    assert largest <= max(8 * vocab, tokens * D)
    largest = 0
    with Watch():
        losses.linear_divergence(hidden, head, teacher, chunk_tokens=8).sum().backward()
    assert largest <= max(8 * vocab, tokens * D)


def test_no_tokens_is_an_empty_result_with_a_zero_gradient():
    hidden, head = torch.zeros(0, D, requires_grad=True), random_head(V, D, dtype=torch.float32, bias=True)
    teacher = torch.zeros(0, V)
    for said in (teacher, signals_of(teacher, K)):
        divergence, cross_entropy = losses.linear_divergence(hidden, head, said, targets=TARGETS[:0])
        assert divergence.shape == cross_entropy.shape == (0,)
        (divergence.sum() + cross_entropy.sum()).backward()
    assert (head.weight.grad == 0).all()


def test_wrong_input_is_refused_in_a_sentence():
    hidden, head, teacher = random_logits(N, D), random_head(V, D), random_logits(N, V, 3)
    with pytest.raises(InputError, match="did you mean 'reverse_kl'"):
        losses.linear_divergence(hidden, head, teacher, "reverse")
    with pytest.raises(InputError, match="no option 'gamma'"):
        losses.linear_divergence(hidden, head, teacher, gamma=1.0)
    with pytest.raises(InputError, match="vocabulary has 24 tokens"):
        losses.linear_divergence(hidden, head, random_logits(N, V + 1))
    with pytest.raises(InputError, match="vocabulary has 24 tokens"):
        losses.linear_divergence(hidden, head, signals_of(random_logits(N, V + 1), K))
    with pytest.raises(InputError, match="values are for 3 tokens"):
        losses.linear_divergence(hidden, head, teacher[:3])
    with pytest.raises(InputError, match="temperature is 0"):
        losses.linear_log_probs(hidden, head, some_ids(), temperature=0.0)
    with pytest.raises(InputError, match="chunk_tokens is -1"):
        losses.linear_divergence(hidden, head, teacher, chunk_tokens=-1)
