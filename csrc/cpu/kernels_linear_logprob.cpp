// Log-probabilities of labels from hidden states and LM head, and their gradients; logits exist one tile at a time.
//
// Everything is computed transposed: a vocabulary block is the rows of a tile, a panel of hidden rows its columns. So the
// softmax statistics of a hidden row live in one lane, the head's rows are broadcast straight from where they lie, and
// probabilities come out in the layout the next product reads. The forward pass, where a gradient will be asked for,
// also accumulates sum_v p_v W_v under the running maximum, which spares the backward pass a second look at the logits.
// The gradient of the head is made block by block of the vocabulary, and each block is written once.
//
// A row's arithmetic does not depend on which panel or thread it falls into: the same results for every thread count.
#include <float.h>
#include <math.h>
#include <string.h>

#include "kernels.h"
#include "math_simd.h"
#include "scratch.h"

namespace essa {
namespace cpu {
namespace ESSA_ISA {
namespace {

constexpr int kTileRows = W == 16 ? 12 : 6;
constexpr int kVectors = 2;
constexpr int kPanel = kVectors * W;     // columns of a tile
constexpr int64_t kVocabBlock = 252;     // of the forward pass: a multiple of kTileRows, and even
constexpr int64_t kChunk = 256;          // hidden rows that share a packed vocabulary block
constexpr int64_t kGradientBlock = 48;   // of the vocabulary, in the backward pass

// What matrix products read: words of kPair elements that are adjacent along the inner dimension.
template <int dtype>
struct Words : Storage<dtype> {
  typedef typename Storage<dtype>::Element Element;
  typedef float Word;
  static constexpr int kPair = 1;
  static constexpr int kSlope = slope_dtype(dtype);
  static constexpr bool kInPlace = dtype == kFloat32;  // elements in memory are words already
  ESSA_INLINE vf multiply_add(const Word* a, const Word* b, vf sum) { return muladd(set1(*a), load(b), sum); }
  ESSA_INLINE void put_across(Word* p, const vf* values) { store(p, values[0]); }
  ESSA_INLINE void put_along(Word* row, int64_t column, vf values) { store(row + column, values); }
  static void along(const Element* row, int64_t d, Word* out) { widen<Storage<dtype>>(row, d, out); }
  // one word per column, of kPair rows
  static void across(const Element* row, const Element*, int64_t d, Word* out) { along(row, d, out); }
};

#if defined(__AVX512BF16__)
template <>
struct Words<kBFloat16> : Storage<kBFloat16> {
  typedef uint32_t Word __attribute__((may_alias, aligned(2)));
  static constexpr int kPair = 2;
  static constexpr int kSlope = slope_dtype(kBFloat16);
  static constexpr bool kInPlace = true;
  ESSA_INLINE vf multiply_add(const Word* a, const Word* b, vf sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32((int)*a), (__m512bh)_mm512_loadu_si512(b));
  }
  ESSA_INLINE void put_across(Word* p, const vf* values) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values[0]));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values[1]));
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  ESSA_INLINE void put_along(Word* row, int64_t column, vf values) {
    _mm256_storeu_si256((__m256i*)((Element*)row + column), (__m256i)_mm512_cvtneps_pbh(values));
  }
  static void along(const Element* row, int64_t d, Word* out) {
    if (d % 2) out[d / 2] = 0;
    memcpy(out, row, d * sizeof(Element));
  }
  static void across(const Element* row, const Element* next, int64_t d, Word* out) {
    if (next == nullptr)
      for (int64_t c = 0; c < d; ++c) out[c] = row[c];
    else
      for (int64_t c = 0; c < d; ++c) out[c] = row[c] | (uint32_t)next[c] << 16;
  }
};
#endif

