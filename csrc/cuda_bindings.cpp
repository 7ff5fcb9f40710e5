// kernomics._cuda: the CUDA kernels, each called with inputs, outputs, workspace, scalars, stream. It loads without a driver.
// tests/native compiles this file with pybind11 (KN_EMBED) over kernels that run on the CPU (KN_ON_CPU).
#if defined(KN_EMBED)
#include "embed.h"
#else
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include "caster.h"
#endif

#ifdef KN_ON_CPU
#include "on_cpu.h"
#endif

#include "cuda/kernels.h"
#include "cuda/mla_decode_plan.h"
#ifdef KN_ON_CPU
#include "cuda/moe_permute_plan.h"
#include "cuda/quantize.cuh"
#endif

namespace nb = nanobind;
using namespace kn;
using T = TensorView;

#define KERNEL(name, ...) m.def(#name, __VA_ARGS__, nb::call_guard<nb::gil_scoped_release>())

static cudaStream_t at(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

NB_MODULE(_cuda, m) {
    m.def("gemm_tiles", [](bool grouped) {  // (swapped, x, y, cluster, stages, bytes of shared memory) of each
        std::vector<std::vector<int>> all;
        auto add = [&](const cuda::GemmTile& t) {
            all.push_back({t.swapped, t.x(), t.y, t.cluster, t.stages(), t.shared_bytes()});
        };
        if (grouped)
            for (const auto& t : cuda::GROUPED_TILES) add(t);
        else
            for (const auto& t : cuda::DENSE_TILES) add(t);
        return all;
    });
    m.def("gemm_plan", [](int64_t m, int64_t n, int64_t k, int units) {
        const cuda::GemmPlan plan = cuda::plan_dense(m, n, k, units);
        return std::vector<int>{plan.tile, plan.splits};
    });
#ifdef KN_ON_CPU
    m.def("gemm_place", [](int index, int tiles_m, int tiles_n, int band) {
        const cuda::TilePlace at = cuda::place(index, tiles_m, tiles_n, band);
        return std::vector<int>{at.m, at.n};
    });
    m.def("decode_segments", [](std::vector<int> lens, int groups, int64_t most, int parts) {
        const cuda::MlaLine line{lens.data(), int(lens.size()), groups, most};
        std::vector<std::vector<std::vector<int64_t>>> all;
        for (cuda::MlaWalk& walk : cuda::mla_ways(line, parts)) {
            const int part = int(all.size());
            all.emplace_back();
            for (cuda::MlaSegment s; walk.next(line, s);)
                all.back().push_back({s.seq, s.group, s.first, s.last, s.whole(), cuda::mla_slot(part, s.begins)});
        }
        return all;
    });
    m.def("gemm_split_start", cuda::split_start);
    m.def("gemm_ring", [](int turns, int stages) {
        std::vector<std::vector<int>> all;
        cuda::Ring at;
        for (int i = 0; i < turns; ++i, at.next(stages)) all.push_back({at.slot, int(at.parity)});
        return all;
    });
    m.def("swizzle128", cuda::swizzle128);
    m.def("fragment",
          [](int thread, int i) { return std::vector<int>{cuda::fragment_row(thread, i), cuda::fragment_column(thread, i)}; });
    m.def("permute_plan", [](int64_t copies, int64_t e) {
        const cuda::PermutePlan p = cuda::permute_plan(copies, e);
        return std::vector<int64_t>{p.bins, p.blocks, p.each, p.warps, p.share, p.shared};
    });
    m.def("permutes_few", cuda::permutes_few);
    m.def("quotients", [](T v, T s, T out, bool is_bf16) {  // of f32 vectors, as the quantizers divide
        for (int64_t i = 0; i < v.size[0]; ++i) {
            const float a = v.as<float>()[i], b = s.as<float>()[i];
            out.as<float>()[i] = is_bf16 ? cuda::quotient<bf16>(a, b, 1.0f / b) : cuda::quotient<float>(a, b, 1.0f / b);
        }
    });
    m.def(
        "schedule", [](int units, uint64_t seed, double eager) { cuda::cpu::schedule() = {units, seed, eager}; },
        "How the next kernels run: multiprocessors, the draw of their order, the share of asynchronous work done at once.");
#endif
    KERNEL(fp8_gemm_sm90, [](T a, T as, T b, T bs, T c, T ws, int, uintptr_t stream) {
        cuda::fp8_gemm_sm90({a, as, b, bs, c, ws, 0}, at(stream));
    });
    KERNEL(fp8_gemm_sm90_plan, [](T a, T as, T b, T bs, T c, T ws, int, int tile, int splits, uintptr_t stream) {
        cuda::fp8_gemm_sm90({a, as, b, bs, c, ws, 0}, {tile, splits}, at(stream));
    });
    KERNEL(fp8_grouped_gemm_sm90_plan, [](T a, T as, T b, T bs, T offsets, T c, T ws, int tile, int splits, uintptr_t stream) {
        cuda::fp8_grouped_gemm_sm90({a, as, b, bs, offsets, c, ws, 0}, {tile, splits}, at(stream));
    });
    KERNEL(fp8_grouped_gemm_sm90, [](T a, T as, T b, T bs, T offsets, T c, T ws, uintptr_t stream) {
        cuda::fp8_grouped_gemm_sm90({a, as, b, bs, offsets, c, ws, 0}, at(stream));
    });
    KERNEL(mla_decode_sm90,
           [](T q, T cache, T table, T lens, T sink, T out, T lse, T ws, double scale, bool causal, uintptr_t stream) {
               cuda::mla_decode_sm90({q, cache, table, lens, sink, out, lse, ws, float(scale), causal, 0}, at(stream));
           });
    m.def("mla_decode_sm90_workspace", cuda::mla_workspace, "Bytes for b sequences of `rows` query rows each on a chip.");
    KERNEL(fp8_quantize, [](T x, T codes, T scale, T, int b0, int b1, int pow2, double floor, uintptr_t stream) {
        cuda::fp8_quantize({x, codes, scale, b0, b1, pow2 == 1, float(floor), 0}, at(stream));
    });
    KERNEL(swiglu_quantize, [](T x, T codes, T scale, T, int pow2, uintptr_t stream) {
        cuda::swiglu_quantize({x, codes, scale, pow2 == 1, 0}, at(stream));
    });
    KERNEL(moe_route, [](T logits, T bias, T weights, T experts, T ws, int, int n_group, int topk_group, int score,
                         int group_score, bool renormalize, double scaling, uintptr_t stream) {
        cuda::moe_route({logits, bias, weights, experts, ws, n_group, topk_group, score == 1, group_score == 1, renormalize,
                         float(scaling), 0},
                        at(stream));
    });
    KERNEL(moe_permute, [](T x, T experts, T x_sorted, T offsets, T row_of, T ws, int64_t, uintptr_t stream) {
        cuda::moe_permute({x, experts, x_sorted, offsets, row_of, ws, 0}, at(stream));
    });
    KERNEL(moe_combine, [](T y, T row_of, T weights, T out, T, uintptr_t stream) {
        cuda::moe_combine({y, row_of, weights, out, 0}, at(stream));
    });
}
