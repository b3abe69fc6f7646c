// CUDA operators of the masking family. picnn_fast/reference/masking.py is the definition; how
// blocks go over maps is told in masking_layouts.cuh.

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "launch.h"
#include "maps.h"
#include "masking_backward.cuh"
#include "masking_draw.cuh"
#include "masking_parameters.cuh"
#include "masking_scale.cuh"

#ifndef PICNN_FAST_CUDA_ON_CPU
// Lives in libtorch_cuda, as the stream of launch.h does.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle out,
                                                                       AtenTensorHandle self,
                                                                       AtenTensorHandle mat2);
#define PICNN_FAST_MM_OUT aoti_torch_cuda_mm_out
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#define PICNN_FAST_MM_OUT aoti_torch_cpu_mm_out
#endif

namespace picnn_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// `table` [B, N], or with labels [K, N].
template <typename A>
MaskRows<A> mask_rows(const Tensor& table, const Tensor* labels) {
  MaskRows<A> rows{};
  rows.mask = static_cast<const A*>(table.data_ptr());
  rows.row = table.stride(0);
  rows.column = table.stride(1);
  if (labels != nullptr) {
    rows.labels = static_cast<const int64_t*>(labels->data_ptr());
    rows.label_stride = labels->stride(0);
    rows.classes = table.size(0);
  }
  return rows;
}

template <typename Op, typename Factors>
void scale(const Tensor& features, const Tensor& masked, const Factors& factors) {
  using Value = typename Op::Value;
  using Factor = typename Factors::Factor;
  const int64_t B = features.size(0), N = features.size(1), S = positions(features);
  const Maps<const Value> in = input_maps<Value>(features);
  const Maps<Value> out = output_maps<Value>(masked);
  // 8 to 64 KB of maps a block: the larger, the less the label and the draws weigh, which cost
  // as much as 24 KB do. So 32 KB at least, once every multiprocessor has blocks of that size.
  const int64_t size = sizeof(Value), bytes = B * N * S * size;
  const int64_t least = std::clamp<int64_t>(bytes / kFewBlocks, 8192, 32768);
  const int64_t elements = std::clamp<int64_t>(bytes / (4 * kManyBlocks), least, 65536) / size;
  const int channels = channels_per_block(N, S, elements);
  // Without channels, one block a sample still draws the label.
  const int64_t blocks = B * std::max<int64_t>(ceil_div(N, channels), 1);
  switch (common_layout(features, masked)) {
    case Layout::kRuns:
      launch(features, scale_runs<Op, Value, Factors>, blocks, kThreads, channels * sizeof(Factor),
             factors, in, out, N, static_cast<int>(S), channels);
      break;
    case Layout::kChannelsLast: {
      const int vector = Tile<Value>::kVector;
      const int lanes = tile_lanes(B, N, vector);
      const int splits = static_cast<int>(
          std::clamp<int64_t>(S * lanes * vector / elements, 1, std::max<int64_t>(S, 1)));
      launch(features, scale_channels_last<Op, Value, Factors>,
             B * ceil_div(N, lanes * vector) * splits, kThreads, lanes * vector * sizeof(Factor),
             factors, in, out, N, S, lanes, splits);
      break;
    }
    case Layout::kStrided:
      launch(features, scale_strided<Op, Value, Factors>, blocks, kThreads,
             channels * sizeof(Factor), factors, in, out, N, S, channels, power_of_two(S, 32));
      break;
  }
}

