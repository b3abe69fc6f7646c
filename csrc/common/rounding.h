#pragma once

#include <cstdint>

#include "macros.h"

// Whole parts of a number, for a >= 0 and b > 0.
namespace picnn_fast {

PICNN_FAST_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PICNN_FAST_HD constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace picnn_fast
