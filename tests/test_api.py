"""AutoAWQ's class, the command line, and .gguf files, as a user meets them."""
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, llama
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils import import_utils

import awq
from awq import AutoAWQForCausalLM

IDS = torch.randint(0, 96, (4, 24), generator=torch.Generator().manual_seed(0))
CODE = "for i in range(10):\n    print(i, i * i)\n" * 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A full-precision model with a tokenizer, as a user would have it on disk."""
    path = tmp_path_factory.mktemp("model") / "small"
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tinylm")
    tokenizer.chat_template = "{{ messages[0].content }}"
    model = llama(vocab_size=len(tokenizer), layers=1)
    model.generation_config.update(do_sample=True, top_p=0.9)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "calib.txt").write_text(CODE)
    return path


@pytest.fixture(scope="module")
def quantized(folder, tmp_path_factory):
    """A folder as save_quantized writes it, with the tokenizer of quantize."""
    path = tmp_path_factory.mktemp("quantized") / "q"
    model = AutoAWQForCausalLM.from_pretrained(folder)
    model.quantize(calib_data=str(folder / "calib.txt"), q_group_size=32, max_calib_samples=4,
                   progress=False)
    model.save_quantized(path)
    return path


# ---- AutoAWQ's class -----------------------------------------------------------------------------


def test_the_snippet_that_people_know(folder, tmp_path):
    model = AutoAWQForCausalLM.from_pretrained(str(folder))
    report = model.quantize(calib_data=str(folder / "calib.txt"), w_bit=4, q_group_size=32,
                            version="GEMM", max_calib_samples=8, progress=False)
    assert len(report["groups"]) == 4
    model.save_quantized(tmp_path / "q", model.tokenizer)
    again = AutoAWQForCausalLM.from_quantized(tmp_path / "q")
    ids = again.tokenizer("def f(", return_tensors="pt").input_ids
    assert torch.equal(again(ids).logits, model(ids).logits)
    text = again.generate(ids, max_new_tokens=3, do_sample=False)
    assert text.shape[1] == ids.shape[1] + 3
    awq.register()
    said = pipeline("text-generation", model=str(tmp_path / "q"), dtype="auto")(
        "def f(", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert said == model.tokenizer.decode(text[0])


def test_the_signature_that_autoawq_had(folder, tmp_path):
    """Its usual keywords, all at once; the tokenizer of quantize is saved with the model."""
    model = AutoAWQForCausalLM.from_pretrained(folder, safetensors=True, torch_dtype=torch.float32,
                                               device_map=None, low_cpu_mem_usage=True,
                                               use_cache=False, download_kwargs=None)
    config = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    report = model.quantize(model.tokenizer, config, [CODE, CODE], split="train",
                            text_column="text", duo_scaling=False, export_compatible=False,
                            apply_clip=False, n_parallel_calib_samples=2, max_calib_samples=2,
                            max_calib_seq_len=48, max_chunk_memory=2 ** 30, progress=False)
    assert (report["bits"], report["group_size"]) == (4, 32)
    assert not any(clipped for line in report["groups"] for _, clipped, _ in line["curve"])
    model.save_quantized(tmp_path / "q", safetensors=True, shard_size="5GB")
    assert (tmp_path / "q" / "tokenizer.json").is_file()
    assert "calibration: own text, 2 x 48 tokens" in (tmp_path / "q" / "README.md").read_text()
    again = AutoAWQForCausalLM.from_quantized(
        tmp_path / "q", "", max_seq_len=64, batch_size=1, fuse_layers=True, safetensors=True,
        use_exllama=False, use_ipex=False, device_map=None, max_memory=None, offload_folder=None)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("call, named", [
    (lambda m, f: m.quantize(None, {"w_bit": 5}, IDS), "bits is 5"),
    (lambda m, f: m.quantize(None, {"version": "GEMV"}, IDS), "version is 'GEMV'"),
    (lambda m, f: m.quantize(calib_data=IDS, zero_point=False), "zero_point is False"),
    (lambda m, f: m.quantize(calib_data=IDS, duo_scaling=True), "duo_scaling is True"),
    (lambda m, f: m.quantize(calib_data=IDS, modules=[]), r"no options \['modules'\]"),
    (lambda m, f: m.quantize(calib_data=IDS, n_parallel_calib_samples=0), "batch_size is 0"),
    (lambda m, f: m.save_quantized(f / "new", safetensors=False), "safetensors is False"),
    (lambda m, f: m.save_quantized(f / "new", banana=1), r"no options \['banana'\]"),
    (lambda m, f: m.save_quantized(f / "new"), "not quantized"),
    (lambda m, f: m.from_quantized(f, use_exllama=True), "use_exllama is True"),
    (lambda m, f: m.from_quantized(f), "has no quantization_config"),
    (lambda m, f: m.from_pretrained(f, trust_remote_code="model.safetensors"), "trust_remote_code"),
])
def test_what_is_not_taken_is_refused_by_name(call, named, folder):
    with pytest.raises(ValueError, match=named) as caught:
        call(AutoAWQForCausalLM(llama(layers=1), folder), folder)
    assert "\n" not in str(caught.value) and not (folder / "new").exists()


def with_code(source, folder):
    """A copy of a model folder that brings code, which ends the process if it is run."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="own", auto_map={"AutoConfig": "own.Config",
                                              "AutoModelForCausalLM": "own.Model"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}}))
    (folder / "own.py").write_text("raise SystemExit('this code has run')")
    return folder


