// Passes over frames: quantization, and the depthwise convolution.
#pragma once

#include "vector.h"

static inline float scale_of(int32_t largest) {
  if (largest >= 0x7f800000) return __builtin_nanf("");  // infinity or NaN: so is what follows
  float amax;
  memcpy(&amax, &largest, 4);
  float scale = amax / 127.0f;
  return scale < 0x1p-126f ? 0x1p-126f : scale;  // a silent row's reciprocal stays finite
}

static inline int32_t largest_of(const float* x, int64_t count) {
  vint largest = {};
  for (int64_t c = 0; c < count; c += LANES)
    largest = max_int(largest, magnitude(load_some(x + c, lanes_left(count - c))));
  return horizontal_max(largest);
}

// offset [count] or null
static inline void quantize_row(const float* x, int64_t count, float scale, const float* offset,
                                uint8_t* q) {
  float inverse = 1.0f / scale;
  for (int64_t c = 0; c < count; c += LANES) {
    int lanes = lanes_left(count - c);
    vfloat value = load_some(x + c, lanes);
    if (offset) value -= load_some(offset + c, lanes);
    store_some(q + c, quantized(value * inverse), lanes);
  }
}

struct Depthwise {
  int64_t valid, channels, out_frames;  // frames from `valid` on count as zero
  int64_t taps, stride, padding, dilation;
  const float* x;            // [frames, channels]
  const float* input_scale;  // null: the input stays float
  const int8_t* weight;      // [taps, channels], levels
  const float* scale;        // [channels]
  const float* bias;         // [channels] or null
  const float* residual;     // [out_frames, channels] or null
  int32_t activation;
  float* out;                // [out_frames, channels]
  int64_t threads;
};

// a tile is 8 frames of one vector; 4 vectors are read together, since neighbours share memory pages
constexpr int DEPTHWISE_ROWS = 8, DEPTHWISE_CHANNELS = 4 * LANES;

// frames that whole tiles of outputs read, padding included
static inline int64_t depthwise_frames(const Depthwise& p) {
  return (p.out_frames + DEPTHWISE_ROWS - 1) * p.stride + (p.taps - 1) * p.dilation + 1;
}

// padded input of channels [c, c + channels) as [frames, DEPTHWISE_CHANNELS], quantized where the
// input is int8: integers in float, whose sums stay below 2^24 and are therefore exact
static void depthwise_input(const Depthwise& p, int64_t c, int channels, float* buffer) {
  float inverse = p.input_scale ? 1.0f / *p.input_scale : 0.0f;
  for (int64_t i = 0, frames = depthwise_frames(p); i < frames; i++, buffer += DEPTHWISE_CHANNELS) {
    int64_t t = i - p.padding;
    bool inside = t >= 0 && t < p.valid;
    for (int v = 0; v < channels; v += LANES) {
      vfloat x = {};
      if (inside) x = load_some(p.x + t * p.channels + c + v, lanes_left(channels - v));
      if (p.input_scale) x = to_float(round_to_int(clamped(x * inverse)));
      store(buffer + v, x);
    }
  }
}

// output frames [t, t + 8) of channels [c, c + count), whose input begins at `from`
static void depthwise_tile(const Depthwise& p, int64_t c, int count, int64_t t, const float* from) {
  vfloat sums[DEPTHWISE_ROWS] = {};
  for (int64_t k = 0; k < p.taps; k++, from += p.dilation * DEPTHWISE_CHANNELS) {
    vfloat w = load_levels(p.weight + k * p.channels + c, count);
#pragma GCC unroll 8
    for (int r = 0; r < DEPTHWISE_ROWS; r++)
      sums[r] += w * load<vfloat>(from + r * p.stride * DEPTHWISE_CHANNELS);
  }
  vfloat scale = load_some(p.scale + c, count);
  if (p.input_scale) scale *= *p.input_scale;
  vfloat bias = p.bias ? load_some(p.bias + c, count) : vfloat{};
#pragma GCC unroll 8  // an index that is no constant would keep the sums in memory
  for (int r = 0; r < DEPTHWISE_ROWS; r++) {
    if (t + r >= p.out_frames) break;
    int64_t at = (t + r) * p.channels + c;
    vfloat y = activate(sums[r] * scale + bias, p.activation);
    if (p.residual) y += load_some(p.residual + at, count);
    store_some(p.out + at, y, count);
  }
}

static void depthwise_channels(const Depthwise& p, int64_t c, float* buffer) {
  int channels = p.channels - c < DEPTHWISE_CHANNELS ? (int)(p.channels - c) : DEPTHWISE_CHANNELS;
  depthwise_input(p, c, channels, buffer);
  for (int64_t t = 0; t < p.out_frames; t += DEPTHWISE_ROWS)
    for (int v = 0; v < channels; v += LANES)
      depthwise_tile(p, c + v, lanes_left(channels - v), t,
                     buffer + t * p.stride * DEPTHWISE_CHANNELS + v);
}
