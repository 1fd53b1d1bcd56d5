// The producer of persistent.cu: one thread that streams all that its block reads from device memory.

#include "persistent_stream.cuh"

// What one stage holds: `bytes` from `a` at its start and, if `second`, as many from `b` at offset `second`. `scales`:
// the group scales of a (of INT4 rows, else 0); those of b lie as far behind them as b lies behind a.
struct Piece {
    u64 a, b;
    u32 bytes, second;
    u64 scales;
    template <typename Copy> __device__ u32 each(Copy copy) const {  // copy(from, bytes, to); returns all bytes
        copy(a, bytes, 0u);
        if (second) copy(b, bytes, second);
        u32 total = bytes;
#ifdef INT4
        if (scales) {
            copy(scales, bytes / SCALES_OF, (u32)STAGE_ROWS);
            if (second) copy(scales + (b - a) / SCALES_OF, bytes / SCALES_OF, STAGE_ROWS + second / SCALES_OF);
            total += bytes / SCALES_OF;
        }
#endif
        return second ? 2 * total : total;
    }
};

// Walks over everything this block reads from device memory, in the order in which it is consumed.
struct Cursor {
    int layer = 0, part = 0, at = 0;
    __device__ Piece next(const Params& p, const Shared& s, const Unit& unit) {
        for (;; at = 0, layer += ++part == 5, part %= 5) {
            const u64* t = s.table[layer];
            Part rows;
            int which, per;
            u32 bytes;
            if (layer == LAYERS) {
                if (part) return {0, 0, 0, 0, 0};
                rows = part_of(VOCAB, 0), which = 0, per = RS_LM, bytes = LM_BYTES;
            } else if (part == 0) {
                rows = part_of(QKV, layer), which = QKV_W, per = RS, bytes = HIDDEN / PER_BYTE;
            } else if (part == 1) {
                if (!unit.active) continue;
                const int pos = unit.lo + at, end = piece_end(pos, unit.hi);
                if (pos >= unit.hi) continue;
                const int block = __ldg(p.block_tables + (u64)s.slot[unit.row] * p.table_stride + pos / TPB);
                const u64 base = t[KV] + (((u64)block * KV_HEADS + unit.head) * TPB + pos % TPB) * HEAD * 2;
                at = end - unit.lo;
                const u64 values = base + (u64)p.num_blocks * KV_HEADS * TPB * HEAD * 2;
                return {base, values, (u32)(end - pos) * HEAD * 2, STAGE_ROWS / 2, 0};
            } else if (part == 2) {
                rows = part_of(HIDDEN, 0), which = O_W, per = RS_Q, bytes = Q_SIZE / PER_BYTE;
            } else if (part == 3) {
                rows = part_of(INTER, layer), which = GU_W, per = PAIRS, bytes = HIDDEN / PER_BYTE;
            } else {
                rows = part_of(HIDDEN, 0), which = DOWN_W, per = RS_I, bytes = INTER / PER_BYTE;
            }
            if (at >= rows.count) continue;
            const bool head = layer == LAYERS, pair = part == 3 && !head;
            const u64 from = (u64)(rows.start + at) * bytes, a = (head ? (u64)p.lm_weight : t[which]) + from;
            const u32 second = pair ? PAIRS * bytes : 0;
            const u64 b = a + (u64)INTER * bytes, scales = PER_BYTE > 1 && !head ? t[which + 1] + from / SCALES_OF : 0;
            bytes *= min(per, rows.count - at), at += per;
            return {a, b, bytes, second, scales};
        }
    }
};
__device__ void produce(const Params& p, Shared& s, Ring ring) {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    const Unit unit = unit_of(s.position);
    Cursor cursor, ahead;
    int lead = 0;  // stages from the current one on that are already on their way to L2
    long long last = clock64();
    // While consumers wait for other blocks and the ring is full, device memory goes on reading at its own pace, into
    // L2; and so it does until the ring, which L2 refills faster, has caught up.
    auto pump = [&](bool full) {
        if (lead < PREFETCH && (full || lead) && clock64() - last > PACE) {
            const Piece next = ahead.next(p, s, unit);
            if (next.bytes) next.each([](u64 from, u32 bytes, u32) { prefetch(from, bytes); });
            ++lead, last = clock64();
        }
    };
    for (;;) {
        if (lead == 0) ahead = cursor;
        const Piece piece = cursor.next(p, s, unit);
        if (piece.bytes == 0) return;
        u32 spins = 0;
        for (; !ring.is_empty(); pump(true))
            if (++spins > 16 * SPIN_LIMIT) __trap();
        for (; !ring.may_issue(lead ? IN_FLIGHT_L2 : IN_FLIGHT); pump(false))
            if (++spins > 16 * SPIN_LIMIT) __trap();
        if (lead) --lead;
        else last = clock64();
        mbar_expect(ring.full_bar(), piece.each([](u64, u32, u32) {}));
        piece.each([&](u64 from, u32 bytes, u32 to) {
            bulk_copy(ring.stage() + to, from, bytes, ring.full_bar(), policy);
        });
        ring.advance();
    }
}
