// Sharing work with XLA's own threads, and the memory that each of them keeps; no threads of ours.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#include "xla/ffi/api/ffi.h"

namespace jaxserve {

// Calls body(i) for every i in [0, count) and returns when all have returned. The caller works too, and waits only for
// items that a thread has begun, so a pool that is busy elsewhere can delay nothing and block nobody.
void parallel_for(xla::ffi::ThreadPool& pool, int64_t count, const std::function<void(int64_t)>& body);

// row(r) of each of `rows` rows of `width` numbers, by as many threads as that is worth.
template <class Row>
void each_row(xla::ffi::ThreadPool& pool, int64_t rows, int64_t width, const Row& row) {
  constexpr int64_t kTogether = 32 * 1024;  // numbers that are worth a thread
  const int64_t each = std::max<int64_t>(1, kTogether / std::max<int64_t>(1, width));
  parallel_for(pool, (rows + each - 1) / each, [&](int64_t item) {
    for (int64_t r = item * each; r < std::min(rows, (item + 1) * each); r++) row(r);
  });
}

// At least `floats` floats of this thread's, aligned for any vector; the next call on the thread gives the same ones.
float* scratch(int64_t floats);

}  // namespace jaxserve
