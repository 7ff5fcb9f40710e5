#include "moe_combine.h"

#include "kernels.h"
#include "moe.h"

namespace kn::KN_ISA {

void moe_combine(const MoeCombine& p) {
    const int64_t t = p.row_of.size[0], top_k = p.row_of.size[1], d = p.y.size[1];
    parallel(p.threads, [&](int index, int threads) {
        const Range r = share(t, index, threads);
        for (int64_t i = r.begin; i < r.end; ++i)
            combine_row(p.y.data, p.y.dtype, d, p.row_of.as<int32_t>() + i * top_k, p.weights ? p.weights.as<float>() + i * top_k : nullptr,
                        top_k, p.out.data, i);
    });
}

}  // namespace kn::KN_ISA
