// The launchers of the CUDA kernels. Tensors are contiguous and start at multiples of 16 bytes; `threads` of the params is not
// used.
#pragma once
#include <cuda_runtime_api.h>

#include "fp8_gemm.h"
#include "fp8_grouped_gemm.h"
#include "fp8_quantize.h"
#include "gemm_plan.h"
#include "mla_decode.h"
#include "moe_combine.h"
#include "moe_permute.h"
#include "moe_route.h"
#include "swiglu_quantize.h"

namespace kn::cuda {
void fp8_gemm_sm90(const Fp8Gemm&, cudaStream_t);
void fp8_gemm_sm90(const Fp8Gemm&, GemmPlan, cudaStream_t);  // with a tile and split of one's own, to tune and to test
void fp8_grouped_gemm_sm90(const Fp8GroupedGemm&, cudaStream_t);
void fp8_grouped_gemm_sm90(const Fp8GroupedGemm&, GemmPlan, cudaStream_t);
void mla_decode_sm90(const MlaDecode&, cudaStream_t);
void fp8_quantize(const Fp8Quantize&, cudaStream_t);
void swiglu_quantize(const SwigluQuantize&, cudaStream_t);
void moe_route(const MoeRoute&, cudaStream_t);
void moe_permute(const MoePermute&, cudaStream_t);
void moe_combine(const MoeCombine&, cudaStream_t);
}  // namespace kn::cuda
