#include "autograd.h"

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/autograd/custom_function.h>

namespace glora {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using Optional = std::optional<at::Tensor>;

constexpr int kInputs = 3 + kStorages + 2;  // x, weight, bias, the storages, config, matmul

at::Tensor or_none(const Optional& tensor) { return tensor ? *tensor : at::Tensor(); }

// Which slots have a storage that wants a gradient. Without a bias to scale, D has none.
std::array<bool, kSlots> wanted_slots(const Terms& terms, const at::Tensor& bias) {
  std::array<bool, kSlots> wanted{};
  for (int slot = 0; slot < kSlots; ++slot) {
    const Term& term = terms.slots[slot];
    wanted[slot] = term && (term.down.requires_grad() || (term.up.defined() && term.up.requires_grad()));
  }
  wanted[D] = wanted[D] && bias.defined();
  return wanted;
}

// Batched by is_grads_batched, or by vmap around torch.autograd.grad: then there is no memory for a kernel to read.
bool is_batched(const at::Tensor& gradient) {
  const auto keys = gradient.key_set();
  return keys.has(c10::DispatchKey::Batched) || keys.has(c10::DispatchKey::FuncTorchBatched);
}

struct Linear : Function<Linear> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight, const Optional& bias,
                            const Optional& ad, const Optional& au, const Optional& bd, const Optional& bu,
                            const Optional& cd, const Optional& cu, const Optional& d, const Optional& e,
                            std::vector<int64_t> config, bool matmul) {
    const Storages storages = {or_none(ad), or_none(au), or_none(bd), or_none(bu),
                               or_none(cd), or_none(cu), or_none(d),  or_none(e)};
    const Terms terms = make_terms(storages, config, matmul);
    const at::Tensor b0 = or_none(bias);
    const auto wanted = wanted_slots(terms, b0);
    const Output output = linear_forward(x, weight, b0, terms);
    variable_list kept = {wanted[A] || wanted[B] ? x : at::Tensor(), weight, b0, output.projected};
    kept.insert(kept.end(), storages.begin(), storages.end());
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data["config"] = std::move(config);
    ctx->saved_data["matmul"] = matmul;
    ctx->saved_data["wanted"] = std::vector<bool>(wanted.begin(), wanted.end());
    ctx->saved_data["wants_x"] = x.requires_grad();
    ctx->saved_data["shape"] = x.sizes().vec();
    return output.y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(),
                                "backend 'cuda' has no second derivatives; use_backend('torch') has");
    TORCH_CHECK_NOT_IMPLEMENTED(!is_batched(gradients[0]),
                                "backend 'cuda' takes no batched gradients; use_backend('torch') does");
    // backward may run inside the autocast block of forward
    const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
    const variable_list kept = ctx->get_saved_variables();
    Storages storages;
    std::copy(kept.begin() + 4, kept.end(), storages.begin());
    const Terms terms =
        make_terms(storages, ctx->saved_data["config"].toIntVector(), ctx->saved_data["matmul"].toBool());
    const auto list = ctx->saved_data["wanted"].toBoolList();
    std::array<bool, kSlots> wanted{};
    std::copy(list.begin(), list.end(), wanted.begin());
    const at::Tensor &x = kept[0], &weight = kept[1];
    const std::vector<int64_t> shape = ctx->saved_data["shape"].toIntVector();
    const int64_t tokens = c10::multiply_integers(shape.begin(), shape.end() - 1);
    Gradients found = glora::backward(gradients[0].reshape({tokens, weight.size(0)}),
                                      x.defined() ? x.reshape({tokens, weight.size(1)}) : x, weight, kept[2], terms,
                                      kept[3], wanted, ctx->saved_data["wants_x"].toBool());
    variable_list result(kInputs);
    if (found.x.defined()) result[0] = found.x.reshape(shape);
    for (int i = 0; i < kStorages; ++i)
      if (storages[i].defined() && storages[i].requires_grad()) result[3 + i] = found.storages[i];
    return result;
  }
};

}  // namespace

Output linear_forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const Terms& terms) {
  Output output;
  output.projected = project(weight, terms);
  output.b_eff = effective_bias(weight, bias, terms);
  output.y = at::linear(x, effective_weight(weight, terms, output.projected),
                        output.b_eff.defined() ? Optional(output.b_eff) : std::nullopt);
  // in place of a view, which a successor such as ReLU(inplace=True) could not overwrite
  if (x.dim() != 2) output.y = at::_unsafe_view(output.y, output.y.sizes());
  return output;
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const Optional& bias,
                  const std::array<Optional, kStorages>& s, const std::vector<int64_t>& config, bool matmul) {
  return Linear::apply(x, weight, bias, s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], config, matmul);
}

}  // namespace glora
