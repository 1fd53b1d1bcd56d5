// One launch decodes one token of 1, 2 or 4 sequences of a Llama-architecture model with INT8 weights.
//
// One block a multiprocessor. A producer thread streams this block's rows of every matrix (and its share of the KV
// cache) in execution order through one ring of shared memory; weights depend on nothing, so it never waits for
// another block. Eight consumer warps each own an eighth of K: they hold the activations of the current matrix as two
// planes of signed 8-bit digits in registers and add exact integer sums. Blocks meet at counters in L2.
//
// Compiled at run time by persistent.py, which defines the geometry: HIDDEN, INTER, LAYERS, HEADS, KV_HEADS, HEAD,
// VOCAB, TPB (tokens per block), GRID, ROWS, and optionally ELEM_BF16, LM_INT8, TRACE.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int WARPS = 8, THREADS = WARPS * 32;
#ifndef IN_FLIGHT
#define IN_FLIGHT 2
#endif
constexpr int STAGE = 16384, SMEM = 232448;
constexpr int Q_SIZE = HEADS * HEAD, KV_SIZE = KV_HEADS * HEAD, QKV = Q_SIZE + 2 * KV_SIZE;
constexpr int GROUP = HEADS / KV_HEADS;
constexpr int SPLITS = GRID / (KV_HEADS * ROWS) > 0 ? GRID / (KV_HEADS * ROWS) : 1;
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
constexpr u32 SPIN_LIMIT = 1u << 24;  // seconds; a lost arrival must trap, not hang the GPU

static_assert(HIDDEN % 1024 == 0 && Q_SIZE % 1024 == 0 && INTER % 1024 == 0, "K is split over 8 warps of 32 words");
static_assert(HIDDEN <= STAGE / 2 && Q_SIZE <= STAGE && INTER <= STAGE, "a stage holds at least one row (one pair)");
static_assert(HEAD == 64 || HEAD == 128, "head size");
static_assert(MAX_PAIRS <= THREADS && ceil_div(QKV, GRID) <= THREADS, "one epilogue thread a row");
static_assert(UNITS <= GRID, "one attention unit a block at most");
static_assert(ROWS * KV_HEADS <= 128, "one arrival counter a KV head fits its room in Params::sync");

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
    float *x, *qkv, *attended, *hidden;  // [ROWS][...]: residual, q k v, attention output, SiLU(gate) * up
    float *partial, *partial_ml;         // [UNITS][GROUP * HEAD], [UNITS][GROUP][2]
    u32* sync;
    u64* trace;
    int table_stride, num_blocks, dummy_slot;
    float eps;
};
enum { QKV_W, QKV_S, O_W, O_S, GU_W, GU_S, DOWN_W, DOWN_S, KV, TABLE };
// words of Params::sync: counters on lines of their own, then the winners, then the attention and amax words
enum { BARRIER = 0, MERGED = 32, DONE = 64, BEST = 96, HEADS_DONE = 128, AMAX = 256 };
enum { T_FULL_QKV, T_FULL_KV, T_FULL_O, T_FULL_GU, T_FULL_DOWN, T_FULL_LM, T_BAR_QKV, T_BAR_ATT, T_BAR_O, T_BAR_GU,
       T_BAR_DOWN, T_ATTEND, T_PRO_QKV, T_PRO_O, T_PRO_GU, T_PRO_DOWN, T_EPI_QKV, T_EPI_O, T_EPI_GU, T_EPI_DOWN, T_GEMV_QKV, T_GEMV_O, T_GEMV_GU, T_GEMV_DOWN, T_PRODUCER,
       T_TOTAL, T_COUNT };

struct Shared {
    u64 full[16], empty[16];
    u64 table[LAYERS][TABLE];
    int acc[ACC_ROWS * ROWS * 2];
    union {
        float merge[WARPS][GROUP * HEAD];
        float lm[64 * WARPS * ROWS];
    };
    float merge_ml[WARPS][GROUP][2];
    float reduce[WARPS][ROWS][2];
    float rope[2][HEAD / 2];
    u64 best[WARPS];
    u32 amax[ROWS];
    int slot[ROWS], position[ROWS], token[ROWS], flag;
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
__device__ __forceinline__ u32 load_acquire(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void add_release(u32* p, u32 v) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
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
    }
    __device__ u32 stage() const { return data + slot * STAGE; }
    __device__ u32 full_bar() const { return full + slot * 8; }
    // Room for one more stage, and fewer than IN_FLIGHT on their way: deeper queues in the memory system would only
    // make everybody's small loads and counters slow.
    __device__ void wait_empty() {
        mbar_wait(empty + slot * 8, parity ^ 1);
        const bool wrapped = slot < IN_FLIGHT;
        if (issued++ >= IN_FLIGHT)
            mbar_wait(full + (slot + (wrapped ? STAGES : 0) - IN_FLIGHT) * 8, parity ^ wrapped);
    }
    __device__ void wait_full() const { mbar_wait(full_bar(), parity); }
    __device__ void release() {
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbar_arrive(empty + slot * 8);
        advance();
    }
};

