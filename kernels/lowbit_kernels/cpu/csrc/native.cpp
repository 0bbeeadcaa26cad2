// The functions that Python calls through ctypes; one translation unit.
#include <omp.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "attention.h"
#include "attention_backward.h"
#include "few_rows.h"
#include "frames.h"
#include "matmul.h"
#include "norm.h"
#include "rows.h"
#include "weight.h"

extern "C" int has_int8_matmul() {
#ifdef __AVX512VNNI__
  return 1;
#else
  return 0;
#endif
}

// ask for large pages under fresh memory: faulting it in by small ones costs more than using it
extern "C" void advise_large_pages(char* start, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = 4096;
  uintptr_t first = ((uintptr_t)start + page - 1) / page * page;
  uintptr_t end = ((uintptr_t)start + bytes) / page * page;
  if (end > first) madvise((void*)first, end - first, MADV_HUGEPAGE);
#endif
}

// start: int32 [panels * 48], what cancels A's zero point: -128 times the sum of a column
extern "C" void matmul_int8(const Matmul* p, const int8_t* panels, const int32_t* start) {
  int64_t count = p->groups * ((p->N + PANEL - 1) / PANEL);
  matmul_panels<ByteArithmetic>(*p, panels, start, 0, count);
}

// the weight is unpacked a few panels at a time, into a buffer that stays in the caches
extern "C" int matmul_float(const Matmul* p, const PackedWeight* weight) {
  int64_t count = p->groups * ((p->N + PANEL - 1) / PANEL), size = p->K * PANEL;
  int64_t block = (4 << 20) / (size * 4);
  if (block < 2 * p->threads) block = 2 * p->threads;
  if (block > count) block = count;
  float* panels = (float*)aligned_alloc(64, block * size * 4);
  if (!panels) return 1;
  for (int64_t first = 0; first < count; first += block) {
    int64_t now = count - first < block ? count - first : block;
#pragma omp parallel for schedule(dynamic) num_threads(p->threads)
    for (int64_t i = 0; i < now; i++) unpack_panel(*weight, *p, first + i, panels + i * size);
    matmul_panels<FloatArithmetic>(*p, panels, nullptr, first, now);
  }
  free(panels);
  return 0;
}

// the same for at most FEW_ROWS rows and one group
extern "C" int matmul_few_rows(const Matmul* p, const PackedWeight* weight) {
  return !few_rows(*p, *weight);
}

// each row [columns] to uint8 with zero point 128, by its scale or, with `own`, by one found here
static void quantize_rows(const float* x, int64_t rows, int64_t columns, int64_t own,
                              uint8_t* q, float* scale, int64_t threads) {
#pragma omp parallel for num_threads(threads_worth(threads, rows * columns))
  for (int64_t r = 0; r < rows; r++) {
    if (own) scale[r] = scale_of(largest_of(x + r * columns, columns));
    quantize_row(x + r * columns, columns, scale[r], nullptr, q + r * columns);
  }
}

// A is float; its rows are quantized first, by row_scale or, where that is null, each by its own
extern "C" int linear_int8(const Matmul* args, const int8_t* panels, const int32_t* start) {
  Matmul p = *args;
  int64_t bytes = (p.M * p.K + 127) / 64 * 64;  // tiles read whole words
  uint8_t* q = (uint8_t*)aligned_alloc(64, bytes + (p.M * 4 + 63) / 64 * 64);
  if (!q) return 1;
  float* scale = p.row_scale ? (float*)p.row_scale : (float*)(q + bytes);
  quantize_rows((const float*)p.a, p.M, p.K, !p.row_scale, q, scale, p.threads);
  p.a = q, p.row_scale = scale;
  matmul_int8(&p, panels, start);
  free(q);
  return 0;
}

// one scale for all rows
extern "C" void shared_scale(const float* x, int64_t rows, int64_t columns, float* scale,
                             int64_t threads) {
  int32_t largest = 0;
#pragma omp parallel for num_threads(threads_worth(threads, rows * columns / LANES)) reduction(max : largest)
  for (int64_t r = 0; r < rows; r++) {
    int32_t here = largest_of(x + r * columns, columns);
    largest = here > largest ? here : largest;
  }
  *scale = scale_of(largest);
}

// frames [frames, groups * channels] to padded planes [groups, left + frames + right, channels] by
// one scale, less offset [groups * channels] or null; frames from `valid` on and the padding become
// zero
extern "C" void quantize_frames(const float* x, int64_t frames, int64_t valid, int64_t groups,
                                int64_t channels, int64_t left, int64_t right,
                                const float* scale, const float* offset, uint8_t* q,
                                int64_t threads) {
  int64_t padded = left + frames + right;
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < padded; i++)
    for (int64_t g = 0; g < groups; g++) {
      uint8_t* out = q + (g * padded + i) * channels;
      if (i < left || i >= left + valid)
        memset(out, 128, channels);
      else
        quantize_row(x + ((i - left) * groups + g) * channels, channels, *scale,
                     offset ? offset + g * channels : nullptr, out);
    }
}

extern "C" int depthwise(const Depthwise* args) {
  const Depthwise& p = *args;
  int64_t size = depthwise_frames(p) * DEPTHWISE_CHANNELS;
  float* buffers = (float*)aligned_alloc(64, p.threads * size * 4);
  if (!buffers) return 1;
#pragma omp parallel for schedule(dynamic) num_threads(p.threads)
  for (int64_t c = 0; c < p.channels; c += DEPTHWISE_CHANNELS)
    depthwise_channels(p, c, buffers + omp_get_thread_num() * size);
  free(buffers);
  return 0;
}

