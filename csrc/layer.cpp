#include "layer.h"

#include "launch.h"

namespace glora {
namespace {

at::Tensor as(const at::Tensor& tensor, at::ScalarType type) { return tensor.to(type); }

// A gradient in the shape and type of its storage: zero in the part that is not read.
at::Tensor into(const at::Tensor& storage, const at::Tensor& value, int64_t axis) {
  if (value.sizes() == storage.sizes()) return value.to(storage.scalar_type());
  at::Tensor result = at::zeros_like(storage);
  result.narrow(axis, 0, value.size(axis)).copy_(value);
  return result;
}

// The gradient of a vector or constant, from one value per row.
at::Tensor into_entries(const Term& term, const at::Tensor& rows) {
  if (term.kind == Kind::vector)
    return term.down.dim() == 1 ? rows.to(term.down.scalar_type()) : into(term.down, rows.unsqueeze(1), 1);
  at::Tensor result = at::zeros_like(term.down);
  at::Tensor first = result;
  while (first.dim() > 0) first = first.select(0, 0);
  first.copy_(rows.sum());
  return result;
}

struct Sink {
  Storages& storages;

  void low_rank(Slot slot, const Term& term, const at::Tensor& left, const at::Tensor& right) {
    storages[kFirstStorage[slot]] = into(term.down, left, 1);
    storages[kFirstStorage[slot] + 1] = into(term.up, right, 0);
  }
  void entries(Slot slot, const Term& term, const at::Tensor& rows) {
    storages[kFirstStorage[slot]] = into_entries(term, rows);
  }
};

// c of W0 c, (K,).
at::Tensor prompt(const Term& term, at::ScalarType type) {
  if (term.kind == Kind::vector) return as(term.entries(), type);
  return at::mm(as(term.left(), type), as(term.right(), type)).squeeze(1);
}

void bias_gradients(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& bias, const Terms& terms,
                    const std::array<bool, kSlots>& wanted, Sink sink) {
  if (!wanted[C] && !wanted[D] && !wanted[E]) return;
  const auto type = compute_type(dy.scalar_type());
  const at::Tensor db = dy.sum(0, false, type);
  if (wanted[D]) sink.entries(D, terms[D], db * bias);
  if (wanted[E]) sink.entries(E, terms[E], db);
  if (!wanted[C]) return;
  const at::Tensor dc = at::mv(as(weight, type).t(), db);
  if (terms[C].kind == Kind::vector) return sink.entries(C, terms[C], dc);
  const at::Tensor left = as(terms[C].left(), type), right = as(terms[C].right(), type);
  sink.low_rank(C, terms[C], at::outer(dc, right.squeeze(1)), at::mv(left.t(), dc).unsqueeze(1));
}

// The gradients of a term that adds its matrix to W_eff or, where `weight` is defined, multiplies W0 by it.
void through_dw(Slot slot, const Term& term, const at::Tensor& dw, const at::Tensor& weight, Sink sink) {
  const auto [left, right] = contract(dw, weight, term);
  if (term.kind == Kind::low_rank)
    sink.low_rank(slot, term, left, right);
  else
    sink.entries(slot, term, left.squeeze(1));
}

// The gradients of B without dW, by products of its thin factors.
void thin(const Term& term, const at::Tensor& dy, const at::Tensor& x, Sink sink) {
  if (term.kind != Kind::low_rank) return sink.entries(B, term, at::mv(dy.t(), x.sum(1)));
  const auto type = x.scalar_type();
  sink.low_rank(B, term, at::mm(dy.t(), at::mm(x, as(term.right(), type).t())),
                at::mm(at::mm(dy, as(term.left(), type)).t(), x));
}

// The gradients of A in W0 + W0 A.
void matmul_gradient(const Term& term, const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                     const at::Tensor& projected, Sink sink) {
  const auto type = x.scalar_type(), wide = compute_type(type);
  if (term.kind != Kind::low_rank)
    return sink.entries(A, term, at::mul(as(at::mm(dy, weight), wide), x).sum(0));
  const at::Tensor d_projected = at::mm(dy.t(), at::mm(x, as(term.right(), type).t()));
  sink.low_rank(A, term, at::mm(weight.t(), d_projected), at::mm(at::mm(dy, as(projected, type)).t(), x));
}

}  // namespace

at::Tensor Term::entries() const {
  if (kind == Kind::vector) return down.dim() == 1 ? down : down.select(1, 0);
  at::Tensor first = down;
  while (first.dim() > 0) first = first.select(0, 0);
  return first;
}

Terms make_terms(const Storages& storages, const std::vector<int64_t>& config, bool matmul) {
  TORCH_CHECK_VALUE(config.size() == 2 * kSlots, "config: expected kind and rank of five slots, got ", config.size());
  Terms terms;
  terms.matmul = matmul;
  for (int slot = 0; slot < kSlots; ++slot) {
    const int64_t code = config[2 * slot];
    TORCH_CHECK_VALUE(code >= 0 && code <= 3, "config: expected kinds of 0 to 3, got ", code);
    Term& term = terms.slots[slot];
    term.kind = static_cast<Kind>(code), term.rank = config[2 * slot + 1];
    const bool pair = term.kind == Kind::low_rank;
    TORCH_CHECK_VALUE(!pair || slot < D, "config: expected no low rank of D or E");
    if (term) term.down = storages[kFirstStorage[slot]];
    if (pair) term.up = storages[kFirstStorage[slot] + 1];
    TORCH_CHECK_VALUE(!term || (term.down.defined() && (!pair || term.up.defined())),
                      "storages: expected every one that is read, got none for slot ", "ABCDE"[slot]);
  }
  return terms;
}

at::ScalarType compute_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

at::Tensor project(const at::Tensor& weight, const Terms& terms) {
  if (!terms.matmul || terms[A].kind != Kind::low_rank) return {};
  const auto wide = compute_type(weight.scalar_type());
  return at::mm(as(weight, wide), as(terms[A].left(), wide));
}

at::Tensor effective_weight(const at::Tensor& weight, const Terms& terms, const at::Tensor& projected) {
  return terms.adapts_weight() ? assemble(weight, terms, projected) : weight;
}

at::Tensor effective_bias(const at::Tensor& weight, const at::Tensor& bias, const Terms& terms) {
  if (!terms[C] && !terms[E] && (!terms[D] || !bias.defined())) return bias;
  const auto wide = compute_type(weight.scalar_type());
  at::Tensor result = bias.defined() ? as(bias, wide) : at::Tensor();
  if (terms[D] && bias.defined()) result = at::addcmul(result, result, as(terms[D].entries(), wide));
  if (terms[E]) {
    const at::Tensor shift = as(terms[E].entries(), wide);
    result = result.defined() ? result + shift : shift.expand({weight.size(0)});
  }
  if (terms[C]) {
    const at::Tensor c = prompt(terms[C], wide);
    result = result.defined() ? at::addmv(result, as(weight, wide), c) : at::mv(as(weight, wide), c);
  }
  return as(result, weight.scalar_type());
}

Gradients backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                   const Terms& terms, const at::Tensor& projected, const std::array<bool, kSlots>& wanted,
                   bool wants_x) {
  Gradients result;
  Sink sink{result.storages};
  bias_gradients(dy, weight, bias, terms, wanted, sink);
  if (wanted[A] && !terms.matmul) {  // the third dense product
    const at::Tensor dw = at::mm(dy.t(), x);
    through_dw(A, terms[A], dw, weight, sink);
    if (wanted[B]) through_dw(B, terms[B], dw, {}, sink);
  } else {
    if (wanted[A]) matmul_gradient(terms[A], dy, x, weight, projected, sink);
    if (wanted[B]) thin(terms[B], dy, x, sink);
  }
  if (wants_x) result.x = at::mm(dy, effective_weight(weight, terms, projected));
  return result;
}

}  // namespace glora
