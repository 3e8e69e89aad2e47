// Sharing work with XLA's own threads, and the memory that each of them keeps; no threads of ours.
#pragma once

#include <cstdint>
#include <functional>

#include "xla/ffi/api/ffi.h"

namespace jaxserve {

// Calls body(i) for every i in [0, count) and returns when all have returned. The caller works too, and waits only for
// items that a thread has begun, so a pool that is busy elsewhere can delay nothing and block nobody.
void parallel_for(xla::ffi::ThreadPool& pool, int64_t count, const std::function<void(int64_t)>& body);

// At least `floats` floats of this thread's, aligned for any vector; the next call on the thread gives the same ones.
float* scratch(int64_t floats);

}  // namespace jaxserve
