// Ragged paged attention for CPU; signature and meaning are those of kernels_pallas/ragged_paged_attention/contract.py.
//
// The unit of work is a tile: a few query tokens of one sequence, with all query heads of one kv head. It walks over
// the sequence's positions in blocks that begin at multiples of kBlock, and every sum runs in an order that positions
// alone decide. So a token's result is the same bit for bit whatever else is in the step, however its prompt was cut,
// and on however many threads.
//
// Where a page holds whole groups of 16 positions, a group's keys and values lie as they are multiplied: for each kv
// head keys [D][16], then values [16][D]. In other pages each position has its row, as the contract has it, and keys
// are turned around each time that they are read.
//
// Of latents there is one row a position, key and value in one; a tile has query heads of one token or several, all of
// them or a part.
//
// A cache of bytes is read as floats. Its scales, which lie in any page as the contract has them, multiply whole sums: a
// key's its scores, a value's its weights.

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "buffers.h"
#include "parallel.h"
#include "product.h"
#include "simd.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

constexpr int kBlock = 64;     // positions scored at once; half the contract's KV_BLOCK
constexpr int kQueryRows = 32;  // rows (query tokens times heads) of a prefill tile
constexpr int kPositions = 16;     // positions whose keys lie side by side
constexpr int kLeastHeads = 4;  // of a latent that are worth reading it once more
constexpr int kSums = 16;      // partial sums of the softmax's denominator, whatever the vector width
constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kLeast = 1e-30f;  // the contract's LEAST

struct Step {
  int64_t heads, kv_heads, head_dim, value_dim, page, row, table_width, first_page;
  bool latent;  // values are the first numbers of keys
  float scale, soft_cap;  // 0: no cap
  int64_t window;         // 0: none
  bool causal;            // otherwise every token attends to the whole sequence
  const int32_t *kv_lens, *page_table, *cu_q_lens;
  const float* sinks;  // [heads], or null
  float* scales;       // [pages][kv_heads][2][page] of a cache of bytes

  int64_t page_of(int64_t s, int64_t i) const { return int64_t{page_table[s * table_width + i]} + first_page; }
  float* scales_of(int64_t id, int64_t offset, int64_t head) const {  // of a position's key; its value's is `page` further
    return scales + (id * kv_heads + head) * 2 * page + offset;
  }
};

// Positions from one entry of the cache to the next that is contiguous in itself: a group, or a row.
int64_t entry(const Step& p) { return p.page % kPositions == 0 && !p.latent ? kPositions : 1; }

// Query heads of a tile: `group` of each of the kv heads [first, first + count), from its `skip`th on.
struct Heads {
  int64_t first, count, skip, group;
};

// The keys of one kv head in groups of 16 positions, and the values of a group; see product.h. `then`: where in the
// cache those are that are read next. They lie too far apart for the processor to foresee.
template <class T>
struct GroupedKeys {
  static constexpr int asks_up_to = 0;
  const T* const* groups;
  const T* operator()(int64_t i, int64_t j) const { return groups[j / kPositions] + i * kPositions + j % kPositions; }
};
template <class T>
struct CachedKeys : GroupedKeys<T> {
  static constexpr int asks_up_to = kRows;
  const T* const* then;
  EachTurn turns{};
  JAXSERVE_ASKS void ask_for_more(int64_t i, int64_t j) const {
    constexpr int together = std::max<int>(1, kLine / (kPositions * sizeof(T)));
    if (i % together == 0 && j % kPositions == 0) ask_for(then[j / kPositions] + i * kPositions, kLine);
  }
};
template <class T>
struct CachedValues : Strided<T> {
  static constexpr int asks_up_to = kRows;
  const T* then;
  EachTurn turns{};
  JAXSERVE_ASKS void ask_for_more(int64_t i, int64_t j) const {
    if (j * sizeof(T) % kLine == 0) ask_for(then + i * this->stride + j, kLine);
  }
};

// x [count] as floats, zeros up to `padded`; meanwhile asks for as many of those that are read next, line by line.
template <class T>
void to_floats_asking(const T* x, const T* then, int64_t count, int64_t padded, float* to) {
  constexpr int64_t line = kLine / sizeof(T);
  for (int64_t i = 0; i < count; i += line) {
    ask_for(then + i, kLine);
    const bool last = count - i <= line;
    to_floats(x + i, last ? count - i : line, last ? padded - i : line, to + i);
  }
}

