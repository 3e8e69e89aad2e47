// Products with quantised weights for CPU, in whole numbers: y[t][n] = sum over k of x[t][k] * w[n][k]; with one matrix
// for all rows of x, or with one for each group of them.
//
// Rows of x are rounded to bytes, and passed by a panel's blocks a tile at a time, as block_products.h or
// stretch_products.h does it: a row of y is the same bit for bit whatever other rows are computed. On every instruction
// set it is the same, too, but for the formats of stretch_products.h where there are tiles.

#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

#include "block_products.h"
#include "buffers.h"
#include "groups.h"
#include "parallel.h"
#include "stretch_products.h"
#include "stretch_tiles.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kRowBytes = 256 << 10;  // of x that one item of work takes: they stay in the second-level cache

// How many of `count` things each part has: as few parts as can be, of at most `most`, and as even.
constexpr int64_t evenly(int64_t count, int64_t most) {
  const int64_t parts = std::max<int64_t>(1, (count + most - 1) / most);
  return (count + parts - 1) / parts;
}

template <class F>
using Products = std::conditional_t<kStretches<F>, StretchProducts<F>, BlockProducts<F>>;

#if defined(JAXSERVE_TILES)
constexpr bool kOnTiles = true;
#else
constexpr bool kOnTiles = false;
#endif
constexpr int64_t kTileRowBytes = 1 << 20;  // of x that one item of work takes, on tiles
constexpr int kMostTiles = 32;

// Rows in the next tile, when there are `left`: no more than needed, and at most kTile.
int tile_of(int64_t left) {
  return std::min<int>(kTile, left > 12 ? 16 : left > 8 ? 12 : left > 4 ? 8 : left > 2 ? 4 : static_cast<int>(left));
}

template <class F>
void multiply_tile(int tile, const uint8_t* panel, const Panel<F>& layout, uint8_t* x, float* y) {
  switch (tile) {
    case 1: return Products<F>::template multiply<1>(panel, layout, x, y);
    case 2: return Products<F>::template multiply<2>(panel, layout, x, y);
    case 4: return Products<F>::template multiply<4>(panel, layout, x, y);
    case 8: return Products<F>::template multiply<8>(panel, layout, x, y);
    case 12: return Products<F>::template multiply<std::min(12, kTile)>(panel, layout, x, y);
    default: return Products<F>::template multiply<kTile>(panel, layout, x, y);
  }
}

template <class F>
int64_t tile_bytes(int tile, int64_t depth) {
  return round_up(typename Products<F>::Rows{tile}.bytes() * (depth / Products<F>::steps), kLine);
}

// The first rows of x, `tokens` of them, as a tile; its others are zero.
template <class F>
void make_tile(const float* x, int64_t tokens, int64_t depth, int tile, uint8_t* to) {
  const typename Products<F>::Rows rows{tile};
  for (int64_t k = 0; k < depth; k += Products<F>::steps, to += rows.bytes()) {
    if (tokens < tile) std::fill_n(to, rows.bytes(), uint8_t{0});
    for (int64_t t = 0; t < tokens; t++) Products<F>::put(x + t * depth + k, rows, to, static_cast<int>(t));
  }
}

