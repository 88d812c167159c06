"""Whole models: statistics, search, folds and packing together; calibration text; two processes."""
import copy
import os
import re
from functools import partial

import pandas
import pytest
import torch
import torch.multiprocessing
from conftest import Toy, llama, opt, small
from datasets import Dataset
from test_blocks import GQA, SLIDING, Experts, shifted_by_text
from torch import nn
from transformers import BatchEncoding

import awq
import kernel
import rounding


def quantized(model, tokens, bits=4, group_size=32, **options):
    """(the model, its report)"""
    return model, awq.quantize_model(model, tokens, bits, group_size,
                                     **{"progress": False, "clip": False, **options})


def packed(model):
    """{name: AWQLinear}"""
    return {name: m for name, m in model.named_modules() if isinstance(m, awq.AWQLinear)}


def same_state(state, other):
    return state.keys() == other.keys() and all(
        a.dtype == other[name].dtype and torch.equal(a, other[name]) for name, a in state.items())


# ---- What quantize_model makes -------------------------------------------------------------------


@pytest.mark.parametrize("build, options", [
    (llama, {}), (opt, {"sequential": True}), (llama, {"rounding": "tuned"})])
def test_losses_of_the_report_are_real(build, options, tokens):
    """The last layer's packed weights on the inputs it sees: of the full-precision blocks before
    it or of the quantized ones. And none is above plain rounding's, before they are tuned."""
    original = build()
    model, report = quantized(copy.deepcopy(original), tokens, 3, clip=True, **options)
    line, seen = report["groups"][-1], []
    layers = line["layers"][0].partition(".1.")[0]
    if options:
        original.get_submodule(layers)[0] = model.get_submodule(layers)[0]
    layer = original.get_submodule(line["layers"][0])
    layer.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, -2)))
    original.base_model(tokens)
    error = model.get_submodule(line["layers"][0]).weight / line["s"] - layer.weight
    direct = (error.double() @ seen[0].double().T).square().sum().item() / len(seen[0])
    assert line["loss"] == pytest.approx(direct, rel=2e-3)
    assert "rounding" in options or all(
        line["loss"] <= line["loss_rtn"] for line in report["groups"])
    assert awq.loss_ratio(report["groups"]) < 0.8
    producer = line["folded_into"]
    if build is opt:    # a bias is not packed and shows by what its channels were divided
        ratio = original.get_submodule(producer).bias / model.get_submodule(producer).bias
        assert torch.allclose(ratio, line["s"], rtol=1e-4)


@pytest.mark.parametrize("build, dtype", [
    (llama, torch.bfloat16), (opt, torch.float16), (partial(small, "gpt2"), torch.float32),
    (partial(small, "phi"), torch.bfloat16)])
def test_eight_bits_are_close_to_the_original(build, dtype, tokens):
    model = build(dtype)
    expected = model(tokens).logits.float()
    model, report = quantized(model, tokens, 8)
    logits = model(tokens).logits
    assert logits.dtype == dtype and len(packed(model)) == sum(
        len(line["layers"]) for line in report["groups"])
    assert (logits.float() - expected).norm() < 0.05 * expected.norm()


def test_without_search_it_is_plain_rounding(tokens):
    """And so is round_model: quantize of every weight, and nothing else changed."""
    original, rounded = opt(), opt()
    model, report = quantized(opt(), tokens, 4, scale=False)
    assert awq.round_model(rounded, 4, 32)["groups"] == []
    assert same_state(model.state_dict(), rounded.state_dict())
    for name, layer in packed(rounded).items():
        W = original.get_submodule(name).weight
        assert torch.equal(layer.weight, awq.Q(W, 4, 32)), name
        assert torch.equal(layer.bias, original.get_submodule(name).bias)
    assert all(line["reason"] == "scale is False" and line["alpha"] == 0
               and line["loss"] == pytest.approx(line["loss_rtn"]) for line in report["groups"])


