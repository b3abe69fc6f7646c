#pragma once

#include <cstdint>

#include "../common/templates.h"
#include "../common/types.h"
#include "units.h"

// The loops of the template family, compiled once for each instruction set (templates_kernels.cpp).
// T is how maps are stored; masks and sums are of Accumulate<T>.
namespace picnn_fast {

// All templates of a map's size, laid out so that whoever goes along the positions of a map reads
// on in memory, yet far smaller than templates times positions.
//
// Entry (i, j; a, b) is the value at offset (a - i, b - j): with (i, j) a peak, the template at
// position (a, b). It is at
//   values[segment * per_segment + first + i * row + j * column + (a, b) in the segment]
// where the h·w pairs (a, b) in row-major order are cut into segments of `length`.
struct PanelLayout {
  int64_t height, width;
  int64_t segments, length;
  int64_t per_segment, first, row, column;
  int64_t size;
  double width_inverse;

  // Where the entries of the number `at`-th pair (i, j) begin. (Numbers are far fewer than a double
  // tells apart, and a half keeps them off whole rows: a product is faster than a division.)
  PICNN_FAST_HD int64_t begin(int64_t at) const {
    const auto i = static_cast<int32_t>((static_cast<int32_t>(at) + 0.5) * width_inverse);
    return first + at * column + i * (row - width * column);
  }
};

// Filters that lie side by side in memory: what the kernels keep of each is on their stack.
constexpr int64_t kFiltersAtOnce = 2048;

// The maps of one call, and the peaks to be found in them or given, in [0, positions).
template <typename T>
struct MapPeaks {
  MapsShape shape;
  Units units;
  const T* maps;
  Strides maps_strides;
  bool side_by_side;  // filters, of which a unit then has at most kFiltersAtOnce
  int64_t* peak;      // [B, N] contiguous
};

template <typename T>
struct TemplateMask {
  MapPeaks<T> in;
  bool find_peak;  // or take it as given
  PanelLayout layout;
  const Accumulate<T>* masks;  // panels of what to multiply by
  T* out;
  Strides out_strides;
  bool stream;    // write past the caches
  bool* invalid;  // set where given peaks are no positions; what belongs to them is not written
};

// Units [begin, end).
template <typename T>
struct TemplatesKernel {
  void (*peaks)(const MapPeaks<T>&, int64_t begin, int64_t end);
  void (*mask)(const TemplateMask<T>&, int64_t begin, int64_t end);
};

// Converts to the kernels of any one type.
struct TemplatesKernels : TemplatesKernel<float>,
                          TemplatesKernel<double>,
                          TemplatesKernel<Half>,
                          TemplatesKernel<BFloat16> {};

extern const TemplatesKernels templates_kernels_default;
#ifdef __x86_64__
extern const TemplatesKernels templates_kernels_avx2;
extern const TemplatesKernels templates_kernels_avx512;
#endif

}  // namespace picnn_fast