extern "C" int first_conv(const FirstConv* conv, const RowFinish* finish) {
  int64_t size = FIRST_ROWS * finish->channels;
  float* buffers = (float*)aligned_alloc(64, (finish->threads * size * 4 + 63) / 64 * 64);
  if (!buffers) return 1;
  int32_t largest = 0;
#pragma omp parallel for num_threads(finish->threads) reduction(max : largest)
  for (int64_t t = 0; t < conv->frames; t += FIRST_ROWS) {
    float* buffer = buffers + omp_get_thread_num() * size;
    int64_t rows = conv->frames - t < FIRST_ROWS ? conv->frames - t : FIRST_ROWS;
    first_conv_rows(*conv, finish->channels, t, rows, buffer);
    for (int64_t r = 0; r < rows; r++) {
      int32_t here = finish_row(*finish, buffer + r * finish->channels, t + r);
      largest = here > largest ? here : largest;
    }
  }
  if (finish->largest) raise_to(finish->largest, largest);
  free(buffers);
  return 0;
}

// x [rows, channels] is changed, and may be where the results go
extern "C" void finish_rows(float* x, int64_t rows, const RowFinish* finish) {
  int32_t largest = 0;
#pragma omp parallel for num_threads(finish->threads) reduction(max : largest)
  for (int64_t r = 0; r < rows; r++) {
    int32_t here = finish_row(*finish, x + r * finish->channels, r);
    largest = here > largest ? here : largest;
  }
  if (finish->largest) raise_to(finish->largest, largest);
}

// x [rows, 2 * columns] to out [rows, columns]
extern "C" void glu(const float* x, int64_t rows, int64_t columns, const float* residual, float* out,
                    int64_t threads) {
#pragma omp parallel for num_threads(threads_worth(threads, 4 * rows * columns))
  for (int64_t r = 0; r < rows; r++)
    glu_row(x + r * 2 * columns, columns, residual ? residual + r * columns : nullptr,
            out + r * columns);
}

extern "C" int attention(const Attention* args) {
  const Attention& p = *args;
  int64_t panels = (p.T + PANEL - 1) / PANEL, head = panels * PANEL * p.D;
  int64_t scores = TILE_ROWS * panels * PANEL, queries = TILE_ROWS * ((p.D + LANES - 1) / LANES * LANES);
  float* keys = (float*)aligned_alloc(64, p.B * p.H * head * 4);
  float* buffers = (float*)aligned_alloc(64, p.threads * (scores + queries) * 4);
  if (keys && buffers) {
#pragma omp parallel for collapse(2) num_threads(p.threads)
    for (int64_t n = 0; n < p.B * p.H; n++)
      for (int64_t i = 0; i < panels; i++)
        pack_keys(p.k + n / p.H * p.k_strides[0] + n % p.H * p.k_strides[1], p.k_strides[2], i * PANEL,
                  p.T, p.D, keys + n * head + i * PANEL * p.D);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(p.threads)
    for (int64_t n = 0; n < p.B * p.H; n++)
      for (int64_t block = 0; block < p.T; block += QUERY_BLOCK) {
        int64_t b = n / p.H, end = block + QUERY_BLOCK < p.T ? block + QUERY_BLOCK : p.T;
        int64_t length = p.lengths && p.lengths[b] < p.T ? p.lengths[b] : p.T;
        float* buffer = buffers + omp_get_thread_num() * (scores + queries);
        for (int64_t t = block; t < end; t += TILE_ROWS)
          attend_rows(p, b, n % p.H, t, length, keys + n * head, buffer + scores, buffer);
      }
  }
  int failed = !keys || !buffers;
  free(keys);
  free(buffers);
  return failed;
}

extern "C" int attention_backward(const AttentionGradient* args) {
  const AttentionGradient& g = *args;
  const Attention& p = g.forward;
  int64_t size = (gradient_buffer(p) + LANES - 1) / LANES * LANES;
  float* buffers = (float*)aligned_alloc(64, p.threads * size * 4);
  if (!buffers) return 1;
  // heads that share a bias's gradient add to it one after the other
  int64_t batches = g.dbias ? g.bias_sizes[0] : p.B, heads = g.dbias ? g.bias_sizes[1] : p.H;
#pragma omp parallel for schedule(dynamic) num_threads(p.threads)
  for (int64_t n = 0; n < batches * heads; n++)
    for (int64_t b = n / heads; b < p.B; b += batches)
      for (int64_t h = n % heads; h < p.H; h += heads)
        HeadGradient(g, b, h, buffers + omp_get_thread_num() * size).run();
  free(buffers);
  return 0;
}

extern "C" void group_norm(const GroupNorm* args) {
  const GroupNorm& p = *args;
#pragma omp parallel for schedule(dynamic) num_threads(p.threads)
  for (int64_t n = 0; n < p.B * p.groups; n++) {
    if (p.grad)
      group_norm_backward(p, n / p.groups, n % p.groups);
    else
      group_norm_forward(p, n / p.groups, n % p.groups);
  }
}

extern "C" int norm_quantize(const NormQuantize* args) {
  const NormQuantize& p = *args;
  int64_t size = (p.columns + LANES - 1) / LANES * LANES;
  float* buffers = (float*)aligned_alloc(64, p.threads * size * 4);
  if (!buffers) return 1;
#pragma omp parallel for num_threads(p.threads) if (p.rows > 8)
  for (int64_t r = 0; r < p.rows; r++)
    norm_quantize_row(p, r, buffers + omp_get_thread_num() * size);
  free(buffers);
  return 0;
}
