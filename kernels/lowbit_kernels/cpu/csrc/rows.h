// Row passes of a convolutional front end: the first convolution, LayerNorm, activation, int8.
#pragma once

#include "frames.h"
#include "matmul.h"

// What becomes of each row [channels]: normalized where norm_weight is given, activated, stored.
struct RowFinish {
  int64_t channels;
  const float* norm_weight;  // [channels] or null
  const float* norm_bias;
  float eps;
  int32_t activation;
  const float* offset;  // [channels], subtracted before `q` and `largest`; or null
  float* out;          // [rows, channels] or null
  uint8_t* q;          // [rows, channels], by `scale`, or null
  const float* scale;
  int32_t* largest;    // the bits of the largest |value - offset|, raised here; or null
  int64_t threads;
};

static void normalize_row(const RowFinish& p, float* row) {
  vfloat sum = {}, squares = {};
  for (int64_t c = 0; c < p.channels; c += LANES)
    sum += load_some(row + c, lanes_left(p.channels - c));
  float mean = horizontal_sum(sum) / p.channels;
  for (int64_t c = 0; c < p.channels; c += LANES) {
    int count = lanes_left(p.channels - c);
    vfloat d = first_lanes(load_some(row + c, count) - mean, count);
    squares += d * d;
  }
  float inverse = 1.0f / __builtin_sqrtf(horizontal_sum(squares) / p.channels + p.eps);
  for (int64_t c = 0; c < p.channels; c += LANES) {
    int count = lanes_left(p.channels - c);
    vfloat y = (load_some(row + c, count) - mean) * inverse;
    y = y * load_some(p.norm_weight + c, count) + load_some(p.norm_bias + c, count);
    store_some(row + c, y, count);
  }
}

// `row` is changed
static int32_t finish_row(const RowFinish& p, float* row, int64_t number) {
  if (p.norm_weight) normalize_row(p, row);
  vint largest = {};
  float inverse = p.q ? 1.0f / *p.scale : 0.0f;
  for (int64_t c = 0; c < p.channels; c += LANES) {
    int count = lanes_left(p.channels - c);
    vfloat y = activate(load_some(row + c, count), p.activation);
    if (p.out) store_some(p.out + number * p.channels + c, y, count);
    if (p.offset) y -= load_some(p.offset + c, count);
    if (p.largest) largest = max_int(largest, magnitude(first_lanes(y, count)));
    if (p.q) store_some(p.q + number * p.channels + c, quantized(y * inverse), count);
  }
  return horizontal_max(largest);
}

// out = row[0 .. columns) * sigmoid(row[columns .. 2 * columns)) + residual, which may be null
static void glu_row(const float* row, int64_t columns, const float* residual, float* out) {
  for (int64_t c = 0; c < columns; c += LANES) {
    int count = lanes_left(columns - c);
    vfloat y = load_some(row + c, count) * sigmoid(load_some(row + columns + c, count));
    if (residual) y += load_some(residual + c, count);
    store_some(out + c, y, count);
  }
}

// A convolution of one input channel: x, weight [taps, channels], bias [channels].
struct FirstConv {
  int64_t frames, taps, stride;
  const float* x;
  const float* weight;
  const float* bias;
};

constexpr int FIRST_ROWS = 4;

static void first_conv_rows(const FirstConv& p, int64_t channels, int64_t t, int64_t rows, float* out) {
  for (int64_t c = 0; c < channels; c += LANES) {
    int count = lanes_left(channels - c);
    vfloat bias = load_some(p.bias + c, count), sums[FIRST_ROWS] = {bias, bias, bias, bias};
    for (int64_t k = 0; k < p.taps; k++) {
      vfloat w = load_some(p.weight + k * channels + c, count);
      // rows past the end repeat the last one
#pragma GCC unroll 4
      for (int64_t r = 0; r < FIRST_ROWS; r++)
        sums[r] += w * p.x[(t + (r < rows ? r : rows - 1)) * p.stride + k];
    }
#pragma GCC unroll 4  // an index that is no constant would keep the sums in memory
    for (int r = 0; r < FIRST_ROWS; r++)
      if (r < rows) store_some(out + r * channels + c, sums[r], count);
  }
}
