// From the rows of a GGUF tensor to the panels of blocks.h: for loading, without XLA.

#include <algorithm>
#include <cmath>
#include <limits>

#include "blocks.h"

namespace jaxserve {
namespace {

// One run of 32 weights of a row, as all formats can be told.
struct Run {
  uint8_t codes[kRun];
  uint16_t half, half_min;      // float16 bits
  uint8_t scale[2], minimum[2];  // of each 16 weights, or the first of both for all
};

uint16_t half_at(const uint8_t* p) { return static_cast<uint16_t>(p[0] | p[1] << 8); }

// 16 bytes: the low halves are the first 16 codes.
void nibbles(const uint8_t* from, uint8_t* codes) {
  for (int i = 0; i < 16; i++) {
    codes[i] = from[i] & 15;
    codes[i + 16] = from[i] >> 4;
  }
}
void fifth_bits(const uint8_t* from, uint8_t* codes) {
  for (int i = 0; i < kRun; i++) codes[i] = static_cast<uint8_t>(codes[i] | (from[i / 8] >> i % 8 & 1) << 4);
}

// The run-th run of 32 weights of a row of whole blocks.
void read(Q8_0, const uint8_t* row, int64_t run, Run& to) {
  const uint8_t* block = row + run * 34;
  to.half = half_at(block);
  for (int i = 0; i < kRun; i++) to.codes[i] = block[2 + i] ^ 0x80;
}
void read(Q4_0, const uint8_t* row, int64_t run, Run& to) {
  const uint8_t* block = row + run * 18;
  to.half = half_at(block);
  nibbles(block + 2, to.codes);
}
void read(IQ4_NL, const uint8_t* row, int64_t run, Run& to) { read(Q4_0{}, row, run, to); }
void read(Q4_1, const uint8_t* row, int64_t run, Run& to) {
  const uint8_t* block = row + run * 20;
  to.half = half_at(block);
  to.half_min = half_at(block + 2);
  nibbles(block + 4, to.codes);
}
void read(Q5_0, const uint8_t* row, int64_t run, Run& to) {
  const uint8_t* block = row + run * 22;
  to.half = half_at(block);
  nibbles(block + 6, to.codes);
  fifth_bits(block + 2, to.codes);
}
void read(Q5_1, const uint8_t* row, int64_t run, Run& to) {
  const uint8_t* block = row + run * 24;
  to.half = half_at(block);
  to.half_min = half_at(block + 2);
  nibbles(block + 8, to.codes);
  fifth_bits(block + 4, to.codes);
}
void read(MXFP4, const uint8_t* row, int64_t run, Run& to) {
  const uint8_t* block = row + run * 17;
  to.scale[0] = block[0];
  nibbles(block + 1, to.codes);
}

// The 6-bit scale and minimum of one of 8 runs, from the 12 bytes that hold them all.
void six_bits(const uint8_t* from, int64_t i, Run& to) {
  if (i < 4) {
    to.scale[0] = from[i] & 63;
    to.minimum[0] = from[i + 4] & 63;
  } else {
    to.scale[0] = static_cast<uint8_t>((from[i + 4] & 15) | from[i - 4] >> 6 << 4);
    to.minimum[0] = static_cast<uint8_t>(from[i + 4] >> 4 | from[i] >> 6 << 4);
  }
}
void read(Q4_K, const uint8_t* row, int64_t run, Run& to) {
  const uint8_t *block = row + run / 8 * 144, *codes = block + 16 + run % 8 / 2 * 32;
  to.half = half_at(block);
  to.half_min = half_at(block + 2) ^ 0x8000;  // minima are subtracted
  six_bits(block + 4, run % 8, to);
  for (int i = 0; i < kRun; i++) to.codes[i] = run % 2 ? codes[i] >> 4 : codes[i] & 15;
}
void read(Q5_K, const uint8_t* row, int64_t run, Run& to) {
  const uint8_t *block = row + run / 8 * 176, *high = block + 16, *codes = high + 32 + run % 8 / 2 * 32;
  to.half = half_at(block);
  to.half_min = half_at(block + 2) ^ 0x8000;
  six_bits(block + 4, run % 8, to);
  for (int i = 0; i < kRun; i++) {
    to.codes[i] = static_cast<uint8_t>((run % 2 ? codes[i] >> 4 : codes[i] & 15) | (high[i] >> run % 8 & 1) << 4);
  }
}
void read(Q6_K, const uint8_t* row, int64_t run, Run& to) {
  const uint8_t* block = row + run / 8 * 210;
  const int64_t i = run % 8, part = i / 4, quarter = i % 4;  // quarters of 128 weights
  const uint8_t *low = block + 64 * part + quarter % 2 * 32, *high = block + 128 + 32 * part;
  to.half = half_at(block + 208);
  to.scale[0] = block[192 + 2 * i];
  to.scale[1] = block[193 + 2 * i];
  for (int l = 0; l < kRun; l++) {
    to.codes[l] = static_cast<uint8_t>((quarter < 2 ? low[l] & 15 : low[l] >> 4) | (high[l] >> 2 * quarter & 3) << 4);
  }
}
void read(Q3_K, const uint8_t* row, int64_t run, Run& to) {
  const uint8_t* block = row + run / 8 * 110;
  const int64_t i = run % 8, part = i / 4, quarter = i % 4;
  const uint8_t *low = block + 32 + 32 * part, *scales = block + 96;
  to.half = half_at(block + 108);
  for (int r = 0; r < 2; r++) {
    const int64_t j = 2 * i + r;
    const int bits = (j < 8 ? scales[j] & 15 : scales[j - 8] >> 4) | (scales[8 + j % 4] >> 2 * (j / 4) & 3) << 4;
    to.scale[r] = static_cast<uint8_t>(bits - 32);
  }
  for (int l = 0; l < kRun; l++) {
    to.codes[l] = static_cast<uint8_t>((low[l] >> 2 * quarter & 3) | (block[l] >> i & 1) << 2);
  }
}
void read(Q2_K, const uint8_t* row, int64_t run, Run& to) {
  const uint8_t* block = row + run / 8 * 84;
  const int64_t i = run % 8, part = i / 4, quarter = i % 4;
  to.half = half_at(block + 80);
  to.half_min = half_at(block + 82) ^ 0x8000;
  for (int r = 0; r < 2; r++) {
    to.scale[r] = block[2 * i + r] & 15;
    to.minimum[r] = block[2 * i + r] >> 4;
  }
  for (int l = 0; l < kRun; l++) to.codes[l] = block[16 + 32 * part + l] >> 2 * quarter & 3;
}
void read(IQ4_XS, const uint8_t* row, int64_t run, Run& to) {
  const uint8_t* block = row + run / 8 * 136;
  const int64_t i = run % 8;
  const int bits = (block[4 + i / 2] >> 4 * (i % 2) & 15) | (half_at(block + 2) >> 2 * i & 3) << 4;
  to.half = half_at(block);
  to.scale[0] = static_cast<uint8_t>(bits - 32);
  nibbles(block + 8 + 16 * i, to.codes);
}

// The codes of a block of 16 rows, 4 steps of a row a word: what is done to a word is done to its 4 bytes.
template <class F>
void write_codes(const Run (&runs)[kPanel], uint8_t* to) {
  using Group = uint32_t[kPanel];
  constexpr auto low_bits = [](int bits) { return 0x01010101u * ((1u << bits) - 1); };
  Group u[kGroups];
  for (int j = 0; j < kGroups; j++) {
    for (int r = 0; r < kPanel; r++) std::memcpy(&u[j][r], runs[r].codes + 4 * j, 4);
  }
  // `count` groups, `every` apart, side by side in one; of each the `bits` from bit `from`.
  const auto put = [&](int first, int every, int count, int from, int bits) {
    Group group = {};
    for (int i = 0; i < count; i++) {
      for (int r = 0; r < kPanel; r++) group[r] |= (u[first + every * i][r] >> from & low_bits(bits)) << bits * i;
    }
    std::memcpy(to, group, sizeof group);
    to += sizeof group;
  };
  if constexpr (F::low == 8) std::memcpy(to, u, sizeof u);
  if constexpr (F::low == 4) for (int v = 0; v < 4; v++) put(v, 4, 2, 0, 4);
  if constexpr (F::low == 2) for (int v = 0; v < 2; v++) put(4 * v, 1, 4, 0, 2);
  if constexpr (F::high == 1) put(0, 1, 8, F::low, 1);
  if constexpr (F::high == 2) for (int v = 0; v < 2; v++) put(4 * v, 1, 4, F::low, 2);
}

void write_half(uint16_t half, int r, uint8_t* to) { std::memcpy(to + 2 * r, &half, 2); }

template <class F>
void write_scales(const Run& run, int r, uint8_t* scales, uint8_t* shared) {
  if constexpr (F::shared) {
    write_half(run.half, r, shared);
    if constexpr (F::minimum) write_half(run.half_min, r, shared + 32);
  }
  for (int i = 0; i < F::runs; i++) {
    if constexpr (F::scales == Scales::kHalf) {
      write_half(run.half, r, scales);
    } else if constexpr (F::scales == Scales::kHalfMin) {
      write_half(run.half, r, scales);
      write_half(run.half_min, r, scales + 32);
    } else if constexpr (F::scales == Scales::kBytesMin) {
      scales[32 * i + r] = run.scale[i];
      scales[32 * i + 16 + r] = run.minimum[i];
    } else if constexpr (F::scales == Scales::kNibblesMin) {
      scales[16 * i + r] = static_cast<uint8_t>(run.scale[i] | run.minimum[i] << 4);
    } else {
      scales[16 * i + r] = run.scale[i];
    }
  }
}

// The largest a weight of the run may be, of either sign; infinite if a scale is no number.
template <class F>
float largest(const Run& run) {
  constexpr float codes = (1 << (F::low + F::high)) - 1;
  float most = 0.0f;
  for (int i = 0; i < F::runs; i++) {
    const float scale = to_float(f16{run.half}) * run.scale[i], minimum = to_float(f16{run.half_min}) * run.minimum[i];
    for (const float code : {0.0f, codes}) {
      const float weight = std::abs(scale * code + minimum);
      most = std::isfinite(weight) ? std::max(most, weight) : std::numeric_limits<float>::infinity();
    }
  }
  return most;
}

// The quantum of weights of which `most` is the largest: whole scales and minima are half a quantum off at most, and
// a weight, with up to 31 times the scale, less than 17.
uint8_t quantum_of(float most) {
  if (!std::isfinite(most)) return 255;
  int e;
  std::frexp(most / 32750.0f, &e);
  return most == 0.0f ? 0 : static_cast<uint8_t>(127 + e);
}

template <class F>
void pack(const uint8_t* rows, int64_t outputs, int64_t depth, int64_t row_bytes, uint8_t* to) {
  const Panel<F> panel(depth);
  const int64_t bytes = panel.bytes();
  Run runs[kPanel];
  for (int64_t n = 0; n < outputs; n += kPanel, to += bytes) {
    const int count = static_cast<int>(std::min<int64_t>(kPanel, outputs - n));
    std::fill(runs + count, runs + kPanel, Run{});
    std::memset(to + panel.scales(), 0, bytes - panel.scales());
    float most[kPanel];  // of the 256 weights so far
    for (int64_t b = 0; b < panel.blocks; b++) {
      if (b % kSharers == 0) std::fill_n(most, kPanel, 0.0f);
      for (int r = 0; r < count; r++) {
        read(F{}, rows + (n + r) * row_bytes, b, runs[r]);
        write_scales<F>(runs[r], r, to + panel.scales() + b * F::scale_bytes,
                        to + panel.shared() + b / kSharers * F::shared_bytes);
        if constexpr (kQuanta<F>) {
          most[r] = std::max(most[r], largest<F>(runs[r]));
          if ((b + 1) % kSharers == 0) to[panel.quanta() + b / kSharers * kPanel + r] = quantum_of(most[r]);
        }
      }
      write_codes<F>(runs, to + b * F::code_bytes);
    }
  }
}

}  // namespace
}  // namespace jaxserve

// Bytes of the panels of [outputs, depth] weights in ggml's format `format`; -1 if that is none of ours.
extern "C" int64_t jaxserve_panels_size(int64_t format, int64_t outputs, int64_t depth) {
  int64_t bytes = -1;
  jaxserve::with_format(format, [&](auto f) {
    bytes = (outputs + jaxserve::kPanel - 1) / jaxserve::kPanel * jaxserve::Panel<decltype(f)>(depth).bytes();
  });
  return bytes;
}

// Rows of whole blocks, `row_bytes` each, to panels of jaxserve_panels_size bytes.
extern "C" void jaxserve_pack_blocks(int64_t format, const uint8_t* rows, int64_t outputs, int64_t depth,
                                     int64_t row_bytes, uint8_t* panels) {
  jaxserve::with_format(
      format, [&](auto f) { jaxserve::pack<decltype(f)>(rows, outputs, depth, row_bytes, panels); });
}
