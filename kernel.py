"""INT4 dequantise + matrix product, fused: the AWQ layer's arithmetic on CUDA and on the CPU.

    Y[M, N] = X[M, K] W_hat[N, K]^T,     W_hat[n, k] = (q[n, k] - z[n, k // G]) * scale[n, k // G]

The checkpoint ("GEMM" format) keeps eight columns n in an int32 word, in a curious order:

    bit     31    28 27    24 23    20 19    16 15    12 11     8 7      4 3      0
            +--------+--------+--------+--------+--------+--------+--------+--------+
            | 8c + 7 | 8c + 5 | 8c + 3 | 8c + 1 | 8c + 6 | 8c + 4 | 8c + 2 | 8c + 0 |
            +--------+--------+--------+--------+--------+--------+--------+--------+
    nibble i     7        6        5        4        3        2        1        0

    qweight [K, N/8] int32    qzeros [K/G, N/8] int32    scales [K/G, N] float16    bias [N]

The order makes sense inside a GPU: (word >> 4 i) & 0x000f000f leaves two neighbouring columns in
the two halves of a register, and `| 0x6400` makes of an integer q the half 1024 + q.

In this file, top to bottom: packing -> the PyTorch reference -> two weight layouts made for speed
-> a C++ kernel for CPUs -> the CUDA source (a teaching kernel of 30 lines, the fast one, a
dequantiser) -> its build -> the operator and `awq_linear` -> checks and benchmark.

    python kernel.py           check and time the GPU; without one, check the CPU path
    python kernel.py --cpu     check and time the CPU: tokens a second, dense against packed
    compute-sanitizer --tool memcheck python kernel.py --check      (and --tool racecheck)

Not here: 2, 3 and 8 bits (awq.py dequantises those), gradients, quantised activations. Activations
are not staged in shared memory: from 17 tokens up the four warps that share them read them through
the L1 cache, and whether staging pays must be measured.
No speed on a GPU is claimed: none was at hand.
"""

import argparse
import ctypes
import datetime
import functools
import gc
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this many tokens the fused kernel, beyond it dequantise + cuBLAS.
# Not measured yet: an estimate; `python kernel.py` prints both sides.
FUSED_MAX_TOKENS = 128
# On a CPU, up to this many tokens the C++ kernel (or, without a compiler, `grouped`), beyond it
# dequantise once and multiply: on one core of an EPYC (AVX2, float32) they cross near 500.
CPU_MAX_TOKENS = 256


# --- packing: all on bytes, little-endian as every machine torch runs on ------------------------
def nibbles(words):
    """int32 [..., C] -> its nibbles, lowest first: uint8 [..., C, 8]"""
    octets = words.contiguous().view(torch.uint8).unflatten(-1, (-1, 4))  # [..., C, 4]
    return torch.stack([octets & 15, octets >> 4], -1).flatten(-2)


def from_nibbles(values):
    """The inverse of nibbles: uint8 [..., 8] -> int32 [...]"""
    octets = values[..., 0::2] | values[..., 1::2] << 4  # [..., 4]
    return octets.contiguous().view(torch.int32).squeeze(-1)


def unpack(words):
    """int32 [R, C] of a checkpoint -> integers 0..15 in column order, uint8 [R, 8 C]

    0x76543210 -> 0 4 1 5 2 6 3 7: columns are nibbles [2, 4] transposed. (Indexing with a list
    would copy it to the GPU at every call, which a CUDA graph cannot hold.)
    """
    return nibbles(words).unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-3)


def pack(q):
    """The inverse of unpack: uint8 [R, 8 C] -> int32 [R, C]"""
    return from_nibbles(q.unflatten(-1, (-1, 4, 2)).transpose(-1, -2).flatten(-2))


# --- reference ----------------------------------------------------------------------------------
def dequantise(qweight, qzeros, scales, group_size, dtype=torch.float32):
    """W_hat = (q - z) * scale, [N, K]: computed in float32, rounded once"""
    q = unpack(qweight).float().unflatten(0, (-1, group_size))  # [K/G, G, N]
    w_hat = (q - unpack(qzeros).float()[:, None]) * scales.float()[:, None]
    return w_hat.flatten(0, 1).T.to(dtype)


def reference(x, qweight, qzeros, scales, bias, group_size):
    """Y = X W_hat^T + bias, with W_hat in x's dtype: x [M, K] -> [M, N]"""
    return F.linear(x, dequantise(qweight, qzeros, scales, group_size, x.dtype), bias)


# --- the weight, laid out for tensor cores ------------------------------------------------------
# Axes of q [N, K] after the view below: row tile, h, g | k tile, j, t, jj, a_hi, half. Lane 4 g + t
# of a warp finds the words (j, jj) of its tile side by side: 16 bytes, four mma A fragments. Nibble
# 4 half + 2 a_hi + h of a word is row g + 8 h, input 64 tile + 32 j + 8 t + 4 jj + 2 a_hi + half.
TILE_AXES = (0, 3, 2, 5, 4, 6, 8, 7, 1)


def repack(qweight):
    """qweight [K, N/8] -> [ceil(N/16), ceil(K/64), 32 lanes, 4 words] int32; padding is q = 0"""
    q = unpack(qweight).T  # [N, K]
    q = F.pad(q, (0, -q.shape[1] % 64, 0, -q.shape[0] % 16))
    rows, tiles = q.shape[0] // 16, q.shape[1] // 64
    q = q.reshape(rows, 2, 8, tiles, 2, 4, 2, 2, 2).permute(TILE_AXES)
    return from_nibbles(q.reshape(rows, tiles, 32, 4, 8))


def unrepack(words, N, K):
    """The inverse of repack: -> qweight [K, N/8]"""
    rows, tiles = words.shape[:2]
    q = nibbles(words).view(rows, tiles, 8, 4, 2, 2, 2, 2, 2)
    q = q.permute([TILE_AXES.index(axis) for axis in range(9)]).reshape(16 * rows, 64 * tiles)
    return pack(q[:N, :K].T)


# --- the weight, laid out for a CPU ---------------------------------------------------------------
SIMD = torch.backends.cpu.get_cpu_capability()
SIMD_FLAGS = {"AVX2": ["-mavx2", "-mfma"], "AVX512": ["-mavx512f", "-mfma"]}.get(SIMD, [])
LANES = 16 if SIMD == "AVX512" else 8  # 32-bit numbers of a vector register


def cpu_repack(qweight, lanes=LANES):
    """qweight [K, N/8] -> [ceil(N/8/lanes), K, lanes]: a block of columns in one run of memory"""
    words = F.pad(qweight, (0, -qweight.shape[1] % lanes))
    return words.unflatten(1, (-1, lanes)).transpose(0, 1).contiguous()


