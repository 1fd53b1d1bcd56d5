// What persistent.cu exchanges and multiplies with: the words that carry activations between blocks, and activations as
// the layers' scheme wants them, held in registers.

#include "persistent_producer.cuh"

// ---------------------------------------------------------------- activations
// Lane l of warp w owns, of every row of K weights, NV vectors of VEC words, and of every K activations the W float4 that
// belong to them: of packed weights a vector's low nibbles come first, then its high ones. Activations lie in global
// memory in the order in which consecutive lanes read consecutive float4 of them; `permuted` says where element k lies.
template <int K> struct Split {
    static constexpr int W = K / 1024, LOADS = W / PER_BYTE, VEC = LOADS % 4 == 0 ? 4 : LOADS % 2 == 0 ? 2 : 1;
    static constexpr int NV = LOADS / VEC, RUNS = W / VEC;  // VEC float4 next to each other in natural order are a run
    __device__ static int vector(int n) {  // the byte of a row where this lane's vector n begins
        return (threadIdx.x / 32) * (K / PER_BYTE / WARPS) + n * 128 * VEC + threadIdx.x % 32 * 4 * VEC;
    }
    __device__ static int natural(int w) {  // first element of this lane's float4 w
        const int byte = vector(w / VEC / PER_BYTE) + w % VEC * 4;
        if (PER_BYTE == 1) return byte;
        return byte / GROUP_BYTES * 2 * GROUP_BYTES + byte % GROUP_BYTES + w / VEC % 2 * GROUP_BYTES;
    }
    __device__ static int word(int w) {  // the same in permuted order
        return (threadIdx.x / 32) * (K / WARPS) + w * 128 + threadIdx.x % 32 * 4;
    }
    __device__ static int permuted(int k) {
        const int half = PER_BYTE == 1 ? 0 : k / GROUP_BYTES % 2;
        const int byte = PER_BYTE == 1 ? k : k / (2 * GROUP_BYTES) * GROUP_BYTES + k % GROUP_BYTES;
        const int in_vector = byte % (128 * VEC);
        return (byte - in_vector) * PER_BYTE + half * 128 * VEC + in_vector % (4 * VEC) / 4 * 128 +
               in_vector / (4 * VEC) * 4 + k % 4;
    }
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
// NaN where either is, unlike fmaxf: a row that holds one must not pass for numbers.
__device__ __forceinline__ float larger(float a, float b) {
    float v;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}
// Two floats at e4m3's nearest values, as halves: a in the low one.
__device__ __forceinline__ u32 round_e4m3(float a, float b) {
    u32 w;
    asm("{ .reg .b16 q; cvt.rn.satfinite.e4m3x2.f32 q, %2, %1; cvt.rn.f16x2.e4m3x2 %0, q; }"
        : "=r"(w) : "f"(a), "f"(b));
    return w;
}
// What INT8 and INT4 weights are multiplied with: fixed point, one scale a row, in two signed digits.
template <int K> struct Digits {
    int hi[ROWS][K / 1024], lo[ROWS][K / 1024];
    float scale[ROWS];
    // row r: v times `factor`, where `amax` is the largest magnitude in all of the row's v
    __device__ __forceinline__ void hold(int r, const float4* v, float amax, float factor) {
        scale[r] = amax * factor / DIGITS_MAX;
#pragma unroll
        for (int w = 0; w < K / 1024; ++w) pack(v[w], inverse_of(amax), hi[r][w], lo[r][w]);
    }
};
// What FP8 weights are multiplied with: e4m3, one scale a row, each value as the half that equals it. quantize_e4m3 of
// schemes.py.
template <int K> struct Halves {
    u32 pair[ROWS][K / 512];
    float scale[ROWS];
    __device__ __forceinline__ void hold(int r, const float4* v, float amax, float factor) {
        scale[r] = larger(amax * factor / 448.0f, 1.0f / (448 * 512));
        const float inverse = factor / scale[r];
#pragma unroll
        for (int w = 0; w < K / 1024; ++w) {
            pair[r][2 * w] = round_e4m3(v[w].x * inverse, v[w].y * inverse);
            pair[r][2 * w + 1] = round_e4m3(v[w].z * inverse, v[w].w * inverse);
        }
    }
};
#ifdef FP8
template <int K> using Inputs = Halves<K>;
#else
template <int K> using Inputs = Digits<K>;
#endif

// ---------------------------------------------------------------- words between blocks
// What travels is the upper 24 bits of a float32 (an error of 2^-17, below that of the 16-bit digits) and a flag.
__device__ __forceinline__ u32 flag_of(const Shared& s, int layer) { return (s.epoch + layer + 1) & 255; }
__device__ __forceinline__ u32 far_flag_of(const Shared& s, int layer) { return s.epoch + layer + 1; }
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
// The same between GPUs: a whole float32 and a flag of 32 bits, in one word that cannot tear.
__device__ __forceinline__ void send_far(u64* word, u32 bits, u32 flag) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"((u64)flag << 32 | bits) : "memory");
}
__device__ __forceinline__ u32 receive_far(const u64* word, u32 flag) {
    u64 w;
    for (u32 n = 0;; ++n) {
        asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(w) : "l"(word) : "memory");
        if ((u32)(w >> 32) == flag) return (u32)w;
        if (n > SPIN_LIMIT) __trap();
    }
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
template <typename D>
__device__ void norm_inputs(Shared& s, const float4 (&weight)[HIDDEN / 1024], float eps,
                            float4 (&v)[ROWS * (HIDDEN / 1024)], D& d) {
    float rstd[ROWS], amax[ROWS];
    normalize(s, weight, eps, v, rstd, amax);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) d.hold(r, v + r * (HIDDEN / 1024), amax[r], rstd[r]);
}
template <int K, bool POLL> __device__ void plain_inputs(Shared& s, const u32* source, u32 flag, Inputs<K>& d) {
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
        d.hold(r, v, top, 1.0f);
    }
}
