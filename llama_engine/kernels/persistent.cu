// One launch decodes one token of 1, 2 or 4 sequences of a Llama-architecture model with INT8 weights.
//
// One block a multiprocessor. A producer thread streams this block's rows of every matrix (and its share of the KV
// cache) in execution order through one ring of shared memory; weights depend on nothing, so it never waits for
// another block. Eight consumer warps each own an eighth of K: they hold the activations of the current matrix as two
// planes of signed 8-bit digits in registers and add exact integer sums.
//
// Blocks exchange activations as words that carry their own readiness: 24 bits of a float32 and an 8-bit flag that
// counts layers. A reader polls the words it needs; there are no fences, counters or barriers between blocks, because
// under a saturated memory system each of those costs a round trip. A word is overwritten one layer later at the
// earliest, when every block is known, through the chain of its own inputs, to have read it.
//
// Compiled at run time by persistent.py, which defines the geometry: HIDDEN, INTER, LAYERS, HEADS, KV_HEADS, HEAD,
// VOCAB, TPB (tokens per block), GRID, ROWS, and optionally ELEM_BF16, LM_INT8, TRACE.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int WARPS = 8, THREADS = WARPS * 32;
#ifndef IN_FLIGHT
#define IN_FLIGHT 3
#endif
#ifndef IN_FLIGHT_L2
#define IN_FLIGHT_L2 6
#endif
#ifndef PREFETCH
#define PREFETCH 8
#endif
#ifndef PACE
#define PACE 1400
#endif
constexpr int STAGE = 16384, SMEM = 232448;
constexpr int Q_SIZE = HEADS * HEAD, KV_SIZE = KV_HEADS * HEAD, QKV = Q_SIZE + 2 * KV_SIZE;
constexpr int GROUP = HEADS / KV_HEADS;
__host__ __device__ constexpr int power_of_two(int n) { return n < 2 ? 1 : 2 * power_of_two(n / 2); }
constexpr int SPLITS = power_of_two(GRID / (KV_HEADS * ROWS));  // blocks that share a KV head's context
constexpr int OUTPUTS = GROUP * HEAD, SLICE = OUTPUTS / SPLITS;  // a unit's outputs; those it merges over the splits
constexpr int UNITS = ROWS * KV_HEADS * SPLITS;
constexpr int LANES_PER_KEY = HEAD / 16, KEYS_PER_WARP = 32 / LANES_PER_KEY;
constexpr int PIECE = WARPS * KEYS_PER_WARP < TPB ? WARPS * KEYS_PER_WARP : TPB;  // positions in one stage
constexpr int DIMS = HEAD / 32;                                                   // value dimensions a lane sums
__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int max_of(int a, int b) { return a > b ? a : b; }
constexpr int RS = STAGE / HIDDEN, PAIRS = RS / 2;  // rows of a hidden-wide matrix in one stage; gate/up pairs
constexpr int RS_Q = STAGE / Q_SIZE, RS_I = STAGE / INTER;
#ifdef LM_INT8
constexpr int RS_LM = RS, LM_CHUNK = 128 / RS_LM * RS_LM, LM_BYTES = HIDDEN;
#else
constexpr int RS_LM = STAGE / (2 * HIDDEN), LM_CHUNK = 64 / RS_LM * RS_LM, LM_BYTES = 2 * HIDDEN;
#endif
constexpr int MAX_PAIRS = ceil_div(INTER, GRID);
constexpr int ACC_ROWS = max_of(max_of(2 * MAX_PAIRS, ceil_div(QKV, GRID)), max_of(ceil_div(HIDDEN, GRID), 128));
#define INF __int_as_float(0x7f800000)
#define NONE -1e30f  // below any score, and finite: the difference of two is a number
constexpr u32 SPIN_LIMIT = 1u << 21;  // seconds; a lost arrival must trap, not hang the GPU

static_assert(HIDDEN % 1024 == 0 && Q_SIZE % 1024 == 0 && INTER % 1024 == 0, "K is split over 8 warps of 32 words");
static_assert(HIDDEN <= STAGE / 2 && Q_SIZE <= STAGE && INTER <= STAGE, "a stage holds at least one row (one pair)");
static_assert(HEAD == 64 || HEAD == 128, "head size");
static_assert(MAX_PAIRS <= THREADS && ceil_div(QKV, GRID) <= THREADS, "one epilogue thread a row");
static_assert(UNITS <= GRID, "one attention unit a block at most");
static_assert(OUTPUTS % SPLITS == 0 && SLICE <= THREADS, "one merging thread an output");
static_assert(HIDDEN >= GRID && INTER >= GRID && QKV >= GRID, "every block takes part in every exchange");
static_assert(ceil_div(HIDDEN, GRID) <= THREADS, "the residual lives in registers");

struct Params {
    const u64* layers;  // [LAYERS][TABLE] pointers
    const float* norms;  // [2 * LAYERS + 1][HIDDEN], permuted
    const float *cosine, *sine;  // [max_seq_len][HEAD / 2]
    const u8 *embedding, *lm_weight;
    const float* lm_scale;
    const int* slot_ids;
    int *last_token, *position;
    const int* block_tables;
    int* sampled;
    float* logits;  // [ROWS][VOCAB] or null
    u32 *x_attention, *x_mlp, *qkv, *attended, *hidden, *partial;  // exchanged words, see exchange()
    u32* sync;
    u64* trace;
    int table_stride, num_blocks, dummy_slot;
    float eps;
};
enum { QKV_W, QKV_S, O_W, O_S, GU_W, GU_S, DOWN_W, DOWN_S, KV, TABLE };
enum { LAUNCHES = 0, DONE = 32, BEST = 64, SENT_HIDDEN = 96, SENT_X = 128, SYNC_WORDS = 160 };  // words of Params::sync
constexpr int UNIT_WORDS = OUTPUTS + 2 * GROUP;
enum { T_FULL_QKV, T_FULL_KV, T_FULL_O, T_FULL_GU, T_FULL_DOWN, T_FULL_LM, T_ATT_LOAD, T_ATT_KEYS, T_ATT_MERGE, T_PRO_QKV, T_PRO_O, T_PRO_GU, T_PRO_DOWN, T_EPI_QKV, T_EPI_O, T_EPI_GU, T_EPI_DOWN, T_GEMV_QKV, T_GEMV_O, T_GEMV_GU, T_GEMV_DOWN, T_TOTAL, T_COUNT };

