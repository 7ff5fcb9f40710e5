#include "mla_prefill.h"

#include "attention.h"
#include "kernels.h"

namespace kn::KN_ISA {

// Up to four queries: a lane each would leave most lanes empty, so lanes run along the depth, and a vector of sums is the
// scores of four queries against NEXT keys. Keys and values are decoded in registers. 2.6 times as fast with AVX-512.
struct Few {
    static constexpr int ROWS = 4, NEXT = W / ROWS, WIDE = W > 8 ? 4 : 2;  // keys, vectors of values at a time
    static constexpr int64_t AHEAD = 8;                                    // keys whose lines are asked for early
    alignas(64) float q[ROWS][192], o[ROWS][128], s[ROWS][SB + W];
    float m[ROWS], l[ROWS];

    template <class Row> void begin(int64_t count, const Row& row) {
        std::memset(q, 0, sizeof q);
        std::memset(o, 0, sizeof o);
        for (int64_t r = 0; r < count; ++r) decode_bf16(row(r), q[r], 192);
        for (int r = 0; r < ROWS; ++r) m[r] = MINUS_INF, l[r] = 0;
    }

    // Row r of `count` sees the first limit(r) of `keys` <= SB keys; `stride` elements lie between keys.
    template <class Limit>
    void attend(int64_t count, int64_t keys, const bf16* k, int64_t k_stride, const bf16* v, int64_t v_stride, float scale,
                const Limit& limit) {
        for (int64_t j = 0; j < keys; j += NEXT) {
            vf sum[W];
            const bf16* at[NEXT];
            KN_UNROLL for (int i = 0; i < W; ++i) sum[i] = zero();
            KN_UNROLL for (int i = 0; i < NEXT; ++i) {
                at[i] = k + min64(j + i, keys - 1) * k_stride;
                for (int64_t p = 0; p < 192; p += 32) __builtin_prefetch(at[i] + AHEAD * k_stride + p);
            }
            for (int64_t p = 0; p < 192; p += W) {
                vf key[NEXT];
                KN_UNROLL for (int i = 0; i < NEXT; ++i) key[i] = load_bf16(at[i] + p);
                KN_UNROLL for (int r = 0; r < ROWS; ++r)
                    KN_UNROLL for (int i = 0; i < NEXT; ++i) sum[r * NEXT + i] = fma(load(q[r] + p), key[i], sum[r * NEXT + i]);
            }
            alignas(64) float lines[W * W], turned[W * W];
            KN_UNROLL for (int i = 0; i < W; ++i) store(lines + i * W, sum[i]);
            transpose(lines, W, turned, W);
            vf total = load(turned);
            KN_UNROLL for (int i = 1; i < W; ++i) total = add(total, load(turned + i * W));
            store(lines, mul(total, set1(scale)));
            KN_UNROLL for (int r = 0; r < ROWS; ++r) std::memcpy(s[r] + j, lines + r * NEXT, NEXT * sizeof(float));
        }
        float change[ROWS] = {};
        for (int64_t r = 0; r < count; ++r) {
            for (int64_t j = max64(min64(limit(r), keys), 0); j < ceil_div(keys, W) * W; ++j) s[r][j] = MINUS_INF;
            vf top = set1(m[r]), sum = zero();
            for (int64_t j = 0; j < keys; j += W) top = max2(load(s[r] + j), top);  // a NaN score leaves top
            const float most = hmax(top), shift = most > -3e38f ? most : -3e38f, old = m[r] > -3e38f ? m[r] : -3e38f;
            for (int64_t j = 0; j < keys; j += W) {
                const vf p = exp1(sub(load(s[r] + j), set1(shift)));
                store(s[r] + j, p);
                sum = add(sum, p);
            }
            change[r] = hmax(exp1(set1(old - shift)));
            l[r] = l[r] * change[r] + hsum(sum);
            m[r] = most;
        }
        for (int64_t c = 0; c < 128; c += WIDE * W) {
            vf sum[ROWS][WIDE];
            KN_UNROLL for (int r = 0; r < ROWS; ++r)
                KN_UNROLL for (int i = 0; i < WIDE; ++i) sum[r][i] = mul(load(o[r] + c + i * W), set1(change[r]));
            for (int64_t j = 0; j < keys; ++j) {
                const bf16* at = v + j * v_stride + c;
                for (int64_t p = 0; p < WIDE * W; p += 32) __builtin_prefetch(at + AHEAD * v_stride + p);
                vf value[WIDE];
                KN_UNROLL for (int i = 0; i < WIDE; ++i) value[i] = load_bf16(at + i * W);
                KN_UNROLL for (int r = 0; r < ROWS; ++r)
                    KN_UNROLL for (int i = 0; i < WIDE; ++i) sum[r][i] = fma(set1(s[r][j]), value[i], sum[r][i]);
            }
            KN_UNROLL for (int r = 0; r < ROWS; ++r)
                KN_UNROLL for (int i = 0; i < WIDE; ++i) store(o[r] + c + i * W, sum[r][i]);
        }
    }
};

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
            const auto row = [&](int64_t r) { return q + r * h * 192; };
            const auto seen = [&](int64_t r) { return p.causal ? tk - tq + first + r + 1 : tk; };
            const auto finish = [&](int64_t r, const float* o, float m, float l) {
                const int64_t to = cu_q[i] + first + r;
                finish_row(o, m, l, nullptr, p.out.as<bf16>() + (to * h + head) * 128, 128, p.lse.as<float>() + head * t + to);
            };
            if (count <= Few::ROWS) {
                Few f;
                f.begin(count, row);
                for (int64_t s0 = 0; s0 < seen(count - 1); s0 += SB)
                    f.attend(count, min64(SB, seen(count - 1) - s0), k + s0 * h * 192, h * 192, v + s0 * h * 128, h * 128,
                             p.softmax_scale, [&](int64_t r) { return seen(r) - s0; });
                for (int64_t r = 0; r < count; ++r) finish(r, f.o[r], f.m[r], f.l[r]);
                continue;
            }
            a.begin(count, row);
            for (int64_t s0 = 0; s0 < seen(count - 1); s0 += SB) {
                const int64_t keys = min64(SB, seen(count - 1) - s0);
                for (int64_t j = 0; j < keys; ++j) {
                    decode_bf16(k + (s0 + j) * h * 192, scratch.keys + j * 208, 192);
                    decode_bf16(v + (s0 + j) * h * 128, scratch.values + j * 144, 128);
                }
                a.attend(keys, scratch.keys, scratch.values, p.softmax_scale, seen(0) < s0 + keys, [&](int64_t r) { return seen(r) - s0; });
            }
            for (int64_t r = 0; r < count; ++r) finish(r, a.o + r * a.LDO, a.m[r], a.l[r]);
        }
    });
}

}  // namespace kn::KN_ISA