// Floats of scratch that a tile of `rows` rows of each of `heads` kv heads needs, head_dim rounded up to `padded` and
// value_dim to `wide`.
int64_t scratch_size(int64_t heads, int64_t rows, int64_t padded, int64_t wide) {
  return heads * rows * (kSums + 1) + rows * kBlock + kBlock * (padded + wide);
}

// soft_cap * tanh(score / soft_cap) of `count` scores, a multiple of 16.
void cap(float* scores, int count, float soft_cap) {
  const Vec factor = splat(soft_cap), inverse = splat(1.0f / soft_cap);
  for (int t = 0; t < count; t += kLanes) store(scores + t, mul(factor, tanh(mul(load(scores + t), inverse))));
}

// Query tokens [first, first + count) of sequence s, some of their heads: queries [heads][rows][padded], times the scale
// and padded with zeros, to results [heads][rows][wide].
template <class C>
void attend(const Step& p, int64_t s, int64_t first, int64_t count, const Heads& of, const float* queries,
            const C* cache, float* results, float* scratch) {
  const int64_t D = p.head_dim, V = p.value_dim, padded = round_up(D, kLanes), wide = round_up(V, kLanes);
  const int64_t h = of.first, heads = of.count, group = of.group, after = p.latent ? 0 : D;  // of a row's values
  const int rows = static_cast<int>(count * group);
  const int64_t position = p.kv_lens[s] - (p.cu_q_lens[s + 1] - p.cu_q_lens[s]) + first;  // of the first token

  float* scores = scratch;                               // [rows][kBlock]
  float* keys = scores + rows * kBlock;                  // [D][kBlock]
  float* values = keys + kBlock * padded;                // [kBlock][wide], unless they can be read where they are
  float* all_denominators = values + kBlock * wide;      // [heads][rows][kSums]
  float* all_best = all_denominators + heads * rows * kSums;  // [heads][rows]
  std::fill(results, results + heads * rows * wide, 0.0f);
  std::fill(all_denominators, all_denominators + heads * rows * kSums, 0.0f);
  std::fill(all_best, all_best + heads * rows, kNone);
  if (p.sinks) {  // as if a position without a value had been scored already
    for (int64_t r = 0; r < heads * rows; r++) {
      all_best[r] = p.sinks[(h + r / rows) * (p.heads / p.kv_heads) + of.skip + r % rows % group];
      all_denominators[r * kSums] = 1.0f;
    }
  }

  const int64_t end = p.causal ? position + count : p.kv_lens[s];  // positions [0, end) are written
  const int64_t low = p.window ? std::max<int64_t>(0, position - p.window + 1) : 0;
  const int64_t step = entry(p), size = p.latent ? p.row : 2 * D * step;  // of a head's part of an entry
  const bool in_place = V == wide && (step == kPositions ? rows <= kRows || std::is_same_v<C, float>
                                                       : std::is_same_v<C, float>);  // values, and keys of groups

  constexpr bool scaled = std::is_same_v<C, int8_t>;
  struct Entries {
    const C* of[kBlock];
    const float* scales[scaled ? kBlock : 1];
  } found[2];  // in this block and in the next
  const auto find = [&](int64_t block, Entries& at) {
    const int n = static_cast<int>(std::clamp<int64_t>(end - block, 0, kBlock));
    for (int64_t t = 0, page = block / p.page, offset = block % p.page; t < n; page++, offset = 0) {
      const int64_t id = p.page_of(s, page);
      const C* from = cache + (id * p.page + offset) * p.row + h * size;
      for (; t < n && offset < p.page; t += step, offset += step, from += step * p.row) {
        at.of[t / step] = from;
        if constexpr (scaled) at.scales[t / step] = p.scales_of(id, offset, h);
      }
    }
    return n;
  };
  const int64_t ahead = step == kPositions ? 0 : size * sizeof(C);  // groups are asked for while others are read
  const auto fetch = [&](const Entries& at, int n, int64_t head) JAXSERVE_ASKS {
    for (int64_t t = 0; t < n; t += step) {
      ask_for(at.of[t / step] + head * size, ahead);
      if constexpr (scaled) {
        const float* scales = at.scales[t / step] + 2 * head * p.page;
        ask_for(scales, kLine);
        ask_for(scales + p.page, kLine);
      }
    }
  };
  // The scales of a head's keys, and of its values; those of positions past the end are never used.
  float key_scales[kBlock] = {}, value_scales[kBlock] = {};
  const auto take_scales = [&](const Entries& at, int n, int64_t head) {
    for (int64_t t = 0; t < n; t += step) {
      const float* scales = at.scales[t / step] + 2 * head * p.page;
      std::copy_n(scales, step, key_scales + t);
      std::copy_n(scales + p.page, step, value_scales + t);
    }
  };
  int64_t block = low / kBlock * kBlock;
  int n = find(block, found[0]), turn = 0;
  if (heads > 1) fetch(found[0], n, 0);  // and from then on what comes next, while this is computed
  for (; block < end; block += kBlock, turn = 1 - turn) {
    const int next = find(block + kBlock, found[1 - turn]);
    const int scored = static_cast<int>(round_up(n, 16));
    // What lies in pages before the window may be another's, and NaN: its scores are not used, its values not read.
    const int unseen = static_cast<int>(std::clamp<int64_t>(low / p.page * p.page - block, 0, n));
    if (heads == 1) fetch(found[turn], n, 0);  // a part so large that the next would push it out of the cache
    for (int64_t head = 0; head < heads; head++) {
      if (head + 1 < heads) fetch(found[turn], n, head + 1);
      else if (heads > 1) fetch(found[1 - turn], next, 0);
      float *sums = results + head * rows * wide, *best = all_best + head * rows;
      float* denominators = all_denominators + head * rows * kSums;
      const C *at[kBlock], *then[kBlock / kPositions];
      const float* query = queries + head * rows * padded;
      if (step == kPositions) {
        for (int g = 0; g < scored / kPositions; g++) {
          at[g] = found[turn].of[g] + head * size;
          then[g] = head + 1 < heads ? at[g] + size : g * kPositions < next ? found[1 - turn].of[g] : at[g];
        }
        if (in_place) {
          product<false>(rows, scored, query, padded, D, CachedKeys<C>{{at}, then}, scores, kBlock);
        } else {
          const float* groups[kBlock / kPositions];
          for (int g = 0; g < scored / kPositions; g++) {
            float* to = keys + g * kPositions * D;
            to_floats_asking(at[g], then[g], kPositions * D, kPositions * D, to);
            groups[g] = to;
          }
          product<false>(rows, scored, query, padded, D, GroupedKeys<float>{groups}, scores, kBlock);
        }
      } else {  // past the end the last one again, whose scores are not used
        for (int t = 0; t < scored; t++) at[t] = found[turn].of[std::min(t, n - 1)] + head * size;
        for (int t = 0; t < scored; t += 16) transpose16(at + t, static_cast<int>(D), keys + t, kBlock);
        product<false>(rows, scored, query, padded, D, Strided<float>{keys, kBlock}, scores, kBlock);
      }
      if constexpr (scaled) {
        take_scales(found[turn], n, head);
        for (int r = 0; r < rows; r++) {
          float* score = scores + r * kBlock;
          for (int t = 0; t < scored; t += kLanes) store(score + t, mul(load(score + t), load(key_scales + t)));
        }
      }
      if (p.soft_cap > 0.0f) {
        for (int r = 0; r < rows; r++) cap(scores + r * kBlock, scored, p.soft_cap);
      }
      for (int r = 0; r < rows; r++) {
        float* score = scores + r * kBlock;
        // The last position that this row's token attends to, counted from the block.
        const int64_t own = (p.causal ? position + r / group : end - 1) - block;
        const int from = static_cast<int>(p.window ? std::clamp<int64_t>(own - p.window + 1, 0, n) : 0);
        const int to = static_cast<int>(std::clamp<int64_t>(own + 1, 0, n));
        std::fill(score, score + std::min(from, to), kNone);
        std::fill(score + to, score + kBlock, kNone);
        Vec most = splat(best[r]);
        for (int t = 0; t < kBlock; t += kLanes) most = max(load(score + t), most);
        const float top = highest(most);
        const Vec base = splat(top == kNone ? 0.0f : top);
        const Vec fade = exp_of_negative(sub(splat(best[r]), base));
        best[r] = top;
        float* denominator = denominators + r * kSums;
        for (int i = 0; i < kSums; i += kLanes) store(denominator + i, mul(load(denominator + i), fade));
        for (int t = 0; t < kBlock; t += kLanes) {
          const Vec weight = exp_of_negative(sub(load(score + t), base));
          store(score + t, scaled ? mul(weight, load(value_scales + t)) : weight);
          store(denominator + t % kSums, add(load(denominator + t % kSums), weight));
        }
        for (int64_t i = 0; i < wide; i += kLanes) {
          store(sums + r * wide + i, mul(load(sums + r * wide + i), fade));
        }
      }
      if (!in_place) {
        for (int t = unseen; t < n; t++) {
          if (step == kPositions) {
            const int64_t g = t / kPositions, values_at = (kPositions + t % kPositions) * D;
            to_floats_asking(at[g] + values_at, then[g] + values_at, V, wide, values + t * wide);
          } else {
            to_floats(at[t] + after, V, wide, values + t * wide);
          }
        }
        const Strided<float> seen{values + unseen * wide, wide};
        product<true>(rows, wide, scores + unseen, kBlock, n - unseen, seen, sums, wide);
      } else if (step == kPositions) {
        for (int t = unseen; t < n; t += kPositions) {
          const int64_t g = t / kPositions, values_at = kPositions * D;
          const CachedValues<C> part{{at[g] + values_at, D}, then[g] + values_at};
          product<true>(rows, wide, scores + t, kBlock, std::min(kPositions, n - t), part, sums, wide);
        }
      } else if constexpr (std::is_same_v<C, float>) {
        product<true>(rows, wide, scores + unseen, kBlock, n - unseen, Scattered{at + unseen, after}, sums, wide);
      }
    }
    n = next;
  }
  for (int64_t r = 0; r < heads * rows; r++) {
    float denominator = 0.0f;
    for (int i = 0; i < kSums; i++) denominator += all_denominators[r * kSums + i];
    const Vec factor = splat(denominator > 0.0f ? 1.0f / denominator : 0.0f);
    float* row = results + r * wide;
    for (int64_t i = 0; i < wide; i += kLanes) store(row + i, mul(load(row + i), factor));
  }
}