template <typename T>
void backward(const Tensor& grad_masked, const Tensor& features, const Tensor& mask,
              const Tensor& grad_features, const Tensor& grad_mask) {
  using A = Accumulate<T>;
  const int64_t B = features.size(0), N = features.size(1), S = positions(features);
  if (B == 0 || N == 0) return;
  Backward<T> p{};
  p.grad_masked = input_maps<T>(grad_masked);
  p.features = input_maps<T>(features);
  p.grad_features = output_maps<T>(grad_features);
  p.mask = static_cast<const A*>(mask.data_ptr());
  p.mask_batch = mask.stride(0);
  p.mask_channel = mask.stride(1);
  p.grad_mask = static_cast<A*>(grad_mask.data_ptr());
  p.B = B;
  p.N = N;
  p.S = S;
  constexpr int kVector = Tile<T>::kVector;
  switch (common_layout(grad_masked, features, grad_features)) {
    case Layout::kRuns: {
      // One piece of shared memory a block where channels are short, vectors that overhang
      // included.
      const int channels = channels_per_block(N, S, kStaged<A> - kVector);
      const int lanes = power_of_two(S / 8, 32);
      launch(features, backward_runs<T>, B * ceil_div(N, channels), kThreads,
             (kStaged<A> + channels) * sizeof(A), p, channels, lanes);
      break;
    }
    case Layout::kChannelsLast: {
      const int lanes = tile_lanes(B, N, kVector);
      const int64_t blocks = B * ceil_div(N, lanes * kVector);
      // Where blocks are few and positions many: pieces that keep every row of threads busy.
      const int64_t pieces = S * lanes / (kThreads * kUnroll);
      const int splits = static_cast<int>(
          std::clamp<int64_t>(kFewBlocks / blocks, 1, std::max<int64_t>(pieces, 1)));
      Tensor partial = grad_mask;
      if (splits > 1) {
        partial = torch::stable::new_empty(grad_mask, {splits, B, N});
        p.grad_mask = static_cast<A*>(partial.data_ptr());
      }
      launch(features, backward_channels_last<T>, blocks * splits, kThreads,
             kThreads * kVector * sizeof(A), p, lanes, splits);
      if (splits > 1)
        launch(features, add_splits<A>, ceil_div(B * N, kThreads), kThreads, 0,
               static_cast<const A*>(p.grad_mask), splits, B * N,
               static_cast<A*>(grad_mask.data_ptr()));
      break;
    }
    case Layout::kStrided: {
      const int lanes = power_of_two(S, 32);
      launch(features, backward_strided<T>, B * ceil_div(N, kThreads / lanes), kThreads, 0, p,
             lanes);
      break;
    }
  }
}

void check_maps(const Tensor& maps, const char* name) {
  STD_TORCH_CHECK(maps.dim() >= 2, name, ": got ", maps.dim(), " axes, want [B, N, *spatial]");
}
void check_mask(const Tensor& mask, const Tensor& features) {
  check_shape(mask, "mask", {features.size(0), features.size(1)});
  check_accumulate_type(mask, "mask", features);
}

void check_seed(const Tensor& seed, const Tensor& other, const char* other_name) {
  check_device(seed, "seed", other, other_name);
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1,
                  "seed: want one int64");
}

bool is_double(const Tensor& t, const char* name) {
  const bool wide = t.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(wide || t.scalar_type() == ScalarType::Float, name, ": want float32 or float64");
  return wide;
}

Reals reals(const Tensor& t, const char* name) {
  Reals values{};
  values.data = t.data_ptr();
  values.is_double = is_double(t, name);
  values.row = t.stride(0);
  values.column = t.stride(1);
  return values;
}

Tensor draw_labels(const Tensor& logits, const Tensor& seed, int64_t rank) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "logits: want [B, K] with K > 0");
  check_seed(seed, logits, "logits");
  Tensor labels = torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Long);
  launch(logits, label_blocks, logits.size(0), kThreads, 0, reals(logits, "logits"), logits.size(1),
         static_cast<const int64_t*>(seed.data_ptr()), static_cast<uint32_t>(rank),
         static_cast<int64_t*>(labels.data_ptr()));
  return labels;
}

