// One vector of floats, as wide as the instruction set that this file is compiled for; the rest of the code is the same
// for all. Every operation rounds alike on all of them, so results do not depend on the width.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(JAXSERVE_SCALAR)  // no vectors: the oracle of the others
#elif defined(__AVX512F__)
#define JAXSERVE_AVX512
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__)
#define JAXSERVE_AVX2
#include <immintrin.h>
#elif defined(__ARM_NEON)
#define JAXSERVE_NEON
#include <arm_neon.h>
#endif

namespace jaxserve {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
#if defined(__aarch64__)
using half = __fp16;
#else
using half = _Float16;
#endif

// 1.5 * 2^23: adding it rounds to a whole number, ties to even. kMagic + n is the float of the bits kMagicBits + n, for
// any whole |n| < 2^22.
constexpr float kMagic = 12582912.0f;
constexpr int32_t kMagicBits = 0x4b400000;

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float to_float(f16 x) {
  half y;
  std::memcpy(&y, &x, 2);
  return static_cast<float>(y);
}

inline void from_float(float x, float* y) { *y = x; }
inline void from_float(float x, bf16* y) {  // to nearest, ties to even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  y->bits = x != x ? uint16_t((bits >> 16) | 0x40) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void from_float(float x, f16* y) {
  const half h = static_cast<half>(x);
  std::memcpy(y, &h, 2);
}

#if defined(JAXSERVE_AVX512)

constexpr int kLanes = 16;
struct Vec {
  __m512 v;
};
inline Vec splat(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline Vec load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline Vec load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(f16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline float highest(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline float total(Vec a) { return _mm512_reduce_add_ps(a.v); }  // in any order: for sums that are exact
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // b, if one is a NaN
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
inline Vec zero_where_below(Vec x, Vec limit, Vec y) {  // y, or 0 where x < limit
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_NLT_UQ), y.v)};
}
inline bool any_above(Vec x, Vec limit) {  // whether any is above its limit, or a NaN
  return _mm512_cmp_ps_mask(x.v, limit.v, _CMP_NLE_UQ) != 0;
}
inline Vec times_power_of_two(Vec a, Vec n) {  // a * 2^n for whole n, where no result is subnormal
  return {_mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_slli_epi32(_mm512_cvtps_epi32(n.v), 23)))};
}

#if defined(__AVX512BF16__)
#define JAXSERVE_PAIRS
// Two steps of k, whose products are added to one sum: c + a.odd * b.odd + a.even * b.even.
struct Pair {
  bf16 even, odd;
};
struct Pairs {
  __m512bh v;
};
inline Pairs splat(Pair x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return {reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits))};
}
inline Pairs load(const Pair* p) { return {reinterpret_cast<__m512bh>(_mm512_loadu_si512(p))}; }
inline Vec fma(Pairs a, Pairs b, Vec c) { return {_mm512_dpbf16_ps(c.v, a.v, b.v)}; }
#endif

#elif defined(JAXSERVE_AVX2)

constexpr int kLanes = 8;
struct Vec {
  __m256 v;
};
inline Vec splat(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
inline Vec load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline Vec load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(f16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline float highest(Vec a) {
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
inline float total(Vec a) {
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec zero_where_below(Vec x, Vec limit, Vec y) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.v, limit.v, _CMP_NLT_UQ), y.v)};
}
inline bool any_above(Vec x, Vec limit) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x.v, limit.v, _CMP_NLE_UQ)) != 0;
}
inline Vec times_power_of_two(Vec a, Vec n) {
  return {_mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(a.v), _mm256_slli_epi32(_mm256_cvtps_epi32(n.v), 23)))};
}

#elif defined(JAXSERVE_NEON)

constexpr int kLanes = 4;
struct Vec {
  float32x4_t v;
};
inline Vec splat(float x) { return {vdupq_n_f32(x)}; }
inline Vec load(const float* p) { return {vld1q_f32(p)}; }
inline Vec load(const bf16* p) {
  return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16))};
}
inline Vec load(const f16* p) {
  return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))))};
}
inline Vec load(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  const int16x4_t wide = vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))));
  return {vcvtq_f32_s32(vmovl_s16(wide))};
}
inline void store(float* p, Vec a) { vst1q_f32(p, a.v); }
inline void store(f16* p, Vec a) { vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(a.v))); }
inline float highest(Vec a) { return vmaxvq_f32(a.v); }
inline float total(Vec a) { return vaddvq_f32(a.v); }
inline Vec add(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {vmaxq_f32(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {vminq_f32(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline Vec zero_where_below(Vec x, Vec limit, Vec y) {
  return {vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(y.v), vcltq_f32(x.v, limit.v)))};
}
inline bool any_above(Vec x, Vec limit) { return vminvq_u32(vcleq_f32(x.v, limit.v)) == 0; }
inline Vec times_power_of_two(Vec a, Vec n) {
  return {vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a.v), vshlq_n_s32(vcvtnq_s32_f32(n.v), 23)))};
}

#else