def test_the_report_says_what_was_done(tokens, capsys):
    model = llama(intermediate_size=96)         # no multiple of 64: down_proj stays
    report = awq.quantize_model(model, tokens, 4, 64)
    assert "quantizing" in capsys.readouterr().err
    quantized(llama(layers=1), tokens, progress=False)
    assert capsys.readouterr() == ("", "")
    assert report.keys() == {"bits", "group_size", "seconds", "stages", "skipped", "groups"}
    assert report["skipped"] == {
        "lm_head": "outside the decoder blocks", **{f"model.layers.{i}.mlp.down_proj": "in_features"
        " 96 is not a multiple of group_size 64" for i in (0, 1)}}
    assert model.config.quantization_config["modules_to_not_convert"] == sorted(report["skipped"])
    assert isinstance(model.model.layers[1].mlp.down_proj, nn.Linear) and len(packed(model)) == 12
    assert [line["block"] for line in report["groups"]] == [0, 0, 0, 1, 1, 1]
    first = dict(report["groups"][0])
    assert [point[:2] for point in first.pop("curve")] == [(i / 20, True) for i in range(21)]
    assert first.keys() == {"block", "layers", "folded_into", "fold", "reason", "alpha", "loss_rtn",
                            "loss", "s"}
    assert first["layers"] == [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    assert first["folded_into"] == "model.layers.0.input_layernorm" and first["reason"] == ""


def test_s_is_the_mean_over_the_heads_that_share_values():
    assert awq.mean_over_readers(torch.tensor([1.0, 3, 5]), torch.tensor([0, 0, 1])).tolist() == [
        2, 2, 5]


def test_layers_without_a_fold_keep_s_at_1_and_are_clipped(tokens):
    _, report = quantized(opt(layers=1, activation_function="gelu"), tokens, 3, clip=True)
    line = report["groups"][-1]
    assert line["folded_into"] is None and line["alpha"] == 0 and "tried: fc1" in line["reason"]
    assert line["loss"] < line["loss_rtn"] and (line["s"] == 1).all()


@pytest.mark.parametrize("chosen_bits", [4, 8])
def test_a_rounding_chooses_the_integers_that_are_packed(chosen_bits, tokens):
    """It is given W diag(s) and C / (s s^T); what it returns is stored and scored."""
    losses = []

    def nothing(W, delta, zero, bits, C):
        losses.append(((W @ C) * W).sum().item())           # of W_hat = 0
        assert bits == chosen_bits and W.shape[1] == len(C) == 32 * delta.shape[1]
        return zero.repeat_interleave(32, 1), delta, zero

    model, report = quantized(llama(layers=1), tokens, chosen_bits, rounding=nothing)
    assert not any(layer.weight.any() for layer in packed(model).values())
    assert len(losses) == 4 and any(line["alpha"] for line in report["groups"])
    assert sum(losses) == pytest.approx(sum(line["loss"] for line in report["groups"]), rel=1e-3)


def test_gptq_descent_and_tuning_make_the_model_better_in_turn(tokens):
    """Each from the same grid: by the logits on the calibration text."""
    expected, errors = llama(layers=1)(tokens).logits, []
    for rounding in ("nearest", "gptq", "descent", "tuned"):
        model, _ = quantized(llama(layers=1), tokens, 3, scale=False, rounding=rounding)
        errors.append((model(tokens).logits - expected).norm().item())
    assert errors == sorted(errors, reverse=True)


def test_what_few_tokens_say_of_c_is_shrunk(tokens):
    """On text that was not seen the named roundings are better; a function's C is left alone."""
    seen, unseen, errors = tokens[:1], tokens[1:], []
    expected = llama(layers=1)(unseen).logits
    for chosen in ("descent", lambda *given: rounding.descend(*given)):
        model, _ = quantized(llama(layers=1), seen, 3, scale=False, rounding=chosen)
        errors.append((model(unseen).logits - expected).norm().item())
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("rubbish", [
    lambda W, delta, zero, bits, C: (torch.full(W.shape, 16, dtype=torch.uint8), delta, zero),
    lambda W, delta, zero, bits, C: (torch.zeros(W.shape), delta, zero),
    lambda W, delta, zero, bits, C: (W.new_zeros(W.shape, dtype=torch.uint8), delta / 0, zero)])
def test_a_rounding_that_gives_what_cannot_be_stored_is_refused(rubbish, tokens):
    with pytest.raises(ValueError, match="rounding .* it must give q and zero as uint8"):
        quantized(llama(layers=1), tokens, rounding=rubbish)


@pytest.mark.parametrize("model_type", ["bloom", "gemma3_text"])
def test_micro_batches_do_not_change_the_result(model_type):
    """8 samples longer than the window of 32, 3 at a time as one at a time."""
    tokens = torch.randint(0, 96, (8, 64), generator=torch.Generator().manual_seed(0))
    losses, weights = [], []
    for batch_size in (1, 3):
        model, report = quantized(small(model_type, **SLIDING[model_type]), tokens,
                                  batch_size=batch_size)
        losses.append([(line["loss_rtn"], line["loss"]) for line in report["groups"]])
        weights.append(torch.cat([layer.weight.flatten() for layer in packed(model).values()]))
    (rtn, ours), (rtn_again, ours_again) = (zip(*pairs) for pairs in losses)
    assert rtn == pytest.approx(rtn_again, rel=1e-4)        # statistics are sums: no more
    assert ours == pytest.approx(ours_again, rel=1e-2)
    assert ((weights[0] - weights[1]).abs() > 0.2).float().mean() < 0.02


@pytest.mark.parametrize("model_type, dtype", [
    ("llama", torch.bfloat16), ("gpt2", torch.float16), ("gemma", torch.float64)])
def test_the_default_dtype_changes_nothing(model_type, dtype, tokens, tmp_path):
    """Of what is searched, saved, loaded and computed."""
    found = []
    for default in (torch.float32, dtype):
        model = small(model_type, num_hidden_layers=1, **GQA if model_type != "gpt2" else {})
        torch.set_default_dtype(default)
        try:
            model, report = quantized(model, tokens, clip=True)
            awq.save_quantized(model, tmp_path / str(default))
            logits = awq.load_quantized(tmp_path / str(default))(tokens).logits
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(([line["curve"] for line in report["groups"]], logits.tolist(),
                      (tmp_path / str(default) / "model.safetensors").read_bytes()))
    assert found[0] == found[1]


def test_experts_with_too_few_tokens_are_rounded_and_named(tokens):
    """No token at all for expert 3: plain rounding, and the report says so. The router, which
    reads what the shared expert reads, is scaled with it and not packed."""
    model = llama(layers=1)
    experts = model.model.layers[0].mlp = Experts(4)
    experts.router.bias.data[3] = -1e9
    router, W = experts.router.weight.detach().clone(), experts.down[3].weight.detach().clone()
    model, report = quantized(model, tokens)
    lines = {line["layers"][0].rpartition("mlp.")[2]: line for line in report["groups"]}
    assert lines["down.3"]["reason"] == "0 of 192 calibration tokens: too few, plain rounding"
    assert torch.equal(experts.down[3].weight, awq.Q(W, 4, 32)) and not lines["down.3"]["fold"]
    assert lines["down.2"]["fold"] == "weight" and not lines["down.2"]["reason"]
    shared = next(line for line in report["groups"] if line["folded_into"] and
                  line["folded_into"].endswith("mlp.norm"))
    assert torch.equal(experts.router.weight, router * shared["s"]) and shared["alpha"] > 0
    # a dense layer is searched however few there are
    _, report = quantized(llama(layers=1), tokens[:1, :8])
    assert not any("too few" in line["reason"] for line in report["groups"])


# ---- Refusals ------------------------------------------------------------------------------------


def changed(change):
    """A function that makes a LLaMA and changes it."""
    def make():
        model = llama(layers=1)
        change(model)
        return model
    return make


TOKENS = torch.arange(16).view(2, 8)
REFUSED = [
    ({"model": changed(lambda m: setattr(m, "peft_config", {"default": None}))},
     r"adapter: merge it first \(merge_and_unload"),
    ({"model": changed(lambda m: m.add_module("lora_A", nn.Linear(8, 8)))}, "merge it first"),
    ({"model": changed(lambda m: setattr(m.config, "quantization_config", {"quant_method": "x"}))},
     r"quantized already \(x\)"),
    ({"model": changed(lambda m: setattr(m.config, "is_encoder_decoder", True))},
     "encoder-decoder: a decoder-only model is needed"),
    ({"model": changed(lambda m: awq.round_model(m, 4, 32))}, r"quantized already \(awq\)"),
    ({"model": changed(lambda m: m.to("meta"))}, "embed_tokens.weight .* on meta"),
    ({"model": changed(lambda m: m.double())}, "embed_tokens.weight .* torch.float64"),
    ({"model": lambda: nn.Linear(4, 4)}, "model is a Linear"),
    ({"model": changed(lambda m: m.model.norm.weight.data[3:4].fill_(torch.nan))},
     "model.norm.weight contains NaN"),
    ({"model": lambda: Toy(shifted_by_text)}, "arguments that depend on the text"),
    ({"tokens": [[1, 2]]}, "tokens is list"),
    ({"tokens": TOKENS[0]}, r"tokens is torch.int64 \(8,\)"),
    ({"tokens": TOKENS.int()}, "tokens is torch.int32"),
    ({"tokens": TOKENS[:0]}, "tokens has 0 samples"),
    ({"tokens": TOKENS[:, :0]}, "sequence length is 0"),
    ({"tokens": TOKENS.repeat(1, 9)}, r"sequence length is 72: it must be in \[1, 64\]"),
    ({"tokens": TOKENS + 88}, r"tokens run from 88 to 103: they must be in \[0, 96\)"),
    ({"tokens": TOKENS - 1}, "tokens run from -1"),
    ({"bits": 5}, "bits is 5"), ({"bits": 4.0}, "bits is 4.0"),
    ({"group_size": 0}, "group_size is 0"),
    ({"model": lambda: small("gpt2"), "group_size": 7}, "no layer of"),    # its Conv1D are back
    ({"group_size": 48}, "no layer .* in_features 128 is not a multiple of group_size 48"),
    ({"batch_size": 0}, "batch_size is 0"), ({"batch_size": 2.0}, "batch_size is 2.0"),
    ({"rounding": "magic"}, "rounding is 'magic'.*gptq"), ({"device": "meta"}, "device is 'meta'"),
]


@pytest.mark.parametrize("changes, named", REFUSED, ids=[named for _, named in REFUSED])
def test_what_cannot_be_quantized_is_refused_before_the_work(changes, named):
    """And the model is as it was."""
    options = {"model": lambda: llama(layers=1), "tokens": TOKENS, "group_size": 32, **changes}
    model = options.pop("model")()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=named) as error:
        quantized(model, **options)
    assert "\n" not in str(error.value)
    assert list(map(type, model.modules())) == list(map(type, before.modules()))
    assert all(a.is_meta or torch.equal(a.nan_to_num(), b.nan_to_num())
               for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_plain_rounding_refuses_the_same_models():
    with pytest.raises(ValueError, match="arguments that depend on the text"):
        awq.round_model(Toy(shifted_by_text), 4, 32)


@pytest.mark.parametrize("context, named", [
    (torch.inference_mode(), "inference_mode"),
    (torch.autocast("cpu", torch.bfloat16), "autocast is on")], ids=["inference", "autocast"])
def test_contexts_that_spoil_the_search_are_refused(context, named):
    with context, pytest.raises(ValueError, match=named):
        quantized(llama(layers=1), TOKENS)


def test_a_step_above_float16_is_named():
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1e8)
    for work in (lambda: quantized(copy.deepcopy(model), TOKENS, scale=False),
                 lambda: awq.round_model(model, 4, 32)):
        with pytest.raises(ValueError, match="^model.layers.1.mlp.up_proj: .* at most 65504"):
            work()


