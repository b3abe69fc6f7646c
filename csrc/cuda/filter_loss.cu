// CUDA operators of the filter loss. picnn_fast/reference/filter_loss.py is the definition.
//
// For one filter, the maps [B, P] times the templates [P, P + 1] give the responses s, of which
// come the statistics of each template (over the batch) and of each sample (over the templates),
// the weights ds, and, times the templates again, the gradient. Responses never leave a block:
// filter_loss_resident.cuh where it holds a whole filter, filter_loss_tiled.cuh elsewhere.

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>

#include "../common/read_template.h"
#include "filter_loss_products.cuh"
#include "filter_loss_resident.cuh"
#include "filter_loss_statistics.cuh"
#include "filter_loss_tiled.cuh"
#include "launch.h"
#include "maps.h"

namespace picnn_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// How many groups the warps of a resident block divide the columns into, and how many tiles of
// columns a warp has at most: the least time, and of equals the most columns a warp.
struct Division {
  int groups, tiles;
};
Division divide(int64_t B, int depth) {
  const int64_t strips = ceil_div(B, kStrip), all = depth / kUnit;
  Division best{};
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int groups = 1; groups <= kWarps; groups *= 2) {
    const int64_t tiles = ceil_div(all, groups), time = ceil_div(strips * groups, kWarps) * tiles;
    if (tiles > kMostTiles || time >= least) continue;
    least = time;
    best = {groups, static_cast<int>(tiles)};
  }
  return best;  // no groups: too many columns
}

template <typename T>
void run_tiled(const Tensor& x, const Problem<T>& p) {
  using A = Accumulate<T>;
  const int64_t B = p.B, N = p.N, templates = p.part.offsets.positions() + 1;
  const ScalarType type = accumulate_type(x);
  const int64_t count = p.part.offsets.count();
  const Tensor values = torch::stable::new_empty(
      x, {count * static_cast<int64_t>(sizeof(Entry<A>) / sizeof(A))}, type);
  const Tensor unfit = torch::stable::new_zeros(x, {1}, ScalarType::Int);
  const Tensor negative = torch::stable::new_empty(x, {N, B}, type);
  const Tensor column = torch::stable::new_empty(x, {N, templates}, type);
  const bool running = p.running.new_log_mean != nullptr;
  const Tensor row = torch::stable::new_empty(x, {N, running ? 1 : B}, type);
  const Tensor sums = torch::stable::new_empty(x, {N, templates}, type);
  Statistics<A> s{};
  s.values = static_cast<Entry<A>*>(values.data_ptr());
  s.unfit = static_cast<int*>(unfit.data_ptr());
  s.negative = static_cast<A*>(negative.data_ptr());
  s.column = static_cast<A*>(column.data_ptr());
  s.row = static_cast<A*>(row.data_ptr());
  s.sums = static_cast<A*>(sums.data_ptr());
  TileShape<A> shape{4};
  while (shape.down > 1 && shape.down / 2 * kStrip >= B) shape.down /= 2;
  const auto shared = static_cast<size_t>(shape.bytes());
  const int64_t in_columns = N * ceil_div(templates, shape.columns());
  const int64_t in_rows = N * ceil_div(B, shape.rows());
  launch(x, template_values<A>, ceil_div(count, kThreads), kThreads, 0, p.part, p.tau, s);
  launch(x, negative_responses<T>, ceil_div(B * N, kWarps), kThreads, 0, p, s);
  launch(x, tiled_columns<T, false>, in_columns, kThreads, shared, p, s, shape);
  if (running)
    launch(x, renew_estimates<T>, N, kThreads, 0, p, s);
  else
    launch(x, tiled_rows<T>, in_rows, kThreads, shared, p, s, shape);
  launch(x, tiled_columns<T, true>, in_columns, kThreads, shared, p, s, shape);
  launch(x, filter_losses<T>, N, kThreads, 0, p, s);
  if (p.grad.data != nullptr) launch(x, tiled_gradient<T>, in_rows, kThreads, shared, p, s, shape);
}

template <typename T>
void run(const Tensor& x, const Problem<T>& p) {
  using A = Accumulate<T>;
  const int64_t bytes = Resident<A>::bytes(p.part.offsets, p.B);
  const Division division = divide(p.B, Resident<A>::depth(p.part.offsets));
  if (division.groups == 0 || bytes > most_shared_bytes(x))
    run_tiled(x, p);
  else if (division.tiles <= kMostTiles / 2)
    launch(x, resident_filter<T, kMostTiles / 2>, p.N, kThreads, bytes, p, division.groups);
  else
    launch(x, resident_filter<T, kMostTiles>, p.N, kThreads, bytes, p, division.groups);
}

// Of x's shape and layout, in the type of its sums.
Tensor empty_gradient(const Tensor& x) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(x),
                                    from(std::optional<ScalarType>(accumulate_type(x))),
                                    from(std::nullopt),
                                    from(std::nullopt),
                                    from(std::nullopt),
                                    from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

