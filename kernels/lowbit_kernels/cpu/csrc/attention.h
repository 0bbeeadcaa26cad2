// softmax(scale Q K' + bias) V for one head at a time, keys up to a length and inside a window.
//
// Eight queries see all their keys at once: their scores [8, keys] stay in the cache, so that the
// softmax needs no second thought and no rescaling.
#pragma once

#include "matmul.h"

struct Attention {
  int64_t B, H, T, D;
  const float* q;
  const float* k;
  const float* v;               // [B, H, T, D] by their strides, D contiguous
  int64_t q_strides[3], k_strides[3], v_strides[3];
  const int64_t* lengths;       // [B] or null
  const float* bias;            // [B, H, T, T] by its strides, keys contiguous; or null
  int64_t bias_strides[3];
  int64_t window;               // frames seen on each side; negative: all
  float scale;
  double dropout;               // the probability to drop a weight; 0: none is drawn
  uint64_t seed;
  float* out;                   // [B, T, H, D]
  float* lse;                   // [B, H, T]
  int64_t threads;
};

// queries of a task, a multiple of TILE_ROWS
constexpr int QUERY_BLOCK = 64;
constexpr float MINUS_INFINITY = -__builtin_inff();

// one panel of keys, [D, 48]; keys past the end repeat the last one and are masked later
static void pack_keys(const float* k, int64_t stride, int64_t first, int64_t T, int64_t D, float* panel) {
  for (int64_t j = 0; j < PANEL; j++) {
    const float* row = k + (first + j < T ? first + j : T - 1) * stride;
    for (int64_t d = 0; d < D; d++) panel[d * PANEL + j] = row[d];
  }
}

// sums[r][v] += a[r, 0..count) B[0..count, v], walked by their strides; the last vector of B has
// `last_lanes` lanes unless it is FULL
template <int VECTORS, bool FULL>
static inline void accumulate(vfloat (&sums)[TILE_ROWS][VECTORS], const float* a, int64_t a_stride,
                              int64_t a_step, const float* b, int64_t b_stride, int64_t count,
                              int last_lanes) {
  for (int64_t i = 0; i < count; i++) {
    vfloat column[VECTORS];
    for (int v = 0; v < VECTORS; v++)
      column[v] = FULL || v + 1 < VECTORS ? load<vfloat>(b + i * b_stride + v * LANES)
                                          : load_some(b + i * b_stride + v * LANES, last_lanes);
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; r++) {
      vfloat x = splat(a[r * a_stride + i * a_step]);
      for (int v = 0; v < VECTORS; v++) sums[r][v] += x * column[v];
    }
  }
}

// fp32 sums over the head dimension are cut into blocks of this many products: long ones lose digits
constexpr int64_t SUM_BLOCK = 32;

// scale times the products [8, width] of eight rows [8, D] with the columns of panels of 48
static void score_rows(const float* rows, const float* panels, int64_t D, float scale, float* scores,
                       int64_t width) {
  for (int64_t j = 0; j < width; j += PANEL, panels += D * PANEL)
    for (int64_t d = 0; d < D; d += SUM_BLOCK) {
      vfloat sums[TILE_ROWS][TILE_VECTORS] = {};
      accumulate<TILE_VECTORS, true>(sums, rows + d, D, 1, panels + d * PANEL, PANEL,
                                     D - d < SUM_BLOCK ? D - d : SUM_BLOCK, LANES);
      for (int r = 0; r < TILE_ROWS; r++)
        for (int v = 0; v < TILE_VECTORS; v++) {
          float* to = scores + r * width + j + v * LANES;
          store(to, d ? load<vfloat>(to) + sums[r][v] * scale : sums[r][v] * scale);
        }
    }
}