// The same from and to the step's own arrays.
template <class Q, class C>
void attend_tile(const Step& p, int64_t s, int64_t first, int64_t count, const Heads& of, const Q* q, const C* cache,
                 Q* out) {
  const int64_t D = p.head_dim, V = p.value_dim, padded = round_up(D, kLanes), wide = round_up(V, kLanes);
  const int64_t rows = count * of.group, all = of.count * rows;
  float* queries = scratch(all * (padded + wide) + scratch_size(of.count, rows, padded, wide));
  float* results = queries + all * padded;
  auto place = [&](int64_t i) {  // of row i % rows of head i / rows, among the heads of all tokens in q and in out
    const int64_t r = i % rows, head = (of.first + i / rows) * (p.heads / p.kv_heads) + of.skip + r % of.group;
    return (p.cu_q_lens[s] + first + r / of.group) * p.heads + head;
  };
  for (int64_t i = 0; i < all; i++) {
    float* query = queries + i * padded;
    to_floats(q + place(i) * D, D, padded, query);
    for (int64_t d = 0; d < padded; d += kLanes) store(query + d, mul(load(query + d), splat(p.scale)));
  }
  attend(p, s, first, count, of, queries, cache, results, results + all * wide);
  for (int64_t i = 0; i < all; i++) {
    Q* to = out + place(i) * V;
    for (int64_t d = 0; d < V; d++) from_float(results[i * wide + d], to + d);
  }
}

