"""Against AutoAWQ 0.2.9 on a CPU: seconds of the whole processes, and the loss of every layer.

    AUTOAWQ_PYTHON=python_with_autoawq python tests/compare_autoawq.py --layers 1

A random float32 LLaMA and random tokens; 4 bits, groups of 128. One process after the other loads
the model, quantises it and saves it, with the same number of threads. AutoAWQ is given two changes:
the tokens, in place of its data set, and a real backup of the weights before its grid (its own is
no copy on a CPU, where every candidate would then start from the last one's weights).

The loss of a layer is Eq. 4 in units of the model as it came: || E X^T ||^2 / T with
E = diag(r) W_hat diag(1/s) - W, X the inputs in full precision, r the s that the layer's rows were
divided by for the next one. Layers with one input are one line.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
GROUPS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
          ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
READS = {"self_attn.v_proj": GROUPS[1], "mlp.up_proj": GROUPS[3]}   # who reads a layer's rows


def run_autoawq(folder):
    """In AutoAWQ's interpreter: folder/model to folder/autoawq; scales.pt: {layers: s} a block."""
    from awq import AutoAWQForCausalLM
    from awq.quantize import quantizer

    tokens = torch.load(folder / "tokens.pt")
    quantizer.get_calib_dataset = lambda **_: [row[None] for row in tokens]
    search, apply_scale = quantizer.AwqQuantizer._compute_best_scale, quantizer.apply_scale
    scales = []

    def with_backup(self, x, w_mean, x_mean, module2inspect, *rest, **kwargs):
        plain = module2inspect.state_dict
        module2inspect.state_dict = lambda: {name: t.clone() for name, t in plain().items()}
        try:
            return search(self, x, w_mean, x_mean, module2inspect, *rest, **kwargs)
        finally:
            del module2inspect.state_dict

    def recorded(module, found, **kwargs):
        scales.append({tuple(layers): s.clone() for _, layers, s in found})
        return apply_scale(module, found, **kwargs)

    quantizer.AwqQuantizer._compute_best_scale, quantizer.apply_scale = with_backup, recorded
    model = AutoAWQForCausalLM.from_pretrained(
        str(folder / "model"), torch_dtype=torch.float32, use_cache=False, safetensors=True,
        device_map=None, low_cpu_mem_usage=False)
    model.quantize(None, max_calib_samples=len(tokens), max_calib_seq_len=tokens.shape[1],
                   quant_config={"zero_point": True, "q_group_size": 128, "w_bit": 4,
                                 "version": "GEMM"})
    model.save_quantized(str(folder / "autoawq"))
    torch.save(scales, folder / "autoawq" / "scales.pt")


def run_ours(folder):
    """folder/model to folder/ours, with the same scales.pt and the seconds of the stages."""
    import awq
    model = awq.load_pretrained(folder / "model")
    report = awq.quantize_model(model, torch.load(folder / "tokens.pt"), 4, 128)
    awq.save_quantized(model, folder / "ours")
    scales = [{} for _ in model.model.layers]
    for line in report["groups"]:
        layers = tuple(name.split(f".{line['block']}.", 1)[1] for name in line["layers"])
        scales[line["block"]][layers] = line["s"]
    torch.save(scales, folder / "ours" / "scales.pt")
    (folder / "stages.json").write_text(json.dumps(report["stages"]))


def layer_loss(tensors, prefix, layers, scales, W, C):
    """The loss, as above, of the layers in a checkpoint; W [N, K], C [K, K] float64."""
    import awq
    rows = []
    for name in layers:
        part = {key: tensors[f"{prefix}{name}.{key}"] for key in ("qweight", "qzeros", "scales")}
        N = part["scales"].shape[1]
        q, zero = (awq.unpack(part[key], 4, N).T.contiguous() for key in ("qweight", "qzeros"))
        W_hat = awq.dequantize(q, part["scales"].T, zero).double()
        r = scales.get(READS.get(name))
        rows.append(W_hat if r is None else W_hat * r.double()[:, None])
    return awq.gram_loss(torch.cat(rows) / scales[layers].double() - W, C).item()


