// Products with dense weights for CPU: y[t][n] = sum over k of x[t][k] * w[n][k], weights in panels; with one matrix for
// all rows of x, or with one for each group of them.
//
// A panel holds 16 rows of w side by side, [K][16], so that a row of y grows in vectors, one k after the other. That
// order is the same for every row: a row of y is the same bit for bit whatever other rows are computed. Processors that
// multiply bfloat16 take weights of it in pairs of k (bf16_pairs.h), on vectors or on tile registers (bf16_tiles.h).

#include <algorithm>
#include <type_traits>
#include <vector>

#include "bf16_pairs.h"
#include "bf16_tiles.h"
#include "buffers.h"
#include "groups.h"
#include "parallel.h"
#include "product.h"
#include "simd.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

constexpr int kDepth = 256;   // steps of a piece of w that stays in the second-level cache while rows of x pass by
constexpr int kTokens = 96;   // rows of x that one item of work takes
constexpr int kOutputs = 64;  // rows of w that they are multiplied by together
constexpr int kOutputsOfOne = 128;  // the same for a single row of x

// The product of `tokens` rows of x and the panels of w from `w` on, `columns` rows of w. A step is a number of x and w,
// or a pair.
template <class X, class W>
void block(const X* x, int64_t tokens, const W* w, int64_t depth, int64_t columns, float* y) {
  if (tokens == 1) {
    return product<false>(1, columns, x, depth, depth, Panels<W>{w, depth, kAhead / int64_t{sizeof(W)}}, y, columns);
  }
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t count = std::min<int64_t>(kDepth, depth - k);
    // After the last piece come the next columns.
    const int64_t ahead = kPanel * (k + count < depth ? count : (columns / kPanel - 1) * depth + count);
    const Panels<W> piece{w + k * kPanel, depth, ahead};
    if (k == 0) {
      product<false>(tokens, columns, x, depth, count, piece, y, columns);
    } else {
      product<true>(tokens, columns, x + k, depth, count, piece, y, columns);
    }
  }
}

// Matrices of [outputs, depth] follow one another from `w` on.
template <class X, class W>
void run(ffi::ThreadPool& pool, const X* x, const W* w, float* y, const std::vector<Group>& groups, int64_t depth,
         int64_t outputs) {
  struct Item {
    const W* w;
    int64_t t, n, tokens, outputs;
  };
  std::vector<Item> items;
  const int64_t padded = round_up(outputs, kPanel), threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t wide = std::clamp<int64_t>(outputs / (8 * threads) / kOutputs, 1, 4) * kOutputs;
  for (const Group& group : groups) {
    for (int64_t n = 0; n < outputs; n += wide) {
      for (int64_t t = 0; t < group.count; t += kTokens) {
        items.push_back({w + (group.matrix * padded + n) * depth, group.first + t, n,
                         std::min<int64_t>(kTokens, group.count - t), std::min(wide, outputs - n)});
      }
    }
  }
  parallel_for(pool, static_cast<int64_t>(items.size()), [&](int64_t i) {
    const Item& item = items[i];
    const int64_t together = item.tokens == 1 ? kOutputsOfOne : kOutputs;
    for (int64_t n = 0; n < item.outputs; n += together) {
      const int64_t count = std::min(together, item.outputs - n), columns = round_up(count, kPanel);
      alignas(64) float sums[kTokens * kOutputs];
      block(x + item.t * depth, item.tokens, item.w + n * depth, depth, columns, sums);
      for (int64_t t = 0; t < item.tokens; t++) {
        std::copy_n(sums + t * columns, count, y + (item.t + t) * outputs + item.n + n);
      }
    }
  });
}

// Calls `call(data)` with the weights as what they are; false for a type that is none of ours.
template <class Call>
bool with_weights(ffi::AnyBuffer w, Call&& call) {
  switch (w.element_type()) {
    case ffi::DataType::F32: return call(static_cast<const float*>(w.untyped_data())), true;
    case ffi::DataType::BF16: return call(static_cast<const bf16*>(w.untyped_data())), true;
    case ffi::DataType::F16: return call(static_cast<const f16*>(w.untyped_data())), true;
    default: return false;
  }
}