def test_code_of_a_folder_never_runs_unasked(quantized, tmp_path, monkeypatch):
    """Not for a file name where AutoAWQ had one, and without a question on the terminal."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    own = with_code(quantized, tmp_path / "own")
    for load in (awq.load_quantized, awq.load_tokenizer, AutoAWQForCausalLM.from_pretrained,
                 lambda f: AutoAWQForCausalLM.from_quantized(f, "model.safetensors")):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(own)
    monkeypatch.setattr(sys, "argv", ["awq.py", str(own), "--save", str(tmp_path / "q"),
                                      "--trust-remote-code"])
    for load in (awq.main, lambda: AutoAWQForCausalLM.from_quantized(own, trust_remote_code=True)):
        with pytest.raises(SystemExit, match="this code has run"):
            load()


def test_the_wrapper_passes_on_what_is_the_models_own(quantized):
    model = AutoAWQForCausalLM.from_quantized(quantized, "model.safetensors")
    inner = model.model
    assert model.config is inner.config and model.generation_config is inner.generation_config
    assert model.device.type == "cpu" and model.dtype == inner.dtype and model.hf_quantizer
    assert model.to("cpu") is inner and model.eval() is inner and not inner.training
    with pytest.raises(AttributeError, match="banana"):
        model.banana


# ---- The command line ----------------------------------------------------------------------------


def command(*arguments):
    return [sys.executable, str(ROOT / "awq.py"), *map(str, arguments)]


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])
    return file


def failed(monkeypatch, capsys, *arguments):
    """The line on stderr of a command in this process that ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["awq.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        awq.main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "error: " in last
    return last


def options(folder, *more):
    return ("--calib", folder / "calib.txt", "--samples", 4, "--seq-len", 32, "--group-size", 32,
            "--device", "cpu", *more)


def test_the_command_quantizes_and_saves(folder, tmp_path):
    done = subprocess.run(command(folder, "--save", tmp_path / "q", *options(folder)),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| layers |" in done.stdout and "not quantized: lm_head" in done.stdout
    assert awq.load_quantized(tmp_path / "q").config.quantization_config.bits == 4
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "q" / name).read_bytes() == (folder / name).read_bytes()
    card = (tmp_path / "q" / "README.md").read_text()
    assert "small, quantized with AWQ" in card and "base_model" not in card and "/" + str(
        folder).strip("/") not in card                                  # no local path on a hub
    assert "calibration: calib.txt, 4 x 32 tokens, seed 0." in card
    assert os.listdir(tmp_path) == ["q"]


def test_the_report_names_two_of_many_experts(capsys):
    line = {"block": 0, "folded_into": None, "reason": "why", "alpha": 0.0, "loss": 1.0,
            "loss_rtn": 2.0, "layers": [f"model.layers.0.mlp.experts.{i}.up" for i in range(64)]}
    awq.print_report({"groups": [line], "skipped": {}, "stages": {}, "seconds": 0.0})
    assert "| 0: mlp.experts.0.up, mlp.experts.1.up, 62 more |" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, named", [
    (["no/such"], "model no/such cannot be loaded: no such folder"),
    (["MODEL", "--device", "banana"], "device is 'banana'"),
    (["MODEL", "--group-size", 48], "in_features 64 is not a multiple of group_size 48"),
    (["MODEL", "--group-size", 0], "group_size is 0"),
    (["MODEL", "--samples", 0], "samples is 0"),
    (["MODEL", "--seq-len", 65], "sequence length is 65"),
    (["MODEL", "--samples", 10 ** 6], "samples need"),
    (["MODEL", "--calib", "MODEL/none.txt"], "data is '.*none.txt'"),
    (["MODEL", "--calib", "MODEL/model.safetensors"], "not UTF-8"),
    (["MODEL", "--calib", "MODEL/bad.jsonl"], "not JSON lines"),
    (["MODEL", "--save", "MODEL"], "non-empty folder"),
    (["MODEL", "--save", "MODEL/calib.txt/q"], "calib.txt"),
    (["MODEL", "--bits", 5], "invalid choice: 5"),
    (["BARE"], "has no tokenizer"),
])
def test_bad_input_is_one_line_and_exit_code_2(arguments, named, folder, tmp_path, monkeypatch,
                                               capsys):
    model = shutil.copytree(folder, tmp_path / "MODEL")
    (model / "bad.jsonl").write_text('{"text": "a"}\nnot JSON\n')
    shutil.copytree(folder, tmp_path / "BARE", ignore=shutil.ignore_patterns("*token*"))
    monkeypatch.chdir(tmp_path)
    line = failed(monkeypatch, capsys, "--save", "q", *options(folder), *arguments)
    assert re.search(named, line), line
    assert sorted(os.listdir()) == ["BARE", "MODEL"]


