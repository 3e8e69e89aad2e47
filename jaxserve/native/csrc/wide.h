// Sixteen lanes at once, whatever the vector width: floats, whole numbers, and the 64 bytes that four steps of a dot
// product take for 16 rows. Whole-number sums are exact and float operations round alike, so results do not depend on
// the instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace jaxserve {

constexpr int kVecs = 16 / kLanes;

struct Floats {
  Vec v[kVecs];
};
inline Floats splat16(float x) {
  Floats y;
  for (Vec& v : y.v) v = splat(x);
  return y;
}
template <class T>
Floats load16(const T* p) {
  Floats y;
  for (int i = 0; i < kVecs; i++) y.v[i] = load(p + i * kLanes);
  return y;
}
inline void store16(float* p, Floats a) {
  for (int i = 0; i < kVecs; i++) store(p + i * kLanes, a.v[i]);
}
inline Floats add(Floats a, Floats b) {
  for (int i = 0; i < kVecs; i++) a.v[i] = add(a.v[i], b.v[i]);
  return a;
}
inline Floats mul(Floats a, Floats b) {
  for (int i = 0; i < kVecs; i++) a.v[i] = mul(a.v[i], b.v[i]);
  return a;
}
inline Floats sub(Floats a, Floats b) {
  for (int i = 0; i < kVecs; i++) a.v[i] = sub(a.v[i], b.v[i]);
  return a;
}
inline Floats max(Floats a, Floats b) {
  for (int i = 0; i < kVecs; i++) a.v[i] = max(a.v[i], b.v[i]);
  return a;
}
inline Floats fma(Floats a, Floats b, Floats c) {  // a * b + c
  for (int i = 0; i < kVecs; i++) c.v[i] = fma(a.v[i], b.v[i], c.v[i]);
  return c;
}
inline Floats magnitude(Floats a) { return max(a, sub(splat16(0.0f), a)); }
inline float highest(Floats a) {
  Vec most = a.v[0];
  for (int i = 1; i < kVecs; i++) most = max(most, a.v[i]);
  return highest(most);
}
inline bool any_above(Floats a, float limit) {  // or a NaN
  bool found = false;
  for (const Vec& v : a.v) found = found || any_above(v, splat(limit));
  return found;
}
inline float total(Floats a) {  // in any order: for sums that are exact
  Vec sum = a.v[0];
  for (int i = 1; i < kVecs; i++) sum = add(sum, a.v[i]);
  return total(sum);
}

// Bytes: 64 unsigned ones, those of row r at 4 r. Ints: 16 whole numbers of 32 bits.
//   low4, high4     the halves of each byte
//   pair<s>         bits 2 s and 2 s + 1 of each byte
//   with_bit<j, v>  u, plus v where bit j of `plane` is set
//   with_pair       u, plus 16 times two bits
//   lookup          table[u], u < 16
//   widen           16 bytes, signed or not, as whole numbers; widen_halves: their halves
//   from_bytes      the same as floats; from_nibbles
//   store_bytes     16 whole numbers from -128 to 127, given as floats, as bytes
//   bits_as_floats  the floats whose bits the whole numbers are
//   to_ints         the nearest whole numbers, ties to even, of floats from -2^16 to 2^16
//   power_of_two    2^(e - 127), e from 1 to 254; of 0 it is 0, of 255 and -1 infinite
//   dot<small>      sums of four products a row, u times the signed bytes at x; `small`: no u is above 127
//   as_factor       whole numbers of 16 bits as what add_product multiplies by
//   add_product     sum + a * b, a of 16 bits, b as_factor
//   as_factors      two whole numbers of 16 bits as what add_products multiplies by
//   add_products    sum + a[0] * the first + a[1] * the second, for all rows

#if defined(JAXSERVE_AVX512)

