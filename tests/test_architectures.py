"""Every causal LM of transformers, small and random: quantise -> save -> load -> the same logits.

    python -m pytest tests/test_architectures.py -s
    python tests/test_architectures.py [TYPE ...]       the table alone, of all types or of these
    python tests/test_architectures.py --memory         peak memory with a model of 1.2 GB (minutes)

The builder knows sizes by the names configurations give them, and no model type. A row: the type;
groups of Linears; folds proven, by kind; groups left at s = 1 and why; Linears skipped and why;
the result. "ok" means that every proven fold, done with powers of two, leaves the logits of the
whole model as they are, and that the quantised model has bitwise equal logits after save and load.
"""
import copy
import os
import re
import sys
import tempfile
import time
from collections import Counter

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import pytest
import torch
from conftest import ROOT  # noqa: F401 (puts the repository on the path)
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

import awq

TYPES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# The families that issue 3 names.
NAMED = """llama mistral ministral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 opt gpt2 gpt_neo
gpt_neox gptj codegen falcon bloom mpt starcoder2 gpt_bigcode stablelm olmo olmo2 olmo3 cohere
cohere2 granite glm glm4 smollm3 nemotron persimmon exaone4 helium seed_oss apertus arcee xglm
biogpt nanochat modernbert-decoder""".split()
AT_LEAST = 150      # types with the result "ok"
LARGE = 10_000_000  # parameters: what the builder did not make small is not tried

