"""Every causal LM of transformers, small and random: quantize -> save -> load -> the same logits.

    python tests/test_architectures.py [TYPE ...]     the table of these types, or of all: then
                                                      (minutes) kept for RESULTS.md
    python -m pytest tests/test_architectures.py      a few of them

The builder knows sizes by the names configurations give them, and no model type. A row: the type;
the share of the decoder blocks' weights that is packed, and of fused experts' weights; groups of
Linears; folds proven; groups left at s = 1 and why; what stays and why; the result. "ok" means that
every proven fold, done with powers of two, leaves the logits of the whole model as they are, and
that the quantized model has bitwise equal logits after save and load.
"""
import copy
import os
import re
import sys
import tempfile
import time
from collections import Counter
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import pytest
import torch
import transformers
from conftest import ROOT       # which puts the repository on the path
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

import awq
import blocks
from eval import markdown, write_json

TYPES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# those of which no other test saves and loads the like (llama, opt, gpt2, mixtral)
SUBSET = "gemma2 falcon phi qwen2_moe deepseek_v3 gpt_oss aria_text nemotron_h".split()
LARGE = 50_000_000  # parameters: what the builder did not make small is not tried

SIZES = {           # attribute names of configurations: the small value
    96: r"(unpadded_|pronunciation_|shape_)?vocab_size|vocab_size_per_layer_input",
    64: r"(\w+_)?(hidden_size|embed_dim|emb_dim|embedding_size)|n_embd|d_model|lru_width"
        r"|word_embed_proj_dim|dim_model_base|embedding_dim|adapter_in\w*|max_position_embeddings"
        r"|n_positions|max_seq_len|n_ctx|max_\w+_positions|context_length|model_max_length",
    128: r"(\w+_)?(intermediate_size\w*|ffn_hidden_size|ffn_dim)|dff|dim_ff|d_inner"
         r"|feed_forward_size|mamba_d_ssm",
    2: r"num_hidden_layers|n_layers?|num_layers\w*|(num_)?\w*coder_layers|num_blocks"
       r"|num_experts_per_tok(en)?|moe_(top_?)?k|sliding_window_pattern|global_attn_every_n_layers",
    4: r"(\w+_)?(num_attention_heads|num_heads|n_heads?|attention_heads)"
       r"|linear_num_value_heads|n_mamba_heads",
    8: r"(moe_)?num_(local_)?experts|\w*sliding_window(_size)?|window_size"
       r"|local_attention|attention_window_size|((mamba|attention)_)?chunk_size|block_size"
       r"|\w+_chunk_length|index_topk",
    0: r"num_kv_shared_layers",
    16: r"((?!qk_head)\w+_)?(head_dim|head_size|d_state|state_size)|dim_head|d_head|kv_channels"
        r"|rotary_dim|time_step_rank|mamba_dt_rank|n_routed_experts",
    32: r"(q|kv|o)_lora_rank|qk_head_dim|laurel_rank|hidden_size_per_layer_input"
        r"|mamba_d_head|mamba_headdim",
    1: r"topk_group|n_group|num_expert_group|(n|num|moe_num)_shared_experts|n_groups"
       r"|first_k_dense_replace|num_dense_layers|\w*_token_id",
}
NEEDED = ("head_dim", "num_experts_per_tok", "n_routed_experts", "topk_group", "n_group",
          "n_shared_experts")
KEYS_AND_VALUES = r"num_key_value_heads|num_kv_heads|swa_num_key_value_heads|linear_num_key_heads"


def small_size(key, value):
    return next((size for size, names in SIZES.items() if re.fullmatch(names, key)), value)


