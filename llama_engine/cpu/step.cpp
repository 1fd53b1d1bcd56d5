// One forward pass of the Llama decoder on a CPU, whole step in one call, paged KV cache included.
//
// Arithmetic: INT8 weights times activations held as 15-bit fixed point with one scale a token, accumulated exactly in
// int32, so a row's result depends neither on the batch around it nor on the number of threads. 15 bits because a
// 512-bit lane then takes 512 pairs of products (K = 16384) without overflow. INT4 weights (int4.h) are exact within a
// group; the groups are added in float32, always in the same order. Halves are multiplied with float32 activations.
// Layouts: K cache [layer][block][kv_head][head_size][tokens_per_block] (lanes are keys: scores need no horizontal
// sums), V cache [layer][block][kv_head][tokens_per_block][head_size], both IEEE half.

#include "attention.h"
#include "sampler.h"

namespace {

struct Engine : Attention {
  std::vector<std::thread> workers;
  std::atomic<int> generation{0};
  std::atomic<bool> stop{false};
  SampleView* samples = nullptr;  // what the workers do next: draw these rows, or without any the step
  int sample_rows = 0;
  std::atomic<int> next_sample{0};

  Engine(const ModelView& view, int n) : Attention(view, n) {
    for (int t = 1; t < n; ++t) workers.emplace_back([this, t] { work(t); });
  }

  ~Engine() {
    stop = true;
    ++generation;
    generation.notify_all();
    for (auto& w : workers) w.join();
  }

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
      samples ? draw() : forward(t);
    }
  }

  void run(const StepView& s) {
    step = s;
    samples = nullptr;
    ++generation;
    generation.notify_all();
    forward(0);
  }

  void run(SampleView* views, int rows) {
    samples = views, sample_rows = rows, next_sample = 0;
    if (rows > 1) {
      ++generation;
      generation.notify_all();
      draw();
    } else if (rows) {
      draw_row(views);
    }
  }

  void draw() {
    for (int i; (i = next_sample++) < sample_rows;) draw_row(samples + i);
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
      quantize(x.data(), H, l.input_norm, t, l.qkv);
      linear(l.qkv, qkv_size, H, T, t, normed.data(), qkv.data(), false);
      rope_and_store(l, t);
      attention(l, t);
      quantize(attn.data(), q_size, nullptr, t, l.o);
      linear(l.o, H, q_size, T, t, attn.data(), x.data(), true);
      quantize(x.data(), H, l.post_norm, t, l.gate_up);
      gemm(l.gate_up, 2 * (int64_t)I, H, true, T, t, normed.data(), [&](int token, int64_t n, v16f gate, v16f up) {
        v16f e = exp_nonpositive(gate < 0.f ? gate : -gate);
        v16f y = gate * (gate < 0.f ? e : v16f{} + 1.f) / (1.f + e) * up;
        std::memcpy(&act[(int64_t)token * I + n], &y, 64);
      });
      quantize(act.data(), I, nullptr, t, l.down);
      linear(l.down, H, I, T, t, act.data(), x.data(), true);
    }
    logits(t);
#if defined(USE_AMX)
    if (amx) _tile_release();
#endif
  }

  void logits(int t) {
    int64_t H = m.hidden;
    int rows = step.logit_rows;
    for (int i = t; i < rows; i += threads) {
      float* out = normed.data() + i * H;
      norm_row(x.data() + step.rows[i] * H, m.final_norm, out);
      take(out, H, i, rows, m.lm_head);
    }
    barrier.wait();
    linear(m.lm_head, m.vocab, H, rows, t, normed.data(), step.logits, false);
  }
};

}  // namespace

extern "C" {
void* llama_create(const ModelView* view, int threads) { return new Engine(*view, threads); }
void llama_forward(void* engine, const StepView* step) { ((Engine*)engine)->run(*step); }
void llama_sample(void* engine, SampleView* views, int rows) {
  if (engine) ((Engine*)engine)->run(views, rows);
  else for (int i = 0; i < rows; ++i) draw_row(views + i);
}
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
