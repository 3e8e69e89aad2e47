// Rotary position embedding for CPU, from cosines and sines that a step computes once: XLA would fuse them into every
// layer's rotation and compute them anew for each head.

#include <string>

#include "buffers.h"
#include "parallel.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

// The pairs (i, i + half) of a head, turned; what lies behind them stays. `to` has room for 2 * half floats.
inline void turn(const float* x, const float* cos, const float* sin, int64_t half, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(to + i, sub(mul(a, c), mul(b, s)));
    store(to + half + i, add(mul(b, c), mul(a, s)));
  }
  for (; i < half; i++) {
    const float a = x[i], b = x[half + i];
    to[i] = a * cos[i] - b * sin[i];
    to[half + i] = b * cos[i] + a * sin[i];
  }
}

inline void rotate_head(const float* x, const float* cos, const float* sin, int64_t half, int64_t head_dim, float* y) {
  turn(x, cos, sin, half, y);
  std::copy(x + 2 * half, x + head_dim, y + 2 * half);
}

inline void rotate_head(const bf16* x, const float* cos, const float* sin, int64_t half, int64_t head_dim, bf16* y) {
  float* const wide = scratch(4 * half);
  to_floats(x, 2 * half, 2 * half, wide);
  turn(wide, cos, sin, half, wide + 2 * half);
  for (int64_t i = 0; i < 2 * half; i++) from_float(wide[2 * half + i], y + i);
  std::copy(x + 2 * half, x + head_dim, y + 2 * half);
}

ffi::Error rotate(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin,
                  ffi::Result<ffi::AnyBuffer> y) {
  const auto xs = x.dimensions(), ys = y->dimensions(), cs = cos.dimensions(), ss = sin.dimensions();
  if (xs.size() != 3 || ys.size() != 3 || !std::equal(xs.begin(), xs.end(), ys.begin())) {
    return invalid("rotate", "x and the result must be [T, N, H]");
  }
  if (cs.size() != 2 || ss.size() != 2 || cs[0] != xs[0] || ss[0] != xs[0] || cs[1] != ss[1] || 2 * cs[1] > xs[2]) {
    return invalid("rotate", "cosines and sines must be [T, R], 2 R at most H");
  }
  if (!is_float(x) || x.element_type() != y->element_type()) {
    return invalid("rotate", "x must be float32 or bfloat16, and the result of its type");
  }
  const auto call = [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(x.untyped_data());
    T* to = static_cast<T*>(y->untyped_data());
    const int64_t heads = xs[1], head_dim = xs[2], half = cs[1];
    each_row(pool, xs[0], heads * head_dim, [&](int64_t t) {
      for (int64_t at = t * heads * head_dim; at < (t + 1) * heads * head_dim; at += head_dim) {
        rotate_head(from + at, cos.typed_data() + t * half, sin.typed_data() + t * half, half, head_dim, to + at);
      }
    });
    return ffi::Error::Success();
  };
  return x.element_type() == ffi::DataType::F32 ? call(float{}) : call(bf16{});
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_rotate, jaxserve::rotate,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::AnyBuffer>());