struct Shared {
    u64 full[16], empty[16];
    u64 table[LAYERS][TABLE];
    alignas(16) int acc[ACC_ROWS * ROWS * 2];
    union alignas(16) {
        float merge[WARPS][GROUP * HEAD];
        float lm[64 * WARPS * ROWS];
    };
    float merge_ml[WARPS][GROUP][2];
    alignas(16) float inputs[(GROUP + 2) * HEAD], slices[SPLITS * (SLICE + 2 * GROUP)];
    float reduce[WARPS][ROWS][2];
    float rope[2][HEAD / 2];
    u64 best[WARPS];
    int slot[ROWS], position[ROWS], token[ROWS], last;
    u32 epoch;
    u64 trace[T_COUNT];
    long long mark;
};
constexpr int STAGES = (SMEM - (int)sizeof(Shared)) / STAGE < 16 ? (SMEM - (int)sizeof(Shared)) / STAGE : 16;

#ifdef TRACE
#define TIMED(id, who, statement) \
    { long long t0_ = clock64(); statement; if (who) s.trace[id] += clock64() - t0_; }
// consumer thread 0: the time since the last mark goes to `id`
#define MARK(id) \
    if (threadIdx.x == 0) { const long long now_ = clock64(); s.trace[id] += now_ - s.mark, s.mark = now_; }
#else
#define TIMED(id, who, statement) { statement; }
#define MARK(id)
#endif

// ---------------------------------------------------------------- small instructions
__device__ __forceinline__ u32 smem_addr(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void consumer_sync() { asm volatile("bar.sync 1, 256;" ::: "memory"); }
__device__ __forceinline__ void mbar_wait(u32 bar, u32 parity) {
    for (u32 n = 0;; ++n) {
        u32 ok;
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(ok) : "r"(bar), "r"(parity) : "memory");
        if (ok) return;
        if (n > SPIN_LIMIT) __trap();
    }
}
__device__ __forceinline__ bool mbar_test(u32 bar, u32 parity) {
    u32 ok;
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(ok) : "r"(bar), "r"(parity) : "memory");
    return ok;
}
__device__ __forceinline__ void prefetch(u64 src, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(src), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbar_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void mbar_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bulk_copy(u32 dst, u64 src, u32 bytes, u32 bar, u64 policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(dst), "l"(src), "r"(bytes), "r"(bar), "l"(policy) : "memory");
}
__device__ __forceinline__ u32 add_acq_rel(u32* p, u32 v) {
    u32 old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
    return old;
}
__device__ __forceinline__ int warp_sum(int v) { return __reduce_add_sync(0xffffffffu, v); }
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int m = 16; m; m >>= 1) v += __shfl_xor_sync(0xffffffffu, v, m);
    return v;
}
// The warp's sums of N values a lane; lane l gets that of value l / (32 / N).
template <int N> __device__ __forceinline__ float sum_many(const float (&values)[N]) {
    static_assert((N & (N - 1)) == 0 && N <= 32, "halved at each step");
    float v[N];
    int m = 16;
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = values[i];
#pragma unroll
    for (int n = N / 2; n; n /= 2, m /= 2)
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const bool up = threadIdx.x & m;
            v[i] = (up ? v[i + n] : v[i]) + __shfl_xor_sync(0xffffffffu, up ? v[i] : v[i + n], m);
        }
#pragma unroll
    for (; m; m /= 2) v[0] += __shfl_xor_sync(0xffffffffu, v[0], m);
    return v[0];
}
__device__ __forceinline__ float2 widen_half(u32 w) {
    float2 f;
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }" : "=f"(f.x), "=f"(f.y) : "r"(w));
    return f;
}
__device__ __forceinline__ u32 narrow_half(float a, float b) {
    u32 w;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(b), "f"(a));
    return w;
}
__device__ __forceinline__ float2 widen(u32 w) {
#ifdef ELEM_BF16
    return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
#else
    return widen_half(w);
#endif
}

// ---------------------------------------------------------------- the ring
struct Ring {
    u32 data, full, empty, slot = 0, parity = 0, issued = 0;
    __device__ void advance() {
        if (++slot == STAGES) { slot = 0; parity ^= 1; }
        ++issued;
    }
    __device__ u32 stage() const { return data + slot * STAGE; }
    __device__ u32 full_bar() const { return full + slot * 8; }
    __device__ bool is_empty() const { return mbar_test(empty + slot * 8, parity ^ 1); }
    // Whether fewer than `limit` stages are on their way: deeper queues in the memory system would only make
    // everybody's small loads slow.
    __device__ bool may_issue(u32 limit) const {
        const bool wrapped = slot < limit;
        return issued < limit || mbar_test(full + (slot + (wrapped ? STAGES : 0) - limit) * 8, parity ^ wrapped);
    }
    __device__ void wait_full() const { mbar_wait(full_bar(), parity); }
    __device__ void release() {
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbar_arrive(empty + slot * 8);
        advance();
    }
};

// Rows of an n-row matrix that this block owns. The blocks with one row more move on with `turn`, the layer where
// a row's owner may change, so that over the token every block streams about the same number of bytes.
struct Part { int start, count; };
__device__ Part part_of(int n, int turn) {
    const int cta = blockIdx.x, q = n / GRID, r = n % GRID, off = turn * r % GRID, end = off + r - GRID;
    const int rel = (cta - off + GRID) % GRID;
    const int before = end <= 0 ? min(max(cta - off, 0), r) : min(cta, end) + max(cta - off, 0);
    return {cta * q + before, q + (rel < r)};
}

// The positions this block attends to: part of one KV head of one row. The new token's position is not among them.
struct Unit { int row, head, split, lo, hi; bool active; };
__device__ Unit unit_of(const int* positions) {
    Unit u;
    u.active = blockIdx.x < UNITS;
    const int id = u.active ? blockIdx.x : 0;
    u.row = id / (KV_HEADS * SPLITS), u.head = id / SPLITS % KV_HEADS, u.split = id % SPLITS;
    const int past = positions[u.row], per = (ceil_div(past, SPLITS) + 7) & ~7;
    u.lo = min(u.split * per, past), u.hi = min(u.lo + per, past);
    return u;
}
__device__ __forceinline__ int piece_end(int p, int hi) { return min((p / PIECE + 1) * PIECE, hi); }

// ---------------------------------------------------------------- producer
// What one stage holds: `bytes` from `a` at its start and, if `second`, as many from `b` at offset `second`.
struct Piece { u64 a, b; u32 bytes, second; };