def cpu_unrepack(words, N):
    """The inverse of cpu_repack: -> qweight [K, N/8]"""
    return words.transpose(0, 1).flatten(1)[:, : N // 8].contiguous()


def grouped(x, qweight, qzeros, scales, bias, group_size):
    """y = sum_g scale_g (x_g q_g - z_g sum(x_g)), in float32: the dense weight never exists

    Up to 128 rows of q at a time, small enough to stay in the cache; the low nibbles of every byte
    are one matrix, the high nibbles another. x [M, K] -> [M, N].
    """
    K, N = qweight.shape[0], scales.shape[1]
    columns = torch.arange(N, device=x.device).view(-1, 2, 2, 2)  # [.., its nibble % 4 .., // 4]
    columns = columns.permute(2, 0, 3, 1).flatten()  # those of low nibbles, then of high ones
    scale, zero = scales.float()[:, columns], unpack(qzeros).float()[:, columns]
    octets, x32 = qweight.contiguous().view(torch.uint8), x.float()  # [K, N/2]
    y = x32.new_zeros(x.shape[0], N)
    for group in range(K // group_size):
        for k in range(group * group_size, (group + 1) * group_size, 128):
            rows = slice(k, min(k + 128, (group + 1) * group_size))
            x_g, q_g = x32[:, rows], octets[rows]
            product = torch.cat([x_g @ (q_g & 15).float(), x_g @ (q_g >> 4).float()], 1)
            y += scale[group] * (product - zero[group] * x_g.sum(1, keepdim=True))
    y = torch.empty_like(y).index_copy_(1, columns, y)
    return (y if bias is None else y + bias.float()).to(x.dtype)


# --- C++ for the CPU: few tokens, any CPU with a C++ compiler -------------------------------------
# grouped()'s sum. gcc and clang turn arithmetic on `Words` and `Floats` into the CPU's vector
# instructions: here and, convert, multiply-add for every eight (AVX-512: sixteen) weights.
CPU = r"""
#include <cstdint>
#include <cstring>
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));

// float16 -> float: sign and the rest to their places, the exponent's bias from 15 to 127.
static inline float from_half(uint32_t h) {
  const uint32_t bits = (h & 0x8000) << 16 | (h & 0x7fff) << 13;
  float f;
  memcpy(&f, &bits, 4);
  return f * 0x1p112f;
}

// y[0] .. of one token and one block: `columns` outputs, 8 LANES or what is left of N.
static void block(const float* x, const float* totals, const Words* words, const uint32_t* qzeros,
                  const uint16_t* scales, float* y, long columns, long N, long K, long G) {
  static const int ORDER[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // column of nibble i
  Floats sum[8] = {};                                    // of nibble i of every word
  float scale[8 * LANES] = {};
  for (long group = 0; group < K / G; group++, x += G, words += G) {
    // 1. dot[i] = sum of x 16^i q over the group: nibble i stays where it is in its word. Being
    //    a power of two, 16^i rounds nothing. The uppermost would be a sign, so it is moved down.
    Floats dot[8] = {};
    for (long k = 0; k < G; k++) {
#pragma GCC unroll 7
      for (int i = 0; i < 7; i++)
        dot[i] += __builtin_convertvector((Integers)(words[k] & 15u << 4 * i), Floats) * x[k];
      dot[7] += __builtin_convertvector((Integers)(words[k] >> 28), Floats) * x[k];
    }
    // 2. sum += scale (dot / 16^i - z total)
    Words zeros = {};
    memcpy(&zeros, qzeros + group * (N / 8), columns / 2);
    for (long n = 0; n < columns; n++) scale[n] = from_half(scales[group * N + n]);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      const float unit = i < 7 ? 1.f / (1u << 4 * i) : 1.f;
      const Floats zero = __builtin_convertvector((Integers)(zeros >> 4 * i & 15), Floats);
      Floats by_nibble = {};
      for (int lane = 0; lane < LANES; lane++) by_nibble[lane] = scale[8 * lane + ORDER[i]];
      sum[i] += by_nibble * (dot[i] * unit - zero * totals[group]);
    }
  }
  for (long n = 0; n < columns; n++) y[n] = sum[n % 8 / 2 + n % 2 * 4][n / 8];
}

extern "C" void awq_cpu(const float* x,          // [M, K]
                        const float* totals,     // [M, K/G], the sum of x over each group
                        const uint32_t* words,   // [ceil(N/8/LANES), K, LANES], see cpu_repack()
                        const uint32_t* qzeros,  // [K/G, N/8]
                        const uint16_t* scales,  // [K/G, N] float16
                        float* y,                // [M, N]
                        long M, long N, long K, long G, int threads) {
  const long blocks = (N / 8 + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads)
  for (long b = 0; b < blocks; b++)
    for (long m = 0; m < M; m++) {  // a block's words stay in the cache for the next token
      const long n = 8 * LANES * b, columns = N - n < 8 * LANES ? N - n : 8 * LANES;
      block(x + m * K, totals + m * (K / G), (const Words*)words + b * K, qzeros + n / 8,
            scales + n, y + m * N + n, columns, N, K, G);
    }
}
"""


@functools.cache
def cpu_library():
    """The C++ above, compiled on first use and kept on disk; None, with a warning, if that fails"""
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC",
               f"-DLANES={LANES}", *SIMD_FLAGS, "-x", "c++", "-"]
    name = hashlib.sha256(repr((command, platform.platform(), CPU)).encode()).hexdigest()[:16]
    root = os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")
    path = Path(root).expanduser() / f"awq_cpu_{name}.so"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                built = Path(folder) / path.name
                subprocess.run([*command, "-o", str(built)], input=CPU, text=True, check=True,
                               capture_output=True)
                built.replace(path)  # in one step: another process sees all of it or nothing
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as reason:
        warnings.warn("AWQ's CPU kernel cannot be built, using the slower PyTorch code: "
                      f"{reason} {getattr(reason, 'stderr', '')}")
        return None


def cpu_linear(x, words, qzeros, scales, bias, group_size):
    """The C++ kernel on words of cpu_repack, in float32: x [M, K] -> [M, N]"""
    (M, K), N = x.shape, scales.shape[1]
    x32, y = x.float().contiguous(), torch.empty(M, N)
    totals = x32.view(M, -1, group_size).sum(2)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x32, totals, words, qzeros, scales, y)]
    cpu_library().awq_cpu(*pointers, *map(ctypes.c_long, (M, N, K, group_size)),
                          torch.get_num_threads())
    return (y if bias is None else y + bias.float()).to(x.dtype)


