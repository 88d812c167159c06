// Runs the CUDA text of kernel.py on a CPU, so that its arithmetic is tested where no GPU is.
//
//     g++ -std=c++17 -include tests/cuda_on_cpu.h -fsanitize=kernel-address ... (see cpu_build)
//
// Every CUDA thread is a fibre (ucontext): it runs until it needs other threads, at
// __syncthreads() or mma(), and a scheduler picks the next one in an order drawn from a seed, as it
// does the blocks. A race or a hang is then a wrong number under some seed, or a message of fail().
//
// All tensors lie in one arena, with gaps. The compiler's address sanitizer calls the functions
// below before every load and store, and they fail() on one that is not inside a tensor, is not
// aligned to its size (a GPU traps there), or stores to an input.
//
// Not here: timing, memory ordering finer than barriers and kernel boundaries, bank conflicts.
#pragma once
#define CUDA_ON_CPU
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time, so one copy will do
inline int mutation = 0;  // which of the errors that a test has written into the text to make
extern "C" void cpu_mutate(int number) { mutation = number; }

using std::max, std::min;
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

// --- fibres ------------------------------------------------------------------------------------
namespace cpu {
enum State { READY, AT_BARRIER, AT_MMA, DONE };

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  State state;
  dim3 index;
  unsigned a[4], b[2];
  static constexpr size_t STACK = 128 << 10;
};

inline std::vector<std::unique_ptr<Fibre>> fibres;
inline Fibre* self;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::mt19937 rng;
inline std::string error;

struct Range { size_t begin, end; bool writable; };
inline Range arena, tensors[16];  // no vector: its functions would themselves be checked
inline int tensor_count;

inline void fail(const char* message) {
  if (error.empty()) error = message;
}

#define UNCHECKED __attribute__((no_sanitize("kernel-address")))
UNCHECKED inline void check_access(size_t address, size_t size, bool store) {
  if (address + size <= arena.begin || address >= arena.end) return;  // stack, shared memory
  if (size <= 16 && address % size) return fail("an access that is not aligned to its size");
  for (int i = 0; i < tensor_count; i++)
    if (address >= tensors[i].begin && address + size <= tensors[i].end)
      return store && !tensors[i].writable ? fail("store to an input") : void();
  fail(store ? "store outside the tensors" : "load outside the tensors");
}

inline void wait(State state) {
  Fibre* me = self;
  me->state = state;
  swapcontext(&me->context, &scheduler);
  threadIdx = me->index;
}

inline void entry() {
  body();
  wait(DONE);
}

// Threads that all wait for the same thing may go on; returns whether any did.
inline bool release(size_t begin, size_t end, State state) {
  for (size_t i = begin; i < end; i++)
    if (fibres[i]->state != state) return false;
  for (size_t i = begin; i < end; i++) fibres[i]->state = READY;
  return true;
}

inline void run_block(size_t threads) {
  std::vector<size_t> order(threads);
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = 0; i < threads; i++) {
    if (fibres.size() <= i) fibres.push_back(std::make_unique<Fibre>());
    Fibre& f = *fibres[i];
    f.index = dim3(i % blockDim.x, i / blockDim.x);
    f.state = READY;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = Fibre::STACK;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
  }
  for (bool progress = true; progress;) {
    progress = false;
    std::shuffle(order.begin(), order.end(), rng);
    for (size_t i : order) {
      if (fibres[i]->state != READY) continue;
      self = fibres[i].get();
      threadIdx = self->index;
      swapcontext(&scheduler, &self->context);
      progress = true;
    }
    for (size_t warp = 0; warp < threads; warp += 32)
      if (release(warp, std::min(warp + 32, threads), AT_MMA)) progress = true;
    if (release(0, threads, AT_BARRIER)) progress = true;
  }
  for (size_t i = 0; i < threads; i++) {
    if (fibres[i]->state == AT_BARRIER) fail("__syncthreads() not reached by every thread");
    if (fibres[i]->state == AT_MMA) fail("mma() not reached by every lane of a warp");
  }
}

inline void launch(dim3 grid, dim3 block, std::function<void()> kernel) {
  gridDim = grid, blockDim = block, body = std::move(kernel);
  if (block.x > 1024 || grid.y > 65535 || grid.z > 65535 || !grid.x || !grid.y || !grid.z)
    return fail("invalid launch configuration");
  std::vector<size_t> blocks((size_t)grid.x * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), rng);
  for (size_t i : blocks) {
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    run_block(block.x * block.y);
  }
}
}  // namespace cpu

template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, int block, void*, A... arguments) {
  cpu::launch(grid, block, [=] { kernel((P)arguments...); });
}

// What the sanitizer calls.
extern "C" {
#define ACCESS(size)                                                                          \
  UNCHECKED void __asan_load##size##_noabort(size_t p) { cpu::check_access(p, size, false); } \
  UNCHECKED void __asan_store##size##_noabort(size_t p) { cpu::check_access(p, size, true); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
UNCHECKED void __asan_loadN_noabort(size_t p, size_t n) { cpu::check_access(p, n, false); }
UNCHECKED void __asan_storeN_noabort(size_t p, size_t n) { cpu::check_access(p, n, true); }
UNCHECKED void __asan_handle_no_return() {}
UNCHECKED void __asan_before_dynamic_init(const void*) {}
UNCHECKED void __asan_after_dynamic_init() {}
}

