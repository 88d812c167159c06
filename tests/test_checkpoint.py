"""Save and load: the same logits, the AWQ format, damaged files, stopped saves, odd sources."""
import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
import transformers
from conftest import ROOT, llama, opt, small
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import awq
import checkpoint
import kernel

IDS = torch.randint(0, 96, (4, 24), generator=torch.Generator().manual_seed(0))
TEXT = dict(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=128, head_dim=16, sliding_window=16)
EYES = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            image_size=28, patch_size=14, vision_use_head=False)
gpt2 = partial(small, "gpt2")                                           # Conv1D
gemma3 = partial(small, "gemma3", text_config=TEXT, vision_config=EYES, mm_tokens_per_image=4)


def rounded(model, bits=4, group_size=32):
    awq.round_model(model, bits, group_size)
    return model


def plain_load(folder, **kwargs):
    awq.register()
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **kwargs})


def config_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def change_config(folder, top=(), **changes):
    """Changes the quantization_config of a folder, and entries at the top."""
    config = json.loads((folder / "config.json").read_text())
    config.setdefault("quantization_config", {}).update(changes)
    (folder / "config.json").write_text(json.dumps({**config, **dict(top)}))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder of a quantized LLaMA, its logits)."""
    folder = tmp_path_factory.mktemp("checkpoint") / "llama"
    model = llama(torch.float16)
    awq.quantize_model(model, IDS, 4, 32, progress=False)
    awq.save_quantized(model, folder)
    return folder, model(IDS).logits


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "copy")


# ---- The same logits -----------------------------------------------------------------------------


@pytest.mark.parametrize("build, dtype, bits, group_size", [
    *[(llama, torch.float32, bits, 32) for bits in (2, 3, 4, 8)], (gpt2, torch.float32, 4, 32),
    (opt, torch.float16, 4, 32), (opt, torch.float32, 3, -1), (llama, torch.bfloat16, 4, 32),
    (gemma3, torch.float32, 4, 32),         # sees images; its layers have other names in the files
    (partial(llama, tie_word_embeddings=True, intermediate_size=80), torch.float16, 4, 32),
])
def test_what_is_saved_loads_to_the_last_bit(build, dtype, bits, group_size, tmp_path):
    """Through every loader, in shards, and once more after a loaded model was saved."""
    model = rounded(build(dtype=dtype), bits, group_size)
    expected = model(IDS).logits
    awq.save_quantized(model, tmp_path / "q")
    loaded = awq.load_quantized(tmp_path / "q")
    awq.save_quantized(loaded, tmp_path / "again", shard_size="30KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert config_of(tmp_path / "again") == config_of(tmp_path / "q")
    plain_load(tmp_path / "again").save_pretrained(tmp_path / "third")      # as transformers saves
    assert config_of(tmp_path / "third") == config_of(tmp_path / "q")
    wrapped = awq.AutoAWQForCausalLM.from_quantized(tmp_path / "third")
    for model in (loaded, plain_load(tmp_path / "q"), awq.load_quantized(tmp_path / "again"),
                  wrapped.model):
        assert torch.equal(model(IDS).logits, expected) and model.dtype == dtype
    assert sorted(os.listdir(tmp_path)) == ["again", "q", "third"]


def test_layers_that_stay_are_named_by_their_path_and_a_tied_head_is_stored_once(tmp_path):
    model = rounded(llama(intermediate_size=80, tie_word_embeddings=True))
    awq.save_quantized(model, tmp_path / "q")
    down = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]        # 80 is no multiple of 32
    assert config_of(tmp_path / "q")["modules_to_not_convert"] == ["lm_head", *down]
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    assert "lm_head.weight" not in tensors and all(f"{name}.weight" in tensors for name in down)
    loaded = awq.load_quantized(tmp_path / "q")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_text_model_from_a_checkpoint_that_also_sees_loads(tmp_path):
    """Its files say model.language_model.layers where the model says model.layers."""
    plain = small("qwen3_5_text", **{**TEXT, "layer_types": ["full_attention"] * 2})
    plain.save_pretrained(tmp_path / "plain")
    change_tensors(tmp_path / "plain", lambda t: [
        t.update({name.replace("model.", "model.language_model."): t.pop(name)})
        for name in list(t) if name.startswith("model.")])
    model = rounded(awq.load_pretrained(tmp_path / "plain"))
    awq.save_quantized(model, tmp_path / "q")
    names = load_file(tmp_path / "q" / "model.safetensors").keys()
    assert "model.language_model.layers.0.mlp.up_proj.qweight" in names
    assert torch.equal(awq.load_quantized(tmp_path / "q")(IDS).logits, model(IDS).logits)


def test_the_dtype_asked_for_is_what_all_but_the_packed_tensors_get(tmp_path):
    awq.save_quantized(rounded(opt()), tmp_path / "q")
    model = awq.load_quantized(tmp_path / "q", dtype=torch.bfloat16)
    layer = model.model.decoder.layers[0].fc1
    bias = load_file(tmp_path / "q" / "model.safetensors")["model.decoder.layers.0.fc1.bias"]
    assert torch.equal(layer.bias, bias.bfloat16()) and bias.abs().max() > 0
    assert model(IDS).logits.dtype == torch.bfloat16 and layer.scales.dtype == torch.float16
    for dtype, named in ((torch.float64, "dtype is torch.float64"), ("banana", "banana")):
        with pytest.raises(ValueError, match=named):
            awq.load_quantized(tmp_path / "q", dtype=dtype)


@pytest.mark.parametrize("build", [llama, opt, gpt2])
def test_the_base_model_opens_a_causal_checkpoint(build, tmp_path):
    model = rounded(build())
    awq.save_quantized(model, tmp_path / "q")
    base = AutoModel.from_pretrained(tmp_path / "q", dtype="auto")
    assert torch.equal(base(IDS).last_hidden_state, model.base_model(IDS).last_hidden_state)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(default, saved, tmp_path):
    """Quantize, save, load and generate: the bits that float32 as default gives."""
    assert torch.get_default_dtype() == torch.float32
    expected = plain_load(saved[0]).generate(IDS[:, :4], max_new_tokens=3, pad_token_id=0)
    model = llama(torch.float16)
    torch.set_default_dtype(default)
    try:
        awq.quantize_model(model, IDS, 4, 32, progress=False)
        awq.save_quantized(model, tmp_path / "q")
        loaded = awq.load_quantized(tmp_path / "q")
        logits = loaded(IDS).logits
        text = loaded.generate(IDS[:, :4], max_new_tokens=3, pad_token_id=0)
    finally:
        torch.set_default_dtype(torch.float32)
    files = [load_file(folder / "model.safetensors") for folder in (tmp_path / "q", saved[0])]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert torch.equal(logits, saved[1]) and torch.equal(text, expected)


def test_a_loaded_model_can_be_pickled_and_copied(saved, tmp_path):
    """Its classes have a module and a name: torch.save, spawned workers, copies."""
    model = awq.load_quantized(saved[0])
    size = model.get_memory_footprint()
    assert torch.equal(copy.deepcopy(model)(IDS).logits, saved[1])
    assert torch.equal(model(IDS).logits, saved[1]) and model.get_memory_footprint() >= size
    config = pickle.loads(pickle.dumps(model.config))
    assert config.quantization_config.to_dict() == config_of(saved[0])
    torch.save([model, IDS, saved[1]], tmp_path / "model.pt")
    script = ("import sys, torch; sys.path.insert(0, sys.argv[1]); torch.set_num_threads(1)\n"
              "model, ids, logits = torch.load(sys.argv[2], weights_only=False)\n"
              "assert torch.equal(model(ids).logits, logits)")
    subprocess.run([sys.executable, "-c", script, ROOT, tmp_path / "model.pt"], check=True)


# ---- The format ----------------------------------------------------------------------------------

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words(rows, bits):
    """int32 words of rows of numbers, by the description of the format, one number at a time."""
    def word(values):       # nibble i holds column ORDER[i]; the other widths are one long stream
        return sum(value << bits * i for i, value in enumerate(values))

    def signed(number):
        return number - 2 ** 32 if number >= 2 ** 31 else number
    if bits == 4:
        lines = [[word([row[c + i] for i in ORDER]) for c in range(0, len(row), 8)] for row in rows]
    else:
        lines = [[word(row[c:c + 32]) >> 32 * i & 0xffffffff for c in range(0, len(row), 32)
                  for i in range(bits)] for row in rows]
    return torch.tensor([[signed(number) for number in line] for line in lines], dtype=torch.int32)


def by_hand(model, bits, integers):
    """The tensors of a checkpoint of model's blocks, from integers(W) -> q, delta, zero."""
    tensors = {name: p.data for name, p in model.named_parameters()}
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, nn.Linear):
            q, delta, zero = integers(tensors.pop(f"{name}.weight"))
            tensors |= {f"{name}.qweight": words(q.T.tolist(), bits),
                        f"{name}.qzeros": words(zero.T.tolist(), bits),
                        f"{name}.scales": delta.T.contiguous()}
    return tensors


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_files_follow_the_written_description(bits, tmp_path):
    model = llama(layers=1)
    expected = by_hand(model, bits, lambda W: awq.quantize(W, bits, 32))
    awq.save_quantized(rounded(model, bits), tmp_path / "q")
    stored = load_file(tmp_path / "q" / "model.safetensors")
    assert stored.keys() == expected.keys()
    for name in stored:
        assert stored[name].dtype == expected[name].dtype and torch.equal(stored[name],
                                                                          expected[name])
    assert config_of(tmp_path / "q") == {
        "quant_method": "awq", "bits": bits, "group_size": 32, "zero_point": True,
        "version": "gemm" if bits == 4 else "dense", "modules_to_not_convert": ["lm_head"]}