# --- CUDA source --------------------------------------------------------------------------------
# No torch header in it, so that nvcc alone can compile it and tests/cuda_on_cpu.h can run it.
CUDA = r"""
#ifndef CUDA_ON_CPU  // tests/cuda_on_cpu.h brings its own of these, so that a CPU can run this text
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LAUNCH(kernel, grid, block, stream, ...) (kernel)<<<grid, block, 0, stream>>>(__VA_ARGS__)

// (v & MASK) | magic. Left to itself, nvcc makes two instructions of it: of two constants only one
// fits into a lop3, so the other has to be in a register.
template <unsigned MASK> __device__ unsigned and_or(unsigned v, unsigned magic) {
  unsigned result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(v), "n"(MASK), "r"(magic));
  return result;
}

// c[16 x 8] += a[16 x 16] b[16 x 8], the whole warp together. With g = lane / 4, t = lane % 4:
//   a[0] row g,     k 2t, 2t+1        a[2] row g,     k 2t+8, 2t+9      b0 k 2t, 2t+1,   column g
//   a[1] row g + 8, k 2t, 2t+1        a[3] row g + 8, k 2t+8, 2t+9      b1 k 2t+8, 2t+9, column g
//   c[0], c[1] row g, columns 2t, 2t+1                 c[2], c[3] row g + 8, the same columns
template <typename T>
__device__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

template <>
__device__ void mma<__half>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else  // sm_75 multiplies 8 deep: two steps
  const unsigned b[2] = {b0, b1};
#pragma unroll
  for (int i = 0; i < 2; i++)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
#endif
}

template <>
__device__ void mma<__nv_bfloat16>(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                   unsigned b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  __trap();  // no bfloat16 tensor cores before sm_80; kernel.py never sends it here
#endif
}
#endif  // CUDA_ON_CPU

constexpr int WARPS = 8;  // of a block of the fused kernel

__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
template <typename T> __device__ T from_float(float v);
template <> __device__ inline __half from_float(float v) { return __float2half_rn(v); }
template <> __device__ inline __nv_bfloat16 from_float(float v) { return __float2bfloat16_rn(v); }

template <typename To, typename From> __device__ inline To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From), "the same bits under another type");
  return *reinterpret_cast<To*>(&v);
}

// Sixteen bytes as an array; streamed: read once, so not worth a place in the L1 cache.
struct alignas(16) Words { unsigned w[4]; };
__device__ inline Words load(const void* p) { return bits_as<Words>(*(const uint4*)p); }
__device__ inline Words stream(const void* p) { return bits_as<Words>(__ldcs((const uint4*)p)); }

// The zero point of column n, from a row of qzeros (nibble order 0 2 4 6 1 3 5 7).
__device__ inline int zero_point(unsigned word, int n) {
  return (word >> 4 * (n % 8 / 2 + 4 * (n % 2))) & 15;
}

// Teaching version: one thread, one output, straight from the checkpoint's own tensors.
//   y[m, n] = bias[n] + sum over groups of scale * sum over k in the group of x[m, k] (q - z)
template <typename T>
__global__ void teaching_kernel(
    const T* __restrict__ x,               // [M, K]
    const unsigned* __restrict__ qweight,  // [K, N/8]
    const unsigned* __restrict__ qzeros,   // [K/G, N/8]
    const __half* __restrict__ scales,     // [K/G, N]
    const T* __restrict__ bias,            // [N] or null
    T* __restrict__ y,                     // [M, N]
    int M, int N, int K, int G) {
  // 1. Which output is mine? Neighbouring threads share a packed word: one load serves eight.
  const int n = blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= N) return;
  for (size_t m = blockIdx.y; m < M; m += gridDim.y) {
    float sum = bias ? to_float(bias[n]) : 0.f;
    for (int group = 0; group < K / G; group++) {
      // 2. One scale and one zero point a group.
      const int zero = zero_point(qzeros[(size_t)group * (N / 8) + n / 8], n);
      float part = 0.f;
      for (int k = group * G; k < (group + 1) * G; k++) {
        // 3. Nibble to integer, integer times activation: float32 throughout, because
        //    |x| * 15 added up K times does not fit in a half.
        const int q = zero_point(qweight[(size_t)k * (N / 8) + n / 8], n);
        part += to_float(x[m * K + k]) * (q - zero);
      }
      sum += part * __half2float(scales[(size_t)group * N + n]);
    }
    // 4. One rounding, at the very end.
    y[m * N + n] = from_float<T>(sum);
  }
}

// Eight nibbles of a word -> the four registers of an mma A fragment, q - z in each half, exactly.
template <typename T> struct Dequantise;

template <> struct Dequantise<__half> {
  __half2 low, high;
  __device__ Dequantise(int zero_g, int zero_g8)
      : low(__float2half2_rn(-1024.f - zero_g)), high(__float2half2_rn(-64.f - zero_g8)) {}
  // 0x6400 | q is the half 1024 + q. Row g + 8 sits four bits higher, as 1024 + 16 q: a sixteenth
  // of it is 64 + q, so no shift. Both steps are exact for all 256 (q, z).
  __device__ void operator()(unsigned v, unsigned (&a)[4]) const {
    const __half2 sixteenth = __float2half2_rn(1.f / 16);
#pragma unroll
    for (int i = 0; i < 2; i++, v >>= 8) {
      const auto q = bits_as<__half2>(and_or<0x000f000f>(v, 0x64006400));
      const auto q16 = bits_as<__half2>(and_or<0x00f000f0>(v, 0x64006400));
      a[2 * i] = bits_as<unsigned>(__hadd2(q, low));
      a[2 * i + 1] = bits_as<unsigned>(__hfma2(q16, sixteenth, high));
    }
  }
};

template <> struct Dequantise<__nv_bfloat16> {
  __nv_bfloat162 minus[2];
  __device__ Dequantise(int zero_g, int zero_g8)
      : minus{__float2bfloat162_rn(-128.f - zero_g), __float2bfloat162_rn(-128.f - zero_g8)} {}
  // 0x4300 | q is the bfloat16 128 + q; eight significant bits leave no room for the 16 q trick.
  __device__ void operator()(unsigned v, unsigned (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++, v >>= 4) {
      const auto q = bits_as<__nv_bfloat162>(and_or<0x000f000f>(v, 0x43004300));
      a[i] = bits_as<unsigned>(__hadd2(q, minus[i % 2]));
    }
  }
};

// What a warp takes from DRAM for one unit, 16 R outputs by 128 inputs: fetched one unit ahead.
template <int R, int GROUPS> struct Unit {
  Words words[R][2];               // two tiles of 64 inputs
  unsigned zeros[GROUPS][R][2];    // the packed word that holds the zero of row g, of row g + 8
  __half scales[GROUPS][R][2];
};

// Y^T = W_hat X^T on tensor cores: the 16 rows of A are output channels, the 8 columns of B tokens.
// A block owns 16 R ROW_WARPS outputs of 8 NT tokens. Its warps share out the outputs (ROW_WARPS)
// and the inputs (the rest); gridDim.y shares out the inputs further, gridDim.z the tokens.
// SLICES: how many slices of 32 inputs have one scale (4: G = 128, 256.. or K; else 1).
template <typename T, int NT, int R, int ROW_WARPS, int SLICES>
__global__ void __launch_bounds__(32 * WARPS) fused_kernel(
    const T* __restrict__ x,              // [M, K], 16-byte aligned
    const uint4* __restrict__ words,      // [ceil(N/16), ceil(K/64), 32 lanes], see repack()
    const unsigned* __restrict__ qzeros,  // [K/G, N/8]
    const __half* __restrict__ scales,    // [K/G, N]
    const T* __restrict__ bias,           // [N] or null
    T* __restrict__ y,                    // [M, N]
    float* partial,                       // [gridDim.y, M, N] if gridDim.y > 1
    unsigned* arrived,                    // [gridDim.z, gridDim.x] zeros, if gridDim.y > 1
    int M, int N, unsigned K, unsigned G) {
  constexpr int ROWS = 16 * R * ROW_WARPS, TOKENS = 8 * NT, K_WARPS = WARPS / ROW_WARPS;
  constexpr int GROUPS = 4 / SLICES;
  // + 4: the stores of phase 5 then touch 32 different banks
  __shared__ float sums[K_WARPS][TOKENS][ROWS + 4];
  __shared__ bool last;

  // 1. Which outputs, tokens and inputs are mine?
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int row_warp = threadIdx.x / 32 % ROW_WARPS, k_warp = threadIdx.x / 32 / ROW_WARPS;
  const int row_tiles = (N + 15) / 16, k_tiles = (K + 63) / 64, units = (k_tiles + 1) / 2;
  const int tile0 = (blockIdx.x * ROW_WARPS + row_warp) * R;
  const size_t token0 = (size_t)blockIdx.z * TOKENS;
  const int first = blockIdx.y * K_WARPS + k_warp, step = gridDim.y * K_WARPS;
  float acc[R][NT][4] = {};

  auto fetch = [&](int u) {
    Unit<R, GROUPS> unit = {};  // zeros where the matrix ends within a tile: they add nothing
#pragma unroll
    for (int r = 0; r < R; r++) {
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (tile0 + r < row_tiles && 2 * u + i < k_tiles)
          unit.words[r][i] =
              stream(words + ((size_t)(tile0 + r) * k_tiles + 2 * u + i) * 32 + lane);
#pragma unroll
      for (int j = 0; j < GROUPS; j++) {
        const unsigned k = 128 * u + 32 * SLICES * j;
        const size_t group = (k < K ? k : 0) / G;  // beyond K any group will do: its x is 0
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int row = 16 * (tile0 + r) + 8 * h;
          if (row < N) {
            unit.zeros[j][r][h] = qzeros[group * (N / 8) + row / 8];
            unit.scales[j][r][h] = scales[group * N + row + g];
          }
        }
      }
    }
    return unit;
  };

  Unit<R, GROUPS> next = {};
  if (first < units) next = fetch(first);
  for (int u = first; u < units; u += step) {
    // 2. The next unit's words travel while this one's are used.
    const Unit<R, GROUPS> now = next;
    if (u + step < units) next = fetch(u + step);
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
      float part[R][NT][4] = {};
#pragma unroll
      for (int slice = j * SLICES; slice < (j + 1) * SLICES; slice++) {
        // 3. Activations: eight neighbouring inputs of token g are B of two mma steps.
        const int k = 128 * u + 32 * slice + 8 * t;
        Words b[NT] = {};
#pragma unroll
        for (int n = 0; n < NT; n++) {
          const size_t token = token0 + 8 * n + g;
          if (token < M && k < K) b[n] = load(x + token * K + k);
        }
#pragma unroll
        for (int r = 0; r < R; r++) {
          // 4. part[16 outputs, 8 tokens] += (q - z)[16, 16] x[16, 8]; every product is exact.
          const Dequantise<T> dequantise(zero_point(now.zeros[j][r][0], g),
                                         zero_point(now.zeros[j][r][1], g));
#pragma unroll
          for (int i = 0; i < 2; i++) {
            unsigned a[4];
            dequantise(now.words[r][slice / 2].w[slice % 2 * 2 + i], a);
#pragma unroll
            for (int n = 0; n < NT; n++) mma<T>(part[r][n], a, b[n].w[2 * i], b[n].w[2 * i + 1]);
          }
        }
      }
      // The scale, once a group and in float32: it never rounds a weight.
#pragma unroll
      for (int r = 0; r < R; r++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
          for (int c = 0; c < 4; c++)
            acc[r][n][c] += __half2float(now.scales[j][r][c / 2]) * part[r][n][c];
    }
  }

  // 5. Add up what the warps along k have, in the order of the warps: the same bits every time.
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int c = 0; c < 4; c++)
        sums[k_warp][8 * n + 2 * t + c % 2][16 * (row_warp * R + r) + g + c / 2 * 8] = acc[r][n][c];
  __syncthreads();  // below, a thread reads what other warps wrote to sums
  for (int o = threadIdx.x; o < TOKENS * ROWS; o += 32 * WARPS) {
    const size_t token = token0 + o / ROWS;
    const int row = blockIdx.x * ROWS + o % ROWS;
    if (token >= M || row >= N) continue;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < K_WARPS; w++) sum += sums[w][o / ROWS][o % ROWS];
    if (gridDim.y > 1)
      __stcg(partial + (blockIdx.y * (size_t)M + token) * N + row, sum);
    else
      y[token * N + row] = from_float<T>(sum + (bias ? to_float(bias[row]) : 0.f));
  }
  if (gridDim.y == 1) return;

  // 6. Inputs shared out over blocks: whoever arrives last adds the blocks' sums, block 0 first.
  __threadfence();  // my partial sums are in memory before anyone counts this block as arrived
  __syncthreads();  // and so are those of every other thread of the block
  unsigned* counter = arrived + blockIdx.z * gridDim.x + blockIdx.x;
  if (threadIdx.x == 0) last = atomicAdd(counter, 1u) == gridDim.y - 1;
  __syncthreads();  // last is known to thread 0 only
  if (!last) return;
  __threadfence();  // the other blocks' sums are read after their arrival was seen
  for (int o = threadIdx.x; o < TOKENS * ROWS; o += 32 * WARPS) {
    const size_t token = token0 + o / ROWS;
    const int row = blockIdx.x * ROWS + o % ROWS;
    if (token >= M || row >= N) continue;
    float sum = 0.f;
    for (unsigned s = 0; s < gridDim.y; s++)
      sum += __ldcg(partial + (s * (size_t)M + token) * N + row);
    y[token * N + row] = from_float<T>(sum + (bias ? to_float(bias[row]) : 0.f));
  }
}

// For many tokens: W_hat [N, K] in T, which cuBLAS multiplies. One thread, one 16-byte load: two
// rows of eight inputs for each of two slices. G any multiple of 8.
template <typename T>
__global__ void dequantise_kernel(
    const uint4* __restrict__ words,      // [ceil(N/16), ceil(K/64), 32 lanes]
    const unsigned* __restrict__ qzeros,  // [K/G, N/8]
    const __half* __restrict__ scales,    // [K/G, N]
    T* __restrict__ w_hat,                // [N, K]
    int N, int K, int G) {
  const size_t index = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
  const int lane = index % 32, g = lane / 4, t = lane % 4, k_tiles = (K + 63) / 64;
  const size_t k_tile = index / 32 % k_tiles, row_tile = index / 32 / k_tiles;
  if (row_tile >= (N + 15) / 16) return;
  const Words packed = stream(words + index);
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const int k = 64 * k_tile + 32 * j + 8 * t;
    if (k >= K) continue;
    const size_t group = k / G;
    unsigned a[2][4];  // [mma step][row g, row g + 8, row g, row g + 8]
    int zero[2] = {};
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = 16 * row_tile + 8 * h;
      if (row < N) zero[h] = zero_point(__ldg(qzeros + group * (N / 8) + row / 8), g);
    }
    const Dequantise<T> dequantise(zero[0], zero[1]);
    dequantise(packed.w[2 * j], a[0]);
    dequantise(packed.w[2 * j + 1], a[1]);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const size_t row = 16 * row_tile + 8 * h + g;
      if (row >= N) continue;
      const float scale = __half2float(__ldg(scales + group * N + row));
      struct alignas(16) { T v[8]; } out;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const unsigned pair = a[i / 4][i / 2 % 2 * 2 + h];
        const auto q = bits_as<T>((unsigned short)(i % 2 ? pair >> 16 : pair));
        out.v[i] = from_float<T>(to_float(q) * scale);
      }
      *(uint4*)(w_hat + row * K + k) = bits_as<uint4>(out);
    }
  }
}

// Host side. bf16 selects the type of x, bias, y and w_hat; every pointer is a device pointer.
// blocks share an SM's L1 copy of X better when they own more outputs, fill more SMs when fewer
extern "C" int awq_rows_per_block(int M) { return M <= 4 ? 16 : M <= 8 ? 32 : 64; }
extern "C" int awq_tokens_per_block(int M) { return M <= 8 ? 8 : M <= 16 ? 16 : M <= 32 ? 32 : 64; }

template <typename T, int NT, int R, int ROW_WARPS> auto fused_for_group(int K, int G) {
  return G % 128 == 0 || G == K ? fused_kernel<T, NT, R, ROW_WARPS, 4>
                                : fused_kernel<T, NT, R, ROW_WARPS, 1>;
}

template <typename T>
void fused(const void* x, const void* words, const void* qzeros, const void* scales,
           const void* bias, void* y, void* partial, void* arrived,
           int M, int N, int K, int G, int splits, cudaStream_t stream) {
  auto kernel = M <= 4    ? fused_for_group<T, 1, 1, 1>(K, G)
                : M <= 8  ? fused_for_group<T, 1, 2, 1>(K, G)
                : M <= 16 ? fused_for_group<T, 2, 2, 2>(K, G)
                : M <= 32 ? fused_for_group<T, 4, 1, 4>(K, G)
                          : fused_for_group<T, 8, 1, 4>(K, G);
  const int rows = awq_rows_per_block(M), tokens = awq_tokens_per_block(M);
  const dim3 grid((N + rows - 1) / rows, splits, (M + tokens - 1) / tokens);
  LAUNCH(kernel, grid, dim3(32 * WARPS), stream, (const T*)x, (const uint4*)words,
         (const unsigned*)qzeros, (const __half*)scales, (const T*)bias, (T*)y, (float*)partial,
         (unsigned*)arrived, M, N, K, G);
}

extern "C" void awq_fused(bool bf16, const void* x, const void* words, const void* qzeros,
                          const void* scales, const void* bias, void* y, void* partial,
                          void* arrived, int M, int N, int K, int G, int splits,
                          cudaStream_t stream) {
  (bf16 ? fused<__nv_bfloat16> : fused<__half>)(x, words, qzeros, scales, bias, y, partial,
                                                arrived, M, N, K, G, splits, stream);
}

template <typename T>
void teaching(const void* x, const void* qweight, const void* qzeros, const void* scales,
              const void* bias, void* y, int M, int N, int K, int G, cudaStream_t stream) {
  const dim3 grid((N + 127) / 128, M < 65535 ? M : 65535);
  LAUNCH(teaching_kernel<T>, grid, dim3(128), stream, (const T*)x, (const unsigned*)qweight,
         (const unsigned*)qzeros, (const __half*)scales, (const T*)bias, (T*)y, M, N, K, G);
}

extern "C" void awq_teaching(bool bf16, const void* x, const void* qweight, const void* qzeros,
                             const void* scales, const void* bias, void* y,
                             int M, int N, int K, int G, cudaStream_t stream) {
  (bf16 ? teaching<__nv_bfloat16> : teaching<__half>)(x, qweight, qzeros, scales, bias, y,
                                                      M, N, K, G, stream);
}

template <typename T>
void dequantise(const void* words, const void* qzeros, const void* scales, void* w_hat,
                int N, int K, int G, cudaStream_t stream) {
  const size_t loads = (size_t)((N + 15) / 16) * ((K + 63) / 64) * 32;
  LAUNCH(dequantise_kernel<T>, dim3((loads + 255) / 256), dim3(256), stream, (const uint4*)words,
         (const unsigned*)qzeros, (const __half*)scales, (T*)w_hat, N, K, G);
}

extern "C" void awq_dequantise(bool bf16, const void* words, const void* qzeros,
                               const void* scales, void* w_hat, int N, int K, int G,
                               cudaStream_t stream) {
  (bf16 ? dequantise<__nv_bfloat16> : dequantise<__half>)(words, qzeros, scales, w_hat,
                                                          N, K, G, stream);
}
"""

