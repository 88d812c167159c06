"""Mixtures of experts: fused experts become nn.Linears, are quantized, saved and loaded."""
import copy
from functools import partial

import pytest
import torch
from conftest import small

import awq
import blocks

SIZES = dict(num_hidden_layers=1, num_experts_per_tok=2, intermediate_size=96)
mixtral = partial(small, "mixtral", num_local_experts=4, num_key_value_heads=2, **SIZES)
qwen2_moe = partial(small, "qwen2_moe", num_experts=8, num_key_value_heads=2,
                    moe_intermediate_size=64, shared_expert_intermediate_size=64, **SIZES)
gpt_oss = partial(small, "gpt_oss", num_local_experts=4, num_key_value_heads=2, head_dim=16,
                  **SIZES)
deepseek_v3 = partial(
    small, "deepseek_v3", n_routed_experts=8, n_group=1, topk_group=1, moe_intermediate_size=64,
    first_k_dense_replace=0, kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=16, v_head_dim=16,
    qk_nope_head_dim=16, num_key_value_heads=4, **SIZES)


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def experts_in(model):
    return model.model.layers[0].mlp.experts


def plan_of(model, tokens):
    return blocks.plan_model(model, tokens, lambda layer: awq.misfit(layer, awq.Settings(4, 32)))


# ---- Fused experts -> nn.Linear ------------------------------------------------------------------


@pytest.mark.parametrize("build", [mixtral, gpt_oss, deepseek_v3])
def test_unfused_experts_make_the_same_outputs_and_share_the_memory(build, tokens):
    """Concatenated, or interleaved and transposed with biases and a clamp (gpt_oss)."""
    model = build()
    expected = logits(model, tokens)
    memory = experts_in(model).down_proj.untyped_storage().data_ptr()
    assert blocks.unfuse_experts(model, "model.layers", lambda layer: "") == {}
    *_, down = experts_in(model).get_submodule("3").values()
    assert down.weight.untyped_storage().data_ptr() == memory
    assert not hasattr(experts_in(model), "down_proj")
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(copy.deepcopy(model), tokens), logits(model, tokens))


def test_experts_that_do_not_compare_equal_stay_fused_and_are_named(tokens, monkeypatch):
    model, run = mixtral(), blocks.run_experts
    monkeypatch.setattr(blocks, "run_experts", lambda *args: 1.01 * run(*args))
    expected = logits(model, tokens)
    assert blocks.unfuse_experts(model, "model.layers", lambda layer: "") == {
        "model.layers.0.mlp.experts": "75% of the model in full precision: fused experts that make "
                                      "other outputs when they are run one by one"}
    assert torch.equal(logits(model, tokens), expected)


def test_experts_that_do_not_fit_stay_fused_with_the_reason(tokens, tmp_path):
    model = mixtral(intermediate_size=72)
    report = awq.quantize_model(model, tokens, 4, 32, progress=False)
    assert report["skipped"]["model.layers.0.mlp.experts"] == (
        "69% of the model in full precision: fused experts: in_features 72 is not a multiple of "
        "group_size 32")
    awq.save_quantized(model, tmp_path / "model")
    loaded = awq.load_quantized(tmp_path / "model")
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert "model.layers.0.block_sparse_moe.experts" in (
        model.config.quantization_config["modules_to_not_convert"])


# ---- What reads what -----------------------------------------------------------------------------


@pytest.mark.parametrize("build, count, up", [
    (mixtral, 4, "w3"), (qwen2_moe, 9, "up_proj"), (deepseek_v3, 9, "up_proj"), (gpt_oss, 4, None)])
def test_experts_share_s_with_the_router_and_down_folds_into_its_own_up(build, count, up, tokens):
    """gpt_oss adds 1 to what up makes: no row can be scaled there, and that is found out.

    Every expert is planned (one of them may be shared), whatever the router's biases are.
    """
    model = build()
    if build is deepseek_v3:
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
    few = len(plan_of(qwen2_moe(), tokens).groups[0]), len(proofs)
    many = len(plan_of(qwen2_moe(num_experts=24), tokens).groups[0]), len(proofs)
    assert many == (few[0] + 16, 2 * few[1])


def test_a_router_that_is_left_out_is_found_out(tokens):
    """Top-1 of normed weights: the router decides only which expert runs. Its columns count."""
    model = mixtral(num_experts_per_tok=1)
    plan = plan_of(model, tokens)
    group = next(group for group in plan.groups[0] if group.kept)
    probe = blocks.Probe(plan.blocks[0], plan.calls[0], plan.hidden)
    assert blocks.folds_are_exact(probe, [group.fold], [group.layers + group.kept])
    assert not blocks.folds_are_exact(probe, [group.fold], [group.layers])
    assert not blocks.folds_are_exact(probe, [group.fold], [group.layers[1:] + group.kept])


# ---- Quantize ------------------------------------------------------------------------------------


def test_tuning_leaves_an_expert_that_a_batch_does_not_reach(tokens):
    model = mixtral()
    report = awq.quantize_model(model, tokens[:1, :1], 3, 32, progress=False, rounding="tuned")
    assert logits(model, tokens).isfinite().all() and any(
        "too few" in line["reason"] for line in report["groups"])


def test_statistics_of_gate_and_up_are_those_of_the_whole_input(tokens):
    model = mixtral()
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
    model = mixtral()
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
    model = mixtral()
    awq.round_model(model, 4, 32)
    chosen, gate = [], model.model.layers[0].mlp.gate
    gate.register_forward_hook(lambda _, args, made: chosen.extend(made[-1].unique().tolist()))
    expected = logits(model, tokens[:1, :1])
    for e in {0, 1, 2, 3} - set(chosen):
        for layer in experts_in(model).get_submodule(str(e)).values():
            layer.scales.fill_(torch.nan)
    assert len(set(chosen)) == 2 and torch.equal(logits(model, tokens[:1, :1]), expected)


# ---- Checkpoints ---------------------------------------------------------------------------------


def test_a_router_that_chooses_more_experts_than_there_are(tokens):
    model = mixtral()
    for module in model.modules():
        if hasattr(module, "top_k"):
            module.top_k = 99
    with pytest.raises(ValueError, match="does not run: .*out of range"):
        awq.quantize_model(model, tokens, 4, 32, progress=False)
