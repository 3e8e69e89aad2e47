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

// Ways for a matrix to lie in memory; each gives the address of row i from column j on, j a multiple of kLanes. Products
// of at most `asks_up_to` rows, for which memory takes longer, ask it for what comes after.
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
  static constexpr int asks_up_to = 1;
  const T* data;
  int64_t depth;
  const T* operator()(int64_t i, int64_t j) const {
    return data + (j / kPanel * depth + i) * kPanel + j % kPanel;
  }
  JAXSERVE_ASKS void ask_for_more(int64_t i, int64_t j) const {
    constexpr int rows = kLine / (kPanel * sizeof(T));  // in a line
    if (i % rows == 0 && j % kPanel == 0) ask_for((*this)(i, j) + kAhead / sizeof(T), kLine);
  }
};

// c[r][j] = start + sum over i < depth of a[r][i] * b[i][j], one fused step at a time in the order of i, for `rows` rows
// and `cols` vectors of columns from column `from` on. The start is c where `onto` is set, else 0.
template <int rows, int cols, bool onto, class B>
void block_product(const float* a, int64_t a_stride, int64_t depth, B b, int64_t from, float* c, int64_t c_stride) {
  Vec sum[rows][cols];
  for (int r = 0; r < rows; r++) {
    for (int j = 0; j < cols; j++) sum[r][j] = onto ? load(c + r * c_stride + from + j * kLanes) : splat(0.0f);
  }
  for (int64_t i = 0; i < depth; i++) {
    Vec column[cols];
    for (int j = 0; j < cols; j++) column[j] = load(b(i, from + j * kLanes));
    if constexpr (rows <= B::asks_up_to) {
      for (int j = 0; j < cols; j++) b.ask_for_more(i, from + j * kLanes);
    }
    for (int r = 0; r < rows; r++) {
      const Vec x = splat(a[r * a_stride + i]);
      for (int j = 0; j < cols; j++) sum[r][j] = fma(x, column[j], sum[r][j]);
    }
  }
  for (int r = 0; r < rows; r++) {
    for (int j = 0; j < cols; j++) store(c + r * c_stride + from + j * kLanes, sum[r][j]);
  }
}

template <int cols, bool onto, class B>
void all_rows(int64_t rows, const float* a, int64_t a_stride, int64_t depth, B b, int64_t from, float* c,
              int64_t c_stride) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    block_product<kRows, cols, onto>(a + r * a_stride, a_stride, depth, b, from, c + r * c_stride, c_stride);
  }
  for (; r + 2 <= rows; r += 2) {
    block_product<2, cols, onto>(a + r * a_stride, a_stride, depth, b, from, c + r * c_stride, c_stride);
  }
  if (r < rows) block_product<1, cols, onto>(a + r * a_stride, a_stride, depth, b, from, c + r * c_stride, c_stride);
}

// The same for all of `columns` columns, a multiple of kLanes.
template <bool onto, class B>
void product(int64_t rows, int64_t columns, const float* a, int64_t a_stride, int64_t depth, B b, float* c,
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
