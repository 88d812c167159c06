"""Perplexity of RTN, AWQ, GPTQ and SmoothQuant, and the AWQ paper's studies, by one protocol.

    python eval.py                                        # offline: tinylm/ on text of the library
    python eval.py --model facebook/opt-125m              # hub model, WikiText-2
    python eval.py --model ./folder --data a.txt --calib b.txt --bits 4,3 --group-size 64
    python eval.py --methods all --bits 8,4,3,2 --plot bits.svg
    python eval.py --study salience                       # or scale, grid, methods, ...
    python eval.py --readme README.md                     # all tables and pictures of the README

Protocol: the documents of the test split joined by blank lines, tokenised once, cut into
non-overlapping windows; negative log-likelihood summed over the predicted tokens (all but the first
of a window) and divided by their number. Calibration text is the train split, never the test split
(a text file has no splits: give two). Corpus, windows, seed and quantiser are the same for every
method. stdout is the set-up and one Markdown table; progress goes to stderr.
"""
import argparse
import json
import math
import os
import platform
import re
import sys
import time
import zlib
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

import awq

HERE = Path(__file__).resolve().parent

# ---- GPTQ: the same Gram matrix, inverted, and weights that move ---------------------------------


def inverse_factor(C, percdamp):
    """U upper triangular with U^T U = (C + damping)^-1; channels that are always 0 count as 1."""
    C = C.double().clone()
    C.diagonal()[C.diagonal() == 0] = 1
    C.diagonal().add_(percdamp * C.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(C))
    return torch.linalg.cholesky(inverse, upper=True).float()


def gptq(W, bits, group_size, shrink=None, *, C, act_order=False, percdamp=0.01):
    """GPTQ (arXiv 2210.17323): round column after column, move the rest to make up for the error.

    The error e of column k, divided by U_kk, is taken from the columns after it along U_k: the
    least squares answer to || (W - W_hat) X^T ||_F^2 if the columns up to k are fixed. Arguments
    and results as awq.quantize, so both methods have the same grids. A group's grid is that of its
    weights when its first column comes up; act_order takes the columns by falling C_kk, and the
    grids are then those of W ("static groups": the checkpoint has no g_idx).
    """
    W, G = awq.check_weight(W, bits, group_size)
    N, K = W.shape
    order = C.diagonal().argsort(descending=True) if act_order else torch.arange(K, device=W.device)
    U = inverse_factor(C[order][:, order], percdamp)
    delta, zero = awq.quantization_grid(W, bits, G, shrink)         # [N, K/G]
    W, q = W[:, order].clone(), torch.empty_like(W)
    step = 128 if act_order else math.gcd(G, 128)                   # columns updated at once
    for first in range(0, K, step):
        if first % G == 0 and not act_order:
            g = slice(first // G, first // G + 1)
            part = None if shrink is None else shrink[:, :, g]
            current = W[:, first:first + G].contiguous()
            delta[:, g], zero[:, g] = awq.quantization_grid(current, bits, G, part)
        last = min(first + step, K)
        errors = torch.zeros_like(W[:, first:last])
        for k in range(first, last):
            g = order[k:k + 1] // G
            column = W[:, k:k + 1].contiguous()
            q[:, k:k + 1] = awq.round_to_grid(column, delta[:, g], zero[:, g], bits)
            e = (column - (q[:, k:k + 1] - zero[:, g]) * delta[:, g]) / U[k, k]     # [N, 1]
            W[:, k:last] -= e * U[k, k:last]
            errors[:, k - first] = e[:, 0]
        W[:, last:] -= errors @ U[first:last, last:]
    q = q[:, order.argsort()]
    return q.to(torch.uint8), delta.half(), zero.to(torch.uint8)


# ---- SmoothQuant: 8-bit weights and activations --------------------------------------------------


@torch.no_grad()
def input_statistics(model, tokens, names):
    """{layer: (s_X, max |X|)}, each [K] float32, of the inputs in the full-precision model."""
    found = {}

    def record(name, args):
        X = args[0].flatten(0, -2).float().abs()                    # [T, K]
        total, count, peak = found.get(name, (0, 0, torch.zeros_like(X[0])))
        found[name] = total + X.sum(0), count + len(X), torch.maximum(peak, X.amax(0))

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: record(name, args)))
        for batch in tqdm(tokens.split(8), desc="statistics", leave=False):
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
    return {name: (total / count, peak) for name, (total, count, peak) in found.items()}


@torch.no_grad()
def smooth(model, tokens, alpha=0.5):
    """SmoothQuant (arXiv 2211.10438): s = max|X|^alpha / max|W|^(1 - alpha), folded into norms.

    The same scaling as AWQ's, W diag(s) and X diag(1/s), to make the *inputs* easy to round.
    """
    plans, prefix, blocks, calls, _ = awq.plan_model(model, tokens, 8, -1)
    todo = [(i, group) for i, plan in enumerate(plans) for group in plan
            if group.fold and "rows" not in group.fold.kind]
    statistics = input_statistics(model, tokens, [f"{prefix}.{i}.{g.layers[0]}" for i, g in todo])
    for i, group in todo:
        peak = statistics[f"{prefix}.{i}.{group.layers[0]}"][1]
        W = torch.cat([blocks[i].get_submodule(name).weight.float() for name in group.layers])
        s = peak.clamp(min=1e-5) ** alpha / W.abs().amax(0).clamp(min=1e-5) ** (1 - alpha)
        s = awq.shared_score(s, group.fold.rows.to(s.device))
        awq.apply_fold(blocks[i], group, calls[i], s)


def quantize_tokens(X, bits=8):
    """X [..., K] rounded to symmetric steps of max|x| / (2^(bits-1) - 1), one step a token."""
    top = 2 ** (bits - 1) - 1
    delta = X.abs().amax(-1, keepdim=True).clamp(min=1e-30) / top
    return (X / delta).round() * delta


def quantize_inputs(model, bits):
    """Round what every packed layer of a model reads, from now on (in floating point)."""
    for module in model.modules():
        if isinstance(module, awq.AWQLinear):
            module.register_forward_pre_hook(
                lambda _, args: (quantize_tokens(args[0], bits), *args[1:]))


# ---- The methods ---------------------------------------------------------------------------------


class Method(NamedTuple):
    title: str
    walk: dict | None = None            # arguments of awq.quantize_model; None: plain rounding
    bits: int | None = None             # of the weights if it has its own: then one group a row
    smooth: float | None = None         # SmoothQuant's alpha
    activation_bits: int | None = None


