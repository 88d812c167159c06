"""The method: quantizer, packing, loss, search. Oracles are plain loops and float64."""
import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import awq
import kernel
from awq import Q, dequantize, pack, quantize

BITS = (2, 3, 4, 8)
SEEDS = st.integers(0, 2 ** 31)

# ---- Quantize and dequantize ---------------------------------------------------------------------


@st.composite
def weights(draw):
    """(W, bits, group_size): constructed, with zero, constant, one-sign and dead parts mixed in."""
    G, groups = draw(st.sampled_from([1, 3, 8, 32])), draw(st.integers(1, 3))
    W = torch.randn(draw(st.integers(1, 4)), groups, G,
                    generator=torch.Generator().manual_seed(draw(SEEDS)))
    W *= 10.0 ** draw(st.integers(-8, 4))
    for part in W.flatten(0, 1):
        kind = draw(st.sampled_from(["plain", "zero", "constant", "positive", "negative", "one"]))
        if kind == "zero":
            part.zero_()
        elif kind == "constant":
            part.fill_(part[0].item())
        elif kind in ("positive", "negative"):
            part.copy_(part.abs() if kind == "positive" else -part.abs())
        elif kind == "one":
            part[1:] = 0
    return W.flatten(1), draw(st.sampled_from(BITS)), G


