// perturb_ and es_update_: noise, or the weighted sum of the noise of many pairs, made for one chunk of a tensor at a
// time. The chunk's sums stay in the L1 cache while the pairs go by, so the tensor is read and written once.
#include "kernels.h"
#include "noise_tiles.h"
#include "storage.h"

namespace essa {
namespace cpu {
namespace ESSA_ISA {
namespace {

constexpr int kMostTiles = kChunk / noise::kGaussianTile;

// Some consecutive tiles of a matrix.
struct Chunk {
  const NoisyMatrix* matrix;
  int tile_size, tiles;
  int64_t row, column;  // where the first one begins
  uint32_t block;
  int columns[kMostTiles];  // that each one has in the matrix
};

template <class T>
void add_chunk(const Chunk& chunk, vf scale, const float* values) {
  typedef typename T::Element Element;
  const int64_t cols = chunk.matrix->cols;
  Element* at = (Element*)chunk.matrix->data + chunk.row * cols + chunk.column;
  for (int tile = 0; tile < chunk.tiles; ++tile, values += chunk.tile_size) {
    const int n = chunk.columns[tile];
    int i = 0;
    for (; i + W <= n; i += W) T::put_exact(at + i, fma(scale, load(values + i), T::get(at + i)));
    if (i < n) {
      Element edge[W] = {};
      __builtin_memcpy(edge, at + i, (n - i) * sizeof(Element));
      T::put_exact(edge, fma(scale, load(values + i), T::get(edge)));
      __builtin_memcpy(at + i, edge, (n - i) * sizeof(Element));
    }
    at += n;
  }
}

// Adds scale times what make(chunk, values) leaves in `values` to the chunks [first, last).
template <class Make>
ESSA_INLINE void for_each_chunk(const EsUpdateArgs& args, int64_t first, int64_t last, float scale, Make make) {
  float* values = scratch(kChunk);
  Chunk chunk;
  chunk.tile_size = args.rademacher ? noise::kRademacherTile : noise::kGaussianTile;
  const int64_t most = kChunk / chunk.tile_size;
  chunk.matrix = args.matrices;
  for (; first < last; ++first) {
    while (first >= chunk.matrix->chunks_end) ++chunk.matrix;
    const NoisyMatrix& matrix = *chunk.matrix;
    const int64_t per_row = noise::tiles_per_row(matrix.cols, chunk.tile_size), tiles = matrix.rows * per_row;
    const int64_t tile = (first - matrix.chunks_end + blocks(tiles, most)) * most;
    chunk.tiles = (int)(tiles - tile < most ? tiles - tile : most);
    chunk.block = (uint32_t)(tile * noise::kTileBlocks);
    chunk.row = tile / per_row, chunk.column = tile % per_row * chunk.tile_size;
    for (int64_t i = 0, column = chunk.column; i < chunk.tiles; ++i) {
      const int64_t left = matrix.cols - column;
      chunk.columns[i] = (int)(left < chunk.tile_size ? left : chunk.tile_size);
      column = left <= chunk.tile_size ? 0 : column + chunk.tile_size;
    }
    make(chunk, values);
    with_storage(matrix.dtype, [&](auto t) { add_chunk<decltype(t)>(chunk, set1(scale), values); });
  }
}

int bits_of(int columns) { return (columns + 63) / 64; }

// --- es_update_: the sums of a chunk ---------------------------------------------------------------------------------

constexpr int kPairsAtOnce = W == 16 ? 4 : 2;  // as many as have room for their words in registers

// totals[i] += +-weight for the bits of a tile, one pair after the other: to add is to fma with a sign.
template <int P>
ESSA_INLINE void add_signs(const Philox* philox, const float* weights, uint32_t block, int bits, float* totals) {
  const vi sign = seti(0x80000000u);
  for (int lane = 0; lane < noise::kTileBlocks; lane += W) {
    vi words[P][4], weight[P];
    for (int p = 0; p < P; ++p) {
      const WordVectors x = Philox::words(philox[p], block + lane);
      for (int word = 0; word < 4; ++word) words[p][word] = x.w[word];
      weight[p] = as_int(set1(weights[p]));
    }
    float* at = totals + lane;
    for (int bit = 0; bit < bits; ++bit, at += 64) {
#pragma GCC unroll 4
      for (int word = 0; word < 4; ++word) {
        vf total = load(at + word * 16);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          vi& w = words[p][word];
          total = add(total, as_float(xori(andi(w, sign), weight[p])));
          w = addi(w, w);
        }
        store(at + word * 16, total);
      }
    }
  }
}

template <int P>
void add_pairs_of_signs(const EsUpdateArgs& args, const Chunk& chunk, int64_t pair, Philox* philox, float* totals) {
  noise::Key key = args.key;
  key.site = chunk.matrix->site;
  for (int p = 0; p < P; ++p) {
    key.pair = args.pairs[pair + p];
    philox[p].start(key, noise::kRademacher);
  }
  for (int tile = 0; tile < chunk.tiles; ++tile)
    add_signs<P>(philox, args.weights + pair, chunk.block + tile * noise::kTileBlocks, bits_of(chunk.columns[tile]),
                 totals + tile * noise::kRademacherTile);
}

}  // namespace

void perturb(const EsUpdateArgs& args, int64_t first, int64_t last) {
  noise::Key key = args.key;
  const uint32_t tag = args.rademacher ? noise::kRademacher : noise::kGaussian;
  Philox philox(key, tag);
  for_each_chunk(args, first, last, args.sigma, [&](const Chunk& chunk, float* values) {
    key.site = chunk.matrix->site;
    philox.start(key, tag);
    if (!args.rademacher) {
      gaussian_tiles(philox, chunk.block, chunk.tiles, seti(0), values);
      return;
    }
    for (int tile = 0; tile < chunk.tiles; ++tile)
      rademacher_bits(philox, chunk.block + tile * noise::kTileBlocks, 0, bits_of(chunk.columns[tile]),
                      seti(0x3f800000u), values + tile * noise::kRademacherTile);
  });
}

void es_update(const EsUpdateArgs& args, int64_t first, int64_t last) {
  noise::Key key = args.key;
  if (args.rademacher) {
    Philox philox[] = {Philox(key, noise::kRademacher), Philox(key, noise::kRademacher),
                       Philox(key, noise::kRademacher), Philox(key, noise::kRademacher)};
    for_each_chunk(args, first, last, 1.0f, [&](const Chunk& chunk, float* totals) {
      __builtin_memset(totals, 0, kChunk * sizeof(float));
      int64_t pair = 0;
      for (; pair + kPairsAtOnce <= args.pair_count; pair += kPairsAtOnce)
        add_pairs_of_signs<kPairsAtOnce>(args, chunk, pair, philox, totals);
      for (; pair < args.pair_count; ++pair) add_pairs_of_signs<1>(args, chunk, pair, philox, totals);
    });
    return;
  }
  Philox philox(key, noise::kGaussian);
  for_each_chunk(args, first, last, 1.0f, [&](const Chunk& chunk, float* totals) {
    __builtin_memset(totals, 0, kChunk * sizeof(float));
    key.site = chunk.matrix->site;
    for (int64_t pair = 0; pair < args.pair_count; ++pair) {
      key.pair = args.pairs[pair];
      philox.start(key, noise::kGaussian);
      const vf weight = set1(args.weights[pair]);
      each_normals(philox, chunk.block, chunk.tiles, seti(0), totals,
                   [&](float* total, vf z) { store(total, fma(weight, z, load(total))); });
    }
  });
}

}  // namespace ESSA_ISA
}  // namespace cpu
}  // namespace essa