// c[i, :] = sum_s a[i, s] b[s, :] for M rows and kPanel columns of float32; `accumulate` adds to what c holds.
// a: words at a + i * a_row + s * a_step bytes. b: [steps, kPanel] words. c: [M, kPanel].
template <class T, int M>
ESSA_INLINE void tile(const char* a, int64_t a_row, int64_t a_step, const typename T::Word* b, int64_t steps, float* c,
                      bool accumulate) {
  typedef typename T::Word Word;
  vf sums[M][kVectors];
  for (int i = 0; i < M; ++i)
    for (int n = 0; n < kVectors; ++n) sums[i][n] = accumulate ? load(c + i * kPanel + n * W) : zero();
  for (int64_t s = 0; s < steps; ++s, a += a_step, b += kPanel)
    for (int i = 0; i < M; ++i)
      for (int n = 0; n < kVectors; ++n)
        sums[i][n] = T::multiply_add((const Word*)(a + i * a_row), b + n * W, sums[i][n]);
  for (int i = 0; i < M; ++i)
    for (int n = 0; n < kVectors; ++n) store(c + i * kPanel + n * W, sums[i][n]);
}

// c [rows, kPanel], from rows of a whose words are adjacent.
template <class T>
void multiply(const void* a, int64_t a_row, int64_t rows, const typename T::Word* b, int64_t steps, float* c) {
  const char* at = (const char*)a;
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows)
    tile<T, kTileRows>(at + i * a_row, a_row, 4, b, steps, c + i * kPanel, false);
  for (; i + 3 <= rows; i += 3) tile<T, 3>(at + i * a_row, a_row, 4, b, steps, c + i * kPanel, false);
  for (; i < rows; ++i) tile<T, 1>(at + i * a_row, a_row, 4, b, steps, c + i * kPanel, false);
}

// Rows 0 .. rows - 1 of d elements as words across them: out [segments of d][steps over rows][SEGMENT], zeros around.
template <class T, int SEGMENT, class Row>
void pack_across(Row row, int64_t rows, int64_t d, typename T::Word* line, typename T::Word* out) {
  const int64_t steps = blocks(rows, T::kPair), segments = blocks(d, SEGMENT);
  memset(line + d, 0, (segments * SEGMENT - d) * 4);
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t i = s * T::kPair;
    T::across(row(i), i + 1 < rows ? row(i + 1) : nullptr, d, line);
    for (int64_t g = 0; g < segments; ++g) memcpy(out + (g * steps + s) * SEGMENT, line + g * SEGMENT, SEGMENT * 4);
  }
}

// Rows 0 .. rows - 1 of d elements as one panel, words along them: out [steps over d][kPanel], zeros beyond the rows.
template <class T, class Row>
void pack_panel(Row row, int64_t rows, int64_t d, typename T::Word* line, typename T::Word* out) {
  const int64_t steps = blocks(d, T::kPair);
  memset(out, 0, steps * kPanel * 4);
  for (int64_t i = 0; i < rows; ++i) {
    T::along(row(i), d, line);
    for (int64_t s = 0; s < steps; ++s) out[s * kPanel + i] = line[s];
  }
}

template <class T>
struct Problem {
  typedef typename T::Element Element;
  typedef typename T::Word Word;
  const LinearLogprobArgs& args;
  const int64_t d, steps;

  explicit Problem(const LinearLogprobArgs& a) : args(a), d(a.d), steps(blocks(a.d, T::kPair)) {}
  const Element* hidden(int64_t i) const { return (const Element*)args.hidden + args.selected[i] * args.hidden_stride; }
  const Element* weight(int64_t v) const { return (const Element*)args.weight + v * d; }
  int64_t label(int64_t i) const { return args.labels[args.selected[i]]; }
  bool copies_weight() const { return !T::kInPlace || d % T::kPair != 0; }
  int64_t line_words() const { return round_up(d, kPanel) + kTileRows; }

