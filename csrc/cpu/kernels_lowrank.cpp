// EGGROLL: low-rank noise on a weight. The forward draws a pair's factors and multiplies the rows of both members with
// them; the update is one blocked product over factors that are drawn a block at a time.
#include "perturbed.h"

namespace essa {
namespace cpu {
namespace ESSA_ISA {
namespace {

// --- forward: y += +-sigma / sqrt(rank) E (F^T x) ------------------------------------------------------------------

// Both members' rows have the same factors: where they lie side by side they are one run.
template <class Run>
ESSA_INLINE void each_run(const PairRows& pair, Run run) {
  if (pair.first[0] + pair.rows[0] == pair.first[1]) return run(pair.first[0], pair.rows[0] + pair.rows[1]);
  for (int sign = 0; sign < 2; ++sign) run(pair.first[sign], pair.rows[sign]);
}

template <class T>
void shrink(const PerturbedArgs& args, int64_t first, int64_t last) {
  const int64_t rank_groups = blocks(args.rank, kRanksAtOnce);
  const int64_t stride = round_up(args.d_in < kColumnBlock ? args.d_in : kColumnBlock, 64);
  float* f_t = scratch(kRanksAtOnce * stride);
  for (int64_t item = first; item < last; ++item) {
    const PairRows& pair = args.pairs[item / rank_groups];
    const int64_t rank = item % rank_groups * kRanksAtOnce;
    const int64_t ranks = args.rank - rank < kRanksAtOnce ? args.rank - rank : kRanksAtOnce;
    const NoiseMatrix noise(args.key, args.key.site, pair.pair, args.rademacher, args.d_in);
    float* h = args.h + rank;
    set_h(args, pair, h, ranks, [](float, int) { return 0.0f; });
    for (int64_t column = 0; column < args.d_in; column += kColumnBlock) {
      const int64_t columns = args.d_in - column < kColumnBlock ? args.d_in - column : kColumnBlock;
      for (int64_t k = 0; k < ranks; ++k) noise.draw(rank + k, column, columns, f_t + k * stride);
      each_run(pair, [&](int64_t row, int64_t rows) {
        shrink_rows<T>(args, row, rows, column, columns, f_t, stride, ranks, h);
      });
    }
    set_h(args, pair, h, ranks, [&](float value, int sign) { return (sign ? -args.scaling : args.scaling) * value; });
  }
}

template <class T>
void expand(const PerturbedArgs& args, int64_t first, int64_t last) {
  const int64_t stride = round_up(args.d_out < kColumnBlock ? args.d_out : kColumnBlock, 64);
  float* e_t = scratch(args.rank * stride);
  for (int64_t item = first; item < last; ++item) {
    const PairRows& pair = args.pairs[item % args.pair_count];
    const int64_t column = item / args.pair_count * kColumnBlock;
    const int64_t columns = args.d_out - column < kColumnBlock ? args.d_out - column : kColumnBlock;
    const NoiseMatrix noise(args.key, args.key.site + 1, pair.pair, args.rademacher, args.d_out);
    for (int64_t k = 0; k < args.rank; ++k) noise.draw(k, column, columns, e_t + k * stride);
    each_run(pair, [&](int64_t row, int64_t rows) { expand_rows<T>(args, row, rows, column, columns, e_t, stride); });
  }
}

// --- update: w += sum over pairs and ranks of (weight E) F^T, one fma each, ascending -------------------------------

constexpr int64_t kDepth = 64;  // pairs times ranks whose factors are held at a time
constexpr int kUpdateRows = 6;
constexpr int kUpdateVectors = W == 16 ? 4 : 2;
constexpr int kUpdateColumns = kUpdateVectors * W;

// Where the sums of a tile of w begin and end: in `sums` between two blocks of depth.
struct Ends {
  bool first, last;
};

// e_t [depth, kTileRows], f_t [depth, kTileColumns], sums [kTileRows, kTileColumns]
template <class T, int M>
ESSA_INLINE void update_block(const float* e_t, const float* f_t, int64_t depth, Ends ends, float* sums,
                              typename T::Element* w, int64_t w_stride, int64_t columns) {
  typedef typename T::Element Element;
  vf acc[M][kUpdateVectors];
  for (int i = 0; i < M; ++i)
    for (int n = 0; n < kUpdateVectors; ++n)
      acc[i][n] = ends.first ? zero() : load(sums + i * kTileColumns + n * W);
  for (int64_t k = 0; k < depth; ++k) {
    vf f[kUpdateVectors];
    for (int n = 0; n < kUpdateVectors; ++n) f[n] = load(f_t + k * kTileColumns + n * W);
    for (int i = 0; i < M; ++i) {
      const vf e = set1(e_t[k * kTileRows + i]);
      for (int n = 0; n < kUpdateVectors; ++n) acc[i][n] = fma(e, f[n], acc[i][n]);
    }
  }
  for (int i = 0; i < M; ++i) {
    if (!ends.last) {
      for (int n = 0; n < kUpdateVectors; ++n) store(sums + i * kTileColumns + n * W, acc[i][n]);
      continue;
    }
    Element* row = w + i * w_stride;
    if (columns >= kUpdateColumns) {
      for (int n = 0; n < kUpdateVectors; ++n) T::put_exact(row + n * W, add(T::get(row + n * W), acc[i][n]));
      continue;
    }
    Element edge[kUpdateColumns] = {};
    __builtin_memcpy(edge, row, columns * sizeof(Element));
    for (int n = 0; n < kUpdateVectors; ++n) T::put_exact(edge + n * W, add(T::get(edge + n * W), acc[i][n]));
    __builtin_memcpy(row, edge, columns * sizeof(Element));
  }
}

// The factors that come next, at most kDepth of them, those of one pair after the other.
class Factors {
 public:
  Factors(const LowrankUpdateArgs& args, int64_t row, int64_t rows, int64_t column, int64_t columns)
      : args_(args), row_(row), rows_(rows), column_(column), columns_(columns) {
    skip_zeros();
  }