def quantize_by_loop(W, bits, G, keep):
    """The quantizer of the checkpoint format, a weight at a time, in numpy float32 and float16."""
    W, top = W.numpy(), 2 ** bits - 1
    N, K = W.shape
    q = np.zeros((N, K), np.uint8)
    delta, zero = np.zeros((N, K // G), np.float16), np.zeros((N, K // G), np.uint8)
    for n in range(N):
        for g in range(K // G):
            group = W[n, g * G:(g + 1) * G]
            low = min(group.min(), np.float32(0)) * np.float32(keep[0])
            high = max(group.max(), np.float32(0)) * np.float32(keep[1])
            delta[n, g] = np.float16((high - low) / np.float32(top))
            step = np.float32(delta[n, g])
            if step > 0:
                zero[n, g] = min(max(np.round(-low / step), 0), top)
                for k in range(G):
                    q[n, g * G + k] = min(max(np.round(group[k] / step) + zero[n, g], 0), top)
    return q, delta, zero


def test_docstring_example_is_worked_by_hand():
    """Four weights, two bits: every number can be checked on paper."""
    result = doctest.testmod(awq)
    assert result.attempted >= 4 and result.failed == 0


@given(weights(), st.sampled_from([(1, 1), (0.5, 1), (1, 0.7), (0.55, 0.9)]))
def test_quantize_equals_a_loop(case, keep):
    for ours, expected in zip(quantize(*case, keep), quantize_by_loop(*case, keep), strict=True):
        assert ours.numpy().dtype == expected.dtype and np.array_equal(ours.numpy(), expected)


@given(weights())
def test_error_is_at_most_half_a_step_inside_the_range(case):
    """|W - W_hat| <= delta / 2 where q did not saturate; float16 holds the range to 2^-11. Zero
    stays zero, nothing is NaN."""
    W, bits, G = case
    q, delta, zero = quantize(W, bits, G)
    W_hat = dequantize(q, delta, zero).double()
    step, z = (x.double().repeat_interleave(G, 1) for x in (delta, zero))
    inside = W.double().clamp(-z * step, (2 ** bits - 1 - z) * step)
    assert ((inside - W_hat).abs() <= step / 2 * (1 + 1e-5)).all()
    # a step too small for float16 leaves the group at 0: an error below 2^-25 (2^bits - 1)
    assert ((W.double() - inside).abs() <= step * (0.5 + 2 ** bits * 2 ** -10) + 2 ** -16).all()
    assert (W_hat[W == 0] == 0).all()


@given(weights(), st.floats(0.3, 1), st.floats(0.3, 1))
def test_q_is_there_and_back(case, low, high):
    """Q is quantize and dequantize, clipped or not, and what the kernel's reference reads back."""
    W, bits, G = case
    keep = (torch.full((len(W), W.shape[1] // G), low), high)
    q, delta, zero = quantize(W, bits, G, keep)
    assert torch.equal(Q(W, bits, G, keep), dequantize(q, delta, zero))
    assert torch.equal(Q(W, bits, G), dequantize(*quantize(W, bits, G)))
    q, delta, zero = (x.repeat(8, 1) for x in (q, delta, zero))         # N a multiple of 8
    words = pack(q.T, bits), pack(zero.T, bits), delta.T.contiguous()
    assert torch.equal(kernel.dequantize(*words, bits=bits, dtype=torch.float32),
                       dequantize(q, delta, zero))


def test_quantize_takes_any_layout_and_dtype():
    """float16, transposed and sliced weights, group_size -1 and the defaults."""
    W = torch.randn(128, 6).half().T
    for G, ours in ((128, quantize(W)), (64, quantize(W, 4, 64)), (128, quantize(W, 4, -1))):
        assert torch.equal(dequantize(*ours), Q(W.float().contiguous(), 4, G))


@pytest.mark.parametrize("W, bits, group_size, named", [
    (torch.zeros(2, 32), 5, 32, "bits is 5"), (torch.zeros(2, 32), "4", 32, "bits is '4'"),
    (torch.zeros(2, 32), 4, 0, "group_size is 0"), (torch.zeros(2, 32), 4, -2, "group_size is -2"),
    (torch.zeros(2, 32), 4, 24, "group_size is 24: .* divide the 32 inputs"),
    (torch.zeros(2, 32), 4, 16.0, "group_size is 16.0"),
    (torch.zeros(2, 32), 4, -1.0, "group_size is -1.0"),
    (torch.zeros(32), 4, 32, "W has shape"), (torch.zeros(0, 32), 4, 32, "W has shape"),
    (torch.full((2, 32), float("nan")), 4, 32, "NaN or Inf"),
    (torch.full((2, 32), float("inf")), 4, 32, "NaN or Inf"),
    (torch.full((2, 32), 1e7), 4, 32, "float16")])
def test_bad_input_is_named(W, bits, group_size, named):
    with pytest.raises(ValueError, match=named):
        quantize(W, bits, group_size)


# ---- Pack ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@given(rows=st.integers(1, 5), columns=st.integers(1, 70), seed=SEEDS)
@settings(max_examples=20)
def test_words_hold_every_bit_where_the_format_says(bits, rows, columns, seed):
    """Bit by bit in Python integers: nibbles in their order for 4 bits, else one stream a row."""
    columns *= 8 if bits == 4 else 1
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2 ** bits, (rows, columns), dtype=torch.uint8, generator=generator)
    words = pack(q, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, columns // 8 if bits == 4 else -(-columns // 32) * bits)
    for row, found in zip(q.tolist(), words.tolist()):
        stream = 0
        for k, value in enumerate(row):
            slot = k // 8 * 8 + [0, 4, 1, 5, 2, 6, 3, 7][k % 8] if bits == 4 else k
            stream += value << bits * slot
        assert stream == sum((word % 2 ** 32) << 32 * i for i, word in enumerate(found))
    assert torch.equal(kernel.unpack(words, bits, columns), q)


# ---- Loss and search -----------------------------------------------------------------------------


def layer(seed, N=24, K=64, T=200):
    """A weight and inputs whose channels differ in size, as salient channels do."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(N, K, generator=generator) * 0.1
    return W, torch.randn(T, K, generator=generator) * torch.randn(K, generator=generator).exp()


def search(W, X, bits=4, **how):
    return awq.search_scale([W], X.T @ X / len(X), X.abs().mean(0), awq.Settings(bits, 32, **how))


@given(SEEDS, st.sampled_from(BITS), st.floats(0, 1))
def test_loss_is_eq_4(seed, bits, alpha):
    """sum((E C) * E) = || Q(W s) diag(1/s) X^T - W X^T ||^2 / T, the right side in float64."""
    (W, X), seen = layer(seed), awq.InputStatistics()
    for part in X.split([1, 99, len(X) - 100]):             # micro-batches of any size
        seen.update(part.view(1, -1, X.shape[1]))
    assert seen.tokens == len(X) and torch.allclose(seen.s_X, X.abs().mean(0), rtol=1e-5)
    s, keep = awq.channel_scale(seen.s_X, alpha), torch.rand(2, 24, 2) / 2 + 0.5
    direct = ((Q(W * s, bits, 32, keep) / s).double() - W.double()) @ X.double().T
    expected = direct.square().sum().item() / len(X)
    assert math.isclose(awq.loss(W, seen.C, s, bits, 32, keep), expected, rel_tol=1e-4)


@given(SEEDS, st.sampled_from([2, 3, 4]), st.booleans(), st.booleans())
@settings(max_examples=16)
def test_search_is_never_worse_than_rtn(seed, bits, clip, scale):
    """Its loss is that of what it returns, in float64, summed over the layers that share s.

    And clipping, searched with s, makes no group worse, measured after division by s.
    """
    W, X = layer(seed)
    C, s_X, weights = X.T @ X / len(X), X.abs().mean(0), [W[:8], W[8:]]
    found, rtn, curve = awq.search_scale(weights, C, s_X, awq.Settings(bits, 32, clip, scale))
    assert [alpha for alpha, _ in curve] == ([i / 20 for i in range(21)] if scale else [0])
    assert found.loss <= rtn.loss and found.loss <= min(loss for _, loss in curve)
    assert rtn.loss == pytest.approx(awq.output_error(Q(W, bits, 32) - W, C), rel=1e-4)
    assert clip == any(keep.min() < 1 for keep in found.keeps)
    assert clip == any((keep[0] != keep[1]).any() for keep in found.keeps)  # each end on its own
    error = torch.cat([Q(W_i * found.s, bits, 32, keep) / found.s - W_i
                       for W_i, keep in zip(weights, found.keeps)]).double() @ X.double().T
    assert found.loss == pytest.approx(error.square().sum().item() / len(X), rel=1e-3)
    if found.alpha:
        assert torch.equal(found.s, awq.channel_scale(s_X, found.alpha))
    for W_i, keep in zip(weights, found.keeps):
        kept, whole = (group_losses(W_i, C, found.s, part, bits) for part in (keep, (1, 1)))
        assert (kept <= whole * (1 + 1e-5)).all()


def test_clipping_that_helps_each_group_and_hurts_their_sum_is_not_taken():
    """Inputs with a large mean couple the groups: then plain rounding may be all that is left."""
    worse = 0
    for seed in range(10):
        W, X = layer(seed, N=1)
        found, rtn, curve = search(W, X / X.std(0) + 10, scale=False)
        assert found.loss <= rtn.loss
        worse += curve[0][1] > rtn.loss
    assert worse


def test_search_finds_the_salient_channel():
    """One channel with inputs 50 times the others': alpha > 0 wins, its s is the largest."""
    W, X = layer(3)
    X = X / X.abs().mean(0)
    X[:, 7] *= 50
    found, rtn, _ = search(W, X, 3, clip=False)
    assert found.alpha > 0 and found.s.argmax() == 7 and found.loss < 0.5 * rtn.loss


def group_losses(W, C, s, keep, bits=3):
    """e C_gg e^T of each row's groups of 32, e = (W s - Q(W s)) / s, in float64. [N, K/32]"""
    e = ((Q(W * s, bits, 32, keep) - W * s).double() / s.double()).view(len(W), -1, 32)
    blocks = [C.double()[g:g + 32, g:g + 32] for g in range(0, len(C), 32)]
    return torch.stack([((e[:, g] @ C_gg) * e[:, g]).sum(-1) for g, C_gg in enumerate(blocks)], 1)


@pytest.mark.parametrize("scaled", [False, True])
def test_keep_is_the_best_of_its_list_for_every_group(scaled):
    """Both ends alike, then the lower, then the upper: a loop over group and part in float64.

    For W diag(s) the groups are judged by C / (s s^T): by what e diag(1/s) does to the outputs.
    300 rows: more than are searched at a time.
    """
    W, X = layer(5, N=300)
    s = awq.channel_scale(X.abs().mean(0), 0.7 * scaled)
    C, ones = X.T @ X / len(X), torch.ones(2, len(W), 2)
    C_s = C / (s[:, None] * s)
    steps = [*awq.COARSE, *awq.FINE]
    none, both, lower, upper = (awq.search_clipping(W * s, C_s, 3, 32, steps[:count], ones)
                                for count in range(4))
    fine = [1 - i / 80 for i in range(1, 41)]
    assert torch.equal(none, ones) and torch.equal(both[0], both[1])
    for found, trials in [
            (both, [(part, part) for part in (1, 0.9, 0.8, 0.7, 0.55)]),
            (lower, [(both[0], both[1]), *((part, both[1]) for part in fine)]),
            (upper, [(lower[0], lower[1]), *((lower[0], part) for part in fine)])]:
        best = torch.stack([group_losses(W, C, s, trial) for trial in trials]).amin(0)
        assert torch.allclose(group_losses(W, C, s, found), best, rtol=1e-3)
    assert (upper[0] != both[0]).any() and (upper[1] != both[1]).any()


def test_dead_channels_and_silent_layers_have_finite_scales():
    W, X = layer(2)
    X[:, :5] = 0
    found, _, curve = search(W, X)
    assert found.alpha > 0 and all(math.isfinite(loss) for _, loss in curve)
    silent, _, _ = search(W, 0 * X)
    assert silent.loss == 0 and torch.equal(silent.s, torch.ones(64))


@given(SEEDS, st.floats(0, 1))
def test_channel_scale_is_a_power_of_the_score(seed, alpha):
    """s_X^alpha times what makes max(s) min(s) = 1; dead channels count as 1e-4 of the top."""
    s_X = torch.rand(32, generator=torch.Generator().manual_seed(seed)) + 0.01
    s_X[5] = 0
    s = awq.channel_scale(s_X, alpha).double()
    floored = s_X.double().clamp(min=s_X.max().item() * 1e-4)
    assert math.isclose(s.max() * s.min(), 1, rel_tol=1e-4)
    assert torch.allclose(s / s[0], (floored / floored[0]) ** alpha, rtol=1e-4)
    assert torch.equal(awq.channel_scale(0 * s_X, alpha), torch.ones(32))       # a silent layer
