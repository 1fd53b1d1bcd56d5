// RoPE, the paged KV cache, and attention over it.
#pragma once

#include "matrix.h"

namespace {

constexpr int kMaxGroup = 8;
constexpr int kMaxQueryTokens = 4;  // prefill tokens that share loads of K and V

struct Attention : Matrices {
  using Matrices::Matrices;

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
};

}  // namespace
