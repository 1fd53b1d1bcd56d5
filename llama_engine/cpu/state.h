// What a step works on: the model and the step as cpu.py passes them, the activations, and where threads meet.
#pragma once

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "dot.h"
#include "int4.h"

extern "C" {

struct LinearView {
  const void* weight;   // [N][K] int8, or half when scale is null; [N][K / 2] of INT4
  const void* scale;    // [N] float; [N][K / group] half of INT4
  int64_t group;        // inputs of INT4 that share a scale, or 0
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

constexpr int kAttentionChunk = 256;  // keys between two merges: fixed, so that splitting never changes a sum

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

struct State {
  ModelView m;
  std::vector<LayerView> layers;
  int threads;
  Barrier barrier;
  StepView step{};
  int64_t q_size, kv_size, qkv_size, max_in, digits_stride = 0;
  std::vector<float> x, qkv, attn, act, scale, normed, partial, group_sums;
  std::vector<int16_t> quantized;
  std::vector<int8_t> high, digits;
  std::vector<uint8_t> low;
  bool amx = false;
  int chunks_max;

  State(const ModelView& view, int n) : m(view), layers(view.layer, view.layer + view.layers), threads(n) {
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
    for (const LayerView& l : layers)  // digits of int4.h, where a matrix needs them: two a value, K rounded up
      if (l.qkv.group || l.o.group || l.gate_up.group || l.down.group)
        digits_stride = 2 * ((max_in + kInt4Block - 1) / kInt4Block * kInt4Block);
    digits.resize(T * digits_stride);
    group_sums.resize(digits_stride ? T * kInt4Groups : 0);
    chunks_max = (m.max_context + kAttentionChunk - 1) / kAttentionChunk;
    partial.resize((size_t)std::max(4 * n, 16) * m.kv_heads * chunks_max * group() * (m.head_size + 2));
    barrier.size = n;
  }

  int group() const { return m.heads / m.kv_heads; }

  // Contiguous share of n units for thread t, in multiples of `unit`.
  void share(int64_t n, int64_t unit, int t, int64_t& begin, int64_t& end) const {
    int64_t units = n / unit;
    begin = units * t / threads * unit;
    end = units * (t + 1) / threads * unit;
  }
};

}  // namespace
