// One row's next token, as llama_engine/sampling.py defines it, to the bit. No full sort: a histogram over the
// logarithms of the weights finds the bin in which top-k or top-p ends, and only that bin is put in order.
#pragma once

#include <algorithm>
#include <vector>

#include "vector.h"

extern "C" {

struct SamplerRecord {  // sampling.RECORD
  int32_t mode, top_k, top_p, num_bias, penalized;
  uint32_t seed[2];
  int32_t num_phrases;
  float scale, unscale, floor, repetition, inverse, frequency, presence, unused;
};

struct SampleView {
  float* logits;             // [vocab], overwritten when penalized, biased or banned
  const SamplerRecord* record;
  int16_t* counts;           // [vocab] as sampling.count_tokens, moved on by the token; null unless penalized
  const int32_t* bias_ids;   // [num_bias]
  const float* biases;       // [num_bias]
  const int32_t* phrase_ids;   // sampling.SamplingParams.phrase_table
  const int32_t* phrase_ends;  // [num_phrases]
  int32_t* recent;             // [kRecent] as sampling.recent_tokens, moved on by the token; null without phrases
  int64_t position;
  int32_t vocab, token;      // the token is written
};

}  // extern "C"

namespace {

// Each product and sum rounds by itself: a fused one would give other bits than the other devices'.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

struct Sampler {
  static constexpr int kRecent = 32;  // sampling.RECENT
  static constexpr int kBins = 2048, kBlock = 512, kHistograms = 4;

  const SampleView& v;
  const SamplerRecord& r;
  int64_t padded;
  float largest = 0, lowest = 0;  // lowest: of t, -28 at least
  // thread_local storage: kept between calls
  std::vector<int32_t>& weight;   // [padded]
  std::vector<int16_t>& bin;      // [padded], larger bins hold smaller logits
  std::vector<int64_t>& histogram;

  Sampler(const SampleView& view, std::vector<int32_t>& w, std::vector<int16_t>& b, std::vector<int64_t>& h)
      : v(view), r(*view.record), padded((view.vocab + kBlock - 1) / kBlock * kBlock), weight(w), bin(b), histogram(h) {
    weight.resize(padded);
    bin.resize(padded);
    histogram.resize(kHistograms * kBins);
  }

  void process() {
    if (r.penalized) {
      for (int64_t i = 0; i < v.vocab; ++i) {
        float x = v.logits[i];
        int count = v.counts[i], output = count >> 1;
        float factor = x > 0 ? r.inverse : r.repetition;
        x = count ? x * factor : x;
        float frequency = r.frequency * (float)output;
        x = x - frequency;
        x = x - (output > 0 ? r.presence : 0.f);
        v.logits[i] = x;
      }
    }
    for (int i = 0; i < r.num_bias; ++i) v.logits[v.bias_ids[i]] += v.biases[i];
    for (int i = 0, first = 0; i < r.num_phrases; first = v.phrase_ends[i++]) {
      int last = v.phrase_ends[i] - 1, at = first;
      while (at < last && v.recent[(v.position - last + at) & (kRecent - 1)] == v.phrase_ids[at]) ++at;
      if (at == last) v.logits[v.phrase_ids[last]] = -INFINITY;
    }
  }

  static bool any(v16i v) {
    int32_t bits = 0;
    for (int j = 0; j < 16; ++j) bits |= v[j];
    return bits;
  }

  template <class F>
  void for_each(F&& f) const {  // sixteen at a time; the rest, filled up with -inf
    int64_t i = 0;
    for (; i + 16 <= v.vocab; i += 16) {
      v16f x;
      std::memcpy(&x, v.logits + i, 64);
      f(i, x);
    }
    if (i < v.vocab) {
      v16f x = v16f{} - INFINITY;
      std::memcpy(&x, v.logits + i, 4 * (v.vocab - i));
      f(i, x);
    }
  }

  // The first of the largest logits, or -1 without a finite one.
  int32_t argmax() {
    v16f most = v16f{} - INFINITY;
    v16i broken{};
    for_each([&](int64_t, v16f x) {
      most = x > most ? x : most;
      broken |= x != x;
    });
    largest = max_of(most);
    if (any(broken) || !std::isfinite(largest)) return -1;
    int64_t i = 0;
    while (v.logits[i] != largest) ++i;
    return i;
  }

  void weigh() {
    v16f low{};
    for_each([&](int64_t i, v16f x) {
      v16f t = (x - largest) * r.scale;
      low = t < low ? t : low;
      t = t >= -40.f ? t : v16f{} - 40.f;
      v16f shifted = t + 12582940.f;
      v16f f = t - (shifted - 12582940.f);
      v16f p = f * 0.0013264723820611835f;
      p = (p + 0.009671512991189957f) * f;
      p = (p + 0.05550733581185341f) * f;
      p = (p + 0.24022242426872253f) * f;
      p = (p + 0.6931470036506653f) * f;
      p = p + 1.f;
      v16i result = __builtin_convertvector((v16f)((v16i)p + ((v16i)shifted << 23)), v16i);
      std::memcpy(&weight[i], &result, 64);
    });
    for (int64_t i = (v.vocab + 15) / 16 * 16; i < padded; ++i) weight[i] = 0;
    lowest = std::max(-max_of(-low), -28.f);
  }

