// Products with dense weights for CPU: y[t][n] = sum over k of x[t][k] * w[n][k], weights as the checkpoint has them.
//
// The sum runs in 16 lanes (k mod 16) over pieces of kDepth, each folded by one fixed tree; the folded pieces are added
// in their order. That order depends on K alone: a row of y is the same bit for bit whatever other rows are computed.

#include <string>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

constexpr int kDepth = 512;     // k of a piece
constexpr int kOutputs = 32;    // rows of w that one item of work takes
constexpr int kTokens = 128;    // rows of x that one item of work takes
constexpr int kInFirstCache = 8;  // rows of w that stay in the first-level cache while all tokens pass by
constexpr int kParts = 16 / kLanes;

// Rows of x and of w whose products are summed in registers together: 16 sums for the widest vectors.
constexpr int kTileT = kLanes == 16 ? 4 : kLanes == 1 ? 1 : 2;
constexpr int kTileN = kLanes == 16 ? 4 : kLanes == 1 ? 1 : 2;
constexpr int kTileOfOne = kLanes == 16 ? 16 : kTileN;  // rows of w for a single row of x

// Lane i + 8 is added to lane i, then i + 4, i + 2, i + 1.
inline float fold(const Vec (&parts)[kParts]) {
  float lanes[16];
  for (int i = 0; i < kParts; i++) store(lanes + i * kLanes, parts[i]);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

#if defined(JAXSERVE_AVX512)
// The same folds of 16 vectors side by side: element 4 i + p of the result is the fold of s[i][p].
inline __m512 fold16(const __m512 (&s)[4][4]) {
  __m512 w[4];
#pragma GCC unroll 4
  for (int p = 0; p < 4; p++) {
    const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(s[0][p], s[1][p], 0x44),
                                   _mm512_shuffle_f32x4(s[0][p], s[1][p], 0xee));
    const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(s[2][p], s[3][p], 0x44),
                                   _mm512_shuffle_f32x4(s[2][p], s[3][p], 0xee));
    w[p] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  const auto pairs = [](__m512 a, __m512 b) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  };
  const __m512 g = pairs(w[0], w[1]), h = pairs(w[2], w[3]);
  return _mm512_add_ps(_mm512_shuffle_ps(g, h, 0x88), _mm512_shuffle_ps(g, h, 0xdd));
}
#endif

// y[t][n] += folded products of `tokens` rows of x and `outputs` rows of w over k in [0, depth), depth a multiple of 16.
template <int tokens, int outputs>
inline void tile(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t depth, float* y,
                 int64_t y_stride) {
#if defined(JAXSERVE_AVX512)
  if constexpr (tokens * outputs == 16) {
    __m512 sum[4][4];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) sum[i / 4][i % 4] = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k += 16) {
      __m512 weight[4];
      if constexpr (tokens == 4) {
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) weight[n] = _mm512_loadu_ps(w + n * w_stride + k);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const __m512 value = _mm512_loadu_ps(tokens == 4 ? x + i * x_stride + k : x + k);
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) {
          const __m512 one = tokens == 4 ? weight[n] : _mm512_loadu_ps(w + (4 * i + n) * w_stride + k);
          sum[i][n] = _mm512_fmadd_ps(value, one, sum[i][n]);
        }
      }
    }
    const __m512 folded = fold16(sum);
    if constexpr (tokens == 1) {
      _mm512_storeu_ps(y, _mm512_add_ps(_mm512_loadu_ps(y), folded));
    } else {
      alignas(64) float rows[16];
      _mm512_store_ps(rows, folded);
      for (int t = 0; t < 4; t++) {
        float* to = y + t * y_stride;
        _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), _mm_load_ps(rows + 4 * t)));
      }
    }
    return;
  }
#endif
  Vec sum[tokens][outputs][kParts];
  for (auto& row : sum) {
    for (auto& one : row) {
      for (Vec& part : one) part = splat(0.0f);
    }
  }
  for (int64_t k = 0; k < depth; k += 16) {
    for (int p = 0; p < kParts; p++) {
      Vec weight[outputs];
      for (int n = 0; n < outputs; n++) weight[n] = load(w + n * w_stride + k + p * kLanes);
      for (int t = 0; t < tokens; t++) {
        const Vec value = load(x + t * x_stride + k + p * kLanes);
        for (int n = 0; n < outputs; n++) sum[t][n][p] = fma(value, weight[n], sum[t][n][p]);
      }
    }
  }
  for (int t = 0; t < tokens; t++) {
    for (int n = 0; n < outputs; n++) y[t * y_stride + n] += fold(sum[t][n]);
  }
}

template <int tokens, int step>
inline void tiles_of(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t outputs,
                     int64_t depth, float* y, int64_t y_stride) {
  int64_t n = 0;
  for (; n + step <= outputs; n += step) {
    tile<tokens, step>(x, x_stride, w + n * w_stride, w_stride, depth, y + n, y_stride);
  }
  for (; n < outputs; n++) tile<tokens, 1>(x, x_stride, w + n * w_stride, w_stride, depth, y + n, y_stride);
}

// Rows of `from` as floats, each followed by zeros up to `padded`.
template <class T>
void unpack(const T* from, int64_t stride, int64_t rows, int64_t count, int64_t padded, float* to) {
  for (int64_t r = 0; r < rows; r++) to_floats(from + r * stride, count, padded, to + r * padded);
}

