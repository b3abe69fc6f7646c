// CPU operators of the masking family: check, allocate, and cut the work for the thread pool.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
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

// A draw costs about as much as moving so many elements.
constexpr int64_t kDrawElements = 4;

const MaskingKernels& kernels() { return PICNN_FAST_KERNELS_IN_USE(masking_kernels); }

void check_like(const Tensor& t, const char* name, const Tensor& features) {
  bool same = t.dim() == features.dim();
  for (int64_t d = 0; same && d < t.dim(); ++d) {
    same = t.size(d) == features.size(d);
  }
  STD_TORCH_CHECK(same, name, ": want the shape of features");
}

uint64_t checked_seed(const Tensor& seed) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1,
                  "seed: want one int64");
  return static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
}

void check_mask(const Tensor& mask, const MapsShape& shape, const Tensor& features) {
  check_shape(mask, "mask", {shape.batch, shape.filters});
  STD_TORCH_CHECK(mask.scalar_type() == accumulate_type(features),
                  "mask: want float32, float64 for float64 features");
}

// Whether all of them are in [0, 1]; NaN is not.
template <typename P>
void check_probabilities(const Tensor& t, const char* name) {
  const P* values = static_cast<const P*>(t.const_data_ptr());
  const int64_t rows = t.size(0), columns = t.size(1);
  const int64_t row = t.stride(0), column = t.stride(1);
  int outside = 0;
  // Together, without a branch: compilers make vectors of it where the columns are neighbours.
  const auto look = [&](int64_t step) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        const P value = values[i * row + j * step];
        outside |= static_cast<int>(!(value >= 0)) | static_cast<int>(!(value <= 1));
      }
    }
  };
  column == 1 ? look(1) : look(column);
  STD_TORCH_CHECK(outside == 0, name, ": want probabilities: finite, in [0, 1]");
}

template <typename L>
DrawLabels<L> label_draws(const Tensor& logits, uint64_t seed, int64_t rank, const Tensor& labels) {
  DrawLabels<L> d{};
  d.classes = logits.size(1);
  d.logits = static_cast<const L*>(logits.const_data_ptr());
  d.sample_stride = logits.stride(0);
  d.class_stride = logits.stride(1);
  d.seed = seed;
  d.rank = static_cast<uint32_t>(rank);
  d.labels = static_cast<int64_t*>(labels.mutable_data_ptr());
  return d;
}

template <typename P, typename A>
DrawFilters<P, A> filter_draws(const Tensor& probabilities, const int64_t* rows, uint64_t seed,
                               int64_t rank, const Tensor& mask) {
  DrawFilters<P, A> d{};
  d.filters = probabilities.size(1);
  d.probabilities = static_cast<const P*>(probabilities.const_data_ptr());
  d.row_stride = probabilities.stride(0);
  d.filter_stride = probabilities.stride(1);
  d.rows = rows;
  d.seed = seed;
  d.rank = static_cast<uint32_t>(rank);
  d.mask = static_cast<A*>(mask.mutable_data_ptr());
  return d;
}

template <typename T>
ScaleMaps<T> scaling(const Tensor& features, const Tensor& mask, const Tensor& masked) {
  ScaleMaps<T> s{};
  s.shape = shape_of_maps(features, "features");
  s.units = units_of(s.shape, torch::stable::get_num_threads());
  s.maps = static_cast<const T*>(features.const_data_ptr());
  s.maps_strides = strides_of_maps(features, "features");
  s.mask = static_cast<const Accumulate<T>*>(mask.const_data_ptr());
  s.out = static_cast<T*>(masked.mutable_data_ptr());
  s.out_strides = strides_of_maps(masked, "masked");
  s.stream = exceeds_cache(masked);
  return s;
}

Tensor draw_labels(const Tensor& logits, const Tensor& seed, int64_t rank) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) >= 1,
                  "logits: want [batch, classes], at least one class");
  const int64_t batch = logits.size(0), classes = logits.size(1);
  const uint64_t key = checked_seed(seed);
  Tensor labels = allocate({batch}, ScalarType::Long);
  with_real(logits, "logits", [&](auto logit) {
    using L = decltype(logit);
    const DrawLabels<L> drawn = label_draws<L>(logits, key, rank, labels);
    const ParameterKernels<L>& k = kernels();
    torch::stable::parallel_for(0, batch, std::max<int64_t>(1, kGrainElements / classes),
                                [&](int64_t begin, int64_t end) {
                                  std::vector<int64_t> scratch(static_cast<size_t>(classes));
                                  k.draw_labels(drawn, begin, end, scratch.data());
                                });
  });
  return labels;
}