// Rows of an n-row matrix that this block owns. The blocks with one row more move on with `turn` (the layer), so
// that over the token every block streams the same number of bytes.
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
__device__ void stream_rows(Ring& ring, Shared& s, u64 weight, Part part, u32 row_bytes, int rows, u64 policy) {
    u64 src = weight + (u64)part.start * row_bytes;
    for (int left = part.count; left > 0; left -= rows) {
        const u32 bytes = min(left, rows) * row_bytes;
        TIMED(T_PRODUCER, true, ring.wait_empty());
        mbar_expect(ring.full_bar(), bytes);
        bulk_copy(ring.stage(), src, bytes, ring.full_bar(), policy);
        src += bytes;
        ring.advance();
    }
}
__device__ void produce(const Params& p, Shared& s, Ring ring) {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    const Unit unit = unit_of(s.position);
    const int* blocks = p.block_tables + (u64)s.slot[unit.row] * p.table_stride;
    for (int layer = 0; layer < LAYERS; ++layer) {
        const u64* t = s.table[layer];
        stream_rows(ring, s, t[QKV_W], part_of(QKV, layer), HIDDEN, RS, policy);
        if (unit.active) {
            for (int pos = unit.lo; pos < unit.hi;) {
                const int end = piece_end(pos, unit.hi), block = __ldg(blocks + pos / TPB);
                const u32 bytes = (end - pos) * HEAD * 2;
                const u64 src = t[KV] + (((u64)block * KV_HEADS + unit.head) * TPB + pos % TPB) * HEAD * 2;
                TIMED(T_PRODUCER, true, ring.wait_empty());
                mbar_expect(ring.full_bar(), 2 * bytes);
                bulk_copy(ring.stage(), src, bytes, ring.full_bar(), policy);
                bulk_copy(ring.stage() + STAGE / 2, src + (u64)p.num_blocks * KV_HEADS * TPB * HEAD * 2, bytes,
                          ring.full_bar(), policy);
                ring.advance();
                pos = end;
            }
        }
        stream_rows(ring, s, t[O_W], part_of(HIDDEN, layer), Q_SIZE, RS_Q, policy);
        const Part pairs = part_of(INTER, layer);
        for (int j = 0; j < pairs.count; j += PAIRS) {
            const u32 bytes = min(PAIRS, pairs.count - j) * HIDDEN;
            const u64 src = t[GU_W] + (u64)(pairs.start + j) * HIDDEN;
            TIMED(T_PRODUCER, true, ring.wait_empty());
            mbar_expect(ring.full_bar(), 2 * bytes);
            bulk_copy(ring.stage(), src, bytes, ring.full_bar(), policy);
            bulk_copy(ring.stage() + PAIRS * HIDDEN, src + (u64)INTER * HIDDEN, bytes, ring.full_bar(), policy);
            ring.advance();
        }
        stream_rows(ring, s, t[DOWN_W], part_of(HIDDEN, layer), INTER, RS_I, policy);
    }
    stream_rows(ring, s, (u64)p.lm_weight, part_of(VOCAB, 0), LM_BYTES, RS_LM, policy);
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

// x * weight of this lane's words, before the RMS factor, which is returned a row; amax likewise.
template <typename Load>
__device__ void load_norm(Shared& s, const float4 (&weight)[HIDDEN / 1024], float eps, Load load,
                          float4 (&v)[ROWS][HIDDEN / 1024], float (&rstd)[ROWS], float (&amax)[ROWS]) {
    constexpr int W = HIDDEN / 1024;
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int w = 0; w < W; ++w) v[r][w] = load(r, w);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float sum = 0, top = 0;
#pragma unroll
        for (int w = 0; w < W; ++w) {
            float4& a = v[r][w];
            sum += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w;
            a.x *= weight[w].x, a.y *= weight[w].y, a.z *= weight[w].z, a.w *= weight[w].w;
            top = fmaxf(top, fmaxf(fmaxf(fabsf(a.x), fabsf(a.y)), fmaxf(fabsf(a.z), fabsf(a.w))));
        }
        sum = warp_sum(sum);
        top = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(top)));
        if (threadIdx.x % 32 == 0) s.reduce[warp][r][0] = sum, s.reduce[warp][r][1] = top;
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
template <typename Load>
__device__ void norm_digits(Shared& s, const float4 (&weight)[HIDDEN / 1024], float eps, Load load, Digits<HIDDEN>& d) {
    float4 v[ROWS][HIDDEN / 1024];
    float rstd[ROWS], amax[ROWS];
    load_norm(s, weight, eps, load, v, rstd, amax);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        d.scale[r] = amax[r] * rstd[r] / 32512.0f;
#pragma unroll
        for (int w = 0; w < HIDDEN / 1024; ++w) pack(v[r][w], inverse_of(amax[r]), d.hi[r][w], d.lo[r][w]);
    }
}
// Activations whose amax the writers have already agreed on.
template <int K> __device__ void plain_digits(const float* source, const u32* amax, Digits<K>& d) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float4 v[K / 1024];
        const float top = __uint_as_float(__ldcg(amax + r));
