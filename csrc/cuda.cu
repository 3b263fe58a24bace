// The kernels on a GPU. One warp or thread sums an element, in a fixed order: no atomics, the same bits every time.
#include <cuda_runtime.h>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <stdexcept>
#include <string>

#include "kernels.h"
#include "tiles.h"

namespace glora {
namespace {

int64_t divided_up(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

// Neighbouring elements of a row, read or written in one access.
template <typename T, int COLUMNS>
struct alignas(sizeof(T) * COLUMNS) Pack {
  T values[COLUMNS];
};

template <typename T, typename C, int COLUMNS>
__global__ void __launch_bounds__(kThreads) assemble_kernel(Assembly<T, C> work) {
  using Access = Pack<T, COLUMNS>;
  const int64_t k = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * COLUMNS;
  if (k >= work.columns) return;
  const int64_t tiles = (work.rows + kTileRows - 1) / kTileRows;
  for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    const int64_t n = tile * kTileRows;
    const int rows = static_cast<int>(work.rows - n < kTileRows ? work.rows - n : kTileRows);
    T weight[kTileRows][COLUMNS], result[kTileRows][COLUMNS];
#pragma unroll
    for (int i = 0; i < kTileRows; ++i) {
      Access pack{};
      if (i < rows) pack = *reinterpret_cast<const Access*>(work.weight + (n + i) * work.weight_row + k);
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) weight[i][j] = pack.values[j];
    }
    effective_tile(work.scale, work.first, work.second, n, k, rows, weight, result);
#pragma unroll
    for (int i = 0; i < kTileRows; ++i) {
      Access pack;
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) pack.values[j] = result[i][j];
      if (i < rows) *reinterpret_cast<Access*>(work.result + (n + i) * work.columns + k) = pack;
    }
  }
}

// One warp per row: work.down, the sums over columns.
template <typename T, typename C>
__global__ void __launch_bounds__(kThreads) contract_rows_kernel(Contraction<T, C> work, int first) {
  constexpr int kWarps = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes; n < work.rows;
       n += static_cast<int64_t>(gridDim.x) * kWarps) {
    C sums[kRanks];
    row_part(work.gradient, work.factor, first, n, lane, sums);
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2)
#pragma unroll
      for (int r = 0; r < kRanks; ++r) sums[r] += __shfl_down_sync(0xffffffffu, sums[r], step);
    if (lane == 0)
#pragma unroll
      for (int r = 0; r < kRanks; ++r)
        if (first + r < work.factor.rank) work.down[n * work.factor.rank + first + r] = sums[r];
  }
}

// One thread per column, one block per chunk of rows: work.up_parts, the sums over rows.
template <typename T, typename C>
__global__ void __launch_bounds__(kThreads) contract_columns_kernel(Contraction<T, C> work, int first) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, columns = work.gradient.columns;
  if (k >= columns) return;
  const int64_t chunks = (work.rows + work.chunk - 1) / work.chunk;
  for (int64_t part = blockIdx.y; part < chunks; part += gridDim.y) {
    const int64_t begin = part * work.chunk, end = begin + work.chunk < work.rows ? begin + work.chunk : work.rows;
    C sums[kRanks];
    column_part(work.gradient, work.factor, first, begin, end, k, sums);
#pragma unroll
    for (int r = 0; r < kRanks; ++r)
      if (first + r < work.factor.rank)
        work.up_parts[(part * work.factor.rank + first + r) * columns + k] = sums[r];
  }
}

constexpr int64_t kMostBlocks = 65535;  // along y; a kernel's loop takes the rest

unsigned blocks(int64_t count) { return static_cast<unsigned>(count < kMostBlocks ? count : kMostBlocks); }

}  // namespace

template <typename T, typename C>
void assemble_cuda(const Assembly<T, C>& work, void* stream) {
  constexpr int kVector = kVectorBytes / sizeof(T);
  const int64_t columns = work.vectors ? work.columns / kVector : work.columns;
  const dim3 grid(static_cast<unsigned>(divided_up(columns, kThreads)), blocks(divided_up(work.rows, kTileRows)));
  const auto on = static_cast<cudaStream_t>(stream);
  if (work.vectors)
    assemble_kernel<T, C, kVector><<<grid, kThreads, 0, on>>>(work);
  else
    assemble_kernel<T, C, 1><<<grid, kThreads, 0, on>>>(work);
  check_launch("assemble");
}

template <typename T, typename C>
void contract_cuda(const Contraction<T, C>& work, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const unsigned row_blocks = blocks(divided_up(work.rows, kThreads / kLanes));
  const dim3 column_grid(static_cast<unsigned>(divided_up(work.gradient.columns, kThreads)),
                         blocks(divided_up(work.rows, work.chunk)));
  for (int first = 0; first < work.factor.rank; first += kRanks) {
    if (work.down) contract_rows_kernel<T, C><<<row_blocks, kThreads, 0, on>>>(work, first);
    if (work.up_parts) contract_columns_kernel<T, C><<<column_grid, kThreads, 0, on>>>(work, first);
  }
  check_launch("contract");
}

#define GLORA_INSTANTIATE(T, C)                                     \
  template void assemble_cuda<T, C>(const Assembly<T, C>&, void*); \
  template void contract_cuda<T, C>(const Contraction<T, C>&, void*);
GLORA_FOR_GPU_TYPES(GLORA_INSTANTIATE)

}  // namespace glora
