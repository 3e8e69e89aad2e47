// Root-mean-square norm and layer norm of rows for CPU. XLA's own sums a row in an order that changes with the number of rows; this
// one always in 16 lanes, folded by one fixed tree, so that a row's result does not depend on its neighbours.

#include <cmath>
#include <string>

#include "parallel.h"
#include "wide.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

// Lane i + 8 is added to lane i, then i + 4, i + 2, i + 1.
inline float fold(Floats sum) {
  float lanes[16];
  store16(lanes, sum);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// y = x / sqrt(mean(x^2) + eps), rounded to T before it is multiplied by the weight. `around_one`: the weight is what is
// to be added to 1, and nothing is rounded before the product.
template <class T, bool around_one>
void norm_row(const T* x, const T* weight, int64_t width, float eps, T* y) {
  Floats squares = splat16(0.0f);
  const int64_t whole = width / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) {
    const Floats v = load16(x + i);
    squares = fma(v, v, squares);
  }
  if (whole < width) {
    float rest[16];
    to_floats(x + whole, width - whole, 16, rest);
    squares = fma(load16(rest), load16(rest), squares);
  }
  const float factor = 1.0f / std::sqrt(fold(squares) / static_cast<float>(width) + eps);
  if constexpr (std::is_same_v<T, float>) {
    const Floats base = splat16(around_one ? 1.0f : 0.0f);
    for (int64_t i = 0; i < whole; i += 16) {
      const Floats w = around_one ? add(load16(weight + i), base) : load16(weight + i);
      store16(y + i, mul(mul(load16(x + i), splat16(factor)), w));
    }
    for (int64_t i = whole; i < width; i++) y[i] = x[i] * factor * (around_one ? weight[i] + 1.0f : weight[i]);
  } else if constexpr (around_one) {
    for (int64_t i = 0; i < width; i++) from_float(to_float(x[i]) * factor * (to_float(weight[i]) + 1.0f), y + i);
  } else {
    for (int64_t i = 0; i < width; i++) {
      T rounded;
      from_float(to_float(x[i]) * factor, &rounded);
      from_float(to_float(rounded) * to_float(weight[i]), y + i);
    }
  }
}

// y = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias, rounded to T once; `centred` has room for the row.
template <class T>
void layer_norm_row(const T* x, const T* weight, const T* bias, int64_t width, float eps, float* centred, T* y) {
  const int64_t padded = (width + 15) / 16 * 16;
  to_floats(x, width, padded, centred);
  Floats sum = splat16(0.0f), squares = splat16(0.0f);
  for (int64_t i = 0; i < padded; i += 16) sum = add(sum, load16(centred + i));
  const Floats minus_mean = splat16(-fold(sum) / static_cast<float>(width));
  for (int64_t i = 0; i < padded; i += 16) store16(centred + i, add(load16(centred + i), minus_mean));
  std::fill(centred + width, centred + padded, 0.0f);
  for (int64_t i = 0; i < padded; i += 16) squares = fma(load16(centred + i), load16(centred + i), squares);
  const float factor = 1.0f / std::sqrt(fold(squares) / static_cast<float>(width) + eps);
  for (int64_t i = 0; i < width; i++) from_float(centred[i] * factor * to_float(weight[i]) + to_float(bias[i]), y + i);
}

template <class T, bool around_one>
void norm(ffi::ThreadPool& pool, const T* x, const T* weight, int64_t rows, int64_t width, float eps, T* y) {
  each_row(pool, rows, width, [&](int64_t r) {
    norm_row<T, around_one>(x + r * width, weight, width, eps, y + r * width);
  });
}

ffi::Error rms_norm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::Result<ffi::AnyBuffer> y,
                    float eps, bool around_one) {
  const auto xs = x.dimensions(), ws = weight.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ws.size() != 1 || ys.size() != 2 || ws[0] != xs[1] || ys[0] != xs[0] || ys[1] != xs[1]) {
    return ffi::Error::InvalidArgument("rms_norm: x and the result must be [T, D] and the weight [D]");
  }
  if (weight.element_type() != x.element_type() || y->element_type() != x.element_type()) {
    return ffi::Error::InvalidArgument("rms_norm: x, the weight and the result must be of one type");
  }
  const auto call = [&](auto element) {
    using T = decltype(element);
    const auto rows = around_one ? norm<T, true> : norm<T, false>;
    rows(pool, static_cast<const T*>(x.untyped_data()), static_cast<const T*>(weight.untyped_data()), xs[0], xs[1],
         eps, static_cast<T*>(y->untyped_data()));
    return ffi::Error::Success();
  };
  switch (x.element_type()) {
    case ffi::DataType::F32: return call(float{});
    case ffi::DataType::BF16: return call(bf16{});
    default: return ffi::Error::InvalidArgument("rms_norm: x must be float32 or bfloat16");
  }
}

ffi::Error layer_norm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::AnyBuffer bias,
                      ffi::Result<ffi::AnyBuffer> y, float eps) {
  const auto xs = x.dimensions(), ws = weight.dimensions(), bs = bias.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ws.size() != 1 || bs.size() != 1 || ys.size() != 2 || ws[0] != xs[1] || bs[0] != xs[1] ||
      ys[0] != xs[0] || ys[1] != xs[1]) {
    return ffi::Error::InvalidArgument("layer_norm: x and the result must be [T, D], the weight and the bias [D]");
  }
  const auto type = x.element_type();
  if (weight.element_type() != type || bias.element_type() != type || y->element_type() != type) {
    return ffi::Error::InvalidArgument("layer_norm: x, the weight, the bias and the result must be of one type");
  }
  const auto call = [&](auto element) {
    using T = decltype(element);
    const auto of = [](const auto& buffer) { return static_cast<const T*>(buffer.untyped_data()); };
    T* to = static_cast<T*>(y->untyped_data());
    const int64_t width = xs[1];
    each_row(pool, xs[0], width, [&](int64_t r) {
      float* centred = scratch((width + 15) / 16 * 16);
      layer_norm_row(of(x) + r * width, of(weight), of(bias), width, eps, centred, to + r * width);
    });
    return ffi::Error::Success();
  };
  switch (type) {
    case ffi::DataType::F32: return call(float{});
    case ffi::DataType::BF16: return call(bf16{});
    default: return ffi::Error::InvalidArgument("layer_norm: x must be float32 or bfloat16");
  }
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_rms_norm, jaxserve::rms_norm,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("eps")
                                  .Attr<bool>("around_one"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_layer_norm, jaxserve::layer_norm,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("eps"));