// Walks over everything this block reads from device memory, in the order in which it is consumed.
struct Cursor {
    int layer = 0, part = 0, at = 0;
    __device__ Piece next(const Params& p, const Shared& s, const Unit& unit) {
        for (;; at = 0, layer += ++part == 5, part %= 5) {
            const u64* t = s.table[layer];
            Part rows;
            u64 base;
            int per;
            u32 bytes;
            if (layer == LAYERS) {
                if (part) return {0, 0, 0, 0};
                rows = part_of(VOCAB, 0), base = (u64)p.lm_weight, per = RS_LM, bytes = LM_BYTES;
            } else if (part == 0) {
                rows = part_of(QKV, layer), base = t[QKV_W], per = RS, bytes = HIDDEN;
            } else if (part == 1) {
                if (!unit.active) continue;
                const int pos = unit.lo + at, end = piece_end(pos, unit.hi);
                if (pos >= unit.hi) continue;
                const int block = __ldg(p.block_tables + (u64)s.slot[unit.row] * p.table_stride + pos / TPB);
                base = t[KV] + (((u64)block * KV_HEADS + unit.head) * TPB + pos % TPB) * HEAD * 2;
                at = end - unit.lo;
                return {base, base + (u64)p.num_blocks * KV_HEADS * TPB * HEAD * 2, (u32)(end - pos) * HEAD * 2, STAGE / 2};
            } else if (part == 2) {
                rows = part_of(HIDDEN, 0), base = t[O_W], per = RS_Q, bytes = Q_SIZE;
            } else if (part == 3) {
                rows = part_of(INTER, layer), base = t[GU_W], per = PAIRS, bytes = HIDDEN;
            } else {
                rows = part_of(HIDDEN, 0), base = t[DOWN_W], per = RS_I, bytes = INTER;
            }
            if (at >= rows.count) continue;
            const u64 a = base + (u64)(rows.start + at) * bytes;
            bytes *= min(per, rows.count - at), at += per;
            const bool pair = part == 3 && layer < LAYERS;
            return {a, a + (u64)INTER * HIDDEN, bytes, pair ? PAIRS * HIDDEN : 0u};
        }
    }
};
__device__ void produce(const Params& p, Shared& s, Ring ring) {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    const Unit unit = unit_of(s.position);
    Cursor cursor, ahead;
    int lead = 0;  // stages from the current one on that are already on their way to L2
    long long last = clock64();
    // While consumers wait for other blocks and the ring is full, device memory goes on reading at its own pace, into
    // L2; and so it does until the ring, which L2 refills faster, has caught up.
    auto pump = [&](bool full) {
        if (lead < PREFETCH && (full || lead) && clock64() - last > PACE) {
            const Piece next = ahead.next(p, s, unit);
            if (next.bytes) prefetch(next.a, next.bytes);
            if (next.bytes && next.second) prefetch(next.b, next.bytes);
            ++lead, last = clock64();
        }
    };
    for (;;) {
        if (lead == 0) ahead = cursor;
        const Piece piece = cursor.next(p, s, unit);
        if (piece.bytes == 0) return;
        u32 spins = 0;
        for (; !ring.is_empty(); pump(true))
            if (++spins > 16 * SPIN_LIMIT) __trap();
        for (; !ring.may_issue(lead ? IN_FLIGHT_L2 : IN_FLIGHT); pump(false))
            if (++spins > 16 * SPIN_LIMIT) __trap();
        if (lead) --lead;
        else last = clock64();
        mbar_expect(ring.full_bar(), piece.second ? 2 * piece.bytes : piece.bytes);
        bulk_copy(ring.stage(), piece.a, piece.bytes, ring.full_bar(), policy);
        if (piece.second) bulk_copy(ring.stage() + piece.second, piece.b, piece.bytes, ring.full_bar(), policy);
        ring.advance();
    }
}

// ---------------------------------------------------------------- activations
// Lane l of warp w owns, of every row of K bytes, NV vectors of VEC words. Activations lie in global memory in
// the order in which consecutive lanes read consecutive float4 of them; `permuted` says where element k lies.
template <int K> struct Split {
    static constexpr int W = K / 1024, VEC = W % 4 == 0 ? 4 : W % 2 == 0 ? 2 : 1, NV = W / VEC;
    __device__ static int permuted(int k) {
        const int in_vector = k % (128 * VEC);
        return k - in_vector + in_vector % (4 * VEC) / 4 * 128 + in_vector / (4 * VEC) * 4 + k % 4;
    }
    __device__ static int word(int w) {  // first element of this lane's word w, in permuted order
        return (threadIdx.x / 32) * (K / WARPS) + w / VEC * 128 * VEC + w % VEC * 128 + threadIdx.x % 32 * 4;
    }
    __device__ static int natural(int w) {  // the same in natural order
        return (threadIdx.x / 32) * (K / WARPS) + w / VEC * 128 * VEC + threadIdx.x % 32 * 4 * VEC + w % VEC * 4;
    }
};
template <int K> struct Digits {
    int hi[ROWS][K / 1024], lo[ROWS][K / 1024];
    float scale[ROWS];
};
__device__ __forceinline__ int to_fixed(float v) { return (int)(v + copysignf(0.5f, v)); }
__device__ __forceinline__ void pack(float4 v, float inv, int& hi, int& lo) {
    const int a = to_fixed(v.x * inv), b = to_fixed(v.y * inv), c = to_fixed(v.z * inv), d = to_fixed(v.w * inv);
    lo = __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
    hi = __byte_perm(__byte_perm(a + 128, b + 128, 0x0051), __byte_perm(c + 128, d + 128, 0x0051), 0x5410);
}
__device__ __forceinline__ float inverse_of(float amax) { return amax > 0 ? 32512.0f / amax : 0.0f; }

