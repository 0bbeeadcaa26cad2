// Every PTX instruction of the kernels, each behind one small function. The kernels contain no
// other code that a CPU cannot run, so replacing this header alone runs them in an emulator.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lowbit {

// the dynamic shared memory of the block, aligned to 16 bytes
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// any of x, y: selector holds four numbers of a byte of {y, x}, four bits each
__device__ __forceinline__ uint32_t permute_bytes(uint32_t x, uint32_t y, uint32_t selector) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(x), "r"(y), "r"(selector));
  return out;
}

// (x & mask) | bits in one instruction: 0xea is the truth table of (a & b) | c
__device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(x), "r"(mask), "r"(bits));
  return out;
}

// starts to copy 16 bytes from global to shared memory past L1: the first `bytes` of them are
// read, the others become zeros. Both addresses are multiples of 16, whatever `bytes` is
__device__ __forceinline__ void copy16_async(void* shared, const void* global, int bytes) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(address), "l"(global), "r"(bytes) : "memory");
}

// the copies that this thread started since the last call become one group
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// waits until at most PENDING of this thread's newest groups are unfinished
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}

// waits for the kernel before this one in the stream, where the launch did not
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// lets the kernel after this one start; it sees this one's results only after its own wait
__device__ __forceinline__ void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// fp16, as bits; pairs hold the first element in the low half
struct Half {
  // 1024 and -1024: OR-ing a code into the mantissa adds it, or 16 times it four bits up
  static constexpr bool DECODES_HIGH_IN_PLACE = true;
  static constexpr uint32_t MAGIC = 0x64006400, MINUS_MAGIC = 0xe400e400, ONE = 0x3c003c00;
  // -(1024 + 8); 1/16; -(1024 + 16 * 8) / 16
  static constexpr uint32_t LOW_TERM = 0xe408e408, HIGH_FACTOR = 0x2c002c00, HIGH_TERM = 0xd480d480;

  static __device__ __forceinline__ uint16_t from_float(float value) {
    uint16_t out;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
    return out;
  }

  static __device__ __forceinline__ float to_float(uint16_t value) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value));
    return out;
  }

  static __device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t out;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
  }

  static __device__ __forceinline__ uint32_t mul2(uint32_t a, uint32_t b) {
    return fma2(a, b, 0x80008000);  // bf16 has no multiplication of its own before sm_90
  }

  // acc[16, 8] += a[16, 16] @ b[16, 8], spread over the warp as the PTX manual draws it
  static __device__ __forceinline__ void mma(float (&acc)[4], const uint32_t (&a)[4],
                                             uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// bf16, as bits
struct BFloat {
  // 128 and -128: seven bits of mantissa have no room for 16 times a code
  static constexpr bool DECODES_HIGH_IN_PLACE = false;
  static constexpr uint32_t MAGIC = 0x43004300, MINUS_MAGIC = 0xc300c300, ONE = 0x3f803f80;
  // -(128 + 8), 1, the same
  static constexpr uint32_t LOW_TERM = 0xc308c308, HIGH_FACTOR = ONE, HIGH_TERM = LOW_TERM;

  static __device__ __forceinline__ uint16_t from_float(float value) {
    uint16_t out;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(value));
    return out;
  }

  static __device__ __forceinline__ float to_float(uint16_t value) {
    return __uint_as_float(static_cast<uint32_t>(value) << 16);
  }

  static __device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t out;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
  }

  static __device__ __forceinline__ uint32_t mul2(uint32_t a, uint32_t b) {
    return fma2(a, b, 0x80008000);  // bf16 has no multiplication of its own before sm_90
  }

  static __device__ __forceinline__ void mma(float (&acc)[4], const uint32_t (&a)[4],
                                             uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

}  // namespace lowbit
