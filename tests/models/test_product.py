import pytest
import torch

from rayk.models import Head
from rayk.models.product import _Float32Product, keeps_float32_sums, linear_float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_on_a_cpu_are_the_rounded_product_of_the_factors(dtype, autocast):
    hidden, weight, bias = torch.randn(5, 8, dtype=dtype), torch.randn(11, 8), torch.randn(11)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        computed = linear_float32(hidden, weight, bias)
    narrow = torch.bfloat16 if autocast else dtype
    expected = torch.nn.functional.linear(hidden.to(narrow), weight.to(narrow), bias.to(narrow)).float()
    assert not keeps_float32_sums(hidden)
    assert torch.equal(computed, expected)


def test_a_gpus_product_has_float32_sums_and_gradients_in_the_dtype_of_the_factors():
    # Only shapes and types: the operation is not implemented on CPUs.
    hidden, weight = (torch.empty(n, 8, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (5, 11))
    logits = _Float32Product.apply(hidden, weight)
    assert (logits.dtype, logits.shape) == (torch.float32, (5, 11))
    logits.sum().backward()
    assert (hidden.grad.dtype, hidden.grad.shape) == (torch.bfloat16, (5, 8))
    assert (weight.grad.dtype, weight.grad.shape) == (torch.bfloat16, (11, 8))


def test_a_head_is_copied_once_to_a_device():
    head = Head(torch.randn(11, 8), torch.randn(11))
    there = head.to("meta")
    assert there.weight.device.type == there.bias.device.type == "meta"
    assert head.to("meta") is there
