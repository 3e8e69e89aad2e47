// Sixteen rows of bytes times a panel of a block format on tile registers.
#pragma once

#include <algorithm>

#include "blocks.h"
#include "parallel.h"
#include "tiles.h"

#if defined(JAXSERVE_TILES)

namespace jaxserve {

// Unpacks a panel, signed codes and scales as floats, and multiplies tiles of kTileRows rows by it: the same whole
// numbers, scaled and added in the same order, as `multiply` gives for smaller ones.
template <class F>
class LargeTiles {
 public:
  explicit LargeTiles(const Panel<F>& layout)
      : layout_(layout), tiles_(kTileRows, kGroups / F::runs),
        scales_(scratch(layout.blocks * (kScales * kPanel + kRun * kPanel / 4), Use::kItem)),
        codes_(reinterpret_cast<int8_t*>(scales_ + layout.blocks * kScales * kPanel)) {}

  void take(const uint8_t* panel) {
    SharedScales<F> shared{};
    float* scales = scales_;
    for (int64_t b = 0; b < layout_.blocks; b++, scales += kScales * kPanel) {
      if (b % kSharers == 0) shared.load(panel + layout_.shared() + b / kSharers * F::shared_bytes);
      Floats scale[F::runs], minimum[F::runs];
      unpack_scales<F>(panel + layout_.scales() + b * F::scale_bytes, shared, scale, minimum);
      for (int r = 0; r < F::runs; r++) {
        store16(scales + r * kPanel, scale[r]);
        if constexpr (F::minimum) store16(scales + (F::runs + r) * kPanel, minimum[r]);
      }
      for_groups<F, 0, kGroups>(panel + b * F::code_bytes, [&](int j, Bytes u) {
        const __m512i code = _mm512_sub_epi8(u.v, _mm512_set1_epi8(static_cast<char>(F::offset)));
        _mm512_store_si512(codes_ + (b * kGroups + j) * kTileBytes, code);
      });
    }
    before_tiles();
  }

  // y[t][0..16) for 16 rows t of x.
  void multiply(const uint8_t* x, float* y) const {
    alignas(64) Whole whole[kPieces];
    Floats sums[kTileRows];
    for (Floats& sum : sums) sum = splat16(0.0f);
    for (int64_t b = 0; b < layout_.blocks; b += kPieces / F::runs) {
      const int64_t count = std::min<int64_t>(kPieces / F::runs, layout_.blocks - b);
      products(b * F::runs, count * F::runs, x, whole);
      for (int64_t i = 0; i < count; i++) add(b + i, whole[i * F::runs], whole[(i + 1) * F::runs - 1], x, sums);
    }
    for (int t = 0; t < kTileRows; t++) store16(y + t * kPanel, sums[t]);
  }

 private:
  using Whole = int32_t[kTileRows * kPanel];

  // Runs that are multiplied before their products are added: while there are tile products the processor does half as
  // many operations on vectors of 64 bytes, so the two take turns; the products in between stay in the first-level cache.
  static constexpr int kPieces = 16;
  static constexpr TileBlock kBlock{kTileRows, F::runs};
  static constexpr int kScales = F::minimum ? 2 * F::runs : F::runs;  // vectors of a block
  static constexpr int kSteps = kGroups / F::runs;                    // groups of a run

  // whole[i] = the products of run first + i. A register is loaded again right after the product that reads it, and
  // stored while the other is multiplied, which is what keeps the tiles' unit at work.
  void products(int64_t first, int64_t count, const uint8_t* x, Whole* whole) const {
    load<0>(first, x);
    if (count > 1) load<1>(first + 1, x);
    for (int64_t i = 0; i < count; i += 2) {
      _tile_zero(0);
      _tile_dpbssd(0, 4, 6);
      if (i + 2 < count) load<0>(first + i + 2, x);
      if (i > 0) _tile_stored(1, whole[i - 1], kTileBytes);
      if (i + 1 < count) {
        _tile_zero(1);
        _tile_dpbssd(1, 5, 7);
        if (i + 3 < count) load<1>(first + i + 3, x);
      }
      _tile_stored(0, whole[i], kTileBytes);
    }
    if (count % 2 == 0) _tile_stored(1, whole[count - 1], kTileBytes);
  }

  template <int set>
  void load(int64_t i, const uint8_t* x) const {  // run i of the rows and of the codes
    const uint8_t* rows = x + i / F::runs * kBlock.bytes() + i % F::runs * 4 * kSteps;
    const int8_t* codes = codes_ + i * kSteps * kTileBytes;
    if constexpr (set == 0) {
      _tile_loadd(4, rows, kRun);
      _tile_loadd(6, codes, kTileBytes);
    } else {
      _tile_loadd(5, rows, kRun);
      _tile_loadd(7, codes, kTileBytes);
    }
  }

  // Block b's products, `first` of its first run and `second` of another one, scaled and added.
  void add(int64_t b, const Whole& first, const Whole& second, const uint8_t* x, Floats (&sums)[kTileRows]) const {
    const float* scales = scales_ + b * kScales * kPanel;
    uint8_t* block = const_cast<uint8_t*>(x) + b * kBlock.bytes();
    for (int t = 0; t < kTileRows; t++) {
      Floats products = mul(floats(first + t * kPanel), load16(scales));
      if constexpr (F::runs == 2) products = fma(floats(second + t * kPanel), load16(scales + kPanel), products);
      sums[t] = fma(products, splat16(kBlock.scale(block)[t]), sums[t]);
      if constexpr (F::minimum) {
        for (int r = 0; r < F::runs; r++) {
          sums[t] = fma(load16(scales + (F::runs + r) * kPanel), splat16(kBlock.weight(block, r)[t]), sums[t]);
        }
      }
    }
  }

  static Floats floats(const int32_t* whole) { return to_floats(Ints{_mm512_load_si512(whole)}); }

  const Panel<F>& layout_;
  const Tiles tiles_;
  float* const scales_;   // [block][kScales][16]
  int8_t* const codes_;   // [block][kGroups][64]
};

}  // namespace jaxserve

#endif
