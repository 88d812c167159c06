"""eval.py: the protocol, the table, the options, and the effect on tinylm."""
import argparse
import copy
import json
import math
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, llama

import awq
import eval as evaluation


def run_eval(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, str(ROOT / "eval.py"), *map(str, arguments)], cwd=cwd,
                          capture_output=True, text=True)


@pytest.fixture(scope="module")
def tinylm():
    """(model, tokenizer, calibration tokens, some test windows) of the committed model."""
    model, tokenizer = evaluation.load_model(ROOT / "tinylm", "cpu")
    tokens = awq.calibration_tokens("pydoc", tokenizer, 64, 512)
    return model, tokenizer, tokens, evaluation.test_windows("pydoc", tokenizer, 512)


def test_perplexity_equals_a_loop():
    """Summed over predicted tokens, one window and one token at a time, in float64."""
    model, windows = llama(), torch.randint(0, 96, (3, 12))
    total = 0.0
    for window in windows:
        logits = model(window[None]).logits[0].double()
        for position in range(11):
            total -= torch.log_softmax(logits[position], -1)[window[position + 1]].item()
    assert math.isclose(evaluation.perplexity(model, windows, "cpu", batch=2),
                        math.exp(total / 33), rel_tol=1e-5)


def test_windows_are_the_text_in_order(tmp_path):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tinylm")
    file = tmp_path / "text.txt"
    file.write_text("a b c d e f g h " * 50)
    ids = tokenizer(file.read_text()).input_ids
    windows = evaluation.test_windows(str(file), tokenizer, 16)
    assert windows.flatten().tolist() == ids[:len(ids) // 16 * 16]
    with pytest.raises(ValueError, match="one window needs"):
        evaluation.test_windows(str(file), tokenizer, len(ids) + 1)


def test_tinylm_is_what_it_says(tinylm):
    """LLaMA-shaped, grouped queries, widths of 128, at most 12 MB."""
    model = tinylm[0]
    config = model.config
    assert config.model_type == "llama"
    assert config.num_key_value_heads < config.num_attention_heads
    assert all(m.in_features % 128 == 0 and m.out_features % 128 == 0
               for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    assert sum(f.stat().st_size for f in (ROOT / "tinylm").iterdir() if f.is_file()) <= 12e6


def test_awq_recovers_what_rtn_loses_on_tinylm(tinylm):
    """INT3: more than 30 % of RTN's loss (README: 41 %); v -> o is folded, heads shared."""
    model, _, tokens, windows = tinylm
    windows = windows[::2]
    full = evaluation.perplexity(model, windows, "cpu")
    rounded, searched = copy.deepcopy(model), copy.deepcopy(model)
    awq.round_model(rounded, 3, 128)
    report = awq.quantize_model(searched, tokens, 3, 128, progress=False)
    rtn = evaluation.perplexity(rounded, windows, "cpu")
    ours = evaluation.perplexity(searched, windows, "cpu")
    assert rtn - full > 0.3
    assert ours - full < 0.7 * (rtn - full)
    for line in report["groups"]:
        assert line["loss"] <= line["loss_rtn"]
        if line["layers"][0].endswith("o_proj"):
            assert line["folded_into"].endswith("v_proj")


@pytest.mark.xfail(reason="the target; README's table has 41 % for this tinylm", strict=False)
def test_int3_recovers_the_target_of_45_percent(tinylm):
    """At least 45 % of RTN's INT3 loss, by README's protocol: 128 samples, all windows."""
    model, tokenizer, _, windows = tinylm
    tokens = awq.calibration_tokens("pydoc", tokenizer, 128, 512)
    rounded, searched = copy.deepcopy(model), copy.deepcopy(model)
    awq.round_model(rounded, 3, 128)
    awq.quantize_model(searched, tokens, 3, 128, progress=False)
    full, rtn, ours = (evaluation.perplexity(m, windows, "cpu") for m in (model, rounded, searched))
    assert ours - full < 0.55 * (rtn - full)


def test_rtn_is_the_search_without_its_parts(tinylm):
    """round_model and quantize_model(scale=False, clip=False) store the same integers."""
    model, _, tokens, _ = tinylm
    rounded, walked = copy.deepcopy(model), copy.deepcopy(model)
    awq.round_model(rounded, 4, 128)
    awq.quantize_model(walked, tokens[:2], 4, 128, clip=False, scale=False, progress=False)
    state = walked.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in rounded.state_dict().items())


def test_table_and_json_hold_the_same_numbers(tmp_path):
    """A small real run from the shell: one Markdown table on stdout, rows as documented."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"The value of item {i} is {i * 7 % 31}." for i in range(2000)))
    done = run_eval("--data", text, "--calib", text, "--bits", "4,2", "--methods", "rtn,awq",
                    "--samples", "4", "--window", "128", "--seq-len", "64", "--seed", "3",
                    "--json", tmp_path / "out.json", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert [(r["method"], r["bits"]) for r in result["rows"]] == [
        ("fp", 16), ("rtn", 4), ("awq", 4), ("rtn", 2), ("awq", 2)]
    assert result["setup"]["seed"] == 3 and result["setup"]["window"] == 128
    cells = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    for row, cell in zip(result["rows"], cells, strict=True):
        assert float(cell[6]) == pytest.approx(row["ppl"], abs=6e-4)
        assert {"method", "bits", "group_size", "ppl", "seconds", "bytes"} <= set(row)
    # 4 bits, and a 16-bit step and a 4-bit zero for every 128 weights
    assert result["rows"][1]["bits_per_weight"] == pytest.approx(4 + 20 / 128)
    assert result["rows"][3]["bits_per_weight"] == pytest.approx(2 + 18 / 128)


def test_saved_model_is_the_evaluated_one(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 400)
    options = ["--data", text, "--calib", text, "--samples", "2", "--seq-len", "64", "--window",
               "64", "--device", "cpu"]
    done = run_eval(*options, "--bits", "4", "--methods", "awq", "--save", tmp_path / "q",
                    "--json", tmp_path / "out.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    model = awq.load_quantized(tmp_path / "q", dtype=torch.float32).eval()
    from transformers import AutoTokenizer
    windows = evaluation.test_windows(text, AutoTokenizer.from_pretrained(tmp_path / "q"), 64)
    row = json.loads((tmp_path / "out.json").read_text())["rows"][1]
    assert evaluation.perplexity(model, windows, "cpu") == pytest.approx(row["ppl"], rel=1e-6)


@pytest.mark.parametrize("arguments, named", [
    (["--model", "no-such-org/no-such-model"], "no-such-org/no-such-model"),
    (["--data", "nothing"], "data is 'nothing'"),
    (["--data", "wikitext"], "wikitext"),
    (["--bits", "5"], "--bits is '5'"),
    (["--methods", "magic"], "--methods is 'magic'"),
    (["--group-size", "0"], "group_size is 0"),
    (["--window", "100000"], "100000"),
    (["--samples", "10000000"], "10000000 samples need"),
    (["--save", "."], "is a non-empty folder"),
    (["--save", "q"], "exactly one of each"),
    (["--device", "banana"], "device is 'banana'"),
    (["--json", "nowhere/out.json"], "--json is nowhere/out.json"),
    (["--readme", "mine"], "no markers <!-- eval -->"),
    (["--window", "1"], "--window is 1"),
])
def test_bad_options_end_with_one_line_and_code_2(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit) as end:
        evaluation.main(["--device", "cpu", "--json", "out.json", *arguments])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(lines) == 1 and named in lines[0], err
    assert "|" not in out
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_published_numbers_stand_beside_their_rows():
    """Only where the protocol is the paper's: WikiText-2, windows of 2048, groups of 128."""
    def paper(method, bits, **changes):
        options = {"model": "meta-llama/Llama-2-7b-hf", "data": "wikitext", "group_size": 128,
                   "window": 2048, **changes}
        window = options.pop("window")
        return evaluation.published(argparse.Namespace(**options), window, method, bits)
    assert paper("awq", 3) == 6.24 and paper("fp", 16) == 5.47
    assert paper("rtn", 3, model="facebook/opt-6.7b") == 23.54
    assert paper("fp", 16, model="facebook/opt-6.7b", group_size=64) == 10.86
    for changes in ({"group_size": 64}, {"data": "a.txt"}, {"window": 512}, {"model": "tinylm"}):
        assert paper("awq", 3, **changes) is None
    row = {"method": "awq", "bits": 3, "group_size": 128, "bits_per_weight": 3.15, "bytes": 1,
           "ppl": 6.3, "seconds": 1.0, "published": 6.24}
    assert "| paper |" in evaluation.table([row]) and "| 6.24 |" in evaluation.table([row])


def test_readme_table_is_one_that_eval_prints():
    """The README's table has the form, the set-up line and the rows of a default run."""
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- eval -->\n(.*?)<!-- /eval -->", readme, re.DOTALL)[1]
    lines = block.strip().splitlines()
    assert lines[0].startswith("tinylm, ") and "seed 0" in lines[0]
    assert [line.split("|")[1:3] for line in lines[4:]] == [
        [f" {title} ", f" {bits} "] for title, bits in
        [("full precision", 16), ("RTN", 4), ("AWQ", 4), ("RTN", 3), ("AWQ", 3)]]


def test_chart_shows_the_curve_of_the_report(tokens):
    report = awq.quantize_model(llama(), tokens, 3, 32, progress=False)
    chart = evaluation.alpha_chart(report)
    lines = [json.loads(line.strip()[5:]) for line in chart.splitlines() if "line [" in line]
    line = next(g for g in report["groups"] if ", ".join(g["layers"]) + " over alpha" in chart)
    assert [len(values) for values in lines] == [21, 21] and lines[0][0] == 1
    for values, clipped in zip(lines, (False, True)):
        expected = [loss / line["loss_rtn"] for _, c, loss in line["curve"] if c is clipped]
        assert values == pytest.approx(expected, abs=6e-4)


def test_write_between_markers_replaces_only_its_block(tmp_path):
    file = tmp_path / "README.md"
    rest = "\nb\n<!-- other -->\nkeep\n<!-- /other -->\n"
    file.write_text("a\n<!-- eval -->\nold\n<!-- /eval -->" + rest)
    evaluation.write_between_markers(file, "eval", "new | \\1")
    assert file.read_text() == "a\n<!-- eval -->\nnew | \\1\n<!-- /eval -->" + rest
    with pytest.raises(ValueError, match="no markers"):
        evaluation.write_between_markers(file, "missing", "x")