// y[t][n] += folded products over one piece, for all rows of x and of w.
void add_piece(const float* x, int64_t x_stride, int64_t tokens, const float* w, int64_t w_stride, int64_t outputs,
               int64_t depth, float* y, int64_t y_stride) {
  const int64_t whole = kTileT > 1 ? tokens / kTileT * kTileT : 0;
  for (int64_t n = 0; whole && n < outputs; n += kInFirstCache) {
    const int64_t count = std::min<int64_t>(kInFirstCache, outputs - n);
    for (int64_t r = n + count; r < std::min(n + 2 * kInFirstCache, outputs); r++) {  // come while these are used
      for (int64_t k = 0; k < depth; k += 16) __builtin_prefetch(w + r * w_stride + k);
    }
    for (int64_t t = 0; t < whole; t += kTileT) {
      tiles_of<kTileT, kTileN>(x + t * x_stride, x_stride, w + n * w_stride, w_stride, count, depth,
                               y + t * y_stride + n, y_stride);
    }
  }
  for (int64_t t = whole; t < tokens; t++) {
    tiles_of<1, kTileOfOne>(x + t * x_stride, x_stride, w, w_stride, outputs, depth, y + t * y_stride, y_stride);
  }
}

// One item of work: sums on y, which holds zeros.
template <class W>
void block(const float* x, int64_t x_stride, int64_t tokens, const W* w, int64_t depth, int64_t outputs, float* y,
           int64_t y_stride) {
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t piece = std::min<int64_t>(kDepth, depth - k), padded = (piece + 15) / 16 * 16;
    if constexpr (std::is_same_v<W, float>) {
      if (padded == piece) {
        add_piece(x + k, x_stride, tokens, w + k, depth, outputs, padded, y, y_stride);
        continue;
      }
    }
    float* copy = scratch(kOutputs * kDepth);
    unpack(w + k, depth, outputs, piece, padded, copy);
    add_piece(x + k, x_stride, tokens, copy, padded, outputs, padded, y, y_stride);
  }
}

template <class X, class W, class Y>
void run(ffi::ThreadPool& pool, const X* x, const W* w, Y* y, int64_t tokens, int64_t depth, int64_t outputs) {
  // x as floats whose rows are whole vectors
  const int64_t padded = (depth + 15) / 16 * 16;
  const float* rows;
  std::vector<float> copy;
  if constexpr (std::is_same_v<X, float>) rows = x;
  if (!std::is_same_v<X, float> || padded != depth) {
    copy.resize(tokens * padded);
    unpack(x, depth, tokens, depth, padded, copy.data());
    rows = copy.data();
  }
  const int64_t n_blocks = (outputs + kOutputs - 1) / kOutputs, t_blocks = (tokens + kTokens - 1) / kTokens;
  parallel_for(pool, n_blocks * t_blocks, [&](int64_t item) {
    const int64_t n = item / t_blocks * kOutputs, t = item % t_blocks * kTokens;
    const int64_t count_n = std::min<int64_t>(kOutputs, outputs - n), count_t = std::min<int64_t>(kTokens, tokens - t);
    float sums[kTokens * kOutputs];
    std::fill(sums, sums + count_t * kOutputs, 0.0f);
    block(rows + t * padded, padded, count_t, w + n * depth, depth, count_n, sums, kOutputs);
    for (int64_t i = 0; i < count_t; i++) {
      for (int64_t j = 0; j < count_n; j++) from_float(sums[i * kOutputs + j], y + (t + i) * outputs + n + j);
    }
  });
}

template <class X, class W>
ffi::Error with_result_type(ffi::ThreadPool& pool, const X* x, const W* w, ffi::AnyBuffer y, int64_t tokens,
                            int64_t depth, int64_t outputs) {
  switch (y.element_type()) {
    case ffi::DataType::F32:
      run(pool, x, w, static_cast<float*>(y.untyped_data()), tokens, depth, outputs);
      return ffi::Error::Success();
    case ffi::DataType::BF16:
      run(pool, x, w, static_cast<bf16*>(y.untyped_data()), tokens, depth, outputs);
      return ffi::Error::Success();
    default: return ffi::Error::InvalidArgument("linear: the result must be float32 or bfloat16");
  }
}

template <class X>
ffi::Error with_weight_type(ffi::ThreadPool& pool, const X* x, ffi::AnyBuffer w, ffi::AnyBuffer y, int64_t tokens,
                            int64_t depth, int64_t outputs) {
  const void* data = w.untyped_data();
  switch (w.element_type()) {
    case ffi::DataType::F32:
      return with_result_type(pool, x, static_cast<const float*>(data), y, tokens, depth, outputs);
    case ffi::DataType::BF16:
      return with_result_type(pool, x, static_cast<const bf16*>(data), y, tokens, depth, outputs);
    case ffi::DataType::F16:
      return with_result_type(pool, x, static_cast<const f16*>(data), y, tokens, depth, outputs);
    default: return ffi::Error::InvalidArgument("linear: weights must be float32, bfloat16 or float16");
  }
}

ffi::Error linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> y) {
  const auto xs = x.dimensions(), ws = w.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ws.size() != 2 || ys.size() != 2 || xs[1] != ws[1] || ys[0] != xs[0] || ys[1] != ws[0]) {
    return ffi::Error::InvalidArgument("linear: x must be [T, K], w [N, K] and the result [T, N]");
  }
  switch (x.element_type()) {
    case ffi::DataType::F32:
      return with_weight_type(pool, static_cast<const float*>(x.untyped_data()), w, *y, xs[0], xs[1], ws[0]);
    case ffi::DataType::BF16:
      return with_weight_type(pool, static_cast<const bf16*>(x.untyped_data()), w, *y, xs[0], xs[1], ws[0]);
    default: return ffi::Error::InvalidArgument("linear: x must be float32 or bfloat16");
  }
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_linear, jaxserve::linear,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());
