"""Check that a model can be loaded, from its configuration and file sizes and before anything is started."""

from typing import Any

from rayk.errors import InputError
from rayk.models.weight_files import check_weight_files


def check_student_model(settings: Any, name: str) -> None:
    """Check that the student's weights are complete and can be trained.

    Raises:
        InputError: they are quantized, or a weight file is missing or damaged.
    """
    if method := quantization_method(settings):
        raise InputError(
            f"student.model '{name}' is quantized ({method}), and quantized weights cannot be trained; give the "
            "checkpoint that it was made from."
        )
    check_weight_files(name)


def check_teacher_model(settings: Any, name: str, label: str) -> None:
    """Check that transformers can load a teacher's weights on this machine.

    Args:
        label: the teacher's name in messages.

    Raises:
        InputError: they are quantized in a way that needs a missing package, or a weight file is missing or damaged.
    """
    check_weight_files(name)
    method = quantization_method(settings)
    if not method:
        return
    from transformers.quantizers.auto import AutoHfQuantizer

    from rayk.models.loading import quiet_loading

    try:
        with quiet_loading():
            quantizer = AutoHfQuantizer.from_config(settings.quantization_config, pre_quantized=True)
            quantizer.validate_environment(device_map=None, dtype=None)
    except Exception as error:  # each quantizer raises its own types
        raise InputError(
            f"{label} '{name}' is quantized ({method}), and transformers cannot load it here: "
            f"{str(error).splitlines()[0]}; install what is missing, or use engine kind 'vllm' or the original "
            "checkpoint."
        ) from error


def quantization_method(settings: Any) -> str:
    """Return the method by which a model's weights are quantized; "" if they are not."""
    quantization = getattr(settings, "quantization_config", None)
    if not quantization:
        return ""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    return str(getattr(method, "value", method) or "unknown method")
