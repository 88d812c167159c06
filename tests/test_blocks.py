"""Blocks: what they are given, what reads what, and where 1/s can go. No bits in here."""
import pytest
import torch
from conftest import Mlp, Toy, llama, small
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import blocks

GQA = {"num_key_value_heads": 2, "head_dim": 16}
ATTENTION = "q_proj+k_proj+v_proj: {}input_layernorm, o_proj: v_proj, "
OPT = {"ffn_dim": 128, "word_embed_proj_dim": 64}
GATED = ATTENTION + "gate_proj+up_proj: {}post_attention_layernorm, down_proj: up_proj"
MODELS = [      # type, changes of its config, groups and what takes their 1/s, "-" if nothing
    ("llama", GQA, GATED.format("", "")),
    ("gemma", GQA, GATED.format("1 + ", "1 + ")),
    ("nemotron", GQA, ATTENTION.format("1 + ") + "up_proj: 1 + post_attention_layernorm, "
                                                 "down_proj: root of up_proj"),     # squared ReLU
    ("opt", OPT, "q_proj+k_proj+v_proj: self_attn_layer_norm, out_proj: v_proj, "
                 "fc1: final_layer_norm, fc2: fc1"),
    # the norm after the residual: the MLP and the residual read one tensor
    ("opt", {**OPT, "do_layer_norm_before": False},
     "q_proj+k_proj+v_proj: -, out_proj: v_proj, fc1: -, fc2: fc1"),
    ("gpt2", {}, "c_attn: ln_1, c_proj: c_attn, c_fc: ln_2, c_proj: -"),
    ("phi3", {"pad_token_id": 0, "num_key_value_heads": 2},
     "qkv_proj: input_layernorm, o_proj: qkv_proj, gate_up_proj: post_attention_layernorm, "
     "down_proj: gate_up_proj"),
    ("gpt_neox", {"use_parallel_residual": True},
     "query_key_value: input_layernorm, dense: query_key_value, "
     "dense_h_to_4h: post_attention_layernorm, dense_4h_to_h: -"),
    ("falcon", {"multi_query": True, "parallel_attn": True},
     "query_key_value+dense_h_to_4h: input_layernorm, dense: query_key_value, dense_4h_to_h: -")]


def fits(layer):
    return f"{layer.out_features} rows" if layer.out_features % 8 else ""


def plan(model, length=24):
    tokens = torch.randint(0, 96, (2, length), generator=torch.Generator().manual_seed(1))
    return blocks.plan_model(model, tokens, fits)


def plan_toy(block, width=32, length=7, **kwargs):
    """(groups, skipped) of a block that is called with hidden states and kwargs."""
    hidden = torch.randn(1, length, width, generator=torch.Generator().manual_seed(0))
    return blocks.plan_block(block, blocks.Call((None,), kwargs, 0), hidden, fits)


def short(name):
    return name.rpartition(".")[2]


def folds(groups):
    """As in MODELS."""
    return ", ".join(
        f"{'+'.join(map(short, group.layers))}: "
        + (group.fold.kind.replace("weight", short(group.fold.producer)) if group.fold else "-")
        for group in groups)


# ---- Folds of whole models -----------------------------------------------------------------------


@pytest.mark.parametrize("model_type, changes, expected", MODELS)
def test_folds_are_found_and_leave_the_model_as_it_was(model_type, changes, expected):
    """Powers of two: not one bit of the logits changes, unless one side alone is scaled."""
    model = small(model_type, **changes)
    tokens = torch.randint(0, 96, (2, 24))
    before = model(tokens).logits
    found = plan(model)         # gpt2's Conv1D is a Linear from here on
    logits = model(tokens).logits
    assert torch.allclose(logits, before, atol=1e-4) and len(found.blocks) == 2
    assert [folds(groups) for groups in found.groups] == [expected] * 2
    assert [short(name) for name in found.skipped] == ["lm_head"]
    for block, groups in zip(found.blocks, found.groups):
        for group in filter(lambda group: group.fold, groups):
            rows = group.fold.rows
            s = 4.0 ** torch.randint(-1, 2, (int(rows.max()) + 1,))[rows]
            blocks.divide_output(block, group.fold, s)
            assert not torch.equal(model(tokens).logits, logits)
            blocks.multiply_inputs(block, group.layers, s)
            assert torch.equal(model(tokens).logits, logits), group.layers


