// One launch decodes one token of 1 or 2 sequences of a Llama-architecture model with INT8, FP8 or INT4 weights.
//
// One block a multiprocessor. A producer thread streams this block's rows of every matrix (and its share of the KV
// cache) in execution order through one ring of shared memory; weights depend on nothing, so it never waits for
// another block. Eight consumer warps each own an eighth of K: they hold the activations of the current matrix in
// registers, as two planes of signed 8-bit digits or, for FP8 weights, as e4m3, and add what they make of their share.
//
// Blocks exchange activations as words that carry their own readiness: 24 bits of a float32 and an 8-bit flag that
// counts layers. A reader polls the words it needs (where many would poll for long, after a counter has hinted that
// they are there); there are no fences and no barriers between blocks, because under a saturated memory system each
// costs a round trip. A word is overwritten one layer later at the earliest, when every block is known, through the
// chain of its own inputs, to have read it.
//
// Compiled at run time by persistent.py, which defines the geometry: HIDDEN, INTER, LAYERS, HEADS, KV_HEADS, HEAD,
// VOCAB, TPB (tokens per block), GRID, ROWS, FP8 or INT4 for such layers, and LM_INT8 for an INT8 lm_head; RANKS, of whose
// share the rest speaks. Ranks run this at once, a GPU each, and exchange what o and down give where the residual is
// added: block b of one has the same rows as block b of another.

#include "persistent_attention.cuh"

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
        const int which = x == p.x_mlp, row = rows_x.start + tid;
        float sum[ROWS];
        if (tid < rows_x.count)
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                sum[r] = take(s, tid, r, scale[r], weight_scale);
                if (RANKS > 1 && !p.alone)
                    for (int to = 0; to < RANKS; ++to)
                        if (to != p.rank)
                            send_far(&p.inboxes[to]->sums[which][p.rank][r][row], __float_as_uint(sum[r]),
                                     far_flag_of(s, layer));
            }
        if (tid < rows_x.count)
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                if (RANKS == 1 || p.alone) residual[r] += sum[r];
                else  // in the order of ranks, so that all get the same bits
                    for (int from = 0; from < RANKS; ++from)
                        residual[r] += from == p.rank ? sum[r]
                                                      : __uint_as_float(receive_far(
                                                            &p.inboxes[p.rank]->sums[which][from][r][row],
                                                            far_flag_of(s, layer)));
                send(x + r * HIDDEN + Split<HIDDEN>::permuted(rows_x.start + tid), residual[r], flag_of(s, layer));
            }
        hint(p.sync + SENT_X), ++sent;
    };
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const u8* row = p.embedding + (u64)s.token[r] * HIDDEN * 2;
        if (tid < rows_x.count) {
            const int n = rows_x.start + tid;
            const float2 pair = widen_half(__ldg((const u32*)row + n / 2));
            residual[r] = n % 2 ? pair.y : pair.x;
        }