PLAIN = {"scale": False, "clip": False}
GPTQ = {"rounding": gptq, "sequential": True}       # as in its own code, a second pass
METHODS = {
    "fp": Method("full precision"),
    "rtn": Method("RTN"),
    "awq": Method("AWQ", {}),
    "awq-scale": Method("AWQ, scale only", {"clip": False}),
    "awq-clip": Method("AWQ, clipping only", {"scale": False}),
    "awq-sequential": Method("AWQ, inputs of quantised blocks", {"sequential": True}),
    "awq-exact": Method("AWQ, calibrated in float32", {"exact": True}),
    "awq-grid": Method("AWQ + grid refinement", {"refine": "grid"}),
    "awq-gradient": Method("AWQ + gradient refinement", {"refine": "gradient"}),
    "gptq": Method("GPTQ", {**PLAIN, **GPTQ}),
    "gptq-order": Method("GPTQ, act-order",
                         {**PLAIN, **GPTQ, "rounding": partial(gptq, act_order=True)}),
    "awq-gptq": Method("AWQ, then GPTQ", GPTQ),
    "awq-a8": Method("AWQ, 8-bit activations", {}, activation_bits=8),
    "smooth-awq": Method("SmoothQuant + AWQ, 8-bit activations", {}, None, 0.5, 8),
    "w8a8": Method("RTN W8A8", None, 8, None, 8),
    "smoothquant": Method("SmoothQuant W8A8", None, 8, 0.5, 8),
}

# WikiText-2 perplexity, windows of 2048, group size 128: arXiv 2306.00978v1, Table 4 (LLaMA) and
# Table 3 (OPT; "kept": 1 % of the channels in FP16, "twice": 1 % of them times s = 2).
PAPER_COLUMNS = (("fp", 16), ("rtn", 3), ("gptq", 3), ("awq", 3), ("rtn", 4), ("gptq", 4),
                 ("awq", 4), ("kept", 3), ("twice", 3))
PUBLISHED = {
    "llama-2-7b": (5.47, 6.66, 6.43, 6.24, 5.73, 5.69, 5.60),
    "llama-2-13b": (4.88, 5.52, 5.48, 5.32, 4.98, 4.98, 4.97),
    "llama-2-70b": (3.32, 3.98, 3.88, 3.74, 3.46, 3.42, 3.41),
    "llama-7b": (5.68, 7.01, 8.81, 6.35, 5.96, 6.22, 5.78),
    "llama-13b": (5.09, 5.88, 5.66, 5.52, 5.25, 5.23, 5.19),
    "llama-30b": (4.10, 4.88, 4.88, 4.61, 4.23, 4.24, 4.21),
    "llama-65b": (3.53, 4.24, 4.17, 3.95, 3.67, 3.66, 3.62),
    "opt-1.3b": (14.62, 119.47, None, 16.32, None, None, None, 16.91, 18.63),
    "opt-2.7b": (12.47, 298.00, None, 13.58, None, None, None, 13.69, 14.94),
    "opt-6.7b": (10.86, 23.54, None, 11.39, None, None, None, 11.39, 11.92),
    "opt-13b": (10.13, 46.04, None, 10.56, None, None, None, 10.43, 10.80),
    "opt-30b": (9.56, 18.80, None, 9.77, None, None, None, 9.85, 10.32),
}


def published(args, window, method, bits, group_size):
    """The paper's perplexity for a row of the table, or None if its protocol is another one."""
    if args.data != "wikitext" or window != 2048 or (bits != 16 and group_size != 128):
        return None
    name = re.sub(r"-hf$", "", str(args.model).rstrip("/").split("/")[-1].lower())
    return dict(zip(PAPER_COLUMNS, PUBLISHED.get(name, ()))).get((method, bits))


def published_table():
    """What the paper measured, as Markdown."""
    return markdown([{"model": name, **{
        f"{METHODS[m].title if m in METHODS else SHARE_TITLES[m]}{f' INT{bits}' * (bits < 16)}": ppl
        for (m, bits), ppl in zip(PAPER_COLUMNS, (*row, None, None))}}
        for name, row in PUBLISHED.items()], digits=2)


SHARE_TITLES = {"kept": "1 % in 16 bits", "twice": "1 % times s = 2"}

# ---- Perplexity ----------------------------------------------------------------------------------


def load_model(name, device):
    """(model in eval mode, tokenizer); float32 on CPU, the stored dtype on CUDA."""
    dtype = "auto" if torch.device(device).type == "cuda" else torch.float32
    return awq.load_pretrained(name, dtype=dtype).eval(), awq.load_tokenizer(name)


def test_windows(data, tokenizer, window, limit=None):
    """[windows, window] token ids of the test split, at most `limit` of them, evenly spread.

    ValueError if they fill no window.
    """
    text = "\n\n".join(awq.load_documents(data, "test"))
    ids = tokenizer(text, verbose=False, return_tensors="pt").input_ids[0].long()
    if len(ids) < window:
        raise ValueError(f"--data {data} has {len(ids)} tokens: one window needs {window}")
    windows = ids[:len(ids) // window * window].view(-1, window)
    return spread(windows, limit)


def spread(windows, limit):
    """At most `limit` of the windows, evenly spread."""
    if limit is None or limit >= len(windows):
        return windows
    return windows[torch.linspace(0, len(windows) - 1, limit).long()]


def bytes_per_token(windows, tokenizer):
    """UTF-8 bytes of text a token: perplexities of two vocabularies compare only through it."""
    text = "".join(tokenizer.batch_decode(windows, skip_special_tokens=True))
    return len(text.encode()) / windows.numel()


@torch.no_grad()
def perplexity(model, windows, device, batch=4):
    """exp of the mean negative log-likelihood of the predicted tokens of windows [n, length]."""
    model.to(device)
    total = torch.zeros((), dtype=torch.float64)
    for ids in tqdm(windows.split(batch), desc="perplexity", leave=False):
        ids = ids.to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(),
                                             reduction="sum").double().cpu()
    return math.exp(total / windows[:, 1:].numel())


def size_of(model):
    """(bytes of all distinct tensors, bits per weight of the packed layers or None)."""
    tensors = {t.data_ptr(): t for t in model.state_dict().values()}
    packed = [m for m in model.modules() if isinstance(m, awq.AWQLinear)]
    bits = sum(8 * tensor.nbytes for m in packed for name, tensor in m.state_dict().items()
               if name != "bias")
    weights = sum(m.in_features * m.out_features for m in packed)
    return sum(stored_bytes(t) for t in tensors.values()), bits / weights if weights else None


def stored_bytes(tensor):
    """Bytes in a checkpoint, where floating-point tensors take 16 bits."""
    return tensor.numel() * 2 if tensor.is_floating_point() else tensor.nbytes


# ---- One loop for all methods --------------------------------------------------------------------


class Bench(NamedTuple):
    """What every measurement of a run shares."""

    args: argparse.Namespace
    tokenizer: object
    windows: torch.Tensor       # [windows, window] test token ids
    tokens: torch.Tensor        # [samples, length] calibration token ids
    setup: dict
    known: dict                 # measurements already made


