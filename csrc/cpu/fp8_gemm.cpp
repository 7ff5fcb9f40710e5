#include "fp8_gemm.h"

#include "gemm.h"
#include "kernels.h"
#include "stream_codes.h"

namespace kn::KN_ISA {

void fp8_gemm(const Fp8Gemm& p) {
    const int64_t m = p.a.size[0], k = p.a.size[1], kb = ceil_div(k, 128);
    const fp8* a = p.a.as<fp8>();
    const float* a_scale = p.a_scale.as<float>();
    const Fp8Weights w{p.b.as<fp8>(), p.b_scale.as<float>(), p.b.size[0], k};
#if defined(__AVX512F__)
    if (stream_codes(m, w, a, a_scale, p.workspace.data, RowWriter{p.c.data, p.c.dtype, m, w.n, nullptr}, p.threads)) return;
#endif
    product(
        m, w, p.workspace.as<float>(),
        [&](int64_t i, int64_t k0, int64_t kc, float* dst) { decode_fp8(a + i * k + k0, a_scale[i * kb + k0 / 128], dst, kc); },
        p.c.data, p.c.dtype, nullptr, p.threads);
}

}  // namespace kn::KN_ISA
