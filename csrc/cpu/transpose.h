#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "vector.h"

namespace PICNN_FAST_NAMESPACE {

// Lanes of two vectors in turn: of the first halves of each kGroup lanes, or of the second ones.
template <bool kSecond, int kGroup, typename A, int... kLane>
PICNN_FAST_HD Vector<A> interleave(Vector<A> a, Vector<A> b, std::integer_sequence<int, kLane...>) {
  constexpr int kHalf = kSecond ? kGroup / 2 : 0;
#ifdef __clang__
  return __builtin_shufflevector(
      a, b, (kLane / kGroup * kGroup + kLane % kGroup / 2 + kHalf + kLane % 2 * kLanes<A>)...);
#else
  return __builtin_shuffle(a, b,
                           Vector<IndexOf<A>>{(kLane / kGroup * kGroup + kLane % kGroup / 2 +
                                               kHalf + kLane % 2 * kLanes<A>)...});
#endif
}

// Squares of kGroup vectors and lanes, side by side: rows become columns. By default one square.
template <typename A, int kGroup = kLanes<A>>
PICNN_FAST_HD void transpose(Vector<A> (&rows)[kGroup]) {
  constexpr int kHalf = kGroup / 2;
  constexpr auto kAll = std::make_integer_sequence<int, kLanes<A>>{};
#pragma GCC unroll 4
  for (int round = 1; round < kGroup; round *= 2) {
    Vector<A> next[kGroup];
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) {
      next[2 * i] = interleave<false, kGroup, A>(rows[i], rows[i + kHalf], kAll);
      next[2 * i + 1] = interleave<true, kGroup, A>(rows[i], rows[i + kHalf], kAll);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kGroup; ++i) {
      rows[i] = next[i];
    }
  }
}

}  // namespace PICNN_FAST_NAMESPACE
