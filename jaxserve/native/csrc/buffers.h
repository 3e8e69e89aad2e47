// Buffers of float32 or bfloat16 seen as floats, which is what the kernels compute with; and an error in one line.
#pragma once

#include <sys/mman.h>

#include <string>
#include <vector>

#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace jaxserve {

inline xla::ffi::Error invalid(const char* who, const std::string& what) {
  return xla::ffi::Error::InvalidArgument(std::string(who) + ": " + what);
}

inline bool is_float(xla::ffi::AnyBuffer buffer) {
  return buffer.element_type() == xla::ffi::DataType::F32 || buffer.element_type() == xla::ffi::DataType::BF16;
}

// Before a large result is written, as logits are: XLA takes memory for each step anew, and the system finds it 4 KiB at
// a time when it is touched; in huge pages that takes a third of the time.
inline void expect_pages([[maybe_unused]] xla::ffi::AnyBuffer result) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  if (result.size_bytes() < 2 * kHuge) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(result.untyped_data()), end = begin + result.size_bytes();
  const uintptr_t first = begin / kHuge * kHuge, last = (end + kHuge - 1) / kHuge * kHuge;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // of what is mapped; no more than advice
#endif
}

// Calls `call(data)` with the buffer's numbers as what they are, float32 or bfloat16.
template <class Call>
void with_floats(xla::ffi::AnyBuffer buffer, Call&& call) {
  if (buffer.element_type() == xla::ffi::DataType::F32) return call(static_cast<float*>(buffer.untyped_data()));
  call(static_cast<bf16*>(buffer.untyped_data()));
}

// The buffer's numbers as floats: where they are, or in `copy`.
inline const float* floats_of(xla::ffi::AnyBuffer buffer, std::vector<float>& copy) {
  if (buffer.element_type() == xla::ffi::DataType::F32) return static_cast<const float*>(buffer.untyped_data());
  const int64_t count = static_cast<int64_t>(buffer.element_count());
  copy.resize(count);
  to_floats(static_cast<const bf16*>(buffer.untyped_data()), count, count, copy.data());
  return copy.data();
}

// Calls `fill(floats)`, and rounds what it wrote where the buffer is not of floats.
template <class Fill>
void fill_floats(xla::ffi::AnyBuffer buffer, Fill&& fill) {
  if (buffer.element_type() == xla::ffi::DataType::F32) return fill(static_cast<float*>(buffer.untyped_data()));
  std::vector<float> copy(buffer.element_count());
  fill(copy.data());
  bf16* to = static_cast<bf16*>(buffer.untyped_data());
  for (size_t i = 0; i < copy.size(); i++) from_float(copy[i], to + i);
}

}  // namespace jaxserve
