#pragma once

#if defined(__AVX512F__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "histogram_kernels.h"
#include "histogram_tiles.h"

// Counting without a counter's load and store for each sample. The cells of the samples of one
// class, six bits each, are cut into bit planes: one vector holds bit b of 64 samples of eight
// filters. The AND of six planes or their complements marks the samples in one cell, and its
// population count is added in a register.
namespace PICNN_FAST_NAMESPACE {
namespace {

#define PICNN_FAST_SLICED __attribute__((target("avx512vpopcntdq,avx512bitalg,gfni")))
constexpr int64_t kSlicedBlock = picnn_fast::kSlicedBlock;
constexpr int64_t kParts = kSlicedBlock / kBlock;
// Rows of 64 cells, as many as the second-level cache has room for, shared out among the blocks of
// a pass: memory is read by whole rows, every page once, where there are at most eight blocks.
constexpr int64_t kSlicedRows = 16384;
constexpr int kPlanes = 6;
constexpr int kSets = 8;         // of eight filters
constexpr int64_t kGroups = 16;  // of 64 samples, whose planes stay in the fastest cache
static_assert(int64_t{1} << kPlanes == picnn_fast::kMostSlicedCells, "a plane for every bit");

struct SlicedBuffers {
  alignas(64) uint8_t cells[kSlicedRows * kSlicedBlock];
  alignas(64) uint8_t no_cells[kSlicedBlock];
  alignas(64) __m512i columns[kSets][8];
  alignas(64) __m512i planes[kSets][kGroups][kPlanes];
  uint16_t order[kSlicedRows];
};

// In every lane of 16 bytes, out[j] = the bytes 2j of all eight vectors, then the bytes 2j + 1.
PICNN_FAST_SLICED inline void transpose_bytes(const __m512i* in, __m512i* out) {
  __m512i pairs[8], fours[8];
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = _mm512_unpacklo_epi8(in[i], in[i + 4]);
    pairs[2 * i + 1] = _mm512_unpackhi_epi8(in[i], in[i + 4]);
  }
  for (int i = 0; i < 4; ++i) {
    fours[i * 2] = _mm512_unpacklo_epi8(pairs[i], pairs[i + 4]);
    fours[i * 2 + 1] = _mm512_unpackhi_epi8(pairs[i], pairs[i + 4]);
  }
  for (int i = 0; i < 4; ++i) {
    out[i * 2] = _mm512_unpacklo_epi8(fours[i], fours[i + 4]);
    out[i * 2 + 1] = _mm512_unpackhi_epi8(fours[i], fours[i + 4]);
  }
}

// The planes of `count` samples, those rows of cells that `order` names: 64 samples a group, the
// last one filled up with cell 0. Set j has bytes 16 l + 2 j and 16 l + 2 j + 1 of each lane l.
PICNN_FAST_SLICED void slice(SlicedBuffers& buffers, const uint8_t* cells, const uint16_t* order,
                             int64_t count) {
  // Multiplied by the bits of a quadword, each byte of this matrix takes out one of its columns.
  const __m512i transpose_bits = _mm512_set1_epi64(0x8040201008040201);
  for (int64_t group = 0; group * 64 < count; ++group) {
    for (int64_t eight = 0; eight < 8; ++eight) {
      __m512i rows[8], columns[kSets];
      for (int64_t i = 0; i < 8; ++i) {
        const int64_t sample = group * 64 + eight * 8 + i;
        rows[i] = _mm512_load_si512(sample < count ? cells + order[sample] * kSlicedBlock
                                                   : buffers.no_cells);
      }
      transpose_bytes(rows, columns);  // eight samples of one filter in each quadword
      for (int set = 0; set < kSets; ++set) {
        buffers.columns[set][eight] =
            _mm512_gf2p8affine_epi64_epi8(transpose_bits, columns[set], 0);
      }
    }
    for (int set = 0; set < kSets; ++set) {
      // Eight planes of the even filters, a byte for every eight samples, then of the odd ones.
      __m512i bytes[8];
      transpose_bytes(buffers.columns[set], bytes);
      for (int pair = 0; pair < kPlanes / 2; ++pair) {
        buffers.planes[set][group][2 * pair] = _mm512_unpacklo_epi64(bytes[pair], bytes[pair + 4]);
        buffers.planes[set][group][2 * pair + 1] =
            _mm512_unpackhi_epi64(bytes[pair], bytes[pair + 4]);
      }
    }
  }
}

// x & (y or its complement) & (z or its complement)
template <int Y, int Z>
PICNN_FAST_SLICED inline __m512i both(__m512i x, __m512i y, __m512i z) {
  return _mm512_ternarylogic_epi64(x, y, z, 1 << (4 + 2 * Y + Z));
}

// How many bits are set in every `Bits` of them.
template <int Bits>
PICNN_FAST_SLICED inline __m512i count_bits(__m512i x) {
  static_assert(Bits == 16 || Bits == 64);
  return Bits == 16 ? _mm512_popcnt_epi16(x) : _mm512_popcnt_epi64(x);
}

template <int Bits, int First, int Second>
PICNN_FAST_SLICED inline void count_four(__m512i within, const __m512i* planes, __m512i* sums) {
  const __m512i four = both<First, Second>(within, planes[3], planes[2]);
  const auto add = [&](int i, __m512i cell) PICNN_FAST_SLICED {
    sums[i] = _mm512_add_epi16(sums[i], count_bits<Bits>(cell));
  };
  add(0, both<0, 0>(four, planes[1], planes[0]));
  add(1, both<0, 1>(four, planes[1], planes[0]));
  add(2, both<1, 0>(four, planes[1], planes[0]));
  add(3, both<1, 1>(four, planes[1], planes[0]));
}

// How many samples lie in the 16 cells whose upper two bits are First and Second.
template <int Bits, int First, int Second>
PICNN_FAST_SLICED void count_sixteen(const __m512i (*planes)[kPlanes], int64_t groups,
                                     __m512i* out) {
  __m512i sums[16];
  for (int i = 0; i < 16; ++i) {
    sums[i] = _mm512_setzero_si512();
  }
  for (int64_t group = 0; group < groups; ++group) {
    const __m512i* p = planes[group];
    const __m512i within = both<First, Second>(_mm512_set1_epi64(-1), p[5], p[4]);
    count_four<Bits, 0, 0>(within, p, sums);
    count_four<Bits, 0, 1>(within, p, sums + 4);
    count_four<Bits, 1, 0>(within, p, sums + 8);
    count_four<Bits, 1, 1>(within, p, sums + 12);
  }
  std::memcpy(out, sums, sizeof(sums));
}

// counts[cell] = how many samples of a set lie in it, of every 64 bits or 16 of its planes.
template <int Bits>
PICNN_FAST_SLICED void count_set(int64_t cells, const __m512i (*planes)[kPlanes], int64_t groups,
                                 __m512i* counts) {
  count_sixteen<Bits, 0, 0>(planes, groups, counts);
  if (cells > 16) {
    count_sixteen<Bits, 0, 1>(planes, groups, counts + 16);
  }
  if (cells > 32) {
    count_sixteen<Bits, 1, 0>(planes, groups, counts + 32);
    count_sixteen<Bits, 1, 1>(planes, groups, counts + 48);
  }
}

// Adds the samples of one class to its tables, of which a filter has `table_cells`. Of no type: one
// copy of it, into which the compiler takes all that it calls.
PICNN_FAST_SLICED void count_class(int64_t table_cells, SlicedBuffers& buffers,
                                   const uint8_t* cells, const uint16_t* order, int64_t count,
                                   uint16_t* table) {
  constexpr int64_t kMost = kGroups * 64;
  for (int64_t from = 0; from < count; from += kMost) {
    const int64_t here = count - from < kMost ? count - from : kMost;
    const int64_t groups = (here + 63) / 64;
    slice(buffers, cells, order + from, here);
    for (int set = 0; set < kSets; ++set) {
      __m512i counts[picnn_fast::kMostSlicedCells];
      count_set<64>(table_cells, buffers.planes[set], groups, counts);
      counts[0] = _mm512_sub_epi64(counts[0], _mm512_set1_epi64(groups * 64 - here));
      __m128i* sums = reinterpret_cast<__m128i*>(table + set * 8 * table_cells);
      for (int64_t cell = 0; cell < table_cells; ++cell) {
        const __m128i sum =
            _mm_add_epi16(_mm_loadu_si128(sums + cell), _mm512_cvtepi64_epi16(counts[cell]));
        _mm_storeu_si128(sums + cell, sum);
      }
    }
  }
}

}  // namespace
}  // namespace PICNN_FAST_NAMESPACE

#endif