#pragma unroll
        for (int w = 0; w < K / 1024; ++w) v[w] = __ldcg((const float4*)(source + r * K + Split<K>::word(w)));
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
            top[h] = -INF, sum[h] = 0;
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
    const float4 a = __ldcg((const float4*)p), b = __ldcg((const float4*)p + 1);
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
    const float* qkv = p.qkv + unit.row * QKV;
    float qa[GROUP][8], qb[GROUP][8];
#pragma unroll
    for (int h = 0; h < GROUP; ++h) {
        load8(qkv + (unit.head * GROUP + h) * HEAD + d, qa[h]);
        load8(qkv + (unit.head * GROUP + h) * HEAD + HEAD / 2 + d, qb[h]);
    }
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
        load8(qkv + Q_SIZE + unit.head * HEAD + d, ka);
        load8(qkv + Q_SIZE + unit.head * HEAD + HEAD / 2 + d, kb);
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
                const float2 f = __ldcg((const float2*)(qkv + Q_SIZE + KV_SIZE + unit.head * HEAD + lane * DIMS + i));
                const u32 w = narrow_half(f.x, f.y);
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
    // the warps of this block, then the blocks of this head: the last to arrive merges
#pragma unroll
    for (int h = 0; h < GROUP; ++h) {
#pragma unroll
        for (int i = 0; i < DIMS; ++i) s.merge[warp][h * HEAD + lane * DIMS + i] = soft.acc[h][i];
        if (lane == 0) s.merge_ml[warp][h][0] = soft.top[h], s.merge_ml[warp][h][1] = soft.sum[h];
    }
    consumer_sync();
    for (int o = tid; o < GROUP * HEAD; o += THREADS) {
        const int h = o / HEAD;
        float top = -INF, sum = 0, acc = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) top = fmaxf(top, s.merge_ml[w][h][0]);
        if (top > -INF) {
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float weight = exp2f(s.merge_ml[w][h][0] - top);
                acc += weight * s.merge[w][o], sum += weight * s.merge_ml[w][h][1];
            }
        }
        p.partial[blockIdx.x * GROUP * HEAD + o] = acc;
        if (o % HEAD == 0) *(float2*)(p.partial_ml + (blockIdx.x * GROUP + h) * 2) = make_float2(top, sum);
    }
    consumer_sync();
    if (tid == 0) {
        u32* arrived = p.sync + HEADS_DONE + unit.row * KV_HEADS + unit.head;
        s.flag = add_acq_rel(arrived, 1) == SPLITS - 1;
        if (s.flag) *arrived = 0;
        s.amax[0] = 0;
    }
    consumer_sync();
    if (!s.flag) return;
    const int first = blockIdx.x - unit.split;
    u32 largest = 0;
    for (int o = tid; o < GROUP * HEAD; o += THREADS) {
        const int h = o / HEAD;
        float2 ml[SPLITS];
        float acc[SPLITS], top = -INF, sum = 0, out = 0;
#pragma unroll
        for (int i = 0; i < SPLITS; ++i) {
            ml[i] = __ldcg((const float2*)(p.partial_ml + ((first + i) * GROUP + h) * 2));
            acc[i] = __ldcg(p.partial + (first + i) * GROUP * HEAD + o);
        }
#pragma unroll
        for (int i = 0; i < SPLITS; ++i) top = fmaxf(top, ml[i].x);
#pragma unroll
        for (int i = 0; i < SPLITS; ++i) {
            const float weight = exp2f(ml[i].x - top);
            out += weight * acc[i], sum += weight * ml[i].y;
        }
        out /= sum;
        p.attended[unit.row * Q_SIZE + Split<Q_SIZE>::permuted(unit.head * GROUP * HEAD + o)] = out;
        largest = max(largest, __float_as_uint(fabsf(out)));
    }
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (lane == 0) atomicMax(&s.amax[0], largest);
    consumer_sync();
    if (tid == 0) {
        atomicMax(p.sync + AMAX + (2 * layer) * ROWS + unit.row, s.amax[0]);
        add_release(p.sync + MERGED, 1);
    }
}