@given(st.integers(0, 2 ** 31), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
       st.booleans(), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_scaling_equivalence(seed, dtype, powers, index):
    """(W diag(s)) (diag(1/s) x) = W x: to the last bit for powers of two, else nearly."""
    generator = torch.Generator().manual_seed(seed)
    model = llama(dtype, layers=1, seed=seed % 10)
    tokens = torch.randint(0, 96, (2, 8), generator=generator)
    before, found = model(tokens).logits, plan(model)
    group, block = found.groups[0][index], found.blocks[0]
    s = 2 * torch.rand(int(group.fold.rows.max()) + 1, generator=generator) + 0.5
    s = (2.0 ** s.round() if powers else s)[group.fold.rows]
    blocks.divide_output(block, group.fold, s)
    blocks.multiply_inputs(block, group.layers, s)
    after = model(tokens).logits
    if powers:
        assert torch.equal(after, before)
    else:
        assert (after - before).norm() <= 8 * torch.finfo(dtype).eps * before.norm()


def test_weights_that_are_zero_do_not_hide_folds_nor_does_a_plan_change_the_model():
    model = llama()
    model.model.layers[0].self_attn.v_proj.weight.data.zero_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert all(group.fold for groups in plan(model).groups for group in groups)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_blocks_of_different_structure_have_their_own_plans():
    model = llama(layers=3)
    model.model.layers[1].mlp.act_fn = nn.GELU()        # either commutes with no s
    model.model.layers[2].mlp = nn.Sequential(nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 64))
    found = plan(model)
    assert folds(found.groups[0]) == folds(found.groups[1]) == MODELS[0][2]
    assert folds(found.groups[2]).endswith("o_proj: v_proj, 2: 0")
    assert found.skipped == {"model.layers.2.mlp.0": "4 rows",
                             "lm_head": "outside the decoder blocks"}


# ---- Folds of single blocks ----------------------------------------------------------------------


class InPlace(Mlp):
    """also reads what up read, but after it was changed where it lies."""

    def forward(self, hidden_states):
        x = self.norm(hidden_states)
        y = self.up(x)
        return hidden_states + self.also(x.tanh_()) + self.down(nn.functional.relu(y))


class Fused(Mlp):
    """gate and up in one Linear, down called by keyword, a norm that multiplies by 1 + weight."""

    def __init__(self, up_first):
        super().__init__()
        self.up_first, self.norm = up_first, nn.RMSNorm(32)
        self.up, self.down = nn.Linear(32, 128), nn.Linear(64, 32)

    def forward(self, hidden_states):
        x = nn.functional.rms_norm(hidden_states, (32,)) * (1 + self.norm.weight)
        self.norm(hidden_states)            # seen to run, without effect
        a, b = self.up(x).chunk(2, -1)
        up, gate = (a, b) if self.up_first else (b, a)
        return hidden_states + self.down(input=nn.functional.silu(gate) * up)


