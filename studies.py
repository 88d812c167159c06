"""The AWQ paper's tables and the questions people ask, measured; RESULTS.md, written whole.

    python studies.py                               # the usual ones of both models, RESULTS.md
    python studies.py --model smollm2               # of one; the other's come from results/
    python studies.py salience scale --windows 20   # these, printed only (--write: kept as well)

A study measures on eval.py's Bench. Its docstring is its title, what the paper claims, and what a
model shows, as a template of the study's facts. Answers are kept in results/MODEL.json with their
set-up and command; RESULTS.md and pictures/ are drawn from these files, so no figure there is typed
by hand. Most studies look at the first of --bits only. What takes longer than usual (autoround,
calibration with 128 sequences, cost) is run by name, as the command below its table says.
"""
import argparse
import copy
import importlib.util
import json
import re
import shlex
import sys
import time
import zlib
from functools import partial
from itertools import zip_longest
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
TITLES = {name: method.title for name, method in METHODS.items()} | {
    "kept": "1 % in 16 bits", "twice": "1 % times s = 2"}
LARGE, SLOW = 10 ** 8, ("awq-sequential", "awq-tuned")      # of a large model these are left out


class Answer(NamedTuple):
    """What a study found in one model; everything in it can be written as JSON."""

    facts: dict                 # for the text's template, with "bits"; "agrees": with the paper
    tables: list                # each a list of dicts with the same keys, the first one a label
    panels: list = []           # of its picture: see eval.draw


def is_large(bench):
    return bench.setup["parameters"] >= LARGE


def calibrated(bench):
    """The methods with calibration and without rounded activations, for a model of this size."""
    return [name for name, method in METHODS.items()
            if method.walk is not None and not method.activation_bits
            and not (is_large(bench) and name in SLOW)]


def grid_of(bench):
    """(bits, group size) that the studies look at."""
    return bench.args.bits[0], bench.args.group_size[0]


def ppl_of(bench, name, tokens=None):
    """Perplexity of a method on the studies' grid."""
    return measure(bench, name, tokens=tokens)[0]["ppl"]


def of_rtn(bench, ppl):
    """The part of RTN's perplexity increase that a perplexity takes back."""
    full, rtn = ppl_of(bench, "fp"), ppl_of(bench, "rtn")
    return (rtn - ppl) / (rtn - full) if rtn != full else 0.0


# ---- All methods ---------------------------------------------------------------------------------


def study_all(bench):
    """All methods

    The paper: AWQ is ahead of GPTQ, and the two add up. AWQ chooses the grid (s and clipping),
    GPTQ and descent the integers on it, through a C that is shrunk by rounding.shrunk; the row
    "GPTQ" is as in its paper's code. First the perplexity over full precision and the seconds at
    the fewest bits, then KL from full precision, 1000 times. W8A8 has one group a row; of a model
    of 100 M parameters or more not all is measured.

    of what RTN loses at INT{bits} the scale alone takes back {share[awq-scale]:.0%}, clipping
    alone {share[awq-clip]:.0%}, AWQ {share[awq]:.0%}; GPTQ {share[gptq]:.0%}, AWQ then GPTQ
    {share[awq-gptq]:.0%}; most is taken back by {best} ({best_share:.0%})."""
    keys = [("fp", 16)]
    if not is_large(bench):
        keys += [(name, 8) for name in ("rtn", "awq", "w8a8", "smoothquant")]
        keys += [("awq-a8", 4), ("smooth-awq", 4)]
    keys += [(name, bits) for bits in bench.args.bits for name in ("rtn", *calibrated(bench))]
    full, *rows = sorted((measure(bench, name, bits)[0] for name, bits in keys),
                         key=lambda row: (list(METHODS).index(row["method"]), -row["bits"]))
    increases = by_bits("perplexity", rows, lambda row: f"{row['ppl'] - full['ppl']:+.3f}")
    divergences = by_bits("1000 KL", rows, lambda row: f"{1000 * row['kl']:.2f}")
    for row in rows:            # of a method the fewest bits come last: their seconds stay
        increases[row["method"]]["seconds"] = f"{row['seconds']:.1f}"
    label, most_bits, *_ = increases["rtn"]
    top = {**dict.fromkeys(increases["rtn"]), label: "full precision (bits a byte)",
           most_bits: f"{full['ppl']:.3f} ({full['bits_per_byte']:.3f})"}
    shares = {name: of_rtn(bench, ppl_of(bench, name)) for name in calibrated(bench)}
    best = max(shares, key=shares.get)
    pictured = [row for row in rows
                if row["method"] in ("rtn", "awq", "gptq", "awq-gptq", "awq-descent")]
    return Answer({"share": shares, "best": TITLES[best], "best_share": shares[best],
                   "agrees": shares["awq"] > shares["gptq"]},
                  [[top, *increases.values()], list(divergences.values())],
                  [evaluation.bits_panel([full, *pictured])])


