#include "launch.h"

#include <c10/core/DeviceGuard.h>

#ifdef GLORA_WITH_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

#include "kernels.h"
#include "plan.h"
#include "tiles.h"

namespace glora {
namespace {

// A factor, and the tensors of the compute type that keep alive what it points to.
template <typename C>
struct Held {
  at::Tensor down, up;
  Factor<C> factor;
};

template <typename C>
Held<C> held(const at::Tensor& weight, const Term& term, bool columns, const at::Tensor& down) {
  constexpr auto type = c10::CppTypeToScalarType<C>::value;
  Held<C> result;
  if (!term) return result;
  result.down = (down.defined() ? down : term.kind == Kind::low_rank ? term.left() : term.entries()).to(type).resolve_neg();
  auto& factor = result.factor;
  factor.down = result.down.template const_data_ptr<C>();
  if (term.kind == Kind::low_rank) {
    result.up = term.right().to(type).resolve_neg();
    factor = {Form::low_rank, static_cast<int>(term.rank), factor.down, result.down.stride(0), result.down.stride(1),
              result.up.template const_data_ptr<C>(), result.up.stride(0), result.up.stride(1)};
  } else {
    factor.form = term.kind == Kind::constant ? Form::constant : columns ? Form::column : Form::row;
    factor.down_row = term.kind == Kind::constant ? 0 : result.down.stride(0);
  }
  TORCH_INTERNAL_ASSERT(result.down.device() == weight.device());
  return result;
}

// The matrix with columns of stride 1 and without a pending negation.
at::Tensor with_rows(const at::Tensor& matrix) {
  const at::Tensor plain = matrix.resolve_neg();
  return plain.stride(1) == 1 ? plain : plain.contiguous();
}

// Calls `work(T{}, C{})` for the type of a weight.
template <typename Work>
void for_type(at::ScalarType type, Work&& work) {
  switch (type) {
    case at::kFloat: return work(float{}, float{});
    case at::kDouble: return work(double{}, double{});
    case at::kHalf: return work(c10::Half{}, float{});
    case at::kBFloat16: return work(c10::BFloat16{}, float{});
    default: TORCH_CHECK_TYPE(false, "weight: expected a floating point type of 16, 32 or 64 bits, got ", type);
  }
}

template <typename T, typename C>
void run(const at::Tensor& on, const Assembly<T, C>& work) {
#ifdef GLORA_WITH_CUDA
  if constexpr (!std::is_same_v<T, double>)
    if (on.is_cuda()) return assemble_cuda(work, c10::cuda::getCurrentCUDAStream());
#endif
  TORCH_CHECK(on.is_cpu(), "weight: no kernel of this build for ", on.device(), " and ", on.scalar_type());
  assemble_host(work);
}

template <typename T, typename C>
void run(const at::Tensor& on, const Contraction<T, C>& work) {
#ifdef GLORA_WITH_CUDA
  if constexpr (!std::is_same_v<T, double>)
    if (on.is_cuda()) return contract_cuda(work, c10::cuda::getCurrentCUDAStream());
#endif
  TORCH_CHECK(on.is_cpu(), "dw: no kernel of this build for ", on.device(), " and ", on.scalar_type());
  contract_host(work);
}

}  // namespace

at::Tensor assemble(const at::Tensor& given, const Terms& terms, const at::Tensor& projected) {
  const c10::DeviceGuard guard(given.device());
  const at::Tensor weight = with_rows(given);
  at::Tensor result = at::empty({weight.size(0), weight.size(1)}, weight.options());
  if (result.numel() == 0) return result;  // no launch has an empty grid
  for_type(weight.scalar_type(), [&](auto t, auto c) {
    using T = decltype(t);
    using C = decltype(c);
    const bool as_shift = projected.defined();  // A of the matmul product, as a low rank
    const auto a = held<C>(weight, terms[A], terms.matmul, projected);
    const auto b = held<C>(weight, terms[B], false, {});
    Assembly<T, C> work;
    work.weight = weight.template const_data_ptr<T>();
    work.weight_row = weight.stride(0), work.rows = weight.size(0), work.columns = weight.size(1);
    if (!as_shift) work.scale = a.factor;
    work.first = as_shift ? a.factor : Factor<C>{};
    work.second = b.factor;
    work.result = result.template mutable_data_ptr<T>();
    work.vectors = takes_vectors(work.columns, work.weight_row, sizeof(T), reinterpret_cast<std::uintptr_t>(work.weight)) &&
                   takes_vectors(work.columns, work.columns, sizeof(T), reinterpret_cast<std::uintptr_t>(work.result));
    run(weight, work);
  });
  return result;
}

std::pair<at::Tensor, at::Tensor> contract(const at::Tensor& given, const at::Tensor& weight, const Term& term) {
  const c10::DeviceGuard guard(given.device());
  const at::Tensor dw = given.contiguous(), scale = weight.defined() ? with_rows(weight) : weight;
  const bool low_rank = term.kind == Kind::low_rank;
  const int64_t rank = low_rank ? term.rank : 1, rows = dw.size(0), columns = dw.size(1);
  const auto plan = plan_contraction(rows, columns);
  const auto options = dw.options().dtype(compute_type(dw.scalar_type()));
  at::Tensor down = at::empty({rows, rank}, options), parts;
  if (low_rank) parts = at::empty({plan.chunks, rank, columns}, options);
  if (dw.numel() == 0) return {down.zero_(), low_rank ? parts.zero_().select(0, 0) : at::Tensor()};
  for_type(dw.scalar_type(), [&](auto t, auto c) {
    using T = decltype(t);
    using C = decltype(c);
    const auto factor = low_rank ? held<C>(dw, term, false, {}) : Held<C>{};
    Contraction<T, C> work;
    work.gradient = {dw.template const_data_ptr<T>(), scale.defined() ? scale.template const_data_ptr<T>() : nullptr,
                     scale.defined() ? scale.stride(0) : 0, columns};
    work.factor = factor.factor;
    work.factor.rank = static_cast<int>(rank);
    work.rows = rows, work.chunk = plan.chunk;
    work.down = down.template mutable_data_ptr<C>();
    work.up_parts = low_rank ? parts.template mutable_data_ptr<C>() : nullptr;
    run(dw, work);
  });
  return {down, low_rank ? (plan.chunks == 1 ? parts.select(0, 0) : parts.sum(0)) : at::Tensor()};
}

}  // namespace glora