# The only C++ that knows torch: pointers, the current stream, the error check.
BINDING = r"""
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/extension.h>

extern "C" int awq_rows_per_block(int M);
extern "C" int awq_tokens_per_block(int M);
extern "C" void awq_fused(bool, const void*, const void*, const void*, const void*, const void*,
                          void*, void*, void*, int, int, int, int, int, cudaStream_t);
extern "C" void awq_teaching(bool, const void*, const void*, const void*, const void*, const void*,
                             void*, int, int, int, int, cudaStream_t);
extern "C" void awq_dequantise(bool, const void*, const void*, const void*, void*, int, int, int,
                               cudaStream_t);
using at::Tensor;
using Maybe = std::optional<at::Tensor>;
static void* pointer(const Maybe& t) { return t ? t->data_ptr() : nullptr; }
static bool is_bf16(const Tensor& t) { return t.scalar_type() == at::kBFloat16; }

int64_t rows_per_block(int64_t M) { return awq_rows_per_block(M); }
int64_t tokens_per_block(int64_t M) { return awq_tokens_per_block(M); }

void fused(const Tensor& x, const Tensor& words, const Tensor& qzeros, const Tensor& scales,
           const Maybe& bias, Tensor y, const Maybe& partial, const Maybe& arrived,
           int64_t G, int64_t splits) {
  const c10::cuda::CUDAGuard guard(x.device());
  awq_fused(is_bf16(x), x.data_ptr(), words.data_ptr(), qzeros.data_ptr(), scales.data_ptr(),
            pointer(bias), y.data_ptr(), pointer(partial), pointer(arrived),
            x.size(0), y.size(1), x.size(1), G, splits, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void teaching(const Tensor& x, const Tensor& qweight, const Tensor& qzeros, const Tensor& scales,
              const Maybe& bias, Tensor y, int64_t G) {
  const c10::cuda::CUDAGuard guard(x.device());
  awq_teaching(is_bf16(x), x.data_ptr(), qweight.data_ptr(), qzeros.data_ptr(), scales.data_ptr(),
               pointer(bias), y.data_ptr(), x.size(0), y.size(1), x.size(1), G,
               c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void dequantise(const Tensor& words, const Tensor& qzeros, const Tensor& scales, Tensor w_hat,
                int64_t G) {
  const c10::cuda::CUDAGuard guard(words.device());
  awq_dequantise(is_bf16(w_hat), words.data_ptr(), qzeros.data_ptr(), scales.data_ptr(),
                 w_hat.data_ptr(), w_hat.size(0), w_hat.size(1), G,
                 c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}
"""


