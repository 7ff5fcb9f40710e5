#include "fp8_linear.h"

#include "gemm.h"
#include "kernels.h"
#include "quantize.h"

namespace kn::KN_ISA {

void fp8_linear(const Fp8Linear& p) {
    const int64_t m = p.x.size[0], k = p.x.size[1];
    const bf16* x = p.x.as<bf16>();
    product(
        m, Fp8Weights{p.w.as<fp8>(), p.w_scale.as<float>(), p.w.size[0], k}, p.workspace.as<float>(),
        [&](int64_t i, int64_t k0, int64_t kc, float* dst) {
            decode_bf16(x + i * k + k0, dst, kc);
            if (p.fp8_activations) through_fp8(dst, kc);
        },
        p.out.data, p.out.dtype, p.bias.as<bf16>(), p.threads);
}

}  // namespace kn::KN_ISA