#pragma unroll
        for (int w = 0; w < W; ++w) {
            const uint2 q = __ldg((const uint2*)(row + Split<HIDDEN>::natural(w) * 2));
            const float2 a = widen_half(q.x), b = widen_half(q.y);
            v[r * W + w] = make_float4(a.x, a.y, b.x, b.y);
        }
    }
    load_weight(0);
    for (int layer = 0; layer < LAYERS; ++layer) {
        const u64* table = s.table[layer];
        const u32 flag = flag_of(s, layer);
        auto scale_of = [&](int which, int row, bool mine) {
            if (PER_BYTE > 1) return 1.0f / 16;  // their scales come with them, and gemv's sums are 16 times too large
            return mine ? __ldg((const float*)table[which] + row) : 0.0f;
        };
        {
            const Part part = part_of(QKV, layer);
            const float weight_scale = scale_of(QKV_S, part.start + tid, tid < part.count);
            Inputs<HIDDEN> d;
            if (layer) receive_x(p.x_mlp, layer - 1);
            norm_inputs(s, weight, p.eps, v, d);
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
            Inputs<Q_SIZE> d;
            plain_inputs<Q_SIZE, true>(s, p.attended, flag, d);
            gemv<Q_SIZE, RS_Q, false>(ring, s, d, rows_x.count);
            add_residual(p.x_attention, layer, d.scale, weight_scale);
        }
        {
            const Part part = part_of(INTER, layer);
            const float gate_scale = scale_of(GU_S, part.start + tid, tid < part.count);
            const float up_scale = scale_of(GU_S, INTER + part.start + tid, tid < part.count);
            load_weight(2 * layer + 1);
            Inputs<HIDDEN> d;
            receive_x(p.x_attention, layer);
            norm_inputs(s, weight, p.eps, v, d);
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
            Inputs<INTER> d;
            await_hint(p.sync + SENT_HIDDEN, GRID * (layer + 1));
            plain_inputs<INTER, false>(s, p.hidden, flag, d);
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
        if (RANKS > 1) n += p.rank * VOCAB;
        if (RANKS > 1 && p.logits && !p.alone)
            for (int to = 0; to < RANKS; ++to) p.all_logits[to][(u64)r * (RANKS * VOCAB) + n] = logit;
        else if (p.logits) p.logits[(u64)r * (RANKS * VOCAB) + n] = logit;
        if (logit != logit) logit = INF;  // a comparison drops NaN, but not infinity
        if (logit > best[r]) best[r] = logit, best_id[r] = n;
    };
#ifdef LM_INT8
    Digits<HIDDEN> d;
    norm_inputs(s, weight, p.eps, v, d);
    for (int chunk = 0; chunk < part.count; chunk += LM_CHUNK) {
        const int rows = min(LM_CHUNK, part.count - chunk), n = part.start + chunk + tid;
        const float weight_scale = tid < rows ? __ldg(p.lm_scale + n) : 0.0f;
        gemv_int8<HIDDEN, RS_LM, false>(ring, s, d, rows);
        consumer_sync();
        if (tid < rows)
#pragma unroll
            for (int r = 0; r < ROWS; ++r) judge(r, n, take_int8(s, tid, r, d.scale[r], weight_scale));
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
            Words<WIDE> q[RS_LM][LOADS];
#pragma unroll
            for (int i = 0; i < RS_LM; ++i)
#pragma unroll
                for (int n = 0; n < LOADS; ++n)
                    q[i][n] = load_shared<WIDE>(ring.stage() + i * LM_BYTES + 2 * S::natural(n / RUN * S::VEC) +
                                                n % RUN * 4 * WIDE);
            if (first) flush(first - RS_LM);
#pragma unroll
            for (int i = 0; i < RS_LM; ++i) {
#pragma unroll
                for (int r = 0; r < ROWS; ++r) sums[i * ROWS + r] = 0;
#pragma unroll
                for (int w = 0; w < S::W; ++w) {
                    const float2 a = widen_half(q[i][2 * w / WIDE].w[2 * w % WIDE]);
                    const float2 b = widen_half(q[i][2 * w / WIDE].w[2 * w % WIDE + 1]);
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
        u64 key = __ldcg((const u64*)(p.sync + BEST) + tid);
        if (RANKS > 1 && !p.alone) {
            const u32 flag = far_flag_of(s, LAYERS - 1);
            __threadfence_system();  // a peer that has these words also sees this rank's columns of its logits
            for (int to = 0; to < RANKS; ++to)
                for (int half = 0; half < 2; ++half)
                    if (to != p.rank) send_far(&p.inboxes[to]->best[p.rank][tid][half], key >> 32 * half, flag);
            for (int from = 0; from < RANKS; ++from)
                if (from != p.rank) {
                    const u64* words = p.inboxes[p.rank]->best[from][tid];
                    key = max(key, receive_far(words, flag) | (u64)receive_far(words + 1, flag) << 32);
                }
            __threadfence_system();
        }
        const u32 ordered = key >> 32, bits = ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered;
        const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
        const int token = finite ? (int)(0xffffffffu - (u32)key) : -1, slot = s.slot[tid];
        p.sampled[tid] = token;  // the slot takes an id in any case: the next step may be on its way already
        if (slot != p.dummy_slot) p.last_token[slot] = max(token, 0), p.position[slot] = s.position[tid] + 1;
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
