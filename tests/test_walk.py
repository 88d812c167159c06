"""The model walk: which folds are found, which are refused, and whole models quantised."""
import copy

import pytest
import torch
from conftest import llama, opt
from torch import nn

import awq


def one_plan(model, group_size=32):
    prefix, blocks = awq.find_blocks(model)
    tokens = torch.arange(32).view(2, 16)
    calls = awq.record_calls(model, blocks, tokens)
    return awq.plan_block(blocks[0], calls[0], 4, group_size)[0], blocks[0], calls[0]


def folds(groups):
    return {group.layers: group.fold and (group.fold.producer, group.fold.kind) for group in groups}


def test_llama_folds_are_found():
    groups, _, _ = one_plan(llama())
    assert folds(groups) == {
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): ("input_layernorm", "gain"),
        ("self_attn.o_proj",): ("self_attn.v_proj", "rows"),
        ("mlp.gate_proj", "mlp.up_proj"): ("post_attention_layernorm", "gain"),
        ("mlp.down_proj",): ("mlp.up_proj", "rows")}


def test_opt_folds_are_found():
    """LayerNorm with bias, biased producers, and ReLU, which commutes with s > 0."""
    groups, _, _ = one_plan(opt())
    assert folds(groups) == {
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): (
            "self_attn_layer_norm", "gain"),
        ("self_attn.out_proj",): ("self_attn.v_proj", "rows"),
        ("fc1",): ("final_layer_norm", "gain"), ("fc2",): ("fc1", "rows")}