// ---------------------------------------------------------------- consumer
__device__ void wait_for(const u32* counter, u32 target) {
    if (threadIdx.x == 0)
        for (u32 n = 0; load_acquire(counter) < target; ++n)
            if (n > SPIN_LIMIT) __trap();
    consumer_sync();
}
__device__ __forceinline__ void arrive(u32* counter) {
    consumer_sync();
    if (threadIdx.x == 0) add_release(counter, 1);
}

__device__ void consume(const Params& p, Shared& s, Ring ring) {
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const Unit unit = unit_of(s.position);
    u32 target = 0;
    float4 weight[HIDDEN / 1024];
    auto load_weight = [&](int norm) {
#pragma unroll
        for (int w = 0; w < HIDDEN / 1024; ++w)
            weight[w] = __ldg((const float4*)(p.norms + norm * HIDDEN + Split<HIDDEN>::word(w)));
    };
    auto from_x = [&](int r, int w) { return __ldcg((const float4*)(p.x + r * HIDDEN + Split<HIDDEN>::word(w))); };
    auto from_embedding = [&](int r, int w) {
        const uint2 v = __ldg((const uint2*)(p.embedding + ((u64)s.token[r] * HIDDEN + Split<HIDDEN>::natural(w)) * 2));
        const float2 a = widen(v.x), b = widen(v.y);
        return make_float4(a.x, a.y, b.x, b.y);
    };
    // rows tid of this block's part of o or down: y is added to the residual
    auto add_residual = [&](const Part& part, const float (&scale)[ROWS], float weight_scale, const float (&old)[ROWS]) {
        consumer_sync();
        if (tid < part.count)
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                p.x[r * HIDDEN + Split<HIDDEN>::permuted(part.start + tid)] =
                    old[r] + take(s, tid, r, scale[r], weight_scale);
        arrive(p.sync + BARRIER), target += GRID;
    };
    auto residual_of = [&](const Part& part, bool embedding, float (&old)[ROWS]) {
        if (tid < part.count)
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const int n = part.start + tid;
                if (embedding) {
                    const u64 at = (u64)s.token[r] * HIDDEN + n;
                    const float2 v = widen(__ldg((const u32*)p.embedding + at / 2));
                    old[r] = at % 2 ? v.y : v.x;
                } else {
                    old[r] = __ldcg(p.x + r * HIDDEN + Split<HIDDEN>::permuted(n));
                }
            }
    };
    load_weight(0);
    for (int layer = 0; layer < LAYERS; ++layer) {
        const u64* table = s.table[layer];
        auto scale_of = [&](int which, int row, bool mine) { return mine ? __ldg((const float*)table[which] + row) : 0.0f; };
        {
            const Part part = part_of(QKV, layer);
            const float weight_scale = scale_of(QKV_S, part.start + tid, tid < part.count);
            Digits<HIDDEN> d;
            if (layer) norm_digits(s, weight, p.eps, from_x, d);
            else norm_digits(s, weight, p.eps, from_embedding, d);
            MARK(T_PRO_QKV)
            gemv<HIDDEN, RS, false>(ring, s, d, part.count, T_FULL_QKV);
            MARK(T_GEMV_QKV)
            consumer_sync();
            if (tid < part.count)
#pragma unroll
                for (int r = 0; r < ROWS; ++r)
                    p.qkv[r * QKV + part.start + tid] = take(s, tid, r, d.scale[r], weight_scale);
            arrive(p.sync + BARRIER), target += GRID;
        }
        MARK(T_EPI_QKV)
        if (unit.active) {
            wait_for(p.sync + BARRIER, target);
            MARK(T_BAR_QKV)
            attend(p, s, ring, unit, layer);
            MARK(T_ATTEND)
        }
        {
            const Part part = part_of(HIDDEN, layer);
            const float weight_scale = scale_of(O_S, part.start + tid, tid < part.count);
            float old[ROWS];
            residual_of(part, layer == 0, old);
            wait_for(p.sync + MERGED, (layer + 1) * ROWS * KV_HEADS);
            MARK(T_BAR_ATT)
            Digits<Q_SIZE> d;
            plain_digits<Q_SIZE>(p.attended, p.sync + AMAX + 2 * layer * ROWS, d);
            MARK(T_PRO_O)
            gemv<Q_SIZE, RS_Q, false>(ring, s, d, part.count, T_FULL_O);
            MARK(T_GEMV_O)
            add_residual(part, d.scale, weight_scale, old);
            MARK(T_EPI_O)
        }
        {
            const Part part = part_of(INTER, layer);
            const float gate_scale = scale_of(GU_S, part.start + tid, tid < part.count);
            const float up_scale = scale_of(GU_S, INTER + part.start + tid, tid < part.count);
            load_weight(2 * layer + 1);
            wait_for(p.sync + BARRIER, target);
            MARK(T_BAR_O)
            Digits<HIDDEN> d;
            norm_digits(s, weight, p.eps, from_x, d);
            MARK(T_PRO_GU)
            gemv<HIDDEN, 2 * PAIRS, true>(ring, s, d, part.count, T_FULL_GU);
            MARK(T_GEMV_GU)
            if (tid < ROWS) s.amax[tid] = 0;
            consumer_sync();
            u32 largest[ROWS] = {};
            if (tid < part.count)
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const float gate = take(s, tid, r, d.scale[r], gate_scale);
                    const float up = take(s, MAX_PAIRS + tid, r, d.scale[r], up_scale);
                    const float act = gate / (1.0f + __expf(-gate)) * up;
                    p.hidden[r * INTER + Split<INTER>::permuted(part.start + tid)] = act;
                    largest[r] = __float_as_uint(fabsf(act));
                }
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const u32 top = __reduce_max_sync(0xffffffffu, largest[r]);
                if (lane == 0) atomicMax(&s.amax[r], top);
            }
            consumer_sync();
            if (tid < ROWS) atomicMax(p.sync + AMAX + (2 * layer + 1) * ROWS + tid, s.amax[tid]);
            arrive(p.sync + BARRIER), target += GRID;
            MARK(T_EPI_GU)
        }
        {
            const Part part = part_of(HIDDEN, layer);
            const float weight_scale = scale_of(DOWN_S, part.start + tid, tid < part.count);
            float old[ROWS];
            residual_of(part, false, old);
            wait_for(p.sync + BARRIER, target);
            MARK(T_BAR_GU)
            Digits<INTER> d;
            plain_digits<INTER>(p.hidden, p.sync + AMAX + (2 * layer + 1) * ROWS, d);
            MARK(T_PRO_DOWN)
            gemv<INTER, RS_I, false>(ring, s, d, part.count, T_FULL_DOWN);
            MARK(T_GEMV_DOWN)
            add_residual(part, d.scale, weight_scale, old);
            MARK(T_EPI_DOWN)
            load_weight(2 * layer + 2);
            wait_for(p.sync + BARRIER, target);
            MARK(T_BAR_DOWN)
        }
    }
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
    norm_digits(s, weight, p.eps, from_x, d);
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
    float4 v[ROWS][S::W];
    float rstd[ROWS], amax[ROWS];
    load_norm(s, weight, p.eps, from_x, v, rstd, amax);
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
                        sums[i * ROWS + r] += v[r][w].x * a.x + v[r][w].y * a.y + v[r][w].z * b.x + v[r][w].w * b.y;
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
    // the last block writes the tokens, moves the slots on and leaves the counters as it found them
    if (tid == 0) s.flag = add_acq_rel(p.sync + DONE, 1) == GRID - 1;
    consumer_sync();
    if (!s.flag) return;
    if (tid < ROWS) {
        const int token = (int)(0xffffffffu - (u32)__ldcg((const u64*)(p.sync + BEST) + tid)), slot = s.slot[tid];
        p.sampled[tid] = token;
        if (slot != p.dummy_slot) p.last_token[slot] = token, p.position[slot] = s.position[tid] + 1;
    }
    consumer_sync();
    for (int i = tid; i < AMAX + 2 * LAYERS * ROWS; i += THREADS) p.sync[i] = 0;
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) decode(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) u8 memory[];
    Shared& s = *(Shared*)(memory + STAGES * STAGE);
    const int tid = threadIdx.x;
    for (int i = tid; i < LAYERS * TABLE; i += THREADS + 32) (&s.table[0][0])[i] = p.layers[i];
    for (int i = tid; i < ACC_ROWS * ROWS * 2; i += THREADS + 32) s.acc[i] = 0;
    if (tid < T_COUNT) s.trace[tid] = 0;
    if (tid == 0) s.mark = clock64();
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
