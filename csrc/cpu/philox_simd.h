#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "../common/philox.h"

namespace PICNN_FAST_NAMESPACE {

// random_24_bits of `count` consecutive draws. Compilers vectorise the plain loop too, but spend
// half of it moving 32-bit words in and out of the 64-bit lanes that products need: here words stay
// in the low halves of such lanes, with whatever the products leave in the high ones. A round waits
// for the one before, so a few vectors go side by side.
inline void random_24_bits_run(uint32_t* out, int64_t count, uint64_t first, uint64_t seed,
                               Stream stream, uint32_t rank) {
  int64_t i = 0;
#ifdef __AVX2__
#ifdef __AVX512F__
  using Wide = __m512i;
  constexpr int kWide = 8;
  const auto set = [](uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); };
  const auto multiply = [](Wide a, Wide b) { return _mm512_mul_epu32(a, b); };
  const auto high = [](Wide a) { return _mm512_srli_epi64(a, 32); };
  const auto add = [](Wide a, Wide b) { return _mm512_add_epi64(a, b); };
  const auto exclusive_or = [](Wide a, Wide b, Wide c) {
    return _mm512_ternarylogic_epi64(a, b, c, 0x96);
  };
  const auto store = [](uint32_t* to, Wide a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_srli_epi32(_mm512_cvtepi64_epi32(a), 8));
  };
  const Wide lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
#else
  using Wide = __m256i;
  constexpr int kWide = 4;
  const auto set = [](uint64_t x) { return _mm256_set1_epi64x(static_cast<int64_t>(x)); };
  const auto multiply = [](Wide a, Wide b) { return _mm256_mul_epu32(a, b); };
  const auto high = [](Wide a) { return _mm256_srli_epi64(a, 32); };
  const auto add = [](Wide a, Wide b) { return _mm256_add_epi64(a, b); };
  const auto exclusive_or = [](Wide a, Wide b, Wide c) {
    return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
  };
  const auto store = [](uint32_t* to, Wide a) {
    const Wide low = _mm256_permutevar8x32_epi32(a, _mm256_setr_epi32(0, 2, 4, 6, 0, 0, 0, 0));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_srli_epi32(_mm256_castsi256_si128(low), 8));
  };
  const Wide lanes = _mm256_setr_epi64x(0, 1, 2, 3);
#endif
  const Wide m0 = set(kPhiloxMultiplier0), m1 = set(kPhiloxMultiplier1);
  Wide key0[10], key1[10];
  for (int round = 0; round < 10; ++round) {
    key0[round] = set(static_cast<uint32_t>(seed) + round * kPhiloxWeyl0);
    key1[round] = set(static_cast<uint32_t>(seed >> 32) + round * kPhiloxWeyl1);
  }
  const auto draw = [&](auto side_by_side) {
    constexpr int kVectors = decltype(side_by_side)::value;
    Wide c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      c0[v] = add(set(first + static_cast<uint64_t>(i + v * kWide)), lanes);
      c1[v] = high(c0[v]);
      c2[v] = set(static_cast<uint32_t>(stream));
      c3[v] = set(rank);
    }
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Wide p0 = multiply(c0[v], m0), p1 = multiply(c2[v], m1);
        c0[v] = exclusive_or(high(p1), c1[v], key0[round]);
        c1[v] = p1;
        c2[v] = exclusive_or(high(p0), c3[v], key1[round]);
        c3[v] = p0;
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      store(out + i + v * kWide, c0[v]);
    }
    i += kVectors * kWide;
  };
  while (i + 4 * kWide <= count) {
    draw(std::integral_constant<int, 4>{});
  }
  while (i + kWide <= count) {
    draw(std::integral_constant<int, 1>{});
  }
#endif
  for (; i < count; ++i) {
    out[i] = random_24_bits(first + static_cast<uint64_t>(i), seed, stream, rank);
  }
}

}  // namespace PICNN_FAST_NAMESPACE
