// Activations to fixed point, the INT8 and INT4 matrices over them, and those of halves over floats.
#pragma once

#include "state.h"

namespace {

constexpr int kActMax = 16383;
constexpr int kRowBlock = 64;     // tokens whose activations stay in L2 while weights stream past
constexpr int kAmxMinTokens = 9;  // fewer tokens than that waste most of a tile

struct Matrices : State {
  using State::State;

  void quantize_row(const float* in, int64_t K, int row, bool tiles, int group = 0) {
    v16i top{};  // magnitudes by their bits: the order of floats, NaN above infinity, where a float's maximum drops NaN
    for (int64_t k = 0; k < K; k += 16) {
      v16i v = load<v16i>(in + k) & 0x7fffffff;
      top = v > top ? v : top;
    }
    int32_t bits = top[0];
    for (int i = 1; i < 16; ++i) bits = std::max(bits, (int32_t)top[i]);
    float amax;
    std::memcpy(&amax, &bits, 4);
    float inverse = amax > 0 ? kActMax / amax : 0.f;
    scale[row] = amax / kActMax;  // NaN or infinite where the row holds such a value, and so is every product with it
    int16_t* q = quantized.data() + (int64_t)row * max_in;
    for (int64_t k = 0; k < K; k += 16) {
      v16f v = load<v16f>(in + k) * inverse + 12582912.f;  // adding 1.5 * 2^23 rounds to nearest even
      v16i i = __builtin_convertvector(v - 12582912.f, v16i);
      auto narrow = __builtin_convertvector(i, v16s);
      std::memcpy(q + k, &narrow, 32);
    }
    if (group) int4_digits(q, K, row, group);
    if (!tiles) return;
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

  // The digits of a row for int4.h, and the sums of its groups.
  void int4_digits(const int16_t* q, int64_t K, int row, int group) {
    int8_t* to = digits.data() + row * digits_stride;
    float* sums = group_sums.data() + (int64_t)row * kInt4Groups;
    std::fill(sums, sums + kInt4Groups, 0.f);
    for (int64_t k = 0; k < (K + kInt4Block - 1) / kInt4Block * kInt4Block; k += 32) {
      v32s v = k < K ? load<v32s>(q + k) : v32s{};
      auto h = __builtin_convertvector(v >> 7, v32c), l = __builtin_convertvector(v & 127, v32c);
      int8_t* at = to + k / kInt4Block * 2 * kInt4Block + int4_place(k, group);
      std::memcpy(at, &h, 32);
      std::memcpy(at + kInt4Block, &l, 32);
      for (int i = 0; k < K && i < 32; ++i) sums[k / group] += 8 * v[i];  // exact: below 2^24
    }
  }

  // One of `rows` rows in fixed point for `next`, or as it is for halves.
  void take(const float* in, int64_t K, int row, int rows, const LinearView& next) {
    if (next.scale) quantize_row(in, K, row, amx && rows >= kAmxMinTokens, next.group);
    else scale[row] = 1.f;
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

  // Rows of `in` [T][K] (after RMSNorm when `norm` is given) as `next` takes them; threads share the tokens.
  void quantize(const float* in, int64_t K, const float* norm, int t, const LinearView& next) {
    int together = step.tokens >= 16 * threads ? 16 : 1;  // rows of one tile share cache lines
    for (int row = 0; row < step.tokens; ++row) {
      if (row / together % threads != t) continue;
      const float* source = in + row * K;
      if (norm) {
        float* out = normed.data() + (int64_t)row * m.hidden;
        norm_row(source, norm, out);
        source = out;
      }
      take(source, K, row, step.tokens, next);
    }
    barrier.wait();
  }

  // Four rows of an INT4 matrix from `row` on against `count` (1 or 4) tokens from `token` on.
  void int4_rows(const LinearView& l, int64_t row, int64_t K, int token, int count, float (*out)[4]) const {
    const uint8_t* w[4];
    const uint16_t* s[4];
    for (int j = 0; j < 4; ++j) {
      w[j] = (const uint8_t*)l.weight + (row + j) * (K / 2);
      s[j] = (const uint16_t*)l.scale + (row + j) * (K / l.group);
    }
    const int8_t* x = digits.data() + token * digits_stride;
    const float* sums = group_sums.data() + (int64_t)token * kInt4Groups;
    if (count == 4) dot_int4<4, 4>(w, s, x, digits_stride, sums, kInt4Groups, K, l.group, out);
    else dot_int4<1, 4>(w, s, x, digits_stride, sums, kInt4Groups, K, l.group, out);
  }

  // The same of a matrix of halves; the tokens' inputs are at `x`.
  static void half_rows(const LinearView& l, int64_t row, int64_t K, const float* x, int count, float (*out)[4]) {
    const uint16_t* first = (const uint16_t*)l.weight + row * K;
    const uint16_t* w[4] = {first, first + K, first + 2 * K, first + 3 * K};
    if (count == 4) dot_half<4, 4>(w, x, K, K, out);
    else dot_half<1, 4>(w, x, K, K, out);
  }

  // W [N][K] against `count` rows that were quantized, or lie in `floats` [count][K] for halves. 2 x 16 rows of W at a
  // time: n.. and n + apart.., the SwiGLU pair of gate and up or simply neighbours. `store(token, n, first, second)` takes
  // both; it is the same code on either path, so that the paths agree to the bit.
  template <class Store>
  void gemm(const LinearView& l, int64_t N, int64_t K, bool pair, int count, int t, const float* floats, Store store) {
    const int8_t* weight = (const int8_t*)l.weight;
    const float* row_scale = l.group ? nullptr : (const float*)l.scale;
    int64_t apart = pair ? N / 2 : 16, span = pair ? 16 : 32, begin, end;
    share(N / 32, 1, t, begin, end);
    auto emit = [&](int token, int64_t n, const float* out) {
      v16f a = load<v16f>(out) * (row_scale ? load<v16f>(row_scale + n) : v16f{} + 1.f) * scale[token];
      v16f b = load<v16f>(out + 16) * (row_scale ? load<v16f>(row_scale + n + apart) : v16f{} + 1.f) * scale[token];
      store(token, n, a, b);
    };
    bool tiles = amx && count >= kAmxMinTokens && l.scale && !l.group;
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
            const int64_t row = j < 16 ? n + j : n + apart + j - 16;
            const int8_t* first = weight + row * K;
            const int8_t* w[4] = {first, first + K, first + 2 * K, first + 3 * K};
            float part[4][4];
            if (l.group) int4_rows(l, row, K, token, rows, part);
            else if (!l.scale) half_rows(l, row, K, floats + token * K, rows, part);
            else if (rows == 4) dot_int8<4, 4>(w, in, max_in, K, part);
            else dot_int8<1, 4>(w, in, max_in, K, part);
            for (int i = 0; i < rows; ++i) std::memcpy(out[i] + j, part[i], 16);
          }
          for (int i = 0; i < rows; ++i, ++token) emit(token, n, out[i]);
        }
      }
    }
    barrier.wait();
  }

  void linear(const LinearView& l, int64_t N, int64_t K, int count, int t, const float* floats, float* y, bool add) {
    gemm(l, N, K, false, count, t, floats, [=](int token, int64_t n, v16f a, v16f b) {
      float* out = y + token * N + n;
      if (add) {
        a += load<v16f>(out);
        b += load<v16f>(out + 16);
      }
      std::memcpy(out, &a, 64);
      std::memcpy(out + 16, &b, 64);
    });
  }
};

}  // namespace
