// One node of autograd for a whole layer.
#pragma once

#include <optional>

#include "layer.h"

namespace glora {

struct Output {
  at::Tensor y, projected, b_eff;
};

// y for x of any leading shape.
Output linear_forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const Terms& terms);

// The same y, differentiable once in x and the storages.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                  const std::array<std::optional<at::Tensor>, kStorages>& storages, const std::vector<int64_t>& config,
                  bool matmul);

}  // namespace glora
