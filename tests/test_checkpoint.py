"""Save, load, the API of AutoAWQ, calibration data and bad checkpoints."""
import json
import os
import shutil
import struct
import subprocess
import sys
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


LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("damage, named", [
    (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
    (lambda f: (f / "config.json").write_text("not json"), "config.json cannot be read as JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json holds a list"),
    (lambda f: (f / "model.safetensors").rename(f / "model.bin"), "has no .*safetensors"),
    (lambda f: change_tensors(f, lambda t: t.update({"model.layers.7.x.scales": torch.ones(2)})),
     "unexpected tensors: model.layers.7.x.scales"),
    (lambda f: change_tensors(f, lambda t: t.update({LAYER + ".weight": torch.ones(128, 64)})),
     "has both a weight and a qweight"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\x01"), "model.safetensors is truncated"),
    (lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:-100]), "model.safetensors is truncated"),
    (lambda f: (f / "model.safetensors").write_bytes(
        b"\xff" * 8 + (f / "model.safetensors").read_bytes()[8:]), "safetensors is truncated"),
    (lambda f: (f / "model.safetensors").write_bytes(
        struct.pack("<Q", 4) + b"abcd"), "model.safetensors is truncated or not"),
    (lambda f: break_header(f / "model.safetensors", lambda h: h.pop(LAYER + ".scales")),
     "model.safetensors is truncated or not"),
    (lambda f: break_header(f / "model.safetensors",
                            lambda h: h[LAYER + ".qzeros"].update(shape=[9, 32])),
     "model.safetensors is truncated or not"),
    (lambda f: change_tensors(f, lambda t: t.pop(LAYER + ".scales")),
     f"tensor {LAYER}.scales is None"),
    (lambda f: change_tensors(f, lambda t: t.pop(LAYER + ".qweight")), f"missing.*{LAYER}.weight"),
    (lambda f: change_tensors(f, lambda t: t.update({LAYER + ".qzeros": t[LAYER + ".qzeros"][:1]})),
     f"model.safetensors: tensor {LAYER}.qzeros"),
    (lambda f: change_tensors(f, lambda t: t.update(
        {LAYER + ".scales": t[LAYER + ".scales"].float()})),
     f"model.safetensors: tensor {LAYER}.scales"),
    (lambda f: change_tensors(f, lambda t: t.update(other_qweight=t.pop(LAYER + ".qweight"))),
     f"missing.*{LAYER}.weight"),
])
def test_damaged_checkpoints_are_named(copied, damage, named):
    damage(copied)
    with pytest.raises(ValueError, match=named):
        awq.load_quantized(copied)


@pytest.mark.parametrize("change, named", [
    (None, "no quantization_config"), ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
    ({"bits": 3}, "version is 'gemm'"), ({"bits": 5}, "bits is 5"),
    ({"version": "gemv"}, "version is 'gemv'"), ({"version": "marlin"}, "version is 'marlin'"),
    ({"zero_point": False}, "zero_point is False"), ({"group_size": 48}, "group_size is 48"),
    ({"group_size": 64}, "qzeros"),
])
def test_foreign_configs_are_named(copied, change, named):
    config = json.loads((copied / "config.json").read_text())
    if change is None:
        del config["quantization_config"]
    else:
        config["quantization_config"].update(change)
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=named):
        awq.load_quantized(copied)


def test_config_without_bits_is_named(copied):
    config = json.loads((copied / "config.json").read_text())
    del config["quantization_config"]["bits"]
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no bits"):
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
    (tmp_path / "empty").mkdir()
    awq.save_quantized(model, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()
    with pytest.raises(ValueError, match="no AWQLinear"):
        awq.save_quantized(llama(), tmp_path / "plain")
    del model.config.quantization_config        # as after Ctrl-C in quantize_model
    with pytest.raises(ValueError, match="in part only"):
        awq.save_quantized(model, tmp_path / "part")


def test_an_interrupted_save_leaves_nothing(saved, tmp_path, monkeypatch):
    """Killed while writing: no target; the next save clears what the killed one left."""
    model = awq.load_quantized(saved[0])
    write = model.save_pretrained

    def interrupted(folder, **kwargs):
        write(folder, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        awq.save_quantized(model, tmp_path / "q")
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    (tmp_path / ".q.partial").mkdir()
    (tmp_path / ".q.partial" / "junk").write_text("left by a kill")
    awq.save_quantized(model, tmp_path / "q")
    assert os.listdir(tmp_path) == ["q"] and not (tmp_path / "q" / "junk").exists()


# --- the API of AutoAWQ, on a small LLaMA with tinylm's tokenizer -------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A full-precision model with a tokenizer, as a user would have it on disk."""
    from transformers import AutoTokenizer
    path = tmp_path_factory.mktemp("model") / "small"
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tinylm")
    llama(vocab_size=len(tokenizer), layers=1).save_pretrained(path)
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


def test_signature_that_autoawq_had(folder):
    model = awq.AutoAWQForCausalLM.from_pretrained(folder)
    config = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    text = "import os\n" * 400
    report = model.quantize(model.tokenizer, quant_config=config, calib_data=[text, text],
                            max_calib_samples=2, progress=False)
    assert report["bits"] == 4 and report["group_size"] == 32
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
    bad = subprocess.run([*command, "--save", str(text)], capture_output=True, text=True)
    assert bad.returncode == 2 and "is a file" in bad.stderr and "Traceback" not in bad.stderr
    assert Path(text).is_file()


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
