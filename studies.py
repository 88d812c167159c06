"""The AWQ paper's tables and the questions people ask, measured; RESULTS.md, written whole.

    python studies.py                               # all studies of tinylm and SmolLM2, RESULTS.md
    python studies.py --model smollm2               # of one; the other's come from results/
    python studies.py salience scale --windows 20   # these, printed only (--write: kept as well)

A study measures on eval.py's Bench; its docstring is what the paper claims, STUDIES has what a
model shows, as a template of the study's facts. Answers are kept in results/MODEL.json with their
set-up and command; RESULTS.md and pictures/ are drawn from these files, so no figure there is typed
by hand. The studies look at the first of --bits.
"""
import copy
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import zlib
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import nn

import awq
import blocks
import eval as evaluation
from eval import METHODS, PUBLISHED, describe, markdown, measure

MODELS = {  # what a run of each may cost: its test windows and calibration sequences
    "tinylm": {"windows": 40, "samples": 32},
    "smollm2": {"windows": 3, "samples": 8}}
CALIBRATED = [name for name, method in METHODS.items()      # that leave activations alone
              if method.walk is not None and not method.activation_bits]
LARGE, SLOW = 10 ** 8, ("awq-sequential", "awq-tuned")      # of a large model these are left out


class Answer(NamedTuple):
    """What a study found in one model; everything in it can be written as JSON."""

    facts: dict                 # numbers for the text's template; "agrees": with the paper
    tables: list                # each a list of dicts with the same keys, the first one a label
    panels: list = []           # of its picture: see eval.draw


def of_rtn(bench, ppl):
    """The part of RTN's perplexity increase that a perplexity takes back."""
    full, rtn = ppl_of(bench, "fp"), ppl_of(bench, "rtn")
    return (rtn - ppl) / (rtn - full) if rtn != full else 0.0


def calibrated(bench):
    """The methods of CALIBRATED that are measured of a model of this size."""
    large = bench.setup["parameters"] >= LARGE
    return [name for name in CALIBRATED if not large or name not in SLOW]


def grid_of(bench):
    """(bits, group size) that the studies look at."""
    return bench.args.bits[0], bench.args.group_size[0]


def ppl_of(bench, name, tokens=None):
    """Perplexity of a method on the studies' grid."""
    return measure(bench, name, *grid_of(bench), tokens)[0]["ppl"]


# ---- All methods ---------------------------------------------------------------------------------


def study_all(bench):
    """The paper: AWQ is ahead of GPTQ, and the two add up. AWQ chooses the grid (s and clipping),
    GPTQ and descent the integers on it, through a C that is shrunk by rounding.shrunk; the row
    "GPTQ" is as in its paper's code. First the perplexity over full precision and the seconds at
    the fewest bits, then KL from full precision, 1000 times. W8A8 has one group a row; of a model
    of 100 M parameters or more not all is measured."""
    keys = [("fp", 16)]
    if bench.setup["parameters"] < LARGE:
        keys += [(name, 8) for name in ("rtn", "awq", "w8a8", "smoothquant")]
        keys += [("awq-a8", 4), ("smooth-awq", 4)]
    keys += [(name, bits) for bits in bench.args.bits for name in ("rtn", *calibrated(bench))]
    rows = [measure(bench, name, bits, grid_of(bench)[1])[0] for name, bits in keys]
    full, columns = rows[0], [f"INT{n}" for n in sorted({row["bits"] for row in rows[1:]})[::-1]]
    shares = {name: of_rtn(bench, ppl_of(bench, name)) for name in calibrated(bench)}
    best = max(shares, key=shares.get)
    pictured = [row for row in rows if row["method"] in ("fp", "rtn", "awq", "gptq", "awq-gptq",
                                                         "awq-descent")]
    facts = {"bits": bench.args.bits[0], "share": shares, "best": METHODS[best].title,
             "best_share": shares[best], "agrees": shares["awq"] > shares["gptq"]}
    lines = by_method(rows, lambda row: f"{row['ppl'] - full['ppl']:+.3f}")
    for row in sorted(rows[1:], key=lambda row: -row["bits"]):      # the last one stays
        lines[row["method"]]["seconds"] = f"{row['seconds']:.1f}"
    lines["fp"] = {columns[0]: f"{full['ppl']:.3f} ({full['bits_per_byte']:.3f})"}
    divergences = by_method(rows, lambda row: f"{1000 * row['kl']:.2f}")
    return Answer(facts, [
        [{"perplexity": METHODS[name].title if name != "fp" else "full precision (bits a byte)",
          **{key: lines[name].get(key) for key in (*columns, "seconds")}}
         for name in METHODS if name in lines],
        [{"1000 KL": METHODS[name].title, **{key: divergences[name].get(key) for key in columns}}
         for name in METHODS if name in divergences]], [evaluation.bits_panel(pictured)])


def by_method(rows, text):
    """{method: {"INT4": text(row), ...}} of the quantized rows."""
    lines = {}
    for row in rows[1:]:
        lines.setdefault(row["method"], {})[f"INT{row['bits']}"] = text(row)
    return lines


# ---- Which channels? (Tables 1 to 3 of the paper) ------------------------------------------------


