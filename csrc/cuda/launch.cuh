// How a kernel starts: grid, cluster, dynamic shared memory, stream. Under KN_ON_CPU (tests/native/cuda) the same sources run
// on the CPU, a fiber a thread.
#pragma once
#ifdef KN_ON_CPU
#include "on_cpu.h"
#else
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

// Dynamic shared memory is the only shared memory that kernels use; its start is aligned to 16 bytes.
#define KN_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace kn::cuda {

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline int device() {
    int index = 0;
    check(cudaGetDevice(&index), "cudaGetDevice");
    return index;
}

// Streaming multiprocessors of the current device.
inline int units() {
    static std::atomic<int> known[64];
    const int index = device();
    int n = index < 64 ? known[index].load() : 0;
    if (!n) {
        check(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, index), "multiprocessors");
        if (index < 64) known[index] = n;
    }
    return n;
}

struct Grid {
    dim3 blocks;
    int threads;
    size_t shared = 0;  // bytes of dynamic shared memory
    int cluster = 1;    // blocks of a cluster, along x
    bool together = false;  // all blocks run at once, so that they may wait for each other
};

template <auto kernel, class... Args> void launch(const char* name, const Grid& g, cudaStream_t stream, Args... args) {
    if (g.blocks.x * g.blocks.y * g.blocks.z == 0) return;
    if (g.shared > 48 << 10) {
        static std::atomic<uint64_t> prepared{0};  // a bit a device
        const uint64_t bit = uint64_t(1) << (device() & 63);
        if (!(prepared & bit)) {
            int most = 0;
            check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device()), name);
            check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), name);
            prepared |= bit;
        }
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = g.blocks;
    config.blockDim = dim3(unsigned(g.threads));
    config.dynamicSmemBytes = g.shared;
    config.stream = stream;
    cudaLaunchAttribute attributes[2] = {};
    config.attrs = attributes;
    if (g.cluster > 1) {
        cudaLaunchAttribute& a = attributes[config.numAttrs++];
        a.id = cudaLaunchAttributeClusterDimension;
        a.val.clusterDim.x = unsigned(g.cluster);
        a.val.clusterDim.y = a.val.clusterDim.z = 1;
    }
    if (g.together) {
        cudaLaunchAttribute& a = attributes[config.numAttrs++];
        a.id = cudaLaunchAttributeCooperative;
        a.val.cooperative = 1;
    }
    check(cudaLaunchKernelEx(&config, kernel, args...), name);
}

inline void clear(void* data, size_t bytes, cudaStream_t stream) { check(cudaMemsetAsync(data, 0, bytes, stream), "clear"); }

// ---- tensor maps: cuTensorMapEncodeTiled is fetched at run time, so that the module loads without a driver.

// A map of `rank` dims, the innermost first, of elements of `type`; `strides` in bytes of dims 1.. (multiples of 16);
// boxes of `box` elements arrive with their 16-byte chunks swizzled within 128 bytes, and zeros outside of the tensor.
inline CUtensorMap tensor_map(CUtensorMapDataType type, const void* base, int rank, const uint64_t* dims, const uint64_t* strides,
                              const uint32_t* box, CUtensorMapSwizzle swizzle) {
    static const auto encode = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult found;
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
              "tensor maps");
        if (found != cudaDriverEntryPointSuccess || !entry) throw std::runtime_error("tensor maps: the driver has none");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
    }();
    check(cudaSetDevice(device()), "tensor maps");  // binds a context, which a thread new to CUDA does not have
    CUtensorMap map;
    const uint32_t ones[5] = {1, 1, 1, 1, 1};
    const CUresult result =
        encode(&map, type, uint32_t(rank), const_cast<void*>(base), dims, strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
               swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) throw std::runtime_error("tensor map refused: CUresult " + std::to_string(int(result)));
    return map;
}

}  // namespace kn::cuda
#endif
