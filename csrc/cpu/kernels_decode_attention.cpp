// Attention of one query token a row over the keys and values that the row has so far.
//
// An item is a row and one of its key-value heads, with all the query heads that share it, so that keys and values are
// read from memory once. They come a block of positions at a time: a block's scores become weights against the running
// maximum, then its values are summed. Scores, weights and sums are float32.
//
// An item's arithmetic does not depend on the other items: the same results in every batch and for every thread count.
#include <math.h>
#include <string.h>

#include <type_traits>

#include "lora_tiles.h"
#include "math_simd.h"
#include "scratch.h"

namespace essa {
namespace cpu {
namespace ESSA_ISA {
namespace {

constexpr int kHeads = W == 16 ? 8 : 4;  // query heads of a tile
constexpr int kColumns = 2 * W;          // of values, in a tile
constexpr int64_t kPositions = 256;      // of a block, at most
constexpr float kUnseen = -INFINITY;     // the score of a position that is masked

// Calls body(std::integral_constant<int, count>()) for a count of 1 .. N, or N for a greater one.
template <int N, class Body>
ESSA_INLINE void with_count(int64_t count, Body body) {
  if constexpr (N > 1) {
    if (count < N) return with_count<N - 1>(count, body);
  }
  body(std::integral_constant<int, N>());
}

// Two vectors of adjacent elements: as they lie or, bfloat16, the even ones and the odd ones.
template <class T>
ESSA_INLINE void load_pair(const typename T::Element* p, vf out[2]) {
  if constexpr (std::is_same<T, BFloat16>::value) {
    load_bf16_even_odd(p, &out[0], &out[1]);
  } else {
    out[0] = T::get(p), out[1] = T::get(p + W);
  }
}

// Where column j of `load_pair`'s vectors is.
template <class T>
ESSA_INLINE int64_t place_of(int64_t j) {
  if (!std::is_same<T, BFloat16>::value) return j;
  return j / kColumns * kColumns + j % 2 * W + j % kColumns / 2;
}

// Rows that will be read next, fetched as others are computed: the machine does not foresee the next block.
struct Ahead {
  const char* row;
  int64_t stride, bytes, rows;
  void fetch_row() {
    if (rows-- <= 0) return;
    for (int64_t byte = 0; byte < bytes; byte += 64) prefetch(row + byte);
    row += stride;
  }
};

template <class T>
struct Attention {
  typedef typename T::Element Element;
  const DecodeAttentionArgs& args;
  const int64_t heads, columns;
  const int64_t block;  // positions at a time: the blocks are of one length, for each fetches the next
  float *scores, *sums, *greatest_score, *total, *line;
  Ahead keys_ahead, values_ahead;
  float* unseen;  // 1 where a position of the block is masked, else 0

  explicit Attention(const DecodeAttentionArgs& a)
      : args(a),
        heads(a.heads / a.kv_heads),
        columns(round_up(a.d_v, kColumns)),
        block(round_up(blocks(a.length, blocks(a.length, kPositions)), W)) {
    Pieces pieces{nullptr};
    place(pieces);
    Pieces real{scratch(pieces.used)};
    place(real);
  }

  void place(Pieces& pieces) {
    scores = pieces.take<float>(heads * kPositions);
    sums = pieces.take<float>(heads * columns);
    greatest_score = pieces.take<float>(heads);
    total = pieces.take<float>(heads);
    line = pieces.take<float>(columns);
    unseen = pieces.take<float>(kPositions);
  }

  const Element* keys_of(int64_t item) const {
    return (const Element*)args.key + item / args.kv_heads * args.key_row + item % args.kv_heads * args.key_head;
  }
  const Element* values_of(int64_t item) const {
    return (const Element*)args.value + item / args.kv_heads * args.value_row + item % args.kv_heads * args.value_head;
  }
  Ahead ahead(const Element* first, int64_t stride, int64_t d, int64_t rows) const {
    constexpr int64_t kSize = sizeof(Element);
    return {(const char*)first, stride * kSize, d * kSize, least(rows, block)};
  }

  // `more`: whether another item comes after this one.
  void run(int64_t item, bool more) {
    const int64_t row = item / args.kv_heads, kv_head = item % args.kv_heads;
    const Element* query = (const Element*)args.query + row * args.query_row + kv_head * heads * args.query_head;
    const Element *keys = keys_of(item), *values = values_of(item);
    for (int64_t k = 0; k < heads; ++k) greatest_score[k] = kUnseen, total[k] = 0.0f;
    memset(sums, 0, heads * columns * sizeof(float));
    for (int64_t at = 0; at < args.length; at += block) {
      const int64_t positions = least(block, args.length - at), left = args.length - at - positions;
      const Element* next_keys = left > 0 ? keys + block * args.key_position : keys_of(item + 1);
      const Element* next_values = left > 0 ? values + block * args.value_position : values_of(item + 1);
      keys_ahead = ahead(next_keys, args.key_position, args.d, left > 0 ? left : more ? args.length : 0);
      values_ahead = ahead(next_values, args.value_position, args.d_v, keys_ahead.rows);
      if (look(row, at, positions)) {
        score(query, keys, positions);
        for (int64_t k = 0; k < heads; ++k) weigh(k, positions);
        sum_values(values, positions);
      }
      keys = next_keys, values = next_values;
    }
    finish((Element*)args.out + (row * args.heads + kv_head * heads) * args.d_v);
  }

