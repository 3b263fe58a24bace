// A layer on tensors: y = x W_eff^T + b_eff and its gradients (glora_kernels/terms.py has the formula and the shapes).
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <vector>

namespace glora {

// In the order of the codes of glora_kernels/path_encoding.py.
enum class Kind : int64_t { none, constant, vector, low_rank };

// A support tensor: its storages, and how many ranks of them are read.
struct Term {
  Kind kind = Kind::none;
  int64_t rank = 0;
  at::Tensor down, up;  // a vector or constant has its storage in `down`

  explicit operator bool() const { return kind != Kind::none; }
  at::Tensor left() const { return down.slice(1, 0, rank); }
  at::Tensor right() const { return up.slice(0, 0, rank); }
  // The part that is read of a vector, (length,), or of a constant, ().
  at::Tensor entries() const;
};

enum Slot { A, B, C, D, E };
constexpr int kSlots = 5, kStorages = 8;
using Storages = std::array<at::Tensor, kStorages>;  // Ad, Au, Bd, Bu, Cd, Cu, D, E; undefined where not read

struct Terms {
  std::array<Term, kSlots> slots;
  bool matmul = false;

  const Term& operator[](Slot slot) const { return slots[slot]; }
  bool adapts_weight() const { return slots[A] || slots[B]; }
};

// The first storage of each slot; A, B and C have two.
constexpr std::array<int, kSlots> kFirstStorage = {0, 2, 4, 6, 7};

// Raises (TORCH_CHECK) for an unknown code, or for a storage that is read but undefined.
Terms make_terms(const Storages& storages, const std::vector<int64_t>& config, bool matmul);

at::ScalarType compute_type(at::ScalarType type);

// V = W0 Ad, (N, r), where A is a low rank of the matmul product; else undefined.
at::Tensor project(const at::Tensor& weight, const Terms& terms);

// W_eff and b_eff, formed in the compute type and rounded once. An operand that no term changes is returned as it is.
at::Tensor effective_weight(const at::Tensor& weight, const Terms& terms, const at::Tensor& projected);
at::Tensor effective_bias(const at::Tensor& weight, const at::Tensor& bias, const Terms& terms);

struct Gradients {
  at::Tensor x;
  Storages storages;
};

// dy is (M, N); x is (M, K), or undefined if neither A nor B wants a gradient.
Gradients backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                   const Terms& terms, const at::Tensor& projected, const std::array<bool, kSlots>& wanted,
                   bool wants_x);

}  // namespace glora
