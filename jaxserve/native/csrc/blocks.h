// ggml's block formats as the kernels want them: 16 rows side by side, 32 steps of k at a time.
//
// A panel of 16 rows is first the codes of all its blocks, then their scales, then, for formats that share a scale among
// 256 weights, those, and then the quanta of 256 weights, where there are any. A code is a small number u >= 0 and a
// weight is scale * (u - offset) + minimum, with scale and minimum of a run of 32 weights or of 16. The codes of a block
// lie in 8 groups of 4 steps; byte 4 r + i of a group is step i of row r.
//   4 bits  64 bytes v = 0..3: group v in the low halves, group v + 4 in the high ones
//   2 bits  64 bytes v = 0..1: group 4 v + s in bits 2 s and 2 s + 1
//   1 bit   64 bytes: group j in bit j
//   8 bits  64 bytes a group
#pragma once

#include <cstdint>
#include <cstring>

#include "product.h"
#include "tiles.h"
#include "wide.h"

namespace jaxserve {

constexpr int kRun = 32;      // steps of k in a block
constexpr int kGroups = 8;    // of 4 steps
constexpr int kShared = 256;  // weights under one shared scale
constexpr int kSharers = kShared / kRun;

// How the scales of a block are kept, for 16 rows:
enum class Scales {
  kHalf,        // float16 each
  kHalfMin,     // float16 scale, float16 minimum
  kPower,       // a byte e each: 2^(e - 128)
  kBytesMin,    // a byte times a shared float16, and a byte times a shared float16 minimum
  kSigned,      // signed byte times a shared float16
  kNibblesMin,  // 4 bits times the shared scale, 4 bits times the shared minimum
};

// low: bits of the first part of a code (8, 4 or 2); high: bits on top of them (0, 1 or 2).
template <int low_bits, int high_bits, int run_length, int offset_, Scales scales_>
struct Format {
  static constexpr int low = low_bits, high = high_bits, runs = kRun / run_length, offset = offset_;
  static constexpr Scales scales = scales_;
  static constexpr bool minimum =
      scales_ == Scales::kHalfMin || scales_ == Scales::kBytesMin || scales_ == Scales::kNibblesMin;
  static constexpr bool shared =
      scales_ == Scales::kBytesMin || scales_ == Scales::kSigned || scales_ == Scales::kNibblesMin;
  static constexpr int code_bytes = 64 * (low_bits + high_bits);
  static constexpr int scale_bytes =
      runs * (scales_ == Scales::kHalf ? 32 : scales_ == Scales::kHalfMin ? 64 : scales_ == Scales::kBytesMin ? 32 : 16);
  static constexpr int shared_bytes = !shared ? 0 : minimum ? 64 : 32;
  static constexpr const uint8_t* table = nullptr;
};

constexpr uint8_t kNonlinear[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                    129, 141, 153, 166, 181, 197, 217, 241};          // IQ4's values, plus 128
constexpr uint8_t kFloat4[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};  // twice E2M1's, plus 12

struct Q8_0 : Format<8, 0, 32, 128, Scales::kHalf> {};
struct Q4_0 : Format<4, 0, 32, 8, Scales::kHalf> {};
struct Q4_1 : Format<4, 0, 32, 0, Scales::kHalfMin> {};
struct Q5_0 : Format<4, 1, 32, 16, Scales::kHalf> {};
struct Q5_1 : Format<4, 1, 32, 0, Scales::kHalfMin> {};
struct Q2_K : Format<2, 0, 16, 0, Scales::kNibblesMin> {};
struct Q3_K : Format<2, 1, 16, 4, Scales::kSigned> {};
struct Q4_K : Format<4, 0, 32, 0, Scales::kBytesMin> {};
struct Q5_K : Format<4, 1, 32, 0, Scales::kBytesMin> {};
struct Q6_K : Format<4, 2, 16, 32, Scales::kSigned> {};
struct IQ4_NL : Format<4, 0, 32, 128, Scales::kHalf> {
  static constexpr const uint8_t* table = kNonlinear;
};
struct IQ4_XS : Format<4, 0, 32, 128, Scales::kSigned> {
  static constexpr const uint8_t* table = kNonlinear;
};
struct MXFP4 : Format<4, 0, 32, 12, Scales::kPower> {
  static constexpr const uint8_t* table = kFloat4;
};

// Formats whose products are summed as stretch_products.h does it: on tiles many rows pass by them twice as fast. Only
// those of blocks of 256, with which llama.cpp, too, rounds rows of x more coarsely, and with codes of 6 bits at most.
// JAXSERVE_STRETCHES: the same arithmetic without tiles, for tests.
#if defined(JAXSERVE_TILES) || defined(JAXSERVE_STRETCHES)
template <class F>
constexpr bool kStretches = F::shared && F::table == nullptr;
#else
template <class F>
constexpr bool kStretches = false;
#endif

// Of these, those whose scales are no whole numbers: they, and minima, are rounded to multiples of a quantum, which is
// 2^(e - 127) for 256 weights with a byte e of their own, so that a weight is less than 2^15 of them.
template <class F>
constexpr bool kQuanta = kStretches<F> && F::scales != Scales::kSigned;

// Calls `call(Q4_0{})` and so on for ggml's code of a format; false for a code that is none of them.
template <class Call>
bool with_format(int64_t code, Call&& call) {
  switch (code) {
    case 2: return call(Q4_0{}), true;
    case 3: return call(Q4_1{}), true;
    case 6: return call(Q5_0{}), true;
    case 7: return call(Q5_1{}), true;
    case 8: return call(Q8_0{}), true;
    case 10: return call(Q2_K{}), true;
    case 11: return call(Q3_K{}), true;
    case 12: return call(Q4_K{}), true;
    case 13: return call(Q5_K{}), true;
    case 14: return call(Q6_K{}), true;
    case 20: return call(IQ4_NL{}), true;
    case 23: return call(IQ4_XS{}), true;
    case 39: return call(MXFP4{}), true;
    default: return false;
  }
}

// Where the parts of a panel of `depth` steps begin, and how long it is: whole cache lines.
template <class F>
struct Panel {
  int64_t blocks;
  explicit Panel(int64_t depth) : blocks(depth / kRun) {}
  int64_t scales() const { return blocks * F::code_bytes; }
  int64_t shared() const { return scales() + blocks * F::scale_bytes; }
  int64_t quanta() const { return shared() + blocks / kSharers * F::shared_bytes; }
  int64_t bytes() const {
    return round_up(quanta() + (kQuanta<F> ? blocks / kSharers * kPanel : 0), kLine);
  }
};

// The codes of one group of the block.
template <class F, int j>
inline Bytes group(const uint8_t* from) {
  const uint8_t* more = from + 64 * F::low;
  Bytes u;
  if constexpr (F::low == 8) {
    u = load_bytes(from + 64 * j);
  } else if constexpr (F::low == 4) {
    const Bytes both = load_bytes(from + 64 * (j % 4));
    u = j < 4 ? low4(both) : high4(both);
  } else {
    u = pair<j % 4>(load_bytes(from + 64 * (j / 4)));
  }
  if constexpr (F::high == 1) u = with_bit<j, 1 << F::low>(u, load_bytes(more));
  if constexpr (F::high == 2) u = with_pair(u, pair<j % 4>(load_bytes(more + 64 * (j / 4))));
  if constexpr (F::table != nullptr) u = lookup(u, F::table);
  return u;
}

// Calls `call(j, codes of group j)` for the groups from `j` to before `end`, unrolled.
template <class F, int j, int end, class Call>
inline void for_groups(const uint8_t* from, Call&& call) {
  if constexpr (j < end) {
    call(j, group<F, j>(from));
    for_groups<F, j + 1, end>(from, call);
  }
}

inline Floats halves(const uint8_t* p) { return load16(reinterpret_cast<const f16*>(p)); }

// What 256 weights share, 16 rows each.
template <class F>
struct SharedScales {
  Floats scale, minimum;
  void load(const uint8_t* from) {
    if constexpr (F::shared) scale = halves(from);
    if constexpr (F::shared && F::minimum) minimum = halves(from + 32);
  }
};

// Scales and minima of the block's runs, 16 rows each.
template <class F>
inline void unpack_scales(const uint8_t* from, const SharedScales<F>& shared, Floats (&scale)[F::runs],
                          Floats (&minimum)[F::runs]) {
  for (int r = 0; r < F::runs; r++) {
    if constexpr (F::scales == Scales::kHalf) {
      scale[r] = halves(from + 32 * r);
    } else if constexpr (F::scales == Scales::kHalfMin) {
      scale[r] = halves(from + 64 * r);
      minimum[r] = halves(from + 64 * r + 32);
    } else if constexpr (F::scales == Scales::kPower) {
      float powers[16];
      for (int i = 0; i < 16; i++) {
        const uint32_t e = from[16 * r + i], bits = e < 2 ? 0x00200000u << e : (e - 1) << 23;  // the first are subnormal
        std::memcpy(powers + i, &bits, 4);
      }
      scale[r] = load16(powers);
    } else if constexpr (F::scales == Scales::kBytesMin) {
      scale[r] = mul(shared.scale, from_bytes(from + 32 * r));
      minimum[r] = mul(shared.minimum, from_bytes(from + 32 * r + 16));
    } else if constexpr (F::scales == Scales::kSigned) {
      scale[r] = mul(shared.scale, from_bytes(reinterpret_cast<const int8_t*>(from + 16 * r)));
    } else {
      Floats low, high;
      from_nibbles(from + 16 * r, low, high);
      scale[r] = mul(shared.scale, low);
      minimum[r] = mul(shared.minimum, high);
    }
  }
}

}  // namespace jaxserve
