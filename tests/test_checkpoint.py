"""Save, load, the API of AutoAWQ, calibration data and bad checkpoints."""
import json
import os
import shutil
import struct
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT, llama, opt, randomize
from safetensors.torch import load_file, save_file

import awq


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder of a quantised LLaMA, its logits, tokens)."""
    folder = tmp_path_factory.mktemp("checkpoint") / "llama"
    tokens = torch.randint(0, 96, (4, 24), generator=torch.Generator().manual_seed(0))
    model = llama(torch.float16)
    awq.quantize_model(model, tokens, 4, 32, progress=False)
    awq.save_quantized(model, folder)
    return folder, model(tokens).logits, tokens


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("bits", awq.BITS)
@pytest.mark.parametrize("build", [llama, opt])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_give_the_same_logits(build, bits, dtype, tokens, tmp_path):
    model = build(dtype)
    awq.quantize_model(model, tokens, bits, 32, progress=False)
    awq.save_quantized(model, tmp_path / "q")
    loaded = awq.load_quantized(tmp_path / "q")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.dtype == dtype
    assert all(m.scales.dtype == torch.float16 for m in loaded.modules()
               if isinstance(m, awq.AWQLinear))
    assert os.listdir(tmp_path) == ["q"]


COMMON = dict(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
              max_position_embeddings=64)
ROTARY = dict(**COMMON, num_key_value_heads=2, intermediate_size=128, head_dim=16, pad_token_id=0)


@pytest.mark.parametrize("kind, config, folds", [
    ("gemma2", dict(**ROTARY, sliding_window=8), {"1 + gain": 2, "rows": 2}),
    ("qwen3", ROTARY, {"gain": 2, "rows": 2}),
    ("phi3", ROTARY, {"gain": 2, "rows": 2}),                           # fused qkv and gate_up
    ("gpt_neox", dict(**COMMON, intermediate_size=128), {"gain": 2, "rows": 1, None: 1}),
    ("gpt2", dict(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64),
     {"gain": 2, "rows": 1, None: 1}),                                  # Conv1D, GELU
])
def test_other_families_fold_and_load(kind, config, folds, tokens, tmp_path):
    """What is folded where follows from the block alone; loaded again, the logits are the same."""
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    model = randomize(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)),
                      torch.float32)
    report = awq.quantize_model(model, tokens, 4, 32, progress=False)
    kinds = [line["fold"] for line in report["groups"] if line["block"] == 0]
    assert {kind: kinds.count(kind) for kind in kinds} == folds
    awq.save_quantized(model, tmp_path / "q")
    assert torch.equal(awq.load_quantized(tmp_path / "q")(tokens).logits, model(tokens).logits)


def test_config_and_tensors_are_the_awq_format(saved):
    folder, _, _ = saved
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True,
                      "version": "gemm", "modules_to_not_convert": ["lm_head"]}
    tensors = load_file(folder / "model.safetensors")
    q = tensors["model.layers.0.mlp.down_proj.qweight"]
    assert (q.shape, q.dtype) == ((128, 8), torch.int32)
    scales = tensors["model.layers.0.mlp.down_proj.scales"]
    assert (scales.shape, scales.dtype) == ((4, 64), torch.float16)
    assert tensors["model.layers.0.mlp.down_proj.qzeros"].shape == (4, 8)
    assert "model.layers.0.mlp.down_proj.weight" not in tensors


def test_a_loaded_model_saves_again(saved, tmp_path):
    folder, logits, tokens = saved
    loaded = awq.load_quantized(folder)
    awq.save_quantized(loaded, tmp_path / "again")
    assert torch.equal(awq.load_quantized(tmp_path / "again")(tokens).logits, logits)
    assert (json.loads((folder / "config.json").read_text())["quantization_config"]
            == json.loads((tmp_path / "again/config.json").read_text())["quantization_config"])


def test_from_pretrained_of_transformers_reads_it(saved):
    from transformers import AutoModelForCausalLM
    folder, logits, tokens = saved
    awq.register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert torch.equal(model(tokens).logits, logits)
    text = model.generate(tokens[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert text.shape == (1, 8)


@pytest.mark.parametrize("group_size", [-1, 64])
def test_other_groups_load(group_size, tokens, tmp_path):
    model = llama()
    awq.round_model(model, 3, group_size)
    awq.save_quantized(model, tmp_path / "q")
    assert torch.equal(awq.load_quantized(tmp_path / "q")(tokens).logits, model(tokens).logits)


def test_tensors_follow_the_written_description(tmp_path):
    """The file against loops over single numbers, written from the format's description alone.

    Nibble i (bits 4 i .. 4 i + 3) of word c holds column 8 c + [0, 2, 4, 6, 1, 3, 5, 7][i] of a
    [K, N] matrix, in qweight and in qzeros; W[n, k] = (q - z) scale.
    """
    model = llama(layers=1)
    W = model.model.layers[0].mlp.down_proj.weight.data.clone()         # [64, 128]
    awq.round_model(model, 4, 32)
    awq.save_quantized(model, tmp_path / "q")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    qweight, qzeros, scales = (tensors[f"model.layers.0.mlp.down_proj.{key}"].tolist()
                               for key in ("qweight", "qzeros", "scales"))
    order, (N, K) = [0, 2, 4, 6, 1, 3, 5, 7], W.shape
    assert (len(qweight), len(qzeros), len(scales), len(scales[0])) == (K, K // 32, K // 32, N)

    def entry(words, row, column):
        word = words[row][column // 8] % 2 ** 32                        # int32, as unsigned
        return word // 16 ** order.index(column % 8) % 16

    q, delta, zero = (x.tolist() for x in awq.quantize(W, 4, 32))
    for n in range(N):
        for g in range(K // 32):
            assert scales[g][n] == delta[n][g] and entry(qzeros, g, n) == zero[n][g]
        for k in range(K):
            assert entry(qweight, k, n) == q[n][k]
            error = W[n, k].item() - (entry(qweight, k, n) - entry(qzeros, k // 32, n)) \
                * scales[k // 32][n]
            assert abs(error) <= 1.01 * scales[k // 32][n]              # half a step, and clamping


# --- transformers' own entry points --------------------------------------------------------------


def plain_load(folder, **kwargs):
    from transformers import AutoModelForCausalLM
    awq.register()
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def set_config(folder, **changes):
    """Change the quantization_config of a folder; None as a value is JSON's null."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("changes", [
    dict(modules_to_not_convert=None, version="GEMM"),                      # AutoAWQ, older
    dict(modules_to_not_convert=["lm_head"], backend="autoawq", do_fuse=False, exllama_config=None),
    dict(version=None, format="gemm", backend="auto", desc_act=False, sym=False, meta={"a": 1}),
])
def test_configs_that_others_write_are_read(copied, changes, saved, tmp_path):
    set_config(copied, **changes)
    model = plain_load(copied, dtype="auto")
    assert torch.equal(model(saved[2]).logits, saved[1])
    model.save_pretrained(tmp_path / "again")                       # as transformers saves it
    again = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert again == json.loads((saved[0] / "config.json").read_text())["quantization_config"]
    assert torch.equal(plain_load(tmp_path / "again", dtype="auto")(saved[2]).logits, saved[1])


