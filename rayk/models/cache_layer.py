"""A layer of transformers' KV cache that grows without copies. Import it lazily: it imports transformers."""

from torch import Tensor
from transformers.cache_utils import DynamicLayer


class ReservedLayer(DynamicLayer):
    """Keys and values of a layer, with memory for the next tokens behind those of the cached ones.

    Transformers' own layer copies all keys and values at each token.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, room: int):
        """
        Args:
            room: number of tokens for which memory is reserved whenever there is none.
        """
        super().__init__()
        self._room = room
        self._reserved: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append the next tokens' keys and values, [rows, heads, tokens, width]; return those of all tokens."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._reserved is None:
            self.lazy_initialization(key_states, value_states)
        if self._reserved is None or end > self._reserved[0].shape[-2]:
            self._reserved = self._grown(self.keys, key_states, end), self._grown(self.values, value_states, end)
        for reserved, states in zip(self._reserved, (key_states, value_states), strict=True):
            reserved[:, :, start:end] = states
        self.keys, self.values = (reserved[:, :, :end] for reserved in self._reserved)
        return self.keys, self.values

    def _grown(self, cached: Tensor, states: Tensor, end: int) -> Tensor:
        """Return memory for `end` tokens and the room behind them, with the cached ones."""
        rows, heads, _, width = states.shape
        memory = states.new_empty(rows, heads, end + self._room, width)
        if cached.numel():
            memory[:, :, : cached.shape[-2]] = cached
        return memory