  // Bins of equal width over the t of the row: the same t gives the same bin, a smaller one none before it.
  void sort_into_bins() {
    float width = lowest < 0 ? (kBins - 1) / -lowest : 0.f;
    for_each([&](int64_t i, v16f x) {
      v16f t = (x - largest) * r.scale;
      t = t >= lowest ? t : v16f{} + lowest;
      v16f place = t * -width;
      place = place < kBins - 1.f ? place : v16f{} + (kBins - 1.f);
      v16s found = __builtin_convertvector(__builtin_convertvector(place, v16i), v16s);
      std::memcpy(&bin[i], &found, 32);
    });
  }

  // Keep the fewest tokens, in order, whose measure reaches `target`: their number, or with kMass their weight. The
  // weights of the rest become zero. Tokens of weight zero do not count.
  template <bool kMass>
  void keep_until(int64_t target) {
    std::fill(histogram.begin(), histogram.end(), 0);
    int64_t* h = histogram.data();
    for (int64_t i = 0; i < padded; i += kHistograms)
      for (int j = 0; j < kHistograms; ++j)  // several, lest an addition wait for the one before
        h[j * kBins + bin[i + j]] += kMass ? weight[i + j] : weight[i + j] > 0;
    int64_t reached = 0;
    int last = 0;
    for (;; ++last) {
      int64_t here = 0;
      for (int j = 0; j < kHistograms; ++j) here += h[j * kBins + last];
      if (reached + here >= target) break;
      if (last == kBins - 1) return;  // fewer than top-k have a weight
      reached += here;
    }
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < padded; i += 16) {
      v16i w = load<v16i>(&weight[i]);
      v16i place = __builtin_convertvector(load<v16s>(&bin[i]), v16i);
      v16i here = (place == last) & (w > 0);
      w &= place <= last;
      std::memcpy(&weight[i], &w, 64);
      if (any(here))
        for (int j = 0; j < 16; ++j)
          if (here[j]) ids.push_back((int32_t)i + j);
    }
    // Halve until the end is found: what is surely kept goes to the front.
    auto before = [this](int32_t a, int32_t b) {
      return v.logits[a] != v.logits[b] ? v.logits[a] > v.logits[b] : a < b;
    };
    auto begin = ids.begin(), end = ids.end();
    while (end - begin > 1) {
      auto middle = begin + (end - begin) / 2;
      std::nth_element(begin, middle, end, before);
      int64_t half = 0;
      for (auto i = begin; i != middle; ++i) half += kMass ? weight[*i] : 1;
      if (reached + half >= target) {
        for (auto i = middle; i != end; ++i) weight[*i] = 0;
        end = middle;
      } else {
        reached += half;
        begin = middle;
      }
    }
  }

  int64_t total(int64_t begin, int64_t end) const {
    int64_t sum = 0;
    for (int64_t i = begin; i < end; ++i) sum += weight[i];
    return sum;
  }

  uint64_t random_bits() const {
    uint64_t x = ((uint64_t)r.seed[1] << 32 | r.seed[0]) + ((uint64_t)v.position + 1) * 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return (x ^ (x >> 31)) >> 11;
  }

  int32_t draw() {
    weigh();
    bool top_k = r.top_k > 0 && r.top_k < v.vocab, top_p = r.top_p < 1 << 30;
    if (top_k || top_p) sort_into_bins();
    if (top_k) keep_until<false>(r.top_k);
    if (top_p) keep_until<true>((int64_t)(((unsigned __int128)r.top_p * total(0, padded) + (1 << 30) - 1) >> 30));
    if (r.floor > -28.f) {
      for_each([&](int64_t i, v16f x) {
        v16f t = (x - largest) * r.scale;
        v16i w;
        std::memcpy(&w, &weight[i], 64);
        w &= t >= r.floor;
        std::memcpy(&weight[i], &w, 64);
      });
    }
    int64_t sums = 0;
    std::vector<int64_t> blocks(padded / kBlock);
    for (size_t b = 0; b < blocks.size(); ++b) sums += blocks[b] = total(b * kBlock, (b + 1) * kBlock);
    int64_t target = (int64_t)(((unsigned __int128)random_bits() * sums) >> 53), at = 0;
    size_t b = 0;
    while (at + blocks[b] <= target) at += blocks[b++];
    int64_t i = b * kBlock;
    while ((at += weight[i]) <= target) ++i;
    return i;
  }

  int32_t run() {
    process();
    int32_t token = argmax();
    if (token >= 0 && r.mode == 2) token = draw();
    if (token >= 0 && r.penalized && v.counts[token] < 32766) v.counts[token] += 2;
    if (token >= 0 && r.num_phrases) v.recent[v.position & (kRecent - 1)] = token;
    return token;
  }
};

#if !defined(__clang__)
#pragma GCC pop_options
#endif

void draw_row(SampleView* view) {
  thread_local std::vector<int32_t> weight;
  thread_local std::vector<int16_t> bin;
  thread_local std::vector<int64_t> histogram;
  view->token = Sampler(*view, weight, bin, histogram).run();
}

}  // namespace