@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
@pytest.mark.parametrize("shard_size", ["5GB", "30KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_from_pretrained_takes_dtype_shards_and_device_map(saved, tmp_path, dtype, shard_size,
                                                           device_map):
    if device_map is not None:
        pytest.importorskip("accelerate", reason="device_map needs pip install accelerate")
    plain_load(saved[0], dtype="auto").save_pretrained(tmp_path, max_shard_size=shard_size)
    sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert len(sizes) > 2 if shard_size == "30KB" else len(sizes) == 1
    model = plain_load(tmp_path, dtype=dtype, device_map=device_map)
    assert model.dtype == dtype and model.model.layers[0].mlp.up_proj.scales.dtype == torch.float16
    logits = model(saved[2]).logits
    assert logits.dtype == dtype
    if dtype == torch.float16:
        assert torch.equal(logits, saved[1])
    assert (logits.float() - saved[1].float()).norm() < 0.02 * saved[1].float().norm()


def test_a_model_of_the_hub_loads(saved, tmp_path):
    """From a cache laid out as huggingface_hub does, shards being links to blobs elsewhere."""
    cache = tmp_path / "models--org--name"
    snapshot, blobs = cache / "snapshots" / ("0" * 40), cache / "blobs"
    awq.save_quantized(awq.load_quantized(saved[0]), snapshot, shard_size="30KB")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    blobs.mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(blobs / file.name.replace(".", "-"))
        file.symlink_to(blobs / file.name.replace(".", "-"))
    for load in (awq.load_quantized, plain_load):
        model = load("org/name", cache_dir=tmp_path, dtype="auto")
        assert torch.equal(model(saved[2]).logits, saved[1])
    (snapshot / "model.safetensors.index.json").unlink()
    with pytest.raises(OSError, match="model 'org/name' cannot be loaded"):
        awq.load_quantized("org/name", cache_dir=tmp_path)


def test_layers_that_transformers_renames_on_disk_load(tokens, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("hrm_text", **ROTARY)).eval()
    awq.round_model(model, 4, 32)
    awq.save_quantized(model, tmp_path / "q")
    stored = load_file(tmp_path / "q" / "model.safetensors").keys()
    assert {name for name in stored if "qweight" in name} - model.state_dict().keys()
    assert torch.equal(awq.load_quantized(tmp_path / "q")(tokens).logits, model(tokens).logits)


def test_biases_follow_the_dtype_that_is_asked_for(tokens, tmp_path):
    model = opt(torch.float32)
    awq.round_model(model, 4, 32)
    awq.save_quantized(model, tmp_path / "q")
    loaded = plain_load(tmp_path / "q", dtype=torch.bfloat16)
    layer = loaded.model.decoder.layers[0].fc1
    assert torch.equal(layer.bias, model.model.decoder.layers[0].fc1.bias.bfloat16())
    assert layer.bias.abs().max() > 0 and layer.scales.dtype == torch.float16


def test_pipeline_generates(folder, tmp_path):
    from transformers import pipeline
    model = awq.AutoAWQForCausalLM.from_pretrained(folder)
    awq.round_model(model.model, 4, 32)
    model.save_quantized(tmp_path / "q", model.tokenizer)
    awq.register()
    text = pipeline("text-generation", model=str(tmp_path / "q"), dtype=torch.float32)(
        "def f(", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    ids = model.tokenizer("def f(", return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=3, do_sample=False)[0]
    assert text == model.tokenizer.decode(expected) and text.startswith("def f(")


@pytest.mark.parametrize("dtype, count", [(torch.float32, 12), (torch.float16, 12),
                                          (torch.bfloat16, 6)])
def test_greedy_text_is_that_of_the_fake_quantised_model(dtype, count, tmp_path):
    """Packed, saved and loaded, against plain Linears that hold W_hat in the same dtype."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    packed = AutoModelForCausalLM.from_pretrained(ROOT / "tinylm", dtype=dtype)
    awq.round_model(packed, 4, 128)
    awq.save_quantized(packed, tmp_path / "q")
    fake = AutoModelForCausalLM.from_pretrained(ROOT / "tinylm", dtype=dtype)
    for name, module in packed.named_modules():
        if isinstance(module, awq.AWQLinear):
            fake.get_submodule(name).weight.data = module.dequantized_weight().to(dtype)
    ids = AutoTokenizer.from_pretrained(ROOT / "tinylm")("The value of the", return_tensors="pt")
    options = dict(max_new_tokens=count, do_sample=False, pad_token_id=0)
    text = plain_load(tmp_path / "q", dtype=dtype).generate(**ids, **options)
    # Each token is the other model's first choice, ties within the dtype's rounding counted as one.
    logits = fake(text).logits[0, -count - 1:-1].detach().float()
    chosen = logits.gather(1, text[0, -count:, None])[:, 0]
    best = logits.amax(1)
    assert (best - chosen <= 2 * torch.finfo(dtype).eps * best).all()
    assert len(set(text[0, -count:].tolist())) > 2


def test_compiled_layer_does_not_break_the_graph():
    W = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    layer = awq.AWQLinear.from_weight(W, torch.ones(32), 4, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 5):
            x = torch.randn(rows, 64).to(dtype)
            assert torch.equal(compiled(x), layer(x))


def test_remote_code_never_runs_unasked(copied, monkeypatch):
    """A checkpoint that brings code is refused at once (no prompt), and by default."""
    config = json.loads((copied / "config.json").read_text())
    config.update(model_type="own", auto_map={"AutoConfig": "own.Config",
                                              "AutoModelForCausalLM": "own.Model"})
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}}))
    (copied / "own.py").write_text("raise SystemExit('this code has run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    for load in (awq.load_quantized, awq.AutoAWQForCausalLM.from_pretrained,
                 awq.AutoAWQForCausalLM.from_quantized, awq.load_tokenizer):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(copied)
    with pytest.raises(SystemExit, match="this code has run"):
        awq.load_quantized(copied, trust_remote_code=True)


# --- bad input -----------------------------------------------------------------------------------


def break_header(path, change):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length:])


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


LAYER = "model.layers.1.mlp.up_proj"
QWEIGHT, QZEROS, SCALES = (f"{LAYER}.{key}" for key in ("qweight", "qzeros", "scales"))


@pytest.mark.parametrize("damage, named", [
    (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
    (lambda f: (f / "config.json").write_text("not json"), "config.json cannot be read as JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json holds a list"),
    (lambda f: (f / "config.json").write_bytes(b""), "config.json cannot be read as JSON"),
    (lambda f: (f / "config.json").write_text("[" * 10 ** 5), "config.json cannot be read as JSON"),
    (lambda f: change_json(f / "config.json", lambda c: c.pop("quantization_config")),
     "config.json has no quantization_config"),
    (lambda f: change_json(f / "config.json", lambda c: c.update(quantization_config=[4])),
     "config.json has no quantization_config"),
    (lambda f: (f / "model.safetensors").unlink(), "has no .*safetensors: only those are read"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
     r"has no .*safetensors.*pytorch_model.bin"),
    (lambda f: change_tensors(f, lambda t: t.update({"model.layers.7.x.scales": torch.ones(2)})),
     "unexpected tensors: model.layers.7.x.scales"),
    (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "index.json holds a list"),
    (lambda f: (f / "model.safetensors.index.json").write_text('{"metadata": {}}'),
     "index.json must have"),
    (lambda f: (f / "model.safetensors.index.json").write_text(
        '{"metadata": {}, "weight_map": {"x": 1}}'), "index.json must have"),
])
def test_damage_that_transformers_would_meet_first_is_named(copied, damage, named):
    damage(copied)
    with pytest.raises(ValueError, match=named):
        awq.load_quantized(copied)


@pytest.mark.parametrize("damage, named", [
    (lambda t: t.update({LAYER + ".weight": torch.ones(128, 64)}),
     f"{LAYER}.weight has no place beside a qweight"),
    (lambda t: t.update({LAYER + ".bias": torch.ones(128)}), f"{LAYER}.bias has no place"),
    (lambda t: t.update({LAYER + ".g_idx": torch.ones(64).int()}), f"{LAYER}.g_idx has no place"),
    (lambda t: t.pop(QWEIGHT), f"tensor {QWEIGHT} is missing"),
    (lambda t: t.pop(QZEROS), f"tensor {QZEROS} is missing"),
    (lambda t: t.pop(SCALES), f"tensor {SCALES} is missing"),
    (lambda t: t.update(other=t.pop(QWEIGHT)), f"tensor {QWEIGHT} is missing"),
    (lambda t: t.update({QWEIGHT: t[QWEIGHT][:32]}), f"tensor {QWEIGHT} is .*32, 16.*64, 16"),
    (lambda t: t.update({QZEROS: t[QZEROS][:1]}), f"tensor {QZEROS} is .*1, 16.*2, 16"),
    (lambda t: t.update({QZEROS: t[QZEROS].short()}), f"tensor {QZEROS} is .*I16.*I32"),
    (lambda t: t.update({SCALES: t[SCALES].float()}), f"tensor {SCALES} is .*F32.*F16"),
    (lambda t: t.update({SCALES: t[SCALES].bfloat16()}), f"tensor {SCALES} is .*BF16.*F16"),
    (lambda t: t[SCALES].__setitem__((1, 5), torch.nan), f"tensor {SCALES} contains NaN or Inf"),
    (lambda t: t[SCALES].__setitem__((0, 0), torch.inf), f"tensor {SCALES} contains NaN or Inf"),
    (lambda t: t.update({QWEIGHT: torch.zeros(128, 8).int()}), f"{QWEIGHT} is .*GEMV's layout"),
    (lambda t: t.update({QWEIGHT: torch.zeros(4, 256).int()}), f"{QWEIGHT} is .*Marlin's layout"),
    (lambda t: t.update({QWEIGHT: torch.zeros(8, 128).int()}), f"{QWEIGHT} is .*GPTQ's layout"),
    (lambda t: t.update({QWEIGHT: torch.zeros(32, 64).short(), LAYER + ".scaled_zeros":
                         t.pop(QZEROS)}), f"{QWEIGHT} is .*TinyChat's"),
    (lambda t: t.pop("model.norm.weight"), "missing tensors: model.norm.weight"),
    (lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:32]}),
     r"tensor model.norm.weight is .*F16.*\(32,\).*\(64,\)"),
    (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].int()}),
     "tensor lm_head.weight is .*I32.*the model has torch.float"),
    (lambda t: t.update({"model.layers.9" + QZEROS[14:]: t[QZEROS].clone()}),
     "model.layers.9.mlp.up_proj is packed, but the model has no nn.Linear"),
    (lambda t: [t.pop(name) for name in list(t) if "qweight" in name or "qzeros" in name],
     "no tensor is called .*qweight"),
])
def test_tensors_that_do_not_fit_are_named(copied, damage, named):
    """Through our loader and through transformers' own, before any weight is read."""
    change_tensors(copied, damage)
    for load in (awq.load_quantized, plain_load):
        with pytest.raises(ValueError, match="model.safetensors: .*" + named):
            load(copied)


@pytest.mark.parametrize("damage, named", [
    (lambda f: f.write_bytes(b""), "is truncated"),
    (lambda f: f.write_bytes(b"\x01"), "is truncated"),
    (lambda f: f.write_bytes(f.read_bytes()[:-100]), "is truncated .*tensor .* does not fit"),
    (lambda f: f.write_bytes(b"\xff" * 8 + f.read_bytes()[8:]), "is truncated or not"),
    (lambda f: f.write_bytes(struct.pack("<Q", 4) + b"abcd"), "is truncated or not"),
    (lambda f: f.write_bytes(struct.pack("<Q", 2) + b"[]"), "is truncated or not"),
    (lambda f: f.write_bytes(struct.pack("<Q", 10 ** 5) + b"[" * 10 ** 5), "is truncated or not"),
    (lambda f: f.write_bytes(b"\x80\x04\x95" + bytes(99)), "is truncated or not"),   # a pickle
    (lambda f: break_header(f, lambda h: h.pop(SCALES)), "is truncated or not"),
    (lambda f: break_header(f, lambda h: h[QZEROS].update(shape=[9, 32])), f"tensor {QZEROS} does"),
    (lambda f: break_header(f, lambda h: h[QZEROS].update(shape=[2 ** 40, 2 ** 40])),
     f"tensor {QZEROS} does not fit"),
    (lambda f: break_header(f, lambda h: h[QZEROS].update(shape=[-2, -16])), "is truncated or not"),
    (lambda f: break_header(f, lambda h: h[QZEROS].update(
        shape=[2 ** 38], data_offsets=[0, 2 ** 40])), f"tensor {QZEROS} does not fit"),
    (lambda f: break_header(f, lambda h: h[QZEROS].update(dtype="I33")),
     f"tensor {QZEROS} is not described"),
    (lambda f: break_header(f, lambda h: h.update({QZEROS: []})), f"tensor {QZEROS} is not desc"),
])
def test_headers_that_lie_are_named(copied, damage, named):
    damage(copied / "model.safetensors")
    for load in (awq.load_quantized, plain_load):
        with pytest.raises(ValueError, match="model.safetensors .*" + named):
            load(copied)


@pytest.mark.parametrize("changes, named", [
    (dict(vocab_size=2 ** 40), "tensor model.embed_tokens.weight is"),
    (dict(vocab_size=2 ** 40, tie_word_embeddings=True), "tensor .*weight is"),
    (dict(hidden_size=2 ** 20, head_dim=16), "cannot be packed|is .*it must be|the model has"),
    (dict(num_hidden_layers=3), "missing tensors: model.layers.2"),
])
def test_sizes_of_the_config_are_not_taken_on_trust(copied, changes, named):
    """The files decide: a size only config.json claims is refused before memory is taken."""
    change_json(copied / "config.json", lambda c: c.update(changes))
    for load in (awq.load_quantized, plain_load):
        with pytest.raises(ValueError, match="model.safetensors: .*" + f"({named})"):
            load(copied)
    change_json(copied / "config.json", lambda c: c.update(vocab_size=2 ** 40))
    change_tensors(copied, lambda t: (t.pop("lm_head.weight"), t.pop("model.embed_tokens.weight"),
                                      t.update(spare=torch.ones(99))))
    if "vocab_size" in changes:
        with pytest.raises(ValueError, match="missing tensors: model.embed_tokens.weight"):
            plain_load(copied)


def test_an_index_cannot_leave_its_folder_nor_name_what_is_not_there(saved, copied, tmp_path):
    awq.save_quantized(awq.load_quantized(saved[0]), tmp_path / "q", shard_size="30KB")
    index = tmp_path / "q" / "model.safetensors.index.json"
    shard = sorted((tmp_path / "q").glob("*.safetensors"))[0]
    good = index.read_text()
    index.write_text(good.replace(shard.name, "model-none.safetensors"))
    for load in (awq.load_quantized, plain_load):
        with pytest.raises(ValueError, match="model-none.safetensors is not there"):
            load(tmp_path / "q")
    for outside in ("../copy/model.safetensors", str(copied / "model.safetensors")):
        index.write_text(good.replace(shard.name, outside))
        for load in (awq.load_quantized, plain_load):
            with pytest.raises(ValueError, match="copy/model.safetensors is outside of"):
                load(tmp_path / "q")
    index.write_text(good.replace(shard.name, "pytorch_model.bin"))
    (tmp_path / "q" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    for load in (awq.load_quantized, plain_load):
        with pytest.raises(ValueError, match="pytorch_model.bin: only safetensors files are read"):
            load(tmp_path / "q")
    index.write_text(good)
    second = sorted((tmp_path / "q").glob("*.safetensors"))[1]
    tensors = load_file(second)
    name = sorted(load_file(shard))[0]
    save_file({**tensors, name: load_file(shard)[name]}, second, metadata={"format": "pt"})
    for load in (awq.load_quantized, plain_load):
        with pytest.raises(ValueError, match=f"{second.name}: tensor {name} is in {shard.name}"):
            load(tmp_path / "q")


def test_pickles_are_refused_by_transformers_too(copied, saved):
    from transformers import AutoConfig
    (copied / "model.safetensors").unlink()
    torch.save(load_file(saved[0] / "model.safetensors"), copied / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: only safetensors files are read"):
        plain_load(copied)
    with pytest.raises(ValueError, match="state_dict is given"):
        type(llama()).from_pretrained(None, config=AutoConfig.from_pretrained(saved[0]),
                                      state_dict=load_file(saved[0] / "model.safetensors"))


@pytest.mark.parametrize("changes, named", [
    (dict(bits=3), "version is 'gemm': with 3 bits it must be 'dense'"),
    (dict(bits=5), "bits is 5"),
    (dict(bits="4"), "bits is '4'"), (dict(bits=4.0), "bits is 4.0"), (dict(bits=None), "bits is"),
    (dict(bits=True), "bits is True"), (dict(group_size=True), "group_size is True"),
    (dict(group_size="32"), "group_size is '32'"), (dict(group_size=0), "group_size is 0"),
    (dict(group_size=-2), "group_size is -2"), (dict(group_size=[32]), r"group_size is \[32\]"),
    (dict(version="gemv"), "version is 'gemv'.*GEMV"), (dict(version="gemv_fast"), "'gemv_fast'"),
    (dict(version="marlin"), "version is 'marlin'.*Marlin"), (dict(version=4), "version is 4"),
    (dict(version="exllama"), "version is 'exllama'.*ExLlama"),
    (dict(version="ipex"), "version is 'ipex'.*IPEX"),
    (dict(version=None, format="gemv"), "version is 'gemv'"),
    (dict(backend="llm-awq"), "version is 'llm-awq'.*TinyChat"),
    (dict(zero_point=False), "zero_point is False"), (dict(zero_point=None), "zero_point is None"),
    (dict(group_size=48), r"model.safetensors: model.layers.*cannot be packed: group_size is 48"),
    (dict(group_size=64), "model.safetensors: tensor .*qzeros"),
])
def test_foreign_configs_are_named(copied, changes, named):
    set_config(copied, **changes)
    for load in (awq.load_quantized, plain_load):
        with pytest.raises(ValueError, match=named):
            load(copied)


@pytest.mark.parametrize("key", ["bits", "group_size"])
def test_config_without_bits_or_group_is_named(copied, key):
    change_json(copied / "config.json", lambda c: c["quantization_config"].pop(key))
    for load in (awq.load_quantized, plain_load):
        with pytest.raises(ValueError, match=f"no {key}"):
            load(copied)
    set_config(copied, **{key: 4}, quant_method="gptq")
    with pytest.raises(ValueError, match="quant_method is 'gptq'"):
        awq.load_quantized(copied)


def test_save_refuses_files_and_full_folders(saved, tmp_path):
    model = awq.load_quantized(saved[0])
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for name, named in (("file", "is a file"), ("full", "is a non-empty folder")):
        with pytest.raises(ValueError, match=named):
            awq.save_quantized(model, tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]
    (tmp_path / ".way.partial").write_text("mine")
    with pytest.raises(ValueError, match=r"\.way\.partial is in the way"):
        awq.save_quantized(model, tmp_path / "way")
    assert (tmp_path / ".way.partial").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    awq.save_quantized(model, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()
    with pytest.raises(ValueError, match="no AWQLinear"):
        awq.save_quantized(llama(), tmp_path / "plain")
    del model.config.quantization_config        # as after Ctrl-C in quantize_model
    with pytest.raises(ValueError, match="in part only"):
        awq.save_quantized(model, tmp_path / "part")


def test_a_target_that_cannot_be_made_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "file").chmod(0o755)
    with pytest.raises(ValueError, match="file is not a writable folder"):
        awq.check_target(tmp_path / "file" / "below" / "q")
    monkeypatch.setattr(os, "access", lambda path, mode: False)     # root may write anywhere
    with pytest.raises(ValueError, match=f"{tmp_path} is not a writable folder"):
        awq.check_target(tmp_path / "new" / "q")
    monkeypatch.undo()
    awq.check_target(tmp_path / "new" / "q")
    assert os.listdir(tmp_path) == ["file"]
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "mounted")
    with pytest.raises(ValueError, match="mounted is a mount point"):
        awq.check_target(tmp_path / "mounted")


STOPPED_SAVES = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
import awq
from conftest import llama

folder = Path(sys.argv[1])
model = llama(torch.float16, layers=1)
awq.round_model(model, 4, 32)
awq.save_quantized(model, folder / "good", shard_size="20KB")   # and imports what a save needs
good = dict((f.name, f.read_bytes()) for f in (folder / "good").iterdir() if f.name[0] != "R")
(folder / "target").mkdir()


def stopped(moment, kill):
    # A child that is stopped before its moment-th file operation; False if it had fewer.
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] != 0
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event == "open" or event.startswith(("os.", "shutil.")):
            seen += 1
            if seen == moment and kill:
                os.kill(os.getpid(), signal.SIGKILL)
            elif seen == moment:
                raise KeyboardInterrupt
    sys.addaudithook(hook)
    try:
        awq.save_quantized(model, folder / "target" / "q", shard_size="20KB")
    except BaseException:
        os._exit(1)
    os._exit(0)


def clear_target():
    files = dict((f.name, f.read_bytes()) for f in (folder / "target" / "q").iterdir())
    files.pop("README.md")
    assert files == good
    for file in (folder / "target" / "q").iterdir():
        file.unlink()
    (folder / "target" / "q").rmdir()


for kill in (True, False):
    moment, partial = 1, 0
    while stopped(moment, kill):
        left = set(os.listdir(folder / "target"))
        assert left <= (set(["q", ".q.partial"]) if kill else set(["q"])), (moment, left)
        if "q" in left:
            clear_target()
        elif left:
            assert not stopped(10 ** 9, kill) and os.listdir(folder / "target") == ["q"], moment
            clear_target()
        moment, partial = moment + 1, partial + (".q.partial" in left)
    assert os.listdir(folder / "target") == ["q"]
    clear_target()
    assert moment > 9 and bool(partial) == kill, (moment, partial)
print(moment, "moments")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="stopped children need os.fork")
def test_a_save_stopped_at_any_file_operation_leaves_all_or_nothing(tmp_path):
    """SIGKILL may leave .q.partial, which the next save clears; Ctrl-C does not leave even that."""
    script = STOPPED_SAVES.format(path=[str(ROOT), str(ROOT / "tests")])
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0 and "moments" in done.stdout, done.stderr[-2000:]


# --- what is in the folder -----------------------------------------------------------------------


def test_tied_head_is_stored_once_and_skipped_layers_by_full_path(tokens, tmp_path):
    """in_features 80 is no multiple of 32: down_proj stays a weight, and is named as a path."""
    model = llama(torch.float16, intermediate_size=80, tie_word_embeddings=True)
    awq.round_model(model, 4, 32)
    awq.save_quantized(model, tmp_path / "q")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    assert {"model.embed_tokens.weight", "lm_head.weight"} & tensors.keys() == {
        "model.embed_tokens.weight"}
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    down = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert config["modules_to_not_convert"] == ["lm_head", *down]
    assert all(name + ".weight" in tensors for name in down)
    loaded = awq.load_quantized(tmp_path / "q")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_default_shards_stay_under_5_gb(saved, monkeypatch, tmp_path):
    model = awq.load_quantized(saved[0])
    sizes = []
    monkeypatch.setattr(model, "save_pretrained", lambda folder, max_shard_size: sizes.append(
        max_shard_size))
    awq.save_quantized(model, tmp_path / "q")
    awq.AutoAWQForCausalLM(model, "x").save_quantized(tmp_path / "r")
    assert sizes == ["5GB", "5GB"]


@pytest.mark.parametrize("bits", [4, 3])
def test_model_card_says_what_it_is_and_how_to_load_it(bits, tmp_path):
    from huggingface_hub import ModelCard
    model = llama(layers=1)
    model.config.name_or_path = "some-org/Model-1.5b"
    awq.round_model(model, bits, 32)
    awq.save_quantized(model, tmp_path / "Model-AWQ", calibration="pileval, 8 x 64 tokens",
                       perplexity="5.60 (WikiText-2, windows of 2048)")
    card = ModelCard((tmp_path / "Model-AWQ" / "README.md").read_text())
    assert card.data.base_model == "some-org/Model-1.5b"
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["awq", f"{bits}-bit"]
    assert card.data.pipeline_tag == "text-generation"
    for fact in ("# Model-AWQ", "base model: some-org/Model-1.5b", f"bits: {bits}", "group size 32",
                 "full precision: lm_head", "calibration: pileval, 8 x 64 tokens",
                 "perplexity: 5.60 (WikiText-2, windows of 2048)", "awq.register()",
                 'AutoModelForCausalLM.from_pretrained("Model-AWQ"'):
        assert fact in card.text
    assert ("vllm serve Model-AWQ" in card.text) == (bits == 4)
    assert ("cannot read" in card.text) == (bits == 3)


# --- other readers and writers of the format (optional: they are large, or break the environment) -


def elsewhere(variable, install, script, *arguments):
    """Run a script in the Python that the environment variable names; skip, aloud, without one."""
    if variable not in os.environ:
        message = f"NOT compared: set {variable} to a Python in which {install} was done"
        warnings.warn(message)
        pytest.skip(message)
    done = subprocess.run([os.environ[variable], "-I", "-c", script, *map(str, arguments)],
                          capture_output=True, text=True)     # -I: their package is called awq too
    assert done.returncode == 0, done.stderr[-3000:]


AUTOAWQ = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from awq import AutoAWQForCausalLM
from awq.quantize import quantizer
from awq.utils.packing_utils import dequantize_gemm
source, ours, out = sys.argv[1:]
tokens = load_file(out + "/tokens.safetensors")["tokens"]

def weights(folder):        # W_hat [N, K] float16 of every packed layer, by AutoAWQ's own code
    t = load_file(folder + "/model.safetensors")
    names = [name[:-8] for name in t if name.endswith(".qweight")]
    return {n: dequantize_gemm(*(t[f"{n}.{k}"] for k in ("qweight", "qzeros", "scales")), 4, 32).T
            .contiguous() for n in names}

save_file(weights(ours), out + "/ours.safetensors")
quantizer.get_calib_dataset = lambda **kwargs: [row[None] for row in tokens]
model = AutoAWQForCausalLM.from_pretrained(source, torch_dtype=torch.float16, device_map=None,
                                           low_cpu_mem_usage=False)
model.quantize(None, {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"},
               apply_clip=False)
model.save_quantized(out + "/autoawq")
save_file(weights(out + "/autoawq"), out + "/theirs.safetensors")
save_file({"logits": model.model(tokens).logits.detach()}, out + "/logits.safetensors")
"""


@pytest.mark.parametrize("tied", [False, True])
def test_autoawq_and_this_file_read_each_other(tied, tokens, tmp_path):
    """Ours by AutoAWQ 0.2.9's dequantisation; what AutoAWQ quantised and saved, by us."""
    model = llama(torch.float16, layers=1, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "source")
    awq.round_model(model, 4, 32)
    awq.save_quantized(model, tmp_path / "q")
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    elsewhere("AUTOAWQ_PYTHON", "pip install torch==2.13.0 transformers==4.51.3 accelerate "
              "datasets zstandard, then pip install --no-deps autoawq==0.2.9",
              AUTOAWQ, tmp_path / "source", tmp_path / "q", tmp_path)
    theirs = awq.load_quantized(tmp_path / "autoawq")
    for loaded, file in ((model, "ours"), (theirs, "theirs")):
        expected = load_file(tmp_path / f"{file}.safetensors")
        layers = {name: module for name, module in loaded.named_modules()
                  if isinstance(module, awq.AWQLinear)}
        assert layers.keys() == expected.keys() and len(layers) == 7
        for name, layer in layers.items():
            assert torch.equal(layer.dequantized_weight().half(), expected[name])
    expected = load_file(tmp_path / "logits.safetensors")["logits"].float()
    assert (theirs(tokens).logits.float() - expected).norm() < 5e-3 * expected.norm()


GPTQMODEL = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, out = sys.argv[1:]
tokens = load_file(out + "/tokens.safetensors")["tokens"]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cpu")
assert "gptqmodel" in type(model.model.layers[0].mlp.up_proj).__module__
save_file({"logits": model(tokens).logits.detach().float()}, out + "/logits.safetensors")
"""


def test_transformers_with_gptqmodel_reads_ours(tokens, tmp_path):
    """transformers' standard path, without awq.register, in float16 on the CPU."""
    model = llama(torch.float16, layers=1, hidden_size=128, intermediate_size=256)
    awq.quantize_model(model, tokens, 4, 32, progress=False)
    awq.save_quantized(model, tmp_path / "q")
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    elsewhere("GPTQMODEL_PYTHON", "pip install torch==2.13.0 transformers==5.23.0 gptqmodel",
              GPTQMODEL, tmp_path / "q", tmp_path)
    expected = load_file(tmp_path / "logits.safetensors")["logits"]
    assert (model(tokens).logits.float() - expected).norm() < 5e-3 * expected.norm()


# --- the API of AutoAWQ, on a small LLaMA with tinylm's tokenizer -------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A full-precision model with a tokenizer, as a user would have it on disk."""
    from transformers import AutoTokenizer
    path = tmp_path_factory.mktemp("model") / "small"
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tinylm")
    tokenizer.chat_template = "{{ messages[0].content }}"
    model = llama(vocab_size=len(tokenizer), layers=1)
    model.generation_config.update(do_sample=True, top_p=0.9)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_snippet_that_people_know(folder, tmp_path):
    from awq import AutoAWQForCausalLM
    model = AutoAWQForCausalLM.from_pretrained(str(folder))
    report = model.quantize(calib_data="pydoc", w_bit=4, q_group_size=32, version="GEMM",
                            max_calib_samples=8, progress=False)
    assert len(report["groups"]) == 4
    model.save_quantized(tmp_path / "q", model.tokenizer)
    again = AutoAWQForCausalLM.from_quantized(tmp_path / "q")
    ids = again.tokenizer("def f(", return_tensors="pt").input_ids
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


def test_signature_that_autoawq_had(folder, tmp_path):
    model = awq.AutoAWQForCausalLM.from_pretrained(folder)
    config = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    text = "import os\n" * 400
    report = model.quantize(model.tokenizer, quant_config=config, calib_data=[text, text],
                            max_calib_samples=2, progress=False)
    assert report["bits"] == 4 and report["group_size"] == 32
    model.save_quantized(tmp_path / "q", safetensors=True, shard_size="5GB")
    assert (tmp_path / "q" / "tokenizer.json").is_file()
    assert "calibration: own text, 2 x 64 tokens" in (tmp_path / "q" / "README.md").read_text()
    for bad in ({"w_bit": 5}, {"bits": 4}, {"version": "GEMV"}, {"zero_point": False}):
        with pytest.raises(ValueError, match=list(bad)[0].replace("w_bit", "bits is 5")):
            awq.AutoAWQForCausalLM.from_pretrained(folder).quantize(
                model.tokenizer, quant_config=bad, calib_data=torch.zeros(2, 8, dtype=int))


def test_calibration_tokens_cut_and_never_drop(folder, tmp_path):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "\n".join(f"value {i} is {i * i}" for i in range(500))
    (tmp_path / "a.txt").write_text(text)
    everything = tokenizer(text, verbose=False).input_ids
    count = len(everything) // 16
    by_file = awq.calibration_tokens(tmp_path / "a.txt", tokenizer, count, 16)
    assert sorted(by_file.flatten().tolist()) == sorted(everything[:count * 16])
    assert torch.equal(by_file, awq.calibration_tokens([text], tokenizer, count, 16))
    assert not torch.equal(by_file, awq.calibration_tokens([text], tokenizer, count, 16, seed=1))
    with pytest.raises(ValueError, match=f"has {len(everything)} tokens"):
        awq.calibration_tokens([text], tokenizer, count + 1, 16)
    with pytest.raises(ValueError, match="has 0 tokens"):
        awq.calibration_tokens([""], tokenizer, 1, 16)
    with pytest.raises(ValueError, match="data is 'nothing'"):
        awq.calibration_tokens("nothing", tokenizer)
    with pytest.raises(ValueError, match="not strings"):
        awq.calibration_tokens([1], tokenizer)


def test_test_text_is_never_calibration_text():
    """No paragraph of the test split stands in the train split, docstrings or sources."""
    from tinylm.corpus import held_out

    def paragraphs(documents):
        return {" ".join(p.split()) for d in documents for p in d.split("\n\n") if len(p) > 30}
    test = paragraphs(awq.load_documents("pydoc", "test"))
    train = paragraphs(awq.load_documents("pydoc", "train"))
    assert len(test) > 500 and len(train) > 5000 and not test & train
    assert held_out("email.message") == held_out("email") == held_out("_email")


def test_command_line_quantizes_and_saves(folder, tmp_path):
    text = tmp_path / "calib.txt"
    text.write_text("for i in range(10):\n    print(i)\n" * 300)
    command = [sys.executable, str(ROOT / "awq.py"), str(folder), "--calib", str(text), "--samples",
               "4", "--seq-len", "32", "--group-size", "32", "--device", "cpu"]
    done = subprocess.run([*command, "--save", str(tmp_path / "q")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| layers |" in done.stdout and "not quantised: lm_head" in done.stdout
    assert awq.load_quantized(tmp_path / "q").config.quantization_config
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "q" / name).read_bytes() == (folder / name).read_bytes()
    card = (tmp_path / "q" / "README.md").read_text()
    assert "base model: small\n" in card and "base_model:" not in card     # no local path on a hub
    assert "calibration: calib.txt, 4 x 32 tokens, seed 0\n" in card
    bad = subprocess.run([*command, "--save", str(text)], capture_output=True, text=True)
    assert bad.returncode == 2 and "is a file" in bad.stderr and "Traceback" not in bad.stderr
    assert Path(text).is_file()


@pytest.mark.parametrize("kill, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_says_so_and_leaves_nothing(kill, code, tmp_path):
    text = tmp_path / "calib.txt"
    text.write_text("\n\n".join(awq.load_documents("pydoc")[:60]))
    (tmp_path / "out").mkdir()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "awq.py"), str(ROOT / "tinylm"), "--calib", str(text),
         "--device", "cpu", "--samples", "32", "--save", str(tmp_path / "out" / "q")],
        stderr=subprocess.PIPE)
    seen = b""
    while b"1/4" not in seen:                               # the bar, after the first block
        piece = process.stderr.read1()
        assert piece, seen
        seen += piece
    process.send_signal(kill)
    rest = process.communicate(timeout=120)[1]
    assert process.returncode == code and b"Traceback" not in rest
    assert (b"\ninterrupted\n" in rest) == (kill == signal.SIGINT)
    assert not os.listdir(tmp_path / "out")


@pytest.mark.parametrize("arguments, named", [
    (["no-such-org/model"], "error: model 'no-such-org/model' cannot be loaded"),
    (["x", "--device", "banana"], "error: device is 'banana'"),
])
def test_command_line_errors_are_one_line(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["awq.py", *arguments, "--save", str(tmp_path / "q")])
    with pytest.raises(SystemExit) as end:
        awq.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.splitlines()[-1].startswith(named)
    assert not (tmp_path / "q").exists()


def test_sharded_checkpoints_load(saved, tmp_path):
    folder, logits, tokens = saved
    awq.save_quantized(awq.load_quantized(folder), tmp_path / "shards", shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(awq.load_quantized(tmp_path / "shards")(tokens).logits, logits)
