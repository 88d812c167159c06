"""kernel.py against float64: the CPU's C++, the CUDA text executed on a CPU, the layer, a GPU."""

import contextlib
import copy
import ctypes
import functools
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import count_sass
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import cpp_extension

import kernel

CXX, NVCC = shutil.which("g++"), count_sass.tool("nvcc")
needs_cxx = pytest.mark.skipif(not CXX, reason="no g++: the C++ and CUDA text did NOT run")
needs_nvcc = pytest.mark.skipif(not NVCC, reason="no nvcc: the CUDA text was NOT compiled")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nothing ran on one")
HALF_ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
SIXTEEN = [torch.float16, torch.bfloat16]


# --- what everything is compared with -------------------------------------------------------------
def random_packed(N, K, G, seed, bits=4):
    """qweight, qzeros, scales of random bits; scales of both signs, over three decades"""
    rng = torch.Generator().manual_seed(seed)
    words = [torch.randint(-2**31, 2**31, (rows, kernel.packed_width(N, bits)), generator=rng,
                           dtype=torch.int32) for rows in (K, K // G)]
    scales = torch.rand(K // G, N, generator=rng) - 0.5
    return [*words, (scales * 10 ** (-3 * torch.rand(K // G, N, generator=rng))).half()]


def float64_weight(qweight, qzeros, scales, bits=4):
    """W[n, k] = (q - z) * scale; test_method.py holds unpack against the format, bit by bit"""
    q, z = (kernel.unpack(t, bits, scales.shape[1]).double() for t in (qweight, qzeros))
    z, scales = (t.repeat_interleave(len(q) // len(t), 0) for t in (z, scales.double()))
    return ((q - z) * scales).T


def assert_close(y, x, W, bias=None, weight_error=0.0):
    """|y - x W^T - b| <= y's rounding + float32 sums + weight_error of each product"""
    x, b = x.double(), torch.zeros(len(W)) if bias is None else bias.double()
    exact, size = x @ W.T + b, x.abs() @ W.T.abs() + b.abs()
    # 15 (|q - z| <= 15, and the CPU's code subtracts z last) and a few roundings of float32
    allowed = HALF_ULP[y.dtype] * exact.abs() + (15 * 2.0**-22 + weight_error) * size + 2.0**-24
    wrong = ~((y - exact).abs() <= allowed)  # NaN: not written, or read from outside
    assert not wrong.any(), f"at {wrong.nonzero()[:3]}: {y[wrong][:3]} for {exact[wrong][:3]}"


@st.composite
def shapes(draw):
    """(M, N, K, G): G of 32, 64, 96, 128, 256 or all of K; N any multiple of 8"""
    G = draw(st.sampled_from([32, 64, 96, 128, 256, None]))
    K = 8 * draw(st.integers(1, 60)) if G is None else G * draw(st.integers(1, 640 // G))
    M = draw(st.sampled_from([1, 2, 3, 7, 8, 9, 16, 17, 33, 65]))
    return M, 8 * draw(st.integers(1, 10)), K, G or K


# --- packing and the reference --------------------------------------------------------------------
def test_unpack_one_word_by_hand():
    """0x76543210: nibble i is i, so columns 0..7 are nibbles 0 4 1 5 2 6 3 7"""
    word = torch.tensor([[0x76543210]], dtype=torch.int32)
    assert kernel.unpack(word, 4, 8).tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]


@settings(max_examples=25)
@given(shapes(), st.sampled_from([4, 8, 16]), st.integers(0, 99))
def test_restore_inverts_both_arrangements(shape, lanes, seed):
    _, N, K, G = shape
    packed = random_packed(N, K, G, seed)
    for words in (kernel.cuda_tiles(*packed), kernel.cpu_rows(*packed, lanes)):
        assert words.dtype == torch.int32 and words.is_contiguous()
        assert kernel.restore(words, K, N).equal(packed[0])


# --- the CPU --------------------------------------------------------------------------------------
@pytest.fixture
def anew(monkeypatch):
    """The libraries are looked for once more"""
    for name in ("cpu_library", "cuda_library"):
        monkeypatch.setattr(kernel, name, functools.cache(getattr(kernel, name).__wrapped__))


@settings(max_examples=30)
@given(shapes(), st.sampled_from(list(HALF_ULP)), st.booleans(), st.sampled_from([2, 3, 4, 8]))
def test_layer_and_reference_equal_float64(shape, dtype, with_bias, bits):
    M, N, K, G = shape
    packed = random_packed(N, K, G, M, bits)
    W, x = float64_weight(*packed, bits), torch.randn(M, K).to(dtype)
    bias = torch.randn(N) if with_bias else None  # of its own dtype: it is added in float32
    # the reference rounds weights and bias to dtype, and adds the bias after y's rounding
    rounded = 3 * HALF_ULP[dtype]
    assert_close(kernel.reference(x, *packed, bias, bits), x, W, bias, rounded)
    layer = kernel.AWQLinear(*packed, bias, bits)
    assert_close(layer(input=x), x, W, bias, 0 if bits == 4 else rounded)


@needs_cxx
@pytest.mark.parametrize("lanes, capability", [(4, ""), (8, ""), (16, ""), (8, "AVX2")])
def test_cpu_kernel_at_every_vector_width(lanes, capability, anew, monkeypatch):
    """16 lanes are AVX-512's; a plain build runs them on any CPU. Float16 subnormals are exact."""
    if capability and kernel.SIMD not in (capability, "AVX512"):
        pytest.skip(f"this CPU has no {capability}")
    monkeypatch.setattr(kernel, "LANES", lanes)
    monkeypatch.setattr(kernel, "SIMD", capability)
    packed = random_packed(200, 192, 64, lanes)
    packed[2][:, ::3] *= 2.0**-16
    words = kernel.cpu_rows(*packed, lanes)
    for threads, M in itertools.product((1, 3), (1, 2, 3, 5, 10)):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        x = torch.randn(M, 192)
        y = kernel.cpu_product(x, words, None, 200)
        assert_close(y, x, float64_weight(*packed))
        assert y.equal(torch.cat([kernel.cpu_product(row[None], words, None, 200) for row in x]))


@needs_cxx
def test_cpu_kernel_is_built_once_and_is_what_the_layer_uses(anew, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    layer, x = kernel.AWQLinear(*random_packed(40, 128, 64, 0)), torch.randn(2, 128)
    assert layer(x).equal(kernel.cpu_product(x, layer.qweight, None, 40))
    built, = tmp_path.iterdir()  # and no temporary file is left
    time_built = built.stat().st_mtime_ns
    assert kernel.cpu_library.__wrapped__() and built.stat().st_mtime_ns == time_built


def test_no_compiler_is_a_warning_with_the_reason_and_the_same_numbers(anew, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    packed, x = random_packed(32, 128, 64, 0), torch.randn(2, 128)
    with pytest.warns(UserWarning, match="dequantizes the weight.*no-such-compiler"):
        y = kernel.AWQLinear(*packed)(x)
    assert y.equal(kernel.reference(x, *packed))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    with pytest.warns(UserWarning, match="dequantizes the weight.*CUDA_HOME"):
        assert kernel.cuda_library() is None


# --- the layer ------------------------------------------------------------------------------------
def layers(bits=4):
    """The same layer in both states, its packed tensors, an input"""
    packed, bias = random_packed(40, 192, 64, bits, bits), torch.randn(40)
    fresh, ready = (kernel.AWQLinear(*(t.clone() for t in packed), bias, bits) for _ in range(2))
    ready.prepare()
    return [fresh, ready], [*packed, bias], torch.randn(3, 192)


@pytest.mark.parametrize("bits", [3, 4])
def test_layer_keeps_the_checkpoints_words_in_every_state(bits):
    """Fresh and prepared: loaded into layers with and without memory, copied, moved"""
    states, packed, x = layers(bits)
    y, sizes = states[1](x), [sum(t.nbytes for t in layer.buffers()) for layer in states]
    assert sizes[0] <= sizes[1] <= 2 * sizes[0]  # the words are counted in both
    meta = kernel.AWQLinear(*(t.to("meta") for t in packed), bits)
    assert meta(x.to("meta")).shape == y.shape and meta.weight.is_meta
    for layer in states:
        full = kernel.AWQLinear(*(torch.zeros_like(t) for t in packed), bits)
        full.prepare()
        empty, assigned = copy.deepcopy(meta).to_empty(device="cpu"), copy.deepcopy(meta)
        for other in (full, empty, assigned):
            other.load_state_dict(layer.state_dict(), assign=other is assigned)
        halves = copy.deepcopy(layer).half(), copy.deepcopy(layer).to(torch.bfloat16)
        for half in halves:
            assert half.bias.dtype != torch.float32
            half.bias = packed[3]
        for same in (layer, full, empty, assigned, *halves, copy.deepcopy(layer),
                     pickle.loads(pickle.dumps(layer)), layer.to("cpu")):
            state = same.state_dict()
            assert set(state) == {"qweight", "qzeros", "scales", "bias"}
            for name, tensor in zip(("qweight", "qzeros", "scales"), packed):
                assert state[name].equal(tensor) and state[name].dtype == tensor.dtype
            assert same(x).equal(y) and same.weight.equal(kernel.dequantize(*packed[:3], bits))


@needs_cxx
def test_threads_may_call_a_new_layer_at_once(monkeypatch):
    packed, x = random_packed(512, 512, 128, 0), torch.randn(2, 512)
    expected, made, real = kernel.AWQLinear(*packed)(x), [], kernel.rearrange
    monkeypatch.setattr(kernel, "rearrange", lambda *p: made.append(1) or real(*p))

    def call(layer, barrier):
        barrier.wait()
        return layer(x).equal(expected) and layer.state_dict()["qweight"].equal(packed[0])

    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            layer, barrier = kernel.AWQLinear(*packed), threading.Barrier(4)
            assert all(pool.map(call, [layer] * 4, [barrier] * 4))
    assert len(made) == 20


def test_shapes_strides_and_no_tokens():
    (layer, _), packed, _ = layers()
    for x in (torch.randn(192), torch.randn(2, 3, 192), torch.randn(0, 192), torch.randn(2, 0, 192),
              torch.randn(192, 5).T, torch.randn(4, 384)[:, ::2], torch.randn(193)[1:]):
        for dtype in HALF_ULP:
            y = layer(x.to(dtype))
            assert y.shape == (*x.shape[:-1], 40) and y.dtype == dtype
            assert y.equal(layer(x.to(dtype).contiguous()))


def test_layer_compiles_without_a_graph_break():
    states, packed, x = layers()
    for layer in states:
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            y = compiled(x)
            torch.library.opcheck(kernel.product_op, (x, layer.qweight, *packed[1:], 4))
            assert y.equal(layer(x)) and compiled(x[:2]).equal(y[:2])


def test_a_gradient_asked_for_is_an_error_not_a_silence():
    x = torch.randn(2, 192, requires_grad=True)
    with pytest.raises(RuntimeError, match="awq.product.* no autograd formula"):
        layers()[0][1](x).sum().backward()


@pytest.mark.parametrize("name, change, message", [
    ("bits", lambda bits: 5, "bits is 5"),
    ("scales", lambda t: t[:0], r"scales is \[0, 40\]"),
    ("scales", lambda t: t[:, :36], r"scales is \[3, 36\].* multiple of 8"),
    ("qweight", lambda t: t.long(), "qweight is torch.int64"),
    ("qzeros", lambda t: t[:2], r"qzeros is .* \[2, 5\]"),
    ("qzeros", lambda t: t.to("meta"), "qzeros is .* on meta"),
    ("bias", lambda t: t[1:], r"bias is .* \[39\]"),
    ("x", lambda t: t.double(), "x is torch.float64"), ("x", lambda t: t[0, 0], r"x is .* \[\]"),
    ("x", lambda t: t.to("meta"), "x is .* on meta")])
def test_bad_arguments_are_named(name, change, message):
    given = dict(zip(("qweight", "qzeros", "scales", "bias"), layers()[1]), bits=4,
                 x=torch.randn(3, 192))
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=message):
        kernel.AWQLinear(**{key: given[key] for key in given if key != "x"})(given["x"])


@pytest.mark.parametrize("limit, failures", [(1e-3, 0), (0, 64)])
def test_command_line_checks_and_writes_json(limit, failures, tmp_path, monkeypatch, capsys):
    """All but the largest shape; no float16 result is exact, so a limit of 0 fails"""
    monkeypatch.setattr(kernel, "CHECK_SHAPES", kernel.CHECK_SHAPES[:-1])
    monkeypatch.setitem(kernel.ERROR_LIMIT, torch.float16, limit)
    monkeypatch.setattr(sys, "argv", ["kernel.py", "--check", "--cpu", "--json",
                                      str(tmp_path / "k.json")])
    assert kernel.main() == bool(failures)
    report = json.loads((tmp_path / "k.json").read_text())
    assert report["cases"] == 192 and len(report["failures"]) == failures
    assert f"checked 192 cases against float64 on cpu: {failures} f" in capsys.readouterr().out


# --- the CUDA text compiles -----------------------------------------------------------------------
@needs_nvcc
@pytest.mark.parametrize("arch", [75, 90])  # its two branches; 80 needs fewer registers than 90
def test_cuda_compiles_without_warnings_or_spills_and_its_loop_is_short(arch, tmp_path):
    report, cubin = count_sass.build(arch, tmp_path)
    assert "warning" not in report
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", report)
    assert len(frames) == 25  # (5 + 4) fused x 2 dtypes; 2 teaching, 2 adding, 3 dequantizing
    assert set(frames) == {("0", "0", "0")}
    if arch == 90:
        if not count_sass.tool("nvdisasm"):
            pytest.skip("no nvdisasm (pip install nvidia-cuda-nvdisasm): loops were NOT counted")
        counts = count_sass.count(cubin)
        assert counts.keys() == count_sass.LIMITS.keys()
        assert all(counts[tokens] <= limit for tokens, limit in count_sass.LIMITS.items()), counts


def test_lop3_computes_and_or():
    """The CPU runs a stand-in for this instruction: its constant is F(0xf0, 0xcc, 0xaa) (PTX)"""
    table, = re.findall(r"lop3\.b32 %0, %1, %2, %3, (0x\w+);", kernel.CUDA)
    assert int(table, 16) == 0xf0 & 0xcc | 0xaa


# --- the CUDA text runs on the CPU ----------------------------------------------------------------
# what is broken -> (a piece of the CUDA text, the part of it to replace, by what)
MUTATIONS = {
    # nibble positions
    "float16, row g + 8": ("and_or<__half2, ROW8>(v, 0x64006400)", "",
                           "and_or<__half2, ROW>(v, 0x64006400)"),
    "float16, next pair": ("v >>= 8)", "v >>= 8", "v >>= 4"),
    "float16, zero of row g + 8": ("__hfma2(q8, sixteenth, zero8)", "zero8", "zero"),
    "bfloat16, next row": ("i < 4; i++, v >>= 4)", "v >>= 4", "v >>= 8"),
    "bfloat16, zero of row g + 8": ("zeros >> i % 2 * 4", "i % 2", "0"),
    "order of the checkpoint's nibbles": ("n % 8 / 2 + 4 * (n % 2)", "", "n % 8"),
    "dequantize, half of a register": ("i % 2 ? q.y : q.x", "i % 2", "0"),
    # indices
    "words of a tile": ("slice % 2 * 2 + i]", "slice % 2 * 2 + i", "i"),
    "second half of a tile": ("tile[r] + 32 * i + lane", "32 * i", "0"),
    "scales behind the words": ("8 * s + g];", "8 * s + g", "g"),
    "row tile": ("16 * (row_warp * R + r) + g + c / 2 * 8", "c / 2 * 8", "0"),
    "rows of a warp": ("blockIdx.x * ROW_WARPS + row_warp", "row_warp", "0"),
    "column of the sum": ("8 * n + 2 * t + c % 2", "2 * t", "t"),
    "token of an activation": ("TOKENS + 8 * n + g", "8 * n", "0"),
    "activation": ("* 128 + 8 * t;", "8 * t", "4 * t"),
    "slice of an activation": ("32 * (slice + i / NT)", "i / NT", "0"),
    "scale of row g + 8": ("c / 2 ? scale.y", "c / 2", "0"),
    "first unit of a warp": ("blockIdx.y * K_WARPS + k_warp,", "k_warp", "0"),
    "next unit": ("tile[r] += step * TILE", "step * TILE", "TILE"),
    "next inputs": ("+= 128 * step", "128 * step", "128"),
    "unit in use": ("multiply(unit[d])", "d", "0"),
    "units of a warp": ("units - first + step - 1", "step - 1", "0"),
    "dequantize, row": ("16 + 8 * h + g", "8 * h", "0"),
    "dequantize, scale": ("slice * S / 4 * 8 + g", "slice * S / 4 * 8", "0"),
    "teaching, input": ("x[m * K + k]", "m * K + k", "m * K"),
    # what lies outside is not read or written
    "tokens of x": (", M - 1);", "M - 1", "M"),
    "units fetched": ("i + d + DEPTH - 1 < mine", "", "true"),
    "first units fetched": ("if (d < mine)", "d < mine", "true"),
    "tokens and rows of y": ("|| row >= N)", "row >= N", "false"),
    "tokens of y": ("if (token >= M", "token >= M", "false"),
    "adding, size": ("if (o >= size)", "o >= size", "false"),
    "teaching, columns": ("if (n >= N) return;", "n >= N", "false"),
    # the reduction
    "warps added": ("w < K_WARPS; w++", "w < K_WARPS", "w < K_WARPS - 1"),
    "blocks added": ("s < splits; s++", "s < splits", "s < splits - 1"),
    "bias of a split sum": ("bias[o % N]", "o % N", "0"),
    "barrier before sums are read": ("__syncthreads();  // below", "__syncthreads()", "void()"),
}


@functools.cache
def cpu_build():
    """The kernel's text as a library for the CPU; cpu_mutate says which error it makes, 0: none"""
    source = kernel.CUDA
    for number, (context, before, after) in enumerate(MUTATIONS.values(), 1):
        before = before or context
        assert source.count(context) == 1 and context.count(before) == 1, context
        choice = f"(mutation == {number} ? ({after}) : ({before}))"
        source = source.replace(context, context.replace(before, choice))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.cpp").write_text(source)
        done = subprocess.run(
            [CXX, "-std=c++17", "-O1", "-w", "-fno-strict-aliasing", "-shared", "-fPIC",
             "-x", "c++", "-fsanitize=kernel-address", "--param=asan-stack=0",
             "--param=asan-instrumentation-with-call-threshold=0", "--param=asan-globals=0",
             "-include", ROOT / "tests/cuda_on_cpu.h", "kernel.cpp", "-o", "kernel.so"],
            cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        library = ctypes.CDLL(f"{folder}/kernel.so")
    library.cpu_error.restype = ctypes.c_char_p
    return library


@contextlib.contextmanager
def emulated(seed=0, processors=1, major=9):
    """kernel.launch runs on the CPU, every load and store checked; yields [(name, arguments)]

    Each tensor lies between gaps, as little aligned as it may be.
    """
    library, launched = cpu_build(), []
    gpu = types.SimpleNamespace(major=major, minor=0, multi_processor_count=processors)
    written = {"awq_fused": (4, 5), "awq_teaching": (5,), "awq_dequantize": (2,)}

    def launch(name, x, *arguments):
        memory = torch.full((1 << 20,), 255, dtype=torch.uint8)  # NaN in every floating type
        begin, used, values, outputs = memory.data_ptr(), 0, [], []
        library.cpu_start(seed, ctypes.c_size_t(begin), ctypes.c_size_t(len(memory)))
        for i, value in enumerate(arguments):
            if isinstance(value, torch.Tensor):
                align = 16 if name != "awq_teaching" and i < 3 else value.element_size()
                assert align < 16 or value.data_ptr() % 16 == 0, "a GPU traps here"
                start = used + 64 + -(begin + used) % 64 + align
                used = start + value.nbytes
                if i in written[name]:
                    outputs.append((value, memory[start:used]))
                else:
                    memory[start:used] = value.contiguous().flatten().view(torch.uint8)
                address = ctypes.c_size_t(begin + start)
                library.cpu_tensor(address, ctypes.c_size_t(value.nbytes), i in written[name])
                value = address
            values.append(value)
        getattr(library, name)(kernel.DTYPES.index(x.dtype), *values, None)
        assert not library.cpu_error(), library.cpu_error().decode()
        for tensor, copied in outputs:
            tensor.copy_(copied.view(tensor.dtype).view(tensor.shape))
        launched.append((name, arguments))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
        patch.setattr(kernel, "launch", launch)
        yield launched


def check_fused(M, N, K, G, dtype, splits=1, seed=0, with_bias=True):
    packed = random_packed(N, K, G, seed)
    torch.manual_seed(seed)
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype) if with_bias else None
    blocks = -(-N // (16 if M <= 4 else 32 if M <= 8 else 64)) * -(
        -M // (64 if G % 128 == 0 or G == K else 32))
    with emulated(seed, splits * blocks) as launched:
        y = kernel.cuda_product(x, kernel.cuda_tiles(*packed), bias, N)
    (name, arguments), = launched
    splits = max(1, min(splits, -(-K // 128) // 8))
    assert name == "awq_fused"
    assert (~arguments[5].isnan()).sum() == (splits * M * N if splits > 1 else 0)  # partial sums
    assert_close(y, x, float64_weight(*packed), bias)


@needs_cxx
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("M", [1, 7, 9, 17, 65])
@pytest.mark.parametrize("G", [32, 128])
def test_fused_kernel_equals_float64(M, G, dtype):
    """Every instance, so deep that a warp takes more units than it holds; N ends inside a tile"""
    K = 3328 // (1 if M <= 8 else 2 if M <= 16 else 4) + G
    check_fused(M, 24, K - K % G, G, dtype, seed=M)


@needs_cxx
@settings(max_examples=12)
@given(shapes(), st.sampled_from(SIXTEEN), st.booleans(), st.integers(0, 999))
def test_fused_kernel_equals_float64_on_random_shapes(shape, dtype, with_bias, seed):
    check_fused(*shape, dtype, 1, seed, with_bias)


@needs_cxx
def test_fused_kernel_gives_the_same_bits_under_every_schedule():
    packed, x = random_packed(24, 3072, 256, 0), torch.randn(1, 3072).half()
    results = []
    for seed in range(4):
        with emulated(seed=seed, processors=6):  # splits: 3
            results.append(kernel.cuda_product(x, kernel.cuda_tiles(*packed), None, 24))
    assert all(y.equal(results[0]) for y in results)


def check_others(M, N, K, G, dtype):
    """The teaching and the dequantizing kernel"""
    packed, x = random_packed(N, K, G, 0), torch.randn(M, K).to(dtype)
    bias = torch.randn(N).to(dtype)
    with emulated():
        if dtype != torch.float32:  # one float32 running sum: its error grows with K
            y = kernel.teaching(x, *packed, bias)
            assert_close(y, x, float64_weight(*packed), bias, K * 2.0**-24)
        tiles = kernel.cuda_tiles(*packed)
        W_hat = x.new_empty(16 * len(tiles), 128 * tiles.shape[1])
        kernel.launch("awq_dequantize", x, (tiles.shape[2] - 256) // 16, tiles, W_hat,
                      *tiles.shape[:2])
        assert W_hat[:N, :K].equal(kernel.dequantize(*packed, dtype=dtype))
        y = kernel.cuda_product(x, tiles, bias, N, fused_max=0)
    assert_close(y, x, float64_weight(*packed), bias, 3 * HALF_ULP[dtype])


@needs_cxx
def test_what_an_old_gpu_is_asked_to_do():
    packed = random_packed(40, 2304, 128, 0)
    with emulated(major=7) as launched:
        for M, dtype, name in ((2, torch.bfloat16, "awq_dequantize"),
                               (2, torch.float16, "awq_fused"),
                               (2, torch.float32, "awq_dequantize"),
                               (kernel.FUSED_MAX_TOKENS + 1, torch.float16, "awq_dequantize")):
            x = torch.randn(M * 2304 + 1).to(dtype)[1:].view(M, 2304)  # not 16-byte aligned
            y = kernel.cuda_product(x, kernel.cuda_tiles(*packed), None, 40)
            assert launched[-1][0] == name
            assert_close(y, x, float64_weight(*packed), None, 2 * HALF_ULP[dtype])


@needs_cxx
@needs_nvcc
def test_launch_hands_over_addresses_and_reports_cudas_error(anew, monkeypatch, tmp_path):
    """Built by load_inline, without a GPU: a host function that writes down what it is given"""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    if not (shutil.which("ninja") and (home / "lib64/libcudart.so").exists()):
        pytest.skip("no ninja or only a part of CUDA: load_inline was NOT tried")
    for name in ("libc10_cuda.so", "libtorch_cuda.so"):  # which torch for CPUs lacks
        subprocess.run([CXX, "-shared", "-x", "c++", "/dev/null", f"-Wl,-soname,{name}", "-o",
                        tmp_path / name], check=True)
        ctypes.CDLL(str(tmp_path / name))
    monkeypatch.setenv("LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(home))
    head, = re.findall(r'^extern "C" int awq_teaching\([^{]*\)(?= {)', kernel.CUDA, re.MULTILINE)
    monkeypatch.setattr(kernel, "CUDA", head + """ {
      const void* pointers[] = {x, qweight, qzeros, scales, bias, stream};
      const int numbers[] = {type, M, N, K, G};
      for (int i = 0; i < 11; i++) ((size_t*)y)[i] = i < 6 ? (size_t)pointers[i] : numbers[i - 6];
      return 7;
    }""")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=99))
    packed, x = random_packed(16, 128, 64, 0), torch.randn(1, 128).bfloat16()
    y = torch.empty(11, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="awq_teaching: CUDA error 7"):
        kernel.launch("awq_teaching", x, x, *packed, None, y, 1, 16, 128, 64)
    assert y.tolist() == [x.data_ptr(), *(t.data_ptr() for t in packed), 0, 99, 2, 1, 16, 128, 64]


@needs_cxx
def test_every_kernel_equals_float64():
    """Few small cases that between them reach every line of the CUDA text"""
    check_others(3, 40, 192, 32, torch.float16)
    check_others(3, 72, 384, 128, torch.bfloat16)
    check_others(3, 72, 200, 200, torch.float32)
    check_fused(1, 24, 3328, 128, torch.float16)
    check_fused(5, 24, 2080, 32, torch.bfloat16, splits=2)
    check_fused(9, 72, 1160, 1160, torch.float16)
    check_fused(17, 24, 2048, 64, torch.float16, splits=3)  # for 16 units and 8 warps only 2
    check_fused(65, 24, 2048, 128, torch.bfloat16)
    check_fused(9, 64, 128, 128, torch.float16)


@needs_cxx
@pytest.mark.parametrize("number", range(1, len(MUTATIONS) + 1), ids=list(MUTATIONS))
def test_a_mutated_kernel_fails(number):
    """The check above is worth something: each of these errors makes it fail"""
    cpu_build().cpu_mutate(number)
    try:
        with pytest.raises(AssertionError):
            test_every_kernel_equals_float64()
    finally:
        cpu_build().cpu_mutate(0)


# --- on a GPU -------------------------------------------------------------------------------------
@needs_gpu
def test_gpu_every_path_equals_float64():
    cases, failures = kernel.check(torch.device("cuda"))
    assert cases == 432 and not failures, failures  # 240, and three kernels on four shapes


@needs_gpu
@pytest.mark.parametrize("M", [1, 65])
def test_gpu_graph_capture_streams_and_compile(M):
    """Few enough blocks that K is shared out, so partial sums are in play"""
    layer = kernel.AWQLinear(*(t.cuda() for t in random_packed(1024, 4096, 128, 0)))
    x = torch.randn(M, 4096, device="cuda").half()
    expected, side, graph = layer(x), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = layer(x)
    side.synchronize()
    assert on_side.equal(expected)
    with torch.cuda.graph(graph):
        y = layer(x)
    for _ in range(3):
        y.fill_(float("nan"))
        graph.replay()
        assert y.equal(expected)
    assert torch.compile(layer, fullgraph=True)(x).equal(expected)
