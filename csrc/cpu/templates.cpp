// CPU operators of the template family. picnn_fast/reference/templates.py is the definition.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/template_arguments.h"
#include "capability.h"
#include "maps.h"
#include "template_panels.h"
#include "tensors.h"

namespace picnn_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename A>
void run(TemplateMask& s, const Template<A>& part, Storage type) {
  if (s.shape.batch == 0 || s.shape.filters == 0) {
    return;
  }
  s.part = &part;
  s.width = part.width;
  std::vector<A> masks;
  if (!s.side_by_side) {
    const A scale = static_cast<A>(s.scale);
    s.layout = panel_layout(part.height, part.width);
    masks = panels<A>(s.layout, [&](int32_t di, int32_t dj) {
      return mask_value(template_value(part, di, dj), scale);
    });
    s.masks = masks.data();
  }
  const TemplatesKernels& kernels = PICNN_FAST_KERNELS_IN_USE(templates_kernels);
  parallel_units(s.shape, s.units,
                 [&](int64_t begin, int64_t end) { kernels.mask(s, type, begin, end); });
}

// Filters of a unit. Those side by side are gone through twice to find their peaks, and the next
// ones are fetched meanwhile: both are to fit the second level of cache.
int64_t most_filters(const TemplateMask& s, int64_t element_size) {
  constexpr int64_t kHalfCache = 400 << 10, kLeast = 64;
  if (!s.side_by_side || !s.find_peak) {
    return s.side_by_side ? kFiltersAtOnce : s.shape.filters;
  }
  const int64_t bytes = element_size * std::max<int64_t>(1, s.shape.positions);
  return std::clamp(kHalfCache / bytes / kLeast * kLeast, kLeast, kFiltersAtOnce);
}

// Masks `x` into what is returned, by the peaks it finds or those it is given.
Tensor mask(const Tensor& x, const Tensor& peak, bool find_peak, const std::optional<Tensor>& table,
            int64_t profile, int64_t norm, double slope, int64_t limit, double scale) {
  const Storage type = storage(x, "x");
  Tensor out = torch::stable::empty_like(x);
  TemplateMask s{};
  s.shape = shape_of_maps(x, "x");
  s.maps = x.const_data_ptr();
  s.maps_strides = strides_of_maps(x, "x");
  s.find_peak = find_peak;
  s.peak = static_cast<int64_t*>(peak.mutable_data_ptr());
  s.scale = scale;
  s.out = out.mutable_data_ptr();
  s.out_strides = strides_of_maps(out, "masked");
  s.side_by_side = s.shape.filters > 1 && s.maps_strides.filter == 1 && s.out_strides.filter == 1;
  s.units = units_of(s.shape, torch::stable::get_num_threads(), most_filters(s, x.element_size()));
  s.stream = exceeds_cache(out);
  if (type == Storage::kDouble) {
    run(s, read_template<double>(x, table, profile, norm, slope, limit), type);
  } else {
    run(s, read_template<float>(x, table, profile, norm, slope, limit), type);
  }
  return out;
}

std::tuple<Tensor, Tensor> template_mask(const Tensor& x, const std::optional<Tensor>& table,
                                         int64_t profile, int64_t norm, double slope, int64_t limit,
                                         double scale) {
  STD_TORCH_CHECK(x.dim() == 4, "x: want maps [B, N, h, w]");
  const Tensor peak = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Long);
  return {mask(x, peak, /*find_peak=*/true, table, profile, norm, slope, limit, scale), peak};
}

Tensor template_mask_backward(const Tensor& grad_masked, const Tensor& peak,
                              const std::optional<Tensor>& table, int64_t profile, int64_t norm,
                              double slope, int64_t limit, double scale) {
  STD_TORCH_CHECK(grad_masked.dim() == 4, "grad_masked: want maps [B, N, h, w]");
  const MapsShape shape = shape_of_maps(grad_masked, "grad_masked");
  check_shape(peak, "peak", {shape.batch, shape.filters});
  const int64_t count = shape.batch * shape.filters;
  const Tensor peaks = class_indices(torch::stable::view(torch::stable::contiguous(peak), {count}),
                                     "peak", count, shape.positions);
  return mask(grad_masked, peaks, /*find_peak=*/false, table, profile, norm, slope, limit, scale);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(picnn_fast, CPU, m) {
  m.impl("template_mask", TORCH_BOX(&template_mask));
  m.impl("template_mask_backward", TORCH_BOX(&template_mask_backward));
}

}  // namespace picnn_fast
