// Attention of persistent.cu: one unit is a share of one KV head's context; units exchange their partial results.

#include "persistent_gemv.cuh"

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
            const u32 values = ring.stage() + STAGE_ROWS / 2 + warp * KEYS_PER_WARP * HEAD * 2 + lane * DIMS * 2;
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
