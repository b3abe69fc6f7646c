#pragma once

#include <cstdint>

#include "../common/macros.h"
#include "storage.h"
#include "templates_kernels.h"
#include "units.h"

// The loops of the filter loss, compiled once for each instruction set (filter_loss_kernels.cpp).
namespace picnn_fast {

// Everything one call needs. A is the accumulation type: double for double maps, else float.
struct FilterLoss {
  MapsShape shape;
  const void* maps;
  Strides maps_strides;
  void* grad;  // A, or null
  Strides grad_strides;
  void* loss;  // A [N]
  double tau;
  PanelLayout layout;
  const void* turned;     // A panels of the table turned about its middle: maps times templates
  const void* upright;    // A panels: weights times templates, where grad is wanted
  int64_t block;          // filters worked on together
  bool running;           // what follows is of the running estimates
  const void* log_mean;   // A [N, P + 1]
  const void* log_ratio;  // A [N]
  double momentum;
  const int64_t* assigned;  // [B, N] or null
  void* new_log_mean;       // A [N, P + 1]
  void* new_log_ratio;      // A [N]
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

struct FilterLossKernels {
  // Blocks of filters [begin, end); scratch is aligned to 64 bytes.
  void (*run)(const FilterLoss&, Storage, int64_t begin, int64_t end, void* scratch);
};

extern const FilterLossKernels filter_loss_kernels_default;
#ifdef __x86_64__
extern const FilterLossKernels filter_loss_kernels_avx2;
extern const FilterLossKernels filter_loss_kernels_avx512;
#endif

}  // namespace picnn_fast
