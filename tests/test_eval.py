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
    """INT3: more than 30 % of RTN's loss with few samples; v -> o is folded, heads shared."""
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
    (["--windows", "0"], "--windows is 0"),
    (["--study", "magic"], "--study is 'magic': it must be one of salience, scale, grid"),
    (["--study", "memory", "--save", "q"], "a study saves no model"),
    (["--study", "grid", "--block", "9"], "--block is 9"),
    (["--methods", "smoothquant", "--bits", "8", "--save", "q"], "no quantised activations"),
    (["--group-size", "128,x"], "--group-size is '128,x'"),
    (["--plot", "out.gif"], "--plot is out.gif: it must end in .svg or .png"),
    (["--plot", "nowhere/out.svg"], "its folder does not exist"),
    (["--check"], "--check without --readme"),
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
        window, group_size = options.pop("window"), options.pop("group_size")
        args = argparse.Namespace(**options)
        return evaluation.published(args, window, method, bits, group_size)
    assert paper("awq", 3) == 6.24 and paper("fp", 16) == 5.47 and paper("gptq", 4) == 5.69
    assert paper("kept", 3, model="facebook/opt-6.7b") == 11.39
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


def test_write_between_markers_replaces_only_its_block(tmp_path):
    file = tmp_path / "README.md"
    rest = "\nb\n<!-- other -->\nkeep\n<!-- /other -->\n"
    file.write_text("a\n<!-- eval -->\nold\n<!-- /eval -->" + rest)
    evaluation.write_between_markers(file, "eval", "new | \\1")
    assert file.read_text() == "a\n<!-- eval -->\nnew | \\1\n<!-- /eval -->" + rest
    with pytest.raises(ValueError, match="no markers"):
        evaluation.write_between_markers(file, "missing", "x")


# ---- The baselines -------------------------------------------------------------------------------


def problem(seed=0, N=24, K=48):
    """(W [N, K], C [K, K]) with correlated channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(400, K, generator=generator) @ torch.randn(K, K, generator=generator)
    X = X * torch.exp2(torch.randn(K, generator=generator))
    return torch.randn(N, K, generator=generator), X.T @ X / len(X)


def gptq_loop(W, bits, G, C, act_order):
    """GPTQ's equations, a column at a time, the inverse of what is left computed anew: float64."""
    W, H = W.double().clone(), C.double().clone()
    N, K = W.shape
    H += 0.01 * H.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    order = sorted(range(K), key=lambda k: -C[k, k]) if act_order else list(range(K))
    grid = awq.quantization_grid(W.float(), bits, G)
    delta, zero = (x.double().clone() for x in grid)
    q = torch.zeros(N, K)
    for done, k in enumerate(order):
        g = k // G
        if k % G == 0 and not act_order:
            now = awq.quantization_grid(W[:, k:k + G].float().contiguous(), bits, G)
            delta[:, g], zero[:, g] = now[0][:, 0].double(), now[1][:, 0].double()
        q[:, k] = ((W[:, k] / delta[:, g]).round() + zero[:, g]).clamp(0, 2 ** bits - 1)
        error = W[:, k] - (q[:, k] - zero[:, g]) * delta[:, g]
        rest = order[done:]
        inverse = torch.linalg.inv(H[rest][:, rest])
        W[:, rest] -= error[:, None] * inverse[0] / inverse[0, 0]
    return q, delta, zero


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits, G", [(4, 16), (3, 8), (2, 48), (3, 24)])
def test_gptq_equals_an_unblocked_loop_in_float64(bits, G, act_order):
    W, C = problem()
    q, delta, zero = evaluation.gptq(W, bits, G, C=C, act_order=act_order)
    q_loop, delta_loop, zero_loop = gptq_loop(W, bits, G, C, act_order)
    assert torch.equal(q.float(), q_loop)
    assert torch.equal(delta.double(), delta_loop) and torch.equal(zero.double(), zero_loop)


def test_gptq_updates_across_blocks_of_columns():
    """More columns than one block of updates holds, a group longer than a block, odd groups."""
    W, C = problem(seed=1, N=8, K=288)
    for G, act_order in ((288, False), (96, False), (32, False), (288, True)):
        q, delta, _ = evaluation.gptq(W, 4, G, C=C, act_order=act_order)
        q_loop, delta_loop, _ = gptq_loop(W, 4, G, C, act_order)
        assert (q.float() != q_loop).float().mean() < 0.01    # float32: a tie may fall otherwise
        assert torch.allclose(delta.double(), delta_loop, rtol=1e-2)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("G", [8, 16, -1])