Tensor draw_filters(const Tensor& probabilities, const Tensor& seed, int64_t rank,
                    const std::optional<Tensor>& labels, bool validate) {
  STD_TORCH_CHECK(probabilities.dim() == 2, "probabilities: want two axes, the second of filters");
  check_seed(seed, probabilities, "probabilities");
  int64_t B = probabilities.size(0);
  const int64_t N = probabilities.size(1);
  if (labels.has_value()) {
    B = labels->numel();
    check_device(*labels, "labels", probabilities, "probabilities");
    check_shape(*labels, "labels", {B});
    check_type(*labels, "labels", ScalarType::Long, "int64");
  }
  Tensor mask = torch::stable::new_empty(probabilities, {B, N});
  const bool checks = validate && probabilities.numel() > 0;
  const int64_t blocks = std::max<int64_t>(ceil_div(B * N, kThreads), checks ? 1 : 0);
  const auto draw = [&](auto value) {
    using P = decltype(value);
    launch(probabilities, filter_elements<P>, blocks, kThreads, 0,
           mask_rows<P>(probabilities, labels.has_value() ? &*labels : nullptr), N, B * N,
           validate ? probabilities.size(0) : 0, static_cast<const int64_t*>(seed.data_ptr()),
           static_cast<uint32_t>(rank), static_cast<P*>(mask.data_ptr()));
  };
  is_double(probabilities, "probabilities") ? draw(double{}) : draw(float{});
  return mask;
}

std::tuple<Tensor, Tensor, Tensor> bernoulli_mask(const Tensor& features, const Tensor& logits,
                                                  const Tensor& correspondence, const Tensor& seed,
                                                  int64_t rank, bool validate) {
  check_maps(features, "features");
  const int64_t B = features.size(0), N = features.size(1);
  STD_TORCH_CHECK(correspondence.dim() == 2 && correspondence.size(0) > 0,
                  "correspondence: want [K, N] with K > 0");
  check_device(logits, "logits", features, "features");
  check_device(correspondence, "correspondence", features, "features");
  check_seed(seed, features, "features");
  const int64_t K = correspondence.size(0);
  check_shape(correspondence, "correspondence", {K, N});
  check_shape(logits, "logits", {B, K});
  Tensor masked = torch::stable::empty_like(features);
  Tensor mask = torch::stable::new_empty(features, {B, N}, accumulate_type(features));
  Tensor pseudo_label = torch::stable::new_empty(features, {B}, ScalarType::Long);
  const auto launch_with = [&](auto factors) {
    factors.logits = reals(logits, "logits");
    factors.correspondence = reals(correspondence, "correspondence");
    factors.classes = K;
    factors.filters = N;
    factors.samples = B;
    factors.seed = static_cast<const int64_t*>(seed.data_ptr());
    factors.rank = static_cast<uint32_t>(rank);
    if (mask.scalar_type() == ScalarType::Double) {
      factors.wide_mask = static_cast<double*>(mask.data_ptr());
    } else {
      factors.mask = static_cast<float*>(mask.data_ptr());
    }
    factors.pseudo_label = static_cast<int64_t*>(pseudo_label.data_ptr());
    with_type(features, "features",
              [&](auto value) { scale<Keep<Bits<sizeof(value)>>>(features, masked, factors); });
  };
  validate ? launch_with(BernoulliFactors<true>{}) : launch_with(BernoulliFactors<false>{});
  // No block of an empty batch looks at the table.
  if (validate && B == 0) draw_filters(correspondence, seed, rank, pseudo_label, true);
  return {masked, mask, pseudo_label};
}

Tensor mask_channels(const Tensor& features, const Tensor& mask) {
  check_maps(features, "features");
  check_device(mask, "mask", features, "features");
  check_mask(mask, features);
  Tensor masked = torch::stable::empty_like(features);
  with_type(features, "features", [&](auto value) {
    using T = decltype(value);
    using A = Accumulate<T>;
    MaskFactors<A> factors{};
    factors.rows = mask_rows<A>(mask, nullptr);
    scale<Multiply<T>>(features, masked, factors);
  });
  return masked;
}

