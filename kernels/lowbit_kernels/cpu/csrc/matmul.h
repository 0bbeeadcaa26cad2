// out = activation(A B' * scales + bias) + residual, for A [M, K] and B [N, K].
//
// A is uint8 with zero point 128 or float, its rows `a_stride` elements apart (rows may overlap: a
// strided convolution is a matmul over such a view). B is cut into panels of 48 columns: int8
// [panels, ceil(K / 4), 48, 4] or float [panels, K, 48]. Groups are independent products that write
// neighbouring columns of out.
// A tile is 8 rows by up to 3 vectors: 24 accumulators of the 32 registers.
#pragma once

#include "vector.h"

constexpr int TILE_ROWS = 8, TILE_VECTORS = 3, PANEL = TILE_VECTORS * LANES;

struct Matmul {
  int64_t M, N, K, groups;  // N, K: of one group
  const void* a;
  int64_t a_stride, a_group_stride;
  const float* row_scale;     // [M]; null: 1
  const float* column_scale;  // [groups * N]; null: 1
  float scale;
  int32_t activation;
  const float* bias;      // [groups * N] or null
  const float* residual;  // [M, groups * N] or null
  int64_t residual_stride;
  float* out;  // [M, groups * N]
  int64_t out_stride;
  int32_t* largest;     // the bits of the largest |out - offset|, raised here; or null
  const float* offset;  // [groups * N] or null
  int64_t threads;
};

struct ByteArithmetic {
  typedef uint8_t A;
  typedef int8_t B;
  typedef vint Sum;
  static constexpr int STEP = 4;
  static inline vint broadcast(const uint8_t* p) {
    int32_t word;
    memcpy(&word, p, 4);
    return splat_int(word);
  }
  static inline vint multiply_add(vint sum, vint a, vint b) {
#ifdef __AVX512VNNI__
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#endif
    return sum;
  }
  static inline vint first(const int32_t* start, int v) { return load<vint>(start + v * LANES); }
  static inline vfloat finish(vint sum) { return to_float(sum); }
};

struct FloatArithmetic {
  typedef float A;
  typedef float B;
  typedef vfloat Sum;
  static constexpr int STEP = 1;
  static inline vfloat broadcast(const float* p) { return splat(*p); }
  static inline vfloat multiply_add(vfloat sum, vfloat a, vfloat b) { return sum + a * b; }
  static inline vfloat first(const int32_t*, int) { return vfloat{}; }
  static inline vfloat finish(vfloat sum) { return sum; }
};

static inline void raise_to(int32_t* largest, int32_t value) {
  int32_t seen = __atomic_load_n(largest, __ATOMIC_RELAXED);
  while (value > seen)
    if (__atomic_compare_exchange_n(largest, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
      return;
}

// one tile: ROWS rows from row m, VECTORS vectors of columns from column n of the group
template <class T, int ROWS, int VECTORS>
static void tile(const Matmul& p, int64_t group, int64_t m, int64_t n, const typename T::B* panel,
                 const int32_t* start) {
  typedef typename T::Sum Sum;
  Sum sums[ROWS][VECTORS];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++) sums[r][v] = T::first(start, v);
  const typename T::A* a = (const typename T::A*)p.a + group * p.a_group_stride + m * p.a_stride;
  if (p.residual)  // on its way while the sums are made: its rows are far apart
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECTORS; v++)
        __builtin_prefetch(p.residual + (m + r) * p.residual_stride + group * p.N + n + v * LANES);
  for (int64_t k = 0; k < p.K; k += T::STEP, panel += PANEL * T::STEP) {
    Sum b[VECTORS];
    for (int v = 0; v < VECTORS; v++) b[v] = load<Sum>(panel + v * LANES * T::STEP);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      Sum x = T::broadcast(a + r * p.a_stride + k);
      for (int v = 0; v < VECTORS; v++) sums[r][v] = T::multiply_add(sums[r][v], x, b[v]);
    }
  }
  vint largest = {};
  for (int v = 0; v < VECTORS; v++) {
    int count = lanes_left(p.N - n - v * LANES);
    int64_t column = group * p.N + n + v * LANES;
    vfloat scale = splat(p.scale);
    if (p.column_scale) scale *= load_some(p.column_scale + column, count);
    vfloat bias = p.bias ? load_some(p.bias + column, count) : vfloat{};
    vfloat offset = p.offset ? load_some(p.offset + column, count) : vfloat{};
    for (int r = 0; r < ROWS; r++) {
      vfloat row = p.row_scale ? scale * p.row_scale[m + r] : scale;
      vfloat y = activate(T::finish(sums[r][v]) * row + bias, p.activation);
      if (p.residual)
        y += load_some(p.residual + (m + r) * p.residual_stride + column, count);
      store_some(p.out + (m + r) * p.out_stride + column, y, count);
      if (p.largest) largest = max_int(largest, magnitude(first_lanes(y - offset, count)));
    }
  }
  if (p.largest) raise_to(p.largest, horizontal_max(largest));
}

