// Stands in for kernels/csrc/ptx.cuh on a CPU: every thread of a block is a fiber, which gives up
// the processor where it waits, and every instruction does what the PTX manual says.
//
// What a wrong kernel could get away with on one machine is made visible: shared memory begins as
// NaN, a copy's destination is NaN until its thread waits for it (or, in eager mode, is written at
// once, over whatever another warp still reads), and threads run first to last or last to first.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max;
using std::min;

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace emulator {

struct Index {
  unsigned x, y;
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;
};

// counts threads in, and lets them out together
struct Barrier {
  int waiting = 0, generation = 0;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  bool done;
  Index index;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> started;
};

// what the lanes of a warp show each other; two, so that one barrier separates two instructions
struct Warp {
  Barrier barrier;
  float a[2][32][8], b[2][32][4];
  int turn[32];
};

inline ucontext_t scheduler;
inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline Thread* current;
inline Index block;
inline Barrier block_barrier;
inline std::vector<unsigned char> shared;
inline bool eager;
inline std::function<void()> body;
inline std::vector<std::pair<const unsigned char*, size_t>> readable;

inline const char* fault = nullptr;  // the first thing that no GPU would forgive

inline void wait(Barrier& barrier, int count) {
  const int generation = barrier.generation;
  if (++barrier.waiting == count) {
    barrier.waiting = 0;
    barrier.generation++;
  }
  while (barrier.generation == generation) swapcontext(&current->context, &scheduler);
}

inline void perform(const Copy& copy) {
  std::memset(copy.to, 0, 16);
  std::memcpy(copy.to, copy.from, copy.bytes);
}

inline void enter() {
  body();
  for (const auto& group : current->groups)
    if (!group.empty()) fault = "a copy is never waited for";
  if (!current->started.empty()) fault = "a copy is never waited for";
  current->done = true;
}

inline void run_block(int count, size_t shared_bytes, bool backwards) {
  shared.assign(shared_bytes + 16, 0xff);
  threads.resize(count);
  warps.assign(count / 32, Warp{});
  block_barrier = {};
  for (int i = 0; i < count; i++) {
    Thread& thread = threads[i];
    if (!thread.stack) thread.stack.reset(new unsigned char[1 << 16]);
    thread.done = false;
    thread.index = {static_cast<unsigned>(i), 0};
    thread.groups.clear();
    thread.started.clear();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = 1 << 16;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, enter, 0);
  }
  for (int left = count; left > 0;) {
    left = 0;
    for (int i = 0; i < count; i++) {
      current = &threads[backwards ? count - 1 - i : i];
      if (!current->done) swapcontext(&scheduler, &current->context);
      left += !current->done;
    }
  }
}

// runs a kernel over a grid, one block after the other
inline void launch(Index grid, int count, size_t shared_bytes, std::function<void()> kernel) {
  body = std::move(kernel);
  for (block.y = 0; block.y < grid.y; block.y++)
    for (block.x = 0; block.x < grid.x; block.x++) run_block(count, shared_bytes, eager);
}

inline float half_to_float(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

inline uint16_t float_to_half(double value) {
  const _Float16 rounded = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}

inline float bfloat_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t float_to_bfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7fff;
  // to nearest, ties to even
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// m16n8k16: the rows of a are g and g + 8 with g = lane / 4, its columns 2t + (0, 1) and 8 more
// with t = lane % 4; b's rows are the same columns, its column is g; acc holds rows g, g + 8 and
// columns 2t + (0, 1)
template <class ToFloat>
inline void mma(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], ToFloat to_float) {
  const int lane = current->index.x % 32;
  Warp& warp = warps[current->index.x / 32];
  const int turn = warp.turn[lane]++ % 2;
  for (int i = 0; i < 8; i++) warp.a[turn][lane][i] = to_float(a[i / 2] >> (i % 2 * 16) & 0xffff);
  for (int i = 0; i < 4; i++) warp.b[turn][lane][i] = to_float(b[i / 2] >> (i % 2 * 16) & 0xffff);
  wait(warp.barrier, 32);
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = acc[i];
    for (int k = 0; k < 16; k++) {
      const int t = k % 8 / 2, upper = k / 8;
      sum += double{warp.a[turn][row % 8 * 4 + t][(row / 8 + upper * 2) * 2 + k % 2]} *
             warp.b[turn][column * 4 + t][upper * 2 + k % 2];
    }
    acc[i] = static_cast<float>(sum);
  }
}

}  // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block)

inline void __syncthreads() {
  emulator::wait(emulator::block_barrier, static_cast<int>(emulator::threads.size()));
}

