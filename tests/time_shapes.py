"""Seconds of each stage, and peak memory, of quantising a LLaMA shape with random weights.

    python tests/time_shapes.py 7b                  # float16 in CPU memory, blocks on the GPU
    python tests/time_shapes.py 70b --layers 1      # one block, and what all 80 would take

4 bits, groups of 128, alpha and clipping searched together. Blocks are copies of one: no stage's
time depends on the values of the weights.
"""
import argparse
import copy
import resource
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import awq

# hidden size, MLP, heads, key and value heads, layers
SHAPES = {"tiny": (256, 768, 4, 2, 4), "1b": (2048, 5632, 32, 4, 22),
          "7b": (4096, 11008, 32, 32, 32), "13b": (5120, 13824, 40, 40, 40),
          "70b": (8192, 28672, 64, 8, 80)}


def random_llama(hidden, mlp, heads, kv_heads, layers, dtype):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads,
        num_key_value_heads=kv_heads, num_hidden_layers=1, vocab_size=32000,
        max_position_embeddings=4096, dtype=dtype)
    model = LlamaForCausalLM(config).to(dtype).eval()
    blocks = model.model.layers
    for index in range(1, layers):
        blocks.append(copy.deepcopy(blocks[0]))
        blocks[index].self_attn.layer_idx = index
    config.num_hidden_layers = layers
    return model


def host_mib():
    """The most memory that this process has held, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer blocks than the shape has")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile the search of the clipping (elementwise passes fused)")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    *sizes, every = SHAPES[args.shape]
    layers = args.layers or every
    if args.compile:
        awq.search_rows = torch.compile(awq.search_rows, dynamic=True)
    model = random_llama(*sizes, layers, getattr(torch, args.dtype))
    tokens = torch.randint(32000, (args.samples, args.length))
    size, loaded = sum(p.nbytes for p in model.parameters()) / 2 ** 20, host_mib()
    report = awq.quantize_model(model, tokens, 4, 128, device=args.device,
                                batch_size=args.batch_size)
    on_gpu = args.device.startswith("cuda")
    name = torch.cuda.get_device_name(args.device) if on_gpu else "CPU"
    print(f"{args.shape}, {layers} of {every} blocks, {args.dtype}, {args.samples} x {args.length} "
          f"tokens{', compiled search' * args.compile}; {name}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}\n")
    print("| stage | seconds | a block |\n|---|---|---|")
    for stage, seconds in [*report["stages"].items(), ("all", report["seconds"])]:
        print(f"| {stage} | {seconds:.1f} | {seconds / layers:.2f} |")
    if layers < every:      # equal blocks are planned once
        plan = report["stages"]["plan"]
        seconds = plan + (report["seconds"] - plan) / layers * every
        print(f"\n{every} blocks at this rate: {seconds:.0f} s")
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(args.device)
        print(f"\npeak device memory {peak / 2 ** 20:.0f} MiB")
    print(f"\nhost memory: model {size:.0f} MiB, peak when made {loaded:.0f}, peak in all "
          f"{host_mib():.0f}")


if __name__ == "__main__":
    main()
