#pragma once

#include <cstdint>

#include "macros.h"
#include "philox.h"

// Arithmetic of the masking family. picnn_fast/reference/masking.py is the definition.
namespace PICNN_FAST_NAMESPACE {

// One rounding each: a fused multiply-add would give other bits than the reference does.
// (Host code is compiled with -ffp-contract=off.)
PICNN_FAST_HD float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
PICNN_FAST_HD float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// exp(x) * 2^30 rounded down, for x = logit - max <= 0 in float32; 0 below exp(-21) and for NaN.
// Cody-Waite reduction and Taylor polynomial of degree 7: relative error below 6e-9 plus rounding.
PICNN_FAST_HD int64_t softmax_weight(float x) {
  x = x > -21.0f ? x : -21.0f;  // exp(-21) * 2^30 < 1: no branch is needed for what weighs nothing
  const float y = add(multiply(x, 1.4426950408889634f), 0.5f);
  const int32_t truncated = static_cast<int32_t>(y);
  const int32_t n = truncated - (y < static_cast<float>(truncated) ? 1 : 0);  // floor(y)
  const float nf = static_cast<float>(n);
  const float r = add(add(x, -multiply(nf, 0.693359375f)), -multiply(nf, -2.1219444005469057e-4f));
  float e = 1.0f / 5040;
  e = add(multiply(e, r), 1.0f / 720);
  e = add(multiply(e, r), 1.0f / 120);
  e = add(multiply(e, r), 1.0f / 24);
  e = add(multiply(e, r), 1.0f / 6);
  e = add(multiply(e, r), 1.0f / 2);
  e = add(multiply(e, r), 1.0f);
  e = add(multiply(e, r), 1.0f);
  const int32_t weight = static_cast<int32_t>(multiply(e, 1073741824.0f)) >> -n;  // e < 1.42
  return weight;
}

// floor(bits * total / 2^24) for bits < 2^24, without leaving 64 bits. The pseudo-label is the
// first class whose cumulative weight exceeds it.
PICNN_FAST_HD int64_t cdf_threshold(uint32_t bits, int64_t total) {
  return bits * (total >> 24) + ((bits * (total & 0xFFFFFF)) >> 24);
}

// u < p with u = bits * 2^-24, exact in float and in double.
template <typename P>
PICNN_FAST_HD bool keeps_filter(uint32_t bits, P p) {
  return static_cast<P>(bits) * static_cast<P>(5.9604644775390625e-8) < p;
}

}  // namespace PICNN_FAST_NAMESPACE
