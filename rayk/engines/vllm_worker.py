"""rayk's methods of vLLM's worker processes: score prompts, and replace the weights. vLLM imports this module by its
name in each worker."""

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from rayk.engines.vllm_scorer import attach_scorer

WORKER_EXTENSION = "rayk.engines.vllm_worker.WorkerExtension"
"""For vLLM's argument `worker_extension_cls`."""
_SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class WorkerExtension:
    """Mixed into vLLM's worker class by `worker_extension_cls`."""

    model_runner: Any
    """An attribute of the worker."""
    reload_weights: Any
    """A method of the worker."""
    get_model: Any
    """A method of the worker."""

    def ping(self) -> None:
        """Return at once: vLLM's processes react, and each has finished its last step."""

    def start_scoring(self) -> None:
        """Return the signals that requests ask for (`rayk.engines.vllm_task`) with their outputs."""
        attach_scorer(self.model_runner)

    def load_weights_file(self, path: str) -> None:
        """Replace the model's weights by those of the safetensors file `path`; each worker loads its own shard.

        `reload_weights` keeps the tensors' addresses, which CUDA graphs and kernels with their own layout require;
        vLLM's `load_weights` alone does not.
        """
        with safe_open(path, "pt") as file:
            names = file.keys()
            self.reload_weights(weights_iterator=((name, file.get_tensor(name)) for name in names))
        self._repack_heads()

    def _repack_heads(self) -> None:
        """Pack the head's weight again on a CPU, where vLLM computes with a packed copy of it. If the head shares the
        embedding's weight, `reload_weights` finds no weight of the head and does not replace the copy."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            for module in self.get_model().modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)


def write_safetensors(file: BinaryIO, weights: Mapping[str, Tensor]) -> None:
    """Write `weights` to an open file in the safetensors format. safetensors' own `save_file` creates a new file and
    renames it, so it cannot write to a file without a name."""
    header, end = {}, 0
    for name, tensor in weights.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end],
        }  # fmt: skip
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for tensor in weights.values():
        file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    file.flush()