struct Bytes {
  __m512i v;
};
struct Ints {
  __m512i v;
};
inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Bytes low4(Bytes b) { return {_mm512_and_si512(b.v, _mm512_set1_epi8(15))}; }
inline Bytes high4(Bytes b) { return {_mm512_and_si512(_mm512_srli_epi16(b.v, 4), _mm512_set1_epi8(15))}; }
template <int s>
Bytes pair(Bytes b) {
  return {_mm512_and_si512(_mm512_srli_epi16(b.v, 2 * s), _mm512_set1_epi8(3))};
}
template <int j, int value>
Bytes with_bit(Bytes u, Bytes plane) {
  const __mmask64 set = _mm512_test_epi8_mask(plane.v, _mm512_set1_epi8(static_cast<char>(1 << j)));
  return {_mm512_mask_add_epi8(u.v, set, u.v, _mm512_set1_epi8(value))};
}
inline Bytes with_pair(Bytes u, Bytes two) { return {_mm512_or_si512(u.v, _mm512_slli_epi16(two.v, 4))}; }
inline Bytes lookup(Bytes u, const uint8_t* table) {
  const __m512i t = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return {_mm512_shuffle_epi8(t, u.v)};
}
inline Ints splat_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
template <bool small>
Ints dot(Ints sum, Bytes u, const int8_t* x) {
#if defined(__AVX512VNNI__)  // compilers load and broadcast before it: twice the instructions
  asm("vpdpbusd %1%{1to16%}, %2, %0" : "+v"(sum.v) : "m"(*reinterpret_cast<const int8_t(*)[4]>(x)), "v"(u.v));
  return sum;
#else
  int32_t four;
  std::memcpy(&four, x, 4);
  const __m512i xs = _mm512_set1_epi32(four);
  const __m512i ones = _mm512_set1_epi16(1);
  if constexpr (small) return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(_mm512_maddubs_epi16(u.v, xs), ones))};
  const __m512i low = _mm512_madd_epi16(_mm512_maddubs_epi16(low4(u).v, xs), ones);  // 16 bits hold no more
  const __m512i high = _mm512_madd_epi16(_mm512_maddubs_epi16(high4(u).v, xs), ones);
  return {_mm512_add_epi32(sum.v, _mm512_add_epi32(low, _mm512_slli_epi32(high, 4)))};
#endif
}
inline Floats to_floats(Ints a) { return {{{_mm512_cvtepi32_ps(a.v)}}}; }
inline Floats bits_as_floats(Ints a) { return {{{_mm512_castsi512_ps(a.v)}}}; }
inline Ints widen(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Ints widen(const int8_t* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void widen_halves(const uint8_t* p, Ints& low, Ints& high) {
  const __m512i b = widen(p).v;
  low = {_mm512_and_si512(b, _mm512_set1_epi32(15))};
  high = {_mm512_srli_epi32(b, 4)};
}
inline Ints as_factor(Ints a) { return {_mm512_and_si512(a.v, _mm512_set1_epi32(0xffff))}; }
inline Ints add_product(Ints sum, Ints a, Ints b) {
#if defined(__AVX512VNNI__)  // compilers move the sum to another register and back
  asm("vpdpwssd %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
  return sum;
#else
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, b.v))};
#endif
}
inline Ints as_factors(Ints a, Ints b) { return {_mm512_or_si512(as_factor(a).v, _mm512_slli_epi32(b.v, 16))}; }
inline Ints add_products(Ints sum, const int16_t* a, Ints both) {
#if defined(__AVX512VNNI__)
  asm("vpdpwssd %1%{1to16%}, %2, %0" : "+v"(sum.v) : "m"(*reinterpret_cast<const int16_t(*)[2]>(a)), "v"(both.v));
  return sum;
#else
  int32_t two;
  std::memcpy(&two, a, 4);
  return add_product(sum, splat_int(two), both);
#endif
}
inline Ints to_ints(Floats a) { return {_mm512_cvtps_epi32(a.v[0].v)}; }
inline Floats power_of_two(Ints e) { return bits_as_floats({_mm512_slli_epi32(e.v, 23)}); }
inline void store_bytes(int8_t* p, Floats a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v[0].v)));
}

#elif defined(JAXSERVE_AVX2)