// ---------------------------------------------------------------- words between blocks
// What travels is the upper 24 bits of a float32 (an error of 2^-17, below that of the 16-bit digits) and a flag.
__device__ __forceinline__ u32 flag_of(const Shared& s, int layer) { return (s.epoch + layer + 1) & 255; }
__device__ __forceinline__ void send(u32* word, float value, u32 flag) {
    const u32 w = ((__float_as_uint(value) + 0x80) & ~255u) | flag;
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(w) : "memory");
}
__device__ __forceinline__ float received(u32 word) { return __uint_as_float(word & ~255u); }
__device__ __forceinline__ u32 peek(const u32* p) {
    u32 w;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(w) : "l"(p) : "memory");
    return w;
}
__device__ __forceinline__ uint4 peek4(const u32* p) {
    uint4 w;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"(p) : "memory");
    return w;
}
__device__ __forceinline__ bool ready(uint4 w, u32 flag) {
    return (((w.x ^ flag) | (w.y ^ flag) | (w.z ^ flag) | (w.w ^ flag)) & 255) == 0;
}
// A hint that a block has sent its words: no order is promised, it only keeps readers from polling data too early.
__device__ __forceinline__ void hint(u32* counter) {
    consumer_sync();
    if (threadIdx.x == 0) asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ void await_hint(const u32* counter, u32 target) {
    if (threadIdx.x == 0)
        for (u32 n = 0; peek(counter) < target; ++n)
            if (n > SPIN_LIMIT) __trap();
    consumer_sync();
}
// N vectors at at(0) .. at(N - 1): polls the first, then asks for the others at once.
template <int N, typename At> __device__ __forceinline__ void receive(float4 (&v)[N], u32 flag, At at) {
    uint4 w[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        w[i] = peek4(at(i));
        for (u32 n = 0; i == 0 && !ready(w[0], flag); ++n, w[0] = peek4(at(0)))
            if (n > SPIN_LIMIT) __trap();
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        for (u32 n = 0; !ready(w[i], flag); ++n, w[i] = peek4(at(i)))
            if (n > SPIN_LIMIT) __trap();
        v[i] = make_float4(received(w[i].x), received(w[i].y), received(w[i].z), received(w[i].w));
    }
    __syncwarp();
}
// N words at at(0) .. at(N - 1), one or a few a thread, into shared memory; the caller synchronizes.
template <int N, typename At> __device__ __forceinline__ void receive_shared(float* to, u32 flag, At at) {
    u32 w[ceil_div(N, THREADS)];
#pragma unroll
    for (int i = threadIdx.x, k = 0; k < ceil_div(N, THREADS); i += THREADS, ++k)
        if (i < N) w[k] = peek(at(i));
#pragma unroll
    for (int i = threadIdx.x, k = 0; k < ceil_div(N, THREADS); i += THREADS, ++k)
        if (i < N) {
            for (u32 n = 0; (w[k] ^ flag) & 255; ++n, w[k] = peek(at(i)))
                if (n > SPIN_LIMIT) __trap();
            to[i] = received(w[k]);
        }
}

__device__ __forceinline__ float largest_of(float4 a, float top) {
    return fmaxf(top, fmaxf(fmaxf(fabsf(a.x), fabsf(a.y)), fmaxf(fabsf(a.z), fabsf(a.w))));
}
__device__ __forceinline__ float warp_max(float v) {  // of values >= 0
    return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(v)));
}
// Residual words of this lane -> times the norm's weight, and a row's RMS factor and largest magnitude before it.
__device__ void normalize(Shared& s, const float4 (&weight)[HIDDEN / 1024], float eps,
                          float4 (&v)[ROWS * (HIDDEN / 1024)], float (&rstd)[ROWS], float (&amax)[ROWS]) {
    constexpr int W = HIDDEN / 1024;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float sum = 0, top = 0;
#pragma unroll
        for (int w = 0; w < W; ++w) {
            float4& a = v[r * W + w];
            sum += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w;
            a.x *= weight[w].x, a.y *= weight[w].y, a.z *= weight[w].z, a.w *= weight[w].w;
            top = largest_of(a, top);
        }
        sum = warp_sum(sum), top = warp_max(top);
        if (threadIdx.x % 32 == 0) s.reduce[threadIdx.x / 32][r][0] = sum, s.reduce[threadIdx.x / 32][r][1] = top;
    }
    consumer_sync();
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float sum = 0, top = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += s.reduce[w][r][0], top = fmaxf(top, s.reduce[w][r][1]);
        rstd[r] = rsqrtf(sum / HIDDEN + eps), amax[r] = top;
    }
}
__device__ void norm_digits(Shared& s, const float4 (&weight)[HIDDEN / 1024], float eps,
                            float4 (&v)[ROWS * (HIDDEN / 1024)], Digits<HIDDEN>& d) {
    constexpr int W = HIDDEN / 1024;
    float rstd[ROWS], amax[ROWS];
    normalize(s, weight, eps, v, rstd, amax);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        d.scale[r] = amax[r] * rstd[r] / 32512.0f;
#pragma unroll
        for (int w = 0; w < W; ++w) pack(v[r * W + w], inverse_of(amax[r]), d.hi[r][w], d.lo[r][w]);
    }
}
template <int K> __device__ void plain_digits(Shared& s, const u32* source, u32 flag, Digits<K>& d) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float4 v[K / 1024];
        float top = 0;
        receive(v, flag, [&](int w) { return source + r * K + Split<K>::word(w); });
#pragma unroll
        for (int w = 0; w < K / 1024; ++w) top = largest_of(v[w], top);
        top = warp_max(top);
        if (threadIdx.x % 32 == 0) s.reduce[threadIdx.x / 32][r][0] = top;
        consumer_sync();
#pragma unroll
        for (int w = 0; w < WARPS; ++w) top = fmaxf(top, s.reduce[w][r][0]);
        d.scale[r] = top / 32512.0f;
#pragma unroll
        for (int w = 0; w < K / 1024; ++w) pack(v[w], inverse_of(top), d.hi[r][w], d.lo[r][w]);
    }
}

// ---------------------------------------------------------------- matrices
template <int N> struct Words { int w[N]; };
template <int N> __device__ __forceinline__ Words<N> load_shared(u32 addr) {
    Words<N> v;
    if constexpr (N == 4)
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "r"(addr));
    else if constexpr (N == 2)
        asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.w[0]), "=r"(v.w[1]) : "r"(addr));
    else
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v.w[0]) : "r"(addr));
    return v;
}

