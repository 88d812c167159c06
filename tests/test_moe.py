"""Mixtures of experts: fused experts become nn.Linears, are quantized, saved and loaded."""
import copy
import json

import pytest
import torch
from conftest import randomize
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, DeepseekV3Config, GptOssConfig, MixtralConfig,
                          Qwen2MoeConfig)

import awq
import blocks

SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
MIXTRAL = MixtralConfig(num_local_experts=4, **SIZES)
QWEN2_MOE = Qwen2MoeConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64,
                           shared_expert_intermediate_size=64, **SIZES)
GPT_OSS = GptOssConfig(num_local_experts=4, num_experts_per_tok=2, head_dim=16, **SIZES)
DEEPSEEK_V3 = DeepseekV3Config(
    n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=64,
    first_k_dense_replace=0, kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=16, v_head_dim=16,
    qk_nope_head_dim=16, **{**SIZES, "num_key_value_heads": 4})


def random_model(config, **changes):
    torch.manual_seed(0)
    config = type(config)(**{**config.to_dict(), **changes})
    return randomize(AutoModelForCausalLM.from_config(config), torch.float32)


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def experts_in(model):
    return model.model.layers[0].mlp.experts


def plan_of(model, tokens):
    return blocks.plan_model(model, tokens, lambda layer: awq.misfit(layer, awq.Settings(4, 32)))


# ---- Fused experts -> nn.Linear ------------------------------------------------------------------


@pytest.mark.parametrize("config", [MIXTRAL, GPT_OSS, DEEPSEEK_V3])
def test_unfused_experts_make_the_same_outputs_and_share_the_memory(config, tokens):
    """Concatenated, or interleaved and transposed with biases and a clamp (gpt_oss)."""
    model = random_model(config)
    expected = logits(model, tokens)
    memory = experts_in(model).down_proj.untyped_storage().data_ptr()
    assert blocks.unfuse_experts(model, "model.layers", lambda layer: "") == {}
    *_, down = experts_in(model).get_submodule("3").values()
    assert down.weight.untyped_storage().data_ptr() == memory
    assert not hasattr(experts_in(model), "down_proj")
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(copy.deepcopy(model), tokens), logits(model, tokens))


def test_experts_that_do_not_compare_equal_stay_fused_and_are_named(tokens, monkeypatch):
    model, run = random_model(MIXTRAL), blocks.run_experts
    monkeypatch.setattr(blocks, "run_experts", lambda *args: 1.01 * run(*args))
    expected = logits(model, tokens)
    assert blocks.unfuse_experts(model, "model.layers", lambda layer: "") == {
        "model.layers.0.mlp.experts": "75% of the model in full precision: fused experts that make "
                                      "other outputs when they are run one by one"}
    assert torch.equal(logits(model, tokens), expected)


def test_experts_that_do_not_fit_stay_fused_with_the_reason(tokens, tmp_path):
    model = random_model(MIXTRAL, intermediate_size=72)
    report = awq.quantize_model(model, tokens, 4, 32, progress=False)
    assert report["skipped"]["model.layers.0.mlp.experts"] == (
        "69% of the model in full precision: fused experts: in_features 72 is not a multiple of "
        "group_size 32")
    awq.save_quantized(model, tmp_path / "model")
    loaded = awq.load_quantized(tmp_path / "model")
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    config = json.loads((tmp_path / "model/config.json").read_text())["quantization_config"]
    assert "model.layers.0.block_sparse_moe.experts" in config["modules_to_not_convert"]


# ---- What reads what -----------------------------------------------------------------------------


@pytest.mark.parametrize("config, count, up", [
    (MIXTRAL, 4, "w3"), (QWEN2_MOE, 9, "up_proj"), (DEEPSEEK_V3, 9, "up_proj"), (GPT_OSS, 4, None)])
def test_experts_share_s_with_the_router_and_down_folds_into_its_own_up(config, count, up, tokens):
    """gpt_oss adds 1 to what up makes: no row can be scaled there, and that is found out.

    Every expert is planned (one of them may be shared), whatever the router's biases are.
    """
    model = random_model(config)
    if config is DEEPSEEK_V3:
        model.model.layers[0].mlp.gate.e_score_correction_bias[3] = -100
    groups = [group for group in plan_of(model, tokens).groups[0] if "mlp" in group.layers[0]]
    first, downs = groups[0], groups[1:]
    assert first.fold.producer == "post_attention_layernorm"
    assert len(downs) == count and len(first.layers) == 2 * count
    assert {"mlp.gate", "mlp.router"} & set(first.kept)
    for group in downs:
        expert, _, _ = group.layers[0].rpartition(".")
        assert len(group.layers) == 1 and bool(group.reason) == (up is None)
        assert group.fold.producer == f"{expert}.{up}" if up else group.fold is None


def test_many_experts_are_proven_at_once(tokens, monkeypatch):
    proofs, prove = [], blocks.folds_are_exact
    monkeypatch.setattr(blocks, "folds_are_exact",
                        lambda *args: proofs.append(prove(*args)) or proofs[-1])
    few = len(plan_of(random_model(QWEN2_MOE), tokens).groups[0]), len(proofs)
    many = len(plan_of(random_model(QWEN2_MOE, num_experts=24), tokens).groups[0]), len(proofs)
    assert many == (few[0] + 16, 2 * few[1])


