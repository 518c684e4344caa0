"""A student that learns to compute with 4-bit weights (quantization-aware distillation), with torchao.

method: { kind: custom, path: "tests.examples.quantized_student:QuantizedStudent", support: { kind: topk, k: 64 } }

Training and evaluation use the rounded weights; the optimizer changes the full ones, which `model/`
contains. `quantize(model)` gives the trained student back.
"""

import torch
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

from rayk import Experience, Loss, Method
from rayk.losses import linear_divergence

GROUP = 16
"""Numbers of a row of weights that share a scale; it divides the widths of all layers."""


def quantize(model):
    """Let the linear layers of `model`, except the head, round their weights to 4 bits in each forward pass."""
    config = QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=GROUP), step="prepare")
    quantize_(model, config, lambda layer, name: isinstance(layer, torch.nn.Linear) and "lm_head" not in name)


class QuantizedStudent(Method):
    """Forward KL at temperature 1 between the teacher and the student with rounded weights."""

    def start(self, student):
        quantize(student.model)

    async def prepare(self, batch):
        return Experience(batch, await self.teacher.ascore(batch, self.settings.support))

    def loss(self, student, experience):
        hidden = student.hidden(experience.batch)
        return Loss(linear_divergence(hidden, student.head, experience.signals, "forward_kl"))
