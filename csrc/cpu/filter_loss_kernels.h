#pragma once

#include <cstdint>

#include "../common/macros.h"
#include "../common/types.h"
#include "templates_kernels.h"
#include "units.h"

// The loops of the filter loss, compiled once for each instruction set (filter_loss_kernels.cpp).
namespace picnn_fast {

// Running estimates of one call, and what becomes of them.
template <typename A>
struct RunningEstimates {
  const A* log_mean;   // [N, P + 1]
  const A* log_ratio;  // [N]
  double momentum;
  const int64_t* assigned;  // [B, N] or null
  A* new_log_mean;          // [N, P + 1]
  A* new_log_ratio;         // [N]
};

// Everything one call needs. T is how maps are stored.
template <typename T>
struct FilterLoss {
  using A = Accumulate<T>;
  MapsShape shape;
  const T* maps;
  Strides maps_strides;
  A* grad;  // or null
  Strides grad_strides;
  A* loss;  // [N]
  A tau;
  PanelLayout layout;
  const A* turned;   // panels of the template turned about its middle: maps times templates
  const A* upright;  // panels: weights times templates, where grad is wanted
  int64_t block;     // filters worked on together
  const RunningEstimates<A>* running;  // or null
};

// A row of responses holds the P + 1 templates and then zeros, up to whole vectors.
PICNN_FAST_HD int64_t padded_templates(int64_t positions) { return (positions + 1 + 15) / 16 * 16; }

// Numbers of type A that a thread needs to work in: the maps of a block of filters; of one filter
// responses and weights; and what is known of each template.
inline int64_t filter_loss_scratch(const MapsShape& shape, int64_t block) {
  constexpr int64_t kOfTemplates = 5;
  return (2 * shape.batch + kOfTemplates) * padded_templates(shape.positions) + shape.batch +
         shape.batch * shape.positions * block;
}

template <typename T>
struct FilterLossKernel {
  // Blocks of filters [begin, end); scratch is aligned to 64 bytes.
  void (*run)(const FilterLoss<T>&, int64_t begin, int64_t end, Accumulate<T>* scratch);
};

// Converts to the kernel of any one type.
struct FilterLossKernels : FilterLossKernel<float>,
                           FilterLossKernel<double>,
                           FilterLossKernel<Half>,
                           FilterLossKernel<BFloat16> {};

extern const FilterLossKernels filter_loss_kernels_default;
#ifdef __x86_64__
extern const FilterLossKernels filter_loss_kernels_avx2;
extern const FilterLossKernels filter_loss_kernels_avx512;
#endif

}  // namespace picnn_fast
