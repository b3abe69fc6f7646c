// CPU operators of the masking family: check, allocate, and cut the work for the thread pool.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../common/spatial.h"
#include "../common/stable.h"
#include "capability.h"
#include "maps.h"
#include "masking_kernels.h"
#include "tensors.h"

namespace picnn_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const MaskingKernels& kernels() { return PICNN_FAST_KERNELS_IN_USE(masking_kernels); }

bool is_double(const Tensor& t, const char* name) {
  const bool wide = t.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(wide || t.scalar_type() == ScalarType::Float, name, ": want float32 or float64");
  return wide;
}

void check_like(const Tensor& t, const char* name, const Tensor& features) {
  bool same = t.dim() == features.dim();
  for (int64_t d = 0; same && d < t.dim(); ++d) {
    same = t.size(d) == features.size(d);
  }
  STD_TORCH_CHECK(same, name, ": want the shape of features");
}

ScaleMaps scaling(const Tensor& features, const Tensor& mask, const Tensor& masked) {
  const MapsShape shape = shape_of_maps(features, "features");
  return {shape,
          units_of(shape, torch::stable::get_num_threads()),
          features.const_data_ptr(),
          strides_of_maps(features, "features"),
          mask.const_data_ptr(),
          masked.mutable_data_ptr(),
          strides_of_maps(masked, "masked"),
          exceeds_cache(masked)};
}

std::tuple<Tensor, Tensor, Tensor> bernoulli_mask(const Tensor& features, const Tensor& logits,
                                                  const Tensor& correspondence, const Tensor& seed,
                                                  int64_t rank) {
  const MapsShape shape = shape_of_maps(features, "features");
  const Storage type = storage(features, "features");
  STD_TORCH_CHECK(logits.dim() == 2, "logits: want [batch, classes]");
  const int64_t classes = logits.size(1);
  STD_TORCH_CHECK(classes >= 1, "logits: want at least one class");
  check_shape(logits, "logits", {shape.batch, classes});
  check_shape(correspondence, "correspondence", {classes, shape.filters});
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1,
                  "seed: want one int64");
  const bool double_logits = is_double(logits, "logits");
  const bool double_correspondence = is_double(correspondence, "correspondence");

  const ScalarType mask_type = accumulate_type(features);
  Tensor masked = torch::stable::empty_like(features);
  Tensor mask = torch::stable::new_empty(features, {shape.batch, shape.filters}, mask_type);
  Tensor labels = torch::stable::new_empty(features, {shape.batch}, ScalarType::Long);
  const ScaleMaps scaled = scaling(features, mask, masked);
  const Draw drawn{classes,
                   shape.filters,
                   logits.const_data_ptr(),
                   {logits.stride(0), logits.stride(1)},
                   correspondence.const_data_ptr(),
                   {correspondence.stride(0), correspondence.stride(1)},
                   static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr())),
                   static_cast<uint32_t>(rank),
                   mask.mutable_data_ptr(),
                   static_cast<int64_t*>(labels.mutable_data_ptr())};
  const MaskingKernels& k = kernels();
  const auto draw = [&](int64_t begin, int64_t end, std::vector<int64_t>& scratch) {
    k.draw(drawn, double_logits, double_correspondence, mask_type == ScalarType::Double, begin, end,
           scratch.data());
  };
  // A draw costs about as much as moving four elements.
  const int64_t elements = classes + shape.filters * (4 + shape.positions);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / elements);
  const bool whole_samples = scaled.units.blocks == 1;
  torch::stable::parallel_for(0, shape.batch, grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> scratch(static_cast<size_t>(classes));
    if (!whole_samples) {
      draw(begin, end, scratch);
      return;
    }
    // Sample by sample: the next draws go on while the stores of the last maps drain.
    for (int64_t b = begin; b < end; ++b) {
      draw(b, b + 1, scratch);
      k.scale(scaled, type, /*binary=*/true, b, b + 1);
    }
  });
  if (!whole_samples) {
    parallel_units(shape, scaled.units, [&](int64_t begin, int64_t end) {
      k.scale(scaled, type, /*binary=*/true, begin, end);
    });
  }
  return {masked, mask, labels};
}

Tensor mask_channels(const Tensor& features, const Tensor& mask) {
  const MapsShape shape = shape_of_maps(features, "features");
  const Storage type = storage(features, "features");
  check_shape(mask, "mask", {shape.batch, shape.filters});
  STD_TORCH_CHECK(mask.scalar_type() == accumulate_type(features),
                  "mask: want float32, float64 for float64 features");
  const Tensor rows = torch::stable::contiguous(mask);
  Tensor masked = torch::stable::empty_like(features);
  const ScaleMaps arguments = scaling(features, rows, masked);
  const MaskingKernels& k = kernels();
  parallel_units(shape, arguments.units, [&](int64_t begin, int64_t end) {
    k.scale(arguments, type, /*binary=*/false, begin, end);
  });
  return masked;
}

