// The instructions of Hopper that C++ has no words for. Under KN_ON_CPU each is carried out by tests/native/cuda/on_cpu.h.
#pragma once
#include "descriptor.h"
#include "launch.cuh"

#ifndef KN_ON_CPU
namespace kn::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- barriers in shared memory: a phase ends when all arrivals have come and all announced bytes have landed.

__device__ __forceinline__ void barrier_init(uint64_t* bar, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals) : "memory");
}
// After barrier_init, before the block (or cluster) synchronises: others and the copy engine see the barriers.
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* bar) { barrier_arrive(shared_address(bar)); }
// Arrives at the same barrier of another block of the cluster, to say that reads are done. Not for handing over data: with the
// release that needs, each arrival waits for all of the thread's stores (MEMBAR.ALL.GPU), and each acquiring wait empties L1.
__device__ __forceinline__ void barrier_arrive_remote(uint64_t* bar, int rank) {
    asm volatile(
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(shared_address(bar)),
        "r"(rank)
        : "memory");
}
// Arrives, and announces bytes that copies will land.
__device__ __forceinline__ void barrier_expect(uint64_t* bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes) : "memory");
}
// Waits for the end of the phase of this parity: 0 for the first, 1 for the second, and so on in turn.
__device__ __forceinline__ void barrier_wait(uint32_t bar, uint32_t parity) {
    asm volatile("{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again; }"
                 :
                 : "r"(bar), "r"(parity)
                 : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* bar, uint32_t parity) { barrier_wait(shared_address(bar), parity); }

// ---- copies by tensor map; destinations are aligned to 128 bytes (1024 under the 128-byte swizzle)

// Policies of L2 for what is read once, and for what others will read again.
static constexpr uint64_t EVICT_FIRST = 0x12f0000000000000, EVICT_NORMAL = 0x1000000000000000;

__device__ __forceinline__ void tma_load(void* to, const CUtensorMap* map, uint64_t* bar, int c0, int c1,
                                         uint64_t policy = EVICT_NORMAL) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4}], [%2], "
        "%5;" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(bar)), "r"(c0), "r"(c1), "l"(policy)
        : "memory");
}
// Into the same place of every block in `blocks`, a bit a rank; each block's own barrier counts the bytes.
__device__ __forceinline__ void tma_load_multicast(void* to, const CUtensorMap* map, uint64_t* bar, int c0, int c1,
                                                   uint16_t blocks, uint64_t policy = EVICT_NORMAL) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
        "[%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(bar)), "r"(c0), "r"(c1), "h"(blocks), "l"(policy)
        : "memory");
}
// The 128 bytes around `from` in global memory into L2. cp.async.bulk.prefetch takes one lane after the other.
__device__ __forceinline__ void prefetch_l2(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory"); }

// Written by threads before, read by the copy engine or the tensor cores after.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Copy of 16 bytes by a thread, zeros instead where not `valid` (`from` is not read then); cp_async_arrive makes `bar` count an
// arrival of this thread (of those it was initialised with) once its copies so far have landed.
__device__ __forceinline__ void cp_async16(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void cp_async4(void* to, const void* from, bool valid) {  // the same of 4 bytes
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0)
                 : "memory");
}
__device__ __forceinline__ void cp_async_arrive(uint64_t* bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(bar)) : "memory");
}

// ---- clusters and parts of a block

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same place in the shared memory of another block of the cluster.
template <class T> __device__ __forceinline__ T* cluster_map(T* p, int rank) {
    uint64_t there;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(reinterpret_cast<uint64_t>(p)), "r"(rank));
    return reinterpret_cast<T*>(there);
}
// Barrier `id` (1 to 15) of `threads` threads of this block, whole warps.
__device__ __forceinline__ void part_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Waits until the bits of `mask` hold `least` or more of a count that blocks of a grid launched together add to (each after a
// __threadfence), and sees what they wrote before.
__device__ __forceinline__ void wait_count(const uint64_t* count, uint64_t mask, uint64_t least) {
    uint64_t seen;
    do asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(count) : "memory");
    while ((seen & mask) < least);
}
// Registers that a warpgroup gives away or takes; the bound of the kernel's launch fixes the sum.
template <int N> __device__ __forceinline__ void registers_less() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void registers_more() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
// The same value in all lanes, known to the compiler to be so.
__device__ __forceinline__ int uniform(int v) { return __shfl_sync(0xffffffff, v, 0); }

