"""INT4 dequantize + matrix product, fused: the AWQ layer's arithmetic on CUDA and on the CPU.

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

Top to bottom: unpack -> dequantize and the product in PyTorch -> the words rearranged for a device
-> the CUDA source (a teaching kernel of 30 lines, the fast one, a dequantizer) -> the C++ kernel
for CPUs -> both built and called -> the operator that picks one -> AWQLinear -> check and
benchmark. A scale here is awq.py's delta, z its zero; AWQ's own s has been folded away before.
What a device needs is compiled when it is first used: with nvcc and ninja (load_inline), or c++.

    python kernel.py           check and time the GPU; without one, check the CPU
    python kernel.py --cpu     check and time the CPU: tokens a second, dense against packed
    compute-sanitizer --tool memcheck python kernel.py --check      (and --tool racecheck)

Not here: fast kernels for 2, 3 and 8 bits (those are dequantized at every call), gradients,
quantized activations. No speed on a GPU is claimed: none was at hand.
"""

import argparse
import copy
import ctypes
import functools
import hashlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import threading
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of x and y; 0, 1, 2 in the CUDA source
# Up to this many tokens the fused CUDA kernel, beyond it dequantize + cuBLAS: an estimate, not
# measured; `python kernel.py` prints both sides.
FUSED_MAX_TOKENS = 128


# --- the packed words: all on bytes, little-endian as every machine torch runs on ----------------
def packed_width(columns, bits):
    """int32 words in a packed row: 8 values a word at 4 bits, else 32 values in `bits` words"""
    return columns // 8 if bits == 4 else -(-columns // 32) * bits


def unpack(words, bits, columns):
    """int32 [.., packed_width(columns, bits)] -> integers in column order, uint8 [.., columns]

    Eight values are `bits` bytes: value i starts at bit `bits` i.
    """
    octets = words.contiguous().view(torch.uint8).unflatten(-1, (-1, bits))  # [.., C/8, bits]
    values = []
    for i in range(8):
        byte, shift = divmod(bits * i, 8)
        value = octets[..., byte] >> shift
        if shift + bits > 8:  # the rest of it is in the next byte
            value = value | octets[..., byte + 1] << (8 - shift)
        values.append(value & 2**bits - 1)
    if bits == 4:
        values = [values[nibble] for nibble in (0, 4, 1, 5, 2, 6, 3, 7)]
    return torch.stack(values, -1).flatten(-2)[..., :columns]


def pack(q):
    """The inverse of unpack at 4 bits: uint8 [.., N] -> int32 [.., N/8]"""
    nibbles = q.unflatten(-1, (-1, 4, 2)).transpose(-1, -2).flatten(-3)
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).contiguous().view(torch.int32)


# --- reference ------------------------------------------------------------------------------------
def dequantize(qweight, qzeros, scales, bits=4, dtype=torch.float32):
    """W_hat = (q - z) * scale, [N, K]: computed in float32, rounded once"""
    groups, N = scales.shape
    q = unpack(qweight, bits, N).unflatten(0, (groups, -1))  # [K/G, G, N]
    W_hat = q.float().sub_(unpack(qzeros, bits, N)[:, None]).mul_(scales[:, None])
    return W_hat.flatten(0, 1).T.to(dtype).contiguous()


def reference(x, qweight, qzeros, scales, bias=None, bits=4):
    """Y = X W_hat^T + bias, with W_hat in x's dtype: x [M, K] -> [M, N]"""
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, dequantize(qweight, qzeros, scales, bits, x.dtype), bias)


# --- the same weight, rearranged for a device -----------------------------------------------------
# Tensor cores: a tile is 16 outputs x 128 inputs, the part of it that lane 4 g + t of a warp
# multiplies lies in two runs of 16 bytes, i = 0 and 1: four words each, (j, jj) = 00 01 10 11.
#
#     input   64 i + 32 j + 8 t + 4 jj +   0, 1    2, 3         halves 0, 1 of a register
#     row g                                0  4    2  6         nibbles of the word: each column
#     row g + 8                            1  5    3  7         pair is one of an A fragment's four
#
# As axes of q [row tile, h, g | unit, i, j, t, jj, a, half], row 8 h + g, into pack's order:
TILE_AXES = (0, 3, 4, 2, 6, 5, 7, 8, 1, 9)
SIMD = torch.backends.cpu.get_cpu_capability()
LANES = 16 if SIMD == "AVX512" else 8  # 32-bit numbers of a CPU's vector register


