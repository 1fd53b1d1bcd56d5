// What persistent.cu streams and how: geometry, shared memory, small instructions, the ring of stages, and who owns which
// rows and positions.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int WARPS = 8, THREADS = WARPS * 32;
// How the layers' matrices lie in memory: bytes of INT8 or (macro FP8) of e4m3, or (macro INT4) two weights a byte and a
// float16 scale for every 128 of K, as model/schemes.py has them. A stage holds rows and, behind them, their group scales.
#ifdef INT4
constexpr int PER_BYTE = 2, STAGE_SCALES = 512;
#else
constexpr int PER_BYTE = 1, STAGE_SCALES = 0;
#endif
constexpr int STAGE_ROWS = 16384, STAGE = STAGE_ROWS + STAGE_SCALES, SMEM = 232448;
constexpr int GROUP_BYTES = 64, SCALES_OF = GROUP_BYTES / 2;  // of a group; row bytes to a byte of scales
// Tuned on an H100: stages on their way from device memory and from L2, stages read ahead into L2, clocks between them.
constexpr int IN_FLIGHT = 3, IN_FLIGHT_L2 = 6, PREFETCH = 8, PACE = 1400;
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
__host__ __device__ constexpr int rows_a_stage(int k) { return STAGE_ROWS / (k / PER_BYTE); }
constexpr int RS = rows_a_stage(HIDDEN), PAIRS = RS / 2;  // rows of a hidden-wide matrix in one stage; gate/up pairs
constexpr int RS_Q = rows_a_stage(Q_SIZE), RS_I = rows_a_stage(INTER);
#ifdef LM_INT8
constexpr int RS_LM = STAGE_ROWS / HIDDEN, LM_CHUNK = 128 / RS_LM * RS_LM, LM_BYTES = HIDDEN;
#else
constexpr int RS_LM = STAGE_ROWS / (2 * HIDDEN), LM_CHUNK = 64 / RS_LM * RS_LM, LM_BYTES = 2 * HIDDEN;
#endif
constexpr int MAX_PAIRS = ceil_div(INTER, GRID);
constexpr int ACC_ROWS = max_of(max_of(2 * MAX_PAIRS, ceil_div(QKV, GRID)), max_of(ceil_div(HIDDEN, GRID), 128));
#define INF __int_as_float(0x7f800000)
#define NONE -1e30f  // below any score, and finite: the difference of two is a number
constexpr u32 SPIN_LIMIT = 1u << 21;  // seconds; a lost arrival must trap, not hang the GPU

constexpr int WORDS = 1024 * PER_BYTE;
static_assert(HIDDEN % WORDS == 0 && Q_SIZE % WORDS == 0 && INTER % WORDS == 0, "K is split over 8 warps of 32 words");
static_assert(PAIRS && RS_Q && RS_I && RS_LM, "a stage holds at least one row (one pair)");
static_assert(RS * ROWS <= 32, "one lane for each sum of a stage");
static_assert(HEAD == 64 || HEAD == 128, "head size");
static_assert(MAX_PAIRS <= THREADS && ceil_div(QKV, GRID) <= THREADS, "one epilogue thread a row");
static_assert(UNITS <= GRID, "one attention unit a block at most");
static_assert(OUTPUTS % SPLITS == 0 && SLICE <= THREADS, "one merging thread an output");
static_assert(HIDDEN >= GRID && INTER >= GRID && QKV >= GRID, "every block takes part in every exchange");
static_assert(ceil_div(HIDDEN, GRID) <= THREADS, "the residual lives in registers");

// What other ranks send to one rank: words of a float32 and, in the upper half, a number that says which exchange it
// belongs to. As all else that blocks exchange, a word is overwritten a layer later at the earliest.
struct Inbox {
    u64 sums[2][RANKS][ROWS][HIDDEN];  // of o and of down
    u64 best[RANKS][ROWS][2];          // the largest logit, as an ordered integer, and its id's complement
};
struct Params {
    const u64* layers;   // [LAYERS][TABLE] pointers
    const float* norms;  // [2 * LAYERS + 1][HIDDEN], permuted
    const float *cosine, *sine;  // [max_seq_len][HEAD / 2]
    const u8 *embedding, *lm_weight;
    const float* lm_scale;
    const int* slot_ids;
    int *last_token, *position;
    const int* block_tables;
    int* sampled;
    float* logits;  // [ROWS][VOCAB] or null
    u32 *x_attention, *x_mlp, *qkv, *attended, *hidden, *partial;  // exchanged words, see send()
    u32* sync;
    int table_stride, num_blocks, dummy_slot;
    float eps;
    // Of tensor-parallel ranks: this one, whether it shall run without the others, and where each has its inbox and logits.
    int rank, alone;
    Inbox* inboxes[RANKS];
    float* all_logits[RANKS];
};
enum { QKV_W, QKV_S, O_W, O_S, GU_W, GU_S, DOWN_W, DOWN_S, KV, TABLE };
enum { LAUNCHES = 0, DONE = 32, BEST = 64, SENT_HIDDEN = 96, SENT_X = 128, SYNC_WORDS = 160 };  // words of Params::sync
constexpr int UNIT_WORDS = OUTPUTS + 2 * GROUP;

struct Shared {
    u64 full[16], empty[16];
    u64 table[LAYERS][TABLE];
    alignas(16) int acc[ACC_ROWS * ROWS * 2];
    union alignas(16) {
        float merge[WARPS][GROUP * HEAD];
        float lm[64 * WARPS * ROWS];
#if defined(FP8) || defined(INT4)
        float part[ACC_ROWS * ROWS][WARPS];  // sums of each warp, added in this order
#endif
    };
    float merge_ml[WARPS][GROUP][2];
    alignas(16) float inputs[(GROUP + 2) * HEAD], slices[SPLITS * (SLICE + 2 * GROUP)];
    float reduce[WARPS][ROWS][2];
    float rope[2][HEAD / 2];
    u64 best[WARPS];
    int slot[ROWS], position[ROWS], token[ROWS], last;
    u32 epoch;
};
constexpr int STAGES = (SMEM - (int)sizeof(Shared)) / STAGE < 16 ? (SMEM - (int)sizeof(Shared)) / STAGE : 16;
static_assert(STAGES > IN_FLIGHT_L2, "the ring is longer than what is on its way");

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
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
        : "=f"(f.x), "=f"(f.y) : "r"(w));
    return f;
}
__device__ __forceinline__ u32 narrow_half(float a, float b) {
    u32 w;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(b), "f"(a));
    return w;
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

// Rows of an n-row matrix that this block owns: split evenly, and the remainder, one row more for n % GRID of the blocks,
// rotates with `turn`, the layer where a row's owner may change, so that over the token every block streams about the
// same number of bytes.
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
