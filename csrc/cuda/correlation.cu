// CUDA operators of the correlation family. picnn_fast/reference/correlation.py is the definition.
// Every sum is added up in a fixed order.

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <utility>

#include "correlation_gradient.cuh"
#include "correlation_loss.cuh"
#include "correlation_problem.cuh"
#include "correlation_sums.cuh"
#include "launch.h"
#include "maps.h"

namespace picnn_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What the kernels read that must be contiguous, kept until they are launched.
struct Arguments {
  Tensor mean, groups;
  std::optional<Tensor> positive;
};

Arguments check(const Tensor& maps, const Tensor& mean, const Tensor& groups,
                const std::optional<Tensor>& positive) {
  STD_TORCH_CHECK(maps.dim() == 4, "maps: got ", maps.dim(), " axes, want [B, C, h, w]");
  check_has_positions(maps, "maps");
  check_device(mean, "mean", maps, "maps");
  check_device(groups, "groups", maps, "maps");
  check_shape(mean, "mean", {maps.size(1), maps.size(2), maps.size(3)});
  check_accumulate_type(mean, "mean", maps);
  check_shape(groups, "groups", {maps.size(1)});
  check_type(groups, "groups", ScalarType::Long, "int64");
  Arguments made{torch::stable::contiguous(mean), torch::stable::contiguous(groups), {}};
  if (positive.has_value()) {
    check_device(*positive, "positive", maps, "maps");
    check_shape(*positive, "positive", {maps.size(0)});
    check_type(*positive, "positive", ScalarType::Bool, "bool");
    made.positive = torch::stable::contiguous(*positive);
  }
  return made;
}

template <typename T>
Problem<T> problem(const Tensor& maps, const Arguments& given, const Tensor& norms,
                   const Tensor& sums) {
  using A = Accumulate<T>;
  Problem<T> q{};
  q.in = input_maps<T>(maps);
  q.mean = static_cast<const A*>(given.mean.data_ptr());
  q.groups = static_cast<const int64_t*>(given.groups.data_ptr());
  if (given.positive) q.positive = static_cast<const bool*>(given.positive->data_ptr());
  q.norms = static_cast<A*>(norms.data_ptr());
  q.sums = static_cast<A*>(sums.data_ptr());
  q.B = maps.size(0);
  q.N = maps.size(1);
  q.G = sums.size(1);
  q.P = positions(maps);
  return q;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_correlation(
    const Tensor& maps, const Tensor& mean, const Tensor& groups, int64_t num_groups,
    const std::optional<Tensor>& positive) {
  const Arguments given = check(maps, mean, groups, positive);
  STD_TORCH_CHECK(num_groups >= 0, "num_groups: got ", num_groups, ", want 0 or more");
  const int64_t B = maps.size(0), N = maps.size(1), G = num_groups, P = positions(maps);
  const ScalarType type = accumulate_type(maps);
  Tensor loss = torch::stable::new_empty(maps, {}, type);
  Tensor norms = torch::stable::new_empty(maps, {B, N}, type);
  Tensor sums = torch::stable::new_empty(maps, {B, G, P}, type);
  Tensor moments = torch::stable::new_empty(maps, {2, G}, type);
  Tensor of_images = torch::stable::new_empty(maps, {B, 2, G}, type);
  with_type(maps, "maps", [&](auto value) {
    using T = decltype(value);
    using A = Accumulate<T>;
    const Problem<T> q = problem<T>(maps, given, norms, sums);
    if (P <= 64) {
      launch(maps, sum_groups<T, 2, true>, B * G, kThreads, 0, q);
    } else if (P <= 256) {
      launch(maps, sum_groups<T, 8, true>, B * G, kThreads, 0, q);
    } else {
      launch(maps, find_norms<T>, ceil_div(B * N, kWarps), kThreads, 0, q);
      launch(maps, sum_groups<T, 8, false>, B * G * ceil_div(P, 256), kThreads, 0, q);
    }
    auto* images = static_cast<A*>(of_images.data_ptr());
    if (G > 0)
      launch(maps, find_moments<A>, B, kThreads, 0, static_cast<const A*>(sums.data_ptr()), images,
             G, P);
    launch(maps, finish<T>, 1, kThreads, 0, q, static_cast<const A*>(images),
           static_cast<A*>(moments.data_ptr()), static_cast<A*>(loss.data_ptr()));
  });
  return {loss, norms, sums, moments};
}

Tensor group_correlation_backward(const Tensor& grad_loss, const Tensor& maps, const Tensor& mean,
                                  const Tensor& groups, const std::optional<Tensor>& positive,
                                  const Tensor& norms, const Tensor& sums, const Tensor& moments) {
  const Arguments given = check(maps, mean, groups, positive);
  const int64_t B = maps.size(0), N = maps.size(1), P = positions(maps);
  STD_TORCH_CHECK(moments.dim() == 2 && moments.size(0) == 2, "moments: want [2, num_groups]");
  const int64_t G = moments.size(1);
  check_shape(norms, "norms", {B, N});
  check_shape(sums, "sums", {B, G, P});
  check_shape(grad_loss, "grad_loss", {});
  const std::pair<const Tensor*, const char*> others[] = {
      {&grad_loss, "grad_loss"}, {&norms, "norms"}, {&sums, "sums"}, {&moments, "moments"}};
  for (const auto& [tensor, name] : others) {
    check_device(*tensor, name, maps, "maps");
    check_accumulate_type(*tensor, name, maps);
  }
  Tensor grad = torch::stable::empty_like(maps);
  if (B == 0 || N == 0) return grad;
  const Tensor own_norms = torch::stable::contiguous(norms);
  const Tensor own_sums = torch::stable::contiguous(sums);
  const Tensor own_moments = torch::stable::contiguous(moments);
  const Tensor weights = torch::stable::empty_like(own_sums);
  with_type(maps, "maps", [&](auto value) {
    using T = decltype(value);
    using A = Accumulate<T>;
    const Problem<T> q = problem<T>(maps, given, own_norms, own_sums);
    const Maps<T> out = output_maps<T>(grad);
    const bool columns = N > 1 && P > 1 && q.in.channel == 1 && q.in.position != 1;
    Toward<A> toward{};
    toward.data = static_cast<A*>(weights.data_ptr());
    toward.group = columns ? 1 : P;
    toward.position = columns ? G : 1;
    launch(maps, group_gradients<A>, ceil_div(B * P, kThreads), kThreads, 0,
           static_cast<const A*>(own_sums.data_ptr()),
           static_cast<const A*>(own_moments.data_ptr()),
           static_cast<const A*>(grad_loss.data_ptr()), toward, B, G, P);
    if (columns) {
      int lanes = 128 / sizeof(T);  // one line of memory
      while (lanes / 2 >= N) lanes /= 2;
      launch(maps, gradient_columns<T>, B * ceil_div(N, lanes), kThreads, 0, q, toward, out, lanes);
    } else if (P <= 64) {
      launch(maps, gradient_rows<T, 2>, ceil_div(B * N, kWarps), kThreads, 0, q, toward, out);
    } else {
      launch(maps, gradient_rows<T, 8>, ceil_div(B * N, kWarps), kThreads, 0, q, toward, out);
    }
  });
  return grad;
}

}  // namespace
}  // namespace picnn_fast

PICNN_FAST_REGISTER_CUDA(m) {
  m.impl("group_correlation", TORCH_BOX(&picnn_fast::group_correlation));
  m.impl("group_correlation_backward", TORCH_BOX(&picnn_fast::group_correlation_backward));
}
