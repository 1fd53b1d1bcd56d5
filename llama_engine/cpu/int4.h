// The inner products of group-wise INT4 rows (llama_engine/model/schemes.py has the layout).
//
// Activations are those of INT8, 15-bit fixed point, in two signed digits x = 128 * high + low. A block of 128 inputs is
// 64 bytes of a row; its activations lie as 64 high digits of the low nibbles, 64 of the high nibbles, then as many low
// digits, each in the order of the row's bytes. Weights are widened to q + 8, without a sign, which vector units multiply
// by signed bytes; 8 times the sum of a group's activations is subtracted in the end. Inside a group all is exact.
#pragma once

#include "vector.h"

namespace {

constexpr int kInt4Block = 128, kInt4Groups = 256 + 16;  // groups of a row, padded for vector loads

// Where the 32 inputs from k on lie in the digits of their half block: 0, 32, 64 or 96.
inline int int4_place(int64_t k, int group) {
  int run = k / 32 % 4;
  return 32 * (group == 64 && (run == 1 || run == 2) ? 3 - run : run);
}

#if defined(__AVX512BW__)
// The sum of one block, per lane: lanes 0-7 and 8-15 belong to the first and the second half of the row's 64 bytes.
struct Int4Weights {
  __m512i low, high;
  Int4Weights(const uint8_t* w, int bytes) {
    const __m512i nibble = _mm512_set1_epi8(15), bias = _mm512_set1_epi8(8);
    __m512i v = bytes >= 64 ? _mm512_loadu_si512(w) : _mm512_maskz_loadu_epi8((1ull << bytes) - 1, w);
    low = _mm512_ternarylogic_epi64(v, nibble, bias, 0x6a);  // (v & 15) ^ 8
    high = _mm512_ternarylogic_epi64(_mm512_srli_epi16(v, 4), nibble, bias, 0x6a);
  }
  __m512 times(const int8_t* x) const {
#if defined(__AVX512VNNI__)
    __m512i h = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, _mm512_loadu_si512(x));
    __m512i l = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, _mm512_loadu_si512(x + 128));
    h = _mm512_dpbusd_epi32(h, high, _mm512_loadu_si512(x + 64));
    l = _mm512_dpbusd_epi32(l, high, _mm512_loadu_si512(x + 192));
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(h, 7), l));
#else
    auto part = [&](const int8_t* digits, int16_t factor) {  // four products of at most 15 * 128 fit 16 bits
      __m512i a = _mm512_maddubs_epi16(low, _mm512_loadu_si512(digits));
      __m512i b = _mm512_maddubs_epi16(high, _mm512_loadu_si512(digits + 64));
      return _mm512_madd_epi16(_mm512_add_epi16(a, b), _mm512_set1_epi16(factor));
    };
    return _mm512_cvtepi32_ps(_mm512_add_epi32(part(x, 128), part(x + 128, 1)));
#endif
  }
};
struct Int4Sum {
  __m512 v = _mm512_setzero_ps();
  void add(const Int4Weights& w, const int8_t* x, float first, float second) {
    __m512 scale = _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(first), _mm512_set1_ps(second));
    v = _mm512_fmadd_ps(w.times(x), scale, v);
  }
  float total() const { return _mm512_reduce_add_ps(v); }
};
#elif defined(__AVX2__)
struct Int4Weights {
  __m256i low[2], high[2];
  Int4Weights(const uint8_t* w, int bytes) {
    const __m256i nibble = _mm256_set1_epi8(15), bias = _mm256_set1_epi8(8);
    for (int i = 0; i < 2; ++i) {
      __m256i v = i && bytes < 64 ? _mm256_setzero_si256() : _mm256_loadu_si256((const __m256i*)w + i);
      low[i] = _mm256_xor_si256(_mm256_and_si256(v, nibble), bias);
      high[i] = _mm256_xor_si256(_mm256_and_si256(_mm256_srli_epi16(v, 4), nibble), bias);
    }
  }
  // Of one half of the row's bytes; four products of at most 15 * 128 fit 16 bits.
  __m256 times(const int8_t* x, int i) const {
    auto part = [&](const int8_t* digits, int16_t factor) {
      __m256i a = _mm256_maddubs_epi16(low[i], _mm256_loadu_si256((const __m256i*)digits + i));
      __m256i b = _mm256_maddubs_epi16(high[i], _mm256_loadu_si256((const __m256i*)(digits + 64) + i));
      return _mm256_madd_epi16(_mm256_add_epi16(a, b), _mm256_set1_epi16(factor));
    };
    return _mm256_cvtepi32_ps(_mm256_add_epi32(part(x, 128), part(x + 128, 1)));
  }
};
struct Int4Sum {
  __m256 v = _mm256_setzero_ps();
  void add(const Int4Weights& w, const int8_t* x, float first, float second) {
    v = v + w.times(x, 0) * _mm256_set1_ps(first);
    v = v + w.times(x, 1) * _mm256_set1_ps(second);
  }
  float total() const {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, v);
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  }
};
#else
struct Int4Weights {
  uint8_t low[64], high[64];
  Int4Weights(const uint8_t* w, int bytes) {
    for (int i = 0; i < 64; ++i) {
      uint8_t v = i < bytes ? w[i] : 0;
      low[i] = (v & 15) ^ 8, high[i] = (v >> 4) ^ 8;
    }
  }
};
struct Int4Sum {
  float v = 0;
  void add(const Int4Weights& w, const int8_t* x, float first, float second) {
    int32_t sums[2] = {};
    for (int i = 0; i < 64; ++i)
      sums[i / 32] += w.low[i] * (128 * x[i] + x[i + 128]) + w.high[i] * (128 * x[i + 64] + x[i + 192]);
    v += sums[0] * first;
    v += sums[1] * second;
  }
  float total() const { return v; }
};
#endif

// out[m][j] = sum_k w[j][k] * x[m][k] for the digits x, `ldx` apart, and 8 times the sums of their groups, `lds` apart.
template <int M, int R>
void dot_int4(const uint8_t* const* w, const uint16_t* const* scales, const int8_t* x, int64_t ldx, const float* sums,
              int64_t lds, int64_t K, int group, float (*out)[R]) {
  alignas(64) float scale[R][kInt4Groups];
  const int groups = K / group, padded = (groups + 15) / 16 * 16;
  for (int j = 0; j < R; ++j)
    for (int g = 0; g < padded; g += 16) {
      uint16_t tail[16] = {};
      if (g + 16 > groups) std::memcpy(tail, scales[j] + g, 2 * (groups - g));
      v16f s = load_half(g + 16 > groups ? tail : scales[j] + g);
      std::memcpy(&scale[j][g], &s, 64);
    }
  Int4Sum acc[M][R];
  const int64_t ahead = prefetch_ahead(R * K / 2);
  for (int64_t k = 0; k < K; k += kInt4Block) {
    const int first = k / group, second = group == 64 ? first + 1 : first;
    for (int j = 0; j < R; ++j) {
      __builtin_prefetch(w[j] + k / 2 + ahead);
      Int4Weights v(w[j] + k / 2, (K - k) / 2);
      for (int m = 0; m < M; ++m) acc[m][j].add(v, x + m * ldx + 2 * k, scale[j][first], scale[j][second]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < R; ++j) {
      v16f bias{};
      for (int g = 0; g < padded; g += 16) bias += load<v16f>(&scale[j][g]) * load<v16f>(sums + m * lds + g);
      out[m][j] = acc[m][j].total() - sum(bias);
    }
}

}  // namespace