std::tuple<Tensor, Tensor> masking_backward(const Tensor& grad_masked, const Tensor& features,
                                            const Tensor& mask) {
  const MapsShape shape = shape_of_maps(features, "features");
  const Storage type = storage(features, "features");
  check_like(grad_masked, "grad_masked", features);
  check_shape(mask, "mask", {shape.batch, shape.filters});
  STD_TORCH_CHECK(grad_masked.scalar_type() == features.scalar_type(),
                  "grad_masked: want the dtype of features");
  STD_TORCH_CHECK(mask.scalar_type() == accumulate_type(features),
                  "mask: want float32, float64 for float64 features");
  const Tensor rows = torch::stable::contiguous(mask);
  Tensor grad_features = torch::stable::empty_like(features);
  Tensor grad_mask =
      torch::stable::new_empty(mask, {shape.batch, shape.filters}, accumulate_type(features));
  const MaskingBackward arguments{shape,
                                  units_of(shape, torch::stable::get_num_threads()),
                                  grad_masked.const_data_ptr(),
                                  strides_of_maps(grad_masked, "grad_masked"),
                                  features.const_data_ptr(),
                                  strides_of_maps(features, "features"),
                                  rows.const_data_ptr(),
                                  grad_features.mutable_data_ptr(),
                                  strides_of_maps(grad_features, "grad_features"),
                                  grad_mask.mutable_data_ptr(),
                                  exceeds_cache(grad_features)};
  const MaskingKernels& k = kernels();
  parallel_units(shape, arguments.units,
                 [&](int64_t begin, int64_t end) { k.backward(arguments, type, begin, end); });
  return {grad_features, grad_mask};
}

std::tuple<Tensor, Tensor> bernoulli_parameters_backward(const Tensor& grad_mask,
                                                         const Tensor& logits,
                                                         const Tensor& correspondence,
                                                         const Tensor& pseudo_label) {
  STD_TORCH_CHECK(grad_mask.dim() == 2 && correspondence.dim() == 2,
                  "grad_mask, correspondence: want two axes");
  const int64_t batch = grad_mask.size(0), classes = correspondence.size(0);
  const int64_t filters = correspondence.size(1);
  STD_TORCH_CHECK(classes >= 1, "correspondence: want at least one class");
  check_shape(grad_mask, "grad_mask", {batch, filters});
  check_shape(logits, "logits", {batch, classes});
  const bool wide = is_double(correspondence, "correspondence");
  STD_TORCH_CHECK(grad_mask.scalar_type() == correspondence.scalar_type() &&
                      logits.scalar_type() == correspondence.scalar_type(),
                  "grad_mask, logits: want the dtype of correspondence");
  const Tensor rows = torch::stable::contiguous(grad_mask);
  const Tensor scores = torch::stable::contiguous(logits);
  const Tensor table = torch::stable::contiguous(correspondence);
  const Tensor labels = class_indices(pseudo_label, "pseudo_label", batch, classes);
  const int64_t* label = static_cast<const int64_t*>(labels.const_data_ptr());
  // Up to here the table stays in the second-level cache while every sample passes over it; beyond,
  // the library's matrix product cuts it into blocks.
  constexpr int64_t kTableElements = 1 << 16;
  Tensor product;
  if (classes * filters > kTableElements) {
    // The CPU kernel itself: through the dispatcher, autocast would lower it to bfloat16.
    product = torch::stable::new_empty(rows, {batch, classes});
    const Tensor transposed = torch::stable::transpose(table, 0, 1);
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_mm_out(product.get(), rows.get(), transposed.get()));
  }
  Tensor grad_logits =
      torch::stable::new_empty(logits, {batch, classes}, correspondence.scalar_type());
  Tensor grad_table =
      torch::stable::new_empty(correspondence, {classes, filters}, correspondence.scalar_type());
  const ParametersBackward arguments{batch,
                                     classes,
                                     filters,
                                     rows.const_data_ptr(),
                                     scores.const_data_ptr(),
                                     table.const_data_ptr(),
                                     label,
                                     product.defined() ? product.const_data_ptr() : nullptr,
                                     grad_logits.mutable_data_ptr(),
                                     grad_table.mutable_data_ptr()};
  const MaskingKernels& k = kernels();
  // One parallel region for both: first the samples, then blocks of filters.
  constexpr int64_t kFilters = 64;
  const int64_t units = batch + (filters + kFilters - 1) / kFilters;
  const int64_t elements = std::max<int64_t>(1, classes * (filters + 16));
  torch::stable::parallel_for(
      0, units, std::max<int64_t>(1, kGrainElements / elements), [&](int64_t begin, int64_t end) {
        std::vector<double> scratch(static_cast<size_t>(begin < batch ? classes : 0));
        k.logits_backward(arguments, wide, std::min(begin, batch), std::min(end, batch),
                          scratch.data());
        const int64_t first = (std::max(begin, batch) - batch) * kFilters;
        const int64_t last = (std::max(end, batch) - batch) * kFilters;
        if (first < last) {
          k.correspondence_backward(arguments, wide, first, std::min(last, filters));
        }
      });
  return {grad_logits, grad_table};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(picnn_fast, CPU, m) {
  m.impl("bernoulli_mask", TORCH_BOX(&bernoulli_mask));
  m.impl("mask_channels", TORCH_BOX(&mask_channels));
  m.impl("masking_backward", TORCH_BOX(&masking_backward));
  m.impl("bernoulli_parameters_backward", TORCH_BOX(&bernoulli_parameters_backward));
}

}  // namespace picnn_fast
