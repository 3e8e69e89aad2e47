// Products with quantised weights for CPU, in whole numbers: y[t][n] = sum over k of x[t][k] * w[n][k]; with one matrix
// for all rows of x, or with one for each group of them.
//
// Each row of x is rounded to signed bytes, 32 of them under one scale. A block's products are summed exactly, then
// scaled and added in the order of the blocks; so a row of y is the same bit for bit whatever other rows are computed,
// and on every instruction set.

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "blocks.h"
#include "buffers.h"
#include "groups.h"
#include "parallel.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

constexpr int kTile = kLanes == 16 ? 16 : 12;  // rows of x that pass by a block's codes together: as registers allow
constexpr int kTiles = 6;  // tiles that one item of work takes: they stay in the second-level cache
constexpr float kSmallest = 1e-30f;  // a run of values that are all nearer to zero is kept as zeros

// Whole sums are told as floats by their bits: 1.5 * 2^23 + n is the float of kMagicBits + n, for any |n| < 2^22.
constexpr float kMagic = 12582912.0f;
constexpr int32_t kMagicBits = 0x4b400000;
constexpr int32_t first_of(int run) { return run == 0 ? kMagicBits : 0; }

// A tile of rows of x is one stretch of memory a block: bytes [tile][32], then for each row its scale, for each run and
// row what its whole sum begins with (the sum of the bytes times -offset, for the offset of the codes; and kMagicBits in
// the first run), and the sum times the scale (what a minimum is multiplied by).
struct TileBlock {
  int tile, runs;
  int64_t bytes() const { return tile * (kRun + 4 + 8 * runs); }
  int8_t* values(uint8_t* at, int t) const { return reinterpret_cast<int8_t*>(at) + t * kRun; }
  float* scale(uint8_t* at) const { return reinterpret_cast<float*>(at + tile * kRun); }
  int32_t* first(uint8_t* at, int run) const {
    return reinterpret_cast<int32_t*>(at + tile * (kRun + 4 + 4 * run));
  }
  float* weight(uint8_t* at, int run) const {
    return reinterpret_cast<float*>(at + tile * (kRun + 4 + 4 * runs + 4 * run));
  }
};

// One row's 32 values, to row t of a tile's block: to nearest, ties to even, the largest becoming 127.
template <class F>
void quantise(const float* x, const TileBlock& block, uint8_t* at, int t) {
  constexpr float largest = std::numeric_limits<float>::max();
  const Floats first = load16(x), last = load16(x + 16);
  const float most = highest(max(magnitude(first), magnitude(last)));
  const bool finite = !any_above(magnitude(first), largest) && !any_above(magnitude(last), largest);
  Floats a = splat16(0.0f), b = a;
  float scale = finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  if (finite && most > kSmallest) {
    scale = most / 127.0f;
    const Floats inverse = splat16(127.0f / most), magic = splat16(kMagic);  // adding it rounds
    a = sub(add(mul(first, inverse), magic), magic);
    b = sub(add(mul(last, inverse), magic), magic);
  }
  store_bytes(block.values(at, t), a);
  store_bytes(block.values(at, t) + 16, b);
  block.scale(at)[t] = scale;
  const float sums[2] = {F::runs == 1 ? total(add(a, b)) : total(a), F::runs == 1 ? 0.0f : total(b)};
  for (int r = 0; r < F::runs; r++) {
    block.first(at, r)[t] = first_of(r) - F::offset * static_cast<int32_t>(sums[r]);
    block.weight(at, r)[t] = scale * sums[r];
  }
}

// whole[t] = the sum of run r's codes times the bytes of row t, less the codes' offset; of the first run as a float's bits.
template <class F, int tile, int r>
inline void sum_run(const uint8_t* codes, const TileBlock& block, uint8_t* x, Ints (&whole)[tile]) {
  constexpr bool small = F::low + F::high < 8 && F::offset < 128;
  constexpr int count = kGroups / F::runs;
  for (int t = 0; t < tile; t++) whole[t] = splat_int(F::offset == 0 ? first_of(r) : block.first(x, r)[t]);
  for_groups<F, r * count, (r + 1) * count>(codes, [&](int j, Bytes u) {
    for (int t = 0; t < tile; t++) whole[t] = dot<small>(whole[t], u, block.values(x, t) + 4 * j);
  });
}

// Asks for the codes that come kAhead bytes after those of block b, and for the scales of b in the next panel.
template <class F>
JAXSERVE_ASKS inline void ask_for_more(const uint8_t* panel, const Panel<F>& layout, int64_t b) {
  constexpr int together = std::max(1, kLine / F::scale_bytes);  // blocks whose scales share a line
  const int64_t codes = b * F::code_bytes + kAhead;
  ask_for(panel + codes + (codes < layout.scales() ? 0 : layout.bytes() - layout.scales()), F::code_bytes);
  const uint8_t* next = panel + layout.bytes();
  if (b % together == 0) ask_for(next + layout.scales() + b * F::scale_bytes, F::scale_bytes);
  if (F::shared && b % kSharers == 0) ask_for(next + layout.shared() + b / kSharers * F::shared_bytes, F::shared_bytes);
}

