// y = a W^T for up to 32 rows of activations on the tensor cores (wgmma m64nNk32): INT8 weights times 16-bit fixed point
// held as two planes of signed 8-bit digits, summed exactly in int32, the digits of all rows side by side as N; or FP8
// weights times e4m3, one plane, summed in float32 from one stage to the next (within one a tensor core keeps 14 bits).
//
// A block owns ROWS = 16 * SLABS weight rows and takes all activation rows along, so weights and digits are read once.
// Weights depend on no other kernel: under programmatic dependent launch a block fills its ring of stages with them
// while the kernels before it still run, and only then waits for its activations. SPLIT blocks of one cluster share the
// rows and cut K between them; their integer sums meet in distributed shared memory.
//
// Compiled at run time by stream.py, which defines N, K, SILU, RESIDUAL, FP8, SLABS, SPLIT, MB (activation rows: 8, 16 or 32),
// KC (bytes of K a stage), STAGES and FLIGHT (bytes of weights a block has on their way).

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

constexpr int ROWS = SLABS * 16, THREADS = (ROWS + 63) / 64 * 128, MT = MB / 8;
constexpr int PLANES = FP8 ? 1 : 2, SUMS = PLANES * MB / 2;  // of activations; a thread's sums
constexpr int CHUNKS = KC / 16, STEPS = K / SPLIT / KC;  // 16-byte chunks of a row in a stage; stages to run through
constexpr int W_BYTES = ROWS * KC, A_BYTES = PLANES * MB * KC, STAGE = W_BYTES + A_BYTES;
constexpr int W_LOADS = (ROWS * CHUNKS + THREADS - 1) / THREADS, A_LOADS = (PLANES * MB * CHUNKS + THREADS - 1) / THREADS;
// Stages of weights still on their way when the next is asked for: more would only lengthen the queue in which every
// small load of this and the neighbouring kernels stands (docs/LOG.md).
constexpr int WANTED = FLIGHT / W_BYTES - 1, IN_FLIGHT = WANTED < 1 ? 1 : WANTED < STAGES - 2 ? WANTED : STAGES - 2;
constexpr int PART = ROWS + 4;  // padded row of partial sums: conflict-free, and still 16-byte aligned
constexpr int QUADS = ROWS / SPLIT / 4;  // groups of four outputs that one block of the cluster finishes

static_assert(KC == 128 && (MB == 8 || MB == 16 || MB == 32), "what descriptors and instructions are written for");
static_assert(K % (SPLIT * KC) == 0 && N % 16 == 0 && ROWS % (4 * SPLIT) == 0, "whole stages and whole tiles");
static_assert(STAGES > 2, "a stage to compute, one to wait for, one to load");
static_assert(W_BYTES % 1024 == 0 && A_BYTES % 1024 == 0, "swizzled tiles start at multiples of their pattern");
static_assert(SILU ? SPLIT == 1 : PLANES * MB * PART * 4 <= STAGES * STAGE, "where the sums meet");

struct Params {
    const char* weight;          // [N][K] int8 or e4m3
    const float* weight_scale;   // [N]
    const char* digits;          // [2][capacity][K] int8 or [capacity][K] e4m3, capacity >= MB
    const float* scale;          // [capacity]
    u16* out;                    // fp16 [*][N], or [*][N / 2] for SILU
    int rows, plane;             // valid activation rows; bytes between the planes of digits
};