namespace lowbit {

inline unsigned char* shared_memory() {
  auto address = reinterpret_cast<uintptr_t>(emulator::shared.data());
  return reinterpret_cast<unsigned char*>((address + 15) & ~uintptr_t{15});
}

inline uint32_t permute_bytes(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  uint32_t out = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t pick = selector >> (4 * i) & 15;
    uint32_t byte = bytes >> (pick % 8 * 8) & 0xff;
    if (pick & 8) byte = byte & 0x80 ? 0xff : 0;  // the sign, repeated
    out |= byte << (8 * i);
  }
  return out;
}

inline uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }

inline void copy16_async(void* to, const void* from, int bytes) {
  const auto* source = static_cast<const unsigned char*>(from);
  const auto inside = [&](const auto& range) {
    return source >= range.first && source + bytes <= range.first + range.second;
  };
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    emulator::fault = "a copy of 16 bytes is not aligned";
  if (bytes < 0 || bytes > 16) emulator::fault = "a copy reads 0 to 16 bytes";
  if (bytes && std::none_of(emulator::readable.begin(), emulator::readable.end(), inside))
    emulator::fault = "a copy reads outside of its tensor";
  if (emulator::fault) return;
  const emulator::Copy copy{static_cast<unsigned char*>(to), source, bytes};
  if (emulator::eager)
    emulator::perform(copy);
  else
    std::memset(to, 0xff, 16);
  emulator::current->started.push_back(copy);
}

inline void commit_copies() {
  auto& thread = *emulator::current;
  thread.groups.push_back(std::move(thread.started));
  thread.started.clear();
}

template <int PENDING>
void wait_copies() {
  auto& groups = emulator::current->groups;
  while (groups.size() > PENDING) {
    if (!emulator::eager)
      std::for_each(groups.front().begin(), groups.front().end(), emulator::perform);
    groups.erase(groups.begin());
  }
}

inline void wait_for_previous_kernel() {}
inline void start_next_kernel() {}

template <float (*TO_FLOAT)(uint16_t), class FromFloat>
uint32_t fma_pairs(uint32_t a, uint32_t b, uint32_t c, FromFloat from_float) {
  uint32_t out = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    // exact in double for the few bits of these operands, so rounded once
    const double value = double{TO_FLOAT(a >> shift)} * TO_FLOAT(b >> shift) + TO_FLOAT(c >> shift);
    out |= static_cast<uint32_t>(static_cast<uint16_t>(from_float(value))) << shift;
  }
  return out;
}

struct Half {
  // 1024 and -1024: OR-ing a code into the mantissa adds it, or 16 times it four bits up
  static constexpr bool DECODES_HIGH_IN_PLACE = true;
  static constexpr uint32_t MAGIC = 0x64006400, MINUS_MAGIC = 0xe400e400, ONE = 0x3c003c00;
  // -(1024 + 8); 1/16; -(1024 + 16 * 8) / 16
  static constexpr uint32_t LOW_TERM = 0xe408e408, HIGH_FACTOR = 0x2c002c00, HIGH_TERM = 0xd480d480;
  static uint16_t from_float(float value) { return emulator::float_to_half(value); }
  static float to_float(uint16_t value) { return emulator::half_to_float(value); }
  static uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    return fma_pairs<emulator::half_to_float>(a, b, c, emulator::float_to_half);
  }
  static uint32_t mul2(uint32_t a, uint32_t b) {
    return fma2(a, b, 0x80008000);  // bf16 has no multiplication of its own before sm_90
  }
  static void mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::mma(acc, a, {b0, b1}, emulator::half_to_float);
  }
};

struct BFloat {
  // 128 and -128: seven bits of mantissa have no room for 16 times a code
  static constexpr bool DECODES_HIGH_IN_PLACE = false;
  static constexpr uint32_t MAGIC = 0x43004300, MINUS_MAGIC = 0xc300c300, ONE = 0x3f803f80;
  // -(128 + 8), 1, the same
  static constexpr uint32_t LOW_TERM = 0xc308c308, HIGH_FACTOR = ONE, HIGH_TERM = LOW_TERM;
  static uint16_t from_float(float value) { return emulator::float_to_bfloat(value); }
  static float to_float(uint16_t value) { return emulator::bfloat_to_float(value); }
  static uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    return fma_pairs<emulator::bfloat_to_float>(a, b, c, emulator::float_to_bfloat);
  }
  static uint32_t mul2(uint32_t a, uint32_t b) {
    return fma2(a, b, 0x80008000);  // bf16 has no multiplication of its own before sm_90
  }
  static void mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::mma(acc, a, {b0, b1}, emulator::bfloat_to_float);
  }
};

}  // namespace lowbit
