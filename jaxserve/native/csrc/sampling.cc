// Choosing tokens for CPU: the largest logit, the filtered random draw, and log-probabilities over whole vocabularies;
// what they mean is said in jaxserve/sampling.py.
//
// One thread has a row from end to end, and every sum runs in the order of the ids: a row's token depends on that row
// alone, bit for bit. Most of a vocabulary is looked at once and rejected by one comparison; what can still win is
// collected, and only there are exact thresholds sought and random numbers made. The noise of an id is a function of
// (seed, position, id) alone, the same that jax.random gives it (threefry2x32, partitionable), so it is made for the
// ids that need it.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

constexpr int kGroup = 16;             // logits that are looked at together, whatever the vector width
constexpr int64_t kSummed = 1024;      // logits whose weights are summed in float32 before float64 takes over
constexpr int64_t kDrawn = 256;        // candidates whose random bits are made together
constexpr int64_t kSpare = 256;        // candidates beyond 2 k before those below the k best are dropped
constexpr int64_t kWorthAThread = 1 << 14;  // logits of an item of work
constexpr float kMostNoise = 16.0f;    // above the largest there is, -log(-log(1 - 2^-23)) = 15.94
constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr float kLevels[] = {1, 2, 4, 8, 16};  // depths below the best logit at which the mass is known
constexpr int kNumLevels = 5;

struct Best {
  float value;
  int64_t id;
};

struct Words {
  uint32_t a, b;
};

struct Row {
  float temperature;
  int32_t top_k;
  float top_p, min_p;
  Words seed;
  int32_t position;
};

// What may still be drawn: logits over the temperature, in the order of their ids.
struct Kept {
  std::vector<float> x, weight;
  std::vector<int32_t> id;
  int64_t count = 0;
};

bool any_above(const float* x, float limit) {  // of a group
  bool any = false;
  for (int i = 0; i < kGroup; i += kLanes) any |= any_above(load(x + i), splat(limit));
  return any;
}

// The largest of n >= 1 numbers, where it first appears; a NaN is larger than all.
Best largest(const float* x, int64_t n) {
  Best best{x[0], 0};
  for (int64_t i = 0; i < n && best.value == best.value; i += kGroup) {
    const int64_t end = std::min(n, i + kGroup);
    if (end - i == kGroup && !any_above(x + i, best.value)) continue;
    for (int64_t j = i; j < end && best.value == best.value; j++) {
      if (!(x[j] <= best.value)) best = {x[j], j};
    }
  }
  return best;
}

// The natural logarithm of a normal x > 0, relative error below 1e-15; a library's may differ between processors.
double log_of(double x) {
  constexpr double kLog2 = 0.69314718055994530942;
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  int exponent = static_cast<int>(bits >> 52) - 1023;
  bits = (bits & 0xfffffffffffff) | (uint64_t{1023} << 52);
  double m;  // in [sqrt(1/2), sqrt(2)]
  std::memcpy(&m, &bits, 8);
  if (m > 1.41421356237309504880) m *= 0.5, exponent++;
  const double s = (m - 1) / (m + 1), z = s * s;  // log(m) = 2 artanh(s)
  double p = 0;
  for (int i = 21; i >= 1; i -= 2) p = p * z + 1.0 / i;
  return exponent * kLog2 + 2 * s * p;
}

// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011): Threefry-2x32 of 20 rounds.
inline Words threefry(Words key, uint32_t a, uint32_t b) {
  constexpr int kRotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t keys[3] = {key.a, key.b, key.a ^ key.b ^ 0x1bd11bda};
  a += keys[0];
  b += keys[1];
#pragma GCC unroll 5
  for (uint32_t i = 0; i < 5; i++) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
      const int rotation = kRotations[i % 2][r];
      a += b;
      b = ((b << rotation) | (b >> (32 - rotation))) ^ a;
    }
    a += keys[(i + 1) % 3];
    b += keys[(i + 2) % 3] + i + 1;
  }
  return {a, b};
}

// Gumbel's distribution from 23 random bits, rounded where jax.random.gumbel rounds.
float gumbel(uint32_t bits) {
  const uint32_t k = bits >> 9;
  const float uniform = k == 0 ? FLT_MIN : static_cast<float>(k) * 0x1p-23f;
  const float exponential = static_cast<float>(-log_of(uniform));
  return static_cast<float>(-log_of(exponential));
}

