// The inner products: INT8 and half rows of weights against a few tokens, on vector registers or AMX tiles.
#pragma once

#include "vector.h"

namespace {

// out[m][j] = sum_k w[j][k] * x[m][k], exact per lane. M tokens share each weight load.
#if defined(USE_AVX2)
// Written out, because GCC keeps arrays of 64-byte vectors in memory where registers hold 32 bytes. One row after the
// other: there are registers for no more, and memory is read in one piece.
template <int M, int R>
inline void dot_int8(const int8_t* const* w, const int16_t* x, int64_t ldx, int K, float (*out)[R]) {
  for (int j = 0; j < R; ++j) {
    __m256i acc[M][2];
    for (auto& pair : acc) pair[0] = pair[1] = _mm256_setzero_si256();
    for (int k = 0; k < K; k += 32) {
      __builtin_prefetch(w[j] + k + kPrefetch);
      for (int half = 0; half < 2; ++half) {
        const __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w[j] + k + 16 * half)));
        for (int m = 0; m < M; ++m) {
          const __m256i a = _mm256_loadu_si256((const __m256i*)(x + m * ldx + k + 16 * half));
          acc[m][half] = _mm256_add_epi32(acc[m][half], _mm256_madd_epi16(a, b));
        }
      }
    }
    for (int m = 0; m < M; ++m) {
      v16i lanes;
      std::memcpy(&lanes, acc[m], 64);
      out[m][j] = sum_exact(lanes);
    }
  }
}

template <int M, int R>
inline void dot_half(const uint16_t* const* w, const float* x, int64_t ldx, int K, float (*out)[R]) {
  for (int j = 0; j < R; ++j) {
    __m256 acc[M][2];
    for (auto& pair : acc) pair[0] = pair[1] = _mm256_setzero_ps();
    for (int k = 0; k < K; k += 16) {
      __builtin_prefetch((const char*)(w[j] + k) + kPrefetch);
      for (int half = 0; half < 2; ++half) {
        const __m256 b = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(w[j] + k + 8 * half)));
        for (int m = 0; m < M; ++m) acc[m][half] += _mm256_loadu_ps(x + m * ldx + k + 8 * half) * b;
      }
    }
    for (int m = 0; m < M; ++m) {
      v16f lanes;
      std::memcpy(&lanes, acc[m], 64);
      out[m][j] = sum(lanes);
    }
  }
}
#else
template <int M, int R>
inline void dot_int8(const int8_t* const* w, const int16_t* x, int64_t ldx, int K, float (*out)[R]) {
  v16i acc[M][R] = {};
  const int64_t ahead = prefetch_ahead(R * (int64_t)K);
  for (int k = 0; k < K; k += 32) {
    v32s a[M];
    for (int m = 0; m < M; ++m) a[m] = load<v32s>(x + m * ldx + k);
    for (int j = 0; j < R; ++j) {
      __builtin_prefetch(w[j] + k + ahead);
      v32s b = widen(w[j] + k);
      for (int m = 0; m < M; ++m) acc[m][j] = dot_i16(acc[m][j], a[m], b);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < R; ++j) out[m][j] = sum_exact(acc[m][j]);
}

template <int M, int R>
inline void dot_half(const uint16_t* const* w, const float* x, int64_t ldx, int K, float (*out)[R]) {
  v16f acc[M][R] = {};
  const int64_t ahead = prefetch_ahead(2 * R * (int64_t)K);
  for (int k = 0; k < K; k += 16) {
    v16f a[M];
    for (int m = 0; m < M; ++m) a[m] = load<v16f>(x + m * ldx + k);
    for (int j = 0; j < R; ++j) {
      __builtin_prefetch((const char*)(w[j] + k) + ahead);
      v16f b = load_half(w[j] + k);
      for (int m = 0; m < M; ++m) acc[m][j] += a[m] * b;
    }
  }
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < R; ++j) out[m][j] = sum(acc[m][j]);
}
#endif

#if defined(USE_AMX)
// Tile registers: 16 rows of weights (A, straight from the [N][K] matrix) times 16 tokens (B, packed by four k).
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

bool request_amx() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }

// Butterfly transpose of a 16 x 16 tile.
inline void transpose(v16f* r) {
  const v16i lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int s = 1; s < 16; s *= 2) {
    v16i low = (lane & s) == 0 ? lane : lane - s + 16, high = (lane & s) == 0 ? lane + s : lane + 16;
    for (int i = 0; i < 16; ++i) {
      if (i & s) continue;
      v16f a = r[i], b = r[i + s];
      r[i] = __builtin_shuffle(a, b, low);
      r[i + s] = __builtin_shuffle(a, b, high);
    }
  }
}

// `ahead` bytes further lie rows to prefetch; 0 for none.
// out[token][j] for 16 tokens and 2 x 16 weight rows, exact: 256 * (w . high digits) + (w . low digits).
void dot_tiles(const int8_t* const* w, int64_t K, int64_t ahead, const int8_t* high, const uint8_t* low, float (*out)[32]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < K; k += 64) {
    for (int i = 0; ahead && i < 16; ++i) {
      __builtin_prefetch(w[0] + ahead + i * K + k);
      __builtin_prefetch(w[1] + ahead + i * K + k);
    }
    _tile_loadd(4, w[0] + k, K);
    _tile_loadd(6, high + k * 16, 64);
    _tile_loadd(7, low + k * 16, 64);
    _tile_loadd(5, w[1] + k, K);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  alignas(64) int32_t c[4][16][16];
  _tile_stored(0, c[0], 64);
  _tile_stored(1, c[1], 64);
  _tile_stored(2, c[2], 64);
  _tile_stored(3, c[3], 64);
  auto wide = [](__m256i a, __m256i b) {
    return _mm512_cvtpd_ps(_mm512_fmadd_pd(_mm512_cvtepi32_pd(a), _mm512_set1_pd(256), _mm512_cvtepi32_pd(b)));
  };
  for (int half = 0; half < 2; ++half) {
    v16f r[16];
    for (int j = 0; j < 16; ++j) {
      __m512i h = _mm512_load_si512(c[2 * half][j]), l = _mm512_load_si512(c[2 * half + 1][j]);
      __m256 first = wide(_mm512_castsi512_si256(h), _mm512_castsi512_si256(l));
      __m256 second = wide(_mm512_extracti64x4_epi64(h, 1), _mm512_extracti64x4_epi64(l, 1));
      r[j] = (v16f)_mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1);
    }
    transpose(r);
    for (int t = 0; t < 16; ++t) std::memcpy(out[t] + 16 * half, &r[t], 64);
  }
}
#endif

}  // namespace
