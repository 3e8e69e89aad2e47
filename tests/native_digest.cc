// The kernels' arithmetic without XLA: prints a digest of what they compute from fixed numbers. Compiled by
// test_native.py for instruction sets that this machine may only emulate.

#include <cstdio>

#include "attention.cc"
#include "heads.cc"
#include "linear.cc"
#include "linear_blocks.cc"
#include "norm.cc"
#include "pack_blocks.cc"
#include "rope.cc"
#include "sampling.cc"

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

template <>
std::vector<int8_t> numbers(size_t count, uint32_t seed) {  // any bytes
  std::vector<int8_t> values(count);
  for (int8_t& value : values) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<int8_t>(seed >> 24);
  }
  return values;
}

template <class Q, class C>
void attention(int64_t page, int64_t head_dim, int64_t window, float soft_cap, bool with_sinks, bool causal = true,
               int64_t value_dim = 0) {
  const bool latent = value_dim > 0;
  const int64_t heads = 6, kv_heads = latent ? 1 : 2, length = 150, queries = 20, pages = 30;
  const auto q = numbers<Q>(queries * heads * head_dim, 1);
  const int64_t row = latent ? head_dim + 4 : kv_heads * 2 * head_dim, values = latent ? value_dim : head_dim;
  const auto cache = numbers<C>(pages * page * row, 2);
  const auto sinks = numbers<float>(heads, 6);
  auto scales = numbers<float>(pages * kv_heads * 2 * page, 7);
  for (float& scale : scales) scale *= 0.02f;
  std::vector<Q> out(queries * heads * values);
  std::vector<int32_t> table(pages);
  const int first_page = 3;
  for (int i = 0; i < pages; i++) table[i] = i * 7 % pages - first_page;
  const int32_t kv_lens[] = {static_cast<int32_t>(length)}, cu_q_lens[] = {0, static_cast<int32_t>(queries)};
  const jaxserve::Step step{heads, kv_heads, head_dim, values, page, row, pages, first_page, latent, 0.3f, soft_cap,
                            window, causal, kv_lens, table.data(), cu_q_lens, with_sinks ? sinks.data() : nullptr, scales.data()};
  for (int64_t first : {0, 7, 8}) {
    const int64_t count = first == 0 ? 7 : first == 7 ? 1 : 12, all = heads / kv_heads;
    for (int64_t h = 0; h < kv_heads; h++) {
      for (int64_t skip = 0; skip < all; skip += 3) {  // of latents in two parts
        jaxserve::attend_tile(step, 0, first, count, {h, 1, skip, 3}, q.data(), cache.data(), out.data());
      }
    }
  }
  add(out);
}

template <class Q, class C>
void keep(int64_t apart) {
  auto x = numbers<Q>(37, 8);
  jaxserve::from_float(1e5f, &x[3]);
  std::vector<C> kept(x.size() * apart);
  jaxserve::keep(x.data(), x.size(), kept.data(), apart);
  add(kept);
}

