"""AWQ: Activation-aware Weight Quantization (Lin et al., arXiv 2306.00978), in one file.

Rounding a weight w of a group with step delta makes an error of about delta / 4, whatever w is, and
the output an error of delta / 4 times the activation x. AWQ multiplies the input channels of W that
see large x by s before rounding and divides x by s, which changes nothing else:

    (W diag(s)) (diag(1/s) x) = W x

As long as such a channel does not set its group's maximum, delta stays and its error falls by s
(Eq. 1-3; there the range is symmetric, here it is asymmetric, as in AWQ's checkpoints). How far
to go is searched, with X in rows, so that Y = X W^T:

    L(s) = || Q(W diag(s)) diag(1/s) X^T - W X^T ||_F^2 / T        (Eq. 4, squared and per token)
    s = s_X^alpha,  alpha* = argmin L over alpha = 0, 0.05, ..., 1                        (Eq. 5)

1/s costs nothing at inference: it is folded into the norm or the Linear that made x.

    code        symbol       what it is
    W           W            [N, K] weight: N outputs, K inputs
    X           X            [T, K] calibration inputs, a row a token (transposed in the paper)
    s_X         s_X          [K] mean over tokens of |X|, the score of an input channel
    s           s            [K] AWQ's channel scale (nothing else is called s)
    alpha       alpha        exponent of Eq. 5; alpha = 0 is plain rounding (RTN)
    C           X^T X / T    [K, K] Gram matrix (GPTQ's Hessian; here it is only read)
    G           group size   channels of a row that share a step and a zero point
    delta       Delta        [N, K/G] quantisation step, stored as float16
    zero        z            [N, K/G] integer zero point
    q           q            [N, K] integers in [0, 2^bits - 1];  W_hat = (q - zero) delta
    shrink      -            [2, N, K/G] clipping: the part kept of a group's lower and upper end

L(s) needs no activations once C is known: with E = Q(W diag(s)) diag(1/s) - W,

    || E X^T ||_F^2 / T = sum((E C) * E)

so a candidate costs N K K multiply-adds whatever the number of tokens, and uses every token.

What this file does not do: train or move weights (GPTQ does), quantise activations, embeddings,
lm_head or fused 3-D expert parameters, or keep a table of architectures.
"""
import argparse
import copy
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from tqdm import tqdm

import kernel

BITS = (2, 3, 4, 8)

# ---- Quantise and dequantise ---------------------------------------------------------------------


def rounded(x):
    """round(x), half to even, in x's memory; its gradient is 1 (straight-through estimator)."""
    return x + (x.round() - x).detach() if x.requires_grad else x.round_()


def group_range(W, group_size):
    """The lower and upper end of every group of W [N, K] float32, [N, K/G] each; 0 is between."""
    # not in the paper: without the widening to 0 a group whose weights share a sign collapses,
    # because the zero point is clamped.
    groups = W.unflatten(-1, (-1, group_size))              # [N, K/G, G]
    return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)


def range_grid(low, high, bits):
    """delta and zero, float32, of ranges [..., K/G] that are cut into 2^bits - 1 steps."""
    # not in the paper: delta is rounded to float16, as stored, before it is used.
    levels = 2 ** bits - 1
    delta = ((high - low) / levels).half().float()
    zero = rounded(-low / torch.where(delta > 0, delta, 1)).clamp(0, levels)
    return delta, zero


def quantization_grid(W, bits, group_size, shrink=None):
    """delta and zero, float32 [N, K/G], of every group of W [N, K] float32."""
    low, high = group_range(W, group_size)
    if shrink is not None:
        low, high = low * shrink[0], high * shrink[1]
    return range_grid(low, high, bits)


def round_to_grid(W, delta, zero, bits):
    """q = clamp(round(W / delta) + zero, 0, 2^bits - 1), float32 [..., N, K]; zero if delta = 0.

    W is [N, K]; delta and zero are [..., N, K/G], several grids for the same W at once.
    """
    groups = W.unflatten(-1, (delta.shape[-1], -1))         # [N, K/G, G]
    steps = rounded(groups / torch.where(delta > 0, delta, math.inf)[..., None])
    return steps.add_(zero[..., None]).clamp_(0, 2 ** bits - 1).flatten(-2)


def quantize(W, bits=4, group_size=128, shrink=None):
    """Round W [N, K] to integers: (q [N, K] uint8, delta [N, K/G] float16, zero [N, K/G] uint8).

    Asymmetric, in groups of group_size along K (-1: one group a row), as in the AWQ checkpoint
    format. shrink [2, N, K/G] in (0, 1] keeps that part of the lower and the upper end of a group's
    range. An all-zero group comes back as exactly 0, and so does one whose step is below float16's
    6e-8. ValueError for bits, group_size or shape out of range, NaN or Inf in W, or a step above
    65504.

    >>> W = torch.tensor([[-1.0, 0.0, 0.5, 2.0]])     # 2 bits: delta = 3 / 3, zero = round(1 / 1)
    >>> q, delta, zero = quantize(W, bits=2, group_size=4)
    >>> q.tolist(), delta.tolist(), zero.tolist()     # 0.5 / delta is a tie and rounds to even
    ([[0, 1, 1, 3]], [[1.0]], [[1]])
    >>> dequantize(q, delta, zero).tolist()
    [[-1.0, 0.0, 0.0, 2.0]]
    """
    W, group_size = check_weight(W, bits, group_size)
    delta, zero = quantization_grid(W, bits, group_size, shrink)
    if not torch.isfinite(delta).all():
        raise ValueError("W contains NaN or Inf, or a group's range exceeds float16 steps: the "
                         "weights must be finite and their step at most 65504")
    q = round_to_grid(W, delta, zero, bits)
    return q.to(torch.uint8), delta.half(), zero.to(torch.uint8)


def dequantize(q, delta, zero):
    """W_hat = (q - zero) delta, float32 [..., N, K]: exact, 8 significant bits times 11."""
    groups = q.unflatten(-1, (delta.shape[-1], -1)).float()
    return (groups - zero[..., None].float()).mul_(delta[..., None].float()).flatten(-2)


def fake_quantize(W, bits=4, group_size=128, shrink=None):
    """Q(W): quantise and dequantise W [N, K] at once, float32 [N, K]; ValueErrors as quantize."""
    W, group_size = check_weight(W, bits, group_size)
    delta, zero = quantization_grid(W, bits, group_size, shrink)
    return dequantize(round_to_grid(W, delta, zero, bits), delta, zero)


def check_weight(W, bits, group_size):
    """(W as contiguous float32 [N, K], the group size in channels), or a ValueError."""
    if W.ndim != 2 or W.numel() == 0:
        raise ValueError(f"W has shape {tuple(W.shape)}: it must be [N, K], not empty")
    return W.float().contiguous(), check_grid(bits, group_size, W.shape[1])


def check_grid(bits, group_size, in_features=None):
    """The group size in channels (-1 becomes in_features); ValueError if either is out of range."""
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"bits is {bits!r}: it must be one of {BITS}")
    if type(group_size) is not int or group_size == 0 or group_size < -1:
        raise ValueError(f"group_size is {group_size!r}: it must be -1 or a positive integer")
    if in_features is None:
        return group_size
    if group_size == -1:
        return in_features
    if in_features % group_size:
        raise ValueError(f"group_size is {group_size}: it must divide in_features {in_features}")
    return group_size


# ---- Pack and unpack -----------------------------------------------------------------------------

NIBBLE_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds column 8 c + NIBBLE_ORDER[i]


def packed_width(columns, bits):
    """int32 words in a packed row of `columns` values; ValueError if they cannot be packed."""
    check_grid(bits, -1)
    if bits == 4 and columns % 8:
        raise ValueError(f"columns is {columns}: 4-bit packing needs a multiple of 8")
    return columns // 8 if bits == 4 else -(-columns // 32) * bits


