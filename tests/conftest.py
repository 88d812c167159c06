"""Shared set-up: the repository on the path, one hypothesis profile, small random models."""
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("fixed")


def llama(dtype=torch.float32, layers=2, seed=0, **changes):
    """A random LLaMA: RMSNorm, SwiGLU, 4 query heads on 2 key/value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    config = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
                  num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    return randomize(LlamaForCausalLM(LlamaConfig(**{**config, **changes})), dtype)


def opt(dtype=torch.float32, layers=2, seed=0, **changes):
    """A random OPT: LayerNorm with bias, biased Linears, a ReLU MLP."""
    from transformers import OPTConfig, OPTForCausalLM
    torch.manual_seed(seed)
    config = dict(vocab_size=96, hidden_size=64, ffn_dim=128, num_hidden_layers=layers,
                  num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=64,
                  dropout=0.0, activation_function="relu")
    return randomize(OPTForCausalLM(OPTConfig(**{**config, **changes})), dtype)


def randomize(model, dtype):
    """Weights large enough for every layer to matter, gains spread over two octaves.

    Buffers (rotary tables) stay float32, as from_pretrained leaves them.
    """
    for name, p in model.named_parameters():
        if p.ndim == 1 and name.endswith("weight"):
            p.data = torch.exp2(torch.rand_like(p) * 2 - 1)
        elif p.ndim == 1:
            p.data = torch.randn_like(p) * 0.1
        else:
            p.data = torch.randn_like(p) * p.shape[-1] ** -0.5
        p.data = p.data.to(dtype)
    return model.eval()


@pytest.fixture
def tokens():
    return torch.randint(0, 96, (8, 24), generator=torch.Generator().manual_seed(0))