Tensor draw_filters(const Tensor& probabilities, const Tensor& seed, int64_t rank,
                    const std::optional<Tensor>& labels, bool validate) {
  STD_TORCH_CHECK(probabilities.dim() == 2, "probabilities: want two axes, the second of filters");
  const int64_t filters = probabilities.size(1);
  int64_t batch = probabilities.size(0);
  std::optional<Tensor> indices;
  const int64_t* rows = nullptr;
  if (labels.has_value()) {
    batch = labels->numel();
    indices = class_indices(*labels, "labels", {batch}, probabilities.size(0));
    rows = static_cast<const int64_t*>(indices->const_data_ptr());
  }
  const uint64_t key = checked_seed(seed);
  Tensor mask = allocate({batch, filters}, probabilities.scalar_type());
  with_real(probabilities, "probabilities", [&](auto probability) {
    using P = decltype(probability);
    if (validate) {
      check_probabilities<P>(probabilities, "probabilities");
    }
    const DrawFilters<P, P> drawn = filter_draws<P, P>(probabilities, rows, key, rank, mask);
    const FilterKernels<P, P>& k = kernels();
    const int64_t grain =
        std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, kDrawElements * filters));
    torch::stable::parallel_for(
        0, batch, grain, [&](int64_t begin, int64_t end) { k.draw_filters(drawn, begin, end); });
  });
  return mask;
}

template <typename T, typename L, typename P>
void draw_and_keep(const DrawLabels<L>& labelled, const DrawFilters<P, Accumulate<T>>& drawn,
                   const ScaleMaps<T>& kept) {
  const MaskingKernels& all = kernels();
  const ParameterKernels<L>& of_labels = all;
  const FilterKernels<P, Accumulate<T>>& of_filters = all;
  const MapKernels<T>& of_maps = all;
  const MapsShape& shape = kept.shape;
  const int64_t elements = labelled.classes + shape.filters * (kDrawElements + shape.positions);
  const bool whole_samples = kept.units.blocks == 1;
  torch::stable::parallel_for(0, shape.batch, std::max<int64_t>(1, kGrainElements / elements),
                              [&](int64_t begin, int64_t end) {
                                std::vector<int64_t> scratch(static_cast<size_t>(labelled.classes));
                                // Sample by sample: the next draws go on while the stores of the
                                // last maps drain.
                                for (int64_t b = begin; b < end; ++b) {
                                  of_labels.draw_labels(labelled, b, b + 1, scratch.data());
                                  of_filters.draw_filters(drawn, b, b + 1);
                                  if (whole_samples) {
                                    of_maps.keep(kept, b, b + 1);
                                  }
                                }
                              });
  if (!whole_samples) {
    parallel_units(shape, kept.units,
                   [&](int64_t begin, int64_t end) { of_maps.keep(kept, begin, end); });
  }
}

std::tuple<Tensor, Tensor, Tensor> bernoulli_mask(const Tensor& features, const Tensor& logits,
                                                  const Tensor& correspondence, const Tensor& seed,
                                                  int64_t rank, bool validate) {
  const MapsShape shape = shape_of_maps(features, "features");
  STD_TORCH_CHECK(logits.dim() == 2, "logits: want [batch, classes]");
  const int64_t classes = logits.size(1);
  STD_TORCH_CHECK(classes >= 1, "logits: want at least one class");
  check_shape(logits, "logits", {shape.batch, classes});
  check_shape(correspondence, "correspondence", {classes, shape.filters});
  const uint64_t key = checked_seed(seed);
  Tensor masked = allocate_like(features);
  Tensor mask = allocate({shape.batch, shape.filters}, accumulate_type(features));
  Tensor labels = allocate({shape.batch}, ScalarType::Long);
  with_types(features, "features", [&](auto element, auto sum) {
    with_real(logits, "logits", [&](auto logit) {
      with_real(correspondence, "correspondence", [&](auto probability) {
        using T = decltype(element);
        using A = decltype(sum);
        using L = decltype(logit);
        using P = decltype(probability);
        if (validate) {
          check_probabilities<P>(correspondence, "correspondence");
        }
        const DrawLabels<L> labelled = label_draws<L>(logits, key, rank, labels);
        draw_and_keep<T, L, P>(labelled,
                               filter_draws<P, A>(correspondence, labelled.labels, key, rank, mask),
                               scaling<T>(features, mask, masked));
      });
    });
  });
  return {masked, mask, labels};
}

// `rows` [B, N] contiguous, in the type of the sums.
Tensor scaled_by(const Tensor& features, const MapsShape& shape, const Tensor& rows) {
  Tensor masked = allocate_like(features);
  with_types(features, "features", [&](auto element, auto) {
    using T = decltype(element);
    const ScaleMaps<T> scaled = scaling<T>(features, rows, masked);
    const MapKernels<T>& k = kernels();
    parallel_units(shape, scaled.units,
                   [&](int64_t begin, int64_t end) { k.scale(scaled, begin, end); });
  });
  return masked;
}

