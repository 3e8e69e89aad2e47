// Rows of x that pass by a panel's blocks together, a tile of them: how many, how they become bytes, and what is asked
// for meanwhile.
#pragma once

#include <algorithm>
#include <limits>

#include "blocks.h"

namespace jaxserve {

// Rows at most: as registers allow. Eight where AVX512-BF16 came without tiles: an EPYC of 2022 stores half a vector a
// cycle, so that a block with two scales took 1.6 times as long with 16 rows, whose sums do not all stay in registers;
// and its first-level cache holds eight rows beside a panel.
#if defined(__AVX512BF16__) && !defined(JAXSERVE_TILES)
constexpr int kTile = 8;
#else
constexpr int kTile = kLanes == 16 ? 16 : 12;
#endif
constexpr float kSmallest = 1e-30f;  // values that are all nearer to zero are kept as zeros

// The scale under which `count` times 16 values become bytes, the largest 127; NaN if one is not finite. In place: to
// nearest, ties to even.
template <int count>
inline float round_to_bytes(Floats (&x)[count]) {
  constexpr float largest = std::numeric_limits<float>::max();
  Floats all = magnitude(x[0]);
  bool finite = !any_above(all, largest);
  for (int i = 1; i < count; i++) {
    finite = finite && !any_above(magnitude(x[i]), largest);
    all = max(all, magnitude(x[i]));
  }
  const float most = highest(all);
  if (!finite || !(most > kSmallest)) {
    for (Floats& v : x) v = splat16(0.0f);
    return finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  const Floats inverse = splat16(127.0f / most), magic = splat16(kMagic);
  for (Floats& v : x) v = sub(add(mul(v, inverse), magic), magic);
  return most / 127.0f;
}

// Adds to sums[t] the codes of a block's groups [from, end) times the bytes of row t, which begin `apart` bytes after
// those of the row before.
template <class F, int from, int end, int apart, int tile>
inline void add_groups(const uint8_t* codes, const int8_t* x, Ints (&sums)[tile]) {
  constexpr bool small = F::low + F::high < 8 && F::offset < 128;
  for_groups<F, from, end>(codes, [&](int j, Bytes u) {
    for (int t = 0; t < tile; t++) sums[t] = dot<small>(sums[t], u, x + t * apart + 4 * j);
  });
}

// Asks for the codes that come kAhead bytes after those of block b, and for the scales of b in the next panel.
template <class F>
JAXSERVE_ASKS inline void ask_for_more(const uint8_t* panel, const Panel<F>& layout, int64_t b) {
  constexpr int together = std::max(1, kLine / F::scale_bytes);  // blocks whose scales share a line
  const int64_t codes = b * F::code_bytes + kAhead;
  ask_for(panel + codes + (codes < layout.scales() ? 0 : layout.bytes() - layout.scales()), F::code_bytes);
  const uint8_t* next = panel + layout.bytes();
  if (b % together == 0) ask_for(next + layout.scales() + b * F::scale_bytes, F::scale_bytes);
  if (F::shared && b % kSharers == 0) {
    ask_for(next + layout.shared() + b / kSharers * F::shared_bytes, F::shared_bytes);
    if (kQuanta<F>) ask_for(next + layout.quanta() + b / kSharers * kPanel, kPanel);
  }
}

}  // namespace jaxserve
