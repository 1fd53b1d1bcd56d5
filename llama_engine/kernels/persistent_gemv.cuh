// The products of persistent.cu: a matrix's rows, as they arrive in the ring, times activations held in registers.

#include "persistent_matrix.cuh"

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

// ---------------------------------------------------------------- INT8, exact
// acc[row][r] += the exact sums of `count` rows that arrive NROWS a stage, each sum as (high, low) with value
// 256 * high + low. PAIRED: a stage holds NROWS / 2 gate rows, then as many up rows; gate j is added to acc row j, up j
// to acc row MAX_PAIRS + j. A stage's sums are reduced over the warp while the next stage's words arrive.
template <int K, int NROWS, bool PAIRED>
__device__ void gemv_int8(Ring& ring, Shared& s, const Digits<K>& d, int count) {
    using S = Split<K>;
    // DIGITS_MAX * 128 * K / WARPS < 2^31: one integer holds a warp's sum of both digits
    constexpr bool ONE = K / WARPS <= 512;
    constexpr int PER = PAIRED ? NROWS / 2 : NROWS, VALUES = NROWS * ROWS, PASSES = ceil_div(VALUES, 16);
    const int lane = threadIdx.x % 32;
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
        ring.wait_full();
        Words<S::VEC> v[NROWS][S::RUNS];
#pragma unroll
        for (int i = 0; i < NROWS; ++i)
#pragma unroll
            for (int n = 0; n < S::RUNS; ++n)
                v[i][n] = load_shared<S::VEC>(ring.stage() + i * K + S::natural(n * S::VEC));
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
__device__ __forceinline__ float take_int8(Shared& s, int row, int r, float row_scale, float weight_scale) {
    int2* cell = (int2*)&s.acc[(row * ROWS + r) * 2];
    const int2 sum = *cell;
    *cell = make_int2(0, 0);
    return ((float)sum.x * 256.0f + (float)sum.y) * row_scale * weight_scale;
}

#if defined(FP8) || defined(INT4)
// ---------------------------------------------------------------- sums in float32
// What COUNT of the NROWS rows of a stage give each lane, and where the warp's sums go. PAIRED as above.
template <int NROWS, int COUNT, bool PAIRED> struct Sums {
    static constexpr int PER = PAIRED ? NROWS / 2 : NROWS, VALUES = COUNT * ROWS, N = power_of_two(2 * VALUES - 1);
    float of[N] = {};
    // rows `at` and on of the stage that begins with the matrix's row (pair) `first`
    __device__ __forceinline__ void flush(Shared& s, int first, int at, int count) const {
        const float sum = sum_many(of);
        const int lane = threadIdx.x % 32, value = lane / (32 / N), row = at + value / ROWS;
        const bool up = PAIRED && row >= PER;
        const int item = first + (up ? row - PER : row);
        if (lane % (32 / N) == 0 && value < VALUES && item < count)
            s.part[(item + (up ? MAX_PAIRS : 0)) * ROWS + value % ROWS][threadIdx.x / 32] = sum;
    }
};
__device__ __forceinline__ float take(const Shared& s, int row, int r, float row_scale, float weight_scale) {
    const float4* part = (const float4*)s.part[row * ROWS + r];
    const float4 a = part[0], b = part[1];
    return ((a.x + a.y + a.z + a.w) + (b.x + b.y + b.z + b.w)) * row_scale * weight_scale;
}
#endif

#ifdef FP8
__device__ __forceinline__ void widen_e4m3(u32 w, u32& low, u32& high) {
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h; }"
        : "=r"(low), "=r"(high) : "r"(w));
}
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// part[row][r] = the sums of `count` rows in float32 (products of two e4m3 are exact). The tensor core takes an eighth of
// the warp's K as each of its rows and as each of its columns: every lane multiplies its own words with its own
// activations, of two weight rows at once, and the diagonals hold the sums over four lanes.
template <int K, int NROWS, bool PAIRED>
__device__ void gemv(Ring& ring, Shared& s, const Halves<K>& d, int count) {
    using S = Split<K>;
    constexpr int CHAINS = NROWS > 2 || S::W < 2 ? 1 : 2;  // sums under way at once, where few rows give few
    const int lane = threadIdx.x % 32;
    const bool diagonal = lane % 4 == lane / 8, odd = lane / 4 % 2;
    Sums<NROWS, NROWS, PAIRED> sums;
    for (int first = 0; first < count; first += sums.PER) {
        ring.wait_full();
        Words<S::VEC> v[NROWS][S::NV];
#pragma unroll
        for (int i = 0; i < NROWS; ++i)
#pragma unroll
            for (int n = 0; n < S::NV; ++n) v[i][n] = load_shared<S::VEC>(ring.stage() + i * K + S::vector(n));
        if (first) sums.flush(s, first - sums.PER, 0, count);
#pragma unroll
        for (int i = 0; i < NROWS; i += 2) {
            float c[ROWS][CHAINS][4] = {};
#pragma unroll
            for (int w = 0; w < S::W; ++w) {
                u32 a[4] = {};
                widen_e4m3(v[i][w / S::VEC].w[w % S::VEC], a[0], a[2]);
                if (i + 1 < NROWS) widen_e4m3(v[min(i + 1, NROWS - 1)][w / S::VEC].w[w % S::VEC], a[1], a[3]);
#pragma unroll
                for (int r = 0; r < ROWS; ++r)
                    mma(c[r][w % CHAINS], a[0], a[1], a[2], a[3], d.pair[r][2 * w], d.pair[r][2 * w + 1]);
            }
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int j = 0; j < 2 && i + j < NROWS; ++j) {
                    float sum = 0;
#pragma unroll
                    for (int chain = 0; chain < CHAINS; ++chain)
                        sum += odd ? c[r][chain][2 * j + 1] : c[r][chain][2 * j];
                    sums.of[(i + j) * ROWS + r] = diagonal ? sum : 0.0f;
                }
        }
        ring.release();
    }
    if (count > 0) sums.flush(s, (count - 1) / sums.PER * sums.PER, 0, count);
}
#elif defined(INT4)
// part[row][r] = the sums of `count` rows, 16 times too large: a nibble in a byte's upper half is a signed digit. The
// sum over a vector, which lies in one group, is exact; group sums are added in float32.
template <int K, int NROWS, bool PAIRED>
__device__ void gemv(Ring& ring, Shared& s, const Digits<K>& d, int count) {
    using S = Split<K>;
    constexpr u32 UPPER = 0xf0f0f0f0u;
    // More sums at once would not fit the registers: a spill goes to L2, through the queue of the weights.
    constexpr int BYTES = K / PER_BYTE, SOME = NROWS % (8 / ROWS) ? NROWS : 8 / ROWS;
    Sums<NROWS, SOME, PAIRED> sums;
    int last = 0, last_at = -1;
    for (int first = 0; first < count; first += sums.PER) {
        ring.wait_full();
#pragma unroll 1
        for (int at = 0; at < NROWS; at += SOME) {
            Words<S::VEC> v[SOME][S::NV];
            float scale[SOME][S::NV];
            const u32 rows = ring.stage() + at * BYTES, scales = ring.stage() + STAGE_ROWS + at * (BYTES / SCALES_OF);
#pragma unroll
            for (int i = 0; i < SOME; ++i)
#pragma unroll
                for (int n = 0; n < S::NV; ++n) {
                    v[i][n] = load_shared<S::VEC>(rows + i * BYTES + S::vector(n));
                    asm volatile("{ .reg .b16 h; ld.shared.b16 h, [%1]; cvt.f32.f16 %0, h; }"
                                 : "=f"(scale[i][n])
                                 : "r"(scales + i * (BYTES / SCALES_OF) + S::vector(n) / GROUP_BYTES * 2));
                }
            if (last_at >= 0) sums.flush(s, last, last_at, count);
            last = first, last_at = at;
#pragma unroll
            for (int i = 0; i < SOME; ++i)
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    float total = 0;
#pragma unroll
                    for (int n = 0; n < S::NV; ++n) {
                        int sum = 0;
#pragma unroll
                        for (int digit = 0; digit < 2; ++digit) {
                            const int(&a)[S::W] = digit ? d.lo[r] : d.hi[r];
                            sum *= 256;
#pragma unroll
                            for (int w = 0; w < S::VEC; ++w) {
                                const u32 word = v[i][n].w[w];
                                sum = __dp4a((int)(word << 4 & UPPER), a[2 * n * S::VEC + w], sum);
                                sum = __dp4a((int)(word & UPPER), a[(2 * n + 1) * S::VEC + w], sum);
                            }
                        }
                        total += (float)sum * scale[i][n];
                    }
                    sums.of[i * ROWS + r] = total;
                }
        }
        ring.release();
    }
    if (last_at >= 0) sums.flush(s, last, last_at, count);
}
#else
template <int K, int NROWS, bool PAIRED>
__device__ __forceinline__ void gemv(Ring& ring, Shared& s, const Digits<K>& d, int count) {
    gemv_int8<K, NROWS, PAIRED>(ring, s, d, count);
}
__device__ __forceinline__ float take(Shared& s, int row, int r, float row_scale, float weight_scale) {
    return take_int8(s, row, r, row_scale, weight_scale);
}
#endif