def pack(q, bits):
    """Integers [R, N] in [0, 2^bits - 1], any integer dtype, to int32 [R, packed_width(N, bits)].

    4 bits: the AWQ GEMM order, nibble i (bits 4i..4i+3) of word c holds column
    8 c + [0, 2, 4, 6, 1, 3, 5, 7][i]; N must be a multiple of 8. 2, 3 and 8 bits, which that format
    does not have: 32 values in `bits` words, as one little-endian stream, zeros appended to N.
    ValueError for bits, N or a value out of range.
    """
    R, N = q.shape
    packed_width(N, bits)
    if q.numel() and not 0 <= int(q.min()) <= int(q.max()) < 2 ** bits:
        raise ValueError(f"q runs from {q.min()} to {q.max()}: {bits} bits hold 0-{2 ** bits - 1}")
    if bits == 4:
        nibbles = q.reshape(R, N // 8, 8)[..., NIBBLE_ORDER].int()
        places = torch.arange(0, 32, 4, device=q.device, dtype=torch.int32)
        return (nibbles << places).sum(-1, dtype=torch.int32)
    q = nn.functional.pad(q, (0, -N % 32)).reshape(R, -1, 32)
    stream = (q[..., None].int() >> torch.arange(bits, device=q.device)) & 1  # [R, N/32, 32, bits]
    words = stream.view(R, -1, 32) << torch.arange(32, device=q.device)       # [R, words, 32]
    return words.sum(-1, dtype=torch.int32)


def unpack(words, bits, columns):
    """The inverse of pack: int32 [R, packed_width(columns, bits)] to uint8 [R, columns]."""
    R = words.shape[0]
    if words.shape[1] != packed_width(columns, bits):
        raise ValueError(f"words is {tuple(words.shape)}: {columns} columns of {bits} bits take "
                         f"{packed_width(columns, bits)} words a row")
    if bits == 4:
        nibbles = (words[..., None] >> torch.arange(0, 32, 4, device=words.device)) & 15
        inverse = [NIBBLE_ORDER.index(i) for i in range(8)]
        return nibbles[..., inverse].view(R, columns).to(torch.uint8)
    stream = (words[..., None] >> torch.arange(32, device=words.device)) & 1  # [R, words, 32]
    values = stream.view(R, -1, bits) << torch.arange(bits, device=words.device)
    return values.sum(-1, dtype=torch.uint8)[:, :columns]


# ---- Several processes: each has its slice of the samples, and of the rows of every layer --------


def ranks():
    """(rank, number of ranks) of torch.distributed; (0, 1) in a process of its own."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def my_share(length):
    """The slice of range(length) that is this rank's."""
    rank, count = ranks()
    return slice(length * rank // count, length * (rank + 1) // count)


def add_over_ranks(tensor):
    """The sum of the ranks' tensors, in place and the same bits on each; ConnectionError."""
    if ranks()[1] > 1:
        try:
            dist.all_reduce(tensor)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConnectionError(f"rank {ranks()[0]} of {ranks()[1]}: another rank died or did "
                                  f"not answer in time ({error})") from error
    return tensor


# ---- Statistics of the calibration inputs --------------------------------------------------------


@contextmanager
def tf32_products(x, exact=False):
    """If x, of the model, is 16-bit and on a GPU: float32 products on its tensor cores.

    They read 10 bits of mantissa: all of X, and enough of E and C for a loss good to 1e-3 (to 2e-2
    where the mean of the inputs is ten times their spread: there most of E C cancels). exact: all
    24 bits, whatever the process allows elsewhere.
    """
    if not x.is_cuda:
        yield
        return
    products = torch.backends.cuda.matmul
    precision = products.fp32_precision
    products.fp32_precision = "ieee" if exact or x.dtype == torch.float32 else "tf32"
    try:
        yield
    finally:
        products.fp32_precision = precision


class InputStatistics:
    """s_X [K] and C [K, K] of a layer's input, accumulated in float32 over micro-batches."""

    def __init__(self, channels, device):
        self.tokens = 0
        self.absolute_sum = torch.zeros(channels, device=device)
        self.square_sum = torch.zeros(channels, channels, device=device)

    def update(self, X):
        rows = X.reshape(-1, X.shape[-1]).float()           # [T, K]
        self.tokens += len(rows)
        self.absolute_sum += rows.abs().sum(0)
        step = -(-X.shape[-1] // 8)     # X^T X is symmetric: an eighth of its rows at a time,
        with tf32_products(X):                              # from the diagonal on
            for i in range(0, X.shape[-1], step):
                self.square_sum[i:i + step, i:].addmm_(rows[:, i:i + step].T, rows[:, i:])

    def add_over_ranks(self):
        """The statistics of all ranks' samples."""
        tokens = torch.tensor([self.tokens], device=self.absolute_sum.device)
        self.tokens = int(add_over_ranks(tokens))
        add_over_ranks(self.absolute_sum)
        add_over_ranks(self.square_sum)

    @property
    def s_X(self):
        return self.absolute_sum / self.tokens

    @property
    def C(self):
        upper = self.square_sum.triu().div_(self.tokens)
        return upper.add_(upper.triu(1).T)


# ---- The loss and the search for s ---------------------------------------------------------------


def gram_loss(E, C):
    """|| E X^T ||_F^2 / T = sum((E C) * E), for E [N, K] and C [K, K] = X^T X / T."""
    step, loss = max(128, -(-len(C) // 8)), 0
    for i in range(0, len(C), step):    # C is symmetric: its blocks on the diagonal, and twice
        j = i + step                    # what is right of them
        part, rest = E[:, i:j], E[:, j:]
        loss = loss + (part @ C[i:j, i:j]).mul_(part).sum()
        loss = loss + 2 * (part @ C[i:j, j:]).mul_(rest).sum()
    return loss


def channel_scale(s_X, alpha):
    """s = s_X^alpha  (Eq. 5), [K]."""
    # not in the paper: dead channels count as 1e-4 of the largest, so that 1/s stays finite.
    s = s_X.clamp(min=s_X.max().item() * 1e-4 or 1.0) ** alpha
    # not in the paper, but in its code: max(s) min(s) = 1. A common factor cancels in Q(c W) / c;
    # this one keeps delta and the folded gain within float16.
    return s / (s.max() * s.min()).sqrt()


def diagonal_blocks(C, group_size):
    """[K/G, G, G]: the part of C that couples channels of one quantisation group."""
    groups = C.shape[0] // group_size
    index = torch.arange(groups, device=C.device)
    return C.view(groups, group_size, groups, group_size)[index, :, index]


def group_losses(E, blocks):
    """[..., N, K/G]: e C_gg e^T for the error e [G] of each row of E [..., N, K] in each group."""
    groups, G, _ = blocks.shape
    rows = E.view(-1, groups, G).transpose(0, 1)            # [K/G, N, G]
    losses = (rows @ blocks).mul_(rows).sum(-1)             # [K/G, N]
    return losses.T.view(*E.shape[:-1], groups)


# What search_shrink tries, pair after pair: (ends of the range, the parts to keep of them).
BOTH = (((0, 1), (0.9, 0.8, 0.7, 0.55)),)       # few: every alpha pays for them
EACH = tuple(((end,), tuple(1 - i / 80 for i in range(1, 41))) for end in (0, 1))


def row_chunks(W, copies=1):
    """Slices of the rows of W [N, K]: `copies` of one fit a CPU's cache, or 256 MiB elsewhere."""
    elements = 2 ** 20 if W.device.type == "cpu" else 2 ** 26
    rows = max(1, elements // (W.shape[1] * copies))
    return [slice(start, start + rows) for start in range(0, len(W), rows)]


def search_shrink(W, blocks, bits, group_size, ends, start=None):
    """Per row and group, the shrink of its range with the least e C_gg e^T  (clipping). [2, N, K/G]

    ends: BOTH, by the same part, or EACH on its own, the lower, then the upper. start: the shrink
    to begin with (1).
    """
    if start is None:
        start = W.new_ones(2, W.shape[0], W.shape[1] // group_size)
    if not len(W):      # more ranks than rows
        return start
    copies = 1 + max(len(parts) for _, parts in ends)
    return torch.cat([search_rows(W[rows], blocks, bits, group_size, ends, start[:, rows])
                      for rows in row_chunks(W, copies)], 1)


def search_rows(W, blocks, bits, group_size, ends, shrink):
    """search_shrink of a few rows: all P trials of an end at once."""
    low, high = group_range(W, group_size)                  # [N, K/G]
    for end, parts in ends:
        trials = shrink.repeat(1 + len(parts), 1, 1, 1)     # [P, 2, N, K/G], the first as it is
        trials[1:, list(end)] = W.new_tensor(parts)[:, None, None, None]
        delta, zero = range_grid(low * trials[:, 0], high * trials[:, 1], bits)
        E = dequantize(round_to_grid(W, delta, zero, bits), delta, zero).sub_(W)    # [P, N, K]
        best = group_losses(E, blocks).argmin(0)            # [N, K/G]
        shrink = trials.gather(0, best.expand(1, 2, -1, -1))[0]
    return shrink


def scaled_loss(W, C, s, shrink, bits, group_size):
    """L(s) = || Q(W diag(s)) diag(1/s) X^T - W X^T ||_F^2 / T  (Eq. 4), through C."""
    def loss_of(rows):
        part = None if shrink is None else shrink[:, rows]
        W_hat = fake_quantize(W[rows] * s, bits, group_size, part)
        return gram_loss(W_hat.div_(s).sub_(W[rows]), C)

    return sum(map(loss_of, row_chunks(W)), W.new_zeros(()))


class Scaling(NamedTuple):
    """A choice for the layers that share an input, and its loss."""

    s: torch.Tensor                     # [K]
    shrink: torch.Tensor | None         # [2, N, K/G], or None: nothing is clipped
    alpha: float
    loss: float                         # L(s) with this shrink
    loss_rtn: float | None = None       # L(1) without clipping
    curve: tuple = ()                   # (alpha, clipped or not, L) of what the grid tried


def scored(W, C, s, shrink, alpha, bits, group_size):
    """The Scaling with its loss."""
    return Scaling(s, shrink, alpha, scaled_loss(W, C, s, shrink, bits, group_size).item())


def with_clipping(W, C, s, shrink, alpha, bits, group_size, ends):
    """scored, with the clipping searched (further): W diag(s) sees the Gram C / (s s^T)."""
    s_g = s.view(-1, group_size)                            # [K/G, G]
    blocks = diagonal_blocks(C, group_size) / (s_g[:, :, None] * s_g[:, None])
    shrink = search_shrink(W * s, blocks, bits, group_size, ends, shrink)
    return scored(W, C, s, shrink, alpha, bits, group_size)


def summed(choices):
    """The choices with the losses of all ranks' rows."""
    losses = torch.tensor([choice.loss for choice in choices], dtype=torch.float64,
                          device=choices[0].s.device)
    return [choice._replace(loss=loss)
            for choice, loss in zip(choices, add_over_ranks(losses).tolist())]


def gathered(shrink, rows, count):
    """The shrink [2, count, K/G] of all rows, from the one that each rank found for its rows."""
    whole = shrink.new_zeros(2, count, shrink.shape[2])
    whole[:, rows] = shrink
    return add_over_ranks(whole)


def search_scale(W, C, s_X, bits, group_size, clip=True, alphas=None, storable=lambda s: s):
    """argmin over alpha of L(s_X^alpha), Eq. 4 and 5, clipping searched inside the loop: a Scaling.

    W [N, K] float32: the weights of all layers that share the input, stacked. alphas: the grid,
    which begins with 0; 0, 0.05, ..., 1 unless given. storable(s): the s that a folded norm really
    divides by once its gain is rounded to its dtype. The least loss wins, so it is never above
    RTN's (alpha = 0), nor above that of RTN with clipping. (With clip, no other alpha is tried
    without: clipping keeps the whole range where nothing less is better.)
    """
    # not in the paper: there alpha is chosen first and the range clipped afterwards, by one factor
    # for both ends and not for q and k. That order can end above clipping alone.
    N, rows = len(W), my_share(len(W))
    W, tried = W[rows], []
    for alpha in [i / 20 for i in range(21)] if alphas is None else alphas:
        s = storable(channel_scale(s_X, alpha))
        if not clip or not tried:
            tried.append(scored(W, C, s, None, alpha, bits, group_size))
        if clip:
            tried.append(with_clipping(W, C, s, None, alpha, bits, group_size, BOTH))
    tried = summed(tried)
    best = min(tried, key=lambda choice: choice.loss)
    if clip:    # then each end on its own, and finer, which costs too much for every alpha
        finals = summed([with_clipping(W, C, choice.s, choice.shrink, choice.alpha, bits,
                                       group_size, EACH)
                         for choice in [best] + [tried[1]] * (best is not tried[1])])
        best = min([best, *finals], key=lambda choice: choice.loss)
    if best.shrink is not None:
        best = best._replace(shrink=gathered(best.shrink, rows, N))
    curve = tuple((choice.alpha, choice.shrink is not None, choice.loss) for choice in tried)
    return best._replace(loss_rtn=tried[0].loss, curve=curve)


# ---- Refinement: single channels of s (optional; not in the paper) -------------------------------


def refine_gradient(W, C, found, bits, group_size, rows, steps=80, lr=0.02):
    """Adam on log s from the grid's answer, through the straight-through gradient of L(s).

    The loss is the unclipped one: the clipping is a minimum found for one s and gets worse in every
    direction, so refine_scale searches it again. rows [K]: channels with an equal number keep an
    equal s (repeated heads). Returns the best s seen.
    """
    _, index = rows.unique(return_inverse=True)
    start = found.s.new_zeros(int(index.max()) + 1).scatter(0, index, found.s)
    log_s = start.log().requires_grad_()
    optimizer = torch.optim.Adam([log_s], lr=lr)
    best_loss, best = math.inf, found.s
    with torch.enable_grad():
        for _ in range(steps):
            s = log_s.exp()[index]
            E = fake_quantize(W * s, bits, group_size, None) / s - W
            loss = gram_loss(E, C)
            if loss.item() < best_loss:
                best_loss, best = loss.item(), s.detach()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return best


def refine_grid(W, C, found, bits, group_size, rows, factors=(0.5, 0.75, 0.9, 1.1, 1.25, 1.5)):
    """Multiply single channels of s by the factors and keep what lowers L(s).

    Groups are quantised independently, so one channel of every group is tried at a time: with
    D = E_new - E, moving group g alone changes L by 2 <(E C)_g, D_g> + <D_g C_gg, D_g>. A layer
    with channels that must stay equal (rows, see refine_gradient) returns as it came. The factors
    are the [0.5, 1.5] that summaries of AWQ give as its search; Eq. 5 is another one.
    """
    _, index, count = rows.unique(return_inverse=True, return_counts=True)
    if (count > 1).any():
        return found.s
    N, K = W.shape
    blocks, s = diagonal_blocks(C, group_size), found.s.clone()
    E = fake_quantize(W * s, bits, group_size, found.shrink) / s - W
    EC = E @ C
    for j in range(group_size):
        change = s.new_zeros(K // group_size)               # best change of L in each group
        D, scale = torch.zeros_like(E), s.clone()
        for factor in factors:
            trial = s.clone()
            trial[j::group_size] *= factor
            step = fake_quantize(W * trial, bits, group_size, found.shrink) / trial - W - E
            gain = (2 * (EC * step).view(N, -1, group_size).sum((0, 2))
                    + group_losses(step, blocks).sum(0))
            better = (gain < change).repeat_interleave(group_size)
            change = torch.minimum(change, gain)
            D, scale = torch.where(better, step, D), torch.where(better, trial, scale)
        if 2 * (EC * D).sum() + gram_loss(D, C) >= 0:       # the moves together may not help:
            alone = torch.zeros(K, dtype=torch.bool, device=s.device)
            alone.view(-1, group_size)[change.argmin()] = True  # then keep the best group's
            D, scale = torch.where(alone, D, 0), torch.where(alone, scale, s)
        E, EC, s = E + D, EC + D @ C, scale
    return s


REFINEMENTS = {"grid": refine_grid, "gradient": refine_gradient}


def refine_scale(W, C, found, bits, group_size, clip, refine, rows, storable=lambda s: s):
    """Refine the grid's answer (refine = "grid" or "gradient"); never returns a worse one."""
    s = storable(REFINEMENTS[refine](W, C, found, bits, group_size, rows))
    choices = [scored(W, C, s, found.shrink, found.alpha, bits, group_size)]
    if clip:
        choices.append(with_clipping(W, C, s, None, found.alpha, bits, group_size, BOTH + EACH))
    best = min([found, *choices], key=lambda choice: choice.loss)
    return best._replace(loss_rtn=found.loss_rtn, curve=found.curve)


# ---- Where 1/s goes: folds, found by tracing a block and proven by powers of two -----------------


class Call(NamedTuple):
    """The arguments a model gave one of its blocks; the first tensor or `hidden_states` counts."""

    args: tuple
    kwargs: dict

    @property
    def key(self):
        """The keyword of the hidden states when they are not the first argument."""
        first = (key for key, x in self.kwargs.items() if isinstance(x, torch.Tensor))
        return "hidden_states" if "hidden_states" in self.kwargs else next(first)

    @property
    def hidden(self):
        return self.args[0] if self.args else self.kwargs[self.key]

    def with_hidden(self, hidden):
        if self.args:
            return Call((hidden, *self.args[1:]), self.kwargs)
        return Call((), {**self.kwargs, self.key: hidden})

    def to(self, device):
        return Call(*map_tensors(lambda x: x.to(device), tuple(self)))

    def float(self):
        return Call(*map_tensors(lambda x: x.float() if x.is_floating_point() else x, tuple(self)))


def map_tensors(function, tree):
    """function applied to every tensor in nested tuples, lists and dicts."""
    return tree_map(lambda x: function(x) if isinstance(x, torch.Tensor) else x, tree)


def hidden_of(output):
    """A block's hidden states: blocks return them alone or first in a tuple or list."""
    return output[0] if isinstance(output, (tuple, list)) else output


def run_block(block, call):
    """The hidden states [B, T, H] that the block makes of a Call."""
    return hidden_of(block(*call.args, **call.kwargs))


def run_whole(block, call):
    """All tensors a block makes: what it returns and what it leaves in dicts it was given."""
    leaves, _ = tree_flatten((block(*call.args, **call.kwargs), call.kwargs))
    return [leaf.clone() for leaf in leaves if isinstance(leaf, torch.Tensor)]


class Fold(NamedTuple):
    """How s leaves: a module of the same block whose output channels are divided by s."""

    producer: str           # name of the module within the block
    kind: str               # "gain": weight / s; "1 + gain": (1 + weight) / s - 1; "rows": its rows
                            # / s; "root rows": its rows / sqrt(s), before a squared ReLU
    rows: torch.Tensor      # [K]: the producer's output channel behind each input channel


class Group(NamedTuple):
    """The Linears of a block that read the same tensor: they share s."""

    layers: tuple           # names within the block
    fold: Fold | None
    kept: tuple = ()        # Linears that read it too and stay in full precision (routers): times s
    reason: str = ""        # why there is no fold


@torch.no_grad()
def divide_output(producer, kind, rows, s):
    """Divide the producer's output channels by s [K] (equal where rows are). In place."""
    factor = torch.ones(producer.weight.shape[0], dtype=s.dtype, device=s.device)
    factor[rows] = s.sqrt() if kind == "root rows" else s
    if "rows" in kind:
        producer.weight.copy_(producer.weight.to(s.dtype) / factor[:, None])
    else:
        offset = 1.0 if kind == "1 + gain" else 0.0
        producer.weight.copy_((producer.weight.to(s.dtype) + offset) / factor - offset)
    if getattr(producer, "bias", None) is not None:
        producer.bias.copy_(producer.bias.to(s.dtype) / factor)


def storable_scale(producer, kind, rows):
    """s -> the s that divide_output really divides by, after rounding to the gain's dtype."""
    # not in the paper: near -1 the stored w of (1 + w) / s is coarse; this way the loss knows.
    gain = producer.weight.detach()
    offset = 1.0 if kind == "1 + gain" else 0.0

    def storable(s):
        if "rows" in kind:      # a Linear's row has many weights: no one s for their rounding
            return s
        before = gain.float()[rows] + offset
        after = (before / s - offset).to(gain.dtype).float() + offset
        return torch.where(after * before > 0, before / after, s)
    return storable


class RouterTrace(TorchFunctionMode):
    """Collects the Linears whose output the block chooses from: the last one before a topk."""

    def __init__(self):
        super().__init__()
        self.last, self.routers = ("", 0, 0), set()     # name, out_features, elements of its output

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("topk", "argmax", "max", "sort"):
            x = args[0] if args else kwargs["input"]
            if x.ndim and (x.shape[-1], x.numel()) == self.last[1:]:
                self.routers.add(self.last[0])
        return function(*args, **(kwargs or {}))


def trace_block(block, call):
    """Names of leaf modules in the order they run, of Linears by the tensor they read, routers."""
    order, readers, alive, choices = [], {}, [], RouterTrace()

    def record(module, args, kwargs):
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, torch.Tensor) and not x.numel():
            return              # an expert without a token has not been reached
        order.append(names[module])
        if isinstance(module, nn.Linear) and isinstance(x, torch.Tensor):
            alive.append(x)     # so that no other tensor takes its address
            key = (x.data_ptr(), x._version, x.shape[-1], x.numel())
            readers.setdefault(key, []).append(names[module])
            N = module.out_features
            choices.last = (names[module], N, x.numel() // x.shape[-1] * N)

    names = {module: name for name, module in block.named_modules() if not list(module.children())}
    with ExitStack() as hooks:
        for module in names:
            hooks.enter_context(module.register_forward_pre_hook(record, with_kwargs=True))
        hooks.enter_context(choices)
        run_block(block, call)
    return order, list(readers.values()), choices.routers


def probe_copy(block):
    """A float32 copy of the block with random weights, its norm gains multiples of 1/16.

    Whether a fold is right depends on the block's structure, not on its weights (they may be 0);
    with these gains (1 + gain) / p - 1 is exact for p = 1024 or 1/1024 (see fold_is_exact).
    """
    block = copy.deepcopy(block).float()
    generator = torch.Generator().manual_seed(0)
    for name, p in block.named_parameters():
        if p.ndim > 1:
            p.data = torch.randn(p.shape, generator=generator).to(p.device) * p.shape[-1] ** -0.5
        elif name.endswith("weight"):
            p.data = (torch.randint(4, 13, p.shape, generator=generator) / 16).to(p.device)
        elif name.endswith("bias"):     # a router's may keep an expert from ever being chosen
            p.data = torch.randn(p.shape, generator=generator).to(p.device) * 0.1
    return block


def fold_is_exact(block, call, layers, fold):
    """Prove a fold: scale by 1/1024, 1 or 1024, which is exact, and compare to the last bit.

    True if what the block makes changes when only the producer is divided, and is bitwise the first
    again when the columns of `layers` are multiplied. A residual that also reads the norm, or a
    GELU between producer and layers, fails here; so does a clamp, at which 1024 arrives, and a fold
    that has no effect at all. The block is left as it was: powers of two are undone exactly. (1024
    has a square root among them.)
    """
    generator = torch.Generator().manual_seed(1)
    powers = 1024.0 ** torch.randint(-1, 2, (int(fold.rows.max()) + 1,), generator=generator)
    s = powers[fold.rows].to(call.hidden.device)
    producer, rows = block.get_submodule(fold.producer), fold.rows.to(s.device)
    weights = [block.get_submodule(name).weight.data for name in layers]

    def unchanged():
        found = run_whole(block, call)
        return len(found) == len(expected) and all(map(torch.equal, found, expected))

    expected = run_whole(block, call)
    divide_output(producer, fold.kind, rows, s)
    has_effect = not unchanged()
    for weight in weights:
        weight *= s
    exact = has_effect and unchanged()
    for weight in weights:
        weight /= s
    divide_output(producer, fold.kind, rows, 1 / s)
    return exact


def is_plain(layer):
    """Whether a Linear of a probe_copy computes x W^T + b, whatever its class calls itself.

    Falcon's own class does; DeepSeek-V4's, one matrix for each group of heads, does not.
    """
    if type(layer).forward is nn.Linear.forward and "forward" not in vars(layer):
        return True
    x = torch.randn(1, 2, layer.in_features, generator=torch.Generator().manual_seed(2))
    x = torch.cat([x, 1024 * x], 1).to(layer.weight.device)             # a clamp shows at 1024
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    try:
        found = layer(x)
    except Exception:       # its code may want anything else: then it is no Linear
        return False
    return (isinstance(found, torch.Tensor) and found.shape == expected.shape
            and bool(((found - expected).norm(dim=-1) <= 1e-4 * expected.norm(dim=-1)).all()))


def trace_rows(block, call, producer, layer, first, count):
    """Which of `count` rows of the producer, from `first`, makes each input channel of layer: [K].

    The first token attends only to itself, so there attention hands v through unchanged, whatever q
    and k are. With output channel first + r of the producer multiplied by r + 1, each input channel
    of layer is multiplied by the number of the row that makes it. None if some factor is no such
    number; that the rows are right, fold_is_exact proves.
    """
    module = block.get_submodule(producer)
    factor = torch.ones(module.out_features, device=call.hidden.device)
    factor[first:first + count] = torch.arange(1, count + 1)
    seen = []

    def keep(_, args):
        seen.append(args[0].reshape(-1, args[0].shape[-1])[:1])

    with block.get_submodule(layer).register_forward_pre_hook(keep):
        run_block(block, call)
        with module.register_forward_hook(lambda _, args, output: output * factor):
            run_block(block, call)
    if len(seen) != 2 or not all(map(len, seen)):       # an expert that no token reaches
        return None
    number = (seen[1] / seen[0])[0].round()
    if not ((number >= 1) & (number <= count)).all():
        return None
    return first - 1 + number.long().cpu()


def candidate_folds(block, call, order, layers):
    """Possible folds for layers, from the modules that ran before them, nearest first."""
    K = block.get_submodule(layers[0]).in_features
    before = order[:min(order.index(name) for name in layers)]
    for name in dict.fromkeys(reversed(before)):
        producer = block.get_submodule(name)
        gain = getattr(producer, "weight", None)
        if not isinstance(producer, nn.Linear):
            # a gain shorter than K: a norm over each head, with one gain for all heads
            if isinstance(gain, torch.Tensor) and gain.ndim == 1 and K % len(gain) == 0:
                rows = torch.arange(K) % len(gain)
                yield Fold(name, "gain", rows)
                yield Fold(name, "1 + gain", rows)
            continue
        if not is_plain(producer):
            continue
        R = producer.out_features
        if R == K:
            yield Fold(name, "rows", torch.arange(K))
            yield Fold(name, "root rows", torch.arange(K))
            continue
        for first, count in [(0, R)] + [(R - K, K), (0, K)] * (R > K):  # all, the last, the first
            rows = trace_rows(block, call, name, layers[0], first, count)
            if rows is not None:
                yield Fold(name, "rows", rows)


def numbers_of(block, name):
    """("experts.{}.up", ["3"]) for experts.3.up: the places in the ModuleLists of a block."""
    parts = name.split(".")
    listed = [isinstance(block.get_submodule(".".join(parts[:i])), nn.ModuleList)
              for i in range(len(parts))]
    return (".".join("{}" if is_number else part for part, is_number in zip(parts, listed)),
            [part for part, is_number in zip(parts, listed) if is_number])


def plan_group(block, call, order, layers, skipped, shared, known):
    """The Group of the layers that are not skipped, with the first fold that is proven.

    known: {layers without their numbers: [Group, ...]}. Of many experts only the first are
    searched: what held for one is proven first for the next, and where two have no fold none has.
    """
    kept = tuple(name for name in layers if name in skipped)
    packed = tuple(name for name in layers if name not in skipped)
    K = block.get_submodule(packed[0]).in_features
    fixed = [name for name in kept if name in shared or order.count(name) > 1
             or block.get_submodule(name).in_features != K]
    if fixed:
        return Group(packed, None, kept, f"{fixed[0]} reads the same tensor and is left alone")
    alike = known.get(tuple(numbers_of(block, name)[0] for name in layers), [])
    if len(alike) > 1 and not any(group.fold for group in alike):
        return Group(packed, None, kept, alike[0].reason)
    tried, candidates = [], candidate_folds(block, call, order, layers)
    if alike and alike[-1].fold:
        pattern, own = numbers_of(block, alike[-1].fold.producer)
        numbers = numbers_of(block, layers[0])[1]
        name = pattern.format(*numbers, *own[len(numbers):])
        width = block.get_submodule(layers[0]).in_features
        if name in order and len(alike[-1].fold.rows) == width:
            candidates = chain([alike[-1].fold._replace(producer=name)], candidates)
    for fold in candidates:
        if fold.producer in shared:
            continue
        if fold_is_exact(block, call, layers, fold):
            return Group(packed, fold, kept)
        tried.append(fold.producer)
    names = ", ".join(dict.fromkeys(tried))
    return Group(packed, None, kept, "no producer whose scaling leaves the block's output "
                 f"unchanged; tried: {names or 'no norm or Linear of this width runs before'}")


@torch.no_grad()
def plan_block(block, call, bits, group_size, shared=()):
    """The groups of Linears of a block, each with its proven fold, and the Linears left alone.

    shared: names of modules whose parameters serve elsewhere in the model too. Returns
    ([Group, ...] in the order they run, {layer name: reason}).
    """
    linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    block, call = probe_copy(block), call.float()
    groups, skipped, reached, known = [], {}, set(), {}
    for seed in range(16):                  # until every expert has been given a token
        hidden = torch.randn(call.hidden.shape, generator=torch.Generator().manual_seed(seed))
        call = call.with_hidden(hidden.to(call.hidden.device))
        order, readers, routers = trace_block(block, call)
        for layers in readers:
            layers = list(dict.fromkeys(layers))
            if reached.isdisjoint(layers):
                skipped.update(reasons_to_skip(block, layers, order, routers, shared, bits,
                                               group_size))
                if not skipped.keys() >= set(layers):
                    group = plan_group(block, call, order, layers, skipped, shared, known)
                    key = tuple(numbers_of(block, name)[0] for name in layers)
                    known.setdefault(key, []).append(group)
                    groups.append(group)
        reached.update(order)
        if reached.issuperset(linears):
            break
    skipped.update({name: "not reached when the block ran" for name in linears
                    if name not in reached})
    return groups, skipped


def reasons_to_skip(block, layers, order, routers, shared, bits, group_size):
    """{name: reason} for those of the layers, which read one tensor, that must stay as they are."""
    reasons = {}
    for name in layers:
        layer = block.get_submodule(name)
        if name in routers:
            reasons[name] = "a router: experts are chosen by its output"
        elif name in shared:
            reasons[name] = "its weight is shared with another module"
        elif order.count(name) > 1:
            reasons[name] = "used more than once in the block"
        elif not is_plain(layer):
            reasons[name] = f"a {type(layer).__name__}, which is not a product with its weight"
        elif group_size != -1 and layer.in_features % group_size:
            reasons[name] = (f"in_features {layer.in_features} is not a multiple of group_size "
                             f"{group_size}")
        elif layer.out_features % 8:
            reasons[name] = f"out_features {layer.out_features} is not a multiple of 8"
    # Readers of a checkpoint fuse q, k and v, gate and up: of one module's Linears, all or none.
    parents = {name.rpartition(".")[0] for name in reasons.keys() - routers}
    return {name: reasons.get(name, "shares its input with a layer that cannot be quantised")
            for name in layers if name in reasons or name.rpartition(".")[0] in parents}


# ---- The model walk ------------------------------------------------------------------------------


@torch.no_grad()
def find_blocks(model):
    """(name, ModuleList) of the decoder blocks: of the lists that run, that of most parameters."""
    ran = set()
    with ExitStack() as hooks:
        for module in model.modules():
            hooks.enter_context(module.register_forward_pre_hook(lambda m, _: ran.add(m)))
        model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device),
                         use_cache=False)
    lists = [(name, module) for name, module in model.named_modules()
             if isinstance(module, nn.ModuleList) and not ran.isdisjoint(module)]
    if not lists:
        raise ValueError(f"model {type(model).__name__} has no nn.ModuleList of blocks to quantise")
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def replace_conv1d(model):
    """transformers' Conv1D (GPT-2) stores W^T: turn every one into the nn.Linear that it is."""
    from transformers.pytorch_utils import Conv1D

    for name in [name for name, module in model.named_modules() if isinstance(module, Conv1D)]:
        module = model.get_submodule(name)
        K, N = module.weight.shape
        linear = nn.Linear(K, N, device="meta")
        linear.weight = nn.Parameter(module.weight.data.T.contiguous(), requires_grad=False)
        linear.bias = module.bias
        model.set_submodule(name, linear)


class _Recorded(Exception):
    """Ends a forward pass when the arguments of all blocks have been seen."""


@torch.no_grad()
def record_calls(model, blocks, tokens):
    """The arguments the model gives each of the blocks when it runs on tokens: [Call, ...].

    ValueError if a block does not run, or runs twice before the others have run.
    """
    calls = {}

    def record(block, args, kwargs):
        if block in calls:
            raise ValueError(f"block {list(blocks).index(block)} runs more than once in a forward "
                             "pass: shared blocks are not supported")
        call = Call(*map_tensors(lambda x: x, (args, kwargs)))  # the model may fill its dicts later
        calls[block] = call.with_hidden(call.hidden.clone())
        if len(calls) == len(blocks):
            raise _Recorded

    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_pre_hook(record, with_kwargs=True))
        try:
            model.base_model(input_ids=tokens, use_cache=False)
        except _Recorded:
            return [calls[block] for block in blocks]
    missing = [i for i, block in enumerate(blocks) if block not in calls]
    raise ValueError(f"blocks {missing} do not run in a forward pass: not supported")


@torch.no_grad()
def walk_blocks(model, blocks, tokens, batch_size, device, few, visit):
    """Drive the model's own forward once, with visit(index, block, calls) in each block's place.

    The model runs on all samples at once, its blocks on micro-batches: calls is the list of the
    block's arguments for each. visit may change the block, and returns what it makes of each, where
    the block came from: the next one's inputs. few: the Call of each block for a single sample (see
    split_call). ValueError for NaN or Inf.
    """
    def drive(index, block):
        home = next(block.parameters()).device

        def forward(*args, **kwargs):
            del block.forward                       # from here on, the block is itself again
            parts = split_call(Call(args, kwargs), few[index], len(tokens), batch_size)
            calls = [call.to(device) for call in parts]
            block.to(device)
            outputs = visit(index, block, calls)
            if not all(hidden_of(output).isfinite().all() for output in outputs):
                raise ValueError(f"the output of block {index} contains NaN or Inf")
            block.to(home)
            for key in (key for key, value in kwargs.items() if isinstance(value, dict)):
                kwargs[key].update(map_tensors(lambda x: x.to(home), calls[0].kwargs[key]))
            return join_outputs(outputs, [len(call.hidden) for call in calls])

        return forward

    for index, block in enumerate(blocks):
        if "forward" in block.__dict__:
            raise ValueError(f"block {index} has a forward of its own (accelerate's device_map?): "
                             "load the model without one")
        block.forward = drive(index, block)
    try:
        model.base_model(input_ids=tokens, use_cache=False)
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def split_call(call, single, samples, batch_size):
    """The Call of all samples in micro-batches of batch_size: [Call, ...].

    A tensor is split along dimension 0 if that is `samples` times as long as in the Call of one
    sample. What cannot be split (hidden states with another dimension first, dicts and objects in
    which blocks leave something for later ones) goes to the block as it is, at once.
    """
    leaves, shape = tree_flatten(tuple(call))
    singles, _ = tree_flatten(tuple(single))

    def is_batched(x, one):
        return (isinstance(x, torch.Tensor) and isinstance(one, torch.Tensor) and x.ndim == one.ndim
                and x.ndim > 0 and len(x) == samples * len(one))

    plain = all(isinstance(x, (torch.Tensor, bool, int, float, str, type(None))) for x in leaves)
    if not plain or len(leaves) != len(singles) or not is_batched(call.hidden, single.hidden) \
            or any(isinstance(value, dict) for value in call.kwargs.values()):
        return [call]
    parts = [x.split(batch_size * len(one)) if is_batched(x, one) else None
             for x, one in zip(leaves, singles)]
    return [Call(*tree_unflatten([x if part is None else part[i] for x, part in zip(leaves, parts)],
                                 shape)) for i in range(-(-samples // batch_size))]


def join_outputs(outputs, sizes):
    """What a block returned for micro-batches of `sizes` samples, as one."""
    leaves = [tree_flatten(output)[0] for output in outputs]
    joined = [torch.cat(parts) if all(isinstance(x, torch.Tensor) and x.ndim and len(x) == size
                                      for x, size in zip(parts, sizes)) else parts[0]
              for parts in zip(*leaves)]
    return tree_unflatten(joined, tree_flatten(outputs[0])[1])


def cpu_has(dtype):
    """Whether this CPU (x86) has instructions for products of a 16-bit dtype."""
    names = {torch.bfloat16: ("avx512_bf16", "amx_bf16"),
             torch.float16: ("avx512_fp16", "amx_fp16")}
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()       # not in older torch
    return any(capabilities.get(name) for name in names[dtype])


class FastLinears(TorchFunctionMode):
    """On a CPU, a model's Linears multiply in a dtype that the CPU has instructions for.

    16-bit products without instructions crawl: they run in float32. Those of a float32 model run in
    bfloat16 if the CPU has that, unless exact: in steps of 2^-9, as in a bfloat16 model. Inputs and
    outputs keep their dtype (under autocast a model would meet others than it expects), and what a
    model itself multiplies in more than its own dtype stays as it is.
    """

    def __init__(self, dtype, exact):
        super().__init__()
        bfloat16 = cpu_has(torch.bfloat16) and not exact
        self.dtype, self.fast = dtype, torch.bfloat16 if bfloat16 else torch.float32
        if dtype in (torch.bfloat16, torch.float16) and cpu_has(dtype):
            self.fast = dtype

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is nn.functional.linear:
            x = args[0] if args else kwargs["input"]
            if x.device.type == "cpu" and x.dtype == self.dtype != self.fast:
                args, kwargs = map_tensors(lambda y: y.to(self.fast), (args, kwargs))
                return function(*args, **kwargs).to(x.dtype)
        return function(*args, **kwargs)


@torch.no_grad()
def run_calls(block, calls, exact=True, home=None):
    """What the block returns for each Call, on the device `home` if given (exact: FastLinears)."""
    with FastLinears(calls[0].hidden.dtype, exact):
        return [map_tensors(lambda x: x if home is None else x.to(home),
                            block(*call.args, **call.kwargs)) for call in calls]


@torch.no_grad()
def collect_statistics(block, groups, calls, exact=True, home=None):
    """(InputStatistics of every group, what run_calls returns), in one pass."""
    entries = []
    with ExitStack() as hooks:
        for group in groups:
            layer = block.get_submodule(group.layers[0])
            entry = InputStatistics(layer.in_features, layer.weight.device)
            hooks.enter_context(layer.register_forward_pre_hook(
                lambda _, args, kwargs, entry=entry: entry.update((*args, *kwargs.values())[0]),
                with_kwargs=True))
            entries.append(entry)
        outputs = run_calls(block, calls, exact, home)
    for entry in entries:
        entry.add_over_ranks()
    return entries, outputs


def quantize_block(block, path, groups, statistics, call, **how):
    """quantize_group for all groups of a block: their lines of the report, in the order they run.

    The packed layers keep W_hat in .dense: checking a fold then builds and prepares no kernel.
    """
    lines, dtype = [], next(block.parameters()).dtype
    # not in the paper: last group first, since a fold changes rows of an earlier group, which is
    # then searched and packed as it will be stored.
    for group, entry in reversed(list(zip(groups, statistics))):
        lines.insert(0, quantize_group(block, path, group, entry, call, **how))
        for layer in map(block.get_submodule, group.layers):
            layer.dense = layer.dequantized_weight().to(dtype)
    return lines


@torch.no_grad()
def quantize_group(block, path, group, statistics, call, *, tokens, bits, group_size, scale, clip,
                   refine, input_scale, rounding, exact):
    """Search s for the layers of a group, fold it and pack them; returns their line of the report.

    path: the block's name in the model. tokens: of the calibration set; an expert to which fewer
    than a group's channels were routed is only rounded.
    """
    W = torch.cat([block.get_submodule(name).weight.float() for name in group.layers])  # [N, K]
    G = check_grid(bits, group_size, W.shape[1])
    line = {"layers": [f"{path}.{name}" for name in group.layers], "folded_into": None,
            "fold": None, "reason": group.reason if scale else "scale is False"}
    if statistics.tokens < min(G, tokens):
        pack_group(block, group, W, None, bits, G)
        return {**line, "alpha": 0.0, "loss_rtn": 0.0, "loss": 0.0, "curve": (),
                "s": torch.ones(W.shape[1]), "reason":
                f"{statistics.tokens} of {tokens} calibration tokens: too few, plain rounding"}
    C, s_X = statistics.C, statistics.s_X
    if not (C.isfinite().all() and s_X.isfinite().all()):
        raise ValueError(f"the input of {path}.{group.layers[0]} contains NaN or Inf")
    scaled = scale and (group.fold or input_scale)
    weight = block.get_submodule(group.layers[0]).weight
    with tf32_products(weight, exact):
        found = (search_group(block, group, W, C, s_X, bits, G, clip, refine) if scaled else
                 search_scale(W, C, s_X, bits, G, clip, alphas=[0.0]))
    if scaled:
        if group.fold:
            apply_fold(block, group, call, found.s)
            line.update(folded_into=f"{path}.{group.fold.producer}", fold=group.fold.kind)
        else:
            line.update(folded_into="the layers' input_scale", fold="input", reason="")
    if rounding:    # of W diag(s), whose input is X / s
        rounding = partial(rounding, C=C / (found.s[:, None] * found.s))
    pack_group(block, group, W * found.s, found.shrink, bits, G, rounding or quantize)
    layers = [block.get_submodule(name) for name in group.layers]
    if rounding:
        W_hat = torch.cat([layer.weight for layer in layers])
        found = found._replace(loss=gram_loss(W_hat / found.s - W, C).item())
    if line["fold"] == "input":
        for layer in layers:
            layer.input_scale = (1 / found.s).to(weight.dtype)
    return {**line, "alpha": found.alpha, "loss_rtn": found.loss_rtn, "loss": found.loss,
            "curve": found.curve, "s": found.s.cpu()}


def search_group(block, group, W, C, s_X, bits, group_size, clip, refine):
    """search_scale for an s that the group's producer, or its layers' input_scale, can store."""
    dtype = block.get_submodule(group.layers[0]).weight.dtype
    if group.fold:
        rows = group.fold.rows
        storable = storable_scale(block.get_submodule(group.fold.producer), group.fold.kind, rows)
    else:
        rows = torch.arange(W.shape[1])

        def storable(s):
            return 1 / (1 / s).to(dtype).float()
    s_X = shared_score(s_X.cpu(), rows.cpu()).to(W.device)      # index_add is exact on a CPU only
    found = search_scale(W, C, s_X, bits, group_size, clip, storable=storable)
    if refine:
        rows = rows.to(W.device)
        found = refine_scale(W, C, found, bits, group_size, clip, refine, rows, storable)
    return found


def pack_group(block, group, W, shrink, bits, group_size, rounding=quantize):
    """Replace the group's layers by AWQLinear of their rows of the stacked W [N, K]."""
    start = 0
    for name in group.layers:
        layer = block.get_submodule(name)
        rows = slice(start, start + layer.out_features)
        part = None if shrink is None else shrink[:, rows]
        packed = AWQLinear.from_weight(W[rows], layer.bias, bits, group_size, part, rounding)
        block.set_submodule(name, packed)
        start = rows.stop


def shared_score(s_X, rows):
    """s_X averaged over the input channels that one producer row makes. [K]"""
    # not in the paper: with grouped queries v's rows are read by several heads, so s is shared.
    sums = s_X.new_zeros(int(rows.max()) + 1)
    counts = sums.index_add(0, rows, torch.ones_like(s_X))
    return (sums.index_add(0, rows, s_X) / counts.clamp(min=1))[rows]


FOLD_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def apply_fold(block, group, call, s):
    """Fold s into its producer; check on a few tokens that what the block adds is unchanged."""
    expected = run_block(block, call).float()
    divide_output(block.get_submodule(group.fold.producer), group.fold.kind,
                  group.fold.rows.to(s.device), s)
    for name in group.layers + group.kept:
        weight = block.get_submodule(name).weight
        weight.data = (weight.float() * s).to(weight.dtype)
    added = (expected - call.hidden.float()).norm()
    error = (run_block(block, call).float() - expected).norm() / added.clamp(min=1e-30)
    if not error < FOLD_TOLERANCE[weight.dtype]:
        raise ValueError(f"folding s into {group.fold.producer} changed what the block adds by "
                         f"{error:.2%}: the block does not behave as the one it was proven on")


@torch.no_grad()
def quantize_model(model, tokens, bits=4, group_size=128, clip=True, refine=None, scale=True,
                   device=None, batch_size=4, progress=True, input_scale=False, rounding=None,
                   sequential=False, exact=False):
    """Replace the Linears of a transformers causal LM's blocks by AWQLinear, in place.

    model: a decoder-only AutoModelForCausalLM, float32, float16 or bfloat16, in CPU or CUDA memory.
    tokens: calibration token ids [samples, length], an integer tensor.
    clip, scale: search the clipping, the scale s; with neither the result is plain rounding (RTN).
    refine: None, "grid" or "gradient", a search over single channels from the grid's answer.
    device: where a block is while it is worked on (default: CUDA if there is one).
    batch_size: at most so many samples run through a block at once.
    input_scale: layers whose 1/s can be folded nowhere multiply their input by it (a buffer that no
    other reader of AWQ checkpoints knows: save_quantized refuses it) instead of keeping s = 1.
    rounding: instead of quantize, a function (W, bits, group_size, shrink, C=Gram) of its results.
    sequential: blocks see the inputs that the quantised blocks before them make, as in GPTQ, at the
    price of a second pass; unless set, those of the full-precision model, as in the paper's code.
    exact: multiply in float32, or in the model's own dtype. Unless set, a CPU with instructions for
    it runs a float32 model's Linears in bfloat16 (see FastLinears), and a GPU searches for a 16-bit
    model in TF32 (see tf32_products).

    Returns the report, a dict of "bits", "group_size", "seconds", "skipped" ({layer: reason}) and
    "groups": a list of {"block", "layers", "folded_into", "fold", "reason" (why s = 1), "alpha",
    "loss_rtn", "loss", "curve", "s"}, losses as in Eq. 4 per token, curve the (alpha, clipped,
    loss) that the grid tried, s [K] float32.
    "stages" gives the seconds of "plan", "statistics" (the pass and its Gram matrices), "search"
    (fold and pack included) and "other" (between blocks; a second pass).
    Under torch.distributed every rank calls this with the same model and tokens, runs its slice of
    the samples and searches the grid on its slice of each layer's rows (refine and rounding: every
    rank on all rows); all end with the same weights.
    ValueError for arguments out of range, NaN or Inf in a weight or activation, and when no layer
    can be quantised; ConnectionError if another rank dies. An error after the walk began leaves
    the model partly quantised.
    """
    watch = Stopwatch()
    keep_freed_memory()
    check_arguments(model, tokens, bits, group_size, refine, batch_size)
    if len(tokens) < ranks()[1]:
        raise ValueError(f"tokens has {len(tokens)} samples: each of {ranks()[1]} ranks needs one")
    device = check_device(device or ("cuda" if torch.cuda.is_available() else model.device))
    plans, prefix, blocks, calls, skipped = plan_model(model, tokens, bits, group_size)
    watch.lap("plan", device)
    report, mine = [], tokens[my_share(len(tokens))].to(model.device)
    how = {"tokens": tokens.numel(), "bits": bits, "group_size": group_size, "scale": scale,
           "clip": clip, "refine": refine, "input_scale": input_scale, "rounding": rounding,
           "exact": exact}
    hide = not progress or ranks()[0] > 0
    with tqdm(total=len(blocks), desc="quantising", unit="block", disable=hide) as bar:
        def visit(index, block, batches):
            watch.lap("other", device)
            statistics, outputs = collect_statistics(block, plans[index], batches, exact,
                                                     model.device)
            watch.lap("statistics", device)
            lines = quantize_block(block, f"{prefix}.{index}", plans[index], statistics,
                                   calls[index].to(device), **how)
            watch.lap("search", device)
            if sequential:
                outputs = run_calls(block, batches, exact, model.device)
            for module in block.modules():      # no further pass needs W_hat
                if isinstance(module, AWQLinear):
                    module.dense = None
            report.extend({"block": index, **line} for line in lines)
            bar.set_postfix_str(f"loss {loss_ratio(report):.3f} of RTN's")
            bar.update()
            return outputs

        walk_blocks(model, blocks, mine, batch_size, device, calls, visit)
    watch.lap("other", device)
    model.config.quantization_config = checkpoint_config(bits, group_size, list(skipped))
    return {"bits": bits, "group_size": group_size, "groups": report, "skipped": skipped,
            "seconds": sum(watch.stages.values()), "stages": watch.stages}


def keep_freed_memory():
    """Have glibc keep what is freed: new memory, page by page, takes up to half the search's time.

    Freeing a block of up to 32 MiB raises its limits to that size (the dynamic threshold of
    mallopt(3)); this one is never touched.
    """
    torch.empty(28 * 2 ** 20, dtype=torch.uint8, device="cpu")


class Stopwatch:
    """Seconds by stage."""

    def __init__(self):
        self.stages, self.last = {}, time.time()

    def lap(self, stage, device):
        """The time since the last lap was this stage's."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.time()
        self.stages[stage] = self.stages.get(stage, 0.0) + now - self.last
        self.last = now


def loss_ratio(groups):
    """Mean over the groups of loss / RTN's loss; groups that RTN does not hurt are left out."""
    ratios = [line["loss"] / line["loss_rtn"] for line in groups if line["loss_rtn"] > 0]
    return sum(ratios) / len(ratios) if ratios else 1.0


def check_arguments(model, tokens, bits, group_size, refine=None, batch_size=1):
    """ValueError unless quantize_model can start."""
    check_grid(bits, group_size)
    is_module = isinstance(getattr(model, "base_model", None), nn.Module)
    if not is_module or not hasattr(model, "config"):
        raise ValueError(f"model is a {type(model).__name__}: it must be a transformers causal LM")
    if any(isinstance(module, AWQLinear) for module in model.modules()):
        raise ValueError("model is quantised already: it must have full-precision weights")
    if model.dtype not in FOLD_TOLERANCE:
        raise ValueError(f"model is {model.dtype}: it must be one of {list(FOLD_TOLERANCE)}")
    if refine is not None and refine not in REFINEMENTS:
        raise ValueError(f"refine is {refine!r}: it must be None or one of {list(REFINEMENTS)}")
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}: it must be an integer of at least 1")
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode is on: weights can be changed only outside of it")
    if not isinstance(tokens, torch.Tensor) or tokens.ndim != 2 or tokens.numel() == 0 \
            or tokens.dtype not in (torch.int32, torch.int64):
        kind = (f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, torch.Tensor)
                else type(tokens).__name__)
        raise ValueError(f"tokens is {kind}: it must be an int64 tensor [samples, length]")
    sequence_length(model, tokens.shape[1])
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ValueError(f"tokens run from {tokens.min()} to {tokens.max()}: they must be in "
                         f"[0, {vocabulary})")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{name} contains NaN or Inf: weights must be finite")


def check_device(name):
    """The torch.device; ValueError unless a tensor can be put there."""
    try:
        probe = torch.zeros(1, device=name)
        probe.tolist()      # "meta" has no values
        return probe.device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {str(name)!r}: {str(error).splitlines()[0]}") from None


def plan_model(model, tokens, bits, group_size):
    """plan_block for every block, once per structure.

    Returns ([[Group, ...] of each block], the blocks' name, the blocks, [Call of each on a few
    tokens], {skipped layer: reason}); ValueError if no layer can be quantised.
    """
    model.eval()
    replace_conv1d(model)
    prefix, blocks = find_blocks(model)
    # One sample, as split_call needs it; odd, as no layer's width is, for RouterTrace; and no
    # divisor of the sequence, so that split_call takes no [T, ...] tensor for a batch.
    length = next(n for n in (31, 29, 23) if tokens.shape[1] % n or n == 23)
    calls = record_calls(model, blocks, tokens[:1, :length].to(model.device))
    plans, skipped, known = [], {}, {}
    elsewhere = shared_modules(model)
    for index, (block, call) in enumerate(zip(blocks, calls)):
        path = f"{prefix}.{index}."
        shared = {name.removeprefix(path) for name in elsewhere if name.startswith(path)}
        structure = repr((block, [tuple(p.shape) for p in block.parameters()], sorted(shared)))
        if structure not in known:
            known[structure] = plan_block(block, call, bits, group_size, shared)
        groups, reasons = known[structure]
        plans.append(groups)
        skipped.update({path + name: reason for name, reason in reasons.items()})
    if not any(plans):
        raise ValueError(f"group_size is {group_size}: no layer can be quantised: "
                         f"{'; '.join(sorted(set(skipped.values()))) or 'there is no nn.Linear'}")
    return plans, prefix, blocks, calls, {**skipped, **skip_fused(model, prefix),
                                          **skip_outside(model, prefix)}


def shared_modules(model):
    """Names of the modules with a parameter that another one (or another name) has too."""
    users = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(parameter, []).append(name.rpartition(".")[0])
    return {name for names in users.values() if len(names) > 1 for name in names}


def skip_fused(model, prefix):
    """{name: reason} for the modules of blocks that hold fused experts [experts, rows, columns]."""
    sizes = {name: sum(p.numel() for p in module.parameters(recurse=False) if p.ndim == 3)
             for name, module in model.named_modules() if name.startswith(prefix + ".")
             and not isinstance(module, (nn.Conv1d, nn.Linear))}
    share = sum(sizes.values()) / sum(p.numel() for p in model.parameters())
    return {name: f"fused 3-D parameters stay in full precision: {share:.0%} of the model in all"
            for name, size in sizes.items() if size}


def skip_outside(model, prefix):
    """{name: reason} for the Linears outside the decoder blocks (lm_head, projections)."""
    return {name: "outside the decoder blocks" for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not name.startswith(prefix + ".")}


@torch.no_grad()
def round_model(model, bits=4, group_size=128):
    """RTN: plain rounding of the layers quantize_model would quantise, in place, without data.

    Returns {"bits", "group_size", "groups": [], "skipped", "seconds"}; errors as quantize_model.
    """
    start = time.time()
    tokens = torch.zeros(2, 1, dtype=torch.long)
    check_arguments(model, tokens, bits, group_size)
    tokens = tokens.expand(2, sequence_length(model, default=31))    # enough to reach all experts
    plans, _, blocks, _, skipped = plan_model(model, tokens, bits, group_size)
    for block, groups in zip(blocks, plans):
        for group in groups:
            W = torch.cat([block.get_submodule(name).weight for name in group.layers])
            pack_group(block, group, W, None, bits, group_size)
    model.config.quantization_config = checkpoint_config(bits, group_size, list(skipped))
    return {"bits": bits, "group_size": group_size, "groups": [], "skipped": skipped,
            "seconds": time.time() - start, "stages": {}}


# ---- The packed layer ----------------------------------------------------------------------------


class AWQLinear(nn.Module):
    """nn.Linear with packed weights, its buffers named and laid out as in the checkpoint.

    qweight [K, N/8] int32, qzeros [K/G, N/8] int32, scales [K/G, N] float16, bias [N] or None
    (4 bits; for 2, 3 and 8 bits packed_width(N, bits) words a row). W[n, k] = (q - zero) delta,
    with delta called scales there. forward takes [..., K] float32, float16 or bfloat16.
    """

    def __init__(self, in_features, out_features, bias=False, bits=4, group_size=128,
                 dtype=None, device=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, check_grid(bits, group_size, in_features)
        width, groups = packed_width(out_features, bits), in_features // self.group_size
        words = {"dtype": torch.int32, "device": device}
        self.register_buffer("qweight", torch.zeros(in_features, width, **words))
        self.register_buffer("qzeros", torch.zeros(groups, width, **words))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16,
                                                   device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device)
                             if bias else None)
        self.register_buffer("input_scale", None)       # 1/s, where no other layer divides by s
        self.repacked, self.prepared = None, False      # the kernel's layout: see prepare
        self.dense = None       # W_hat, while the model is quantised and no kernel is to be built

    @classmethod
    def from_weight(cls, W, bias, bits, group_size, shrink=None, rounding=quantize):
        """Quantise W [N, K] by rounding (see quantize) and pack it."""
        N, K = W.shape
        layer = cls(K, N, False, bits, group_size, device="meta")
        q, delta, zero = rounding(W, bits, group_size, shrink)
        layer.qweight, layer.qzeros = pack(q.T.contiguous(), bits), pack(zero.T.contiguous(), bits)
        layer.scales = delta.T.contiguous()
        layer.bias = None if bias is None else bias.detach().clone()
        return layer

    def dequantized_weight(self):
        """W_hat [N, K] float32."""
        q = unpack(self.checkpoint_qweight(), self.bits, self.out_features).T.contiguous()
        zero = unpack(self.qzeros, self.bits, self.out_features).T
        return dequantize(q, self.scales.T, zero)

    @property
    def weight(self):
        """W_hat anew at every access, for code of transformers that expects a Linear to have it."""
        W_hat = self.dequantized_weight()
        return W_hat if self.input_scale is None else W_hat * self.input_scale

    def forward(self, x):
        if self.input_scale is not None:
            x = x * self.input_scale.to(x.dtype)
        if self.bits != 4 or self.dense is not None:
            W_hat = self.dequantized_weight() if self.dense is None else self.dense
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return nn.functional.linear(x, W_hat.to(x.dtype), bias)
        # A compiled graph must not rearrange buffers: it takes the layout that is there.
        if not self.prepared and not torch.compiler.is_compiling():
            self.prepare()
        weight = self.qweight if self.repacked is None else self.repacked
        return kernel.awq_linear(x, weight, self.qzeros, self.scales, self.bias,
                                 group_size=self.group_size)

    def prepare(self):
        """Rearrange the weight for its device's kernel; qweight's own memory is given up."""
        self.restore()
        self.repacked = kernel.prepare(self.qweight, self.qzeros, self.scales, self.group_size)
        self.qweight = self.qweight if self.repacked is None else None
        self.prepared = True

    def restore(self):
        """The inverse of prepare."""
        self.qweight, self.repacked, self.prepared = self.checkpoint_qweight(), None, False

    def checkpoint_qweight(self):
        """qweight as the checkpoint has it, bit for bit, whether rearranged or not."""
        if self.repacked is None:
            return self.qweight
        return kernel.restore(self.repacked, self.out_features, self.in_features)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "qweight"] = self.checkpoint_qweight()

    def _load_from_state_dict(self, *arguments):
        self.restore()
        super()._load_from_state_dict(*arguments)

    def _apply(self, function, recurse=True):
        """Moves with the module, but .to(dtype) leaves the scales float16: they are exact there."""
        scales = self.scales
        self.restore()
        super()._apply(function, recurse)
        self.scales = scales.to(self.qweight.device)
        return self

    def extra_repr(self):
        return (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"bias={self.bias is not None}, bits={self.bits}, group_size={self.group_size}")


# ---- Calibration text ----------------------------------------------------------------------------

DATASETS = ("wikitext", "pileval", "pydoc")


def load_documents(data, split="train"):
    """The documents of `data`: "wikitext" or "pileval" (hub), "pydoc" (offline), a text file.

    split: "train" or "test"; a file has none and is used whole. ValueError for an unknown name,
    OSError for a data set that cannot be reached.
    """
    if isinstance(data, str) and data == "pydoc":
        from tinylm.corpus import stdlib_documents
        return stdlib_documents(split)
    if isinstance(data, str) and data in ("wikitext", "pileval"):
        from datasets import load_dataset
        name, subset, part = {
            ("wikitext", "train"): ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
            ("wikitext", "test"): ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
            ("pileval", "train"): ("mit-han-lab/pile-val-backup", None, "validation[:4096]"),
            ("pileval", "test"): ("mit-han-lab/pile-val-backup", None, "validation[4096:4608]"),
        }[data, split]
        try:
            return list(load_dataset(name, subset, split=part)["text"])
        except OSError as error:
            raise OSError(f"data set {data!r} ({name}) cannot be loaded from the hub: offline, use "
                          "'pydoc' or a text file") from error
    if isinstance(data, (str, os.PathLike)) and Path(data).is_file():
        try:
            return [Path(data).read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise ValueError(f"data is {str(data)!r}: it is not UTF-8 text: {error}") from error
    raise ValueError(f"data is {str(data)!r}: it must be one of {DATASETS} or a text file")


def calibration_tokens(calib_data, tokenizer, samples=128, seq_len=512, seed=0):
    """[samples, seq_len] token ids from calib_data, without padding.

    calib_data: a name or path for load_documents ("train" split), a list of strings, or a tensor
    [samples, length], which is returned as it is. Documents are joined by blank lines, tokenised
    and cut to windows of seq_len; the seed chooses `samples` of them. ValueError if too few.
    """
    if samples < 1 or seq_len < 1:
        raise ValueError(f"samples is {samples}, seq_len {seq_len}: both must be at least 1")
    if isinstance(calib_data, torch.Tensor):
        return calib_data
    if isinstance(calib_data, (list, tuple)):
        if not all(isinstance(text, str) for text in calib_data):
            raise ValueError("calib_data is a list with items that are not strings: only text is")
        documents = calib_data
    else:
        documents = load_documents(calib_data)
    ids = tokenizer("\n\n".join(documents), verbose=False, return_tensors="pt").input_ids[0].long()
    windows = ids[:len(ids) // seq_len * seq_len].view(-1, seq_len)
    if len(windows) < samples:
        raise ValueError(f"calib_data has {len(ids)} tokens, {len(windows)} windows of {seq_len}: "
                         f"{samples} samples need {samples * seq_len} tokens")
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:samples]
    return windows[chosen]


# ---- Checkpoints ---------------------------------------------------------------------------------


def checkpoint_config(bits, group_size, skipped):
    """The quantization_config of config.json. 2, 3 and 8 bits are not in the AWQ GEMM format: they
    get a version of their own, which other readers refuse."""
    return {"quant_method": "awq", "bits": bits, "group_size": group_size, "zero_point": True,
            "version": "gemm" if bits == 4 else "dense", "modules_to_not_convert": sorted(skipped)}


def check_checkpoint_config(config):
    """ValueError, naming the entry, for a quantization_config that this file cannot read."""
    if config.get("quant_method") != "awq":
        raise ValueError(f"quant_method is {config.get('quant_method')!r}: it must be 'awq'")
    for key in ("bits", "group_size"):
        if key not in config:
            raise ValueError(f"quantization_config has no {key}")
    check_grid(config["bits"], config["group_size"])
    version = config.get("version") or config.get("format") or "gemm"
    if config.get("backend") == "llm-awq":
        version = "llm-awq"
    expected = "gemm" if config["bits"] == 4 else "dense"
    if str(version).lower() != expected:
        raise ValueError(f"version is {version!r}: with {config['bits']} bits it must be "
                         f"{expected!r} (GEMV, Marlin, ExLlama, IPEX and TinyChat (llm-awq) "
                         "checkpoints are not read)")
    if config.get("zero_point", True) is not True:
        raise ValueError(f"zero_point is {config['zero_point']!r}: only checkpoints with zero "
                         "points (True) are read")


def read_header(path):
    """{tensor: (dtype, shape, file name)} of a safetensors file; ValueError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: only safetensors files are read")
    if not Path(path).is_file():
        raise ValueError(f"{path} is not there, though the checkpoint's index names it")
    try:
        with safe_open(path, framework="pt") as file:   # checks the header against the file's size
            entries = {name: file.get_slice(name) for name in file.keys()}
            return {name: (entry.get_dtype(), tuple(entry.get_shape()), Path(path).name)
                    for name, entry in entries.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file{misfit(path)}: "
                         f"{error}") from error


BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1,
         "BOOL": 1}


def misfit(path):
    """For an error: the first tensor whose header entry contradicts itself or the file, if any."""
    size, name = os.path.getsize(path), None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, 10 ** 8))            # safetensors' own limit
    try:
        for name, entry in json.loads(header).items():
            begin, end = (0, 0) if name == "__metadata__" else entry["data_offsets"]
            shape = (0,) if name == "__metadata__" else entry["shape"]
            need = math.prod(shape) and BYTES[entry["dtype"]] * math.prod(shape)
            if not 0 <= begin <= end <= size - 8 - length or end - begin != need:
                return f" (tensor {name} does not fit)"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f" (tensor {name} is not described)" if name else ""
    return ""


def read_headers(files, folder):
    """read_header of all shards; ValueError for a tensor stored twice or a shard outside folder."""
    tensors, root = {}, os.path.abspath(folder)
    for file in files:
        if Path(folder).is_dir() and not os.path.abspath(file).startswith(root + os.sep):
            raise ValueError(f"{file} is outside of {folder}: the checkpoint's index must not "
                             "leave its folder")
        header = read_header(file)
        for name in sorted(header.keys() & tensors.keys()):
            raise ValueError(f"{Path(file).name}: tensor {name} is in {tensors[name][2]} too")
        tensors.update(header)
    return tensors


def prepare_packed_layers(model, bits, group_size, files):
    """Put an AWQLinear where the files hold a packed layer; ValueError if a tensor does not fit.

    Only headers are read, and the model is still without memory. Returns their entries.
    """
    if not files:
        raise ValueError("state_dict is given: an AWQ checkpoint is read from safetensors only")
    replace_conv1d(model)
    tensors = renamed(model, read_headers(files, model.name_or_path))
    modules, stored = dict(model.named_modules()), {}       # {module: {tensor: header entry}}
    for name, entry in tensors.items():
        module, _, key = name.rpartition(".")
        stored.setdefault(module, {})[key] = entry
    packed = {name: entries for name, entries in stored.items()
              if entries.keys() & {"qweight", "qzeros"}}
    if not packed:
        raise ValueError(f"{Path(files[0]).name}: no tensor is called *.qweight, though the config "
                         "says quant_method awq")
    for name, entries in packed.items():
        layer = packed_layer(name, modules.get(name), entries, bits, group_size)
        model.set_submodule(name, layer)
    check_tensors(model, tensors)
    return tensors


def renamed(model, tensors):
    """The same entries under the names that transformers gives them when it loads this model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key
    rules, own = get_model_conversion_mapping(model), model.state_dict()
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    return {rename_source_key(name, renamings, [], model.base_model_prefix, own)[0]: entry
            for name, entry in tensors.items()}


def packed_layer(name, linear, entries, bits, group_size):
    """An AWQLinear without memory in the place of linear; ValueError unless entries are its own."""
    file = next(iter(entries.values()))[2]
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"{file}: {name} is packed, but the model has no nn.Linear of that name")
    try:
        with torch.device("meta"):
            layer = AWQLinear(linear.in_features, linear.out_features, linear.bias is not None,
                              bits, group_size, dtype=linear.weight.dtype)
    except ValueError as error:
        raise ValueError(f"{file}: {name} cannot be packed: {error}") from None
    for key, dtype in (("qweight", "I32"), ("qzeros", "I32"), ("scales", "F16")):
        expected = (dtype, tuple(getattr(layer, key).shape))
        if key not in entries:
            raise ValueError(f"{file}: tensor {name}.{key} is missing")
        if entries[key][:2] != expected:
            raise ValueError(f"{entries[key][2]}: tensor {name}.{key} is {entries[key][:2]}: it "
                             f"must be {expected}{other_layout(linear, *entries['qweight'][:2])}")
    for key in sorted(entries.keys() - layer.state_dict().keys()):
        raise ValueError(f"{entries[key][2]}: tensor {name}.{key} has no place beside a qweight")
    return layer


def other_layout(linear, dtype, shape):
    """For an error: which tool's layout a qweight that is not GEMM's may have."""
    N, K = linear.weight.shape
    if dtype == "I16":
        return " (TinyChat's or GEMV-fast's layout, which is not read)"
    names = {(N, K // 8): "GEMV", (K // 16, 2 * N): "Marlin", (K // 8, N): "GPTQ"}
    return f" ({names[shape]}'s layout, which is not read)" if shape in names else ""


FLOATS = ("F16", "BF16", "F32", "F64")


def check_tensors(model, tensors):
    """ValueError if a tensor of the model is missing from the files, or of another type or size.

    transformers would take memory for a missing tensor and draw it at random.
    """
    wanted = model.state_dict()
    for name in filter(tensors.__contains__, wanted):
        dtype, shape, file = tensors[name]
        # An order of axes that transformers' own conversions change is left to them.
        if sorted(shape) != sorted(wanted[name].shape) \
                or wanted[name].is_floating_point() != (dtype in FLOATS):
            raise ValueError(f"{file}: tensor {name} is {dtype, shape}: the model has "
                             f"{wanted[name].dtype} {tuple(wanted[name].shape)}")
    pairs = [pair for pair in model.all_tied_weights_keys.items() if tensors.keys() & pair]
    there = tensors.keys() | {name for pair in pairs for name in pair}
    ignored = model._keys_to_ignore_on_load_missing or ()
    missing = [name for name in wanted
               if name not in there and not any(re.search(rule, name) for rule in ignored)]
    # A tensor under another name may be one that transformers renames, splits or joins: that keeps
    # the number of elements.
    spare = sum(math.prod(tensors[name][1]) for name in tensors.keys() - wanted.keys())
    if sum(wanted[name].numel() for name in missing) > spare:
        files = ", ".join(sorted({entry[2] for entry in tensors.values()})[:3])
        raise ValueError(f"{files}: missing tensors: {', '.join(missing[:5])}")


def check_scales(model, tensors):
    """ValueError for a packed layer whose scales, now loaded, are not finite."""
    for name, module in model.named_modules():
        if isinstance(module, AWQLinear) and not module.scales.is_meta \
                and not module.scales.isfinite().all():
            raise ValueError(f"{tensors[name + '.scales'][2]}: tensor {name}.scales contains NaN "
                             "or Inf")


def register():
    """Let transformers' own from_pretrained read AWQ checkpoints, with nothing else installed."""
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class AwqConfig(QuantizationConfigMixin):
        def __init__(self, **config):
            check_checkpoint_config(config)
            self.__dict__.update(checkpoint_config(config["bits"], config["group_size"], []))

    class AwqQuantizer(HfQuantizer):
        requires_calibration = True

        def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
            config = self.quantization_config
            self.tensors = prepare_packed_layers(model, config.bits, config.group_size,
                                                 checkpoint_files)
            # in full paths, whatever the checkpoint said: what a later save_pretrained writes
            config.modules_to_not_convert = sorted(
                name for name, module in model.named_modules() if isinstance(module, nn.Linear)
                or any(p.ndim == 3 for p in module.parameters(recurse=False)))  # fused experts
            return model

        def _process_model_after_weight_loading(self, model, **kwargs):
            check_scales(model, self.tensors)
            for module in model.modules():      # now, because a compiled forward cannot do it
                if isinstance(module, AWQLinear) and module.bits == 4 and module.qweight.is_cuda:
                    module.prepare()
            return model

        def is_serializable(self, *args, **kwargs):
            return True

        @property
        def is_trainable(self):
            return False

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["awq"] = AwqConfig
    auto.AUTO_QUANTIZER_MAPPING["awq"] = AwqQuantizer


def check_target(folder):
    """ValueError unless folder can be written: it must be absent or an empty folder."""
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "a non-empty folder" if folder.is_dir() else "a file"
        raise ValueError(f"folder {folder} is {what}: it must not exist or be empty")
    if folder.is_mount():
        raise ValueError(f"folder {folder} is a mount point, which no folder can replace at once: "
                         "choose one inside it")
    above = next(parent for parent in folder.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"folder {folder} cannot be made: {above} is not a writable folder")


def save_quantized(model, folder, tokenizer=None, shard_size="5GB", calibration=None,
                   perplexity=None):
    """Write the quantised model (and tokenizer) to folder, config and safetensors, or nothing.

    calibration, perplexity: text for the model card (README.md), for instance "pileval, 128 x 512
    tokens". Everything is written to `.NAME.partial` beside the folder, which is then renamed.
    ValueError if the folder is a file or not empty, or if the model is not quantised.
    """
    folder = Path(folder).resolve()
    check_target(folder)
    if not any(isinstance(module, AWQLinear) for module in model.modules()):
        raise ValueError("model has no AWQLinear: call quantize_model first")
    if getattr(model.config, "quantization_config", None) is None:
        raise ValueError("model is quantised in part only: quantize_model did not finish")
    scaled = [name for name, module in model.named_modules()
              if getattr(module, "input_scale", None) is not None]
    if scaled:
        raise ValueError(f"model was quantised with input_scale: {scaled[0]} multiplies its input "
                         "by 1/s, for which the checkpoint format has no place")
    partial = folder.parent / f".{folder.name}.partial"
    if partial.is_symlink() or partial.is_file():
        raise ValueError(f"{partial} is in the way: the checkpoint is written there first")
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial, max_shard_size=shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        card = model_card(model, folder.name, calibration, perplexity)
        (partial / "README.md").write_text(card, encoding="utf-8")
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


MODEL_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- awq
- {bits}-bit
{link}---
# {name}

Quantised with AWQ (arXiv 2306.00978).

- base model: {base}
- bits: {bits}, asymmetric, group size {group_size}
- full precision: {skipped}
- calibration: {calibration}
- perplexity: {perplexity}

In transformers, with the awq.py and kernel.py that wrote this checkpoint:

```python
import awq
from transformers import AutoModelForCausalLM

awq.register()
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
```

{vllm}
"""


def model_card(model, name, calibration=None, perplexity=None):
    """The README.md of a checkpoint: what was quantised, how, and how to load it."""
    config = model.config.quantization_config
    config = config if isinstance(config, dict) else config.to_dict()
    bits, base = config["bits"], model.config.name_or_path or "unknown"
    # a local folder is nothing that a hub page could link to
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    link = f"base_model: {json.dumps(base)}\nbase_model_relation: quantized\n" if on_hub else ""
    vllm = (f"In vLLM: `vllm serve {name} --dtype float16`" if bits == 4 else
            f"The AWQ format has no {bits}-bit layout: vLLM and others cannot read this.")
    return MODEL_CARD.format(
        bits=bits, group_size=config["group_size"], name=name, link=link, vllm=vllm,
        base=base if on_hub else Path(base).name, calibration=calibration or "not recorded",
        skipped=", ".join(config["modules_to_not_convert"]) or "no Linear",
        perplexity=perplexity or "not measured")


def load_quantized(folder, **kwargs):
    """The model that save_quantized (or AutoAWQ) wrote, as transformers loads it: the same tensors.

    kwargs go to AutoModelForCausalLM.from_pretrained. ValueError for a checkpoint with missing,
    truncated or foreign tensors.
    """
    register()
    if Path(folder).is_dir():
        check_folder(Path(folder, kwargs.get("subfolder") or ""))
    kwargs.setdefault("use_safetensors", True)
    model, info = load_pretrained(folder, output_loading_info=True, **kwargs)
    for problem in ("missing", "mismatched", "unexpected"):
        keys = sorted(str(key) for key in info[f"{problem}_keys"] if "inv_freq" not in str(key))
        if keys:
            raise ValueError(f"checkpoint {folder} has {problem} tensors: {', '.join(keys[:5])}")
    return model


def check_folder(folder):
    """ValueError for damage that would stop transformers before register's own checks."""
    config = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(config, dict):
        raise ValueError(f"{folder}/config.json has no quantization_config: not quantised")
    check_checkpoint_config(config)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        also = f" (pickles are not: {', '.join(sorted(pickles))})" if pickles else ""
        raise ValueError(f"folder {folder} has no *.safetensors: only those are read{also}")
    for file in files:
        read_header(file)
    for path in folder.glob("*.safetensors.index.json"):
        index = read_json(path)
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not isinstance(index.get("metadata"), dict) \
                or not all(isinstance(shard, str) for shard in shards.values()):
            raise ValueError(f"{path} must have metadata and a weight_map {{tensor: file}}")


def read_json(path):
    """The dict in a JSON file; ValueError naming the file if there is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: it must be a JSON object")
    return content


def load_pretrained(name, **kwargs):
    """AutoModelForCausalLM.from_pretrained, in the stored dtype; OSError that names the model."""
    from transformers import AutoModelForCausalLM
    kwargs = {"dtype": "auto", "trust_remote_code": False, **kwargs}
    try:
        return AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except OSError as error:
        raise OSError(f"model {str(name)!r} cannot be loaded: no such folder, and the hub has no "
                      "such model or cannot be reached; local folders work offline") from error


def load_tokenizer(name, **kwargs):
    """AutoTokenizer.from_pretrained; OSError that names the model."""
    from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(name, **{"trust_remote_code": False, **kwargs})
    except OSError as error:
        raise OSError(f"model {str(name)!r} has no tokenizer that can be loaded") from error


# ---- The API that AutoAWQ had, and the command line ----------------------------------------------


class AutoAWQForCausalLM:
    """A model with the methods AutoAWQ's users know; `.model` is the transformers model."""

    def __init__(self, model, name, trust_remote_code=False):
        self.model, self.name, self.trust_remote_code = model, name, trust_remote_code
        self.calibration, self.calibration_tokenizer = None, None   # saved with the checkpoint

    @classmethod
    def from_pretrained(cls, name, trust_remote_code=False, **kwargs):
        """A full-precision model from a folder or the hub, in the dtype it is stored in."""
        model = load_pretrained(name, trust_remote_code=trust_remote_code, **kwargs)
        return cls(model, name, trust_remote_code)

    @classmethod
    def from_quantized(cls, folder, trust_remote_code=False, fuse_layers=False, **kwargs):
        """A quantised model (folder or hub): see load_quantized. fuse_layers is ignored."""
        model = load_quantized(folder, trust_remote_code=trust_remote_code, **kwargs)
        return cls(model, folder, trust_remote_code)

    def quantize(self, tokenizer=None, quant_config=None, calib_data="pileval", w_bit=4,
                 q_group_size=128, version="GEMM", zero_point=True, max_calib_samples=128,
                 max_calib_seq_len=None, seed=0, **options):
        """Calibrate and quantise in place; returns the report of quantize_model.

        quant_config, as in AutoAWQ, may hold w_bit, q_group_size, version and zero_point.
        calib_data: see calibration_tokens. max_calib_seq_len: 512, or the model's
        positions if fewer. options go to quantize_model. tokenizer: the model's own unless given.
        """
        settings = {"w_bit": w_bit, "q_group_size": q_group_size, "version": version,
                    "zero_point": zero_point}
        unknown = set(quant_config or {}) - set(settings)
        if unknown:
            raise ValueError(f"quant_config has {sorted(unknown)}: its keys are {list(settings)}")
        settings.update(quant_config or {})
        if str(settings["version"]).upper() != "GEMM" or settings["zero_point"] is not True:
            raise ValueError(f"version is {settings['version']!r}, zero_point "
                             f"{settings['zero_point']!r}: only 'GEMM' with True is written")
        check_grid(settings["w_bit"], settings["q_group_size"])
        if not isinstance(calib_data, torch.Tensor) and tokenizer is None:
            tokenizer = self.tokenizer
        length = sequence_length(self.model, max_calib_seq_len)
        tokens = calibration_tokens(calib_data, tokenizer, max_calib_samples, length, seed)
        report = quantize_model(self.model, tokens, settings["w_bit"], settings["q_group_size"],
                                **options)
        source = Path(calib_data).name if isinstance(calib_data, (str, os.PathLike)) else "own text"
        self.calibration_tokenizer = tokenizer
        self.calibration = f"{source}, {len(tokens)} x {tokens.shape[1]} tokens, seed {seed}"
        return report

    @property
    def tokenizer(self):
        return load_tokenizer(self.name, trust_remote_code=self.trust_remote_code)

    def save_quantized(self, folder, tokenizer=None, safetensors=True, shard_size="5GB",
                       perplexity=None):
        """See save_quantized; only safetensors are written. tokenizer: that of quantize if none."""
        if not safetensors:
            raise ValueError("safetensors is False: no other files are written")
        tokenizer = self.calibration_tokenizer if tokenizer is None else tokenizer
        save_quantized(self.model, folder, tokenizer, shard_size, self.calibration, perplexity)

    def generate(self, *args, **kwargs):
        with torch.inference_mode():
            return self.model.generate(*args, **kwargs)

    def __call__(self, *args, **kwargs):
        return self.model(*args, **kwargs)


def sequence_length(model, requested=None, default=512):
    """requested, or `default` limited to the model's positions, if any; ValueError if exceeded."""
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    positions = positions if positions > 0 else math.inf        # XLNet's -1
    if requested is None:
        return min(default, positions)
    if not 0 < requested <= positions:
        raise ValueError(f"sequence length is {requested}: it must be in [1, {positions}]")
    return requested


def main():
    parser = argparse.ArgumentParser(description="Quantise a Hugging Face causal LM with AWQ.")
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("--save", required=True, metavar="DIR", help="where the checkpoint goes")
    parser.add_argument("--bits", type=int, default=4, choices=BITS)
    parser.add_argument("--group-size", type=int, default=128, help="-1: one group a row")
    parser.add_argument("--calib", default="pileval",
                        help=f"calibration text: {', '.join(DATASETS)} or a text file")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, help="tokens a sample (512)")
    parser.add_argument("--refine", choices=list(REFINEMENTS))
    parser.add_argument("--no-clip", action="store_true", help="do not search the clipping")
    parser.add_argument("--sequential", action="store_true",
                        help="calibrate on what the quantised blocks make (two passes)")
    parser.add_argument("--exact", action="store_true",
                        help="no product in fewer bits than the model's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="where blocks are worked on (cuda if there is one)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # so that save_quantized clears up
    try:
        check_target(args.save)
        own_device = join_ranks()
        args.device = args.device or own_device
        check_device(args.device or "cpu")
        wrapped = AutoAWQForCausalLM.from_pretrained(args.model)
        tokenizer = wrapped.tokenizer
        report = wrapped.quantize(
            tokenizer, calib_data=args.calib, w_bit=args.bits, q_group_size=args.group_size,
            max_calib_samples=args.samples, max_calib_seq_len=args.seq_len, seed=args.seed,
            clip=not args.no_clip, refine=args.refine, device=args.device,
            sequential=args.sequential, exact=args.exact)
        if ranks()[0] == 0:
            wrapped.save_quantized(args.save, tokenizer)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    if ranks()[0] == 0:
        print_report(report)
        print(f"saved to {args.save}")


def join_ranks():
    """Join the other processes if torchrun started this one; returns this rank's GPU, or None."""
    if "LOCAL_RANK" not in os.environ:
        return None
    device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else None
    if device:
        check_device(device)
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(timeout=timedelta(minutes=10))
    except RuntimeError as error:
        raise ConnectionError(f"the processes of torchrun did not meet: {error}") from error
    return device


def print_report(report):
    """The report as Markdown: a line a group of layers, then what was skipped and why."""
    print("| layers | 1/s folded into | alpha | loss / RTN's |")
    print("|---|---|---|---|")
    for line in report["groups"]:
        layers = ", ".join(name.split(f".{line['block']}.", 1)[-1] for name in line["layers"])
        ratio = line["loss"] / line["loss_rtn"] if line["loss_rtn"] else 1.0
        fold = line["folded_into"] or f"nothing, s = 1: {line['reason']}"
        print(f"| {line['block']}: {layers} | {fold} | {line['alpha']:.2f} | {ratio:.3f} |")
    for name, reason in report["skipped"].items():
        print(f"not quantised: {name}: {reason}")
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report["stages"].items())
    print(f"{report['seconds']:.1f} s: {stages}")


if __name__ == "__main__":
    from awq import main  # one module identity: classes pickled or saved are awq's, not __main__'s
    main()
