// GroupNorm over the valid frames with its gradient; LayerNorm and activations to int8 rows.
#pragma once

#include "frames.h"

struct GroupNorm {
  int64_t B, C, T, groups;
  const float* x;          // [B, C, T] by its strides, frames contiguous
  int64_t x_strides[2];
  const int64_t* lengths;  // [B] or null
  const float* weight;     // [C]
  const float* bias;       // [C]; null in the backward
  float eps;
  float* mean;             // [B, groups]
  float* rstd;             // [B, groups]
  float* out;              // [B, C, T], y; in the backward dx
  const float* grad;       // [B, C, T] by its strides, frames contiguous
  int64_t grad_strides[2];
  float* dweight;          // [B, C], to be summed over B
  float* dbias;            // [B, C]
  int64_t threads;
};

// numbers that are read twice while they are in the first-level cache, and summed in fp32
constexpr int64_t MOMENT_BLOCK = 2048;

struct Moments {
  double count = 0, mean = 0, squares = 0;  // squares: sum of (x - mean)^2

  void add(const float* x, int64_t size) {
    for (int64_t i = 0; i < size; i += MOMENT_BLOCK)
      add_block(x + i, size - i < MOMENT_BLOCK ? size - i : MOMENT_BLOCK);
  }

  void add_block(const float* x, int64_t size) {
    vfloat sums[4] = {}, deviations[4] = {}, powers[4] = {};
    for (int64_t i = 0; i < size; i += 4 * LANES)
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++)
        if (i + v * LANES < size) sums[v] += load_some(x + i + v * LANES, lanes_left(size - i - v * LANES));
    float center = horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / size;
    for (int64_t i = 0; i < size; i += 4 * LANES)
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) {
        if (i + v * LANES >= size) break;
        int lanes = lanes_left(size - i - v * LANES);
        vfloat d = first_lanes(load_some(x + i + v * LANES, lanes) - center, lanes);
        deviations[v] += d, powers[v] += d * d;
      }
    // center is rounded: what it is off by, the deviations know
    double off = horizontal_sum((deviations[0] + deviations[1]) + (deviations[2] + deviations[3]));
    double power = horizontal_sum((powers[0] + powers[1]) + (powers[2] + powers[3]));
    double difference = center + off / size - mean, total = count + size;
    squares += power + difference * difference * count * size / total;
    mean += difference * size / total;
    count = total;
  }

  double variance() const { return squares / count; }
};

static inline int64_t valid_frames(const GroupNorm& p, int64_t b) {
  int64_t n = p.lengths ? p.lengths[b] : p.T;
  return n < 0 ? 0 : n < p.T ? n : p.T;
}

static void group_norm_forward(const GroupNorm& p, int64_t b, int64_t group) {
  int64_t channels = p.C / p.groups, first = group * channels, n = valid_frames(p, b);
  const float* x = p.x + b * p.x_strides[0] + first * p.x_strides[1];
  Moments moments;
  for (int64_t c = 0; c < channels; c++) moments.add(x + c * p.x_strides[1], n);
  float mean = moments.mean, rstd = n ? 1.0 / __builtin_sqrt(moments.variance() + p.eps) : 0.0;
  p.mean[b * p.groups + group] = mean, p.rstd[b * p.groups + group] = rstd;
  for (int64_t c = 0; c < channels; c++, x += p.x_strides[1]) {
    float scale = rstd * p.weight[first + c], bias = p.bias[first + c];
    float* out = p.out + (b * p.C + first + c) * p.T;
    for (int64_t t = 0; t < n; t += LANES) {
      int lanes = lanes_left(n - t);
      store_some(out + t, (load_some(x + t, lanes) - mean) * scale + bias, lanes);
    }
    memset(out + n, 0, (p.T - n) * 4);
  }
}

// sums of the gradient and of its products with x - mean, over one channel
static void gradient_sums(const float* grad, const float* x, float mean, int64_t size, double* sum,
                          double* product) {
  *sum = *product = 0;
  for (int64_t block = 0; block < size; block += MOMENT_BLOCK) {
    int64_t end = block + MOMENT_BLOCK < size ? block + MOMENT_BLOCK : size;
    vfloat sums = {}, products = {};
    for (int64_t t = block; t < end; t += LANES) {
      int lanes = lanes_left(end - t);
      vfloat g = load_some(grad + t, lanes);
      sums += g, products += g * (load_some(x + t, lanes) - mean);
    }
    *sum += horizontal_sum(sums), *product += horizontal_sum(products);
  }
}