struct Tile {
  int64_t sequence, first, count;
};

// What a cache of C keeps of x [count]: float16 has no numbers beyond 65504, and an infinite one would spoil its whole
// row. A number is `apart` elements from the next.
template <class Q, class C>
void keep(const Q* x, int64_t count, C* to, int64_t apart) {
  int64_t i = 0;
  if constexpr (std::is_same_v<C, f16>) {
    for (; i + kLanes <= count; i += kLanes) {
      const Vec kept = max(splat(-65504.0f), min(splat(65504.0f), load(x + i)));
      if (apart == 1) {
        store(to + i, kept);
      } else {
        C lanes[kLanes];
        store(lanes, kept);
        for (int lane = 0; lane < kLanes; lane++) to[(i + lane) * apart] = lanes[lane];
      }
    }
  }
  for (; i < count; i++) {
    const float y = to_float(x[i]);
    from_float(std::is_same_v<C, f16> ? std::clamp(y, -65504.0f, 65504.0f) : y, to + i * apart);
  }
}

// What a cache of bytes keeps of x [count], and its scale; see the contract.
template <class Q>
float keep_bytes(const Q* x, int64_t count, int8_t* to, int64_t apart) {
  const int64_t padded = round_up(count, kLanes);
  float* y = scratch(padded);
  to_floats(x, count, padded, y);
  const Vec largest = splat(std::numeric_limits<float>::max());
  Vec most_of = splat(0.0f);
  bool finite = true;
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Vec size = max(load(y + i), sub(splat(0.0f), load(y + i)));
    finite = finite && !any_above(size, largest);
    most_of = max(size, most_of);
  }
  const float most = highest(most_of);
  if (!finite || !(most > kLeast)) {
    for (int64_t i = 0; i < count; i++) to[i * apart] = 0;
    return finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  const Vec inverse = splat(127.0f / most), magic = splat(kMagic);
  for (int64_t i = 0; i < padded; i += kLanes) store(y + i, add(mul(load(y + i), inverse), magic));
  for (int64_t i = 0; i < count; i++) {
    int32_t bits;
    std::memcpy(&bits, y + i, 4);
    to[i * apart] = static_cast<int8_t>(bits - kMagicBits);
  }
  return most * (1.0f / 127.0f);
}

