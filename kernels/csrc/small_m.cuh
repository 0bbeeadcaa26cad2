// y = epilogue(x @ W.T + bias) + residual for at most 64 rows of x and a 4-bit symmetric weight W.
//
// Dimension key: M rows of x, N output features, K input features. A *block* is 64 weights of a row
// in 32 bytes (formats/packing.py: byte j holds element j in its low and 32 + j in its high half).
// A *step* is what all warps of a thread block take along K in one turn of the main loop.
//
// The weight is the left operand (16 features x 16 k) of mma.m16n8k16, eight rows of x the right
// one. Thread t of the four that share a feature reads words 2t and 2t + 1 of a block, which hold
// elements 8t..8t+7 in their low halves and 32 + 8t..32 + 8t+7 in the high ones. Which element sits
// in which k-slot is free as long as both operands agree, so four matrix instructions (i, u) take
// elements 32u + 8t + 4i + (0, 1, 2, 3) into the slots (2t, 2t+1, 2t+8, 2t+9): weights never change
// threads, and x is one 16-byte read of its natural order for i = 0 and 1.
//
// `level * group_scale` is an integer of at most 8 bits, exact in fp16 and bf16: one fused
// multiply-add (MAGIC + code) * s - (MAGIC + 8) * s makes it from the code. The channel's scale
// waits for the finished sum.
//
// The floor is memory: N * K / 2 bytes of weight and N * K / G of group scales from HBM, and x from
// L2 once a column of thread blocks, 4 * M / BLOCK_N times the weight's bytes. At 4.3 TB/s, 132
// multiprocessors and 1.75 GHz a multiprocessor receives 18.6 bytes a cycle: the 128 bytes of a
// 16 x 16 tile take 6.9 cycles, 27 issue slots. A tile needs, in the main loop that nvcc 13.0
// compiles for sm_90 (groups of 64 or more, wide tiles), so many instructions:
//   M to 8:  fp16 22.2, bf16 23.1, of them 9 fma, 8.2 lop3, 2 prmt, 2 shifts (bf16: 3), 1 matrix
//   M to 16: fp16 26.5, bf16 28.1; to 32: 28.6, 30.1; to 64: 35.6, 37.4, of them 8 matrix
// so up to 8 rows memory is the bound, at 16 the two meet, and from 32 rows on instructions and the
// matrix unit are (M / 8 at 1 to 2 cycles each). On sm_80, at 13 bytes a cycle, a tile has 39 issue
// slots. Predictions: nothing was timed.
//
// Sums are taken in an order that the tile sizes alone decide: same bits every time.
#pragma once

#include <ptx.cuh>
#include <tile.cuh>

namespace lowbit {

static __device__ __forceinline__ float activate(float z, int epilogue) {
  switch (epilogue) {
    case GELU:  // 1 + erf would cancel for negative z
      return 0.5f * z * erfcf(-0.70710678118654752f * z);
    case GELU_TANH:  // (1 + tanh(u)) / 2 is the sigmoid of 2u
      return z / (1.0f + expf(-1.5957691216057308f * (z + 0.044715f * z * z * z)));
    case SILU:
      return z / (1.0f + expf(-z));
    case RELU:  // written so that a NaN stays one
      return z < 0.0f ? 0.0f : z;
    default:
      return z;
  }
}

// from a finished sum to the output
template <class T>
static __device__ __forceinline__ void store_output(const SmallM& p, int m, int n, float sum) {
  float z = sum * p.scale[n];
  if (p.bias) z += T::to_float(p.bias[n]);
  z = activate(z, p.epilogue);
  if (p.residual) z += T::to_float(p.residual[m * p.residual_stride + n]);
  p.y[int64_t{m} * p.N + n] = T::from_float(z);
}

// What turns the codes of one row's block into level * group_scale: a factor and a term for the low
// halves of its bytes and for the high ones.
struct RowScale {
  uint32_t factor[2], term[2];
};

// group scale s to the pair (s, s): MAGIC + s, less MAGIC
template <class T>
static __device__ __forceinline__ uint32_t scale_pair(uint32_t byte) {
  return T::fma2(byte * 0x10001 + T::MAGIC, T::ONE, T::MINUS_MAGIC);
}

// Elements 4i..4i+3 of a word, its low (u = 0) or high halves, as two pairs. `word` comes with its
// middle bytes swapped, so that bytes 0 and 1 of the weight are 16 bits apart.
template <class T>
static __device__ __forceinline__ void decode(uint32_t word, int u, const RowScale& s,
                                              uint32_t& first, uint32_t& second) {
  uint32_t mask = 0x000f000f, next = word >> 8;
  if (u == 1 && T::DECODES_HIGH_IN_PLACE) mask = 0x00f000f0;
  if (u == 1 && !T::DECODES_HIGH_IN_PLACE) next = word >> 12, word = word >> 4;
  first = T::fma2(and_or(word, mask, T::MAGIC), s.factor[u], s.term[u]);
  second = T::fma2(and_or(next, mask, T::MAGIC), s.factor[u], s.term[u]);
}

// What a thread copies, step after step: half a block of a row of the weight for its own warp, and
// 16 bytes of rows of x for all. Zeros where N, M, K or this part of the sum end. A stage holds
//   weight [warp][BLOCKS][WARP_N] rows of 32 bytes,
//   x [STEP_BLOCKS][BLOCK_M] rows of 128 bytes, whose halves are swapped in odd rows so that a read
//   of two rows at once meets no bank twice.
template <class C>
struct Copies {
  // rows of x that the threads cover at once, each 8 threads a block
  static constexpr int ROWS = THREADS / (8 * C::STEP_BLOCKS);
  static_assert(ROWS % 2 == 0, "the rows of one thread are all odd or all even");