def quantized_layers(bench, model):
    """{name: Linear} of the layers of a full-precision model that are quantized."""
    skipped = measure(bench, "rtn", *grid_of(bench))[1]["skipped"]
    blocks.conv1d_to_linear(model)
    return {name: module for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name not in skipped}


@torch.no_grad()
def rewritten(bench, what, rewrite):
    """Perplexity with rewrite(name, W) in place of every weight W [N, K] that is quantized."""
    if what not in bench.known:
        model = copy.deepcopy(bench.model)
        for name, layer in quantized_layers(bench, model).items():
            layer.weight.copy_(rewrite(name, layer.weight.float()))
        bench.known[what] = evaluation.perplexity(model, bench.windows)[0]
        print(f"{what}: {bench.known[what]:.3f}", file=sys.stderr)
    return bench.known[what]


def activation_scores(bench):
    """{layer: s_X} of every layer that is quantized, in the full-precision model."""
    if "s_X" not in bench.known:
        model = copy.deepcopy(bench.model)
        layers = quantized_layers(bench, model)
        found = evaluation.input_statistics(model, bench.tokens, layers)
        bench.known["s_X"] = {      # of an expert that no token reaches: 0
            name: found[name][0] if name in found else layer.weight.new_zeros(layer.in_features)
            for name, layer in layers.items()}
    return bench.known["s_X"]


def top_channels(score, share):
    """Indices of the share of channels with the highest score, at least one."""
    return score.topk(max(1, round(share * len(score)))).indices


