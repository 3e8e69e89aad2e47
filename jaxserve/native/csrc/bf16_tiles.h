// Rows of numbers times a panel of bfloat16 weights on tile registers.
//
// A tile is 32 steps of a panel in pairs (bf16_pairs.h): [16 pairs of k][16 rows][2]. Rows of float32 are two rows of
// bfloat16 each, the nearest and the nearest to what that leaves out, so that no more is lost than 2^-17 of a number; the
// sums of both are added. Each is summed in tiles of k in order, in float32.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "bf16_pairs.h"
#include "groups.h"
#include "parallel.h"
#include "product.h"
#include "tiles.h"

#if defined(JAXSERVE_TILES)

namespace jaxserve {

constexpr int kTileSteps = kDepthStep;  // of k
constexpr int kTileNumbers = kTileRows * kTileSteps;

inline int64_t tile_steps(int64_t depth) { return paired_depth(depth) / kTileSteps; }

// Rows of x as tiles [tile of rows][K / 32][rows in a tile][32].
class TileRows {
 public:
  // `rows` of bfloat16, `each` for a row of x; tiles are as high as is needed.
  TileRows(int64_t rows, int64_t depth, int each)
      : rows(rows), each(each), high(static_cast<int>(std::min<int64_t>(rows, kTileRows))), steps(tile_steps(depth)),
        depth_(depth) {}

  int64_t tiles() const { return (rows + high - 1) / high; }
  int64_t tile_numbers() const { return steps * high * kTileSteps; }

  // Row r of x, to its rows in `tiles`.
  void put(const bf16* x, int64_t r, bf16* tiles) const {
    bf16* to = row(r, tiles);
    for (int64_t k = 0; k < depth_; k += kTileSteps, to += high * kTileSteps) {
      const int64_t count = std::min<int64_t>(kTileSteps, depth_ - k);
      std::copy_n(x + k, count, to);
      std::fill(to + count, to + kTileSteps, bf16{0});
    }
  }
  void put(const float* x, int64_t r, bf16* tiles) const {
    bf16 *nearest = row(2 * r, tiles), *rest = row(2 * r + 1, tiles);
    for (int64_t k = 0; k < depth_; k += kTileSteps, nearest += high * kTileSteps, rest += high * kTileSteps) {
      const int64_t count = depth_ - k;
      const __m512 first = _mm512_maskz_loadu_ps(up_to_16(count), x + k);
      const __m512 last = _mm512_maskz_loadu_ps(up_to_16(count - 16), x + k + 16);
      const __m512i near = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(last, first));
      _mm512_storeu_si512(nearest, near);
      const __m512 first_rest = left_out(first, _mm512_castsi512_si256(near));
      const __m512 last_rest = left_out(last, _mm512_extracti64x4_epi64(near, 1));
      _mm512_storeu_si512(rest, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(last_rest, first_rest)));
    }
  }

  // Zeros for the rows of the last tile that are none of x.
  void fill(bf16* tiles) const {
    for (int64_t r = rows; r < this->tiles() * high; r++) {
      bf16* to = row(r, tiles);
      for (int64_t s = 0; s < steps; s++, to += high * kTileSteps) std::fill_n(to, kTileSteps, bf16{0});
    }
  }

  const int64_t rows;
  const int each, high;
  const int64_t steps;

 private:
  bf16* row(int64_t r, bf16* tiles) const { return tiles + r / high * tile_numbers() + r % high * kTileSteps; }

  static __mmask16 up_to_16(int64_t count) {
    return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, 16)) - 1);
  }

  // What the nearest bfloat16 leaves out of a number; nothing of one that is not finite.
  static __m512 left_out(__m512 x, __m256i nearest) {
    const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(nearest), 16));
    const __mmask16 others = _mm512_fpclass_ps_mask(wide, 0x99);  // infinities and NaNs
    return _mm512_maskz_sub_ps(_knot_mask16(others), x, wide);
  }

  const int64_t depth_;
};

// sums[i][j][row][16] = the products of tile i of rows, of `a`, with panel j of `b`, both one or two. Registers 0 to 3
// are for sums [rows][16], 4 and 5 for rows [rows][32], 6 and 7 for panels [16 pairs][16][2]. A register is
// loaded again as soon as the last product that reads it is on its way. `fresh`: nothing has read these panels yet.
template <int a, int b>
void multiply_tiles(const bf16* x, const TileRows& rows, const bf16* w, bool fresh, float* sums) {
  const int64_t x_next = rows.tile_numbers(), x_step = rows.high * kTileSteps, w_next = rows.steps * kTileNumbers;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, x, kTileBytes);
  _tile_loadd(6, w, kTileBytes);
  if constexpr (b == 2) _tile_loadd(7, w + w_next, kTileBytes);
  if constexpr (a == 2) _tile_loadd(5, x + x_next, kTileBytes);
  for (int64_t left = rows.steps - 1; left >= 0; left--) {
    x += left > 0 ? x_step : 0;  // the last tiles are loaded twice
    w += left > 0 ? kTileNumbers : 0;
    if (fresh) {
      constexpr int tiles = kAhead / (kTileRows * kTileBytes);
      const bf16* then = w + tiles * kTileNumbers + (left >= tiles ? 0 : (b - 1) * w_next);  // or in the panels after these
      ask_for(then, kTileRows * kTileBytes);
      if constexpr (b == 2) ask_for(then + w_next, kTileRows * kTileBytes);
    }
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (b == 2) _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(4, x, kTileBytes);
    if constexpr (a == 2) _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(6, w, kTileBytes);
    if constexpr (a == 2 && b == 2) _tile_dpbf16ps(3, 5, 7);
    if constexpr (b == 2) _tile_loadd(7, w + w_next, kTileBytes);
    if constexpr (a == 2) _tile_loadd(5, x + x_next, kTileBytes);
  }
  constexpr int size = kTileRows * kPanel;
  _tile_stored(0, sums, kTileBytes);
  if constexpr (b == 2) _tile_stored(1, sums + size, kTileBytes);
  if constexpr (a == 2) _tile_stored(2, sums + b * size, kTileBytes);
  if constexpr (a == 2 && b == 2) _tile_stored(3, sums + 3 * size, kTileBytes);
}