static void group_norm_backward(const GroupNorm& p, int64_t b, int64_t group) {
  int64_t channels = p.C / p.groups, first = group * channels, n = valid_frames(p, b);
  const float* x = p.x + b * p.x_strides[0] + first * p.x_strides[1];
  const float* grad = p.grad + b * p.grad_strides[0] + first * p.grad_strides[1];
  float mean = p.mean[b * p.groups + group], rstd = p.rstd[b * p.groups + group];
  double total = 0, projection = 0, count = n ? (double)channels * n : 1.0;
  for (int64_t c = 0; c < channels; c++) {
    double sum, product;
    gradient_sums(grad + c * p.grad_strides[1], x + c * p.x_strides[1], mean, n, &sum, &product);
    p.dbias[b * p.C + first + c] = sum, p.dweight[b * p.C + first + c] = product * rstd;
    total += p.weight[first + c] * sum, projection += p.weight[first + c] * product * rstd;
  }
  // a mean in two parts: what cancels, as all of a group of one number does, leaves no rounding error
  float shift = total / count, rest = total / count - shift, slope = projection / count * rstd;
  for (int64_t c = 0; c < channels; c++, x += p.x_strides[1], grad += p.grad_strides[1]) {
    float weight = p.weight[first + c];
    float* out = p.out + (b * p.C + first + c) * p.T;
    for (int64_t t = 0; t < n; t += LANES) {
      int lanes = lanes_left(n - t);
      vfloat centered = load_some(x + t, lanes) - mean;
      vfloat g = (load_some(grad + t, lanes) * weight - shift) - rest;
      store_some(out + t, (g - centered * slope) * rstd, lanes);
    }
    memset(out + n, 0, (p.T - n) * 4);
  }
}

struct NormQuantize {
  int64_t rows, columns;
  const float* x;         // these and all outputs but the statistics: [rows, columns]
  const float* residual;  // or null
  const float* weight;    // [columns]
  const float* bias;      // [columns]
  float eps;
  const float* static_scale;  // one number, or null: each row's own
  float* h;               // x + residual, or null
  float* y;               // normalized, or null
  int8_t* q;
  float* scale;           // these three: [rows]
  float* mean;
  float* rstd;
  int64_t threads;
};

// q [columns] of x
static void signed_row(const float* x, int64_t columns, float scale, int8_t* q) {
  float inverse = 1.0f / scale;
  for (int64_t c = 0; c < columns; c += LANES) {
    int lanes = lanes_left(columns - c);
    vint level = round_to_int(clamped(load_some(x + c, lanes) * inverse));
    store_some((uint8_t*)q + c, __builtin_convertvector(level, vbyte), lanes);
  }
}

// buffer: [columns], where the normalized values go if y is null
static void norm_quantize_row(const NormQuantize& p, int64_t r, float* buffer) {
  int64_t at = r * p.columns;
  const float* x = p.x + at;
  if (p.residual) {
    float* h = p.h + at;
    for (int64_t c = 0; c < p.columns; c += LANES) {
      int lanes = lanes_left(p.columns - c);
      store_some(h + c, load_some(x + c, lanes) + load_some(p.residual + at + c, lanes), lanes);
    }
    x = h;
  }
  Moments moments;
  moments.add(x, p.columns);
  float mean = moments.mean, rstd = 1.0 / __builtin_sqrt(moments.variance() + p.eps);
  vint largest = {};
  if (p.y) buffer = p.y + at;
  for (int64_t c = 0; c < p.columns; c += LANES) {
    int lanes = lanes_left(p.columns - c);
    vfloat y = (load_some(x + c, lanes) - mean) * rstd;
    y = y * load_some(p.weight + c, lanes) + load_some(p.bias + c, lanes);
    largest = max_int(largest, magnitude(first_lanes(y, lanes)));
    store_some(buffer + c, y, lanes);
  }
  p.scale[r] = p.static_scale ? *p.static_scale : scale_of(horizontal_max(largest));
  p.mean[r] = mean, p.rstd[r] = rstd;
  signed_row(buffer, p.columns, p.scale[r], p.q + at);
}
