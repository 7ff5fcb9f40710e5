#include "swiglu_quantize.h"

#include "kernels.h"
#include "parallel.h"
#include "quantize.h"

namespace kn::KN_ISA {

void swiglu_quantize(const SwigluQuantize& p) {
    const int64_t t = p.codes.size[0], n = p.codes.size[1], nb = ceil_div(n, 128);
    parallel(p.threads, [&](int index, int threads) {
        const Range r = share(t, index, threads);
        alignas(64) float v[128];
        for (int64_t i = r.begin; i < r.end; ++i)
            for (int64_t q = 0; q < n; q += 128) {
                const int64_t count = min64(128, n - q);
                const bf16* gate = p.x.as<bf16>() + i * 2 * n + q;
                swiglu(gate, gate + n, v, count);
                const float s = block_scale(amax_finite(v, count), p.pow2, 1e-4f);
                p.scale.as<float>()[i * nb + q / 128] = s;
                encode_fp8(v, s, p.codes.as<fp8>() + i * n + q, count);
            }
    });
}

}  // namespace kn::KN_ISA
