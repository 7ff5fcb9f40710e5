// MLA decode over a paged latent cache, dense and sparse. The keys of a (sequence, block of 64 query rows) are cut into
// splits by shapes alone; each split is an independent work item, merged in split order at the end.
#include "mla_decode.h"

#include "attention.h"
#include "kernels.h"

namespace kn::KN_ISA {

constexpr int64_t PARTIAL = 514;  // f32 values kept of a row and split: o[512], m, l
using MlaAttention = Attention<576, 512, 592, 592>;
static thread_local struct {
    MlaAttention attention;
    alignas(64) float keys[SB * 592];
} scratch;

// One cached token as f32 [576].
KN_INLINE void decode_token(const TensorView& cache, int64_t token, float* dst) {
    if (cache.dtype == Dtype::bf16) {
        decode_bf16(cache.as<bf16>() + token * 576, dst, 576);
    } else {
        const fp8* p = cache.as<fp8>() + token * 656;
        float scale[4];
        std::memcpy(scale, p + 512, 16);
        for (int i = 0; i < 4; ++i) decode_fp8(p + i * 128, scale[i], dst + i * 128, 128);
        bf16 rope[64];
        std::memcpy(rope, p + 528, 128);
        decode_bf16(rope, dst + 512, 64);
    }
}

struct Rows {  // the query rows of a work item: `count` rows from `first` of sequence `b`
    int64_t b, first, count;
};

// All items of a call. Item(rows, split, splits, attention) runs one; row r of sequence b is query r / h, head r % h.
template <class Item>
static void run(const TensorView& q, const TensorView& sink, const TensorView& out, const TensorView& lse, const TensorView& workspace,
                int64_t row_block, int64_t rows_per_group, int threads, const Item& item) {
    const int64_t b = q.size[0], nq = q.size[1], h = q.size[2], per_seq = nq * h, total = b * per_seq;
    if (!total) return;
    const int64_t splits = workspace ? max64(workspace.size[0] / (total * PARTIAL * 4), 1) : 1;
    const int64_t groups = per_seq / rows_per_group, blocks = ceil_div(rows_per_group, row_block);
    float* partial = workspace.as<float>();

    auto write = [&](int64_t row, const float* o, float m, float l) {
        const int64_t i = row / per_seq, j = row % per_seq / h, head = row % h;
        finish_row(o, m, l, sink ? sink.as<float>() + head : nullptr, out.as<bf16>() + row * 512, 512,
                   lse.as<float>() + (i * h + head) * nq + j);
    };
    Queue queue;
    parallel(threads, [&](int, int) {
        MlaAttention& a = scratch.attention;
        for (int64_t n; (n = queue.take()) < b * groups * blocks * splits;) {
            const int64_t split = n % splits, group = n / splits / blocks, block = n / splits % blocks;
            const int64_t first = block * row_block, count = min64(row_block, rows_per_group - first);
            const Rows rows{group / groups, group % groups * rows_per_group + first, count};
            item(rows, split, splits, a);
            for (int64_t i = 0; i < count; ++i) {
                const int64_t row = rows.b * per_seq + rows.first + i;
                if (splits == 1) {
                    write(row, a.o + i * a.LDO, a.m[i], a.l[i]);
                } else {
                    float* p = partial + (split * total + row) * PARTIAL;
                    std::memcpy(p, a.o + i * a.LDO, 512 * 4);
                    p[512] = a.m[i], p[513] = a.l[i];
                }
            }
        }
    });
    if (splits == 1) return;
    parallel(threads, [&](int index, int count) {
        const Range r = share(total, index, count);
        for (int64_t row = r.begin; row < r.end; ++row) {
            alignas(64) float o[512];
            float m = MINUS_INF, l = 0;
            for (int64_t i = 0; i < splits; ++i) m = fmaxf(m, partial[(i * total + row) * PARTIAL + 512]);
            std::memset(o, 0, sizeof o);
            for (int64_t i = 0; i < splits; ++i) {
                const float* p = partial + (i * total + row) * PARTIAL;
                const float weight = p[512] == MINUS_INF && p[513] == 0 ? 0.0f : expf(p[512] - m);
                l += weight * p[513];
                if (weight != 0)
                    for (int64_t d = 0; d < 512; d += W) store(o + d, fma(load(p + d), set1(weight), load(o + d)));
            }
            write(row, o, m, l);
        }
    });
}

void mla_decode(const MlaDecode& p) {
    const int64_t nq = p.q.size[1], h = p.q.size[2], page = p.kv_cache.size[1], n = p.block_table.size[1];
    run(p.q, p.sink, p.out, p.lse, p.workspace, LQ, max64(nq * h, 1), p.threads,
        [&](const Rows& rows, int64_t split, int64_t splits, MlaAttention& a) {
            const int64_t len = p.seq_lens.as<int32_t>()[rows.b];
            const int64_t chunk = ceil_div(ceil_div(len, splits), SB) * SB;
            const int64_t end = min64(len, (split + 1) * chunk);
            const int32_t* table = p.block_table.as<int32_t>() + rows.b * n;
            const bf16* q = p.q.as<bf16>() + (rows.b * nq * h + rows.first) * 576;
            a.begin(rows.count, [&](int64_t i) { return q + i * 576; });
            // With `causal` query j sees len - nq + j + 1 keys; the first rows of the block see fewest.
            auto seen = [&](int64_t i) { return p.causal ? len - nq + (rows.first + i) / h + 1 : len; };
            for (int64_t s0 = split * chunk; s0 < min64(end, seen(rows.count - 1)); s0 += SB) {
                const int64_t keys = min64(SB, min64(end, seen(rows.count - 1)) - s0);
                for (int64_t i = 0; i < keys; ++i) {
                    const int64_t s = s0 + i;
                    decode_token(p.kv_cache, int64_t(table[s / page]) * page + s % page, scratch.keys + i * 592);
                }
                a.attend(keys, scratch.keys, scratch.keys, p.softmax_scale, seen(0) < s0 + keys, [&](int64_t i) { return seen(i) - s0; });
            }
        });
}

void mla_decode_sparse(const MlaDecodeSparse& p) {
    const int64_t nq = p.q.size[1], h = p.q.size[2], tokens = p.kv_cache.size[0] * p.kv_cache.size[1], top_k = p.indices.size[2];
    run(p.q, p.sink, p.out, p.lse, p.workspace, LQ, max64(h, 1), p.threads,
        [&](const Rows& rows, int64_t split, int64_t splits, MlaAttention& a) {
            const int32_t* indices = p.indices.as<int32_t>() + (rows.b * nq + rows.first / h) * top_k;
            const int64_t chunk = ceil_div(ceil_div(top_k, splits), SB) * SB, end = min64(top_k, (split + 1) * chunk);
            const bf16* q = p.q.as<bf16>() + (rows.b * nq * h + rows.first) * 576;
            a.begin(rows.count, [&](int64_t i) { return q + i * 576; });
            int64_t keys = 0;
            for (int64_t s = split * chunk; s < end; ++s) {
                if (indices[s] >= 0 && indices[s] < tokens) decode_token(p.kv_cache, indices[s], scratch.keys + keys++ * 592);
                if (keys == SB || (s + 1 == end && keys)) {
                    a.attend(keys, scratch.keys, scratch.keys, p.softmax_scale, false, [](int64_t) { return SB; });
                    keys = 0;
                }
            }
        });
}

}  // namespace kn::KN_ISA
