// LoRA with factors perturbed per member: y += scaling (B + sigma eps_B) ((A + sigma eps_A) x), rows grouped by pair.
//
// A pair's noise is drawn once and makes two small matrices in the cache, the parameters plus and minus sigma times the
// noise, which the rows of the even and of the odd member are multiplied with.
#include "perturbed.h"

namespace essa {
namespace cpu {
namespace ESSA_ISA {
namespace {

constexpr int64_t kExpandBlock = 256;  // columns of two perturbed blocks of B^T that stay in the first-level cache

// out[j] = fma(sigma, eps[j], parameters[j]) for whole vectors; out may be eps.
template <class P>
ESSA_INLINE void perturb(const float* eps, const typename P::Element* parameters, int64_t columns, float sigma,
                         float* out) {
  const vf scale = set1(sigma);
  int64_t j = 0;
  for (; j + W <= columns; j += W) store(out + j, fma(scale, load(eps + j), P::get(parameters + j)));
  if (j == columns) return;
  typename P::Element tail[W] = {};
  __builtin_memcpy(tail, parameters + j, (columns - j) * sizeof(typename P::Element));
  store(out + j, fma(scale, load(eps + j), P::get(tail)));
}

template <class T, class P>
void shrink(const PerturbedArgs& args, int64_t first, int64_t last) {
  const int64_t rank_groups = blocks(args.rank, kRanksAtOnce);
  const int64_t stride = round_up(args.d_in < kColumnBlock ? args.d_in : kColumnBlock, 64);
  float* eps = scratch(2 * kRanksAtOnce * stride);
  float* perturbed = eps + kRanksAtOnce * stride;
  for (int64_t item = first; item < last; ++item) {
    const PairRows& pair = args.pairs[item / rank_groups];
    const int64_t rank = item % rank_groups * kRanksAtOnce;
    const int64_t ranks = args.rank - rank < kRanksAtOnce ? args.rank - rank : kRanksAtOnce;
    const NoiseMatrix noise(args.key, args.key.site, pair.pair, args.rademacher, args.d_in);
    float* h = args.h + rank;
    set_h(args, pair, h, ranks, [](float, int) { return 0.0f; });
    for (int64_t column = 0; column < args.d_in; column += kColumnBlock) {
      const int64_t columns = args.d_in - column < kColumnBlock ? args.d_in - column : kColumnBlock;
      const typename P::Element* a = (const typename P::Element*)args.a + rank * args.d_in + column;
      for (int64_t k = 0; k < ranks; ++k) noise.draw(rank + k, column, columns, eps + k * stride);
      for (int sign = 0; sign < 2; ++sign) {
        if (pair.rows[sign] == 0) continue;
        for (int64_t k = 0; k < ranks; ++k)
          perturb<P>(eps + k * stride, a + k * args.d_in, columns, sign ? -args.sigma : args.sigma,
                     perturbed + k * stride);
        shrink_rows<T>(args, pair.first[sign], pair.rows[sign], column, columns, perturbed, stride, ranks, h);
      }
    }
    set_h(args, pair, h, ranks, [&](float value, int) { return args.scaling * value; });
  }
}

// b_t [rank, stride]: the columns of B^T in a block, in P's dtype
template <class P>
void pack(const PerturbedArgs& args, int64_t column, int64_t columns, typename P::Element* b_t, int64_t stride) {
  const typename P::Element* b = (const typename P::Element*)args.b + column * args.b_row_stride;
  for (int64_t k = 0; k < args.rank; ++k)
    for (int64_t j = 0; j < columns; ++j) b_t[k * stride + j] = b[j * args.b_row_stride + k * args.b_col_stride];
}

template <class T, class P>
void expand(const PerturbedArgs& args, int64_t first, int64_t last) {
  const int64_t stride = round_up(args.d_out < kColumnBlock ? args.d_out : kColumnBlock, 64);
  float* eps = scratch(args.rank * (2 * stride + kExpandBlock));
  float* perturbed = eps + args.rank * stride;
  typename P::Element* b_t = (typename P::Element*)(perturbed + args.rank * kExpandBlock);
  int64_t packed = -1;
  for (int64_t item = first; item < last; ++item) {
    const PairRows& pair = args.pairs[item % args.pair_count];
    const int64_t column = item / args.pair_count * kColumnBlock;
    const int64_t columns = args.d_out - column < kColumnBlock ? args.d_out - column : kColumnBlock;
    if (packed != column) pack<P>(args, column, columns, b_t, stride);
    packed = column;
    const NoiseMatrix noise(args.key, args.key.site + 1, pair.pair, args.rademacher, args.d_out);
    for (int64_t k = 0; k < args.rank; ++k) noise.draw(k, column, columns, eps + k * stride);
    for (int64_t at = 0; at < columns; at += kExpandBlock) {
      const int64_t wide = columns - at < kExpandBlock ? columns - at : kExpandBlock;
      for (int sign = 0; sign < 2; ++sign) {
        if (pair.rows[sign] == 0) continue;
        for (int64_t k = 0; k < args.rank; ++k)
          perturb<P>(eps + k * stride + at, b_t + k * stride + at, wide, sign ? -args.sigma : args.sigma,
                     perturbed + k * kExpandBlock);
        expand_rows<T>(args, pair.first[sign], pair.rows[sign], column + at, wide, perturbed, kExpandBlock);
      }
    }
  }
}

// Calls run(Storage of x and y, Storage of the parameters): these are x's or fp32.
template <class Run>
ESSA_INLINE void with_dtypes(const PerturbedArgs& args, Run run) {
  with_storage(args.dtype, [&](auto rows) {
    if (args.parameter_dtype == kFloat32) run(rows, Storage<kFloat32>());
    else run(rows, rows);
  });
}

}  // namespace

void lora_perturbed_shrink(const PerturbedArgs& args, int64_t first, int64_t last) {
  with_dtypes(args, [&](auto rows, auto parameters) {
    shrink<decltype(rows), decltype(parameters)>(args, first, last);
  });
}

void lora_perturbed_expand(const PerturbedArgs& args, int64_t first, int64_t last) {
  with_dtypes(args, [&](auto rows, auto parameters) {
    expand<decltype(rows), decltype(parameters)>(args, first, last);
  });
}

}  // namespace ESSA_ISA
}  // namespace cpu
}  // namespace essa
