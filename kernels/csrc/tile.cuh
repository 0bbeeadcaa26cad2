// What the small-M kernel is given, and the sizes that it is compiled for.
//
// Dimension key: M rows of x, N output features, K input features.
#pragma once

#include <ptx.cuh>

namespace lowbit {

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
// two thread blocks share the 163 KB of sm_80, one fits the 99 KB of sm_86, sm_89 and sm_120
constexpr int PIPELINE_BYTES = 80 * 1024;
constexpr int MAX_STAGES = 8;

enum Epilogue { NONE, GELU, GELU_TANH, SILU, RELU };

struct SmallM {
  const uint16_t* x;  // [M, K]
  int64_t x_stride;  // its rows begin at multiples of 16 bytes
  const uint8_t* qweight;  // [N, pitch]
  int pitch;
  const float* scale;  // [N]
  const uint8_t* group_scale;  // [N, num_groups] or null
  int num_groups;
  int group_shift;  // log2 of the group size
  const uint16_t* bias;  // [N] or null
  const uint16_t* residual;  // [M, N] or null
  int64_t residual_stride;
  uint16_t* y;  // [M, N]
  float* parts;  // [splits, M, N], or null where one thread block sums all of K
  int M, N, K;
  int epilogue;
  int splits;
};

// Sizes of a tile: BLOCK_M rows of x, 16 * WARP_TILES features a warp, WARPS_N warps side by side
// and the others one behind the other along K.
template <int BLOCK_M_, int WARPS_N_, bool HALF_GROUPS_>
struct Tile {
  static constexpr bool HALF_GROUPS = HALF_GROUPS_;
  static constexpr int BLOCK_M = BLOCK_M_;
  static constexpr int WARPS_N = WARPS_N_;
  static constexpr int WARPS_K = WARPS / WARPS_N;
  static constexpr int TILES_M = BLOCK_M / 8;
  // with many rows a read of x from shared memory must serve two tiles of the weight
  static constexpr int WARP_TILES = BLOCK_M >= 32 ? 2 : 1;
  static constexpr int WARP_N = 16 * WARP_TILES;
  static constexpr int BLOCK_N = WARP_N * WARPS_N;
  // bytes of one block of every row that a stage holds
  static constexpr int BLOCK_BYTES = WARPS * WARP_N * 32 + WARPS_K * BLOCK_M * 128;
  // blocks a warp and step: the more, the fewer barriers and addresses, while three stages fit
  static constexpr int BLOCKS =
      4 * BLOCK_BYTES * 3 <= PIPELINE_BYTES ? 4 : 2 * BLOCK_BYTES * 3 <= PIPELINE_BYTES ? 2 : 1;
  static constexpr int STEP_BLOCKS = WARPS_K * BLOCKS;
  static constexpr int WEIGHT_BYTES = WARPS * BLOCKS * WARP_N * 32;
  static constexpr int STAGE_BYTES = BLOCKS * BLOCK_BYTES;
  static constexpr int STAGES =
      PIPELINE_BYTES / STAGE_BYTES < MAX_STAGES ? PIPELINE_BYTES / STAGE_BYTES : MAX_STAGES;
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;
  // rows of partial sums: 4 more floats than features keep the banks apart
  static constexpr int SUM_PITCH = BLOCK_N + 4;
  // with 64 rows the sums alone take half of the registers that two thread blocks would leave
  static constexpr int BLOCKS_PER_SM = BLOCK_M == 64 ? 1 : 2;
  static unsigned blocks(int N) { return static_cast<unsigned>((N + BLOCK_N - 1) / BLOCK_N); }

  static_assert(STAGES >= 2);
  static_assert(WARPS_K * BLOCK_M * SUM_PITCH * 4 <= SHARED_BYTES);
  static_assert(THREADS % (8 * STEP_BLOCKS) == 0 && BLOCK_M * STEP_BLOCKS * 8 % THREADS == 0);
};

// Calls launch.run<T, Tile>() for the tile that the numbers name; false where there is no such one.
// TILES of matmul/csrc.py is the same list.
template <class T, bool HALF_GROUPS, class Launch>
bool with_tile(int block_m, int warps_n, Launch& launch) {
  switch (block_m * 10 + warps_n) {
    case 81: return launch.template run<T, Tile<8, 1, HALF_GROUPS>>(), true;
    case 84: return launch.template run<T, Tile<8, 4, HALF_GROUPS>>(), true;
    case 161: return launch.template run<T, Tile<16, 1, HALF_GROUPS>>(), true;
    case 164: return launch.template run<T, Tile<16, 4, HALF_GROUPS>>(), true;
    case 322: return launch.template run<T, Tile<32, 2, HALF_GROUPS>>(), true;
    case 324: return launch.template run<T, Tile<32, 4, HALF_GROUPS>>(), true;
    case 642: return launch.template run<T, Tile<64, 2, HALF_GROUPS>>(), true;
    case 644: return launch.template run<T, Tile<64, 4, HALF_GROUPS>>(), true;
    default: return false;
  }
}

template <class Launch>
bool with_tile(const SmallM& p, int block_m, int warps_n, bool is_bf16, Launch& launch) {
  if (p.num_groups && p.group_shift == 5)
    return is_bf16 ? with_tile<BFloat, true>(block_m, warps_n, launch)
                   : with_tile<Half, true>(block_m, warps_n, launch);
  return is_bf16 ? with_tile<BFloat, false>(block_m, warps_n, launch)
                 : with_tile<Half, false>(block_m, warps_n, launch);
}

}  // namespace lowbit