// ---- matrix products of a warpgroup: fence, products, commit, wait; the accumulators are not to be touched in between

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N groups are under way.
template <int N> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// The compiler may not move accesses to these accumulators across.
template <int N> __device__ __forceinline__ void hold(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// Nor writes of an operand in registers: before wgmma_fence.
__device__ __forceinline__ void hold(uint32_t (&a)[4]) {
    asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
}

// Registers of a tile of N columns: their names in PTX, and the operands.
#define KN_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define KN_R1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define KN_R2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define KN_R3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define KN_R4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define KN_R5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define KN_R6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define KN_R7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define KN_D(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define KN_NAMES_8 "%0, %1, %2, %3"
#define KN_OUT_8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define KN_NAMES_16 KN_R0
#define KN_OUT_16 KN_D(0)
#define KN_NAMES_32 KN_NAMES_16 ", " KN_R1
#define KN_OUT_32 KN_OUT_16, KN_D(8)
#define KN_NAMES_48 KN_NAMES_32 ", " KN_R2
#define KN_OUT_48 KN_OUT_32, KN_D(16)
#define KN_NAMES_64 KN_NAMES_48 ", " KN_R3
#define KN_OUT_64 KN_OUT_48, KN_D(24)
#define KN_NAMES_80 KN_NAMES_64 ", " KN_R4
#define KN_OUT_80 KN_OUT_64, KN_D(32)
#define KN_NAMES_96 KN_NAMES_80 ", " KN_R5
#define KN_OUT_96 KN_OUT_80, KN_D(40)
#define KN_NAMES_112 KN_NAMES_96 ", " KN_R6
#define KN_OUT_112 KN_OUT_96, KN_D(48)
#define KN_NAMES_128 KN_NAMES_112 ", " KN_R7
#define KN_OUT_128 KN_OUT_112, KN_D(56)
#define KN_WGMMA(N, K, TYPES, A, B, P, MORE, ...)                                                                     \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " P ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k" #K ".f32." TYPES \
                 " {" KN_NAMES_##N "}, " A ", " B ", p, 1, 1" MORE "; }"                                              \
                 : KN_OUT_##N                                                                                         \
                 : __VA_ARGS__)

#define KN_E4M3(N, A, B, P) KN_WGMMA(N, 32, "e4m3.e4m3", A, B, P, "", "l"(a), "l"(b), "r"(int(accumulate)))
#define KN_BF16(N, A, B, P, C) \
    KN_WGMMA(N, 16, "bf16.bf16", A, B, P, ", 0, " C, "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(columns)))
#define KN_BF16_HELD(N, A, B, P, C)                                                                                         \
    KN_WGMMA(N, 16, "bf16.bf16", A, B, P, ", " C, "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), \
             "n"(int(columns)))
#define KN_F16_HELD(N, A, B, P)                                                                                       \
    KN_WGMMA(N, 16, "f16.f16", A, B, P, ", 0", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)))

// d += a * b.T for e4m3 codes, 64 x N x 32, both operands rows of k (descriptors); without `accumulate` d is set.
template <int N> __device__ __forceinline__ void wgmma_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    if constexpr (N == 8) KN_E4M3(8, "%4", "%5", "%6");
    else if constexpr (N == 16) KN_E4M3(16, "%8", "%9", "%10");
    else if constexpr (N == 32) KN_E4M3(32, "%16", "%17", "%18");
    else if constexpr (N == 64) KN_E4M3(64, "%32", "%33", "%34");
    else if constexpr (N == 96) KN_E4M3(96, "%48", "%49", "%50");
    else if constexpr (N == 112) KN_E4M3(112, "%56", "%57", "%58");
    else if constexpr (N == 128) KN_E4M3(128, "%64", "%65", "%66");
    else static_assert(N < 0, "no such tile");
}

