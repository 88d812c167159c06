"""Perplexity of full precision, RTN and AWQ, by one protocol: the same corpus, windows and seed.

    python eval.py                                        # offline: tinylm/ on text of the library
    python eval.py --model facebook/opt-125m              # hub model, WikiText-2
    python eval.py --model ./folder --data a.txt --calib b.txt --bits 4,3 --group-size 64

Protocol: the documents of the test split joined by blank lines, tokenised once, cut into
non-overlapping windows; negative log-likelihood summed over the predicted tokens (all but the first
of a window) and divided by their number. Calibration text is the train split, never the test split
(a text file has no splits: give two). stdout is the set-up and one Markdown table; progress goes to
stderr.
"""
import argparse
import json
import math
import os
import platform
import re
import sys
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import awq

HERE = Path(__file__).resolve().parent
METHODS = {     # name: (title, arguments of quantize_model); {}: rounded without calibration text
    "fp": ("full precision", None),
    "rtn": ("RTN", {}),
    "awq": ("AWQ", {"clip": True}),
    "awq-scale": ("AWQ, scale only", {"clip": False}),
    "awq-clip": ("AWQ, clipping only", {"scale": False, "clip": True}),
    "awq-grid": ("AWQ + grid refinement", {"clip": True, "refine": "grid"}),
    "awq-gradient": ("AWQ + gradient refinement", {"clip": True, "refine": "gradient"}),
}

# WikiText-2 perplexity, windows of 2048, group size 128: arXiv 2306.00978v1, Table 4 (LLaMA) and
# Table 3 (OPT, 3 bits only). {model: (full precision, RTN 3, AWQ 3, RTN 4, AWQ 4)}
PUBLISHED = {
    "llama-2-7b": (5.47, 6.66, 6.24, 5.73, 5.60),
    "llama-2-13b": (4.88, 5.52, 5.32, 4.98, 4.97),
    "llama-2-70b": (3.32, 3.98, 3.74, 3.46, 3.41),
    "llama-7b": (5.68, 7.01, 6.35, 5.96, 5.78),
    "llama-13b": (5.09, 5.88, 5.52, 5.25, 5.19),
    "llama-30b": (4.10, 4.88, 4.61, 4.23, 4.21),
    "llama-65b": (3.53, 4.24, 3.95, 3.67, 3.62),
    "opt-1.3b": (14.62, 119.47, 16.32, None, None),
    "opt-2.7b": (12.47, 298.00, 13.58, None, None),
    "opt-6.7b": (10.86, 23.54, 11.39, None, None),
    "opt-13b": (10.13, 46.04, 10.56, None, None),
    "opt-30b": (9.56, 18.80, 9.77, None, None),
}


def published(args, window, method, bits):
    """The paper's perplexity for a row of the table, or None if its protocol is another one."""
    if args.data != "wikitext" or window != 2048 or (bits != 16 and args.group_size != 128):
        return None
    name = re.sub(r"-hf$", "", str(args.model).rstrip("/").split("/")[-1].lower())
    column = {("fp", 16): 0, ("rtn", 3): 1, ("awq", 3): 2, ("rtn", 4): 3, ("awq", 4): 4}
    if name not in PUBLISHED or (method, bits) not in column:
        return None
    return PUBLISHED[name][column[method, bits]]


def load_model(name, device):
    """(model in eval mode, tokenizer); float32 on CPU, the stored dtype on CUDA."""
    dtype = "auto" if torch.device(device).type == "cuda" else torch.float32
    return awq.load_pretrained(name, dtype=dtype).eval(), awq.load_tokenizer(name)