struct Results {
  Tensor loss, grad;
};

// `set_running` fills in the arguments of the running form.
template <typename SetRunning>
Results filter_loss(const Tensor& x, const Tensor& offsets, double tau, bool with_grad,
                    bool running, const SetRunning& set_running) {
  offsets_of_maps(x, "x");
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const int64_t B = x.size(0), N = x.size(1);
  STD_TORCH_CHECK(B <= kMost, "x: got ", B, " samples, want fewer than 2^31");
  const Tensor loss = torch::stable::new_empty(x, {N}, accumulate_type(x));
  const Tensor grad =
      with_grad ? empty_gradient(x) : torch::stable::new_empty(x, {0}, accumulate_type(x));
  with_type(x, "x", [&](auto value) {
    using T = decltype(value);
    using A = Accumulate<T>;
    const auto part = read_template<A>(x, "x", offsets);
    STD_TORCH_CHECK(part.offsets.count() <= kMost, "x: got maps ", x.size(2), " x ", x.size(3),
                    ", want fewer than 2^31 offsets");
    const double templates = static_cast<double>(x.size(2) * x.size(3) + 1);
    Problem<T> p{};
    p.x = input_maps<T>(x);
    if (with_grad) p.grad = output_maps<A>(grad);
    p.B = B;
    p.N = N;
    p.part = part;
    p.tau = static_cast<A>(tau);
    const double samples = running ? static_cast<double>(std::max<int64_t>(B, 1)) : 1.0;
    p.scale = static_cast<A>(1 / (templates * samples));
    p.loss = static_cast<A*>(loss.data_ptr());
    set_running(p.running);
    run(x, p);
  });
  return {loss, grad};
}

std::tuple<Tensor, Tensor> batch_filter_loss(const Tensor& x, const Tensor& offsets, double tau,
                                             bool with_grad) {
  const Results results = filter_loss(x, offsets, tau, with_grad, false, [](const auto&) {});
  return {results.loss, results.grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> running_filter_loss(
    const Tensor& x, const Tensor& log_mean, const Tensor& log_ratio, double momentum,
    const std::optional<Tensor>& assigned, const Tensor& offsets, double tau, bool with_grad) {
  offsets_of_maps(x, "x");
  const int64_t B = x.size(0), N = x.size(1), templates = x.size(2) * x.size(3) + 1;
  check_device(log_mean, "log_mean", x, "x");
  check_device(log_ratio, "log_ratio", x, "x");
  check_shape(log_mean, "log_mean", {N, templates});
  check_accumulate_type(log_mean, "log_mean", x);
  check_shape(log_ratio, "log_ratio", {N});
  check_accumulate_type(log_ratio, "log_ratio", x);
  STD_TORCH_CHECK(0 < momentum && momentum <= 1, "momentum: got ", momentum, ", want (0, 1]");
  if (assigned.has_value()) {
    check_device(*assigned, "assigned", x, "x");
    check_shape(*assigned, "assigned", {B, N});
    check_type(*assigned, "assigned", ScalarType::Long, "int64");
  }
  const Tensor new_log_mean =
      torch::stable::new_empty(log_mean, {log_mean.size(0), log_mean.size(1)});
  const Tensor new_log_ratio = torch::stable::new_empty(log_ratio, {log_ratio.size(0)});
  const auto set_running = [&](auto& running) {
    using A = std::remove_reference_t<decltype(*running.new_log_mean)>;
    running.log_mean = static_cast<const A*>(log_mean.data_ptr());
    running.mean_filter = log_mean.stride(0);
    running.mean_template = log_mean.stride(1);
    running.log_ratio = static_cast<const A*>(log_ratio.data_ptr());
    running.ratio_filter = log_ratio.stride(0);
    running.new_log_mean = static_cast<A*>(new_log_mean.data_ptr());
    running.new_mean_filter = new_log_mean.stride(0);
    running.new_mean_template = new_log_mean.stride(1);
    running.new_log_ratio = static_cast<A*>(new_log_ratio.data_ptr());
    running.new_ratio_filter = new_log_ratio.stride(0);
    running.log_kept = static_cast<A>(std::log1p(-momentum));
    running.log_taken = static_cast<A>(std::log(momentum));
    running.replaces = momentum == 1;
    if (!assigned.has_value()) return;
    running.assigned = static_cast<const int64_t*>(assigned->data_ptr());
    running.assigned_batch = assigned->stride(0);
    running.assigned_filter = assigned->stride(1);
  };
  const Results results = filter_loss(x, offsets, tau, with_grad, true, set_running);
  return {results.loss, results.grad, new_log_mean, new_log_ratio};
}

}  // namespace
}  // namespace picnn_fast

PICNN_FAST_REGISTER_CUDA(m) {
  m.impl("filter_loss", TORCH_BOX(&picnn_fast::batch_filter_loss));
  m.impl("filter_loss_running", TORCH_BOX(&picnn_fast::running_filter_loss));
}
