// What persistent.cu multiplies and exchanges: activations as digits, the words that carry them between blocks, and the
// exact product of a matrix's rows with them.

#include "persistent_stream.cuh"

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
// The largest activation in fixed point: both of its digits fit a signed byte. DIGITS_MAX of schemes.py.
constexpr float DIGITS_MAX = 32512.0f;
// round(v * inv), |result| <= DIGITS_MAX, in the low 16 bits: adding 1.5 * 2^23 leaves the integer in the mantissa.
__device__ __forceinline__ int to_fixed(float v, float inv) { return __float_as_int(fmaf(v, inv, 12582912.0f)); }
__device__ __forceinline__ void pack(float4 v, float inv, int& hi, int& lo) {
    const int a = to_fixed(v.x, inv), b = to_fixed(v.y, inv), c = to_fixed(v.z, inv), d = to_fixed(v.w, inv);
    lo = __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
    hi = __byte_perm(__byte_perm(a + 128, b + 128, 0x0051), __byte_perm(c + 128, d + 128, 0x0051), 0x5410);
}
__device__ __forceinline__ float inverse_of(float amax) { return amax > 0 ? DIGITS_MAX / amax : 0.0f; }

// ---------------------------------------------------------------- words between blocks
// What travels is the upper 24 bits of a float32 (an error of 2^-17, below that of the 16-bit digits) and a flag.
__device__ __forceinline__ u32 flag_of(const Shared& s, int layer) { return (s.epoch + layer + 1) & 255; }
__device__ __forceinline__ void send(u32* word, float value, u32 flag) {
    const u32 bits = value == value ? __float_as_uint(value) + 0x80 : 0x7fc00000;
    const u32 w = (bits & ~255u) | flag;
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
// A hint that a block has sent its words: no order is promised, it only keeps readers from polling data too early
// (thousands of threads that poll the same lines slow the writers down).
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
// N vectors at at(0) .. at(N - 1). `POLL`: they are not expected yet, so the first is polled before the others.
template <int N, bool POLL, typename At> __device__ __forceinline__ void receive(float4 (&v)[N], u32 flag, At at) {
    auto stale = [&](uint4 w) { return ((w.x ^ flag) | (w.y ^ flag) | (w.z ^ flag) | (w.w ^ flag)) & 255; };
    uint4 w[N];
    u32 wrong = 1, spins = 0;
    if (POLL)
        while (stale(peek4(at(0))))
            if (++spins > SPIN_LIMIT) __trap();
    while (wrong) {
        wrong = 0;
#pragma unroll
        for (int i = 0; i < N; ++i) w[i] = peek4(at(i));
#pragma unroll
        for (int i = 0; i < N; ++i) wrong |= stale(w[i]);
        if (++spins > SPIN_LIMIT) __trap();
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < N; ++i)
        v[i] = make_float4(received(w[i].x), received(w[i].y), received(w[i].z), received(w[i].w));
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

// NaN where either is, unlike fmaxf: a row that holds one must not pass for numbers.
__device__ __forceinline__ float larger(float a, float b) {
    float v;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}
__device__ __forceinline__ float largest_of(float4 a, float top) {
    return larger(top, larger(larger(fabsf(a.x), fabsf(a.y)), larger(fabsf(a.z), fabsf(a.w))));
}
__device__ __forceinline__ float warp_max(float v) {  // of values >= 0, and NaN, whose bits are above all
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
        for (int w = 0; w < WARPS; ++w) sum += s.reduce[w][r][0], top = larger(top, s.reduce[w][r][1]);
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
        d.scale[r] = amax[r] * rstd[r] / DIGITS_MAX;
#pragma unroll
        for (int w = 0; w < W; ++w) pack(v[r * W + w], inverse_of(amax[r]), d.hi[r][w], d.lo[r][w]);
    }
}
template <int K, bool POLL> __device__ void plain_digits(Shared& s, const u32* source, u32 flag, Digits<K>& d) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float4 v[K / 1024];
        float top = 0;
        receive<K / 1024, POLL>(v, flag, [&](int w) { return source + r * K + Split<K>::word(w); });
#pragma unroll
        for (int w = 0; w < K / 1024; ++w) top = largest_of(v[w], top);
        top = warp_max(top);
        if (threadIdx.x % 32 == 0) s.reduce[threadIdx.x / 32][r][0] = top;
        consumer_sync();
#pragma unroll
        for (int w = 0; w < WARPS; ++w) top = larger(top, s.reduce[w][r][0]);
        d.scale[r] = top / DIGITS_MAX;
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
__device__ void gemv(Ring& ring, Shared& s, const Digits<K>& d, int count) {
    using S = Split<K>;
    // DIGITS_MAX * 128 * K / WARPS < 2^31: one integer holds a warp's sum of both digits
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
        ring.wait_full();
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