def test_gptq_with_identity_hessian_is_rtn(G, act_order):
    W, _ = problem()
    shrink = torch.rand(2, 24, 1 if G == -1 else 48 // G) / 2 + 0.5
    for given in (None, shrink):
        found = evaluation.gptq(W, 3, G, given, C=torch.eye(48), act_order=act_order)
        expected = awq.quantize(W, 3, G, given)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_gptq_has_a_lower_loss_than_rtn_and_stands_dead_channels():
    W, C = problem()
    C[5], C[:, 5] = 0, 0
    rounded = awq.gram_loss(awq.fake_quantize(W, 3, 16) - W, C)
    for act_order in (False, True):
        W_hat = awq.dequantize(*evaluation.gptq(W, 3, 16, C=C, act_order=act_order))
        assert awq.gram_loss(W_hat - W, C) < 0.7 * rounded
        assert (W_hat[:, 5] - W[:, 5]).abs().max() < 1      # a dead channel is still rounded
        found = evaluation.gptq(W, 3, 16, C=torch.zeros_like(C), act_order=act_order)
        assert all(torch.equal(a, b) for a, b in zip(found, awq.quantize(W, 3, 16)))


def test_rounding_hook_gets_the_gram_of_the_scaled_input(tokens):
    """(W s) (C / s s^T) (W s)^T = W C W^T, and the report's loss is that of what is stored."""
    def spied(**options):
        seen = []

        def spy(W, bits, group_size, shrink=None, *, C):
            seen.append(awq.gram_loss(W, C).item())
            return awq.quantize(W, bits, group_size, shrink)
        report = awq.quantize_model(llama(), tokens, 3, 32, progress=False, rounding=spy, **options)
        return seen, report
    plain, _ = spied(scale=False, clip=False)
    scaled, report = spied()
    assert scaled[0] == pytest.approx(plain[0], rel=1e-4)
    expected = awq.quantize_model(llama(), tokens, 3, 32, progress=False)
    for line, same in zip(report["groups"], expected["groups"], strict=True):
        assert line["loss"] == pytest.approx(same["loss"], rel=1e-3)
    report = awq.quantize_model(llama(), tokens, 3, 32, progress=False,
                                **evaluation.METHODS["gptq"].walk)
    assert all(line["loss"] < 0.9 * line["loss_rtn"] for line in report["groups"])


def test_smoothing_balances_and_leaves_the_output_unchanged(tokens):
    """alpha = 0.5: max|X / s| = max|W s| in every channel; the function is the same."""
    model = llama()
    expected = model(tokens).logits
    name = "model.layers.0.self_attn.q_proj"
    before = evaluation.input_statistics(model, tokens, [name])[name][1]
    evaluation.smooth(model, tokens)
    peak = evaluation.input_statistics(model, tokens, [name])[name][1]
    layers = [getattr(model.model.layers[0].self_attn, f"{x}_proj") for x in "qkv"]
    largest = torch.cat([layer.weight for layer in layers]).abs().amax(0)
    torch.testing.assert_close(peak, largest, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(peak, before, rtol=0.1)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_statistics_are_the_mean_and_the_peak(tokens):
    model, seen = llama(), []
    name = "model.layers.1.mlp.down_proj"
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    s_X, peak = evaluation.input_statistics(model, tokens.repeat(2, 1), [name])[name]
    X = torch.cat(seen).flatten(0, 1).abs()
    torch.testing.assert_close(s_X, X.mean(0))
    assert torch.equal(peak, X.amax(0))


def test_activations_are_rounded_a_token_at_a_time():
    X = torch.randn(3, 5, 32) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    X[1, 2] = 0
    rounded = evaluation.quantize_tokens(X)
    for x, r in zip(X.flatten(0, 1), rounded.flatten(0, 1)):
        delta = x.abs().max() / 127
        assert (r - x).abs().max() <= delta / 2 * 1.001
        steps = r / delta.clamp(min=1e-30)
        assert torch.allclose(steps, steps.round(), atol=1e-3)
        assert len(steps.round().unique()) <= 255


def test_quantised_inputs_change_what_packed_layers_read(tokens):
    model = llama()
    awq.round_model(model, 8, -1)
    expected = model(tokens).logits
    evaluation.quantize_inputs(model, 8)
    difference = (model(tokens).logits - expected).norm() / expected.norm()
    assert 1e-4 < difference < 0.1


# ---- The studies and the README ------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Options that make eval.py quick: a random LLaMA of hidden size 64 with tinylm's tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = awq.load_tokenizer(ROOT / "tinylm")
    llama(vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    text = folder / "text.txt"
    text.write_text("\n".join(f"The value of item {i} is {i * 7 % 31}." for i in range(2000)))
    return ["--model", str(folder / "model"), "--data", str(text), "--calib", str(text),
            "--group-size", "32", "--window", "32", "--windows", "4", "--seq-len", "8",
            "--device", "cpu"]


@pytest.fixture(scope="module")
def readme_run(small):
    """(blocks, pictures) of the README's command on the small input; its check must pass."""
    kept, patch = [], pytest.MonkeyPatch()
    original = evaluation.readme_blocks
    patch.setattr(evaluation, "readme_blocks",
                  lambda bench: kept.append(original(bench)) or kept[0])
    patch.setattr(evaluation, "WIDTHS", (32, 64, 96))
    patch.setattr(awq, "EACH", (((0,), (0.75,)),))      # quick: only the form is compared
    before = (ROOT / "README.md").read_text()
    evaluation.main([*small, "--readme", str(ROOT / "README.md"), "--check"])
    patch.undo()
    assert (ROOT / "README.md").read_text() == before
    return kept[0]


def test_readme_has_the_form_of_what_its_command_writes(readme_run, tmp_path, monkeypatch, small,
                                                        capsys):
    """The check passed (fixture), and fails when a row, a head, a block or a picture is gone."""
    monkeypatch.setattr(evaluation, "readme_blocks", lambda bench: readme_run)
    readme = (ROOT / "README.md").read_text()
    (tmp_path / "pictures").mkdir()
    for picture in (ROOT / "pictures").iterdir():
        (tmp_path / "pictures" / picture.name).write_text("")
    for old, new, named in [("| GPTQ, act-order |", "| GPTQ, other |", "in baselines:"),
                            ("| by s_X |", "| by X |", "in salience:"),
                            ("<!-- gptq -->", "<!-- gone -->", "no markers <!-- gptq -->")]:
        assert readme.count(old) == 1
        (tmp_path / "README.md").write_text(readme.replace(old, new))
        with pytest.raises(SystemExit):
            evaluation.main([*small, "--readme", str(tmp_path / "README.md"), "--check"])
        assert named in capsys.readouterr().err
    (tmp_path / "README.md").write_text(readme)
    evaluation.main([*small, "--readme", str(tmp_path / "README.md"), "--check"])
    (tmp_path / "pictures" / "bits.svg").unlink()
    with pytest.raises(SystemExit):
        evaluation.main([*small, "--readme", str(tmp_path / "README.md"), "--check"])
    assert "in bits.svg:" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(evaluation.STUDIES))
def test_every_study_gives_a_sentence_and_a_table(readme_run, name):
    block = readme_run[0][name]
    ends = {"memory": "not a percentage", "cost": "the search"}.get(name, "agrees|does not agree")
    assert re.search(rf"({ends})[^|]*\.(\n|$)", block)
    assert ("|---|" in block) == (name != "grid")
    for number in re.findall(r"\d+\.\d+", block):
        assert math.isfinite(float(number))
    assert "nan" not in block.split()


def test_cost_study_reports_the_stages_it_was_given(small, monkeypatch):
    """Every stage in its own column, and the growth that of most samples over fewest."""
    def quantize(model, method, bits, G, tokens, device):
        stages = {"plan": 0.5, "statistics": 0.5 * len(tokens) ** 2, "search": 7.0,
                  "other": 1.0 * len(tokens)}
        return {"stages": stages, "seconds": sum(stages.values())}

    monkeypatch.setattr(evaluation, "quantize", quantize)
    study = evaluation.study_cost(bench_of(small), samples=(2, 8))
    assert [row["samples"] for row in study.rows] == [2, 8] * len(evaluation.WIDTHS)
    for row in study.rows:
        n = row["samples"]
        assert (row["statistics"], row["search"], row["other"]) == (n * n / 2, 7, n)
        assert row["all"] == 7.5 + n + n * n / 2
    for words in ("With 4 times the samples", "statistics take 16.0 / 16.0 / 16.0 times",
                  "search 1.0 / 1.0 / 1.0 times"):
        assert words in study.sentence
    assert study.panels[0]["series"]["hidden size 128"] == ((2, 8), [11.5, 47.5])


def bench_of(small, *arguments):
    return evaluation.open_bench(evaluation.parse_arguments([*small, *arguments]))


def test_studies_agree_with_rtn_where_they_must(small, monkeypatch):
    """Nothing kept, or all times s = 1, is RTN; everything kept is full precision."""
    bench = bench_of(small)
    full, rtn = (evaluation.measure(bench, *key)[0]["ppl"] for key in [("fp",), ("rtn", 3, 32)])
    s_X = evaluation.activation_scores(bench)
    kept = evaluation.rewritten(bench, lambda name, W: evaluation.keep_channels(
        W, s_X[name], 1.0, 3, 32), "all")
    assert kept == pytest.approx(full, rel=1e-6) and abs(full - rtn) > 1e-3 * full
    study = evaluation.study_scale(bench)
    assert study.rows[0]["perplexity"] == pytest.approx(rtn, rel=1e-6)
    assert study.rows[0]["delta changes"] == "0.0%" and study.rows[0]["mean delta'/delta"] == 1
    assert all(1 <= row["mean delta'/delta"] <= float(row["s"]) for row in study.rows)


def test_gptq_has_the_second_pass_of_its_own_code():
    walks = [method.walk for method in evaluation.METHODS.values()
             if "rounding" in (method.walk or {})]
    assert len(walks) == 3 and all(walk["sequential"] for walk in walks)


def test_kept_channels_are_those_of_the_highest_score():
    W, _ = problem()
    score = torch.arange(48.0)
    W_hat = evaluation.keep_channels(W, score, 0.05, 3, 16)
    same = (W_hat == W).all(0)
    assert same.nonzero().flatten().tolist() == [46, 47]
    assert torch.equal(W_hat[:, ~same], awq.fake_quantize(W, 3, 16)[:, ~same])
    assert evaluation.salient_scale(score, 4.0, 0.05).tolist() == [1.0] * 46 + [4.0] * 2


def test_grid_study_shows_the_curves_of_the_reports(small):
    bench = bench_of(small, "--block", "1")
    study = evaluation.study_grid_of_alpha(bench)
    assert len(study.rows) == 21 and len(study.panels) == 4
    for clipped, name in enumerate(("awq-scale", "awq")):
        lines = [line for line in evaluation.measure(bench, name, 3, 32)[1]["groups"]
                 if line["block"] == 1]
        for i, line in enumerate(lines):
            expected = [loss / line["loss_rtn"] for _, c, loss in line["curve"] if c == clipped]
            assert [list(row.values())[1 + 2 * i + clipped] for row in study.rows] == expected


def test_memory_is_what_a_checkpoint_holds(small):
    bench = bench_of(small, "--bits", "4")
    row = next(row for row in evaluation.study_memory(bench).rows
               if (row["bits"], row["group"]) == ("4", "32"))
    measured = evaluation.measure(bench, "rtn", 4, 32)[0]
    assert row["bits/weight"] == pytest.approx(measured["bits_per_weight"])
    assert row["size, MB"] == pytest.approx(measured["bytes"] / 1e6)
    assert row["scales and zeros, bits/weight"] == pytest.approx((16 + 4) / 32)


def test_study_from_the_shell_writes_the_same_rows_as_json(small, tmp_path, capsys):
    evaluation.main([*small, "--study", "methods", "--json", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    out = capsys.readouterr().out
    assert result["study"] == "methods" and result["sentence"] in out
    lines = [line for line in out.splitlines() if line.startswith("| ")][1:]
    assert [float(line.split("|")[2]) for line in lines] == pytest.approx(
        [row["perplexity"] for row in result["rows"]], abs=6e-4)


def test_smoothquant_rows_have_bits_and_groups_of_their_own(small):
    bench = bench_of(small, "--methods", "rtn,smoothquant", "--bits", "4,3",
                     "--group-size", "32,64")
    rows = evaluation.measure_all(bench)
    keys = [(row["method"], row["bits"], row["group_size"]) for row in rows]
    assert keys == [("fp", 16, None), ("rtn", 4, 32), ("smoothquant", 8, -1), ("rtn", 3, 32),
                    ("rtn", 4, 64), ("rtn", 3, 64)]


def test_pictures_are_written_whole_and_repeatable(readme_run, tmp_path):
    pytest.importorskip("matplotlib")
    for name, panels in readme_run[1].items():
        evaluation.draw(tmp_path / name, panels)
        text = (tmp_path / name).read_text()
        assert "<svg" in text and all(panel["title"] in text for panel in panels)
    before, again = (tmp_path / "bits.svg").read_text(), readme_run[1]["bits.svg"]
    evaluation.draw(tmp_path / "bits.svg", again)
    assert (tmp_path / "bits.svg").read_text() == before
    evaluation.draw(tmp_path / "bits.png", again)
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(KeyError):
        evaluation.draw(tmp_path / "broken.svg", [{"title": "no axes"}])
    assert len(list(tmp_path.iterdir())) == 4


def test_plot_without_matplotlib_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for option in (["--plot", str(tmp_path / "x.svg")], ["--readme", str(ROOT / "README.md")]):
        with pytest.raises(SystemExit) as end:
            evaluation.main(option)
        assert end.value.code == 2 and "pip install matplotlib" in capsys.readouterr().err
