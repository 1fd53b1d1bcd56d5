// One forward pass of the Llama decoder on a CPU, whole step in one call, paged KV cache included.
//
// Arithmetic: INT8 weights times activations held as 15-bit fixed point with one scale a token, accumulated exactly in
// int32, so a row's result depends neither on the batch around it nor on the number of threads. 15 bits because a
// 512-bit lane then takes 512 pairs of products (K = 16384) without overflow.
// Layouts: K cache [layer][block][kv_head][head_size][tokens_per_block] (lanes are keys: scores need no horizontal
// sums), V cache [layer][block][kv_head][tokens_per_block][head_size], both IEEE half.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>
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

constexpr int kActMax = 16383;
constexpr int kAttentionChunk = 256;  // keys between two merges: fixed, so that splitting never changes a sum
constexpr int kRowBlock = 64;         // tokens whose activations stay in L2 while weights stream past
constexpr int kMaxGroup = 8;
constexpr int kAmxMinTokens = 9;      // fewer tokens than that waste most of a tile
constexpr int kMaxQueryTokens = 4;    // prefill tokens that share loads of K and V
#if defined(USE_AVX2)
constexpr int kPrefetch = 1536;
#else
constexpr int kPrefetch = 4096;       // bytes ahead; rows are contiguous, so this reaches the next rows (docs/LOG.md)
#endif

template <class V, class T>
inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