def test_a_router_that_is_left_out_is_found_out(tokens):
    """Top-1 of normed weights: the router decides only which expert runs. Its columns count."""
    model = random_model(MIXTRAL, num_experts_per_tok=1)
    plan = plan_of(model, tokens)
    group = next(group for group in plan.groups[0] if group.kept)
    probe = blocks.Probe(plan.blocks[0], plan.calls[0], plan.hidden)
    assert blocks.folds_are_exact(probe, [group.fold], [group.layers + group.kept])
    assert not blocks.folds_are_exact(probe, [group.fold], [group.layers])
    assert not blocks.folds_are_exact(probe, [group.fold], [group.layers[1:] + group.kept])


# ---- Quantize ------------------------------------------------------------------------------------


def test_tuning_leaves_an_expert_that_a_batch_does_not_reach(tokens):
    model = random_model(MIXTRAL)
    report = awq.quantize_model(model, tokens[:1, :1], 3, 32, progress=False, rounding="tuned")
    assert logits(model, tokens).isfinite().all() and any(
        "too few" in line["reason"] for line in report["groups"])


def test_statistics_of_gate_and_up_are_those_of_the_whole_input(tokens):
    model = random_model(MIXTRAL)
    plan, seen = plan_of(model, tokens), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    hidden = blocks.first_hidden(model, plan.blocks, tokens)
    call = blocks.record(model, plan.blocks, tokens)[0][0]
    statistics, _ = awq.collect_statistics(plan.blocks[0], plan.groups[0], [call], [hidden])
    index = next(i for i, group in enumerate(plan.groups[0]) if group.kept)
    torch.testing.assert_close(statistics[index].s_X, seen[-1].flatten(0, 1).abs().mean(0))
    assert sum(entry.tokens for entry in statistics[index + 1:]) == 2 * tokens.numel()


def test_with_planted_outliers_awq_beats_rounding_in_every_group_of_experts(tokens):
    """Channels 20 times as large as they come, in what gate and up read and in what down reads."""
    model = random_model(MIXTRAL)
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[::13] *= 20
        experts_in(model).gate_up_proj[:, -90::24] *= 20        # rows of up
    rounded, exact = copy.deepcopy(model), logits(model, tokens)
    report = awq.quantize_model(model, tokens, 4, 32, progress=False)
    awq.round_model(rounded, 4, 32)
    lines = [line for line in report["groups"] if "experts" in line["layers"][0]]
    assert len(lines) == 5 and all(line["folded_into"] for line in lines)
    assert all(line["loss"] < 0.8 * line["loss_rtn"] for line in lines)
    moved = [(logits(m, tokens) - exact).norm() for m in (model, rounded)]
    assert moved[0] < 0.9 * moved[1]


def test_a_token_touches_only_the_experts_that_are_chosen(tokens):
    model = random_model(MIXTRAL)
    awq.round_model(model, 4, 32)
    chosen, gate = [], model.model.layers[0].mlp.gate
    gate.register_forward_hook(lambda _, args, made: chosen.extend(made[-1].unique().tolist()))
    expected = logits(model, tokens[:1, :1])
    for e in {0, 1, 2, 3} - set(chosen):
        for layer in experts_in(model).get_submodule(str(e)).values():
            layer.scales.fill_(torch.nan)
    assert len(set(chosen)) == 2 and torch.equal(logits(model, tokens[:1, :1]), expected)


# ---- Checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_is_as_autoawq_would_write_it_and_loads(tokens, tmp_path):
    """Made by hand from a plain checkpoint: packed experts under w1, w2, w3, the router plain."""
    model = random_model(MIXTRAL)
    model.save_pretrained(tmp_path / "hand")
    tensors = load_file(tmp_path / "hand/model.safetensors")
    for name in [name for name, W in tensors.items() if "layers" in name and W.ndim == 2
                 and not name.endswith("gate.weight")]:
        q, delta, zero = awq.quantize(tensors.pop(name), 4, 32)
        path = name.removesuffix("weight")
        tensors |= {path + "qweight": awq.pack(q.T), path + "qzeros": awq.pack(zero.T),
                    path + "scales": delta.T.contiguous()}
    assert "model.layers.0.block_sparse_moe.experts.3.w2.qweight" in tensors
    save_file(tensors, tmp_path / "hand/model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "hand/config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": ["gate"]}
    (tmp_path / "hand/config.json").write_text(json.dumps(config))
    awq.round_model(model, 4, 32)
    awq.save_quantized(model, tmp_path / "ours")
    ours = load_file(tmp_path / "ours/model.safetensors")
    assert ours.keys() == tensors.keys() and all(torch.equal(ours[x], tensors[x]) for x in ours)
    config = json.loads((tmp_path / "ours/config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == ["lm_head", "model.layers.0.block_sparse_moe.gate"]
    for folder in ("hand", "ours"):
        loaded = awq.load_quantized(tmp_path / folder)
        assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_a_router_that_chooses_more_experts_than_there_are(tokens):
    model = random_model(MIXTRAL)
    for module in model.modules():
        if hasattr(module, "top_k"):
            module.top_k = 99
    with pytest.raises(ValueError, match="does not run: .*out of range"):
        awq.quantize_model(model, tokens, 4, 32, progress=False)