  bool done() const { return pair_ == args_.pairs; }

  int64_t next(float* e_t, float* f_t) {
    int64_t depth = 0;
    while (depth < kDepth && !done()) {
      const float weight = args_.pair_weights[pair_];
      const int64_t left = args_.rank - rank_, ranks = left < kDepth - depth ? left : kDepth - depth;
      const uint32_t site = args_.key.site, pair = (uint32_t)pair_;
      const NoiseMatrix f(args_.key, site, pair, args_.rademacher, args_.d_in);
      const NoiseMatrix e(args_.key, site + 1, pair, args_.rademacher, args_.d_out);
      for (int64_t end = rank_ + ranks; rank_ < end; ++rank_, ++depth) {
        f.draw(rank_, column_, columns_, f_t + depth * kTileColumns);
        float* scaled = e_t + depth * kTileRows;
        e.draw(rank_, row_, rows_, scaled);
        for (int64_t i = 0; i < rows_; i += W) store(scaled + i, mul(set1(weight), load(scaled + i)));
      }
      if (rank_ < args_.rank) break;
      rank_ = 0;
      ++pair_;
      skip_zeros();
    }
    return depth;
  }

 private:
  void skip_zeros() {
    while (!done() && args_.pair_weights[pair_] == 0.0f) ++pair_;
  }

  const LowrankUpdateArgs& args_;
  const int64_t row_, rows_, column_, columns_;
  int64_t pair_ = 0, rank_ = 0;
};

template <class T>
void update(const LowrankUpdateArgs& args, int64_t first, int64_t last) {
  typedef typename T::Element Element;
  float* sums = scratch(kTileRows * kTileColumns + kDepth * (kTileRows + kTileColumns));
  float* e_t = sums + kTileRows * kTileColumns;
  float* f_t = e_t + kDepth * kTileRows;
  const int64_t across = blocks(args.d_in, kTileColumns);
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t row = tile / across * kTileRows, column = tile % across * kTileColumns;
    const int64_t rows = args.d_out - row < kTileRows ? args.d_out - row : kTileRows;
    const int64_t columns = args.d_in - column < kTileColumns ? args.d_in - column : kTileColumns;
    Element* w = (Element*)args.w + row * args.d_in + column;
    Factors factors(args, row, rows, column, columns);
    Ends ends{true, false};
    do {
      const int64_t depth = factors.next(e_t, f_t);
      ends.last = factors.done();
      for (int64_t j = 0; j < columns; j += kUpdateColumns) {
        const auto block = [&](auto count, int64_t i) {
          update_block<T, decltype(count)::value>(e_t + i, f_t + j, depth, ends, sums + i * kTileColumns + j,
                                                  w + i * args.d_in + j, args.d_in, columns - j);
        };
        int64_t i = 0;
        for (; i + kUpdateRows <= rows; i += kUpdateRows) block(std::integral_constant<int, kUpdateRows>(), i);
        for (; i < rows; ++i) block(std::integral_constant<int, 1>(), i);
      }
      ends.first = false;
    } while (!ends.last);
  }
}

}  // namespace

void lowrank_shrink(const PerturbedArgs& args, int64_t first, int64_t last) {
  with_storage(args.dtype, [&](auto rows) { shrink<decltype(rows)>(args, first, last); });
}

void lowrank_expand(const PerturbedArgs& args, int64_t first, int64_t last) {
  with_storage(args.dtype, [&](auto rows) { expand<decltype(rows)>(args, first, last); });
}

void lowrank_update(const LowrankUpdateArgs& args, int64_t first, int64_t last) {
  with_storage(args.dtype, [&](auto weight) { update<decltype(weight)>(args, first, last); });
}

}  // namespace ESSA_ISA
}  // namespace cpu
}  // namespace essa
