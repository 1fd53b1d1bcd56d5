// Vectors of GCC's and Clang's extension, and what one instruction set does better than the compiler: halves, sums, e^x.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_INT8__) && defined(__AVX512F__) && defined(__linux__)
#define USE_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__AVX2__) && defined(__F16C__) && !defined(__AVX512F__)
#define USE_AVX2 1
#endif

namespace {

typedef float v8f __attribute__((vector_size(32)));
typedef float v16f __attribute__((vector_size(64)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef int16_t v16s __attribute__((vector_size(32)));
typedef int16_t v32s __attribute__((vector_size(64)));
typedef int8_t v16c __attribute__((vector_size(16)));
typedef int8_t v32c __attribute__((vector_size(32)));
// What attention computes with: as wide as a register, of which it needs many.
#if defined(USE_AVX2)
typedef v8f vf;
typedef v8i vi;
#else
typedef v16f vf;
typedef v16i vi;
#endif
constexpr int kLanes = sizeof(vf) / sizeof(float);

#if defined(USE_AVX2)
constexpr int kPrefetch = 1536;  // bytes ahead; rows are contiguous, so this reaches the next rows (docs/LOG.md)
#else
constexpr int kPrefetch = 4096;
#endif

// Bytes ahead of rows of `together` bytes that are read side by side: behind the last of them, or the prefetch of one
// row brings what another is just reading.
inline int64_t prefetch_ahead(int64_t together) { return together > kPrefetch ? together : kPrefetch; }

template <class V, class T>
inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

inline v16i dot_i16(v16i acc, v32s a, v32s b) {
#if defined(__AVX512VNNI__)
  return (v16i)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return acc + (v16i)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  union { v32s v; __m256i h[2]; } ua{a}, ub{b};
  union { v16i v; __m256i h[2]; } uc{acc};
  for (int i = 0; i < 2; ++i) uc.h[i] = _mm256_add_epi32(uc.h[i], _mm256_madd_epi16(ua.h[i], ub.h[i]));
  return uc.v;
#else
  for (int i = 0; i < 16; ++i) acc[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return acc;
#endif
}

inline v32s widen(const int8_t* p) {
#if defined(__AVX512BW__)
  return (v32s)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  union { v32s v; __m256i h[2]; } u;
  for (int i = 0; i < 2; ++i) u.h[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p + i));
  return u.v;
#else
  return __builtin_convertvector(load<v32c>(p), v32s);
#endif
}

inline float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
  if (exponent == 0) {
    float f = (float)mantissa * 0x1p-24f;
    return sign ? -f : f;
  }
  bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

template <class V = v16f>
inline V load_half(const uint16_t* p) {
#if defined(__AVX512F__)
  return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  union { V v; __m256 h[sizeof(V) / 32]; } u;
  for (int i = 0; i < (int)sizeof(V) / 32; ++i) u.h[i] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + i));
  return u.v;
#else
  V v;
  for (int i = 0; i < (int)sizeof(V) / 4; ++i) v[i] = half_to_float(p[i]);
  return v;
#endif
}

inline uint16_t float_to_half(float f) {
#if defined(__F16C__) || defined(__AVX512F__)
  return _cvtss_sh(f, 0);
#else
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint32_t sign = (bits >> 16) & 0x8000;
  float a = std::fabs(f);
  if (!(a < 65520.f)) return sign | (std::isnan(f) ? 0x7e00 : 0x7c00);
  if (a < 0x1p-14f) return sign | (uint16_t)std::nearbyint(a * 0x1p24f);
  int exponent;
  float m = std::frexp(a, &exponent);  // a = m * 2^exponent, m in [0.5, 1)
  uint32_t q = (uint32_t)std::nearbyint(m * 2048.f) - 1024;
  return sign | (((exponent + 14) << 10) + q);
#endif
}

#if defined(USE_AVX2)
inline float sum(v8f v) {
  __m128 four = _mm256_castps256_ps128((__m256)v) + _mm256_extractf128_ps((__m256)v, 1);
  four += _mm_movehl_ps(four, four);
  return four[0] + four[1];
}
#endif

inline float sum(v16f v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(USE_AVX2)
  union { v16f v; v8f h[2]; } u{v};
  return sum(u.h[0] + u.h[1]);
#else
  float total = 0;
  for (int i = 0; i < 16; ++i) total += v[i];
  return total;
#endif
}

// Exact, so that every path to the same integer gives the same float.
inline float sum_exact(v16i v) {
#if defined(__AVX512F__)
  __m512i wide = _mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256((__m512i)v)),
                                  _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64((__m512i)v, 1)));
  return (float)_mm512_reduce_add_epi64(wide);
#elif defined(__AVX2__)
  union { v16i v; __m128i q[4]; } u{v};
  __m256i wide = _mm256_add_epi64(_mm256_add_epi64(_mm256_cvtepi32_epi64(u.q[0]), _mm256_cvtepi32_epi64(u.q[1])),
                                  _mm256_add_epi64(_mm256_cvtepi32_epi64(u.q[2]), _mm256_cvtepi32_epi64(u.q[3])));
  __m128i two = _mm_add_epi64(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  return (float)(_mm_extract_epi64(two, 0) + _mm_extract_epi64(two, 1));
#else
  int64_t total = 0;
  for (int i = 0; i < 16; ++i) total += v[i];
  return (float)total;
#endif
}

template <class V>
inline float max_of(V v) {
  float m = v[0];
  for (int i = 1; i < (int)sizeof(V) / 4; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// e^x for x <= 0 by 2^n * p(r): Cody-Waite reduction and a degree-6 Taylor polynomial, relative error below 4e-7.
template <class V, class I = std::conditional_t<sizeof(V) == 64, v16i, v8i>>
inline V exp_nonpositive(V x) {
  x = x < -87.f ? (V{} - 87.f) : x;
  V shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the low mantissa bits hold round(x / ln 2)
  V n = shifted - 12582912.f;
  V r = x - n * 0.693359375f + n * 2.12194440e-4f;
  V p = r * (1.f / 720) + (1.f / 120);
  p = p * r + (1.f / 24);
  p = p * r + (1.f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  I bits = __builtin_convertvector(n, I);
  return (V)((I)p + (bits << 23));
}

}  // namespace