// For the test: start a run in an arena; announce a tensor; ask what the run did wrong.
extern "C" void cpu_start(unsigned seed, size_t arena, size_t bytes) {
  cpu::rng.seed(seed), cpu::error.clear(), cpu::tensor_count = 0;
  cpu::arena = {arena, arena + bytes, false};
}
extern "C" void cpu_tensor(size_t begin, size_t bytes, bool writable) {
  cpu::tensors[cpu::tensor_count++] = {begin, begin + bytes, writable};
}
extern "C" const char* cpu_error() { return cpu::error.c_str(); }

inline void __syncthreads() { cpu::wait(cpu::AT_BARRIER); }
inline void __syncwarp() {}  // only there to order the compiler's loads
inline int cudaGetLastError() { return 0; }
template <typename T> T __ldcs(const T* p) { return *p; }

// --- 16-bit numbers ----------------------------------------------------------------------------
struct Bits { uint16_t bits; };
struct __half : Bits {
  __half() = default;
  __half(Bits bits) : Bits(bits) {}
  explicit __half(float v);
  explicit operator float() const;
};
struct __half2 { __half x, y; };
struct __nv_bfloat16 : Bits {
  __nv_bfloat16() = default;
  __nv_bfloat16(Bits bits) : Bits(bits) {}
  explicit __nv_bfloat16(float v);
  explicit operator float() const;
};
struct __nv_bfloat162 { __nv_bfloat16 x, y; };

// v rounded to `digits` significant bits, ties to even; step: the smallest spacing there is.
inline double round_to(double v, int digits, double step) {
  if (v == 0 || !std::isfinite(v)) return v;
  const double ulp = std::max(std::ldexp(1.0, std::ilogb(v) - digits + 1), step);
  return std::nearbyint(v / ulp) * ulp;
}

inline Bits to_half(double v) {
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  v = round_to(std::fabs(v), 11, std::ldexp(1.0, -24));
  if (std::isnan(v)) return {0x7fff};
  if (v >= 65536) return {uint16_t(sign | 0x7c00)};
  const int e = std::max(std::ilogb(v), -14);  // a subnormal's is that of the smallest normal
  return {uint16_t(sign | (((e + 14) << 10) + (int)std::ldexp(v, 10 - e)))};
}

inline __half::__half(float v) : Bits(to_half(v)) {}
inline __half::operator float() const {
  const int e = bits >> 10 & 31, f = bits & 1023;
  const float v = e == 31 ? (f ? NAN : INFINITY)
                          : std::ldexp(f + (e ? 1024.f : 0.f), std::max(e, 1) - 25);
  return bits >> 15 ? -v : v;
}

// A bfloat16 is the upper half of a float.
union Float { float f; uint32_t u; };
inline Bits to_bfloat16(double v) {
  const Float whole = {(float)round_to(v, 8, 0)};
  return {uint16_t(std::isnan(whole.f) ? 0x7fff : whole.u >> 16)};
}
inline __nv_bfloat16::__nv_bfloat16(float v) : Bits(to_bfloat16(v)) {}
inline __nv_bfloat16::operator float() const { return Float{.u = (uint32_t)bits << 16}.f; }

inline __half2 __float2half2_rn(float v) { return {to_half(v), to_half(v)}; }

// Computed in double, where a product or sum of 16-bit numbers is exact, and rounded once.
inline __half fma16(__half a, __half b, __half c) {
  return to_half((double)float(a) * float(b) + float(c));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return {fma16(a.x, b.x, c.x), fma16(a.y, b.y, c.y)};
}
inline __half2 __hmul2(__half2 a, __half2 b) { return __hfma2(a, b, __float2half2_rn(-0.f)); }
inline __half2 __hsub2(__half2 a, __half2 b) { return __hfma2(b, __float2half2_rn(-1), a); }
inline __nv_bfloat162 __hsub2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {to_bfloat16((double)float(a.x) - float(b.x)),
          to_bfloat16((double)float(a.y) - float(b.y))};
}

template <typename Pair, unsigned MASK> Pair and_or(unsigned v, unsigned magic) {
  const unsigned result = (v & MASK) | magic;
  return *(const Pair*)&result;
}

// --- mma.sync.m16n8k16, from the fragment tables of the PTX manual -----------------------------
template <typename T>
void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  auto number = [](unsigned pair, int k) -> double {
    return float(T(Bits{uint16_t(pair >> k % 2 * 16)}));
  };
  cpu::Fibre& me = *cpu::self;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  std::copy(a, a + 4, me.a);
  me.b[0] = b0, me.b[1] = b1;
  cpu::wait(cpu::AT_MMA);  // every lane has shown its fragments
  const auto* warp = &cpu::fibres[threadIdx.x / 32 * 32];
  float sum[4];
  for (int i = 0; i < 4; i++) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    double exact = c[i];
    for (int k = 0; k < 16; k++) {
      const auto& left = *warp[row % 8 * 4 + k % 8 / 2];
      const auto& right = *warp[column * 4 + k % 8 / 2];
      exact += number(left.a[k / 8 * 2 + row / 8], k) * number(right.b[k / 8], k);
    }
    sum[i] = (float)exact;
  }
  cpu::wait(cpu::AT_MMA);  // every lane has read them
  std::copy(sum, sum + 4, c);
}
