// How weights of bfloat16 lie for processors that multiply them in pairs: two steps of k side by side.
//
// A panel [16][K] is [K / 2][16 rows][2], zeros after the last k: on tile registers up to whole tiles of 32 steps. For
// vectors (AVX512-BF16) rows of x are in such pairs, too, those of float32 rounded to bfloat16.
#pragma once

#include <algorithm>
#include <cstring>

#include "product.h"
#include "tiles.h"

#if defined(JAXSERVE_PAIRS)

namespace jaxserve {

#if defined(JAXSERVE_TILES)
constexpr int kDepthStep = 32;
#else
constexpr int kDepthStep = 2;
#endif

inline int64_t paired_depth(int64_t depth) { return round_up(depth, kDepthStep); }

// w [outputs][depth] to panels.
inline void pack_pairs(const bf16* from, int64_t outputs, int64_t depth, bf16* to) {
  constexpr int64_t kTogether = 32;  // k of a row, a line of memory
  const int64_t wide = paired_depth(depth);
  for (int64_t n = 0; n < outputs; n += kPanel) {
    const int64_t rows = std::min<int64_t>(kPanel, outputs - n);
    for (int64_t k = 0; k < wide; k += kTogether) {
      bf16 some[kPanel][kTogether] = {};
      for (int64_t i = 0; i < rows; i++) {
        std::copy_n(from + (n + i) * depth + k, std::clamp<int64_t>(depth - k, 0, kTogether), some[i]);
      }
      for (int64_t j = 0; j < std::min(kTogether, wide - k); j += 2) {
        for (int64_t i = 0; i < kPanel; i++, to += 2) std::memcpy(to, &some[i][j], 4);
      }
    }
  }
}

#if !defined(JAXSERVE_TILES)
// A row of x in pairs, rounded to nearest.
inline void put_pairs(const float* x, int64_t depth, Pair* to) {
  int64_t k = 0;
  for (; k + 16 <= depth; k += 16) {
    const __m256bh near = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + k));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k / 2), reinterpret_cast<__m256i>(near));
  }
  for (; k < depth; k += 2) {
    from_float(x[k], &to[k / 2].even);
    from_float(k + 1 < depth ? x[k + 1] : 0.0f, &to[k / 2].odd);
  }
}
inline void put_pairs(const bf16* x, int64_t depth, Pair* to) {
  for (int64_t k = 0; k < depth; k += 2) to[k / 2] = {x[k], k + 1 < depth ? x[k + 1] : bf16{0}};
}
#endif

// Row n of panels of [outputs][depth] as floats.
inline void row_of_pairs(const bf16* w, int64_t n, int64_t depth, float* to) {
  const bf16* panel = w + n / kPanel * kPanel * paired_depth(depth) + n % kPanel * 2;
  for (int64_t k = 0; k < depth; k++) to[k] = to_float(panel[k / 2 * 2 * kPanel + k % 2]);
}

}  // namespace jaxserve

#endif
