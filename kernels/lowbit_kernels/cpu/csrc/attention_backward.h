// The gradients of attention.h, one head at a time, from the logarithm of the softmax's denominator.
//
// Scores are computed again for blocks of 64 queries by 192 keys that stay in the cache. One task
// owns a head, or all heads that share a bias, so that sums have the same order every time.
#pragma once

#include "attention.h"

struct AttentionGradient {
  Attention forward;        // out is not read
  const float* grad_out;    // [B, H, T, D] by its strides, D contiguous
  int64_t grad_strides[3];
  const float* delta;       // [B, H, T]: grad_out . out
  float* dq;                // these three [B, T, H, D], zeros on entry
  float* dk;
  float* dv;
  float* dbias;             // [bias_sizes] by its strides, zeros on entry; or null
  int64_t bias_sizes[2];    // of batch and heads: theirs or 1
  int64_t dbias_strides[4];  // 0 where the bias is broadcast
};

constexpr int64_t KEY_BLOCK = 4 * PANEL;

static inline int64_t gradient_buffer(const Attention& p) {
  return (2 * KEY_BLOCK + 2 * QUERY_BLOCK) * p.D + 3 * QUERY_BLOCK * KEY_BLOCK;
}

template <int VECTORS>
static void add_tile(const float* a, int64_t a_stride, int64_t a_step, const float* b, int64_t b_stride,
                     int64_t count, int last_lanes, float scale, int rows, float* out, int64_t out_stride) {
  vfloat sums[TILE_ROWS][VECTORS] = {};
  if (last_lanes == LANES)
    accumulate<VECTORS, true>(sums, a, a_stride, a_step, b, b_stride, count, LANES);
  else
    accumulate<VECTORS, false>(sums, a, a_stride, a_step, b, b_stride, count, last_lanes);
#pragma GCC unroll 8  // an index that is no constant would keep the sums in memory
  for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 3
    for (int i = 0; i < VECTORS; i++) {
      if (r >= rows) break;
      float* to = out + r * out_stride + i * LANES;
      int lanes = i + 1 < VECTORS ? LANES : last_lanes;
      store_some(to, load_some(to, lanes) + sums[r][i] * scale, lanes);
    }
}

// out [rows, D] += scale * a [rows, count] b [count, D]; a is readable up to a multiple of 8 rows
static void add_product(const float* a, int64_t a_stride, int64_t a_step, const float* b, int64_t b_stride,
                        int64_t count, int64_t D, float scale, int64_t rows, float* out, int64_t out_stride) {
  for (int64_t d = 0; d < D;) {
    int64_t left = D - d, vectors = vectors_of((left + LANES - 1) / LANES);
    int last = lanes_left(left - (vectors - 1) * LANES);
    auto add = vectors == 3 ? add_tile<3> : vectors == 2 ? add_tile<2> : add_tile<1>;
    for (int64_t r = 0; r < rows; r += TILE_ROWS)
      add(a + r * a_stride, a_stride, a_step, b + d, b_stride, count, last, scale,
          rows - r < TILE_ROWS ? (int)(rows - r) : TILE_ROWS, out + r * out_stride + d, out_stride);
    d += vectors * LANES;
  }
}

// one query's scores become its dropped probabilities, and the gradient of those its scores'. `whole`:
// no other key is seen, and what delta stands for is summed here, closer to how its terms cancel
static void gradient_row(float* s, float* grad, int64_t width, int64_t from, int64_t to, const float* bias,
                         float lse, float delta, bool whole, const RowDropout& factors, int64_t first) {
  vfloat sum = {};
  for (int64_t j = 0; j < width; j += LANES) {
    vfloat x = load<vfloat>(s + j), g = load<vfloat>(grad + j);
    if (bias && j < to) x += load_some(bias + j, lanes_left(to - j));
    vint key = lane_numbers() + (int)j;
    vint seen = (key >= (int)from) & (key < (int)to) & (x != MINUS_INFINITY);
    vfloat prob = seen ? exp(x - lse) : splat(0.0f);
    g = seen ? g : splat(0.0f);
    if (factors.threshold) g *= factors(first + j);
    sum += prob * g;
    store(s + j, prob), store(grad + j, g);
  }
  if (whole) delta = horizontal_sum(sum);
  for (int64_t j = 0; j < width; j += LANES) {
    vfloat prob = load<vfloat>(s + j);
    store(grad + j, prob * (load<vfloat>(grad + j) - delta));
    if (factors.threshold) store(s + j, prob * factors(first + j));
  }
}