#if defined(JAXSERVE_TILES)
template <class X>
void run_in_pairs(ffi::ThreadPool& pool, const X* x, const bf16* w, ffi::AnyBuffer y, const std::vector<Group>& groups,
                  int64_t depth, int64_t outputs) {
  with_floats(y, [&](auto* to) { run_on_tiles(pool, x, w, to, groups, depth, outputs); });
}
#elif defined(JAXSERVE_PAIRS)
template <class X>
void run_in_pairs(ffi::ThreadPool& pool, const X* x, const bf16* w, ffi::AnyBuffer y, const std::vector<Group>& groups,
                  int64_t depth, int64_t outputs) {
  const int64_t count = y.dimensions()[0], pairs = paired_depth(depth) / 2;
  const Pair* rows = reinterpret_cast<const Pair*>(x);
  if (std::is_same_v<X, float> || depth % 2 != 0) {
    Pair* const copy = reinterpret_cast<Pair*>(scratch(count * pairs));
    each_row(pool, count, depth, [&](int64_t r) { put_pairs(x + r * depth, depth, copy + r * pairs); });
    rows = copy;
  }
  fill_floats(y, [&](float* to) { run(pool, rows, reinterpret_cast<const Pair*>(w), to, groups, pairs, outputs); });
}
#endif

// K of the panels of weights with `depth` steps of k.
int64_t panel_depth([[maybe_unused]] bool is_bf16, int64_t depth) {
#if defined(JAXSERVE_PAIRS)
  if (is_bf16) return paired_depth(depth);
#endif
  return depth;
}
int64_t panel_depth(ffi::AnyBuffer w, int64_t depth) {
  return panel_depth(w.element_type() == ffi::DataType::BF16, depth);
}

template <class W>
void multiply(ffi::ThreadPool& pool, ffi::AnyBuffer x, const W* w, ffi::AnyBuffer y, const std::vector<Group>& groups) {
  const int64_t depth = x.dimensions()[1], outputs = y.dimensions()[1];
#if defined(JAXSERVE_PAIRS)
  if constexpr (std::is_same_v<W, bf16>) {
    return with_floats(x, [&](const auto* rows) { run_in_pairs(pool, rows, w, y, groups, depth, outputs); });
  }
#endif
  std::vector<float> copy;
  const float* rows = floats_of(x, copy);
  fill_floats(y, [&](float* to) { run(pool, rows, w, to, groups, depth, outputs); });
}

ffi::Error multiply(ffi::ThreadPool& pool, const char* who, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::AnyBuffer y,
                    std::vector<Group> groups) {
  if (!is_float(x) || !is_float(y)) return invalid(who, "x and the result must be float32 or bfloat16");
  expect_pages(y);
  leave_out_zeros(x, y, groups);
  const bool known = with_weights(w, [&](const auto* weights) { multiply(pool, x, weights, y, groups); });
  return known ? ffi::Error::Success() : invalid(who, "weights must be float32, bfloat16 or float16");
}

ffi::Error linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> y) {
  const auto xs = x.dimensions(), ws = w.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ws.size() != 3 || ys.size() != 2 || ws[1] != panel_depth(w, xs[1]) || ys[0] != xs[0] ||
      ws[2] != kPanel || ws[0] != (ys[1] + kPanel - 1) / kPanel) {
    return invalid("linear", "x must be [T, K], w [N / 16, K, 16] and the result [T, N]");
  }
  return multiply(pool, "linear", x, w, *y, one_group(xs[0]));
}

ffi::Error grouped_linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Buffer<ffi::S32> sizes,
                          ffi::Result<ffi::AnyBuffer> y) {
  const auto xs = x.dimensions(), ws = w.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ws.size() != 4 || ys.size() != 2 || ws[2] != panel_depth(w, xs[1]) || ys[0] != xs[0] ||
      ws[3] != kPanel || ws[1] != (ys[1] + kPanel - 1) / kPanel || sizes.dimensions().size() != 1 ||
      sizes.dimensions()[0] != ws[0]) {
    return invalid("grouped_linear", "x must be [T, K], w [E, N / 16, K, 16], sizes [E] and the result [T, N]");
  }
  std::vector<Group> groups;
  if (!groups_of(sizes, xs[0], groups)) return invalid("grouped_linear", bad_sizes(xs[0]));
  return multiply(pool, "grouped_linear", x, w, *y, groups);
}