// Not below gumbel(bits), and close above it where that is large: -log(u) >= 1 - u, and log2(1 + m) >= m gives the
// logarithm of 1 - u from its bits.
inline float gumbel_at_most(uint32_t bits) {
  const float rest = static_cast<float>(static_cast<int32_t>((1u << 23) - (bits >> 9)));  // (1 - u) * 2^23
  int32_t scaled;
  std::memcpy(&scaled, &rest, 4);
  return (150 * 0.693147181f + 1e-3f) - static_cast<float>(scaled) * (0.693147181f / (1 << 23));
}

// Unsigned integers in the order of the floats, -0 below 0.
inline uint32_t ordered(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits >> 31 ? ~bits : bits | (1u << 31);
}
inline float from_ordered(uint32_t key) {
  const uint32_t bits = key >> 31 ? key & ~(1u << 31) : ~key;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The k-th largest (as `ordered`) of more than k.
uint32_t floor_of_best(const Kept& kept, int64_t k) {
  static thread_local std::vector<uint32_t> keys;
  keys.resize(kept.count);
  for (int64_t i = 0; i < kept.count; i++) keys[i] = ordered(kept.x[i]);
  std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<uint32_t>());
  return keys[k - 1];
}

void drop_below(uint32_t floor, Kept& kept) {
  int64_t count = 0;
  for (int64_t i = 0; i < kept.count; i++) {
    const float x = kept.x[i];
    kept.x[count] = x;
    kept.id[count] = kept.id[i];
    count += ordered(x) >= floor;
  }
  kept.count = count;
}

// Keeps the ids whose logit over the temperature is at least `low` and not -inf; with k > 0 only the k best of them,
// and what equals the last.
void collect(const float* logits, int64_t vocab, float temperature, float low, int64_t k, Kept& kept) {
  if (static_cast<int64_t>(kept.x.size()) < vocab + kGroup) {
    kept.x.resize(vocab + kGroup);
    kept.weight.resize(vocab + kGroup);
    kept.id.resize(vocab + kGroup);
  }
  // What is not above this is below `low` when divided, whatever the rounding: most is never divided.
  const auto reject = [&](float low) {
    const float product = low * temperature;
    return product - (std::abs(product) * 1e-6f + temperature * 1e-36f + 1e-36f);
  };
  low = std::max(low, -FLT_MAX);
  float limit = reject(low);
  int64_t count = 0, room = k > 0 ? 2 * k + kSpare : vocab;
  const auto cut = [&] {
    kept.count = count;
    const uint32_t floor = floor_of_best(kept, k);
    drop_below(floor, kept);
    count = kept.count;
    if (floor > ordered(low)) low = from_ordered(floor), limit = reject(low);
  };
  float* const xs = kept.x.data();
  int32_t* const ids = kept.id.data();
  for (int64_t i = 0; i < vocab; i += kGroup) {
    const int64_t end = std::min(vocab, i + kGroup);
    if (end - i == kGroup && !any_above(logits + i, limit)) continue;
    float group[kGroup];
    if (end - i == kGroup) {
      for (int v = 0; v < kGroup; v += kLanes) store(group + v, div(load(logits + i + v), splat(temperature)));
    } else {
      for (int64_t j = i; j < end; j++) group[j - i] = logits[j] / temperature;
    }
    bool all = end - i == kGroup;
    for (int v = 0; v < kGroup && all; v += kLanes) all = !any_above(splat(low), load(group + v));
    if (all) {
      std::copy(group, group + kGroup, xs + count);
      for (int j = 0; j < kGroup; j++) ids[count + j] = static_cast<int32_t>(i + j);
      count += kGroup;
    } else {
      for (int64_t j = i; j < end; j++) {  // written in any case: no branch to guess
        xs[count] = group[j - i];
        ids[count] = static_cast<int32_t>(j);
        count += group[j - i] >= low;
      }
    }
    if (k > 0 && count >= room) {
      cut();
      room = std::max(room, 2 * count);  // of many equal ones none can be dropped
    }
  }
  if (k > 0 && count > k) cut();
  kept.count = count;
}