struct Bytes {
  __m256i v[2];
};
struct Ints {
  __m256i v[2];
};
inline __m256i shifted_and(__m256i a, int shift, char mask) {
  return _mm256_and_si256(_mm256_srli_epi16(a, shift), _mm256_set1_epi8(mask));
}
inline Bytes load_bytes(const uint8_t* p) {
  const auto* q = reinterpret_cast<const __m256i*>(p);
  return {{_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)}};
}
inline Bytes low4(Bytes b) { return {{shifted_and(b.v[0], 0, 15), shifted_and(b.v[1], 0, 15)}}; }
inline Bytes high4(Bytes b) { return {{shifted_and(b.v[0], 4, 15), shifted_and(b.v[1], 4, 15)}}; }
template <int s>
Bytes pair(Bytes b) {
  return {{shifted_and(b.v[0], 2 * s, 3), shifted_and(b.v[1], 2 * s, 3)}};
}
template <int j, int value>
Bytes with_bit(Bytes u, Bytes plane) {
  const __m256i bit = _mm256_set1_epi8(static_cast<char>(1 << j)), add = _mm256_set1_epi8(value);
  for (int i = 0; i < 2; i++) {
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(plane.v[i], bit), bit);
    u.v[i] = _mm256_add_epi8(u.v[i], _mm256_and_si256(set, add));
  }
  return u;
}
inline Bytes with_pair(Bytes u, Bytes two) {
  for (int i = 0; i < 2; i++) u.v[i] = _mm256_or_si256(u.v[i], _mm256_slli_epi16(two.v[i], 4));
  return u;
}
inline Bytes lookup(Bytes u, const uint8_t* table) {
  const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return {{_mm256_shuffle_epi8(t, u.v[0]), _mm256_shuffle_epi8(t, u.v[1])}};
}
inline Ints splat_int(int32_t x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
template <bool small>
Ints dot(Ints sum, Bytes u, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  const __m256i xs = _mm256_set1_epi32(four);
#if defined(__AVXVNNI__)
  for (int i = 0; i < 2; i++) sum.v[i] = _mm256_dpbusd_avx_epi32(sum.v[i], u.v[i], xs);
#else
  const __m256i ones = _mm256_set1_epi16(1);
  for (int i = 0; i < 2; i++) {
    if constexpr (small) {
      sum.v[i] = _mm256_add_epi32(sum.v[i], _mm256_madd_epi16(_mm256_maddubs_epi16(u.v[i], xs), ones));
    } else {  // in halves: 16 bits hold no more
      const __m256i low = _mm256_madd_epi16(_mm256_maddubs_epi16(shifted_and(u.v[i], 0, 15), xs), ones);
      const __m256i high = _mm256_madd_epi16(_mm256_maddubs_epi16(shifted_and(u.v[i], 4, 15), xs), ones);
      sum.v[i] = _mm256_add_epi32(sum.v[i], _mm256_add_epi32(low, _mm256_slli_epi32(high, 4)));
    }
  }
#endif
  return sum;
}
inline Floats to_floats(Ints a) { return {{{_mm256_cvtepi32_ps(a.v[0])}, {_mm256_cvtepi32_ps(a.v[1])}}}; }
inline Floats bits_as_floats(Ints a) { return {{{_mm256_castsi256_ps(a.v[0])}, {_mm256_castsi256_ps(a.v[1])}}}; }
inline Ints widen(const uint8_t* p) {
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {{_mm256_cvtepu8_epi32(b), _mm256_cvtepu8_epi32(_mm_srli_si128(b, 8))}};
}
inline Ints widen(const int8_t* p) {
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {{_mm256_cvtepi8_epi32(b), _mm256_cvtepi8_epi32(_mm_srli_si128(b, 8))}};
}
inline void widen_halves(const uint8_t* p, Ints& low, Ints& high) {
  const Ints b = widen(p);
  for (int i = 0; i < 2; i++) {
    low.v[i] = _mm256_and_si256(b.v[i], _mm256_set1_epi32(15));
    high.v[i] = _mm256_srli_epi32(b.v[i], 4);
  }
}
inline Ints as_factor(Ints a) {
  for (__m256i& v : a.v) v = _mm256_and_si256(v, _mm256_set1_epi32(0xffff));
  return a;
}
inline Ints add_product(Ints sum, Ints a, Ints b) {
  for (int i = 0; i < 2; i++) {
#if defined(__AVXVNNI__)
    sum.v[i] = _mm256_dpwssd_avx_epi32(sum.v[i], a.v[i], b.v[i]);
#else
    sum.v[i] = _mm256_add_epi32(sum.v[i], _mm256_madd_epi16(a.v[i], b.v[i]));
#endif
  }
  return sum;
}
inline Ints as_factors(Ints a, Ints b) {
  for (int i = 0; i < 2; i++) a.v[i] = _mm256_blend_epi16(a.v[i], _mm256_slli_epi32(b.v[i], 16), 0xaa);
  return a;
}
inline Ints add_products(Ints sum, const int16_t* a, Ints both) {
  int32_t two;
  std::memcpy(&two, a, 4);
  return add_product(sum, splat_int(two), both);
}
inline Ints to_ints(Floats a) { return {{_mm256_cvtps_epi32(a.v[0].v), _mm256_cvtps_epi32(a.v[1].v)}}; }
inline Floats power_of_two(Ints e) {
  for (__m256i& v : e.v) v = _mm256_slli_epi32(v, 23);
  return bits_as_floats(e);
}
inline void store_bytes(int8_t* p, Floats a) {
  const __m256i halves = _mm256_packs_epi32(_mm256_cvtps_epi32(a.v[0].v), _mm256_cvtps_epi32(a.v[1].v));
  const __m256i in_order = _mm256_permute4x64_epi64(halves, 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi16(_mm256_castsi256_si128(in_order), _mm256_extracti128_si256(in_order, 1)));
}

#elif defined(JAXSERVE_NEON)

struct Bytes {
  uint8x16_t v[4];
};
struct Ints {
  int32x4_t v[4];
};
inline Bytes load_bytes(const uint8_t* p) { return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}}; }
inline Bytes low4(Bytes b) {
  for (uint8x16_t& v : b.v) v = vandq_u8(v, vdupq_n_u8(15));
  return b;
}
inline Bytes high4(Bytes b) {
  for (uint8x16_t& v : b.v) v = vshrq_n_u8(v, 4);
  return b;
}
template <int s>
Bytes pair(Bytes b) {
  for (uint8x16_t& v : b.v) v = vandq_u8(vshlq_u8(v, vdupq_n_s8(-2 * s)), vdupq_n_u8(3));
  return b;
}
template <int j, int value>
Bytes with_bit(Bytes u, Bytes plane) {
  for (int i = 0; i < 4; i++) {
    const uint8x16_t set = vtstq_u8(plane.v[i], vdupq_n_u8(1 << j));
    u.v[i] = vaddq_u8(u.v[i], vandq_u8(set, vdupq_n_u8(value)));
  }
  return u;
}
inline Bytes with_pair(Bytes u, Bytes two) {
  for (int i = 0; i < 4; i++) u.v[i] = vorrq_u8(u.v[i], vshlq_n_u8(two.v[i], 4));
  return u;
}
inline Bytes lookup(Bytes u, const uint8_t* table) {
  for (uint8x16_t& v : u.v) v = vqtbl1q_u8(vld1q_u8(table), v);
  return u;
}
inline Ints splat_int(int32_t x) { return {{vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x)}}; }
template <bool small>
Ints dot(Ints sum, Bytes u, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
#if defined(__ARM_FEATURE_MATMUL_INT8)
  const int8x16_t xs = vreinterpretq_s8_s32(vdupq_n_s32(four));
  for (int i = 0; i < 4; i++) sum.v[i] = vusdotq_s32(sum.v[i], u.v[i], xs);
#elif defined(__ARM_FEATURE_DOTPROD)
  const int8x16_t xs = vreinterpretq_s8_s32(vdupq_n_s32(four));
  const int32x4_t shifted = vdupq_n_s32(small ? 0 : 128 * (x[0] + x[1] + x[2] + x[3]));
  const uint8x16_t shift = vdupq_n_u8(small ? 0 : 128);  // both factors have to be signed
  for (int i = 0; i < 4; i++) {
    sum.v[i] = vdotq_s32(vaddq_s32(sum.v[i], shifted), vreinterpretq_s8_u8(veorq_u8(u.v[i], shift)), xs);
  }
#else
  const int16x8_t xs = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
  for (int i = 0; i < 4; i++) {  // a product fits 16 bits: no x is -128
    const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(u.v[i])));
    const int16x8_t high = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(u.v[i])));
    const int32x4_t pairs = vpaddlq_s16(vmulq_s16(low, xs)), more = vpaddlq_s16(vmulq_s16(high, xs));
    sum.v[i] = vaddq_s32(sum.v[i], vpaddq_s32(pairs, more));
  }
