#include "fp8_grouped_gemm.h"

#include "gemm.h"
#include "kernels.h"

namespace kn::KN_ISA {

void fp8_grouped_gemm(const Fp8GroupedGemm& p) {
    const int64_t t = p.a.size[0], k = p.a.size[1], e = p.b.size[0], n = p.b.size[1], kb = ceil_div(k, 128), nb = ceil_div(n, 128);
    const int32_t* offsets = p.offsets.as<int32_t>();
    bf16* c = p.c.as<bf16>();
    for (int64_t i = 0; i < e; ++i) {
        const int64_t first = offsets[i], rows = offsets[i + 1] - first;
        if (!rows) continue;
        const fp8* a = p.a.as<fp8>() + first * k;
        const float* a_scale = p.a_scale.as<float>() + first * kb;
        product(
            rows, Fp8Weights{p.b.as<fp8>() + i * n * k, p.b_scale.as<float>() + i * nb * kb, n, k}, p.workspace.as<float>(),
            [&](int64_t r, int64_t k0, int64_t kc, float* dst) { decode_fp8(a + r * k + k0, a_scale[r * kb + k0 / 128], dst, kc); },
            c + first * n, Dtype::bf16, nullptr, p.threads);
    }
    const int64_t end = e ? offsets[e] : 0;
    if (end < t) std::memset(c + end * n, 0, size_t((t - end) * n) * 2);
}

}  // namespace kn::KN_ISA