constexpr int kLanes = 1;
struct Vec {
  float v;
};
inline Vec splat(float x) { return {x}; }
template <class T>
Vec load(const T* p) {
  return {to_float(*p)};
}
inline void store(float* p, Vec a) { *p = a.v; }
inline void store(f16* p, Vec a) { from_float(a.v, p); }
inline float highest(Vec a) { return a.v; }
inline float total(Vec a) { return a.v; }
inline Vec add(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec div(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {std::fma(a.v, b.v, c.v)}; }
inline Vec zero_where_below(Vec x, Vec limit, Vec y) { return {x.v < limit.v ? 0.0f : y.v}; }
inline bool any_above(Vec x, Vec limit) { return !(x.v <= limit.v); }
inline Vec times_power_of_two(Vec a, Vec n) {
  int32_t bits;
  std::memcpy(&bits, &a.v, 4);
  bits += static_cast<int32_t>(std::lrint(n.v)) * (1 << 23);
  float y;
  std::memcpy(&y, &bits, 4);
  return {y};
}

#endif

// e^x as 2^n (1 + r q): Cody and Waite's reduction to |r| <= log(2)/2, then Taylor's polynomial of degree 7.
struct Exponential {
  Vec n, r, q;
};
inline Exponential exponential(Vec x) {
  const Vec magic = splat(kMagic);
  const Vec n = sub(fma(x, splat(1.44269504f), magic), magic);
  const Vec r = fma(n, splat(-1.42860677e-6f), fma(n, splat(-0.693145752f), x));
  Vec q = splat(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f}) q = fma(q, r, splat(c));
  return {n, r, q};
}

// e^x for x <= 0, relative error below 1e-6; below -86 it is 0, so that no result is subnormal. exp(0) is 1 exactly.
inline Vec exp_of_negative(Vec x) {
  const Vec limit = splat(-86.0f);
  const Exponential e = exponential(max(x, limit));
  return zero_where_below(x, limit, times_power_of_two(fma(e.q, e.r, splat(1.0f)), e.n));
}

// tanh x, relative error below 1e-6: with m = e^(-2|x|) - 1, whose digits small x keep, it is -m / (2 + m) under the sign
// of x. From |x| = 10 on it is 1.
inline Vec tanh(Vec x) {
  const Vec zero = splat(0.0f), minus = sub(zero, x);
  const Exponential e = exponential(max(mul(max(x, minus), splat(-2.0f)), splat(-20.0f)));
  const Vec power = times_power_of_two(splat(1.0f), e.n);
  const Vec m = fma(power, mul(e.q, e.r), sub(power, splat(1.0f)));
  const Vec y = div(sub(zero, m), add(splat(2.0f), m));
  return sub(zero_where_below(x, zero, y), zero_where_below(minus, zero, y));
}

// `count` numbers as floats, followed by zeros up to `padded`.
template <class T>
void to_floats(const T* from, int64_t count, int64_t padded, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; i++) to[i] = to_float(from[i]);
  for (; i < padded; i++) to[i] = 0.0f;
}

// columns[i * stride + t] = rows[t][i] for t < 16 and i < count, as floats.
template <class T>
void transpose16(const T* const* rows, int count, float* columns, int stride) {
  int i = 0;
#if defined(JAXSERVE_AVX512)
  for (; i + 16 <= count; i += 16) {
    __m512 a[16], b[16];
#pragma GCC unroll 16
    for (int t = 0; t < 16; t++) a[t] = load(rows[t] + i).v;
#pragma GCC unroll 8
    for (int t = 0; t < 16; t += 2) {
      b[t] = _mm512_unpacklo_ps(a[t], a[t + 1]);
      b[t + 1] = _mm512_unpackhi_ps(a[t], a[t + 1]);
    }
#pragma GCC unroll 4
    for (int t = 0; t < 16; t += 4) {
#pragma GCC unroll 2
      for (int u = 0; u < 2; u++) {
        const __m512d lo = _mm512_castps_pd(b[t + u]), hi = _mm512_castps_pd(b[t + 2 + u]);
        a[t + 2 * u] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
        a[t + 2 * u + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
      }
    }
    // a[4 g + c], lane group l: column 4 l + c of rows 4 g .. 4 g + 3
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
      const __m512 p = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x44), q = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x44);
      const __m512 r = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xee), s = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xee);
      float* out = columns + (i + c) * stride;
      _mm512_storeu_ps(out, _mm512_shuffle_f32x4(p, q, 0x88));
      _mm512_storeu_ps(out + 4 * stride, _mm512_shuffle_f32x4(p, q, 0xdd));
      _mm512_storeu_ps(out + 8 * stride, _mm512_shuffle_f32x4(r, s, 0x88));
      _mm512_storeu_ps(out + 12 * stride, _mm512_shuffle_f32x4(r, s, 0xdd));
    }
  }
#elif defined(JAXSERVE_AVX2)
  for (; i + 8 <= count; i += 8) {
    for (int half = 0; half < 16; half += 8) {
      __m256 a[8], b[8];
      for (int t = 0; t < 8; t++) a[t] = load(rows[half + t] + i).v;
      for (int t = 0; t < 8; t += 2) {
        b[t] = _mm256_unpacklo_ps(a[t], a[t + 1]);
        b[t + 1] = _mm256_unpackhi_ps(a[t], a[t + 1]);
      }
      for (int t = 0; t < 8; t += 4) {
        for (int u = 0; u < 2; u++) {
          const __m256d lo = _mm256_castps_pd(b[t + u]), hi = _mm256_castps_pd(b[t + 2 + u]);
          a[t + 2 * u] = _mm256_castpd_ps(_mm256_unpacklo_pd(lo, hi));
          a[t + 2 * u + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(lo, hi));
        }
      }
      for (int c = 0; c < 4; c++) {
        float* out = columns + (i + c) * stride + half;
        _mm256_storeu_ps(out, _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
        _mm256_storeu_ps(out + 4 * stride, _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
      }
    }
  }
#endif
  for (; i < count; i++) {
    for (int t = 0; t < 16; t++) columns[i * stride + t] = to_float(rows[t][i]);
  }
}

}  // namespace jaxserve