def random_score(name, W, seed):
    """[K] random numbers, the same for a layer and a seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
    return torch.rand(W.shape[1], generator=generator).to(W.device)


def kept_by(bench, what, share, score):
    """Perplexity with the share of channels with the largest score(name, W) in full precision."""
    bits, G = grid_of(bench)

    def rewrite(name, W):
        top = top_channels(score(name, W), share)
        W_hat = awq.Q(W, bits, awq.group_length(W.shape[1], bits, G))
        W_hat[:, top] = W[:, top]
        return W_hat

    return rewritten(bench, f"{share:.1%} kept by {what}", rewrite)


def study_salience(bench, seeds=3):
    """The paper: with the 1 % of channels of the largest activations in 16 bits, OPT-6.7B is nearly
    restored (23.54 to 11.39; full precision 10.86); chosen by weight norm or at random it is not
    (22.37, 24.23). That needs channels with far larger inputs than others: the second table."""
    s_X, rtn = activation_scores(bench), ppl_of(bench, "rtn")
    chance = sum(kept_by(bench, f"chance, seed {seed}", 0.01, lambda name, W: random_score(
        name, W, seed)) for seed in range(seeds)) / seeds
    rows = [{"kept in full precision": "nothing (RTN)", "by s_X": rtn, "by weight norm": rtn,
             "at random": rtn}]
    rows += [{"kept in full precision": f"{share:.1%}",
              "by s_X": kept_by(bench, "s_X", share, lambda name, W: s_X[name]),
              "by weight norm": kept_by(bench, "norm", share, lambda name, W: W.norm(dim=0)),
              "at random": chance if share == 0.01 else None} for share in (0.001, 0.01, 0.03)]
    facts = {"bits": grid_of(bench)[0], "s_X": of_rtn(bench, rows[2]["by s_X"]),
             "norm": of_rtn(bench, rows[2]["by weight norm"]), "chance": of_rtn(bench, chance)}
    outliers = outlier_ratios(s_X)
    ratios = [row["mean"] for row in outliers]
    return Answer({**facts, "least": min(ratios), "most": max(ratios), "agrees": facts["s_X"] > max(
        0.5, facts["norm"], facts["chance"])}, [rows, outliers])


def outlier_ratios(s_X):
    """Largest s_X of a layer over its median, by kind of layer: mean and extremes over blocks."""
    kinds = {}
    for name, s in s_X.items():
        kind = re.sub(r".*\.\d+\.", "", name)
        kinds.setdefault(kind, []).append((s.max() / s.median().clamp(min=1e-30)).item())
    return [{"largest s_X over median": kind, "least": min(ratios),
             "mean": sum(ratios) / len(ratios), "most": max(ratios)}
            for kind, ratios in kinds.items()]


def twice(bench, factor):
    """(perplexity, changes of delta) with the 1 % of channels with the largest s_X times factor."""
    (bits, G), s_X, ratios = grid_of(bench), activation_scores(bench), []

    def rewrite(name, W):
        s = torch.ones_like(s_X[name]).index_fill(0, top_channels(s_X[name], 0.01), factor)
        length = awq.group_length(W.shape[1], bits, G)
        before, after = (awq.grid(*awq.group_range(V, length), bits)[0] for V in (W, W * s))
        touched = (s.view(-1, length) != 1).any(1)
        ratios.append((after / before)[:, touched].flatten())
        return awq.Q(W * s, bits, length) / s

    ppl = rewritten(bench, f"1 % times s = {factor:g}", rewrite)
    if ratios:                  # else the perplexity was known
        bench.known["delta", factor] = torch.cat(ratios)
    ratio = bench.known["delta", factor]
    return ppl, ratio[ratio.isfinite()]


def study_scale(bench):
    """The paper: times s > 1 the salient channels' error falls, until delta grows and the others'
    errors with it; s = 2 is best (OPT-6.7B: 23.54 to 11.92), s = 4 worse (12.36)."""
    rows = [{"s": "1 (RTN)", "perplexity": ppl_of(bench, "rtn"), "delta changes": "0.0%",
             "mean delta'/delta": 1.0, "mean delta'/(delta s)": 1.0}]
    for factor in (1.25, 1.5, 2.0, 4.0):
        ppl, ratio = twice(bench, factor)
        mean = ratio.mean().item()
        rows.append({"s": f"{factor:g}", "perplexity": ppl,
                     "delta changes": f"{(ratio != 1).float().mean():.1%}",
                     "mean delta'/delta": mean, "mean delta'/(delta s)": mean / factor})
    best = min(rows, key=lambda row: row["perplexity"])
    return Answer({"bits": grid_of(bench)[0], "best": best["s"], "rtn": rows[0]["perplexity"],
                   "ppl": best["perplexity"], "four": rows[-1]["perplexity"],
                   "changes": rows[-1]["delta changes"],
                   "agrees": best not in (rows[0], rows[-1])}, [rows])


def study_methods(bench):
    """The paper: AWQ, with no channel in 16 bits, is as good as keeping 1 % there (OPT-6.7B: both
    11.39), better than s = 2 (11.92) and far better than RTN (23.54)."""
    s_X, full = activation_scores(bench), ppl_of(bench, "fp")
    found = {"rtn": ("RTN", ppl_of(bench, "rtn")),
             "kept": ("1 % in 16 bits", kept_by(bench, "s_X", 0.01, lambda name, W: s_X[name])),
             "twice": ("1 % times s = 2", twice(bench, 2.0)[0]),
             "awq-scale": ("AWQ, scale only", ppl_of(bench, "awq-scale")),
             "awq": ("AWQ", ppl_of(bench, "awq"))}
    paper = {name: evaluation.published(bench.setup, name, *grid_of(bench)) for name in found}
    rows = [{"method": title, "perplexity": ppl, "difference": f"{ppl - full:+.3f}",
             **({"paper": paper[name]} if any(paper.values()) else {})}
            for name, (title, ppl) in found.items()]
    cost = {name: ppl - full for name, (_, ppl) in found.items()}
    return Answer({"bits": grid_of(bench)[0], "cost": cost,
                   "agrees": cost["awq"] <= min(cost.values())}, [rows])


# ---- The search (Eq. 5), and finer ones ----------------------------------------------------------


def study_grid(bench):
    """The paper: the best alpha lies inside (0, 1). In the picture the scale alone is RTN at
    alpha = 0; the chosen point lies below its curve because there each end of a range is clipped
    on its own."""
    def curve(line):
        return ([alpha for alpha, _, _ in line["curve"]],
                [loss / line["loss_rtn"] for _, _, loss in line["curve"]])

    scales, clips = (measure(bench, name, *grid_of(bench))[1]["groups"]
                     for name in ("awq-scale", "awq"))
    block, rows, panels = max(line["block"] for line in scales) // 2, [], []
    for scale, clip in zip(scales, clips):
        if scale["block"] != block or not scale["loss_rtn"]:
            continue
        title = ", ".join(name.rpartition(".")[2] for name in scale["layers"])
        curves = {"scale alone": curve(scale), "with clipping": curve(clip)}
        chosen = clip["loss"] / clip["loss_rtn"]
        rows.append({"layers": title, "alpha, scale alone": f"{scale['alpha']:.2f}",
                     "loss / RTN's": scale["loss"] / scale["loss_rtn"],
                     "at alpha = 1": curves["scale alone"][1][-1],
                     "alpha with clipping": f"{clip['alpha']:.2f}",
                     "loss with clipping / RTN's": chosen})
        panels.append({"title": title, "x": "alpha", "y": "loss / RTN's", "series": curves,
                       "points": [(0.0, 1.0, "RTN"), (clip["alpha"], chosen, "chosen")]})
    inside = sum(0 < float(row["alpha, scale alone"]) < 1 for row in rows)
    return Answer({"bits": grid_of(bench)[0], "block": block, "inside": inside, "of": len(rows),
                   "agrees": 2 * inside > len(rows)}, [rows],
                  [*panels, saliency_panel(activation_scores(bench), block)])


def saliency_panel(s_X, block):
    """Sorted s_X of the layers of a block; of layers that share their input, the first."""
    curves = {}
    for name, s in s_X.items():
        if re.search(r"\d+", name)[0] == str(block):
            curves.setdefault(tuple((s.sort(descending=True).values / s.mean()).tolist()),
                              name.rpartition(".")[2])
    return {"title": f"block {block}: sorted s_X", "x": "channels, %", "y": "s_X / its mean",
            "log": "xy", "vline": (1.0, "1 %"), "series": {
                name: ([100 * (i + 0.5) / len(s) for i in range(len(s))], list(s))
                for s, name in curves.items()}}


def by_factors(weights, C, s, bits, G, factors=(0.5, 0.75, 0.9, 1.1, 1.25, 1.5)):
    """Each channel of s times the factor that most lowers its own group's part of L(s), e C_gg e^T.

    Groups are rounded independently, so channel j of all groups is tried at once.
    """
    C_gg = torch.stack([C[g:g + G, g:g + G] for g in range(0, len(C), G)])       # [K/G, G, G]

    def group_losses(s):
        E = torch.cat([awq.Q(W * s, bits, G) / s - W for W in weights])
        E = E.unflatten(1, (-1, G)).movedim(1, 0)                                  # [K/G, N, G]
        return ((E @ C_gg) * E).sum((1, 2))

    best = group_losses(s)
    for j in range(G):
        for factor in factors:
            trial = s.clone()
            trial[j::G] *= factor
            losses = group_losses(trial)
            s = torch.where((losses < best).repeat_interleave(G), trial, s)
            best = torch.minimum(best, losses)
    return s


@torch.enable_grad()
def by_gradient(weights, C, s, bits, G, steps=80):
    """Adam on log s. Rounding's gradient is 0, so its fractions are held: E = delta(s) c / s."""
    log_s = s.log().requires_grad_()
    optimizer, best = torch.optim.Adam([log_s], lr=0.02), (float("inf"), s)
    for _ in range(steps):
        s, total = log_s.exp(), 0
        for W in weights:
            low, high = awq.group_range(W * s, G)
            delta = ((high - low) / (2 ** bits - 1)).clamp(min=1e-30)[..., None]    # [N, K/G, 1]
            v = (W * s).detach().unflatten(-1, (-1, G)) / delta.detach()
            E = (delta * (v.round() - v)).flatten(-2) / s
            total = total + ((E @ C) * E).sum()
        best = min(best, (total.item(), s.detach()), key=lambda found: found[0])
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return best[1]