// Sums of exp(x - best) over a row, x the logits over the temperature; `filtered`: over all x >= low, and over those no
// more than each of kLevels below the best. Else over the logits as they are.
struct Mass {
  double all, levels[kNumLevels];
};
template <bool filtered>
Mass mass_of(const float* logits, int64_t vocab, float temperature, float best, float low) {
  constexpr int kVecs = kGroup / kLanes, kSets = filtered ? 1 + kNumLevels : 1;
  double totals[1 + kNumLevels] = {};
  for (int64_t start = 0; start < vocab; start += kSummed) {
    Vec sums[kSets][kVecs];
    for (auto& set : sums) std::fill(set, set + kVecs, splat(0.0f));
    const auto add_group = [&](const float* group) {
      for (int v = 0; v < kVecs; v++) {
        Vec x = load(group + v * kLanes);
        if (filtered) x = div(x, splat(temperature));
        Vec weight = exp_of_negative(sub(x, splat(best)));
        if (filtered) weight = zero_where_below(x, splat(low), weight);
        sums[0][v] = add(sums[0][v], weight);
        for (int set = 1; set < kSets; set++) {
          sums[set][v] = add(sums[set][v], zero_where_below(x, splat(best - kLevels[set - 1]), weight));
        }
      }
    };
    const int64_t end = std::min(vocab, start + kSummed);
    int64_t i = start;
    for (; i + kGroup <= end; i += kGroup) add_group(logits + i);
    if (i < end) {
      float rest[kGroup];
      std::fill(std::copy(logits + i, logits + end, rest), rest + kGroup, kLowest);
      add_group(rest);
    }
    for (int set = 0; set < kSets; set++) {
      float lanes[kGroup];
      for (int v = 0; v < kVecs; v++) store(lanes + v * kLanes, sums[set][v]);
      for (const float lane : lanes) totals[set] += lane;
    }
  }
  Mass mass{totals[0], {}};
  std::copy(totals + 1, totals + 1 + kNumLevels, mass.levels);
  return mass;
}

// Keeps the largest logits whose weights exp(x - best) come to `share` of `total`, and what equals the last; a total of
// 0 stands for all that is kept.
void keep_share(float share, double total, float best, Kept& kept) {
  constexpr int kBins = 2048;
  constexpr float kBinsPerUnit = 32.0f;  // of x below the best: no weight is left where they end
  const auto bin = [&](float x) { return static_cast<int>(std::min((best - x) * kBinsPerUnit, kBins - 1.0f)); };
  for (int64_t i = 0; i < kept.count; i += kGroup) {
    if (kept.count - i < kGroup) std::fill(&kept.x[kept.count], &kept.x[i] + kGroup, kLowest);
    for (int v = 0; v < kGroup; v += kLanes) {
      store(&kept.weight[i + v], exp_of_negative(sub(load(&kept.x[i + v]), splat(best))));
    }
  }
  double sums[kBins] = {};
  for (int64_t i = 0; i < kept.count; i++) sums[bin(kept.x[i])] += kept.weight[i];
  if (total == 0) {
    for (const double sum : sums) total += sum;
  }
  const double enough = share * total;
  double above = 0;
  int last = 0;  // the bin in which there is enough
  for (; last < kBins - 1 && above + sums[last] < enough; last++) above += sums[last];
  static thread_local std::vector<std::pair<uint32_t, float>> found;
  found.clear();
  for (int64_t i = 0; i < kept.count; i++) {
    if (bin(kept.x[i]) == last) found.emplace_back(ordered(kept.x[i]), kept.weight[i]);
  }
  std::sort(found.begin(), found.end(), std::greater<>());
  uint32_t floor = found.empty() ? 0 : found.back().first;
  for (const auto& [key, weight] : found) {
    above += weight;
    if (above < enough) continue;
    floor = key;
    break;
  }
  drop_below(floor, kept);
}

// The id of the largest sum of logit and noise, the lowest of equals; 0 where nothing is kept.
int32_t winner(const Kept& kept, Words key) {
  float best = kLowest;
  int32_t id = 0;
  for (int64_t i = 0; i < kept.count; i += kDrawn) {
    const int64_t count = std::min(kDrawn, kept.count - i);
    uint32_t bits[kDrawn];
    float reach[kDrawn];
    const float* x = &kept.x[i];
    const int32_t* ids = &kept.id[i];
    for (int64_t j = 0; j < count; j++) {
      const Words words = threefry(key, 0, static_cast<uint32_t>(ids[j]));
      bits[j] = words.a ^ words.b;
    }
    for (int64_t j = 0; j < count; j++) reach[j] = x[j] + gumbel_at_most(bits[j]);
    for (int64_t j = count; j % kGroup != 0; j++) reach[j] = kLowest;
    for (int64_t group = 0; group < count; group += kGroup) {
      if (!any_above(reach + group, best)) continue;
      for (int64_t j = group; j < group + kGroup; j++) {
        if (!(reach[j] > best)) continue;
        const float sum = x[j] + gumbel(bits[j]);
        if (sum > best) best = sum, id = ids[j];
      }
    }
  }
  return id;
}