  vf logit(vf raw) const {
    return args.capped ? mul(set1(args.outer), tanh(mul(set1(args.inner), raw))) : mul(set1(args.outer), raw);
  }
  // d logit / d raw, in units of outer * inner
  vf cap_slope(vf logit) const {
    const vf t = max(set1(-1.0f), mul(logit, set1(1.0f / args.outer)));
    return sub(set1(1.0f), mul(t, t));
  }
  float cap_slope(float logit) const {
    const float t = logit * (1.0f / args.outer);
    return args.capped ? 1.0f - t * t : 1.0f;
  }

  // Logits of `rows` words of the vocabulary from `first` on against one panel, [rows, kPanel].
  // copy: [rows, steps] words, where the weight cannot be read in place. bias: [rows], float32.
  void logits(int64_t first, int64_t rows, const Word* copy, const Word* panel, const float* bias, float* out) const {
    if (copies_weight()) multiply<T>(copy, steps * 4, rows, panel, steps, out);
    else multiply<T>(weight(first), d * sizeof(Element), rows, panel, steps, out);
    for (int64_t v = 0; v < rows; ++v)
      for (int n = 0; n < kPanel; n += W) {
        vf raw = load(out + v * kPanel + n);
        if (bias != nullptr) raw = add(raw, set1(bias[v]));
        store(out + v * kPanel + n, logit(raw));
      }
  }

  void load_block(int64_t first, int64_t rows, Word* copy, float* bias) const {
    if (copies_weight())
      for (int64_t v = 0; v < rows; ++v) T::along(weight(first + v), d, copy + v * steps);
    if (bias != nullptr) widen<T>((const Element*)args.bias + first, rows, bias);
  }
};

// --- forward -------------------------------------------------------------------------------------------------------

template <class T>
struct Forward : Problem<T> {
  typedef typename T::Element Element;
  typedef typename T::Word Word;
  using Problem<T>::args;
  using Problem<T>::d;
  using Problem<T>::steps;
  const bool slopes;
  const int64_t most_panels;
  Word *panels, *packed, *copy, *probabilities, *line;
  float *bias, *sums, *tile_logits, *highest, *total, *label_logit;

  Forward(const LinearLogprobArgs& a, int64_t rows)
      : Problem<T>(a), slopes(a.slope != nullptr), most_panels(blocks(least(rows, kChunk), kPanel)) {
    Pieces pieces{nullptr};
    place(pieces);
    Pieces real{scratch(pieces.used)};
    place(real);
  }

  void place(Pieces& pieces) {
    const int64_t block = least(args.vocab, kVocabBlock), lines = most_panels * kPanel;
    panels = pieces.take<Word>(most_panels * steps * kPanel);
    line = pieces.take<Word>(this->line_words());
    copy = pieces.take<Word>(this->copies_weight() ? block * steps : 0);
    bias = pieces.take<float>(args.bias == nullptr ? 0 : block);
    tile_logits = pieces.take<float>((block + 1) * kPanel);
    highest = pieces.take<float>(lines);
    total = pieces.take<float>(lines);
    label_logit = pieces.take<float>(lines);
    sums = pieces.take<float>(slopes ? most_panels * round_up(d, kTileRows) * kPanel : 0);
    packed = pieces.take<Word>(slopes ? round_up(d, kTileRows) * blocks(block, T::kPair) : 0);
    probabilities = pieces.take<Word>(slopes && T::kPair > 1 ? blocks(block, T::kPair) * kPanel : 0);
    if (T::kPair == 1) probabilities = (Word*)tile_logits;
    if (args.bias == nullptr) bias = nullptr;
  }

  float* panel_sums(int64_t panel) const { return sums + panel * round_up(d, kTileRows) * kPanel; }