template <class Q, class C>
void run(ffi::ThreadPool& pool, const Step& p, int64_t seqs, int64_t tokens, const Q* q, const Q* k, const Q* v,
         C* cache, Q* out) {
  const int64_t group = p.heads / p.kv_heads, D = p.head_dim, step = entry(p);
  std::vector<Tile> tiles;
  for (int64_t s = 0; s < seqs; s++) {
    const int64_t q_len = p.cu_q_lens[s + 1] - p.cu_q_lens[s], most = std::max<int64_t>(1, kQueryRows / group);
    for (int64_t first = 0; first < q_len; first += most) tiles.push_back({s, first, std::min(most, q_len - first)});
  }
  // All of the step's keys and values are written before anything is read.
  auto write = [&](int64_t tile) {
    const auto [s, first, count] = tiles[tile];
    for (int64_t t = p.cu_q_lens[s] + first; t < p.cu_q_lens[s] + first + count; t++) {
      const int64_t i = p.kv_lens[s] - p.cu_q_lens[s + 1] + t;
      const int64_t in_page = i % p.page, lane = in_page % step;
      const int64_t id = p.page_of(s, i / p.page);
      C* to = cache + (id * p.page + in_page - lane) * p.row;
      if (p.latent) {
        if constexpr (!std::is_same_v<C, int8_t>) keep(k + t * D, D, to, 1);
        std::fill(to + D, to + p.row, C{});
        continue;
      }
      for (int64_t h = 0; h < p.kv_heads; h++, to += 2 * D * step) {
        const int64_t from = (t * p.kv_heads + h) * D;
        C *key = to + lane, *value = to + (step + lane) * D;
        if constexpr (std::is_same_v<C, int8_t>) {
          float* scale = p.scales_of(id, in_page, h);
          scale[0] = keep_bytes(k + from, D, key, step);
          scale[p.page] = keep_bytes(v + from, D, value, 1);
        } else {
          keep(k + from, D, key, step);
          keep(v + from, D, value, 1);
        }
      }
    }
  };
  const int64_t many = 64 * 1024;  // elements worth a second thread
  const int64_t used = p.cu_q_lens[seqs];
  if (used * p.row > many) {
    parallel_for(pool, static_cast<int64_t>(tiles.size()), write);
  } else {
    for (size_t tile = 0; tile < tiles.size(); tile++) write(static_cast<int64_t>(tile));
  }
  // All kv heads of a position lie in one row of the cache: where there is work for every thread, an item takes several.
  // Of latents, whose row is for all heads, it takes a part of these where there is not.
  struct Item {
    const Tile* tile;
    Heads heads;
  };
  const int64_t count = static_cast<int64_t>(tiles.size()), enough = 4 * pool.num_threads();
  int64_t pieces = p.latent && count < enough ? std::clamp<int64_t>(group / kLeastHeads, 1, pool.num_threads()) : 1;
  while (group % pieces) pieces--;
  const int64_t each = group / pieces;
  std::vector<Item> items;
  for (const Tile& tile : tiles) {
    const int64_t most = std::max<int64_t>(1, kQueryRows / (tile.count * group));
    int64_t heads = std::clamp<int64_t>(count * p.kv_heads / enough, 1, std::min(most, p.kv_heads));
    while (p.kv_heads % heads) heads--;
    for (int64_t first = 0; first < p.kv_heads; first += heads) {
      for (int64_t skip = 0; skip < group; skip += each) items.push_back({&tile, {first, heads, skip, each}});
    }
  }
  parallel_for(pool, static_cast<int64_t>(items.size()), [&](int64_t i) {
    const auto& [tile, heads] = items[i];
    attend_tile(p, tile->sequence, tile->first, tile->count, heads, q, cache, out);
  });
  std::memset(static_cast<void*>(out + used * p.heads * p.value_dim), 0,
              (tokens - used) * p.heads * p.value_dim * sizeof(Q));
}