def large_outputs(embedding, layer):
    """The largest float16 numbers, to which the first MLP adds."""
    embedding[95] = 65504
    layer.mlp.down_proj.weight.data *= 300


def large_inputs(embedding, layer):
    """A first channel as large as a norm lets it be, and its gain too."""
    embedding[95] = torch.eye(64)[0] * 100
    layer.self_attn.o_proj.weight.data.zero_()
    layer.post_attention_layernorm.weight.data[0] = 5e4 / 6
    layer.mlp.up_proj.weight.data[:, 0] = layer.mlp.gate_proj.weight.data[:, 0] = 0


@pytest.mark.parametrize("enlarge, sample, named", [
    (large_outputs, 0, "the output of block 0 contains NaN or Inf in torch.float16"),   # at once
    (large_outputs, 7, "the output of model.layers.0 contains NaN or Inf"),
    (large_inputs, 7, "input of model.layers.0.mlp.down_proj contains NaN")])
def test_what_overflows_for_one_token_is_named(enlarge, sample, named, tokens):
    model = llama(torch.float16)
    enlarge(model.model.embed_tokens.weight.data, model.model.layers[0])
    tokens[tokens == 95] = 0
    tokens[sample, 3] = 95
    with pytest.raises(ValueError, match=named):
        quantized(model, tokens, scale=False)