# --- build --------------------------------------------------------------------------------------
def build_flags(capability, compilable):
    """nvcc's -gencode flags: machine code where nvcc knows the GPU, else PTX of the nearest below

    capability (9, 0); compilable: what nvcc knows, as [75, 80, 90].
    """
    arch = 10 * capability[0] + capability[1]
    known = max((a for a in compilable if 75 <= a <= arch), default=None)
    if known is None:
        raise RuntimeError(f"compute capability {capability} needs sm_75 or newer and an nvcc that "
                           f"knows it; this nvcc compiles for {compilable}")
    ptx = f"-gencode=arch=compute_{known},code=compute_{known}"
    return [ptx] + ([f"-gencode=arch=compute_{arch},code=sm_{arch}"] if known == arch else [])


@functools.cache
def extension(capability):
    """The CUDA code for one compute capability, built once (cached on disk); None with a warning"""
    from torch.utils import cpp_extension  # slow to import, and only needed here
    try:
        home = cpp_extension.CUDA_HOME
        nvcc = home and shutil.which("nvcc", path=f"{home}/bin")
        if not nvcc:
            raise RuntimeError("nvcc not found: install the CUDA toolkit or set CUDA_HOME")
        if not cpp_extension.is_ninja_available():
            raise RuntimeError("ninja not found: pip install ninja")
        if not shutil.which(cpp_extension.get_cxx_compiler()):
            raise RuntimeError(f"no host compiler {cpp_extension.get_cxx_compiler()}: install g++")
        listed = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True).split()
        compilable = [int(a.removeprefix("compute_")) for a in listed if a[8:].isdigit()]
        return cpp_extension.load_inline(
            name=f"awq_kernel_sm_{capability[0]}{capability[1]}",
            cpp_sources=BINDING, cuda_sources=CUDA, with_cuda=True,
            functions=["fused", "teaching", "dequantise", "rows_per_block", "tokens_per_block"],
            extra_cuda_cflags=["-O3", *build_flags(capability, compilable)])
    except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as reason:
        warnings.warn(f"AWQ's CUDA kernel cannot be built, using the slower PyTorch code: {reason}")
        return None


# --- the operator -------------------------------------------------------------------------------
METHODS = ("auto", "reference", "grouped", "cpu", "teaching", "fused", "dequantise")


def prepare(qweight, qzeros, scales, group_size):
    """The same words rearranged for qweight's device, or None where nothing can read that layout

    On a CPU [ceil(N/8/LANES), K, LANES], on CUDA [ceil(N/16), ceil(K/64), 32, 4] int32. It builds
    the device's code: call it, or the layer once, before capturing a CUDA graph.
    """
    _check_packed(qweight, qzeros, scales, group_size)
    if qweight.is_cuda and group_size % 8 == 0 and extension(
            torch.cuda.get_device_capability(qweight.device)):
        return repack(qweight)
    if qweight.device.type == "cpu" and cpu_library():
        return cpu_repack(qweight)
    return None


