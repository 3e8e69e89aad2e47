// Rows of x in groups, each of which is multiplied by a matrix of its own.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

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

}  // namespace jaxserve