def test_a_fold_that_does_not_fit_its_block_is_an_error(tokens):
    """Proven on another block, wrong here: o's s into k's rows changes what the block adds."""
    plan = awq.blocks.plan_model(llama(layers=1), tokens, lambda layer: "")
    group = next(group for group in plan.groups[0] if "o_proj" in group.layers[0])
    wrong = group._replace(fold=group.fold._replace(producer="self_attn.k_proj"))
    work = awq.Work(plan.blocks[0], "model.layers.0", plan.calls[0], plan.hidden, tokens.numel())
    s = torch.linspace(0.5, 2, 32)[group.fold.rows]
    with pytest.raises(ValueError, match="folding s into model.layers.0.self_attn.k_proj changed"):
        awq.fold(work, wrong, s)


# ---- Calibration text ----------------------------------------------------------------------------

TEXTS = [f"A document, the one with the number {i}, about nothing at all. " * 4 for i in range(30)]


@pytest.mark.parametrize("given", [
    tuple, iter, pandas.Series, lambda texts: Dataset.from_dict({"text": texts}),
    lambda texts: Dataset.from_dict({"text": texts})["text"],
    lambda texts: pandas.DataFrame({"text": texts})], ids="tuple generator Series Dataset Column "
    "DataFrame".split())
def test_texts_are_taken_as_people_have_them(given, tokenizer):
    """Joined by blank lines, tokenized, cut: windows of the whole, without padding, by seed."""
    whole = tokenizer("\n\n".join(TEXTS)).input_ids
    windows = [whole[i:i + 16] for i in range(0, len(whole), 16)]
    found = awq.calibration_tokens(given(TEXTS), tokenizer, 5, 16, seed=1)
    assert found.shape == (5, 16) and found.dtype == torch.int64
    assert all(row in windows for row in found.tolist())
    assert torch.equal(found, awq.calibration_tokens(TEXTS, tokenizer, 5, 16, seed=1))
    assert not torch.equal(found, awq.calibration_tokens(TEXTS, tokenizer, 5, 16, seed=2))


