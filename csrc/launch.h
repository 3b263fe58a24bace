// The kernels on tensors.
#pragma once

#include <utility>

#include "layer.h"

namespace glora {

// W0 * (1 + scale) + shift + shift: see element.h. Terms of the compute type; `projected` replaces Ad of the matmul product.
at::Tensor assemble(const at::Tensor& weight, const Terms& terms, const at::Tensor& projected);

// What `factor`, a low rank, is given by the gradient dW, or dW * W0 where `weight` is defined: (N, r) and (r, K). A vector
// or constant is given its (N, 1) sums over columns, and no second.
std::pair<at::Tensor, at::Tensor> contract(const at::Tensor& dw, const at::Tensor& weight, const Term& factor);

}  // namespace glora
