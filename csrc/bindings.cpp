// The module glora_kernels._C, which glora_kernels/_cuda/ calls.
#include <torch/extension.h>

#include "autograd.h"
#include "plan.h"

namespace {

using glora::kSlots;
using glora::kStorages;
using Optional = std::optional<at::Tensor>;
using Given = std::array<Optional, kStorages>;

glora::Terms terms_of(const Given& given, const std::vector<int64_t>& config, bool matmul) {
  glora::Storages storages;
  for (int i = 0; i < kStorages; ++i) storages[i] = given[i].value_or(at::Tensor());
  return glora::make_terms(storages, config, matmul);
}

Optional optional(const at::Tensor& tensor) { return tensor.defined() ? Optional(tensor) : std::nullopt; }

std::tuple<at::Tensor, Optional, Optional> forward(const at::Tensor& x, const at::Tensor& weight, const Optional& bias,
                                                   const Given& storages, const std::vector<int64_t>& config,
                                                   bool matmul) {
  const auto output =
      glora::linear_forward(x, weight, bias.value_or(at::Tensor()), terms_of(storages, config, matmul));
  return {output.y, optional(output.projected), optional(output.b_eff)};
}

std::vector<Optional> backward(const at::Tensor& dy, const Optional& x, const at::Tensor& weight, const Optional& bias,
                               const Given& storages, const std::vector<int64_t>& config, bool matmul,
                               const Optional& projected, const std::array<bool, kSlots>& wanted, bool wants_x) {
  const auto terms = terms_of(storages, config, matmul);
  const auto found = glora::backward(dy, x.value_or(at::Tensor()), weight, bias.value_or(at::Tensor()), terms,
                                     projected ? *projected : glora::project(weight, terms), wanted, wants_x);
  std::vector<Optional> result = {optional(found.x)};
  for (const auto& gradient : found.storages) result.push_back(optional(gradient));
  return result;
}

std::tuple<at::Tensor, Optional> assemble(const at::Tensor& weight, const Optional& bias, const Given& storages,
                                          const std::vector<int64_t>& config, bool matmul) {
  const auto terms = terms_of(storages, config, matmul);
  return {glora::effective_weight(weight, terms, glora::project(weight, terms)),
          optional(glora::effective_bias(weight, bias.value_or(at::Tensor()), terms))};
}

std::pair<int64_t, int64_t> plan_contraction(int64_t rows, int64_t columns) {
  const auto plan = glora::plan_contraction(rows, columns);
  return {plan.chunk, plan.chunks};
}

#ifdef GLORA_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.attr("with_cuda") = kWithCuda;
  module.def("linear", &glora::linear);
  module.def("forward", &forward);
  module.def("backward", &backward);
  module.def("assemble", &assemble);
  module.def("plan_contraction", &plan_contraction);
  module.def("takes_vectors", &glora::takes_vectors);
}