def open_bench(args):
    """Load the model once for its facts, and the two texts."""
    model, tokenizer = load_model(args.model, args.device)
    blocks = len(awq.find_blocks(model)[1])
    block = blocks // 2 if args.block is None else args.block
    if not 0 <= block < blocks:
        raise ValueError(f"--block is {block}: it must be in [0, {blocks - 1}]")
    window = awq.sequence_length(model, args.window, default=2048)
    length = awq.sequence_length(model, args.seq_len)
    windows = test_windows(args.data, tokenizer, window, args.windows)
    tokens = awq.calibration_tokens(args.calib, tokenizer, args.samples, length, args.seed)
    setup = {"model": str(args.model), "parameters": sum(p.numel() for p in model.parameters()),
             "block": block,
             "data": args.data, "windows": len(windows), "window": window,
             "bytes_per_token": bytes_per_token(windows, tokenizer), "calib": args.calib,
             "samples": len(tokens), "seq_len": tokens.shape[1], "seed": args.seed,
             "device": describe_device(args.device), "python": platform.python_version(),
             "torch": torch.__version__, "transformers": __import__("transformers").__version__}
    return Bench(args, tokenizer, windows, tokens, setup, {})


def quantize(model, method, bits, group_size, tokens, device):
    """Quantise in place by one of METHODS; returns the report of awq."""
    start = time.time()
    if method.smooth is not None:
        smooth(model.to(device), tokens, method.smooth)
    if method.walk is None:
        report = awq.round_model(model, bits, group_size)
    else:
        report = awq.quantize_model(model, tokens, bits, group_size, device=device, **method.walk)
    if method.activation_bits:
        quantize_inputs(model, method.activation_bits)
    return {**report, "seconds": time.time() - start}


def measure(bench, name, bits=16, group_size=None, calib=None):
    """(row of the table, report of awq) of a method; calib: other tokens than the bench's."""
    args, method = bench.args, METHODS[name]
    if method.bits:
        bits, group_size = method.bits, -1
    tokens = bench.tokens if calib is None else calib
    reads = method.walk is not None or method.smooth is not None
    key = (name, bits, group_size, tokens.numpy().tobytes() if reads else None)
    if key not in bench.known:
        model, _ = load_model(args.model, args.device)
        report = {"seconds": 0.0, "groups": []}
        if name != "fp":
            report = quantize(model, method, bits, group_size, tokens, args.device)
        size, bits_per_weight = size_of(model)
        ppl = perplexity(model, bench.windows, args.device)
        row = {"method": name, "bits": bits, "group_size": group_size,
               "bits_per_weight": bits_per_weight or 16.0, "bytes": size, "ppl": ppl,
               "seconds": report["seconds"],
               "published": published(args, bench.setup["window"], name, bits, group_size)}
        print(f"{method.title}, {bits} bits: {ppl:.3f}", file=sys.stderr)
        if args.save and name != "fp":
            awq.save_quantized(model.cpu(), args.save, bench.tokenizer)
        bench.known[key] = row, report
    return bench.known[key]


def measure_all(bench):
    """The rows of --methods x --bits x --group-size, full precision first."""
    args = bench.args
    wanted = {(name, METHODS[name].bits or bits, -1 if METHODS[name].bits else G): None
              for G in args.group_sizes for bits in args.bits for name in args.methods}
    return [measure(bench, *key)[0] for key in [("fp",), *wanted]]


