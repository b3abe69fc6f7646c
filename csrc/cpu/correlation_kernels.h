#pragma once

#include <cstdint>

#include "../common/macros.h"
#include "../common/rounding.h"
#include "../common/types.h"
#include "units.h"

// The loops of the correlation family, compiled once for each instruction set
// (correlation_kernels.cpp). A unit of work is an image.
namespace picnn_fast {

// T is how maps are stored, A the type of sums: double for double, else float.
template <typename T, typename A>
struct Correlation {
  MapsShape shape;
  const T* maps;
  Strides maps_strides;
  const A* mean;  // [C, P]
  // [P, C] where filters are neighbours in memory, else null.
  const A* mean_by_position;
  const int64_t* groups;  // [C], in [0, num_groups)
  int64_t num_groups;
  const bool* positive;  // [B], or null: all images count

  bool counts(int64_t image) const { return positive == nullptr || positive[image]; }
};

template <typename T, typename A>
struct CorrelationForward : Correlation<T, A> {
  A* norms;         // [B, C]
  A* sums;          // [B, num_groups, P]
  double* moments;  // [B, 2, num_groups]: ‖S‖² and ⟨S, Σ S⟩ of each image and group
};

template <typename T, typename A>
struct CorrelationBackward : Correlation<T, A> {
  const A* norms;  // [B, C]
  const A* sums;   // [B, num_groups, P]
  const A* own;    // [num_groups], see GroupGradient
  const A* total;  // [num_groups]
  T* grad;
  Strides grad_strides;
  bool stream;  // write the gradient past the caches
};

// Maps worked on together: as many as the first-level cache takes beside the sums of the groups,
// and beside the gradient that is written.
constexpr int64_t kTile = 8, kGradientTile = 4;

// A row of numbers of a map, with zeros up to whole vectors.
PICNN_FAST_HD int64_t padded_positions(int64_t positions) { return (positions + 15) / 16 * 16; }

// Numbers at a position, one a group, with zeros up to two whole vectors.
inline int64_t table_width(int64_t num_groups) { return round_up(num_groups, 32); }

// Numbers that a thread needs to work in: a tile of maps, a table for each position, a row for each
// group, two more.
inline int64_t correlation_scratch(const MapsShape& shape, int64_t num_groups) {
  const int64_t padded = padded_positions(shape.positions);
  return kTile * padded + shape.positions * table_width(num_groups) + (num_groups + 2) * padded;
}

template <typename T, typename A>
struct CorrelationKernelsOf {
  // Images [begin, end); scratch is aligned to 64 bytes.
  void (*forward)(const CorrelationForward<T, A>&, int64_t begin, int64_t end, A* scratch);
  void (*backward)(const CorrelationBackward<T, A>&, int64_t begin, int64_t end, A* scratch);
  // The mean map [C, P] turned to [P, C], filters [begin, end) of it.
  void (*by_position)(const A* mean, const MapsShape&, int64_t begin, int64_t end, A* turned);
};

// Converts to the kernels of any one type.
struct CorrelationKernels : CorrelationKernelsOf<float, float>,
                            CorrelationKernelsOf<double, double>,
                            CorrelationKernelsOf<Half, float>,
                            CorrelationKernelsOf<BFloat16, float> {};

extern const CorrelationKernels correlation_kernels_default;
#ifdef __x86_64__
extern const CorrelationKernels correlation_kernels_avx2;
extern const CorrelationKernels correlation_kernels_avx512;
#endif

}  // namespace picnn_fast
