// Vectors of 16 floats or ints, and the activations on them.
//
// GCC's and Clang's vector extensions: one AVX-512 register, or several narrower ones elsewhere.
#pragma once

#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

constexpr int LANES = 16;
typedef float vfloat __attribute__((vector_size(64)));
typedef int32_t vint __attribute__((vector_size(64)));
typedef uint32_t vuint __attribute__((vector_size(64)));
typedef uint8_t vbyte __attribute__((vector_size(16)));

enum Activation { NONE, GELU, GELU_TANH, SILU, RELU };

static inline vfloat splat(float x) { return x - vfloat{}; }
static inline vint splat_int(int32_t x) { return x - vint{}; }
static inline vint lane_numbers() { return vint{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

template <class V, class T>
static inline V load(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class T>
static inline void store(T* p, V v) {
  memcpy(p, &v, sizeof v);
}

static inline int lanes_left(int64_t left) { return left < LANES ? (int)left : LANES; }

// the first `count` lanes; the rest are zero
static inline vfloat load_some(const float* p, int count) {
  if (count >= LANES) return load<vfloat>(p);
#ifdef __AVX512F__  // a memcpy of so few bytes is a call
  return (vfloat)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#else
  vfloat v = {};
  memcpy(&v, p, count * sizeof(float));
  return v;
#endif
}

static inline void store_some(float* p, vfloat v, int count) {
  if (count >= LANES)
    store(p, v);
  else
#ifdef __AVX512F__
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
#else
    memcpy(p, &v, count * sizeof(float));
#endif
}

static inline void store_some(uint8_t* p, vbyte v, int count) {
  if (count >= LANES)
    store(p, v);
  else
    memcpy(p, &v, count);
}

static inline vfloat first_lanes(vfloat v, int count) {
  return count >= LANES ? v : load_some((const float*)&v, count);
}

static inline vfloat to_float(vint v) { return __builtin_convertvector(v, vfloat); }
static inline vfloat as_float(vint v) { return (vfloat)v; }
static inline vint as_int(vfloat v) { return (vint)v; }
static inline vfloat min(vfloat a, vfloat b) { return a < b ? a : b; }
static inline vfloat max(vfloat a, vfloat b) { return a > b ? a : b; }

// the bits of |x|: they order as |x| does, and NaN above everything, so that a maximum keeps it
static inline vint magnitude(vfloat x) { return as_int(x) & 0x7fffffff; }
static inline vint max_int(vint a, vint b) { return a > b ? a : b; }

static inline int32_t horizontal_max(vint v) {
#ifdef __AVX512F__
  return _mm512_reduce_max_epi32((__m512i)v);
#else
  int32_t best = v[0];
  for (int i = 1; i < LANES; i++) best = v[i] > best ? v[i] : best;
  return best;
#endif
}

static inline float horizontal_sum(vfloat v) {
  typedef float vhalf __attribute__((vector_size(32)));
  typedef float vquarter __attribute__((vector_size(16)));
  vhalf half = load<vhalf>(&v) + load<vhalf>((const float*)&v + 8);
  vquarter quarter = load<vquarter>(&half) + load<vquarter>((const float*)&half + 4);
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

static inline vint widen(const uint8_t* p) {
#ifdef __AVX512F__  // GCC moves the bytes one by one for __builtin_convertvector
  return (vint)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  return __builtin_convertvector(load<vbyte>(p), vint);
#endif
}

// the first `count` of 16 int8; the rest are zero
static inline vfloat load_levels(const int8_t* p, int count) {
  typedef int8_t vint8 __attribute__((vector_size(16)));
  vint8 v = {};
  if (count >= LANES)
    v = load<vint8>(p);
  else
    memcpy(&v, p, count);
#ifdef __AVX512F__
  return (vfloat)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)v));
#else
  return __builtin_convertvector(v, vfloat);
#endif
}

// table[index % 16] in each lane
static inline vfloat look_up(vfloat table, vint index) {
#ifdef __AVX512F__
  return (vfloat)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#else
  vfloat out;
  for (int i = 0; i < LANES; i++) out[i] = table[index[i] & (LANES - 1)];
  return out;
#endif
}

// round half to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits
static inline vint round_to_int(vfloat x) { return as_int(x + 12582912.0f) - 0x4b400000; }

static inline vfloat clamped(vfloat x) { return min(max(x, splat(-127.0f)), splat(127.0f)); }

// uint8 with zero point 128, from a value in units of its scale
static inline vbyte quantized(vfloat x) {
  vint q = round_to_int(clamped(x)) + 128;
  return __builtin_convertvector(q, vbyte);
}

template <int N>
static inline vfloat horner(const float (&c)[N], vfloat x) {
  vfloat y = splat(c[N - 1]);
  for (int i = N - 2; i >= 0; i--) y = y * x + c[i];
  return y;
}

static inline vfloat exp(vfloat x) {
  x = x < -87.0f ? splat(-87.0f) : x;  // these two keep NaN
  x = x > 88.0f ? splat(88.0f) : x;
  vint n = round_to_int(x * 1.44269504f);
  // ln 2 in two parts, so that the difference is exact
  vfloat r = (x - to_float(n) * 0.693359375f) + to_float(n) * 2.12194440e-4f;
  static const float taylor[] = {1.0f,      1.0f,       0.5f,       1 / 6.0f,
                                 1 / 24.0f, 1 / 120.0f, 1 / 720.0f, 1 / 5040.0f};
  return horner(taylor, r) * as_float((n + 127) << 23);
}

static inline vfloat sigmoid(vfloat x) { return 1.0f / (1.0f + exp(-x)); }

// x Phi(x); Phi(x) - 1/2 as x P(x^2) / Q(x^2), fitted on |x| <= 5.5, off by at most 2e-8 in exact
// arithmetic; beyond, Phi is 0 or 1 in float32
static inline vfloat gelu(vfloat x) {
  static const float p[] = {0.398942155f,    0.035921915f,     0.00450914377f, 0.00017037028f,
                            3.24100442e-06f, -2.20821079e-08f, 1.1175682e-10f};
  static const float q[] = {1.0f, 0.25670746f, 0.0290913176f, 0.00183062402f, 6.23251155e-05f};
  vfloat z = min(max(x, splat(-5.5f)), splat(5.5f)), s = z * z;
  vfloat phi = 0.5f + z * horner(p, s) / horner(q, s);
  // the comparisons above lose a NaN; x does not
  return x * min(max(phi, splat(0.0f)), splat(1.0f));
}

static inline vfloat gelu_tanh(vfloat x) {
  return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
}

static inline vfloat activate(vfloat x, int activation) {
  switch (activation) {
    case GELU: return gelu(x);
    case GELU_TANH: return gelu_tanh(x);
    case SILU: return x * sigmoid(x);
    case RELU: return x < 0.0f ? splat(0.0f) : x;  // keeps NaN
  }
  return x;
}