  const uint8_t* weight[C::WARP_TILES];
  int weight_left[C::WARP_TILES];  // bytes
  const uint16_t* x;
  int x_left;  // elements
  int weight_out, x_out, m;

  __device__ __forceinline__ Copies(const SmallM& p, int warp, int lane, int first_row,
                                    int first_block, int last_block) {
    const int own = warp / C::WARPS_N * C::BLOCKS;
#pragma unroll
    for (int r = 0; r < C::WARP_TILES; r++) {
      const int row = first_row + r * 16 + lane / 2;
      const int byte = (first_block + own) * 32 + lane % 2 * 16;
      weight[r] = p.qweight + int64_t{min(row, p.N - 1)} * p.pitch + byte;
      weight_left[r] = row < p.N ? min(p.pitch, last_block * 32) - byte : 0;
    }
    weight_out = warp * (C::BLOCKS * C::WARP_N * 32) + lane * 16;
    const int thread = threadIdx.x, part = thread % 8, block = thread / 8 % C::STEP_BLOCKS;
    m = thread / (8 * C::STEP_BLOCKS);
    const int k = (first_block + block) * 64 + part * 8;
    x = p.x + m * p.x_stride + k;
    x_left = min(p.K, last_block * 64) - k;
    x_out = C::WEIGHT_BYTES + (block * C::BLOCK_M + m) * 128 + (part ^ (m & 1) << 2) * 16;
  }

  __device__ __forceinline__ void start_weight(unsigned char* stage) {
#pragma unroll
    for (int r = 0; r < C::WARP_TILES; r++) {
#pragma unroll
      for (int b = 0; b < C::BLOCKS; b++)
        copy16_async(stage + weight_out + (b * C::WARP_N + r * 16) * 32, weight[r] + b * 32,
                     weight_left[r] > b * 32 ? 16 : 0);
      weight[r] += C::STEP_BLOCKS * 32;
      weight_left[r] -= C::STEP_BLOCKS * 32;
    }
  }

  __device__ __forceinline__ void start_x(const SmallM& p, unsigned char* stage) {
    const int bytes = min(max(x_left, 0), 8) * 2;
#pragma unroll
    for (int i = 0; i < C::BLOCK_M / ROWS; i++)
      copy16_async(stage + x_out + i * ROWS * 128, x + i * ROWS * p.x_stride,
                   m + i * ROWS < p.M ? bytes : 0);
    x += C::STEP_BLOCKS * 64;
    x_left -= C::STEP_BLOCKS * 64;
  }
};

// The group scales of the rows that a lane multiplies: a byte for a block, or for each of its
// halves where a group has 32 weights.
template <class T, class C>
struct GroupScales {
  static constexpr int ROWS = 2 * C::WARP_TILES, BYTES = C::HALF_GROUPS ? 2 : 1;

