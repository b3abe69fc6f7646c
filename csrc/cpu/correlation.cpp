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

const CorrelationKernels& kernels() { return PICNN_FAST_KERNELS_IN_USE(correlation_kernels); }

// The mean map [C, P] turned to [P, C].
template <typename T, typename A>
Tensor by_position(const Tensor& mean, const MapsShape& shape) {
  const CorrelationKernelsOf<T, A>& k = kernels();
  const Tensor turned = allocate({shape.positions, shape.filters}, mean.scalar_type());
  const A* from = static_cast<const A*>(mean.const_data_ptr());
  A* to = static_cast<A*>(turned.mutable_data_ptr());
  constexpr int64_t kFilters = 16;  // a line of floats
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (kFilters * shape.positions + 1));
  torch::stable::parallel_for(
      0, ceil_div(shape.filters, kFilters), grain, [&](int64_t begin, int64_t end) {
        k.by_position(from, shape, begin * kFilters, std::min(end * kFilters, shape.filters), to);
      });
  return turned;
}

// Arguments of both passes as the kernels read them, kept while they do.
struct Arguments {
  MapsShape shape;
  int64_t num_groups;
  int64_t counted;  // images
  Tensor maps, mean, groups;
  std::optional<Tensor> positive, mean_by_position;

  Arguments(const Tensor& maps_given, const Tensor& mean_given, const Tensor& groups_given,
            int64_t groups_wanted, const std::optional<Tensor>& positive_given)
      : num_groups(groups_wanted), maps(maps_given) {
    STD_TORCH_CHECK(maps.dim() == 4, "maps: want [B, C, h, w]");
    check_has_positions(maps, "maps");
    STD_TORCH_CHECK(num_groups >= 0, "num_groups: got ", num_groups, ", want an int >= 0");
    shape = shape_of_maps(maps, "maps");
    check_shape(mean_given, "mean", {maps.size(1), maps.size(2), maps.size(3)});
    STD_TORCH_CHECK(mean_given.scalar_type() == accumulate_type(maps),
                    "mean: want float32, float64 for float64 maps");
    mean = as_contiguous(mean_given);
    groups = class_indices(groups_given, "groups", {shape.filters}, num_groups);
    counted = shape.batch;
    if (positive_given.has_value()) {
      check_shape(*positive_given, "positive", {shape.batch});
      STD_TORCH_CHECK(positive_given->scalar_type() == ScalarType::Bool, "positive: want bool");
      positive = as_contiguous(*positive_given);
      const bool* counts = static_cast<const bool*>(positive->const_data_ptr());
      counted = std::count(counts, counts + shape.batch, true);
    }
  }

  template <typename T, typename A>
  void fill(Correlation<T, A>& c) {
    c.shape = shape;
    c.maps = static_cast<const T*>(maps.const_data_ptr());
    c.maps_strides = strides_of_maps(maps, "maps");
    c.mean = static_cast<const A*>(mean.const_data_ptr());
    if (c.maps_strides.filter == 1 && c.maps_strides.position != 1) {
      mean_by_position = by_position<T, A>(mean, shape);
      c.mean_by_position = static_cast<const A*>(mean_by_position->const_data_ptr());
    }
    c.groups = static_cast<const int64_t*>(groups.const_data_ptr());
    c.num_groups = num_groups;
    if (positive.has_value()) {
      c.positive = static_cast<const bool*>(positive->const_data_ptr());
    }
  }
};

// Runs `kernel(begin, end, scratch)` on all images.
template <typename A, typename Kernel>
void for_images(const MapsShape& shape, int64_t num_groups, const Kernel& kernel) {
  const int64_t elements = std::max<int64_t>(1, shape.filters * shape.positions);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / elements);
  torch::stable::parallel_for(0, shape.batch, grain, [&](int64_t begin, int64_t end) {
    constexpr size_t kLine = 64;
    const auto size = static_cast<size_t>(correlation_scratch(shape, num_groups)) * sizeof(A);
    std::unique_ptr<char[]> memory(new char[size + kLine]);
    const size_t misplaced = reinterpret_cast<uintptr_t>(memory.get()) % kLine;
    kernel(begin, end, reinterpret_cast<A*>(memory.get() + (kLine - misplaced)));
  });
}

