#include "moe_permute.h"

#include "kernels.h"
#include "moe.h"

namespace kn::KN_ISA {

void moe_permute(const MoePermute& p) {
    const int64_t t = p.experts.size[0], top_k = p.experts.size[1], copies = t * top_k, e = p.offsets.size[0] - 1;
    const int64_t bytes = p.x.size[1] * (p.x.dtype == Dtype::f32 ? 4 : p.x.dtype == Dtype::bf16 ? 2 : 1);
    int32_t* row_of = p.row_of.as<int32_t>();
    sort_copies(p.experts.as<int32_t>(), copies, e, p.offsets.as<int32_t>(), row_of, p.workspace.as<int32_t>());
    const char* x = p.x.as<char>();
    char* out = p.x_sorted.as<char>();
    parallel(p.threads, [&](int index, int threads) {
        const Range r = share(copies, index, threads);
        for (int64_t i = r.begin; i < r.end; ++i) {
            if (row_of[i] >= 0) std::memcpy(out + row_of[i] * bytes, x + i / top_k * bytes, size_t(bytes));
            if (i >= p.offsets.as<int32_t>()[e]) std::memset(out + i * bytes, 0, size_t(bytes));
        }
    });
}

}  // namespace kn::KN_ISA