  uint32_t rows[ROWS];  // where the rows of group_scale begin
  uint32_t bytes[C::BLOCKS][ROWS][BYTES];

  __device__ __forceinline__ GroupScales(const SmallM& p, int first_row) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      rows[r] = min(first_row + r * 8, p.N - 1) * static_cast<uint32_t>(p.num_groups);
#pragma unroll
      for (int b = 0; b < C::BLOCKS; b++) bytes[b][r][0] = bytes[b][r][BYTES - 1] = 1;
    }
  }

  __device__ __forceinline__ void load(const SmallM& p, int first_block) {
    if (p.num_groups == 0) return;
#pragma unroll
    for (int b = 0; b < C::BLOCKS; b++) {
#pragma unroll
      for (int h = 0; h < BYTES; h++) {
        const int k = (first_block + b) * 64 + h * 32;
        const uint32_t group = min(k >> p.group_shift, p.num_groups - 1);
#pragma unroll
        for (int r = 0; r < ROWS; r++) bytes[b][r][h] = p.group_scale[rows[r] + group];
      }
    }
  }

  __device__ __forceinline__ void expand(RowScale (&out)[C::BLOCKS][ROWS]) const {
#pragma unroll
    for (int b = 0; b < C::BLOCKS; b++) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const uint32_t low = scale_pair<T>(bytes[b][r][0]);
        const uint32_t high = C::HALF_GROUPS ? scale_pair<T>(bytes[b][r][BYTES - 1]) : low;
        // all products are exact
        out[b][r] = {{low, T::mul2(high, T::HIGH_FACTOR)},
                     {T::mul2(low, T::LOW_TERM), T::mul2(high, T::HIGH_TERM)}};
      }
    }
  }
};

// Multiplies what a stage holds: acc[r][m] is the tile of 16 features r and 8 rows m.
template <class T, class C>
static __device__ __forceinline__ void multiply(
    const unsigned char* weight, const unsigned char* x, int x_half,
    const RowScale (&scales)[C::BLOCKS][2 * C::WARP_TILES],
    float (&acc)[C::WARP_TILES][C::TILES_M][4]) {
#pragma unroll
  for (int b = 0; b < C::BLOCKS; b++) {
    uint32_t words[2 * C::WARP_TILES][2];
#pragma unroll
    for (int r = 0; r < 2 * C::WARP_TILES; r++) {
      const uint2 pair = *reinterpret_cast<const uint2*>(weight + (b * C::WARP_N + r * 8) * 32);
      words[r][0] = permute_bytes(pair.x, 0, 0x3120);
      words[r][1] = permute_bytes(pair.y, 0, 0x3120);
    }
#pragma unroll
    for (int u = 0; u < 2; u++) {
      uint4 columns[C::TILES_M];
#pragma unroll
      for (int m = 0; m < C::TILES_M; m++)
        columns[m] = *reinterpret_cast<const uint4*>(x + (b * C::BLOCK_M + m * 8) * 128 +
                                                     (u ? 64 - x_half : x_half));
#pragma unroll
      for (int r = 0; r < C::WARP_TILES; r++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          uint32_t a[4];
          decode<T>(words[2 * r][i], u, scales[b][2 * r], a[0], a[2]);
          decode<T>(words[2 * r + 1][i], u, scales[b][2 * r + 1], a[1], a[3]);
#pragma unroll
          for (int m = 0; m < C::TILES_M; m++)
            T::mma(acc[r][m], a, i ? columns[m].z : columns[m].x, i ? columns[m].w : columns[m].y);
        }
      }
    }
  }
}