def describe_device(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    file = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", file.read_text() if file.exists() else "")
    return f"{model[1] if model else 'CPU'}, {torch.get_num_threads()} threads"


def describe(setup):
    """The set-up in one line."""
    return (f"{setup['model']}, {setup['parameters'] / 1e6:.1f} M parameters; test text "
            f"{setup['data']}, {setup['windows']} windows of {setup['window']}, "
            f"{setup['bytes_per_token']:.2f} bytes a token; calibration "
            f"{setup['calib']}, {setup['samples']} x {setup['seq_len']} tokens, seed "
            f"{setup['seed']}; {setup['device']}; Python {setup['python']}, torch "
            f"{setup['torch']}, transformers {setup['transformers']}")


def markdown(rows, digits=3):
    """A list of dicts with the same keys as a Markdown table."""
    def cell(value):
        if isinstance(value, float):
            return f"{value:.{digits}f}"
        return "" if value is None else str(value)
    lines = ["| " + " | ".join(map(cell, line)) + " |"
             for line in [rows[0].keys(), *(row.values() for row in rows)]]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def recovered(row, rows):
    """The share of RTN's perplexity increase that a row takes back, or None."""
    full = rows[0]["ppl"]
    rtn = [r["ppl"] - full for r in rows if (r["method"], r["bits"], r["group_size"])
           == ("rtn", row["bits"], row["group_size"])]
    if row["method"] in ("fp", "rtn") or not rtn or rtn[0] <= 0:
        return None
    return 1 - (row["ppl"] - full) / rtn[0]


def table(rows):
    """The rows of measure_all, full precision first, as a Markdown table."""
    def line(row):
        quantised, share = row["method"] != "fp", recovered(row, rows)
        cells = {"method": METHODS[row["method"]].title, "bits": row["bits"],
                 "group": row["group_size"] or "", "bits/weight": f"{row['bits_per_weight']:.2f}",
                 "size": f"{row['bytes'] / 1e6:.1f} MB", "perplexity": row["ppl"],
                 "difference": f"{row['ppl'] - rows[0]['ppl']:+.3f}" if quantised else "",
                 "RTN's loss recovered": "" if share is None else f"{share:.0%}",
                 "seconds": f"{row['seconds']:.1f}" if quantised else ""}
        paper = f"{row['published']:.2f}" if row["published"] else ""
        return {**cells, **({"paper": paper} if show_published else {})}
    show_published = any(row["published"] for row in rows)
    return markdown([line(row) for row in rows])


def pivot(rows):
    """One line a method: the perplexity increase at each number of bits, and the seconds."""
    full, every = rows[0]["ppl"], sorted({row["bits"] for row in rows[1:]}, reverse=True)
    lines = {}
    for row in rows[1:]:
        line = lines.setdefault(row["method"], {"method": METHODS[row["method"]].title,
                                                **{f"INT{bits}": None for bits in every},
                                                "seconds": None})
        line[f"INT{row['bits']}"] = f"{row['ppl'] - full:+.3f}"
        line["seconds"] = f"{row['seconds']:.1f}"
    return markdown(list(lines.values()))


# ---- The paper's studies -------------------------------------------------------------------------


class Study(NamedTuple):
    sentence: str               # what the paper claims and what this run shows
    rows: list                  # dicts with the same keys: the table
    panels: list                # of the picture: see draw


def verdict(paper, here, agrees):
    return f"The paper: {paper}. This run: {here}; it {'agrees' if agrees else 'does not agree'}."


def study_grid(bench):
    """(bits, group size) of the studies: the fewest --bits and the first --group-size."""
    return min(bench.args.bits), bench.args.group_sizes[0]


def fresh_layers(bench):
    """(a full-precision model, {name: Linear} of its layers that are quantised)."""
    skipped = measure(bench, "rtn", *study_grid(bench))[1]["skipped"]
    model, _ = load_model(bench.args.model, bench.args.device)
    awq.replace_conv1d(model)
    return model, {name: module for name, module in model.named_modules()
                   if isinstance(module, nn.Linear) and name not in skipped}


@torch.no_grad()
def rewritten(bench, rewrite, what):
    """Perplexity with rewrite(name, W) in place of every weight W [N, K] that is quantised."""
    model, layers = fresh_layers(bench)
    for name, layer in layers.items():
        layer.weight.data = rewrite(name, layer.weight.float()).to(layer.weight.dtype)
    ppl = perplexity(model, bench.windows, bench.args.device)
    print(f"{what}: {ppl:.3f}", file=sys.stderr)
    return ppl


def activation_scores(bench):
    """{layer: s_X} of every layer that is quantised, in the full-precision model, on the CPU."""
    if "s_X" not in bench.known:
        model, layers = fresh_layers(bench)
        found = input_statistics(model.to(bench.args.device), bench.tokens, layers)
        bench.known["s_X"] = {name: s_X.cpu() for name, (s_X, _) in found.items()}
    return bench.known["s_X"]


def top_channels(score, share):
    """Indices of the share of channels with the highest score, at least one."""
    return score.topk(max(1, round(share * len(score)))).indices


def keep_channels(W, score, share, bits, group_size):
    """Q(W), but the input channels of the highest score as they were. [N, K]"""
    W_hat, top = awq.fake_quantize(W, bits, group_size), top_channels(score, share).to(W.device)
    W_hat[:, top] = W[:, top]
    return W_hat


def scale_channels(W, s, bits, group_size):
    """Q(W diag(s)) diag(1/s). [N, K]"""
    return awq.fake_quantize(W * s, bits, group_size) / s


def salient_scale(s_X, factor, share=0.01):
    """s [K]: factor for the share of channels with the largest s_X, 1 for the others."""
    s = torch.ones_like(s_X)
    s[top_channels(s_X, share)] = factor
    return s


def study_salience(bench, seeds=5):
    """Table 1: which channels matter? A few of them stay in full precision."""
    (bits, G), s_X = study_grid(bench), activation_scores(bench)
    full, rtn = measure(bench, "fp")[0]["ppl"], measure(bench, "rtn", bits, G)[0]["ppl"]

    def kept(share, score, what):
        return rewritten(bench, lambda name, W: keep_channels(W, score(name, W), share, bits, G),
                         f"{share:.1%} by {what}")

    rows = [{"kept in full precision": "nothing (RTN)", "by s_X": rtn, "by weight norm": rtn,
             "at random": rtn, "spread (std)": None}]
    for share in (0.001, 0.01, 0.03):
        draws = torch.tensor([kept(share, partial(random_score, seed=seed), f"seed {seed}")
                              for seed in range(seeds)])
        rows.append({"kept in full precision": f"{share:.1%}",
                     "by s_X": kept(share, lambda name, W: s_X[name], "s_X"),
                     "by weight norm": kept(share, lambda name, W: W.norm(dim=0), "weight norm"),
                     "at random": draws.mean().item(), "spread (std)": draws.std().item()})
    one = rows[2]
    share = {key: (rtn - one[key]) / ((rtn - full) or math.nan) for key in list(one)[1:4]}
    ratio = sum((s.max() / s.median()).item() for s in s_X.values()) / len(s_X)
    here = (f"at INT{bits} 1 % by s_X takes back {share['by s_X']:.0%} of RTN's loss, by weight "
            f"norm {share['by weight norm']:.0%}, at random {share['at random']:.0%} (a layer's "
            f"largest s_X is {ratio:.1f} times its median, on average)")
    agrees = share["by s_X"] > 0.5 and one["by s_X"] < min(
        one["by weight norm"], one["at random"] - one["spread (std)"])
    paper = ("keeping the 1 % of channels with the largest activations nearly restores full "
             "precision (OPT-6.7B: 23.54 to 11.39 of 10.86), by weight norm or at random it does "
             "not (22.37, 24.23)")
    return Study(verdict(paper, here, agrees), rows, [saliency_panel(bench, s_X)])


def random_score(name, W, seed):
    """[K] random numbers, the same for a layer and a seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
    return torch.rand(W.shape[1], generator=generator)


def saliency_panel(bench, s_X):
    """Sorted s_X of the layers of the chosen block."""
    block = bench.setup["block"]
    curves = {name.split(f".{block}.", 1)[1]: s.sort(descending=True).values / s.mean()
              for name, s in s_X.items() if re.search(r"\.(\d+)\.", name)[1] == str(block)}
    distinct = {tuple(s.tolist()): name for name, s in reversed(curves.items())}
    series = {name: ([100 * (i + 0.5) / len(s) for i in range(len(s))], list(s))
              for s, name in reversed(distinct.items())}
    return {"title": f"block {block}: channels by saliency", "x": "channels, % (sorted)",
            "y": "s_X / its mean", "series": series, "log": "xy", "vline": (1.0, "1 %")}


def study_scale(bench):
    """Table 2: the 1 % of channels with the largest s_X times s, all others as they are."""
    (bits, G), s_X = study_grid(bench), activation_scores(bench)
    rows = []
    for factor in (1.0, 1.25, 1.5, 2.0, 4.0):
        ratios = []

        def rewrite(name, W):
            s = salient_scale(s_X[name], factor)
            length = awq.check_grid(bits, G, W.shape[1])
            before, _ = awq.quantization_grid(W, bits, length)
            after, _ = awq.quantization_grid(W * s, bits, length)
            touched = torch.zeros_like(s).index_fill(0, top_channels(s_X[name], 0.01), 1)
            touched = touched.view(-1, length).amax(1) > 0
            ratios.append((after / before)[:, touched & (before > 0).all(0)].flatten())
            return scale_channels(W, s, bits, G)

        ppl = rewritten(bench, rewrite, f"s = {factor}")
        ratio = torch.cat(ratios)
        rows.append({"s": f"{factor:g}", "delta changes": f"{(ratio != 1).float().mean():.1%}",
                     "mean delta'/delta": ratio.mean().item(),
                     "mean delta'/(delta s)": ratio.mean().item() / factor, "perplexity": ppl})
    best = min(rows, key=lambda row: row["perplexity"])
    here = (f"at INT{bits} s = {best['s']} is best ({rows[0]['perplexity']:.3f} to "
            f"{best['perplexity']:.3f}); s = 4 gives {rows[-1]['perplexity']:.3f} and changes "
            f"{rows[-1]['delta changes']} of the steps of groups with such a channel")
    paper = ("times s > 1 the salient channels' error falls, until delta grows and the others' "
             "errors with it: s = 2 is best (OPT-6.7B: 23.54 to 11.92), s = 4 worse (12.36)")
    series = {"perplexity": ([float(row["s"]) for row in rows],
                             [row["perplexity"] for row in rows])}
    panel = {"title": f"the 1 % of channels with the largest s_X times s, INT{bits}", "x": "s",
             "y": "perplexity", "series": series}
    return Study(verdict(paper, here, best not in (rows[0], rows[-1])), rows, [panel])


def study_grid_of_alpha(bench):
    """Eq. 5: the loss over alpha, for every group of layers of a block."""
    bits, G = study_grid(bench)
    block = bench.setup["block"]
    alone, clipped = ([line for line in measure(bench, name, bits, G)[1]["groups"]
                       if line["block"] == block and line["loss_rtn"]]
                      for name in ("awq-scale", "awq"))
    rows, panels, best = {}, [], []
    for pair in zip(alone, clipped):
        line = pair[1]
        title = ", ".join(name.split(f".{block}.", 1)[1].split(".")[-1] for name in line["layers"])
        series = {}
        for run, what in zip(pair, ("scale alone", "with clipping")):
            points = [(alpha, loss / run["loss_rtn"]) for alpha, is_clipped, loss in run["curve"]
                      if is_clipped is (run is line)]
            series[what] = tuple(map(list, zip(*points)))
            for alpha, loss in points:
                key = f"{alpha:.2f}"
                rows.setdefault(key, {"alpha": key})[f"{title}: {what}"] = loss
        best.append(min(zip(series["scale alone"][1], series["scale alone"][0])))
        panels.append({"title": title, "x": "alpha", "y": "loss / RTN's loss", "series": series,
                       "points": [(0.0, 1.0, "RTN"), (line["alpha"], line["loss"]
                                                      / line["loss_rtn"], "chosen")]})
    interior = sum(0 < alpha < 1 for _, alpha in best)
    last = [panel["series"]["scale alone"][1] for panel in panels]
    here = (f"in block {block} at INT{bits} scale alone is best inside in {interior} of "
            f"{len(best)} groups (alpha {', '.join(f'{alpha:.2f}' for _, alpha in best)}: "
            f"{', '.join(f'{loss:.2f}' for loss, _ in best)} of RTN's loss), and alpha = 1 costs "
            f"{', '.join(f'{losses[-1]:.2f}' for losses in last)}")
    paper = "the best alpha lies inside (0, 1), a balance of salient and other channels"
    rows = [{key: row.get(key) for key in rows["0.00"]} for row in rows.values()]
    return Study(verdict(paper, here, 2 * interior > len(best)), rows, panels)


def study_methods(bench):
    """Table 3: RTN, the 1 % in full precision, the 1 % times 2, AWQ."""
    (bits, G), s_X = study_grid(bench), activation_scores(bench)
    full = measure(bench, "fp")[0]["ppl"]
    found = {"rtn": measure(bench, "rtn", bits, G)[0]["ppl"],
             "kept": rewritten(bench, lambda name, W: keep_channels(
                 W, s_X[name], 0.01, bits, G), SHARE_TITLES["kept"]),
             "twice": rewritten(bench, lambda name, W: scale_channels(
                 W, salient_scale(s_X[name], 2.0), bits, G), SHARE_TITLES["twice"]),
             "awq": measure(bench, "awq", bits, G)[0]["ppl"]}
    titles = {"rtn": "RTN", "awq": "AWQ", **SHARE_TITLES}
    paper = {name: published(bench.args, bench.setup["window"], name, bits, G) for name in found}
    rows = [{"method": "full precision", "perplexity": full, "difference": ""}]
    rows += [{"method": f"{titles[name]}, INT{bits}", "perplexity": ppl,
              "difference": f"{ppl - full:+.3f}"} for name, ppl in found.items()]
    if any(paper.values()):
        rows = [{**row, "paper": value} for row, value in zip(rows, [None, *paper.values()])]
    here = ", ".join(f"{titles[name]} {ppl - full:+.3f}" for name, ppl in found.items())
    claim = ("AWQ, with no channel in 16 bits, is as good as keeping 1 % there (OPT-6.7B: both "
             "11.39), better than s = 2 (11.92) and far better than RTN (23.54)")
    agrees = found["awq"] <= min(found["kept"], found["twice"], found["rtn"])
    names = list(found)
    panel = {"title": f"INT{bits}", "x": "", "y": "perplexity increase", "bars":
             ([titles[name] for name in names], [found[name] - full for name in names])}
    return Study(verdict(claim, here, agrees), rows, [panel])


def other_documents(args):
    """Calibration text from another source than --calib, for awq.calibration_tokens."""
    if args.other == "source":
        from tinylm.corpus import stdlib_documents
        return stdlib_documents("train", source=True)
    return args.other


def study_calibration(bench):
    """How much calibration text is needed, and from where?"""
    (bits, G), args = study_grid(bench), bench.args
    full = measure(bench, "fp")[0]["ppl"]
    other = awq.calibration_tokens(other_documents(args), bench.tokenizer, len(bench.tokens),
                                   bench.tokens.shape[1], args.seed)
    counts = sorted({min(n, len(bench.tokens)) for n in (1, 4, 16, 64, 128)})
    trials = [(f"same source, {n} sequences", bench.tokens[:n]) for n in counts]
    trials.append((f"other source, {counts[-1]} sequences", other))
    rows = [{"calibration": label, "AWQ": measure(bench, "awq", bits, G, tokens)[0]["ppl"],
             "GPTQ": measure(bench, "gptq", bits, G, tokens)[0]["ppl"]} for label, tokens in trials]
    cost = {name: rows[-1][name] - rows[-2][name] for name in ("AWQ", "GPTQ")}
    few = {name: rows[0][name] - rows[-2][name] for name in ("AWQ", "GPTQ")}
    here = (f"at INT{bits} text from {args.other} instead of {args.calib} costs AWQ "
            f"{cost['AWQ']:+.3f}, GPTQ {cost['GPTQ']:+.3f}, and {counts[0]} instead of "
            f"{counts[-1]} sequences AWQ {few['AWQ']:+.3f}, GPTQ {few['GPTQ']:+.3f}")
    paper = ("AWQ overfits its calibration text less than GPTQ: another source costs it 0.5-0.6 "
             "perplexity, GPTQ 2.3-4.9 (OPT-6.7B), and it needs a tenth of the sequences")
    series = {name: (counts, [row[name] - full for row in rows[:-1]]) for name in ("AWQ", "GPTQ")}
    panel = {"title": f"INT{bits}", "x": "calibration sequences", "y": "perplexity increase",
             "series": series, "log": "x", "points": [
                 (counts[-1], rows[-1][name] - full, f"{name}, other source") for name in series]}
    agrees = cost["AWQ"] < cost["GPTQ"] and few["AWQ"] < few["GPTQ"]
    return Study(verdict(paper, here, agrees), rows, [panel])


def study_memory(bench):
    """Bits per weight with scales and zeros counted: bits + (16 + bits) / G."""
    model, layers = fresh_layers(bench)
    (size, _), layers = size_of(model), layers.values()
    weights = sum(layer.weight.numel() for layer in layers)
    rows, series = [], {}
    for bits, G in [(bits, G) for bits in awq.BITS for G in (32, 64, 128, -1)]:
        fits = G == -1 or not any(layer.in_features % G for layer in layers)
        packed = [awq.AWQLinear(layer.in_features, layer.out_features, False, bits, G,
                                device="meta") for layer in layers if fits]
        stored = sum(tensor.nbytes for module in packed for tensor in module.buffers())
        extra = 8 * (stored - sum(module.qweight.nbytes for module in packed)) / weights
        cells = (8 * stored / weights, extra, f"{extra / bits:.1%}", f"{extra / 16:.2%}",
                 (size - 2 * weights + stored) / 1e6) if fits else (None,) * 5
        rows.append({"bits": str(bits), "group": "a row" if G == -1 else str(G), **dict(zip(
            ("bits/weight", "scales and zeros, bits/weight", "of the integers", "of FP16",
             "size, MB"), cells))})
        if fits and G > 0:
            series.setdefault(f"{bits} bits", []).append((G, cells[0]))
    extra = (16 + 4) / 128
    sentence = ("Summaries quote an overhead of 0.1-0.2 % for the scales. In the format, 4 bits in "
                "groups of 128 store a 16-bit step and a 4-bit zero each: (16 + 4) / 128 = "
                f"{extra:.2f} bits a weight, {extra / 4:.1%} of the integers and {extra / 16:.1%} "
                "of FP16; 0.1-0.2 is the number of bits a weight, not a percentage.")
    panel = {"title": "scales and zeros counted", "x": "group size", "y": "bits per weight",
             "series": {name: tuple(zip(*points)) for name, points in series.items()}, "log": "x"}
    return Study(sentence, rows, [panel])


WIDTHS = (128, 256, 512)        # of the models of the studies `time` and `cost`


def random_llama(width, positions):
    """One random LLaMA block; the seconds of a search do not depend on the weights' values."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=1,
        num_attention_heads=width // 16, max_position_embeddings=positions)).eval()


def study_time(bench):
    """Seconds to quantise, by method and model size."""
    (bits, G), tokens = study_grid(bench), bench.tokens % 256
    names = ("rtn", "gptq", "awq-scale", "awq")
    rows = [{"model": "this model", "parameters, M": bench.setup["parameters"] / 1e6, **{
        METHODS[name].title: measure(bench, name, bits, G)[0]["seconds"] for name in names}}]
    for width in WIDTHS:
        rows.append({"model": f"one random block, width {width}"})
        for name in names:
            model = random_llama(width, tokens.shape[1])
            rows[-1]["parameters, M"] = sum(p.numel() for p in model.parameters()) / 1e6
            report = quantize(model, METHODS[name], bits, G, tokens, bench.args.device)
            rows[-1][METHODS[name].title] = report["seconds"]
    ratio = [row["AWQ"] / row["GPTQ"] for row in rows]
    here = (f"AWQ with clipping in the search takes {min(ratio):.1f} to {max(ratio):.1f} times "
            f"GPTQ's seconds, scale alone {rows[-1]['AWQ, scale only'] / rows[-1]['GPTQ']:.1f} "
            "times at the largest width")
    paper = ("a search without regression or back-propagation, which summaries turn into \"faster "
             "than GPTQ\"; it gives no seconds")
    series = {METHODS[name].title: ([row["parameters, M"] for row in rows[1:]],
                                    [row[METHODS[name].title] for row in rows[1:]])
              for name in names}
    panel = {"title": f"INT{bits}, one block", "x": "parameters, M", "y": "seconds",
             "series": series, "log": "xy"}
    return Study(verdict(paper, here, max(ratio) < 1), rows, [panel])


def study_cost(bench, samples=(32, 128, 512)):
    """Seconds of the stages of AWQ, by hidden size and number of calibration samples."""
    (bits, G), length, rows, series = study_grid(bench), bench.tokens.shape[1], [], {}
    generator = torch.Generator().manual_seed(bench.args.seed)
    for width in WIDTHS:
        for count in samples:
            tokens = torch.randint(256, (count, length), generator=generator)
            report = quantize(random_llama(width, length), METHODS["awq"], bits, G, tokens,
                              bench.args.device)
            stages = {name: report["stages"][name] for name in ("statistics", "search", "other")}
            rows.append({"hidden size": width, "samples": count, **stages,
                         "all": report["seconds"]})
        last = rows[-len(samples):]
        series[f"hidden size {width}"] = (samples, [row["all"] for row in last])
    ends = list(zip(rows[::len(samples)], rows[len(samples) - 1::len(samples)]))
    growth = {name: " / ".join(f"{many[name] / few[name]:.1f}" for few, many in ends)
              for name in ("statistics", "search")}
    sentence = (f"With {samples[-1] / samples[0]:.0f} times the samples (of {length} tokens; one "
                f"random block of hidden size {' / '.join(map(str, WIDTHS))}) the pass and its "
                f"statistics take {growth['statistics']} times as long, the search "
                f"{growth['search']} times.")
    panel = {"title": f"INT{bits}, one block", "x": "calibration samples", "y": "seconds",
             "series": series, "log": "xy"}
    return Study(sentence, rows, [panel])


STUDIES = {"salience": study_salience, "scale": study_scale, "grid": study_grid_of_alpha,
           "methods": study_methods, "calibration": study_calibration, "memory": study_memory,
           "time": study_time, "cost": study_cost}

# ---- Pictures ------------------------------------------------------------------------------------

GREY = "#808080"                # readable on white and on black


def check_plot(path):
    """ValueError unless a picture can be written to path."""
    if Path(path).suffix not in (".svg", ".png"):
        raise ValueError(f"--plot is {path}: it must end in .svg or .png")
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"--plot is {path}: its folder does not exist")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(f"--plot {path} needs matplotlib: pip install matplotlib") from None