// acc[row][r] += the exact sums of `count` rows that arrive NROWS a stage, each sum as (high, low) with value
// 256 * high + low. PAIRED: a stage holds NROWS / 2 gate rows, then as many up rows; gate j is added to acc row j, up j
// to acc row MAX_PAIRS + j. A stage's sums are reduced over the warp while the next stage's words arrive.
template <int K, int NROWS, bool PAIRED>
__device__ void gemv(Ring& ring, Shared& s, const Digits<K>& d, int count, int trace) {
    using S = Split<K>;
    // 32512 * 128 * K / WARPS < 2^31: one integer holds a warp's sum of both digits
    constexpr bool ONE = K / WARPS <= 512;
    constexpr int PER = PAIRED ? NROWS / 2 : NROWS, VALUES = NROWS * ROWS, PASSES = ceil_div(VALUES, 16);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sums[VALUES][ONE ? 1 : 2];
    auto flush = [&](int first) {
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            int mine = 0;
#pragma unroll
            for (int c = 0; c < 16 && pass * 16 + c < VALUES; ++c) {
                const int* sum = sums[pass * 16 + c];
                if constexpr (ONE) {
                    const int both = warp_sum(sum[0]);
                    if (lane / 2 == c) mine = both;
                } else {
                    const int high = warp_sum(sum[0]), low = warp_sum(sum[1]);
                    if (lane == 2 * c) mine = high;
                    if (lane == 2 * c + 1) mine = low;
                }
            }
            if (ONE) mine = lane % 2 ? mine & 255 : mine >> 8;
            const int value = pass * 16 + lane / 2, row = value / ROWS;
            const bool up = PAIRED && row >= PER;
            const int item = first + (up ? row - PER : row);
            if (value < VALUES && item < count)
                atomicAdd(&s.acc[((item + (up ? MAX_PAIRS : 0)) * ROWS + value % ROWS) * 2 + lane % 2], mine);
        }
    };
    for (int first = 0; first < count; first += PER) {
        TIMED(trace, threadIdx.x == 0, ring.wait_full());
        const u32 base = ring.stage() + warp * (K / WARPS) + lane * 4 * S::VEC;
        Words<S::VEC> v[NROWS][S::NV];
#pragma unroll
        for (int i = 0; i < NROWS; ++i)
#pragma unroll
            for (int n = 0; n < S::NV; ++n) v[i][n] = load_shared<S::VEC>(base + i * K + n * 128 * S::VEC);
        if (first) flush(first - PER);
#pragma unroll
        for (int i = 0; i < NROWS; ++i)
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                int high = 0, low = 0;
#pragma unroll
                for (int w = 0; w < S::W; ++w) {
                    high = __dp4a(v[i][w / S::VEC].w[w % S::VEC], d.hi[r][w], high);
                    low = __dp4a(v[i][w / S::VEC].w[w % S::VEC], d.lo[r][w], low);
                }
                if constexpr (ONE) sums[i * ROWS + r][0] = high * 256 + low;
                else sums[i * ROWS + r][0] = high, sums[i * ROWS + r][1] = low;
            }
        ring.release();
    }
    if (count > 0) flush((count - 1) / PER * PER);
}
// Takes a sum out of acc (leaving zero for the next matrix).
__device__ __forceinline__ float take(Shared& s, int row, int r, float row_scale, float weight_scale) {
    int2* cell = (int2*)&s.acc[(row * ROWS + r) * 2];
    const int2 sum = *cell;
    *cell = make_int2(0, 0);
    return ((float)sum.x * 256.0f + (float)sum.y) * row_scale * weight_scale;
}

// ---------------------------------------------------------------- attention
// Online softmax of GROUP query heads over keys KEYS_PER_WARP at a time; scores are in units of log2.
struct Softmax {
    float top[GROUP], sum[GROUP], acc[GROUP][DIMS];
    __device__ void clear() {
#pragma unroll
        for (int h = 0; h < GROUP; ++h) {
            top[h] = NONE, sum[h] = 0;
#pragma unroll
            for (int i = 0; i < DIMS; ++i) acc[h][i] = 0;
        }
    }
    // score: this lane's key (lane / LANES_PER_KEY), -inf where there is none; keys 0 .. count - 1 exist (count >= 1)
    template <typename Value> __device__ void add(float (&score)[GROUP], int count, Value value) {
#pragma unroll
        for (int h = 0; h < GROUP; ++h) {
            float best = score[h];
#pragma unroll
            for (int m = LANES_PER_KEY; m < 32; m <<= 1) best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, m));
            best = fmaxf(best, top[h]);
            const float shrink = exp2f(top[h] - best);
            score[h] = exp2f(score[h] - best);
            float total = score[h];
#pragma unroll
            for (int m = LANES_PER_KEY; m < 32; m <<= 1) total += __shfl_xor_sync(0xffffffffu, total, m);
            sum[h] = sum[h] * shrink + total, top[h] = best;
#pragma unroll
            for (int i = 0; i < DIMS; ++i) acc[h][i] *= shrink;
        }
#pragma unroll
        for (int key = 0; key < KEYS_PER_WARP; ++key) {
            if (key >= count) break;  // the same for the whole warp
            float v[DIMS];
            value(key, v);
#pragma unroll
            for (int h = 0; h < GROUP; ++h) {
                const float weight = __shfl_sync(0xffffffffu, score[h], key * LANES_PER_KEY);
#pragma unroll
                for (int i = 0; i < DIMS; ++i) acc[h][i] += weight * v[i];
            }
        }
    }
};
__device__ __forceinline__ void widen8(uint4 w, float (&f)[8]) {
    const u32 words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = widen_half(words[i]);
        f[2 * i] = pair.x, f[2 * i + 1] = pair.y;
    }
}
__device__ __forceinline__ void load8(const float* p, float (&f)[8]) {
    const float4 a = *(const float4*)p, b = *((const float4*)p + 1);
    f[0] = a.x, f[1] = a.y, f[2] = a.z, f[3] = a.w, f[4] = b.x, f[5] = b.y, f[6] = b.z, f[7] = b.w;
}
// dimensions d .. d + 7 (a) and their partners half a head later (b), rotated, times `factor`
__device__ __forceinline__ void rotate(const Shared& s, int d, float factor, float (&a)[8], float (&b)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float c = s.rope[0][d + i], sn = s.rope[1][d + i], x = a[i], y = b[i];
        a[i] = (x * c - y * sn) * factor, b[i] = (y * c + x * sn) * factor;
    }
}

__device__ void attend(const Params& p, Shared& s, Ring& ring, const Unit& unit, int layer) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tid = threadIdx.x;
    const int d = lane % LANES_PER_KEY * 8, my_key = lane / LANES_PER_KEY;
    const u32 flag = flag_of(s, layer);
    const u32* qkv = p.qkv + unit.row * QKV;
    const float *new_key = s.inputs + OUTPUTS, *new_value = new_key + HEAD;
    receive_shared<(GROUP + 2) * HEAD>(s.inputs, flag, [&](int i) {
        const int kind = i < OUTPUTS ? 0 : i < OUTPUTS + HEAD ? 1 : 2;
        return qkv + (kind == 0 ? unit.head * OUTPUTS + i
                                : Q_SIZE + (kind - 1) * KV_SIZE + unit.head * HEAD + i - OUTPUTS - (kind - 1) * HEAD);
    });
    consumer_sync();
    MARK(T_ATT_LOAD)
    float qa[GROUP][8], qb[GROUP][8];
