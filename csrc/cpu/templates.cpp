// CPU operators of the template family. picnn_fast/reference/templates.py is the definition.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/read_template.h"
#include "capability.h"
#include "maps.h"
#include "templates_kernels.h"
#include "tensors.h"

namespace picnn_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const TemplatesKernels& kernels() { return PICNN_FAST_KERNELS_IN_USE(templates_kernels); }

// Filters of a unit. Those side by side whose peaks are found and that are then masked are gone
// through twice, and are to be in the second level of cache still at the second time. Whole rows
// are best: they are fetched in the order in which they lie in memory.
template <typename T>
int64_t most_filters(const MapPeaks<T>& s, bool twice) {
  constexpr int64_t kLeast = 64, kLine = 64, kWhole = 400 << 10, kPart = 200 << 10;
  if (!s.side_by_side || !twice) {
    return s.side_by_side ? kFiltersAtOnce : s.shape.filters;
  }
  const int64_t row = s.shape.filters * static_cast<int64_t>(sizeof(T));
  const int64_t positions = std::max<int64_t>(1, s.shape.positions);
  const int64_t most = row % kLine == 0 && row * positions > kWhole ? kPart : kWhole;
  const int64_t bytes = static_cast<int64_t>(sizeof(T)) * positions;
  return std::clamp(most / bytes / kLeast * kLeast, kLeast, kFiltersAtOnce);
}

// Without what depends on whether filters are side by side.
template <typename T>
MapPeaks<T> map_peaks_of(const Tensor& x, const char* name, const Tensor& peak) {
  MapPeaks<T> s{};
  s.shape = shape_of_maps(x, name);
  s.maps = static_cast<const T*>(x.const_data_ptr());
  s.maps_strides = strides_of_maps(x, name);
  s.peak = static_cast<int64_t*>(peak.mutable_data_ptr());
  return s;
}

template <typename T>
void set_units(MapPeaks<T>& s, bool side_by_side, bool twice) {
  s.side_by_side = side_by_side;
  s.units = units_of(s.shape, torch::stable::get_num_threads(), most_filters(s, twice));
}

const int64_t* categories_of(const Tensor& t, const char* name, int64_t count) {
  check_shape(t, name, {count});
  check_type(t, name, ScalarType::Long, "int64");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

// h · w takes the place of the peaks [B, N] of images of another category than the filter's.
void keep_own(const Tensor& peak, const Tensor& labels, const Tensor& filter_category,
              int64_t none) {
  const int64_t batch = peak.size(0), filters = peak.size(1);
  const int64_t* label = categories_of(labels, "labels", batch);
  const int64_t* category = categories_of(filter_category, "filter_category", filters);
  const int64_t label_stride = labels.stride(0), category_stride = filter_category.stride(0);
  int64_t* peaks = static_cast<int64_t*>(peak.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, filters));
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t own = label[b * label_stride];
      for (int64_t n = 0; n < filters; ++n) {
        int64_t& at = peaks[b * filters + n];
        at = category[n * category_stride] == own ? at : none;
      }
    }
  });
}

Tensor map_peaks(const Tensor& x, const std::optional<Tensor>& labels,
                 const std::optional<Tensor>& filter_category) {
  STD_TORCH_CHECK(labels.has_value() == filter_category.has_value(),
                  "labels, filter_category: want both or neither");
  const Offsets offsets = offsets_of_maps(x, "x");
  const Tensor peak = allocate({x.size(0), x.size(1)}, ScalarType::Long);
  with_types(x, "x", [&](auto stored, auto) {
    using T = decltype(stored);
    auto s = map_peaks_of<T>(x, "x", peak);
    set_units(s, s.shape.filters > 1 && s.maps_strides.filter == 1, /*twice=*/false);
    const TemplatesKernel<T>& k = kernels();
    parallel_units(s.shape, s.units, [&](int64_t begin, int64_t end) { k.peaks(s, begin, end); });
  });
  if (labels.has_value()) {
    keep_own(peak, *labels, *filter_category, offsets.positions());
  }
  return peak;
}

