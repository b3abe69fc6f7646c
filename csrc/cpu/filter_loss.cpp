// CPU operators of the filter loss. picnn_fast/reference/filter_loss.py is the definition.
//
// A thread works on whole filters: the responses of all samples to all templates, their statistics
// and the gradient by the same templates stay in its cache at usual sizes. Both products read the
// templates' values by offset (template_panels.h), the maps where they are.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/read_template.h"
#include "capability.h"
#include "filter_loss_kernels.h"
#include "maps.h"
#include "template_panels.h"
#include "tensors.h"

namespace picnn_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Filters worked on together: where those are neighbours in memory, a cache line of them, unless
// that is more than a cache holds or leaves threads without work.
int64_t filters_together(const FilterLoss& f, int64_t element_size) {
  constexpr int64_t kLine = 64, kCache = 4 << 20;
  if (f.maps_strides.position == 1) {
    return 1;
  }
  int64_t filters = kLine / element_size;
  const int64_t threads = torch::stable::get_num_threads();
  while (filters > 1 && (filters * f.shape.batch * f.shape.positions * element_size > kCache ||
                         (f.shape.filters + filters - 1) / filters < 2 * threads)) {
    filters /= 2;
  }
  return filters;
}

template <typename A>
void run(FilterLoss& f, const Tensor& x, const Tensor& offsets) {
  const Template<A> part = read_template<A>(x, "x", offsets);
  if (f.shape.batch == 0 || f.shape.filters == 0) {
    return;
  }
  f.layout = panel_layout(part.offsets);
  const std::vector<A> values(part.values, part.values + part.offsets.count());
  const std::vector<A> about_the_middle(values.rbegin(), values.rend());
  const std::vector<A> turned = panels(f.layout, about_the_middle);
  std::vector<A> upright;
  if (f.grad != nullptr && values != about_the_middle) {
    upright = panels(f.layout, values);
  }
  f.turned = turned.data();
  f.upright = upright.empty() ? turned.data() : upright.data();
  f.block = filters_together(f, sizeof(A));
  const FilterLossKernels& kernels = PICNN_FAST_KERNELS_IN_USE(filter_loss_kernels);
  const Storage type = storage(x, "x");
  const int64_t blocks = (f.shape.filters + f.block - 1) / f.block;
  // Every response takes a multiplication for each position.
  const int64_t work = f.block * f.shape.batch * f.shape.positions * f.shape.positions / 16;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    constexpr size_t kLine = 64;
    const auto size = static_cast<size_t>(filter_loss_scratch(f.shape, f.block));
    std::unique_ptr<char[]> memory(new char[size * sizeof(A) + kLine]);
    const size_t misplaced = reinterpret_cast<uintptr_t>(memory.get()) % kLine;
    kernels.run(f, type, begin, end, memory.get() + (kLine - misplaced));
  });
}

struct Outputs {
  Tensor loss, grad;
};

// What both forms have in common.
Outputs prepare(FilterLoss& f, const Tensor& x, double tau, bool with_grad) {
  STD_TORCH_CHECK(x.dim() == 4, "x: want maps [B, N, h, w]");
  f.shape = shape_of_maps(x, "x");
  const ScalarType type = accumulate_type(x);
  // Of an empty batch the loss is 0.
  Tensor loss = f.shape.batch == 0 ? torch::stable::new_zeros(x, {f.shape.filters}, type)
                                   : torch::stable::new_empty(x, {f.shape.filters}, type);
  Tensor grad = with_grad ? empty_like(x, type) : torch::stable::new_empty(x, {0}, type);
  f.maps = x.const_data_ptr();
  f.maps_strides = strides_of_maps(x, "x");
  f.loss = loss.mutable_data_ptr();
  f.tau = tau;
  if (with_grad) {
    f.grad = grad.mutable_data_ptr();
    f.grad_strides = strides_of_maps(grad, "grad");
  }
  return {loss, grad};
}

void run_any(FilterLoss& f, const Tensor& x, const Tensor& offsets) {
  accumulate_type(x) == ScalarType::Double ? run<double>(f, x, offsets) : run<float>(f, x, offsets);
}

std::tuple<Tensor, Tensor> filter_loss(const Tensor& x, const Tensor& offsets, double tau,
                                       bool with_grad) {
  FilterLoss f{};
  const Outputs out = prepare(f, x, tau, with_grad);
  run_any(f, x, offsets);
  return {out.loss, out.grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> filter_loss_running(
    const Tensor& x, const Tensor& log_mean, const Tensor& log_ratio, double momentum,
    const std::optional<Tensor>& assigned, const Tensor& offsets, double tau, bool with_grad) {
  FilterLoss f{};
  const Outputs out = prepare(f, x, tau, with_grad);
  const int64_t templates = f.shape.positions + 1;
  check_shape(log_mean, "log_mean", {f.shape.filters, templates});
  check_shape(log_ratio, "log_ratio", {f.shape.filters});
  STD_TORCH_CHECK(
      log_mean.scalar_type() == accumulate_type(x) && log_ratio.scalar_type() == accumulate_type(x),
      "log_mean, log_ratio: want float32, float64 for float64 maps");
  STD_TORCH_CHECK(momentum > 0 && momentum <= 1, "momentum: got ", momentum, ", want (0, 1]");
  const Tensor means = torch::stable::contiguous(log_mean);
  const Tensor ratios = torch::stable::contiguous(log_ratio);
  std::optional<Tensor> chosen;
  if (assigned.has_value()) {
    check_shape(*assigned, "assigned", {f.shape.batch, f.shape.filters});
    const int64_t count = f.shape.batch * f.shape.filters;
    chosen = class_indices(torch::stable::view(torch::stable::contiguous(*assigned), {count}),
                           "assigned", count, templates);
    f.assigned = static_cast<const int64_t*>(chosen->const_data_ptr());
  }
  Tensor new_mean = torch::stable::clone(means);
  Tensor new_ratio = torch::stable::clone(ratios);
  f.running = true;
  f.log_mean = means.const_data_ptr();
  f.log_ratio = ratios.const_data_ptr();
  f.momentum = momentum;
  f.new_log_mean = new_mean.mutable_data_ptr();
  f.new_log_ratio = new_ratio.mutable_data_ptr();
  run_any(f, x, offsets);
  return {out.loss, out.grad, new_mean, new_ratio};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(picnn_fast, CPU, m) {
  m.impl("filter_loss", TORCH_BOX(&filter_loss));
  m.impl("filter_loss_running", TORCH_BOX(&filter_loss_running));
}

}  // namespace picnn_fast