def restore(weight, N, K):
    """qweight [K, N/8] from any of the three layouts: the same bits"""
    if weight.dim() == 2:
        return weight
    return cpu_unrepack(weight, N) if weight.dim() == 3 else unrepack(weight, N, K)


def _linear(x: Tensor, weight: Tensor, qzeros: Tensor, scales: Tensor, bias: Optional[Tensor],
            group_size: int, method: str) -> Tensor:
    """x [M, K] -> [M, N]; arguments already checked by awq_linear"""
    (M, K), N = x.shape, scales.shape[1]
    if M == 0 or N == 0:
        return x.new_empty(M, N)
    x, qzeros, scales = x.contiguous(), qzeros.contiguous(), scales.contiguous()
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    if x.is_cuda and method not in ("reference", "grouped"):
        y = _cuda(x, weight, qzeros, scales, bias, group_size, method)
        if y is not None:
            return y
    if method == "auto":
        method = ("reference" if x.is_cuda or M > CPU_MAX_TOKENS else
                  "cpu" if cpu_library() else "grouped")
    if method == "cpu":
        if cpu_library() is None:
            raise RuntimeError("method 'cpu': the C++ code could not be built, see the warning")
        if weight.dim() != 3 or weight.shape[2] != LANES:
            weight = cpu_repack(restore(weight, N, K))
        return cpu_linear(x, weight.contiguous(), qzeros, scales, bias, group_size)
    plain = grouped if method == "grouped" else reference
    return plain(x, restore(weight, N, K), qzeros, scales, bias, group_size)


# Opaque to torch.compile: no graph break. It has no gradient, and says so when one is asked for.
linear_op = torch.library.custom_op("awq_reference::linear", _linear, mutates_args=())


@linear_op.register_fake
def _(x, weight, qzeros, scales, bias, group_size, method):
    return x.new_empty(x.shape[0], scales.shape[1])