// y[t][0..16) of one panel, for a tile of rows of x.
template <class F, int tile>
void multiply(const uint8_t* panel, const Panel<F>& layout, uint8_t* x, float* y) {
  constexpr TileBlock block{tile, F::runs};
  Floats sums[tile];
  for (Floats& sum : sums) sum = splat16(0.0f);
  SharedScales<F> shared{};
  for (int64_t b = 0; b < layout.blocks; b++, x += block.bytes()) {
    const uint8_t* codes = panel + b * F::code_bytes;
    ask_for_more<F>(panel, layout, b);
    if (b % kSharers == 0) shared.load(panel + layout.shared() + b / kSharers * F::shared_bytes);
    Floats scale[F::runs], minimum[F::runs];
    unpack_scales<F>(panel + layout.scales() + b * F::scale_bytes, shared, scale, minimum);
    Ints whole[tile];
    Floats products[tile];
    sum_run<F, tile, 0>(codes, block, x, whole);
    const Floats start = mul(splat16(-kMagic), scale[0]);  // exact: a scale has 19 bits at most
    for (int t = 0; t < tile; t++) products[t] = fma(bits_as_floats(whole[t]), scale[0], start);
    if constexpr (F::runs == 2) {
      sum_run<F, tile, 1>(codes, block, x, whole);
      for (int t = 0; t < tile; t++) products[t] = fma(to_floats(whole[t]), scale[1], products[t]);
    }
    for (int t = 0; t < tile; t++) {
      sums[t] = fma(products[t], splat16(block.scale(x)[t]), sums[t]);
      if constexpr (F::minimum) {
        for (int r = 0; r < F::runs; r++) sums[t] = fma(minimum[r], splat16(block.weight(x, r)[t]), sums[t]);
      }
    }
  }
  for (int t = 0; t < tile; t++) store16(y + t * kPanel, sums[t]);
}

// Rows in the next tile, when there are `left`: no more than needed, and at most kTile.
int tile_of(int64_t left) {
  return left > 12 ? kTile : left > 8 ? 12 : left > 4 ? 8 : left > 2 ? 4 : static_cast<int>(left);
}

template <class F>
void multiply_tile(int tile, const uint8_t* panel, const Panel<F>& layout, uint8_t* x, float* y) {
  switch (tile) {
    case 1: return multiply<F, 1>(panel, layout, x, y);
    case 2: return multiply<F, 2>(panel, layout, x, y);
    case 4: return multiply<F, 4>(panel, layout, x, y);
    case 8: return multiply<F, 8>(panel, layout, x, y);
    case 12: return multiply<F, 12>(panel, layout, x, y);
    default: return multiply<F, kTile>(panel, layout, x, y);
  }
}

// The first rows of x, `tokens` of them, as a tile; its others are zero.
template <class F>
void make_tile(const float* x, int64_t tokens, int64_t depth, int tile, uint8_t* to) {
  const TileBlock block{tile, F::runs};
  for (int64_t b = 0; b < depth / kRun; b++, to += block.bytes()) {
    if (tokens < tile) std::fill_n(to, block.bytes(), uint8_t{0});
    for (int64_t t = 0; t < tokens; t++) quantise<F>(x + t * depth + b * kRun, block, to, static_cast<int>(t));
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
  };
  const Panel<F> layout(depth);
  const int64_t panels = (outputs + kPanel - 1) / kPanel, threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t all_panels = panels * static_cast<int64_t>(groups.size());
  const int64_t together = std::clamp<int64_t>(all_panels / (8 * threads), 1, 16);
  std::vector<Tile> tiles;
  std::vector<Item> items;
  int64_t bytes = 0, values = 0;
  for (const Group& group : groups) {
    const int64_t first = static_cast<int64_t>(tiles.size());
    for (int64_t t = 0; t < group.count; t += kTile) {
      const int size = tile_of(group.count - t);
      tiles.push_back({group.first + t, std::min<int64_t>(size, group.count - t), size, bytes});
      bytes += TileBlock{size, F::runs}.bytes() * layout.blocks;
    }
    values += group.count * depth;
    const int64_t end = static_cast<int64_t>(tiles.size());
    for (int64_t p = 0; p < panels; p += together) {
      for (int64_t i = first; i < end; i += kTiles) {
        items.push_back({w + (group.matrix * panels + p) * layout.bytes(), p, std::min(together, panels - p), i,
                         std::min<int64_t>(kTiles, end - i)});
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
    for (int64_t p = 0; p < item.panels; p++) {
      const int64_t column = (item.panel + p) * kPanel, count = std::min<int64_t>(kPanel, outputs - column);
      for (int64_t j = item.tile; j < item.tile + item.tiles; j++) {
        const Tile& tile = tiles[j];
        float sums[kTile * kPanel];
        multiply_tile<F>(tile.size, item.w + p * layout.bytes(), layout, rows + tile.at, sums);
        for (int64_t t = 0; t < tile.count; t++) {
          std::copy_n(sums + t * kPanel, count, y + (tile.first + t) * outputs + column);
        }
      }
    }
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
                    int64_t matrices, const std::vector<Group>& groups, int64_t format) {
  if (!is_float(x) || !is_float(y)) return invalid(who, "x and the result must be float32 or bfloat16");
  const int64_t outputs = y.dimensions()[1], depth = x.dimensions()[1];
  bool fit = false;
  const bool known = with_format(format, [&](auto f) {
    using F = decltype(f);
    fit = fits<F>(static_cast<int64_t>(w.element_count()), matrices, outputs, depth);
    if (!fit) return;
    expect_pages(y);
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
        row_of<F>(w.typed_data(), std::clamp<int64_t>(ids.typed_data()[t], 0, outputs - 1), depth, to + t * depth);
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