class HeadNorm(nn.Module):
    """A gain of 16 for each of four heads, between two Linears; v's rows are not folded into."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.out = nn.Linear(64, 64), nn.LayerNorm(16), nn.Linear(64, 64)

    def forward(self, x):
        return x + self.out(self.norm(self.inner(x).unflatten(-1, (4, 16))).flatten(-2))


class Leaves(Mlp):
    """Also puts what it computed into a dict it was given, for a later block."""

    def forward(self, hidden_states, store):
        store["up"] = self.up(self.norm(hidden_states))
        return hidden_states + self.down(nn.functional.relu(store["up"]))


class Numbered(Mlp):
    """Its layers are siblings with numbers, as experts are, and of one shape."""

    def __init__(self):
        super().__init__()
        self.mlp, self.up, self.down = nn.Sequential(
            nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), None, None

    def forward(self, hidden_states):
        return hidden_states + self.mlp(self.norm(hidden_states))


class Odd(nn.Module):
    """A block with a Linear used twice, one that never runs, and one whose width does not fit."""

    def __init__(self):
        super().__init__()
        self.twice, self.never = nn.Linear(32, 32), nn.Linear(32, 32)
        self.wide, self.narrow, self.last = nn.Linear(32, 32), nn.Linear(32, 4), nn.Linear(32, 32)

    def forward(self, x):
        y = self.twice(self.twice(x) + x)
        return x + self.last(self.wide(y) + self.narrow(y).sum(-1, keepdim=True))


class Grouped(nn.Linear):
    """As DeepSeek-V4's: a matrix of [N/2, K] for each half of the input [..., 2 K]."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features // 2, out_features)

    def forward(self, x):
        halves = x.unflatten(-1, (2, -1)).transpose(-2, -3)             # [B, 2, T, K]
        W = self.weight.unflatten(0, (2, -1)).transpose(-1, -2)         # [2, K, N/2]
        return (halves @ W).transpose(-2, -3).flatten(-2) + self.bias


