"""AutoAWQ's class, the command line, and .gguf files, as a user meets them."""
import errno
import json
import os
import re
import runpy
import shutil
import sys

import pytest
import torch
from conftest import ROOT, llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import awq
from awq import AutoAWQForCausalLM

IDS = torch.randint(0, 96, (4, 24), generator=torch.Generator().manual_seed(0))
CODE = "for i in range(10):\n    print(i, i * i)\n" * 200

# ---- AutoAWQ's class -----------------------------------------------------------------------------


def test_the_signature_that_autoawq_had(folder, tmp_path):
    """Its usual keywords, all at once; a tokenizer given to save_quantized is the one saved."""
    model = AutoAWQForCausalLM.from_pretrained(str(folder), safetensors=True, device_map=None,
                                               torch_dtype=torch.float32, low_cpu_mem_usage=True,
                                               use_cache=False, download_kwargs=None)
    config = {"w_bit": 3, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    report = model.quantize(model.tokenizer, config, [CODE, CODE], split="train",
                            text_column="text", duo_scaling=False, export_compatible=False,
                            apply_clip=False, n_parallel_calib_samples=None, max_calib_samples=2,
                            max_calib_seq_len=48, max_chunk_memory=2 ** 30, progress=False)
    assert (report["bits"], report["group_size"]) == (3, 32)
    assert not any(clipped for line in report["groups"] for _, clipped, _ in line["curve"])
    tokenizer = model.tokenizer
    tokenizer.chat_template = "changed"
    model.save_quantized(tmp_path / "q", tokenizer, safetensors=True, shard_size="5GB")
    assert "calibration: own text, 2 x 48 tokens" in (tmp_path / "q" / "README.md").read_text()
    again = AutoAWQForCausalLM.from_quantized(
        tmp_path / "q", "model.safetensors", max_seq_len=64, batch_size=1, fuse_layers=True,
        safetensors=True, use_exllama=False, use_ipex=False, device_map=None, max_memory=None,
        offload_folder=None)
    assert again.tokenizer.chat_template == "changed" and again.config is again.model.config
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.generate(IDS, max_new_tokens=3).shape == (4, 27)


@pytest.mark.parametrize("call, named", [
    (lambda m, f: m.quantize(None, {"version": "GEMV"}, IDS), "version is 'GEMV'"),
    (lambda m, f: m.quantize(calib_data=IDS, zero_point=False), "zero_point is False"),
    (lambda m, f: m.quantize(calib_data=IDS, modules=[]), r"no options \['modules'\]"),
    (lambda m, f: m.save_quantized(f / "new", safetensors=False), "safetensors is False"),
    (lambda m, f: m.save_quantized(f / "new", banana=1), r"no options \['banana'\]"),
    (lambda m, f: m.save_quantized(f / "new"), "not quantized"),
    (lambda m, f: m.from_quantized(f, use_exllama=True), "use_exllama is True"),
    (lambda m, f: m.from_quantized(f), "has no quantization_config"),
])
def test_what_is_not_taken_is_refused_by_name(call, named, folder):
    with pytest.raises(ValueError, match=named):
        call(AutoAWQForCausalLM(llama(layers=1), folder), folder)
    assert not (folder / "new").exists()


def test_code_of_a_folder_never_runs_unasked(folder, tmp_path, monkeypatch):
    """Not for a file name where AutoAWQ had one, and without a question on the terminal."""
    own = shutil.copytree(folder, tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    config.update(model_type="own", auto_map={"AutoConfig": "own.Config",
                                              "AutoModelForCausalLM": "own.Model"})
    (own / "config.json").write_text(json.dumps(config))
    (own / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}}))
    (own / "own.py").write_text("raise SystemExit('this code has run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    for load in (awq.load_quantized, awq.load_tokenizer, AutoAWQForCausalLM.from_pretrained,
                 lambda f: AutoAWQForCausalLM.from_quantized(f, "model.safetensors"),
                 lambda f: awq.load_pretrained(f, trust_remote_code="model.safetensors")):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(own)
    for asked in (lambda: AutoAWQForCausalLM.from_quantized(own, trust_remote_code=True),
                  lambda: run(monkeypatch, own, "--save", tmp_path / "q", "--trust-remote-code")):
        with pytest.raises(SystemExit, match="this code has run"):
            asked()


# ---- The command line ----------------------------------------------------------------------------


