// Products of each head with a matrix of its own, for latent attention on CPU: XLA sums them in an order that the number
// of tokens changes.

#include <string>
#include <vector>

#include "buffers.h"
#include "parallel.h"
#include "product.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kTogether = 48;  // tokens of an item of work

// x [tokens][inputs], rows `apart` floats from each other, times w [inputs][outputs], to y [tokens][outputs] with rows
// `y_apart` from each other.
template <class W>
void by_rows(const float* x, int64_t tokens, int64_t apart, const W* w, int64_t inputs, int64_t outputs, float* y,
             int64_t y_apart) {
  const int64_t wide = round_up(outputs, kLanes);
  if (wide == outputs) return product<false>(tokens, outputs, x, apart, inputs, Strided<W>{w, outputs}, y, y_apart);
  float* const filled = scratch((inputs + tokens) * wide);
  float* const sums = filled + inputs * wide;
  for (int64_t i = 0; i < inputs; i++) to_floats(w + i * outputs, outputs, wide, filled + i * wide);
  product<false>(tokens, wide, x, apart, inputs, Strided<float>{filled, wide}, sums, wide);
  for (int64_t t = 0; t < tokens; t++) std::copy_n(sums + t * wide, outputs, y + t * y_apart);
}

// The same times the transpose of w [outputs][inputs].
template <class W>
void by_columns(const float* x, int64_t tokens, int64_t apart, const W* w, int64_t inputs, int64_t outputs, float* y,
                int64_t y_apart) {
  float* const columns = scratch((inputs + tokens) * kPanel);
  float* const sums = columns + inputs * kPanel;
  for (int64_t o = 0; o < outputs; o += kPanel) {
    const W* rows[kPanel];  // past the end the last one again, whose sums are not used
    for (int64_t r = 0; r < kPanel; r++) rows[r] = w + std::min(o + r, outputs - 1) * inputs;
    transpose16(rows, static_cast<int>(inputs), columns, kPanel);
    product<false>(tokens, kPanel, x, apart, inputs, Strided<float>{columns, kPanel}, sums, kPanel);
    const int64_t count = std::min<int64_t>(kPanel, outputs - o);
    for (int64_t t = 0; t < tokens; t++) std::copy_n(sums + t * kPanel, count, y + t * y_apart + o);
  }
}

ffi::Error by_head(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> y,
                   int64_t first, bool transposed) {
  const auto xs = x.dimensions(), ws = w.dimensions(), ys = y->dimensions();
  if (xs.size() != 3 || ws.size() != 3 || ys.size() != 3 || ws[0] != xs[1] || ys[0] != xs[0] || ys[1] != xs[1]) {
    return invalid("by_head", "x must be [T, N, I], w [N, M, R] and the result [T, N, O]");
  }
  const int64_t heads = xs[1], inputs = xs[2], outputs = ys[2], used = transposed ? outputs : inputs;
  if (first < 0 || used < 1 || first > ws[1] - used || ws[2] != (transposed ? inputs : outputs) || ws[2] < 1) {
    return invalid("by_head", "the rows of w do not fit x and the result");
  }
  if (!is_float(x) || !is_float(*y) || !is_float(w)) {
    return invalid("by_head", "x, w and the result must be float32 or bfloat16");
  }
  const int64_t tokens = xs[0], tiles = (tokens + kTogether - 1) / kTogether;
  std::vector<float> copy;
  const float* from = floats_of(x, copy);
  fill_floats(*y, [&](float* to) {
    with_floats(w, [&](const auto* matrices) {
      parallel_for(pool, heads * tiles, [&](int64_t item) {
        const int64_t n = item / tiles, t = item % tiles * kTogether, count = std::min(kTogether, tokens - t);
        const auto* matrix = matrices + (n * ws[1] + first) * ws[2];
        const float* rows = from + (t * heads + n) * inputs;
        float* sums = to + (t * heads + n) * outputs;
        const auto multiply = transposed ? by_columns<std::decay_t<decltype(*matrix)>>
                                         : by_rows<std::decay_t<decltype(*matrix)>>;
        multiply(rows, count, heads * inputs, matrix, inputs, outputs, sums, heads * outputs);
      });
    });
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_by_head, jaxserve::by_head,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("first")
                                  .Attr<bool>("transposed"));