ffi::Error refused(const std::string& message) { return invalid("ragged_paged_attention", message); }

bool same(ffi::AnyBuffer::Dimensions a, ffi::AnyBuffer::Dimensions b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

std::string text(ffi::AnyBuffer::Dimensions dims) {
  std::string shape = "[";
  for (const int64_t d : dims) shape += (shape.size() > 1 ? ", " : "") + std::to_string(d);
  return shape + "]";
}

// The lengths and page ids: what only the device knows, so no caller can have checked it.
ffi::Error check(const Step& p, int64_t seqs, int64_t all_seqs, int64_t tokens, int64_t pages) {
  if (seqs < 0 || seqs > all_seqs) return refused("distribution holds " + std::to_string(seqs) + " sequences");
  for (int64_t s = 0; s < seqs; s++) {
    const int64_t begin = p.cu_q_lens[s], end = p.cu_q_lens[s + 1], length = p.kv_lens[s];
    const std::string who = " of sequence " + std::to_string(s);
    if (begin < 0 || end < begin || end > tokens || (s == 0 && begin != 0)) return refused("cu_q_lens" + who);
    if (length < end - begin || length > p.table_width * p.page) return refused("kv_lens" + who);
    for (int64_t i = 0; i * p.page < length; i++) {
      const int64_t id = p.page_of(s, i);
      if (id < 0 || id >= pages) return refused("page " + std::to_string(id) + who + " is not in the cache");
    }
  }
  return ffi::Error::Success();
}

template <class Q>
ffi::Error with_cache_type(ffi::ThreadPool& pool, const Step& p, int64_t seqs, int64_t tokens, ffi::AnyBuffer q,
                           ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer cache, ffi::AnyBuffer out) {
  auto call = [&](auto element) {
    using C = decltype(element);
    run<Q, C>(pool, p, seqs, tokens, static_cast<const Q*>(q.untyped_data()), static_cast<const Q*>(k.untyped_data()),
              static_cast<const Q*>(v.untyped_data()), static_cast<C*>(cache.untyped_data()),
              static_cast<Q*>(out.untyped_data()));
    return ffi::Error::Success();
  };
  switch (cache.element_type()) {
    case ffi::DataType::F32: return call(float{});
    case ffi::DataType::BF16: return call(bf16{});
    case ffi::DataType::F16: return call(f16{});
    case ffi::DataType::S8: return call(int8_t{});
    default: return refused("the cache must be float32, bfloat16, float16 or int8");
  }
}

ffi::Error ragged_paged_attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                                  ffi::AnyBuffer cache, ffi::Buffer<ffi::F32> scales, ffi::Buffer<ffi::S32> kv_lens,
                                  ffi::Buffer<ffi::S32> page_table, ffi::Buffer<ffi::S32> first_page,
                                  ffi::Buffer<ffi::S32> cu_q_lens,
                                  ffi::Buffer<ffi::S32> distribution, ffi::Buffer<ffi::F32> sinks,
                                  ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> new_cache,
                                  ffi::ResultBuffer<ffi::F32> new_scales, float scale, int64_t window,
                                  float soft_cap, bool causal, int64_t value_dim) {
  const auto qs = q.dimensions(), ks = k.dimensions(), vs = v.dimensions(), cs = cache.dimensions();
  const auto ts = page_table.dimensions();
  if (qs.size() != 3 || ks.size() != 3 || vs.size() != 3 || cs.size() != 3 || ts.size() != 2) {
    return refused("q, k, v and cache must have 3 axes and page_table 2");
  }
  const int64_t tokens = qs[0], all_seqs = ts[0];
  const bool heads_fit = ks[1] > 0 && qs[1] > 0 && qs[1] % ks[1] == 0 && ks[0] == tokens && ks[2] == qs[2];
  const bool latent = value_dim != 0;
  const bool values_fit = latent ? v.element_count() == 0 && ks[1] == 1 : same(ks, vs);
  if (!heads_fit || !values_fit || qs[2] < 1) return refused("q " + text(qs) + ", k " + text(ks) + ", v " + text(vs));
  if (latent && (value_dim < 1 || value_dim > ks[2])) return refused("value_dim " + std::to_string(value_dim));
  if ((latent ? cs[2] < ks[2] : cs[2] != ks[1] * 2 * ks[2]) || cs[1] < 1) {
    return refused("cache " + text(cs) + " for k " + text(ks));
  }
  if (latent && cache.element_type() == ffi::DataType::S8) return refused("a cache of bytes for latents");
  if (static_cast<int64_t>(kv_lens.element_count()) != all_seqs ||
      static_cast<int64_t>(cu_q_lens.element_count()) != all_seqs + 1 || distribution.element_count() != 3 ||
      first_page.element_count() != 1) {
    return refused("kv_lens, cu_q_lens, distribution or first_page do not fit page_table " + text(ts));
  }
  if (k.element_type() != q.element_type() || (!latent && v.element_type() != q.element_type()) ||
      out->element_type() != q.element_type() || new_cache->element_type() != cache.element_type()) {
    return refused("q, k, v and the result must be of one type, and the cache keep its own");
  }
  const auto os = out->dimensions();
  const int64_t values = latent ? value_dim : qs[2];
  if (os.size() != 3 || os[0] != tokens || os[1] != qs[1] || os[2] != values || !same(new_cache->dimensions(), cs)) {
    return refused("results " + text(os) + ", " + text(new_cache->dimensions()) + " for q " + text(qs));
  }
  if (window < 0) return refused("a negative window");
  if (window > 0 && !causal) return refused("a window of attention that is not causal");
  if (!(soft_cap >= 0.0f && std::isfinite(soft_cap))) return refused("a soft cap that is negative or no number");
  const bool with_sinks = sinks.element_count() > 0;  // none: an empty array
  if (with_sinks && (sinks.dimensions().size() != 1 || sinks.dimensions()[0] != qs[1])) {
    return refused("sinks " + text(sinks.dimensions()) + " for q " + text(qs));
  }
  if (cache.untyped_data() != new_cache->untyped_data()) return refused("the cache must be updated in place");
  const auto ss = scales.dimensions();
  if (cache.element_type() == ffi::DataType::S8) {
    if (ss.size() != 3 || ss[0] != cs[0] || ss[1] != 2 * ks[1] || ss[2] != cs[1] || !same(ss, new_scales->dimensions())) {
      return refused("scales " + text(ss) + " for a cache of bytes " + text(cs));
    }
    if (scales.untyped_data() != new_scales->untyped_data()) return refused("the scales must be updated in place");
  } else if (scales.element_count() > 0) {  // none: an empty array
    return refused("scales for a cache that is not of bytes");
  }

  const Step p{qs[1], ks[1], qs[2], values, cs[1], cs[2], ts[1], *first_page.typed_data(), latent, scale, soft_cap, window, causal, kv_lens.typed_data(),
               page_table.typed_data(), cu_q_lens.typed_data(), with_sinks ? sinks.typed_data() : nullptr,
               new_scales->typed_data()};
  const int64_t seqs = distribution.typed_data()[2];
  if (ffi::Error error = check(p, seqs, all_seqs, tokens, cs[0]); error.failure()) return error;
  switch (q.element_type()) {
    case ffi::DataType::F32: return with_cache_type<float>(pool, p, seqs, tokens, q, k, v, *new_cache, *out);
    case ffi::DataType::BF16: return with_cache_type<bf16>(pool, p, seqs, tokens, q, k, v, *new_cache, *out);
    default: return refused("q must be float32 or bfloat16");
  }
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_ragged_paged_attention, jaxserve::ragged_paged_attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("soft_cap")
                                  .Attr<bool>("causal")
                                  .Attr<int64_t>("value_dim"));
