"""A decoder as Llama has it, for benchmarks: RMSNorm, attention, SwiGLU; its layers, a head and the loss."""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

WINDOW = 1024
VOCABULARY = 4096
HEAD = 64


class Layer(nn.Module):
    """[windows, WINDOW, hidden] -> the same."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        wide = 11 * hidden // 4
        self.before, self.between = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.gate, self.up = nn.Linear(hidden, wide, bias=False), nn.Linear(hidden, wide, bias=False)
        self.down = nn.Linear(wide, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.between(x)
        return x + cast(Tensor, self.down(F.silu(self.gate(y)) * self.up(y)))


class Decoder(nn.Module):
    """int64 [windows, WINDOW] -> the loss of the next token."""

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.layers = nn.Sequential(*(Layer(hidden) for _ in range(layers)))
        self.last = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.last(self.layers(self.embedding(tokens))))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