def cuda_tiles(qweight, qzeros, scales):
    """-> int32 [row tiles, units, 256 + 16 S]: 256 words and, for each of S scales a row, 16 more

    N is padded to 64, K to units of 128. S = 1 if a unit has one scale a row, else 4, one for each
    32 inputs; for row pair g they are (scale of g, of g + 8) and the zeros of both as nibbles.
    """
    (K, _), (groups, N) = qweight.shape, scales.shape
    rows, units, G = -(-N // 64) * 4, -(-K // 128), K // groups
    S = 1 if G % 128 == 0 or groups == 1 else 4
    q = F.pad(unpack(qweight, 4, N).T, (0, 128 * units - K, 0, 16 * rows - N))
    q = q.reshape(rows, 2, 8, units, 2, 2, 4, 2, 2, 2).permute(TILE_AXES)
    words = pack(q.reshape(rows, units, 2048))
    group = torch.arange(units * S, device=scales.device) * (128 // S) // G
    scales, zeros = (F.pad(t[group.clamp(max=groups - 1)], (0, 16 * rows - N))
                     .view(units, S, rows, 2, 8).permute(2, 0, 1, 4, 3).contiguous()  # g, h
                     for t in (scales, unpack(qzeros, 4, N)))
    zeros = (zeros[..., :1] | zeros[..., 1:] << 4).int() * 0x10001  # as nibbles 0, 1 and 4, 5
    pairs = torch.cat([scales.view(torch.int32), zeros], -1)  # [rows, units, S, 8, 2]
    return torch.cat([words, pairs.flatten(2)], -1)


def cpu_rows(qweight, qzeros, scales, lanes=LANES):
    """-> int32 [blocks, K/G, G + 5, lanes]: G rows of words, one of zeros, four of scales

    Row p of the scales has those of columns 2 p and 2 p + 1 of every word, nibbles p and p + 4.
    """
    groups, N = scales.shape
    pad = -(N // 8) % lanes
    words, zeros = (F.pad(t, (0, pad)).view(groups, -1, (N // 8 + pad) // lanes, lanes)
                    for t in (qweight, qzeros))
    pairs = F.pad(scales.flatten().view(torch.int32).view(groups, -1), (0, 4 * pad))
    pairs = pairs.view(groups, -1, lanes, 4).permute(0, 3, 1, 2)  # [K/G, 4, blocks, lanes]
    return torch.cat([words, zeros, pairs], 1).permute(2, 0, 1, 3).contiguous()


def rearrange(qweight, qzeros, scales, bits):
    """qweight for its device's kernel, which is built; itself where there is none"""
    groups, device = len(scales), qweight.device.type
    if bits == 4 and device == "cpu" and cpu_library():
        return cpu_rows(qweight, qzeros, scales)
    whole = len(qweight) // groups % 32 == 0 or groups == 1  # tiles have a scale every 32 inputs
    if bits == 4 and device == "cuda" and whole and cuda_library():
        return cuda_tiles(qweight, qzeros, scales)
    return qweight


def restore(words, K, N):
    """qweight [K, N/8] of a rearranged one, the same bits; itself if it is none"""
    if words.dim() == 2:
        return words
    if words.dim() == 4:
        return words[:, :, :-5].flatten(1, 2).transpose(0, 1).flatten(1)[:, :N // 8].contiguous()
    q = unpack(words[..., :256], 4, 2048).unflatten(-1, (2, 8, 4, 2, 2, 2, 2, 2))
    q = q.permute([TILE_AXES.index(axis) for axis in range(10)]).reshape(16 * len(words), -1)
    return pack(q[:N, :K].T)


# --- CUDA source ----------------------------------------------------------------------------------
# No torch header in it, so that nvcc alone can compile it and tests/cuda_on_cpu.h can run it.
CUDA = r"""
template <typename To, typename From> __device__ inline To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From), "the same bits under another type");
  return *reinterpret_cast<To*>(&v);
}

#ifndef CUDA_ON_CPU  // tests/cuda_on_cpu.h brings its own of these, so that a CPU can run this text
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <type_traits>

// Pointers without a type become what the kernel declares.
template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, int block, void* stream, A... arguments) {
  kernel<<<grid, block, 0, (cudaStream_t)stream>>>((P)arguments...);
}

// (v & MASK) | magic, as a pair of numbers. Left to itself, nvcc makes two instructions of it: of
// two constants only one fits into a lop3, so the other has to be in a register.
template <typename Pair, unsigned MASK> __device__ Pair and_or(unsigned v, unsigned magic) {
  unsigned result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(v), "n"(MASK), "r"(magic));
  return bits_as<Pair>(result);
}

// c[16 x 8] += a[16 x 16] b[16 x 8], the whole warp together. With g = lane / 4, t = lane % 4:
//   a[0] row g,     k 2t, 2t+1        a[2] row g,     k 2t+8, 2t+9      b0 k 2t, 2t+1,   column g
//   a[1] row g + 8, k 2t, 2t+1        a[3] row g + 8, k 2t+8, 2t+9      b1 k 2t+8, 2t+9, column g
//   c[0], c[1] row g, columns 2t, 2t+1                 c[2], c[3] row g + 8, the same columns
#define MMA(type)                                                            \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "         \
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"      \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <typename T>
__device__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  constexpr bool is_half = std::is_same<T, __half>::value;
#if __CUDA_ARCH__ >= 800
  if constexpr (is_half) MMA("f16"); else MMA("bf16");
#else  // sm_75 multiplies 8 deep, so in two steps, and no bfloat16: cuda_product sends it none
  for (int i = 0; i < 2; i++)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(i ? b1 : b0));
  if (!is_half) __trap();
#endif
}
#endif  // CUDA_ON_CPU

// Sixteen bytes as an array; streamed: read once, so not worth a place in the L1 cache.
struct alignas(16) Words { unsigned w[4]; };
__device__ inline Words load(const void* p) { return bits_as<Words>(*(const uint4*)p); }
__device__ inline Words stream(const void* p) { return bits_as<Words>(__ldcs((const uint4*)p)); }

// Column n of a row of the checkpoint's words (nibble order 0 2 4 6 1 3 5 7).
__device__ inline int nibble(const unsigned* row, int n) {
  return (row[n / 8] >> 4 * (n % 8 / 2 + 4 * (n % 2))) & 15;
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
    int N, int K, int G) {
  // 1. Which output is mine? Neighbouring threads share a packed word: one load serves eight.
  const size_t m = blockIdx.x;
  const int n = blockIdx.y * blockDim.x + threadIdx.x;
  if (n >= N) return;
  float sum = bias ? float(bias[n]) : 0.f;
  for (size_t group = 0; group < K / G; group++) {
    // 2. One scale and one zero point a group.
    const int zero = nibble(qzeros + group * (N / 8), n);
    float part = 0.f;
    for (size_t k = group * G; k < (group + 1) * G; k++)
      // 3. Nibble to integer, integer times activation: float32 throughout, because |x| * 15
      //    added up K times does not fit in a half.
      part += float(x[m * K + k]) * (nibble(qweight + k * (N / 8), n) - zero);
    sum += part * float(scales[group * N + n]);
  }
  // 4. One rounding, at the very end.
  y[m * N + n] = T(sum);
}

// Eight nibbles of a word -> the four registers of an mma A fragment, q - z in each half, exactly.
// `zeros` is such a word too: it holds z of row g and z of row g + 8, each where q would be.
template <typename T> __device__ void decode(unsigned (&a)[4], unsigned v, unsigned zeros);
constexpr unsigned ROW = 0x000f000f, ROW8 = 0x00f000f0;  // two inputs of row g, of row g + 8

// 0x6400 | q is the half 1024 + q. Row g + 8 sits four bits higher, as 1024 + 16 q: a sixteenth of
// it is 64 + q, so no shift. All steps are exact for all 256 (q, z).
template <> __device__ inline void decode<__half>(unsigned (&a)[4], unsigned v, unsigned zeros) {
  const __half2 sixteenth = __float2half2_rn(1.f / 16), minus = __float2half2_rn(-1.f / 16);
  const __half2 zero = and_or<__half2, ROW>(zeros, 0x64006400);
  const __half2 zero8 = __hmul2(and_or<__half2, ROW8>(zeros, 0x64006400), minus);
  for (int i = 0; i < 2; i++, v >>= 8) {
    const __half2 q8 = and_or<__half2, ROW8>(v, 0x64006400);
    a[2 * i] = bits_as<unsigned>(__hsub2(and_or<__half2, ROW>(v, 0x64006400), zero));
    a[2 * i + 1] = bits_as<unsigned>(__hfma2(q8, sixteenth, zero8));
  }
}

// 0x4300 | q is the bfloat16 128 + q; eight significant bits leave no room for the 16 q trick.
template <>
__device__ inline void decode<__nv_bfloat16>(unsigned (&a)[4], unsigned v, unsigned zeros) {
  for (int i = 0; i < 4; i++, v >>= 4) {
    const auto zero = and_or<__nv_bfloat162, ROW>(zeros >> i % 2 * 4, 0x43004300);
    a[i] = bits_as<unsigned>(__hsub2(and_or<__nv_bfloat162, ROW>(v, 0x43004300), zero));
  }
}

// Y^T = W_hat X^T on tensor cores: the 16 rows of A are outputs, the 8 columns of B are tokens.
// A block of 8 warps owns 16 R ROW_WARPS outputs of 8 NT tokens. The warps share out the outputs
// (ROW_WARPS) and the inputs (the rest); gridDim.y shares out the inputs further, gridDim.z the
// tokens. Every warp has 2 KB of weights under way while it computes, 1 KB if S is 4.
constexpr int WARPS = 8;

template <typename T, int NT, int R, int ROW_WARPS, int S>
__global__ void __launch_bounds__(32 * WARPS, NT * S >= 8 ? 1 : 2) fused_kernel(
    const T* x,                       // [M, 128 units], 16-byte aligned
    const Words* __restrict__ tiles,  // [row tiles, units, 64 + 4 S], see cuda_tiles()
    const T* __restrict__ bias,       // [N] or null
    T* __restrict__ y,                // [M, N]
    float* __restrict__ partial,      // [gridDim.y, M, N] if gridDim.y > 1
    int M, int N, int units) {
  constexpr int ROWS = 16 * R * ROW_WARPS, TOKENS = 8 * NT, K_WARPS = WARPS / ROW_WARPS;
  constexpr int TILE = 64 + 4 * S, DEPTH = R * S == 1 ? 3 : 2;  // units under way, mine included
  constexpr int AHEAD = NT == 1 ? 4 : NT <= 4 ? 2 : 1;  // slices of X loaded at once
  constexpr int CHAINS = R * NT == 1 ? 2 : 1;           // sums that need not wait for each other
  struct Unit { Words words[R][2]; uint2 pairs[R][S]; };
  __shared__ float sums[K_WARPS][TOKENS][ROWS + 4];  // + 4: phase 4 then stores to 32 banks

  // 1. Which outputs, tokens and inputs are mine? A token that is not there repeats the last one.
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int row_warp = threadIdx.x / 32 % ROW_WARPS, k_warp = threadIdx.x / 32 / ROW_WARPS;
  const int first = blockIdx.y * K_WARPS + k_warp, step = gridDim.y * K_WARPS;
  const int mine = (units - first + step - 1) / step;  // units first, first + step, ..
  const size_t row0 = 16 * R * (blockIdx.x * ROW_WARPS + row_warp);
  const Words* tile[R];
  const T* inputs[NT];
  for (int r = 0; r < R; r++)
    tile[r] = tiles + ((row0 / 16 + r) * units + first) * TILE;
  for (int n = 0; n < NT; n++) {
    const size_t token = min((int)blockIdx.z * TOKENS + 8 * n + g, M - 1);
    inputs[n] = x + (token * units + first) * 128 + 8 * t;
  }
  float acc[R][NT][4] = {};

  auto fetch = [&](Unit& unit) {
    for (int r = 0; r < R; r++) {
      for (int i = 0; i < 2; i++) unit.words[r][i] = stream(tile[r] + 32 * i + lane);
      for (int s = 0; s < S; s++) unit.pairs[r][s] = ((const uint2*)(tile[r] + 64))[8 * s + g];
      tile[r] += step * TILE;
    }
  };

  auto multiply = [&](const Unit& unit) {
    Words b[AHEAD][NT];
    for (int s = 0; s < S; s++) {
      float part[CHAINS][R][NT][4] = {};
      for (int slice = 4 / S * s; slice < 4 / S * (s + 1); slice++) {
        // 2. Activations: eight neighbouring inputs of token g are B of two mma steps.
        if (slice % AHEAD == 0) {
          __syncwarp();  // else the compiler loads all slices at once, and registers run out
          for (int i = 0; i < AHEAD * NT; i++)
            b[i / NT][i % NT] = load(inputs[i % NT] + 32 * (slice + i / NT));
        }
        for (int r = 0; r < R; r++) {
          // 3. part[16 outputs, 8 tokens] += (q - z)[16, 16] x[16, 8]; every product is exact.
          for (int i = 0; i < 2; i++) {
            unsigned a[4];
            decode<T>(a, unit.words[r][slice / 2].w[slice % 2 * 2 + i], unit.pairs[r][s].y);
            for (int n = 0; n < NT; n++) {
              const unsigned(&x8)[4] = b[slice % AHEAD][n].w;
              mma<T>(part[i % CHAINS][r][n], a, x8[2 * i], x8[2 * i + 1]);
            }
          }
        }
      }
      // The scale, once a group and in float32: it never rounds a weight.
      for (int i = 0; i < CHAINS * R * NT * 4; i++) {
        const int c = i % 4, n = i / 4 % NT, r = i / 4 / NT % R;
        const __half2 scale = bits_as<__half2>(unit.pairs[r][s].x);
        acc[r][n][c] += float(c / 2 ? scale.y : scale.x) * part[i / 4 / NT / R][r][n][c];
      }
    }
    for (int n = 0; n < NT; n++) inputs[n] += 128 * step;
  };

  // The next units travel while this one is used: asked for before this one is waited for. (nvcc
  // unrolls the other loops by itself; were one left, arrays would go to memory and a test fail.)
  Unit unit[DEPTH];
  for (int d = 0; d < DEPTH - 1; d++)
    if (d < mine) fetch(unit[d]);
  for (int i = 0; i < mine; i += DEPTH) {
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      if (i + d >= mine) break;
      if (i + d + DEPTH - 1 < mine) fetch(unit[(d + DEPTH - 1) % DEPTH]);
      multiply(unit[d]);
    }
  }

  // 4. Add up what the warps along k have, in the order of the warps: the same bits every time.
  for (int i = 0; i < R * NT * 4; i++) {
    const int c = i % 4, n = i / 4 % NT, r = i / 4 / NT;
    sums[k_warp][8 * n + 2 * t + c % 2][16 * (row_warp * R + r) + g + c / 2 * 8] = acc[r][n][c];
  }
  __syncthreads();  // below, a thread reads what other warps wrote to sums
  for (int o = threadIdx.x; o < TOKENS * ROWS; o += 32 * WARPS) {
    const size_t token = blockIdx.z * TOKENS + o / ROWS, row = blockIdx.x * ROWS + o % ROWS;
    if (token >= M || row >= N) continue;
    float sum = 0.f;
    for (int w = 0; w < K_WARPS; w++) sum += sums[w][o / ROWS][o % ROWS];
    if (gridDim.y > 1)
      partial[(blockIdx.y * (size_t)M + token) * N + row] = sum;
    else
      y[token * N + row] = T(sum + (bias ? float(bias[row]) : 0.f));
  }
}

// y = bias + the sums of the blocks that shared out the inputs, block 0 first. A kernel of its own:
// no counter of arrived blocks that a graph, a stream or an aborted launch could leave wrong.
template <typename T>
__global__ void add_kernel(const float* __restrict__ partial,  // [splits, M, N]
                           const T* __restrict__ bias,         // [N] or null
                           T* __restrict__ y,                  // [M, N]
                           size_t size, int N, int splits) {
  const size_t o = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
  if (o >= size) return;
  float sum = 0.f;
  for (int s = 0; s < splits; s++) sum += partial[s * size + o];
  y[o] = T(sum + (bias ? float(bias[o % N]) : 0.f));
}

// For many tokens: W_hat in T, which cuBLAS multiplies. One block, one tile; one thread, one load
// of 16 bytes: two rows of eight inputs in each of two slices.
template <typename T>
__global__ void dequantize_kernel(const Words* __restrict__ tiles,  // [row tiles, units, 64 + 4 S]
                                  T* __restrict__ W_hat,            // [16 row tiles, 128 units]
                                  int units, int S) {
  const Words* tile = tiles + blockIdx.x * (size_t)(64 + 4 * S);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Words packed = stream(tile + threadIdx.x);
  for (int j = 0; j < 2; j++) {
    const int slice = threadIdx.x / 32 * 2 + j;
    const uint2 pair = ((const uint2*)(tile + 64))[slice * S / 4 * 8 + g];
    const __half2 scale = bits_as<__half2>(pair.x);
    unsigned a[2][4];  // [mma step][row g, g + 8, g, g + 8]
    for (int i = 0; i < 2; i++) decode<__half>(a[i], packed.w[2 * j + i], pair.y);
    for (int h = 0; h < 2; h++) {
      struct alignas(16) { T v[8]; } out;
      for (int i = 0; i < 8; i++) {
        const __half2 q = bits_as<__half2>(a[i / 4][i / 2 % 2 * 2 + h]);
        out.v[i] = T(float(i % 2 ? q.y : q.x) * float(h ? scale.y : scale.x));
      }
      const size_t row = blockIdx.x / units * 16 + 8 * h + g;
      const int k = blockIdx.x % units * 128 + 32 * slice + 8 * t;
      *(decltype(out)*)(W_hat + row * 128 * units + k) = out;
    }
  }
}

// Host side: `type` is that of x and y, its index in DTYPES. Each returns CUDA's error, 0 if none.
extern "C" int awq_teaching(int type, void* x, void* qweight, void* qzeros, void* scales,
                            void* bias, void* y, int M, int N, int K, int G, void* stream) {
  auto start = [=](auto kernel) {
    launch(kernel, dim3(M, (N + 127) / 128), 128, stream, x, qweight, qzeros, scales, bias, y, N, K,
           G);
  };
  type == 1 ? start(teaching_kernel<__half>) : start(teaching_kernel<__nv_bfloat16>);
  return cudaGetLastError();
}

extern "C" int awq_fused(int type, int S, void* x, void* tiles, void* bias, void* y, void* partial,
                         int M, int N, int units, int processors, void* stream) {
  auto start = [=](auto kernel, auto add, int rows, int tokens) {  // those of a block
    dim3 grid((N + rows - 1) / rows, 1, (M + tokens - 1) / tokens);
    // Fewer blocks than SMs: share out K too, while there is a unit for each of a block's warps.
    grid.y = max(1, min(processors / int(grid.x * grid.z), units / WARPS));
    launch(kernel, grid, 32 * WARPS, stream, x, tiles, bias, y, partial, M, N, units);
    const size_t size = (size_t)M * N;
    if (grid.y > 1) launch(add, (size + 255) / 256, 256, stream, partial, bias, y, size, N, grid.y);
  };
  // More outputs a block read X less often, fewer fill more SMs; S = 4 has no registers for R = 2.
  auto choose = [=](auto zero, auto one_scale) {
    using T = decltype(zero);
    constexpr int S = one_scale() ? 1 : 4, R = one_scale() ? 2 : 1;
    M <= 4    ? start(fused_kernel<T, 1, 1, 1, S>, add_kernel<T>, 16, 8)
    : M <= 8  ? start(fused_kernel<T, 1, R, 2 / R, S>, add_kernel<T>, 32, 8)
    : M <= 16 ? start(fused_kernel<T, 2, R, 4 / R, S>, add_kernel<T>, 64, 16)
    : M <= 32 ? start(fused_kernel<T, 4, 1, 4, S>, add_kernel<T>, 64, 32)
              : start(fused_kernel<T, 4 * R, 1, 4, S>, add_kernel<T>, 64, 32 * R);
  };
  const std::true_type one;
  const std::false_type four;
  if (S == 1) type == 1 ? choose(__half(), one) : choose(__nv_bfloat16(), one);
  else type == 1 ? choose(__half(), four) : choose(__nv_bfloat16(), four);
  return cudaGetLastError();
}

extern "C" int awq_dequantize(int type, int S, void* tiles, void* W_hat, int rows, int units,
                              void* stream) {
  auto start = [=](auto kernel) {
    launch(kernel, rows * units, 64, stream, tiles, W_hat, units, S);
  };
  type == 0   ? start(dequantize_kernel<float>)
  : type == 1 ? start(dequantize_kernel<__half>)
              : start(dequantize_kernel<__nv_bfloat16>);
  return cudaGetLastError();
}
"""


# --- C++ for the CPU ------------------------------------------------------------------------------
# gcc and clang turn arithmetic on `Words` and `Floats` into the CPU's vector instructions.
CPU = r"""
#include <cstdint>
#include <memory>
#include <vector>
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));
constexpr int TOGETHER = LANES == 16 ? 6 : 3;  // tokens whose 4 sums fit into the registers

// float16 in the low halves -> float: sign, exponent and fraction to their places, then the
// exponent's bias from 15 to 127.
static inline Floats from_halves(Words h) {
  return (Floats)((h & 0x8000) << 16 | (h & 0x7fff) << 13) * 0x1p112f;
}

// 16^i times nibble i < 4: it stays where it is in its word, and a power of two rounds nothing.
static inline Floats decode(Words half, int i) {
  return __builtin_convertvector((Integers)(half & 15u << 4 * i), Floats);
}

// sum[n] += scale (x q - z total), n = first + i and i < NIBBLES, for TOKENS tokens and one group
template <int TOKENS, int NIBBLES>
static void add_group(const float* x,           // [TOKENS, K], at the group
                      const float* totals,      // [TOKENS, K/G], the sum of x over the group
                      const Words* rows,        // [G + 5], see cpu_rows()
                      const Floats (*tile)[4],  // [G] rows decoded, if NIBBLES is 4
                      Floats (*sum)[8], int first, long K, long G) {
  Floats dot[TOKENS][NIBBLES] = {};
  for (long k = 0; k < G; k++) {
    if (NIBBLES == 8) __builtin_prefetch(rows + k + 64);  // 2 KB ahead, or 4
#pragma GCC unroll 8
    for (int i = 0; i < NIBBLES; i++) {
      const Floats q = NIBBLES == 4 ? tile[k][i] : decode(rows[k] >> i / 4 * 16, i % 4);
#pragma GCC unroll 6
      for (int t = 0; t < TOKENS; t++) dot[t][i] += q * x[t * K + k];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < NIBBLES; i++) {
    const int n = first + i;
    const Floats scale = from_halves(rows[G + 1 + n % 4] >> n / 4 * 16 & 0xffff);
    const Floats zero = decode(rows[G] >> n / 4 * 16, n % 4);
    for (int t = 0; t < TOKENS; t++)
      sum[t][n] += scale * (1.f / (1 << n % 4 * 4)) * (dot[t][i] - zero * totals[t * (K / G)]);
  }
}

constexpr decltype(&add_group<3, 4>) SHARING[] = {add_group<3, 4>, add_group<4, 4>,
                                                  add_group<5, 4>, add_group<6, 4>};

extern "C" void awq_cpu(const float* x,         // [M, K]
                        const uint32_t* words,  // [ceil(N/8/LANES), K/G, G + 5, LANES]
                        float* y,               // [M, N]
                        int M, int N, int K, int G, int threads) {
  const long blocks = (N / 8 + LANES - 1) / LANES;
  std::vector<float> totals(M * (K / G));
  for (long group = 0; group < M * (K / G); group++) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (long k = group * G; k < (group + 1) * G; k++) total += x[k];
    totals[group] = total;
  }
#pragma omp parallel for num_threads(threads)
  for (long b = 0; b < blocks; b++) {
    const std::unique_ptr<Floats[][8]> sum(new Floats[M][8]());
    const std::unique_ptr<Floats[][4]> tile(new Floats[G][4]);
    const long shared = M % TOGETHER < 3 ? M - M % TOGETHER : M;
    for (long group = 0; group < K / G; group++) {
      const Words* rows = (const Words*)words + (b * (K / G) + group) * (G + 5);
      const float *X = x + group * G, *total = &totals[group];
      // Tokens share what is decoded, half of each word at a time: 128 rows fit the fastest cache.
      for (int first = 0; first < 8 && shared; first += 4) {
        for (long k = 0; k < G; k++)
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++) tile[k][i] = decode(rows[k] >> 4 * first, i);
        for (long m = 0, step; m < shared; m += step) {
          step = shared - m < TOGETHER ? shared - m : TOGETHER;
          SHARING[step - 3](X + m * K, total + m * (K / G), rows, &tile[0], &sum[m], first, K, G);
        }
      }
      for (long m = shared; m < M; m++)  // one or two are faster alone
        add_group<1, 8>(X + m * K, total + m * (K / G), rows, nullptr, &sum[m], 0, K, G);
    }
    const long first = 8 * LANES * b, columns = N - first < 8 * LANES ? N - first : 8 * LANES;
    for (long m = 0; m < M; m++)
      for (long n = 0; n < columns; n++)
        y[m * N + first + n] = sum[m][n % 8 / 2 + n % 2 * 4][n / 8];
  }
}
"""


# --- both sources built and called ----------------------------------------------------------------
# Against torch's flags, which forbid the float(v) and T(v) of 16-bit numbers in the text above.
CUDA_FLAGS = ["-O3", "-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__"]


@functools.cache
def cuda_library():
    """The CUDA source, built for the GPUs there are, kept on disk; None, with a warning"""
    from torch.utils import cpp_extension  # slow to import, and only needed here
    try:
        return ctypes.CDLL(cpp_extension.load_inline(
            "awq_cuda", "", CUDA, extra_cuda_cflags=CUDA_FLAGS, is_python_module=False,
            no_implicit_headers=True))
    except (OSError, RuntimeError, ImportError) as reason:
        return no_library("CUDA", reason)


@functools.cache
def cpu_library():
    """The C++ source, compiled on first use and kept on disk; None, with a warning"""
    flags = {"AVX2": ["-mavx2", "-mfma"], "AVX512": ["-mavx512f", "-mfma"]}.get(SIMD, [])
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC",
               f"-DLANES={LANES}", *flags, "-x", "c++", "-"]
    name = hashlib.sha256(repr((command, platform.platform(), CPU)).encode()).hexdigest()[:16]
    root = os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")
    path = Path(root).expanduser() / f"awq_cpu_{name}.so"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            built = path.with_suffix(f".{os.getpid()}")
            subprocess.run([*command, "-o", built], input=CPU, text=True, check=True,
                           capture_output=True)
            built.replace(path)  # in one step: another process sees all of it or nothing
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as reason:
        return no_library("CPU", f"{reason} {getattr(reason, 'stderr', '')}")


def no_library(device, reason):
    """None, with a warning"""
    warnings.warn(f"AWQ's {device} kernel cannot be built, so a product dequantizes the weight and "
                  f"multiplies: {reason}")


def pointer(tensor, device):
    """A tensor's address for a library, which reads it as contiguous and on the device"""
    assert tensor.device == device and tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def launch(name, x, *arguments):
    """Call a host function of CUDA for x's dtype, on its device and the current stream there"""
    arguments = [pointer(a, x.device) if isinstance(a, Tensor) else a for a in arguments]
    with torch.cuda.device(x.device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = getattr(cuda_library(), name)(DTYPES.index(x.dtype), *arguments, stream)
    if error:
        raise RuntimeError(f"{name}: CUDA error {error}")


def teaching(x, qweight, qzeros, scales, bias=None):
    """The teaching kernel on the checkpoint's tensors: x [M, K] float16 or bfloat16 -> [M, N]"""
    (M, K), (groups, N) = x.shape, scales.shape
    y, x = x.new_empty(M, N), x.contiguous()
    launch("awq_teaching", x, x, qweight, qzeros, scales, bias, y, M, N, K, K // groups)
    return y


def cuda_product(x, words, bias, N, fused_max=FUSED_MAX_TOKENS):
    """The fast kernels: x [M, K], words of cuda_tiles -> [M, N]"""
    M, (rows, units, width) = len(x), words.shape
    gpu, S = torch.cuda.get_device_properties(x.device), (width - 256) // 16
    pad = 128 * units - x.shape[1]
    assert words.dtype == torch.int32 and words.data_ptr() % 16 == 0
    assert rows == -(-N // 64) * 4 and 0 <= pad < 128
    x = F.pad(x, (0, pad)) if pad else x.contiguous()  # F.pad by nothing would copy
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    if M > fused_max or x.dtype == torch.float32 or x.dtype == torch.bfloat16 and gpu.major < 8:
        W_hat = x.new_empty(16 * rows, 128 * units)
        launch("awq_dequantize", x, S, words, W_hat, rows, units)
        return F.linear(x, W_hat[:N], bias)
    x = x.clone() if x.data_ptr() % 16 else x  # a view at an address unfit for 16-byte loads
    y, processors = x.new_empty(M, N), gpu.multi_processor_count
    partial = x.new_empty(processors, 64 * 64, dtype=torch.float32)  # a block an SM, 4096 sums each
    launch("awq_fused", x, S, x, words, bias, y, partial, M, N, units, processors)
    return y


def cpu_product(x, words, bias, N):
    """The C++ kernel, in float32, rounded once: x [M, K], words of cpu_rows -> [M, N]"""
    (M, K), (blocks, groups, rows, lanes) = x.shape, words.shape
    assert words.is_cpu and words.dtype == torch.int32 and lanes == LANES
    assert blocks == -(-N // 8 // lanes) and K == groups * (rows - 5)
    x32 = x.float().contiguous()
    y = x32.new_empty(M, N)
    cpu_library().awq_cpu(*[pointer(t, words.device) for t in (x32, words, y)], M, N, K,
                          K // groups, torch.get_num_threads())
    return (y if bias is None else y.add_(bias)).to(x.dtype)


# --- the operator ---------------------------------------------------------------------------------
def product(x: Tensor, words: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None,
            bits: int) -> Tensor:
    """x [M, K] -> [M, N]; words: the checkpoint's qweight [K, N/8], or what rearrange made of it"""
    N = scales.shape[1]
    if len(x) == 0:
        return x.new_empty(0, N)
    if words.dim() == 2:  # a graph compiled before prepare(), or there is no kernel
        words = rearrange(words, qzeros, scales, bits)
    if words.dim() == 2:
        return reference(x, words, qzeros, scales, bias, bits)
    return (cuda_product if words.dim() == 3 else cpu_product)(x, words, bias, N)


# Opaque to torch.compile: no graph break. It has no gradient; torch says so where one is asked.
product_op = torch.library.custom_op("awq::product", product, mutates_args=())
product_op.register_fake(lambda x, words, qzeros, scales, *_: x.new_empty(x.shape[0],
                                                                          scales.shape[1]))


# --- the layer ------------------------------------------------------------------------------------
PREPARING = threading.Lock()


def check_packed(qweight, qzeros, scales, bias, bits):
    """The packed tensors belong together, else a ValueError with name, value and rule"""
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"bits is {bits!r}: it must be 2, 3, 4 or 8")
    (K, *_), (groups, N) = qweight.shape, scales.shape
    if groups == 0 or K == 0 or K % groups or bits == 4 and N % 8:
        raise ValueError(f"scales is {[groups, N]} for K = {K}: it must be [K/G, N], with G a "
                         "divisor of K and, at 4 bits, N a multiple of 8")
    width = packed_width(N, bits)
    for name, tensor, dtypes, shape in (("qweight", qweight, (torch.int32,), (K, width)),
                                        ("qzeros", qzeros, (torch.int32,), (groups, width)),
                                        ("scales", scales, (torch.float16,), (groups, N)),
                                        ("bias", bias, (*DTYPES, torch.float64), (N,))):
        if tensor is not None and (tensor.dtype not in dtypes or tensor.shape != shape
                                   or tensor.device != scales.device):
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}: "
                             f"it must be {dtypes[0]} {list(shape)} on {scales.device}")


class AWQLinear(nn.Module):
    """nn.Linear with packed weights, its buffers named and laid out as in the checkpoint.

    Tensors as above (2, 3, 8 bits: packed_width(N, bits) words a row), bias [N] or None; forward
    takes [..., K] float32, float16 or bfloat16. Two states: qweight as in the checkpoint or, once
    prepared, rearranged for the device's kernel (of 3 or 4 dimensions). state_dict holds the
    checkpoint's in both.
    """

    def __init__(self, qweight, qzeros, scales, bias=None, bits=4):
        super().__init__()
        check_packed(qweight, qzeros, scales, bias, bits)
        self.in_features, self.out_features, self.bits = len(qweight), scales.shape[1], bits
        self.group_size = len(qweight) // len(scales)
        for name, tensor in (("qweight", qweight), ("qzeros", qzeros), ("scales", scales),
                             ("bias", bias)):
            self.register_buffer(name, None if tensor is None else tensor.detach())

    def forward(self, input):
        x = input  # nn.Linear's name for it, by which it may be called
        if x.dtype not in DTYPES or x.shape[-1:] != (self.in_features,) or (
                x.device != self.scales.device):
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)} on {x.device}: it must be float32, float16 or "
                f"bfloat16 [.., {self.in_features}] on {self.scales.device}")
        compiling = torch.compiler.is_compiling()
        if not compiling:  # a graph takes the words as they are
            self.prepare()
        # An operator's dispatch costs a decoded token as much as a small matrix does.
        plain = not (compiling or x.requires_grad or x.is_meta) and type(x) is Tensor
        y = (product if plain else product_op)(x.reshape(-1, self.in_features), self.qweight,
                                               self.qzeros, self.scales, self.bias, self.bits)
        return y.view(*x.shape[:-1], self.out_features)

    def prepare(self):
        """Rearrange the words for the device's kernel, which is built; once, and where there is one

        Call it, or the layer once, before torch.compile or capturing a CUDA graph: else that
        rearranges them at every call.
        """
        with PREPARING:  # of two threads that call a new layer at once, one does it
            if self.qweight.dim() == 2:
                check_packed(self.qweight, self.qzeros, self.scales, self.bias, self.bits)
                self.qweight = rearrange(self.qweight, self.qzeros, self.scales, self.bits)

    def checkpoint_qweight(self):
        """qweight as the checkpoint has it, bit for bit, in either state"""
        return restore(self.qweight, self.in_features, self.out_features)

    @property
    def weight(self):
        """W_hat [N, K] float32 anew at every access, for code that expects a Linear to have it"""
        return dequantize(self.checkpoint_qweight(), self.qzeros, self.scales, self.bits)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "qweight"] = self.checkpoint_qweight()

    def _load_from_state_dict(self, *arguments):
        self.qweight = self.checkpoint_qweight()
        super()._load_from_state_dict(*arguments)

    def _apply(self, function, recurse=True):
        """Moves with the module; .to(dtype) sees the scales as integers, so they stay exact"""
        self.qweight, self.scales = self.checkpoint_qweight(), self.scales.view(torch.int16)
        try:
            return super()._apply(function, recurse)
        finally:
            self.scales = self.scales.view(torch.float16)

    def __setstate__(self, state):
        """A copy or a pickle was made in either state, perhaps for another kind of CPU"""
        super().__setstate__(state)
        self.qweight = self.checkpoint_qweight()

    def extra_repr(self):
        return (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"bias={self.bias is not None}, bits={self.bits}, group_size={self.group_size}")


# --- check and benchmark: python kernel.py [--check] [--cpu] [--json FILE] ------------------------
CHECK_SHAPES = ((64, 512, 32), (72, 448, 64), (40, 200, 200), (24, 72, 8), (1024, 2048, 128))
SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096), (4096, 14336), (8192, 8192), (8192, 28672))
# ||y - exact|| / ||exact|| allowed: y's own rounding, and that of the weights where there is one
ERROR_LIMIT = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def random_weight(N, K, G, device):
    """qweight and qzeros of random bits, scales that give outputs of a usual size"""
    words = [torch.randint(-2**31, 2**31, shape, dtype=torch.int32, device=device)
             for shape in ((K, N // 8), (K // G, N // 8))]
    scales = torch.empty(K // G, N, dtype=torch.float32, device=device).uniform_(1e-3, 5e-3)
    return (*words, scales.half())


def relative_error(y, x, packed):
    """||y - exact|| / ||exact||, exact = x W_hat^T in float64"""
    exact = x.double() @ dequantize(*packed).double().T
    return ((y.double() - exact).norm() / exact.norm()).item()


def paths(x, packed, layer):
    """{name: function} of every way to the product of x that its device has"""
    layer.prepare()
    found = {"layer": lambda: layer(x), "reference": lambda: reference(x, *packed)}
    if x.is_cuda and layer.qweight.dim() == 3 and x.dtype != torch.float32:
        N = layer.out_features
        found |= {"fused": lambda: cuda_product(x, layer.qweight, None, N, 2**31),
                  "dequantize": lambda: cuda_product(x, layer.qweight, None, N, 0),
                  "teaching": lambda: teaching(x, *packed)}
    return found


def check(device):
    """Every path, dtype and kind of shape against float64: (number of cases, failures)"""
    cases, failures = 0, []
    for (N, K, G), dtype in itertools.product(CHECK_SHAPES, ERROR_LIMIT):
        packed = random_weight(N, K, G, device)
        for M in (1, 7, 8, 9, 16, 17, 65, 200):
            x = torch.randn(M, K, dtype=dtype, device=device)
            for name, path in paths(x, packed, AWQLinear(*packed)).items():
                error = relative_error(path(), x, packed)
                cases += 1
                if not error <= ERROR_LIMIT[dtype]:  # so written that NaN fails too
                    failures.append(f"{name} {dtype} M={M} N={N} K={K} G={G}: {error:.1e}")
    return cases, failures


def timed(calls, device, repeats=50):
    """{name: functions} -> {name: median microseconds of one}, in turn: all meet the same machine

    On a GPU each name is a CUDA graph of 20 calls.
    """
    times, run, inner = {name: [] for name in calls}, {}, 20 if device.type == "cuda" else 1
    for name, functions in calls.items():
        functions[0]()  # builds and warms up
        if device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for function in itertools.islice(itertools.cycle(functions), inner):
                    function()
            functions = [lambda g=graph: (g.replay(), torch.cuda.synchronize())]
        run[name] = itertools.cycle(functions)
    for _, name in itertools.product(range(repeats), calls):
        function, start = next(run[name]), time.perf_counter()
        function()
        times[name].append((time.perf_counter() - start) * 1e6 / inner)
    return {name: statistics.median(t) for name, t in times.items()}


def tinygemm(qweight, qzeros, scales, G=128):
    """torch's own int4 product of the same weight, (q - 8) * scale + shift, as x -> y; bfloat16"""
    q, scale = unpack(qweight, 4, scales.shape[1]).T, scales.bfloat16()
    shift = (8 - unpack(qzeros, 4, len(q)).float()) * scale.float()
    pairs = torch.stack([scale, shift.bfloat16()], -1).contiguous()
    if not q.is_cuda:
        words = torch._convert_weight_to_int4pack_for_cpu(q.int().contiguous(), 1)
        return lambda x: torch._weight_int4pack_mm_for_cpu(x, words, G, pairs)
    words = torch._convert_weight_to_int4pack((q[:, 0::2] << 4 | q[:, 1::2]).contiguous(), 8)
    return lambda x: torch._weight_int4pack_mm(x, words, G, pairs)


def benchmark_shape(K, N, tokens, device):
    """Rows {K x N, M, microseconds of every method on cold weights (medians), TB/s of layer}"""
    size = N * K // 2 + K // 128 * (2 * N + N // 2)  # bytes of words, scales and zeros
    cache = 2**26 if device.type == "cpu" else torch.cuda.get_device_properties(0).L2_cache_size
    weights = [random_weight(N, K, 128, device) for _ in range(1 + max(1, 2 * cache // size))]
    made = [(dequantize(*w, dtype=torch.bfloat16), tinygemm(*w), AWQLinear(*w)) for w in weights]
    rows = []
    for M in tokens:
        x = torch.randn(M, K, dtype=torch.bfloat16, device=device)  # all that tinygemm has
        ways = [{"dense": functools.partial(F.linear, x, W_hat),
                 "tinygemm": functools.partial(peer, x), **paths(x, weight, layer)}
                for weight, (W_hat, peer, layer) in zip(weights, made)]
        error = relative_error(ways[0]["layer"](), x, weights[0])
        assert error <= ERROR_LIMIT[x.dtype], f"wrong results are not timed: {error}"
        us = timed({name: [way[name] for way in ways] for name in ways[0]
                    if name not in ("reference", "teaching")}, device)  # both far slower
        rows.append({"K x N": f"{K} x {N}", "M": M, **us, "TB/s": size / us["layer"] / 1e6})
    return rows


def decoder(model):
    """A function that decodes one token, batch 1; it never waits: a CUDA graph can hold it"""
    from transformers import StaticCache
    positions = 1024 if model.device.type == "cuda" else 32  # attention reads all, filled or not
    cache = StaticCache(config=model.config, max_cache_len=positions)
    token, position = (torch.ones(1, 1, dtype=torch.long, device=model.device) for _ in range(2))

    def step():
        logits = model(token, position_ids=position, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1:].argmax(-1))
        position.add_(1)

    return step


@torch.no_grad()
def benchmark_model(device, dtype, prefill=512, **config):
    """Rows of tokens a second of a LLaMA, dense and packed in turn, batch 1; all weights random"""
    from transformers import LlamaConfig, LlamaForCausalLM
    with torch.device(device):
        dense = LlamaForCausalLM(LlamaConfig(**config)).to(dtype).eval()
    packed = copy.deepcopy(dense)
    for path, linear in list(packed.model.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            weight = random_weight(linear.out_features, linear.in_features, 128, device)
            packed.model.layers.set_submodule(path, AWQLinear(*weight))
    models, text = {"dense": dense, "packed": packed}, torch.ones(1, prefill, device=device).long()
    rows = []
    for task, tokens, repeats, function in (
            ("decode", 1, 24, decoder),
            (f"prefill {prefill}", prefill, 3, lambda model: lambda: model(text, use_cache=False))):
        us = timed({name: [function(model)] for name, model in models.items()}, device, repeats)
        rows.append({"tokens/s": f"{task}, {str(dtype).removeprefix('torch.')}",
                     **{name: 1e6 * tokens / us[name] for name in models},
                     "ratio": us["dense"] / us["packed"]})
    return rows


def benchmarks(device):
    """Yield (name, rows) as they are measured; on a CPU that takes minutes"""
    if device.type == "cuda":
        halves = torch.empty(2, 2**29, dtype=torch.uint8, device=device)
        us = timed({"copy": [lambda: halves[0].copy_(halves[1])]}, device)["copy"]
        print(f"Copying: {2**30 / us / 1e6:.2f} TB/s. The model is shaped like LLaMA-7B.\n")
        for K, N in SHAPES:
            yield "shapes", benchmark_shape(K, N, (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024), device)
        yield "model", benchmark_model(device, torch.float16)  # transformers' default
        return
    print("The model has 456 M parameters. On a CPU without bfloat16 instructions (AVX2), torch's\n"
          "own bfloat16 products are slow, so that a ratio to them flatters.\n")
    yield "shapes", benchmark_shape(4096, 4096, (1, 4, 16, 64), device)
    for dtype in (torch.bfloat16, torch.float32):
        yield "model", benchmark_model(device, dtype, vocab_size=1024, hidden_size=1536,
                                       intermediate_size=4096, num_hidden_layers=16,
                                       num_attention_heads=16)


def main():
    parser = argparse.ArgumentParser(description="check and time the INT4 product")
    parser.add_argument("--check", action="store_true", help="only verify the results")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, even if there is a GPU")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures to FILE")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{SIMD} CPU"
    setup = (f"{time.strftime('%Y-%m-%d')}, {name}, {torch.get_num_threads()} threads, "
             f"torch {torch.__version__}, CUDA {torch.version.cuda}")
    cases, failures = check(device)
    report = {"setup": setup, "cases": cases, "failures": failures}
    print(f"{setup}\n\nchecked {cases} cases against float64 on {device}: {len(failures)} failed",
          *failures, sep="\n  ", end="\n\n")
    idle = device.type == "cpu" and not options.cpu
    if idle:
        print("No GPU here: the CPU path was checked and nothing timed (--cpu times the CPU).")
    for name, rows in benchmarks(device) if not (idle or failures or options.check) else ():
        cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()]
                 for row in rows]
        for line in (list(rows[0]), ["---"] * len(rows[0]), *cells):
            print("|", " | ".join(line), "|")
        print(flush=True)
        report[name] = report.get(name, []) + rows
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return bool(failures)


if __name__ == "__main__":
    raise SystemExit(main())
