// Products of a tile of rows with one panel, for formats whose blocks of 32 weights have scales of their own.
//
// Each row of x is rounded to signed bytes, 32 of them under one scale. A block's products are summed exactly, then
// scaled and added in the order of the blocks.
#pragma once

#include "tile_rows.h"

namespace jaxserve {

template <class F>
struct BlockProducts {
  static constexpr int steps = kRun;  // of k under one scale

  // A tile is one stretch of memory a block: bytes [tile][32], then for each row its scale, for each run and row what
  // its whole sum begins with (the sum of the bytes times -offset, for the offset of the codes; and kMagicBits in the
  // first run), and the sum times the scale (what a minimum is multiplied by).
  struct Rows {
    int tile;
    int64_t bytes() const { return tile * (kRun + 4 + 8 * F::runs); }
    int8_t* values(uint8_t* at, int t) const { return reinterpret_cast<int8_t*>(at) + t * kRun; }
    float* scale(uint8_t* at) const { return reinterpret_cast<float*>(at + tile * kRun); }
    int32_t* first(uint8_t* at, int run) const {
      return reinterpret_cast<int32_t*>(at + tile * (kRun + 4 + 4 * run));
    }
    float* weight(uint8_t* at, int run) const {
      return reinterpret_cast<float*>(at + tile * (kRun + 4 + 4 * F::runs + 4 * run));
    }
  };
  static constexpr int32_t first_of(int run) { return run == 0 ? kMagicBits : 0; }

  // One row's values of a block, to row t of a tile.
  static void put(const float* x, const Rows& rows, uint8_t* at, int t) {
    Floats v[2] = {load16(x), load16(x + 16)};
    const float scale = round_to_bytes(v);
    for (int i = 0; i < 2; i++) store_bytes(rows.values(at, t) + 16 * i, v[i]);
    rows.scale(at)[t] = scale;
    for (int r = 0; r < F::runs; r++) {
      const float sum = total(F::runs == 1 ? add(v[0], v[1]) : v[r]);
      rows.first(at, r)[t] = first_of(r) - F::offset * static_cast<int32_t>(sum);
      rows.weight(at, r)[t] = scale * sum;
    }
  }

  // whole[t] = the sum of run r's codes times the bytes of row t, less the codes' offset; of the first run as a float's
  // bits.
  template <int tile, int r>
  static inline void sum_run(const uint8_t* codes, const Rows& rows, uint8_t* x, Ints (&whole)[tile]) {
    constexpr int count = kGroups / F::runs;
    for (int t = 0; t < tile; t++) whole[t] = splat_int(F::offset == 0 ? first_of(r) : rows.first(x, r)[t]);
    add_groups<F, r * count, (r + 1) * count, kRun>(codes, rows.values(x, 0), whole);
  }

  // y[t][0..16) of one panel, for a tile of rows of x.
  template <int tile>
  static void multiply(const uint8_t* panel, const Panel<F>& layout, uint8_t* x, float* y) {
    constexpr Rows rows{tile};
    Floats sums[tile];
    for (Floats& sum : sums) sum = splat16(0.0f);
    SharedScales<F> shared{};
    for (int64_t b = 0; b < layout.blocks; b++, x += rows.bytes()) {
      const uint8_t* codes = panel + b * F::code_bytes;
      ask_for_more<F>(panel, layout, b);
      if (b % kSharers == 0) shared.load(panel + layout.shared() + b / kSharers * F::shared_bytes);
      Floats scale[F::runs], minimum[F::runs];
      unpack_scales<F>(panel + layout.scales() + b * F::scale_bytes, shared, scale, minimum);
      Ints whole[tile];
      Floats products[tile];
      sum_run<tile, 0>(codes, rows, x, whole);
      const Floats start = mul(splat16(-kMagic), scale[0]);  // exact: a scale has 19 bits at most
      for (int t = 0; t < tile; t++) products[t] = fma(bits_as_floats(whole[t]), scale[0], start);
      if constexpr (F::runs == 2) {
        sum_run<tile, 1>(codes, rows, x, whole);
        for (int t = 0; t < tile; t++) products[t] = fma(to_floats(whole[t]), scale[1], products[t]);
      }
      for (int t = 0; t < tile; t++) {
        sums[t] = fma(products[t], splat16(rows.scale(x)[t]), sums[t]);
        if constexpr (F::minimum) {
          for (int r = 0; r < F::runs; r++) sums[t] = fma(minimum[r], splat16(rows.weight(x, r)[t]), sums[t]);
        }
      }
    }
    for (int t = 0; t < tile; t++) store16(y + t * kPanel, sums[t]);
  }
};

}  // namespace jaxserve