@torch.no_grad()
def compare(folder):
    """One line a group of layers: both losses as parts of plain rounding's."""
    import awq
    from safetensors.torch import load_file
    model, tokens = awq.load_pretrained(folder / "model"), torch.load(folder / "tokens.pt")
    names = ("autoawq", "ours")
    tensors = [load_file(next((folder / name).glob("*.safetensors"))) for name in names]
    scales = [torch.load(folder / name / "scales.pt") for name in names]
    calls = [awq.record_calls(model, model.model.layers[:1], part)[0] for part in tokens.split(8)]
    lines = []
    for index, block in enumerate(model.model.layers):
        groups = [awq.Group(layers, None) for layers in GROUPS]
        for layers, seen in zip(GROUPS, awq.collect_statistics(block, groups, calls)[0]):
            C = seen.C.double()
            W = torch.cat([block.get_submodule(name).weight for name in layers])
            rtn = awq.gram_loss((awq.fake_quantize(W, 4, 128) - W).double(), C).item()
            lines.append((f"{index}: {', '.join(layers)}", *(
                layer_loss(t, f"model.layers.{index}.", layers, s[index], W.double(), C) / rtn
                for t, s in zip(tensors, scales))))
        calls = [call.with_hidden(awq.run_block(block, call)) for call in calls]
    return lines


def make_model(folder, args):
    """A random LLaMA in folder/model, random tokens in folder/tokens.pt."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=args.hidden, intermediate_size=args.mlp, vocab_size=8192,
                         num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64,
                         max_position_embeddings=2048)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    torch.save(torch.randint(8192, (args.samples, args.length)), folder / "tokens.pt")


def run_process(role, folder):
    """Seconds of the whole process of a role."""
    # -I keeps this repository's awq.py off the path: AutoAWQ's package is called awq as well
    python = [os.environ["AUTOAWQ_PYTHON"], "-I"] if role == "autoawq" else [sys.executable]
    start = time.time()
    subprocess.run([*python, __file__, "--role", role, "--folder", folder], check=True,
                   env={**os.environ, "CUDA_VISIBLE_DEVICES": "",
                        "OMP_NUM_THREADS": str(torch.get_num_threads())})
    return time.time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--mlp", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--role", choices=["autoawq", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role != "autoawq":
        sys.path.insert(0, str(ROOT))
    if args.role:
        return {"autoawq": run_autoawq, "ours": run_ours}[args.role](args.folder)
    if "AUTOAWQ_PYTHON" not in os.environ:
        parser.error("AUTOAWQ_PYTHON must name an interpreter with autoawq 0.2.9 (see the tests of "
                     "tests/test_checkpoint.py for how to install it)")
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), args)
        seconds = {role: run_process(role, folder) for role in ("ours", "autoawq")}
        stages = json.loads(Path(folder, "stages.json").read_text())
        lines = compare(Path(folder))
    print(f"hidden size {args.hidden}, MLP {args.mlp}, {args.layers} layers, {args.samples} x "
          f"{args.length} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| whole process | seconds |\n|---|---|")
    print(f"| AutoAWQ 0.2.9 | {seconds['autoawq']:.1f} |\n| awq.py | {seconds['ours']:.1f} |")
    print(f"\nratio {seconds['autoawq'] / seconds['ours']:.1f}; awq.py: " + ", ".join(
        f"{name} {value:.1f}" for name, value in stages.items()))
    print("\n| loss / RTN's | AutoAWQ | awq.py |\n|---|---|---|")
    for name, theirs, ours in lines:
        print(f"| {name} | {theirs:.3f} | {ours:.3f} |")
    print(f"\nawq.py is lower in {sum(ours < theirs for _, theirs, ours in lines)} of {len(lines)}")


if __name__ == "__main__":
    main()