def test_windows(data, tokenizer, window):
    """[windows, window] token ids of the test split; ValueError if they fill no window."""
    text = "\n\n".join(awq.load_documents(data, "test"))
    ids = tokenizer(text, verbose=False, return_tensors="pt").input_ids[0].long()
    if len(ids) < window:
        raise ValueError(f"--data {data} has {len(ids)} tokens: one window needs {window}")
    return ids[:len(ids) // window * window].view(-1, window)


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


def quantize(model, method, bits, tokens, args):
    """Quantise in place by one of METHODS; returns the report of awq."""
    options = METHODS[method][1]
    if not options:
        return awq.round_model(model, bits, args.group_size)
    return awq.quantize_model(model, tokens, bits, args.group_size, device=args.device, **options)


def run(args):
    """The set-up, one row (a dict) for every method and number of bits, and awq's last report."""
    model, tokenizer = load_model(args.model, args.device)
    window = awq.sequence_length(model, args.window, default=2048)
    length = awq.sequence_length(model, args.seq_len)
    windows = test_windows(args.data, tokenizer, window)
    tokens = awq.calibration_tokens(args.calib, tokenizer, args.samples, length, args.seed)
    setup = {"model": str(args.model), "parameters": sum(p.numel() for p in model.parameters()),
             "data": args.data, "windows": len(windows), "window": window,
             "bytes_per_token": bytes_per_token(windows, tokenizer), "calib": args.calib,
             "samples": len(tokens), "seq_len": tokens.shape[1], "seed": args.seed,
             "device": describe_device(args.device), "python": platform.python_version(),
             "torch": torch.__version__, "transformers": __import__("transformers").__version__}
    print(describe(setup), flush=True)
    size, _ = size_of(model)
    full = perplexity(model, windows, args.device)
    rows = [{"method": "fp", "bits": 16, "group_size": None, "bits_per_weight": 16.0, "bytes": size,
             "ppl": full, "seconds": 0.0, "published": published(args, window, "fp", 16)}]
    report = {"groups": []}
    for bits in args.bits:
        for method in args.methods:
            model, _ = load_model(args.model, args.device)
            report = quantize(model, method, bits, tokens, args)
            size, bits_per_weight = size_of(model)
            rows.append({"method": method, "bits": bits, "group_size": args.group_size,
                         "bits_per_weight": bits_per_weight, "bytes": size,
                         "ppl": perplexity(model, windows, args.device),
                         "seconds": report["seconds"],
                         "published": published(args, window, method, bits)})
    if args.save:
        awq.save_quantized(model.cpu(), args.save, tokenizer)
    return {"setup": setup, "rows": rows}, report


def describe_device(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def describe(setup):
    """The set-up in one line."""
    return (f"{setup['model']}, {setup['parameters'] / 1e6:.1f} M parameters; test text "
            f"{setup['data']}, {setup['windows']} windows of {setup['window']}, "
            f"{setup['bytes_per_token']:.2f} bytes a token; calibration "
            f"{setup['calib']}, {setup['samples']} x {setup['seq_len']} tokens, seed "
            f"{setup['seed']}; {setup['device']}; Python {setup['python']}, torch "
            f"{setup['torch']}, transformers {setup['transformers']}")


def table(rows):
    """The rows as a Markdown table."""
    lines = []
    show_published = any(row["published"] for row in rows)
    lines.append("| method | bits | group | bits/weight | size | perplexity | difference "
                 "| RTN's loss recovered | seconds |" + (" paper |" if show_published else ""))
    lines.append("|---|---|---|---|---|---|---|---|---|" + ("---|" if show_published else ""))
    full = rows[0]["ppl"]
    for row in rows:
        rtn = [r["ppl"] - full for r in rows if r["method"] == "rtn" and r["bits"] == row["bits"]]
        difference = row["ppl"] - full
        hurt = row["method"] != "rtn" and rtn and rtn[0] > 0
        recovered = f"{1 - difference / rtn[0]:.0%}" if hurt else ""
        cells = [METHODS[row["method"]][0], row["bits"], row["group_size"] or "",
                 f"{row['bits_per_weight']:.2f}" if row["bits_per_weight"] else "",
                 f"{row['bytes'] / 1e6:.1f} MB", f"{row['ppl']:.3f}",
                 f"{difference:+.3f}" if row["method"] != "fp" else "", recovered,
                 f"{row['seconds']:.1f}" if row["method"] != "fp" else ""]
        if show_published:
            cells.append(row["published"] or "")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def alpha_chart(report):
    """Mermaid chart of loss over alpha, for the layers of a report that scaling helps most."""
    def unclipped(line):
        return [loss for _, clipped, loss in line["curve"] if not clipped]
    line = min((line for line in report["groups"] if line["loss_rtn"]),
               key=lambda line: min(unclipped(line)) / line["loss_rtn"])
    curves = [[f"{loss / line['loss_rtn']:.3f}" for _, clipped, loss in line["curve"]
               if clipped is which] for which in (False, True)]
    alphas = [f"{alpha:.2f}" for alpha, clipped, _ in line["curve"] if not clipped]
    lines = [f"Loss of {', '.join(line['layers'])} over alpha, INT{report['bits']}, in units of "
             "RTN's (alpha = 0): scale alone (upper line), scale with clipping (lower line). "
             f"Chosen: alpha = {line['alpha']:.2f}, {line['loss'] / line['loss_rtn']:.3f}.", "",
             "```mermaid",
             "xychart-beta", f"    x-axis \"alpha\" [{', '.join(alphas)}]",
             "    y-axis \"loss / RTN's loss\""]
    lines += [f"    line [{', '.join(curve)}]" for curve in curves if curve]
    return "\n".join([*lines, "```"])


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


def choice_list(text, valid, what):
    """The items of a comma-separated option; ValueError names what is not valid."""
    items = list(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))
    unknown = [item for item in items if item not in valid]
    if unknown or not items:
        raise ValueError(f"{what} is {text!r}: it must be a comma-separated list of "
                         f"{', '.join(valid)}")
    return items


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="tinylm", help="hub name or folder (the tinylm of this repository)")
    add("--data", help="test text: wikitext, pydoc, a text file (pydoc for tinylm, else wikitext)")
    add("--calib", help=f"calibration text: {', '.join(awq.DATASETS)} or a text file (as --data)")
    add("--methods", default="rtn,awq", help=f"comma-separated: {', '.join(METHODS)}")
    add("--bits", default="4,3", help="comma-separated: 2, 3, 4, 8")
    add("--group-size", type=int, default=128, help="-1: one group a row")
    add("--samples", type=int, default=128, help="calibration samples")
    add("--seq-len", type=int, help="tokens a calibration sample (512)")
    add("--window", type=int, help="tokens a test window (2048, or the model's positions)")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--save", metavar="DIR", help="save the quantised model; needs one method and one --bits")
    add("--json", metavar="FILE", help="write the set-up and the rows as JSON")
    add("--readme", metavar="FILE", help="write table and chart between the markers of a README")
    args = parser.parse_args(argv)
    is_tinylm = args.model == "tinylm"
    default = "pydoc" if is_tinylm else "wikitext"
    args.data = args.data or default
    args.calib = args.calib or (args.data if args.data in awq.DATASETS else default)
    args.model = os.path.relpath(HERE / "tinylm") if is_tinylm else args.model
    args.methods = [m for m in choice_list(args.methods, list(METHODS), "--methods") if m != "fp"]
    args.bits = [int(b) for b in choice_list(args.bits, list(map(str, awq.BITS)), "--bits")]
    awq.check_grid(args.bits[0], args.group_size)
    awq.check_device(args.device)
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"--json is {args.json}: its folder does not exist")
    if args.readme:
        find_markers(args.readme, "eval")
        find_markers(args.readme, "alpha")
    if args.window is not None and args.window < 2:
        raise ValueError(f"--window is {args.window}: a window needs at least 2 tokens")
    if args.save:
        awq.check_target(args.save)
        if len(args.methods) * len(args.bits) != 1:
            raise ValueError(f"--save {args.save} with methods {args.methods} and bits {args.bits}"
                             ": it needs exactly one of each")
    return args


def main(argv=None):
    start = time.time()
    try:
        args = parse_arguments(argv)
        result, report = run(args)
        print("\n" + table(result["rows"]))
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
        if args.readme:
            text = describe(result["setup"]) + "\n\n" + table(result["rows"])
            write_between_markers(args.readme, "eval", text)
            if report["groups"]:
                write_between_markers(args.readme, "alpha", alpha_chart(report))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{time.time() - start:.0f} s in all", file=sys.stderr)


if __name__ == "__main__":
    main()
