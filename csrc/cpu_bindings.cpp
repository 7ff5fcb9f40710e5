// kernomics._cpu: the CPU kernels, each called with inputs, outputs, workspace, scalars, threads.
// tests/native compiles this file with pybind11 instead (KN_EMBED), into an executable under a sanitizer.
#if defined(KN_EMBED)
#include "embed.h"
#else
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "caster.h"
#endif

#include <cstdlib>

#include "cpu/kernels.h"

namespace nb = nanobind;
using namespace kn;
using T = TensorView;

#define KERNEL(name, ...) m.def(#name, __VA_ARGS__, nb::call_guard<nb::gil_scoped_release>())

#if defined(__clang__)
#define KN_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define KN_COMPILER "gcc " __VERSION__
#else
#define KN_COMPILER "unknown"
#endif

NB_MODULE(_cpu, m) {
    m.def("isas", [] {
        std::vector<std::string> names;
        for (int i = 0; i < isa_count(); ++i) names.push_back(isa(i).isa);
        return names;
    }, "Instruction sets this machine runs, slowest first.");
    m.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use.");
    m.def("use_isa", [](const std::string& name) {
        if (!use_isa(name.c_str())) throw nb::value_error(("this machine does not run isa '" + name + "'").c_str());
    }, "Use this instruction set from now on.");
    kernels();  // choose here, once, before any thread can ask
    if (const char* name = std::getenv("KERNOMICS_ISA"))
        if (!use_isa(name)) throw nb::import_error((std::string("KERNOMICS_ISA=") + name + ": this machine does not run it").c_str());

    m.attr("compiler") = KN_COMPILER;
    KERNEL(ceiling_fma, [](int threads, int64_t iterations) {
        double flops = 0;
        std::vector<double> sums(size_t(threads), 0.0);
        kernels().ceiling_fma({iterations, &flops, sums.data(), threads});
        return flops;
    });
    KERNEL(ceiling_read, [](T buffer, int threads) {
        std::vector<double> sums(size_t(threads), 0.0);
        kernels().ceiling_read({buffer, sums.data(), threads});
        double sum = 0;
        for (double x : sums) sum += x;
        return sum;
    });
    KERNEL(fp8_quantize, [](T x, T codes, T scale, T, int b0, int b1, int pow2, double floor, int threads) {
        kernels().fp8_quantize({x, codes, scale, b0, b1, pow2 == 1, float(floor), threads});
    });
    KERNEL(fp8_gemm, [](T a, T as, T b, T bs, T c, T ws, int, int threads) {
        kernels().fp8_gemm({a, as, b, bs, c, ws, threads});
    });
    KERNEL(mla_append_kv, [](T kv_c, T k_pe, T cache, T slots, T weight, T cos, T sin, T, double eps, bool interleaved, int scale, int threads) {
        kernels().mla_append_kv({kv_c, k_pe, cache, slots, weight, cos, sin, float(eps), interleaved, scale == 0, threads});
    });
    KERNEL(mla_decode, [](T q, T cache, T table, T lens, T sink, T out, T lse, T ws, double scale, bool causal, int threads) {
        kernels().mla_decode({q, cache, table, lens, sink, out, lse, ws, float(scale), causal, threads});
    });
    KERNEL(mla_decode_sparse, [](T q, T cache, T indices, T sink, T out, T lse, T ws, double scale, int threads) {
        kernels().mla_decode_sparse({q, cache, indices, sink, out, lse, ws, float(scale), threads});
    });
    KERNEL(mla_prefill, [](T q, T k, T v, T cu_q, T cu_k, T out, T lse, T, double scale, bool causal, int threads) {
        kernels().mla_prefill({q, k, v, cu_q, cu_k, out, lse, float(scale), causal, threads});
    });
    KERNEL(mla_index, [](T q, T k, T k_scale, T weights, T start, T stop, T out, T, int threads) {
        kernels().mla_index({q, k, k_scale, weights, start, stop, out, threads});
    });
    KERNEL(attention_merge, [](T out_a, T lse_a, T out_b, T lse_b, T out, T lse, T, int threads) {
        kernels().attention_merge({out_a, lse_a, out_b, lse_b, out, lse, threads});
    });
    KERNEL(fp8_grouped_gemm, [](T a, T as, T b, T bs, T offsets, T c, T ws, int threads) {
        kernels().fp8_grouped_gemm({a, as, b, bs, offsets, c, ws, threads});
    });
    KERNEL(fp8_grouped_wgrad, [](T dy, T dys, T x, T xs, T offsets, T dw, T, int threads) {
        kernels().fp8_grouped_wgrad({dy, dys, x, xs, offsets, dw, threads});
    });
    KERNEL(fp8_linear, [](T x, T w, T ws, T bias, T out, T space, int activations, int, int threads) {
        kernels().fp8_linear({x, w, ws, bias, out, space, activations == 0, threads});
    });
    KERNEL(swiglu_quantize, [](T x, T codes, T scale, T, int pow2, int threads) {
        kernels().swiglu_quantize({x, codes, scale, pow2 == 1, threads});
    });
    KERNEL(moe_route, [](T logits, T bias, T weights, T experts, T ws, int, int n_group, int topk_group, int score, int group_score,
                         bool renormalize, double scaling, int threads) {
        kernels().moe_route({logits, bias, weights, experts, ws, n_group, topk_group, score == 1, group_score == 1, renormalize,
                             float(scaling), threads});
    });
    KERNEL(moe_permute, [](T x, T experts, T x_sorted, T offsets, T row_of, T ws, int64_t, int threads) {
        kernels().moe_permute({x, experts, x_sorted, offsets, row_of, ws, threads});
    });
    KERNEL(moe_combine, [](T y, T row_of, T weights, T out, T, int threads) {
        kernels().moe_combine({y, row_of, weights, out, threads});
    });
    KERNEL(moe_experts, [](T x, T w13, T s13, T w2, T s2, T weights, T experts, T out, T ws, int activations, int threads) {
        kernels().moe_experts({x, w13, s13, w2, s2, weights, experts, out, ws, activations == 0, threads});
    });
    KERNEL(moe_experts_bf16, [](T x, T w13, T w2, T weights, T experts, T out, T ws, int threads) {
        kernels().moe_experts({x, w13, {}, w2, {}, weights, experts, out, ws, false, threads});
    });
}