// Num and Den of each group from what its images say, and the loss.
template <typename A>
void finish(const Arguments& given, const double* of_images, A* moments, A* loss) {
  const int64_t groups = given.num_groups, filters = given.shape.filters;
  const auto* group_of = static_cast<const int64_t*>(given.groups.const_data_ptr());
  const double batch = std::max<int64_t>(1, given.shape.batch);
  std::vector<double> sums(static_cast<size_t>(2 * groups), 0.0);
  for (int64_t image = 0; image < given.shape.batch; ++image) {
    for (int64_t i = 0; i < 2 * groups; ++i) {
      sums[i] += of_images[image * 2 * groups + i];
    }
  }
  std::vector<double> sizes(static_cast<size_t>(groups), 0.0);
  for (int64_t filter = 0; filter < filters; ++filter) {
    ++sizes[group_of[filter]];
  }
  double total = 0;
  for (int64_t group = 0; group < groups; ++group) {
    const double size = sizes[group];
    const double within = (sums[group] + given.counted * size * size) / batch;
    const double across = (sums[groups + group] + given.counted * size * filters) / batch;
    moments[group] = static_cast<A>(within);
    moments[groups + group] = static_cast<A>(across);
    total += group_loss(within, across);
  }
  *loss = static_cast<A>(total);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_correlation(
    const Tensor& maps, const Tensor& mean, const Tensor& groups, int64_t num_groups,
    const std::optional<Tensor>& positive) {
  Arguments given(maps, mean, groups, num_groups, positive);
  const MapsShape& shape = given.shape;
  const ScalarType type = accumulate_type(maps);
  Tensor loss = allocate({}, type), norms = allocate({shape.batch, shape.filters}, type);
  Tensor sums = allocate({shape.batch, num_groups, shape.positions}, type);
  Tensor moments = allocate({2, num_groups}, type);
  with_types(maps, "maps", [&](auto element, auto sum) {
    using T = decltype(element);
    using A = decltype(sum);
    std::vector<double> of_images(static_cast<size_t>(shape.batch * 2 * num_groups));
    CorrelationForward<T, A> c{};
    given.fill(c);
    c.norms = static_cast<A*>(norms.mutable_data_ptr());
    c.sums = static_cast<A*>(sums.mutable_data_ptr());
    c.moments = of_images.data();
    const CorrelationKernelsOf<T, A>& k = kernels();
    for_images<A>(shape, num_groups, [&](int64_t begin, int64_t end, A* scratch) {
      k.forward(c, begin, end, scratch);
    });
    finish(given, of_images.data(), static_cast<A*>(moments.mutable_data_ptr()),
           static_cast<A*>(loss.mutable_data_ptr()));
  });
  return {loss, norms, sums, moments};
}

// What each group adds to the gradient, from its part of the loss.
template <typename A>
struct GroupGradients {
  std::vector<A> own, total;

  GroupGradients(const A* moments, int64_t groups, A scale) {
    for (int64_t group = 0; group < groups; ++group) {
      const auto gradient = group_gradient(moments[group], moments[groups + group], scale);
      own.push_back(gradient.own);
      total.push_back(gradient.total);
    }
  }
};

Tensor group_correlation_backward(const Tensor& grad_loss, const Tensor& maps, const Tensor& mean,
                                  const Tensor& groups, const std::optional<Tensor>& positive,
                                  const Tensor& norms, const Tensor& sums, const Tensor& moments) {
  STD_TORCH_CHECK(moments.dim() == 2, "moments: want [2, num_groups]");
  Arguments given(maps, mean, groups, moments.size(1), positive);
  const MapsShape& shape = given.shape;
  check_shape(grad_loss, "grad_loss", {});
  check_shape(norms, "norms", {shape.batch, shape.filters});
  check_shape(sums, "sums", {shape.batch, given.num_groups, shape.positions});
  check_shape(moments, "moments", {2, given.num_groups});
  for (const Tensor* t : {&grad_loss, &norms, &sums, &moments}) {
    STD_TORCH_CHECK(t->scalar_type() == accumulate_type(maps),
                    "grad_loss, norms, sums, moments: want float32, float64 for float64 maps");
  }
  const Tensor own_norms = as_contiguous(norms);
  const Tensor own_sums = as_contiguous(sums);
  const Tensor own_moments = as_contiguous(moments);
  Tensor grad = allocate_like(maps);
  with_types(maps, "maps", [&](auto element, auto sum) {
    using T = decltype(element);
    using A = decltype(sum);
    const A scale = *static_cast<const A*>(grad_loss.const_data_ptr()) /
                    static_cast<A>(std::max<int64_t>(1, shape.batch));
    const GroupGradients<A> gradients(static_cast<const A*>(own_moments.const_data_ptr()),
                                      given.num_groups, scale);
    CorrelationBackward<T, A> c{};
    given.fill(c);
    c.norms = static_cast<const A*>(own_norms.const_data_ptr());
    c.sums = static_cast<const A*>(own_sums.const_data_ptr());
    c.own = gradients.own.data();
    c.total = gradients.total.data();
    c.grad = static_cast<T*>(grad.mutable_data_ptr());
    c.grad_strides = strides_of_maps(grad, "grad");
    c.stream = exceeds_cache(grad);
    const CorrelationKernelsOf<T, A>& k = kernels();
    for_images<A>(shape, given.num_groups, [&](int64_t begin, int64_t end, A* scratch) {
      k.backward(c, begin, end, scratch);
    });
  });
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(picnn_fast, CPU, m) {
  m.impl("group_correlation", TORCH_BOX(&group_correlation));
  m.impl("group_correlation_backward", TORCH_BOX(&group_correlation_backward));
}

}  // namespace picnn_fast