def draw(path, panels):
    """A picture of panels side by side, for light and dark pages; written whole or not at all.

    A panel is a dict of "title", "x", "y" (labels) and "series" {label: (xs, ys)} or "bars"
    (labels, heights); "log": axes among "xy"; "points" [(x, y, text)]; "vline": (x, text).
    """
    import matplotlib
    from matplotlib.figure import Figure
    style = {"svg.hashsalt": "awq", "svg.fonttype": "none", "font.size": 9, "legend.frameon": False,
             **{key: GREY for key in ("text.color", "axes.edgecolor", "axes.labelcolor",
                                      "axes.titlecolor", "xtick.color", "ytick.color")}}
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    partial_path = Path(path).with_suffix(".partial" + Path(path).suffix)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4 * columns if columns > 1 else 6, 3.2 * lines),
                        layout="constrained")
        for i, panel in enumerate(panels):
            draw_panel(figure.add_subplot(lines, columns, i + 1), panel)
        metadata = {"Date": None} if Path(path).suffix == ".svg" else None
        try:
            figure.savefig(partial_path, transparent=True, metadata=metadata)
            partial_path.replace(path)
        finally:
            partial_path.unlink(missing_ok=True)


def draw_panel(axes, panel):
    axes.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GREY, alpha=0.25)
    if "bars" in panel:
        axes.bar(*panel["bars"], color="C0")
    for label, (xs, ys) in panel.get("series", {}).items():
        axes.plot(xs, ys, marker="o" if len(xs) < 10 else None, markersize=4, label=label)
    for axis in panel.get("log", ""):
        axes.set(**{f"{axis}scale": "log"})
    for x, y, text in panel.get("points", ()):
        axes.plot([x], [y], "D", color=GREY, markersize=5)
        axes.annotate(text, (x, y), xytext=(5, 5), textcoords="offset points")
    if "vline" in panel:
        axes.axvline(panel["vline"][0], color=GREY, linestyle="--")
        axes.annotate(panel["vline"][1], (panel["vline"][0], 0.95), xytext=(4, 0),
                      xycoords=("data", "axes fraction"), textcoords="offset points")
    if "ticks" in panel:
        axes.set_xticks(panel["ticks"], [f"{tick:g}" for tick in panel["ticks"]])
        axes.minorticks_off()
    if len(panel.get("series", ())) > 1:
        axes.legend()


