#include "attention_merge.h"

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace kn::KN_ISA {

void attention_merge(const AttentionMerge& p) {
    const int last = p.out_a.ndim - 1;
    const int64_t d = p.out_a.size[last], h = p.out_a.size[last - 1], q = p.out_a.size[last - 2];
    int64_t rows = q * h;
    for (int i = 0; i < last - 2; ++i) rows *= p.out_a.size[i];
    const float minus_inf = -__builtin_inff();
    parallel(p.threads, [&](int index, int threads) {
        const Range r = share(rows, index, threads);
        for (int64_t row = r.begin; row < r.end; ++row) {
            const int64_t lead = row / (q * h), j = row / h % q, head = row % h, at = (lead * h + head) * q + j;
            float la = p.lse_a.as<float>()[at], lb = p.lse_b.as<float>()[at];
            if (la == -minus_inf) la = minus_inf;
            if (lb == -minus_inf) lb = minus_inf;
            const double top = la > lb || lb != lb ? la : lb, ta = double(la) - top, tb = double(lb) - top;
            const double sum = exp(ta) + exp(tb), lse = top + log(sum);
            const bool none = la == minus_inf && lb == minus_inf;
            p.lse.as<float>()[at] = none ? minus_inf : float(lse);
            const vf wa = set1(float(exp(ta) / sum)), wb = set1(float(exp(tb) / sum));
            const bf16 *a = p.out_a.as<bf16>() + row * d, *b = p.out_b.as<bf16>() + row * d;
            bf16* out = p.out.as<bf16>() + row * d;
            for (int64_t i = 0; i < d; i += W) {
                // The values beside an lse of -inf are not read: they may be anything.
                vf x = la == minus_inf ? zero() : mul(load_bf16_n(a + i, d - i), wa);
                if (lb != minus_inf) x = fma(load_bf16_n(b + i, d - i), wb, x);
                store_bf16_n(out + i, x, d - i);
            }
        }
    });
}

}  // namespace kn::KN_ISA