// Matrices of [outputs, depth] follow one another from `w` on.
template <class F>
void run(ffi::ThreadPool& pool, const float* x, const uint8_t* w, float* y, const std::vector<Group>& groups,
         int64_t depth, int64_t outputs) {
  struct Tile {
    int64_t first, count;  // rows of x
    int size;              // room for so many
    int64_t at;            // its first byte in `rows`
  };
  struct Item {
    const uint8_t* w;
    int64_t panel, panels, tile, tiles;
    bool on_tiles;
  };
  const Panel<F> layout(depth);
  const int64_t panels = (outputs + kPanel - 1) / kPanel, threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t all_panels = panels * static_cast<int64_t>(groups.size());
  const int64_t together = std::clamp<int64_t>(all_panels / (8 * threads), 1, 16);
  std::vector<Tile> tiles;
  std::vector<Item> items;
  int64_t bytes = 0, values = 0;
  for (const Group& group : groups) {
    const bool on_tiles = kOnTiles && kStretches<F> && group.count > kTile;
    const int64_t first = static_cast<int64_t>(tiles.size());
    for (int64_t t = 0; t < group.count; t += kTile) {
      const int size = on_tiles ? kTile : tile_of(group.count - t);
      tiles.push_back({group.first + t, std::min<int64_t>(size, group.count - t), size, bytes});
      bytes += tile_bytes<F>(size, depth);
    }
    values += group.count * depth;
    const int64_t end = static_cast<int64_t>(tiles.size());
    const int64_t most =
        on_tiles ? std::clamp<int64_t>(kTileRowBytes / tile_bytes<F>(kTile, depth), 2, kMostTiles)
                 : evenly(end - first, std::clamp<int64_t>(kRowBytes / tile_bytes<F>(kTile, depth), 4, 16));
    for (int64_t p = 0; p < panels; p += together) {
      for (int64_t i = first; i < end; i += most) {
        items.push_back({w + (group.matrix * panels + p) * layout.bytes(), p, std::min(together, panels - p), i,
                         std::min<int64_t>(most, end - i), on_tiles});
      }
    }
  }
  uint8_t* const rows = reinterpret_cast<uint8_t*>(scratch((bytes + 3) / 4));
  const auto make = [&](int64_t i) {
    make_tile<F>(x + tiles[i].first * depth, tiles[i].count, depth, tiles[i].size, rows + tiles[i].at);
  };
  const int64_t many = 64 * 1024;  // values worth a second thread
  if (values > many) {
    parallel_for(pool, static_cast<int64_t>(tiles.size()), make);
  } else {
    for (size_t i = 0; i < tiles.size(); i++) make(static_cast<int64_t>(i));
  }
  parallel_for(pool, static_cast<int64_t>(items.size()), [&](int64_t i) {
    const Item& item = items[i];
    const auto each_panel = [&](const auto& multiply) {
      for (int64_t p = 0; p < item.panels; p++) multiply(item.w + p * layout.bytes(), (item.panel + p) * kPanel);
    };
    const auto keep = [&](const Tile& tile, int64_t column, const float* sums) {
      const int64_t count = std::min<int64_t>(kPanel, outputs - column);
      for (int64_t t = 0; t < tile.count; t++) {
        float* to = y + (tile.first + t) * outputs + column;
        if (count == kPanel) {
          store16(to, load16(sums + t * kPanel));
        } else {
          std::copy_n(sums + t * kPanel, count, to);
        }
      }
    };
#if defined(JAXSERVE_TILES)
    if constexpr (kStretches<F>) {
      if (item.on_tiles) {
        const Tiles registers(kTileRows);
        return each_panel([&](const uint8_t* panel, int64_t column) {
          alignas(64) float sums[kMostTiles * kTile * kPanel];
          StretchTiles<F>::multiply(panel, layout, rows + tiles[item.tile].at, tile_bytes<F>(kTile, depth),
                                    static_cast<int>(item.tiles), sums);
          for (int64_t j = 0; j < item.tiles; j++) keep(tiles[item.tile + j], column, sums + j * kTile * kPanel);
        });
      }
    }
#endif
    each_panel([&](const uint8_t* panel, int64_t column) {
      for (int64_t j = item.tile; j < item.tile + item.tiles; j++) {
        float sums[kTile * kPanel];  // where they go comes from memory meanwhile
        for (int64_t t = 0; t < tiles[j].count; t++) __builtin_prefetch(y + (tiles[j].first + t) * outputs + column, 1);
        multiply_tile<F>(tiles[j].size, panel, layout, rows + tiles[j].at, sums);
        keep(tiles[j], column, sums);
      }
    });
  });
}

// Row n of the weights as floats.
template <class F>
void row_of(const uint8_t* w, int64_t n, int64_t depth, float* to) {
  const Panel<F> layout(depth);
  const uint8_t* panel = w + n / kPanel * layout.bytes();
  const int lane = static_cast<int>(n % kPanel);
  for (int64_t b = 0; b < layout.blocks; b++, to += kRun) {
    SharedScales<F> shared{};
    shared.load(panel + layout.shared() + b / kSharers * F::shared_bytes);
    Floats scale[F::runs], minimum[F::runs];
    unpack_scales<F>(panel + layout.scales() + b * F::scale_bytes, shared, scale, minimum);
    uint8_t bytes[kGroups][64];
    for_groups<F, 0, kGroups>(panel + b * F::code_bytes, [&](int j, Bytes u) { std::memcpy(bytes[j], &u, 64); });
    for (int r = 0; r < F::runs; r++) {
      float scales[kPanel], minima[kPanel] = {};
      store16(scales, scale[r]);
      if constexpr (F::minimum) store16(minima, minimum[r]);
      for (int k = r * kRun / F::runs; k < (r + 1) * kRun / F::runs; k++) {
        const float code = static_cast<float>(bytes[k / 4][4 * lane + k % 4] - F::offset);
        to[k] = F::minimum ? scales[lane] * code + minima[lane] : scales[lane] * code;
      }
    }
  }
}

// Whether `bytes` are the panels of `count` matrices of [outputs, depth].
template <class F>
bool fits(int64_t bytes, int64_t count, int64_t outputs, int64_t depth) {
  const int64_t step = F::shared ? kShared : kRun;
  return depth > 0 && depth % step == 0 && outputs > 0 && count > 0 && bytes % count == 0 &&
         bytes / count == (outputs + kPanel - 1) / kPanel * Panel<F>(depth).bytes();
}