def bits_panel(rows):
    """Perplexity increase by bits, a line a method; an increase <= 0 has no place on a log axis."""
    full, series = rows[0]["ppl"], {}
    for row in sorted(rows[1:], key=lambda row: row["bits"]):
        if row["ppl"] > full:
            title = METHODS[row["method"]].title
            if len({r["group_size"] for r in rows[1:]} - {-1}) > 1:
                title += f", group {row['group_size']}"
            series.setdefault(title, []).append((row["bits"], row["ppl"] - full))
    return {"title": f"full precision: {full:.2f}", "x": "bits", "y": "perplexity increase",
            "log": "y", "ticks": sorted({row["bits"] for row in rows[1:]}),
            "series": {title: tuple(zip(*points)) for title, points in series.items()}}


# ---- README --------------------------------------------------------------------------------------

FEW = {"windows": 40, "samples": 32}    # of the README's studies, to keep its command quick
PICTURED = ("rtn", "awq", "gptq", "awq-gptq")


def increases(bench, bits, names):
    """{name: perplexity increase} of methods at a number of bits."""
    full, G = measure(bench, "fp")[0]["ppl"], bench.args.group_sizes[0]
    return {name: measure(bench, name, bits, G)[0]["ppl"] - full for name in names}


def gptq_sentence(bench):
    parts = []
    for bits in (4, 3, 2):
        found = increases(bench, bits, ("awq", "gptq", "awq-gptq"))
        titles = {"awq": "AWQ", "gptq": "GPTQ", "awq-gptq": "the two together"}
        best = titles[min(found, key=found.get)]
        figures = ", ".join(f"{titles[name]} {cost:+.3f}" for name, cost in found.items())
        parts.append(f"INT{bits}: {figures}; best: {best}")
    pairs = [(row[i], row[i + 1]) for row in PUBLISHED.values() for i in (2, 5) if row[i]]
    wins = sum(awq_ppl < gptq_ppl for gptq_ppl, awq_ppl in pairs)
    return (f"Perplexity increase in this run: {'. '.join(parts)}. In the paper's tables AWQ is "
            f"below GPTQ in {wins} of {len(pairs)} cases.")


