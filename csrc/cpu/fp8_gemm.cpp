#include "fp8_gemm.h"

#include "gemm.h"
#include "kernels.h"
#include "parallel.h"

namespace kn::KN_ISA {

static thread_local PanelScratch scratch;

void fp8_gemm(const Fp8Gemm& p) {
    const int64_t m = p.a.size[0], k = p.a.size[1], n = p.b.size[0], kb = ceil_div(k, 128);
    const fp8* a = p.a.as<fp8>();
    const float* a_scale = p.a_scale.as<float>();
    float* packed = p.workspace.as<float>();
    const Fp8Weights w{p.b.as<fp8>(), p.b_scale.as<float>(), n, k};
    void* out = p.c.data;
    const Dtype dtype = p.c.dtype;

    if (m <= STREAM_ROWS) {
        for (int64_t i = 0; i < m; ++i)
            for (int64_t q = 0; q < k; q += 128)
                decode_fp8(a + i * k + q, a_scale[i * kb + q / 128], packed + i * k + q, min64(128, k - q));
        parallel(p.threads, [&](int index, int threads) {
            const Range r = share(n, index, threads, 32);
            stream(m, w, r.begin, r.end, packed, [&](int64_t row, const float* sums) {
                for (int64_t i = 0; i < m; ++i) {
                    if (dtype == Dtype::bf16)
                        static_cast<bf16*>(out)[i * n + row] = float_to_bf16(sums[i]);
                    else
                        static_cast<float*>(out)[i * n + row] = sums[i];
                }
            });
        });
        return;
    }
    for (int64_t m0 = 0; m0 < m; m0 += MC) {
        const int64_t rows = min64(MC, m - m0);
        parallel(p.threads, [&](int index, int threads) {
            const Range r = share(k, index, threads, 128);
            pack(rows, k, r.begin, r.end, packed, [&](int64_t i, int64_t k0, int64_t kc, float* dst) {
                decode_fp8(a + (m0 + i) * k + k0, a_scale[(m0 + i) * kb + k0 / 128], dst, kc);
            });
        });
        parallel(p.threads, [&](int index, int threads) {
            const Range r = share(n, index, threads, MR);
            panel(rows, w, r.begin, r.end, packed, scratch, [&](int64_t row0, int64_t count, const float* sums, int64_t mm) {
                store_transposed(out, dtype, n, m0, mm, row0, count, sums);
            });
        });
    }
}

}  // namespace kn::KN_ISA