#pragma unroll
    for (int h = 0; h < GROUP; ++h) load8(s.inputs + h * HEAD + d, qa[h]), load8(s.inputs + h * HEAD + HEAD / 2 + d, qb[h]);
#pragma unroll
    for (int h = 0; h < GROUP; ++h) rotate(s, d, 1.44269504f * rsqrtf((float)HEAD), qa[h], qb[h]);
    auto scores = [&](const float (&ka)[8], const float (&kb)[8], bool valid, float (&score)[GROUP]) {
#pragma unroll
        for (int h = 0; h < GROUP; ++h) {
            float dot = 0;
#pragma unroll
            for (int i = 0; i < 8; ++i) dot += qa[h][i] * ka[i] + qb[h][i] * kb[i];
#pragma unroll
            for (int m = 1; m < LANES_PER_KEY; m <<= 1) dot += __shfl_xor_sync(0xffffffffu, dot, m);
            score[h] = valid ? dot : -INF;
        }
    };
    Softmax soft;
    soft.clear();
    float score[GROUP], ka[8], kb[8];
    if (unit.split == SPLITS - 1 && warp == 0) {  // the new token: rotate and store its key, store its value
        const int pos = s.position[unit.row];
        const int block = __ldg(p.block_tables + (u64)s.slot[unit.row] * p.table_stride + pos / TPB);
        u8* key = (u8*)s.table[layer][KV] + (((u64)block * KV_HEADS + unit.head) * TPB + pos % TPB) * HEAD * 2;
        u8* val = key + (u64)p.num_blocks * KV_HEADS * TPB * HEAD * 2;
        load8(new_key + d, ka), load8(new_key + HEAD / 2 + d, kb);
        rotate(s, d, 1.0f, ka, kb);
        uint4 wa = make_uint4(narrow_half(ka[0], ka[1]), narrow_half(ka[2], ka[3]), narrow_half(ka[4], ka[5]),
                              narrow_half(ka[6], ka[7]));
        uint4 wb = make_uint4(narrow_half(kb[0], kb[1]), narrow_half(kb[2], kb[3]), narrow_half(kb[4], kb[5]),
                              narrow_half(kb[6], kb[7]));
        if (my_key == 0) {
            *(uint4*)(key + d * 2) = wa;
            *(uint4*)(key + HEAD + d * 2) = wb;
        }
        widen8(wa, ka), widen8(wb, kb);
        scores(ka, kb, my_key == 0, score);
        soft.add(score, 1, [&](int, float (&v)[DIMS]) {
#pragma unroll
            for (int i = 0; i < DIMS; i += 2) {
                const u32 w = narrow_half(new_value[lane * DIMS + i], new_value[lane * DIMS + i + 1]);
                *(u32*)(val + (lane * DIMS + i) * 2) = w;
                const float2 rounded = widen_half(w);
                v[i] = rounded.x, v[i + 1] = rounded.y;
            }
        });
    }
    for (int pos = unit.lo; pos < unit.hi;) {
        const int end = piece_end(pos, unit.hi), count = end - pos - warp * KEYS_PER_WARP;
        TIMED(T_FULL_KV, tid == 0, ring.wait_full());
        if (count > 0) {
            const u32 key = ring.stage() + (warp * KEYS_PER_WARP + my_key) * HEAD * 2 + d * 2;
            const Words<4> a = load_shared<4>(key), b = load_shared<4>(key + HEAD);
            widen8(make_uint4(a.w[0], a.w[1], a.w[2], a.w[3]), ka);
            widen8(make_uint4(b.w[0], b.w[1], b.w[2], b.w[3]), kb);
            scores(ka, kb, my_key < count, score);
            const u32 values = ring.stage() + STAGE / 2 + warp * KEYS_PER_WARP * HEAD * 2 + lane * DIMS * 2;
            soft.add(score, count, [&](int k, float (&v)[DIMS]) {
                const Words<DIMS / 2> w = load_shared<DIMS / 2>(values + k * HEAD * 2);
#pragma unroll
                for (int i = 0; i < DIMS / 2; ++i) {
                    const float2 f = widen_half(w.w[i]);
                    v[2 * i] = f.x, v[2 * i + 1] = f.y;
                }
            });
        }
        ring.release();
        pos = end;
    }
    MARK(T_ATT_KEYS)
    // the warps of this block send their merged sums; then every block merges a slice of outputs over its head's blocks
#pragma unroll
    for (int h = 0; h < GROUP; ++h) {
#pragma unroll
        for (int i = 0; i < DIMS; ++i) s.merge[warp][h * HEAD + lane * DIMS + i] = soft.acc[h][i];
        if (lane == 0) s.merge_ml[warp][h][0] = soft.top[h], s.merge_ml[warp][h][1] = soft.sum[h];
    }
    consumer_sync();
    u32* mine = p.partial + blockIdx.x * UNIT_WORDS;
#pragma unroll
    for (int o = tid; o < OUTPUTS; o += THREADS) {
        const int h = o / HEAD;
        float top = NONE, sum = 0, acc = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) top = fmaxf(top, s.merge_ml[w][h][0]);
        top = rintf(top);  // exact in a word, and any reference near the largest score will do
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float weight = exp2f(s.merge_ml[w][h][0] - top);
            acc += weight * s.merge[w][o], sum += weight * s.merge_ml[w][h][1];
        }
        send(mine + o, acc, flag);
        if (o % HEAD == 0) send(mine + OUTPUTS + 2 * h, top, flag), send(mine + OUTPUTS + 2 * h + 1, sum, flag);
    }
    const u32* first = p.partial + (blockIdx.x - unit.split) * UNIT_WORDS;
    receive_shared<SPLITS * (SLICE + 2 * GROUP)>(s.slices, flag, [&](int i) {
        const int split = i / (SLICE + 2 * GROUP), o = i % (SLICE + 2 * GROUP);
        return first + split * UNIT_WORDS + (o < SLICE ? unit.split * SLICE + o : OUTPUTS + o - SLICE);
    });
    consumer_sync();
    if (tid < SLICE) {
        const int o = unit.split * SLICE + tid, ml = SLICE + 2 * (o / HEAD);
        float top = NONE, sum = 0, acc = 0;
#pragma unroll
        for (int i = 0; i < SPLITS; ++i) top = fmaxf(top, s.slices[i * (SLICE + 2 * GROUP) + ml]);
#pragma unroll
        for (int i = 0; i < SPLITS; ++i) {
            const float* slice = s.slices + i * (SLICE + 2 * GROUP);
            const float weight = exp2f(slice[ml] - top);
            acc += weight * slice[tid], sum += weight * slice[ml + 1];
        }
        send(p.attended + unit.row * Q_SIZE + Split<Q_SIZE>::permuted(unit.head * OUTPUTS + o), acc / sum, flag);
    }
    MARK(T_ATT_MERGE)
}

