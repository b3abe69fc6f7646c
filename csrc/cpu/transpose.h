#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "vector.h"

namespace PICNN_FAST_NAMESPACE {

// Lanes of two vectors in turn: of their first halves, or of their second ones.
template <bool kSecond, typename A, int... kLane>
PICNN_FAST_HD Vector<A> interleave(Vector<A> a, Vector<A> b, std::integer_sequence<int, kLane...>) {
  constexpr int kHalf = kSecond ? kLanes<A> / 2 : 0;
#ifdef __clang__
  return __builtin_shufflevector(a, b, (kLane / 2 + kHalf + kLane % 2 * kLanes<A>)...);
#else
  return __builtin_shuffle(a, b,
                           Vector<IndexOf<A>>{(kLane / 2 + kHalf + kLane % 2 * kLanes<A>)...});
#endif
}

// A square of as many vectors as each has lanes: its rows become its columns.
template <typename A>
PICNN_FAST_HD void transpose(Vector<A> (&rows)[kLanes<A>]) {
  constexpr int kHalf = kLanes<A> / 2;
  constexpr auto kAll = std::make_integer_sequence<int, kLanes<A>>{};
#pragma GCC unroll 4
  for (int round = 1; round < kLanes<A>; round *= 2) {
    Vector<A> next[kLanes<A>];
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) {
      next[2 * i] = interleave<false, A>(rows[i], rows[i + kHalf], kAll);
      next[2 * i + 1] = interleave<true, A>(rows[i], rows[i + kHalf], kAll);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i) {
      rows[i] = next[i];
    }
  }
}

}  // namespace PICNN_FAST_NAMESPACE