std::tuple<Tensor, Tensor> class_gate(const Tensor& features, const Tensor& gate,
                                      const Tensor& labels) {
  check_maps(features, "features");
  check_device(gate, "gate", features, "features");
  check_device(labels, "labels", features, "features");
  STD_TORCH_CHECK(gate.dim() == 2, "gate: want [K, N]");
  check_shape(gate, "gate", {gate.size(0), features.size(1)});
  check_accumulate_type(gate, "gate", features);
  check_shape(labels, "labels", {features.size(0)});
  check_type(labels, "labels", ScalarType::Long, "int64");
  Tensor masked = torch::stable::empty_like(features);
  Tensor rows = torch::stable::new_empty(gate, {features.size(0), features.size(1)});
  with_type(features, "features", [&](auto value) {
    using T = decltype(value);
    using A = Accumulate<T>;
    MaskFactors<A> factors{};
    factors.rows = mask_rows<A>(gate, &labels);
    factors.used = static_cast<A*>(rows.data_ptr());
    factors.filters = features.size(1);
    scale<Multiply<T>>(features, masked, factors);
  });
  return {masked, rows};
}

std::tuple<Tensor, Tensor> masking_backward(const Tensor& grad_masked, const Tensor& features,
                                            const Tensor& mask) {
  check_maps(features, "features");
  check_maps(grad_masked, "grad_masked");
  check_device(grad_masked, "grad_masked", features, "features");
  STD_TORCH_CHECK(grad_masked.dim() == features.dim(), "grad_masked: want the shape of features");
  for (int64_t axis = 0; axis < features.dim(); ++axis)
    STD_TORCH_CHECK(grad_masked.size(axis) == features.size(axis),
                    "grad_masked: want the shape of features");
  STD_TORCH_CHECK(grad_masked.scalar_type() == features.scalar_type(),
                  "grad_masked: want the dtype of features");
  check_device(mask, "mask", features, "features");
  const int64_t B = features.size(0), N = features.size(1);
  check_mask(mask, features);
  Tensor grad_features = torch::stable::empty_like(features);
  Tensor grad_mask = torch::stable::new_empty(mask, {B, N});
  with_type(features, "features", [&](auto value) {
    using T = decltype(value);
    backward<T>(grad_masked, features, mask, grad_features, grad_mask);
  });
  return {grad_features, grad_mask};
}

// Rows [B, N] by label, into [K, N].
template <typename A>
SumByLabel<A> summed(const Tensor& rows, const Tensor& labels, const Tensor& sums) {
  SumByLabel<A> s{};
  s.rows = static_cast<const A*>(rows.data_ptr());
  s.row = rows.stride(0);
  s.column = rows.stride(1);
  s.labels = static_cast<const int64_t*>(labels.data_ptr());
  s.label_stride = labels.stride(0);
  s.B = rows.size(0);
  s.N = rows.size(1);
  s.K = sums.size(0);
  s.sums = static_cast<A*>(sums.data_ptr());
  return s;
}

Tensor sums_by_label(const Tensor& rows, const Tensor& labels, int64_t classes) {
  STD_TORCH_CHECK(rows.dim() == 2, "rows: want two axes");
  check_shape(labels, "labels", {rows.size(0)});
  check_type(labels, "labels", ScalarType::Long, "int64");
  check_device(labels, "labels", rows, "rows");
  Tensor sums = torch::stable::new_empty(rows, {classes, rows.size(1)});
  const auto run = [&](auto value) {
    const auto sum = summed<decltype(value)>(rows, labels, sums);
    launch(rows, sum_by_label<decltype(value)>, sum.blocks(rows.size(1), classes), kThreads, 0,
           sum);
  };
  is_double(rows, "rows") ? run(double{}) : run(float{});
  return sums;
}

