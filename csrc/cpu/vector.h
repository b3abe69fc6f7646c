#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "scalar.h"

// Vectors as wide as the processor's own: compilers lower wider ones badly.
namespace PICNN_FAST_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename A>
constexpr int kLanes = kVectorBytes / sizeof(A);

template <typename A, int kCount = kLanes<A>>
using Vector __attribute__((vector_size(kCount * sizeof(A)))) = A;

template <typename A>
PICNN_FAST_HD Vector<A> broadcast(A value) {
  return value - Vector<A>{};  // the one spelling that compilers make one instruction of
}

template <typename A, typename T>
PICNN_FAST_HD Vector<A> load(const T* from) {
  Vector<A> vector;
  if constexpr (std::is_same_v<T, A>) {
    std::memcpy(&vector, from, sizeof(vector));
  } else {
    A array[kLanes<A>];  // loops over the elements of a vector type do not vectorise
    for (int l = 0; l < kLanes<A>; ++l) {
      array[l] = widen(from[l]);
    }
    std::memcpy(&vector, array, sizeof(vector));
  }
  return vector;
}

template <typename A, typename T>
PICNN_FAST_HD void store(const Vector<A>& vector, T* to) {
  if constexpr (std::is_same_v<T, A>) {
    std::memcpy(to, &vector, sizeof(vector));
  } else {
    A array[kLanes<A>];
    std::memcpy(array, &vector, sizeof(vector));
    for (int l = 0; l < kLanes<A>; ++l) {
      to[l] = narrow<T>(array[l]);
    }
  }
}

// All lanes in one, by halves: lane l is joined with lane l + kCount / 2, and so on.
template <typename A, int kCount = kLanes<A>, typename Join>
PICNN_FAST_HD A fold(const Vector<A, kCount>& vector, const Join& join) {
  if constexpr (kCount == 1) {
    return vector[0];
  } else {
    Vector<A, kCount / 2> halves[2];
    std::memcpy(halves, &vector, sizeof(vector));
    return fold<A, kCount / 2>(join(halves[0], halves[1]), join);
  }
}

}  // namespace PICNN_FAST_NAMESPACE
