// What stretch_products.h computes, on AMX's tile registers, for many rows: weights are whole numbers of 16 bits, and
// tiles multiply their two bytes.
#pragma once

#include "stretch_products.h"
#include "tiles.h"

#if defined(JAXSERVE_TILES)

namespace jaxserve {

template <class F>
struct StretchTiles {
  using Vectors = StretchProducts<F>;
  static constexpr int tile_steps = kBytesTogether;  // of k
  static constexpr int tile_bytes = kTileRows * kTileBytes;
  static constexpr int sum_size = kTileRows * kPanel;
  static constexpr bool signed_bytes = F::scales == Scales::kSigned;  // the scales
  static_assert(!signed_bytes || 128 * F::offset < 32768, "a weight has 16 bits");

  // Products of `tiles` tiles of rows of x, `apart` bytes from one to the next, with one panel: sums [tiles][16][16].
  static void multiply(const uint8_t* panel, const Panel<F>& layout, uint8_t* x, int64_t apart, int tiles,
                       float* sums) {
    constexpr typename Vectors::Rows rows{kTileRows};
    alignas(64) uint8_t weights[4 * tile_bytes];
    alignas(64) int32_t whole[2][2 * sum_size];
    WholeScales<F> scales{};
    for (int64_t b = 0; b < layout.blocks; b += kStretchBlocks, x += rows.bytes()) {
      unpack(panel, layout, b, scales, weights);
      before_tiles();
      _tile_loadd(0, weights, kTileBytes);
      _tile_loadd(1, weights + tile_bytes, kTileBytes);
      _tile_loadd(2, weights + 2 * tile_bytes, kTileBytes);
      _tile_loadd(3, weights + 3 * tile_bytes, kTileBytes);
      const auto add_tile = [&](int j) {
        const float* x_scales = rows.scale(x + j * apart);
        float* to = sums + j * sum_size;
        b == 0 ? add<true>(whole[j % 2], scales.step, x_scales, to) : add<false>(whole[j % 2], scales.step, x_scales, to);
      };
      for (int j = 0; j < tiles; j++) {  // while a tile's products are on their way, those of the one before are added
        multiply_tile(x + j * apart, whole[j % 2]);
        if (j > 0) add_tile(j - 1);
      }
      add_tile(tiles - 1);
    }
  }

 private:
  // A stretch of a panel as tiles [step of 64][the higher byte, signed, and the lower one][16 groups][16 rows][4].
  static void unpack(const uint8_t* panel, const Panel<F>& layout, int64_t b, WholeScales<F>& scales, uint8_t* to) {
    scales.begin(panel, layout, b);
    for (int i = 0; i < kStretchBlocks; i++) {
      ask_for_more<F>(panel, layout, b + i);
      scales.load(panel, layout, b + i);
      unpack_runs<0>(panel + (b + i) * F::code_bytes, scales,
                     to + i * kRun / tile_steps * 2 * tile_bytes + i * kRun % tile_steps / 4 * kTileBytes);
    }
  }
  template <int r>
  static void unpack_runs(const uint8_t* codes, const WholeScales<F>& scales, uint8_t* to) {
    if constexpr (r < F::runs) {
      const __m512i low = _mm512_set1_epi16(0xff);
      const __m512i scale = twice(scales.scale[r]);
      const __m512i minimum =
          F::minimum ? twice(scales.minimum[r]) : _mm512_mullo_epi16(scale, _mm512_set1_epi16(-F::offset));
      // Of two codes in 16 bits, the first times the scale, and the second.
      const __m512i first_of = signed_bytes ? _mm512_and_si512(scale, low) : scale;
      const __m512i second_of = signed_bytes ? _mm512_slli_epi16(scale, 8) : scale;
      for_groups<F, r * kGroups / F::runs, (r + 1) * kGroups / F::runs>(codes, [&](int j, Bytes u) {
        const auto weight = [&](__m512i code, __m512i of) {
          return _mm512_add_epi16(signed_bytes ? _mm512_maddubs_epi16(u.v, of) : _mm512_mullo_epi16(code, of), minimum);
        };
        const __m512i first = weight(_mm512_and_si512(u.v, low), first_of);
        const __m512i second = weight(_mm512_srli_epi16(u.v, 8), second_of);
        const __m512i higher = _mm512_or_si512(_mm512_srli_epi16(first, 8), _mm512_andnot_si512(low, second));
        const __m512i lower = _mm512_or_si512(_mm512_and_si512(first, low), _mm512_slli_epi16(second, 8));
        _mm512_store_si512(to + j * kTileBytes, higher);
        _mm512_store_si512(to + tile_bytes + j * kTileBytes, lower);
      });
      unpack_runs<r + 1>(codes, scales, to);
    }
  }
  // Of 16 bits each, in both halves.
  static __m512i twice(Ints a) { return as_factors(a, a).v; }

  // The products of one tile of rows with the weights of tiles 0 to 3: of the higher bytes, and of the lower.
  static void multiply_tile(const uint8_t* x, int32_t* whole) {
    _tile_loadd(4, x, kTileBytes);
    _tile_zero(6);
    _tile_dpbssd(6, 4, 0);
    _tile_zero(7);
    _tile_dpbsud(7, 4, 1);
    _tile_loadd(5, x + tile_bytes, kTileBytes);
    _tile_dpbssd(6, 5, 2);
    _tile_dpbsud(7, 5, 3);
    _tile_stored(6, whole, kTileBytes);
    _tile_stored(7, whole + sum_size, kTileBytes);
  }

  // Adds a tile's whole sums of a stretch to `sums`, which are not there yet at the first.
  template <bool first>
  static void add(const int32_t* whole, Floats step, const float* scales, float* sums) {
    for (int t = 0; t < kTileRows; t++, whole += kPanel, sums += kPanel) {
      const __m512i higher = _mm512_slli_epi32(_mm512_load_si512(whole), 8);
      const Ints sum{_mm512_add_epi32(higher, _mm512_load_si512(whole + sum_size))};
      store16(sums, Vectors::add_stretch(first ? splat16(0.0f) : load16(sums), sum, step, scales[t]));
    }
  }
};

}  // namespace jaxserve

#endif