static inline vuint mixed(vuint x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// dropout's factors of one row's weights, 0 or 1 / (1 - dropout), drawn from the seed, the row and
// the key alone
struct RowDropout {
  uint32_t low = 0, high = 0, threshold = 0;
  float factor = 1.0f;

  RowDropout(const Attention& p, int64_t row) {
    if (p.dropout == 0.0) return;
    uint64_t x = p.seed + (uint64_t)(row + 1) * 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    low = (uint32_t)x, high = (uint32_t)(x >> 32);
    threshold = (uint32_t)(p.dropout * 4294967296.0), factor = 1.0 / (1.0 - p.dropout);
  }

  vfloat operator()(int64_t key) const {
    vuint bits = mixed(mixed((vuint)lane_numbers() + ((uint32_t)key + low)) ^ high);
    return bits < threshold ? splat(0.0f) : splat(factor);
  }
};

// scores [width] to probabilities before division; returns their sum, 0 where no key is seen.
// Keys [from, to) of those in the buffer are seen.
static float softmax_row(float* s, int64_t width, int64_t from, int64_t to, const float* bias, float* lse) {
  vfloat top = splat(MINUS_INFINITY);
  for (int64_t j = 0; j < width; j += LANES) {
    vfloat x = load<vfloat>(s + j);
    if (bias && j < to) x += load_some(bias + j, lanes_left(to - j));
    vint key = lane_numbers() + (int)j;
    x = (key >= (int)from) & (key < (int)to) ? x : splat(MINUS_INFINITY);
    store(s + j, x);
    top = max(x, top);
  }
  float largest = MINUS_INFINITY;
  for (int i = 0; i < LANES; i++) largest = top[i] > largest ? top[i] : largest;
  if (largest == MINUS_INFINITY) largest = 0.0f;  // nothing is seen, or only NaN
  vfloat sum = {};
  for (int64_t j = 0; j < width; j += LANES) {
    vfloat x = load<vfloat>(s + j);
    vfloat e = x == MINUS_INFINITY ? splat(0.0f) : exp(x - largest);
    store(s + j, e);
    sum += e;
  }
  float total = horizontal_sum(sum);
  *lse = total == 0.0f ? 0.0f : largest + __builtin_logf(total);
  return total;
}

template <int VECTORS>
static void mix_values(const float* probs, int64_t width, const float* v, int64_t v_stride,
                       int64_t keys, int last_lanes, const float* total, int rows, float* out,
                       int64_t out_stride) {
  vfloat sums[TILE_ROWS][VECTORS] = {};
  if (last_lanes == LANES)
    accumulate<VECTORS, true>(sums, probs, width, 1, v, v_stride, keys, LANES);
  else
    accumulate<VECTORS, false>(sums, probs, width, 1, v, v_stride, keys, last_lanes);
#pragma GCC unroll 8  // an index that is no constant would keep the sums in memory
  for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 3
    for (int i = 0; i < VECTORS; i++) {
      if (r >= rows) break;
      vfloat y = total[r] == 0.0f ? vfloat{} : sums[r][i] / total[r];
      store_some(out + r * out_stride + i * LANES, y, i + 1 < VECTORS ? LANES : last_lanes);
    }
}

// keys [from, to), counted from `first`, that query `row` sees of [first, end)
static void seen_keys(const Attention& p, int64_t row, int64_t first, int64_t end, int64_t* from,
                      int64_t* to) {
  *from = 0, *to = end - first;
  if (p.window < 0) return;
  if (row - p.window > first) *from = row - p.window - first;
  if (row + p.window + 1 < end) *to = row + p.window + 1 - first;
}

// of `left` vectors, those to take together: 4 as 2 + 2, since one vector alone is slow
static inline int64_t vectors_of(int64_t left) { return left == 4 ? 2 : left > 3 ? 3 : left; }

// eight queries from t on; scores: [8, width]
static void attend_rows(const Attention& p, int64_t b, int64_t h, int64_t t, int64_t length,
                        const float* panels, float* q_rows, float* scores) {
  int rows = p.T - t < TILE_ROWS ? (int)(p.T - t) : TILE_ROWS;
  int64_t first = 0, end = length;
  if (p.window >= 0) {
    first = t > p.window ? (t - p.window) / PANEL * PANEL : 0;
    end = t + rows + p.window < length ? t + rows + p.window : length;
  }
  int64_t width = end > first ? (end - first + PANEL - 1) / PANEL * PANEL : 0;
  const float* q = p.q + b * p.q_strides[0] + h * p.q_strides[1];
  for (int r = 0; r < TILE_ROWS; r++)  // rows past the end repeat the last one
    memcpy(q_rows + r * p.D, q + (t + (r < rows ? r : rows - 1)) * p.q_strides[2], p.D * 4);
  score_rows(q_rows, panels + first * p.D, p.D, p.scale, scores, width);
  float total[TILE_ROWS];
  for (int r = 0; r < TILE_ROWS; r++) {
    int64_t row = t + (r < rows ? r : rows - 1), number = (b * p.H + h) * p.T + row, from, to;
    seen_keys(p, row, first, end, &from, &to);
    if (row >= length) to = 0;  // a padded query sees nothing
    const float* bias = p.bias;
    if (bias) bias += b * p.bias_strides[0] + h * p.bias_strides[1] + row * p.bias_strides[2] + first;
    float* s = scores + r * width;
    total[r] = softmax_row(s, width, from, to, bias, p.lse + number);
    if (p.dropout == 0.0) continue;
    RowDropout factors(p, number);
    for (int64_t j = 0; j < width; j += LANES) store(s + j, load<vfloat>(s + j) * factors(first + j));
  }
  const float* v = p.v + b * p.v_strides[0] + h * p.v_strides[1] + first * p.v_strides[2];
  float* out = p.out + ((b * p.T + t) * p.H + h) * p.D;
  int64_t keys = end > first ? end - first : 0;
  for (int64_t d = 0; d < p.D;) {
    int64_t left = p.D - d, vectors = vectors_of((left + LANES - 1) / LANES);
    int last = lanes_left(left - (vectors - 1) * LANES);
    auto mix = vectors == 3 ? mix_values<3> : vectors == 2 ? mix_values<2> : mix_values<1>;
    mix(scores, width, v + d, p.v_strides[2], keys, last, total, rows, out + d, p.H * p.D);
    d += vectors * LANES;
  }
}