// d += a * b.T for bf16, 64 x N x 16; with `columns` b lies in rows of n, a row a k (see descriptor.h).
template <int N, bool columns = false>
__device__ __forceinline__ void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    if constexpr (N == 8) KN_BF16(8, "%4", "%5", "%6", "%7");
    else if constexpr (N == 16) KN_BF16(16, "%8", "%9", "%10", "%11");
    else if constexpr (N == 32) KN_BF16(32, "%16", "%17", "%18", "%19");
    else if constexpr (N == 64) KN_BF16(64, "%32", "%33", "%34", "%35");
    else if constexpr (N == 96) KN_BF16(96, "%48", "%49", "%50", "%51");
    else if constexpr (N == 112) KN_BF16(112, "%56", "%57", "%58", "%59");
    else if constexpr (N == 128) KN_BF16(128, "%64", "%65", "%66", "%67");
    else static_assert(N < 0, "no such tile");
}

// The same with a in registers: of the 16 k, a[0] and a[1] hold this lane's two of the first eight at rows g and g + 8, a[2] and
// a[3] of the others, where g and the k are those of an accumulator (fragment_row, fragment_column).
template <int N, bool columns = false>
__device__ __forceinline__ void wgmma_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    if constexpr (N == 8) KN_BF16_HELD(8, "{%4, %5, %6, %7}", "%8", "%9", "%10");
    else if constexpr (N == 16) KN_BF16_HELD(16, "{%8, %9, %10, %11}", "%12", "%13", "%14");
    else if constexpr (N == 32) KN_BF16_HELD(32, "{%16, %17, %18, %19}", "%20", "%21", "%22");
    else if constexpr (N == 64) KN_BF16_HELD(64, "{%32, %33, %34, %35}", "%36", "%37", "%38");
    else if constexpr (N == 96) KN_BF16_HELD(96, "{%48, %49, %50, %51}", "%52", "%53", "%54");
    else if constexpr (N == 112) KN_BF16_HELD(112, "{%56, %57, %58, %59}", "%60", "%61", "%62");
    else if constexpr (N == 128) KN_BF16_HELD(128, "{%64, %65, %66, %67}", "%68", "%69", "%70");
    else static_assert(N < 0, "no such tile");
}

// d += a * b.T for f16, 64 x N x 16, with a in registers and b in rows of k.
template <int N>
__device__ __forceinline__ void wgmma_f16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    if constexpr (N == 16) KN_F16_HELD(16, "{%8, %9, %10, %11}", "%12", "%13");
    else if constexpr (N == 32) KN_F16_HELD(32, "{%16, %17, %18, %19}", "%20", "%21");
    else static_assert(N < 0, "no such tile");
}

// Four 8 x 8 matrices of 16-bit values to shared memory: lane 8 i + r gives the address of row r of matrix i (16 bytes, aligned);
// v[i] holds the two values of matrix i at row lane / 4, columns 2 (lane % 4) and the next; `transposed` stores each matrix
// transposed.
template <bool transposed = false> __device__ __forceinline__ void stmatrix4(void* row, const uint32_t (&v)[4]) {
    if constexpr (transposed)
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                     "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                     : "memory");
    else
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(v[0]),
                     "r"(v[1]), "r"(v[2]), "r"(v[3])
                     : "memory");
}
// Such matrices from shared memory, each transposed: v[i] holds the two values of matrix i at rows 2 (lane % 4) and the next,
// column lane / 4.
__device__ __forceinline__ void ldmatrix4_transposed(uint32_t (&v)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// Four e4m3 codes as f16, which holds them exactly: of the low two and of the high two.
__device__ __forceinline__ void widen_e4m3(uint32_t codes, uint32_t& low, uint32_t& high) {
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b; }"
        : "=r"(low), "=r"(high)
        : "r"(codes));
}
// Two values rounded to bf16, `low` in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
// 2^x, to 2 ulp; 0 for -inf.
__device__ __forceinline__ float exp2_fast(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
// 1 / x, to an ulp; 0 above 2^126.
__device__ __forceinline__ float reciprocal_fast(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

}  // namespace kn::cuda
#endif
