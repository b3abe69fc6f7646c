#pragma once

#include <cstdint>

#include "../common/types.h"
#include "units.h"

// The loops of the masking family, compiled once for each instruction set (masking_kernels.cpp).
// T is how maps are stored; their masks and sums are Accumulate<T>. L, P and A are float or double:
// the types of logits, of probabilities, and of masks and gradients.
namespace picnn_fast {

template <typename L>
struct DrawLabels {
  int64_t classes;
  const L* logits;  // [B, K]
  int64_t sample_stride, class_stride;
  uint64_t seed;
  uint32_t rank;
  int64_t* labels;  // [B]
};

template <typename P, typename A>
struct DrawFilters {
  int64_t filters;
  const P* probabilities;  // [rows, N]
  int64_t row_stride, filter_stride;
  const int64_t* rows;  // [B], the row of each sample; null: row b is sample b's
  uint64_t seed;
  uint32_t rank;
  A* mask;  // [B, N] contiguous
};

template <typename T>
struct ScaleMaps {
  MapsShape shape;
  Units units;
  const T* maps;
  Strides maps_strides;
  const Accumulate<T>* mask;  // [B, N] contiguous
  T* out;
  Strides out_strides;
  bool stream;  // write past the caches
};

template <typename T>
struct MaskingBackward {
  MapsShape shape;
  Units units;
  const T* grad;
  Strides grad_strides;
  const T* maps;
  Strides maps_strides;
  const Accumulate<T>* mask;  // [B, N] contiguous
  T* grad_maps;
  Strides grad_maps_strides;
  Accumulate<T>* grad_mask;  // [B, N] contiguous
  bool stream;               // write past the caches
};

// Gradients of mask = one_hot @ correspondence; everything contiguous.
template <typename A>
struct ParametersBackward {
  int64_t batch, classes, filters;
  const A* grad_mask;       // [B, N]
  const A* logits;          // [B, K]
  const A* correspondence;  // [K, N]
  const int64_t* labels;    // [B]
  const A* grad_y1;         // grad_mask @ correspondence^T [B, K], or null to work it out
  A* grad_logits;           // [B, K]
  A* grad_correspondence;   // [K, N]
};

template <typename T>
struct MapKernels {
  // Units [begin, end). keep: the mask holds only 0 and 1.
  void (*keep)(const ScaleMaps<T>&, int64_t begin, int64_t end);
  void (*scale)(const ScaleMaps<T>&, int64_t begin, int64_t end);
  void (*backward)(const MaskingBackward<T>&, int64_t begin, int64_t end);
};

template <typename A>
struct ParameterKernels {
  // Samples [begin, end). scratch holds `classes` integers.
  void (*draw_labels)(const DrawLabels<A>&, int64_t begin, int64_t end, int64_t* scratch);
  // grad_logits of samples [begin, end). scratch holds `classes` numbers.
  void (*logits_backward)(const ParametersBackward<A>&, int64_t begin, int64_t end, A* scratch);
  // grad_correspondence of filters [begin, end).
  void (*correspondence_backward)(const ParametersBackward<A>&, int64_t begin, int64_t end);
};

template <typename P, typename A>
struct FilterKernels {
  // Samples [begin, end).
  void (*draw_filters)(const DrawFilters<P, A>&, int64_t begin, int64_t end);
};

// Converts to the kernels of any one type.
struct MaskingKernels : MapKernels<float>,
                        MapKernels<double>,
                        MapKernels<Half>,
                        MapKernels<BFloat16>,
                        ParameterKernels<float>,
                        ParameterKernels<double>,
                        FilterKernels<float, float>,
                        FilterKernels<float, double>,
                        FilterKernels<double, float>,
                        FilterKernels<double, double> {};

extern const MaskingKernels masking_kernels_default;
#ifdef __x86_64__
extern const MaskingKernels masking_kernels_avx2;
extern const MaskingKernels masking_kernels_avx512;
#endif

}  // namespace picnn_fast
