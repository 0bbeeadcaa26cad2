// Few rows times a packed weight: each weight is decoded in registers and read from memory once.
//
// With many rows it pays to unpack a panel first (weight.h); with a handful, as in a decoder's step,
// the unpacking would be all there is. Rows here sum in 16 lanes, so their bits differ from those of
// the panels.
#pragma once

#include "weight.h"

constexpr int FEW_ROWS = 8;

// the level of every code, repeated so that 4 bits index it
static inline vfloat levels(const PackedWeight& w) {
  vint code = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return to_float(to_level(code & ((1 << w.bits) - 1), w));
}

// sums of `row` of the weight with each of ROWS rows of x [ROWS, pitch], zeros from K on
template <int ROWS, int BITS>
static inline void dot_products(const PackedWeight& w, int64_t row, int64_t K, const float* x,
                                int64_t pitch, float* sums) {
  constexpr int SLICES = 8 / BITS;
  vfloat even[ROWS] = {}, odd[ROWS] = {};  // two chains hide the latency of an addition
  const uint8_t* bytes = w.bytes + row * w.pitch;
  const vfloat codes = levels(w);
  vfloat table = codes;
  int64_t group = row * w.scale_groups, next = w.group_size ? 0 : K;  // next: where a group begins
  for (int64_t k = 0; k < K; bytes += 32) {
    vint low = widen(bytes), high = widen(bytes + 16);
#pragma GCC unroll 8
    for (int u = 0; u < SLICES; u++, k += 32) {
      if (BITS < 8 && k == next && k < K) {
        table = codes;
        if (w.zero) table -= w.zero[group];
        if (w.multiplier) table *= w.multiplier[group];
        group++, next += w.group_size;
      }
      vfloat a, b;
      if constexpr (BITS == 8)
        a = to_float(low << 24 >> 24), b = to_float(high << 24 >> 24);
      else
        a = look_up(table, low >> (u * BITS)), b = look_up(table, high >> (u * BITS));
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        even[r] += a * load<vfloat>(x + r * pitch + k);
        odd[r] += b * load<vfloat>(x + r * pitch + k + 16);
      }
    }
  }
  for (int r = 0; r < ROWS; r++) sums[r] = horizontal_sum(even[r] + odd[r]);
}

// columns [n, n + count) of every row of the output; x [M, pitch]
template <int ROWS, int BITS>
static void few_rows_columns(const Matmul& p, const PackedWeight& w, const float* x, int64_t pitch,
                             int64_t n, int count) {
  float sums[LANES][ROWS] = {};
  for (int i = 0; i < count; i++) dot_products<ROWS, BITS>(w, n + i, p.K, x, pitch, sums[i]);
  for (int r = 0; r < ROWS; r++) {
    vfloat y;
    for (int i = 0; i < LANES; i++) y[i] = sums[i][r];
    vfloat scale = p.column_scale ? load_some(p.column_scale + n, count) : splat(1.0f);
    vfloat bias = p.bias ? load_some(p.bias + n, count) : vfloat{};
    y = activate(y * scale + bias, p.activation);
    if (p.residual) y += load_some(p.residual + r * p.residual_stride + n, count);
    store_some(p.out + r * p.out_stride + n, y, count);
  }
}

typedef void (*FewRows)(const Matmul&, const PackedWeight&, const float*, int64_t, int64_t, int);

template <int BITS>
static FewRows few_rows_kernel(int64_t M) {
  static const FewRows kernels[FEW_ROWS] = {
      few_rows_columns<1, BITS>, few_rows_columns<2, BITS>, few_rows_columns<3, BITS>,
      few_rows_columns<4, BITS>, few_rows_columns<5, BITS>, few_rows_columns<6, BITS>,
      few_rows_columns<7, BITS>, few_rows_columns<8, BITS>};
  return kernels[M - 1];
}

// one group, 1 <= M <= FEW_ROWS; false without memory
static bool few_rows(const Matmul& p, const PackedWeight& w) {
  int64_t block = 256 / w.bits, pitch = (p.K + block - 1) / block * block;
  float* x = (float*)aligned_alloc(64, p.M * pitch * 4);
  if (!x) return false;
  for (int64_t m = 0; m < p.M; m++) {
    memcpy(x + m * pitch, (const float*)p.a + m * p.a_stride, p.K * 4);
    memset(x + m * pitch + p.K, 0, (pitch - p.K) * 4);
  }
  FewRows run = w.bits == 8   ? few_rows_kernel<8>(p.M)
                : w.bits == 4 ? few_rows_kernel<4>(p.M)
                : w.bits == 2 ? few_rows_kernel<2>(p.M)
                              : few_rows_kernel<1>(p.M);
#pragma omp parallel for num_threads(threads_worth(p.threads, p.N * p.K * (p.M + 3) / LANES))
  for (int64_t n = 0; n < p.N; n += LANES) run(p, w, x, pitch, n, lanes_left(p.N - n));
  free(x);
  return true;
}
