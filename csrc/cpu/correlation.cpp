// CPU operators of the correlation family. picnn_fast/reference/correlation.py is the definition.
//
// A thread works on whole images, in the cache: map by map, or where filters are neighbours in
// memory (channels_last) vector by vector of filters, each at one position.
#include "../common/correlation.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "capability.h"
#include "correlation_kernels.h"
#include "maps.h"
#include "tensors.h"

namespace picnn_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Arguments of both passes, the tensors kept where they had to be made anew.
struct Arguments {
  Correlation c{};
  Storage type;
  int64_t counted;  // images
  Tensor mean, mean_by_position, groups;
  std::optional<Tensor> positive;

  Arguments(const Tensor& maps, const Tensor& mean_given, const Tensor& groups_given,
            int64_t num_groups, const std::optional<Tensor>& positive_given)
      : type(storage(maps, "maps")) {
    STD_TORCH_CHECK(maps.dim() == 4, "maps: want [B, C, h, w]");
    STD_TORCH_CHECK(num_groups >= 0, "num_groups: got ", num_groups, ", want an int >= 0");
    c.shape = shape_of_maps(maps, "maps");
    c.maps = maps.const_data_ptr();
    c.maps_strides = strides_of_maps(maps, "maps");
    check_shape(mean_given, "mean", {maps.size(1), maps.size(2), maps.size(3)});
    STD_TORCH_CHECK(mean_given.scalar_type() == accumulate_type(maps),
                    "mean: want float32, float64 for float64 maps");
    mean = torch::stable::contiguous(mean_given);
    c.mean = mean.const_data_ptr();
    groups = class_indices(groups_given, "groups", c.shape.filters, num_groups);
    c.groups = static_cast<const int64_t*>(groups.const_data_ptr());
    c.num_groups = num_groups;
    if (c.maps_strides.filter == 1 && c.maps_strides.position != 1) {
      transpose_mean();
    }
    counted = c.shape.batch;
    if (positive_given.has_value()) {
      check_shape(*positive_given, "positive", {c.shape.batch});
      STD_TORCH_CHECK(positive_given->scalar_type() == ScalarType::Bool, "positive: want bool");
      positive = torch::stable::contiguous(*positive_given);
      c.positive = static_cast<const bool*>(positive->const_data_ptr());
      counted = std::count(c.positive, c.positive + c.shape.batch, true);
    }
  }

 private:
  void transpose_mean() {
    mean_by_position = torch::stable::new_empty(mean, {c.shape.positions, c.shape.filters});
    c.mean_by_position = mean_by_position.const_data_ptr();
    if (type == Storage::kDouble) {
      transpose_to(static_cast<double*>(mean_by_position.mutable_data_ptr()));
    } else {
      transpose_to(static_cast<float*>(mean_by_position.mutable_data_ptr()));
    }
  }

  template <typename A>
  void transpose_to(A* to) const {
    const auto [batch, filters, positions] = c.shape;
    const A* from = static_cast<const A*>(c.mean);
    constexpr int64_t kSquare = 16;  // a line of floats each way
    const int64_t grain = std::max<int64_t>(1, kGrainElements / (kSquare * positions + 1));
    const auto squares = [&, filters = filters, positions = positions](int64_t begin, int64_t end) {
      const int64_t last = std::min(end * kSquare, filters);
      for (int64_t i = begin * kSquare; i < last; i += kSquare) {
        for (int64_t p = 0; p < positions; ++p) {
          for (int64_t j = i; j < std::min(i + kSquare, last); ++j) {
            to[p * filters + j] = from[j * positions + p];
          }
        }
      }
    };
    torch::stable::parallel_for(0, (filters + kSquare - 1) / kSquare, grain, squares);
  }
};

template <typename Kernel>
void run(const Correlation& c, Storage type, Kernel kernel) {
  const int64_t elements = std::max<int64_t>(1, c.shape.filters * c.shape.positions);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / elements);
  torch::stable::parallel_for(0, c.shape.batch, grain, [&](int64_t begin, int64_t end) {
    constexpr size_t kLine = 64;
    const size_t size = type == Storage::kDouble ? sizeof(double) : sizeof(float);
    const auto bytes = static_cast<size_t>(correlation_scratch(c)) * size;
    std::unique_ptr<char[]> memory(new char[bytes + kLine]);
    const size_t misplaced = reinterpret_cast<uintptr_t>(memory.get()) % kLine;
    kernel(c, type, begin, end, memory.get() + (kLine - misplaced));
  });
}