def parts_sentence(bench):
    parts = []
    for bits in (4, 3):
        found = increases(bench, bits, ("rtn", "awq-scale", "awq-clip", "awq"))
        rtn = found["rtn"] or math.nan
        share = {name: f"{1 - cost / rtn:.0%}" for name, cost in found.items()}
        parts.append(f"at INT{bits} the scale alone takes back {share['awq-scale']} of RTN's loss, "
                     f"clipping alone {share['awq-clip']}, both together {share['awq']}")
    return f"In this run {'; '.join(parts)}."


def eight_bit_sentence(bench):
    found = increases(bench, 8, ("rtn", "awq"))
    w8a8, smoothed = (measure(bench, name)[0]["ppl"] - measure(bench, "fp")[0]["ppl"]
                      for name in ("w8a8", "smoothquant"))
    four = increases(bench, 4, ("awq", "awq-a8", "smooth-awq"))
    return (f"In this run INT8 weights cost {found['rtn']:+.3f} perplexity rounded and "
            f"{found['awq']:+.3f} with AWQ. With 8-bit activations as well: {w8a8:+.3f} rounded, "
            f"{smoothed:+.3f} with SmoothQuant. INT4 weights by AWQ: {four['awq']:+.3f}, under "
            f"8-bit activations {four['awq-a8']:+.3f}, with SmoothQuant first "
            f"{four['smooth-awq']:+.3f}.")


def readme_blocks(bench):
    """({marker: text}, {picture: panels}) of everything in the README that a run computes."""
    start = time.time()
    G = bench.args.group_sizes[0]
    main = [measure(bench, *key)[0] for key in
            [("fp",), *((name, bits, G) for bits in (4, 3) for name in ("rtn", "awq"))]]
    blocks = {"eval": f"{describe(bench.setup)}; {time.time() - start:.0f} s\n\n{table(main)}",
              "published": published_table()}
    tokens, windows = bench.tokens, spread(bench.windows, FEW["windows"])
    bench = bench._replace(windows=windows, tokens=tokens[:FEW["samples"]], known={})
    bench.setup.update(windows=len(windows), samples=len(bench.tokens))
    wanted = [("fp",), *((name, bits, G) for name in METHODS if name != "fp"
                         for bits in ((8, 4, 3, 2) if name in PICTURED else (4, 3)))]
    rows = list({id(row): row for row in (measure(bench, *key)[0] for key in wanted)}.values())
    blocks["baselines"] = f"{describe(bench.setup)}\n\n{pivot(rows)}"
    blocks["gptq"], blocks["parts"] = gptq_sentence(bench), parts_sentence(bench)
    blocks["eight"] = eight_bit_sentence(bench)
    studies = {name: study(bench._replace(tokens=tokens) if name == "calibration" else bench)
               for name, study in STUDIES.items()}
    for name, study in studies.items():
        table_of_it = [] if name == "grid" else ["", markdown(study.rows)]
        blocks[name] = "\n".join([study.sentence, *table_of_it])
    pictures = {"bits.svg": [bits_panel([rows[0], *(r for r in rows if r["method"] in PICTURED)])],
                "alpha.svg": studies["grid"].panels, "saliency.svg": studies["salience"].panels}
    blocks["took"] = f"(This run: {(time.time() - start) / 60:.0f} minutes.)"
    return blocks, pictures