def test_grouped_query_heads_share_rows():
    """4 query heads of 16 on 2 key/value heads: o's channels 0-15 and 16-31 are rows 0-15."""
    groups, _, _ = one_plan(llama())
    rows = next(group.fold.rows for group in groups if group.layers == ("self_attn.o_proj",))
    expected = [16 * (head // 2) + i for head in range(4) for i in range(16)]
    assert rows.tolist() == expected


def test_gelu_between_is_refused():
    groups, _, _ = one_plan(opt(activation_function="gelu"))
    assert folds(groups)[("fc2",)] is None


def test_residual_that_also_reads_the_norm_is_refused():
    """OPT with the norm after the residual: q, k, v and the residual read one tensor."""
    groups, _, _ = one_plan(opt(do_layer_norm_before=False))
    assert folds(groups)[("fc1",)] is None
    assert folds(groups)[("self_attn.out_proj",)] == ("self_attn.v_proj", "rows")


class Fused(nn.Module):
    """A block with a fused gate_up, a norm that multiplies by 1 + weight, and no attention."""

    class Norm(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(width) * 0.1)

        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)

    def __init__(self, up_first):
        super().__init__()
        self.up_first = up_first
        self.norm, self.gate_up = self.Norm(32), nn.Linear(32, 128)
        self.down = nn.Linear(64, 32)

    def forward(self, hidden_states):
        a, b = self.gate_up(self.norm(hidden_states)).chunk(2, -1)
        up, gate = (a, b) if self.up_first else (b, a)
        return hidden_states + self.down(nn.functional.silu(gate) * up)


@pytest.mark.parametrize("up_first", [False, True])
def test_fused_gate_up_folds_into_the_right_rows(up_first):
    torch.manual_seed(0)
    block = Fused(up_first)
    call = awq.Call((), {"hidden_states": torch.randn(2, 8, 32)})
    groups, skipped = awq.plan_block(block, call, 4, 32)
    assert not skipped
    assert folds(groups) == {("gate_up",): ("norm", "1 + gain"), ("down",): ("gate_up", "rows")}
    first = 0 if up_first else 64
    assert groups[1].fold.rows.tolist() == list(range(first, first + 64))


def test_wrong_rows_are_refused():
    block, call = Fused(False), awq.Call((torch.randn(2, 8, 32),), {})
    for rows in (torch.arange(64), torch.arange(64, 128).flip(0)):      # the gate; the wrong order
        assert not awq.fold_is_exact(block, call, ["down"], awq.Fold("gate_up", "rows", rows))
    assert not awq.fold_is_exact(awq.probe_copy(block), call, ["gate_up"],
                                 awq.Fold("norm", "gain", torch.arange(32)))


def test_a_fold_without_effect_proves_nothing():
    """A block whose output ignores the layers would pass any comparison."""
    block, call = Fused(False), awq.Call((torch.randn(2, 8, 32),), {})
    block.down.weight.data.zero_()
    assert not awq.fold_is_exact(block, call, ["down"],
                                 awq.Fold("gate_up", "rows", torch.arange(64, 128)))


@pytest.mark.parametrize("build", [llama, opt])
def test_fold_leaves_output_bitwise_unchanged(build):
    """Every fold of the plan, on the block itself, with powers of two."""
    groups, block, call = one_plan(build())
    expected = awq.run_block(block, call)
    for group in groups:
        generator = torch.Generator().manual_seed(0)
        s = 2.0 ** torch.randint(-2, 3, (256,), generator=generator)[group.fold.rows]
        awq.divide_output(block.get_submodule(group.fold.producer), group.fold.kind,
                          group.fold.rows, s)
        assert not torch.equal(awq.run_block(block, call), expected)
        for name in group.layers:
            block.get_submodule(name).weight.data *= s
        assert torch.equal(awq.run_block(block, call), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gain", "1 + gain"])
def test_storable_scale_is_what_the_rounded_gain_divides_by(dtype, kind):
    producer = nn.Module()
    producer.weight = nn.Parameter((torch.rand(64) + 0.2).to(dtype))
    before, s = producer.weight.detach().float(), torch.rand(64) * 3 + 0.3
    storable = awq.storable_scale(producer, kind, torch.arange(64))(s)
    awq.divide_output(producer, kind, torch.arange(64), s)
    offset = 1.0 if kind == "1 + gain" else 0.0
    divided = (before + offset) / (producer.weight.detach().float() + offset)
    assert torch.allclose(storable, divided, rtol=1e-6) and not torch.equal(storable, s)


def dequantized_twin(model):
    """The same model with every AWQLinear replaced by an nn.Linear of its dequantised weight."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, awq.AWQLinear):
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            linear.weight.data, dtype = module.dequantized_weight(), twin.dtype
            if module.bias is not None:
                linear.bias.data = module.bias
            twin.set_submodule(name, linear.to(dtype))
    return twin


@pytest.mark.parametrize("build", [llama, opt])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantized_model_is_the_dequantized_one(build, dtype, tokens):
    """8 bits: close to the original; always: equal to nn.Linear on the dequantised weights."""
    model = build(dtype)
    expected = model(tokens).logits.float()
    report = awq.quantize_model(model, tokens, bits=8, group_size=32, progress=False)
    logits = model(tokens).logits
    assert torch.allclose(logits.float(), dequantized_twin(model)(tokens).logits.float(), atol=1e-2)
    assert (logits.float() - expected).norm() < 0.05 * expected.norm()
    assert logits.dtype == dtype and len(report["groups"]) == 8
    assert all(line["loss"] <= line["loss_rtn"] * 1.001 for line in report["groups"])


@pytest.mark.parametrize("build", [llama, opt])
def test_losses_of_the_report_are_real(build, tokens):
    """The reported loss of the last layer is what its packed weights do to its real inputs."""
    model = build(layers=1)
    original = copy.deepcopy(model)
    report = awq.quantize_model(model, tokens, bits=3, group_size=32, progress=False)
    line = report["groups"][-1]
    name = line["layers"][0]
    seen = []
    original.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    original.base_model(tokens)
    X = seen[0].reshape(-1, seen[0].shape[-1])
    W, layer = original.get_submodule(name).weight, model.get_submodule(name)
    producer = line["folded_into"]
    s = (original.get_submodule(producer).bias / model.get_submodule(producer).bias
         if build is opt else None)
    if s is not None:
        direct = ((layer.dequantized_weight() / s - W) @ X.T).square().sum() / len(X)
        assert abs(direct - line["loss"]) < 1e-2 * line["loss"]
    else:   # without a bias, by the whole block: gains of s cannot be read off a packed producer
        assert line["loss"] < line["loss_rtn"]


def test_micro_batches_do_not_change_the_result(tokens):
    models = []
    for batch_size in (1, 3, 8):
        models.append(llama())
        awq.quantize_model(models[-1], tokens, 4, 32, batch_size=batch_size, progress=False)
    for model in models[1:]:
        for (name, a), b in zip(models[0].state_dict().items(), model.state_dict().values()):
            if a.dtype == torch.int32:
                assert (a == b).float().mean() > 0.97, name
            else:
                assert torch.allclose(a.float(), b.float(), rtol=5e-2, atol=1e-3), name


def test_later_blocks_see_quantized_inputs(tokens):
    """The statistics of block 1 are those of the model whose block 0 is quantised."""
    model = llama()
    seen = {}
    original = awq.collect_statistics

    def spy(block, groups, calls):
        seen.setdefault("states", []).append([call.hidden.clone() for call in calls])
        return original(block, groups, calls)

    awq.collect_statistics = spy
    try:
        awq.quantize_model(model, tokens, 3, 32, progress=False)
    finally:
        awq.collect_statistics = original
    hidden = model.base_model(tokens, output_hidden_states=True).hidden_states
    assert torch.allclose(torch.cat(seen["states"][1]), hidden[1], atol=1e-5)


def test_layers_that_do_not_fit_stay_and_are_reported(tokens):
    """in_features 96 is no multiple of 64: down_proj stays as it is, the rest is packed."""
    model = llama(intermediate_size=96)
    report = awq.quantize_model(model, tokens, 4, 64, progress=False)
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
    assert isinstance(model.model.layers[0].mlp.up_proj, awq.AWQLinear)
    reason = report["skipped"]["model.layers.0.mlp.down_proj"]
    assert "96 is not a multiple of group_size 64" in reason
    assert "lm_head" in report["skipped"]
    assert set(model.config.quantization_config["modules_to_not_convert"]) == set(report["skipped"])


def test_no_layer_that_fits_is_an_error(tokens):
    model = llama()
    with pytest.raises(ValueError, match="group_size is 48: no layer can be quantised"):
        awq.quantize_model(model, tokens, 4, 48, progress=False)
    assert not any(isinstance(m, awq.AWQLinear) for m in model.modules())


@pytest.mark.parametrize("changes, named", [
    ({"bits": 5}, "bits is 5"), ({"group_size": 0}, "group_size is 0"),
    ({"refine": "magic"}, "refine is 'magic'"),
    ({"tokens": torch.zeros(4)}, "tokens is"),
    ({"tokens": torch.zeros(0, 4, dtype=int)}, "tokens is"),
    ({"tokens": torch.full((2, 8), 96)}, "tokens run from 96"),
    ({"model": nn.Linear(4, 4)}, "model is a Linear"),
])
def test_bad_arguments_are_named(changes, named, tokens):
    arguments = {"model": llama(), "tokens": tokens, "group_size": 32, "progress": False, **changes}
    with pytest.raises(ValueError, match=named):
        awq.quantize_model(**arguments)


def test_nan_weights_and_activations_are_named(tokens):
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight contains NaN"):
        awq.quantize_model(model, tokens, 4, 32, progress=False)
    model = llama(torch.float16)
    model.model.layers[0].mlp.down_proj.weight.data.mul_(60000)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(60000)
    with pytest.raises(ValueError, match="input of model.layers.0.mlp.down_proj contains NaN"):
        awq.quantize_model(model, tokens, 4, 32, scale=False, progress=False)


def test_quantized_model_is_refused(tokens):
    model = llama()
    awq.round_model(model, 4, 32)
    with pytest.raises(ValueError, match="quantised already"):
        awq.quantize_model(model, tokens, 4, 32, progress=False)


@pytest.mark.parametrize("refine", ["grid", "gradient"])
def test_refined_models_work(refine, tokens):
    plain, refined = llama(), llama()
    a = awq.quantize_model(plain, tokens, 3, 32, progress=False)
    b = awq.quantize_model(refined, tokens, 3, 32, refine=refine, progress=False)
    assert awq.loss_ratio(b["groups"]) < awq.loss_ratio(a["groups"])
    assert refined(tokens).logits.isfinite().all()


def test_a_rearranged_layer_is_still_the_checkpoint():
    """prepare gives qweight's memory up; state_dict, W_hat, .to and deepcopy still know it."""
    torch.manual_seed(0)
    layer = awq.AWQLinear.from_weight(torch.randn(64, 128), torch.randn(64), 4, 32)
    expected = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    W_hat, x = layer.dequantized_weight(), torch.randn(3, 128)
    layer.prepare()
    if layer.repacked is None:
        pytest.skip("no C++ compiler: nothing is rearranged")
    assert layer.qweight is None and torch.equal(layer.dequantized_weight(), W_hat)
    y = layer(x.bfloat16()).float()
    assert (y - (x @ W_hat.T + expected["bias"])).norm() < 0.02 * y.norm()
    for state in (layer.state_dict(), copy.deepcopy(layer).bfloat16().state_dict()):
        assert all(torch.equal(state[name].to(tensor.dtype), tensor) for name, tensor in
                   expected.items() if name != "bias")
    assert layer.to(torch.bfloat16).scales.dtype == torch.float16 and layer.qweight is not None
    layer(x)
    layer.load_state_dict({name: tensor * 0 for name, tensor in expected.items()})
    assert not layer(x).any()


def test_layer_takes_any_leading_dimensions_and_strides():
    layer = awq.AWQLinear.from_weight(torch.randn(16, 64), torch.randn(16).half(), 4, 32)
    x = torch.randn(5, 64, 3).transpose(1, 2)
    expected = x @ layer.dequantized_weight().T + layer.bias.float()
    assert torch.allclose(layer(x), expected, atol=1e-4)
    assert layer(x[0, 0]).shape == (16,) and layer(x[:0]).shape == (0, 3, 16)


def test_statistics_count_every_token_of_every_micro_batch(tokens):
    model = llama(layers=1)
    seen = []
    layer = model.model.layers[0].mlp.down_proj
    hook = layer.register_forward_pre_hook(lambda _, x: seen.append(x[0].reshape(-1, 128)))
    calls = []
    for batch in tokens.split(2):
        calls += awq.record_calls(model, model.model.layers, batch)
        model.base_model(batch)
    hook.remove()
    X = torch.cat(seen).double()
    groups = [awq.Group(("mlp.down_proj",), None)]
    statistics = awq.collect_statistics(model.model.layers[0], groups, calls)[0]
    assert statistics.tokens == tokens.numel() == len(X)
    assert torch.allclose(statistics.s_X.double(), X.abs().mean(0), rtol=1e-4)
    assert torch.allclose(statistics.C.double(), X.T @ X / len(X), rtol=1e-3, atol=1e-6)


def test_a_fold_that_does_not_fit_its_block_is_an_error():
    """Proven on another block, wrong here: o's s into k's rows changes what the block adds."""
    _, block, call = one_plan(llama())
    rows = torch.tensor([16 * (head // 2) + i for head in range(4) for i in range(16)])
    group = awq.Group(("self_attn.o_proj",), awq.Fold("self_attn.k_proj", "rows", rows))
    s = torch.linspace(0.5, 2, 32)[rows]
    with pytest.raises(ValueError, match="folding s into self_attn.k_proj changed"):
        awq.apply_fold(block, group, call, s)


def test_an_output_that_overflows_is_named(tokens):
    model = llama(torch.float16)
    model.model.layers[1].mlp.down_proj.weight.data.fill_(6e4)
    model.model.layers[1].mlp.up_proj.weight.data.mul_(20)
    with pytest.raises(ValueError, match="output of block 1 contains NaN or Inf"):
        awq.quantize_model(model, tokens, 8, 32, scale=False, clip=False, progress=False)


class Odd(nn.Module):
    """A block with a Linear used twice, one that never runs, and one whose width does not fit."""

    def __init__(self):
        super().__init__()
        self.twice, self.never = nn.Linear(32, 32), nn.Linear(32, 32)
        self.wide, self.narrow, self.last = nn.Linear(32, 32), nn.Linear(32, 4), nn.Linear(32, 32)

    def forward(self, x):
        y = self.twice(self.twice(x) + x)
        return x + self.last(self.wide(y) + self.narrow(y).sum(-1, keepdim=True))


def test_layers_left_alone_have_their_reasons():
    """Layers that read one tensor are all quantised or none, as readers fuse q, k and v."""
    groups, skipped = awq.plan_block(Odd(), awq.Call((torch.randn(2, 8, 32),), {}), 4, 32)
    assert [group.layers for group in groups] == [("last",)]
    assert "more than once" in skipped["twice"] and "not reached" in skipped["never"]
    assert "4 is not a multiple of 8" in skipped["narrow"] and "shares its input" in skipped["wide"]


def test_zero_weights_in_one_block_do_not_hide_folds(tokens):
    model = llama()
    model.model.layers[0].self_attn.v_proj.weight.data.zero_()
    report = awq.quantize_model(model, tokens, 4, 32, progress=False)
    assert all(line["folded_into"] for line in report["groups"])


def test_layers_without_a_fold_keep_s_at_1(tokens):
    model = opt(activation_function="gelu")
    report = awq.quantize_model(model, tokens, 3, 32, progress=False)
    lines = [line for line in report["groups"] if line["layers"][0].endswith("fc2")]
    assert all(line["folded_into"] is None and line["alpha"] == 0 for line in lines)
    assert all(line["loss"] < line["loss_rtn"] for line in lines)        # clipped all the same


def test_score_is_the_mean_over_the_channels_of_a_row():
    s_X = awq.shared_score(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]))
    assert s_X.tolist() == [2, 2, 5]


def test_blocks_are_the_list_with_most_parameters():
    model = llama()
    model.model.extra = nn.ModuleList([nn.Linear(4, 4)])
    assert awq.find_blocks(model)[0] == "model.layers"


def test_inference_mode_is_refused(tokens):
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        awq.quantize_model(llama(), tokens, 4, 32, progress=False)


def test_each_layer_of_a_group_is_packed_with_its_own_rows():
    block = Odd()
    W, shrink = torch.randn(64, 32), torch.rand(2, 64, 1) * 0.5 + 0.5
    awq.pack_group(block, awq.Group(("wide", "last"), None), W, shrink, 4, 32)
    for layer, rows in ((block.wide, slice(0, 32)), (block.last, slice(32, 64))):
        expected = awq.fake_quantize(W[rows], 4, 32, shrink[:, rows])
        assert torch.equal(layer.dequantized_weight(), expected)