def by_bits(label, rows, text):
    """Lines of a table, {method: its title and, under every number of bits, text(row)}."""
    columns = [f"INT{bits}" for bits in sorted({row["bits"] for row in rows}, reverse=True)]
    lines = {}
    for row in rows:
        line = lines.setdefault(row["method"], {label: TITLES[row["method"]],
                                                **dict.fromkeys(columns)})
        line[f"INT{row['bits']}"] = text(row)
    return lines


# ---- Which channels? (Tables 1 to 3 of the paper) ------------------------------------------------


def quantized_layers(bench):
    """(a copy of the model, {name: Linear} of its layers that are to be quantized)."""
    model, skipped = copy.deepcopy(bench.model), measure(bench, "rtn")[1]["skipped"]
    blocks.conv1d_to_linear(model)
    return model, {name: module for name, module in model.named_modules()
                   if isinstance(module, nn.Linear) and name not in skipped}


@torch.no_grad()
def rewritten(bench, rewrite):
    """Perplexity with rewrite(name, W, bits, G) for every weight W [N, K] that is quantized."""
    (bits, group_size), (model, layers) = grid_of(bench), quantized_layers(bench)
    for name, layer in layers.items():
        G = awq.group_length(layer.in_features, bits, group_size)
        layer.weight.copy_(rewrite(name, layer.weight.float(), bits, G))
    return evaluation.perplexity(model, bench.windows)[0]


def activation_scores(bench):
    """{layer: s_X} of every layer that is quantized, in the full-precision model."""
    model, layers = quantized_layers(bench)
    found = evaluation.input_statistics(model, bench.tokens, layers)
    return {name: found[name][0] if name in found else layer.weight.new_zeros(layer.in_features)
            for name, layer in layers.items()}      # 0 of an expert that no token reaches


def top_channels(score, share):
    """Indices of the share of channels with the highest score, at least one."""
    return score.topk(max(1, round(share * len(score)))).indices


def kept_by(bench, share, score):
    """Perplexity with the share of channels with the largest score(name, W) in full precision."""
    def rewrite(name, W, bits, G):
        top = top_channels(score(name, W), share)
        W_hat = awq.Q(W, bits, G)
        W_hat[:, top] = W[:, top]
        return W_hat

    return rewritten(bench, rewrite)


