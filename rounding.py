"""Other ways to choose the integers on a grid that is given: GPTQ, coordinate descent, gradient.

AWQ chooses the grid (s and the clipping) and rounds every weight to its nearest point. C, which
scored the scales, can choose the integers as well, by the same loss:

    L(q) = || (W_hat - W) X^T ||_F^2 / T = sum((E C) * E),  E = W_hat - W,  W_hat = (q - zero) delta

`gptq` fixes column after column and moves the weights still to come; `descend` then moves single
integers, each to where L is least. Both are called alike, and answer as AWQ's quantize does:

    rounding(W, delta, zero, bits, C) -> q, delta, zero

    W      [N, K]    weights, float32 (float64 works too); in AWQ's walk W diag(s)
    delta  [N, K/G]  step of each group, representable in float16
    zero   [N, K/G]  zero point of each group, an integer in [0, 2^bits - 1]
    C      [K, K]    X^T X / T of the inputs X [T, K] that W meets; in AWQ's walk C / (s s^T)
    q      [N, K]    uint8 in [0, 2^bits - 1]; delta comes back as float16, zero as uint8

The grid comes back as it was, except from gptq with `regrid`. `tune` goes on from there: it moves
integers and grid for the output of a whole block. What this file does not do: choose s, measure C.
"""
import math
from itertools import cycle

import torch
from torch.nn.functional import linear

BLOCK = 128     # channels between two matrix products
DAMPING = 0.01  # of C's mean diagonal, as in GPTQ's code
REACH = 0.25    # steps between a point of the grid and where tuning starts, at most
TRAVEL = 0.5, 0.05  # tuning moves an offset about 0.5 steps at most, an end by a twentieth


def transposed(delta, zero, dtype):
    """The grid by groups, [K/G, N]; a step of 0 becomes huge, which rounds all to exactly 0."""
    delta, zero = delta.T.to(dtype), zero.T.to(dtype).contiguous()
    return delta.where(delta > 0, torch.finfo(dtype).max).contiguous(), zero


def nearest(w, delta, zero, bits):
    """q = clamp(round(w / delta) + zero, 0, 2^bits - 1), and its w_hat = (q - zero) delta."""
    q = (w / delta).round_().add_(zero).clamp_(0, 2 ** bits - 1)
    return q, (q - zero).mul_(delta)


def inverse_factor(C):
    """U upper triangular with U^T U = (C + damping)^-1; channels that are always 0 count as 1."""
    C = C.double()
    C = C + torch.diag((C.diagonal() == 0) + DAMPING * C.diagonal().mean())
    R = torch.linalg.cholesky(C.flip(0, 1)).flip(0, 1)      # upper triangular too: R R^T = C
    return torch.linalg.solve_triangular(R, torch.eye(len(C)).to(C), upper=True)


def shrunk(C, tokens):
    """C + K / T diag(C), of T tokens: what is off the diagonal counts less. [K, K]

    not in the papers: off its diagonal an entry of C is uncertain by about sqrt(C_ii C_jj / T), and
    K of them move a weight. With few tokens gptq and descend would fit that noise.
    """
    return C + torch.diag(C.diagonal() * (len(C) / tokens))


