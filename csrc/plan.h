// What is decided on the host before a launch, from shapes and strides alone.
#pragma once

#include <cstdint>

namespace glora {

// Rows that one block sums over for the gradient of an `up`: as many partial sums as fill a GPU, and no more memory than
// a sixteenth of dW for ranks up to 8.
struct ContractionPlan {
  int64_t chunk;   // rows
  int64_t chunks;  // partial sums of each element
};

ContractionPlan plan_contraction(int64_t rows, int64_t columns);

// Whether a matrix can be read and written 16 bytes at a time.
bool takes_vectors(int64_t columns, int64_t row_stride, int64_t element_size, std::uintptr_t address);

}  // namespace glora