@pytest.mark.parametrize("where, error", [
    ("LlamaForCausalLM.save_pretrained", OSError(errno.ENOSPC, "No space left on device")),
    ("LlamaModel.forward", torch.OutOfMemoryError("CUDA out of memory"))])
def test_what_fails_on_the_way_is_one_line_and_leaves_nothing(where, error, folder, tmp_path,
                                                              monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise error
    monkeypatch.setattr(f"transformers.{where}", fail)
    line = failed(monkeypatch, capsys, folder, "--save", tmp_path / "q", *options(folder))
    assert str(error) in line and not os.listdir(tmp_path)


def test_ctrl_c_leaves_nothing(folder, tmp_path):
    process = subprocess.Popen(command(ROOT / "tinylm", "--save", tmp_path / "q",
                                       *options(folder)), stderr=subprocess.PIPE,
                               # in a background job SIGINT is ignored, which children inherit
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    seen = b""
    while b"0/4" not in seen:               # the bar, at the first block
        piece = process.stderr.read1()
        assert piece, seen
        seen += piece
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and b"interrupted" in rest and b"Traceback" not in rest
    assert not os.listdir(tmp_path)


# ---- .gguf files ---------------------------------------------------------------------------------


def write_gguf(model, tokenizer, file, architecture="llama"):
    """A LLaMA as llama.cpp stores it: float16 matrices, rotary halves interleaved."""
    gguf = pytest.importorskip("gguf", reason="NOT tested: .gguf files need pip install gguf")
    pytest.importorskip("accelerate", reason="NOT tested: .gguf files need pip install accelerate")
    config, writer = model.config, gguf.GGUFWriter(str(file), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is not None:
        spec = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(vocabulary)
        writer.add_token_types([1] * len(vocabulary))
        writer.add_token_merges([" ".join(pair) for pair in spec["merges"]])
        writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, W in model.state_dict().items():
        count = heads.get(name.split(".")[-2])
        if count:
            W = W.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, [".weight"]),
                          (W.half() if W.ndim == 2 else W).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def gguf(folder, tmp_path):
    """(file, the model it was made from)."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (tmp_path / "in").mkdir()
    return write_gguf(model, AutoTokenizer.from_pretrained(folder),
                      tmp_path / "in" / "small.gguf"), model


def test_a_gguf_file_is_a_model(gguf, folder, tmp_path, monkeypatch, capsys):
    """Its logits, its tokenizer; quantized and saved by the command it loads as any other."""
    file, original = gguf
    model = AutoAWQForCausalLM.from_pretrained(file)
    expected = original(IDS).logits
    assert (model(IDS).logits - expected).norm() < 2e-3 * expected.norm()
    assert model.tokenizer(CODE).input_ids == AutoTokenizer.from_pretrained(folder)(CODE).input_ids
    monkeypatch.setattr(sys, "argv", ["awq.py", str(file), "--save", str(tmp_path / "q"),
                                      *map(str, options(folder))])
    awq.main()
    loaded = AutoAWQForCausalLM.from_quantized(tmp_path / "q")
    assert loaded.tokenizer("def f(").input_ids == model.tokenizer("def f(").input_ids
    assert (loaded(IDS).logits - expected).norm() < 0.3 * expected.norm()
    assert "small.gguf, quantized with AWQ" in (tmp_path / "q" / "README.md").read_text()


def test_a_gguf_model_from_transformers_itself_can_be_quantized_and_saved(gguf, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(gguf[0].parent, gguf_file=gguf[0].name)
    awq.quantize_model(model, IDS, 4, 32, progress=False)
    awq.save_quantized(model, tmp_path / "q")
    assert torch.equal(awq.load_quantized(tmp_path / "q")(IDS).logits, model(IDS).logits)


def two_files(file):
    shutil.copy(file, file.with_name("other.gguf"))
    return file.parent


@pytest.mark.parametrize("change, named", [
    (lambda file: cut(file, -5000), "small.gguf cannot be loaded: it is truncated"),
    (lambda file: cut(file, 0), "small.gguf cannot be loaded: it is truncated"),
    (lambda file: write_gguf(llama(layers=1), None, file, "weird"), "architecture weird is not"),
    (lambda file: write_gguf(llama(layers=1), None, file), "small.gguf has no tokenizer"),
    (two_files, "name one of its .gguf files: other.gguf, small.gguf"),
    (lambda file: file.with_name("none.gguf"), "none.gguf cannot be loaded: no such"),
])
def test_bad_gguf_files_are_one_line(change, named, gguf, folder, tmp_path, monkeypatch, capsys):
    line = failed(monkeypatch, capsys, change(gguf[0]), "--save", tmp_path / "q", *options(folder))
    assert named in line and os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_package_is_named(package, gguf, folder, tmp_path, monkeypatch, capsys):
    found = import_utils._is_package_available
    monkeypatch.setattr(import_utils, "_is_package_available", lambda name, *args, **kwargs: (
        (False, "0") if name == package else found(name, *args, **kwargs)))
    for cached in (import_utils.is_gguf_available, import_utils.is_accelerate_available):
        cached.cache_clear()
    try:
        line = failed(monkeypatch, capsys, gguf[0], "--save", tmp_path / "q", *options(folder))
    finally:
        monkeypatch.undo()
        for cached in (import_utils.is_gguf_available, import_utils.is_accelerate_available):
            cached.cache_clear()
    assert package in line and "install" in line and os.listdir(tmp_path) == ["in"]
