"""AWQ: Activation-aware Weight Quantization (Lin et al., arXiv 2306.00978).

Rounding a weight w of a group with step delta makes an error of about delta / 4, whatever w is, and
the output an error of delta / 4 times the activation x. AWQ multiplies the input channels of W that
see large x by s before rounding and divides x by s, which changes nothing else:

    (W diag(s)) (diag(1/s) x) = W x

As long as such a channel does not set its group's maximum, delta stays and its error falls by s
(Section 3.2, Eq. 1-3; there the range is symmetric, here asymmetric, as in AWQ's checkpoints). How
far to go is searched, with X in rows, so that Y = X W^T:

    L(s) = || Q(W diag(s)) diag(1/s) X^T - W X^T ||_F^2 / T        (Eq. 4, squared and per token)
    s = s_X^alpha,  alpha* = argmin L over alpha = 0, 0.05, ..., 1                        (Eq. 5)

1/s costs nothing at inference: it is folded into the norm or the Linear that made x.

    code        symbol       what it is                                                where
    W           W            [N, K] weight: N outputs, K inputs                        Eq. 1
    X           X            [T, K] calibration inputs, a row a token (a column there) Eq. 4
    s_X         s_X          [K] mean over tokens of |X|, the score of a channel       Eq. 5
    s           s            [K] AWQ's channel scale (nothing else is called s)        Eq. 2
    alpha       alpha        exponent; alpha = 0 is s = 1, as in plain rounding (RTN)  Eq. 5
    delta       Delta        [N, K/G] step of a group, stored as float16               Eq. 1
    zero        -            [N, K/G] integer zero point                               (format)
    q           Round(.)     [N, K] integers in [0, 2^bits - 1]                        Eq. 1
    W_hat, Q    Q(w)         [N, K] what they stand for, (q - zero) delta              Eq. 1
    G           -            channels of a row that share a step and a zero point (128 there)
    C           -            [K, K] Gram matrix X^T X / T (GPTQ's Hessian, but for a factor)
    keep        -            [2, N, K/G] clipping: the part kept of a group's lower, upper end

L(s) needs no activations once C is known: with E = Q(W diag(s)) diag(1/s) - W,

    || E X^T ||_F^2 / T = sum((E C) * E)

so a candidate costs N K K multiply-adds whatever the number of tokens, and uses every token.

The method trains nothing and moves no weight; activations, embeddings and lm_head stay as they are,
and there is no table of architectures. To read this file: the method, up to the line that marks its
end, needs torch alone and can be pasted; then quantize_model and, upwards from it, what it calls.
"""
from typing import NamedTuple

import torch

# ---- Quantize and dequantize ---------------------------------------------------------------------


def group_range(W, G, keep=(1, 1)):
    """Both ends of every group of W [N, K] float32, 0 between them, times keep: two [N, K/G]."""
    # not in the paper: without the widening to 0 a group whose weights share a sign collapses,
    # because the zero point is clamped.
    groups = W.unflatten(-1, (-1, G))                       # [N, K/G, G]
    return groups.amin(-1).clamp(max=0) * keep[0], groups.amax(-1).clamp(min=0) * keep[1]


def grid(low, high, bits):
    """delta and zero, float32, of ranges [..., K/G] that are cut into 2^bits - 1 steps."""
    # not in the paper: delta is rounded to float16, as stored, before it is used.
    delta = ((high - low) / (2 ** bits - 1)).half().float()
    return delta, (-low / delta.where(delta > 0, 1)).round().clamp(0, 2 ** bits - 1)


def round_to_grid(W, delta, zero, bits):
    """q = clamp(round(W / delta) + zero, 0, 2^bits - 1), float32 [..., N, K]; zero if delta = 0.

    delta and zero [..., N, K/G]: one grid for W [N, K], or several at once.
    """
    groups = W.unflatten(-1, (delta.shape[-1], -1)) / delta.where(delta > 0, torch.inf)[..., None]
    return groups.round_().add_(zero[..., None]).clamp_(0, 2 ** bits - 1).flatten(-2)


def dequantize(q, delta, zero):
    """W_hat = (q - zero) delta, float32 [..., N, K]: exact, 8 significant bits times 11."""
    groups = q.unflatten(-1, (delta.shape[-1], -1)).float()
    return (groups - zero[..., None].float()).mul_(delta[..., None].float()).flatten(-2)


def group_length(K, bits, group_size):
    """Channels in a group of K (all if group_size is -1); ValueError for what is out of range."""
    if type(bits) is not int or bits not in (2, 3, 4, 8):
        raise ValueError(f"bits is {bits!r}: it must be one of 2, 3, 4, 8")
    G = K if group_size == -1 else group_size
    if type(group_size) is not int or G < 1 or K % G:
        raise ValueError(f"group_size is {group_size!r}: it must be -1 or divide the {K} inputs")
    return G


