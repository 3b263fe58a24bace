// The kernels on tensors.
#pragma once

#include <utility>

#include "layer.h"

namespace glora {

// W_eff, (N, K): see element.h. `projected`, V = W0 Ad, takes the place of Ad in the matmul product.
at::Tensor assemble(const at::Tensor& weight, const Terms& terms, const at::Tensor& projected);

// dW, or dW * W0 where `weight` is defined, contracted with a low-rank `factor`: the gradients of its left, (N, r), and
// its right factor, (r, K). For a vector or constant: the (N, 1) sums over columns, and no second tensor.
std::pair<at::Tensor, at::Tensor> contract(const at::Tensor& dw, const at::Tensor& weight, const Term& factor);

}  // namespace glora