def random_score(name, W, seed):
    """[K] random numbers, the same for a layer and a seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
    return torch.rand(W.shape[1], generator=generator).to(W.device)


def study_salience(bench):
    """Which channels matter? (Table 1)

    The paper: with the 1 % of channels of the largest activations in 16 bits, OPT-6.7B is nearly
    restored (23.54 to 11.39; full precision 10.86); chosen by weight norm or at random it is not
    (22.37, 24.23). That needs channels with far larger inputs than others: the second table.

    at INT{bits} 1 % by s_X takes back {s_X:.0%} of RTN's loss, by weight norm {norm:.0%}, at
    random {chance:.0%}. A layer's largest s_X is {least:.0f} to {most:.0f} times its median (means
    of the kinds of layers)."""
    label, rtn, s_X = "kept in full precision", ppl_of(bench, "rtn"), activation_scores(bench)
    rows = [{label: "nothing (RTN)", "by s_X": rtn, "by weight norm": rtn, "at random": rtn}]
    rows += [{label: f"{share:.1%}", "by s_X": kept_by(bench, share, lambda name, W: s_X[name]),
              "by weight norm": kept_by(bench, share, lambda name, W: W.norm(dim=0)),
              "at random": None} for share in (0.001, 0.01, 0.03)]
    rows[2]["at random"] = sum(kept_by(bench, 0.01, partial(random_score, seed=seed))
                               for seed in range(3)) / 3
    _, *of_one_percent = rows[2].values()
    by_s_X, by_norm, chance = (of_rtn(bench, ppl) for ppl in of_one_percent)
    outliers = outlier_ratios(s_X)
    ratios = [row["mean"] for row in outliers]
    return Answer({"s_X": by_s_X, "norm": by_norm, "chance": chance, "least": min(ratios),
                   "most": max(ratios), "agrees": by_s_X > max(0.5, by_norm, chance)},
                  [rows, outliers])


def outlier_ratios(s_X):
    """Largest s_X of a layer over its median, by kind of layer: mean and extremes over blocks."""
    kinds = {}
    for name, s in s_X.items():
        kind = re.sub(r".*\.\d+\.", "", name)
        kinds.setdefault(kind, []).append((s.max() / s.median().clamp(min=1e-30)).item())
    return [{"largest s_X over median": kind, "least": min(ratios),
             "mean": sum(ratios) / len(ratios), "most": max(ratios)}
            for kind, ratios in kinds.items()]


def twice(bench, s_X, factor):
    """(perplexity, changes of delta) with the 1 % of channels with the largest s_X times factor."""
    ratios = []

    def rewrite(name, W, bits, G):
        s = torch.ones_like(s_X[name]).index_fill(0, top_channels(s_X[name], 0.01), factor)
        before, after = (awq.grid(*awq.group_range(V, G), bits)[0] for V in (W, W * s))
        touched = (s.view(-1, G) != 1).any(1)
        ratios.append((after / before)[:, touched].flatten())
        return awq.Q(W * s, bits, G) / s

    ppl, ratio = rewritten(bench, rewrite), torch.cat(ratios)
    return ppl, ratio[ratio.isfinite()]


def study_scale(bench):
    """Scaling the 1 % instead of keeping it (Table 2)

    The paper: times s > 1 the salient channels' error falls, until delta grows and the others'
    errors with it; s = 2 is best (OPT-6.7B: 23.54 to 11.92), s = 4 worse (12.36).

    at INT{bits} s = {best} is best ({rtn:.3f} to {ppl:.3f}); s = 4 gives {four:.3f} and changes
    {changes} of the steps of groups with such a channel."""
    s_X = activation_scores(bench)
    rows = [{"s": "1 (RTN)", "perplexity": ppl_of(bench, "rtn"), "delta changes": "0.0%",
             "mean delta'/delta": 1.0, "mean delta'/(delta s)": 1.0}]
    for factor in (1.25, 1.5, 2.0, 4.0):
        ppl, ratio = twice(bench, s_X, factor)
        mean = ratio.mean().item()
        rows.append({"s": f"{factor:g}", "perplexity": ppl,
                     "delta changes": f"{(ratio != 1).float().mean():.1%}",
                     "mean delta'/delta": mean, "mean delta'/(delta s)": mean / factor})
    best = min(rows, key=lambda row: row["perplexity"])
    return Answer({"best": best["s"], "rtn": rows[0]["perplexity"], "ppl": best["perplexity"],
                   "four": rows[-1]["perplexity"], "changes": rows[-1]["delta changes"],
                   "agrees": best not in (rows[0], rows[-1])}, [rows])


def study_methods(bench):
    """Keeping, scaling, searching (Table 3)

    The paper: AWQ, with no channel in 16 bits, is as good as keeping 1 % there (OPT-6.7B: both
    11.39), better than s = 2 (11.92) and far better than RTN (23.54).

    perplexity over full precision at INT{bits}: RTN {cost[rtn]:+.3f}, 1 % in 16 bits
    {cost[kept]:+.3f}, 1 % times 2 {cost[twice]:+.3f}, AWQ {cost[awq]:+.3f}, its scale alone
    {cost[awq-scale]:+.3f}."""
    s_X, full = activation_scores(bench), ppl_of(bench, "fp")
    ppl = {"rtn": ppl_of(bench, "rtn"), "kept": kept_by(bench, 0.01, lambda name, W: s_X[name]),
           "twice": twice(bench, s_X, 2.0)[0], "awq-scale": ppl_of(bench, "awq-scale"),
           "awq": ppl_of(bench, "awq")}
    cost = {name: ppl[name] - full for name in ppl}
    paper = {name: evaluation.published(bench.setup, name, *grid_of(bench)) for name in ppl}
    rows = [{"method": TITLES[name], "perplexity": ppl[name], "difference": f"{cost[name]:+.3f}",
             **({"paper": paper[name]} if any(paper.values()) else {})} for name in ppl]
    return Answer({"cost": cost, "agrees": cost["awq"] <= min(cost.values())}, [rows])


# ---- The search (Eq. 5), and finer ones ----------------------------------------------------------


def study_grid(bench):
    """The loss over alpha (Eq. 5)

    The paper: the best alpha lies inside (0, 1). In the picture the scale alone is RTN at
    alpha = 0; the chosen point lies below its curve because there each end of a range is clipped
    on its own.

    in block {block} at INT{bits} the best alpha without clipping lies inside in {inside} of {of}
    groups."""
    def curve(line):
        return ([alpha for alpha, _, _ in line["curve"]],
                [loss / line["loss_rtn"] for _, _, loss in line["curve"]])

    scales, clips = (measure(bench, name)[1]["groups"] for name in ("awq-scale", "awq"))
    block, rows, panels = max(line["block"] for line in scales) // 2, [], []
    pairs = [(scale, clip) for scale, clip in zip(scales, clips)
             if scale["block"] == block and scale["loss_rtn"]]
    for scale, clip in pairs:
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
    inside = sum(0 < scale["alpha"] < 1 for scale, _ in pairs)
    panels.append(saliency_panel(bench, [scale["layers"][0] for scale, _ in pairs], block))
    return Answer({"block": block, "inside": inside, "of": len(rows),
                   "agrees": 2 * inside > len(rows)}, [rows], panels)


def saliency_panel(bench, names, block):
    """Sorted s_X of layers of a block; of experts that are one tensor it is not known."""
    series, s_X = {}, activation_scores(bench)
    for name in names:
        if name in s_X:
            s = s_X[name].sort(descending=True).values / s_X[name].mean()
            percent = [100 * (i + 0.5) / len(s) for i in range(len(s))]
            series[name.rpartition(".")[2]] = percent, s.tolist()
    return {"title": f"block {block}: sorted s_X", "x": "channels, %", "y": "s_X / its mean",
            "log": "xy", "vline": (1.0, "1 %"), "series": series}


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
    """awq.search_scale, its s refined where that lowers the loss."""
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


def patched(bench, name, function):
    """What measure gives for AWQ, anew, with another function in the place of awq.`name`."""
    with patch.object(awq, name, function), patch.dict(bench.known, clear=True):
        return measure(bench, "awq")


def table_of_searches(label, found):
    """Rows of {title: what measure gives}."""
    return [{label: title, "loss / RTN's": awq.loss_ratio(report["groups"]),
             "perplexity": row["ppl"], "1000 KL": f"{1000 * row['kl']:.2f}",
             "seconds": f"{row['seconds']:.1f}"} for title, (row, report) in found.items()]


def study_refinements(bench):
    """Is one alpha enough?

    Summaries of AWQ give a factor in [0.5, 1.5] a channel as its search, or gradient descent;
    the paper searches alpha only. Both start from its answer, where channels are free (not behind
    shared heads), and are kept where the loss falls.

    perplexity over full precision at INT{bits}: alpha alone {grid:+.3f} in {seconds[0]} s, gradient
    {gradient:+.3f} in {seconds[1]} s, factors {factors:+.3f} in {seconds[2]} s."""
    searches = {"grid of alpha (Eq. 5): AWQ": awq.search_scale,
                "gradient on log s": refined_search(by_gradient),
                "a factor in [0.5, 1.5] a channel": refined_search(by_factors)}
    rows = table_of_searches("search of s", {
        title: patched(bench, "search_scale", search) for title, search in searches.items()})
    cost = [row["perplexity"] - ppl_of(bench, "fp") for row in rows]
    return Answer({"grid": cost[0], "gradient": cost[1], "factors": cost[2],
                   "seconds": [row["seconds"] for row in rows]}, [rows])


# ---- What the search should minimize -------------------------------------------------------------


def choosing_by_block(search_scale=awq.search_scale, quantize_block=awq.quantize_block, batches=4):
    """A quantize_block that takes AWQ's s or s = 1, both with clipping: what changes the block's
    output less on a few micro-batches, all other groups in full precision."""
    def chosen(work, groups, calls, hidden, how, clock):
        pairs = list(zip(calls, hidden))[:batches]
        outputs = [blocks.replay(work.block, *pair) for pair in pairs]

        def error(weights, choice, how):
            before = [W.clone() for W in weights]       # the weights are the block's own
            for W, keep in zip(weights, choice.keeps):
                G = awq.group_length(W.shape[1], how.bits, how.group_size)
                W.copy_(awq.Q(W * choice.s, how.bits, G, keep) / choice.s)
            total = sum((blocks.replay(work.block, *pair) - y).square().sum().item()
                        for pair, y in zip(pairs, outputs))
            for W, own in zip(weights, before):
                W.copy_(own)
            return total

        def search(weights, C, s_X, how):
            best, rtn, curve = search_scale(weights, C, s_X, how)
            if how.scale:
                unscaled = search_scale(weights, C, s_X, how._replace(scale=False))[0]
                best = min(best, unscaled, key=lambda choice: error(weights, choice, how))
            return best, rtn, curve

        with patch.object(awq, "search_scale", search):
            return quantize_block(work, groups, calls, hidden, how, clock)

    return chosen


def study_criterion(bench):
    """What is the scale worth where clipping is fine?

    The paper minimizes what a module's output changes (Eq. 4; here a Linear's). The last row
    takes s or s = 1, whichever changes the output of the whole block less. Perplexity over full
    precision is also lower where predictions are only less sure; KL is not.

    at INT{bits} KL is {clip[kl]} thousandths with clipping alone, {scale[kl]} with the scale alone,
    {awq[kl]} with both and {block[kl]} by the block's output; perplexity {clip[ppl]}, {scale[ppl]},
    {awq[ppl]} and {block[ppl]}."""
    found = {TITLES[name]: measure(bench, name) for name in ("awq-scale", "awq-clip", "awq")}
    found["AWQ, chosen by the block"] = patched(bench, "quantize_block", choosing_by_block())
    rows = table_of_searches("criterion", found)
    for row in rows:
        row["perplexity"] = f"{row['perplexity'] - ppl_of(bench, 'fp'):+.3f}"
    return Answer({name: {"ppl": row["perplexity"], "kl": row["1000 KL"]}
                   for name, row in zip(("scale", "clip", "awq", "block"), rows)}, [rows])


# ---- AutoRound on the same tokens ----------------------------------------------------------------


def autoround(bench, bits, iterations):
    """What measure gives, as far as it is used, of AutoRound (pip install auto-round==0.16.1)."""
    from auto_round import AutoRound
    model, tokens = copy.deepcopy(bench.model).cpu(), bench.tokens
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    found = AutoRound(
        model, bench.tokenizer, scheme="W4A16", bits=bits, group_size=grid_of(bench)[1], sym=False,
        iters=iterations, dataset=torch.utils.data.DataLoader(data, batch_size=8),
        nsamples=len(tokens), seqlen=tokens.shape[1], device_map="cpu", enable_torch_compile=False)
    start = time.process_time()
    found.quantize()            # the model's weights are the rounded ones then, densely
    cpu = time.process_time() - start
    ppl, divergence = evaluation.perplexity(model.to(bench.model.device), bench.windows, bench.full)
    return {"ppl": ppl, "kl": divergence}, {"cpu": cpu}


def study_autoround(bench):
    """Beside AutoRound

    SignRound (arXiv 2309.05516) tunes roundings and ranges of a block by sign gradient, from
    plain rounding; AutoRound 0.16.1 is its authors' program: 200 iterations, light 50. Perplexity
    over full precision, 1000 KL and CPU seconds, on the same tokens.

    at INT{bits} AWQ then descent loses {descent}, AutoRound's light recipe {light}; least is lost
    by {best}."""
    lines, full, names = {}, ppl_of(bench, "fp"), ["awq-descent", "awq-tuned"]
    if not is_large(bench):
        names = ["awq", "awq-gptq", *names]
    for bits in bench.args.bits:
        found = {TITLES[name]: measure(bench, name, bits) for name in names}
        found["AutoRound, light"] = autoround(bench, bits, 50)
        if not is_large(bench):
            found["AutoRound"] = autoround(bench, bits, 200)
        for title, (row, report) in found.items():
            lines.setdefault(title, {"method": title}).update({
                f"INT{bits}": f"{row['ppl'] - full:+.3f}",
                f"INT{bits}, 1000 KL": f"{1000 * row['kl']:.2f}",
                f"INT{bits}, CPU s": f"{report['cpu']:.0f}"})
    first = {title: line[f"INT{bench.args.bits[0]}"] for title, line in lines.items()}
    return Answer({"light": first["AutoRound, light"],
                   "best": min(first, key=lambda title: float(first[title])),
                   "descent": first[TITLES["awq-descent"]]}, [list(lines.values())])


# ---- Calibration, time ---------------------------------------------------------------------------


def other_documents(calib):
    """(name, calibration text) from another source than calib."""
    if calib == "pydoc":
        from tinylm.corpus import stdlib_documents
        return "the library's source code", stdlib_documents("train", source=True)
    other = "pileval" if calib == "wikitext" else "pydoc"
    return other, other


def study_calibration(bench):
    """How much calibration text, and which?

    The paper: AWQ overfits its calibration text less than GPTQ: another source costs it 0.5 to
    0.6 perplexity, GPTQ 2.3 to 4.9 (OPT-6.7B), and it needs a tenth of the sequences.

    at INT{bits} {source} instead of {calib} costs AWQ {moved[awq]:+.3f} perplexity, GPTQ
    {moved[gptq]:+.3f}, descent {moved[awq-descent]:+.3f}; 1 instead of {most} sequences
    {few[awq]:+.3f}, {few[gptq]:+.3f} and {few[awq-descent]:+.3f}. Within 5 % of RTN's loss of what
    {most} give are {enough[awq]}, {enough[gptq]} and {enough[awq-descent]}."""
    names = [name for name in ("awq", "gptq", "awq-descent", "awq-tuned")
             if name in calibrated(bench)]
    counts = sorted({min(n, len(bench.tokens)) for n in (1, 4, 16, 64, 128)})
    source, documents = other_documents(bench.args.calib)
    other = awq.calibration_tokens(documents, bench.tokenizer, counts[-1], bench.tokens.shape[1],
                                   bench.args.seed)
    trials = {f"{n} sequences": bench.tokens[:n] for n in counts}
    trials[f"{counts[-1]} of another source"] = other
    found = [{name: ppl_of(bench, name, tokens) for name in names} for tokens in trials.values()]
    rows = [{"calibration": label, **{TITLES[name]: ppl for name, ppl in line.items()}}
            for label, line in zip(trials, found)]
    one, most, elsewhere = found[0], found[-2], found[-1]
    few = {name: one[name] - most[name] for name in names}
    moved = {name: elsewhere[name] - most[name] for name in names}
    enough = {name: next(n for n, line in zip(counts, found)
                         if of_rtn(bench, line[name]) > of_rtn(bench, most[name]) - 0.05)
              for name in names}
    return Answer({"source": source, "calib": bench.args.calib, "most": counts[-1], "few": few,
                   "moved": moved, "enough": enough, "agrees":
                   few["awq"] < few["gptq"] and moved["awq"] < moved["gptq"]}, [rows])


def study_cost(bench):
    """Seconds and memory

    The paper: a search without regression or back-propagation, which summaries turn into
    "faster than GPTQ"; it gives no seconds. The peak is that of the process, which keeps the
    full-precision model beside the copy that is quantized.

    at INT{bits} AWQ takes {seconds:.0f} s, with {times:.0f} times fewer sequences {few:.0f} s: the
    statistics take {statistics:.1f} times as long with all, the search {search:.1f} times."""
    few = bench.tokens[:max(1, len(bench.tokens) // 16)]
    names = ["awq"] if is_large(bench) else calibrated(bench)
    trials = [*((name, bench.tokens) for name in names), ("awq", few)]
    reports = [measure(bench, name, tokens=tokens)[1] for name, tokens in trials]
    rows = [{"method": f"{TITLES[name]}, {len(tokens)} sequences",
             **{stage: f"{report['stages'].get(stage, 0):.1f}"
                for stage in ("plan", "statistics", "search")},
             "all": f"{report['seconds']:.1f}",
             "peak, MB": f"{report['peak'] / 1e6:.0f}" if report["peak"] else None}
            for (name, tokens), report in zip(trials, reports)]
    first, last = reports[0], reports[-1]           # AWQ with all sequences and with few
    facts = {"times": len(bench.tokens) / len(few), "seconds": first["seconds"],
             "few": last["seconds"], **{stage: first["stages"][stage] / last["stages"][stage]
                                        for stage in ("statistics", "search")}}
    if "gptq" in names:
        facts["agrees"] = first["seconds"] < reports[names.index("gptq")]["seconds"]
    return Answer(facts, [rows])


# ---- RESULTS.md, from results/*.json -------------------------------------------------------------

STUDIES = {"all": study_all, "salience": study_salience, "scale": study_scale,
           "methods": study_methods, "grid": study_grid, "refinements": study_refinements,
           "criterion": study_criterion, "autoround": study_autoround,
           "calibration": study_calibration, "cost": study_cost}
PICTURES = {"all": "bits", "grid": "alpha"}     # what they are called, before the model's name


def texts(name):
    """(title, what is claimed, template of what a model shows): the docstring of a study."""
    return [" ".join(part.split()) for part in STUDIES[name].__doc__.split("\n\n")]


def sentence(name, model, facts):
    """What the model shows, and whether that agrees with the paper."""
    agrees = {True: " It agrees.", False: " It does not agree.", None: ""}[facts.get("agrees")]
    return f"{model}: {texts(name)[2].format(**facts)}{agrees}"


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
    title, claim, _ = texts(name)
    lines = [f"## {title}", "", claim, ""]
    lines += [f"- {sentence(name, model, record['facts'])}" for model, record in kept.items()]
    for tables in zip(*(record["tables"] for record in kept.values())):
        lines += ["", markdown(side_by_side(dict(zip(kept, tables))))]
    if name in PICTURES:
        lines += [""] + [f"![{title}: {model}](pictures/{PICTURES[name]}-{model}.svg)"
                         for model in kept]
    commands = [f"`{record['command']}` ({record['seconds']:.0f} s)" for record in kept.values()]
    return "\n".join([*lines, "", "Made by " + ", ".join(commands) + ".", ""])


def published_table():
    """What the paper measured."""
    columns = [f"{TITLES[name]} INT{bits}" if bits < 16 else TITLES[name]
               for name, bits in evaluation.PAPER_COLUMNS]
    return markdown([{"model": name, **{column: ppl and f"{ppl:.2f}"
                                        for column, ppl in zip_longest(columns, row)}}
                     for name, row in PUBLISHED.items()])


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
             "file whole from results/*.json. The command below a table prints it again, and with "
             "--write keeps it here. The protocol is in the docstring of eval.py; a perplexity is "
             "per token of a model's own vocabulary, bits a byte compare.\n",
             "\n".join(setups), f"\n{minutes:.0f} minutes in all.\n"]
    for name in STUDIES:
        kept = {model: records[name] for model, records in results.items() if name in records}
        if kept:
            parts.append(section(name, kept))
    if architectures:
        parts.append(architectures_section(architectures))
    parts.append("## Published numbers\n\nWikiText-2, windows of 2048, groups of 128, from the "
                 "paper (arXiv 2306.00978 in a version that has Llama-2, Tables 3 and 4). `python "
                 "eval.py --model ...` on one of these models prints them beside its own. A "
                 "circulating summary gives \"RTN 73.2, GPTQ 68.4, AWQ 68.1\" for LLaMA-7B: that "
                 f"matches no published table.\n\n{published_table()}\n")
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
    for name, picture in PICTURES.items():
        for model, records in results.items():
            if name in records:
                evaluation.draw(root / "pictures" / f"{picture}-{model}.svg",
                                records[name]["panels"])


# ---- Command line --------------------------------------------------------------------------------


def parse(argv, model=None):
    """(the parser, the options): eval.py's, with what a run of the model may cost as defaults."""
    parser = evaluation.make_parser(__doc__.split("\n")[0], bits="3,4,2")
    parser.set_defaults(model=model, **MODELS.get(model, {}))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"among {', '.join(STUDIES)}")
    parser.add_argument("--write", action="store_true", help="keep the studies named in results/")
    return parser, parser.parse_args(argv)


