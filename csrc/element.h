// What a thread computes: for CUDA, and for the host, so that tests need no GPU. No torch, no launches.
//
// Every path is W_eff = W0 * (1 + scale) + first + second, elementwise over (N, K), with factors of a few forms. In the
// matmul product, A as a vector is a scale per column, and A as a low rank is `first`: (W0 Ad) Au.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define GLORA_HD __host__ __device__ __forceinline__
#define GLORA_UNROLL _Pragma("unroll")
#else
#define GLORA_HD inline
#define GLORA_UNROLL
#endif

namespace glora {

enum class Form : int { none, constant, row, column, low_rank };

// An (N, K) matrix; C is the compute type. The strides are in elements. Element (n, k) is `down[0]` for a constant;
// `down[n * down_row]` for a row vector; `down[k * down_row]` for a column vector; for a low rank
// `sum_r down[n * down_row + r * down_rank] * up[r * up_rank + k * up_column]`.
template <typename C>
struct Factor {
  Form form = Form::none;
  int rank = 0;
  const C* down = nullptr;
  int64_t down_row = 0, down_rank = 0;
  const C* up = nullptr;
  int64_t up_rank = 0, up_column = 0;
};

// Adds to a tile the part of `factor` whose upper left corner is (n, k). Tile rows from `rows` on are not changed.
template <typename C, int ROWS, int COLUMNS>
GLORA_HD void add_factor(const Factor<C>& factor, int64_t n, int64_t k, int rows, C (&tile)[ROWS][COLUMNS]) {
  if (factor.form == Form::none) return;
  if (factor.form == Form::low_rank) {
    for (int r = 0; r < factor.rank; ++r) {
      C up[COLUMNS];
      const C* from = factor.up + r * factor.up_rank + k * factor.up_column;
  GLORA_UNROLL
      for (int j = 0; j < COLUMNS; ++j) up[j] = from[j * factor.up_column];
  GLORA_UNROLL
      for (int i = 0; i < ROWS; ++i) {
        if (i >= rows) break;
        const C down = factor.down[(n + i) * factor.down_row + r * factor.down_rank];
  GLORA_UNROLL
        for (int j = 0; j < COLUMNS; ++j) tile[i][j] += down * up[j];
      }
    }
    return;
  }
  GLORA_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    if (i >= rows) break;
  GLORA_UNROLL
    for (int j = 0; j < COLUMNS; ++j) {
      const int64_t place = factor.form == Form::row ? n + i : factor.form == Form::column ? k + j : 0;
      tile[i][j] += factor.down[place * factor.down_row];
    }
  }
}

// A tile of W_eff: formed in C, rounded once.
template <typename T, typename C, int ROWS, int COLUMNS>
GLORA_HD void effective_tile(const Factor<C>& scale, const Factor<C>& first, const Factor<C>& second, int64_t n,
                             int64_t k, int rows, const T (&weight)[ROWS][COLUMNS], T (&result)[ROWS][COLUMNS]) {
  C tile[ROWS][COLUMNS] = {};
  add_factor(scale, n, k, rows, tile);
  GLORA_UNROLL
  for (int i = 0; i < ROWS; ++i)
  GLORA_UNROLL
    for (int j = 0; j < COLUMNS; ++j) {
      const C w = static_cast<C>(weight[i][j]);
      tile[i][j] = w + w * tile[i][j];
    }
  add_factor(first, n, k, rows, tile);
  add_factor(second, n, k, rows, tile);
  GLORA_UNROLL
  for (int i = 0; i < ROWS; ++i)
  GLORA_UNROLL
    for (int j = 0; j < COLUMNS; ++j) result[i][j] = static_cast<T>(tile[i][j]);
}

constexpr int kRanks = 8;   // ranks that one pass over dW contracts with
constexpr int kLanes = 32;  // lanes of a warp that share a row

// The (N, K) gradient that is contracted: dW, or dW * W0 where `weight` is given.
template <typename T, typename C>
struct Gradient {
  const T* dw;
  const T* weight;  // null: ones
  int64_t weight_row, columns;

  GLORA_HD C at(int64_t n, int64_t k) const {
    const C value = static_cast<C>(dw[n * columns + k]);
    return weight ? value * static_cast<C>(weight[n * weight_row + k]) : value;
  }
};

// One lane's part of `sum_k gradient[n, k] up[r, k]` for the ranks `first` to `first + kRanks`; null `up` is ones.
template <typename T, typename C>
GLORA_HD void row_part(const Gradient<T, C>& gradient, const Factor<C>& factor, int first, int64_t n, int lane,
                       C (&sums)[kRanks]) {
  GLORA_UNROLL
  for (int r = 0; r < kRanks; ++r) sums[r] = 0;
  for (int64_t k = lane; k < gradient.columns; k += kLanes) {
    const C value = gradient.at(n, k);
  GLORA_UNROLL
    for (int r = 0; r < kRanks; ++r)
      if (first + r < factor.rank)
        sums[r] += value * (factor.up ? factor.up[(first + r) * factor.up_rank + k * factor.up_column] : C(1));
  }
}

// `sum_n down[n, r] gradient[n, k]` over the rows `begin` to `end`, for the ranks `first` to `first + kRanks`.
template <typename T, typename C>
GLORA_HD void column_part(const Gradient<T, C>& gradient, const Factor<C>& factor, int first, int64_t begin, int64_t end,
                          int64_t k, C (&sums)[kRanks]) {
  GLORA_UNROLL
  for (int r = 0; r < kRanks; ++r) sums[r] = 0;
  for (int64_t n = begin; n < end; ++n) {
    const C value = gradient.at(n, k);
  GLORA_UNROLL
    for (int r = 0; r < kRanks; ++r)
      if (first + r < factor.rank) sums[r] += factor.down[n * factor.down_row + (first + r) * factor.down_rank] * value;
  }
}

}  // namespace glora
