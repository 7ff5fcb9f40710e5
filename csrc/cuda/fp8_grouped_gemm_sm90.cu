// fp8_grouped_gemm on Hopper: gemm_sm90.cuh with groups of rows at any offset, read on the device.
#include "gemm_sm90.cuh"
#include "kernels.h"

namespace kn::cuda {

void fp8_grouped_gemm_sm90(const Fp8GroupedGemm& p, cudaStream_t stream) {
    fp8_grouped_gemm_sm90(p, plan_grouped(p.a.size[0], p.b.size[0]), stream);
}

void fp8_grouped_gemm_sm90(const Fp8GroupedGemm& p, GemmPlan plan, cudaStream_t stream) {
    const int64_t t = p.a.size[0], k = p.a.size[1], e = p.b.size[0], n = p.b.size[1];
    if (t == 0 || n == 0) return;
    if (k == 0 || e == 0) return clear(p.c.data, size_t(t * n * 2), stream);
    const GemmArgs args = {p.a.as<const uint8_t>(), p.b.as<const uint8_t>(), p.a_scale.as<const float>(),
                           p.b_scale.as<const float>(), p.offsets.as<const int>(), p.c.data, int(t), int(n), int(k),
                           int(up(k, 128)), int(e), 1, false, k % 16 == 0};
    constexpr int COUNT = sizeof GROUPED_TILES / sizeof *GROUPED_TILES;
    if (plan.tile < 0 || plan.tile >= COUNT || plan.splits != 1)
        throw std::invalid_argument("fp8_grouped_gemm_sm90: no such tile or split");
    launch_tile<GROUPED_TILES, true>(plan.tile, "fp8_grouped_gemm_sm90", args, stream, std::make_integer_sequence<int, COUNT>());
}

}  // namespace kn::cuda
