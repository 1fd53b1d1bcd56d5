// y = a W^T for up to 32 rows of activations on the tensor cores (wgmma m64nNk32): INT8 weights times 16-bit fixed point
// held as two planes of signed 8-bit digits, summed exactly in int32, the digits of all rows side by side as N; or FP8
// weights times e4m3, one plane, summed in float32 from one stage to the next (within one a tensor core keeps 14 bits);
// or INT4 weights times the digits, where a stage is a group, summed exactly and then scaled into float32.
//
// A block owns ROWS = 16 * SLABS weight rows and takes all activation rows along, so weights and digits are read once.
// Weights depend on no other kernel: under programmatic dependent launch a block fills its ring of stages with them
// while the kernels before it still run, and only then waits for its activations. SPLIT blocks of one cluster share the
// rows and cut K between them; their integer sums meet in distributed shared memory.
//
// Compiled at run time by stream.py, which defines N, K, SILU, RESIDUAL, FP8, INT4, SLABS, SPLIT, MB (activation rows: 8, 16 or
// 32),
// KC (bytes of K a stage), STAGES and FLIGHT (bytes of weights a block has on their way).

#include "stream_tile.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) stream_gemm(const Params p) {
    extern __shared__ __align__(1024) char memory[];
    asm volatile("griddepcontrol.launch_dependents;");
    const int tid = threadIdx.x, lane = tid % 32, slab = tid / 32;
    const int group = blockIdx.x / SPLIT, split = blockIdx.x % SPLIT;
    const u32 ring = smem_addr(memory);

    u32 w_from[W_LOADS], w_to[W_LOADS], a_from[A_LOADS], a_to[A_LOADS];
#pragma unroll
    for (int i = 0; i < W_LOADS; ++i) {
        const int r = (tid + i * THREADS) / W_CHUNKS, c = (tid + i * THREADS) % W_CHUNKS;
        w_from[i] = (u32)weight_row(group, r) * ROW_K + split * (ROW_K / SPLIT) + c * 16;
        w_to[i] = place_weight(r, c);
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
            if (tid + i * THREADS < ROWS * W_CHUNKS) load16(stage + w_to[i], p.weight + w_from[i] + step * ROW_KC);
    };
    auto load_digits = [&](int step) {
        const u32 stage = ring + step % STAGES * STAGE;
#pragma unroll
        for (int i = 0; i < A_LOADS; ++i)
            if (tid + i * THREADS < PLANES * MB * CHUNKS) load16(stage + a_to[i], p.digits + a_from[i] + step * KC);
    };

    const u32 scales = ring + STAGES * STAGE;  // of INT4: float16 [ROWS][STEPS]
    for (int i = tid; INT4 && i < ROWS * (STEPS / 8); i += THREADS) {
        const int r = i / (STEPS / 8), c = i % (STEPS / 8);
        const u32 from = (u32)weight_row(group, r) * (K / KC) + split * STEPS + c * 8;
        load16(scales + (r * STEPS + c * 8) * 2, (const char*)p.weight_scale + from * 2);
    }
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

    Acc acc[ACC] = {};  // of this warp's slab: [plane][row / 8][4] as the tensor core lays them out
#if FP8 || INT4
    Sum sums[SUMS];  // the same of one stage
#endif
#pragma unroll 1
    for (int step = 0; step < STEPS; ++step) {
        wait_groups<IN_FLIGHT>();
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
        // A last warpgroup with fewer than four slabs multiplies what lies behind them too, and ignores the result.
        const u32 stage = ring + step % STAGES * STAGE;
        const u64 b = descriptor(stage + W_BYTES);
#if INT4
        u32 words[W_CHUNKS][2];  // of rows l / 4 and l / 4 + 8 of the slab
        float scale[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = slab * 16 + half * 8 + lane / 4;
#pragma unroll
            for (int c = 0; c < W_CHUNKS; ++c) words[c][half] = load_word(stage + place_weight(row, c) + lane % 4 * 4);
            scale[half] = load_half(scales + (row * STEPS + step) * 2);
        }
        Rows rows[KC / 32];  // nibbles as bytes, 16 times too large: the group's first half is in the low ones
#pragma unroll
        for (int k = 0; k < KC / 32; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32 word = words[k % 2 * 2 + i / 2][i % 2];
                rows[k].word[i] = (k < 2 ? word << 4 : word) & 0xf0f0f0f0u;
            }
#else
        const u64 a = descriptor(stage + slab / 4 * 64 * KC);
#endif
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < KC / 32; ++k)
#if INT4
            multiply(sums, rows[k], b + 2 * k, k);
#elif FP8
            multiply(sums, a + 2 * k, b + 2 * k, k);
#else
            multiply(acc, a + 2 * k, b + 2 * k, true);
#endif
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (step + STAGES - 1 < STEPS) load_weights(step + STAGES - 1), load_digits(step + STAGES - 1);
        commit();
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#if FP8 || INT4
#pragma unroll
        for (int i = 0; i < SUMS; ++i) keep(sums[i]);
#pragma unroll
        for (int i = 0; i < ACC; ++i)
#if FP8
            acc[i] += sums[i];
#else
            acc[i] += scale[i / 2 % 2] * (float)(sums[i] * 256 + sums[i + ACC]);  // exact up to here: KC is a group
#endif
#endif
    }

    // Lane l holds weight rows l / 4 and l / 4 + 8 of the slab, for activation rows l % 4 * 2 and the next.
    if (SILU) {
        const int column = group * (ROWS / 2) + slab * 8 + lane / 4;
        if (slab >= SLABS || column >= N / 2) return;
        const float gate_scale = INT4 ? 1.0f / 16 : __ldg(p.weight_scale + column);
        const float up_scale = INT4 ? 1.0f / 16 : __ldg(p.weight_scale + N / 2 + column);
#pragma unroll
        for (int t = 0; t < MT; ++t)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int m = t * 8 + lane % 4 * 2 + e, high = t * 4 + e, low = high + (OUT_PLANES - 1) * MT * 4;
                if (m >= p.rows) continue;
                const float gate = __fmul_rn(scaled(acc[high], acc[low], p.scale[m]), gate_scale);
                const float up = __fmul_rn(scaled(acc[high + 2], acc[low + 2], p.scale[m]), up_scale);
                p.out[(u64)m * (N / 2) + column] = to_half(silu_mul(gate, up));
            }
        return;
    }
    Acc* part = (Acc*)memory;  // [OUT_PLANES][MB][PART]
    __syncthreads();
    if (slab < SLABS)
#pragma unroll
        for (int i = 0; i < ACC; ++i) {
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
        constexpr float UNIT = 1.0f / 16;
        const float4 ws = INT4 ? make_float4(UNIT, UNIT, UNIT, UNIT) : __ldg((const float4*)(p.weight_scale + column));
        const float scale = p.scale[m];
        ushort4* at = (ushort4*)(p.out + (u64)m * N + column);
        const ushort4 before = RESIDUAL ? *at : make_ushort4(0, 0, 0, 0);
        Four sum[2] = {};
#pragma unroll
        for (int plane = 0; plane < OUT_PLANES; ++plane)
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
