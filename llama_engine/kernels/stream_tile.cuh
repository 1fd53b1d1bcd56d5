// What stream.cu multiplies and moves: the shape of a block's stages, and the instructions.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

constexpr int ROWS = SLABS * 16, THREADS = (ROWS + 63) / 64 * 128, MT = MB / 8;
constexpr int PLANES = FP8 ? 1 : 2, SUMS = PLANES * MB / 2;  // of activations; a thread's sums in a tensor core
constexpr int OUT_PLANES = FP8 || INT4 ? 1 : 2, ACC = OUT_PLANES * MB / 2;  // what it adds up over the stages
constexpr int ROW_KC = INT4 ? KC / 2 : KC, ROW_K = INT4 ? K / 2 : K;        // bytes of a weight row: in a stage, in all
constexpr int CHUNKS = KC / 16, W_CHUNKS = ROW_KC / 16, STEPS = K / SPLIT / KC;  // 16 bytes each; stages to run through
constexpr int W_BYTES = ROWS * ROW_KC, A_BYTES = PLANES * MB * KC, STAGE = W_BYTES + A_BYTES;
constexpr int W_LOADS = (ROWS * W_CHUNKS + THREADS - 1) / THREADS;
constexpr int A_LOADS = (PLANES * MB * CHUNKS + THREADS - 1) / THREADS;
// Stages of weights still on their way when the next is asked for: more would only lengthen the queue in which every
// small load of this and the neighbouring kernels stands (docs/LOG.md).
constexpr int WANTED = FLIGHT / W_BYTES - 1, IN_FLIGHT = WANTED < 1 ? 1 : WANTED < STAGES - 2 ? WANTED : STAGES - 2;
constexpr int PART = ROWS + 4;  // padded row of partial sums: conflict-free, and still 16-byte aligned
constexpr int QUADS = ROWS / SPLIT / 4;  // groups of four outputs that one block of the cluster finishes

static_assert(KC == 128 && (MB == 8 || MB == 16 || MB == 32), "what descriptors and instructions are written for");
static_assert(K % (SPLIT * KC) == 0 && N % 16 == 0 && ROWS % (4 * SPLIT) == 0, "whole stages and whole tiles");
static_assert(!INT4 || STEPS % 8 == 0, "a row's group scales are loaded 16 bytes at a time");
static_assert(STAGES > 2, "a stage to compute, one to wait for, one to load");
static_assert(W_BYTES % 1024 == 0 && A_BYTES % 1024 == 0, "swizzled tiles start at multiples of their pattern");
static_assert(SILU ? SPLIT == 1 : OUT_PLANES * MB * PART * 4 <= STAGES * STAGE, "where the sums meet");

struct Params {
    const char* weight;          // [N][K] int8 or e4m3, or [N][K / 2] of two nibbles
    const float* weight_scale;   // [N], of INT4 float16 [N][K / 128]
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
typedef float Sum;  // of the tensor core
#define TYPES "f32.e4m3.e4m3"
#define SCALES ", p, 1, 1"
#define R4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#else
typedef int Sum;
#define TYPES "s32.s8.s8"
#define SCALES ", p"
#define R4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#endif
#if FP8 || INT4
typedef float Acc;  // over the stages
#else
typedef int Acc;
#endif
#define P4 "%0, %1, %2, %3"
#define P8 P4 ", %4, %5, %6, %7"
#define P16 P8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define P32 P16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define R8(i) R4(i), R4(i + 4)
#define R16(i) R8(i), R8(i + 8)
#define R32(i) R16(i), R16(i + 16)
#if INT4
struct Rows { u32 word[4]; };  // of 16 weight rows a warp, 32 of K, as the tensor core takes them from registers
#define OPERAND "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3])
#else
typedef u64 Rows;  // a descriptor of 64 weight rows in shared memory
#define OPERAND "l"(a)
#endif
#define WGMMA(n, registers, sums, descriptors, keep)                                                             \
    asm volatile("{ .reg .pred p; setp.ne.u32 p, " keep ", 0;\n"                                                  \
                 "wgmma.mma_async.sync.aligned.m64n" n "k32." TYPES " {" registers "}, " descriptors SCALES "; }"  \
                 : sums : OPERAND, "l"(b), "r"((u32)add) : "memory")
// d = A B^T, or d += where `add`, for 64 rows of A and PLANES * MB of B, 32 of K.
__device__ __forceinline__ void multiply(Sum (&d)[SUMS], Rows a, u64 b, bool add) {
#if INT4
    if constexpr (SUMS == 8) WGMMA("16", P8, R8(0), "{%8, %9, %10, %11}, %12", "%13");
    else if constexpr (SUMS == 16) WGMMA("32", P16, R16(0), "{%16, %17, %18, %19}, %20", "%21");
    else WGMMA("64", P32, R32(0), "{%32, %33, %34, %35}, %36", "%37");
#else
    if constexpr (SUMS == 4) WGMMA("8", P4, R4(0), "%4, %5", "%6");
    else if constexpr (SUMS == 8) WGMMA("16", P8, R8(0), "%8, %9", "%10");
    else if constexpr (SUMS == 16) WGMMA("32", P16, R16(0), "%16, %17", "%18");
    else WGMMA("64", P32, R32(0), "%32, %33", "%34");
#endif
}
// Shared-memory matrix descriptor: rows of 128 bytes one after the other, their 16-byte chunks swizzled.
__device__ __forceinline__ u64 descriptor(u32 addr) {
    return (addr & 0x3ffff) >> 4 | (u64)1 << 16 | (u64)(8 * KC / 16) << 32 | (u64)1 << 62;
}
// Where chunk c of row r lies under that swizzle.
__device__ __forceinline__ u32 place(int r, int c) { return r * KC + (c ^ (r & 7)) * 16; }
// The same of a packed weight row, which is half as long: eight rows' words lie in different banks.
__device__ __forceinline__ u32 place_weight(int r, int c) {
    return INT4 ? r * ROW_KC + (c ^ (r / 2 & 3)) * 16 : place(r, c);
}

struct alignas(16) Four { Acc of[4]; };
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
__device__ __forceinline__ u32 load_word(u32 addr) {
    u32 w;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(w) : "r"(addr));
    return w;
}
__device__ __forceinline__ float load_half(u32 addr) {
    float f;
    asm volatile("{ .reg .b16 h; ld.shared.b16 h, [%1]; cvt.f32.f16 %0, h; }" : "=f"(f) : "r"(addr));
    return f;
}
// The tensor core has written it by now: not to be read before.
__device__ __forceinline__ void keep(int& v) { asm volatile("" : "+r"(v)::"memory"); }
__device__ __forceinline__ void keep(float& v) { asm volatile("" : "+f"(v)::"memory"); }
// What follows is as Triton computes it, of INT8 to the bit: the two kernels may finish rows of one sequence.
__device__ __forceinline__ float scaled(Acc high, Acc low, float scale) {
    return __fmul_rn(OUT_PLANES == 1 ? (float)high : fmaf((float)high, 256.0f, (float)low), scale);
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