def run(monkeypatch, *arguments):
    """python awq.py with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["awq.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "awq.py"), run_name="__main__")


def failed(monkeypatch, capsys, *arguments, code=2):
    """The last line on stderr of a command that ends with an exit code."""
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *arguments)
    out, err = capsys.readouterr()
    assert end.value.code == code and not out
    return err.splitlines()[-1]


def options(folder):
    return ("--calib", folder / "calib.txt", "--samples", 4, "--seq-len", 32, "--group-size", 32,
            "--device", "cpu")


def test_the_command_quantizes_and_saves(folder, tmp_path, monkeypatch, capsys):
    run(monkeypatch, folder, "--save", tmp_path / "q", *options(folder))
    out = capsys.readouterr().out
    assert "| layers |" in out and "not quantized: lm_head" in out
    assert awq.load_quantized(tmp_path / "q").config.quantization_config.bits == 4
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "q" / name).read_bytes() == (folder / name).read_bytes()
    card = (tmp_path / "q" / "README.md").read_text()
    assert "small, quantized with AWQ" in card and str(folder) not in card
    assert "calibration: calib.txt, 4 x 32 tokens, seed 0." in card
    assert os.listdir(tmp_path) == ["q"]


def test_the_report_names_two_of_many_experts(capsys):
    line = {"block": 0, "folded_into": None, "reason": "why", "alpha": 0.0, "loss": 1.0,
            "loss_rtn": 2.0, "layers": [f"model.layers.0.mlp.experts.{i}.up" for i in range(64)]}
    awq.print_report({"groups": [line], "skipped": {}, "stages": {}, "seconds": 0.0})
    assert "| 0: mlp.experts.0.up, mlp.experts.1.up, 62 more |" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, named", [
    (["no/such"], "model no/such cannot be loaded: no such folder"),
    (["BARE"], "has no tokenizer"),
    (["MODEL", "--device", "banana"], "device is 'banana'"),
    (["MODEL", "--samples", 0], "samples is 0"),
    (["MODEL", "--seq-len", 65], "sequence length is 65"),
    (["MODEL", "--calib", "MODEL/none.txt"], "data is '.*none.txt'"),
    (["MODEL", "--calib", "MODEL/bad.jsonl"], "not JSON lines"),
    (["MODEL", "--save", "MODEL"], "non-empty folder"),
    (["MODEL", "--save", "MODEL/calib.txt/q"], "calib.txt"),
])
def test_bad_input_is_one_line_and_exit_code_2(arguments, named, folder, tmp_path, monkeypatch,
                                               capsys):
    model = shutil.copytree(folder, tmp_path / "MODEL")
    (model / "bad.jsonl").write_text('{"text": "a"}\nnot JSON\n')
    shutil.copytree(folder, tmp_path / "BARE", ignore=shutil.ignore_patterns("*token*"))
    monkeypatch.chdir(tmp_path)
    line = failed(monkeypatch, capsys, "--save", "q", *options(folder), *arguments)
    assert line.startswith("error: ") and re.search(named, line), line
    assert sorted(os.listdir()) == ["BARE", "MODEL"]


@pytest.mark.parametrize("where, error, code, named", [
    ("transformers.LlamaForCausalLM.save_pretrained", OSError(errno.ENOSPC, "No space left"), 2,
     "error: .*No space left"),
    ("transformers.LlamaModel.forward", torch.OutOfMemoryError("CUDA out of memory"), 2,
     "error: CUDA out of memory"),
    ("checkpoint.model_card", KeyboardInterrupt(), 130, "interrupted")])
def test_what_ends_on_the_way_is_one_line_and_leaves_nothing(where, error, code, named, folder,
                                                             tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise error
    monkeypatch.setattr(where, fail)
    line = failed(monkeypatch, capsys, folder, "--save", tmp_path / "q", *options(folder),
                  code=code)
    assert re.match(named, line) and not os.listdir(tmp_path)


# ---- .gguf files ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf(folder, tmp_path_factory):
    """The model as llama.cpp stores it: float16 matrices, rotary halves interleaved."""
    gguf = pytest.importorskip("gguf", reason="NOT tested: .gguf files need pip install gguf")
    pytest.importorskip("accelerate", reason="NOT tested: .gguf files need pip install accelerate")
    file = tmp_path_factory.mktemp("gguf") / "small.gguf"
    model = AutoModelForCausalLM.from_pretrained(folder)
    config, writer = model.config, gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    words = json.loads((folder / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(words["vocab"], key=words["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in words["merges"]])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, W in model.state_dict().items():
        if count := heads.get(name.split(".")[-2]):
            W = W.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, [".weight"]),
                          (W.half() if W.ndim == 2 else W).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_file_is_a_model(gguf, folder, tmp_path, monkeypatch):
    """Its logits, its tokenizer; quantized and saved by the command it loads as any other."""
    model = AutoAWQForCausalLM.from_pretrained(gguf)
    expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    assert (model(IDS).logits - expected).norm() < 2e-3 * expected.norm()
    assert model.tokenizer(CODE).input_ids == AutoTokenizer.from_pretrained(folder)(CODE).input_ids
    run(monkeypatch, gguf, "--save", tmp_path / "q", *options(folder))
    loaded = AutoAWQForCausalLM.from_quantized(tmp_path / "q")
    assert loaded.tokenizer("def f(").input_ids == model.tokenizer("def f(").input_ids
    assert (loaded(IDS).logits - expected).norm() < 0.3 * expected.norm()


def test_a_gguf_model_from_transformers_itself_can_be_quantized_and_saved(gguf, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    awq.quantize_model(model, IDS, 4, 32, progress=False)
    awq.save_quantized(model, tmp_path / "q")
    assert torch.equal(awq.load_quantized(tmp_path / "q")(IDS).logits, model(IDS).logits)


GGUF_IS_THERE = "transformers.modeling_gguf_pytorch_utils.is_gguf_available"


@pytest.mark.parametrize("change, named", [
    (lambda file, patch: os.truncate(file, 5000), "small.gguf cannot .*: it is truncated"),
    (lambda file, patch: patch(GGUF_IS_THERE, lambda: False), "loaded: Please install .*gguf>="),
    (lambda file, patch: file.parent, "name one of its .gguf files: small.gguf"),
    (lambda file, patch: file.with_name("none.gguf"), "none.gguf cannot be loaded: no such"),
])
def test_bad_gguf_files_are_one_line(change, named, gguf, folder, tmp_path, monkeypatch, capsys):
    file = shutil.copy(gguf, tmp_path / "small.gguf")
    given = change(file, monkeypatch.setattr) or file
    line = failed(monkeypatch, capsys, given, "--save", tmp_path / "q", *options(folder))
    assert re.search(named, line) and os.listdir(tmp_path) == ["small.gguf"]