// One thread block: BLOCK_N features (blockIdx.x) of all rows, one part (blockIdx.y) of the sum.
// What it reads before wait_for_previous_kernel must not be that kernel's result.
template <class T, class C>
__global__ void __launch_bounds__(THREADS, C::BLOCKS_PER_SM) small_m_kernel(const SmallM p) {
  unsigned char* shared = shared_memory();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int start_n = blockIdx.x * C::BLOCK_N, warp_n = warp % C::WARPS_N * C::WARP_N;
  const int steps = (p.pitch / 32 + C::STEP_BLOCKS - 1) / C::STEP_BLOCKS;
  const int split_steps = (steps + p.splits - 1) / p.splits;
  const int first = blockIdx.y * split_steps, last = min(first + split_steps, steps);

  Copies<C> copies(p, warp, lane, start_n + warp_n, first * C::STEP_BLOCKS, last * C::STEP_BLOCKS);
#pragma unroll
  for (int s = 0; s < C::STAGES - 1; s++) copies.start_weight(shared + s * C::STAGE_BYTES);

  int scale_block = first * C::STEP_BLOCKS + warp / C::WARPS_N * C::BLOCKS;
  GroupScales<T, C> scales(p, start_n + warp_n + g);
  scales.load(p, scale_block);

  wait_for_previous_kernel();
  // not earlier: the next kernel may rely on everything up to this one's start being complete
  start_next_kernel();
#pragma unroll
  for (int s = 0; s < C::STAGES - 1; s++) {
    copies.start_x(p, shared + s * C::STAGE_BYTES);
    commit_copies();
  }

  float acc[C::WARP_TILES][C::TILES_M][4] = {};
  const int weight_in = warp * (C::BLOCKS * C::WARP_N * 32) + g * 32 + t * 8;
  const int x_in =
      C::WEIGHT_BYTES + warp / C::WARPS_N * (C::BLOCKS * C::BLOCK_M * 128) + g * 128 + t * 16;
  unsigned char* stage = shared;
  unsigned char* spare = shared + (C::STAGES - 1) * C::STAGE_BYTES;
  for (int step = first; step < last; step++) {
    wait_copies<C::STAGES - 2>();
    // also: every warp is done with the stage that is filled next
    __syncthreads();
    copies.start_weight(spare);
    copies.start_x(p, spare);
    commit_copies();
    RowScale rows[C::BLOCKS][2 * C::WARP_TILES];
    scales.expand(rows);
    scale_block += C::STEP_BLOCKS;
    scales.load(p, scale_block);
    multiply<T, C>(stage + weight_in, stage + x_in, (g & 1) * 64, rows, acc);
    spare = stage;
    stage = stage == shared + (C::STAGES - 1) * C::STAGE_BYTES ? shared : stage + C::STAGE_BYTES;
  }

  // the zeros that were copied past the end, too, or they would land among the sums
  wait_copies<0>();
  __syncthreads();
  float* sums = reinterpret_cast<float*>(shared);  // [WARPS_K][BLOCK_M][SUM_PITCH]
#pragma unroll
  for (int r = 0; r < C::WARP_TILES; r++)
#pragma unroll
    for (int m = 0; m < C::TILES_M; m++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        sums[(warp / C::WARPS_N * C::BLOCK_M + m * 8 + t * 2 + i % 2) * C::SUM_PITCH + warp_n +
             r * 16 + g + i / 2 * 8] = acc[r][m][i];
  __syncthreads();
  for (int i = threadIdx.x; i < C::BLOCK_M * C::BLOCK_N; i += THREADS) {
    const int m = i / C::BLOCK_N, n = i % C::BLOCK_N;
    if (m >= p.M || start_n + n >= p.N) continue;
    float sum = sums[m * C::SUM_PITCH + n];
#pragma unroll
    for (int part = 1; part < C::WARPS_K; part++)
      sum += sums[(part * C::BLOCK_M + m) * C::SUM_PITCH + n];
    if (p.parts)
      p.parts[(int64_t{blockIdx.y} * p.M + m) * p.N + start_n + n] = sum;
    else
      store_output<T>(p, m, start_n + n, sum);
  }
}

// One thread: one output, its parts added in order.
template <class T>
__global__ void __launch_bounds__(THREADS) finish_kernel(const SmallM p) {
  const int n = blockIdx.x * THREADS + threadIdx.x, m = blockIdx.y;
  wait_for_previous_kernel();
  if (n >= p.N) return;
  float sum = 0.0f;
  for (int part = 0; part < p.splits; part++)
    sum += p.parts[(int64_t{part} * p.M + m) * p.N + n];
  store_output<T>(p, m, n, sum);
}

inline unsigned finish_blocks(int N) { return static_cast<unsigned>((N + THREADS - 1) / THREADS); }

}  // namespace lowbit