// ---------------------------------------------------------------- consumer
__device__ void consume(const Params& p, Shared& s, Ring ring) {
    constexpr int W = HIDDEN / 1024;
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const Unit unit = unit_of(s.position);
    const Part rows_x = part_of(HIDDEN, 0);  // rows of o and down, the same in every layer: row tid's residual is here
    float residual[ROWS];
    u32 sent = 0;  // times this block, hence every block, has sent its residual rows
    float4 weight[W], v[ROWS * W];
    auto load_weight = [&](int norm) {
#pragma unroll
        for (int w = 0; w < W; ++w)
            weight[w] = __ldg((const float4*)(p.norms + norm * HIDDEN + Split<HIDDEN>::word(w)));
    };
    auto receive_x = [&](const u32* x, int layer) {
        await_hint(p.sync + SENT_X, sent * GRID);
        receive(v, flag_of(s, layer), [&](int i) { return x + i / W * HIDDEN + Split<HIDDEN>::word(i % W); });
    };
    auto add_residual = [&](u32* x, int layer, const float (&scale)[ROWS], float weight_scale) {
        consumer_sync();
        if (tid < rows_x.count)
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                residual[r] += take(s, tid, r, scale[r], weight_scale);
                send(x + r * HIDDEN + Split<HIDDEN>::permuted(rows_x.start + tid), residual[r], flag_of(s, layer));
            }
        hint(p.sync + SENT_X), ++sent;
    };
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const u8* row = p.embedding + (u64)s.token[r] * HIDDEN * 2;
        if (tid < rows_x.count) {
            const int n = rows_x.start + tid;
            const float2 pair = widen(__ldg((const u32*)row + n / 2));
            residual[r] = n % 2 ? pair.y : pair.x;
        }
#pragma unroll
        for (int w = 0; w < W; ++w) {
            const uint2 q = __ldg((const uint2*)(row + Split<HIDDEN>::natural(w) * 2));
            const float2 a = widen(q.x), b = widen(q.y);
            v[r * W + w] = make_float4(a.x, a.y, b.x, b.y);
        }
    }
    load_weight(0);
    for (int layer = 0; layer < LAYERS; ++layer) {
        const u64* table = s.table[layer];
        const u32 flag = flag_of(s, layer);
        auto scale_of = [&](int which, int row, bool mine) { return mine ? __ldg((const float*)table[which] + row) : 0.0f; };
        {
            const Part part = part_of(QKV, layer);
            const float weight_scale = scale_of(QKV_S, part.start + tid, tid < part.count);
            Digits<HIDDEN> d;
            if (layer) receive_x(p.x_mlp, layer - 1);
            norm_digits(s, weight, p.eps, v, d);
            MARK(T_PRO_QKV)
            gemv<HIDDEN, RS, false>(ring, s, d, part.count, T_FULL_QKV);
            MARK(T_GEMV_QKV)
            consumer_sync();
            if (tid < part.count)
#pragma unroll
                for (int r = 0; r < ROWS; ++r)
                    send(p.qkv + r * QKV + part.start + tid, take(s, tid, r, d.scale[r], weight_scale), flag);
            MARK(T_EPI_QKV)
        }
        if (unit.active) attend(p, s, ring, unit, layer);
        {
            const float weight_scale = scale_of(O_S, rows_x.start + tid, tid < rows_x.count);
            Digits<Q_SIZE> d;
            plain_digits<Q_SIZE>(s, p.attended, flag, d);
            MARK(T_PRO_O)
            gemv<Q_SIZE, RS_Q, false>(ring, s, d, rows_x.count, T_FULL_O);
            MARK(T_GEMV_O)
            add_residual(p.x_attention, layer, d.scale, weight_scale);
            MARK(T_EPI_O)
        }
        {
            const Part part = part_of(INTER, layer);
            const float gate_scale = scale_of(GU_S, part.start + tid, tid < part.count);
            const float up_scale = scale_of(GU_S, INTER + part.start + tid, tid < part.count);
            load_weight(2 * layer + 1);
            Digits<HIDDEN> d;
            receive_x(p.x_attention, layer);
            norm_digits(s, weight, p.eps, v, d);
            MARK(T_PRO_GU)
            gemv<HIDDEN, 2 * PAIRS, true>(ring, s, d, part.count, T_FULL_GU);
            MARK(T_GEMV_GU)
            consumer_sync();
            if (tid < part.count)
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const float gate = take(s, tid, r, d.scale[r], gate_scale);
                    const float up = take(s, MAX_PAIRS + tid, r, d.scale[r], up_scale);
                    send(p.hidden + r * INTER + Split<INTER>::permuted(part.start + tid),
                         gate / (1.0f + __expf(-gate)) * up, flag);
                }
            hint(p.sync + SENT_HIDDEN);
            MARK(T_EPI_GU)
        }
        {
            const float weight_scale = scale_of(DOWN_S, rows_x.start + tid, tid < rows_x.count);
            Digits<INTER> d;
            await_hint(p.sync + SENT_HIDDEN, GRID * (layer + 1));
            plain_digits<INTER>(s, p.hidden, flag, d);
            MARK(T_PRO_DOWN)
            gemv<INTER, RS_I, false>(ring, s, d, rows_x.count, T_FULL_DOWN);
            MARK(T_GEMV_DOWN)
            add_residual(p.x_mlp, layer, d.scale, weight_scale);
            load_weight(2 * layer + 2);
            MARK(T_EPI_DOWN)
        }
    }
    receive_x(p.x_mlp, LAYERS - 1);
    // lm_head in chunks, the running argmax of thread tid over rows tid, tid + LM_CHUNK, ...
    const Part part = part_of(VOCAB, 0);
    float best[ROWS];
    int best_id[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) best[r] = -INF, best_id[r] = 0;
    auto judge = [&](int r, int n, float logit) {
        if (p.logits) p.logits[(u64)r * VOCAB + n] = logit;
        if (!(logit <= best[r])) best[r] = logit, best_id[r] = n;
    };