def quantize(W, bits=4, group_size=128, keep=(1, 1)):
    """Round W [N, K] to integers: (q [N, K] uint8, delta [N, K/G] float16, zero [N, K/G] uint8).

    Asymmetric, in groups of group_size along K (-1: one group a row), as in the AWQ checkpoint
    format. keep: the part of the lower and upper end of each group's range, numbers or [2, N, K/G].
    An all-zero group comes back as exactly 0, and so does one whose step is 0 in float16 (3e-8).
    ValueError for bits, group_size or shape out of range, NaN or Inf in W, a step above 65504.

    >>> W = torch.tensor([[-1.0, 0.0, 0.5, 2.0]])     # 2 bits: delta = 3 / 3, zero = round(1 / 1)
    >>> q, delta, zero = quantize(W, bits=2, group_size=4)
    >>> q.tolist(), delta.tolist(), zero.tolist()     # 0.5 / delta is a tie and rounds to even
    ([[0, 1, 1, 3]], [[1.0]], [[1]])
    >>> dequantize(q, delta, zero).tolist()
    [[-1.0, 0.0, 0.0, 2.0]]
    """
    if W.ndim != 2 or W.numel() == 0:
        raise ValueError(f"W has shape {tuple(W.shape)}: it must be [N, K], not empty")
    G = group_length(W.shape[1], bits, group_size)
    delta, zero = grid(*group_range(W.float(), G, keep), bits)
    if not delta.isfinite().all():
        raise ValueError("W contains NaN or Inf, or a group's range exceeds float16 steps: the "
                         "weights must be finite and their step at most 65504")
    q = round_to_grid(W.float(), delta, zero, bits)
    return q.to(torch.uint8), delta.half(), zero.to(torch.uint8)


def Q(W, bits, G, keep=(1, 1)):
    """W [N, K] float32 as it comes back from rounding: quantize and dequantize at once."""
    delta, zero = grid(*group_range(W, G, keep), bits)
    return dequantize(round_to_grid(W, delta, zero, bits), delta, zero)


# ---- Pack: the words of the AWQ GEMM format ------------------------------------------------------

NIBBLE_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)     # nibble i of a word holds column 8 c + NIBBLE_ORDER[i]


def pack(q, bits=4):
    """Integers [R, N] in [0, 2^bits - 1] to int32 words [R, N/8] (4 bits), N a multiple of 8.

    Nibble i (bits 4i..4i+3) of word c holds column 8 c + NIBBLE_ORDER[i]. 2, 3 and 8 bits, which
    that format does not have: 32 values in `bits` words, a little-endian stream, zeros appended.
    """
    if bits != 4:
        q = torch.nn.functional.pad(q, (0, -q.shape[1] % 32))
    values = q.long().unflatten(1, (-1, 8))                         # [R, N/8, 8]: `bits` bytes
    if bits == 4:
        values = values[..., NIBBLE_ORDER]
    octets = (values << bits * torch.arange(8, device=q.device)).sum(-1, keepdim=True)
    return octets.view(torch.uint8)[..., :bits].flatten(1).contiguous().view(torch.int32)


# ---- What the search needs to know of X ----------------------------------------------------------


class InputStatistics:
    """s_X [K] and C [K, K] of a layer's input, summed in float32 over micro-batches."""

    def __init__(self):
        self.tokens, self.absolute_sum, self.square_sum = 0, 0, 0

    def update(self, X):
        X = X.flatten(0, -2).float()                        # [T, K]
        self.tokens += len(X)
        self.absolute_sum += X.abs().sum(0)
        self.square_sum += X.T @ X

    @property
    def s_X(self):
        return self.absolute_sum / self.tokens

    @property
    def C(self):
        return self.square_sum / self.tokens


# ---- The search ----------------------------------------------------------------------------------


def channel_scale(s_X, alpha):
    """s = s_X^alpha  (Eq. 5), [K]."""
    # not in the paper: dead channels count as 1e-4 of the largest, so that 1/s stays finite (its
    # code does that to s).
    s = s_X.clamp(min=s_X.max().item() * 1e-4 or 1.0) ** alpha
    # not in the paper, but in its code: max(s) min(s) = 1. A common factor cancels in Q(c W) / c;
    # this one keeps delta and the folded gain within float16.
    return s / (s.max() * s.min()).sqrt()


def output_error(E, C):
    """|| E X^T ||_F^2 / T of an error E [N, K] of the weights: the outputs' error, squared."""
    return ((E @ C) * E).sum().item()


def loss(W, C, s, bits, G, keep=(1, 1)):
    """L(s) = || Q(W diag(s)) diag(1/s) X^T - W X^T ||_F^2 / T  (Eq. 4)."""
    return output_error(Q(W * s, bits, G, keep) / s - W, C)


# Parts of a group's range to keep, as search_clipping tries them: of both ends alike (few, because
# every alpha pays for them), then of the lower and of the upper end on its own.
COARSE = [([0, 1], [0.9, 0.8, 0.7, 0.55])]
FINE = [([end], [1 - i / 80 for i in range(1, 41)]) for end in (0, 1)]


