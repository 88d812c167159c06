"""Shared set-up: the repository on the path, one hypothesis profile, small random models."""
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("fixed")


def small(model_type, dtype=torch.float32, seed=0, attention=None, **changes):
    """A random causal LM of a type: width 64, MLP 128, two blocks, unless its config says other."""
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(seed)
    sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                 num_attention_heads=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=0)
    config = AutoConfig.for_model(model_type, **{**sizes, **changes})
    return randomize(AutoModelForCausalLM.from_config(config, attn_implementation=attention), dtype)


def llama(dtype=torch.float32, layers=2, seed=0, **changes):
    """A random LLaMA: RMSNorm, SwiGLU, 4 query heads on 2 key/value heads."""
    return small("llama", dtype, seed,
                 **{"num_hidden_layers": layers, "num_key_value_heads": 2, **changes})


def opt(dtype=torch.float32, layers=2, seed=0, **changes):
    """A random OPT: LayerNorm with bias, biased Linears, a ReLU MLP."""
    return small("opt", dtype, seed, **{"num_hidden_layers": layers, "ffn_dim": 128, "dropout": 0.0,
                                        "word_embed_proj_dim": 64, **changes})


def randomize(model, dtype):
    """Weights large enough for every layer to matter, gains spread over two octaves.

    Gains are multiples of 1/16, so that 1 + gain can be divided by powers of two exactly. Buffers
    (rotary tables) stay float32, as from_pretrained leaves them.
    """
    for name, p in model.named_parameters():
        if p.ndim == 1 and name.endswith("weight"):
            p.data = torch.exp2(torch.rand_like(p) * 2 - 1).mul(16).round().div(16)
        elif p.ndim == 1:
            p.data = torch.randn_like(p) * 0.1
        else:
            p.data = torch.randn_like(p) * p.shape[-1] ** -0.5
        p.data = p.data.to(dtype)
    return model.eval()


class Mlp(nn.Module):
    """norm -> up -> activation -> down; `also` may read the norm's output as a second branch."""

    def __init__(self, activation=nn.functional.relu, also=None):
        super().__init__()
        self.norm, self.activation, self.also = nn.LayerNorm(32), activation, also
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, hidden_states, shift=0):
        x = self.norm(hidden_states)
        y = self.down(self.activation(self.up(x)))
        return hidden_states + shift + y + (0 if self.also is None else self.also(x))


class Toy(nn.Module):
    """A model that is all its own: an embedding, two blocks, and run(model, x, tokens)."""

    def __init__(self, run, *blocks):
        from transformers import PreTrainedConfig
        super().__init__()
        self.config, self.run, self.device = PreTrainedConfig(), run, torch.device("cpu")
        self.embedding = nn.Embedding(96, 32)
        self.blocks = nn.ModuleList(blocks or [Mlp(), Mlp()])

    @property
    def base_model(self):
        return self

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache=False):
        return self.run(self, self.embedding(input_ids), input_ids)


@pytest.fixture
def tokens():
    return torch.randint(0, 96, (8, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(ROOT / "tinylm")


@pytest.fixture(scope="session")
def folder(tokenizer, tmp_path_factory):
    """A small full-precision LLaMA with a tokenizer and text, as a user would have it on disk."""
    path = tmp_path_factory.mktemp("model") / "small"
    model = llama(layers=1, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                  num_attention_heads=2)
    model.generation_config.update(do_sample=True, top_p=0.9)
    model.save_pretrained(path)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(path)
    (path / "calib.txt").write_text("".join(f"The value of item {i} is {i * 7 % 31}.\n"
                                            for i in range(400)))
    return path