def aligned(tensor):
    """The contiguous tensor, or a copy if it is a view at an address unfit for 16-byte loads"""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _cuda(x, weight, qzeros, scales, bias, G, method):
    """The CUDA methods; None: nothing here applies, and "auto" goes on to the reference"""
    properties = torch.cuda.get_device_properties(x.device)
    built = extension((properties.major, properties.minor))
    (M, K), N, weight = x.shape, scales.shape[1], aligned(weight.contiguous())
    repacked = weight.dim() == 4
    can = {
        "teaching": x.dtype != torch.float32,
        "fused": repacked and x.dtype != torch.float32 and (G % 32 == 0 or G == K and K % 8 == 0)
        and (x.dtype == torch.float16 or properties.major >= 8),
        "dequantise": repacked and x.dtype != torch.float32 and G % 8 == 0}
    if method == "auto":
        method = "fused" if can["fused"] and M <= FUSED_MAX_TOKENS else "dequantise"
        if built is None or not can[method]:
            return None
    if built is None:
        raise RuntimeError(f"method {method!r}: the CUDA code could not be built, see the warning")
    if not can[method]:
        raise ValueError(f"method {method!r} does not do x {x.dtype}, group_size {G}, sm_"
                         f"{properties.major}{properties.minor}, repacked weight: {repacked}")
    if method == "dequantise":
        w_hat = x.new_empty(N, K)
        built.dequantise(weight, qzeros, scales, w_hat, G)
        return F.linear(x, w_hat, bias)
    y = x.new_empty(M, N)
    if method == "teaching":
        built.teaching(x, restore(weight, N, K), qzeros, scales, bias, y, G)
        return y
    x = aligned(x)
    blocks = -(-N // built.rows_per_block(M)) * -(-M // built.tokens_per_block(M))
    # Fewer blocks than SMs: share out K too, while a block still has a unit of 128 for each warp.
    splits = max(1, min(properties.multi_processor_count // blocks, K // (8 * 128)))
    partial = arrived = None
    if splits > 1:
        partial = torch.empty(splits, M, N, dtype=torch.float32, device=x.device)
        arrived = torch.zeros(blocks, dtype=torch.int32, device=x.device)
    built.fused(x, weight, qzeros, scales, bias, y, partial, arrived, G, splits)
    return y


def _check_packed(weight, qzeros, scales, group_size):
    """The packed tensors belong together; returns (N, K)"""
    if not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size is {group_size!r}: it must be a positive integer "
                         "(pass in_features for one group a row)")
    for name, tensor, dtype, dims in (
            ("scales", scales, torch.float16, (2,)), ("qzeros", qzeros, torch.int32, (2,)),
            ("weight", weight, torch.int32, (2, 3, 4))):
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.dim() not in dims:
            got = (f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor)
                   else type(tensor).__name__)
            raise ValueError(f"{name} is {got}: it must be a {dims[0]}-D tensor of {dtype}"
                             + " or what prepare() made of it" * (name == "weight"))
        if tensor.device != scales.device:
            raise ValueError(f"{name} is on {tensor.device}: it must be on scales' {scales.device}")
    groups, N = scales.shape
    K = groups * group_size
    if N % 8:
        raise ValueError(f"scales is {list(scales.shape)}: N = {N} must be a multiple of 8")
    lanes = weight.shape[-1]
    shapes = {2: (K, N // 8), 3: (-(-N // 8 // max(lanes, 1)), K, lanes),
              4: (-(-N // 16), -(-K // 64), 32, 4)}
    for name, tensor, shape in (("qzeros", qzeros, (groups, N // 8)),
                                ("weight", weight, shapes[weight.dim()])):
        if tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}: scales {list(scales.shape)} and "
                             f"group_size {group_size} make it {list(shape)}")
    return N, K


def awq_linear(x, weight, qzeros, scales, bias=None, *, group_size, method="auto"):
    """y = x W_hat^T + bias

    x         [..., K]    float32, float16 or bfloat16; any strides
    weight    [K, N/8]    int32: the checkpoint's qweight; or what prepare() made of it
    qzeros    [K/G, N/8]  int32
    scales    [K/G, N]    float16
    bias      [N]         any floating dtype, or None
    method    "auto", or one of METHODS: "reference" and "grouped" anywhere, "cpu" on the CPU,
              the others on CUDA
    returns   [..., N]    in x's dtype
    """
    N, K = _check_packed(weight, qzeros, scales, group_size)
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x is {getattr(x, 'dtype', type(x).__name__)}: it must be a tensor of "
                         "float32, float16 or bfloat16")
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x is {list(x.shape)}: its last dimension must be K = {K}")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: it must be one of {METHODS}")
    needs = {"cpu": "cpu", "teaching": "cuda", "fused": "cuda", "dequantise": "cuda"}.get(method)
    if needs and x.device.type != needs:
        raise ValueError(f"method is {method!r} and x is on {x.device}: it must be on {needs}")
    if bias is not None and not (isinstance(bias, Tensor) and bias.shape == (N,)
                                 and bias.is_floating_point()):
        got = f"{bias.dtype} {list(bias.shape)}" if isinstance(bias, Tensor) else repr(bias)
        raise ValueError(f"bias is {got}: it must be a floating tensor [{N}]")
    for name, tensor in (("scales", scales), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}: it must be on x's {x.device}")
    # An operator's dispatch costs a decoded token as much as a small matrix does.
    plain = type(x) is Tensor and not (x.is_meta or torch.compiler.is_compiling()
                                       or torch.is_grad_enabled())
    y = (_linear if plain else linear_op)(x.reshape(-1, K), weight, qzeros, scales, bias,
                                          group_size, method)
    return y.view(*x.shape[:-1], N)


# --- checks and benchmark: python kernel.py [--check] [--cpu] [--json FILE [--readme FILE]] -----
CHECK_SHAPES = ((64, 512, 32), (72, 448, 64), (40, 200, 200), (24, 72, 8), (1024, 2048, 128))
SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096), (4096, 14336), (8192, 8192), (8192, 28672))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
SETUP = ("date", "python", "torch", "cuda", "gpu", "cpu")
# ||y - exact|| / ||exact|| allowed: y's own rounding, and that of the weights where a method has it
ERROR_LIMIT = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def random_weight(N, K, G, device):
    """qweight and qzeros of random bits, scales that give outputs of a usual size"""
    words = [torch.randint(-2**31, 2**31, shape, device=device).to(torch.int32)
             for shape in ((K, N // 8), (K // G, N // 8))]
    return (*words, torch.empty(K // G, N, device=device).uniform_(1e-3, 5e-3).half())


def exact_product(x, qweight, qzeros, scales, G):
    """x W_hat^T in float64"""
    q = unpack(qweight).double() - unpack(qzeros).double().repeat_interleave(G, 0)  # [K, N]
    return x.double() @ (q * scales.double().repeat_interleave(G, 0))


def relative_error(y, exact):
    """||y - exact|| / ||exact||"""
    return ((y.double() - exact).norm() / exact.norm()).item()


def check(device):
    """Every method, dtype and kind of shape against float64: (number of cases, failures)"""
    cases, failures = 0, []
    for N, K, G in CHECK_SHAPES:
        packed = random_weight(N, K, G, device)
        ready = prepare(*packed, G)
        weight = packed[0] if ready is None else ready
        for dtype in ERROR_LIMIT:
            methods = ["auto", "reference", "grouped"]
            if device.type == "cpu" and ready is not None:
                methods += ["cpu"]
            if device.type == "cuda" and ready is not None and dtype != torch.float32:
                methods += ["teaching", "dequantise"]
                sm_80 = torch.cuda.get_device_capability() >= (8, 0)
                methods += ["fused"] * (G != 8 and (sm_80 or dtype == torch.float16))
            for M in (1, 7, 8, 9, 16, 17, 65, 200):
                x = torch.randn(M, K, device=device).to(dtype)
                exact = exact_product(x, *packed, G)
                for method in methods:
                    y = awq_linear(x, weight, *packed[1:], group_size=G, method=method)
                    error = relative_error(y, exact)
                    cases += 1
                    if not error <= ERROR_LIMIT[dtype]:  # so written that NaN fails too
                        failures.append(f"{method} {dtype} M={M} N={N} K={K} G={G}: {error:.1e}")
    return cases, failures


def graph_times(calls, replays=50):
    """{name: [functions]} -> {name: [median, 10th, 90th percentile]} in microseconds a call

    One CUDA graph a name. They are replayed in turn, so that a change of clock meets them all.
    """
    graphs, times = {}, {name: [] for name in calls}
    for name, functions in calls.items():
        functions[0]()  # builds and warms up outside the capture
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for function in functions:
                function()
    for replay in range(-5, replays):  # five to warm up
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if replay >= 0:
                times[name].append(1e3 * start.elapsed_time(end) / len(calls[name]))
    quantiles = torch.tensor([0.5, 0.1, 0.9])
    return {name: torch.tensor(t).quantile(quantiles).tolist() for name, t in times.items()}


def tinygemm_pack(qweight, qzeros, scales):
    """The same weight for torch._weight_int4pack_mm, which computes (q - 8) * scale + shift"""
    q, scale = unpack(qweight).T, scales.bfloat16()
    shift = (8 - unpack(qzeros).float()) * scale.float()
    return (torch._convert_weight_to_int4pack((q[:, 0::2] << 4 | q[:, 1::2]).contiguous(), 8),
            torch.stack([scale, shift.bfloat16()], -1).contiguous())


def benchmark_shape(K, N, copy_rate, device, G=128):
    """One row for every M: microseconds of every method on cold weights, errors, TB/s"""
    size = N * K // 2 + K // G * (2 * N + N // 2)  # bytes of words, scales and zeros
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    weights = [random_weight(N, K, G, device) for _ in range(1 + max(1, 2 * l2 // size))]
    dense = [dequantise(*w, G, torch.float16).contiguous() for w in weights]
    ready = [prepare(*w, G) for w in weights]
    try:
        tiny = [tinygemm_pack(*w) for w in weights]
        x16 = torch.zeros(1, K, device=device).bfloat16()
        torch._weight_int4pack_mm(x16, tiny[0][0], G, tiny[0][1])
    except (RuntimeError, TypeError, AttributeError) as reason:  # private functions of torch
        print("tinygemm is not timed:", str(reason).splitlines()[0], file=sys.stderr)
        tiny = None
    rows = []
    for M in TOKENS:
        x = torch.randn(M, K, device=device).half()
        x16 = x.bfloat16()  # tinygemm has no float16

        def ours(method, i):
            weight = weights[i][0] if method == "teaching" else ready[i]
            return awq_linear(x, weight, *weights[i][1:], group_size=G, method=method)

        run = {"cublas": lambda i: F.linear(x, dense[i])}
        if tiny:
            run["tinygemm"] = lambda i: torch._weight_int4pack_mm(x16, tiny[i][0], G, tiny[i][1])
        for method in ("auto", "fused", "dequantise", "teaching"):
            if method != "teaching" or M <= 4:  # beyond, it takes longer than all the others
                run[method] = functools.partial(ours, method)
        exact = exact_product(x, *weights[0], G)
        error = {name: relative_error(f(0), exact) for name, f in run.items()}
        wrong = {n: e for n, e in error.items()
                 if not e <= ERROR_LIMIT[torch.bfloat16 if n == "tinygemm" else torch.float16]}
        if wrong:
            raise SystemExit(f"{K} x {N}, M = {M}: wrong results are not timed: {wrong}")
        us = graph_times({name: [functools.partial(f, i % len(weights))
                                 for i in range(max(20, len(weights)))] for name, f in run.items()})
        rate = (size + 2 * M * (N + K)) / us["auto"][0] / 1e6  # TB/s
        rows.append({"K": K, "N": N, "M": M, "us": us, "error": error, "TB/s": rate,
                     "of_copy": rate / copy_rate, "ratio": us["cublas"][0] / us["auto"][0]})
    return rows


def decoder(device, dtype, packed, positions, **config):
    """A function that decodes one token, batch 1, with a random LLaMA: dense or of awq.AWQLinear

    A static cache of `positions` and nothing that waits for the GPU, so a CUDA graph can hold it.
    The packed words are random: speed does not depend on them.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    from awq import AWQLinear
    config = LlamaConfig(**config, dtype=dtype)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        torch.set_default_dtype(default)
        for block in model.model.layers if packed else ():
            for path, linear in list(block.named_modules()):
                if isinstance(linear, torch.nn.Linear):
                    K, N = linear.in_features, linear.out_features
                    layer = AWQLinear(K, N, bits=4, group_size=128)
                    layer.qweight, layer.qzeros, layer.scales = random_weight(N, K, 128, device)
                    block.set_submodule(path, layer)
        token, position = (torch.ones(1, 1, dtype=torch.long) for _ in range(2))
    cache = StaticCache(config=config, max_cache_len=positions)

    @torch.no_grad()
    def step():
        logits = model(token, position_ids=position, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1:].argmax(-1))
        position.add_(1)

    for _ in range(3):  # rearranges the weights, builds, warms up
        step()
    return step


def benchmark_cpu(steps=32):
    """Tokens a second on the CPU of a LLaMA of 453 M parameters, dense and packed, in each dtype

    The two decode in turn, a token each, so that both meet the same machine: medians.
    """
    rows = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        models = [decoder(torch.device("cpu"), dtype, packed, steps + 4, vocab_size=1024,
                          hidden_size=1536, intermediate_size=4096, num_hidden_layers=16,
                          num_attention_heads=16) for packed in (False, True)]
        seconds = [[], []]
        for _ in range(steps):
            for step, times in zip(models, seconds, strict=True):
                start = time.perf_counter()
                step()
                times.append(time.perf_counter() - start)
        dense, packed = (1 / torch.tensor(times).median().item() for times in seconds)
        rows.append({"dtype": str(dtype).removeprefix("torch."), "dense": dense, "packed": packed,
                     "ratio": packed / dense})
    return rows


def benchmark_gpu_model(device, steps=64):
    """Tokens a second of a LLaMA-7B-shaped model in one CUDA graph, batch 1: float16 and packed"""
    report = {}
    for name, packed in (("float16", False), ("packed", True)):
        gc.collect()  # the model before is gone before this one's memory is measured
        step = decoder(device, torch.float16, packed, 2 * steps, vocab_size=32000,
                       hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                       num_attention_heads=32)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graph.replay()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for _ in range(steps):
            graph.replay()
        torch.cuda.synchronize()
        report[name] = {"tokens/s": steps / (time.perf_counter() - start),
                        "peak_GB": torch.cuda.max_memory_allocated() / 1e9}
        del step, graph
    return report


def table(rows):
    """[{column: text}] as Markdown"""
    lines = ["| " + " | ".join(cells) + " |" for cells in [rows[0], *(r.values() for r in rows)]]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def shape_table(rows):
    """Markdown of benchmark_shape's rows"""
    names = ("cublas", "tinygemm", "auto", "fused", "dequantise", "teaching")
    return table([{
        "K x N": f"{row['K']} x {row['N']}", "M": str(row["M"]),
        **{name: "{:.1f} ({:.1f}-{:.1f})".format(*row["us"][name]) if name in row["us"] else "-"
           for name in names},
        "TB/s": f"{row['TB/s']:.2f}", "of copy": f"{row['of_copy']:.0%}",
        "ratio": f"{row['ratio']:.2f}",
        "error / cublas": f"{row['error']['auto']:.1e} / {row['error']['cublas']:.1e}"}
        for row in rows])


def setup(report):
    """The first line of every output: when, on what and with which versions"""
    return ", ".join(f"{key} {report[key]}" for key in SETUP)


def gpu_text(report):
    """Markdown of what gpu_tables measured: the shapes, the crossover, the whole model"""
    rows, model = report["rows"], report.get("model", {})
    exact = sum(row["error"]["fused"] <= row["error"]["cublas"] for row in rows)
    parts = [f"{setup(report)}; copy {report['copy_TB/s']:.2f} TB/s",
             "Microseconds on cold weights: median (10th-90th percentile). TB/s, share of copy and "
             "ratio to cuBLAS are those of auto.",
             shape_table(rows),
             f"fused is ahead of dequantise up to M = {report['FUSED_MAX_TOKENS']} (geometric mean "
             "over the shapes); its error against float64 is at or below that of cuBLAS on float16 "
             f"weights in {exact} of {len(rows)} rows."]
    if model:
        parts.append(table([{
            "7B-shaped model, batch 1": name, "tokens/s": f"{figures['tokens/s']:.1f}",
            "peak GB": f"{figures['peak_GB']:.1f}"} for name, figures in model.items()]))
    return "\n\n".join(parts)


def cpu_text(report):
    """Markdown of what benchmark_cpu measured"""
    return f"{setup(report)}\n\n" + table([
        {"tokens/s, batch 1": row["dtype"], "dense": f"{row['dense']:.2f}",
         "packed": f"{row['packed']:.2f}", "ratio": f"{row['ratio']:.2f}"}
        for row in report["cpu_model"]])


def write_readme(readme, file):
    """Write a report's tables into the README, between its markers gpu or cpu; ValueError"""
    from eval import write_between_markers
    try:
        report = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as reason:
        raise ValueError(f"--json is {file}: not what this command wrote: {reason}") from None
    texts = {"gpu": gpu_text, "cpu": cpu_text}
    names = [name for name, key in (("gpu", "rows"), ("cpu", "cpu_model")) if report.get(key)]
    if not names:
        raise ValueError(f"--json is {file}: it holds no timings, only a check")
    for name in names:
        write_between_markers(readme, name, texts[name](report))


def gpu_tables(device, report, save):
    """Time every shape, then the whole model; after each, save() what there is"""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_us = graph_times({"copy": [lambda: target.copy_(source)] * 20})["copy"][0]
    report |= {"copy_TB/s": 2 * source.numel() / copy_us / 1e6, "rows": []}
    del source, target
    for K, N in SHAPES:
        rows = benchmark_shape(K, N, report["copy_TB/s"], device)
        print(shape_table(rows), "\n", flush=True)
        report["rows"] += rows
        report["FUSED_MAX_TOKENS"] = crossover(report["rows"])
        save()
        torch.cuda.empty_cache()
    report["model"] = benchmark_gpu_model(device)
    save()
    print(f"all of it:\n\n{gpu_text(report)}\n\n"
          f"this file's FUSED_MAX_TOKENS is {FUSED_MAX_TOKENS}\n")


def crossover(rows):
    """The largest M up to which fused beats dequantise, in the geometric mean over the shapes"""
    best = 0
    for M in TOKENS:
        times = [row["us"] for row in rows if row["M"] == M]
        if sum(math.log(us["fused"][0] / us["dequantise"][0]) for us in times) > 0:
            break
        best = M
    return best


def main():
    parser = argparse.ArgumentParser(description="check and time the INT4 product")
    parser.add_argument("--check", action="store_true", help="only verify the results")
    parser.add_argument("--cpu", action="store_true",
                        help="on the CPU; unless --check, time a 453 M parameter model there")
    parser.add_argument("--json", metavar="FILE", help="write the same figures to FILE")
    parser.add_argument("--readme", metavar="FILE",
                        help="write the tables of --json's file into a README; measure nothing")
    options = parser.parse_args()
    if options.readme:
        try:
            if not options.json:
                raise ValueError("--readme needs --json")
            return write_readme(options.readme, options.json)
        except (OSError, ValueError) as reason:
            parser.error(str(reason))
    cuda = torch.cuda.is_available() and not options.cpu
    device = torch.device("cuda" if cuda else "cpu")
    report = dict(zip(SETUP, (
        datetime.date.today().isoformat(), platform.python_version(), torch.__version__,
        torch.version.cuda, torch.cuda.get_device_name() if cuda else None,
        f"{SIMD}, {torch.get_num_threads()} threads"), strict=True))

    def save():
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n")

    print(setup(report), "\n")
    if cuda and extension(torch.cuda.get_device_capability()) is None:
        raise SystemExit("the CUDA code was not built (see the warning): nothing to check or time")
    cases, failures = check(device)
    report |= {"cases": cases, "failures": failures}
    print(f"checked {cases} cases against float64 on {device}: {len(failures)} failed", *failures,
          sep="\n  ", end="\n\n")
    save()
    if failures or options.check:
        return bool(failures)
    if cuda:
        gpu_tables(device, report, save)
    elif options.cpu:
        report["cpu_model"] = benchmark_cpu()
        print(cpu_text(report), "\n")
    else:
        print("No GPU here: the CPU path was verified, nothing was timed (--cpu times the CPU).")
    save()
    return 0


if __name__ == "__main__":
    sys.modules["kernel"] = sys.modules["__main__"]  # awq.py shall not import this file again
    raise SystemExit(main())
