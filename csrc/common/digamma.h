#pragma once

#include <cmath>
#include <cstdint>

#include "macros.h"

namespace PICNN_FAST_NAMESPACE {

// psi(n) for an integer n >= 1. From n = 32 on by the asymptotic series: the first term left out,
// 1 / (132 n^10), is below the rounding of the result. Below 32, psi(n) = psi(n + 1) - 1/n.
PICNN_FAST_HD double digamma(int64_t n) {
  double terms = 0;
  for (; n < 32; ++n) terms += 1.0 / static_cast<double>(n);
  const double x = static_cast<double>(n);
  const double s = 1 / (x * x);
  const double series = s * (1.0 / 12 - s * (1.0 / 120 - s * (1.0 / 252 - s * (1.0 / 240))));
  return (log(x) - 0.5 / x) - series - terms;
}

}  // namespace PICNN_FAST_NAMESPACE
