// The kernels' arithmetic without XLA: prints a digest of what they compute from fixed numbers. Compiled by
// test_native.py for instruction sets that this machine may only emulate.

#include <cstdio>

#include "attention.cc"
#include "linear.cc"

namespace {

uint64_t digest = 1469598103934665603u;  // FNV-1a

template <class T>
void add(const std::vector<T>& values) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (size_t i = 0; i < values.size() * sizeof(T); i++) digest = (digest ^ bytes[i]) * 1099511628211u;
}

template <class T>
std::vector<T> numbers(size_t count, uint32_t seed) {  // in [-1, 1), from a linear congruence
  std::vector<T> values(count);
  for (T& value : values) {
    seed = seed * 1664525u + 1013904223u;
    jaxserve::from_float(static_cast<float>(seed >> 8) / (1 << 23) - 1.0f, &value);
  }
  return values;
}

template <class Q, class C>
void attention(int64_t head_dim, int64_t window) {
  const int64_t heads = 6, kv_heads = 2, page = 5, length = 150, queries = 20, pages = 30;
  const auto q = numbers<Q>(queries * heads * head_dim, 1);
  const auto cache = numbers<C>(pages * page * kv_heads * 2 * head_dim, 2);
  std::vector<Q> out(q.size());
  std::vector<int32_t> table(pages);
  for (int i = 0; i < pages; i++) table[i] = i * 7 % pages;
  const int32_t kv_lens[] = {static_cast<int32_t>(length)}, cu_q_lens[] = {0, static_cast<int32_t>(queries)};
  const jaxserve::Step step{heads, kv_heads, head_dim, page, kv_heads * 2 * head_dim, pages, 0.3f, window,
                            kv_lens, table.data(), cu_q_lens};
  for (int64_t first : {0, 7, 8}) {
    const int64_t count = first == 0 ? 7 : first == 7 ? 1 : 12;
    for (int64_t h = 0; h < kv_heads; h++) {
      jaxserve::attend_tile(step, 0, first, count, h, 1, q.data(), cache.data(), out.data());
    }
  }
  add(out);
}

template <class W>
void product(int64_t tokens, int64_t depth, int64_t outputs) {
  const auto x = numbers<float>(tokens * depth, 3);
  const auto w = numbers<W>(outputs * depth, 4);
  const int64_t columns = (outputs + 15) / 16 * 16;
  std::vector<W> panels(columns * depth);
  std::vector<float> y(tokens * columns);
  jaxserve::pack(w.data(), outputs, depth, panels.data());
  jaxserve::block(x.data(), tokens, panels.data(), depth, columns, y.data());
  add(y);
}

}  // namespace

int main() {
  for (const int64_t head_dim : {12, 64, 80}) {
    attention<float, float>(head_dim, 0);
    attention<jaxserve::bf16, jaxserve::bf16>(head_dim, 40);
    attention<float, jaxserve::f16>(head_dim, 0);
  }
  for (const int64_t tokens : {1, 3, 9}) {
    product<float>(tokens, 100, 30);
    product<jaxserve::bf16>(tokens, 1100, 32);
    product<jaxserve::f16>(tokens, 512, 17);
  }
  std::printf("%016llx\n", static_cast<unsigned long long>(digest));
}