#ifdef LM_INT8
    Digits<HIDDEN> d;
    norm_digits(s, weight, p.eps, v, d);
    for (int chunk = 0; chunk < part.count; chunk += LM_CHUNK) {
        const int rows = min(LM_CHUNK, part.count - chunk), n = part.start + chunk + tid;
        const float weight_scale = tid < rows ? __ldg(p.lm_scale + n) : 0.0f;
        gemv<HIDDEN, RS_LM, false>(ring, s, d, rows, T_FULL_LM);
        consumer_sync();
        if (tid < rows)
#pragma unroll
            for (int r = 0; r < ROWS; ++r) judge(r, n, take(s, tid, r, d.scale[r], weight_scale));
        consumer_sync();
    }
#else
    using S = Split<HIDDEN>;
    float rstd[ROWS], amax[ROWS];
    normalize(s, weight, p.eps, v, rstd, amax);
    float sums[RS_LM * ROWS];
    auto flush = [&](int first) {
        const float sum = sum_many(sums);
        constexpr int LANES = 32 / (RS_LM * ROWS);
        if (lane % LANES == 0) s.lm[(first * ROWS + lane / LANES) * WARPS + warp] = sum;
    };
    for (int chunk = 0; chunk < part.count; chunk += LM_CHUNK) {
        const int rows = min(LM_CHUNK, part.count - chunk);
        for (int first = 0; first < rows; first += RS_LM) {
            TIMED(T_FULL_LM, tid == 0, ring.wait_full());
            constexpr int WIDE = S::VEC >= 2 ? 4 : 2, LOADS = 2 * S::W / WIDE, RUN = 2 * S::VEC / WIDE;
            const u32 base = ring.stage() + (warp * (HIDDEN / WARPS) + lane * 4 * S::VEC) * 2;
            Words<WIDE> q[RS_LM][LOADS];
#pragma unroll
            for (int i = 0; i < RS_LM; ++i)
#pragma unroll
                for (int n = 0; n < LOADS; ++n)
                    q[i][n] = load_shared<WIDE>(base + i * LM_BYTES + n / RUN * 256 * S::VEC + n % RUN * 4 * WIDE);
            if (first) flush(first - RS_LM);
#pragma unroll
            for (int i = 0; i < RS_LM; ++i) {
#pragma unroll
                for (int r = 0; r < ROWS; ++r) sums[i * ROWS + r] = 0;
#pragma unroll
                for (int w = 0; w < S::W; ++w) {
                    const float2 a = widen(q[i][2 * w / WIDE].w[2 * w % WIDE]);
                    const float2 b = widen(q[i][2 * w / WIDE].w[2 * w % WIDE + 1]);
#pragma unroll
                    for (int r = 0; r < ROWS; ++r)
                        sums[i * ROWS + r] += v[r * W + w].x * a.x + v[r * W + w].y * a.y + v[r * W + w].z * b.x +
                                              v[r * W + w].w * b.y;
                }
            }
            ring.release();
        }
        flush((rows - 1) / RS_LM * RS_LM);
        consumer_sync();
        if (tid < rows)
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                float sum = 0;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) sum += s.lm[(tid * ROWS + r) * WARPS + w];
                judge(r, part.start + chunk + tid, sum * rstd[r]);
            }
        consumer_sync();
    }
#endif
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const u32 bits = __float_as_uint(best[r]), ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
        u64 key = (u64)ordered << 32 | (0xffffffffu - best_id[r]);
#pragma unroll
        for (int m = 16; m; m >>= 1) key = max(key, __shfl_xor_sync(0xffffffffu, key, m));
        if (lane == 0) s.best[warp] = key;
        consumer_sync();
        if (tid == 0) {
            for (int w = 1; w < WARPS; ++w) key = max(key, s.best[w]);
            atomicMax((u64*)(p.sync + BEST) + r, key);
        }
        consumer_sync();
    }
    // the last block writes the tokens, moves the slots on and counts the launch
    if (tid == 0) s.last = add_acq_rel(p.sync + DONE, 1) == GRID - 1;
    consumer_sync();
    if (!s.last) return;
    if (tid < ROWS) {
        const int token = (int)(0xffffffffu - (u32)__ldcg((const u64*)(p.sync + BEST) + tid)), slot = s.slot[tid];
        p.sampled[tid] = token;
        if (slot != p.dummy_slot) p.last_token[slot] = token, p.position[slot] = s.position[tid] + 1;
    }
    consumer_sync();
    if (tid > LAUNCHES && tid < SYNC_WORDS) p.sync[tid] = 0;
    if (tid == 0) p.sync[LAUNCHES] += 1;
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) decode(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) u8 memory[];
    Shared& s = *(Shared*)(memory + STAGES * STAGE);
    const int tid = threadIdx.x;
    for (int i = tid; i < LAYERS * TABLE; i += THREADS + 32) (&s.table[0][0])[i] = p.layers[i];
    for (int i = tid; i < ACC_ROWS * ROWS * 2; i += THREADS + 32) s.acc[i] = 0;
    if (tid < T_COUNT) s.trace[tid] = 0;
    if (tid == 0) s.mark = clock64(), s.epoch = p.sync[LAUNCHES] * LAYERS;
    if (tid < ROWS) {
        const int slot = p.slot_ids[tid];
        s.slot[tid] = slot, s.position[tid] = p.position[slot], s.token[tid] = p.last_token[slot];
    }
    if (tid < STAGES) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_addr(s.full + tid)), "r"(1));
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_addr(s.empty + tid)), "r"(WARPS));
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    Ring ring;
    ring.data = smem_addr(memory), ring.full = smem_addr(s.full), ring.empty = smem_addr(s.empty);
    if (tid >= THREADS) {
        if (tid == THREADS) produce(p, s, ring);
    } else {
        const int row = unit_of(s.position).row;
        for (int i = tid; i < HEAD / 2; i += THREADS) {
            s.rope[0][i] = p.cosine[s.position[row] * (HEAD / 2) + i];
            s.rope[1][i] = p.sine[s.position[row] * (HEAD / 2) + i];
        }
        TIMED(T_TOTAL, tid == 0, consume(p, s, ring));
    }
#ifdef TRACE
    __syncthreads();
    if (tid < T_COUNT) p.trace[blockIdx.x * T_COUNT + tid] = s.trace[tid];
#endif
}