__device__ __forceinline__ u32 smem_addr(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// Neighbouring bytes of the row, which a later stage needs, come into L2 along: device memory reads them together.
__device__ __forceinline__ void load16(u32 dst, const char* src) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wait_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#if FP8
typedef float Sum;
#define TYPES "f32.e4m3.e4m3"
#define SCALES ", p, 1, 1"
#define R4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#else
typedef int Sum;
#define TYPES "s32.s8.s8"
#define SCALES ", p"
#define R4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#endif
#define P4 "%0, %1, %2, %3"
#define P8 P4 ", %4, %5, %6, %7"
#define P16 P8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define P32 P16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define R8(i) R4(i), R4(i + 4)
#define R16(i) R8(i), R8(i + 8)
#define R32(i) R16(i), R16(i + 16)
#define WGMMA(n, registers, sums, descriptors, keep)                                                          \
    asm volatile("{ .reg .pred p; setp.ne.u32 p, " keep ", 0;\n"                                               \
                 "wgmma.mma_async.sync.aligned.m64n" n "k32." TYPES " {" registers "}, " descriptors SCALES "; }" \
                 : sums : "l"(a), "l"(b), "r"((u32)add) : "memory")
// d = A B^T, or d += where `add`, for 64 rows of A and PLANES * MB of B, 32 bytes of K.
__device__ __forceinline__ void multiply(Sum (&d)[SUMS], u64 a, u64 b, bool add) {
    if constexpr (SUMS == 4) WGMMA("8", P4, R4(0), "%4, %5", "%6");
    else if constexpr (SUMS == 8) WGMMA("16", P8, R8(0), "%8, %9", "%10");
    else if constexpr (SUMS == 16) WGMMA("32", P16, R16(0), "%16, %17", "%18");
    else WGMMA("64", P32, R32(0), "%32, %33", "%34");
}
// Shared-memory matrix descriptor: rows of 128 bytes one after the other, their 16-byte chunks swizzled.
__device__ __forceinline__ u64 descriptor(u32 addr) {
    return (addr & 0x3ffff) >> 4 | (u64)1 << 16 | (u64)(8 * KC / 16) << 32 | (u64)1 << 62;
}
// Where chunk c of row r lies under that swizzle.
__device__ __forceinline__ u32 place(int r, int c) { return r * KC + (c ^ (r & 7)) * 16; }

struct alignas(16) Four { Sum of[4]; };
__device__ __forceinline__ Four load_peer(u32 addr, u32 rank) {
    uint4 v;
    asm volatile("{ .reg .u32 a; mapa.shared::cluster.u32 a, %4, %5;\n"
                 "ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [a]; }"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(addr), "r"(rank) : "memory");
    return *(const Four*)&v;
}
__device__ __forceinline__ u16 to_half(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
__device__ __forceinline__ float from_half(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
// What follows is as Triton computes it, of INT8 to the bit: the two kernels may finish rows of one sequence.
__device__ __forceinline__ float scaled(Sum high, Sum low, float scale) {
    return __fmul_rn(FP8 ? (float)high : fmaf((float)high, 256.0f, (float)low), scale);
}
__device__ __forceinline__ float silu_mul(float gate, float up) {
    float e, q;
    asm("ex2.approx.f32 %0, %1;" : "=f"(e) : "f"(__fmul_rn(__fsub_rn(0.0f, gate), 1.4426950408889634f)));
    asm("div.full.f32 %0, %1, %2;" : "=f"(q) : "f"(gate), "f"(__fadd_rn(e, 1.0f)));
    return __fmul_rn(q, up);
}
// The weight row behind row r of this block's stages; for SILU, every slab holds eight gate rows and their up rows.
__device__ __forceinline__ int weight_row(int group, int r) {
    if (!SILU) return min(group * ROWS + r, N - 1);
    return r % 16 / 8 * (N / 2) + min(group * (ROWS / 2) + r / 16 * 8 + r % 8, N / 2 - 1);
}

extern "C" __global__ void __launch_bounds__(THREADS) stream_gemm(const Params p) {
    extern __shared__ __align__(1024) char memory[];
    asm volatile("griddepcontrol.launch_dependents;");
    const int tid = threadIdx.x, lane = tid % 32, slab = tid / 32;
    const int group = blockIdx.x / SPLIT, split = blockIdx.x % SPLIT;
    const u32 ring = smem_addr(memory);

    u32 w_from[W_LOADS], w_to[W_LOADS], a_from[A_LOADS], a_to[A_LOADS];
#pragma unroll
    for (int i = 0; i < W_LOADS; ++i) {
        const int r = (tid + i * THREADS) / CHUNKS, c = (tid + i * THREADS) % CHUNKS;
        w_from[i] = (u32)weight_row(group, r) * K + split * (K / SPLIT) + c * 16;
        w_to[i] = place(r, c);
    }
#pragma unroll
    for (int i = 0; i < A_LOADS; ++i) {
        const int r = (tid + i * THREADS) / CHUNKS, c = (tid + i * THREADS) % CHUNKS;
        a_from[i] = (u32)(r / MB) * p.plane + (u32)(r % MB) * K + split * (K / SPLIT) + c * 16;
        a_to[i] = W_BYTES + place(r, c);
    }
    auto load_weights = [&](int step) {
        const u32 stage = ring + step % STAGES * STAGE;
#pragma unroll
        for (int i = 0; i < W_LOADS; ++i)
            if (tid + i * THREADS < ROWS * CHUNKS) load16(stage + w_to[i], p.weight + w_from[i] + step * KC);
    };
    auto load_digits = [&](int step) {
        const u32 stage = ring + step % STAGES * STAGE;
#pragma unroll
        for (int i = 0; i < A_LOADS; ++i)
            if (tid + i * THREADS < PLANES * MB * CHUNKS) load16(stage + a_to[i], p.digits + a_from[i] + step * KC);
    };

#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < STEPS) load_weights(step);
        commit();
        wait_groups<IN_FLIGHT>();
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");
#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < STEPS) load_digits(step);
        commit();
    }

    Sum acc[SUMS] = {}, stage_sums[SUMS];  // of this warp's slab: [plane][row / 8][4] as the tensor core lays them out
#pragma unroll 1
    for (int step = 0; step < STEPS; ++step) {
        wait_groups<IN_FLIGHT>();
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
        // A last warpgroup with fewer than four slabs multiplies what lies behind them too, and ignores the result.
        const u32 stage = ring + step % STAGES * STAGE;
        const u64 a = descriptor(stage + slab / 4 * 64 * KC), b = descriptor(stage + W_BYTES);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < KC / 32; ++k) multiply(FP8 ? stage_sums : acc, a + 2 * k, b + 2 * k, !FP8 || k);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (step + STAGES - 1 < STEPS) load_weights(step + STAGES - 1), load_digits(step + STAGES - 1);
        commit();
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#if FP8
#pragma unroll
        for (int i = 0; i < SUMS; ++i) {
            asm volatile("" : "+f"(stage_sums[i])::"memory");  // not to be read before that wait
            acc[i] += stage_sums[i];
        }
#endif
    }

    // Lane l holds weight rows l / 4 and l / 4 + 8 of the slab, for activation rows l % 4 * 2 and the next.
    if (SILU) {
        const int column = group * (ROWS / 2) + slab * 8 + lane / 4;
        if (slab >= SLABS || column >= N / 2) return;
        const float gate_scale = __ldg(p.weight_scale + column), up_scale = __ldg(p.weight_scale + N / 2 + column);
#pragma unroll
        for (int t = 0; t < MT; ++t)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int m = t * 8 + lane % 4 * 2 + e, high = t * 4 + e, low = high + (PLANES - 1) * MT * 4;
                if (m >= p.rows) continue;
                const float gate = __fmul_rn(scaled(acc[high], acc[low], p.scale[m]), gate_scale);
                const float up = __fmul_rn(scaled(acc[high + 2], acc[low + 2], p.scale[m]), up_scale);
                p.out[(u64)m * (N / 2) + column] = to_half(silu_mul(gate, up));
            }
        return;
    }
    Sum* part = (Sum*)memory;  // [PLANES][MB][PART]
    __syncthreads();
    if (slab < SLABS)
#pragma unroll
        for (int i = 0; i < SUMS; ++i) {
            const int m = i / 4 % MT * 8 + lane % 4 * 2 + i % 2, n = slab * 16 + lane / 4 + i % 4 / 2 * 8;
            part[(i / 4 / MT * MB + m) * PART + n] = acc[i];
        }
    __syncthreads();
    // The block's own barrier does not wait for its last stores to land: its own loads queue behind them, a peer's do
    // not. This fence (CUDA 12.8 and later) does, and unlike the barrier's own (arrive.release) leaves global memory alone.
    if (SPLIT > 1)
        asm volatile("fence.release.sync_restrict::shared::cta.cluster;\n"
                     "barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
    for (int i = tid; i < p.rows * QUADS; i += THREADS) {
        const int m = i / QUADS, local = split * (ROWS / SPLIT) + i % QUADS * 4, column = group * ROWS + local;
        if (column >= N) continue;
        const float4 ws = __ldg((const float4*)(p.weight_scale + column));
        const float scale = p.scale[m];
        ushort4* at = (ushort4*)(p.out + (u64)m * N + column);
        const ushort4 before = RESIDUAL ? *at : make_ushort4(0, 0, 0, 0);
        Four sum[2] = {};
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane)
#pragma unroll
            for (int rank = 0; rank < SPLIT; ++rank) {
                const int from = (plane * MB + m) * PART + local;
                const Four v = SPLIT > 1 ? load_peer(ring + from * 4, rank) : *(const Four*)(part + from);
#pragma unroll
                for (int e = 0; e < 4; ++e) sum[plane].of[e] += v.of[e];
            }
        auto finish = [&](int e, float weight_scale, u16 x) {
            const float y = scaled(sum[0].of[e], sum[1].of[e], scale);
            return to_half(RESIDUAL ? fmaf(y, weight_scale, from_half(x)) : __fmul_rn(y, weight_scale));
        };
        *at = make_ushort4(finish(0, ws.x, before.x), finish(1, ws.y, before.y), finish(2, ws.z, before.z),
                           finish(3, ws.w, before.w));
    }
    if (SPLIT > 1)  // a block's shared memory must outlive its peers' reads
        asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}
