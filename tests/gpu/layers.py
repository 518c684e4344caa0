"""Attention: every implementation, in float32 and bfloat16, padded and packed, and compiled layers."""

import copy
import importlib.util

import torch

from rayk.config import TrainingConfig
from rayk.models import final_hidden
from rayk.models.compilation import compile_layers
from rayk.training.optimizer import make_optimizer
from tests.gpu.scale import Scale, Skip, ensure, relative


def states(scale: Scale, model, **changes) -> torch.Tensor:
    batch = scale.batch(**changes)
    with torch.no_grad():
        return batch.counted(final_hidden(model, batch.input_ids, batch.attention_mask)).float()


def packed_rows_equal_single_rows(scale: Scale) -> str:
    model, lengths = scale.model(), (33, 120, 64, 7)
    packed = states(scale, model)
    batch, singles = scale.batch(), []
    for row in range(len(lengths)):
        one = batch.select([row])
        with torch.no_grad():
            singles.append(one.counted(final_hidden(model, one.input_ids, one.attention_mask)))
    return ensure(relative(packed, torch.cat(singles)), 2e-3 if scale.is_gpu else 1e-5, "difference")


def eager_attention_equals_sdpa(scale: Scale) -> str:
    figures = []
    for dtype, limit in ((torch.float32, 5e-3), (torch.bfloat16, 0.1)):
        found, expected = (states(scale, scale.model(kind, dtype)) for kind in ("eager", "sdpa"))
        figures.append(ensure(relative(found, expected), limit, str(dtype).removeprefix("torch.")))
    return ", ".join(figures)


def flash_attention_equals_sdpa(scale: Scale) -> str:
    if not scale.is_gpu or importlib.util.find_spec("flash_attn") is None:
        raise Skip("flash_attn is not installed")
    found, expected = (states(scale, scale.model(kind, torch.bfloat16)) for kind in ("flash_attention_2", "sdpa"))
    return ensure(relative(found, expected), 0.1, "difference")


def bfloat16_states_are_close_to_float32(scale: Scale) -> str:
    model = scale.model()
    expected = states(scale, model)
    return ensure(relative(states(scale, model.bfloat16()), expected), 0.15, "difference")


def compiled_layers_equal_plain_ones(scale: Scale) -> str:
    plain = scale.model()
    compiled = copy.deepcopy(plain)
    torch.compiler.reset()
    compile_layers(compiled, backend="inductor" if scale.is_gpu else "eager")
    differences = []
    for lengths in ((33, 120, 64, 7), (90, 5), (12, 12, 40)):
        batch, results = scale.batch(lengths), []
        for model in (plain, compiled):
            hidden = batch.counted(final_hidden(model, batch.input_ids, batch.attention_mask))
            hidden.float().square().mean().backward()
            weight = model.model.layers[0].mlp.up_proj.weight
            results.append((hidden.detach(), weight.grad.clone()))
            model.zero_grad()
        differences += [relative(found, expected) for expected, found in zip(*results, strict=True)]
    return ensure(max(differences), 5e-3, "difference of states and gradients")


def optimizers_agree(scale: Scale) -> str:
    if importlib.util.find_spec("torchao") is None:
        raise Skip("torchao is not installed")
    torch.manual_seed(0)
    first = torch.nn.Linear(512, 512).to(scale.device)
    other, target = copy.deepcopy(first), torch.randn(512, 512, device=scale.device)
    for module, name in ((first, "adamw"), (other, "adamw_8bit")):
        optimizer = make_optimizer(list(module.parameters()), TrainingConfig(learning_rate=0.01, optimizer=name))
        torch.manual_seed(1)
        for _ in range(20):
            inputs = torch.randn(64, 512, device=scale.device)
            (module(inputs) - inputs @ target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return ensure(relative(other.weight.detach(), first.weight.detach()), 0.1, "8-bit weights after 20 steps differ by")


CHECKS = [
    packed_rows_equal_single_rows, eager_attention_equals_sdpa, flash_attention_equals_sdpa,
    bfloat16_states_are_close_to_float32, compiled_layers_equal_plain_ones, optimizers_agree,
]  # fmt: skip
