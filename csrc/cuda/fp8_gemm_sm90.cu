// fp8_gemm on Hopper: gemm_sm90.cuh without groups.
#include "gemm_sm90.cuh"
#include "kernels.h"

namespace kn::cuda {

void fp8_gemm_sm90(const Fp8Gemm& p, cudaStream_t stream) {
    fp8_gemm_sm90(p, plan_dense(p.a.size[0], p.b.size[0], p.a.size[1], units()), stream);
}

void fp8_gemm_sm90(const Fp8Gemm& p, GemmPlan plan, cudaStream_t stream) {
    const int64_t m = p.a.size[0], k = p.a.size[1], n = p.b.size[0];
    const bool f32 = p.c.dtype == Dtype::f32;
    if (m == 0 || n == 0) return;
    if (k == 0) return clear(p.c.data, size_t(m * n * (f32 ? 4 : 2)), stream);
    const GemmArgs args = {p.a.as<const uint8_t>(), p.b.as<const uint8_t>(), p.a_scale.as<const float>(),
                           p.b_scale.as<const float>(), nullptr, p.c.data, int(m), int(n), int(k), int(up(k, 128)), 1,
                           plan.splits, f32, k % 16 == 0};
    constexpr int COUNT = sizeof DENSE_TILES / sizeof *DENSE_TILES;
    if (plan.tile < 0 || plan.tile >= COUNT || plan.splits < 1 ||
        plan.splits > (DENSE_TILES[plan.tile].swapped ? MOST_SPLITS : 1))
        throw std::invalid_argument("fp8_gemm_sm90: no such tile or split");
    launch_tile<DENSE_TILES, false>(plan.tile, "fp8_gemm_sm90", args, stream, std::make_integer_sequence<int, COUNT>());
}

}  // namespace kn::cuda
