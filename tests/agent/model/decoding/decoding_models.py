"""Models to decode with: random small shapes with every weight drawn anew, and one that was trained for a moment."""

import random

import torch

from agent.model import V3, V3Config, Yarn


def drawn(seed: int, depth: int = 0) -> V3Config:
    """A random small configuration; the seed decides everything."""
    r = random.Random(seed)
    groups, layers = r.choice([1, 2, 4]), r.choice([1, 2, 3])
    kept, per_group = r.randint(1, groups), r.choice([2, 3, 4])
    return V3Config(
        vocab_size=r.choice([50, 96]),
        hidden_size=r.choice([16, 40, 57]),
        num_hidden_layers=layers,
        first_k_dense_replace=r.randint(0, layers),
        num_attention_heads=r.choice([1, 3, 4]),
        qk_nope_head_dim=r.choice([5, 12]),
        qk_rope_head_dim=r.choice([2, 8, 16]),
        v_head_dim=r.choice([4, 11]),
        kv_lora_rank=r.choice([8, 21]),
        intermediate_size=r.choice([24, 70]),
        moe_intermediate_size=r.choice([10, 24]),
        n_routed_experts=groups * per_group,
        num_experts_per_tok=r.randint(1, kept * per_group),
        q_lora_rank=r.choice([None, 13]),
        n_shared_experts=r.choice([0, 1, 2]),
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=r.random() < 0.5,
        attention_bias=r.random() < 0.5,
        mtp_depth=depth,
        mtp_after_norm=r.random() < 0.5,
        yarn=Yarn(factor=r.choice([1.5, 40.0]), original_max_position_embeddings=32) if r.random() < 0.5 else None,
    )


def filled(config: V3Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> V3:
    """A model with all parameters and router biases drawn anew, large enough that each of them matters."""
    model, generator = V3(config, dtype), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        flat = parameter.dim() == 1
        parameter.data.normal_(float(flat), 0.2 if flat else parameter.shape[-1] ** -0.5, generator=generator)
    for router in model.routers():
        router.router_bias.normal_(0.0, 0.05, generator=generator)
    return model


def ids(config: V3Config, count: int, seed: int = 0) -> torch.Tensor:
    """int64 [count]."""
    return torch.randint(0, config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def trained(config: V3Config, steps: int = 40) -> tuple[V3, list[float], list[float]]:
    """A model after a moment on sentences of few words, and its losses: main and of the MTP modules, by step."""
    model, generator = V3(config), torch.Generator().manual_seed(3)
    words = torch.randint(0, config.vocab_size, (6, 5), generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    main, mtp = [], []
    for _ in range(steps):
        picks = torch.randint(0, len(words), (8, 10), generator=generator)
        result = model.loss(words[picks].flatten(1)[:, : 33 + config.mtp_depth])
        optimizer.zero_grad()
        torch.autograd.backward(result.total)
        optimizer.step()
        main.append(float(result.main))
        mtp.append(float(result.mtp))
    return model, main, mtp
