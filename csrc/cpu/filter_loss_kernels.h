#pragma once

#include <cstdint>

#include "../common/macros.h"
#include "../common/rounding.h"
#include "../common/types.h"
#include "units.h"

// The loops of the filter loss, compiled once for each instruction set (filter_loss_kernels.cpp).
//
// Numbers lie in lines of 64 bytes: of one position, or one template, and as many maps as a line
// holds numbers. Those are maps of some filters next to one another, and of as many samples as
// fill the line: number g·filters + i is of sample g and filter i.
namespace picnn_fast {

template <typename A>
constexpr int64_t kLineNumbers = 64 / static_cast<int64_t>(sizeof(A));

// A line `line` lines away, times a value.
template <typename A>
struct Tap {
  int32_t line;
  A value;
};

// A template slid over a map, out[p] = sum_q template(q - p)·in[q], in lines. Where most of its
// values are one and the same, only the differences of the others count for each p, the taps, and
// that value times the sum of the map is the same for all p. Rows of the map are followed by lines
// of zeros, which taps beyond its sides find.
template <typename A>
struct Stencil {
  int64_t height, width;
  int64_t margin;      // lines of zeros before the first row and after each
  A rest;              // what all other values are; 0 where there are no taps
  const Tap<A>* taps;  // in the order of offsets; or null: the table has them all
  const int64_t*
      begins;      // where the taps of each row of offsets begin, and where the last ones end
  const A* table;  // [2h - 1, 2w - 1]

  PICNN_FAST_HD int64_t lines() const { return margin + height * (width + margin); }
};

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
  bool stream;  // write grad past the caches
  A* loss;      // [N]
  A tau;
  Stencil<A> of_maps;     // maps to responses
  Stencil<A> of_weights;  // weights to the gradient: the template turned about its middle
  int64_t filters;        // in a line, a power of 2: those worked on together
  const RunningEstimates<A>* running;  // or null

  // Lines of samples that a filter's maps take.
  int64_t steps() const { return ceil_div(shape.batch, kLineNumbers<A> / filters); }
};

// Lines that a thread needs to work in: responses and weights of some filters, what is known of
// each template, a map with its margins, and twice without.
template <typename T>
int64_t filter_loss_scratch(const FilterLoss<T>& f) {
  constexpr int64_t kOfTemplates = 5;
  const int64_t margins =
      f.of_maps.lines() > f.of_weights.lines() ? f.of_maps.lines() : f.of_weights.lines();
  return (2 * f.steps() + kOfTemplates) * (f.shape.positions + 1) + margins + 2 * f.shape.positions;
}

template <typename T>
struct FilterLossKernel {
  // Blocks of f.filters filters [begin, end); scratch is aligned to 64 bytes.
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