// Num and Den of each group from what its images say, and the loss.
template <typename A>
void finish(const Correlation& c, int64_t counted, A* moments, A* loss) {
  const int64_t groups = c.num_groups, batch = std::max<int64_t>(1, c.shape.batch);
  std::vector<double> sums(static_cast<size_t>(2 * groups), 0.0);
  for (int64_t image = 0; image < c.shape.batch; ++image) {
    for (int64_t i = 0; i < 2 * groups; ++i) {
      sums[i] += c.moments[image * 2 * groups + i];
    }
  }
  std::vector<double> sizes(static_cast<size_t>(groups), 0.0);
  for (int64_t filter = 0; filter < c.shape.filters; ++filter) {
    ++sizes[c.groups[filter]];
  }
  double total = 0;
  for (int64_t group = 0; group < groups; ++group) {
    const double size = sizes[group], filters = static_cast<double>(c.shape.filters);
    const double within = (sums[group] + counted * size * size) / batch;
    const double across = (sums[groups + group] + counted * size * filters) / batch;
    moments[group] = static_cast<A>(within);
    moments[groups + group] = static_cast<A>(across);
    total += group_loss(within, across);
  }
  *loss = static_cast<A>(total);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_correlation(
    const Tensor& maps, const Tensor& mean, const Tensor& groups, int64_t num_groups,
    const std::optional<Tensor>& positive) {
  Arguments arguments(maps, mean, groups, num_groups, positive);
  Correlation& c = arguments.c;
  const ScalarType type = accumulate_type(maps);
  const auto empty = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(maps, sizes, type);
  };
  Tensor loss = empty({}), norms = empty({c.shape.batch, c.shape.filters});
  Tensor sums = empty({c.shape.batch, num_groups, c.shape.positions});
  Tensor moments = empty({2, num_groups});
  std::vector<double> of_images(static_cast<size_t>(c.shape.batch * 2 * num_groups));
  c.norms = norms.mutable_data_ptr();
  c.sums = sums.mutable_data_ptr();
  c.moments = of_images.data();
  run(c, arguments.type, PICNN_FAST_KERNELS_IN_USE(correlation_kernels).forward);
  if (type == ScalarType::Double) {
    finish(c, arguments.counted, static_cast<double*>(moments.mutable_data_ptr()),
           static_cast<double*>(loss.mutable_data_ptr()));
  } else {
    finish(c, arguments.counted, static_cast<float*>(moments.mutable_data_ptr()),
           static_cast<float*>(loss.mutable_data_ptr()));
  }
  return {loss, norms, sums, moments};
}

template <typename A>
void run_backward(Correlation& c, Storage type, const Tensor& moments, const Tensor& grad_loss) {
  const auto* of_groups = static_cast<const A*>(moments.const_data_ptr());
  const A scale = *static_cast<const A*>(grad_loss.const_data_ptr()) /
                  static_cast<A>(std::max<int64_t>(1, c.shape.batch));
  std::vector<A> own, total;
  for (int64_t group = 0; group < c.num_groups; ++group) {
    const auto gradient = group_gradient(of_groups[group], of_groups[c.num_groups + group], scale);
    own.push_back(gradient.own);
    total.push_back(gradient.total);
  }
  c.own = own.data();
  c.total = total.data();
  run(c, type, PICNN_FAST_KERNELS_IN_USE(correlation_kernels).backward);
}

Tensor group_correlation_backward(const Tensor& grad_loss, const Tensor& maps, const Tensor& mean,
                                  const Tensor& groups, const std::optional<Tensor>& positive,
                                  const Tensor& norms, const Tensor& sums, const Tensor& moments) {
  STD_TORCH_CHECK(moments.dim() == 2, "moments: want [2, num_groups]");
  Arguments arguments(maps, mean, groups, moments.size(1), positive);
  Correlation& c = arguments.c;
  check_shape(grad_loss, "grad_loss", {});
  check_shape(norms, "norms", {c.shape.batch, c.shape.filters});
  check_shape(sums, "sums", {c.shape.batch, c.num_groups, c.shape.positions});
  check_shape(moments, "moments", {2, c.num_groups});
  for (const Tensor* t : {&grad_loss, &norms, &sums, &moments}) {
    STD_TORCH_CHECK(t->scalar_type() == accumulate_type(maps),
                    "grad_loss, norms, sums, moments: want float32, float64 for float64 maps");
  }
  const Tensor own_norms = torch::stable::contiguous(norms);
  const Tensor own_sums = torch::stable::contiguous(sums);
  const Tensor own_moments = torch::stable::contiguous(moments);
  Tensor grad = torch::stable::empty_like(maps);
  c.norms = const_cast<void*>(own_norms.const_data_ptr());
  c.sums = const_cast<void*>(own_sums.const_data_ptr());
  c.grad = grad.mutable_data_ptr();
  c.grad_strides = strides_of_maps(grad, "grad");
  c.stream = exceeds_cache(grad);
  if (arguments.type == Storage::kDouble) {
    run_backward<double>(c, arguments.type, own_moments, grad_loss);
  } else {
    run_backward<float>(c, arguments.type, own_moments, grad_loss);
  }
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(picnn_fast, CPU, m) {
  m.impl("group_correlation", TORCH_BOX(&group_correlation));
  m.impl("group_correlation_backward", TORCH_BOX(&group_correlation_backward));
}

}  // namespace picnn_fast
