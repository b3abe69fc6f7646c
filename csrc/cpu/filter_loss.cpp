// CPU operators of the filter loss. picnn_fast/reference/filter_loss.py is the definition.
//
// A thread works on whole filters, several at a time: the responses of all samples to all
// templates, their statistics and the gradient by the same templates stay in its cache at usual
// sizes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/read_template.h"
#include "capability.h"
#include "filter_loss_kernels.h"
#include "maps.h"
#include "tensors.h"

namespace picnn_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls run(down, right, value) for each offset from a peak.
template <typename A, typename Run>
void for_each_offset(const A* table, const Offsets& offsets, const Run& run) {
  for (int64_t down = 1 - offsets.height; down < offsets.height; ++down) {
    for (int64_t right = 1 - offsets.width; right < offsets.width; ++right, ++table) {
      run(down, right, *table);
    }
  }
}

// A stencil and what it points to.
template <typename A>
struct StencilOf {
  std::vector<Tap<A>> taps;
  std::vector<int64_t> begins;
  Stencil<A> stencil{};

  // What the value of the farthest offset leaves of the others: most templates are the same from
  // some distance on. A table of many values is taken as it is, where that is less work.
  StencilOf(const A* table, const Offsets& offsets) {
    const int64_t height = offsets.height, width = offsets.width, positions = height * width;
    const A rest = table[0];
    int64_t margin = 0, work = 0;
    stencil.height = height;
    stencil.width = width;
    stencil.table = table;
    for_each_offset(table, offsets, [&](int64_t down, int64_t right, A value) {
      margin = value != rest ? std::max(margin, std::abs(right)) : margin;
      work += value != rest ? (height - std::abs(down)) * width : 0;
    });
    if (work >= positions * positions) {
      return;
    }
    taps.reserve(static_cast<size_t>(offsets.count()));
    for_each_offset(table, offsets, [&](int64_t down, int64_t right, A value) {
      if (right == 1 - width) {
        begins.push_back(static_cast<int64_t>(taps.size()));
      }
      if (value != rest) {
        taps.push_back({static_cast<int32_t>(down * (width + margin) + right), value - rest});
      }
    });
    begins.push_back(static_cast<int64_t>(taps.size()));
    stencil.margin = margin;
    stencil.rest = rest;
    stencil.taps = taps.data();
    stencil.begins = begins.data();
  }
  StencilOf(const StencilOf&) = delete;
  StencilOf& operator=(const StencilOf&) = delete;
};

// Filters in a line: as many as it holds, for maps that lie side by side are then read in whole
// lines; fewer where there would be little to share among threads, or very much to keep, as long
// as there are samples to fill the line. By the shape alone: so results are the same on any number
// of threads.
template <typename T>
int64_t filters_in_line(const MapsShape& shape) {
  constexpr int64_t kNumbers = kLineNumbers<Accumulate<T>>, kBlocks = 8, kBytes = 16 << 20;
  const int64_t of_filter = 2 * shape.batch * (shape.positions + 1) * (64 / kNumbers);
  int64_t filters = kNumbers;
  while (filters > 1 && shape.batch >= 2 * kNumbers / filters &&
         (ceil_div(shape.filters, filters) < kBlocks || filters * of_filter > kBytes)) {
    filters /= 2;
  }
  return filters;
}

template <typename T>
void run_blocks(const FilterLoss<T>& f) {
  using A = Accumulate<T>;
  const FilterLossKernel<T>& kernel = PICNN_FAST_KERNELS_IN_USE(filter_loss_kernels);
  const int64_t blocks = ceil_div(f.shape.filters, f.filters);
  // Every response takes a multiplication for each position.
  const int64_t work = f.filters * f.shape.batch * f.shape.positions * f.shape.positions / 16;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    constexpr size_t kLine = 64;
    const auto size = static_cast<size_t>(filter_loss_scratch(f)) * kLine;
    std::unique_ptr<char[]> memory(new char[size + kLine]);
    const size_t misplaced = reinterpret_cast<uintptr_t>(memory.get()) % kLine;
    kernel.run(f, begin, end, reinterpret_cast<A*>(memory.get() + (kLine - misplaced)));
  });
}

struct Outputs {
  Tensor loss, grad;
};

Outputs empty_outputs(const Tensor& x, bool with_grad) {
  const ScalarType type = accumulate_type(x);
  // Of an empty batch the loss is 0.
  const Tensor loss =
      x.size(0) == 0 ? torch::stable::new_zeros(x, {x.size(1)}, type) : allocate({x.size(1)}, type);
  return {loss, with_grad ? allocate_like(x, type) : allocate({0}, type)};
}

