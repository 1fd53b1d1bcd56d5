// One launch decodes one token of 1 or 2 sequences of a Llama-architecture model with INT8 weights.
//
// One block a multiprocessor. A producer thread streams this block's rows of every matrix (and its share of the KV
// cache) in execution order through one ring of shared memory; weights depend on nothing, so it never waits for
// another block. Eight consumer warps each own an eighth of K: they hold the activations of the current matrix as two
// planes of signed 8-bit digits in registers and add exact integer sums.
//
// Blocks exchange activations as words that carry their own readiness: 24 bits of a float32 and an 8-bit flag that
// counts layers. A reader polls the words it needs (where many would poll for long, after a counter has hinted that
// they are there); there are no fences and no barriers between blocks, because under a saturated memory system each
// costs a round trip. A word is overwritten one layer later at the earliest, when every block is known, through the
// chain of its own inputs, to have read it.
//
// Compiled at run time by persistent.py, which defines the geometry: HIDDEN, INTER, LAYERS, HEADS, KV_HEADS, HEAD,
// VOCAB, TPB (tokens per block), GRID, ROWS, and optionally ELEM_BF16, LM_INT8.

#include "persistent_stream.cu"

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
// round(v * inv), |result| <= 32512, in the low 16 bits: adding 1.5 * 2^23 leaves the integer in the mantissa.
__device__ __forceinline__ int to_fixed(float v, float inv) { return __float_as_int(fmaf(v, inv, 12582912.0f)); }
__device__ __forceinline__ void pack(float4 v, float inv, int& hi, int& lo) {
    const int a = to_fixed(v.x, inv), b = to_fixed(v.y, inv), c = to_fixed(v.z, inv), d = to_fixed(v.w, inv);
    lo = __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
    hi = __byte_perm(__byte_perm(a + 128, b + 128, 0x0051), __byte_perm(c + 128, d + 128, 0x0051), 0x5410);
}
__device__ __forceinline__ float inverse_of(float amax) { return amax > 0 ? 32512.0f / amax : 0.0f; }

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
__device__ void gemv(Ring& ring, Shared& s, const Digits<K>& d, int count) {
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
    float qa[GROUP][8], qb[GROUP][8];
#pragma unroll
    for (int h = 0; h < GROUP; ++h) {
        load8(s.inputs + h * HEAD + d, qa[h]);
        load8(s.inputs + h * HEAD + HEAD / 2 + d, qb[h]);
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
    if (unit.split == SPLITS - 1 && warp == WARPS - 1) {  // the new token: rotate and store its key, store its value
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
        ring.wait_full();
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
        auto at = [&](int i) { return x + i / W * HIDDEN + Split<HIDDEN>::word(i % W); };
        receive<ROWS * W, false>(v, flag_of(s, layer), at);
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
        auto scale_of = [&](int which, int row, bool mine) {
            return mine ? __ldg((const float*)table[which] + row) : 0.0f;
        };
        {
            const Part part = part_of(QKV, layer);
            const float weight_scale = scale_of(QKV_S, part.start + tid, tid < part.count);
            Digits<HIDDEN> d;
            if (layer) receive_x(p.x_mlp, layer - 1);
            norm_digits(s, weight, p.eps, v, d);
            gemv<HIDDEN, RS, false>(ring, s, d, part.count);
            consumer_sync();
            if (tid < part.count)
#pragma unroll
                for (int r = 0; r < ROWS; ++r)
                    send(p.qkv + r * QKV + part.start + tid, take(s, tid, r, d.scale[r], weight_scale), flag);
        }
        if (unit.active) attend(p, s, ring, unit, layer);
        {
            const float weight_scale = scale_of(O_S, rows_x.start + tid, tid < rows_x.count);
            Digits<Q_SIZE> d;
            plain_digits<Q_SIZE, true>(s, p.attended, flag, d);
            gemv<Q_SIZE, RS_Q, false>(ring, s, d, rows_x.count);
            add_residual(p.x_attention, layer, d.scale, weight_scale);
        }
        {
            const Part part = part_of(INTER, layer);
            const float gate_scale = scale_of(GU_S, part.start + tid, tid < part.count);
            const float up_scale = scale_of(GU_S, INTER + part.start + tid, tid < part.count);
            load_weight(2 * layer + 1);
            Digits<HIDDEN> d;
            receive_x(p.x_attention, layer);
            norm_digits(s, weight, p.eps, v, d);
            gemv<HIDDEN, 2 * PAIRS, true>(ring, s, d, part.count);
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
        }
        {
            const float weight_scale = scale_of(DOWN_S, rows_x.start + tid, tid < rows_x.count);
            Digits<INTER> d;
            await_hint(p.sync + SENT_HIDDEN, GRID * (layer + 1));
            plain_digits<INTER, false>(s, p.hidden, flag, d);
            gemv<INTER, RS_I, false>(ring, s, d, rows_x.count);
            add_residual(p.x_mlp, layer, d.scale, weight_scale);
            load_weight(2 * layer + 2);
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
        gemv<HIDDEN, RS_LM, false>(ring, s, d, rows);
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
            ring.wait_full();
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
    if (tid == 0) s.epoch = p.sync[LAUNCHES] * LAYERS;
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
        consume(p, s, ring);
    }
}