std::string text(int64_t count, int64_t outputs, int64_t depth) {
  const std::string matrix = "[" + std::to_string(outputs) + ", " + std::to_string(depth) + "]";
  return "the weights are not " + (count == 1 ? matrix : std::to_string(count) + " of " + matrix);
}

ffi::Error multiply(ffi::ThreadPool& pool, const char* who, ffi::AnyBuffer x, ffi::Buffer<ffi::U8> w, ffi::AnyBuffer y,
                    int64_t matrices, std::vector<Group> groups, int64_t format) {
  if (!is_float(x) || !is_float(y)) return invalid(who, "x and the result must be float32 or bfloat16");
  const int64_t outputs = y.dimensions()[1], depth = x.dimensions()[1];
  bool fit = false;
  const bool known = with_format(format, [&](auto f) {
    using F = decltype(f);
    fit = fits<F>(static_cast<int64_t>(w.element_count()), matrices, outputs, depth);
    if (!fit) return;
    expect_pages(y);
    leave_out_zeros(x, y, groups);
    std::vector<float> copy;
    const float* rows = floats_of(x, copy);
    fill_floats(y, [&](float* to) { run<F>(pool, rows, w.typed_data(), to, groups, depth, outputs); });
  });
  if (!known) return invalid(who, "format " + std::to_string(format) + " is not known");
  return fit ? ffi::Error::Success() : invalid(who, text(matrices, outputs, depth));
}

ffi::Error linear_blocks(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::U8> w,
                         ffi::Result<ffi::AnyBuffer> y, int64_t format) {
  const auto xs = x.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ys.size() != 2 || xs[0] != ys[0]) {
    return invalid("linear_blocks", "x must be [T, K] and the result [T, N]");
  }
  return multiply(pool, "linear_blocks", x, w, *y, 1, one_group(xs[0]), format);
}

ffi::Error grouped_linear_blocks(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::U8> w,
                                 ffi::Buffer<ffi::S32> sizes, ffi::Result<ffi::AnyBuffer> y, int64_t format) {
  const auto xs = x.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ys.size() != 2 || xs[0] != ys[0] || sizes.dimensions().size() != 1) {
    return invalid("grouped_linear_blocks", "x must be [T, K], sizes [E] and the result [T, N]");
  }
  std::vector<Group> groups;
  if (!groups_of(sizes, xs[0], groups)) return invalid("grouped_linear_blocks", bad_sizes(xs[0]));
  return multiply(pool, "grouped_linear_blocks", x, w, *y, sizes.dimensions()[0], groups, format);
}

ffi::Error embed_blocks(ffi::ThreadPool pool, ffi::Buffer<ffi::U8> w, ffi::Buffer<ffi::S32> ids,
                        ffi::Result<ffi::AnyBuffer> y, int64_t format, int64_t outputs) {
  const auto ys = y->dimensions();
  const int64_t tokens = static_cast<int64_t>(ids.element_count());
  if (ys.size() != 2 || ys[0] != tokens) return invalid("embed_blocks", "ids must be [T] and the result [T, K]");
  if (!is_float(*y)) return invalid("embed_blocks", "the result must be float32 or bfloat16");
  const int64_t depth = ys[1];
  bool fit = false;
  const bool known = with_format(format, [&](auto f) {
    using F = decltype(f);
    fit = fits<F>(static_cast<int64_t>(w.element_count()), 1, outputs, depth);
    if (!fit) return;
    fill_floats(*y, [&](float* to) {
      const auto one = [&](int64_t t) {
        const int64_t id = ids.typed_data()[t];
        if (id < 0) {
          std::fill_n(to + t * depth, depth, 0.0f);
        } else {
          row_of<F>(w.typed_data(), std::min(id, outputs - 1), depth, to + t * depth);
        }
      };
      if (tokens > 8) {
        parallel_for(pool, tokens, one);
      } else {
        for (int64_t t = 0; t < tokens; t++) one(t);
      }
    });
  });
  if (!known) return invalid("embed_blocks", "format " + std::to_string(format) + " is not known");
  return fit ? ffi::Error::Success() : invalid("embed_blocks", text(1, outputs, depth));
}

}  // namespace
}  // namespace jaxserve

// How many numbers of a row of x one scale is for, in products with ggml's format `format`; -1 if that is none of ours.
extern "C" int64_t jaxserve_steps_of_a_scale(int64_t format) {
  int64_t steps = -1;
  jaxserve::with_format(format, [&](auto f) { steps = jaxserve::Products<decltype(f)>::steps; });
  return steps;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_linear_blocks, jaxserve::linear_blocks,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("format"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_grouped_linear_blocks, jaxserve::grouped_linear_blocks,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("format"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_embed_blocks, jaxserve::embed_blocks,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("format")
                                  .Attr<int64_t>("outputs"));