// rows [rows, width] of the scores' gradient into the bias's, which is broadcast where a stride is 0
static void add_bias_gradient(const float* grad, int64_t width, int64_t rows, int64_t keys,
                              const int64_t* strides, float* dbias, float* buffer) {
  for (int64_t r = 0; r < rows; r++) {
    const float* row = grad + r * width;
    if (strides[2] == 0) {  // summed here first: long sums in fp32 lose digits
      for (int64_t j = 0; j < width; j += LANES)
        store(buffer + j, r ? load<vfloat>(buffer + j) + load<vfloat>(row + j) : load<vfloat>(row + j));
      if (r + 1 < rows) continue;
      row = buffer;
    }
    vfloat sum = {};
    for (int64_t j = 0; j < keys; j += LANES) {
      int lanes = lanes_left(keys - j);
      vfloat x = load_some(row + j, lanes);
      if (strides[3] == 0)
        sum += x;
      else
        store_some(dbias + r * strides[2] + j, load_some(dbias + r * strides[2] + j, lanes) + x, lanes);
    }
    if (strides[3] == 0) dbias[r * strides[2]] += horizontal_sum(sum);
  }
}

// rows [rows, D], followed by zeros up to a multiple of 8 of them
static void copy_rows(const float* from, int64_t stride, int64_t rows, int64_t D, float* to) {
  for (int64_t r = 0; r < rows; r++) memcpy(to + r * D, from + r * stride, D * 4);
  memset(to + rows * D, 0, (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS * D * 4 - rows * D * 4);
}

struct HeadGradient {
  const AttentionGradient& g;
  const Attention& p;
  int64_t b, h, length;
  float *keys, *values, *queries, *grads, *probs, *grad_scores, *row;

  HeadGradient(const AttentionGradient& g, int64_t b, int64_t h, float* buffer)
      : g(g), p(g.forward), b(b), h(h) {
    length = p.lengths && p.lengths[b] < p.T ? p.lengths[b] : p.T;
    keys = buffer, values = keys + KEY_BLOCK * p.D;
    queries = values + KEY_BLOCK * p.D, grads = queries + QUERY_BLOCK * p.D;
    probs = grads + QUERY_BLOCK * p.D, grad_scores = probs + QUERY_BLOCK * KEY_BLOCK;
    row = grad_scores + QUERY_BLOCK * KEY_BLOCK;
  }

  const float* head(const float* x, const int64_t* strides) const {
    return x + b * strides[0] + h * strides[1];
  }

  // queries [t, t + rows) against keys [first, end), which are packed
  void block(int64_t t, int64_t rows, int64_t first, int64_t end) {
    int64_t count = end - first, width = (count + PANEL - 1) / PANEL * PANEL;
    int64_t number = (b * p.H + h) * p.T + t, stride = p.H * p.D;
    copy_rows(head(p.q, p.q_strides) + t * p.q_strides[2], p.q_strides[2], rows, p.D, queries);
    copy_rows(head(g.grad_out, g.grad_strides) + t * g.grad_strides[2], g.grad_strides[2], rows, p.D, grads);
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
      score_rows(queries + r * p.D, keys, p.D, p.scale, probs + r * width, width);
      score_rows(grads + r * p.D, values, p.D, 1.0f, grad_scores + r * width, width);
    }
    for (int64_t r = 0; r < rows; r++) {
      int64_t from, to;
      seen_keys(p, t + r, first, end, &from, &to);
      const float* bias = p.bias ? head(p.bias, p.bias_strides) + (t + r) * p.bias_strides[2] + first : nullptr;
      bool before = first > 0 && (p.window < 0 || t + r - p.window < first);
      bool after = end < length && (p.window < 0 || t + r + p.window >= end);
      gradient_row(probs + r * width, grad_scores + r * width, width, from, to, bias, p.lse[number + r],
                   g.delta[number + r], !before && !after, RowDropout(p, number + r), first);
    }
    if (g.dbias)
      add_bias_gradient(grad_scores, width, rows, count, g.dbias_strides,
                        g.dbias + b * g.dbias_strides[0] + h * g.dbias_strides[1] + t * g.dbias_strides[2] +
                            first * g.dbias_strides[3],
                        row);
    int64_t key_at = ((b * p.T + first) * p.H + h) * p.D, query_at = ((b * p.T + t) * p.H + h) * p.D;
    add_product(probs, 1, width, grads, p.D, rows, p.D, 1.0f, count, g.dv + key_at, stride);
    add_product(grad_scores, 1, width, queries, p.D, rows, p.D, p.scale, count, g.dk + key_at, stride);
    add_product(grad_scores, width, 1, head(p.k, p.k_strides) + first * p.k_strides[2], p.k_strides[2], count,
                p.D, p.scale, rows, g.dq + query_at, stride);
  }

  void run() {
    for (int64_t first = 0; first < length; first += KEY_BLOCK) {
      int64_t end = first + KEY_BLOCK < length ? first + KEY_BLOCK : length, from = 0, to = length;
      for (int64_t j = first; j < end; j += PANEL) {
        pack_keys(head(p.k, p.k_strides), p.k_strides[2], j, length, p.D, keys + (j - first) * p.D);
        pack_keys(head(p.v, p.v_strides), p.v_strides[2], j, length, p.D, values + (j - first) * p.D);
      }
      if (p.window >= 0) {
        if (first > p.window) from = first - p.window;
        if (end + p.window < length) to = end + p.window;
      }
      for (int64_t t = from; t < to; t += QUERY_BLOCK)
        block(t, to - t < QUERY_BLOCK ? to - t : QUERY_BLOCK, first, end);
    }
  }
};
