"""The method: quantiser, packing, Gram loss, search. Oracles are plain loops and float64."""
import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import awq
from awq import BITS, dequantize, fake_quantize, pack, quantize, unpack


@st.composite
def weights(draw, max_groups=3):
    """(W, bits, group_size): constructed, with zero, constant, one-sign and dead parts mixed in."""
    group_size = draw(st.sampled_from([1, 3, 8, 32]))
    groups = draw(st.integers(1, max_groups))
    rows = draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2 ** 31)))
    W = torch.randn(rows, groups * group_size, generator=generator)
    W *= 10.0 ** draw(st.integers(-4, 4))
    for row in range(rows):
        for g in range(groups):
            part = W[row, g * group_size:(g + 1) * group_size]
            kind = draw(st.sampled_from(
                ["plain", "zero", "constant", "positive", "negative", "one"]))
            if kind == "zero":
                part.zero_()
            elif kind == "constant":
                part.fill_(part[0].item())
            elif kind == "positive":
                part.abs_()
            elif kind == "negative":
                part.copy_(-part.abs())
            elif kind == "one":
                part[1:] = 0
    return W, draw(st.sampled_from(BITS)), group_size


def quantize_by_loop(W, bits, G):
    """The quantiser of the checkpoint format, a weight at a time, in numpy float32 and float16."""
    W = W.numpy()
    N, K = W.shape
    top = 2 ** bits - 1
    q = np.zeros((N, K), np.uint8)
    delta = np.zeros((N, K // G), np.float16)
    zero = np.zeros((N, K // G), np.uint8)
    for n in range(N):
        for g in range(K // G):
            group = W[n, g * G:(g + 1) * G]
            low, high = min(group.min(), np.float32(0)), max(group.max(), np.float32(0))
            delta[n, g] = np.float16((high - low) / np.float32(top))
            step = np.float32(delta[n, g])
            if step == 0:
                continue
            zero[n, g] = min(max(np.round(-low / step), 0), top)
            for k in range(G):
                q[n, g * G + k] = min(max(np.round(group[k] / step) + zero[n, g], 0), top)
    return q, delta, zero


def test_docstring_example_is_worked_by_hand():
    """Four weights, two bits: every number can be checked on paper."""
    result = doctest.testmod(awq)
    assert result.attempted >= 4 and result.failed == 0


@given(weights())
def test_quantize_equals_a_loop(case):
    W, bits, G = case
    expected = quantize_by_loop(W, bits, G)
    for ours, theirs in zip(quantize(W, bits, G), expected):
        assert ours.numpy().dtype == theirs.dtype and np.array_equal(ours.numpy(), theirs)


@given(weights())
def test_error_is_at_most_half_a_step_inside_the_range(case):
    """|W - W_hat| <= delta / 2 where q did not saturate; float16 holds the range to 2^-11."""
    W, bits, G = case
    q, delta, zero = quantize(W, bits, G)
    step = delta.double().repeat_interleave(G, 1)
    z = zero.double().repeat_interleave(G, 1)
    inside = W.double().clamp(-z * step, (2 ** bits - 1 - z) * step)
    error = (inside - dequantize(q, delta, zero).double()).abs()
    assert (error <= step / 2 * (1 + 1e-5)).all()
    # a step too small for float16 leaves the group at 0: an error below 2^-25 (2^bits - 1)
    assert ((W.double() - inside).abs() <= step * (0.5 + 2 ** bits * 2 ** -10) + 2 ** -16).all()


@given(weights())
def test_rounding_a_rounded_weight_to_its_grid_changes_nothing(case):
    W, bits, G = case
    q, delta, zero = quantize(W, bits, G)
    again = awq.round_to_grid(dequantize(q, delta, zero), delta.float(), zero.float(), bits)
    assert torch.equal(again.to(torch.uint8), torch.where(
        delta.repeat_interleave(G, 1) > 0, q, zero.repeat_interleave(G, 1)))


@given(weights())
def test_zero_stays_zero_and_nothing_is_nan(case):
    W, bits, G = case
    W_hat = fake_quantize(W, bits, G)
    assert torch.isfinite(W_hat).all()
    assert (W_hat[W == 0] == 0).all()


def test_one_sign_group_does_not_collapse():
    """Without widening the range to 0 the clamped zero point would lose [10, 11] altogether."""
    W = torch.linspace(10, 11, 8)[None]
    assert (fake_quantize(W, 4, 8) - W).abs().max() < 11 / 15 / 2 + 0.01


@pytest.mark.parametrize("bits", BITS)
@given(data=st.data(), rows=st.integers(1, 5))
def test_unpack_inverts_pack(bits, data, rows):
    columns = data.draw(st.integers(1, 9)) * 8 if bits == 4 else data.draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(columns)
    q = torch.randint(0, 2 ** bits, (rows, columns), dtype=torch.uint8, generator=generator)
    words = pack(q, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, awq.packed_width(columns, bits))
    assert torch.equal(unpack(words, bits, columns), q)


def test_four_bit_words_hold_the_documented_nibbles():
    """Nibble i of word c is column 8 c + [0, 2, 4, 6, 1, 3, 5, 7][i], built here bit by bit."""
    q = torch.randint(0, 16, (3, 24), dtype=torch.uint8)
    for row, words in zip(q.tolist(), pack(q, 4).tolist()):
        for c, word in enumerate(words):
            expected = sum(row[8 * c + j] << 4 * i for i, j in enumerate([0, 2, 4, 6, 1, 3, 5, 7]))
            assert word % 2 ** 32 == expected


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_dense_words_are_one_little_endian_stream(bits):
    q = torch.randint(0, 2 ** bits, (2, 64), dtype=torch.uint8)
    for row, words in zip(q.tolist(), pack(q, bits).tolist()):
        stream = sum((word % 2 ** 32) << 32 * i for i, word in enumerate(words))
        assert stream == sum(value << bits * i for i, value in enumerate(row))


@given(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.integers(0, 10 ** 6))
def test_scaling_equivalence(dtype, seed):
    """(W s)(x / s) = W x: within rounding for any s, to the last bit for powers of two."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(8, 32, generator=generator).to(dtype)
    x = torch.randn(5, 32, generator=generator).to(dtype)
    powers = (2.0 ** torch.randint(-3, 4, (32,), generator=generator)).to(dtype)
    assert torch.equal((x / powers) @ (W * powers).T, x @ W.T)
    s = (torch.rand(32, generator=generator) + 0.5).to(dtype)
    exact = x.double() @ W.double().T
    bound = (x.double().abs() @ W.double().abs().T) * torch.finfo(dtype).eps * 4
    assert (((x / s).double() @ (W * s).double().T - exact).abs() <= bound).all()


def layer(seed, N=24, K=64, T=200):
    """A weight and inputs whose channels differ in size, as salient channels do."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(N, K, generator=generator) * 0.1
    X = torch.randn(T, K, generator=generator) * torch.exp(torch.randn(K, generator=generator))
    return W, X


@given(st.integers(0, 10 ** 6), st.sampled_from([2, 3, 4]))
def test_gram_loss_equals_the_direct_loss(seed, bits):
    """sum((E C) * E) = || E X^T ||^2 / T, against float64, accumulated in uneven micro-batches."""
    W, X = layer(seed)
    statistics = awq.InputStatistics(64, "cpu")
    for part in X.split([1, 99, 100]):
        statistics.update(part.view(1, -1, 64))
    E = fake_quantize(W, bits, 32) - W
    direct = (E.double() @ X.double().T).square().sum() / len(X)
    assert math.isclose(awq.gram_loss(E, statistics.C).item(), direct.item(), rel_tol=1e-4)
    assert torch.allclose(statistics.s_X, X.abs().mean(0), rtol=1e-5)


@pytest.mark.parametrize("K", [1, 96, 128, 129, 300, 1025])
def test_gram_loss_of_any_width_is_the_whole_product(K):
    """Against sum((E C) * E) in float64: no panel of the symmetric C is missed or counted twice."""
    generator = torch.Generator().manual_seed(K)
    E, X = torch.randn(5, K, generator=generator), torch.randn(40, K, generator=generator)
    C = (X.T @ X).double()
    expected = ((E.double() @ C) * E.double()).sum().item()
    assert math.isclose(awq.gram_loss(E, C.float()).item(), expected, rel_tol=1e-4)
    assert math.isclose(awq.gram_loss(E.double(), C).item(), expected, rel_tol=1e-12)


@given(st.integers(0, 10 ** 6), st.sampled_from([2, 3, 4]), st.booleans())
def test_search_never_worse_than_rtn(seed, bits, clip):
    """Nor than RTN with clipping; and its loss is the loss of what it returns, in float64."""
    W, X = layer(seed)
    C, s_X = X.T @ X / len(X), X.abs().mean(0)
    found = awq.search_scale(W, C, s_X, bits, 32, clip)
    assert found.loss <= found.loss_rtn
    if clip:
        shrink = awq.search_shrink(W, awq.diagonal_blocks(C, 32), bits, 32, awq.BOTH + awq.EACH)
        assert found.loss <= awq.scaled_loss(W, C, torch.ones(64), shrink, bits, 32)
    E = (fake_quantize(W * found.s, bits, 32, found.shrink) / found.s - W).double()
    assert math.isclose(found.loss, (E @ X.double().T).square().sum() / len(X), rel_tol=1e-3)
    assert found.loss <= min(loss for _, _, loss in found.curve)
    assert found.curve[0] == (0, False, found.loss_rtn)


def tf32(x):
    """x with the 10 bits of mantissa that a tensor core reads."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1fff).view(torch.float32)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("mean, tolerance", [(1, 1e-3), (10, 2e-2)])
def test_products_of_ten_bits_choose_as_well(bits, mean, tolerance, monkeypatch):
    """On a GPU 16-bit models are searched in TF32: its losses, and its choice's, to 1e-3.

    A mean of the inputs takes part of that away: its large products cancel in E C.
    """
    exact_gram, exact_group = awq.gram_loss, awq.group_losses
    for seed in range(4):
        W, X = layer(seed, N=64, K=128)
        X += mean * X.abs().mean(0)
        C, s_X = X.T @ X / len(X), X.abs().mean(0)
        expected = awq.search_scale(W, C, s_X, bits, 64)
        with monkeypatch.context() as patch:
            patch.setattr(awq, "gram_loss", lambda E, C: ((tf32(E) @ tf32(C)) * E).sum())
            patch.setattr(awq, "group_losses", lambda E, blocks: exact_group(
                tf32(E), tf32(blocks)))
            found = awq.search_scale(W, C, s_X, bits, 64)
        E = (fake_quantize(W * found.s, bits, 64, found.shrink) / found.s - W).double()
        real = exact_gram(E, C.double()).item()
        assert math.isclose(found.loss, real, rel_tol=tolerance)
        assert real <= expected.loss * (1 + tolerance)
        assert found.loss != expected.loss      # it did compute with ten bits


def test_a_rank_without_rows_adds_nothing():
    """More ranks than rows: an empty share has an empty clipping and no loss."""
    W, X = layer(0)
    blocks = awq.diagonal_blocks(X.T @ X, 32)
    assert awq.search_shrink(W[:0], blocks, 4, 32, awq.BOTH).shape == (2, 0, 2)
    assert awq.scaled_loss(W[:0], X.T @ X, torch.ones(64), None, 4, 32) == 0


def test_search_finds_the_salient_channel():
    """One channel with inputs 50 times the others': alpha > 0 wins, its s is the largest."""
    W, X = layer(3)
    X = X / X.abs().mean(0)
    X[:, 7] *= 50
    found = awq.search_scale(W, X.T @ X / len(X), X.abs().mean(0), 3, 32, clip=False)
    assert found.alpha > 0 and found.s.argmax() == 7 and found.loss < 0.5 * found.loss_rtn


def test_shrink_is_the_best_of_its_grid_for_every_group():
    """Both ends together, then the upper end alone: each a search over the grid, in float64."""
    W, X = layer(5)
    blocks = awq.diagonal_blocks(X.T @ X / len(X), 32)
    both = awq.search_shrink(W, blocks, 3, 32, awq.BOTH)
    upper = awq.search_shrink(W, blocks, 3, 32, awq.EACH[1:], both)
    assert torch.equal(both[0], both[1]) and torch.equal(upper[0], both[0])

    def loss(n, g, low, high):
        part = W[n:n + 1, 32 * g:32 * g + 32]
        e = (fake_quantize(part, 3, 32, (low, high)) - part).double()
        return (e @ blocks[g].double() @ e.T).item()

    for n in range(3):
        for g in range(2):
            best = min(loss(n, g, kept, kept) for kept in (1, *awq.BOTH[0][1]))
            assert math.isclose(loss(n, g, *both[:, n, g]), best, rel_tol=1e-3)
            best = min(best, *(loss(n, g, both[0, n, g], kept) for kept in awq.EACH[1][1]))
            assert math.isclose(loss(n, g, *upper[:, n, g]), best, rel_tol=1e-3)
    assert (upper[1] != both[1]).any()


@pytest.mark.parametrize("refine", ["grid", "gradient"])
@pytest.mark.parametrize("clip", [False, True])
def test_refinement_never_worse_and_sometimes_better(refine, clip):
    better = 0
    for seed in range(4):
        W, X = layer(seed)
        C, s_X, rows = X.T @ X / len(X), X.abs().mean(0), torch.arange(64)
        found = awq.search_scale(W, C, s_X, 3, 32, clip)
        refined = awq.refine_scale(W, C, found, 3, 32, clip, refine, rows)
        assert refined.loss <= found.loss
        loss = awq.scaled_loss(W, C, refined.s, refined.shrink, 3, 32).item()
        assert math.isclose(refined.loss, loss, rel_tol=1e-5)
        better += refined.loss < 0.995 * found.loss
    assert better > 0


def test_gradient_refinement_keeps_tied_channels_equal():
    W, X = layer(1)
    C, rows = X.T @ X / len(X), torch.arange(32).repeat(2)
    s_X = awq.shared_score(X.abs().mean(0), rows)
    found = awq.search_scale(W, C, s_X, 3, 32, clip=False)
    for refine in awq.REFINEMENTS:
        s = awq.refine_scale(W, C, found, 3, 32, False, refine, rows).s
        assert torch.equal(s[:32], s[32:])


def test_dead_channels_and_silent_layers_have_finite_scales():
    W, X = layer(2)
    X[:, :5] = 0
    assert awq.search_scale(W, X.T @ X, X.abs().mean(0), 4, 32).s.isfinite().all()
    silent = awq.search_scale(W, torch.zeros(64, 64), torch.zeros(64), 4, 32)
    assert silent.loss == 0 and torch.equal(silent.s, torch.ones(64))


@pytest.mark.parametrize("W, bits, group_size, named", [
    (torch.zeros(2, 32), 5, 32, "bits is 5"),
    (torch.zeros(2, 32), 4, 0, "group_size is 0"),
    (torch.zeros(2, 32), 4, -2, "group_size is -2"),
    (torch.zeros(2, 32), 4, 24, "group_size is 24"),
    (torch.zeros(32), 4, 32, "W has shape"),
    (torch.full((2, 32), float("nan")), 4, 32, "NaN or Inf"),
    (torch.full((2, 32), float("inf")), 4, 32, "NaN or Inf"),
    (torch.full((2, 32), 1e7), 4, 32, "float16"),
    (torch.zeros(2, 32), 4.0, 32, "bits is 4.0"),
    (torch.zeros(2, 32), True, 32, "bits is True"),
])
def test_bad_input_is_named(W, bits, group_size, named):
    with pytest.raises(ValueError, match=named):
        quantize(W, bits, group_size)


@pytest.mark.parametrize("q, bits, named", [
    (torch.zeros(2, 12, dtype=torch.uint8), 4, "columns is 12"),
    (torch.zeros(2, 16, dtype=torch.uint8), 5, "bits is 5"),
    (torch.full((2, 16), 16), 4, "q runs from 16"),
    (torch.full((2, 16), -1), 2, "q runs from -1"),
])
def test_what_cannot_be_packed_is_named(q, bits, named):
    with pytest.raises(ValueError, match=named):
        pack(q, bits)


def test_words_of_another_width_are_named():
    with pytest.raises(ValueError, match="words is"):
        unpack(torch.zeros(2, 3, dtype=torch.int32), 4, 16)
    with pytest.raises(ValueError, match="columns is 12"):
        awq.AWQLinear(128, 12, bits=4)


def test_quantize_takes_any_layout_and_dtype():
    """float16, transposed and sliced weights, group_size -1 and the defaults."""
    W = torch.randn(128, 6).half().T
    assert torch.equal(fake_quantize(W), fake_quantize(W.float().contiguous(), 4, 128))
    assert torch.equal(fake_quantize(W, 3, -1), dequantize(*quantize(W, 3, -1)))


@given(st.integers(0, 10 ** 6), st.floats(0, 1))
def test_channel_scale_is_a_power_of_the_score(seed, alpha):
    """s_X^alpha times what makes max(s) min(s) = 1; dead channels count as 1e-4 of the top."""
    s_X = torch.rand(32, generator=torch.Generator().manual_seed(seed)) + 0.01
    s_X[5] = 0
    s = awq.channel_scale(s_X, alpha).double()
    floored = s_X.double().clamp(min=s_X.max().item() * 1e-4)
    assert math.isclose(s.max() * s.min(), 1, rel_tol=1e-4)
    assert torch.allclose(s / s[0], (floored / floored[0]) ** alpha, rtol=1e-4)


def test_the_grid_is_eq_5s_and_s_is_what_can_be_stored():
    W, X = layer(4)
    C, s_X, storable = X.T @ X / len(X), X.abs().mean(0), lambda s: s.bfloat16().float()
    found = awq.search_scale(W, C, s_X, 3, 32, storable=storable)
    assert [alpha for alpha, clipped, _ in found.curve if clipped] == [i / 20 for i in range(21)]
    refined = [awq.refine_scale(W, C, found, 3, 32, True, refine, torch.arange(64), storable)
               for refine in awq.REFINEMENTS]
    for choice in (found, *refined):
        assert torch.equal(choice.s, storable(choice.s)) and not torch.equal(choice.s, s_X ** 0)


def test_clipping_is_judged_by_the_loss_of_the_unscaled_output():
    """For W diag(s) the blocks are C / (s s^T): e / s against C_gg in float64, group by group."""
    W, X = layer(6)
    C = X.T @ X / len(X)
    s = awq.channel_scale(X.abs().mean(0), 0.7)
    choice = awq.with_clipping(W, C, s, None, 0.7, 3, 32, awq.BOTH)

    def losses(kept):
        e = ((fake_quantize(W * s, 3, 32, (kept, kept)) - W * s) / s).double()
        return torch.stack([((e_g @ C_gg) * e_g).sum(-1) for e_g, C_gg in zip(
            e.split(32, 1), awq.diagonal_blocks(C, 32).double())], 1)

    parts = (1.0, *awq.BOTH[0][1])
    best = torch.stack([losses(kept) for kept in parts]).amin(0)
    chosen = torch.stack([torch.where(choice.shrink[0] == kept, losses(kept), 0)
                          for kept in [torch.tensor(k).item() for k in parts]]).sum(0)
    assert torch.allclose(chosen, best, rtol=1e-3)


def test_every_move_of_the_grid_refinement_lowers_the_loss():
    """refine_grid keeps E C up to date and tests moves together: what it returns is never worse."""
    for seed in range(6):
        W, X = layer(seed)
        C = X.T @ X / len(X)
        found = awq.search_scale(W, C, X.abs().mean(0), 3, 32, clip=False)
        s = awq.refine_grid(W, C, found, 3, 32, torch.arange(64))
        assert awq.scaled_loss(W, C, s, None, 3, 32).item() < 0.97 * found.loss
        ratio = s / found.s
        assert 0.4999 < ratio.min() < 1 < ratio.max() < 1.5001


def test_grid_refinement_keeps_its_error_up_to_date():
    """Inputs that move together couple all groups: a stale E C would raise the loss."""
    for seed in range(4):
        W, X = layer(seed)
        X = X + 3 * torch.randn(len(X), 2, generator=torch.Generator().manual_seed(seed)
                                ) @ torch.randn(2, 64, generator=torch.Generator().manual_seed(9))
        C = X.T @ X / len(X)
        found = awq.search_scale(W, C, X.abs().mean(0), 3, 8, clip=False)
        s = awq.refine_grid(W, C, found, 3, 8, torch.arange(64))
        assert awq.scaled_loss(W, C, s, None, 3, 8).item() < 0.9 * found.loss