int32_t choose(const float* logits, int64_t vocab, const Row& row, Kept& kept) {
  const Best greedy = largest(logits, vocab);
  if (!(row.temperature > 0) || greedy.value != greedy.value) return static_cast<int32_t>(greedy.id);
  const float best = greedy.value / row.temperature;
  if (std::isinf(best)) {  // no noise tells the infinite apart
    int64_t id = 0;
    while (logits[id] / row.temperature != best) id++;
    return static_cast<int32_t>(id);
  }
  const Words key = threefry(row.seed, 0, static_cast<uint32_t>(row.position));
  const bool by_k = row.top_k > 0 && row.top_k < vocab, by_p = row.top_p < 1;
  float low = kLowest;
  if (row.min_p > 0) low = best + static_cast<float>(log_of(std::max(row.min_p, FLT_MIN)));
  double total = 0;
  if (by_p && !by_k) {
    const Mass mass = mass_of<true>(logits, vocab, row.temperature, best, low);
    total = mass.all;
    for (int i = 0; i < kNumLevels; i++) {  // the margin is for what rounding does to the sums
      if (mass.levels[i] < row.top_p * total * (1 + 1e-5)) continue;
      low = std::max(low, best - kLevels[i]);
      break;
    }
  } else if (!by_p && !by_k && best >= low) {
    const Words words = threefry(key, 0, static_cast<uint32_t>(greedy.id));
    const float sum = best + gumbel(words.a ^ words.b);
    low = std::max(low, sum - kMostNoise - std::abs(sum) * 1e-6f);  // below it no noise suffices
  }
  collect(logits, vocab, row.temperature, low, by_k ? row.top_k : 0, kept);
  if (by_p) keep_share(row.top_p, total, best, kept);
  return winner(kept, key);
}

// The chosen token's log-probability and rank, and the `top` best ids with theirs; a row without a finite best logit
// has NaN for all, and the lowest ids.
void logprobs_of(const float* logits, int64_t vocab, int32_t token, int64_t top, float* logprob, int32_t* rank,
                 int32_t* ids, float* logprobs) {
  const Best best = largest(logits, vocab);
  if (!std::isfinite(best.value)) {
    *logprob = std::numeric_limits<float>::quiet_NaN();
    *rank = 1;
    for (int64_t i = 0; i < top; i++) ids[i] = static_cast<int32_t>(i);
    std::fill(logprobs, logprobs + top, *logprob);
    return;
  }
  const float log_sum = static_cast<float>(log_of(mass_of<false>(logits, vocab, 1, best.value, kLowest).all));
  const auto normalised = [&](float x) { return (x - best.value) - log_sum; };
  const float chosen = logits[token];
  int32_t above = 0;
  for (int64_t i = 0; i < vocab; i++) above += logits[i] > chosen;
  *logprob = normalised(chosen);
  *rank = 1 + above;
  int64_t count = 0;
  for (int64_t i = 0; i < vocab && top > 0; i += kGroup) {
    const int64_t end = std::min(vocab, i + kGroup);
    if (end - i == kGroup && count == top && !any_above(logits + i, logprobs[top - 1])) continue;
    for (int64_t j = i; j < end; j++) {
      if (count == top && !(logits[j] > logprobs[top - 1])) continue;
      int64_t at = count < top ? count++ : top - 1;
      for (; at > 0 && logits[j] > logprobs[at - 1]; at--) {
        logprobs[at] = logprobs[at - 1];
        ids[at] = ids[at - 1];
      }
      logprobs[at] = logits[j];
      ids[at] = static_cast<int32_t>(j);
    }
  }
  for (int64_t i = 0; i < top; i++) logprobs[i] = normalised(logprobs[i]);
}

// Calls body(row) for every row, on the pool where there is enough to do.
template <class Body>
void for_rows(ffi::ThreadPool& pool, int64_t rows, int64_t vocab, const Body& body) {
  const int64_t each = std::max<int64_t>(1, kWorthAThread / vocab);
  parallel_for(pool, (rows + each - 1) / each, [&](int64_t item) {
    for (int64_t row = item * each; row < std::min(rows, (item + 1) * each); row++) body(row);
  });
}