inline v16i dot_i16(v16i acc, v32s a, v32s b) {
#if defined(__AVX512VNNI__)
  return (v16i)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
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
  for (int k = 0; k < K; k += 32) {
    v32s a[M];
    for (int m = 0; m < M; ++m) a[m] = load<v32s>(x + m * ldx + k);
    for (int j = 0; j < R; ++j) {
      __builtin_prefetch(w[j] + k + kPrefetch);
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
  for (int k = 0; k < K; k += 16) {
    v16f a[M];
    for (int m = 0; m < M; ++m) a[m] = load<v16f>(x + m * ldx + k);
    for (int j = 0; j < R; ++j) {
      __builtin_prefetch((const char*)(w[j] + k) + kPrefetch);
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

// All threads of a step meet here; a short spin, then yield so that an oversubscribed machine still moves.
struct Barrier {
  std::atomic<int> waiting{0}, generation{0};
  int size = 1;
  void wait() {
    if (size == 1) return;
    int g = generation.load(std::memory_order_acquire);
    if (waiting.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      waiting.store(0, std::memory_order_relaxed);
      generation.store(g + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; generation.load(std::memory_order_acquire) == g; ++spins) {
#if defined(__x86_64__)
      if (spins < 20000) { _mm_pause(); continue; }
#else
      if (spins < 20000) continue;
#endif
      std::this_thread::yield();
    }
  }
};

}  // namespace

extern "C" {

struct LinearView {
  const void* weight;   // [N][K] int8, or half when scale is null
  const float* scale;   // [N]
};

struct LayerView {
  const float* input_norm;
  const float* post_norm;
  LinearView qkv, o, gate_up, down;
  uint16_t* k_cache;
  uint16_t* v_cache;
};

struct ModelView {
  int32_t hidden, intermediate, layers, heads, kv_heads, head_size, vocab, tokens_per_block, max_tokens, max_context;
  float eps;
  const uint16_t* embedding;  // [vocab][hidden] half
  const float* final_norm;
  LinearView lm_head;
  const float* cos;  // [max_context][head_size / 2]
  const float* sin;
  const LayerView* layer;
};

struct StepView {
  int32_t tokens, logit_rows, table_stride;
  const int32_t* ids;          // [tokens]
  const int32_t* positions;    // [tokens]
  const int32_t* slots;        // [tokens] row of block_tables
  const int32_t* block_tables; // [slots][table_stride]
  const int32_t* rows;         // [logit_rows] tokens whose logits are wanted
  float* logits;               // [logit_rows][vocab]
};

}  // extern "C"

namespace {

struct Engine {
  ModelView m;
  std::vector<LayerView> layers;
  int threads;
  Barrier barrier;
  std::vector<std::thread> workers;
  std::atomic<int> generation{0};
  std::atomic<bool> stop{false};
  StepView step{};
  int64_t q_size, kv_size, qkv_size, max_in;
  std::vector<float> x, qkv, attn, act, scale, normed, partial;
  std::vector<int16_t> quantized;
  std::vector<int8_t> high;
  std::vector<uint8_t> low;
  bool amx = false;
  int chunks_max;

  Engine(const ModelView& view, int n) : m(view), layers(view.layer, view.layer + view.layers), threads(n) {
    q_size = (int64_t)m.heads * m.head_size;
    kv_size = (int64_t)m.kv_heads * m.head_size;
    qkv_size = q_size + 2 * kv_size;
    max_in = std::max<int64_t>(std::max<int64_t>(m.hidden, m.intermediate), q_size);
    int64_t T = m.max_tokens;
    x.resize(T * m.hidden);
    qkv.resize(T * qkv_size);
    attn.resize(T * q_size);
    act.resize(T * m.intermediate);
    scale.resize(T);
    normed.resize(T * m.hidden);
    quantized.resize(T * max_in);
#if defined(USE_AMX)
    amx = m.hidden % 64 == 0 && m.intermediate % 64 == 0 && q_size % 64 == 0 && request_amx();
    high.resize(amx ? (T + 15) / 16 * 16 * max_in : 0);
    low.resize(high.size());
#endif
    chunks_max = (m.max_context + kAttentionChunk - 1) / kAttentionChunk;
    partial.resize((size_t)std::max(4 * n, 16) * m.kv_heads * chunks_max * group() * (m.head_size + 2));
    barrier.size = n;
    for (int t = 1; t < n; ++t) workers.emplace_back([this, t] { work(t); });
  }

  ~Engine() {
    stop = true;
    ++generation;
    generation.notify_all();
    for (auto& w : workers) w.join();
  }

  int group() const { return m.heads / m.kv_heads; }

  void work(int t) {
    int seen = 0;
    for (;;) {
      for (int spins = 0; generation.load(std::memory_order_acquire) == seen && spins < 30000; ++spins) {
#if defined(__x86_64__)
        _mm_pause();
#endif
      }
      generation.wait(seen, std::memory_order_acquire);
      if (stop) return;
      ++seen;
      forward(t);
    }
  }

  void run(const StepView& s) {
    step = s;
    ++generation;
    generation.notify_all();
    forward(0);
  }

  // Contiguous share of n units for thread t, in multiples of `unit`.
  void share(int64_t n, int64_t unit, int t, int64_t& begin, int64_t& end) const {
    int64_t units = n / unit;
    begin = units * t / threads * unit;
    end = units * (t + 1) / threads * unit;
  }

  void quantize_row(const float* in, int64_t K, int row, bool digits) {
    v16f top{};
    for (int64_t k = 0; k < K; k += 16) {
      v16f v = load<v16f>(in + k);
      v = v < 0.f ? -v : v;
      top = v > top ? v : top;
    }
    float amax = max_of(top);
    float inverse = amax > 0 ? kActMax / amax : 0.f;
    scale[row] = amax / kActMax;
    int16_t* q = quantized.data() + (int64_t)row * max_in;
    for (int64_t k = 0; k < K; k += 16) {
      v16f v = load<v16f>(in + k) * inverse + 12582912.f;  // adding 1.5 * 2^23 rounds to nearest even
      v16i i = __builtin_convertvector(v - 12582912.f, v16i);
      auto narrow = __builtin_convertvector(i, v16s);
      std::memcpy(q + k, &narrow, 32);
    }
    if (!digits) return;
    // Token `row` is column row % 16 of its tile: four consecutive k lie together, tokens 4 bytes apart.
    int64_t base = (int64_t)(row / 16) * 16 * K + row % 16 * 4;
    for (int64_t k = 0; k < K; k += 16) {
      v16s v = load<v16s>(q + k);
      auto h = __builtin_convertvector(v >> 8, v16c), l = __builtin_convertvector(v & 255, v16c);
      for (int i = 0; i < 4; ++i) {
        std::memcpy(&high[base + (k / 4 + i) * 64], (const char*)&h + 4 * i, 4);
        std::memcpy(&low[base + (k / 4 + i) * 64], (const char*)&l + 4 * i, 4);
      }
    }
  }

  void norm_row(const float* in, const float* weight, float* out) const {
    v16f squares{};
    for (int k = 0; k < m.hidden; k += 16) {
      v16f v = load<v16f>(in + k);
      squares += v * v;
    }
    float r = 1.f / std::sqrt(sum(squares) / m.hidden + m.eps);
    for (int k = 0; k < m.hidden; k += 16) {
      v16f v = load<v16f>(in + k) * r * load<v16f>(weight + k);
      std::memcpy(out + k, &v, 64);
    }
  }

  // Rows of `in` [T][K] (after RMSNorm when `norm` is given) to fixed point; threads share the tokens.
  void quantize(const float* in, int64_t K, const float* norm, int t) {
    int together = step.tokens >= 16 * threads ? 16 : 1;  // rows of one tile share cache lines
    for (int row = 0; row < step.tokens; ++row) {
      if (row / together % threads != t) continue;
      const float* source = in + row * K;
      if (norm) {
        float* out = normed.data() + (int64_t)row * m.hidden;
        norm_row(source, norm, out);
        source = out;
      }
      quantize_row(source, K, row, amx && step.tokens >= kAmxMinTokens);
    }
    barrier.wait();
  }

  // W [N][K] against `count` quantized rows, 2 x 16 rows of W at a time: n.. and n + apart.., the SwiGLU pair of gate and
  // up or simply neighbours. `store(token, n, first, second)` takes both; it is the same code on either path, so that
  // the paths agree to the bit.
  template <class Store>
  void gemm(const LinearView& l, int64_t N, int64_t K, bool pair, int count, int t, Store store) {
    const int8_t* weight = (const int8_t*)l.weight;
    int64_t apart = pair ? N / 2 : 16, span = pair ? 16 : 32, begin, end;
    share(N / 32, 1, t, begin, end);
    auto emit = [&](int token, int64_t n, const float* out) {
      v16f a = load<v16f>(out) * load<v16f>(l.scale + n) * scale[token];
      v16f b = load<v16f>(out + 16) * load<v16f>(l.scale + n + apart) * scale[token];
      store(token, n, a, b);
    };
    bool tiles = amx && count >= kAmxMinTokens;
    for (int base = 0; base < count; base += kRowBlock) {
      int limit = std::min(base + kRowBlock, count);
      for (int64_t g = begin; g < end; ++g) {
        int64_t n = g * span;
        alignas(64) float out[16][32];
#if defined(USE_AMX)
        if (tiles) {
          const int8_t* w[2] = {weight + n * K, weight + (n + apart) * K};
          for (int token = base; token < limit; token += 16) {
            dot_tiles(w, K, token == base ? span * K : 0, high.data() + token * K, low.data() + token * K, out);
            for (int i = 0; i < std::min(16, limit - token); ++i) emit(token + i, n, out[i]);
          }
          continue;
        }
#endif
        for (int token = base; token < limit;) {
          int rows = token + 4 <= limit ? 4 : 1;
          const int16_t* in = quantized.data() + token * max_in;
          for (int j = 0; j < 32; j += 4) {
            const int8_t* first = weight + (j < 16 ? n + j : n + apart + j - 16) * K;
            const int8_t* w[4] = {first, first + K, first + 2 * K, first + 3 * K};
            float part[4][4];
            if (rows == 4) dot_int8<4, 4>(w, in, max_in, K, part);
            else dot_int8<1, 4>(w, in, max_in, K, part);
            for (int i = 0; i < rows; ++i) std::memcpy(out[i] + j, part[i], 16);
          }
          for (int i = 0; i < rows; ++i, ++token) emit(token, n, out[i]);
        }
      }
    }
    barrier.wait();
  }

  void linear(const LinearView& l, int64_t N, int64_t K, int count, int t, float* y, bool add) {
    gemm(l, N, K, false, count, t, [=](int token, int64_t n, v16f a, v16f b) {
      float* out = y + token * N + n;
      if (add) {
        a += load<v16f>(out);
        b += load<v16f>(out + 16);
      }
      std::memcpy(out, &a, 64);
      std::memcpy(out + 16, &b, 64);
    });
  }

  int64_t block_of(int token, int position) const {
    return step.block_tables[(int64_t)step.slots[token] * step.table_stride + position / m.tokens_per_block];
  }

  // rotate_half convention: dimension d pairs with d + head_size / 2.
  void rope(float* head, int position) const {
    int half = m.head_size / 2;
    const float* c = m.cos + (int64_t)position * half;
    const float* s = m.sin + (int64_t)position * half;
    for (int d = 0; d < half; ++d) {
      float a = head[d], b = head[d + half];
      head[d] = a * c[d] - b * s[d];
      head[d + half] = b * c[d] + a * s[d];
    }
  }

  void rope_and_store(const LayerView& l, int t) {
    int tpb = m.tokens_per_block, hd = m.head_size;
    for (int token = t; token < step.tokens; token += threads) {
      int position = step.positions[token];
      float* row = qkv.data() + token * qkv_size;
      for (int h = 0; h < m.heads + m.kv_heads; ++h) rope(row + h * hd, position);
      int64_t block = block_of(token, position);
      int offset = position % tpb;
      for (int h = 0; h < m.kv_heads; ++h) {
        uint16_t* k = l.k_cache + (block * m.kv_heads + h) * hd * tpb + offset;
        uint16_t* v = l.v_cache + (block * m.kv_heads + h) * hd * tpb + (int64_t)offset * hd;
        const float* kin = row + q_size + h * hd;
        const float* vin = kin + kv_size;
        for (int d = 0; d < hd; ++d) {
          k[(int64_t)d * tpb] = float_to_half(kin[d]);
          v[d] = float_to_half(vin[d]);
        }
      }
    }
    barrier.wait();
  }

  // One query head of one token: q [head_size], keys 0 .. context - 1, out (head_size values, then max, then sum).
  struct QueryRow {
    const float* q;
    int context;
    float* out;
  };

  // Softmax statistics and weighted values over the chunk of keys that begins at `first`, for R rows of the sequence
  // that `token` belongs to. Rows share each load of K and V but no arithmetic, so R does not change a result.
  template <int R>
  void attend_rows(const LayerView& l, int token, int kv_head, int first, const QueryRow* rows) const {
    vi lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    int tpb = m.tokens_per_block, hd = m.head_size, last = first;
    int ends[R];
    for (int r = 0; r < R; ++r) {
      ends[r] = std::min(rows[r].context, first + kAttentionChunk);
      last = std::max(last, ends[r]);
    }
    float inv = 1.f / std::sqrt((float)hd);
    alignas(64) float scores[R][kAttentionChunk];
    for (int base = first; base < last; base += kLanes) {
      const uint16_t* k =
          l.k_cache + (block_of(token, base) * m.kv_heads + kv_head) * (int64_t)hd * tpb + base % tpb;
      vf acc[R] = {};
      for (int d = 0; d < hd; ++d) {
        vf keys = load_half<vf>(k + (int64_t)d * tpb);
        for (int r = 0; r < R; ++r) acc[r] += keys * rows[r].q[d];
      }
      for (int r = 0; r < R; ++r) {
        vf s = lane < ends[r] - base ? acc[r] * inv : vf{} - 1e30f;
        std::memcpy(scores[r] + base - first, &s, sizeof s);
      }
    }
    int padded = (last - first + kLanes - 1) / kLanes * kLanes;
    for (int r = 0; r < R; ++r) {
      vf top = load<vf>(scores[r]), total{};
      for (int j = kLanes; j < padded; j += kLanes) {
        vf s = load<vf>(scores[r] + j);
        top = s > top ? s : top;
      }
      float max = max_of(top);
      for (int j = 0; j < padded; j += kLanes) {
        vf p = exp_nonpositive(load<vf>(scores[r] + j) - max);
        p = lane < ends[r] - first - j ? p : vf{};
        std::memcpy(scores[r] + j, &p, sizeof p);
        total += p;
      }
      rows[r].out[hd] = max;
      rows[r].out[hd + 1] = sum(total);
    }
    for (int d = 0; d < hd; d += kLanes) {
      vf acc[R] = {};
      for (int base = first; base < last;) {
        int stop_at = std::min(last, (base / tpb + 1) * tpb);
        const uint16_t* v = l.v_cache + (block_of(token, base) * m.kv_heads + kv_head) * (int64_t)hd * tpb +
                            (int64_t)(base % tpb) * hd + d;
        for (; base < stop_at; ++base, v += hd) {
          vf value = load_half<vf>(v);
          for (int r = 0; r < R; ++r) acc[r] += value * scores[r][base - first];
        }
      }
      for (int r = 0; r < R; ++r) std::memcpy(rows[r].out + d, &acc[r], sizeof acc[r]);
    }
  }

  // The query heads of `kv_head` for `count` tokens from `token` on, all of one sequence and all reaching this chunk.
  void attend_chunk(const LayerView& l, int token, int count, int kv_head, int chunk, float* out) const {
    int hd = m.head_size, G = group();
    QueryRow rows[kMaxQueryTokens * kMaxGroup];
    for (int i = 0; i < count; ++i)
      for (int g = 0; g < G; ++g)
        rows[i * G + g] = {qkv.data() + (token + i) * qkv_size + ((int64_t)kv_head * G + g) * hd,
                           step.positions[token + i] + 1, out + (i * G + g) * (hd + 2)};
    int first = chunk * kAttentionChunk;
    for (int r = 0, n = count * G; r < n;) {
      int left = n - r;
      if (left >= 12) attend_rows<12>(l, token, kv_head, first, rows + r), r += 12;
      else if (left >= 8) attend_rows<8>(l, token, kv_head, first, rows + r), r += 8;
      else if (left >= 4) attend_rows<4>(l, token, kv_head, first, rows + r), r += 4;
      else if (left == 3) attend_rows<3>(l, token, kv_head, first, rows + r), r += 3;
      else if (left == 2) attend_rows<2>(l, token, kv_head, first, rows + r), r += 2;
      else attend_rows<1>(l, token, kv_head, first, rows + r), r += 1;
    }
  }

  static void merge(float* into, const float* part, int hd) {
    float top = std::max(into[hd], part[hd]);
    float a = std::exp(into[hd] - top), b = std::exp(part[hd] - top);
    for (int d = 0; d < hd; ++d) into[d] = into[d] * a + part[d] * b;
    into[hd] = top;
    into[hd + 1] = into[hd + 1] * a + part[hd + 1] * b;
  }

  void finish(int token, int kv_head, const float* state) {
    int hd = m.head_size, G = group();
    for (int g = 0; g < G; ++g) {
      const float* s = state + g * (hd + 2);
      float* out = attn.data() + token * q_size + ((int64_t)kv_head * G + g) * hd;
      for (int d = 0; d < hd; ++d) out[d] = s[d] / s[hd + 1];
    }
  }

  // Few tokens: threads share (token, head, chunk) and the partial results are merged afterwards. Many tokens: threads
  // share (tokens, head) and merge as they go. Chunks, and so the arithmetic, are the same.
  void attention(const LayerView& l, int t) {
    int hd = m.head_size, G = group(), stride = G * (hd + 2);
    if (step.tokens <= std::max(4 * threads, 16)) {
      int task = 0;
      for (int token = 0; token < step.tokens; ++token)
        for (int h = 0; h < m.kv_heads; ++h)
          for (int c = 0; c * kAttentionChunk <= step.positions[token]; ++c)
            if (task++ % threads == t)
              attend_chunk(l, token, 1, h, c,
                           partial.data() + (((int64_t)token * m.kv_heads + h) * chunks_max + c) * stride);
      barrier.wait();
      for (int token = t; token < step.tokens; token += threads) {
        int chunks = step.positions[token] / kAttentionChunk + 1;
        for (int h = 0; h < m.kv_heads; ++h) {
          float* state = partial.data() + ((int64_t)token * m.kv_heads + h) * chunks_max * stride;
          for (int c = 1; c < chunks; ++c)
            for (int g = 0; g < G; ++g) merge(state + g * (hd + 2), state + c * stride + g * (hd + 2), hd);
          finish(token, h, state);
        }
      }
    } else {
      std::vector<float> state(kMaxQueryTokens * stride), part(kMaxQueryTokens * stride);
      int task = 0;
      for (int token = 0, count; token < step.tokens; token += count) {
        int chunks = step.positions[token] / kAttentionChunk + 1;
        for (count = 1; count < kMaxQueryTokens && token + count < step.tokens; ++count)
          if (step.slots[token + count] != step.slots[token] ||
              step.positions[token + count] / kAttentionChunk + 1 != chunks)
            break;
        for (int h = 0; h < m.kv_heads; ++h) {
          if (task++ % threads != t) continue;
          attend_chunk(l, token, count, h, 0, state.data());
          for (int c = 1; c < chunks; ++c) {
            attend_chunk(l, token, count, h, c, part.data());
            for (int r = 0; r < count * G; ++r) merge(&state[r * (hd + 2)], &part[r * (hd + 2)], hd);
          }
          for (int i = 0; i < count; ++i) finish(token + i, h, state.data() + i * stride);
        }
      }
    }
    // Token rows are split by token in the short form but by task in the long one: meet before they are read.
    barrier.wait();
  }

  void forward(int t) {
    int H = m.hidden, I = m.intermediate;
#if defined(USE_AMX)
    TileConfig config;
    if (amx) _tile_loadconfig(&config);
#endif
    for (int token = t; token < step.tokens; token += threads) {
      const uint16_t* row = m.embedding + (int64_t)step.ids[token] * H;
      for (int k = 0; k < H; k += 16) {
        v16f v = load_half(row + k);
        std::memcpy(&x[(int64_t)token * H + k], &v, 64);
      }
    }
    barrier.wait();
    int T = step.tokens;
    for (const LayerView& l : layers) {
      quantize(x.data(), H, l.input_norm, t);
      linear(l.qkv, qkv_size, H, T, t, qkv.data(), false);
      rope_and_store(l, t);
      attention(l, t);
      quantize(attn.data(), q_size, nullptr, t);
      linear(l.o, H, q_size, T, t, x.data(), true);
      quantize(x.data(), H, l.post_norm, t);
      gemm(l.gate_up, 2 * (int64_t)I, H, true, T, t, [&](int token, int64_t n, v16f gate, v16f up) {
        v16f e = exp_nonpositive(gate < 0.f ? gate : -gate);
        v16f y = gate * (gate < 0.f ? e : v16f{} + 1.f) / (1.f + e) * up;
        std::memcpy(&act[(int64_t)token * I + n], &y, 64);
      });
      quantize(act.data(), I, nullptr, t);
      linear(l.down, H, I, T, t, x.data(), true);
    }
    logits(t);
#if defined(USE_AMX)
    if (amx) _tile_release();
#endif
  }

  void logits(int t) {
    int64_t H = m.hidden, begin, end;
    int rows = step.logit_rows;
    for (int i = t; i < rows; i += threads) {
      float* out = normed.data() + i * H;
      norm_row(x.data() + step.rows[i] * H, m.final_norm, out);
      if (m.lm_head.scale) quantize_row(out, H, i, amx && rows >= kAmxMinTokens);
    }
    barrier.wait();
    if (m.lm_head.scale) {
      linear(m.lm_head, m.vocab, H, rows, t, step.logits, false);
      return;
    }
    share(m.vocab, 4, t, begin, end);
    for (int base = 0; base < rows; base += kRowBlock) {
      int limit = std::min(base + kRowBlock, rows);
      for (int64_t n = begin; n < end; n += 4) {
        const uint16_t* w[4];
        for (int j = 0; j < 4; ++j) w[j] = (const uint16_t*)m.lm_head.weight + (n + j) * H;
        float out[4][4];
        for (int i = base; i < limit;) {
          int count = i + 4 <= limit ? 4 : 1;
          if (count == 4) dot_half<4, 4>(w, normed.data() + i * H, H, H, out);
          else dot_half<1, 4>(w, normed.data() + i * H, H, H, out);
          for (int c = 0; c < count; ++c, ++i)
            std::memcpy(step.logits + (int64_t)i * m.vocab + n, out[c], sizeof(out[c]));
        }
      }
    }
    barrier.wait();
  }
};

}  // namespace

extern "C" {
void* llama_create(const ModelView* view, int threads) { return new Engine(*view, threads); }
void llama_forward(void* engine, const StepView* step) { ((Engine*)engine)->run(*step); }
void llama_destroy(void* engine) { delete (Engine*)engine; }
const char* llama_isa() {
#if defined(USE_AMX)
  return "amx";
#elif defined(__AVX512VNNI__)
  return "avx512-vnni";
#elif defined(__AVX2__)
  return "avx2";
#else
  return "generic";
#endif
}
}