template <class W>
void gather(const W* w, const int32_t* ids, int64_t tokens, int64_t depth, int64_t outputs, float* y) {
  for (int64_t t = 0; t < tokens; t++) {
    if (ids[t] < 0) {
      std::fill_n(y + t * depth, depth, 0.0f);
      continue;
    }
    const int64_t n = std::min<int64_t>(ids[t], outputs - 1);
#if defined(JAXSERVE_PAIRS)
    if constexpr (std::is_same_v<W, bf16>) {
      row_of_pairs(w, n, depth, y + t * depth);
      continue;
    }
#endif
    const W* from = w + n / kPanel * depth * kPanel + n % kPanel;
    for (int64_t k = 0; k < depth; k++) y[t * depth + k] = to_float(from[k * kPanel]);
  }
}

ffi::Error embed(ffi::AnyBuffer w, ffi::Buffer<ffi::S32> ids, ffi::Result<ffi::AnyBuffer> y, int64_t outputs) {
  const auto ws = w.dimensions(), ys = y->dimensions();
  const int64_t tokens = static_cast<int64_t>(ids.element_count());
  if (ws.size() != 3 || ws[2] != kPanel || outputs < 1 || ws[0] != (outputs + kPanel - 1) / kPanel ||
      ys.size() != 2 || ys[0] != tokens || ws[1] != panel_depth(w, ys[1])) {
    return invalid("embed", "w must be [N / 16, K, 16], ids [T] and the result [T, K]");
  }
  if (!is_float(*y)) return invalid("embed", "the result must be float32 or bfloat16");
  const bool known = with_weights(w, [&](const auto* weights) {
    fill_floats(*y, [&](float* to) { gather(weights, ids.typed_data(), tokens, ys[1], outputs, to); });
  });
  return known ? ffi::Error::Success() : invalid("embed", "weights must be float32, bfloat16 or float16");
}

template <class T>
void pack(const T* from, int64_t outputs, int64_t depth, T* to) {
  constexpr int64_t kTile = 64;  // k at a time, so that 16 rows are read in whole cache lines
  for (int64_t n = 0; n < outputs; n += kPanel, to += depth * kPanel) {
    const int64_t count = std::min<int64_t>(kPanel, outputs - n);
    for (int64_t k0 = 0; k0 < depth; k0 += kTile) {
      const int64_t end = std::min(depth, k0 + kTile);
      for (int64_t i = 0; i < kPanel; i++) {
        for (int64_t k = k0; k < end; k++) to[k * kPanel + i] = i < count ? from[(n + i) * depth + k] : T{};
      }
    }
  }
}

}  // namespace
}  // namespace jaxserve

// K of the panels of weights [N][K], by ggml's code of their type: 0 for float32, 1 for float16, 30 for bfloat16.
extern "C" int64_t jaxserve_panel_depth(int64_t type, int64_t depth) { return jaxserve::panel_depth(type == 30, depth); }

// w [N][K] to panels [N / 16][that K][16], zeros after the last row. Without XLA: for loading.
extern "C" void jaxserve_pack(const void* w, int64_t outputs, int64_t depth, int64_t type, void* panels) {
#if defined(JAXSERVE_PAIRS)
  if (type == 30) {
    return jaxserve::pack_pairs(static_cast<const jaxserve::bf16*>(w), outputs, depth,
                                static_cast<jaxserve::bf16*>(panels));
  }
#endif
  if (type == 0) {
    jaxserve::pack(static_cast<const uint32_t*>(w), outputs, depth, static_cast<uint32_t*>(panels));
  } else {
    jaxserve::pack(static_cast<const uint16_t*>(w), outputs, depth, static_cast<uint16_t*>(panels));
  }
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_linear, jaxserve::linear,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_grouped_linear, jaxserve::grouped_linear,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_embed, jaxserve::embed,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("outputs"));