@pytest.mark.parametrize("given", [
    list, lambda ids: BatchEncoding({"input_ids": ids}),
    lambda ids: Dataset.from_dict({"input_ids": ids, "text": ["x"] * len(ids)})])
def test_token_ids_are_taken_as_they_are(given):
    ids = [list(range(i, i + 7)) for i in range(12)]
    found = awq.calibration_tokens(given(ids), None, 10, 8)
    flat = [i for row in ids for i in row]
    assert sorted(found.tolist()) == sorted(flat[i:i + 8] for i in range(0, 80, 8))
    assert awq.calibration_tokens(BatchEncoding({"input_ids": TOKENS}), None) is TOKENS


def test_files_of_text_and_of_json_lines(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    Dataset.from_dict({"text": TEXTS}).to_json(tmp_path / "a.jsonl")
    Dataset.from_dict({"content": TEXTS}).to_json(tmp_path / "b.jsonl")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    expected = awq.calibration_tokens(TEXTS, tokenizer, 5, 16)
    for given in (tmp_path / "a.txt", str(tmp_path / "a.txt"), tmp_path / "a.jsonl"):
        assert torch.equal(awq.calibration_tokens(given, tokenizer, 5, 16), expected)
    for name, named in (("b.jsonl", "rows have .*content.*, no 'text'"), ("b.txt", "not UTF-8")):
        with pytest.raises(ValueError, match=named):
            awq.load_documents(tmp_path / name)


@pytest.mark.parametrize("given, named", [
    (TEXTS[:1], "has .* tokens, . windows of 16: 50 samples need 800 tokens"), ([], "has 0 tokens"),
    ("secret " * 50, "data is a text of 350 characters"), (5, "calib_data is a int"),
    (None, "is a NoneType"), (b"secret", "is a bytes"), ([["secret"]], "is a list"),
    (["secret", None], "is a list"), ({"secret": ["secret"]}, "is a dict"),
    (Dataset.from_dict({"content": ["secret"]}), "is a Dataset"), ([1, 2, 3], "is a list")])
def test_what_is_no_calibration_text_is_named_but_not_printed(given, named, tokenizer):
    with pytest.raises(ValueError, match=named) as error:
        awq.calibration_tokens(given, tokenizer, 50, 16)
    assert "secret" not in str(error.value) and "document" not in str(error.value)


# ---- Several processes ---------------------------------------------------------------------------


def rank_of_two(rank, folder, victim):
    """One of two processes: its report and weights, or its error, go to a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    model = llama()
    if rank == victim:      # dies in the middle of the second block
        model.model.layers[1].mlp.register_forward_pre_hook(
            lambda *_: os._exit(9) if len(packed(model)) else None)
    try:
        _, report = quantized(model, torch.load(f"{folder}/tokens"), batch_size=2)
        torch.save((model.state_dict(), report["groups"]), f"{folder}/{rank}")
    except ConnectionError as error:
        torch.save(str(error), f"{folder}/{rank}")
    os._exit(0)


def two_ranks(folder, tokens, victim=None):
    """Exit codes of two processes."""
    torch.save(tokens, folder / "tokens")
    both = torch.multiprocessing.start_processes(rank_of_two, (folder, victim), nprocs=2,
                                                 join=False, start_method="fork").processes
    for process in both:
        process.join(60)
        process.kill()
    return [process.exitcode for process in both]


def test_two_ranks_end_with_the_weights_of_one_process(tokens, tmp_path):
    """5 samples: an odd number. The same bits on both ranks, those of one but for summation."""
    assert two_ranks(tmp_path, tokens[:5]) == [0, 0]
    (first, lines), (second, _) = (torch.load(tmp_path / f"{rank}") for rank in (0, 1))
    assert same_state(first, second)
    model, report = quantized(llama(), tokens[:5])
    assert [line["curve"][0][-1] for line in lines] == pytest.approx(
        [line["curve"][0][-1] for line in report["groups"]], rel=1e-3)
    for name, layer in packed(model).items():
        q = kernel.unpack(layer.qweight, 4, layer.out_features)
        other = kernel.unpack(first[f"{name}.qweight"], 4, layer.out_features)
        assert (q != other).float().mean() < 0.02, name     # ties of the search, no more


def test_a_rank_that_dies_ends_the_other_with_one_line(tokens, tmp_path):
    assert two_ranks(tmp_path, tokens, victim=1) == [0, 9]
    assert re.match(r"rank 0 of 2: another rank died or did not answer", torch.load(tmp_path / "0"))


def test_more_ranks_than_samples_are_refused(monkeypatch):
    monkeypatch.setattr(awq, "ranks", lambda: (0, 3))
    with pytest.raises(ValueError, match="tokens has 2 samples: each of 3 ranks needs one"):
        quantized(llama(layers=1), TOKENS)