// `running` is null for the loss over the batch.
template <typename T>
void run(const Tensor& x, const Tensor& offsets, double tau, bool with_grad,
         const RunningEstimates<Accumulate<T>>* running, const Outputs& out) {
  using A = Accumulate<T>;
  const Template<A> part = read_template<A>(x, "x", offsets);
  FilterLoss<T> f{};
  f.shape = shape_of_maps(x, "x");
  if (f.shape.batch == 0 || f.shape.filters == 0) {
    return;
  }
  f.maps = static_cast<const T*>(x.const_data_ptr());
  f.maps_strides = strides_of_maps(x, "x");
  f.loss = static_cast<A*>(out.loss.mutable_data_ptr());
  f.tau = static_cast<A>(tau);
  if (with_grad) {
    f.grad = static_cast<A*>(out.grad.mutable_data_ptr());
    f.grad_strides = strides_of_maps(out.grad, "grad");
    f.stream = exceeds_cache(out.grad);
  }
  const StencilOf<A> of_maps(part.values, part.offsets);
  f.of_maps = of_maps.stencil;
  const std::vector<A> values(part.values, part.values + part.offsets.count());
  const std::vector<A> turned(values.rbegin(), values.rend());
  std::optional<StencilOf<A>> of_weights;
  if (with_grad && values != turned) {
    of_weights.emplace(turned.data(), part.offsets);
  }
  f.of_weights = of_weights ? of_weights->stencil : f.of_maps;
  f.filters = filters_in_line<T>(f.shape);
  f.running = running;
  run_blocks(f);
}

std::tuple<Tensor, Tensor> filter_loss(const Tensor& x, const Tensor& offsets, double tau,
                                       bool with_grad) {
  offsets_of_maps(x, "x");
  const Outputs out = empty_outputs(x, with_grad);
  with_types(x, "x", [&](auto stored, auto) {
    run<decltype(stored)>(x, offsets, tau, with_grad, nullptr, out);
  });
  return {out.loss, out.grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> filter_loss_running(
    const Tensor& x, const Tensor& log_mean, const Tensor& log_ratio, double momentum,
    const std::optional<Tensor>& assigned, const Tensor& offsets, double tau, bool with_grad) {
  const int64_t templates = int64_t{offsets_of_maps(x, "x").positions()} + 1;
  check_shape(log_mean, "log_mean", {x.size(1), templates});
  check_shape(log_ratio, "log_ratio", {x.size(1)});
  STD_TORCH_CHECK(
      log_mean.scalar_type() == accumulate_type(x) && log_ratio.scalar_type() == accumulate_type(x),
      "log_mean, log_ratio: want float32, float64 for float64 maps");
  STD_TORCH_CHECK(momentum > 0 && momentum <= 1, "momentum: got ", momentum, ", want (0, 1]");
  const Tensor means = as_contiguous(log_mean);
  const Tensor ratios = as_contiguous(log_ratio);
  std::optional<Tensor> chosen;
  if (assigned.has_value()) {
    chosen = class_indices(*assigned, "assigned", {x.size(0), x.size(1)}, templates);
  }
  const Outputs out = empty_outputs(x, with_grad);
  Tensor new_mean = torch::stable::clone(means);
  Tensor new_ratio = torch::stable::clone(ratios);
  with_types(x, "x", [&](auto stored, auto sum) {
    using A = decltype(sum);
    RunningEstimates<A> running{};
    running.log_mean = static_cast<const A*>(means.const_data_ptr());
    running.log_ratio = static_cast<const A*>(ratios.const_data_ptr());
    running.momentum = momentum;
    if (chosen.has_value()) {
      running.assigned = static_cast<const int64_t*>(chosen->const_data_ptr());
    }
    running.new_log_mean = static_cast<A*>(new_mean.mutable_data_ptr());
    running.new_log_ratio = static_cast<A*>(new_ratio.mutable_data_ptr());
    run<decltype(stored)>(x, offsets, tau, with_grad, &running, out);
  });
  return {out.loss, out.grad, new_mean, new_ratio};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(picnn_fast, CPU, m) {
  m.impl("filter_loss", TORCH_BOX(&filter_loss));
  m.impl("filter_loss_running", TORCH_BOX(&filter_loss_running));
}

}  // namespace picnn_fast