def gptq(W, delta, zero, bits, C, regrid=None):
    """w_j -= e U_kj for all j > k, where e = (w_k - w_hat_k) / U_kk  (GPTQ, arXiv 2210.17323).

    Column after column is rounded and its error taken from the columns after it: the least squares
    answer to L while the columns up to k are fixed. Cost: N K K / 2, and in float64 2 K^3 / 3.

    Columns come by falling C_kk, on the grid given ("act-order" with "static groups", since the
    checkpoint has no g_idx). With regrid they come in their own order, and when the first column of
    group g comes up, regrid(its columns as moved by then [N, G], g) says its delta and zero [N, 1].
    """
    N, K = W.shape
    G = K // delta.shape[1]
    order = range(K) if regrid else C.diagonal().argsort(descending=True).tolist()
    U = inverse_factor(C[order][:, order]).to(W.dtype)
    W, q = W.T[order], W.new_empty(K, N)        # [K, N]: the weights of a channel are contiguous
    delta, zero = delta.to(torch.float16, copy=True), zero.to(torch.uint8, copy=True)
    size = math.gcd(G, BLOCK) if regrid else BLOCK
    for first in range(0, K, size):
        if regrid and first % G == 0:
            g = slice(first // G, first // G + 1)
            delta[:, g], zero[:, g] = regrid(W[first:first + G].T.contiguous(), g.start)
        steps, zeros = transposed(delta, zero, W.dtype)             # [K/G, N]
        last = min(first + size, K)
        errors = W.new_empty(last - first, N)
        for i, k in enumerate(range(first, last)):
            w, g = W[k] - U[first:k, k] @ errors[:i], order[k] // G
            q[order[k]], w_hat = nearest(w, steps[g], zeros[g], bits)
            errors[i] = (w - w_hat) / U[k, k]
        W[last:] -= U[first:last, last:].T @ errors
    return q.T.to(torch.uint8).contiguous(), delta, zero


def descend(W, delta, zero, bits, C, sweeps=4):
    """q_k = the grid point nearest to w_hat_k - (E C)_k / C_kk: the best one given all the others.

    Cyclic coordinate descent (QuantEase, arXiv 2309.01885; CDQuant, arXiv 2406.17542), started from
    gptq's integers. L is quadratic in each weight, so it never rises. E C is made for a block of
    columns, one product, and kept up to date within it. Cost: gptq's, and N K K a sweep.
    """
    N, K = W.shape
    q, delta, zero = gptq(W, delta, zero, bits, C)
    W, C, q = W.T.contiguous(), C.to(W.dtype), q.T.to(W.dtype).contiguous()     # [K, N]
    steps, zeros = transposed(delta, zero, W.dtype)                 # [K/G, N]
    G = K // len(steps)
    W_hat = (q.unflatten(0, (-1, G)) - zeros[:, None]).mul_(steps[:, None]).flatten(0, 1)
    E, diagonal = W_hat - W, C.diagonal().where(C.diagonal() > 0, math.inf)     # inf: stays
    for first in list(range(0, K, BLOCK)) * sweeps:
        last = min(first + BLOCK, K)
        EC, moved = C[first:last] @ E, E.new_empty(last - first, N)             # [128, N]
        for i, k in enumerate(range(first, last)):
            better = W_hat[k] - (EC[i] + C[k, first:k] @ moved[:i]) / diagonal[k]
            q[k], w_hat = nearest(better, steps[k // G], zeros[k // G], bits)
            moved[i] = w_hat - W_hat[k]
            W_hat[k] = w_hat
        E[first:last] += moved
    return q.T.to(torch.uint8).contiguous(), delta, zero


# ---- SignRound: moved by gradient, for the output of the whole block -----------------------------


def through(x, y):
    """The value of y with the gradient of x (straight-through estimator)."""
    return y.detach() + (x - x.detach())


def cell_of(W, q, delta, zero):
    """W moved inside the cell of points that round to q, with its grid: where tuning starts."""
    delta, zero = delta.float(), zero.float()
    groups, step = W.unflatten(1, (delta.shape[1], -1)), delta[..., None]       # [N, K/G, G]
    W_hat = (q.view_as(groups) - zero[..., None]) * step
    return W_hat + (groups - W_hat).clamp(-REACH * step, REACH * step), delta, zero


def moved_point(W, delta, zero, offset, ends, bits):
    """W_hat [N, K] and its q, delta, zero, all with gradients; W and offset are [N, K/G, G].

    The offset is added to W / delta before it is rounded; the lower and the upper end of a group's
    range are multiplied by ends [2, N, K/G].
    """
    top = 2 ** bits - 1
    low, high = -zero * delta * ends[0], (top - zero) * delta * ends[1]
    delta = (high - low) / top
    delta = through(delta, delta.half().float())
    step = delta.where(delta > 0, torch.finfo(delta.dtype).max)
    zero = through(-low / step, (-low / step).round()).clamp(0, top)
    q = W / step[..., None] + offset
    q = (through(q, q.round()) + zero[..., None]).clamp(0, top)
    return ((q - zero[..., None]) * delta[..., None]).flatten(1), q.flatten(1), delta, zero


def block_error(cells, moves, bits, run, batches):
    """sum of || run(hidden) - target ||^2, and the {layer: point} whose W_hat the layers use."""
    points = {layer: moved_point(*cells[layer], *moves[layer], bits) for layer in cells}
    for layer, (W_hat, *_) in points.items():
        layer.forward = lambda x, layer=layer, W_hat=W_hat: linear(x, W_hat.to(x.dtype), layer.bias)
    try:
        return sum((run(x) - y).float().square().sum() for x, y in batches), points
    finally:
        for layer in points:
            del layer.forward


@torch.enable_grad()
def tune(layers, bits, run, batches, steps=50):
    """x -= rate sign(d || run(hidden) - target ||^2 / dx), x: rounding offsets and ends of ranges.

    SignRound (arXiv 2309.05516) on one block, but from integers that are there, not the nearest. A
    step reads one of the batches, and the rate falls to 0. The error of all is measured before and
    after, and the start is returned if that was better: the block's output never gets worse. Cost:
    a step, the block forward and back; memory: what it keeps for that, of one batch.

    layers: {layer: (W, q, delta, zero)} of the block's Linears, or what has their forward and bias;
    run(hidden): what the block makes of hidden states; batches: [(hidden, target), ...], what the
    quantized blocks before make, and what the block made in full precision of full-precision input.
    Returns {layer: (q, delta, zero)}.
    """
    cells = {layer: cell_of(*stored) for layer, stored in layers.items()}
    moves = {layer: (torch.zeros_like(W, requires_grad=True),
                     W.new_ones(2, *delta.shape).requires_grad_())
             for layer, (W, delta, _) in cells.items()}
    with torch.no_grad():
        start, _ = block_error(cells, moves, bits, run, batches)
    for step in range(steps):
        error, _ = block_error(cells, moves, bits, run, [batches[step % len(batches)]])
        tensors = [x for pair in moves.values() for x in pair]
        # an expert that no token of the batch reaches has a slope of zero
        slopes = torch.autograd.grad(error, tensors, allow_unused=True, materialize_grads=True)
        for x, slope, travel in zip(tensors, slopes, cycle(TRAVEL)):
            x.data -= 2 * travel / steps * (1 - step / steps) * slope.sign()
    with torch.no_grad():
        error, points = block_error(cells, moves, bits, run, batches)
    if not error < start:
        return {layer: stored[1:] for layer, stored in layers.items()}
    return {layer: (q.to(torch.uint8), delta.half(), zero.to(torch.uint8))
            for layer, (_, q, delta, zero) in points.items()}
