"""What rayk adds to vLLM's worker processes, which load this module by its name."""

from typing import Any

from safetensors import safe_open


class TakesWeights:
    """Mixed into vLLM's worker (its argument `worker_extension_cls`)."""

    reload_weights: Any
    """The worker's own."""

    def take_over_weights(self, path: str) -> None:
        """Compute with the weights of the safetensors file `path` from now on; each worker takes its shard of them.

        `reload_weights` keeps the tensors where they are, which CUDA graphs and kernels with a layout of their own
        need, and which vLLM's `load_weights` alone does not do.
        """
        with safe_open(path, "pt") as file:
            names = file.keys()
            self.reload_weights(weights_iterator=((name, file.get_tensor(name)) for name in names))
