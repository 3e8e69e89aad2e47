// Intel's AMX: eight registers of 16 rows of 64 bytes, a tile each, and products of them. Nothing of it is there for
// other instruction sets.
#pragma once

#include "simd.h"

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(JAXSERVE_AVX512)
#define JAXSERVE_TILES

namespace jaxserve {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;  // of a row

// The tile registers of this thread, until the end of the scope: 0 to 5 have `rows` rows, 6 and 7 all 16. The process
// must have been granted them (native/build.py does it).
class Tiles {
 public:
  explicit Tiles(int rows) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) {
      config.row_bytes[i] = kTileBytes;
      config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : kTileRows);
    }
    asm volatile("ldtilecfg %0" ::"m"(config));  // a compiler's own function may lose what writes most of it
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// What was written comes before the tiles that are loaded from it: compilers do not know what a tile is loaded from.
inline void before_tiles() { asm volatile("" ::: "memory"); }

}  // namespace jaxserve

#endif