  // Fills `unseen`; whether any position is seen.
  bool look(int64_t row, int64_t at, int64_t positions) {
    const uint8_t* mask = args.mask == nullptr ? nullptr : args.mask + row * args.mask_row + at;
    bool any = false;
    for (int64_t t = 0; t < round_up(positions, W); ++t) {
      const bool seen = t < positions && (mask == nullptr || mask[t] != 0);
      unseen[t] = seen ? 0.0f : 1.0f;
      any = any || seen;
    }
    return any;
  }

  // scores[k, t] = the query of head k times key t
  void score(const Element* query, const Element* keys, int64_t positions) {
    const Strided<const Element> queries{query, args.query_head};
    for (int64_t k = 0; k < heads; k += kShrinkRows)
      with_count<kShrinkRows>(heads - k, [&](auto count) {
        shrink_rows<T, count()>(queries.from(k), keys, positions, args.key_position, 0, args.d,
                                scores + k * kPositions, kPositions);
      });
  }

  // A head's scores become weights; what was summed under a lower maximum shrinks.
  void weigh(int64_t k, int64_t positions) {
    float* own = scores + k * kPositions;
    vf highest = set1(greatest_score[k]);
    for (int64_t t = 0; t < positions; t += W) {
      const vf scaled = mul(load(own + t), set1(args.scale));
      const vf score = select_less(zero(), load(unseen + t), set1(kUnseen), scaled);
      store(own + t, score);
      highest = max(score, highest);
    }
    const float now = greatest(highest);
    if (now > greatest_score[k]) {
      alignas(64) float shrink[W];
      store(shrink, exp(set1(greatest_score[k] - now)));
      float* own_sums = sums + k * columns;
      for (int64_t j = 0; j < columns; j += W) store(own_sums + j, mul(load(own_sums + j), set1(shrink[0])));
      total[k] *= shrink[0];
      greatest_score[k] = now;
    }
    vf added = zero();
    for (int64_t t = 0; t < positions; t += W) {
      const vf weight = exp(sub(load(own + t), set1(now)));
      const vf seen = select_less(zero(), load(unseen + t), zero(), weight);
      store(own + t, seen);
      added = add(added, seen);
    }
    total[k] += sum(added);
  }

  // sums[k, :] += sum of weights[k, t] values[t, :]
  void sum_values(const Element* values, int64_t positions) {
    Ahead none{nullptr, 0, 0, 0};
    for (int64_t k = 0; k < heads; k += kHeads)
      with_count<kHeads>(heads - k, [&](auto count) {
        constexpr int kPairs = 2 * count() <= kHeads ? 2 : 1;
        int64_t j = 0;
        for (; j + kPairs * kColumns <= args.d_v; j += kPairs * kColumns) {
          const bool last = j + 2 * kPairs * kColumns > args.d_v;
          sum_tile<count(), kPairs, true>(values + j, positions, k, j, k == 0 && j == 0 ? keys_ahead : none,
                                          k == 0 && last ? values_ahead : none);
        }
        for (; j + kColumns <= args.d_v; j += kColumns)
          sum_tile<count(), 1, true>(values + j, positions, k, j, none, none);
        if (j < args.d_v) sum_tile<count(), 1, false>(values + j, positions, k, j, none, none);
      });
  }

  template <int K, int P, bool kWhole>
  void sum_tile(const Element* values, int64_t positions, int64_t k, int64_t j, Ahead one, Ahead other) {
    vf tile[K][2 * P];
    for (int i = 0; i < K; ++i)
      for (int n = 0; n < 2 * P; ++n) tile[i][n] = load(sums + (k + i) * columns + j + n * W);
    const float* weight = scores + k * kPositions;
    const int64_t stride = args.value_position, left = args.d_v - j;
    for (int64_t t = 0; t < positions; ++t, ++weight, values += stride) {
      one.fetch_row();
      other.fetch_row();
      vf row[2 * P];
      if (kWhole) {
        for (int p = 0; p < P; ++p) load_pair<T>(values + p * kColumns, row + 2 * p);
      } else {
        Element edge[kColumns] = {};
        memcpy(edge, values, left * sizeof(Element));
        load_pair<T>(edge, row);
      }
      for (int i = 0; i < K; ++i) {
        const vf factor = set1(weight[i * kPositions]);
        for (int n = 0; n < 2 * P; ++n) tile[i][n] = muladd(factor, row[n], tile[i][n]);
      }
    }
    for (int i = 0; i < K; ++i)
      for (int n = 0; n < 2 * P; ++n) store(sums + (k + i) * columns + j + n * W, tile[i][n]);
  }

  void finish(Element* out) {
    for (int64_t k = 0; k < heads; ++k, out += args.d_v) {
      const float factor = total[k] == 0.0f ? 0.0f : 1.0f / total[k];
      for (int64_t j = 0; j < args.d_v; ++j) line[j] = factor * sums[k * columns + place_of<T>(j)];
      narrow<T>(line, args.d_v, out);
    }
  }
};

template <class T>
void attend(const DecodeAttentionArgs& args, int64_t first, int64_t last) {
  Attention<T> attention(args);
  for (int64_t item = first; item < last; ++item) attention.run(item, item + 1 < last);
}

}  // namespace

void decode_attention(const DecodeAttentionArgs& args, int64_t first, int64_t last) {
  if (args.dtype == kFloat32) attend<Float32>(args, first, last);
  if (args.dtype == kBFloat16) attend<BFloat16>(args, first, last);
  if (args.dtype == kFloat16) attend<Float16>(args, first, last);
}

}  // namespace ESSA_ISA
}  // namespace cpu
}  // namespace essa
