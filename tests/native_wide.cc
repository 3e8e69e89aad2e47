// The operations of wide.h over fixed bytes: prints a digest. Compiled by test_native.py for each instruction set.

#include "wide.h"

#include <cstdio>

namespace {

using namespace jaxserve;

uint64_t digest = 1469598103934665603u;  // FNV-1a
uint32_t seed = 7;

void add(const void* data, size_t count) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  for (size_t i = 0; i < count; i++) digest = (digest ^ bytes[i]) * 1099511628211u;
}
void add(Bytes b) { add(&b, 64); }
void add(Ints a) { add(&a, 64); }
void add(Floats a) { add(&a, 64); }

uint8_t next() {
  seed = seed * 1664525u + 1013904223u;
  return static_cast<uint8_t>(seed >> 24);
}

template <bool small>
void dots(Bytes u, int8_t most) {
  Ints sum = splat_int(-12345);
  for (int turn = 0; turn < 20; turn++) {
    int8_t x[4];
    for (int8_t& value : x) value = most == 0 ? static_cast<int8_t>(next() % 255 - 127) : turn % 2 ? most : -most;
    sum = dot<small>(sum, u, x);
  }
  add(sum);
  add(to_floats(sum));
}

}  // namespace

int main() {
  uint8_t table[16];
  for (uint8_t& value : table) value = next();
  for (int turn = 0; turn < 40; turn++) {
    uint8_t first[64], second[64];
    for (uint8_t& value : first) value = turn == 0 ? 255 : next();  // the largest products first
    for (uint8_t& value : second) value = next();
    const Bytes a = load_bytes(first), b = load_bytes(second);
    for (const Bytes& bytes : {low4(a), high4(a), pair<0>(a), pair<1>(a), pair<2>(a), pair<3>(a)}) add(bytes);
    add(lookup(low4(a), table));
    add(with_pair(low4(a), pair<2>(b)));
    add(with_bit<0, 16>(low4(a), b));
    add(with_bit<3, 4>(pair<0>(a), b));
    add(with_bit<7, 16>(low4(a), b));
    for (const int8_t most : {0, 127}) {
      dots<false>(a, most);
      for (uint8_t& value : first) value &= 127;
      dots<true>(load_bytes(first), most);
    }
    add(from_bytes(second));
    add(from_bytes(reinterpret_cast<const int8_t*>(second)));
    Floats low, high;
    from_nibbles(second, low, high);
    add(low);
    add(high);
    const Floats whole = from_bytes(reinterpret_cast<const int8_t*>(second));
    const Ints signed_ones = widen(reinterpret_cast<const int8_t*>(second));
    const Ints words = add_product(signed_ones, widen(first), as_factor(splat_int(-128)));
    const Ints others = add_product(splat_int(0), signed_ones, as_factor(splat_int(127)));
    add(add_product(words, splat_int(-32512), as_factor(signed_ones)));
    add(add_product(others, others, as_factor(widen(first))));
    const int16_t two[] = {static_cast<int16_t>(32767 - turn), static_cast<int16_t>(-4064 + turn)};
    add(add_products(words, two, as_factors(signed_ones, others)));
    add(to_ints(mul(whole, splat16(255.5f))));  // ties among them
    add(power_of_two(widen(second)));
    int8_t stored[16];
    store_bytes(stored, whole);
    add(stored, 16);
    const float sums[] = {total(whole), highest(magnitude(sub(whole, splat16(3.0f))))};
    add(sums, sizeof sums);
  }
  std::printf("%016llx\n", static_cast<unsigned long long>(digest));
}