def search_clipping(W, C, bits, G, steps, keep):
    """Per row and group, the keep with the least e C_gg e^T, C_gg the group's own block of C.

    That is the output's error if all other groups were exact: what couples two of them is left to
    the loss. W [N, K] and C: already times s and 1 / (s s^T). keep, to begin with, and the result:
    [2, N, K/G].
    """
    # not in the paper, whose code has one factor for both ends, a sample of tokens, not q and k.
    own = torch.stack([C[g:g + G, g:g + G] for g in range(0, len(C), G)])           # [K/G, G, G]
    elements = 2 ** 19 if W.device.type == "cpu" else 2 ** 26       # at a time: what a cache holds
    for ends, parts in steps:
        rows = max(1, elements // (len(C) * (1 + len(parts))))
        keep = torch.cat([best_parts(W_r, own, bits, ends, parts, keep_r)
                          for W_r, keep_r in zip(W.split(rows), keep.split(rows, dim=1))], dim=1)
    return keep


def best_parts(W, own, bits, ends, parts, keep):
    """keep with the best of P parts, or as it is, at the given ends of each group. [2, N, K/G]"""
    trials = keep[:, None].repeat(1, 1 + len(parts), 1, 1)                  # [2, P + 1, N, K/G]
    trials[ends, 1:] = W.new_tensor(parts)[:, None, None]
    delta, zero = grid(*group_range(W, own.shape[-1], trials), bits)        # [P + 1, N, K/G]
    E = dequantize(round_to_grid(W, delta, zero, bits), delta, zero).sub_(W)
    E = E.unflatten(-1, own.shape[:2]).movedim(-2, 0).flatten(1, 2)         # [K/G, (P + 1) N, G]
    errors = (E @ own).mul_(E).sum(-1).view(len(own), -1, len(W))           # [K/G, P + 1, N]
    best = errors.argmin(1).T.expand(2, 1, -1, -1)      # which trial: one for both ends of a group
    return trials.gather(1, best)[:, 0]


class Settings(NamedTuple):
    """How to quantize."""

    bits: int = 4
    group_size: int = 128
    clip: bool = True                   # search the clipping; if not, keep is 1
    scale: bool = True                  # search s; if not, s is 1
    # The rest is for quantize_model, below.
    rounding: object = None             # a function of rounding.py; None: to nearest
    sequential: bool = False            # blocks see what the quantized blocks before them make
    tuned: bool = False                 # and last, move the integers of a block by gradient


class Scaling(NamedTuple):
    """A choice for the layers that share an input."""

    loss: float                         # L(s), summed over the layers
    alpha: float
    s: torch.Tensor                     # [K]
    keeps: list                         # of each layer, [2, N, K/G]


def search_scale(weights, C, s_X, how):
    """argmin L over alpha (Eq. 5), the clipping searched at every alpha: three results.

    weights: of the layers that share the input, each [N, K]. Returns the best Scaling, that of RTN,
    which is among what is compared, and [(alpha, loss)] of all (without the finer clipping).
    """
    # not in the paper: there alpha is chosen first and the range clipped afterwards.
    bits, G = how.bits, group_length(len(C), how.bits, how.group_size)
    whole = [C.new_ones(2, len(W), len(C) // G) for W in weights]

    def tried(alpha, s, keeps, steps=()):
        if steps:
            C_s = C / (s[:, None] * s)                      # of X diag(1/s), which W diag(s) reads
            keeps = [search_clipping(W * s, C_s, bits, G, steps, keep)
                     for W, keep in zip(weights, keeps)]
        total = sum(loss(W, C, s, bits, G, keep) for W, keep in zip(weights, keeps))
        return Scaling(total, alpha, s, keeps)

    best = rtn = tried(0.0, torch.ones_like(s_X), whole)
    alphas = [i / 20 for i in range(21)] if how.scale else [0.0]
    curve = []
    for alpha in alphas:
        choice = tried(alpha, channel_scale(s_X, alpha), whole, COARSE if how.clip else ())
        best = min(best, choice, key=lambda choice: choice.loss)
        curve.append((alpha, choice.loss))
    if how.clip:    # then each end on its own and finer, which costs too much for every alpha
        finer = tried(best.alpha, best.s, best.keeps, FINE)
        best = min(best, finer, key=lambda choice: choice.loss)
    return best, rtn, curve


# ==== Here the method ends: all above needs torch alone. What follows makes a product of it. ======

import argparse
import os
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import blocks
from checkpoint import (check_device, check_plain, check_target, checkpoint_config, hub_names,
                        load_pretrained, load_quantized, load_tokenizer, register, save_quantized)
from kernel import AWQLinear
from rounding import descend, gptq, shrunk, tune

# ---- A group: search s, fold it, round -----------------------------------------------------------


class Work(NamedTuple):
    """A block that is being quantized, and what its groups need."""

    block: nn.Module
    path: str                           # the block's name in the model
    few_call: blocks.Call               # its arguments on a few tokens, to check every fold on
    few_hidden: torch.Tensor            # hidden states of that size: those of the first block
    tokens: int                         # of the calibration set
    full: list | None = None            # for tuning: the hidden states in full precision, of which
                                        # every block makes, in place, those of the next


def quantize_group(work, group, statistics, how):
    """Search s for the Linears of a group, fold it, round: (report, {layer: (q, delta, zero)}).

    The Linears hold W diag(s) afterwards. ValueError for NaN or Inf, or a step above float16.
    """
    # 1. The weights that share the input, and what is known of it.
    names = [f"{work.path}.{name}" for name in group.layers]
    weights = [work.block.get_submodule(name).weight for name in group.layers]
    K = weights[0].shape[1]
    reason = group.reason if how.scale else "scale is False"
    how = how._replace(scale=bool(group.fold) and how.scale)
    too_few = statistics.tokens < min(group_length(K, how.bits, how.group_size), work.tokens)
    if too_few:
        reason = (f"{statistics.tokens} of {work.tokens} calibration tokens: too few, plain "
                  "rounding")
        s_X = torch.zeros(K, dtype=torch.float32, device=weights[0].device)
        C = s_X.new_zeros(K, K)
        how = how._replace(scale=False, clip=False, rounding=None)
    else:
        C, s_X = statistics.C, statistics.s_X
        if not C.isfinite().all():
            raise ValueError(f"the input of {names[0]} contains NaN or Inf")
    # 2. s and the clipping.
    if how.scale:
        s_X = mean_over_readers(s_X, group.fold.rows)
    best, rtn, curve = search_scale(weights, C, s_X, how)
    # 3. W diag(s) to integers; what it reads is now X diag(1/s).
    integers = [quantize_layer(name, W * best.s, how, keep)
                for name, W, keep in zip(names, weights, best.keeps)]
    if how.rounding:
        integers = round_together([W * best.s for W in weights], integers,
                                  C / (best.s[:, None] * best.s), statistics.tokens, how)
    total = sum(output_error(dequantize(*i) / best.s - W, C) for i, W in zip(integers, weights))
    # 4. 1/s into the producer, s into the Linears, which changes these weights in place.
    if how.scale:
        fold(work, group, best.s)
    return {"layers": names, "reason": reason, "alpha": best.alpha, "loss_rtn": rtn.loss,
            "folded_into": f"{work.path}.{group.fold.producer}" if how.scale else None,
            "fold": group.fold.kind if how.scale else None, "loss": total, "s": best.s.cpu(),
            "curve": [(alpha, how.clip, loss) for alpha, loss in curve]
            }, dict(zip(group.layers, integers))


def round_together(weights, integers, C, tokens, how):
    """how.rounding of the weights of a group as one matrix: what it makes of C, it makes once.

    rounding.py's functions are given C shrunk; a function of the caller's has C as it is.
    """
    rows = [len(W) for W in weights]
    if how.rounding in ROUNDINGS.values():
        C = shrunk(C, tokens)
    delta, zero = (torch.cat(part) for part in list(zip(*integers))[1:])
    q, delta, zero = how.rounding(torch.cat(weights), delta, zero, how.bits, C)
    if not (q.dtype == zero.dtype == torch.uint8 and q.shape == (sum(rows), len(C))
            and delta.isfinite().all() and max(q.max().item(), zero.max().item()) < 2 ** how.bits):
        raise ValueError(f"rounding {how.rounding} gave q {q.dtype} {tuple(q.shape)}: it must give "
                         "q and zero as uint8 below 2^bits, and finite steps delta")
    return list(zip(q.split(rows), delta.split(rows), zero.split(rows)))


def quantize_layer(name, W, how, keep=(1, 1)):
    """quantize, whose ValueError then names the layer."""
    try:
        return quantize(W, how.bits, how.group_size, keep)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def mean_over_readers(s_X, rows):
    """s_X averaged over the input channels that one producer row makes. [K]"""
    # not in the paper: with grouped queries v's rows are read by several heads, so s is shared.
    sums = rows.bincount(s_X.cpu().double())        # on a CPU: there in the same order every time
    return (sums / rows.bincount().clamp(min=1))[rows].to(s_X)


FOLD_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def fold(work, group, s):
    """(W diag(s)) (diag(1/s) x) = W x: 1/s to the producer, s to the layers, the proof once more.

    ValueError if what the block adds to most of a few tokens changes.
    """
    before = blocks.replay(work.block, work.few_call, work.few_hidden).float()
    blocks.divide_output(work.block, group.fold, s)
    blocks.multiply_inputs(work.block, group.layers + group.kept, s)
    after = blocks.replay(work.block, work.few_call, work.few_hidden).float()
    dtype = work.block.get_submodule(group.layers[0]).weight.dtype
    if not (before.isfinite().all() and after.isfinite().all()):
        raise ValueError(f"the output of {work.path} contains NaN or Inf in {dtype}: its weights "
                         "or activations exceed that range")
    # The median token: one of which two experts were about to be chosen may now have the other.
    added = (before - work.few_hidden.float()).norm(dim=-1).clamp(min=1e-30)
    error = ((after - before).norm(dim=-1) / added).median()
    if error > FOLD_TOLERANCE[dtype]:
        raise ValueError(f"folding s into {work.path}.{group.fold.producer} changed what the block "
                         f"adds by {error:.2%}: it does not behave as the one it was proven on")


# ---- A block -------------------------------------------------------------------------------------


def collect_statistics(block, groups, calls, hidden):
    """(InputStatistics of every group, the block's outputs) of all micro-batches of hidden states.

    Under torch.distributed the statistics are those of all ranks' samples.
    """
    statistics = [InputStatistics() for _ in groups]
    with ExitStack() as hooks:
        for group, entry in zip(groups, statistics):
            reader = block.get_submodule(group.reader)
            hooks.enter_context(reader.register_forward_pre_hook(
                lambda _, args, kwargs, entry=entry: entry.update((*args, *kwargs.values())[0]),
                with_kwargs=True))
        outputs = [blocks.replay(block, call, x) for call, x in zip(calls, hidden)]
    if ranks()[1] > 1:
        for group, entry in zip(groups, statistics):
            add_over_ranks(entry, block.get_submodule(group.layers[0]).weight)
    return statistics, outputs


def quantize_block(work, groups, calls, hidden, how, clock):
    """(lines of the report, in the order the groups run; what the next block is given) of a block.

    calls, hidden: the block's arguments and hidden states, an entry for each micro-batch.
    """
    # 1. One pass for the statistics of all inputs and the outputs.
    if how.tuned:
        work.full[:] = [blocks.replay(work.block, *pair) for pair in zip(calls, work.full)]
    statistics, outputs = collect_statistics(work.block, groups, calls, hidden)
    clock.lap("statistics")
    # 2. Search, fold, round.
    # not in the paper: last group first, since a fold changes rows of an earlier group, which is
    # then searched and packed as it will be stored.
    lines, integers = [], {}
    for group, entry in reversed(list(zip(groups, statistics))):
        line, found = quantize_group(work, group, entry, how)
        lines.insert(0, line)
        integers |= found
    if how.tuned:
        integers = tune_block(work, integers, calls, hidden, how)
        # of the block the error has fallen, of a single layer it may have risen
        for line, group, entry in zip(lines, groups, statistics):
            line["loss"] = stored_loss(work, group, entry, line["s"], integers)
    # 3. The packed layers take their places.
    if how.sequential:
        for name, found in integers.items():
            work.block.get_submodule(name).weight.copy_(dequantize(*found))
        outputs = [blocks.replay(work.block, *pair) for pair in zip(calls, hidden)]
    pack_block(work.block, integers, how.bits)
    if not all(output.isfinite().all() for output in outputs):
        raise ValueError(f"the output of {work.path} contains NaN or Inf")
    clock.lap("search")
    return lines, outputs


def tune_block(work, integers, calls, hidden, how):
    """rounding.tune: what the block makes of hidden, closer to what it made in full precision."""
    layers = {work.block.get_submodule(name): name for name in integers}
    found = tune(
        {layer: (layer.weight.float(), *integers[name]) for layer, name in layers.items()},
        how.bits, lambda given: blocks.replay(work.block, *given),
        list(zip(zip(calls, hidden), work.full)))
    return {layers[layer]: moved for layer, moved in found.items()}


def stored_loss(work, group, statistics, s, integers):
    """L of the integers of a group, whose Linears hold W diag(s)."""
    if not statistics.tokens:
        return 0.0
    errors = [dequantize(*integers[name]) - work.block.get_submodule(name).weight
              for name in group.layers]
    return sum(output_error(E / s.to(E.device), statistics.C) for E in errors)


def pack_block(block, integers, bits):
    """An AWQLinear in the place of every Linear of integers {name: (q, delta, zero)}."""
    for name, (q, delta, zero) in integers.items():
        bias = block.get_submodule(name).bias
        block.set_submodule(name, AWQLinear(pack(q.T, bits), pack(zero.T, bits),
                                            delta.T.contiguous(),
                                            None if bias is None else bias.data, bits))


# ---- Several processes ---------------------------------------------------------------------------


def ranks():
    """(rank, number of ranks) of torch.distributed; (0, 1) in a process of its own."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def my_share(tokens):
    """The slice of the samples that is this rank's."""
    rank, count = ranks()
    return tokens[len(tokens) * rank // count:len(tokens) * (rank + 1) // count]


def add_over_ranks(statistics, weight):
    """The statistics of all ranks' samples, the same bits on each; ConnectionError."""
    K = weight.shape[1]
    flat = torch.zeros(K * K + K + 1, dtype=torch.float32, device=weight.device)
    square_sum, absolute_sum, tokens = flat[:K * K].view(K, K), flat[K * K:-1], flat[-1]
    square_sum += statistics.square_sum         # 0 where no token reached the layer on this rank
    absolute_sum += statistics.absolute_sum
    tokens += statistics.tokens
    try:
        dist.all_reduce(flat)
    except RuntimeError as error:
        raise ConnectionError(f"rank {ranks()[0]} of {ranks()[1]}: another rank died or did not "
                              f"answer in time ({error})") from error
    statistics.square_sum, statistics.absolute_sum = square_sum, absolute_sum
    statistics.tokens = int(tokens)


# ---- A model -------------------------------------------------------------------------------------

ROUNDINGS = {"nearest": None, "gptq": gptq, "descent": descend, "tuned": descend}


@torch.no_grad()
def quantize_model(model, tokens, bits=4, group_size=128, *, clip=True, scale=True,
                   rounding="nearest", sequential=False, device=None, batch_size=4, progress=True):
    """Replace the Linears of a transformers causal LM's blocks by AWQLinear, in place.

    model: a decoder-only AutoModelForCausalLM, float32, float16 or bfloat16.
    tokens: calibration token ids [samples, length], int64. Ranks of torch.distributed, all called
    with the same, each run a slice of the samples and end with the same weights.
    clip, scale: search the clipping, the scale s; with neither the result is plain rounding (RTN).
    rounding: "nearest", "gptq", "descent", "tuned", or a function like those of rounding.py.
    sequential: blocks see what the quantized blocks before them make, for a second pass; unless
    set, what the full-precision blocks make, as in the paper's code. "tuned" sets it.
    device: where blocks are worked on (CUDA if there is one), batch_size samples at a time.

    Returns the report: "bits", "group_size", "seconds", "stages" (seconds of each), "skipped"
    ({layer: reason}), "groups", a list of {"block", "layers", "folded_into", "fold", "reason" (why
    s = 1), "alpha", "loss_rtn", "loss" (Eq. 4), "curve" [(alpha, clipped, loss)], "s" [K]}.
    ValueError for what cannot be quantized, before any work; NaN or Inf on the way leave the model
    partly quantized.
    """
    # 1. What cannot be quantized is refused, then it is planned what will be.
    tuned = rounding == "tuned"
    function = ROUNDINGS.get(rounding, rounding) if isinstance(rounding, str) else rounding
    how = Settings(bits, group_size, clip, scale, function, sequential or tuned, tuned)
    check_arguments(model, tokens, how, batch_size)
    device = working_device(model, device)
    clock, report = Stopwatch(device), []
    with blocks.put_back_if_refused(model):
        plan = blocks.plan_model(model.eval(), tokens, lambda layer: misfit(layer, how))
        # 2. The arguments of every block, and the hidden states that go into the first.
        batches = my_share(tokens).split(batch_size)
        hidden = [blocks.first_hidden(model, plan.blocks, batch).to(device) for batch in batches]
        calls = record_batches(model, plan.blocks, batches, hidden)
    full = list(hidden) if tuned else None
    clock.lap("plan")
    # 3. Block after block.
    bar = tqdm(plan.blocks, "quantizing", unit="block", disable=not progress or ranks()[0] > 0)
    for index, block in enumerate(bar):
        work = Work(block, f"{plan.prefix}.{index}", plan.calls[index].map(lambda x: x.to(device)),
                    plan.hidden.to(device), tokens.numel(), full)
        own = [calls[len(batch)][index] for batch in batches]
        with blocks.moved(block, device):
            lines, hidden = quantize_block(work, plan.groups[index], own, hidden, how, clock)
        report += [{"block": index, **line} for line in lines]
        bar.set_postfix_str(f"loss {loss_ratio(report):.3f} of RTN's")
    return finish(model, plan, how, report, clock)


def working_device(model, device=None):
    """The device that blocks are worked on: the one named, else CUDA, else the model's."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else model.device
    return check_device(device)


def finish(model, plan, how, groups, clock):
    """The report; the model's config says from now on that it is quantized."""
    model.config.quantization_config = checkpoint_config(
        how.bits, how.group_size, hub_names(model, plan.skipped))
    return {"bits": how.bits, "group_size": how.group_size, "groups": groups,
            "skipped": plan.skipped, "seconds": sum(clock.stages.values()), "stages": clock.stages}


def record_batches(model, layers, batches, hidden):
    """{samples of a micro-batch: [Call of every block]}; ValueError where a replay differs.

    hidden: what goes into the first block, of every micro-batch, where the blocks are to run.
    """
    calls = {}
    for batch, x in zip(batches, hidden):
        if len(batch) not in calls:
            calls[len(batch)], made = blocks.record(model, layers, batch, x.device)
            blocks.check_replay(layers, calls[len(batch)], x, made)
    return calls


def misfit(layer, how):
    """Why a Linear cannot be stored in the AWQ format, or ""."""
    if how.group_size != -1 and layer.in_features % how.group_size:
        return f"in_features {layer.in_features} is not a multiple of group_size {how.group_size}"
    if layer.out_features % 8:
        return f"out_features {layer.out_features} is not a multiple of 8"
    return ""


def check_arguments(model, tokens, how, batch_size=1):
    """ValueError unless quantize_model can start."""
    group_length(1 if how.group_size == -1 else how.group_size, how.bits, how.group_size)
    check_plain(model)
    if how.rounding is not None and not callable(how.rounding):
        raise ValueError(f"rounding is {how.rounding!r}: it must be one of {list(ROUNDINGS)} or a "
                         "function (W, delta, zero, bits, C)")
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}: it must be an integer of at least 1")
    if how.tuned and ranks()[1] > 1:
        raise ValueError("rounding is 'tuned': it runs in one process only")
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
        raise ValueError("torch.inference_mode is on, or was when model was made: weights can be "
                         "changed only outside of it")
    if torch.is_autocast_enabled(model.device.type):
        raise ValueError("torch.autocast is on: the search is in float32")
    if not isinstance(tokens, torch.Tensor) or tokens.ndim != 2 or tokens.dtype != torch.int64:
        kind = (f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, torch.Tensor)
                else type(tokens).__name__)
        raise ValueError(f"tokens is {kind}: it must be an int64 tensor [samples, length]")
    if len(tokens) < ranks()[1]:
        raise ValueError(f"tokens has {len(tokens)} samples: each of {ranks()[1]} ranks needs one")
    sequence_length(model, tokens.shape[1])
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ValueError(f"tokens run from {tokens.min()} to {tokens.max()}: they must be in "
                         f"[0, {vocabulary})")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{name} contains NaN or Inf: weights must be finite")


def sequence_length(model, requested=None, default=512):
    """requested, or `default` limited to the model's positions, if any; ValueError if exceeded."""
    positions = getattr(model.config, "max_position_embeddings", None) or 0
    positions = positions if positions > 0 else sys.maxsize         # XLNet's -1
    if requested is None:
        return min(default, positions)
    if not 0 < requested <= positions:
        raise ValueError(f"sequence length is {requested}: it must be in [1, {positions}]")
    return requested


class Stopwatch:
    """Seconds by stage."""

    def __init__(self, device):
        self.device, self.stages, self.last = device, {}, time.time()

    def lap(self, stage):
        """The time since the last lap was this stage's."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.time()
        self.stages[stage] = self.stages.get(stage, 0.0) + now - self.last
        self.last = now


def loss_ratio(groups):
    """Mean over the groups of loss / RTN's loss; groups that RTN does not hurt are left out."""
    ratios = [line["loss"] / line["loss_rtn"] for line in groups if line["loss_rtn"] > 0]
    return sum(ratios) / len(ratios) if ratios else 1.0


@torch.no_grad()
def round_model(model, bits=4, group_size=128):
    """RTN: plain rounding of the layers quantize_model would quantize, in place, without data.

    Returns a report without groups; errors as quantize_model.
    """
    check_plain(model)
    clock, how = Stopwatch(model.device), Settings(bits, group_size)
    tokens = torch.arange(sequence_length(model, default=31)).clamp(max=1)[None]
    check_arguments(model, tokens, how)
    with blocks.put_back_if_refused(model):
        plan = blocks.plan_model(model.eval(), tokens, lambda layer: misfit(layer, how))
    for index, (block, groups) in enumerate(zip(plan.blocks, plan.groups)):
        path = f"{plan.prefix}.{index}"
        pack_block(block, {name: quantize_layer(f"{path}.{name}", block.get_submodule(name).weight,
                                                how) for group in groups for name in group.layers},
                   bits)
    clock.lap("search")
    return finish(model, plan, how, [], clock)


# ---- Calibration text ----------------------------------------------------------------------------

DATASETS = {    # name: (hub name, subset, train split, test split)
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "test"),
    "pileval": ("mit-han-lab/pile-val-backup", None, "validation[:4096]", "validation[4096:4608]"),
    "pydoc": None}      # offline: docstrings of the standard library


def load_documents(data, split="train"):
    """The documents of `data`: "wikitext" or "pileval" (hub), "pydoc" (offline), a text file.

    split: "train" or "test"; a file has none and is used whole. Of a .json or .jsonl file the
    "text" fields. ValueError for an unknown name, OSError for what cannot be reached.
    """
    if data == "pydoc":
        from tinylm.corpus import stdlib_documents
        return stdlib_documents(split)
    from datasets import exceptions, load_dataset
    if data in DATASETS:
        name, subset, train, test = DATASETS[data]
        try:
            return load_dataset(name, subset, split=test if split == "test" else train)["text"]
        except OSError as error:
            raise OSError(f"data set {data!r} ({name}) cannot be loaded from the hub: offline, use "
                          "'pydoc' or a text file") from error
    if not os.path.isfile(data):
        name = repr(str(data)) if len(str(data)) < 100 else f"a text of {len(str(data))} characters"
        raise ValueError(f"data is {name}: it must be {', '.join(DATASETS)} or a file")
    if Path(data).suffix in (".json", ".jsonl"):
        try:
            rows = load_dataset("json", data_files=str(data), split="train")
        except (exceptions.DatasetsError, StopIteration) as error:      # StopIteration: it is empty
            raise ValueError(f"data is {str(data)!r}: it is not JSON lines with 'text'") from error
        if "text" not in rows.column_names or not isinstance(rows[0]["text"], str):
            raise ValueError(f"data is {str(data)!r}: its rows have {rows.features}, no 'text'")
        return rows["text"]
    try:
        return [Path(data).read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise ValueError(f"data is {str(data)!r}: it is not UTF-8 text: {error}") from error


def calibration_tokens(calib_data, tokenizer, samples=128, seq_len=512, seed=0):
    """[samples, seq_len] token ids from calib_data, without padding.

    calib_data: a name or file for load_documents, strings or lists of token ids (any iterable), a
    dataset with a "text" column, or a tensor [samples, length], which is returned as it is.
    Documents are joined by blank lines, tokenized and cut to windows of seq_len; the seed chooses
    `samples` of them. ValueError if too few, or for anything else.
    """
    if samples < 1 or seq_len < 1:
        raise ValueError(f"samples is {samples}, seq_len {seq_len}: both must be at least 1")
    kind = type(calib_data).__name__
    columns = getattr(calib_data, "column_names", getattr(calib_data, "columns", None))
    if columns is not None or isinstance(calib_data, Mapping):      # a Series is neither
        columns = list(calib_data if columns is None else columns)
        key = next((key for key in ("input_ids", "text") if key in columns), None)
        calib_data = calib_data[key] if key else None
    if isinstance(calib_data, torch.Tensor):
        return calib_data
    if isinstance(calib_data, (str, os.PathLike)):
        calib_data = load_documents(calib_data)
    items = list(calib_data) if hasattr(calib_data, "__iter__") else [None]
    if all(isinstance(item, str) for item in items):
        ids = tokenizer("\n\n".join(items), verbose=False, return_tensors="pt").input_ids[0].long()
    elif all(isinstance(item, (list, tuple)) and all(type(i) is int for i in item)
             for item in items):
        ids = torch.tensor([i for item in items for i in item], dtype=torch.int64)
    else:
        raise ValueError(f"calib_data is a {kind}: it must be a name, a file, "
                         "strings, lists of token ids, a dataset with a 'text' column or a tensor")
    windows = ids[:len(ids) // seq_len * seq_len].view(-1, seq_len)
    if len(windows) < samples:
        raise ValueError(f"calib_data has {len(ids)} tokens, {len(windows)} windows of {seq_len}: "
                         f"{samples} samples need {samples * seq_len} tokens")
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:samples]
    return windows[chosen]


# ---- The API that AutoAWQ had --------------------------------------------------------------------

RENAMED = {"w_bit": "bits", "q_group_size": "group_size", "apply_clip": "clip",
           "n_parallel_calib_samples": "batch_size"}
OPTIONS = ("bits", "group_size", "clip", "scale", "rounding", "sequential", "device", "batch_size",
           "progress")
# AutoAWQ's options that change nothing here, with the values that can be taken for them (or any).
IN_QUANTIZE = {"version": ("GEMM", "gemm"), "zero_point": (True,), "split": ("train",),
               "text_column": ("text",), "duo_scaling": (False,), "export_compatible": (False,),
               "max_chunk_memory": None}
IN_LOADING = {"safetensors": (True,), "fuse_layers": None, "max_seq_len": None, "batch_size": None,
              "max_new_tokens": None, "download_kwargs": (None,), "use_ipex": (False,),
              "use_exllama": (False,), "use_exllama_v2": (False,)}


def without_ignored(options, ignored):
    """AutoAWQ's options less those that change nothing here; ValueError for a value not taken."""
    for name in ignored.keys() & options.keys():
        if ignored[name] is not None and options[name] not in ignored[name]:
            raise ValueError(f"{name} is {options[name]!r}: only {ignored[name][0]!r} is possible")
    return {name: value for name, value in options.items() if name not in ignored}


class AutoAWQForCausalLM:
    """A model with the methods AutoAWQ's users know; `.model` is the transformers model."""

    def __init__(self, model, name, trust_remote_code=False):
        self.model, self.name, self.trust_remote_code = model, name, trust_remote_code
        self.calibration, self.calibration_tokenizer = None, None   # saved with the checkpoint

    @classmethod
    def from_pretrained(cls, name, **kwargs):
        """A full-precision model from a folder, the hub or a .gguf file: see load_pretrained."""
        kwargs = without_ignored(kwargs, IN_LOADING)
        return cls(load_pretrained(name, **kwargs), name, kwargs.get("trust_remote_code", False))

    @classmethod
    def from_quantized(cls, folder, file_name="", **kwargs):
        """A quantized model (folder or hub): see load_quantized. The file's name is not needed."""
        kwargs = without_ignored(kwargs, IN_LOADING)
        return cls(load_quantized(folder, **kwargs), folder, kwargs.get("trust_remote_code", False))

    def quantize(self, tokenizer=None, quant_config=None, calib_data="pileval", *,
                 max_calib_samples=128, max_calib_seq_len=None, seed=0, **options):
        """Calibrate and quantize in place; returns the report of quantize_model.

        quant_config and options: w_bit (4), q_group_size (128) and what quantize_model takes.
        calib_data: see calibration_tokens. max_calib_seq_len: 512, or the model's positions if
        fewer. tokenizer: the model's own unless given.
        """
        options = {RENAMED.get(name, name): value for name, value in without_ignored(
            {**(quant_config or {}), **options}, IN_QUANTIZE).items() if value is not None}
        unknown = sorted(options.keys() - set(OPTIONS))
        if unknown:
            raise ValueError(f"quantize has no options {unknown}: it has {', '.join(OPTIONS)}")
        tokenizer = tokenizer or (None if isinstance(calib_data, torch.Tensor) else self.tokenizer)
        tokens = calibration_tokens(calib_data, tokenizer, max_calib_samples,
                                    sequence_length(self.model, max_calib_seq_len), seed)
        report = quantize_model(self.model, tokens, **options)
        source = Path(calib_data).name if isinstance(calib_data, (str, os.PathLike)) else "own text"
        self.calibration_tokenizer = tokenizer
        self.calibration = f"{source}, {len(tokens)} x {tokens.shape[1]} tokens, seed {seed}"
        return report

    @property
    def tokenizer(self):
        return load_tokenizer(self.name, trust_remote_code=self.trust_remote_code)

    def save_quantized(self, folder, tokenizer=None, *, shard_size="5GB", **kwargs):
        """See save_quantized; only safetensors are written. tokenizer: that of quantize if none."""
        unknown = without_ignored(kwargs, IN_LOADING)
        if unknown:
            raise ValueError(f"save_quantized has no options {sorted(unknown)}")
        save_quantized(self.model, folder, tokenizer or self.calibration_tokenizer, shard_size,
                       self.calibration)

    def __call__(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def __getattr__(self, name):        # generate, config, device, to, eval, ...
        if name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)


# ---- The command line ----------------------------------------------------------------------------


def parse_arguments():
    parser = argparse.ArgumentParser(description="Quantize a Hugging Face causal LM with AWQ.")
    parser.add_argument("model", help="folder, hub name or .gguf file")
    parser.add_argument("--save", required=True, metavar="DIR", help="where the checkpoint goes")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8))
    parser.add_argument("--group-size", type=int, default=128, help="-1: one group a row")
    parser.add_argument("--calib", default="pileval",
                        help=f"calibration text (pileval): {', '.join(DATASETS)}, .txt or .jsonl")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, help="tokens a sample (512)")
    parser.add_argument("--rounding", choices=list(ROUNDINGS), default="nearest",
                        help="how the integers are chosen (nearest: AWQ's own)")
    parser.add_argument("--no-clip", action="store_true", help="do not search the clipping")
    parser.add_argument("--sequential", action="store_true",
                        help="calibrate on what the quantized blocks make (two passes)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="where blocks are worked on (cuda if there is one)")
    parser.add_argument("--trust-remote-code", action="store_true",
                        help="run the code that comes with a model")
    return parser.parse_args()


def run(args):
    """Load, quantize, save, print the report."""
    check_target(args.save)
    own_device = join_ranks()
    check_device(args.device or own_device or "cpu")
    wrapped = AutoAWQForCausalLM.from_pretrained(args.model,
                                                 trust_remote_code=args.trust_remote_code)
    report = wrapped.quantize(
        calib_data=args.calib, w_bit=args.bits, q_group_size=args.group_size,
        max_calib_samples=args.samples, max_calib_seq_len=args.seq_len, seed=args.seed,
        clip=not args.no_clip, rounding=args.rounding,
        sequential=args.sequential, device=args.device or own_device)
    if ranks()[0] == 0:
        wrapped.save_quantized(args.save)
        print_report(report)
        print(f"saved to {args.save}")


def join_ranks():
    """Join the other processes if torchrun started this one; returns this rank's GPU, or None."""
    if "LOCAL_RANK" not in os.environ:
        return None
    device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else None
    if device:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(timeout=timedelta(minutes=10))
    except RuntimeError as error:
        raise ConnectionError(f"the processes of torchrun did not meet: {error}") from error
    return device


def print_report(report):
    """The report as Markdown: a line a group of layers, then what was skipped and why."""
    print("| layers | 1/s folded into | alpha | loss / RTN's |\n|---|---|---|---|")
    for line in report["groups"]:
        names = [name.split(f".{line['block']}.", 1)[-1] for name in line["layers"]]
        rest = [f"{len(names) - 2} more"] if len(names) > 4 else names[2:]      # many experts
        layers = ", ".join(names[:2] + rest)
        folded = line["folded_into"] or f"nothing, s = 1: {line['reason']}"
        print(f"| {line['block']}: {layers} | {folded} | {line['alpha']:.2f} | "
              f"{loss_ratio([line]):.3f} |")
    for name, reason in report["skipped"].items():
        print(f"not quantized: {name}: {reason}")
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report["stages"].items())
    print(f"{report['seconds']:.1f} s: {stages}")


def main():
    # On CUDA the float32 products of the search may use tensor cores: 1e-3 of the loss.
    torch.set_float32_matmul_precision("high")
    try:
        run(parse_arguments())
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
