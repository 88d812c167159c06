"""Integers chosen through C and by gradient: float64 loops, brute force, and what is promised."""
import pytest
import torch
from conftest import Mlp
from hypothesis import given, settings
from hypothesis import strategies as st

import awq
import rounding


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """16 columns between two matrix products: what depends on them shows in small matrices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "BLOCK", 16)
        yield


def random_problem(seed, N=6, K=48, tokens=96):
    """W [N, K] and C [K, K] float64 of correlated inputs, channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, K, generator=generator).double()
    X += X[:, :1] + X.roll(1, 1)
    X *= torch.exp2(torch.randn(K, generator=generator))
    return torch.randn(N, K, generator=generator).double(), X.T @ X / tokens


@st.composite
def problems(draw):
    """(W, delta, zero, bits, C): float64, 2 to 8 bits, one group a row or several, tokens fewer
    than channels or more, dead channels, a group of zeros, groups without a step."""
    G, groups = draw(st.sampled_from([(1, 4), (3, 5), (8, 1), (8, 3), (20, 2)]))
    K, bits = G * groups, draw(st.sampled_from([2, 3, 4, 8]))
    W, C = random_problem(draw(st.integers(0, 10 ** 6)), draw(st.integers(1, 5)), K,
                          draw(st.sampled_from([1, K // 2 + 1, 4 * K])))
    dead = draw(st.lists(st.integers(0, K - 1), max_size=K))
    C[dead], C[:, dead] = 0, 0
    W[0, :G] *= draw(st.booleans())
    delta, zero = on_grid(W, bits, -1 if groups == 1 else G)
    delta[:, -1] *= draw(st.booleans())
    return W, delta, zero, bits, C


def on_grid(W, bits, G):
    return awq.quantize(W.float(), bits, G)[1:]


def loss(W, C, found):
    E = awq.dequantize(*found).double() - W
    return ((E @ C) * E).sum().item()


def same(found, expected):
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected))


def gptq_loop(W, delta, zero, bits, C, order, regrid=None):
    """GPTQ's equations, a column at a time, the inverse of what is left computed anew."""
    W, delta, zero = W.clone(), delta.double(), zero.double()
    G, q = W.shape[1] // delta.shape[1], torch.zeros_like(W)
    H = C + 0.01 * C.diagonal().mean() * torch.eye(len(C)).double()
    for done, k in enumerate(order):
        g = k // G
        if regrid and k % G == 0:
            delta[:, g:g + 1], zero[:, g:g + 1] = regrid(W[:, k:k + G], g)
        q[:, k] = ((W[:, k] / delta[:, g]).round() + zero[:, g]).clamp(0, 2 ** bits - 1)
        error = W[:, k] - (q[:, k] - zero[:, g]) * delta[:, g]
        rest = order[done:]
        inverse = torch.linalg.inv(H[rest][:, rest])
        W[:, rest] -= error[:, None] * inverse[0] / inverse[0, 0]
    return q.byte(), delta.half(), zero.byte()


def descend_loop(W, q, delta, zero, bits, C, sweeps):
    """Each integer in turn, E C computed anew."""
    G, W_hat, q = W.shape[1] // delta.shape[1], awq.dequantize(q, delta, zero).double(), q.clone()
    for k in list(range(W.shape[1])) * sweeps:
        d, z = delta[:, k // G].double(), zero[:, k // G].double()
        best = W_hat[:, k] - (W_hat - W) @ C[:, k] / C[k, k]
        q[:, k] = ((best / d).round() + z).clamp(0, 2 ** bits - 1)
        W_hat[:, k] = (q[:, k] - z) * d
    return q, delta, zero


# one block of updates a group, more groups than blocks, groups longer than a block or across them
SHAPES = pytest.mark.parametrize("bits, K, G", [(4, 48, 16), (3, 48, 8), (2, 48, 48), (8, 45, 15)])


@SHAPES
def test_gptq_equals_an_unblocked_loop(bits, K, G):
    """On the grid given, by falling C_kk. With regrid in plain order, each grid from the columns
    moved by then, the groups in turn; the grid that is answered comes back."""
    W, C = random_problem(K + G, K=K, tokens=2 * K)
    grid, order, asked = on_grid(W, bits, G), sorted(range(K), key=lambda k: -C[k, k]), []
    assert same(rounding.gptq(W, *grid, bits, C), gptq_loop(W, *grid, bits, C, order))

    def regrid(columns, g):
        asked.append(g)
        return on_grid(columns, bits, G)

    found = rounding.gptq(W, *grid, bits, C, regrid)
    assert asked == list(range(K // G))
    assert same(found, gptq_loop(W, *grid, bits, C, list(range(K)), regrid))
    assert same(grid, on_grid(W, bits, G)) and (K == G or not same(found[1:], grid))


def test_shrunk_c_is_worked_by_hand():
    """Of 2 channels and 4 tokens: the diagonal grows by a half, and nothing else does."""
    C = torch.tensor([[4.0, 2.0], [2.0, 1.0]])
    assert rounding.shrunk(C, 4).tolist() == [[6.0, 2.0], [2.0, 1.5]]


@SHAPES
def test_descend_equals_an_unblocked_loop(bits, K, G):
    W, C = random_problem(K + G, K=K, tokens=2 * K)
    start = rounding.gptq(W, *on_grid(W, bits, G), bits, C)
    found = rounding.descend(W, *start[1:], bits, C)
    assert same(found, descend_loop(W, *start, bits, C, sweeps=4))
    assert not torch.equal(found[0], start[0])


# ---- Properties ----------------------------------------------------------------------------------


@given(problems())
@settings(max_examples=30)
def test_no_sweep_raises_the_loss_and_in_the_end_no_integer_lowers_it(problem):
    W, delta, zero, bits, C = problem
    points = [rounding.gptq(*problem), *(rounding.descend(*problem, sweeps=n) for n in (1, 2, 50))]
    losses = [loss(W, C, found) for found in points]
    assert all(b <= a * (1 + 1e-9) + 1e-12 for a, b in zip(losses, losses[1:]))
    E = awq.dequantize(*points[-1]).double() - W
    for value in {0, 1, 2 ** bits - 2, 2 ** bits - 1} | set(range(min(2 ** bits, 16))):
        q = torch.full_like(points[-1][0], value)
        other = awq.dequantize(q, delta, zero).double() - W
        # E with e_k replaced, all N K of them at once: L + 2 d (E C)_k + d^2 C_kk
        change = (other - E) * (2 * E @ C + (other - E) * C.diagonal())
        assert change.min() >= -1e-9 * losses[-1] - 1e-12


@given(problems())
def test_both_write_the_format_and_leave_what_they_read(problem):
    """Without correlations both round to nearest: where there is no step, that is zero."""
    W, delta, zero, bits, C = problem
    before = [x.clone() for x in (W, delta, zero, C)]
    nearest = awq.round_to_grid(W, delta.double(), zero.double(), bits).byte()
    for method in (rounding.gptq, rounding.descend):
        q, *grid = method(*problem)
        assert same(grid, (delta, zero)) and q.dtype == torch.uint8
        assert int(q.max()) < 2 ** bits and q.is_contiguous()
        no_step = (delta == 0).repeat_interleave(W.shape[1] // delta.shape[1], 1)
        assert torch.equal(q[no_step], nearest[no_step])
        assert torch.equal(method(W, delta, zero, bits, torch.diag(C.diagonal()))[0], nearest)
        assert same(before, (W, delta, zero, C))


def test_the_losses_fall_from_method_to_method():
    """In float32, fewer tokens than channels: descent below GPTQ, far below rounding to nearest."""
    W, C = (x.float() for x in random_problem(0, 32, 128, tokens=64))
    for bits in (2, 3, 4):
        nearest = awq.quantize(W, bits, 64)
        methods = nearest, rounding.gptq(W, *nearest[1:], bits, C), \
            rounding.descend(W, *nearest[1:], bits, C)
        losses = [loss(W.double(), C.double(), found) for found in methods]
        assert losses[2] < 0.95 * losses[1] < 0.5 * losses[0]


def test_shrunk_c_chooses_integers_for_other_tokens_too():
    """By the C of 4096 tokens, of which half as many as there are channels were seen."""
    gains = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        W, X = (torch.randn(n, 48, generator=generator).double() for n in (6, 4096))
        X += X[:, :1] + X.roll(1, 1)
        C, few = X.T @ X / len(X), X[:24].T @ X[:24] / 24
        plain, shrunk = (loss(W, C, rounding.descend(W, *on_grid(W, 3, 16), 3, found))
                         for found in (few, rounding.shrunk(few, 24)))
        gains.append(shrunk / plain)
    assert max(gains) < 1, gains


# ---- Tuning --------------------------------------------------------------------------------------


def tuning_problem(bits, seed=0, G=8, count=3):
    """(block, layers as rounded, batches whose inputs are not those of the targets)."""
    torch.manual_seed(seed)
    block, layers = Mlp(torch.tanh).requires_grad_(False), {}
    X = [torch.randn(5, 7, 32) for _ in range(count)]
    batches = [(x + 0.01 * torch.randn_like(x), block(x)) for x in X]
    for layer in (block.up, block.down):
        layers[layer] = layer.weight.clone(), *awq.quantize(layer.weight, bits, G)
    return block, layers, batches


def block_error(block, found, batches):
    for layer, point in found.items():
        layer.weight.data = awq.dequantize(*point[-3:])
    return sum((block(x) - y).square().sum().item() for x, y in batches)


@given(st.integers(0, 10 ** 6), st.sampled_from([2, 3, 4, 8]), st.sampled_from([4, 16]),
       st.sampled_from([0, 1, 4, 11]), st.sampled_from([1, 3]))
def test_tuning_never_ends_above_its_start(seed, bits, G, steps, count):
    block, layers, batches = tuning_problem(bits, seed, G=G, count=count)
    found = rounding.tune(layers, bits, block, batches, steps)
    for layer, (q, delta, zero) in found.items():
        assert delta.shape == zero.shape and delta.dtype == torch.float16 and delta.isfinite().all()
        assert q.dtype == zero.dtype == torch.uint8
        assert max(int(q.max()), int(zero.max())) < 2 ** bits and q.shape == layer.weight.shape
        assert steps or same((q, delta, zero), layers[layer][1:])
    start = block_error(block, layers, batches)
    assert block_error(block, found, batches) <= start * (1 + 1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tuning_pays(bits):
    block, layers, batches = tuning_problem(bits)
    with torch.no_grad():           # as in the walk
        found = rounding.tune(layers, bits, block, batches, steps=60)
    error = block_error(block, found, batches)
    assert error < 0.8 * block_error(block, layers, batches)
    for layer, (q, delta, _) in found.items():
        assert not torch.equal(q, layers[layer][1]) and not torch.equal(delta, layers[layer][2])


def test_tuning_reads_the_batches_in_turn_and_leaves_the_layers_alone():
    """All before the first step and after the last, one a step: four steps, three batches.

    The layers' forward and weights are their own again, also after an error in the block.
    """
    block, layers, batches = tuning_problem(3)
    before = [x.clone() for stored in layers.values() for x in (*stored, *block.parameters())]
    seen, hidden = [], [x for x, _ in batches]
    rounding.tune(layers, 3, lambda x: [block(x), seen.append(x)][0], batches, steps=4)
    assert [[x is y for y in hidden].index(True) for x in seen] == [0, 1, 2, 0, 1, 2, 0, 0, 1, 2]
    with pytest.raises(RuntimeError):
        rounding.tune(layers, 3, block, [(hidden[0][..., 1:], batches[0][1])], steps=2)
    after = [x for stored in layers.values() for x in (*stored, *block.parameters())]
    assert same(before, after) and all("forward" not in layer.__dict__ for layer in layers)


def test_tuning_keeps_zero_groups_and_16_bit_models():
    block, layers, batches = tuning_problem(3)
    W = layers[block.up][0]
    W[:, :8] = 0
    layers[block.up] = W, *awq.quantize(W, 3, 8)
    block, batches = block.bfloat16(), [(x.bfloat16(), y.bfloat16()) for x, y in batches]
    q, delta, zero = rounding.tune(layers, 3, block, batches, steps=8)[block.up]
    assert not delta[:, 0].any() and not awq.dequantize(q, delta, zero)[:, :8].any()


@given(st.integers(0, 10 ** 6), st.sampled_from([2, 3, 4, 8]))
def test_a_tuned_point_starts_from_any_integers_and_its_ends_are_clipping(seed, bits):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2 ** bits, (3, 2, 8), generator=generator)
    q[..., 0], q[..., 1] = 0, 2 ** bits - 1         # a grid that is the one of its own points
    zero = torch.randint(0, 2 ** bits, (3, 2), generator=generator).float()
    delta = (torch.rand(3, 2, generator=generator) + 0.01).half().float()
    q[0, 0], zero[0, 0], delta[0, 0] = 0, 0, 0      # zeros only; and float16's least step
    zero[1, 0], delta[1, 0] = 2 ** bits - 1, 2 ** -24
    W_hat, W = awq.dequantize(q.flatten(1), delta, zero), torch.randn(3, 16, generator=generator)
    none, ends = torch.zeros(3, 2, 8), torch.ones(2, 3, 2)
    cells = rounding.cell_of(W, q.flatten(1), delta, zero)
    assert ((cells[0] - W_hat.view(3, 2, 8)).abs() <= 0.26 * delta[..., None]).all()
    assert same(rounding.moved_point(*cells, none, ends, bits),
                (W_hat, q.flatten(1).float(), delta, zero))
    ends = torch.rand(2, 3, 2, generator=generator) + 0.5
    ends[0, 1, 0] = 1.4
    _, *clipped = rounding.moved_point(W_hat.view(3, 2, 8), delta, zero, none, ends, bits)
    expected = awq.quantize(W_hat, bits, 8, ends)
    assert same(clipped, [x.float() for x in expected])