SIZES = {           # attribute names of configurations: the small value
    96: r"(unpadded_|input_)?vocab_size\w*|pronunciation_vocab_size|shape_vocab_size",
    64: r"(\w+_)?(hidden_size|embed_dim)|n_embd|d_model|emb_dim|(input_|output_)?embedding_size"
        r"|word_embed_proj_dim|dim_model_base|lru_width|embedding_dim|max_position_embeddings"
        r"|n_positions|max_seq_len|n_ctx|max_(target|source)_positions|context_length"
        r"|model_max_length|pronunciation_embed_dim|shape_embed_dim|adapter_in\w*",
    128: r"(\w+_)?(intermediate_size\w*|(intermediate|ffn_hidden)_size)|(\w+_)?ffn_dim|dff|dim_ff"
         r"|d_inner|n_inner|feed_forward_size|mamba_d_ssm",
    2: r"num_hidden_layers|n_layers?|num_layers|\w*coder_layers|num_\w*coder_layers|num_blocks"
       r"|num_layers_per_stack|num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k"
       r"|sliding_window_pattern|global_attn_every_n_layers|expand|mamba_expand",
    4: r"(\w+_)?(num_attention_heads|num_heads|n_heads?|attention_heads)|linear_num_value_heads"
       r"|n_mamba_heads|mamba_n_heads",
    8: r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|\w*sliding_window(_size)?"
       r"|window_size|local_attention|attention_window_size|attention_chunk_size|block_size"
       r"|\w+_attn_chunk_length|(mamba_)?chunk_size|index_topk|mamba_chunk_size",
    0: r"num_kv_shared_layers",
    16: r"((?!qk_head)\w+_)?(head_dim|head_size)|dim_head|d_head|kv_channels|rotary_dim"
        r"|(mamba_)?d_state|(ssm_)?state_size|mamba_d_state|time_step_rank|mamba_dt_rank",
    32: r"(q|kv|o)_lora_rank|qk_head_dim|laurel_rank|hidden_size_per_layer_input"
        r"|mamba_d_head|mamba_headdim",
    1: r"topk_group|n_group|num_expert_group|(n|num|moe_num)_shared_experts|moe_layer_start_index"
       r"|first_k_dense_replace|num_dense_layers|n_groups|mamba_n_groups|mamba_ngroups"
       r"|\w*_token_id",
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
    done = set()
    for p in model.parameters():
        if p.is_floating_point() and p not in done:
            done.add(p)
            p.data = p.data + 0.1 * torch.randn_like(p) if p.ndim < 2 else \
                torch.randn_like(p) * p.shape[-1] ** -0.5
    return model


def logits_of(model):
    """Logits of two sequences of 24 tokens."""
    tokens = torch.randint(2, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def assert_folds_are_exact(model, plans, logits):
    """All proven folds in the whole model, with powers of four: the logits stay the same."""
    awq.replace_conv1d(model)
    _, blocks = awq.find_blocks(model)
    generator = torch.Generator().manual_seed(2)
    for block, groups in zip(blocks, plans):
        for group in groups:
            if group.fold is None:
                continue
            s = 4.0 ** torch.randint(-1, 2, (1024,), generator=generator)[group.fold.rows]
            awq.divide_output(block.get_submodule(group.fold.producer), group.fold.kind,
                              group.fold.rows, s)
            for name in group.layers + group.kept:
                block.get_submodule(name).weight.data *= s
    error = ((logits_of(model) - logits).norm() / logits.norm()).item()
    assert error < 1e-4, f"the folds change the logits by {error:.1e}"


def assert_routers_are_kept(model):
    wrong = [name for name, module in model.named_modules() if isinstance(module, awq.AWQLinear)
             and re.fullmatch(r"router|gate|wg|shared_expert_gate", name.rpartition(".")[2])]
    assert not wrong, f"routers are quantised: {wrong}"


def try_type(model_type):
    """(report or None, result) of quantise -> save -> load -> same logits."""
    report, seen = None, {}
    try:
        model = small_model(model_type)
        logits = logits_of(model)
    except Exception as error:      # the reason stands in the table
        return None, f"not built: {one_line(error)}"
    plain = copy.deepcopy(model)
    try:
        tokens = torch.randint(2, 96, (4, 24), generator=torch.Generator().manual_seed(0))
        with pytest.MonkeyPatch.context() as patch:
            plan = awq.plan_model
            patch.setattr(awq, "plan_model", lambda *args: seen.setdefault("plan", plan(*args)))
            report = awq.quantize_model(model, tokens, 4, 32, clip=False, batch_size=2,
                                        progress=False)
        assert_folds_are_exact(plain, seen["plan"][0], logits)
        assert_routers_are_kept(model)
        with tempfile.TemporaryDirectory() as folder:
            expected = logits_of(model)
            assert not torch.equal(expected, logits), "nothing has changed"
            awq.save_quantized(model, folder + "/quantised")
            found = logits_of(awq.load_quantized(folder + "/quantised").eval())
            assert torch.equal(found, expected), \
                f"the logits differ by {(found - expected).abs().max():.1e} after loading"
    except Exception as error:
        return report, one_line(error) + transformers_too(small_model(model_type), logits)
    return report, "ok"


def transformers_too(model, logits):
    """For a type that fails: whether transformers saves and loads it unquantised."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            same = torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder)), logits)
    except Exception as error:
        return f" (nor does transformers reload it unquantised: {one_line(error)})"
    return "" if same else " (nor has it the same logits when transformers reloads it unquantised)"


def one_line(error):
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 160 else text[:157] + "..."


def counted(items):
    return ", ".join(f"{n} {item}" for item, n in Counter(items).items()) or "-"


def row(model_type, report, result):
    """A Markdown row of the table."""
    lines = report["groups"] if report else []
    folds = counted(line["fold"] for line in lines if line["fold"])
    left = counted(f"{line['layers'][0].rpartition('.')[2]} ({line['reason']})"
                   for line in lines if not line["fold"])
    skipped = counted(report["skipped"].values()) if report else "-"
    return f"| {model_type} | {len(lines)} | {folds} | {left} | {skipped} | {result} |"


HEAD = ("| type | groups | folds | s = 1, and why | skipped, and why | result |\n"
        "|---|---|---|---|---|---|")


@pytest.fixture(scope="module")
def results():
    """{type: (report, result)} of all types; the table is printed (see it with -s)."""
    return print_table(TYPES)


def print_table(types):
    """Print the rows of the types; {type: (report, result)}."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"\n{HEAD}")
    results = {}
    for model_type in types:
        report, result = results[model_type] = try_type(model_type)
        print(row(model_type, report, result), flush=True)
    print(f"{sum(result == 'ok' for _, result in results.values())} of {len(results)} types are ok")
    return results


@pytest.mark.parametrize("model_type", NAMED)
def test_named_families_have_the_same_logits_after_save_and_load(model_type, results):
    report, result = results[model_type]
    assert result == "ok"
    assert len(report["groups"]) >= 6
    assert all(line["reason"] or line["fold"] for line in report["groups"])


def test_most_types_have_the_same_logits_after_save_and_load(results):
    failed = {model_type: result for model_type, (_, result) in results.items() if result != "ok"}
    assert len(results) - len(failed) >= AT_LEAST, failed


def test_packed_types_never_fail_without_transformers_failing_too(results):
    """A type that is quantised is also saved and loaded, unless transformers cannot do that."""
    wrong = {model_type: result for model_type, (report, result) in results.items()
             if report and result != "ok" and "transformers reload" not in result}
    assert not wrong


def print_memory():
    """Peak memory of quantising and saving a LLaMA of 1.2 GB, bfloat16, with 12 blocks of 0.1 GB.

    alpha is searched over two values and without clipping: that is faster and no smaller.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1000, hidden_size=2048, intermediate_size=5632,
                         num_hidden_layers=12, num_attention_heads=16, max_position_embeddings=64)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    for p in model.parameters():
        p.data.normal_(std=p.shape[-1] ** -0.5) if p.ndim > 1 else p.data.fill_(1)
    model.model.rotary_emb.__init__(config)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2 ** 20
    block = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters()) / 2 ** 20
    print(f"model {size:.0f} MiB, block {block:.0f} MiB; resident {peak():.0f} MiB with the model")
    search = awq.search_scale
    awq.search_scale = lambda *args, **kwargs: search(*args, **{"alphas": [0.0, 0.5], **kwargs})
    tokens = torch.randint(0, 1000, (1, 32), generator=torch.Generator().manual_seed(0))
    awq.quantize_model(model, tokens, 4, 128, clip=False)
    print(f"quantised: peak {peak():.0f} MiB")
    with tempfile.TemporaryDirectory() as folder:
        awq.save_quantized(model, folder + "/model")
    print(f"saved: peak {peak():.0f} MiB")


def peak():
    """The most memory this process has had resident, MiB."""
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10


if __name__ == "__main__":
    start = time.time()
    if sys.argv[1:] == ["--memory"]:
        print_memory()
    else:
        print_table(sys.argv[1:] or TYPES)
    print(f"{time.time() - start:.0f} s")