// Short rows by themselves leave vectors half empty where a map is gone along: worth larger panels,
// up to a few megabytes. Along filters that lie side by side, the smallest are best.
PanelLayout panel_layout(const Offsets& offsets, bool side_by_side) {
  constexpr int64_t kNarrow = 32, kMostIfNarrow = 1 << 20, kMost = 1 << 16;
  constexpr int64_t kPadding = 64;  // vectors may be read beyond the end of a segment
  const int64_t height = offsets.height, width = offsets.width;
  const int64_t rows = offsets.rows(), columns = offsets.columns();
  PanelLayout layout{};
  layout.height = height;
  layout.width = width;
  layout.width_inverse = 1.0 / static_cast<double>(width);
  const int64_t most = side_by_side ? 0 : width < kNarrow ? kMostIfNarrow : kMost;
  if (width * rows * width <= most) {
    // For each j the rows of offsets, all of them, cut to their columns -j to width - 1 - j. So the
    // rows of a map follow one another, and short ones too fill vectors.
    layout.segments = 1;
    layout.length = height * width;
    layout.first = (height - 1) * width;
    layout.row = -width;
    layout.column = rows * width;
    layout.size = width * rows * width + kPadding;
  } else {
    layout.segments = height;
    layout.length = width;
    layout.per_segment = columns;
    layout.first = (height - 1) * columns + width - 1;
    layout.row = -columns;
    layout.column = -1;
    layout.size = rows * columns + kPadding;
  }
  return layout;
}

// `values`, one an offset, laid out so.
template <typename A>
std::vector<A> panels(const PanelLayout& layout, const std::vector<A>& values) {
  std::vector<A> panels(static_cast<size_t>(layout.size));
  if (layout.per_segment != 0) {
    std::copy(values.begin(), values.end(), panels.begin());
    return panels;
  }
  const int64_t rows = 2 * layout.height - 1, columns = 2 * layout.width - 1;
  auto out = panels.begin();
  for (int64_t j = 0; j < layout.width; ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t first = i * columns + layout.width - 1 - j;
      out = std::copy_n(values.begin() + first, layout.width, out);
    }
  }
  return panels;
}

template <typename T>
void run(const Tensor& x, const char* name, const Tensor& peak, bool find_peak,
         const Tensor& offsets, double scale, const Tensor& out) {
  using A = Accumulate<T>;
  const Template<A> part = read_template<A>(x, name, offsets);
  TemplateMask<T> s{};
  s.in = map_peaks_of<T>(x, name, peak);
  if (s.in.shape.batch == 0 || s.in.shape.filters == 0) {
    return;
  }
  s.find_peak = find_peak;
  s.out = static_cast<T*>(out.mutable_data_ptr());
  s.out_strides = strides_of_maps(out, "masked");
  s.stream = exceeds_cache(out);
  set_units(s.in,
            s.in.shape.filters > 1 && s.in.maps_strides.filter == 1 && s.out_strides.filter == 1,
            find_peak);
  std::vector<A> masks(part.values, part.values + part.offsets.count());
  for (A& mask : masks) {
    mask = mask_value(mask, static_cast<A>(scale));
  }
  s.layout = panel_layout(part.offsets, s.in.side_by_side);
  masks = panels(s.layout, masks);
  s.masks = masks.data();
  bool invalid = false;
  s.invalid = &invalid;
  const TemplatesKernel<T>& k = kernels();
  parallel_units(s.in.shape, s.in.units,
                 [&](int64_t begin, int64_t end) { k.mask(s, begin, end); });
  if (invalid) {
    class_indices(peak, "peak", {s.in.shape.batch, s.in.shape.filters}, s.in.shape.positions);
  }
}

// Masks `x` into what is returned, by the peaks it finds or those it is given.
Tensor mask(const Tensor& x, const char* name, const Tensor& peak, bool find_peak,
            const Tensor& offsets, double scale) {
  Tensor out = allocate_like(x);
  with_types(x, name, [&](auto stored, auto) {
    run<decltype(stored)>(x, name, peak, find_peak, offsets, scale, out);
  });
  return out;
}

std::tuple<Tensor, Tensor> template_mask(const Tensor& x, const Tensor& offsets, double scale) {
  STD_TORCH_CHECK(x.dim() == 4, "x: want maps [B, N, h, w]");
  const Tensor peak = allocate({x.size(0), x.size(1)}, ScalarType::Long);
  return {mask(x, "x", peak, /*find_peak=*/true, offsets, scale), peak};
}

Tensor template_mask_backward(const Tensor& grad_masked, const Tensor& peak, const Tensor& offsets,
                              double scale) {
  STD_TORCH_CHECK(grad_masked.dim() == 4, "grad_masked: want maps [B, N, h, w]");
  const MapsShape shape = shape_of_maps(grad_masked, "grad_masked");
  const Tensor peaks = contiguous_indices(peak, "peak", {shape.batch, shape.filters});
  return mask(grad_masked, "grad_masked", peaks, /*find_peak=*/false, offsets, scale);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(picnn_fast, CPU, m) {
  m.impl("map_peaks", TORCH_BOX(&map_peaks));
  m.impl("template_mask", TORCH_BOX(&template_mask));
  m.impl("template_mask_backward", TORCH_BOX(&template_mask_backward));
}

}  // namespace picnn_fast
