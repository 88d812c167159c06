"""kernel.py against float64: PyTorch paths, its CUDA text executed on the CPU, and on a GPU."""

import ctypes
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import kernel  # noqa: E402

CXX = shutil.which("g++")
NVCC = shutil.which("nvcc")
needs_cxx = pytest.mark.skipif(not CXX, reason="no g++: the C++ and CUDA text did NOT run")
needs_nvcc = pytest.mark.skipif(not NVCC, reason="no nvcc: the CUDA text was NOT compiled")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nothing ran on one")
HALF_ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


# --- what everything is compared with -----------------------------------------------------------
def random_layer(N, K, G, seed, device="cpu"):
    """qweight, qzeros, scales of random bits; scales of both signs, over three decades"""
    rng = torch.Generator().manual_seed(seed)
    words = [torch.randint(-2**31, 2**31, shape, generator=rng).to(torch.int32)
             for shape in ((K, N // 8), (K // G, N // 8))]
    scales = torch.rand(K // G, N, generator=rng) - 0.5
    scales = scales * 10 ** (-3 * torch.rand(K // G, N, generator=rng))
    return [t.to(device) for t in (*words, scales.half())]


def float64_weight(qweight, qzeros, scales, G):
    """W[n, k] = (q - z) * scale by a loop over nibbles, written from the format's description"""
    qweight, qzeros, scales = (t.cpu().numpy() for t in (qweight, qzeros, scales))
    K, N = qweight.shape[0], scales.shape[1]
    q, z = np.zeros((K, N)), np.zeros((K // G, N))
    for integers, packed in ((q, qweight), (z, qzeros)):
        for c in range(N // 8):
            for i, j in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                integers[:, 8 * c + j] = packed[:, c] >> 4 * i & 15
    return ((q - z.repeat(G, 0)) * scales.astype(np.float64).repeat(G, 0)).T


def assert_close(y, x, W, bias, weight_error=0.0):
    """|y - x W^T - b| <= y's rounding + float32 sums + weight_error of each product"""
    x64, b = x.double().cpu().numpy(), 0 if bias is None else bias.double().cpu().numpy()
    exact, size = x64 @ W.T + b, np.abs(x64) @ np.abs(W).T + np.abs(b)
    # 15 (|q - z| <= 15, and CPU code subtracts z last) and a few roundings of float32
    allowed = HALF_ULP[y.dtype] * np.abs(exact) + (15 * 2.0**-22 + weight_error) * size + 2.0**-24
    error = np.abs(y.double().cpu().numpy() - exact)
    assert not np.isnan(error).any(), "an output is NaN: not written, or read from outside"
    worst = np.unravel_index((error - allowed).argmax(), error.shape)
    assert (error <= allowed).all(), f"at {worst}: error {error[worst]}, allowed {allowed[worst]}"


@st.composite
def layers(draw, M=st.sampled_from([1, 2, 7, 8, 9, 16, 17, 33, 65])):
    """(M, N, K, G): G of 32, 64, 96, 128, 256 or all of K; N any multiple of 8"""
    G = draw(st.sampled_from([32, 64, 96, 128, 256, None]))
    N = 8 * draw(st.integers(1, 10))
    K = 8 * draw(st.integers(1, 60)) if G is None else G * draw(st.integers(1, 640 // G))
    return draw(M), N, K, G or K


# --- packing ------------------------------------------------------------------------------------
def test_unpack_one_word_by_hand():
    """0x76543210: nibble i is i, so columns 0..7 are nibbles 0 4 1 5 2 6 3 7"""
    word = torch.tensor([[0x76543210]], dtype=torch.int32)
    assert kernel.unpack(word).tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]
    assert kernel.pack(kernel.unpack(word)).equal(word)


@settings(deadline=None, max_examples=20)
@given(layers(), st.integers(0, 99))
def test_dequantise_equals_the_loop(shape, seed):
    _, N, K, G = shape
    layer = random_layer(N, K, G, seed)
    W = kernel.dequantise(*layer, G, torch.float64)
    error = np.abs(W.numpy() - float64_weight(*layer, G))
    assert error.max() <= 2.0**-24 * 8  # one float32 rounding of a number below 8


@settings(deadline=None, max_examples=30)
@given(layers(), st.integers(0, 99))
def test_unrepack_inverts_repack(shape, seed):
    _, N, K, G = shape
    qweight = random_layer(N, K, G, seed)[0]
    words = kernel.repack(qweight)
    assert kernel.unrepack(words, N, K).equal(qweight)
    if N % 16 == 0 and K % 64 == 0:
        assert words.numel() == qweight.numel()


def test_repacked_words_are_mma_fragments():
    """The whole mapping in NumPy: lane (g, t) takes A and B fragments as the PTX manual lists them

    A word's nibbles 0 and 4 are a[0], 1 and 5 a[1], 2 and 6 a[2], 3 and 7 a[3]; of the eight inputs
    at 64 tile + 32 j + 8 t, step jj takes 4 jj .. 4 jj + 3 as b0 (two) and b1 (two).
    """
    N, K, tokens = 32, 128, 8
    q = torch.randint(0, 16, (K, N), dtype=torch.uint8)
    words = kernel.repack(kernel.pack(q)).numpy().view(np.uint32)  # [N/16, K/64, 32, 4]
    x = np.random.default_rng(0).standard_normal((tokens, K))
    y = np.zeros((tokens, N))
    for row_tile, k_tile, j, jj in np.ndindex(N // 16, K // 64, 2, 2):
        A, B = np.zeros((16, 16)), np.zeros((16, 8))  # of one mma.m16n8k16
        for g, t in np.ndindex(8, 4):
            word = words[row_tile, k_tile, 4 * g + t, 2 * j + jj]
            for i, half in np.ndindex(4, 2):
                row, k = g + 8 * (i % 2), 2 * t + half + 8 * (i // 2)
                A[row, k] = word >> np.uint32(4 * i + 16 * half) & 15
            inputs = x[g, 64 * k_tile + 32 * j + 8 * t + 4 * jj:][:4]
            B[2 * t: 2 * t + 2, g], B[2 * t + 8: 2 * t + 10, g] = inputs[:2], inputs[2:]
        y[:, 16 * row_tile: 16 * row_tile + 16] += (A @ B).T
    np.testing.assert_allclose(y, x @ q.numpy().astype(float), rtol=0, atol=1e-12)


# --- the CPU: PyTorch, C++, the operator ---------------------------------------------------------
@settings(deadline=None, max_examples=30)
@given(layers(), st.sampled_from([4, 8, 16]), st.integers(0, 99))
def test_cpu_unrepack_inverts_cpu_repack(shape, lanes, seed):
    _, N, K, G = shape
    qweight = random_layer(N, K, G, seed)[0]
    assert kernel.cpu_unrepack(kernel.cpu_repack(qweight, lanes), N).equal(qweight)


def cpu_methods(layer, G):
    """[(method, weight)]: all a CPU can do, on the checkpoint's words and on rearranged ones"""
    ready = kernel.prepare(*layer, G)
    weights = [layer[0]] if ready is None else [layer[0], ready]
    methods = ["auto", "reference", "grouped"] + ["cpu"] * (ready is not None)
    return [(method, weight) for method in methods for weight in weights]


@settings(deadline=None, max_examples=25)
@given(layers(), st.sampled_from(list(HALF_ULP)), st.booleans(), st.integers(0, 99))
def test_cpu_paths_agree_with_float64(shape, dtype, with_bias, seed):
    M, N, K, G = shape
    layer = random_layer(N, K, G, seed)
    W = float64_weight(*layer, G)
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype) if with_bias else None
    for method, weight in cpu_methods(layer, G):
        assert kernel.restore(weight, N, K).equal(layer[0])
        y = kernel.awq_linear(x, weight, *layer[1:], bias, group_size=G, method=method)
        # the reference rounds weights to dtype and adds the bias after y's rounding
        assert_close(y, x, W, bias, 2 * HALF_ULP[dtype] if method == "reference" else 0)


@needs_cxx
def test_cpu_kernel_was_built_and_is_what_few_tokens_get():
    layer = random_layer(40, 128, 64, 0)
    assert kernel.cpu_library() is not None and kernel.prepare(*layer, 64).dim() == 3
    x = torch.randn(2, 128)
    auto, cpu, grouped = (kernel.awq_linear(x, *layer, group_size=64, method=method)
                          for method in ("auto", "cpu", "grouped"))
    assert torch.equal(auto, cpu) and not torch.equal(auto, grouped)
    other = kernel.cpu_repack(layer[0], 2 * kernel.LANES)  # as a CPU with wider vectors left it
    assert torch.equal(kernel.awq_linear(x, other, *layer[1:], group_size=64), cpu)


@needs_cxx
@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("threads", [1, 3])
def test_cpu_kernel_at_every_vector_width(lanes, threads, monkeypatch):
    """16 lanes are AVX-512's; a plain build runs them on any CPU. Float16 subnormals are exact."""
    N, K, G = 200, 192, 64
    qweight, qzeros, scales = random_layer(N, K, G, lanes)
    scales[:, ::3] *= 2.0**-16
    monkeypatch.setattr(kernel, "LANES", lanes)
    monkeypatch.setattr(kernel, "SIMD_FLAGS", [])
    monkeypatch.setattr(kernel, "cpu_library", functools.cache(kernel.cpu_library.__wrapped__))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    arena = Arena()
    x, qzeros = arena.put(torch.randn(3, K), align=4), arena.put(qzeros, align=4)
    words = arena.put(kernel.cpu_repack(qweight, lanes), align=4)
    y = kernel.cpu_linear(x, words, qzeros, arena.put(scales, align=2), None, G)
    assert_close(y, x, float64_weight(qweight, qzeros, scales, G), None)


def test_no_compiler_is_a_warning_and_the_same_numbers(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(kernel, "cpu_library", functools.cache(kernel.cpu_library.__wrapped__))
    layer, x = random_layer(32, 128, 64, 0), torch.randn(2, 128)
    with pytest.warns(UserWarning, match="no-such-compiler"):
        y = kernel.awq_linear(x, *layer, group_size=64)
    assert kernel.prepare(*layer, 64) is None
    with pytest.raises(RuntimeError, match="could not be built"):
        kernel.awq_linear(x, *layer, group_size=64, method="cpu")
    assert_close(y, x, float64_weight(*layer, 64), None)


@needs_cxx
def test_cpu_library_is_built_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert kernel.cpu_library.__wrapped__() is not None
    built, = tmp_path.iterdir()  # and no temporary file is left
    time_built = built.stat().st_mtime_ns
    assert kernel.cpu_library.__wrapped__() is not None
    assert built.stat().st_mtime_ns == time_built


@pytest.mark.parametrize("dtype", list(HALF_ULP), ids=str)
def test_shapes_strides_and_no_tokens(dtype):
    N, K, G = 32, 128, 64
    layer = random_layer(N, K, G, 1)
    for x in (torch.randn(K), torch.randn(2, 3, K), torch.randn(0, K), torch.randn(2, 0, K),
              torch.randn(K, 5).T, torch.randn(4, 2 * K)[:, ::2],
              torch.randn(4 * K + 1)[1:].view(4, K)):
        x = x.to(dtype)
        for method, weight in cpu_methods(layer, G):
            arguments = dict(group_size=G, method=method)
            y = kernel.awq_linear(x, weight, *layer[1:], **arguments)
            assert y.shape == (*x.shape[:-1], N) and y.dtype == dtype
            assert torch.equal(y, kernel.awq_linear(x.contiguous(), *layer, **arguments))


@pytest.mark.parametrize("dtype", list(HALF_ULP), ids=str)
def test_operator_passes_opcheck_and_compiles_without_a_graph_break(dtype):
    N, K, G = 32, 128, 64
    layer, bias = random_layer(N, K, G, 2), torch.randn(N)
    ready = kernel.prepare(*layer, G)
    weight = layer[0] if ready is None else ready
    x = torch.randn(3, K).to(dtype)
    for b in (None, bias):
        torch.library.opcheck(kernel.linear_op, (x, weight, *layer[1:], b, G, "auto"))

    def layer_forward(x):
        return kernel.awq_linear(x * 2, weight, *layer[1:], bias, group_size=G) + 1

    compiled = torch.compile(layer_forward, fullgraph=True, backend="aot_eager")
    for shape in ((3, K), (2, 5, K)):
        x = torch.randn(shape).to(dtype)
        with torch.no_grad():
            assert torch.equal(compiled(x), layer_forward(x))


def test_packed_layer_compiles_without_a_graph_break_and_runs_on_meta():
    import awq
    layer = awq.AWQLinear.from_weight(torch.randn(64, 128), torch.randn(64), 4, 32)
    x = torch.randn(3, 128)
    with torch.no_grad():
        before = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        expected = layer(x)  # rearranges the weight
        after = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(before, expected) and torch.equal(after, expected)
        assert awq.AWQLinear(128, 64, device="meta")(x.to("meta")).shape == (3, 64)


def test_a_gradient_asked_for_is_an_error_not_a_silence():
    layer, x = random_layer(32, 128, 64, 0), torch.randn(2, 128, requires_grad=True)
    with pytest.raises(RuntimeError, match="autograd"):
        kernel.awq_linear(x, *layer, group_size=64).sum().backward()


def test_bad_input_is_named():
    N, K, G = 32, 128, 64
    qweight, qzeros, scales = random_layer(N, K, G, 1)
    x, ready, cpu = torch.randn(2, K), kernel.repack(qweight), kernel.cpu_repack(qweight)
    for argument, change in {
            "x": {"x": x.int()}, "x is": {"x": torch.randn(2, K + 8)},
            "x is \\[\\]": {"x": torch.tensor(1.)},
            "weight": {"weight": qweight.long()}, "weight is": {"weight": qweight[:-1]},
            "weight is NoneType": {"weight": None}, "weight is list": {"weight": [1]},
            "weight is torch.int32 \\[4\\]": {"weight": qweight[0]},
            "weight is \\[1, 2": {"weight": ready[:1]}, "weight is torch.int64": {
                "weight": ready.long()}, "weight is on meta": {"weight": ready.to("meta")},
            "weight is \\[0, 1": {"weight": cpu[:0]}, "weight is \\[1, 128, 0": {
                "weight": cpu[:, :, :0]},
            "qzeros": {"qzeros": qzeros.float()}, "qzeros is": {"qzeros": qzeros[:1]},
            "qzeros is \\[2, 5\\]": {"qzeros": torch.zeros(2, 5, dtype=torch.int32)},
            "scales": {"scales": scales.float()}, "scales is": {"scales": scales[:, :-1]},
            "scales is on meta": {"scales": scales.to("meta"), "qzeros": qzeros.to("meta"),
                                  "weight": qweight.to("meta")},
            "qzeros is on meta": {"qzeros": qzeros.to("meta")},
            "bias is torch.float32 \\[31\\]": {"bias": torch.zeros(N - 1)},
            "bias": {"bias": torch.zeros(N).int()}, "bias is \\[0.5\\]": {"bias": [0.5]},
            "group_size": {"group_size": 0}, "group_size is -1": {"group_size": -1},
            "qzeros is \\[2, 4\\]": {"group_size": 64, "scales": scales[:1]},
            "group_size is 64.0": {"group_size": 64.0},
            "method": {"method": "fast"}, "method is 'fused' and x is on cpu": {"method": "fused"},
    }.items():
        arguments = dict(x=x, weight=qweight, qzeros=qzeros, scales=scales, group_size=G) | change
        with pytest.raises(ValueError, match=argument):
            kernel.awq_linear(**arguments)


# --- the CUDA text compiles ---------------------------------------------------------------------
@needs_nvcc
@pytest.mark.parametrize("arch", [75, 80, 89, 90])
def test_cuda_compiles_without_warnings_spills_or_stack(arch, tmp_path):
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True).stdout
    if f"compute_{arch}" not in known:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    (tmp_path / "kernel.cu").write_text(kernel.CUDA)
    done = subprocess.run(
        [NVCC, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", "-Werror", "all-warnings",
         "-cubin", "-o", "kernel.cubin", "kernel.cu"], cwd=tmp_path, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert "warning" not in report
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", report)
    assert len(frames) == 24  # 5 ranges of tokens x 2 of groups x 2 dtypes; 2 + 2 other kernels
    assert set(frames) == {("0", "0", "0")}


def test_lop3_computes_and_or():
    """The CPU runs a stand-in for this instruction: its constant is F(0xf0, 0xcc, 0xaa) (PTX)"""
    table, = re.findall(r"lop3\.b32 %0, %1, %2, %3, (0x\w+);", kernel.CUDA)
    assert int(table, 16) == 0xf0 & 0xcc | 0xaa


@pytest.mark.parametrize("capability, known, flags", [
    ((9, 0), [75, 80, 90], ["compute_90,code=compute_90", "compute_90,code=sm_90"]),
    ((8, 7), [75, 80, 86, 90], ["compute_86,code=compute_86"]),
    ((12, 0), [75, 80, 90], ["compute_90,code=compute_90"])])
def test_build_flags_fall_back_to_ptx(capability, known, flags):
    assert kernel.build_flags(capability, known) == [f"-gencode=arch={f}" for f in flags]
    with pytest.raises(RuntimeError, match="sm_75"):
        kernel.build_flags((7, 0), known)


# --- the CUDA text runs on the CPU --------------------------------------------------------------
@functools.cache
def cpu_build(source):
    """The kernel's text as a shared library for the CPU"""
    folder = Path(tempfile.mkdtemp())
    (folder / "kernel.cpp").write_text(source)
    done = subprocess.run(
        [CXX, "-std=c++17", "-O1", "-w", "-fno-strict-aliasing", "-shared", "-fPIC", "-x", "c++",
         "-fsanitize=kernel-address", "--param=asan-instrumentation-with-call-threshold=0",
         "--param=asan-stack=0", "--param=asan-globals=0",
         "-include", str(HERE / "cuda_on_cpu.h"), "kernel.cpp", "-o", "kernel.so"],
        cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "kernel.so"))
    shutil.rmtree(folder)
    library.cpu_error.restype = ctypes.c_char_p
    return library


class Arena:
    """Tensors in one piece of memory with gaps between them, each as little aligned as it may be"""

    def __init__(self, size=1 << 22):
        self.memory = torch.full((size,), 255, dtype=torch.uint8)  # NaN in every floating type
        self.begin, self.used = self.memory.data_ptr(), 0
        self.tensors = []  # [(copy, writable)]

    def put(self, tensor, writable=False, align=16):
        """A copy that begins at an address `align` divides and 2 align does not"""
        start = self.used + 64 + -(self.begin + self.used) % 64 + align
        self.used = start + tensor.nbytes
        copy = self.memory[start: self.used].view(tensor.dtype).view(tensor.shape)
        self.tensors.append((copy.copy_(tensor), writable))
        return copy

    def gaps(self):
        """All bytes that belong to no tensor"""
        starts = [tensor.data_ptr() - self.begin for tensor, _ in self.tensors]
        ends = [0, len(self.memory)] + starts
        ends += [start + t.nbytes for start, (t, _) in zip(starts, self.tensors, strict=True)]
        ends.sort()
        return torch.cat([self.memory[a:b] for a, b in zip(ends[::2], ends[1::2], strict=True)])


def pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def on_cpu(source, method, x, layer, bias, G, splits=1, seed=0):
    """Run one of the CUDA text's three host functions; returns y (or w_hat)"""
    library, arena = cpu_build(source), Arena()
    (M, K), N = x.shape, layer[2].shape[1]
    x = arena.put(x)
    weight = arena.put(layer[0], align=4) if method == "teaching" else arena.put(
        kernel.repack(layer[0]))
    qzeros, scales = arena.put(layer[1], align=4), arena.put(layer[2], align=2)
    bias = None if bias is None else arena.put(bias, align=2)
    shape = (N, K) if method == "dequantise" else (M, N)
    y = arena.put(torch.full(shape, float("nan"), dtype=x.dtype), True)
    partial = arena.put(torch.full((splits, M, N), float("nan")), True)
    blocks = -(-N // library.awq_rows_per_block(M)) * -(-M // library.awq_tokens_per_block(M))
    arrived = arena.put(torch.zeros(blocks, dtype=torch.int32), True)
    library.cpu_start(seed, ctypes.c_size_t(arena.begin), ctypes.c_size_t(len(arena.memory)))
    for tensor, writable in arena.tensors:
        library.cpu_tensor(*map(ctypes.c_size_t, (tensor.data_ptr(), tensor.nbytes)), writable)
    packed, sizes = (pointer(weight), pointer(qzeros), pointer(scales)), (N, K, G)
    bf16 = ctypes.c_bool(x.dtype == torch.bfloat16)
    if method == "dequantise":
        library.awq_dequantise(bf16, *packed, pointer(y), *sizes, pointer(None))
    elif method == "teaching":
        library.awq_teaching(bf16, pointer(x), *packed, pointer(bias), pointer(y), M, *sizes,
                             pointer(None))
    else:
        library.awq_fused(bf16, pointer(x), *packed, pointer(bias), pointer(y), pointer(partial),
                          pointer(arrived), M, *sizes, splits, pointer(None))
    assert not library.cpu_error(), library.cpu_error().decode()
    assert set(arrived.tolist()) <= {0, splits}, "every block of a sum counts itself once"
    assert (arena.gaps() == 255).all(), "written outside the tensors"
    return y


def check_fused(source, M, N, K, G, dtype, splits, seed, with_bias=True):
    layer = random_layer(N, K, G, seed)
    torch.manual_seed(seed)
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype) if with_bias else None
    y = on_cpu(source, "fused", x, layer, bias, G, splits, seed)
    assert_close(y, x, float64_weight(*layer, G), bias)
    return x, layer, bias, y


@needs_cxx
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M", [1, 7, 8, 9, 16, 17, 65])
@pytest.mark.parametrize("G", [32, 64, 128, None])
def test_fused_kernel_equals_float64(M, G, dtype):
    """Deep enough that every warp takes two units; N and, if G allows, K end inside a tile"""
    K = 2120 if G is None else 2048 + 3 * G if M <= 8 else 1024 + 3 * G
    check_fused(kernel.CUDA, M, 40, K, G or K, dtype, splits=1, seed=M)


@needs_cxx
@settings(deadline=None, max_examples=40)
@given(layers(), st.sampled_from([torch.float16, torch.bfloat16]), st.integers(1, 4), st.booleans(),
       st.integers(0, 999))
def test_fused_kernel_equals_float64_on_random_shapes(shape, dtype, splits, with_bias, seed):
    check_fused(kernel.CUDA, *shape, dtype, splits, seed, with_bias)


@needs_cxx
def test_fused_kernel_gives_the_same_bits_under_every_schedule():
    x, layer, bias, y = check_fused(kernel.CUDA, 9, 72, 1280, 128, torch.float16, 3, 0)
    for seed in range(1, 6):
        again = on_cpu(kernel.CUDA, "fused", x, layer, bias, 128, 3, seed)
        assert torch.equal(y, again)


@needs_cxx
@settings(deadline=None, max_examples=20)
@given(layers(M=st.sampled_from([1, 3])), st.sampled_from([torch.float16, torch.bfloat16]),
       st.booleans(), st.integers(0, 999))
def test_teaching_and_dequantise_kernels_equal_float64(shape, dtype, with_bias, seed):
    check_teaching_and_dequantise(kernel.CUDA, *shape, dtype, seed, with_bias)


def check_teaching_and_dequantise(source, M, N, K, G, dtype, seed, with_bias):
    layer, x = random_layer(N, K, G, seed), torch.randn(M, K).to(dtype)
    bias = torch.randn(N).to(dtype) if with_bias else None
    y = on_cpu(source, "teaching", x, layer, bias, G)
    # one float32 running sum: its error grows with K
    assert_close(y, x, float64_weight(*layer, G), bias, K * 2.0**-24)
    w_hat = on_cpu(source, "dequantise", x, layer, None, G)
    assert torch.equal(w_hat, kernel.dequantise(*layer, G, dtype))


@needs_cxx
def test_dequantise_kernel_with_a_group_of_8():
    layer = random_layer(24, 72, 8, 0)
    w_hat = on_cpu(kernel.CUDA, "dequantise", torch.zeros(1, 72).half(), layer, None, 8)
    assert torch.equal(w_hat, kernel.dequantise(*layer, 8, torch.float16))


class BuiltForCpu:
    """What kernel.extension returns, its functions with kernel.BINDING's arguments, on the CPU"""

    def __init__(self, record):
        self.library, self.record = cpu_build(kernel.CUDA), record
        self.library.cpu_start(0, ctypes.c_size_t(0), ctypes.c_size_t(0))
        self.rows_per_block = self.library.awq_rows_per_block
        self.tokens_per_block = self.library.awq_tokens_per_block

    def run(self, name, dtype, tensors, sizes):
        assert all(t is None or t.is_contiguous() for t in tensors)
        self.record.append((name, sizes[-1]))
        getattr(self.library, "awq_" + name)(ctypes.c_bool(dtype == torch.bfloat16),
                                             *map(pointer, tensors), *sizes, None)
        assert not self.library.cpu_error(), self.library.cpu_error().decode()

    def fused(self, x, words, qzeros, scales, bias, y, partial, arrived, G, splits):
        assert x.data_ptr() % 16 == 0 and words.data_ptr() % 16 == 0
        assert splits == 1 or (partial.shape, len(arrived)) == (
            (splits, *y.shape), -(-y.shape[1] // self.rows_per_block(len(x)))
            * -(-len(x) // self.tokens_per_block(len(x))))
        self.run("fused", x.dtype, (x, words, qzeros, scales, bias, y, partial, arrived),
                 (*y.shape, x.shape[1], G, splits))

    def teaching(self, x, qweight, qzeros, scales, bias, y, G):
        self.run("teaching", x.dtype, (x, qweight, qzeros, scales, bias, y),
                 (*y.shape, x.shape[1], G))

    def dequantise(self, words, qzeros, scales, w_hat, G):
        assert words.data_ptr() % 16 == 0
        self.run("dequantise", w_hat.dtype, (words, qzeros, scales, w_hat), (*w_hat.shape, G))


@pytest.fixture
def gpu_on_cpu(monkeypatch):
    """kernel._cuda believes in an sm_90 GPU of 20 SMs; the calls it makes are recorded"""
    record = []
    gpu = types.SimpleNamespace(major=9, minor=0, multi_processor_count=20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(kernel, "extension", lambda capability: BuiltForCpu(record))
    return gpu, record


@needs_cxx
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N, K, G", [(40, 2304, 128), (24, 2048, 32), (72, 1160, 1160)])
def test_what_the_gpu_path_launches_equals_float64(N, K, G, dtype, gpu_on_cpu):
    """Python's side of the CUDA path: choice of kernel, splits, workspaces, alignment"""
    layer, bias = random_layer(N, K, G, 0), torch.randn(N).to(dtype)
    W, words = float64_weight(*layer, G), kernel.repack(layer[0])
    for M, method in ((1, "fused"), (1, "auto"), (17, "auto"), (3, "teaching"), (3, "dequantise"),
                      (kernel.FUSED_MAX_TOKENS + 1, "auto")):
        # at addresses 16 does not divide
        x = torch.randn(M * K + 1).to(dtype)[1:].view(M, K)
        words = torch.cat([words.new_zeros(1), words.flatten()])[1:].view(words.shape)
        y = kernel._cuda(x, words, *layer[1:], bias, G, method)
        rounded = 0 if method == "fused" or M in (1, 17) else 2 * HALF_ULP[dtype]
        assert_close(y, x, W, bias, rounded + (K * 2.0**-24 if method == "teaching" else 0))
    names, last = zip(*gpu_on_cpu[1], strict=True)
    assert names == ("fused", "fused", "fused", "teaching", "dequantise", "dequantise")
    assert last[0] == {2304: 2, 2048: 2, 1160: 1}[K]  # splits


@needs_cxx
def test_check_runs_every_method_of_a_gpu(gpu_on_cpu, monkeypatch):
    """`python kernel.py --check` as on a GPU, but that the CUDA text runs on the CPU"""
    def awq_linear(x, weight, *packed, group_size, method):
        if method not in ("reference", "grouped"):
            y = kernel._cuda(x, weight, *packed, None, group_size, method)
            if y is not None:
                return y
        return kernel.grouped(x, kernel.restore(weight, packed[1].shape[1], x.shape[1]), *packed,
                              None, group_size)

    monkeypatch.setattr(kernel, "awq_linear", awq_linear)
    monkeypatch.setattr(kernel, "prepare", lambda qweight, *_: kernel.repack(qweight))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    real = kernel.random_weight
    monkeypatch.setattr(kernel, "random_weight", lambda N, K, G, _: real(N, K, G, "cpu"))
    real_randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, device=None: real_randn(*shape))
    monkeypatch.setattr(kernel, "CHECK_SHAPES", kernel.CHECK_SHAPES[:4])  # the fifth takes minutes
    cases, failures = kernel.check(types.SimpleNamespace(type="cuda"))
    assert not failures
    ran = {name for name, _ in gpu_on_cpu[1]}
    assert ran == {"fused", "teaching", "dequantise"}
    # 8 numbers of tokens, 3 methods in float32, 6 in each of two types; with G = 8 none is fused
    assert cases == 8 * (4 * (3 + 2 * 6) - 2)


def test_what_the_gpu_path_cannot_do_is_named_or_left_to_the_reference(gpu_on_cpu):
    gpu, record = gpu_on_cpu
    layer = random_layer(32, 128, 64, 0)
    words, x = kernel.repack(layer[0]), torch.randn(2, 128)
    assert kernel._cuda(x, words, *layer[1:], None, 64, "auto") is None
    with pytest.raises(ValueError, match="'fused' does not do x torch.float32"):
        kernel._cuda(x, words, *layer[1:], None, 64, "fused")
    with pytest.raises(ValueError, match="repacked weight: False"):
        kernel._cuda(x.half(), layer[0], *layer[1:], None, 64, "dequantise")
    gpu.major, gpu.minor = 7, 5
    with pytest.raises(ValueError, match="sm_75"):
        kernel._cuda(x.bfloat16(), words, *layer[1:], None, 64, "fused")
    kernel._cuda(x.half(), words, *layer[1:], None, 64, "fused")
    kernel._cuda(x.bfloat16(), words, *layer[1:], None, 64, "auto")
    assert [name for name, _ in record] == ["fused", "dequantise"]


# what is broken -> (a piece of the CUDA text, the part of it to replace, by what)
MUTATIONS = {
    # nibble positions
    "float16, row g + 8": ("and_or<0x00f000f0>(v, 0x64006400)", "",
                           "and_or<0x000f000f>(v, 0x64006400)"),
    "float16, next pair": ("v >>= 8)", "v >>= 8", "v >>= 4"),
    "float16, zero of row g + 8": ("(-64.f - zero_g8)", "zero_g8", "zero_g"),
    "bfloat16, next row": ("i < 4; i++, v >>= 4)", "v >>= 4", "v >>= 8"),
    "bfloat16, zero of row g + 8": ("minus[i % 2]", "i % 2", "0"),
    "order of the zeros": ("4 * (n % 8 / 2 + 4 * (n % 2))", "n % 8 / 2 + 4 * (n % 2)", "n % 8"),
    "dequantise, half of a register": ("(i % 2 ? pair >> 16", "i % 2", "0"),
    # indices
    "words of a tile": ("slice % 2 * 2 + i]", "slice % 2 * 2 + i", "i"),
    "tile of a unit": ("* k_tiles + 2 * u + i)", "2 * u + i", "2 * u"),
    "row tile": ("16 * (row_warp * R + r) + g + c / 2 * 8", "c / 2 * 8", "0"),
    "column of the sum": ("8 * n + 2 * t + c % 2", "2 * t", "t"),
    "token of an activation": ("token0 + 8 * n + g", "8 * n", "0"),
    "activation": ("32 * slice + 8 * t;", "8 * t", "4 * t"),
    "group of a slice": ("k = 128 * u + 32 * SLICES * j", "32 * SLICES * j", "0"),
    "scale of row g + 8": ("now.scales[j][r][c / 2]", "c / 2", "0"),
    "first unit of a warp": ("blockIdx.y * K_WARPS + k_warp,", "k_warp", "0"),
    "first token of a block": ("(size_t)blockIdx.z * TOKENS", "TOKENS", "TOKENS + 1"),
    "dequantise, row": ("16 * row_tile + 8 * h + g", "8 * h", "0"),
    "teaching, input": ("x[m * K + k]", "+ k", "+ k - group * G"),
    # what lies outside is not read or written
    "rows of words": ("tile0 + r < row_tiles", "", "true"),
    "tiles of words": ("2 * u + i < k_tiles", "", "true"),
    "rows of zeros and scales": ("if (row < N) {", "row < N", "true"),
    "the last group": ("(k < K ? k : 0) / G", "k < K", "true"),
    "tokens of x": ("if (token < M &&", "token < M", "true"),
    "inputs of x": ("k < K) b[n]", "k < K", "true"),
    "dequantise, row tiles": ("if (row_tile >= (N + 15) / 16) return;",
                              "row_tile >= (N + 15) / 16", "false"),
    "dequantise, inputs": ("if (k >= K) continue;", "k >= K", "false"),
    "dequantise, rows of zeros": ("if (row < N) zero", "row < N", "true"),
    "dequantise, rows": ("if (row >= N) continue;", "row >= N", "false"),
    "teaching, columns": ("if (n >= N) return;", "n >= N", "false"),
    # the reduction: bounds, barriers, fences
    "warps added": ("w < K_WARPS; w++", "w < K_WARPS", "w < K_WARPS - 1"),
    "blocks added": ("s < gridDim.y; s++", "s < gridDim.y", "s < gridDim.y - 1"),
    "the last block": ("== gridDim.y - 1", "gridDim.y - 1", "0"),
    "barrier before sums are read": ("__syncthreads();  // below", "__syncthreads()", "void()"),
    "barrier before the count": ("__syncthreads();  // and", "__syncthreads()", "void()"),
    "barrier before last is read": ("__syncthreads();  // last", "__syncthreads()", "void()"),
    "fence before the count": ("__threadfence();  // my", "__threadfence()", "void()"),
    "fence after the count": ("__threadfence();  // the", "__threadfence()", "void()"),
}


def with_mutations(source):
    """The text with each of these errors in it, to be made if the global `mutation` says so"""
    for number, (context, before, after) in enumerate(MUTATIONS.values(), 1):
        before = before or context
        assert source.count(context) == 1 and context.count(before) == 1, context
        choice = f"(mutation == {number} ? ({after}) : ({before}))"
        if before == "+ k":
            choice = f"+ (mutation == {number} ? k - group * G : k)"
        source = source.replace(context, context.replace(before, choice))
    return source


def battery(source):
    """Few small cases that between them reach every line of the CUDA text"""
    for dtype in (torch.float16, torch.bfloat16):
        check_teaching_and_dequantise(source, 3, 40, 72, 24, dtype, 0, True)
    for M, N, K, G, dtype, splits in ((1, 40, 2304, 128, torch.float16, 1),
                                      (5, 24, 1312, 32, torch.bfloat16, 2),
                                      (9, 72, 1160, 1160, torch.float16, 1),
                                      (17, 72, 448, 64, torch.float16, 2),
                                      (65, 72, 448, 64, torch.bfloat16, 3)):
        for seed in range(2):
            check_fused(source, M, N, K, G, dtype, splits, seed)


@needs_cxx
@pytest.mark.parametrize("change", [None, *MUTATIONS])
def test_a_mutated_kernel_fails(change):
    """The check above is worth something: each of these errors makes it fail"""
    source = with_mutations(kernel.CUDA)
    library = cpu_build(source)
    library.cpu_mutate([None, *MUTATIONS].index(change))
    if change is None:
        return battery(source)
    with pytest.raises(AssertionError):
        battery(source)


# --- the README's tables are those of the JSON file -----------------------------------------------
def gpu_report(M, fused, cublas, error):
    row = {"K": 4096, "N": 8192, "M": M, "of_copy": 0.8, "ratio": cublas / fused, "TB/s": 3.21,
           "us": {"cublas": [cublas, 1, 2], "auto": [fused, 3, 4], "fused": [fused, 3, 4],
                  "dequantise": [50.0, 5, 6]},
           "error": {"auto": error, "fused": error, "cublas": 2e-4}}
    return {"date": "2001-02-03", "python": "3", "torch": "2", "cuda": "13", "gpu": "a GPU",
            "cpu": "a CPU", "copy_TB/s": 4.0, "FUSED_MAX_TOKENS": 64,
            "rows": [row, row | {"M": 99}],
            "model": {"float16": {"tokens/s": 70.0, "peak_GB": 13.5},
                      "packed": {"tokens/s": 210.0, "peak_GB": 4.0}}}


def test_readme_is_written_from_the_json_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kernel.py", "--json", str(tmp_path / "k.json"), "--readme",
                                      str(tmp_path / "README.md")])
    (tmp_path / "README.md").write_text("before\n<!-- gpu -->\nold\n<!-- /gpu -->\nafter\n")
    (tmp_path / "k.json").write_text(json.dumps(gpu_report(8, 12.5, 37.5, 1e-4)))
    assert not kernel.main()
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n<!-- gpu -->\ndate 2001-02-03, python 3, torch 2, cuda 13,")
    assert text.endswith("\n<!-- /gpu -->\nafter\n") and "\nold\n" not in text
    for part in ("| 4096 x 8192 | 8 | 37.5 (1.0-2.0) | - | 12.5 (3.0-4.0) | 12.5 (3.0-4.0) |",
                 "| 4096 x 8192 | 99 |", "| 3.21 | 80% | 3.00 | 1.0e-04 / 2.0e-04 |",
                 "float16 weights in 2 of 2 rows", "up to M = 64", "| packed | 210.0 | 4.0 |"):
        assert part in text
    assert "in 0 of 2 rows" in kernel.gpu_text(gpu_report(8, 12.5, 37.5, 3e-4))


@pytest.mark.parametrize("content, message", [
    ("{", "not what this command wrote"), ('{"cases": 3}', "holds no timings, only a check"),
    (json.dumps(gpu_report(1, 1, 1, 0)), "no markers <!-- gpu -->")])
def test_a_file_that_does_not_fit_is_named(content, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "k.json").write_text(content)
    (tmp_path / "README.md").write_text("nothing here\n")
    monkeypatch.setattr(sys, "argv", ["kernel.py", "--json", str(tmp_path / "k.json"), "--readme",
                                      str(tmp_path / "README.md")])
    with pytest.raises(SystemExit):
        kernel.main()
    assert message in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "nothing here\n"


# --- on a GPU -----------------------------------------------------------------------------------
@pytest.fixture
def poisoned():
    """torch.empty returns NaN, so an output nobody wrote shows"""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@needs_gpu
@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("G", [32, 64, 128, None])
@pytest.mark.parametrize("N, K", [(8, 128), (40, 1280), (256, 384), (4096, 4096), (4096, 11008)])
def test_gpu_every_method_equals_float64(N, K, G, dtype, poisoned):
    G, device = G or K, "cuda"
    layer = random_layer(N, K, G, N + K, device)
    W, bias = float64_weight(*layer, G), torch.randn(N, device=device).to(dtype)
    ready = kernel.prepare(*layer, G)
    half = dtype != torch.float32
    assert ready is not None, "the kernel was not built: see the warning"
    assert kernel.restore(ready, N, K).equal(layer[0])
    old_gpu = torch.cuda.get_device_capability() < (8, 0) and dtype == torch.bfloat16
    for M in (0, 1, 4, 7, 8, 9, 16, 17, 32, 33, 64, 65, 300):
        x = torch.randn(M, K, device=device).to(dtype)
        methods = ["auto", "reference"] + ["dequantise", "teaching"] * half
        methods += ["fused"] * (half and not old_gpu)
        for method in methods:
            y, again = (kernel.awq_linear(x, ready, *layer[1:], bias, group_size=G, method=method)
                        for _ in range(2))
            assert torch.equal(y, again)
            if M:
                fused = method == "fused" or method == "auto" and M <= kernel.FUSED_MAX_TOKENS
                rounded = 0 if fused and half else 2 * HALF_ULP[dtype] if half else 2.0**-10
                assert_close(y, x, W, bias, rounded + (K * 2.0**-24 if method == "teaching" else 0))


@needs_gpu
@pytest.mark.parametrize("M", [1, 65])
def test_gpu_graph_capture_streams_and_compile(M):
    N, K, G = 1024, 4096, 128  # few enough blocks that K is shared out, so counters are in play
    layer = random_layer(N, K, G, 0, "cuda")
    ready = kernel.prepare(*layer, G)
    x = torch.randn(M, K, device="cuda").half()

    def forward():
        return kernel.awq_linear(x, ready, *layer[1:], group_size=G)

    expected = forward()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = forward()
    side.synchronize()
    assert torch.equal(on_side, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = forward()
    for _ in range(3):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)
    assert torch.equal(torch.compile(forward, fullgraph=True)(), expected)


@needs_gpu
def test_gpu_bad_device_is_named():
    layer = random_layer(32, 128, 64, 0, "cuda")
    with pytest.raises(ValueError, match="scales is on cuda"):
        kernel.awq_linear(torch.randn(1, 128), *layer, group_size=64)
