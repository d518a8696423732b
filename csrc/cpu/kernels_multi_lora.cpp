// Stored adapters of any ranks in one batch: y += scaling B (A x), each row with its own adapter's A and B.
//
// Rows come as a list grouped by adapter. A part of an adapter's rows goes through shrink and expand while its factors
// are in cache. The backward pass takes the same parts to h = scaling A x, g = scaling B^T dy and dx, and then makes the
// gradients of the factors column block by column block, each from all rows of its adapter, in fp32, rounded once. How
// the work is cut depends on the ids alone, so results are the same for every thread count.
#include "lora_tiles.h"

namespace essa {
namespace cpu {
namespace ESSA_ISA {
namespace {

// T: the dtype of rows. P: of the factors. Dot: how they are multiplied along a row.
template <class T_, class P_, class Dot_>
struct Dtypes {
  typedef T_ T;
  typedef P_ P;
  typedef Dot_ Dot;
};

// Calls run(Dtypes): the factors' dtype is the rows' or fp32.
template <class Run>
void with_dtypes(const MultiLoraArgs& args, Run run) {
  if (args.dtype == kFloat32) return run(Dtypes<Float32, Float32, Float32>());
  if (args.parameter_dtype == kFloat32) {
    if (args.dtype == kBFloat16) return run(Dtypes<BFloat16, Float32, Widened<BFloat16>>());
    return run(Dtypes<Float16, Float32, Widened<Float16>>());
  }
  if (args.dtype == kBFloat16) return run(Dtypes<BFloat16, BFloat16, BFloat16>());
  run(Dtypes<Float16, Float16, Float16>());
}

template <class Element>
Listed<Element> listed(const Rows& rows, const int64_t* order, int64_t first) {
  return {(Element*)rows.data, rows.stride, order + first};
}

// h = scaling A x for a part's rows, [rows, rank]
template <class D>
void shrink_scaled(const MultiLoraArgs& args, const AdapterPart& part, float* h, int64_t h_stride) {
  const Adapter& adapter = args.adapters[part.adapter];
  shrink<typename D::Dot>(listed<const typename D::T::Element>(args.x, args.order, part.first), part.rows,
                          (const typename D::P::Element*)adapter.a, adapter.rank, args.d_in, h, h_stride);
  for (int64_t i = 0; i < part.rows; ++i)
    for (int64_t k = 0; k < adapter.rank; ++k) h[i * h_stride + k] *= adapter.scaling;
}

template <class D>
void forward(const MultiLoraArgs& args, int64_t first, int64_t last) {
  typedef typename D::P::Element Parameter;
  const int64_t room_size = expand_room(args.most_ranks);
  float* room = scratch(room_size + kPartRows * args.most_ranks);
  float* h = room + room_size;
  for (int64_t item = first; item < last; ++item) {
    const AdapterPart& part = args.parts[item];
    const Adapter& adapter = args.adapters[part.adapter];
    shrink_scaled<D>(args, part, h, adapter.rank);
    const Factor<Parameter> b{(const Parameter*)adapter.b, args.d_out, adapter.rank, adapter.rank, 1};
    expand<typename D::T, typename D::P>(listed<typename D::T::Element>(args.y, args.order, part.first), part.rows, h,
                                         adapter.rank, b, room);
  }
}

// --- backward ------------------------------------------------------------------------------------------------------

// t[i, k] += sum over a packed panel's columns, which are rows' columns from `at` on
template <class T, int M, int K, class Rows>
ESSA_INLINE void project_tile(Rows rows, int64_t at, int64_t columns, const float* panel, int64_t ranks, float* t,
                              int64_t t_stride) {
  typedef typename T::Element Element;
  vf sums[M][K];
  for (int i = 0; i < M; ++i)
    for (int k = 0; k < K; ++k) sums[i][k] = zero();
  for (int64_t j = 0; j < columns; j += kExpandColumns, panel += ranks * kExpandColumns) {
    Element edge[M][kExpandColumns] = {};
    const Element* from[M];
    for (int i = 0; i < M; ++i) {
      from[i] = rows(i) + at + j;
      if (columns - j >= kExpandColumns) continue;
      __builtin_memcpy(edge[i], from[i], (columns - j) * sizeof(Element));
      from[i] = edge[i];
    }
    for (int n = 0; n < kExpandColumns; n += W) {
      vf values[M];
      for (int i = 0; i < M; ++i) values[i] = T::get(from[i] + n);
      for (int k = 0; k < K; ++k) {
        const vf factor = load(panel + k * kExpandColumns + n);
        for (int i = 0; i < M; ++i) sums[i][k] = muladd(values[i], factor, sums[i][k]);
      }
    }
  }
  for (int i = 0; i < M; ++i)
    for (int k = 0; k < K; ++k) t[i * t_stride + k] += sum(sums[i][k]);
}

template <class T, int M, class Rows>
void project_rows(Rows rows, int64_t at, int64_t columns, const float* panel, int64_t ranks, float* t,
                  int64_t t_stride) {
  int64_t k = 0;
  for (; k + 4 <= ranks; k += 4)
    project_tile<T, M, 4>(rows, at, columns, panel + k * kExpandColumns, ranks, t + k, t_stride);
  for (; k < ranks; ++k)
    project_tile<T, M, 1>(rows, at, columns, panel + k * kExpandColumns, ranks, t + k, t_stride);
}

// g = scaling B^T dy for a part's rows, [rows, rank]
template <class D>
void project_scaled(const MultiLoraArgs& args, const AdapterPart& part, float* g, int64_t g_stride, float* panel) {
  typedef typename D::P::Element Parameter;
  typedef typename D::T T;
  const Adapter& adapter = args.adapters[part.adapter];
  const Factor<Parameter> b{(const Parameter*)adapter.b, args.d_out, adapter.rank, adapter.rank, 1};
  const auto rows = listed<const typename T::Element>(args.d_y, args.order, part.first);
  for (int64_t i = 0; i < part.rows; ++i)
    for (int64_t k = 0; k < adapter.rank; ++k) g[i * g_stride + k] = 0.0f;
  const int64_t width = panel_columns(args.d_out, adapter.rank);
  for (int64_t at = 0; at < args.d_out; at += width) {
    const int64_t columns = args.d_out - at < width ? args.d_out - at : width;
    pack_panel<typename D::P>(b, at, columns, panel);
    int64_t i = 0;
    for (; i + 4 <= part.rows; i += 4)
      project_rows<T, 4>(rows.from(i), at, columns, panel, adapter.rank, g + i * g_stride, g_stride);
    for (; i < part.rows; ++i)
      project_rows<T, 1>(rows.from(i), at, columns, panel, adapter.rank, g + i * g_stride, g_stride);
  }
  for (int64_t i = 0; i < part.rows; ++i)
    for (int64_t k = 0; k < adapter.rank; ++k) g[i * g_stride + k] *= adapter.scaling;
}

template <class D>
void backward_rows(const MultiLoraArgs& args, int64_t first, int64_t last) {
  typedef typename D::P::Element Parameter;
  float* room = scratch(expand_room(args.most_ranks));
  for (int64_t item = first; item < last; ++item) {
    const AdapterPart& part = args.parts[item];
    const Adapter& adapter = args.adapters[part.adapter];
    if (args.h != nullptr)
      shrink_scaled<D>(args, part, args.h + part.first * args.most_ranks, args.most_ranks);
    if (args.g == nullptr) continue;
    float* g = args.g + part.first * args.most_ranks;
    project_scaled<D>(args, part, g, args.most_ranks, room);
    if (args.d_x.data == nullptr) continue;
    const Factor<Parameter> a{(const Parameter*)adapter.a, args.d_in, adapter.rank, 1, args.d_in};
    expand<typename D::T, typename D::P>(listed<typename D::T::Element>(args.d_x, args.order, part.first), part.rows,
                                         g, args.most_ranks, a, room);
  }
}

// sums [ranks, kGradientColumns]: those of t[i, k] x[i, column + ..] over rows, K ranks and V vectors
template <class T, int K, int V, class Rows>
ESSA_INLINE void outer_tile(Rows x, int64_t rows, int64_t column, const float* t, int64_t t_stride, float* sums) {
  vf tile[K][V];
  for (int k = 0; k < K; ++k)
    for (int n = 0; n < V; ++n) tile[k][n] = zero();
  for (int64_t i = 0; i < rows; ++i) {
    const typename T::Element* row = x(i) + column;
    vf values[V];
    for (int n = 0; n < V; ++n) values[n] = T::get(row + n * W);
    for (int k = 0; k < K; ++k) {
      const vf factor = set1(t[i * t_stride + k]);
      for (int n = 0; n < V; ++n) tile[k][n] = muladd(factor, values[n], tile[k][n]);
    }
  }
  for (int k = 0; k < K; ++k)
    for (int n = 0; n < V; ++n) store(sums + k * kGradientColumns + n * W, tile[k][n]);
}

template <class T, int K, class Rows>
void outer_ranks(Rows x, int64_t rows, int64_t column, int64_t columns, const float* t, int64_t t_stride,
                 float* sums) {
  constexpr int V = W == 16 ? 4 : 2;
  int64_t j = 0;
  for (; j + V * W <= columns; j += V * W) outer_tile<T, K, V>(x, rows, column + j, t, t_stride, sums + j);
  for (; j + W <= columns; j += W) outer_tile<T, K, 1>(x, rows, column + j, t, t_stride, sums + j);
  for (; j < columns; ++j)
    for (int k = 0; k < K; ++k) {
      float sum = 0.0f;
      for (int64_t i = 0; i < rows; ++i) sum += t[i * t_stride + k] * T::get1(x(i)[column + j]);
      sums[k * kGradientColumns + j] = sum;
    }
}

// out[k, j] or, transposed, out[j, k] = sum over an adapter's rows of t[i, k] x[i, j], for a block of columns j
template <class D>
void outer(const MultiLoraArgs& args, int64_t adapter, const Rows& x, const float* t, int64_t column, int64_t columns,
           void* out, int64_t rank_stride, int64_t column_stride) {
  typedef typename D::P P;
  typedef typename P::Element Parameter;
  const int64_t first = args.starts[adapter], rows = args.starts[adapter + 1] - first;
  const int64_t ranks = args.adapters[adapter].rank;
  const auto list = listed<const typename D::T::Element>(x, args.order, first);
  float* sums = scratch(ranks * kGradientColumns);
  t += first * args.most_ranks;
  int64_t k = 0;
  for (; k + 4 <= ranks; k += 4)
    outer_ranks<typename D::T, 4>(list, rows, column, columns, t + k, args.most_ranks, sums + k * kGradientColumns);
  for (; k < ranks; ++k)
    outer_ranks<typename D::T, 1>(list, rows, column, columns, t + k, args.most_ranks, sums + k * kGradientColumns);
  for (k = 0; k < ranks; ++k) {
    alignas(64) Parameter line[kGradientColumns];
    for (int64_t j = 0; j < columns; j += W) P::put(line + j, load(sums + k * kGradientColumns + j));
    for (int64_t j = 0; j < columns; ++j) ((Parameter*)out)[k * rank_stride + (column + j) * column_stride] = line[j];
  }
}

template <class D>
void backward_factors(const MultiLoraArgs& args, int64_t first, int64_t last) {
  const int64_t blocks_in = blocks(args.d_in, kGradientColumns), blocks_out = blocks(args.d_out, kGradientColumns);
  for (int64_t item = first; item < last; ++item) {
    const int64_t k = item / (blocks_in + blocks_out), block = item % (blocks_in + blocks_out);
    const Adapter& adapter = args.adapters[k];
    const bool of_a = block < blocks_in;
    const int64_t column = (of_a ? block : block - blocks_in) * kGradientColumns, all = of_a ? args.d_in : args.d_out;
    const int64_t columns = all - column < kGradientColumns ? all - column : kGradientColumns;
    if (of_a && adapter.d_a != nullptr)
      outer<D>(args, k, args.x, args.g, column, columns, adapter.d_a, args.d_in, 1);
    if (!of_a && adapter.d_b != nullptr)
      outer<D>(args, k, args.d_y, args.h, column, columns, adapter.d_b, 1, adapter.rank);
  }
}

}  // namespace

void multi_lora(const MultiLoraArgs& args, int64_t first, int64_t last) {
  with_dtypes(args, [&](auto dtypes) { forward<decltype(dtypes)>(args, first, last); });
}

void multi_lora_backward_rows(const MultiLoraArgs& args, int64_t first, int64_t last) {
  with_dtypes(args, [&](auto dtypes) { backward_rows<decltype(dtypes)>(args, first, last); });
}

void multi_lora_backward_factors(const MultiLoraArgs& args, int64_t first, int64_t last) {
  with_dtypes(args, [&](auto dtypes) { backward_factors<decltype(dtypes)>(args, first, last); });
}

}  // namespace ESSA_ISA
}  // namespace cpu
}  // namespace essa