  // Selected rows first .. first + rows - 1, at most kChunk.
  void run(int64_t first, int64_t rows) {
    const int64_t panel_count = blocks(rows, kPanel);
    for (int64_t panel = 0; panel < panel_count; ++panel) {
      const int64_t begin = first + panel * kPanel;
      pack_panel<T>([&](int64_t i) { return this->hidden(begin + i); }, least(kPanel, first + rows - begin), d, line,
                    panels + panel * steps * kPanel);
    }
    for (int64_t i = 0; i < panel_count * kPanel; ++i) highest[i] = -FLT_MAX, total[i] = 0.0f;
    if (slopes) memset(sums, 0, panel_count * round_up(d, kTileRows) * kPanel * sizeof(float));

    for (int64_t v = 0; v < args.vocab; v += kVocabBlock) {
      const int64_t block = least(kVocabBlock, args.vocab - v);
      this->load_block(v, block, copy, bias);
      if (slopes)
        pack_across<T, kTileRows>([&](int64_t i) { return this->weight(v + i); }, block, d, line, packed);
      for (int64_t panel = 0; panel < panel_count; ++panel) {
        this->logits(v, block, copy, panels + panel * steps * kPanel, bias, tile_logits);
        take_labels(v, block, first, least(kPanel, rows - panel * kPanel), panel * kPanel);
        exponentials(block, panel);
        if (slopes) accumulate(block, panel);
      }
    }
    for (int64_t i = 0; i < rows; ++i) finish(first + i, i);
  }

  // The labels' own logits leave the tile: what remains of a confident row is then summed without cancellation.
  void take_labels(int64_t v, int64_t block, int64_t first, int64_t rows, int64_t at) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t label = this->label(first + at + i) - v;
      if (label < 0 || label >= block) continue;
      label_logit[at + i] = tile_logits[label * kPanel + i];
      tile_logits[label * kPanel + i] = -FLT_MAX;
    }
  }

  // The tile's logits become e^(logit - highest); what was summed under a lower maximum shrinks.
  void exponentials(int64_t block, int64_t panel) {
    const int64_t even = round_up(block, T::kPair);
    for (int64_t i = block * kPanel; i < even * kPanel; ++i) tile_logits[i] = -FLT_MAX;
    for (int n = 0; n < kVectors; ++n) {
      float* column = tile_logits + n * W;
      float* state = highest + panel * kPanel + n * W;
      const vf before = load(state);
      vf now = before;
      for (int64_t v = 0; v < block; ++v) now = max(now, load(column + v * kPanel));
      store(state, now);
      const vf shrink = exp(sub(before, now));
      vf sum = mul(load(total + panel * kPanel + n * W), shrink);
      for (int64_t v = 0; v < even; v += T::kPair) {
        vf values[T::kPair];
        for (int i = 0; i < T::kPair; ++i) {
          const vf logit = load(column + (v + i) * kPanel);
          values[i] = exp(sub(logit, now));
          sum = add(sum, values[i]);
          if (slopes && args.capped) values[i] = mul(values[i], this->cap_slope(logit));
        }
        if (slopes) T::put_across(probabilities + v / T::kPair * kPanel + n * W, values);
      }
      store(total + panel * kPanel + n * W, sum);
      if (slopes) shrink_sums(before, now, shrink, panel_sums(panel) + n * W);
    }
  }

  void shrink_sums(vf before, vf now, vf shrink, float* column) {
    if (sum(select_less(before, now, set1(1.0f), zero())) == 0.0f) return;
    for (int64_t c = 0; c < d; ++c) store(column + c * kPanel, mul(load(column + c * kPanel), shrink));
  }

  void accumulate(int64_t block, int64_t panel) {
    const int64_t inner = blocks(block, T::kPair);
    for (int64_t c = 0; c < d; c += kTileRows)
      tile<T, kTileRows>((const char*)(packed + c * inner), 4, 4 * kTileRows, probabilities, inner,
                         panel_sums(panel) + c * kPanel, true);
  }

  void finish(int64_t row, int64_t i) {
    const int64_t at = args.selected[row], label = this->label(row);
    const float own = label_logit[i], top = own > highest[i] ? own : highest[i];
    const float shrink = expf(highest[i] - top), others = total[i] * shrink, mine = expf(own - top);
    const float all = others + mine;
    args.logprob[at] = others < mine ? -log1pf(others / mine) : own - top - logf(all);
    args.logsumexp[at] = top + logf(all);
    if (!slopes) return;

    const float unit = args.outer * args.inner;
    const float keep = unit * this->cap_slope(own) * (others / all), share = -unit * shrink / all;
    const float* column = panel_sums(i / kPanel) + i % kPanel;
    float* row_slope = (float*)line;
    widen<T>(this->weight(label), d, row_slope);
    for (int64_t c = 0; c < d; ++c) row_slope[c] = keep * row_slope[c] + share * column[c * kPanel];
    typedef Storage<T::kSlope> Slope;
    narrow<Slope>(row_slope, d, (typename Slope::Element*)args.slope + at * d);
  }
};

