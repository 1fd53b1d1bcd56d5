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
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

typedef float v16f __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef int16_t v16s __attribute__((vector_size(32)));
typedef int16_t v32s __attribute__((vector_size(64)));
typedef int8_t v32c __attribute__((vector_size(32)));

constexpr int kActMax = 16383;
constexpr int kAttentionChunk = 256;  // keys between two merges: fixed, so that splitting never changes a sum
constexpr int kRowBlock = 64;         // tokens whose activations stay in L2 while weights stream past
constexpr int kMaxGroup = 8;
constexpr int kPrefetch = 4096;       // bytes ahead; rows are contiguous, so this reaches the next rows (docs/LOG.md)

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

inline v16f load_half(const uint16_t* p) {
#if defined(__AVX512F__)
  return (v16f)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  union { v16f v; __m256 h[2]; } u;
  u.h[0] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  u.h[1] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)));
  return u.v;
#else
  v16f v;
  for (int i = 0; i < 16; ++i) v[i] = half_to_float(p[i]);
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

inline float sum(v16f v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < 16; ++i) total += v[i];
  return total;
#endif
}

inline float max_of(v16f v) {
  float m = v[0];
  for (int i = 1; i < 16; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// e^x for x <= 0 by 2^n * p(r): Cody-Waite reduction and a degree-6 Taylor polynomial, relative error below 4e-7.
inline v16f exp_nonpositive(v16f x) {
  x = x < -87.f ? (v16f{} - 87.f) : x;
  v16f shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the low mantissa bits hold round(x / ln 2)
  v16f n = shifted - 12582912.f;
  v16f r = x - n * 0.693359375f + n * 2.12194440e-4f;
  v16f p = r * (1.f / 720) + (1.f / 120);
  p = p * r + (1.f / 24);
  p = p * r + (1.f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  v16i bits = __builtin_convertvector(n, v16i);
  return (v16f)((v16i)p + (bits << 23));
}

// out[m][j] = sum_k w[j][k] * x[m][k], exact per lane. R rows share each activation load, M tokens each weight load.
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
    for (int j = 0; j < R; ++j) out[m][j] = sum(__builtin_convertvector(acc[m][j], v16f));
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

  void quantize_row(const float* in, int64_t K, int row) {
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
    for (int row = t; row < step.tokens; row += threads) {
      const float* source = in + row * K;
      if (norm) {
        float* out = normed.data() + (int64_t)row * m.hidden;
        norm_row(source, norm, out);
        source = out;
      }
      quantize_row(source, K, row);
    }
    barrier.wait();
  }

  // Four weight rows at a time against all tokens; `store(token, j, value)` takes row j of the four.
  template <class Rows, class Store>
  void gemm(int64_t groups, int64_t K, int t, Rows rows, Store store) {
    int64_t begin, end;
    share(groups, 1, t, begin, end);
    for (int base = 0; base < step.tokens; base += kRowBlock) {
      int limit = std::min(base + kRowBlock, step.tokens);
      for (int64_t g = begin; g < end; ++g) {
        const int8_t* w[4];
        rows(g, w);
        int token = base;
        float out[4][4];
        for (; token + 4 <= limit; token += 4) {
          dot_int8<4, 4>(w, quantized.data() + token * max_in, max_in, K, out);
          for (int i = 0; i < 4; ++i) store(g, token + i, out[i]);
        }
        for (; token < limit; ++token) {
          dot_int8<1, 4>(w, quantized.data() + token * max_in, max_in, K, out);
          store(g, token, out[0]);
        }
      }
    }
    barrier.wait();
  }

  template <class Store>
  void linear(const LinearView& l, int64_t N, int64_t K, int t, Store store) {
    const int8_t* weight = (const int8_t*)l.weight;
    gemm(
        N / 4, K, t,
        [=](int64_t g, const int8_t** w) {
          for (int j = 0; j < 4; ++j) w[j] = weight + (4 * g + j) * K;
        },
        [&](int64_t g, int token, const float* out) {
          for (int j = 0; j < 4; ++j) store(token, 4 * g + j, out[j] * l.scale[4 * g + j] * scale[token]);
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

  // Softmax statistics and weighted values of one chunk of keys for the query heads of one KV head.
  // out: group x (head_size values, then max, then sum).
  void attend_chunk(const LayerView& l, int token, int kv_head, int first, int last, float* out) const {
    int tpb = m.tokens_per_block, hd = m.head_size, G = group();
    float inv = 1.f / std::sqrt((float)hd);
    const float* q = qkv.data() + token * qkv_size + (int64_t)kv_head * G * hd;
    alignas(64) float scores[kMaxGroup][kAttentionChunk];
    for (int base = first; base < last; base += 16) {
      const uint16_t* k =
          l.k_cache + (block_of(token, base) * m.kv_heads + kv_head) * (int64_t)hd * tpb + base % tpb;
      v16f acc[kMaxGroup] = {};
      for (int d = 0; d < hd; ++d) {
        v16f keys = load_half(k + (int64_t)d * tpb);
        for (int g = 0; g < G; ++g) acc[g] += keys * q[g * hd + d];
      }
      for (int g = 0; g < G; ++g)
        for (int j = 0; j < 16; ++j) scores[g][base - first + j] = base + j < last ? acc[g][j] * inv : -1e30f;
    }
    int padded = (last - first + 15) / 16 * 16;
    for (int g = 0; g < G; ++g) {
      v16f top = load<v16f>(scores[g]), total{};
      for (int j = 16; j < padded; j += 16) {
        v16f s = load<v16f>(scores[g] + j);
        top = s > top ? s : top;
      }
      float max = max_of(top);
      for (int j = 0; j < padded; j += 16) {
        v16f p = exp_nonpositive(load<v16f>(scores[g] + j) - max);
        std::memcpy(scores[g] + j, &p, 64);
        total += p;
      }
      out[g * (hd + 2) + hd] = max;
      out[g * (hd + 2) + hd + 1] = sum(total);
    }
    for (int d = 0; d < hd; d += 32) {
      v16f acc[kMaxGroup][2] = {};
      for (int base = first; base < last;) {
        int stop_at = std::min(last, (base / tpb + 1) * tpb);
        const uint16_t* v =
            l.v_cache + (block_of(token, base) * m.kv_heads + kv_head) * (int64_t)hd * tpb + (int64_t)(base % tpb) * hd + d;
        for (; base < stop_at; ++base, v += hd) {
          v16f v0 = load_half(v), v1 = load_half(v + 16);
          for (int g = 0; g < G; ++g) {
            float p = scores[g][base - first];
            acc[g][0] += v0 * p;
            acc[g][1] += v1 * p;
          }
        }
      }
      for (int g = 0; g < G; ++g) std::memcpy(out + g * (hd + 2) + d, acc[g], 128);
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
  // share (token, head) and merge as they go. Chunks, and so the arithmetic, are the same.
  void attention(const LayerView& l, int t) {
    int hd = m.head_size, G = group(), stride = G * (hd + 2);
    if (step.tokens <= std::max(4 * threads, 16)) {
      int task = 0;
      for (int token = 0; token < step.tokens; ++token) {
        int context = step.positions[token] + 1;
        for (int h = 0; h < m.kv_heads; ++h)
          for (int c = 0; c * kAttentionChunk < context; ++c)
            if (task++ % threads == t)
              attend_chunk(l, token, h, c * kAttentionChunk, std::min(context, (c + 1) * kAttentionChunk),
                           partial.data() + (((int64_t)token * m.kv_heads + h) * chunks_max + c) * stride);
      }
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
      std::vector<float> state(stride), part(stride);
      for (int64_t task = t; task < (int64_t)step.tokens * m.kv_heads; task += threads) {
        int token = task / m.kv_heads, h = task % m.kv_heads, context = step.positions[token] + 1;
        attend_chunk(l, token, h, 0, std::min(context, kAttentionChunk), state.data());
        for (int c = kAttentionChunk; c < context; c += kAttentionChunk) {
          attend_chunk(l, token, h, c, std::min(context, c + kAttentionChunk), part.data());
          for (int g = 0; g < G; ++g) merge(state.data() + g * (hd + 2), part.data() + g * (hd + 2), hd);
        }
        finish(token, h, state.data());
      }
    }
    // Token rows are split by token in the short form but by task in the long one: meet before they are read.
    barrier.wait();
  }

  void forward(int t) {
    int H = m.hidden, I = m.intermediate;
    for (int token = t; token < step.tokens; token += threads) {
      const uint16_t* row = m.embedding + (int64_t)step.ids[token] * H;
      for (int k = 0; k < H; k += 16) {
        v16f v = load_half(row + k);
        std::memcpy(&x[(int64_t)token * H + k], &v, 64);
      }
    }
    for (const LayerView& l : layers) {
      quantize(x.data(), H, l.input_norm, t);
      linear(l.qkv, qkv_size, H, t, [&](int token, int64_t n, float y) { qkv[token * qkv_size + n] = y; });
      rope_and_store(l, t);
      attention(l, t);
      quantize(attn.data(), q_size, nullptr, t);
      linear(l.o, H, q_size, t, [&](int token, int64_t n, float y) { x[(int64_t)token * H + n] += y; });
      quantize(x.data(), H, l.post_norm, t);
      const int8_t* gate_up = (const int8_t*)l.gate_up.weight;
      gemm(
          I / 2, H, t,
          [=](int64_t g, const int8_t** w) {
            for (int j = 0; j < 4; ++j) w[j] = gate_up + ((j / 2) * (int64_t)I + 2 * g + j % 2) * H;
          },
          [&](int64_t g, int token, const float* out) {
            for (int j = 0; j < 2; ++j) {
              int64_t n = 2 * g + j;
              float gate = out[j] * l.gate_up.scale[n] * scale[token];
              float up = out[2 + j] * l.gate_up.scale[I + n] * scale[token];
              act[(int64_t)token * I + n] = gate / (1.f + std::exp(-gate)) * up;
            }
          });
      quantize(act.data(), I, nullptr, t);
      linear(l.down, H, I, t, [&](int token, int64_t n, float y) { x[(int64_t)token * H + n] += y; });
    }
    logits(t);
  }

  void logits(int t) {
    int64_t H = m.hidden, begin, end;
    int rows = step.logit_rows;
    for (int i = t; i < rows; i += threads) {
      float* out = normed.data() + i * H;
      norm_row(x.data() + step.rows[i] * H, m.final_norm, out);
      if (m.lm_head.scale) quantize_row(out, H, i);
    }
    barrier.wait();
    share(m.vocab, 4, t, begin, end);
    for (int base = 0; base < rows; base += kRowBlock) {
      int limit = std::min(base + kRowBlock, rows);
      for (int64_t n = begin; n < end; n += 4) {
        float out[4][4];
        for (int i = base; i < limit;) {
          int count = i + 4 <= limit ? 4 : 1;
          if (m.lm_head.scale) {
            const int8_t* w[4];
            for (int j = 0; j < 4; ++j) w[j] = (const int8_t*)m.lm_head.weight + (n + j) * H;
            const int16_t* in = quantized.data() + i * max_in;
            if (count == 4) dot_int8<4, 4>(w, in, max_in, H, out);
            else dot_int8<1, 4>(w, in, max_in, H, out);
          } else {
            const uint16_t* w[4];
            for (int j = 0; j < 4; ++j) w[j] = (const uint16_t*)m.lm_head.weight + (n + j) * H;
            if (count == 4) dot_half<4, 4>(w, normed.data() + i * H, H, H, out);
            else dot_half<1, 4>(w, normed.data() + i * H, H, H, out);
          }
          for (int c = 0; c < count; ++c)
            for (int j = 0; j < 4; ++j) {
              float s = m.lm_head.scale ? m.lm_head.scale[n + j] * scale[i + c] : 1.f;
              step.logits[(int64_t)(i + c) * m.vocab + n + j] = out[c][j] * s;
            }
          i += count;
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
#if defined(__AVX512VNNI__)
  return "avx512-vnni";
#elif defined(__AVX2__)
  return "avx2";
#else
  return "generic";
#endif
}
}