template <class T, int VECTORS>
static void tile_rows(const Matmul& p, int64_t rows, int64_t group, int64_t m, int64_t n,
                      const typename T::B* panel, const int32_t* start) {
  switch (rows) {
    case 1: return tile<T, 1, VECTORS>(p, group, m, n, panel, start);
    case 2: return tile<T, 2, VECTORS>(p, group, m, n, panel, start);
    case 3: return tile<T, 3, VECTORS>(p, group, m, n, panel, start);
    case 4: return tile<T, 4, VECTORS>(p, group, m, n, panel, start);
    case 5: return tile<T, 5, VECTORS>(p, group, m, n, panel, start);
    case 6: return tile<T, 6, VECTORS>(p, group, m, n, panel, start);
    case 7: return tile<T, 7, VECTORS>(p, group, m, n, panel, start);
    default: return tile<T, 8, VECTORS>(p, group, m, n, panel, start);
  }
}

// threads that earn the microseconds it costs to wake them; `steps` are vector instructions
static inline int threads_worth(int64_t threads, int64_t steps) {
  int64_t most = steps / (16 << 10) + 1;
  return (int)(threads < most ? threads : most);
}

// rows of A that one task keeps in its second-level cache, while panels of B pass by
static inline int64_t chunk_rows(const Matmul& p, int64_t bytes) {
  int64_t rows = (256 << 10) / (p.K * bytes + 1);
  int64_t fair = p.M / (2 * p.threads) + 1;
  if (rows > fair) rows = fair;
  if (rows < 4 * TILE_ROWS) rows = 4 * TILE_ROWS;
  return (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
}

// `count` panels, the first of them number `first`, counted through all groups
template <class T>
static void matmul_panels(const Matmul& p, const typename T::B* panels, const int32_t* start,
                          int64_t first, int64_t count) {
  int64_t chunk = chunk_rows(p, sizeof(typename T::A)), chunks = (p.M + chunk - 1) / chunk;
  int64_t a_group = (p.N + PANEL - 1) / PANEL;
  int64_t panel_size = (p.K + T::STEP - 1) / T::STEP * T::STEP * PANEL;
  int threads = threads_worth(p.threads, p.M * count * panel_size / (T::STEP * LANES));
#pragma omp parallel for schedule(dynamic) collapse(2) num_threads(threads)
  for (int64_t c = 0; c < chunks; c++)
    for (int64_t i = 0; i < count; i++) {
      int64_t end = (c + 1) * chunk < p.M ? (c + 1) * chunk : p.M;
      int64_t group = (first + i) / a_group, n = (first + i) % a_group * PANEL;
      const typename T::B* panel = panels + i * panel_size;
      const int32_t* s = start ? start + (first + i) * PANEL : nullptr;
      for (int64_t m = c * chunk; m < end; m += TILE_ROWS) {
        int64_t rows = end - m < TILE_ROWS ? end - m : TILE_ROWS;
        if (p.N - n > 2 * LANES)
          tile_rows<T, 3>(p, rows, group, m, n, panel, s);
        else if (p.N - n > LANES)
          tile_rows<T, 2>(p, rows, group, m, n, panel, s);
        else
          tile_rows<T, 1>(p, rows, group, m, n, panel, s);
      }
    }
}
