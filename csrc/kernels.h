// The launchers, on raw pointers: `cuda.cu` has them for a GPU, `host.cpp` for the host, in the same order of sums.
#pragma once

#include "element.h"

namespace glora {

template <typename T, typename C>
struct Assembly {
  const T* weight;
  int64_t weight_row, rows, columns;  // W0 is (rows, columns), its columns next to each other
  Factor<C> scale, first, second;
  T* result;  // contiguous
  bool vectors;  // whether rows begin at multiples of 16 bytes and hold whole ones
};

template <typename T, typename C>
struct Contraction {
  Gradient<T, C> gradient;
  Factor<C> factor;
  int64_t rows;
  C* down;      // (rows, rank), or null
  C* up_parts;  // (chunks, rank, columns), or null: one sum a chunk of rows
  int64_t chunk;
};

template <typename T, typename C>
void assemble_host(const Assembly<T, C>& work);
template <typename T, typename C>
void contract_host(const Contraction<T, C>& work);
template <typename T, typename C>
void assemble_cuda(const Assembly<T, C>& work, void* stream);
template <typename T, typename C>
void contract_cuda(const Contraction<T, C>& work, void* stream);

}  // namespace glora
