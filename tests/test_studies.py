"""studies.py: every study on a tiny model, what they must agree with, RESULTS.md from results/."""
import importlib.util
import json
import re

import pytest
import torch
from conftest import ROOT, llama
from test_eval import bench_of, small  # noqa: F401

import awq
import eval as evaluation
import studies


@pytest.fixture(scope="module")
def kept(small, tmp_path_factory):      # noqa: F811
    """(folder, records) of all studies, run as tinylm's and smollm2's on a tiny random model.

    smollm2's first, as if matplotlib were not installed: it keeps no pictures.
    """
    root, find = tmp_path_factory.mktemp("results"), importlib.util.find_spec
    load, options = evaluation.load_model, dict(zip(small[::2], small[1::2]))
    rest = [item for key, value in options.items() if key != "--model" for item in (key, value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(awq, "COARSE", [([0, 1], [0.8])])
        patch.setattr(awq, "FINE", [([0], [0.75])])
        patch.setattr(evaluation, "load_model", lambda _, device: load(options["--model"], device))
        patch.setattr(studies, "other_documents", lambda calib: ("more of it", ["a b c d " * 999]))
        with patch.context() as bare:
            bare.setattr(importlib.util, "find_spec",
                         lambda name: None if name == "matplotlib" else find(name))
            studies.main(["methods", "salience", "--write", "--model", "smollm2", *rest], root)
        assert sorted(path.name for path in root.iterdir()) == ["RESULTS.md", "results"]
        studies.main(["--model", "tinylm", "--bits", "3", *rest], root)
    return root, {model: json.loads((root / "results" / f"{model}.json").read_text())
                  for model in studies.MODELS}


def test_every_study_gives_a_sentence_a_table_and_its_command(kept):
    root, records = kept
    assert list(records["tinylm"]) == [name for name in studies.STUDIES if name != "autoround"]
    text = (root / "RESULTS.md").read_text()
    for name, record in records["tinylm"].items():
        title, claim, _ = studies.texts(name)
        said = studies.sentence(name, "tinylm", record["facts"])
        assert f"## {title}\n\n{claim}\n\n- {said}\n" in text
        assert not re.search(r"[{}]|\bnan\b|None", said)
        assert record["command"].startswith(f"python studies.py {name} --model tinylm --data ")
        assert record["command"] in text and record["setup"]["model"] == "tinylm"
        assert all(len(row) == len(rows[0]) for rows in record["tables"] for row in rows)


def test_results_hold_only_numbers_of_the_runs(kept):
    """Rendered whole from results/*.json: changed there, changed in RESULTS.md; no other source."""
    root, records = kept
    before = (root / "RESULTS.md").read_text()
    assert studies.render(records) == before
    row = records["tinylm"]["methods"]["tables"][0][0]
    line = "| RTN | {:.3f} | " + row["difference"]
    assert before.count(line.format(row["perplexity"])) == 1
    changed = json.loads(json.dumps(records))
    changed["tinylm"]["methods"]["tables"][0][0]["perplexity"] = 4711.0
    assert studies.render(changed) == before.replace(line.format(row["perplexity"]),
                                                     line.format(4711.0))


def test_models_stand_side_by_side():
    tables = {"a": [{"n": "x", "v": 1}, {"n": "y", "v": 2}], "b": [{"n": "y", "v": 3}]}
    assert studies.side_by_side(tables) == [{"n": "x", "v, a": 1, "v, b": None},
                                            {"n": "y", "v, a": 2, "v, b": 3}]


def test_pictures_have_the_curves(kept):
    root, records = kept
    *panels, last = records["tinylm"]["grid"]["panels"]
    assert len(panels) == 4 and last["vline"] == [1.0, "1 %"]
    for panel, row in zip(panels, records["tinylm"]["grid"]["tables"][0]):
        assert panel["title"] == row["layers"] and [p[2] for p in panel["points"]] == [
            "RTN", "chosen"]
        alphas, losses = panel["series"]["scale alone"]
        assert len(alphas) == 21 and losses[0] == pytest.approx(1) and min(losses) == min(
            [row["loss / RTN's"], *losses])
    if importlib.util.find_spec("matplotlib"):
        assert "sorted s_X" in (root / "pictures" / "alpha-tinylm.svg").read_text()
        text = (root / "pictures" / "bits-tinylm.svg").read_text()
        assert "full precision: " in text and evaluation.GREY in text   # readable on light and dark
        assert "fill: #000000" not in text and "fill: #ffffff" not in text


def test_studies_agree_with_each_other_where_they_must(kept):
    """RTN, AWQ and what is kept are the same numbers in every study that has them."""
    tables = {name: record["tables"] for name, record in kept[1]["tinylm"].items()}
    methods = {row["method"]: row["perplexity"] for row in tables["methods"][0]}
    kept_rows, scaled = tables["salience"][0], tables["scale"][0]
    assert methods["RTN"] == kept_rows[0]["by s_X"] == scaled[0]["perplexity"]
    assert methods["1 % in 16 bits"] == kept_rows[2]["by s_X"]
    assert methods["1 % times s = 2"] == scaled[3]["perplexity"]
    assert methods["AWQ"] == tables["calibration"][0][-2]["AWQ"] == pytest.approx(
        tables["refinements"][0][0]["perplexity"])
    for row in scaled:
        s = float(row["s"].split()[0])
        assert 1 <= row["mean delta'/delta"] <= s + 1e-3
    losses = [row["loss / RTN's"] for row in tables["refinements"][0]]
    assert min(losses[1:]) < losses[0] and max(losses[1:]) <= losses[0]


def test_everything_kept_is_full_precision_and_nothing_scaled_is_rtn(small):     # noqa: F811
    bench = bench_of(*small)
    full, rtn = (studies.ppl_of(bench, name) for name in ("fp", "rtn"))
    s_X = studies.activation_scores(bench)
    everything = studies.kept_by(bench, 1.0, lambda name, W: s_X[name])
    assert everything == pytest.approx(full, rel=1e-6) and abs(full - rtn) > 1e-3 * full
    assert studies.twice(bench, s_X, 1.0)[0] == pytest.approx(rtn, rel=1e-6)
    assert studies.of_rtn(bench, full) == 1 and studies.of_rtn(bench, rtn) == 0


def test_the_share_of_channels_with_the_highest_score_is_at_least_one():
    assert studies.top_channels(torch.arange(48.0), 0.05).tolist() == [47, 46]
    assert studies.top_channels(-torch.arange(48.0), 0.001).tolist() == [0]


@pytest.mark.parametrize("refine", [studies.by_factors, studies.by_gradient])
def test_refinements_lower_the_loss_of_free_channels_and_leave_shared_ones(refine):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(300, 32, generator=generator) * torch.rand(32, generator=generator) ** 3
    W, how = torch.randn(16, 32, generator=generator), awq.Settings(3, 16)
    C, s_X = X.T @ X / 300, X.abs().mean(0)
    found, rtn, curve = awq.search_scale([W], C, s_X, how)
    better = studies.refined_search(refine)([W], C, s_X, how)
    assert better[0].loss < found.loss and better[1].loss == rtn.loss
    assert better[0].loss == pytest.approx(awq.loss(W, C, better[0].s, 3, 16, better[0].keeps[0]))
    s_X[1] = s_X[0]
    assert torch.equal(studies.refined_search(refine)([W], C, s_X, how)[0].s,
                       awq.search_scale([W], C, s_X, how)[0].s)


@pytest.mark.parametrize("scaled, unscaled", [(1.0, 0.3), (0.3, 1.0)])
def test_choosing_by_the_block_takes_what_changes_its_output_less(scaled, unscaled, monkeypatch):
    """Of two searches the one that keeps the whole range, not 0.3 of it, in all groups."""
    def search(weights, C, s_X, how):
        keeps = [C.new_full((2, len(W), len(C) // 32), scaled if how.scale else unscaled)
                 for W in weights]
        found = awq.Scaling(1.0, float(how.scale), torch.ones_like(s_X), keeps)
        return found, found, []

    monkeypatch.setattr(awq, "quantize_block", studies.choosing_by_block(search))
    report = awq.quantize_model(llama(), torch.randint(0, 96, (4, 24)), 8, 32, progress=False)
    assert {line["alpha"] for line in report["groups"]} == {float(scaled > unscaled)}


def test_the_command_kept_has_the_options_given_and_no_other_study():
    """Also a value that is a study's name, or the model's; of a run of all models its own."""
    argv = ["all", "grid", "--model", "tinylm", "--calib", "all", "--data=tinylm", "--bits", "4,3",
            "--seed", "0", "--group-size", "-1", "--write"]
    said = "--data tinylm --calib all --bits 4,3 --group-size -1 --seed 0"
    command = studies.command("grid", "tinylm", argv)
    assert command == f"python studies.py grid --model tinylm {said}"
    assert studies.command("grid", "tinylm", command.split()[2:]) == command
    assert studies.command("all", "smollm2", []) == "python studies.py all --model smollm2"


@pytest.mark.parametrize("arguments, named", [
    (["magic"], "['magic']: a study is one of all, salience"),
    (["scale", "--model", "gpt2", "--write"], "--write keeps results of tinylm, smollm2 only"),
    (["scale", "--save", "q"], "--save is an option of eval.py"),
    (["grid", "--data", "nothing", "--device", "cpu"], "data is 'nothing'"),
])
def test_bad_options_end_with_one_line_and_code_2(arguments, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        studies.main(arguments, tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and named in lines[-1] and not list(tmp_path.iterdir())
    assert sum(": error: " in line for line in lines) == 1


def test_the_committed_results_are_what_their_runs_say():
    """RESULTS.md of the repository is what results/*.json render to."""
    assert (ROOT / "RESULTS.md").read_text() == studies.render(*studies.read_results(ROOT))
