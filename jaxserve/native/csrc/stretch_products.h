// Products of a tile of rows with one panel, for formats whose scales are bytes times a shared one: Q3_K and Q6_K.
//
// Each row of x is rounded to signed bytes, 128 of them under one scale: a stretch. A run's sums are multiplied by the
// run's own scale, which is a whole number too, and only the stretch's sum becomes a float. So tiles, which have
// nothing but products of bytes, come to the same bits (stretch_tiles.h).
#pragma once

#include "tile_rows.h"

namespace jaxserve {

constexpr int kStretch = 128;  // steps of k
constexpr int kStretchBlocks = kStretch / kRun;
constexpr int kBytesTogether = 64;  // of a row; the bytes of the next row follow

template <class F>
struct StretchProducts {
  static constexpr int steps = kStretch;  // of k under one scale
  static constexpr int run = kRun / F::runs;
  static constexpr int unit = 127 * F::offset * run < 32768 ? run : 8;  // steps whose sum has 16 bits
  static constexpr int units = kStretch / unit;
  static_assert(F::scales == Scales::kSigned && 2 * F::offset == 1 << (F::low + F::high));
  static_assert(127 * F::offset * unit < 32768);

  // A tile is one piece of memory a stretch: bytes [2][tile][64], then for each row its scale, and for each unit and
  // row what its sum begins with (the sum of the bytes times -offset).
  struct Rows {
    int tile;
    int64_t bytes() const { return tile * (kStretch + 4 + 4 * units); }
    int8_t* values(uint8_t* at, int t, int k) const {
      return reinterpret_cast<int8_t*>(at) + (k / kBytesTogether * tile + t) * kBytesTogether + k % kBytesTogether;
    }
    float* scale(uint8_t* at) const { return reinterpret_cast<float*>(at + tile * kStretch); }
    int32_t* first(uint8_t* at, int unit) const {
      return reinterpret_cast<int32_t*>(at + tile * (kStretch + 4 + 4 * unit));
    }
  };

  // One row's values of a stretch, to row t of a tile.
  static void put(const float* x, const Rows& rows, uint8_t* at, int t) {
    Floats v[kStretch / 16];
    for (int i = 0; i < kStretch / 16; i++) v[i] = load16(x + 16 * i);
    rows.scale(at)[t] = round_to_bytes(v);
    for (int i = 0; i < kStretch / 16; i++) store_bytes(rows.values(at, t, 16 * i), v[i]);
    for (int u = 0; u < units; u++) {
      const int8_t* values = rows.values(at, t, u * unit);
      int32_t sum = 0;
      for (int k = 0; k < unit; k++) sum += values[k];
      rows.first(at, u)[t] = -F::offset * sum;
    }
  }

  // The scales of the runs of block b, of 16 rows.
  static void whole_scales(const uint8_t* panel, const Panel<F>& layout, int64_t b, Ints (&scale)[F::runs]) {
    const uint8_t* from = panel + layout.scales() + b * F::scale_bytes;
    for (int r = 0; r < F::runs; r++) scale[r] = widen(reinterpret_cast<const int8_t*>(from + 16 * r));
  }

  // `sum` and what a row's whole sum of a stretch adds to it.
  static inline Floats add_stretch(Floats sum, Ints whole, const SharedScales<F>& shared, float scale) {
    return fma(mul(shared.scale, to_floats(whole)), splat16(scale), sum);
  }

  // y[t][0..16) of one panel, for a tile of rows of x.
  template <int tile>
  static void multiply(const uint8_t* panel, const Panel<F>& layout, uint8_t* x, float* y) {
    constexpr Rows rows{tile};
    Floats sums[tile];
    for (Floats& sum : sums) sum = splat16(0.0f);
    SharedScales<F> shared{};
    for (int64_t b = 0; b < layout.blocks; b += kStretchBlocks, x += rows.bytes()) {
      if (b % kSharers == 0) shared.load(panel + layout.shared() + b / kSharers * F::shared_bytes);
      Ints whole[tile];
      for (Ints& sum : whole) sum = splat_int(0);
      for (int i = 0; i < kStretchBlocks; i++) {
        ask_for_more<F>(panel, layout, b + i);
        Ints scale[F::runs];
        whole_scales(panel, layout, b + i, scale);
        for (Ints& of : scale) of = as_factor(of);
        add_units<tile, 0>(panel + (b + i) * F::code_bytes, rows.values(x, 0, i * kRun),
                           rows.first(x, i * kRun / unit), scale, whole);
      }
      for (int t = 0; t < tile; t++) sums[t] = add_stretch(sums[t], whole[t], shared, rows.scale(x)[t]);
    }
    for (int t = 0; t < tile; t++) store16(y + t * kPanel, sums[t]);
  }

 private:
  // Adds to each row's whole sum those of the block's units, from the u-th on, times their runs' scales.
  template <int tile, int u>
  static inline void add_units(const uint8_t* codes, const int8_t* x, const int32_t* first,
                               const Ints (&scale)[F::runs], Ints (&whole)[tile]) {
    if constexpr (u < kRun / unit) {
      Ints sum[tile];
      for (int t = 0; t < tile; t++) sum[t] = splat_int(first[u * tile + t]);
      add_groups<F, u * unit / 4, (u + 1) * unit / 4, kBytesTogether>(codes, x, sum);
      for (int t = 0; t < tile; t++) whole[t] = add_product(whole[t], sum[t], scale[u * unit / run]);
      add_units<tile, u + 1>(codes, x, first, scale, whole);
    }
  }
};

}  // namespace jaxserve
