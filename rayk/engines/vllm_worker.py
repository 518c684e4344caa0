"""What rayk adds to vLLM's worker processes, which load this module by its name."""

from typing import Any

from safetensors import safe_open


class WeightUpdateExtension:
    """Mixed into vLLM's worker (its argument `worker_extension_cls`)."""

    reload_weights: Any
    get_model: Any
    """The worker's own, as the former."""

    def load_weights_file(self, path: str) -> None:
        """Compute with the weights of the safetensors file `path` from now on; each worker takes its shard of them.

        `reload_weights` keeps the tensors where they are, which CUDA graphs and kernels with a layout of their own
        need, and which vLLM's `load_weights` alone does not do.
        """
        with safe_open(path, "pt") as file:
            names = file.keys()
            self.reload_weights(weights_iterator=((name, file.get_tensor(name)) for name in names))
        self._pack_heads_again()

    def _pack_heads_again(self) -> None:
        """On the CPU a head computes with a packed copy of its weight. Where that is the embedding's, `reload_weights`
        finds nothing of the head's own to load, and leaves the copy as it was."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            for module in self.get_model().modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)