def refined_search(refine, search=awq.search_scale):
    """awq.search_scale, its s refined channel by channel where that lowers the loss."""
    def refined(weights, C, s_X, how):
        found, rtn, curve = search(weights, C, s_X, how)
        if not how.scale or len(s_X.unique()) < len(s_X):   # shared by heads: must stay equal
            return found, rtn, curve
        bits, G = how.bits, awq.group_length(len(C), how.bits, how.group_size)
        s = refine(weights, C, found.s, bits, G)
        keeps = [awq.search_clipping(W * s, C / (s[:, None] * s), bits, G, awq.COARSE + awq.FINE,
                                     W.new_ones(2, len(W), len(C) // G)) for W in weights]
        total = sum(awq.loss(W, C, s, bits, G, keep) for W, keep in zip(weights, keeps))
        better = awq.Scaling(total, found.alpha, s, keeps)
        return min(found, better, key=lambda choice: choice.loss), rtn, curve
    return refined


def patched(bench, name, search):
    """(perplexity, KL, report) of AWQ with another function in the place of awq.`name`."""
    with patch.object(awq, name, search):
        model, report = evaluation.quantized(bench, METHODS["awq"], *grid_of(bench), bench.tokens)
    return *evaluation.perplexity(model, bench.windows, bench.full), report


def study_refinements(bench):
    """Summaries of AWQ give a factor in [0.5, 1.5] a channel as its search, or gradient descent;
    the paper searches alpha only. Both start from its answer, where channels are free (not behind
    shared heads), and are kept where the loss falls."""
    rows, full = [], ppl_of(bench, "fp")
    for title, search in (("grid of alpha (Eq. 5): AWQ", awq.search_scale),
                          ("gradient on log s", refined_search(by_gradient)),
                          ("a factor in [0.5, 1.5] a channel", refined_search(by_factors))):
        ppl, divergence, report = patched(bench, "search_scale", search)
        rows.append({"search of s": title, "loss / RTN's": awq.loss_ratio(report["groups"]),
                     "perplexity": ppl, "1000 KL": f"{1000 * divergence:.2f}",
                     "seconds": f"{report['seconds']:.1f}"})
    cost = [row["perplexity"] - full for row in rows]
    return Answer({"bits": grid_of(bench)[0], "grid": cost[0], "gradient": cost[1],
                   "factors": cost[2], "seconds": [row["seconds"] for row in rows]}, [rows])


# ---- What the search should minimize -------------------------------------------------------------


def choosing_by_block(search_scale=awq.search_scale, collect=awq.collect_statistics, batches=4):
    """(collect_statistics, quantize_group) that take AWQ's s or s = 1, both with clipping: what
    changes the block's output less on a few micro-batches, all other groups in full precision."""
    seen = {}

    def collected(block, groups, calls, hidden):
        found = statistics, outputs = collect(block, groups, calls, hidden)
        seen.update(pairs=list(zip(calls, hidden, outputs))[:batches])
        return found

    def error(work, group, choice, how):
        layers = [work.block.get_submodule(name) for name in group.layers]
        weights = [layer.weight.clone() for layer in layers]
        for layer, W, keep in zip(layers, weights, choice.keeps):
            G = awq.group_length(W.shape[1], how.bits, how.group_size)
            layer.weight.copy_(awq.Q(W * choice.s, how.bits, G, keep) / choice.s)
        total = sum((blocks.replay(work.block, call, x) - y).square().sum().item()
                    for call, x, y in seen["pairs"])
        for layer, W in zip(layers, weights):
            layer.weight.copy_(W)
        return total

    def quantize_group(work, group, statistics, how, quantize_group=awq.quantize_group):
        def search(weights, C, s_X, settings):
            best, rtn, curve = search_scale(weights, C, s_X, settings)
            if not settings.scale:
                return best, rtn, curve
            unscaled = search_scale(weights, C, s_X, settings._replace(scale=False))[0]
            return min(best, unscaled, key=lambda choice: error(work, group, choice, settings)
                       ), rtn, curve
        with patch.object(awq, "search_scale", search):
            return quantize_group(work, group, statistics, how)

    return collected, quantize_group


def study_criterion(bench):
    """The paper minimizes what a module's output changes (Eq. 4; here a Linear's). The last row
    takes s or s = 1, whichever changes the output of the whole block less. Perplexity over full
    precision is also lower where predictions are only less sure; KL is not."""
    collected, quantize_group = choosing_by_block()
    with patch.object(awq, "collect_statistics", collected):
        chosen = patched(bench, "quantize_group", quantize_group)
    measured = [(METHODS[name].title, row["ppl"], row["kl"], report) for name in (
        "awq-scale", "awq-clip", "awq") for row, report in [measure(bench, name, *grid_of(bench))]]
    rows = [{"criterion": title, "loss / RTN's": awq.loss_ratio(report["groups"]),
             "perplexity": f"{ppl - ppl_of(bench, 'fp'):+.3f}", "1000 KL": f"{1000 * kl:.2f}",
             "seconds": f"{report['seconds']:.1f}"}
            for title, ppl, kl, report in [*measured, ("AWQ, chosen by the block", *chosen)]]
    return Answer({"bits": grid_of(bench)[0], **{
        name: {key: row[column] for key, column in (("ppl", "perplexity"), ("kl", "1000 KL"))}
        for name, row in zip(("scale", "clip", "awq", "block"), rows)}}, [rows])


# ---- AutoRound on the same tokens ----------------------------------------------------------------

AUTOROUND = """
import sys, time, torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, bits, group_size, iterations, threads = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
tokens = torch.load(folder + "/tokens.pt")
data = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
found = AutoRound(
    model, tokenizer, scheme="W4A16", bits=bits, group_size=group_size, sym=False,
    iters=iterations, dataset=torch.utils.data.DataLoader(data, batch_size=8), nsamples=len(tokens),
    seqlen=tokens.shape[1], device_map="cpu", enable_torch_compile=False)
start = time.process_time()
found.quantize()
torch.save(model.state_dict(), folder + "/dense.pt")
print(time.process_time() - start)
"""


def autoround(bench, bits, iterations):
    """(perplexity, KL, CPU seconds) of what AutoRound makes, its weights written back densely."""
    python = os.environ.get("AUTOROUND_PYTHON")
    if not python:
        raise ValueError("AUTOROUND_PYTHON must be a Python that has auto-round==0.16.1 "
                         "(pip install torch==2.13.0 transformers==5.23.0 auto-round==0.16.1)")
    with tempfile.TemporaryDirectory() as folder:
        bench.model.save_pretrained(folder)
        bench.tokenizer.save_pretrained(folder)
        torch.save(bench.tokens, f"{folder}/tokens.pt")
        sizes = bits, grid_of(bench)[1], iterations, torch.get_num_threads()
        printed = subprocess.run([python, "-c", AUTOROUND, folder, *map(str, sizes)], check=True,
                                 stdout=subprocess.PIPE, text=True).stdout
        model = copy.deepcopy(bench.model)
        model.load_state_dict(torch.load(f"{folder}/dense.pt"))
    return *evaluation.perplexity(model, bench.windows, bench.full), float(printed.split()[-1])


def study_autoround(bench):
    """SignRound (arXiv 2309.05516) tunes roundings and ranges of a block by sign gradient, from
    plain rounding; AutoRound 0.16.1 is its authors' program: 200 iterations, light 50. Perplexity
    over full precision, 1000 KL and CPU seconds, on the same tokens."""
    large, full = bench.setup["parameters"] >= LARGE, ppl_of(bench, "fp")
    lines = {}
    for bits in bench.args.bits:
        found = {METHODS[name].title: (row["ppl"], row["kl"], report.get("cpu")) for name in (
            ("awq", "awq-gptq", "awq-descent", "awq-tuned")[2 * large:])
            for row, report in [measure(bench, name, bits, grid_of(bench)[1])]}
        found["AutoRound, light"] = autoround(bench, bits, 50)
        if not large:
            found["AutoRound"] = autoround(bench, bits, 200)
        for title, (ppl, divergence, cpu) in found.items():
            key = f"INT{bits}"
            lines.setdefault(title, {"method": title}).update({
                key: f"{ppl - full:+.3f}", f"{key}, 1000 KL": f"{1000 * divergence:.2f}",
                f"{key}, CPU s": f"{cpu:.0f}"})
    key, rows = f"INT{bench.args.bits[0]}", list(lines.values())
    return Answer({"bits": bench.args.bits[0], "light": lines["AutoRound, light"][key],
                   "best": min(rows, key=lambda row: float(row[key]))["method"],
                   "descent": lines[METHODS["awq-descent"].title][key]}, [rows])


# ---- Calibration, time ---------------------------------------------------------------------------


def other_documents(calib):
    """(name, calibration text) from another source than calib."""
    if calib == "pydoc":
        from tinylm.corpus import stdlib_documents
        return "the library's source code", stdlib_documents("train", source=True)
    other = "pileval" if calib == "wikitext" else "pydoc"
    return other, other


def study_calibration(bench):
    """The paper: AWQ overfits its calibration text less than GPTQ: another source costs it 0.5 to
    0.6 perplexity, GPTQ 2.3 to 4.9 (OPT-6.7B), and it needs a tenth of the sequences."""
    args = bench.args
    titles = {name: METHODS[name].title for name in ("awq", "gptq", "awq-descent", "awq-tuned")
              if name in calibrated(bench)}
    counts = sorted({min(n, len(bench.tokens)) for n in (1, 4, 16, 64, 128)})
    source, documents = other_documents(args.calib)
    other = awq.calibration_tokens(documents, bench.tokenizer, counts[-1], bench.tokens.shape[1],
                                   args.seed)
    trials = [*((f"{n} sequences", bench.tokens[:n]) for n in counts),
              (f"{counts[-1]} of another source", other)]
    rows = [{"calibration": label, **{title: ppl_of(bench, name, tokens)
                                      for name, title in titles.items()}}
            for label, tokens in trials]
    few = {name: rows[0][title] - rows[-2][title] for name, title in titles.items()}
    moved = {name: rows[-1][title] - rows[-2][title] for name, title in titles.items()}
    enough = {name: next(n for n, row in zip(counts, rows)
                         if of_rtn(bench, row[title]) > of_rtn(bench, rows[-2][title]) - 0.05)
              for name, title in titles.items()}
    return Answer({"bits": grid_of(bench)[0], "source": source, "calib": args.calib,
                   "most": counts[-1], "few": few, "moved": moved, "enough": enough, "agrees":
                   few["awq"] < few["gptq"] and moved["awq"] < moved["gptq"]}, [rows])


def study_cost(bench):
    """The paper: a search without regression or back-propagation, which summaries turn into
    "faster than GPTQ"; it gives no seconds. The peak is that of the process, which keeps the
    full-precision model beside the copy that is quantized."""
    few, rows = max(1, len(bench.tokens) // 16), []
    names = calibrated(bench) if bench.setup["parameters"] < LARGE else ["awq"]
    trials = {f"{METHODS[name].title}, {len(bench.tokens)} sequences": (name, bench.tokens)
              for name in names}
    trials[f"{METHODS['awq'].title}, {few} sequences"] = ("awq", bench.tokens[:few])
    found = {title: measure(bench, name, *grid_of(bench), tokens)[1]
             for title, (name, tokens) in trials.items()}
    for title, report in found.items():
        stages = {stage: f"{report['stages'].get(stage, 0):.1f}"
                  for stage in ("plan", "statistics", "search")}
        rows.append({"method": title, **stages, "all": f"{report['seconds']:.1f}",
                     "peak, MB": f"{report['peak'] / 1e6:.0f}" if report["peak"] else None})
    reports = list(found.values())
    facts = {"bits": grid_of(bench)[0], "times": len(bench.tokens) / few,
             "seconds": reports[0]["seconds"], "few": reports[-1]["seconds"],
             **{stage: reports[0]["stages"][stage] / reports[-1]["stages"][stage]
                for stage in ("statistics", "search")}}
    if "gptq" in names:
        facts["agrees"] = reports[0]["seconds"] < reports[names.index("gptq")]["seconds"]
    return Answer(facts, [rows])


# ---- The texts -----------------------------------------------------------------------------------


class Study(NamedTuple):
    """A section of RESULTS.md."""

    measure: object             # Bench -> Answer; its docstring is what is claimed, and by whom
    title: str
    here: str                   # what a model shows: a template of Answer.facts
    picture: str = ""           # its name without the model's
    models: tuple = tuple(MODELS)


STUDIES = {
    "all": Study(
        study_all, "All methods",
        "of what RTN loses at INT{bits} the scale alone takes back {share[awq-scale]:.0%}, "
        "clipping alone {share[awq-clip]:.0%}, AWQ {share[awq]:.0%}; GPTQ {share[gptq]:.0%}, "
        "AWQ then GPTQ {share[awq-gptq]:.0%}; most is taken back by {best} ({best_share:.0%}).",
        "bits"),
    "salience": Study(
        study_salience, "Which channels matter? (Table 1)",
        "at INT{bits} 1 % by s_X takes back {s_X:.0%} of RTN's loss, by weight norm {norm:.0%}, at "
        "random {chance:.0%}. A layer's largest s_X is {least:.0f} to {most:.0f} times its median "
        "(means of the kinds of layers)."),
    "scale": Study(
        study_scale, "Scaling the 1 % instead of keeping it (Table 2)",
        "at INT{bits} s = {best} is best ({rtn:.3f} to {ppl:.3f}); s = 4 gives {four:.3f} and "
        "changes {changes} of the steps of groups with such a channel."),
    "methods": Study(
        study_methods, "Keeping, scaling, searching (Table 3)",
        "perplexity over full precision at INT{bits}: RTN {cost[rtn]:+.3f}, 1 % in 16 bits "
        "{cost[kept]:+.3f}, 1 % times 2 {cost[twice]:+.3f}, AWQ {cost[awq]:+.3f}, its scale alone "
        "{cost[awq-scale]:+.3f}."),
    "grid": Study(
        study_grid, "The loss over alpha (Eq. 5)",
        "in block {block} at INT{bits} the best alpha without clipping lies inside in {inside} of "
        "{of} groups.", "alpha"),
    "refinements": Study(
        study_refinements, "Is one alpha enough?",
        "perplexity over full precision at INT{bits}: alpha alone {grid:+.3f} in {seconds[0]} s, "
        "gradient {gradient:+.3f} in {seconds[1]} s, factors {factors:+.3f} in {seconds[2]} s.",
        models=("tinylm",)),
    "criterion": Study(
        study_criterion, "What is the scale worth where clipping is fine?",
        "at INT{bits} KL is {clip[kl]} thousandths with clipping alone, {scale[kl]} with the "
        "scale alone, {awq[kl]} with both and {block[kl]} by the block's output; perplexity "
        "{clip[ppl]}, {scale[ppl]}, {awq[ppl]} and {block[ppl]}."),
    "autoround": Study(
        study_autoround, "Beside AutoRound",
        "at INT{bits} AWQ then descent loses {descent}, AutoRound's light recipe {light}; least "
        "is lost by {best}.", models=()),       # it needs an environment of its own
    "calibration": Study(
        study_calibration, "How much calibration text, and which?",
        "at INT{bits} {source} instead of {calib} costs AWQ {moved[awq]:+.3f} perplexity, GPTQ "
        "{moved[gptq]:+.3f}, descent {moved[awq-descent]:+.3f}; 1 instead of {most} sequences "
        "{few[awq]:+.3f}, {few[gptq]:+.3f} and {few[awq-descent]:+.3f}. Within 5 % of RTN's loss "
        "of what {most} give are {enough[awq]}, {enough[gptq]} and {enough[awq-descent]}."),
    "cost": Study(
        study_cost, "Seconds and memory",
        "at INT{bits} AWQ takes {seconds:.0f} s, with {times:.0f} times fewer sequences {few:.0f} "
        "s: the statistics take {statistics:.1f} times as long with all, the search {search:.1f} "
        "times."),
}


def claim(study):
    """What the paper says, in one line."""
    return " ".join(study.measure.__doc__.split())


def sentence(study, model, facts):
    """What the model shows, and whether that agrees with the paper."""
    agrees = {True: " It agrees.", False: " It does not agree.", None: ""}[facts.get("agrees")]
    return f"{model}: {study.here.format(**facts)}{agrees}"


# ---- RESULTS.md, from results/*.json -------------------------------------------------------------


def side_by_side(tables):
    """One table of the {model: rows}, joined by the first column."""
    lines, columns = {}, {}
    for model, rows in tables.items():
        label, *keys = rows[0]
        titles = {key: f"{key}, {model}" if len(tables) > 1 else key for key in keys}
        columns |= dict.fromkeys(titles.values())
        for row in rows:
            lines.setdefault(row[label], {}).update({titles[key]: row[key] for key in keys})
    return [{label: name, **columns, **line} for name, line in lines.items()]


def section(name, kept):
    """A study's part of RESULTS.md; kept: {model: its record}."""
    study = STUDIES[name]
    lines = [f"## {study.title}", "", claim(study), ""]
    lines += [f"- {sentence(study, model, record['facts'])}" for model, record in kept.items()]
    for tables in zip(*(record["tables"] for record in kept.values())):
        lines += ["", markdown(side_by_side(dict(zip(kept, tables))))]
    if study.picture:
        lines += [""] + [f"![{study.title}: {model}](pictures/{study.picture}-{model}.svg)"
                         for model in kept]
    commands = [f"`{record['command']}` ({record['seconds']:.0f} s)" for record in kept.values()]
    return "\n".join([*lines, "", "Made by " + ", ".join(commands) + ".", ""])


def published_table():
    """What the paper measured."""
    titles = {"fp": "full precision", "kept": "1 % in 16 bits", "twice": "1 % times s = 2"}
    columns = [f"{titles.get(name, name.upper())}{f' INT{bits}' if bits < 16 else ''}"
               for name, bits in evaluation.PAPER_COLUMNS]
    return markdown([{"model": name, **dict(zip(columns, [
        ppl and f"{ppl:.2f}" for ppl in (*row, None, None)]))} for name, row in PUBLISHED.items()])


def architectures_section(found):
    """What tests/test_architectures.py made of all model types."""
    return ("## Model types\n\nThe share of the decoder blocks' weights that is packed, and of the "
            "experts that transformers keeps as 3-D parameters, in small random models of every "
            f"causal LM type of transformers {found['transformers']}. {found['summary']}: ok is "
            "that every proven fold leaves the logits as they were, and saving and loading every "
            "bit of them. Made by `python tests/test_architectures.py`, which prints the reasons "
            f"of all that stays.\n\n{markdown(found['rows'])}\n")


def render(results, architectures=None):
    """RESULTS.md of {model: {study: record}} and of what is known of model types."""
    records = [record for records in results.values() for record in records.values()]
    setups = dict.fromkeys(f"- {describe(record['setup'])}" for record in records)
    minutes = sum(record["seconds"] for record in records) / 60
    parts = ["# Results\n\nEverything measured here, by `python studies.py`, which writes this "
             "file whole from results/*.json. The protocol is in the docstring of eval.py; a "
             "perplexity is per token of a model's own vocabulary, bits a byte compare.\n",
             "\n".join(setups), f"\n{minutes:.0f} minutes in all.\n"]
    for name in STUDIES:
        kept = {model: records[name] for model, records in results.items() if name in records}
        if kept:
            parts.append(section(name, kept))
    if architectures:
        parts.append(architectures_section(architectures))
    parts.append("## Published numbers\n\nWikiText-2, windows of 2048, groups of 128, from the "
                 "paper's first version (arXiv 2306.00978v1, Tables 3 and 4). `python eval.py "
                 "--model ...` on one of these models prints them beside its own. A circulating "
                 "summary gives \"RTN 73.2, GPTQ 68.4, AWQ 68.1\" for LLaMA-7B: that matches no "
                 f"published table.\n\n{published_table()}\n")
    return "\n".join(parts)


def read_results(root):
    """What render takes: the files of root/results."""
    found = {file.stem: json.loads(file.read_text(encoding="utf-8"))
             for file in (root / "results").glob("*.json")}
    return {model: found[model] for model in MODELS if model in found}, found.get("architectures")


def write_results(root):
    """RESULTS.md and, where matplotlib is installed, pictures/, from root/results/*.json."""
    results, architectures = read_results(root)
    (root / "RESULTS.md").write_text(render(results, architectures), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: the pictures stay as they are", file=sys.stderr)
        return
    (root / "pictures").mkdir(exist_ok=True)
    for model, records in results.items():
        for name, record in records.items():
            if STUDIES[name].picture:
                evaluation.draw(root / "pictures" / f"{STUDIES[name].picture}-{model}.svg",
                                record["panels"])


# ---- Command line --------------------------------------------------------------------------------


def parse(argv, model=None):
    """(the parser, the options): eval.py's, with what a run of the model may cost as defaults."""
    parser = evaluation.make_parser(__doc__.split("\n")[0], bits="3,4,2")
    parser.set_defaults(model=model, **MODELS.get(model, {}))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"among {', '.join(STUDIES)}")
    parser.add_argument("--write", action="store_true", help="keep the studies named in results/")
    return parser, parser.parse_args(argv)


def run_study(name, bench, options):
    """The record of a study that RESULTS.md and --json hold; it is printed too."""
    start, study, model = time.time(), STUDIES[name], bench.setup["model"]
    answer = study.measure(bench)
    print(f"\n{claim(study)}\n{sentence(study, model, answer.facts)}")
    for rows in answer.tables:
        print(f"\n{markdown(rows)}", flush=True)
    command = shlex.join(["python", "studies.py", name, "--model", model, *options])
    return {"setup": bench.setup, "command": command, "seconds": time.time() - start,
            **answer._asdict()}


def run_model(model, args, argv, root):
    """{study: record} of a model; kept in root/results where that is asked for."""
    bench = evaluation.open_bench(evaluation.set_defaults(parse(argv, model)[1]))
    print(describe(bench.setup), flush=True)
    options = [item for item in argv if item not in (*args.names, "--write", "--model", args.model)]
    keeps, records = model in MODELS and (args.write or not args.names), {}
    for name in args.names or [name for name, study in STUDIES.items()
                               if model in study.models or study.models and model not in MODELS]:
        records[name] = run_study(name, bench, options)
        if keeps:
            keep(root / "results" / f"{model}.json", name, records[name])
    if keeps:
        write_results(root)
    return records


def keep(file, name, record):
    """Replace a study's record in a results file."""
    file.parent.mkdir(exist_ok=True)
    records = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    evaluation.write_json(file, {**records, name: record})


def main(argv=None, root=evaluation.HERE):
    argv = sys.argv[1:] if argv is None else argv
    parser, args = parse(argv)
    models = [args.model] if args.model else ["tinylm"] if args.names else list(MODELS)
    try:
        if args.save:
            raise ValueError("--save is an option of eval.py")
        if not set(args.names) <= set(STUDIES):
            raise ValueError(f"{args.names}: a study is one of {', '.join(STUDIES)}")
        if args.write and models[0] not in MODELS:
            raise ValueError(f"--write keeps results of {', '.join(MODELS)} only")
        results = {model: run_model(model, args, argv, root) for model in models}
        if args.json:
            evaluation.write_json(args.json, results)
        if args.plot:
            evaluation.draw(args.plot, [panel for records in results.values()
                                        for record in records.values()
                                        for panel in record["panels"]])
    except (ValueError, OSError, ImportError, subprocess.CalledProcessError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