template <class T>
void run_forward(const LinearLogprobArgs& args, int64_t first, int64_t last) {
  Forward<T> forward(args, last - first);
  for (int64_t row = first; row < last; row += kChunk) forward.run(row, least(kChunk, last - row));
}

// --- backward ------------------------------------------------------------------------------------------------------

template <class T>
void run_pack_hidden(const LinearLogprobArgs& args) {
  typedef typename T::Word Word;
  const Problem<T> p(args);
  Word* line = (Word*)scratch(p.line_words());
  for (int64_t i = 0; i < args.rows; i += kPanel)
    pack_panel<T>([&](int64_t k) { return p.hidden(i + k); }, least(kPanel, args.rows - i), p.d, line,
                  (Word*)args.panels + i * p.steps);
  if (args.d_weight != nullptr)
    pack_across<T, kPanel>([&](int64_t k) { return p.hidden(k); }, args.rows, p.d, line, (Word*)args.hidden_across);
}

// The gradients of words of the vocabulary, from every hidden row: the logits are computed again.
template <class T>
struct Backward : Problem<T> {
  typedef typename T::Element Element;
  typedef typename T::Word Word;
  using Problem<T>::args;
  using Problem<T>::d;
  using Problem<T>::steps;
  const int64_t columns;  // hidden rows, padded to panels
  Word *copy, *gradient;
  float *bias, *bias_sums, *result, *factor, *logsumexp;

  explicit Backward(const LinearLogprobArgs& a) : Problem<T>(a), columns(round_up(a.rows, kPanel)) {
    Pieces pieces{nullptr};
    place(pieces);
    Pieces real{scratch(pieces.used)};
    place(real);
    const float unit = args.outer * args.inner;
    for (int64_t i = 0; i < columns; ++i) {
      factor[i] = i < args.rows ? unit * args.grad[args.selected[i]] : 0.0f;
      logsumexp[i] = i < args.rows ? args.logsumexp[args.selected[i]] : 0.0f;
    }
  }

  void place(Pieces& pieces) {
    copy = pieces.take<Word>(this->copies_weight() ? kGradientBlock * steps : 0);
    bias = pieces.take<float>(kGradientBlock);
    bias_sums = pieces.take<float>(kGradientBlock);
    result = pieces.take<float>(kGradientBlock * kPanel);
    factor = pieces.take<float>(columns);
    logsumexp = pieces.take<float>(columns);
    gradient = pieces.take<Word>(kGradientBlock * columns / T::kPair);
    if (args.bias == nullptr) bias = nullptr;
  }

  // Words first .. first + block - 1 of the vocabulary, at most kGradientBlock.
  void run(int64_t first, int64_t block) {
    this->load_block(first, block, copy, bias);
    memset(bias_sums, 0, kGradientBlock * sizeof(float));
    for (int64_t column = 0; column < columns; column += kPanel) {
      this->logits(first, block, copy, (const Word*)args.panels + column * steps, bias, result);
      differentiate(first, block, column);
    }
    if (args.d_weight != nullptr) multiply_hidden(first, block);
    if (args.d_bias != nullptr) narrow<T>(bias_sums, block, (Element*)args.d_bias + first);
  }

