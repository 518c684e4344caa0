"""Training steps of a student: distillation in float32 and with autocast, and FSDP2 on one rank."""

import socket

import torch
import torch.distributed as dist
from torch import nn

from rayk.config import TrainingConfig
from rayk.losses import linear_divergence, token_mean
from rayk.models import final_hidden, get_head
from rayk.training.optimizer import make_optimizer, set_learning_rate
from tests.gpu.scale import Scale, ensure, relative

STEPS = 20


class Step(nn.Module):
    """Body, head and loss in one forward pass, as in training."""

    def __init__(self, model, precision: torch.dtype = torch.float32):
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, batch, teacher) -> torch.Tensor:
        with torch.autocast(batch.input_ids.device.type, self.precision, enabled=self.precision != torch.float32):
            states = final_hidden(self.model, batch.input_ids, batch.attention_mask)
        hidden = batch.counted(states).to(self.precision)
        return token_mean(linear_divergence(hidden, get_head(self.model), teacher), batch.counted_tokens)


def teacher_logits(scale: Scale, batch) -> torch.Tensor:
    with torch.no_grad():
        model = scale.model(seed=1)
        hidden = batch.counted(final_hidden(model, batch.input_ids, batch.attention_mask))
        return get_head(model).logits(hidden)


def fit(scale: Scale, step: nn.Module, optimizer_name: str = "adamw") -> list[float]:
    """Train on the same rows for `STEPS` steps; return the losses."""
    batch = scale.batch()
    teacher = teacher_logits(scale, batch)
    settings = TrainingConfig(learning_rate=1e-3, optimizer=optimizer_name)
    optimizer, losses = make_optimizer(list(step.parameters()), settings), []
    for _ in range(STEPS):
        set_learning_rate(optimizer, 1e-3)
        loss = step(batch, teacher)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def a_student_learns_in_float32_and_bfloat16(scale: Scale) -> str:
    figures, first = [], []
    for precision in (torch.float32, torch.bfloat16):
        losses = fit(scale, Step(scale.model().train(), precision))
        name = str(precision).removeprefix("torch.")
        ensure(losses[-1] / losses[0], 0.9, f"share of the first loss after {STEPS} steps in {name}")
        figures.append(f"{name} {losses[0]:.3f} → {losses[-1]:.3f}")
        first.append(losses[0])
    ensure(abs(first[1] / first[0] - 1), 0.05, "difference of the first losses")
    return ", ".join(figures)


def fsdp_on_one_rank_equals_the_plain_student(scale: Scale) -> str:
    from torch.distributed.fsdp import fully_shard

    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"tcp://localhost:{free.getsockname()[1]}"
    backend = "nccl" if scale.is_gpu else "gloo"
    dist.init_process_group(backend, init_method=address, rank=0, world_size=1)
    try:
        plain, sharded = Step(scale.model().train()), Step(scale.model().train())
        for layer in sharded.model.model.layers:
            fully_shard(layer)
        fully_shard(sharded)
        expected, found = (torch.tensor(fit(scale, step)) for step in (plain, sharded))
    finally:
        dist.destroy_process_group()
    return f"{backend}, " + ensure(relative(found, expected), 5e-3, "difference of 20 losses")


CHECKS = [a_student_learns_in_float32_and_bfloat16, fsdp_on_one_rank_equals_the_plain_student]
