#pragma once

#include <cmath>
#include <cstdint>

#include "macros.h"

// Part templates, in units of tau. picnn_fast/reference/templates.py is the definition.
namespace picnn_fast {

enum Profile : int32_t { kGradient = 0, kUniform = 1, kTable = 2 };

// What the operators take, for maps of one size; sums and templates are of type A.
template <typename A>
struct Template {
  const A* table;  // [2 * height - 1, 2 * width - 1], of kTable alone
  int32_t profile;
  int32_t norm;   // 1 or 2
  A slope;        // of kGradient
  int32_t limit;  // of kUniform
  int32_t height, width;
};

}  // namespace picnn_fast

namespace PICNN_FAST_NAMESPACE {

// 1 - slope * length with two roundings, as the reference does. (Host code is compiled with
// -ffp-contract=off.)
PICNN_FAST_HD float one_minus_product(float slope, float length) {
#ifdef __CUDA_ARCH__
  return __fsub_rn(1.0f, __fmul_rn(slope, length));
#else
  return 1.0f - slope * length;
#endif
}
PICNN_FAST_HD double one_minus_product(double slope, double length) {
#ifdef __CUDA_ARCH__
  return __dsub_rn(1.0, __dmul_rn(slope, length));
#else
  return 1.0 - slope * length;
#endif
}

// T_mu / tau at mu + (di, dj), for |di| < height and |dj| < width. Sides are at most 2^15, so that
// a squared distance fits 31 bits.
template <typename A>
PICNN_FAST_HD A template_value(const picnn_fast::Template<A>& t, int32_t di, int32_t dj) {
  if (t.profile == picnn_fast::kTable) {
    return t.table[static_cast<int64_t>(di + t.height - 1) * (2 * t.width - 1) + dj + t.width - 1];
  }
  const int32_t distance =
      t.norm == 1 ? (di < 0 ? -di : di) + (dj < 0 ? -dj : dj) : di * di + dj * dj;
  if (t.profile == picnn_fast::kUniform) {
    return distance < t.limit ? A{1} : A{-1};
  }
  const A length = t.norm == 1 ? static_cast<A>(distance) : std::sqrt(static_cast<A>(distance));
  const A value = one_minus_product(t.slope, length);
  return value < A{-1} ? A{-1} : value;
}

// What the mask layer multiplies by, for a value in units of tau.
template <typename A>
PICNN_FAST_HD A mask_value(A value, A scale) {
  return (value < A{0} ? A{0} : value) * scale;
}

}  // namespace PICNN_FAST_NAMESPACE
