// Packed low-bit weights to float panels; the bytes are described in formats/packing.py.
#pragma once

#include "matmul.h"

struct PackedWeight {
  const uint8_t* bytes;     // [N, pitch]
  int64_t pitch;
  int64_t bits;
  int64_t asymmetric;       // codes themselves, not levels
  int64_t group_size;       // 0: no group scales
  int64_t scale_groups;     // a row
  const float* multiplier;  // [N, scale_groups], null: 1
  const float* zero;        // [N, scale_groups], subtracted from the code; null: 0
};

static inline vint to_level(vint code, const PackedWeight& w) {
  if (w.bits == 8) return code << 24 >> 24;
  if (w.asymmetric) return code;
  return w.bits == 4 ? code - 8 : 2 * code - (int)((1 << w.bits) - 1);
}

// columns of B [row, row + 16) of the weight, as [K, PANEL]; lanes past `count` are zero
static void unpack_vector(const PackedWeight& w, int64_t row, int count, int64_t K, float* panel) {
  const int per_block = 256 / w.bits, slices = 8 / w.bits;
  const int mask = (1 << w.bits) - 1;
  for (int64_t block = 0; block * per_block < K; block++)
    for (int u = 0; u < slices; u++) {
      int64_t k0 = block * per_block + u * 32;
      if (k0 >= K) break;
      vfloat multiplier = splat(1.0f), zero = {};
      int64_t g = w.group_size ? k0 / w.group_size : 0;
      for (int i = 0; i < count; i++) {
        if (w.multiplier) multiplier[i] = w.multiplier[(row + i) * w.scale_groups + g];
        if (w.zero) zero[i] = w.zero[(row + i) * w.scale_groups + g];
      }
      for (int word = 0; word < 8; word++) {
        vint four = {};
        for (int i = 0; i < count; i++)
          memcpy((char*)&four + 4 * i, w.bytes + (row + i) * w.pitch + block * 32 + word * 4, 4);
        for (int j = 0; j < 4; j++) {
          int64_t k = k0 + word * 4 + j;
          if (k >= K) break;
          vint code = (four >> (8 * j + u * (int)w.bits)) & mask;
          vfloat value = (to_float(to_level(code, w)) - zero) * multiplier;
          store(panel + k * PANEL, first_lanes(value, count));
        }
      }
    }
}

static void unpack_panel(const PackedWeight& w, const Matmul& p, int64_t number, float* panel) {
  int64_t a_group = (p.N + PANEL - 1) / PANEL;
  int64_t group = number / a_group, n = number % a_group * PANEL;
  for (int v = 0; v < TILE_VECTORS && n + v * LANES < p.N; v++)
    unpack_vector(w, group * p.N + n + v * LANES, lanes_left(p.N - n - v * LANES), p.K,
                  panel + v * LANES);
}
