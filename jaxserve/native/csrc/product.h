// The product that attention and the dense weights are made of: rows of floats times a matrix, in registers.
#pragma once

#include <cstdint>

#include "simd.h"

namespace jaxserve {

constexpr int kPanel = 16;  // columns of a panel, whatever the vector width

constexpr int kLine = 64;  // bytes of memory that come together

// Weights are asked for this many bytes before they are read: processors that fetch ahead stop where a page ends.
constexpr int kAhead = 4096;

// Inline in whatever calls it: GCC takes a function that only prefetches for one without effect, and drops its calls.
#define JAXSERVE_ASKS __attribute__((always_inline))

JAXSERVE_ASKS inline void ask_for(const void* memory, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(memory) + i, 0, 2);
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

constexpr int kRows = kLanes == 8 ? 2 : 6;  // of the register blocks: as many as the registers hold

// Ways for a matrix to lie in memory; each gives the address of row i from column j on, j a multiple of kLanes. Blocks of
// at most `asks_up_to` rows ask memory for what comes after, at each row of the matrix where it is the block's turn.
struct EachTurn {
  void begin(int64_t, int64_t) {}
  bool now() { return true; }
};
struct Turns {  // blocks that pass by the same matrix share its rows
  int64_t others = 0, until = 0;
  void begin(int64_t block, int64_t blocks) {
    until = block;
    others = blocks - 1;
  }
  bool now() {
    if (until-- > 0) return false;
    until = others;
    return true;
  }
};
template <class T>
struct Strided {
  static constexpr int asks_up_to = 0;
  const T* data;
  int64_t stride;
  const T* operator()(int64_t i, int64_t j) const { return data + i * stride + j; }
};
struct Scattered {
  static constexpr int asks_up_to = 0;
  const float* const* rows;
  int64_t offset;
  const float* operator()(int64_t i, int64_t j) const { return rows[i] + offset + j; }
};
template <class T>
struct Panels {  // [columns / kPanel][depth][kPanel]
  static constexpr int asks_up_to = kRows;
  const T* data;
  int64_t depth, ahead;  // how much further on lies what comes after
  Turns turns{};
  const T* operator()(int64_t i, int64_t j) const {
    return data + (j / kPanel * depth + i) * kPanel + j % kPanel;
  }
  JAXSERVE_ASKS void ask_for_more(int64_t i, int64_t j) const {
    if (j % kPanel == 0) ask_for((*this)(i, j) + ahead, kLine);
  }
};

// c[r][j] = start + sum over i < depth of a[r][i] * b[i][j], one fused step at a time in the order of i, for `rows` rows
// and `cols` vectors of columns from column `from` on. The start is c where `onto` is set, else 0.
template <int rows, int cols, bool onto, class A, class B>
void block_product(const A* a, int64_t a_stride, int64_t depth, B b, int64_t from, float* c, int64_t c_stride) {
  Vec sum[rows][cols];
  for (int r = 0; r < rows; r++) {
    for (int j = 0; j < cols; j++) sum[r][j] = onto ? load(c + r * c_stride + from + j * kLanes) : splat(0.0f);
  }
  for (int64_t i = 0; i < depth; i++) {
    decltype(load(b(0, 0))) column[cols];
    for (int j = 0; j < cols; j++) column[j] = load(b(i, from + j * kLanes));
    if constexpr (rows <= B::asks_up_to) {
      if (b.turns.now()) {
        for (int j = 0; j < cols; j++) b.ask_for_more(i, from + j * kLanes);
      }
    }
    for (int r = 0; r < rows; r++) {
      const auto x = splat(a[r * a_stride + i]);
      for (int j = 0; j < cols; j++) sum[r][j] = fma(x, column[j], sum[r][j]);
    }
  }
  for (int r = 0; r < rows; r++) {
    for (int j = 0; j < cols; j++) store(c + r * c_stride + from + j * kLanes, sum[r][j]);
  }
}

template <int cols, bool onto, class A, class B>
void all_rows(int64_t rows, const A* a, int64_t a_stride, int64_t depth, B b, int64_t from, float* c,
              int64_t c_stride) {
  const int64_t blocks = rows / kRows + (rows % kRows + 1) / 2;
  int64_t r = 0, block = 0;
  const auto begin = [&] {
    if constexpr (B::asks_up_to > 0) b.turns.begin(block++, blocks);
  };
  for (; r + kRows <= rows; r += kRows) {
    begin();
    block_product<kRows, cols, onto>(a + r * a_stride, a_stride, depth, b, from, c + r * c_stride, c_stride);
  }
  for (; r + 2 <= rows; r += 2) {
    begin();
    block_product<2, cols, onto>(a + r * a_stride, a_stride, depth, b, from, c + r * c_stride, c_stride);
  }
  begin();
  if (r < rows) block_product<1, cols, onto>(a + r * a_stride, a_stride, depth, b, from, c + r * c_stride, c_stride);
}

// The same for all of `columns` columns, a multiple of kLanes.
template <bool onto, class A, class B>
void product(int64_t rows, int64_t columns, const A* a, int64_t a_stride, int64_t depth, B b, float* c,
             int64_t c_stride) {
  for (int64_t j = 0; j < columns;) {
    const int64_t left = (columns - j) / kLanes;
    if (rows == 1 && left >= 8) {
      block_product<1, 8, onto>(a, a_stride, depth, b, j, c, c_stride);
      j += 8 * kLanes;
    } else if (left >= 4) {
      all_rows<4, onto>(rows, a, a_stride, depth, b, j, c, c_stride);
      j += 4 * kLanes;
    } else if (left >= 2) {
      all_rows<2, onto>(rows, a, a_stride, depth, b, j, c, c_stride);
      j += 2 * kLanes;
    } else {
      all_rows<1, onto>(rows, a, a_stride, depth, b, j, c, c_stride);
      j += kLanes;
    }
  }
}

}  // namespace jaxserve
