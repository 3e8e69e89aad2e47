#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

namespace jaxserve {
namespace {

constexpr int kLooks = 2000;  // the last items are short: look so often before the core is given away

// Outlives the call: a task that the pool runs late finds that nothing is left, and never touches `body`.
struct Shared {
  const int64_t count;
  const std::function<void(int64_t)>* const body;
  std::atomic<int64_t> next{0}, done{0};

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      (*body)(i);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

}  // namespace

void parallel_for(xla::ffi::ThreadPool& pool, int64_t count, const std::function<void(int64_t)>& body) {
  const int64_t threads = std::min<int64_t>(pool.num_threads(), count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; i++) body(i);
    return;
  }
  const std::shared_ptr<Shared> shared(new Shared{count, &body});
  for (int64_t t = 1; t < threads; t++) pool.Schedule([shared] { shared->work(); });
  shared->work();
  for (int looks = 0; shared->done.load(std::memory_order_acquire) < count; looks++) {
    if (looks > kLooks) std::this_thread::yield();
  }
}

float* scratch(int64_t floats) {
  constexpr int64_t kAlign = 64;
  static thread_local std::vector<float> memory;
  const size_t needed = static_cast<size_t>(floats) + kAlign / sizeof(float);
  if (memory.size() < needed) memory.resize(needed);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (kAlign - address % kAlign) % kAlign / sizeof(float);
}

}  // namespace jaxserve
