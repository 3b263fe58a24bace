// The launchers, on raw pointers: for a GPU in `cuda.cu`, for the host in `host.cpp`. Both sum in the same order.
#pragma once

#include "element.h"

namespace glora {

template <typename T, typename C>
struct Assembly {
  const T* weight;
  int64_t weight_row, rows, columns;  // W0 is (rows, columns) with columns of stride 1
  Factor<C> scale, first, second;
  T* result;  // contiguous
  bool vectors;  // whether rows begin at multiples of 16 bytes and are multiples of 16 bytes long
};

template <typename T, typename C>
struct Contraction {
  Gradient<T, C> gradient;
  Factor<C> factor;
  int64_t rows;
  C* down;      // (rows, rank), or null
  C* up_parts;  // (chunks, rank, columns), or null: one sum per chunk of rows
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