#endif
  return sum;
}
inline Floats to_floats(Ints a) {
  Floats y;
  for (int i = 0; i < 4; i++) y.v[i] = {vcvtq_f32_s32(a.v[i])};
  return y;
}
inline Floats bits_as_floats(Ints a) {
  Floats y;
  for (int i = 0; i < 4; i++) y.v[i] = {vreinterpretq_f32_s32(a.v[i])};
  return y;
}
inline Ints widen(int16x8_t low, int16x8_t high) {
  return {{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)),
           vmovl_s16(vget_high_s16(high))}};
}
inline Ints widen(const int8_t* p) { return widen(vmovl_s8(vld1_s8(p)), vmovl_s8(vld1_s8(p + 8))); }
inline Ints widen(const uint8_t* p) {
  return widen(vreinterpretq_s16_u16(vmovl_u8(vld1_u8(p))), vreinterpretq_s16_u16(vmovl_u8(vld1_u8(p + 8))));
}
inline void widen_halves(const uint8_t* p, Ints& low, Ints& high) {
  const Ints b = widen(p);
  for (int i = 0; i < 4; i++) {
    low.v[i] = vandq_s32(b.v[i], vdupq_n_s32(15));
    high.v[i] = vshrq_n_s32(b.v[i], 4);
  }
}
inline Ints as_factor(Ints a) { return a; }
inline Ints add_product(Ints sum, Ints a, Ints b) {
  for (int i = 0; i < 4; i++) sum.v[i] = vmlaq_s32(sum.v[i], a.v[i], b.v[i]);
  return sum;
}
inline Ints as_factors(Ints a, Ints b) {
  for (int i = 0; i < 4; i++) a.v[i] = vsliq_n_s32(a.v[i], b.v[i], 16);
  return a;
}
inline Ints add_products(Ints sum, const int16_t* a, Ints both) {
  for (int i = 0; i < 4; i++) {
    const int32x4_t first = vshrq_n_s32(vshlq_n_s32(both.v[i], 16), 16);
    sum.v[i] = vmlaq_n_s32(vmlaq_n_s32(sum.v[i], first, a[0]), vshrq_n_s32(both.v[i], 16), a[1]);
  }
  return sum;
}
inline Ints to_ints(Floats a) {
  return {{vcvtnq_s32_f32(a.v[0].v), vcvtnq_s32_f32(a.v[1].v), vcvtnq_s32_f32(a.v[2].v), vcvtnq_s32_f32(a.v[3].v)}};
}
inline Floats power_of_two(Ints e) {
  for (int32x4_t& v : e.v) v = vshlq_n_s32(v, 23);
  return bits_as_floats(e);
}
inline void store_bytes(int8_t* p, Floats a) {
  int16x4_t whole[4];
  for (int i = 0; i < 4; i++) whole[i] = vmovn_s32(vcvtnq_s32_f32(a.v[i].v));
  vst1_s8(p, vmovn_s16(vcombine_s16(whole[0], whole[1])));
  vst1_s8(p + 8, vmovn_s16(vcombine_s16(whole[2], whole[3])));
}

