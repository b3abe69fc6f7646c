#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __x86_64__
#include <immintrin.h>
#endif

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

// Integers as wide as the lanes.
template <typename A>
using IndexOf = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;

template <typename A>
PICNN_FAST_HD Vector<A> broadcast(A value) {
  return value - Vector<A>{};  // the one spelling that compilers make one instruction of
}

// Whole vectors of bits, for the type whose conversions compilers do not always make vectors of.
using Wide __attribute__((vector_size(kVectorBytes))) = uint32_t;
using Narrow __attribute__((vector_size(kVectorBytes / 2))) = uint16_t;

// Conversions that compilers make several instructions of.
PICNN_FAST_HD Wide widen_bits(const Narrow& bits) {
#if defined(__AVX512F__)
  return (Wide)_mm512_cvtepu16_epi32((__m256i)bits);
#elif defined(__AVX2__)
  return (Wide)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, Wide);
#endif
}

// Of numbers below 2^16.
PICNN_FAST_HD Narrow narrow_bits(const Wide& bits) {
#if defined(__AVX512F__)
  return (Narrow)_mm512_cvtepi32_epi16((__m512i)bits);
#elif defined(__AVX2__)
  constexpr int kEvenQuarters = 0b1000;
  const __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
  return (Narrow)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, kEvenQuarters));
#else
  return __builtin_convertvector(bits, Narrow);
#endif
}

// float16 as widen() and narrow() of it have it, where there are instructions for that: no number
// is rounded otherwise, and NaN is narrowed to the same one.
#if defined(__AVX2__)
PICNN_FAST_HD Vector<float> widen_float16(const Narrow& bits) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_cvtph_ps((__m256i)bits);
#else
  return (Vector<float>)_mm256_cvtph_ps((__m128i)bits);
#endif
}

PICNN_FAST_HD Narrow narrow_float16(const Vector<float>& vector) {
  Wide bits;
  std::memcpy(&bits, &vector, sizeof(bits));
  const Wide same = vector != vector ? (bits & 0x80000000u) | 0x7FC00000u : bits;
#if defined(__AVX512F__)
  return (Narrow)_mm512_cvtps_ph((__m512)same, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return (Narrow)_mm256_cvtps_ph((__m256)same, _MM_FROUND_TO_NEAREST_INT);
#endif
}
#endif

template <typename A, typename T>
PICNN_FAST_HD Vector<A> load(const T* from) {
  Vector<A> vector;
  if constexpr (std::is_same_v<T, A>) {
    std::memcpy(&vector, from, sizeof(vector));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    Narrow bits;
    std::memcpy(&bits, from, sizeof(bits));
    const Wide wide = widen_bits(bits) << 16;
    std::memcpy(&vector, &wide, sizeof(vector));
#if defined(__AVX2__)
  } else if constexpr (std::is_same_v<T, Half>) {
    Narrow bits;
    std::memcpy(&bits, from, sizeof(bits));
    vector = widen_float16(bits);
#endif
  } else {
    A array[kLanes<A>];  // loops over the elements of a vector type do not vectorise
    for (int l = 0; l < kLanes<A>; ++l) {
      array[l] = widen(from[l]);
    }
    std::memcpy(&vector, array, sizeof(vector));
  }
  return vector;
}

// As narrow() has it, in the upper halves.
PICNN_FAST_HD Wide round_to_bfloat16(const Vector<float>& vector) {
  Wide bits;
  std::memcpy(&bits, &vector, sizeof(bits));
  const Wide rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  return vector != vector ? Wide{} + 0x7FC00000u : rounded;
}

template <typename A, typename T>
PICNN_FAST_HD void store(const Vector<A>& vector, T* to) {
  if constexpr (std::is_same_v<T, A>) {
    std::memcpy(to, &vector, sizeof(vector));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const Narrow half = narrow_bits(round_to_bfloat16(vector) >> 16);
    std::memcpy(to, &half, sizeof(half));
#if defined(__AVX2__)
  } else if constexpr (std::is_same_v<T, Half>) {
    const Narrow half = narrow_float16(vector);
    std::memcpy(to, &half, sizeof(half));
#endif
  } else {
    A array[kLanes<A>];
    std::memcpy(array, &vector, sizeof(vector));
    for (int l = 0; l < kLanes<A>; ++l) {
      to[l] = narrow<T>(array[l]);
    }
  }
}

// Two vectors as one of bfloat16, in fewer instructions than one at a time takes.
PICNN_FAST_HD Vector<float> narrow_both(const Vector<float>& a, const Vector<float>& b) {
  const Wide low = round_to_bfloat16(a), high = round_to_bfloat16(b);
#if defined(__AVX512F__)
  alignas(64) constexpr uint16_t kOdd[] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                           23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                           45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return (Vector<float>)_mm512_permutex2var_epi16((__m512i)low, _mm512_load_si512(kOdd),
                                                  (__m512i)high);
#elif defined(__AVX2__)
  constexpr int kQuartersInTurn = 0b11011000;
  const __m256i packed = _mm256_packus_epi32((__m256i)(low >> 16), (__m256i)(high >> 16));
  return (Vector<float>)_mm256_permute4x64_epi64(packed, kQuartersInTurn);
#else
  const Narrow halves[] = {narrow_bits(low >> 16), narrow_bits(high >> 16)};
  Vector<float> both;
  std::memcpy(&both, halves, sizeof(both));
  return both;
#endif
}

PICNN_FAST_HD void store_both(const Vector<float>& a, const Vector<float>& b, BFloat16* to) {
  const Vector<float> both = narrow_both(a, b);
  std::memcpy(to, &both, sizeof(both));
}

// Lanes of two vectors by their numbers, those of `b` after those of `a`.
template <typename A>
PICNN_FAST_HD Vector<A> shuffle(const Vector<A>& a, const Vector<A>& b,
                                const Vector<IndexOf<A>>& lanes) {
#ifdef __clang__
  A both[2 * kLanes<A>], values[kLanes<A>];
  std::memcpy(both, &a, sizeof(a));
  std::memcpy(both + kLanes<A>, &b, sizeof(b));
  for (int l = 0; l < kLanes<A>; ++l) {
    values[l] = both[lanes[l]];
  }
  return load<A>(values);
#else
  return __builtin_shuffle(a, b, lanes);
#endif
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