Tensor mask_channels(const Tensor& features, const Tensor& mask) {
  const MapsShape shape = shape_of_maps(features, "features");
  check_mask(mask, shape, features);
  return scaled_by(features, shape, as_contiguous(mask));
}

std::tuple<Tensor, Tensor> masking_backward(const Tensor& grad_masked, const Tensor& features,
                                            const Tensor& mask) {
  const MapsShape shape = shape_of_maps(features, "features");
  check_like(grad_masked, "grad_masked", features);
  STD_TORCH_CHECK(grad_masked.scalar_type() == features.scalar_type(),
                  "grad_masked: want the dtype of features");
  check_mask(mask, shape, features);
  const Tensor rows = as_contiguous(mask);
  Tensor grad_features = allocate_like(features);
  Tensor grad_mask = allocate({shape.batch, shape.filters}, accumulate_type(features));
  with_types(features, "features", [&](auto element, auto sum) {
    using T = decltype(element);
    using A = decltype(sum);
    MaskingBackward<T> s{};
    s.shape = shape;
    s.units = units_of(shape, torch::stable::get_num_threads());
    s.grad = static_cast<const T*>(grad_masked.const_data_ptr());
    s.grad_strides = strides_of_maps(grad_masked, "grad_masked");
    s.maps = static_cast<const T*>(features.const_data_ptr());
    s.maps_strides = strides_of_maps(features, "features");
    s.mask = static_cast<const A*>(rows.const_data_ptr());
    s.grad_maps = static_cast<T*>(grad_features.mutable_data_ptr());
    s.grad_maps_strides = strides_of_maps(grad_features, "grad_features");
    s.grad_mask = static_cast<A*>(grad_mask.mutable_data_ptr());
    s.stream = exceeds_cache(grad_features);
    const MapKernels<T>& k = kernels();
    parallel_units(shape, s.units, [&](int64_t begin, int64_t end) { k.backward(s, begin, end); });
  });
  return {grad_features, grad_mask};
}

// The maps scaled by the rows of a gate [K, N] that labels name, and these rows [B, N].
std::tuple<Tensor, Tensor> class_gate(const Tensor& features, const Tensor& gate,
                                      const Tensor& labels) {
  const MapsShape shape = shape_of_maps(features, "features");
  STD_TORCH_CHECK(gate.dim() == 2, "gate: want [classes, filters]");
  check_shape(gate, "gate", {gate.size(0), shape.filters});
  check_accumulate_type(gate, "gate", features);
  const Tensor indices = class_indices(labels, "labels", {shape.batch}, gate.size(0));
  const Tensor table = as_contiguous(gate);
  Tensor rows = allocate({shape.batch, shape.filters}, gate.scalar_type());
  with_real(table, "gate", [&](auto element) {
    using A = decltype(element);
    const A* from = static_cast<const A*>(table.const_data_ptr());
    const int64_t* label = static_cast<const int64_t*>(indices.const_data_ptr());
    A* to = static_cast<A*>(rows.mutable_data_ptr());
    for (int64_t b = 0; b < shape.batch; ++b) {
      std::copy_n(from + label[b] * shape.filters, shape.filters, to + b * shape.filters);
    }
  });
  return {scaled_by(features, shape, rows), rows};
}

// Rows [B, N] added up by label, in the order of the samples: the same bits every time.
template <typename A>
void sum_by_label(const A* rows, const int64_t* labels, int64_t batch, int64_t filters,
                  int64_t classes, A* sums) {
  constexpr int64_t kFilters = 64;
  const int64_t grain =
      std::max<int64_t>(1, kGrainElements / (kFilters * std::max<int64_t>(1, batch + classes)));
  torch::stable::parallel_for(0, (filters + kFilters - 1) / kFilters, grain,
                              [&](int64_t begin, int64_t end) {
                                const int64_t first = begin * kFilters;
                                const int64_t count = std::min(end * kFilters, filters) - first;
                                for (int64_t k = 0; k < classes; ++k) {
                                  std::fill_n(sums + k * filters + first, count, A{0});
                                }
                                for (int64_t b = 0; b < batch; ++b) {
                                  const A* row = rows + b * filters + first;
                                  A* sum = sums + labels[b] * filters + first;
                                  for (int64_t n = 0; n < count; ++n) {
                                    sum[n] += row[n];
                                  }
                                }
                              });
}