#else  // no vectors

struct Bytes {
  uint8_t v[64];
};
struct Ints {
  int32_t v[16];
};
inline Bytes load_bytes(const uint8_t* p) {
  Bytes b;
  std::memcpy(b.v, p, 64);
  return b;
}
inline Bytes low4(Bytes b) {
  for (uint8_t& x : b.v) x &= 15;
  return b;
}
inline Bytes high4(Bytes b) {
  for (uint8_t& x : b.v) x >>= 4;
  return b;
}
template <int s>
Bytes pair(Bytes b) {
  for (uint8_t& x : b.v) x = x >> 2 * s & 3;
  return b;
}
template <int j, int value>
Bytes with_bit(Bytes u, Bytes plane) {
  for (int i = 0; i < 64; i++) u.v[i] = static_cast<uint8_t>(u.v[i] + (plane.v[i] >> j & 1) * value);
  return u;
}
inline Bytes with_pair(Bytes u, Bytes two) {
  for (int i = 0; i < 64; i++) u.v[i] = static_cast<uint8_t>(u.v[i] | two.v[i] << 4);
  return u;
}
inline Bytes lookup(Bytes u, const uint8_t* table) {
  for (uint8_t& x : u.v) x = table[x];
  return u;
}
inline Ints splat_int(int32_t x) {
  Ints a;
  for (int32_t& lane : a.v) lane = x;
  return a;
}
template <bool small>
Ints dot(Ints sum, Bytes u, const int8_t* x) {
  for (int r = 0; r < 16; r++) {
    for (int i = 0; i < 4; i++) sum.v[r] += u.v[4 * r + i] * x[i];
  }
  return sum;
}
inline Floats to_floats(Ints a) {
  float y[16];
  for (int i = 0; i < 16; i++) y[i] = static_cast<float>(a.v[i]);
  return load16(y);
}
inline Floats bits_as_floats(Ints a) {
  float y[16];
  std::memcpy(y, a.v, sizeof y);
  return load16(y);
}
template <class T>
Ints widen(const T* p) {
  Ints a;
  for (int i = 0; i < 16; i++) a.v[i] = p[i];
  return a;
}
inline void widen_halves(const uint8_t* p, Ints& low, Ints& high) {
  for (int i = 0; i < 16; i++) {
    low.v[i] = p[i] & 15;
    high.v[i] = p[i] >> 4;
  }
}
inline Ints as_factor(Ints a) { return a; }
inline Ints add_product(Ints sum, Ints a, Ints b) {
  for (int i = 0; i < 16; i++) sum.v[i] += a.v[i] * b.v[i];
  return sum;
}
inline Ints as_factors(Ints a, Ints b) {
  for (int i = 0; i < 16; i++) {
    a.v[i] = static_cast<int32_t>((static_cast<uint32_t>(a.v[i]) & 0xffff) | static_cast<uint32_t>(b.v[i]) << 16);
  }
  return a;
}
inline Ints add_products(Ints sum, const int16_t* a, Ints both) {
  for (int i = 0; i < 16; i++) {
    sum.v[i] += a[0] * static_cast<int16_t>(both.v[i]) + a[1] * (both.v[i] >> 16);
  }
  return sum;
}
inline Ints to_ints(Floats a) {
  float y[16];
  Ints n;
  store16(y, add(a, splat16(kMagic)));
  std::memcpy(n.v, y, sizeof y);
  for (int32_t& lane : n.v) {
    lane = static_cast<int32_t>(static_cast<uint32_t>(lane) - kMagicBits);
    if (lane < -65536 || lane > 65536) lane = 0;
  }
  return n;
}
inline Floats power_of_two(Ints e) {
  for (int32_t& lane : e.v) lane = static_cast<int32_t>(static_cast<uint32_t>(lane) << 23);
  return bits_as_floats(e);
}
inline void store_bytes(int8_t* p, Floats a) {
  float whole[16];
  store16(whole, a);
  for (int i = 0; i < 16; i++) p[i] = static_cast<int8_t>(whole[i]);
}

#endif

template <class T>
Floats from_bytes(const T* p) {
  return to_floats(widen(p));
}
inline void from_nibbles(const uint8_t* p, Floats& low, Floats& high) {
  Ints a, b;
  widen_halves(p, a, b);
  low = to_floats(a);
  high = to_floats(b);
}

}  // namespace jaxserve
