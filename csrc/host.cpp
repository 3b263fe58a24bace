// The arithmetic of the kernels on the host, thread by thread: for tests without a GPU, and for CPU tensors.
#include <algorithm>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "kernels.h"
#include "tiles.h"

namespace glora {

template <typename T, typename C>
void assemble_host(const Assembly<T, C>& work) {
  for (int64_t n = 0; n < work.rows; n += kTileRows)
    for (int64_t k = 0; k < work.columns; ++k) {
      const int rows = static_cast<int>(std::min<int64_t>(kTileRows, work.rows - n));
      T weight[kTileRows][1] = {}, result[kTileRows][1];
      for (int i = 0; i < rows; ++i) weight[i][0] = work.weight[(n + i) * work.weight_row + k];
      effective_tile(work.scale, work.first, work.second, n, k, rows, weight, result);
      for (int i = 0; i < rows; ++i) work.result[(n + i) * work.columns + k] = result[i][0];
    }
}

template <typename T, typename C>
void contract_host(const Contraction<T, C>& work) {
  const int rank = work.factor.rank;
  for (int first = 0; first < rank; first += kRanks) {
    const int count = std::min(kRanks, rank - first);
    for (int64_t n = 0; work.down && n < work.rows; ++n) {
      C lanes[kLanes][kRanks];
      for (int lane = 0; lane < kLanes; ++lane) row_part(work.gradient, work.factor, first, n, lane, lanes[lane]);
      for (int step = kLanes / 2; step > 0; step /= 2)  // in the order of a warp's shuffles
        for (int lane = 0; lane < step; ++lane)
          for (int r = 0; r < kRanks; ++r) lanes[lane][r] += lanes[lane + step][r];
      for (int r = 0; r < count; ++r) work.down[n * rank + first + r] = lanes[0][r];
    }
    if (!work.up_parts) continue;
    for (int64_t begin = 0, part = 0; begin < work.rows; begin += work.chunk, ++part)
      for (int64_t k = 0; k < work.gradient.columns; ++k) {
        C sums[kRanks];
        column_part(work.gradient, work.factor, first, begin, std::min(begin + work.chunk, work.rows), k, sums);
        for (int r = 0; r < count; ++r)
          work.up_parts[(part * rank + first + r) * work.gradient.columns + k] = sums[r];
      }
  }
}

#define GLORA_INSTANTIATE(T, C)                              \
  template void assemble_host<T, C>(const Assembly<T, C>&); \
  template void contract_host<T, C>(const Contraction<T, C>&);
GLORA_FOR_TYPES(GLORA_INSTANTIATE)

}  // namespace glora