def form(text):
    """What must not drift in a block: the heads and first cells of its tables, less the numbers."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = lines[:1] + [line.split("|")[1].strip() for line in lines[1:]]
    return [re.sub(r"\d[\d.]*", "0", cell) for cell in cells] or [bool(text.strip())]


def write_readme(args):
    """Measure everything, then write tables and pictures; with --check only compare their form."""
    blocks, pictures = readme_blocks(open_bench(args))
    folder = Path(args.readme).absolute().parent / "pictures"
    if args.check:
        drifted = [name for name, text in blocks.items()
                   if form(find_markers(args.readme, name)[1][0]) != form(text)]
        drifted += [name for name in pictures if not (folder / name).is_file()]
        if drifted:
            raise ValueError(f"{args.readme} has drifted in {', '.join(drifted)}: run "
                             "python eval.py --readme README.md")
        return
    folder.mkdir(exist_ok=True)
    for name, panels in pictures.items():
        draw(folder / name, panels)
    for name, text in blocks.items():
        write_between_markers(args.readme, name, text)


def find_markers(path, name):
    """(text of a file, match of what `<!-- name -->` and `<!-- /name -->` enclose); ValueError."""
    text = Path(path).read_text()
    match = re.search(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", text, re.DOTALL)
    if not match:
        raise ValueError(f"{path} has no markers <!-- {name} --> and <!-- /{name} -->")
    return text, match


def write_between_markers(path, name, new):
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` in a file."""
    text, match = find_markers(path, name)
    Path(path).write_text(text[:match.start()] + new + "\n" + text[match.end():])


# ---- Command line --------------------------------------------------------------------------------


def choice_list(text, valid, what):
    """The items of a comma-separated option; ValueError names what is not valid."""
    items = list(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))
    unknown = [item for item in items if item not in valid]
    if unknown or not items:
        raise ValueError(f"{what} is {text!r}: it must be a comma-separated list of "
                         f"{', '.join(valid)}")
    return items


def integers(text, what):
    """The integers of a comma-separated option; ValueError if an item is none."""
    try:
        return list(dict.fromkeys(int(item) for item in text.split(",")))
    except ValueError:
        raise ValueError(f"{what} is {text!r}: it must be a comma-separated list of integers"
                         ) from None


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="tinylm", help="hub name or folder (the tinylm of this repository)")
    add("--data", help="test text: wikitext, pydoc, a text file (pydoc for tinylm, else wikitext)")
    add("--calib", help=f"calibration text: {', '.join(awq.DATASETS)} or a text file (as --data)")
    add("--methods", default="rtn,awq", help=f"comma-separated: {', '.join(METHODS)}; or all")
    add("--bits", default="4,3", help="comma-separated: 2, 3, 4, 8 (a study takes the fewest)")
    add("--group-size", default="128", help="comma-separated; -1: one group a row")
    add("--samples", type=int, default=128, help="calibration samples")
    add("--seq-len", type=int, help="tokens a calibration sample (512)")
    add("--window", type=int, help="tokens a test window (2048, or the model's positions)")
    add("--windows", type=int, help="at most so many test windows, evenly spread (all)")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--study", metavar="NAME", help=f"a study of the paper instead: {', '.join(STUDIES)}")
    add("--block", type=int, help="decoder block of the study `grid` and the picture of `salience`")
    add("--other", help="second source of the study `calibration`: as --calib, or source, the "
        "library's source code (source for pydoc, pileval for wikitext, else pydoc)")
    add("--save", metavar="DIR", help="save the quantised model; needs one method and one --bits")
    add("--json", metavar="FILE", help="write the set-up and the rows as JSON")
    add("--plot", metavar="FILE", help="draw the table or study (.svg or .png; needs matplotlib)")
    add("--readme", metavar="FILE", help="write all tables and pictures of a README")
    add("--check", action="store_true", help="with --readme: compare the form, write nothing")
    args = parser.parse_args(argv)
    set_defaults(args)
    check_options(args)
    return args


def set_defaults(args):
    """Fill in what depends on other options, and turn lists into lists."""
    is_tinylm = args.model == "tinylm"
    default = "pydoc" if is_tinylm else "wikitext"
    args.data = args.data or default
    args.calib = args.calib or (args.data if args.data in awq.DATASETS else default)
    args.other = args.other or {"pydoc": "source", "wikitext": "pileval"}.get(args.calib, "pydoc")
    args.model = os.path.relpath(HERE / "tinylm") if is_tinylm else args.model
    names = ",".join(METHODS) if args.methods == "all" else args.methods
    args.methods = [m for m in choice_list(names, list(METHODS), "--methods") if m != "fp"]
    args.bits = [int(b) for b in choice_list(args.bits, list(map(str, awq.BITS)), "--bits")]
    args.group_sizes = integers(args.group_size, "--group-size")


def check_options(args):
    """ValueError for an option out of range or for options that do not go together."""
    for G in args.group_sizes:
        awq.check_grid(args.bits[0], G)
    awq.check_device(args.device)
    if args.study is not None and args.study not in STUDIES:
        raise ValueError(f"--study is {args.study!r}: it must be one of {', '.join(STUDIES)}")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"--json is {args.json}: its folder does not exist")
    if args.plot:
        check_plot(args.plot)
    if args.check and not args.readme:
        raise ValueError("--check without --readme: it compares the form of a README")
    if args.readme:
        find_markers(args.readme, "eval")
        used = [f"--{name}" for name in ("study", "json", "plot", "save") if getattr(args, name)]
        if used:
            raise ValueError(f"--readme with {', '.join(used)}: it makes all studies and pictures")
        if not args.check:
            check_plot("README.svg")
    for name, least in (("window", 2), ("windows", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} is {value}: it must be at least {least}"
                             f"{' tokens' if name == 'window' else ''}")
    if args.save:
        check_save(args)


def check_save(args):
    awq.check_target(args.save)
    if args.study:
        raise ValueError(f"--save {args.save} with --study: a study saves no model")
    if len(args.methods) * len(args.bits) * len(args.group_sizes) != 1:
        raise ValueError(f"--save {args.save} with methods {args.methods}, bits {args.bits} and "
                         f"groups {args.group_sizes}: it needs exactly one of each")
    if METHODS[args.methods[0]].activation_bits:
        raise ValueError(f"--save {args.save} with {args.methods[0]}: the AWQ format has no "
                         "quantised activations")


def run(args):
    """Measure and print; returns what --json writes and the panels that --plot draws."""
    bench = open_bench(args)
    print(describe(bench.setup), flush=True)
    if args.study:
        study = STUDIES[args.study](bench)
        print(f"\n{study.sentence}\n\n{markdown(study.rows)}")
        result = {"setup": bench.setup, "study": args.study, "sentence": study.sentence,
                  "rows": study.rows}
        return result, study.panels
    rows = measure_all(bench)
    print("\n" + table(rows))
    return {"setup": bench.setup, "rows": rows}, [bits_panel(rows)]


def main(argv=None):
    start = time.time()
    try:
        args = parse_arguments(argv)
        if args.readme:
            write_readme(args)
        else:
            result, panels = run(args)
            if args.json:
                partial_path = Path(f"{args.json}.partial")
                partial_path.write_text(json.dumps(result, indent=1) + "\n")
                partial_path.replace(args.json)
            if args.plot:
                draw(args.plot, panels)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{time.time() - start:.0f} s in all", file=sys.stderr)


if __name__ == "__main__":
    main()