def small_values(config):
    """The changes that make a configuration small: two layers of 64 channels, 4 heads of 16."""
    values = config.to_dict()
    heads = values.get("num_attention_heads")
    layers = next((values[key] for key in ("num_hidden_layers", "n_layer", "num_layers")
                   if isinstance(values.get(key), int)), None)
    changes = {}
    for key, value in values.items():
        if key in config.sub_configs or isinstance(value, bool):
            continue
        if re.fullmatch(KEYS_AND_VALUES, key):              # all heads, where that is the default
            changes[key] = 4 if value is not None and value == heads else 2
        elif isinstance(value, int) and value > 0 or value is None and key in NEEDED:
            changes[key] = small_size(key, value)
            if "per_tok" in key and value == 1:
                changes[key] = 1
        elif key == "layer_types" and value is None:
            changes[key] = ["full_attention"] * 2
        elif isinstance(value, float) and "drop" in key:
            changes[key] = 0.0
        elif isinstance(value, list) and layers and len(value) == layers > 2:
            kinds = list(dict.fromkeys(map(str, value)))    # alternating layers: one of each kind
            values_of = [next(x for x in value if str(x) == kind) for kind in kinds]
            changes[key] = [small_size(key, x) if type(x) is int else x for x in values_of * 2][:2]
    if "is_decoder" in values:
        changes["is_decoder"] = True
    return changes


def small_model(model_type):
    """A random float32 model of the type, with gains spread around their initial values."""
    cls = CONFIG_MAPPING[model_type]
    config = cls()
    changes = small_values(config)
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            changes[name] = {**small_values(part), "model_type": part.model_type}
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(cls(**changes)).parameters())
    if size > LARGE:
        raise ValueError(f"the small configuration has {size / 1e6:.0f} million parameters")
    model = AutoModelForCausalLM.from_config(cls(**changes)).float().eval()
    for p in filter(torch.is_floating_point, model.parameters()):
        p.data = p.data + 0.1 * torch.randn_like(p) if p.ndim < 2 else \
            torch.randn_like(p) * p.shape[-1] ** -0.5
    return model


def logits_of(model):
    """Logits of two sequences of 24 tokens."""
    tokens = torch.randint(2, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def assert_folds_are_exact(model, plan, logits):
    """All proven folds in the whole model, with powers of four: the logits stay the same."""
    blocks.conv1d_to_linear(model)
    blocks.unfuse_experts(model, plan.prefix, lambda layer: "")
    generator = torch.Generator().manual_seed(2)
    for block, groups in zip(blocks.find_blocks(model)[1], plan.groups):
        for group in groups:
            if group.fold:
                count = int(group.fold.rows.max()) + 1
                s = 4.0 ** torch.randint(-1, 2, (count,), generator=generator)[group.fold.rows]
                blocks.divide_output(block, group.fold, s)
                blocks.multiply_inputs(block, group.layers + group.kept, s)
    error = ((logits_of(model) - logits).norm() / logits.norm()).item()
    assert error < 1e-4, f"the folds change the logits by {error:.1e}"


class Found(NamedTuple):
    """What came of a type: "ok" or what went wrong, and the packed shares of the weights."""

    result: str
    report: dict | None = None
    blocks: float = 0               # of all decoder blocks
    experts: float | None = None    # of what were fused experts; None: there are none


def shares(plain, model, prefix):
    """The packed shares of the weights [..., N, K] of all blocks, and of fused experts or None."""
    inside = [(name, module) for name, module in plain.named_modules()
              if name.startswith(prefix + ".")]
    fused = {name: blocks.stack_size(module) for name, module in inside if has_stack(module)}
    packed = {name: module.in_features * module.out_features for name, module
              in model.named_modules() if isinstance(module, awq.AWQLinear)}
    experts = sum(size for name, size in packed.items()
                  if any(name.startswith(stack + ".") for stack in fused))
    every = sum(p.numel() for _, module in inside for p in module.parameters(recurse=False)
                if p.ndim > 1)
    return sum(packed.values()) / every, experts / sum(fused.values()) if fused else None


def has_stack(module):
    """Whether a module holds fused experts; there are 3-D parameters of other kinds."""
    names = ("weight", "gate_up_proj", "up_proj", "down_proj")
    return blocks.stack_size(module) > 0 and any(
        name in names and p.ndim == 3 for name, p in module.named_parameters(recurse=False))


def try_type(model_type):
    """What comes of quantize -> save -> load -> same logits; errors stand in the table."""
    try:
        model = small_model(model_type)
        logits = logits_of(model)
    except Exception as error:
        return Found(f"not built: {one_line(error)}")
    found = Found("ok", experts=0 if any(map(has_stack, model.modules())) else None)
    plain, plans, plan_model = copy.deepcopy(model), [], blocks.plan_model
    try:
        tokens = torch.randint(2, 96, (16, 24), generator=torch.Generator().manual_seed(0))
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
            patch.setattr(blocks, "plan_model",
                          lambda *args: plans.append(plan_model(*args)) or plans[-1])
            report = awq.quantize_model(model, tokens, 4, 32, clip=False, batch_size=8,
                                        progress=False)
            found = Found("ok", report, *shares(plain, model, plans[0].prefix))
            packed = [name.rpartition(".")[2] for name, module in model.named_modules()
                      if isinstance(module, awq.AWQLinear)]
            assert not {"router", "gate", "wg", "shared_expert_gate"} & set(packed)
            assert_folds_are_exact(plain, plans[0], logits)
            expected = logits_of(model)
            assert not torch.equal(expected, logits), "nothing has changed"
            awq.save_quantized(model, folder + "/quantized")
            loaded = logits_of(awq.load_quantized(folder + "/quantized").eval())
            assert torch.equal(loaded, expected), \
                f"the logits differ by {(loaded - expected).abs().max():.1e} after loading"
    except Exception as error:
        return found._replace(result=one_line(error))
    return found


def one_line(error):
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"/\S+/", "", text)           # of temporary folders
    return text if len(text) < 160 else text[:157] + "..."