  // The tile's logits become the gradient of the raw logits, factor * cap_slope * ([own label] - probability).
  void differentiate(int64_t first, int64_t block, int64_t column) {
    float own[kPanel];
    const int64_t rows = least(kPanel, args.rows - column);
    const auto element = [&](int64_t i) {
      const int64_t label = this->label(column + i) - first;
      return label < 0 || label >= block ? nullptr : result + label * kPanel + i;
    };
    for (int64_t i = 0; i < rows; ++i)
      if (const float* at = element(i)) own[i] = *at;
    for (int64_t v = 0; v < block; ++v)
      for (int n = 0; n < kPanel; n += W) {
        float* at = result + v * kPanel + n;
        const vf logit = load(at);
        vf g = mul(load(factor + column + n), exp(sub(logit, load(logsumexp + column + n))));
        if (args.capped) g = mul(g, this->cap_slope(logit));
        store(at, sub(zero(), g));
      }
    for (int64_t i = 0; i < rows; ++i)
      if (float* at = element(i))
        *at = factor[column + i] * this->cap_slope(own[i]) * -expm1f(args.logprob[args.selected[column + i]]);
    for (int64_t v = 0; v < block; ++v) {
      vf both = zero();
      for (int n = 0; n < kPanel; n += W) {
        const vf g = load(result + v * kPanel + n);
        both = add(both, g);
        T::put_along(gradient + v * (columns / T::kPair), column + n, g);
      }
      bias_sums[v] += sum(both);
    }
  }

  void multiply_hidden(int64_t first, int64_t block) {
    const int64_t inner = blocks(args.rows, T::kPair);
    for (int64_t c = 0; c < d; c += kPanel) {
      multiply<T>(gradient, columns / T::kPair * 4, block, (const Word*)args.hidden_across + c * inner, inner, result);
      for (int64_t v = 0; v < block; ++v)
        narrow<T>(result + v * kPanel, least(kPanel, d - c), (Element*)args.d_weight + (first + v) * d + c);
    }
  }
};

template <class T>
void run_backward(const LinearLogprobArgs& args, int64_t first, int64_t last) {
  Backward<T> backward(args);
  for (int64_t v = first; v < last; v += kGradientBlock) backward.run(v, least(kGradientBlock, last - v));
}

template <class T>
void run_scale(const LinearLogprobArgs& args, int64_t first, int64_t last) {
  typedef Storage<T::kSlope> Slope;
  float* line = scratch(args.d);
  for (int64_t row = first; row < last; ++row) {
    typename T::Element* out = (typename T::Element*)args.d_hidden + row * args.d;
    if (args.labels[row] == args.ignore_index) {
      memset(out, 0, args.d * sizeof(*out));
      continue;
    }
    widen<Slope>((const typename Slope::Element*)args.slope + row * args.d, args.d, line);
    for (int64_t c = 0; c < args.d; ++c) line[c] *= args.grad[row];
    narrow<T>(line, args.d, out);
  }
}

// Calls body(Words<dtype>()).
template <class Body>
void with_words(int dtype, Body body) {
  if (dtype == kFloat32) body(Words<kFloat32>());
  else if (dtype == kBFloat16) body(Words<kBFloat16>());
  else body(Words<kFloat16>());
}

}  // namespace

void linear_logprob(const LinearLogprobArgs& args, int64_t first, int64_t last) {
  with_words(args.dtype, [&](auto words) { run_forward<decltype(words)>(args, first, last); });
}

void linear_logprob_pack(const LinearLogprobArgs& args) {
  with_words(args.dtype, [&](auto words) { run_pack_hidden<decltype(words)>(args); });
}

void linear_logprob_head(const LinearLogprobArgs& args, int64_t first, int64_t last) {
  with_words(args.dtype, [&](auto words) { run_backward<decltype(words)>(args, first, last); });
}

void linear_logprob_hidden(const LinearLogprobArgs& args, int64_t first, int64_t last) {
  with_words(args.dtype, [&](auto words) { run_scale<decltype(words)>(args, first, last); });
}

}  // namespace ESSA_ISA
}  // namespace cpu
}  // namespace essa
