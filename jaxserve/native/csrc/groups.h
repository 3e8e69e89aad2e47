// Rows of x in groups, each of which is multiplied by a matrix of its own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "buffers.h"
#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace jaxserve {

struct Group {
  int64_t matrix, first, count;  // which matrix; rows [first, first + count) of x
};

// The groups that have rows, `sizes` being how many rows each matrix gets, one after the other. False unless none is
// below 0 and all together are `rows`.
inline bool groups_of(xla::ffi::Buffer<xla::ffi::S32> sizes, int64_t rows, std::vector<Group>& groups) {
  int64_t first = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(sizes.element_count()); i++) {
    const int64_t count = sizes.typed_data()[i];
    if (count < 0 || count > rows - first) return false;
    if (count > 0) groups.push_back({i, first, count});
    first += count;
  }
  return first == rows;
}

inline std::string bad_sizes(int64_t rows) {
  return "sizes must be 0 or more each, and together the " + std::to_string(rows) + " rows of x";
}

// All rows by the one matrix that there is.
inline std::vector<Group> one_group(int64_t rows) {
  return rows == 0 ? std::vector<Group>() : std::vector<Group>{{0, 0, rows}};
}

// Whether all of them are 0 or -0.
template <class T>
bool all_zeros(const T* numbers, int64_t count) {
  constexpr int64_t kTogether = 64;  // in vectors, and nearly always the first that tell
  for (int64_t i = 0; i < count; i += kTogether) {
    int some = 0;
    for (int64_t j = i; j < std::min(count, i + kTogether); j++) some |= to_float(numbers[j]) != 0.0f;
    if (some) return false;
  }
  return true;
}

// Ends each group before the rows of zeros that it ends with, and writes the zeros that are their products to y: a step
// with fewer tokens than it has room for is filled up with such rows.
inline void leave_out_zeros(xla::ffi::AnyBuffer x, xla::ffi::AnyBuffer y, std::vector<Group>& groups) {
  const int64_t depth = x.dimensions()[1];
  const int64_t row_bytes = y.dimensions()[0] == 0 ? 0 : static_cast<int64_t>(y.size_bytes()) / y.dimensions()[0];
  with_floats(x, [&](const auto* rows) {
    for (Group& group : groups) {
      const int64_t end = group.first + group.count;
      while (group.count > 0 && all_zeros(rows + (group.first + group.count - 1) * depth, depth)) group.count--;
      const int64_t live = group.first + group.count;
      std::memset(static_cast<char*>(y.untyped_data()) + live * row_bytes, 0, (end - live) * row_bytes);
    }
  });
  groups.erase(std::remove_if(groups.begin(), groups.end(), [](const Group& group) { return group.count == 0; }),
               groups.end());
}

}  // namespace jaxserve