bool is_matrix_of_logits(ffi::AnyBuffer::Dimensions dims) {
  return dims.size() == 2 && dims[1] >= 1 && dims[1] <= std::numeric_limits<int32_t>::max() - kGroup;
}

ffi::Error sample(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, ffi::Buffer<ffi::F32> temperature,
                  ffi::Buffer<ffi::S32> top_k, ffi::Buffer<ffi::F32> top_p, ffi::Buffer<ffi::F32> min_p,
                  ffi::Buffer<ffi::U32> seed, ffi::Buffer<ffi::S32> position,
                  ffi::Result<ffi::Buffer<ffi::S32>> tokens) {
  const auto dims = logits.dimensions();
  const size_t rows = dims.size() == 2 ? dims[0] : 0;
  if (!is_matrix_of_logits(dims) || temperature.element_count() != rows || top_k.element_count() != rows ||
      top_p.element_count() != rows || min_p.element_count() != rows || seed.element_count() != 2 * rows ||
      position.element_count() != rows || tokens->element_count() != rows) {
    return ffi::Error::InvalidArgument("sample: logits must be [S, V], seed [S, 2] and all else [S]");
  }
  for (size_t i = 0; i < rows; i++) {
    if (std::isinf(temperature.typed_data()[i])) {
      return ffi::Error::InvalidArgument("sample: the temperature of row " + std::to_string(i) + " is infinite");
    }
  }
  for_rows(pool, dims[0], dims[1], [&](int64_t i) {
    static thread_local Kept kept;
    const uint32_t* words = seed.typed_data() + 2 * i;
    const Row row{temperature.typed_data()[i], top_k.typed_data()[i], top_p.typed_data()[i],
                  min_p.typed_data()[i],       {words[0], words[1]},  position.typed_data()[i]};
    tokens->typed_data()[i] = choose(logits.typed_data() + i * dims[1], dims[1], row, kept);
  });
  return ffi::Error::Success();
}

ffi::Error token_logprobs(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, ffi::Buffer<ffi::S32> tokens,
                          ffi::Result<ffi::Buffer<ffi::F32>> logprob, ffi::Result<ffi::Buffer<ffi::S32>> rank,
                          ffi::Result<ffi::Buffer<ffi::S32>> top_ids,
                          ffi::Result<ffi::Buffer<ffi::F32>> top_logprobs) {
  const auto dims = logits.dimensions(), tops = top_ids->dimensions(), values = top_logprobs->dimensions();
  const size_t rows = dims.size() == 2 ? dims[0] : 0;
  if (!is_matrix_of_logits(dims) || tops.size() != 2 || values.size() != 2 || tops[0] != dims[0] ||
      values[0] != dims[0] || tops[1] != values[1] || tops[1] > dims[1] || tokens.element_count() != rows ||
      logprob->element_count() != rows || rank->element_count() != rows) {
    return ffi::Error::InvalidArgument(
        "token_logprobs: logits must be [S, V], tokens [S] and the results [S], [S], [S, K] and [S, K], K <= V");
  }
  for (size_t i = 0; i < rows; i++) {
    const int32_t token = tokens.typed_data()[i];
    if (token < -1 || token >= dims[1]) {
      return ffi::Error::InvalidArgument("token_logprobs: token " + std::to_string(token) + " of row " +
                                         std::to_string(i) + " is not in the vocabulary");
    }
  }
  const int64_t top = tops[1];
  for_rows(pool, dims[0], dims[1], [&](int64_t i) {
    float* const one = logprob->typed_data() + i;
    float* const many = top_logprobs->typed_data() + i * top;
    int32_t* const place = rank->typed_data() + i;
    int32_t* const ids = top_ids->typed_data() + i * top;
    const int32_t token = tokens.typed_data()[i];
    if (token < 0) {  // not wanted
      *one = 0.0f;
      *place = 0;
      std::fill(ids, ids + top, 0);
      std::fill(many, many + top, 0.0f);
    } else {
      logprobs_of(logits.typed_data() + i * dims[1], dims[1], token, top, one, place, ids, many);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_sample, jaxserve::sample,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_token_logprobs, jaxserve::token_logprobs,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