class Renamed(nn.Linear):
    """As Falcon's: the same product in other words."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Clipped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-20, 20)


def with_up(kind):
    block = Mlp()
    block.up = kind(32, 64)
    return block


@pytest.mark.parametrize("block, expected, skipped", [
    (Mlp(lambda x: nn.functional.relu(x).square()), "up: norm, down: root of up", {}),
    (Mlp(lambda x: nn.functional.relu(x).clamp(max=10)), "up: norm, down: -", {}),
    (Mlp(nn.functional.gelu), "up: norm, down: -", {}),
    # a parallel Linear shares s; anything else that reads the norm keeps it from being folded
    (Mlp(also=nn.Linear(32, 32)), "up+also: norm, down: up", {}),
    (Mlp(also=torch.tanh), "up: -, down: up", {}),
    (InPlace(also=nn.Linear(32, 32)), "up: -, also: -, down: up", {}),
    (Numbered(), "0: norm, 2: 0", {}),
    # what does not multiply by its weight stays, and is no place for a fold
    (with_up(Renamed), "up: norm, down: up", {}),
    (with_up(Grouped), "down: -", {"up": "a Grouped, which is not a product with its weight"}),
    (with_up(Clipped), "down: -", {"up": "a Clipped, which is not a product with its weight"}),
    # beside plain layers: times s, unpacked; and one whose weight has no columns for s
    (Mlp(also=nn.Sequential(nn.Linear(32, 1))), "up: norm, down: up", {"also.0": "1 rows"}),
    (Mlp(also=nn.Sequential(Grouped(32, 32))), "up: -, down: up",
     {"also.0": "a Grouped, which is not a product with its weight"}),
    # of the layers that read one tensor all are quantized or none, as readers fuse q, k and v
    (Odd(), "last: -", {"twice": "used more than once in the block", "narrow": "4 rows",
                        "wide": "shares its input with a layer that cannot be quantized",
                        "never": "not reached when the block ran"})])
def test_folds_of_a_block(block, expected, skipped):
    groups, stay = plan_toy(block)
    assert folds(groups) == expected and stay == skipped
    assert all(bool(group.fold) != bool(group.reason) for group in groups)


@pytest.mark.parametrize("block, width, expected, rows", [
    (Fused(up_first=False), 32, "up: 1 + norm, down: up", range(64, 128)),
    (Fused(up_first=True), 32, "up: 1 + norm, down: up", range(64)),
    (HeadNorm(), 64, "inner: -, out: norm", [*range(16)] * 4)])
def test_rows_that_a_fold_divides(block, width, expected, rows):
    groups, _ = plan_toy(block, width)
    assert folds(groups) == expected and groups[1].fold.rows.tolist() == list(rows)


def test_what_a_block_leaves_for_later_ones_must_not_change():
    assert folds(plan_toy(Leaves(), store={})[0]) == "up: norm, down: -"


def test_the_proof_refuses_wrong_rows_a_wrong_kind_and_what_has_no_effect():
    probe = blocks.Probe(Fused(False), blocks.Call((None,), {}, 0), torch.randn(1, 7, 32))
    block, right = probe.block, blocks.Fold("up", torch.arange(64, 128))
    before = [p.clone() for p in block.parameters()]
    assert blocks.folds_are_exact(probe, [right], [["down"]])
    assert all(map(torch.equal, block.parameters(), before))        # left as it was
    for rows in (torch.arange(64), torch.arange(64, 128).flip(0)):  # the gate; the wrong order
        assert not blocks.folds_are_exact(probe, [right._replace(rows=rows)], [["down"]])
    assert not blocks.folds_are_exact(probe, [blocks.Fold("norm", torch.arange(32))], [["up"]])
    norm = blocks.Fold("norm", torch.arange(32), offset=1.0)
    assert blocks.folds_are_exact(probe, [norm], [["up"]])
    block.down.weight.data.zero_()          # its output ignores the layers: anything would pass
    assert not blocks.folds_are_exact(probe, [right], [["down"]])


# ---- Layers that stay ----------------------------------------------------------------------------


class Experts(nn.Module):
    """A mixture of experts of two nn.Linears, two for each token, and a shared expert."""

    def __init__(self, count):
        super().__init__()
        self.norm, self.router = nn.LayerNorm(64), nn.Linear(64, count)
        self.up, self.down = (nn.ModuleList(nn.Linear(64, 64) for _ in range(count)) for _ in "ud")
        self.shared = nn.ModuleDict({"up": nn.Linear(64, 64), "down": nn.Linear(64, 64)})

    def forward(self, hidden_states):
        x = self.norm(hidden_states)
        scores, chosen = self.router(x).softmax(-1).topk(2)         # [B, T, 2]
        y = self.shared["down"](nn.functional.relu(self.shared["up"](x)))
        for i, (up, down) in enumerate(zip(self.up, self.down)):
            weight = (scores * (chosen == i)).sum(-1)
            mine = weight > 0
            y[mine] += weight[mine, None] * down(nn.functional.relu(up(x[mine])))
        return hidden_states + y


def test_routers_stay_and_every_expert_is_reached():
    """Three tokens reach 6 of 8 experts at most, so the block runs until all are known."""
    groups, skipped = plan_toy(Experts(8), width=64, length=3)
    assert list(skipped) == ["router"] and "a router" in skipped["router"]
    assert sorted(groups[0].layers) == ["shared.up", *(f"up.{i}" for i in range(8))]
    assert groups[0].kept == ("router",) and groups[0].fold.producer == "norm"
    assert groups[0].reader == "router"         # the first that is given all tokens
    found = {group.layers: group.fold.producer for group in groups[1:]}
    assert found == {("shared.down",): "shared.up",
                     **{(f"down.{i}",): f"up.{i}" for i in range(8)}}


def test_one_module_used_by_two_blocks_is_left_alone():
    """Neither quantized, nor divided by s."""
    model = llama()
    first, second = model.model.layers
    second.mlp.up_proj, second.input_layernorm = first.mlp.up_proj, first.input_layernorm
    found = plan(model)
    for i, groups in enumerate(found.groups):
        assert folds(groups) == "q_proj+k_proj+v_proj: -, o_proj: v_proj, down_proj: -"
        assert "shared with another" in found.skipped[f"model.layers.{i}.mlp.up_proj"]
        assert "shares its input" in found.skipped[f"model.layers.{i}.mlp.gate_proj"]


# ---- Record and replay ---------------------------------------------------------------------------

SLIDING = {
    "mistral": {**GQA, "sliding_window": 32},
    "qwen2": {**GQA, "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
    "gemma2": {**GQA, "sliding_window": 32},
    "gemma3_text": {**GQA, "sliding_window": 32, "layer_types": ["sliding_attention",
                                                                 "full_attention"]},
    "bloom": {}, "gpt2": {}, "falcon": {"alibi": True}}     # biases of samples times heads


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", SLIDING)
@pytest.mark.parametrize("length", [24, 64])
def test_blocks_replayed_make_what_the_model_makes(model_type, attention, length):
    """Shorter and longer than the window, in micro-batches of 3, 3 and 2 samples."""
    if (model_type, attention) in {("gemma2", "sdpa"), ("bloom", "sdpa")}:
        pytest.skip("transformers has no such attention for it")
    model = small(model_type, attention=attention, **SLIDING[model_type])
    tokens, made = torch.randint(0, 96, (8, length)), []
    layers = blocks.find_blocks(model)[1]
    for block in layers:
        block.register_forward_hook(lambda *args: made.append(blocks.hidden_of(args[2])))
    blocks.run_backbone(model, tokens)
    whole = list(made)
    for part in range(0, 8, 3):
        batch = tokens[part:part + 3]
        calls, last = blocks.record(model, layers, batch)
        hidden = blocks.first_hidden(model, layers, batch)
        for block, call, expected in zip(layers, calls, whole, strict=True):
            hidden = blocks.replay(block, call, hidden)
            assert torch.allclose(hidden, expected[part:part + 3], atol=1e-4)
        assert torch.allclose(last, hidden, atol=1e-5)


def in_turn(model, x, tokens):
    for block in model.blocks:
        x = block(x)
    return x


def shifted_by_text(model, x, tokens):
    for block in model.blocks:
        x = block(x, shift=tokens[..., None] / 96)
    return x


def kept_in_a_dict(model, x, tokens):
    store = {}
    x = model.blocks[0](x, store=store)
    return model.blocks[1](x, shift=store["up"].mean(-1, keepdim=True))


@pytest.mark.parametrize("run, inner, named", [
    (shifted_by_text, [], "arguments that depend on the text"),
    (kept_in_a_dict, [Leaves(), Mlp()], "arguments that depend on the text"),
    (lambda model, x, tokens: in_turn(model, in_turn(model, x, tokens), tokens), [],
     "block 0 runs more than once"),
    (lambda model, x, tokens: model.blocks[1](x), [], r"blocks \[0\] do not run"),
    (lambda model, x, tokens: model.blocks[1](model.blocks[0](x) * 1.01), [],
     "make other hidden states than the model does"),
    (in_turn, [nn.ReLU(), nn.Sequential(nn.Linear(32, 4))], "no layer of Toy can be .* 4 rows"),
    (lambda model, x, tokens: x, [], "no nn.ModuleList")])
def test_models_that_are_not_a_row_of_blocks_are_refused(run, inner, named):
    model = Toy(run, *inner)
    with pytest.raises(ValueError, match=named):
        plan(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_that_the_text_matters_is_seen_where_all_samples_begin_alike():
    tokens = torch.randint(0, 96, (1, 40)).repeat(2, 1)
    with pytest.raises(ValueError, match="arguments that depend on the text"):
        blocks.plan_model(Toy(shifted_by_text), tokens, fits)


def test_hidden_states_by_keyword_changed_in_place_afterwards():
    model = Toy(lambda model, x, tokens: model.blocks[1](
        shift=x[:1, :1] * 0 + 1, hidden_states=model.blocks[0](hidden_states=x)).zero_())
    assert [call.key for call in plan(model).calls] == ["hidden_states"] * 2


def test_blocks_are_the_list_with_most_parameters_among_those_that_run():
    model = llama()
    model.model.extra = nn.ModuleList([nn.Linear(4, 4)])
    model.model.tower = nn.ModuleList(nn.Linear(512, 512) for _ in range(4))
    model.model.norm.register_forward_pre_hook(
        lambda *_: [model.model.extra[0](torch.zeros(4))] and None)
    found = plan(model)
    assert found.prefix == "model.layers"
    assert found.skipped["model.tower.0"] == "outside the decoder blocks"
