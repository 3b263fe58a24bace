// What is decided on the host before a launch, from shapes and strides alone.
#pragma once

#include <cstdint>

namespace glora {

// How the rows are split into partial sums for the gradient of an `up`: enough of them to fill a GPU; for ranks up to
// 8, no more memory than a sixteenth of dW.
struct ContractionPlan {
  int64_t chunk;   // rows that one block sums over
  int64_t chunks;  // partial sums per element
};

ContractionPlan plan_contraction(int64_t rows, int64_t columns);

// Whether a matrix can be read and written 16 bytes at a time.
bool takes_vectors(int64_t columns, int64_t row_stride, int64_t element_size, std::uintptr_t address);

}  // namespace glora
