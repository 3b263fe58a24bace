// The module glora_kernels._cpu: what the torch backend forms from W0 and from dy on a CPU, each in one pass.
//
// The operators are in torch.ops.glora_cpu, for fp32 and fp64 on x86-64 with AVX2, built by GCC. Operands that are
// absent are None, results that were not asked for are empty.
#include <algorithm>
#include <vector>

#include <ATen/Parallel.h>
#include <torch/extension.h>

namespace {

using Optional = std::optional<at::Tensor>;

constexpr int kTileRows = 4;

// (rows, rank) (rank, columns); a rank of 0 is nothing.
template <typename T>
struct Factors {
  const T* down = nullptr;
  const T* up = nullptr;
  int64_t rank = 0, down_row = 0, up_row = 0;
};

// W_eff = W (row_scale or column_scale or 1, + scale) + row_shift + shift.
template <typename T>
struct Weight {
  const T* weight;
  int64_t rows, columns, weight_row;
  const T *row_scale, *column_scale, *row_shift;
  Factors<T> scale, shift;
  T* result;
};

// Sums over tokens, in `totals`: tokens dy, (token_rank, columns), then sum dy, then sum dy output. And rows dy^T.
template <typename T>
struct Tokens {
  const T* dy;
  int64_t count, columns, dy_row;
  const T* output;
  int64_t output_row;
  const T* tokens;
  int64_t token_rank, tokens_row;
  const T* rows;
  int64_t row_rank, rows_row;
  bool sums;
  T* totals;
};

// Only what is between these lines is compiled for AVX2, so that the module can be loaded, and asked, without it.
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "cpu_kernels.h"
#pragma GCC pop_options

template <typename T>
const T* data(const Optional& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

void check(const at::Tensor& like, const Optional& tensor, const char* name, at::IntArrayRef shape) {
  if (!tensor) return;
  TORCH_CHECK(tensor->device().is_cpu() && tensor->scalar_type() == like.scalar_type() && tensor->sizes() == shape &&
                  (shape.back() < 2 || tensor->stride(-1) == 1),
              name, ": expected ", like.scalar_type(), " ", shape, " on the CPU, each row contiguous, got ",
              tensor->scalar_type(), " ", tensor->sizes(), " of strides ", tensor->strides());
}

template <typename T>
Factors<T> factors_of(const at::Tensor& like, const Optional& down, const Optional& up, const char* name) {
  TORCH_CHECK(down.has_value() == up.has_value(), name, ": expected both factors or none");
  if (!down) return {};
  const int64_t rank = up->size(0);
  check(like, down, name, {like.size(0), rank});
  check(like, up, name, {rank, like.size(1)});
  return {data<T>(down), data<T>(up), rank, down->stride(0), up->stride(0)};
}

void effective_weight(const at::Tensor& weight, const Optional& row_scale, const Optional& column_scale,
                      const Optional& row_shift, const Optional& scale_down, const Optional& scale_up,
                      const Optional& shift_down, const Optional& shift_up, const at::Tensor& out) {
  check(weight, weight, "weight", weight.sizes());
  TORCH_CHECK(weight.dim() == 2, "weight: expected a matrix");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  check(weight, row_scale, "row_scale", rows);
  check(weight, column_scale, "column_scale", columns);
  check(weight, row_shift, "row_shift", rows);
  check(weight, out, "out", weight.sizes());
  TORCH_CHECK(out.is_contiguous(), "out: expected a contiguous tensor");
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "effective_weight", [&] {
    Weight<scalar_t> work{weight.const_data_ptr<scalar_t>(),
                          rows,
                          columns,
                          weight.stride(0),
                          data<scalar_t>(row_scale),
                          data<scalar_t>(column_scale),
                          data<scalar_t>(row_shift),
                          factors_of<scalar_t>(weight, scale_down, scale_up, "scale"),
                          factors_of<scalar_t>(weight, shift_down, shift_up, "shift"),
                          out.data_ptr<scalar_t>()};
    // by whole tiles: what is left of the rows is left for any number of threads, and every element has the same bits
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    const int64_t grain = at::internal::GRAIN_SIZE / std::max<int64_t>(columns * kTileRows, 1) + 1;
    at::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
      effective_rows(work, begin * kTileRows, std::min(end * kTileRows, rows));
    });
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> read_tokens(const at::Tensor& dy, const Optional& output,
                                                                       const Optional& tokens, const Optional& rows,
                                                                       bool sums) {
  check(dy, dy, "dy", dy.sizes());
  TORCH_CHECK(dy.dim() == 2, "dy: expected a matrix");
  const int64_t count = dy.size(0), columns = dy.size(1);
  const int64_t token_rank = tokens ? tokens->size(0) : 0, row_rank = rows ? rows->size(0) : 0;
  check(dy, output, "output", dy.sizes());
  check(dy, tokens, "tokens", {token_rank, count});
  check(dy, rows, "rows", {row_rank, columns});
  const auto totals = at::zeros({token_rank + 2, columns}, dy.options());
  // as many parts as threads: sums do not depend on which thread takes which
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), columns / 64));
  const auto through = at::zeros({threads, row_rank, count}, dy.options());
  AT_DISPATCH_FLOATING_TYPES(dy.scalar_type(), "read_tokens", [&] {
    Tokens<scalar_t> work{dy.const_data_ptr<scalar_t>(),
                          count,
                          columns,
                          dy.stride(0),
                          data<scalar_t>(output),
                          output ? output->stride(0) : 0,
                          data<scalar_t>(tokens),
                          token_rank,
                          tokens ? tokens->stride(0) : 0,
                          data<scalar_t>(rows),
                          row_rank,
                          rows ? rows->stride(0) : 0,
                          sums,
                          totals.data_ptr<scalar_t>()};
    auto* through_data = through.data_ptr<scalar_t>();
    at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        const int64_t begin = part * columns / threads, end = (part + 1) * columns / threads;
        std::vector<scalar_t> parts((token_rank + 2) * (end - begin));
        read_columns(work, begin, end, parts.data(), through_data + part * row_rank * count);
      }
    });
  });
  const auto some = [&](int64_t row, bool there) {
    return there ? totals.select(0, row).clone() : at::empty({0}, dy.options());
  };
  return {some(token_rank, sums), some(token_rank + 1, output.has_value()), totals.narrow(0, 0, token_rank),
          threads == 1 ? through.select(0, 0) : through.sum(0)};
}

// Whether this machine has the instructions of cpu_kernels.h.
bool can_run() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

TORCH_LIBRARY(glora_cpu, library) {
  library.def(
      "effective_weight(Tensor weight, Tensor? row_scale, Tensor? column_scale, Tensor? row_shift, Tensor? scale_down, "
      "Tensor? scale_up, Tensor? shift_down, Tensor? shift_up, Tensor(a!) out) -> ()");
  library.def(
      "read_tokens(Tensor dy, Tensor? output, Tensor? tokens, Tensor? rows, bool sums) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
}

TORCH_LIBRARY_IMPL(glora_cpu, CPU, library) {
  library.impl("effective_weight", &effective_weight);
  library.impl("read_tokens", &read_tokens);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) { module.def("can_run", &can_run); }
