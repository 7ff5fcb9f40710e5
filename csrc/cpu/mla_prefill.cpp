#include "mla_prefill.h"

#include "attention.h"
#include "kernels.h"

namespace kn::KN_ISA {

static thread_local struct {
    Attention<192, 128, 208, 144> attention;
    alignas(64) float keys[SB * 208];
    alignas(64) float values[SB * 144];
} scratch;

void mla_prefill(const MlaPrefill& p) {
    const int64_t t = p.q.size[0], h = p.q.size[1], b = p.cu_q.size[0] - 1;
    const int32_t *cu_q = p.cu_q.as<int32_t>(), *cu_k = p.cu_k.as<int32_t>();
    int64_t blocks = 0;  // of up to LQ queries of one sequence
    for (int64_t i = 0; i < b; ++i) blocks += ceil_div(cu_q[i + 1] - cu_q[i], LQ);
    Queue queue;
    parallel(p.threads, [&](int, int) {
        auto& a = scratch.attention;
        for (int64_t n; (n = queue.take()) < blocks * h;) {
            const int64_t head = n / blocks;
            int64_t block = blocks - 1 - n % blocks, i = 0;  // the longest first
            for (; block >= ceil_div(cu_q[i + 1] - cu_q[i], LQ); ++i) block -= ceil_div(cu_q[i + 1] - cu_q[i], LQ);
            const int64_t tq = cu_q[i + 1] - cu_q[i], tk = cu_k[i + 1] - cu_k[i], first = block * LQ, count = min64(LQ, tq - first);
            const bf16* q = p.q.as<bf16>() + ((cu_q[i] + first) * h + head) * 192;
            const bf16* k = p.k.as<bf16>() + (cu_k[i] * h + head) * 192;
            const bf16* v = p.v.as<bf16>() + (cu_k[i] * h + head) * 128;
            a.begin(count, [&](int64_t r) { return q + r * h * 192; });
            auto seen = [&](int64_t r) { return p.causal ? tk - tq + first + r + 1 : tk; };
            for (int64_t s0 = 0; s0 < seen(count - 1); s0 += SB) {
                const int64_t keys = min64(SB, seen(count - 1) - s0);
                for (int64_t j = 0; j < keys; ++j) {
                    decode_bf16(k + (s0 + j) * h * 192, scratch.keys + j * 208, 192);
                    decode_bf16(v + (s0 + j) * h * 128, scratch.values + j * 144, 128);
                }
                a.attend(keys, scratch.keys, scratch.values, p.softmax_scale, seen(0) < s0 + keys, [&](int64_t r) { return seen(r) - s0; });
            }
            for (int64_t r = 0; r < count; ++r) {
                const int64_t row = cu_q[i] + first + r;
                finish_row(a.o + r * a.LDO, a.m[r], a.l[r], nullptr, p.out.as<bf16>() + (row * h + head) * 128, 128,
                           p.lse.as<float>() + head * t + row);
            }
        }
    });
}

}  // namespace kn::KN_ISA