Tensor sums_by_label(const Tensor& rows, const Tensor& labels, int64_t classes) {
  STD_TORCH_CHECK(rows.dim() == 2, "rows: want two axes");
  const int64_t batch = rows.size(0), filters = rows.size(1);
  const Tensor indices = class_indices(labels, "labels", {batch}, classes);
  const Tensor values = as_contiguous(rows);
  Tensor sums = allocate({classes, filters}, rows.scalar_type());
  with_real(values, "rows", [&](auto element) {
    using A = decltype(element);
    sum_by_label(static_cast<const A*>(values.const_data_ptr()),
                 static_cast<const int64_t*>(indices.const_data_ptr()), batch, filters, classes,
                 static_cast<A*>(sums.mutable_data_ptr()));
  });
  return sums;
}

// grad_mask @ correspondence^T by the library, or nothing where the kernel works it out.
Tensor product_of_large(const Tensor& grad_mask, const Tensor& correspondence) {
  // Up to here the table stays in the second-level cache while every sample passes over it; beyond,
  // the library's matrix product cuts it into blocks.
  constexpr int64_t kTableElements = 1 << 16;
  Tensor product;
  if (correspondence.numel() > kTableElements) {
    // The CPU kernel itself: through the dispatcher, autocast would lower it to bfloat16.
    product = allocate({grad_mask.size(0), correspondence.size(0)}, grad_mask.scalar_type());
    const Tensor transposed = torch::stable::transpose(correspondence, 0, 1);
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_mm_out(product.get(), grad_mask.get(), transposed.get()));
  }
  return product;
}

template <typename A>
void parameters_backward(const ParametersBackward<A>& s) {
  const ParameterKernels<A>& k = kernels();
  // One parallel region for both: first the samples, then blocks of filters.
  constexpr int64_t kFilters = 64;
  const int64_t units = s.batch + (s.filters + kFilters - 1) / kFilters;
  const int64_t elements = std::max<int64_t>(1, s.classes * (s.filters + 16));
  torch::stable::parallel_for(
      0, units, std::max<int64_t>(1, kGrainElements / elements), [&](int64_t begin, int64_t end) {
        std::vector<A> scratch(static_cast<size_t>(begin < s.batch ? s.classes : 0));
        k.logits_backward(s, std::min(begin, s.batch), std::min(end, s.batch), scratch.data());
        const int64_t first = (std::max(begin, s.batch) - s.batch) * kFilters;
        const int64_t last = (std::max(end, s.batch) - s.batch) * kFilters;
        if (first < last) {
          k.correspondence_backward(s, first, std::min(last, s.filters));
        }
      });
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
  const Tensor rows = as_contiguous(grad_mask);
  const Tensor scores = as_contiguous(logits);
  const Tensor table = as_contiguous(correspondence);
  const Tensor labels = class_indices(pseudo_label, "pseudo_label", {batch}, classes);
  Tensor grad_logits = allocate({batch, classes}, logits.scalar_type());
  Tensor grad_table = allocate({classes, filters}, correspondence.scalar_type());
  with_real(correspondence, "correspondence", [&](auto element) {
    using A = decltype(element);
    STD_TORCH_CHECK(grad_mask.scalar_type() == correspondence.scalar_type() &&
                        logits.scalar_type() == correspondence.scalar_type(),
                    "grad_mask, logits: want the dtype of correspondence");
    const Tensor product = product_of_large(rows, table);
    ParametersBackward<A> s{};
    s.batch = batch;
    s.classes = classes;
    s.filters = filters;
    s.grad_mask = static_cast<const A*>(rows.const_data_ptr());
    s.logits = static_cast<const A*>(scores.const_data_ptr());
    s.correspondence = static_cast<const A*>(table.const_data_ptr());
    s.labels = static_cast<const int64_t*>(labels.const_data_ptr());
    s.grad_y1 = product.defined() ? static_cast<const A*>(product.const_data_ptr()) : nullptr;
    s.grad_logits = static_cast<A*>(grad_logits.mutable_data_ptr());
    s.grad_correspondence = static_cast<A*>(grad_table.mutable_data_ptr());
    parameters_backward(s);
  });
  return {grad_logits, grad_table};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(picnn_fast, CPU, m) {
  m.impl("draw_labels", TORCH_BOX(&draw_labels));
  m.impl("draw_filters", TORCH_BOX(&draw_filters));
  m.impl("bernoulli_mask", TORCH_BOX(&bernoulli_mask));
  m.impl("mask_channels", TORCH_BOX(&mask_channels));
  m.impl("masking_backward", TORCH_BOX(&masking_backward));
  m.impl("class_gate", TORCH_BOX(&class_gate));
  m.impl("sums_by_label", TORCH_BOX(&sums_by_label));
  m.impl("bernoulli_parameters_backward", TORCH_BOX(&bernoulli_parameters_backward));
}

}  // namespace picnn_fast