@pytest.mark.parametrize("bits, changes", [
    (4, {"modules_to_not_convert": ["lm_head"], "version": "gemm"}),        # ours, always
    (3, {"version": "dense"}),
    (4, {"modules_to_not_convert": None, "version": "GEMM"}),               # AutoAWQ, older
    (4, {"backend": "autoawq", "do_fuse": False, "exllama_config": None}),
    (4, {"format": "gemm", "backend": "auto", "desc_act": False, "sym": False, "meta": {"a": 1}}),
])
def test_checkpoints_that_others_write_are_read(bits, changes, tmp_path):
    """A checkpoint made number by number, against plain Linears of (q - zero) delta."""
    generator = torch.Generator().manual_seed(0)

    def integers(W):
        N, K = W.shape
        q = torch.randint(0, 2 ** bits, (N, K), generator=generator)
        zero = torch.randint(0, 2 ** bits, (N, K // 32), generator=generator)
        delta = (torch.rand(N, K // 32, generator=generator) / 32).half()
        W.copy_((q - zero.repeat_interleave(32, 1)) * delta.float().repeat_interleave(32, 1))
        return q, delta, zero

    model = llama(layers=1)
    tensors = by_hand(model, bits, integers)
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    change_config(tmp_path, {"dtype": "float32"}, quant_method="awq", bits=bits, group_size=32,
                  zero_point=True, **changes)
    expected = model(IDS).logits
    for load in (awq.load_quantized, plain_load):
        assert (load(tmp_path)(IDS).logits - expected).norm() < 1e-5 * expected.norm()


# ---- Damage --------------------------------------------------------------------------------------

LAYER = "model.layers.1.mlp.up_proj"
QWEIGHT, QZEROS, SCALES = (f"{LAYER}.{key}" for key in ("qweight", "qzeros", "scales"))


def tensors_less(name):
    return lambda folder: change_tensors(folder, lambda t: t.pop(name))


def tensors_with(name, make):
    return lambda folder: change_tensors(folder, lambda t: t.update({name: make(t)}))


def to_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("damage, named", [
    (tensors_less(QWEIGHT), f"missing tensors: {LAYER}.weight"),
    (tensors_less(QZEROS), f"tensors of {LAYER} are"),
    (tensors_with(QWEIGHT, lambda t: t[QWEIGHT][:32]), rf"{LAYER} are .*\[32, 16\].*\[64, 16\]"),
    (tensors_with(SCALES, lambda t: t[SCALES].float()), f"{LAYER} are .*F32"),
    (tensors_with(SCALES, lambda t: t[SCALES] * torch.inf), f"{SCALES} contains NaN or Inf"),
    (tensors_with(f"{LAYER}.g_idx", lambda t: torch.ones(64).int()), f"unexpected .*{LAYER}.g_idx"),
    (tensors_with("model.layers.9.x.qweight", lambda t: t[QWEIGHT].clone()), "9.x is packed"),
    (tensors_less("model.norm.weight"), "missing tensors: model.norm.weight"),
    (tensors_with("model.norm.weight", lambda t: torch.ones(32)), "mismatched .*model.norm.weight"),
    (lambda f: change_tensors(f, lambda t: [t.pop(n) for n in list(t) if "qweight" in n]),
     "no tensor is called"),
    (cut, "not fully covered"), (to_pickle, "safetensors files only"),
    (lambda f: (f / "config.json").write_text("{"), "not a valid JSON"),
    (lambda f: change_config(f, {"quantization_config": None}), "missing tensors"),
    (lambda f: change_config(f, {"quantization_config": [4]}), "cannot be loaded"),
    (lambda f: change_config(f, {"vocab_size": "many"}), "vocab_size"),
    (lambda f: change_config(f, version=None, format="gemv"), "version 'gemv'"),
    (lambda f: change_config(f, bits=3), "with 'dense'"),
    (lambda f: change_config(f, backend="llm-awq"), "llm-awq"),
    (lambda f: change_config(f, zero_point=False), "zero_point False"),
    (lambda f: change_config(f, bits="4"), "bits is '4'"),
    (lambda f: change_config(f, group_size=-2), "group_size -2"),
    (lambda f: change_config(f, group_size=64), r"are .*\[4, 64\].*\[2, 64\]"),
    (lambda f: change_config(f, quant_method="gptq"), "GPTQ"),
])
def test_damage_is_one_error_that_names_the_folder(copied, damage, named):
    damage(copied)
    with pytest.raises(ValueError, match=f"model {copied} .*{named}") as caught:
        awq.load_quantized(copied)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage, named", [
    (tensors_less(QZEROS), LAYER), (tensors_with(SCALES, lambda t: t[SCALES] * torch.nan), SCALES),
])
def test_from_pretrained_of_transformers_refuses_damage_too(copied, damage, named):
    damage(copied)
    with pytest.raises((ValueError, SafetensorError), match=named):
        plain_load(copied)


# ---- Saves that do not end well ------------------------------------------------------------------


def failing(error):
    def fail(*args, **kwargs):
        raise error
    return fail


def adapter_only(folder, **kwargs):
    """What save_pretrained writes of a model with an adapter."""
    folder.mkdir()
    save_file({"lora_A": torch.ones(1)}, folder / "adapter_model.safetensors")


class BadTokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{")
        raise OSError("a broken tokenizer")


@pytest.mark.parametrize("spoil, tokenizer, error, named", [
    (lambda patch, model: patch(transformers.modeling_utils, "safe_save_file", failing(
        SafetensorError("I/O error: No space left on device"))), None, OSError, "q cannot .*No s"),
    (lambda patch, model: patch(model, "save_pretrained", adapter_only), None, ValueError,
     "of 14 packed layers only 0"),
    (lambda patch, model: patch(checkpoint, "model_card", failing(KeyboardInterrupt())), None,
     KeyboardInterrupt, None),
    (lambda patch, model: None, BadTokenizer(), OSError, "a broken tokenizer"),
    (lambda patch, model: None, True, ValueError, "tokenizer is True"),     # AutoAWQ's safetensors
])
def test_a_failed_save_leaves_nothing(spoil, tokenizer, error, named, saved, tmp_path, monkeypatch):
    model = awq.load_quantized(saved[0])
    spoil(monkeypatch.setattr, model)
    with pytest.raises(error, match=named):
        awq.save_quantized(model, tmp_path / "new" / "q", tokenizer)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("exists", [False, True])
def test_of_two_saves_to_one_folder_one_wins(exists, tmp_path, monkeypatch):
    """The other is written and renamed while the first is being written."""
    first, other = (rounded(llama(seed=seed, layers=1)) for seed in (0, 1))
    card = checkpoint.model_card
    if exists:
        (tmp_path / "q").mkdir()

    def overtaken(*args):
        monkeypatch.setattr(checkpoint, "model_card", card)
        awq.save_quantized(other, tmp_path / "q")
        return card(*args)
    monkeypatch.setattr(checkpoint, "model_card", overtaken)
    with pytest.raises(OSError, match="not empty"):
        awq.save_quantized(first, tmp_path / "q")
    assert torch.equal(awq.load_quantized(tmp_path / "q")(IDS).logits, other(IDS).logits)
    assert os.listdir(tmp_path) == ["q"]


def test_targets_that_cannot_be_taken_are_refused_before_the_work(saved, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model = awq.load_quantized(saved[0])
    for name, error in (("../full/mine", ValueError), ("../full", ValueError), (".", ValueError),
                        ("../full/mine/q", OSError)):
        for refuse in (awq.check_target, partial(awq.save_quantized, model)):
            with pytest.raises(error, match=f"{name.split('/')[-1].strip('.')}"):
                refuse(name)
    awq.check_target("new/below")
    assert sorted(os.listdir("..")) == ["full", "here"] and not os.listdir(".")
    awq.save_quantized(model, "new/below")
    assert os.listdir("new") == ["below"]


def test_what_is_not_quantized_is_not_saved(saved, tmp_path):
    model = awq.load_quantized(saved[0])
    del model.config.quantization_config                # as after Ctrl-C in quantize_model
    for unfinished in (llama(), model):
        with pytest.raises(ValueError, match="not quantized, or in part only"):
            awq.save_quantized(unfinished, tmp_path / "q")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("base, link", [
    ("some-org/Model-1.5b", "some-org/Model-1.5b"), ("/home/me/Model-1.5b", None), ("", None),
    ("local/Model-1.5b", None)])
def test_the_card_says_what_was_done_and_nothing_that_was_not(base, link, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("local/Model-1.5b")
    model = rounded(llama(layers=1), 3)
    model.config.name_or_path = base
    awq.save_quantized(model, "Model-AWQ", calibration="pileval, 8 x 64 tokens")
    card = ModelCard((tmp_path / "Model-AWQ" / "README.md").read_text())
    assert card.data.base_model == link and card.data.tags == ["awq", "3-bit"]
    for fact in ("# Model-AWQ", "3 bits", "groups of 32", "In full precision: lm_head",
                 "calibration: pileval, 8 x 64 tokens", "awq.register()"):
        assert fact in card.text
    assert not re.search("vllm|sglang|perplexity|/home", str(card), re.IGNORECASE)


# ---- Sources -------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, named", [
    (lambda m: setattr(m, "peft_config", {"default": None}), "merge it first"),
    (lambda m: setattr(m.model.layers[0].mlp, "lora_A", nn.Linear(64, 4)), "merge it first"),
    (lambda m: m.lm_head.to("meta"), "lm_head.weight is .* on meta"),
    (lambda m: m.double(), "torch.float64"), (rounded, r"quantized already \(awq\)"),
    (lambda m: setattr(m.config, "quantization_config", {"quant_method": "x"}), r"already \(x\)"),
])
def test_sources_that_are_not_plain_are_refused_before_the_work(change, named):
    model = llama(layers=1)
    change(model)
    with pytest.raises(ValueError, match=named):
        awq.quantize_model(model, IDS, 4, 32, progress=False)


def test_encoder_decoders_and_other_modules_are_named():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=16, d_ff=16, num_layers=1,
                                             num_heads=2, d_kv=8))
    for model, named in ((t5, "encoder-decoder: a decoder-only"), (nn.Linear(2, 2), "is a Linear")):
        with pytest.raises(ValueError, match=named):
            awq.quantize_model(model, IDS, 4, 32, progress=False)


@pytest.mark.parametrize("damage, named", [
    (tensors_less("model.layers.0.mlp.up_proj.weight"), "missing .*up_proj.weight"),
    (cut, "not fully covered"), (lambda f: (f / "config.json").unlink(), "config"),
    (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "merge it into its model"),
    (lambda f: change_config(f, quant_method="gptq", bits=4), "GPTQ.*requires|gptq"),
    (lambda f: change_config(f, quant_method="bitsandbytes", load_in_4bit=True), "bits"),
    (lambda f: change_config(f, quant_method="torchao", quant_type={"default": {
        "_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}}), "torchao"),
    (lambda f: change_config(f, quant_method="banana"), "banana"),
])
def test_folders_that_are_no_plain_source_are_named(damage, named, tmp_path):
    llama(layers=1).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=named) as caught:
        awq.load_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_plain_source_has_the_dtype_asked_for_on_a_slow_cpu_too(dtype, tmp_path):
    llama(layers=1).save_pretrained(tmp_path)
    assert awq.load_pretrained(tmp_path, dtype=dtype).dtype == dtype


def fp8_folder(folder):
    """A small LLaMA as block-FP8 checkpoints are published: blocks of 32 x 32, a scale each."""
    llama(layers=1).save_pretrained(folder)

    def to_fp8(tensors):
        for name in [name for name in tensors if "proj" in name]:
            W = tensors[name]
            scale = 2.0 ** -torch.randint(4, 9, (len(W) // 32, W.shape[1] // 32))
            spread = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
            tensors |= {name: (W / spread).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
    change_tensors(folder, to_fp8)
    change_config(folder, quant_method="fp8", activation_scheme="dynamic",
                  weight_block_size=[32, 32])
    return folder


@pytest.mark.parametrize("load", [awq.load_pretrained, AutoModelForCausalLM.from_pretrained])
def test_a_block_fp8_source_is_saved_as_plain_and_loads(load, tmp_path):
    pytest.importorskip("accelerate", reason="FP8 checkpoints need pip install accelerate")
    model = load(fp8_folder(tmp_path / "fp8"))
    plain = llama(layers=1)(IDS).logits
    assert (model(IDS).logits - plain).norm() < 0.1 * plain.norm()
    awq.quantize_model(model, IDS, 4, 32, progress=False)
    awq.save_quantized(model, tmp_path / "q")
    stored = load_file(tmp_path / "q" / "model.safetensors")
    assert not [name for name, t in stored.items() if "inv" in name or t.element_size() == 1]
    assert torch.equal(awq.load_quantized(tmp_path / "q")(IDS).logits, model(IDS).logits)


# ---- Other readers and writers of the format (optional: they are large) --------------------------


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
import sys, torch
from safetensors.torch import load_file, save_file
from awq import AutoAWQForCausalLM
from awq.quantize import quantizer
from awq.utils.packing_utils import dequantize_gemm
out = sys.argv[1]
tokens = load_file(out + "/tokens.safetensors")["tokens"]

def weights(folder):        # W_hat [N, K] float16 of every packed layer, by AutoAWQ's own code
    t = load_file(folder + "/model.safetensors")
    names = [name[:-8] for name in t if name.endswith(".qweight")]
    return {n: dequantize_gemm(*(t[f"{n}.{k}"] for k in ("qweight", "qzeros", "scales")), 4, 32).T
            .contiguous() for n in names}

save_file(weights(out + "/ours"), out + "/ours.safetensors")
quantizer.get_calib_dataset = lambda **kwargs: [row[None] for row in tokens]
model = AutoAWQForCausalLM.from_pretrained(out + "/source", torch_dtype=torch.float16,
                                           device_map=None, low_cpu_mem_usage=False)
model.quantize(None, {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"},
               apply_clip=False)
model.save_quantized(out + "/theirs")
save_file(weights(out + "/theirs"), out + "/theirs.safetensors")
save_file({"logits": model.model(tokens).logits.detach()}, out + "/logits.safetensors")
"""


@pytest.mark.parametrize("tied", [False, True])
def test_autoawq_and_this_file_read_each_other(tied, tmp_path):
    """Ours by AutoAWQ 0.2.9's dequantization; what AutoAWQ quantized and saved, by us."""
    model = llama(torch.float16, layers=1, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "source")
    awq.save_quantized(rounded(model), tmp_path / "ours")
    save_file({"tokens": IDS}, tmp_path / "tokens.safetensors")
    elsewhere("AUTOAWQ_PYTHON", "pip install torch==2.13.0 transformers==4.51.3 accelerate "
              "datasets zstandard, then pip install --no-deps autoawq==0.2.9", AUTOAWQ, tmp_path)
    for folder in ("ours", "theirs"):
        expected, loaded = load_file(tmp_path / f"{folder}.safetensors"), awq.load_quantized(
            tmp_path / folder)
        assert len(expected) == 7
        for name, W in expected.items():
            layer = loaded.get_submodule(name)
            ours = kernel.dequantize(layer.qweight, layer.qzeros, layer.scales, 4)
            assert torch.equal(ours.half(), W)
    expected = load_file(tmp_path / "logits.safetensors")["logits"].float()
    assert (loaded(IDS).logits.float() - expected).norm() < 5e-3 * expected.norm()


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


def test_transformers_with_gptqmodel_reads_ours(tmp_path):
    """transformers' standard path, without awq.register, in float16 on the CPU."""
    model = rounded(llama(torch.float16, layers=1, hidden_size=128, intermediate_size=256))
    awq.save_quantized(model, tmp_path / "q")
    save_file({"tokens": IDS}, tmp_path / "tokens.safetensors")
    elsewhere("GPTQMODEL_PYTHON", "pip install torch==2.13.0 transformers==5.23.0 gptqmodel",
              GPTQMODEL, tmp_path / "q", tmp_path)
    expected = load_file(tmp_path / "logits.safetensors")["logits"]
    assert (model(IDS).logits.float() - expected).norm() < 5e-3 * expected.norm()
