// The list of CPU kernels: name, params struct. One line here makes a kernel part of every ISA's table.
#pragma once
#include "attention_merge.h"
#include "ceilings.h"
#include "fp8_gemm.h"
#include "fp8_quantize.h"
#include "mla_append_kv.h"
#include "mla_decode.h"
#include "mla_index.h"
#include "mla_prefill.h"
#include "fp8_grouped_gemm.h"
#include "fp8_grouped_wgrad.h"
#include "fp8_linear.h"
#include "moe_combine.h"
#include "moe_experts.h"
#include "moe_permute.h"
#include "moe_route.h"
#include "swiglu_quantize.h"

#define KN_KERNELS(X)           \
    X(ceiling_fma, CeilingFma)   \
    X(ceiling_read, CeilingRead) \
    X(fp8_quantize, Fp8Quantize) \
    X(fp8_gemm, Fp8Gemm)         \
    X(mla_append_kv, MlaAppendKv) \
    X(mla_decode, MlaDecode)     \
    X(mla_decode_sparse, MlaDecodeSparse) \
    X(mla_prefill, MlaPrefill)   \
    X(mla_index, MlaIndex)       \
    X(attention_merge, AttentionMerge) \
    X(fp8_grouped_gemm, Fp8GroupedGemm) \
    X(fp8_grouped_wgrad, Fp8GroupedWgrad) \
    X(fp8_linear, Fp8Linear) \
    X(swiglu_quantize, SwigluQuantize) \
    X(moe_route, MoeRoute) \
    X(moe_permute, MoePermute) \
    X(moe_combine, MoeCombine) \
    X(moe_experts, MoeExperts)

namespace kn {

struct Kernels {
    const char* isa;
#define KN_FIELD(name, Params) void (*name)(const Params&);
    KN_KERNELS(KN_FIELD)
#undef KN_FIELD
};

#define KN_DECLARE(name, Params) void name(const Params&);
namespace base {
KN_KERNELS(KN_DECLARE)
extern const Kernels table;
}  // namespace base
#if defined(__x86_64__)
namespace avx2 {
KN_KERNELS(KN_DECLARE)
extern const Kernels table;
}  // namespace avx2
namespace avx512 {
KN_KERNELS(KN_DECLARE)
extern const Kernels table;
}  // namespace avx512
#endif
#undef KN_DECLARE

// The tables this machine can run, slowest first, and the one in use.
int isa_count();
const Kernels& isa(int i);
const Kernels& kernels();
bool use_isa(const char* name);  // false where the machine lacks it

}  // namespace kn
