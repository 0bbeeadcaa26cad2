// Passes over frames: quantization, and the depthwise convolution.
#pragma once

#include "vector.h"

static inline float scale_of(int32_t largest) {
  float amax;
  memcpy(&amax, &largest, 4);
  float scale = amax / 127.0f;
  return scale < 0x1p-126f ? 0x1p-126f : scale;  // a silent row's reciprocal stays finite; keeps NaN
}

static inline int32_t largest_of(const float* x, int64_t count) {
  vint largest = {};
  for (int64_t c = 0; c < count; c += LANES)
    largest = max_int(largest, magnitude(load_some(x + c, lanes_left(count - c))));
  return horizontal_max(largest);
}

static inline void quantize_row(const float* x, int64_t count, float scale, uint8_t* q) {
  float inverse = 1.0f / scale;
  for (int64_t c = 0; c < count; c += LANES) {
    int lanes = lanes_left(count - c);
    vbyte v = quantized(load_some(x + c, lanes) * inverse);
    memcpy(q + c, &v, lanes);
  }
}

struct Depthwise {
  int64_t valid, channels, out_frames;  // frames from `valid` on count as zero
  int64_t taps, stride, padding, dilation;
  const float* x;            // [frames, channels]
  const float* input_scale;  // null: the input stays float
  const float* weight;       // [taps, channels]
  const float* scale;        // [channels]
  const float* bias;         // [channels] or null
  const float* residual;     // [out_frames, channels] or null
  int32_t activation;
  float* out;                // [out_frames, channels]
  int64_t threads;
};

constexpr int DEPTHWISE_ROWS = 8;

// frames that whole tiles of outputs read, padding included
static inline int64_t depthwise_frames(const Depthwise& p) {
  return (p.out_frames + DEPTHWISE_ROWS - 1) * p.stride + (p.taps - 1) * p.dilation + 1;
}

// channels [c, c + 16); buffer [padded, 16] holds their frames, quantized where the input is int8:
// integers in float, whose sums stay below 2^24 and are therefore exact
static void depthwise_vector(const Depthwise& p, int64_t c, float* buffer) {
  int count = lanes_left(p.channels - c);
  for (int64_t i = 0, frames = depthwise_frames(p); i < frames; i++) {
    int64_t t = i - p.padding;
    vfloat v = {};
    if (t >= 0 && t < p.valid) v = load_some(p.x + t * p.channels + c, count);
    if (p.input_scale) {
      v = min(max(v * (1.0f / *p.input_scale), splat(-127.0f)), splat(127.0f));
      v = to_float(round_to_int(v));
    }
    store(buffer + i * LANES, v);
  }
  vfloat scale = load_some(p.scale + c, count);
  if (p.input_scale) scale *= *p.input_scale;
  vfloat bias = p.bias ? load_some(p.bias + c, count) : vfloat{};
  for (int64_t t = 0; t < p.out_frames; t += DEPTHWISE_ROWS) {
    vfloat sums[DEPTHWISE_ROWS] = {};
    for (int64_t k = 0; k < p.taps; k++) {
      vfloat w = load_some(p.weight + k * p.channels + c, count);
      const float* from = buffer + (t * p.stride + k * p.dilation) * LANES;
      for (int r = 0; r < DEPTHWISE_ROWS; r++)
        sums[r] += w * load<vfloat>(from + r * p.stride * LANES);
    }
    for (int r = 0; r < DEPTHWISE_ROWS && t + r < p.out_frames; r++) {
      vfloat y = activate(sums[r] * scale + bias, p.activation);
      if (p.residual) y += load_some(p.residual + (t + r) * p.channels + c, count);
      store_some(p.out + (t + r) * p.channels + c, y, count);
    }
  }
}