template <typename A>
void parameters(const Tensor& grad_mask, const Tensor& logits, const Tensor& correspondence,
                const Tensor& pseudo_label, const Tensor& grad_logits, const Tensor& grad_table) {
  // Beyond, blocks of samples would read the table too often, and the library's product serves.
  constexpr int64_t kTableElements = 1 << 16;
  Parameters<A> p{};
  p.grad_mask = static_cast<const A*>(grad_mask.data_ptr());
  p.mask_row = grad_mask.stride(0);
  p.mask_column = grad_mask.stride(1);
  p.logits = static_cast<const A*>(logits.data_ptr());
  p.logits_row = logits.stride(0);
  p.logits_column = logits.stride(1);
  p.correspondence = static_cast<const A*>(correspondence.data_ptr());
  p.table_row = correspondence.stride(0);
  p.table_column = correspondence.stride(1);
  p.B = grad_mask.size(0);
  p.N = grad_mask.size(1);
  p.K = correspondence.size(0);
  p.grad_logits = static_cast<A*>(grad_logits.data_ptr());
  p.multiplied = correspondence.numel() > kTableElements;
  if (p.multiplied) {
    // The library's kernel itself: through the dispatcher, autocast would lower its precision.
    const Tensor transposed = torch::stable::transpose(correspondence, 0, 1);
    STABLE_TORCH_ERROR_CODE_CHECK(
        PICNN_FAST_MM_OUT(grad_logits.get(), grad_mask.get(), transposed.get()));
  }
  p.table = summed<A>(grad_mask, pseudo_label, grad_table);
  launch(grad_mask, parameters_backward<A>, p.B + p.table.blocks(p.N, p.K), kThreads, 0, p);
}

std::tuple<Tensor, Tensor> bernoulli_parameters_backward(const Tensor& grad_mask,
                                                         const Tensor& logits,
                                                         const Tensor& correspondence,
                                                         const Tensor& pseudo_label) {
  STD_TORCH_CHECK(grad_mask.dim() == 2, "grad_mask: want [B, N]");
  STD_TORCH_CHECK(correspondence.dim() == 2 && correspondence.size(0) > 0,
                  "correspondence: got no class, want [K, N]");
  const int64_t B = grad_mask.size(0), K = correspondence.size(0);
  check_shape(correspondence, "correspondence", {K, grad_mask.size(1)});
  check_shape(logits, "logits", {B, K});
  check_shape(pseudo_label, "pseudo_label", {B});
  check_device(logits, "logits", grad_mask, "grad_mask");
  check_device(correspondence, "correspondence", grad_mask, "grad_mask");
  check_device(pseudo_label, "pseudo_label", grad_mask, "grad_mask");
  check_type(pseudo_label, "pseudo_label", ScalarType::Long, "int64");
  check_type(logits, "logits", grad_mask.scalar_type(), "the dtype of grad_mask");
  check_type(correspondence, "correspondence", grad_mask.scalar_type(), "the dtype of grad_mask");
  Tensor grad_logits = torch::stable::new_empty(logits, {B, K});
  Tensor grad_table = torch::stable::new_empty(correspondence, {K, grad_mask.size(1)});
  const auto run = [&](auto value) {
    parameters<decltype(value)>(grad_mask, logits, correspondence, pseudo_label, grad_logits,
                                grad_table);
  };
  is_double(grad_mask, "grad_mask") ? run(double{}) : run(float{});
  return {grad_logits, grad_table};
}

}  // namespace
}  // namespace picnn_fast

PICNN_FAST_REGISTER_CUDA(m) {
  m.impl("draw_labels", TORCH_BOX(&picnn_fast::draw_labels));
  m.impl("draw_filters", TORCH_BOX(&picnn_fast::draw_filters));
  m.impl("bernoulli_mask", TORCH_BOX(&picnn_fast::bernoulli_mask));
  m.impl("mask_channels", TORCH_BOX(&picnn_fast::mask_channels));
  m.impl("masking_backward", TORCH_BOX(&picnn_fast::masking_backward));
  m.impl("class_gate", TORCH_BOX(&picnn_fast::class_gate));
  m.impl("sums_by_label", TORCH_BOX(&picnn_fast::sums_by_label));
  m.impl("bernoulli_parameters_backward", TORCH_BOX(&picnn_fast::bernoulli_parameters_backward));
}