// The products of `tiles` tiles of rows with `panels` panels, at most two of each: y[r][0..columns) of a group's rows.
template <class Y>
void multiply_some(const bf16* x, const TileRows& rows, int64_t tile, int64_t tiles, bool fresh, const bf16* w,
                   int64_t panels, int64_t columns, Y* y, int64_t y_stride) {
  alignas(64) float sums[4][kTileRows * kPanel];
  const bf16* from = x + tile * rows.tile_numbers();
  if (tiles == 2) {
    panels == 2 ? multiply_tiles<2, 2>(from, rows, w, fresh, sums[0])
                : multiply_tiles<2, 1>(from, rows, w, fresh, sums[0]);
  } else {
    panels == 2 ? multiply_tiles<1, 2>(from, rows, w, fresh, sums[0])
                : multiply_tiles<1, 1>(from, rows, w, fresh, sums[0]);
  }
  for (int64_t i = 0; i < tiles; i++) {
    const int64_t first = (tile + i) * rows.high, end = std::min(rows.rows, first + rows.high);
    for (int64_t row = first; row < end; row += rows.each) {
      for (int64_t j = 0; j < panels; j++) {
        const float* sum = sums[i * panels + j] + (row - first) * kPanel;
        Y* to = y + row / rows.each * y_stride + j * kPanel;
        float whole[kPanel];
        store(whole, rows.each == 2 ? add(load(sum), load(sum + kPanel)) : load(sum));
        for (int64_t n = 0; n < std::min<int64_t>(kPanel, columns - j * kPanel); n++) from_float(whole[n], to + n);
      }
    }
  }
}

// y[t][n] = sum over k of x[t][k] * w[n][k], x and y of float32 or bfloat16; matrices of [outputs, depth] follow one
// another from `w` on.
template <class X, class Y>
void run_on_tiles(xla::ffi::ThreadPool& pool, const X* x, const bf16* w, Y* y, const std::vector<Group>& groups,
                  int64_t depth, int64_t outputs) {
  struct Rows {
    Group group;
    TileRows layout;
    int64_t at;
  };
  struct Item {
    const Rows* rows;
    int64_t tile, tiles, panel, panels;
  };
  const int each = std::is_same_v<X, float> ? 2 : 1;
  const int64_t panels = (outputs + kPanel - 1) / kPanel, steps = tile_steps(depth);
  // Of the rows, as many tiles as stay in the second-level cache.
  const int64_t together = std::clamp<int64_t>(1024 / steps / 2 * 2, 2, 32);
  std::vector<Rows> rows;
  std::vector<Item> items;
  int64_t numbers = 0;
  rows.reserve(groups.size());
  for (const Group& group : groups) {
    rows.push_back({group, TileRows(group.count * each, depth, each), numbers});
    const TileRows& layout = rows.back().layout;
    numbers += layout.tiles() * layout.tile_numbers();
    const int64_t wide = layout.tiles() == 1 ? 8 : 4;
    for (int64_t p = 0; p < panels; p += wide) {
      for (int64_t t = 0; t < layout.tiles(); t += together) {
        items.push_back({&rows.back(), t, std::min(together, layout.tiles() - t), p, std::min(wide, panels - p)});
      }
    }
  }
  bf16* const tiles = reinterpret_cast<bf16*>(scratch((numbers + 1) / 2));
  for (const Rows& some : rows) {
    const auto put = [&](int64_t r) { some.layout.put(x + (some.group.first + r) * depth, r, tiles + some.at); };
    each_row(pool, some.group.count, depth, put);
    some.layout.fill(tiles + some.at);
  }
  parallel_for(pool, static_cast<int64_t>(items.size()), [&](int64_t i) {
    const Item& item = items[i];
    const TileRows& layout = item.rows->layout;
    const Tiles registers(layout.high);
    before_tiles();
    for (int64_t p = item.panel; p < item.panel + item.panels; p += 2) {
      const bf16* panel = w + (item.rows->group.matrix * panels + p) * steps * kTileNumbers;
      Y* to = y + item.rows->group.first * outputs + p * kPanel;
      for (int64_t t = item.tile; t < item.tile + item.tiles; t += 2) {
        multiply_some(tiles + item.rows->at, layout, t, std::min<int64_t>(2, item.tile + item.tiles - t), t == item.tile,
                      panel, std::min<int64_t>(2, item.panel + item.panels - p), outputs - p * kPanel, to, outputs);
      }
    }
  });
}

}  // namespace jaxserve

#endif