template <class Q>
void keep_bytes(int64_t apart) {
  std::vector<int8_t> kept(3 * 37 * apart);
  std::vector<float> scales;
  for (const float spoiled : {1.0f, 0.0f, INFINITY, NAN}) {
    auto x = numbers<Q>(37, 9);
    for (size_t i = 0; i < x.size(); i += spoiled == 0.0f ? 1 : 20) jaxserve::from_float(spoiled, &x[i]);
    scales.push_back(jaxserve::keep_bytes(x.data(), x.size(), kept.data(), apart));
    add(kept);
  }
  add(scales);
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

template <class W>
void by_head(int64_t tokens, int64_t inputs, int64_t outputs) {
  const auto x = numbers<float>(tokens * 2 * inputs, 3);  // of two heads, of which one is computed
  const auto w = numbers<W>(inputs * outputs, 4);
  std::vector<float> y(tokens * outputs);
  jaxserve::by_rows(x.data(), tokens, 2 * inputs, w.data(), inputs, outputs, y.data(), outputs);
  add(y);
  jaxserve::by_columns(x.data(), tokens, 2 * inputs, w.data(), inputs, outputs, y.data(), outputs);
  add(y);
}

// Any bytes are codes; scales are set to small ones.
template <class F>
void blocks(int64_t tokens, int64_t depth) {
  const auto x = numbers<float>(tokens * depth, 3);
  const jaxserve::Panel<F> layout(depth);
  std::vector<uint8_t> panel(layout.bytes());
  uint32_t seed = 5;
  for (size_t i = 0; i < panel.size(); i++) {
    seed = seed * 1664525u + 1013904223u;
    panel[i] = static_cast<uint8_t>(seed >> 24);
    const bool half = F::shared ? static_cast<int64_t>(i) >= layout.shared() : static_cast<int64_t>(i) >= layout.scales();
    if (half && F::scales == jaxserve::Scales::kPower) panel[i] = static_cast<uint8_t>(120 + panel[i] % 8);
    else if (half && i % 2) panel[i] = static_cast<uint8_t>(32 + panel[i] % 8);  // float16 from 1/128 to 1/2
  }
  const int tile = jaxserve::tile_of(tokens);
  std::vector<uint8_t> rows(jaxserve::tile_bytes<F>(tile, depth));
  jaxserve::make_tile<F>(x.data(), tokens, depth, tile, rows.data());
  std::vector<float> y(tile * jaxserve::kPanel), row(depth);
  jaxserve::multiply_tile<F>(tile, panel.data(), layout, rows.data(), y.data());
  jaxserve::row_of<F>(panel.data(), 5, depth, row.data());
  add(y);
  add(row);
}

template <class T, bool around_one>
void norm(int64_t width) {
  const auto x = numbers<T>(3 * width, 3), weight = numbers<T>(width, 4);
  std::vector<T> y(x.size());
  for (int64_t r = 0; r < 3; r++) {
    jaxserve::norm_row<T, around_one>(x.data() + r * width, weight.data(), width, 1e-5f, y.data() + r * width);
  }
  add(y);
}

template <class T>
void rotation(int64_t half, int64_t head_dim) {
  const auto x = numbers<T>(head_dim, 3);
  const auto cos = numbers<float>(half, 4), sin = numbers<float>(half, 5);
  std::vector<T> y(x.size());
  jaxserve::rotate_head(x.data(), cos.data(), sin.data(), half, head_dim, y.data());
  add(y);
}

void sampling(int64_t vocab, float scale) {
  auto logits = numbers<float>(vocab, 5);
  for (float& x : logits) x *= scale;
  jaxserve::Kept kept;
  std::vector<int32_t> ids;
  std::vector<float> logprobs;
  for (int32_t position = 0; position < 20; position++) {
    for (const int32_t top_k : {0, 1, 40}) {
      for (const float top_p : {1.0f, 0.9f}) {
        const jaxserve::Row row{0.7f, top_k, top_p, position % 2 * 0.01f, {6, 7}, position};
        ids.push_back(jaxserve::choose(logits.data(), vocab, row, kept));
      }
    }
  }
  const size_t drawn = ids.size(), top = 20;
  ids.resize(drawn + 1 + top);
  logprobs.resize(1 + top);
  jaxserve::logprobs_of(logits.data(), vocab, 9, top, &logprobs[0], &ids[drawn], &ids[drawn + 1], &logprobs[1]);
  const auto mass = jaxserve::mass_of<true>(logits.data(), vocab, 0.7f, scale, -scale);
  add(ids);
  add(logprobs);
  add(std::vector<double>(mass.levels, mass.levels + jaxserve::kNumLevels));
}

}  // namespace

int main() {
  for (const int64_t page : {5, 16}) {
    for (const int64_t head_dim : {12, 64, 80}) {
      attention<float, float>(page, head_dim, 0, 0.0f, false);
      attention<float, float>(page, head_dim, 0, 0.0f, false, false);
      attention<float, float>(page, head_dim, 0, 0.2f, false);  // scores from well below the cap to far above it
      attention<jaxserve::bf16, jaxserve::bf16>(page, head_dim, 40, 0.0f, true);
      attention<float, jaxserve::f16>(page, head_dim, 0, 30.0f, true);
      attention<float, int8_t>(page, head_dim, 0, 0.0f, false);
      attention<jaxserve::bf16, int8_t>(page, head_dim, 40, 30.0f, true);
      attention<float, float>(page, head_dim, 0, 0.0f, true, true, head_dim - 8);
      attention<jaxserve::bf16, jaxserve::f16>(page, head_dim, 40, 30.0f, false, true, head_dim / 2 + 1);
    }
  }
  for (const int64_t apart : {1, 16}) {
    keep<float, jaxserve::f16>(apart);
    keep<jaxserve::bf16, jaxserve::f16>(apart);
    keep<float, jaxserve::bf16>(apart);
    keep_bytes<float>(apart);
    keep_bytes<jaxserve::bf16>(apart);
  }
  for (const int64_t tokens : {1, 3, 9}) {
    product<float>(tokens, 100, 30);
    product<jaxserve::bf16>(tokens, 1100, 32);
    product<jaxserve::f16>(tokens, 512, 17);
    by_head<float>(tokens, 24, 33);
    by_head<jaxserve::bf16>(tokens, 33, 48);
  }
  for (const int64_t tokens : {1, 2, 3, 7, 11}) {
    for (const int64_t code : {2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23, 39}) {
      jaxserve::with_format(code, [&](auto f) { blocks<decltype(f)>(tokens, 512); });
    }
  }
  for (const int64_t width : {7, 32, 1000}) {
    norm<float, false>(width);
    norm<float, true>(width);
    norm<jaxserve::bf16, false>(width);
    norm<jaxserve::bf16, true>(width);
  }
  for (const int64_t half : {3, 16, 37}) {
    rotation<float>(half, 2 * half + 5);
    rotation<jaxserve::bf16>(half, 2 * half);
  }
  for (const int64_t vocab : {21, 1024, 5003}) {
    sampling(vocab, 0.1f);
    sampling(vocab, 20.0f);
  }
  std::printf("%016llx\n", static_cast<unsigned long long>(digest));
}