def counted(items):
    return ", ".join(f"{n} {item}" for item, n in Counter(items).items()) or "-"


def row(model_type, found):
    """A row of the table, as a dict."""
    lines = found.report["groups"] if found.report else []
    return {"type": model_type, "blocks packed": f"{found.blocks:.0%}",
            "experts packed": "" if found.experts is None else f"{found.experts:.0%}",
            "groups": len(lines), "folds": counted(line["fold"] for line in lines if line["fold"]),
            "s = 1, and why": counted(f"{line['layers'][0].rpartition('.')[2]} "
                                      f"({re.sub(r'[0-9]+', '#', line['reason'])})"
                                      for line in lines if not line["fold"]),
            "stays, and why": counted(found.report["skipped"].values()) if found.report else "-",
            "result": found.result}


def print_table(types):
    """Print the rows of the types; returns what RESULTS.md takes of them."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows, results = [], []
    for model_type in types:
        results.append(try_type(model_type))
        rows.append(row(model_type, results[-1]))
        lines = markdown(rows[-1:]).splitlines()
        print("\n".join(lines if len(rows) == 1 else lines[2:]), flush=True)
    ok = [found for found in results if found.result == "ok"]
    fused = sum(found.experts is not None for found in results)
    packed = sum((found.experts or 0) >= 0.9 for found in ok)
    summary = (f"{len(ok)} of {len(results)} types are ok; of {fused} with fused experts {packed} "
               "have 90 % or more of them packed")
    print(summary)
    columns = ("type", "blocks packed", "experts packed", "folds", "result")
    return {"summary": summary, "rows": [{key: line[key] for key in columns} for line in rows]}


@pytest.mark.parametrize("model_type", SUBSET)
def test_the_logits_are_the_same_after_save_and_load(model_type):
    """Bitwise; with all experts packed, where they were fused; every s = 1 has its reason."""
    logging.set_verbosity_error()
    found = try_type(model_type)
    assert found.result == "ok"
    assert found.blocks > 0.8 and found.experts in (None, 1)
    assert all(line["reason"] or line["fold"] for line in found.report["groups"])


if __name__ == "__main__":
    start = time.time()
    found = print_table(sys.argv[1:] or TYPES)
    print(f"{time.time() - start:.0f} s")
    if not sys.argv[1:]:
        write_json(ROOT / "results" / "architectures.json",
                   {**found, "transformers": transformers.__version__})
