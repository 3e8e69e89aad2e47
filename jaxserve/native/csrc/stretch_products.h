// Products of a tile of rows with one panel, for formats of blocks of 256 weights: Q2_K to Q6_K.
//
// Each row of x is rounded to signed bytes, 128 of them under one scale: a stretch. Scales and minima of runs are whole
// numbers, of themselves or as multiples of a quantum, so that only the stretch's sum becomes a float. So tiles, which
// have nothing but products of bytes, come to the same bits (stretch_tiles.h).
#pragma once

#include "tile_rows.h"

namespace jaxserve {

constexpr int kStretch = 128;  // steps of k
constexpr int kStretchBlocks = kStretch / kRun;
constexpr int kBytesTogether = 64;  // of a row; the bytes of the next row follow

// A weight is what the whole number scale * (code - offset) + minimum is times `step`, the two being its run's.
template <class F>
struct WholeScales {
  Floats step;  // of 16 rows, for 256 weights
  Ints scale[F::runs], minimum[F::runs];

  // What the blocks of a stretch from b on share; stretches come in order.
  void begin(const uint8_t* panel, const Panel<F>& layout, int64_t b) {
    if (b % kSharers != 0) return;
    shared_.load(panel + layout.shared() + b / kSharers * F::shared_bytes);
    if constexpr (F::scales == Scales::kSigned) {
      step = shared_.scale;
    } else {
      const Ints e = widen(panel + layout.quanta() + b / kSharers * kPanel);
      step = power_of_two(e);
      const Floats steps = power_of_two(add_product(splat_int(254), e, as_factor(splat_int(-1))));  // in 1
      shared_.scale = mul(shared_.scale, steps);
      shared_.minimum = mul(shared_.minimum, steps);
    }
  }

  // Those of block b.
  void load(const uint8_t* panel, const Panel<F>& layout, int64_t b) {
    const uint8_t* from = panel + layout.scales() + b * F::scale_bytes;
    if constexpr (F::scales == Scales::kSigned) {
      for (int r = 0; r < F::runs; r++) scale[r] = widen(reinterpret_cast<const int8_t*>(from + 16 * r));
    } else {
      Floats scales[F::runs], minima[F::runs];
      unpack_scales<F>(from, shared_, scales, minima);
      for (int r = 0; r < F::runs; r++) {
        scale[r] = to_ints(scales[r]);
        minimum[r] = to_ints(minima[r]);
      }
    }
  }

 private:
  SharedScales<F> shared_;  // in steps, where the runs' own are no whole numbers of themselves
};

template <class F>
struct StretchProducts {
  static constexpr int steps = kStretch;  // of k under one scale
  static constexpr int run = kRun / F::runs;
  static constexpr int centre = 1 << (F::low + F::high - 1);  // of the codes
  // Steps whose sum of codes less the centre, times bytes, has 16 bits.
  static constexpr int unit = 127 * centre * run < 32768 ? run : 127 * centre * run / 2 < 32768 ? run / 2 : run / 4;
  static constexpr int units = kStretch / unit;
  static constexpr int pairs = F::minimum ? kStretch / run / 2 : 0;  // of runs
  static_assert(127 * centre * unit < 32768 && unit % 4 == 0);
  static_assert(F::offset == (F::minimum ? 0 : centre));

  // A tile is one piece of memory a stretch: bytes [2][tile][64], then for each row its scale, for each unit and row what
  // its sum begins with (the sum of the bytes times -centre), and, where there are minima, for each pair of runs and row
  // the sums of the bytes.
  struct Rows {
    int tile;
    int64_t bytes() const { return tile * (kStretch + 4 + 4 * units + 4 * pairs); }
    int8_t* values(uint8_t* at, int t, int k) const {
      return reinterpret_cast<int8_t*>(at) + (k / kBytesTogether * tile + t) * kBytesTogether + k % kBytesTogether;
    }
    float* scale(uint8_t* at) const { return reinterpret_cast<float*>(at + tile * kStretch); }
    int32_t* first(uint8_t* at, int unit) const {
      return reinterpret_cast<int32_t*>(at + tile * (kStretch + 4 + 4 * unit));
    }
    int16_t* sums(uint8_t* at, int pair) const { return reinterpret_cast<int16_t*>(first(at, units + pair)); }
  };

  // One row's values of a stretch, to row t of a tile.
  static void put(const float* x, const Rows& rows, uint8_t* at, int t) {
    Floats v[kStretch / 16];
    for (int i = 0; i < kStretch / 16; i++) v[i] = load16(x + 16 * i);
    rows.scale(at)[t] = round_to_bytes(v);
    for (int i = 0; i < kStretch / 16; i++) store_bytes(rows.values(at, t, 16 * i), v[i]);
    int32_t sums[kStretch / run] = {};
    for (int u = 0; u < units; u++) {
      const int8_t* values = rows.values(at, t, u * unit);
      int32_t sum = 0;
      for (int k = 0; k < unit; k++) sum += values[k];
      rows.first(at, u)[t] = -centre * sum;
      sums[u * unit / run] += sum;
    }
    for (int r = 0; r < 2 * pairs; r++) rows.sums(at, r / 2)[2 * t + r % 2] = static_cast<int16_t>(sums[r]);
  }

  // `sum` and what a row's whole sum of a stretch adds to it.
  static inline Floats add_stretch(Floats sum, Ints whole, Floats step, float scale) {
    return fma(mul(step, to_floats(whole)), splat16(scale), sum);
  }

  // y[t][0..16) of one panel, for a tile of rows of x.
  template <int tile>
  static void multiply(const uint8_t* panel, const Panel<F>& layout, uint8_t* x, float* y) {
    constexpr Rows rows{tile};
    Floats sums[tile];
    for (Floats& sum : sums) sum = splat16(0.0f);
    WholeScales<F> scales{};
    for (int64_t stretch = 0; stretch < layout.blocks / kStretchBlocks; stretch++, x += rows.bytes()) {
      const int64_t b = stretch * kStretchBlocks;
      Ints whole[tile], minima[kStretch / run];  // the latter of codes less the centre
      for (Ints& sum : whole) sum = splat_int(0);
      scales.begin(panel, layout, b);
#pragma GCC unroll 4
      for (int i = 0; i < kStretchBlocks; i++) {
        ask_for_more<F>(panel, layout, b + i);
        scales.load(panel, layout, b + i);
        for (int r = 0; r < F::runs; r++) {
          const Ints scale = scales.scale[r];
          if constexpr (F::minimum) {
            minima[i * F::runs + r] = add_product(scales.minimum[r], scale, as_factor(splat_int(centre)));
          }
          scales.scale[r] = as_factor(scale);
        }
        add_units<tile, 0>(panel + (b + i) * F::code_bytes, rows.values(x, 0, i * kRun),
                           rows.first(x, i * kRun / unit), scales.scale, whole);
      }
      for (int r = 0; r < 2 * pairs; r += 2) {
        const Ints both = as_factors(minima[r], minima[r + 1]);
        for (int t = 0; t < tile; t++) whole[t] = add_products(whole[t], rows.sums(x, r / 2) + 2 * t, both);
      }
      for (int t = 0; t < tile; t++) sums[t] = add_stretch(sums[t], whole[t], scales.step, rows.scale(x)[t]);
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
