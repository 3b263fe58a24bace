#include "plan.h"

#include <algorithm>

#include "tiles.h"

namespace glora {
namespace {

constexpr int64_t kBlocks = 512;    // a few per multiprocessor
constexpr int64_t kShortest = 128;  // rows of a chunk: the partial sums of 8 ranks are then a sixteenth of dW

int64_t divided_up(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

}  // namespace

ContractionPlan plan_contraction(int64_t rows, int64_t columns) {
  const int64_t across = std::max<int64_t>(divided_up(columns, kThreads), 1);
  const int64_t wanted = std::max<int64_t>(divided_up(kBlocks, across), 1);
  const int64_t chunk = std::max(divided_up(rows, wanted), kShortest);
  return {chunk, std::max<int64_t>(divided_up(rows, chunk), 1)};
}

bool takes_vectors(int64_t columns, int64_t row_stride, int64_t element_size, std::uintptr_t address) {
  const int64_t elements = kVectorBytes / element_size;
  return columns % elements == 0 && row_stride % elements == 0 && address % kVectorBytes == 0;
}

}  // namespace glora
