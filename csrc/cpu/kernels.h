// The CPU kernels' arguments and the table of their entry points, one table per instruction set.
#pragma once
#include <stdint.h>

#include "../noise/noise.h"

namespace essa {
namespace cpu {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct NoiseArgs {
  float* out;  // [rows, cols], contiguous
  int64_t rows, cols;
  noise::Key key;
  bool negate;  // the odd member of an antithetic pair
};

// svd_lora, or one of its halves: `y == nullptr` stops after h, `x == nullptr` starts from h.
struct SvdLoraArgs {
  int dtype;  // of x, v_a, u_b and y
  int64_t rows, members, d_in, d_out, r_a, r_b;
  const void* x;  // [rows, d_in], row stride x_stride
  int64_t x_stride;
  const void* v_a;           // [r_a, d_in]
  const float* core;         // [r_b, r_a]
  const float *s_a, *s_b;    // [members, r_a], [members, r_b]
  const int64_t* offsets;    // [members + 1]
  float* h;                  // [rows, r_b], row stride h_stride; nullptr in the fused form
  int64_t h_stride;
  const void* u_b;           // [d_out, r_b], either dimension contiguous
  int64_t u_b_row_stride, u_b_col_stride;
  void* y;  // [rows, d_out], row stride y_stride
  int64_t y_stride;
};

// The rows of an antithetic pair: [first, first + rows) of the even member and of the odd one.
struct PairRows {
  uint32_t pair;
  int64_t first[2], rows[2];
};

// lora_perturbed and, with `a` and `b` null, lowrank_perturbed.
struct PerturbedArgs {
  int dtype;  // of x and y
  int64_t d_in, d_out, rank;
  const void* x;  // [rows, d_in], row stride x_stride
  int64_t x_stride;
  int parameter_dtype;  // of a and b
  const void* a;        // [rank, d_in], contiguous
  const void* b;        // [d_out, rank]
  int64_t b_row_stride, b_col_stride;
  noise::Key key;  // its site is the first of two; the pair is the rows'
  bool rademacher;
  float sigma;    // on the noise; lowrank_perturbed has it in `scaling`
  float scaling;  // of the result
  const PairRows* pairs;
  int64_t pair_count;
  float* h;  // [rows, rank]
  void* y;   // [rows, d_out], row stride y_stride
  int64_t y_stride;
};

// One of the tensors of perturb_ and es_update_: a matrix of whole noise tiles, cut into chunks of kChunk elements.
struct NoisyMatrix {
  int dtype;
  void* data;  // [rows, cols], contiguous
  int64_t rows, cols;
  uint32_t site;
  int64_t chunks_end;  // the chunks of this matrix and of those before it
};

struct EsUpdateArgs {
  const NoisyMatrix* matrices;
  noise::Key key;  // the matrix has its own site; perturb_: the pair
  bool rademacher;
  float sigma;  // perturb_
  // es_update_: the pairs whose weight is not 0, ascending
  const uint32_t* pairs;
  const float* weights;
  int64_t pair_count;
};

struct LowrankUpdateArgs {
  int dtype;
  int64_t d_out, d_in, rank;
  void* w;  // [d_out, d_in], contiguous
  noise::Key key;  // its site is the first of two; the pair is an index into the weights
  bool rademacher;
  const float* pair_weights;
  int64_t pairs;
};

// linear_logprob and its gradients. Rows of hidden are [.., d]; those whose label is not ignored are `selected`.
// logit = outer * raw, or where capped outer * tanh(inner * raw); inner is 1 where not capped.
struct LinearLogprobArgs {
  int dtype;  // of hidden, weight, bias, d_hidden, d_weight and d_bias
  int64_t rows, d, vocab;   // of them selected
  const int64_t* selected;  // [rows], ascending
  const int64_t* labels;    // like the following, by row of hidden
  const void* hidden;       // row stride hidden_stride
  int64_t hidden_stride;
  const void* weight;  // [vocab, d]
  const void* bias;    // [vocab] or nullptr
  bool capped;
  float inner, outer;
  int64_t ignore_index;
  float *logprob, *logsumexp;
  void* slope;               // d logprob / d hidden, of slope_dtype(dtype), or nullptr; rows of ignored labels undefined
  const float* grad;         // d loss / d logprob
  void *d_hidden, *d_weight, *d_bias;
  float *panels, *hidden_across;  // hidden as linear_logprob_pack lays it out
};

// float16 has too little range for a gradient that is not yet scaled.
constexpr int slope_dtype(int dtype) { return dtype == kBFloat16 ? kBFloat16 : kFloat32; }

struct Rows {
  void* data;  // [.., d], adjacent elements
  int64_t stride;
};

struct Adapter {
  const void *a, *b;  // [rank, d_in], [d_out, rank], contiguous
  int64_t rank;
  float scaling;
  void *d_a, *d_b;  // like a and b, or nullptr
};

// Some of an adapter's rows: [first, first + rows) of the order.
struct AdapterPart {
  int64_t adapter, first, rows;
};

// multi_lora and its gradients.
struct MultiLoraArgs {
  int dtype;            // of x, y, d_x and d_y
  int parameter_dtype;  // of the adapters
  int64_t d_in, d_out, most_ranks;
  const Adapter* adapters;
  const int64_t* starts;  // [adapters + 1]: an adapter's rows in the order
  const int64_t* order;   // numbers of rows by adapter, ascending within one; padded with valid ones
  const AdapterPart* parts;
  Rows x, y;
  Rows d_x, d_y;  // backward: d_x may be null
  float *h, *g;   // backward: by order, [.., most_ranks], or nullptr
};

// Attention of one token a row over `length` positions.
struct DecodeAttentionArgs {
  int dtype;
  int64_t rows, heads, kv_heads, length, d, d_v;
  const void *query, *key, *value;  // [rows, heads, d], [rows, kv_heads, length, d], [.., d_v]: adjacent elements
  int64_t query_row, query_head;
  int64_t key_row, key_head, key_position;
  int64_t value_row, value_head, value_position;
  const uint8_t* mask;  // [rows, length] of row stride mask_row, or nullptr: which positions are seen
  int64_t mask_row;
  float scale;
  void* out;  // [rows, heads, d_v], contiguous
};

struct Kernels {
  const char* isa;
  // tiles [first, last) of the rows * tiles_per_row tiles
  void (*gaussian)(const NoiseArgs&, int64_t first, int64_t last);
  void (*rademacher)(const NoiseArgs&, int64_t first, int64_t last);
  // rows [first, last)
  void (*svd_lora)(const SvdLoraArgs&, int64_t first, int64_t last);
  // items [first, last), see below
  void (*lora_perturbed_shrink)(const PerturbedArgs&, int64_t first, int64_t last);
  void (*lora_perturbed_expand)(const PerturbedArgs&, int64_t first, int64_t last);
  void (*lowrank_shrink)(const PerturbedArgs&, int64_t first, int64_t last);
  void (*lowrank_expand)(const PerturbedArgs&, int64_t first, int64_t last);
  void (*lowrank_update)(const LowrankUpdateArgs&, int64_t first, int64_t last);
  // chunks [first, last) of all matrices
  void (*perturb)(const EsUpdateArgs&, int64_t first, int64_t last);
  void (*es_update)(const EsUpdateArgs&, int64_t first, int64_t last);
  // selected rows [first, last)
  void (*linear_logprob)(const LinearLogprobArgs&, int64_t first, int64_t last);
  // fills panels and hidden_across
  void (*linear_logprob_pack)(const LinearLogprobArgs&);
  // d_weight and d_bias of words [first, last) of the vocabulary
  void (*linear_logprob_head)(const LinearLogprobArgs&, int64_t first, int64_t last);
  // d_hidden of rows [first, last) of hidden
  void (*linear_logprob_hidden)(const LinearLogprobArgs&, int64_t first, int64_t last);
  // parts [first, last)
  void (*multi_lora)(const MultiLoraArgs&, int64_t first, int64_t last);
  void (*multi_lora_backward_rows)(const MultiLoraArgs&, int64_t first, int64_t last);
  // of every adapter the blocks of kGradientColumns columns of d_a, then those of d_b
  void (*multi_lora_backward_factors)(const MultiLoraArgs&, int64_t first, int64_t last);
  // of every row the key-value heads [first, last)
  void (*decode_attention)(const DecodeAttentionArgs&, int64_t first, int64_t last);
};

#define ESSA_DECLARE_KERNELS(ISA)                                                          \
  namespace ISA {                                                                          \
  void gaussian(const NoiseArgs& args, int64_t first, int64_t last);                       \
  void rademacher(const NoiseArgs& args, int64_t first, int64_t last);                     \
  void svd_lora(const SvdLoraArgs& args, int64_t first, int64_t last);                     \
  void lora_perturbed_shrink(const PerturbedArgs& args, int64_t first, int64_t last);      \
  void lora_perturbed_expand(const PerturbedArgs& args, int64_t first, int64_t last);      \
  void lowrank_shrink(const PerturbedArgs& args, int64_t first, int64_t last);             \
  void lowrank_expand(const PerturbedArgs& args, int64_t first, int64_t last);             \
  void lowrank_update(const LowrankUpdateArgs& args, int64_t first, int64_t last);         \
  void perturb(const EsUpdateArgs& args, int64_t first, int64_t last);                     \
  void es_update(const EsUpdateArgs& args, int64_t first, int64_t last);                   \
  void linear_logprob(const LinearLogprobArgs& args, int64_t first, int64_t last);         \
  void linear_logprob_pack(const LinearLogprobArgs& args);                                 \
  void linear_logprob_head(const LinearLogprobArgs& args, int64_t first, int64_t last);    \
  void linear_logprob_hidden(const LinearLogprobArgs& args, int64_t first, int64_t last);  \
  void multi_lora(const MultiLoraArgs& args, int64_t first, int64_t last);                 \
  void multi_lora_backward_rows(const MultiLoraArgs& args, int64_t first, int64_t last);   \
  void multi_lora_backward_factors(const MultiLoraArgs& args, int64_t first, int64_t last);\
  void decode_attention(const DecodeAttentionArgs& args, int64_t first, int64_t last);     \
  }
ESSA_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
ESSA_DECLARE_KERNELS(avx2)
ESSA_DECLARE_KERNELS(avx512)
ESSA_DECLARE_KERNELS(avx512bf16)
#endif

// How the work of PerturbedArgs and LowrankUpdateArgs is cut: the same for every thread count, so that results are.
constexpr int64_t kRanksAtOnce = 4;         // an item of a shrink: one pair's rows, so many ranks
constexpr int64_t kColumnBlock = 2048;      // an item of an expand: one pair's rows, so many columns of y
constexpr int64_t kTileRows = 256, kTileColumns = 512;  // an item of an update: so many rows and columns of w
constexpr int64_t kChunk = 4096;  // an item of perturb_ and es_update_: its noise stays in the L1 cache

// multi_lora's
constexpr int64_t kPartRows = 256;        // an item of the passes over rows
constexpr int64_t kGradientColumns = 256;  // an item of the factors' gradients

constexpr int64_t blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }
constexpr int64_t round_up(int64_t n, int64_t to) { return blocks(n, to) * to; }

// A 64-byte aligned buffer of this thread, valid until its next call; grows, never shrinks. A few hundred kilobytes at
// the ranks of LoRA; svd_lora keeps its core there.
float* scratch(int64_t floats);

}  // namespace cpu
}  // namespace essa