def command(name, model, argv):
    """What makes a study's record again: the options that argv gives."""
    parser, args = parse(argv)
    blank = argparse.Namespace(**dict.fromkeys(vars(args)))     # what is not given stays None
    words = ["python", "studies.py", name, "--model", model]
    for option, value in vars(parser.parse_args(argv, blank)).items():
        if value is not None and option not in ("names", "write", "model"):
            items = value if isinstance(value, list) else [value]
            words += [f"--{option.replace('_', '-')}", ",".join(map(str, items))]
    return shlex.join(words)


def usual_studies(model):
    """All but autoround, which needs another package, and what takes hours."""
    return [name for name in STUDIES if name != "autoround"
            and (name, model) != ("refinements", "smollm2")]


def run_study(name, bench, argv):
    """The record of a study that RESULTS.md and --json hold; it is printed too."""
    start, model = time.time(), bench.setup["model"]
    answer = STUDIES[name](bench)
    facts = {"bits": grid_of(bench)[0], **answer.facts}
    print(f"\n{texts(name)[1]}\n{sentence(name, model, facts)}")
    for rows in answer.tables:
        print(f"\n{markdown(rows)}", flush=True)
    return {"setup": bench.setup, "command": command(name, model, argv),
            "seconds": time.time() - start, "facts": facts, "tables": answer.tables,
            "panels": answer.panels}


def run_model(model, argv, root):
    """{study: record} of a model; kept in root/results where that is asked for."""
    args = evaluation.set_defaults(parse(argv, model)[1])
    bench = evaluation.open_bench(args)
    print(describe(bench.setup), flush=True)
    file, records = root / "results" / f"{model}.json", {}
    keeps = model in MODELS and (args.write or not args.names)
    for name in args.names or usual_studies(model):
        records[name] = run_study(name, bench, argv)
        if keeps:
            file.parent.mkdir(exist_ok=True)
            kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            evaluation.write_json(file, {**kept, name: records[name]})
    if keeps:
        write_results(root)
    return records


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
        results = {model: run_model(model, argv, root) for model in models}
        if args.json:
            evaluation.write_json(args.json, results)
        if args.plot:
            evaluation.draw(args.plot, [panel for records in results.values()
                                        for record in records.values()
                                        for panel in record["panels"]])
    except (ValueError, OSError, ImportError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
