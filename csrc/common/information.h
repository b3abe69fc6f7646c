#pragma once

#include <cstdint>
#include <cstring>

#include "macros.h"

// Mutual information of counts: what the two sides of the histogram family's operators share.
// picnn_fast/reference/histogram.py is the definition.
namespace PICNN_FAST_NAMESPACE {

template <typename A>
struct Binary;
template <>
struct Binary<float> {
  using Bits = uint32_t;
  static constexpr int kFraction = 23;  // bits
  static constexpr int kRange = 128;    // more than any difference of exponents in use
  static constexpr int kTerms = 5;      // of the logarithm's series
  static constexpr float kEpsilon = 1.0f / (1 << 23);
};
template <>
struct Binary<double> {
  using Bits = uint64_t;
  static constexpr int kFraction = 52;
  static constexpr int kRange = 1024;
  static constexpr int kTerms = 11;
  static constexpr double kEpsilon = 1.0 / (int64_t{1} << 52);
};

// Never part of a fused operation: products of equal factors are equal.
PICNN_FAST_HD float whole_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
PICNN_FAST_HD double whole_product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// Within two units of rounding, for what is below 2^126.
PICNN_FAST_HD float quick_quotient(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
PICNN_FAST_HD double quick_quotient(double a, double b) { return a / b; }

// log(a / b) of normal numbers above 0, to a few units of rounding; 0 where they are equal. Without
// a branch, a table or a conversion, so that compilers make vectors of it: with the power of two
// that brings b next to a, 2 artanh((a - b) / (a + b)), in which z = ((a - b) / (a + b))^2 <=
// 0.0403.
template <typename A>
PICNN_FAST_HD A log_quotient(A a, A b) {
  using Bits = typename Binary<A>::Bits;
  constexpr int kFraction = Binary<A>::kFraction;
  constexpr Bits kOne = Bits{1} << kFraction, kOffset = Bits{Binary<A>::kRange} << kFraction;
  Bits of_a, of_b;
  std::memcpy(&of_a, &a, sizeof(A));
  std::memcpy(&of_b, &b, sizeof(A));
  // Of numbers as integers, the exponent is the whole part: rounded to nearest.
  const Bits apart = of_a - of_b + (kOne / 2 + kOffset);
  of_b += (apart & ~(kOne - 1)) - kOffset;
  std::memcpy(&b, &of_b, sizeof(A));
  // 2^kFraction + the exponent, its last bits.
  const Bits shifted = (Bits{Binary<A>::kRange - 1 + kFraction} << kFraction) | apart >> kFraction;
  A exponent;
  std::memcpy(&exponent, &shifted, sizeof(A));
  exponent -= static_cast<A>(kOne + Binary<A>::kRange);
  const A s = quick_quotient(a - b, a + b), z = s * s;
  A series = A{1} / A{2 * Binary<A>::kTerms - 1};
  for (int i = Binary<A>::kTerms - 1; i > 0; --i)
    series = series * z + A{1} / static_cast<A>(2 * i - 1);
  return exponent * static_cast<A>(0.6931471805599453094) + 2 * s * series;
}

// log(joint * total / (first * second)), 0 for a joint count of 0.
template <typename A>
PICNN_FAST_HD A log_ratio(A joint, A first, A second, A total) {
  const bool some = joint > A{0};
  const A above = whole_product(joint, total), below = whole_product(first, second);
  return log_quotient(some ? above : A{1}, some ? below : A{1});
}

// Of the other classes in a bin. Rounding of the sums leaves a little where they have nothing.
template <typename A>
PICNN_FAST_HD A rest_of(A joint, A per_bin, A slack) {
  const A rest = per_bin - joint;
  return rest > per_bin * slack ? rest : A{0};
}

// What a joint count's own term, and its part in those of others, add to the slope of `total` times
// the information. Of an empty one, of which the logarithm is none, the others' parts alone.
template <typename A>
PICNN_FAST_HD A slope(A joint, A first, A second, A total) {
  const A others = A{1} - (first > A{0} ? A{1} : A{0}) - (second > A{0} ? A{1} : A{0});
  return log_ratio(joint, first, second, total) + (joint > A{0} ? A{0} : others);
}

// Miller and Madow's correction of information from counts `total` in all.
template <typename A>
PICNN_FAST_HD A correction(A bins_used, A classes_used, A cells_used, A total) {
  return (bins_used + classes_used - cells_used - A{1}) / (A{2} * total);
}

}  // namespace PICNN_FAST_NAMESPACE
