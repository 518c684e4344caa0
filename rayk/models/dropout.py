"""Training without dropout."""

from torch import nn


def disable_dropout(model: nn.Module) -> None:
    """Disable dropout in a model in training mode; gradient checkpointing continues to work.

    All modules are set to eval mode, except the layers that transformers checkpoints in training mode only. In such a
    layer itself, dropout probabilities (`dropout`, `activation_dropout`, …) are set to 0.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        module.training = isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
        if module.training:
            for name, value in vars(module).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(module, name, 0.0)
