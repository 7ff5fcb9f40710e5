// CUDA kernels on the CPU: a fiber a thread, the blocks of a cluster together, clusters in turn or all at once. Test-only.
//
// It stands in for csrc/cuda/launch.cuh and ptx.cuh (KN_ON_CPU): barriers, copies by tensor map, wgmma by descriptor, clusters.
// What is asynchronous on the chip happens here at a drawn moment: copies land and products are done at once or as late as the
// waits allow, and fibers take turns in a drawn order, a warp now and then far behind the others, so that a missing wait shows as
// a wrong or poisoned value. A kernel that can go on nowhere is reported with what each warp waits for. Threads of a warp share
// no instruction: lanes run apart between the points where they meet. Not covered: memory ordering (fences are no-ops), speed,
// register limits.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "descriptor.h"

#undef __shared__
#define __shared__ static_assert(false, "kernels use dynamic shared memory alone: KN_SHARED")
#ifndef __grid_constant__
#define __grid_constant__
#endif
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __forceinline__
#define __forceinline__ inline
#define KN_SHARED(name) unsigned char* const name = kn::cuda::cpu::here().shared()

namespace kn::cuda {

struct Grid {
    dim3 blocks;
    int threads;
    size_t shared = 0;
    int cluster = 1;
    bool together = false;
};

namespace cpu {

// How the next launches run: multiprocessors, the draw of the order, and the share of asynchronous work done at once.
struct Schedule {
    int units = 4;
    uint64_t seed = 0;  // 0: fibers in order
    double eager = 1;
};
inline Schedule& schedule() {
    static Schedule s;
    return s;
}

constexpr size_t STACK = 64 << 10;     // of a fiber; the address sanitizer clears its shadow at each switch
static constexpr uint32_t BASE = 128;  // shared-memory address of a block's first byte: 16-byte aligned and no better is promised

struct Block;
struct Group {  // a named barrier
    int arrived = 0;
    uint64_t turn = 0;
};
enum class Type { e4m3, bf16, f16 };
struct Product {
    float* d;
    int n, k;
    Type type;
    bool columns, accumulate, registers;
    uint64_t a, b;
    uint32_t ra[4];
};
struct Fiber {
    ucontext_t context;
    Block* block;
    int index;
    bool done;
    bool (*ready)(void*);  // null: it may go on
    void* asks;
    const char* what;
    uint64_t slot[2];                                   // what a shuffle hands over
    std::vector<std::vector<Product>> groups;           // wgmma committed and not yet done
    std::vector<Product> open;                          // wgmma issued since the last commit
    std::vector<std::function<void()>> copies;  // cp_async not yet carried out
    char* stack;
};
struct Block {
    uint3 id;
    int rank, threads, alive;
    uint32_t slow = 0;  // warps that stand still while anything else can go on
    std::vector<Block*> cluster;  // by rank
    Group* meet;                  // of the cluster
    std::vector<unsigned char> memory;
    size_t size;
    std::map<uint64_t, Group> groups;
    std::vector<Fiber> fibers;
    unsigned char* shared() { return memory.data() + BASE + (-reinterpret_cast<uintptr_t>(memory.data()) & 1023); }
};
struct Machine {
    dim3 grid, block;
    std::vector<std::unique_ptr<Block>> blocks;  // that run at once: a cluster, or all
    std::vector<std::function<void()>> flying;   // copies that will land
    std::vector<Group> meet;                     // of each cluster
    ucontext_t main;
    Fiber* now = nullptr;
    std::mt19937_64 random;
    std::function<void()> body;
    std::string failure;
};
inline Machine*& machine() {
    static Machine* m = nullptr;
    return m;
}
inline Fiber& me() { return *machine()->now; }
inline Block& here() { return *me().block; }
[[noreturn]] inline void fail(const std::string& why) {
    Fiber& f = me();
    throw std::runtime_error("block " + std::to_string(f.block->id.x) + " thread " + std::to_string(f.index) + ": " + why);
}
inline bool eager() { return schedule().eager >= 1 || std::uniform_real_distribution<>()(machine()->random) < schedule().eager; }
inline void leave() { swapcontext(&me().context, &machine()->main); }

// Goes on once `condition` holds.
template <class F> void wait_until(const char* what, F condition) {
    if (condition()) return;
    Fiber& f = me();
    f.ready = [](void* p) { return (*static_cast<F*>(p))(); };
    f.asks = &condition;
    f.what = what;
    leave();
}
inline void meet(Group& g, int threads, const char* what) {
    const uint64_t turn = g.turn;
    if (++g.arrived == threads) {
        g.arrived = 0;
        ++g.turn;
        auto& random = machine()->random;
        if (schedule().seed && threads > 32 && random() % 8 == 0) here().slow |= 1u << random() % unsigned(here().threads / 32);
    } else {
        wait_until(what, [&g, turn] { return g.turn != turn; });
    }
}
inline void sync_threads() { meet(here().groups[0], here().threads, "__syncthreads"); }
inline void sync_warp(unsigned mask = 0xffffffff) {
    if (!(mask >> (me().index & 31) & 1)) fail("__syncwarp: the mask leaves this lane out");
    meet(here().groups[uint64_t(me().index / 32 + 1) << 32 | mask], __builtin_popcount(mask), "__syncwarp or a shuffle");
}

inline void entry() {
    Fiber& f = me();
    try {
        machine()->body();
        if (!f.open.empty() || !f.groups.empty()) fail("a thread ends with products under way");
        if (!f.copies.empty()) fail("a thread ends with copies that nothing waits for");
    } catch (const std::exception& e) {
        machine()->failure = e.what();
    }
    f.done = true;
    leave();
}

inline void run_blocks() {
    Machine& m = *machine();
    std::vector<Fiber*> order;
    for (auto& b : m.blocks) {
        b->slow = 0;
        for (auto& f : b->fibers) {
            f.done = false;
            f.ready = nullptr;
            f.groups.clear(), f.open.clear(), f.copies.clear();
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack;
            f.context.uc_stack.ss_size = STACK;
            f.context.uc_link = &m.main;
            makecontext(&f.context, entry, 0);
            order.push_back(&f);
        }
    }
    size_t alive = order.size();
    int held = -1;  // this warp of each block, or of block `where`, stands still while any other can go on
    unsigned where = 0;
    while (alive) {
        bool moved = false;
        if (schedule().seed) std::shuffle(order.begin(), order.end(), m.random);
        for (Fiber* f : order) {
            if (f->done) continue;
            if (f->block->slow >> (f->index / 32) & 1) continue;
            if (f->index / 32 == held && (where >= m.blocks.size() || f->block == m.blocks[where].get())) continue;
            m.now = f;
            if (f->ready && !f->ready(f->asks)) continue;
            f->ready = nullptr;
            swapcontext(&m.main, &f->context);
            moved = true;
            if (!m.failure.empty()) throw std::runtime_error(m.failure);
            if (f->done) {
                --alive;
                Block& b = *f->block;
                if (--b.alive == 0) std::fill(b.memory.begin(), b.memory.end(), 0xFF);  // its memory goes to another block
            }
        }
        // Copies land now and then, and at the latest when nothing else can go on.
        while (!m.flying.empty() && (!moved || m.random() % 4 == 0)) {
            std::swap(m.flying[m.random() % m.flying.size()], m.flying.back());
            auto land = std::move(m.flying.back());
            m.flying.pop_back();
            land();
            moved = true;
        }
        if (!moved) {
            bool waited = held >= 0;
            held = -1;
            for (auto& b : m.blocks) waited |= b->slow != 0, b->slow = 0;
            if (waited) continue;
        }
        if (schedule().seed && held < 0 && m.random() % 2 == 0) {
            held = int(m.random() % (m.block.x / 32));
            where = unsigned(m.random() % (2 * m.blocks.size()));
        }
        if (alive && !moved) {
            std::map<std::string, int> waits;
            for (Fiber* f : order)
                if (!f->done)
                    ++waits["block " + std::to_string(f->block->id.x) + " warp " + std::to_string(f->index / 32) + " in " +
                            f->what];
            std::string all = "no thread can go on:";
            for (auto& [where, n] : waits) all += "\n  " + where + " (" + std::to_string(n) + " lanes)";
            throw std::runtime_error(all);
        }
    }
    if (!m.flying.empty()) throw std::runtime_error("the blocks end before their copies have landed");
}

template <class F> void run(const char* name, const Grid& g, F body) {
    Machine m;
    m.grid = g.blocks;
    m.block = dim3(unsigned(g.threads));
    m.random.seed(schedule().seed);
    m.body = body;
    if (g.shared > 227 << 10) throw std::runtime_error(std::string(name) + ": more than 227 KiB of shared memory");
    if (g.threads < 1 || g.threads > 1024) throw std::runtime_error(std::string(name) + ": bad number of threads");
    if (g.blocks.x % unsigned(g.cluster))
        throw std::runtime_error(std::string(name) + ": the grid is no multiple of the cluster");
    static std::vector<std::unique_ptr<char[]>> stacks;
    const size_t all = size_t(g.blocks.x) * g.blocks.y * g.blocks.z, at_once = g.together ? all : size_t(g.cluster);
    if (g.together && all > size_t(schedule().units))
        throw std::runtime_error(std::string(name) + ": too many blocks to run at once");
    size_t used = 0;
    m.meet.resize(at_once / size_t(g.cluster));
    for (size_t i = 0; i < at_once; ++i) {
        m.blocks.push_back(std::make_unique<Block>());
        Block& b = *m.blocks.back();
        b.rank = int(i % size_t(g.cluster));
        b.meet = &m.meet[i / size_t(g.cluster)];
        b.threads = g.threads;
        b.size = g.shared;
        b.memory.resize(g.shared + BASE + 2048);
        b.fibers.resize(size_t(g.threads));
        for (auto& f : b.fibers) {
            if (used == stacks.size()) stacks.emplace_back(new char[STACK]);
            f.block = &b;
            f.index = int(&f - b.fibers.data());
            f.stack = stacks[used++].get();
        }
    }
    for (size_t i = 0; i < at_once; ++i)
        for (int r = 0; r < g.cluster; ++r)
            m.blocks[i]->cluster.push_back(m.blocks[i / size_t(g.cluster) * size_t(g.cluster) + size_t(r)].get());
    Machine* outer = std::exchange(machine(), &m);
    try {
        for (size_t first = 0; first < all; first += at_once) {
            for (size_t i = 0; i < at_once; ++i) {
                Block& b = *m.blocks[i];
                const unsigned at = unsigned(first + i);
                b.id = uint3{at % g.blocks.x, at / g.blocks.x % g.blocks.y, at / g.blocks.x / g.blocks.y};
                b.alive = b.threads;
                b.groups.clear();
                std::fill(b.memory.begin(), b.memory.end(), 0xFF);
            }
            for (Group& meet : m.meet) meet = {};
            run_blocks();
        }
    } catch (const std::exception& e) {
        machine() = outer;
        throw std::runtime_error(std::string(name) + ": " + e.what());
    }
    machine() = outer;
}

// ---- the warp

template <class T> T from_lane(T v, int lane, unsigned mask) {
    static_assert(sizeof(T) <= 8);
    Fiber& f = me();
    std::memcpy(f.slot, &v, sizeof v);
    sync_warp(mask);
    T got;
    std::memcpy(&got, here().fibers[f.index / 32 * 32 + (lane & 31)].slot, sizeof got);
    sync_warp(mask);
    return got;
}
template <class T, class F> T over_lanes(T v, unsigned mask, T start, F join) {
    Fiber& f = me();
    std::memcpy(f.slot, &v, sizeof v);
    sync_warp(mask);
    T all = start;
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1) {
            T one;
            std::memcpy(&one, here().fibers[f.index / 32 * 32 + i].slot, sizeof one);
            all = join(all, one, i);
        }
    sync_warp(mask);
    return all;
}

// ---- tensor maps

struct Map {
    unsigned char* base;
    uint64_t dims[2], stride;  // of rows, in bytes
    uint32_t box[2];
    int item;
    bool swizzle;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));
inline Map& open(const CUtensorMap* map) { return *reinterpret_cast<Map*>(const_cast<CUtensorMap*>(map)); }
inline uint32_t box_bytes(const Map& m) { return m.box[0] * m.box[1] * uint32_t(m.item); }

// A box of the tensor at (c0, c1) to shared memory at `address` of block `b`; zeros outside of the tensor.
inline void copy_box(const Map& m, Block& b, uint32_t address, int c0, int c1) {
    unsigned char* shared = b.shared() - BASE;
    uint32_t at = address;
    for (uint32_t y = 0; y < m.box[1]; ++y)
        for (uint32_t x = 0; x < m.box[0]; ++x, at += uint32_t(m.item)) {
            const int64_t i = int64_t(c0) + x, j = int64_t(c1) + y;
            unsigned char* s = shared + (m.swizzle ? swizzle128(at) : at);
            if (i >= 0 && j >= 0 && uint64_t(i) < m.dims[0] && uint64_t(j) < m.dims[1])
                std::memcpy(s, m.base + i * m.item + j * int64_t(m.stride), size_t(m.item));
            else
                std::memset(s, 0, size_t(m.item));
        }
}

// ---- barriers: pending arrivals and bytes of a phase

struct Barrier {
    int32_t bytes;
    uint16_t arrivals;  // 15 bits: arrivals of a phase that are left
    uint16_t state;     // phase in the lowest bit, above it arrivals of a phase
};
static_assert(sizeof(Barrier) == 8);
inline Barrier& open(uint64_t* bar) { return *reinterpret_cast<Barrier*>(bar); }
inline void settle(Barrier& b) {
    if (b.arrivals == 0 && b.bytes == 0) {
        b.arrivals = b.state >> 1;
        b.state ^= 1;
    }
}
inline void arrive(uint64_t* bar, int32_t bytes = 0) {
    Barrier& b = open(bar);
    if (b.arrivals == 0) fail("more arrivals at a barrier than it was initialised with");
    b.bytes += bytes;
    --b.arrivals;
    settle(b);
}
inline void landed(uint64_t* bar, uint32_t bytes) {
    open(bar).bytes -= int32_t(bytes);
    settle(open(bar));
}

// Which block of the cluster a pointer lies in, and its address there.
inline Block& owner(const void* p) {
    for (Block* b : here().cluster) {
        const auto* q = static_cast<const unsigned char*>(p);
        if (q >= b->shared() && q < b->shared() + b->size) return *b;
    }
    fail("an address outside of shared memory");
}

// ---- products

inline float e4m3(uint8_t code) {
    static const auto table = [] {
        std::array<float, 256> t;
        for (int i = 0; i < 256; ++i) {
            const int e = i >> 3 & 15, m = i & 7;
            const float v = e ? std::ldexp(1.0f + float(m) / 8, e - 7) : std::ldexp(float(m) / 8, -6);
            t[size_t(i)] = (i & 127) == 127 ? NAN : i & 128 ? -v : v;
        }
        return t;
    }();
    return table[code];
}
inline float bf16_value(const void* p) {
    uint16_t u;
    std::memcpy(&u, p, 2);
    const uint32_t w = uint32_t(u) << 16;
    float f;
    std::memcpy(&f, &w, 4);
    return f;
}

inline float f16_value(const void* p) {
    uint16_t u;
    std::memcpy(&u, p, 2);
    return __half2float(__half(__half_raw{u}));
}
inline float value(Type type, const void* p) {
    return type == Type::e4m3 ? e4m3(*static_cast<const uint8_t*>(p)) : type == Type::bf16 ? bf16_value(p) : f16_value(p);
}

// Values of an operand, n rows of k from row `first` on, in rows of `to` or (`across`) in its columns; it lies in rows of k or
// (`columns`) of n.
inline void fetch(Block& b, uint64_t descriptor, int first, int n, int k, Type type, bool columns, float* to, bool across) {
    if (descriptor >> 62 != 1) throw std::runtime_error("wgmma: only the 128-byte swizzle is known here");
    const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, leading = uint32_t(descriptor >> 16 & 0x3fff) << 4,
                   stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
    const int item = type == Type::e4m3 ? 1 : 2, per = 16 / item;  // values of a 16-byte chunk
    const unsigned char* memory = b.shared() - BASE;
    auto chunk = [&](uint32_t at) {
        const uint32_t address = swizzle128(at);
        if (address < BASE || address + 16 - BASE > b.size)
            throw std::runtime_error("wgmma: an operand outside of shared memory");
        return memory + address;
    };
    auto put = [&](int r, int i, const unsigned char* p) { to[across ? i * n + r : r * k + i] = value(type, p); };
    if (columns)
        for (int i = 0; i < k; ++i)
            for (int r = 0; r < n; r += per) {
                const int at = first + r;
                const auto* p = chunk(start + uint32_t(at / 64) * leading + uint32_t(i / 8) * stride + uint32_t(i % 8) * 128 +
                                      uint32_t(at % 64) * 2);
                for (int j = 0; j < per; ++j) put(r + j, i, p + j * item);
            }
    else
        for (int r = 0; r < n; ++r)
            for (int i = 0; i < k; i += per) {
                const int at = first + r;
                const auto* p = chunk(start + uint32_t(at / 8) * stride + uint32_t(at % 8) * 128 + uint32_t(i * item));
                for (int j = 0; j < per; ++j) put(r, i + j, p + j * item);
            }
}

// A warp's 16 rows of the product that its 32 threads issued as their next one: warps of a warpgroup run apart.
inline void multiply(Fiber* warp, const std::array<Product*, 32>& all) {
    const Product& p = *all[0];
    Block& block = *warp->block;
    for (Product* q : all)
        if (q->a != p.a || q->b != p.b || q->n != p.n || q->accumulate != p.accumulate)
            throw std::runtime_error("wgmma: lanes disagree");
    static std::vector<float> a, b, d;
    a.resize(size_t(16 * p.k)), b.resize(size_t(p.k * p.n)), d.resize(size_t(16 * p.n));
    if (p.registers) {
        for (int t = 0; t < 32; ++t)
            for (int i = 0; i < 8; ++i) {
                const int r = fragment_row(t, i & 3), k = i / 4 * 8 + t % 4 * 2 + (i & 1);
                const uint32_t word = all[size_t(t)]->ra[i / 2];
                const uint16_t half = uint16_t(i & 1 ? word >> 16 : word);
                a[size_t(r * p.k + k)] = value(p.type, &half);
            }
    } else {
        fetch(block, p.a, warp->index % 128 / 32 * 16, 16, p.k, p.type, false, a.data(), false);
    }
    fetch(block, p.b, 0, p.n, p.k, p.type, p.columns, b.data(), true);
    std::fill(d.begin(), d.end(), 0.0f);
    for (int r = 0; r < 16; ++r) {
        float* row = d.data() + r * p.n;
        for (int k = 0; k < p.k; ++k) {
            const float x = a[size_t(r * p.k + k)];
            const float* other = b.data() + k * p.n;
            for (int j = 0; j < p.n; ++j) row[j] += x * other[j];
        }
    }
    for (int t = 0; t < 32; ++t)
        for (int i = 0; i < p.n / 2; ++i) {
            float& to = all[size_t(t)]->d[i];
            to = (p.accumulate ? to : 0.0f) + d[size_t(fragment_row(t, i) * p.n + fragment_column(t, i))];
        }
}

// Does the oldest committed groups of this warp until `left` remain; its first lane does the work.
inline void finish(size_t left) {
    sync_warp();
    Fiber& f = me();
    Fiber* warp = &here().fibers[size_t(f.index / 32 * 32)];
    if (&f == warp)
        for (; warp->groups.size() > left;) {
            const size_t count = warp->groups[0].size();
            for (size_t i = 0; i < count; ++i) {
                std::array<Product*, 32> all;
                for (int t = 0; t < 32; ++t) {
                    if (warp[t].groups.empty() || warp[t].groups[0].size() != count)
                        fail("wgmma: lanes issued different products");
                    all[size_t(t)] = &warp[t].groups[0][i];
                }
                multiply(warp, all);
            }
            for (int t = 0; t < 32; ++t) warp[t].groups.erase(warp[t].groups.begin());
        }
    sync_warp();
}

template <class T> T atomic(T* p, T v) {
    const T old = *p;
    *p = old + v;
    return old;
}

}  // namespace cpu

// ---- launch.cuh

inline int units() { return cpu::schedule().units; }

template <auto kernel, class... Args> void launch(const char* name, const Grid& g, cudaStream_t, Args... args) {
    if (g.blocks.x * g.blocks.y * g.blocks.z == 0) return;
    cpu::run(name, g, [=] { kernel(args...); });
}
inline void clear(void* data, size_t bytes, cudaStream_t) { std::memset(data, 0, bytes); }

inline CUtensorMap tensor_map(CUtensorMapDataType type, const void* base, int rank, const uint64_t* dims, const uint64_t* strides,
                              const uint32_t* box, CUtensorMapSwizzle swizzle) {
    CUtensorMap map;
    cpu::Map& m = *reinterpret_cast<cpu::Map*>(&map);
    auto refuse = [](const char* why) { throw std::runtime_error(std::string("tensor map refused: ") + why); };
    if (rank != 2) refuse("two dims are known here");
    m = {};
    m.base = static_cast<unsigned char*>(const_cast<void*>(base));
    m.item = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? 2 : 0;
    m.stride = strides[0];
    m.swizzle = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
    if (!m.item) refuse("this type is not known here");
    if (!m.swizzle && swizzle != CU_TENSOR_MAP_SWIZZLE_NONE) refuse("this swizzle is not known here");
    if (reinterpret_cast<uintptr_t>(base) % 16) refuse("the address is not a multiple of 16");
    if (m.stride % 16 || m.stride >= uint64_t(1) << 40) refuse("a stride is not a multiple of 16 below 2^40");
    for (int i = 0; i < 2; ++i) {
        m.dims[i] = dims[i];
        m.box[i] = box[i];
        if (m.dims[i] < 1 || m.dims[i] > uint64_t(1) << 32) refuse("a dim is not in 1 to 2^32");
        if (m.box[i] < 1 || m.box[i] > 256) refuse("a box is not in 1 to 256");
    }
    if (m.box[0] * uint32_t(m.item) % 16) refuse("a box's rows are not multiples of 16 bytes");
    if (m.swizzle && m.box[0] * uint32_t(m.item) > 128) refuse("a swizzled row is longer than 128 bytes");
    return map;
}

// ---- ptx.cuh

inline uint32_t shared_address(const void* p) {
    return uint32_t(static_cast<const unsigned char*>(p) - cpu::here().shared()) + cpu::BASE;
}

inline void barrier_init(uint64_t* bar, int arrivals) { cpu::open(bar) = {0, uint16_t(arrivals), uint16_t(arrivals << 1)}; }
inline void barrier_init_fence() {}
inline void barrier_arrive(uint64_t* bar) { cpu::arrive(bar); }
inline void barrier_expect(uint64_t* bar, uint32_t bytes) { cpu::arrive(bar, int32_t(bytes)); }
inline void barrier_wait(uint64_t* bar, uint32_t parity) {
    if (parity > 1) cpu::fail("a parity is 0 or 1");
    cpu::wait_until("barrier_wait", [=] { return uint32_t(cpu::open(bar).state & 1) != parity; });
}
inline uint64_t* barrier_at(uint32_t address) {
    return reinterpret_cast<uint64_t*>(cpu::here().shared() + (address - cpu::BASE));
}
inline void barrier_arrive(uint32_t bar) { barrier_arrive(barrier_at(bar)); }
inline void barrier_wait(uint32_t bar, uint32_t parity) { barrier_wait(barrier_at(bar), parity); }

static constexpr uint64_t EVICT_FIRST = 0x12f0000000000000, EVICT_NORMAL = 0x1000000000000000;

template <class T> T* cluster_map(T* p, int rank) {
    cpu::Block& b = *cpu::here().cluster.at(size_t(rank));
    return reinterpret_cast<T*>(b.shared() + (reinterpret_cast<unsigned char*>(p) - cpu::here().shared()));
}
inline void barrier_arrive_remote(uint64_t* bar, int rank) { cpu::arrive(cluster_map(bar, rank)); }

namespace cpu {
inline void load(void* to, const CUtensorMap* map, uint64_t* bar, int c0, int c1, uint16_t blocks) {
    const Map m = open(map);
    const uint32_t address = shared_address(to);
    if (address % (m.swizzle ? 1024 : 128)) fail("a copy's destination is not aligned");
    if (address + box_bytes(m) - BASE > here().size) fail("a copy lands outside of shared memory");
    for (int r = 0; r < 16; ++r)
        if (blocks >> r & 1) {
            Block* b = here().cluster.at(size_t(r));
            uint64_t* there = cluster_map(bar, r);
            auto land = [=] {
                if (b->alive == 0) throw std::runtime_error("a copy lands in a block that has ended");
                copy_box(m, *b, address, c0, c1);
                landed(there, box_bytes(m));
            };
            if (eager()) land();
            else machine()->flying.push_back(land);
        }
}
}  // namespace cpu

inline void tma_load(void* to, const CUtensorMap* map, uint64_t* bar, int c0, int c1, uint64_t = EVICT_NORMAL) {
    cpu::load(to, map, bar, c0, c1, uint16_t(1 << cpu::here().rank));
}
inline void tma_load_multicast(void* to, const CUtensorMap* map, uint64_t* bar, int c0, int c1, uint16_t blocks,
                               uint64_t = EVICT_NORMAL) {
    cpu::load(to, map, bar, c0, c1, blocks);
}
inline void prefetch_l2(const void* from) {
    static_cast<void>(*static_cast<const volatile unsigned char*>(from));  // such memory must be there
}
inline void fence_async() {}

namespace cpu {
inline void copy_async(void* to, const void* from, bool valid, uint32_t bytes) {
    if (reinterpret_cast<uintptr_t>(to) % bytes || (valid && reinterpret_cast<uintptr_t>(from) % bytes))
        fail("cp_async: not aligned");
    auto copy = [=] { valid ? std::memcpy(to, from, bytes) : std::memset(to, 0, bytes); };
    if (eager()) copy();
    else me().copies.push_back(copy);
}
}  // namespace cpu
inline void cp_async16(void* to, const void* from, bool valid) { cpu::copy_async(to, from, valid, 16); }
inline void cp_async4(void* to, const void* from, bool valid) { cpu::copy_async(to, from, valid, 4); }
inline void cp_async_arrive(uint64_t* bar) {
    auto land = [bar, copies = std::move(cpu::me().copies)] {
        for (auto& copy : copies) copy();
        cpu::arrive(bar);
    };
    cpu::me().copies.clear();
    if (cpu::eager()) land();
    else cpu::machine()->flying.push_back(land);
}
inline uint32_t cluster_rank() { return uint32_t(cpu::here().rank); }
inline void cluster_sync() {
    cpu::meet(*cpu::here().meet, int(cpu::here().cluster.size()) * cpu::here().threads, "cluster_sync");
}
inline void part_sync(int id, int threads) { cpu::meet(cpu::here().groups[uint64_t(id)], threads, "part_sync"); }
inline int uniform(int v) { return v; }
inline void wait_count(const uint64_t* count, uint64_t mask, uint64_t least) {
    cpu::wait_until("wait_count", [=] { return (*count & mask) >= least; });
}
template <int N> void registers_less() { static_assert(N % 8 == 0 && N >= 24 && N <= 256); }
template <int N> void registers_more() { static_assert(N % 8 == 0 && N >= 24 && N <= 256); }
inline void wgmma_fence() {}
inline void wgmma_commit() {
    cpu::me().groups.push_back(std::move(cpu::me().open));
    cpu::me().open.clear();
    if (cpu::schedule().eager >= 1) cpu::finish(0);
}
template <int N> void wgmma_wait() {
    if (!cpu::me().open.empty()) cpu::fail("wgmma wait before commit");
    cpu::finish(N);
}
template <class T, int N> void hold(T (&)[N]) {}
template <int N> void wgmma_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    cpu::me().open.push_back({d, N, 32, cpu::Type::e4m3, false, accumulate, false, a, b, {}});
}
template <int N, bool columns = false> void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    cpu::me().open.push_back({d, N, 16, cpu::Type::bf16, columns, accumulate, false, a, b, {}});
}
template <int N, bool columns = false> void wgmma_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    cpu::me().open.push_back({d, N, 16, cpu::Type::bf16, columns, accumulate, true, 0, b, {a[0], a[1], a[2], a[3]}});
}
template <int N> void wgmma_f16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    cpu::me().open.push_back({d, N, 16, cpu::Type::f16, false, accumulate, true, 0, b, {a[0], a[1], a[2], a[3]}});
}

template <bool transposed = false> void stmatrix4(void* row, const uint32_t (&v)[4]) {
    if (shared_address(row) % 16) cpu::fail("stmatrix4: a row is not aligned");
    const int lane = cpu::me().index & 31;
    for (int i = 0; i < 4; ++i)
        for (int half = 0; half < 2; ++half) {
            int r = lane / 4, c = lane % 4 * 2 + half;
            if (transposed) std::swap(r, c);
            // the address of row r of matrix i comes from lane 8 i + r
            const uintptr_t at = cpu::from_lane(reinterpret_cast<uintptr_t>(row), 8 * i + r, ~0u);
            reinterpret_cast<uint16_t*>(at)[c] = uint16_t(half ? v[i] >> 16 : v[i]);
        }
    cpu::sync_warp();
}
inline void ldmatrix4_transposed(uint32_t (&v)[4], const void* row) {
    if (shared_address(row) % 16) cpu::fail("ldmatrix4: a row is not aligned");
    const int lane = cpu::me().index & 31;
    for (int i = 0; i < 4; ++i) {
        uint16_t both[2];
        for (int half = 0; half < 2; ++half)  // the address of row r of matrix i comes from lane 8 i + r
            both[half] = reinterpret_cast<const uint16_t*>(
                cpu::from_lane(reinterpret_cast<uintptr_t>(row), 8 * i + lane % 4 * 2 + half, ~0u))[lane / 4];
        v[i] = uint32_t(both[0]) | uint32_t(both[1]) << 16;
    }
}
inline void widen_e4m3(uint32_t codes, uint32_t& low, uint32_t& high) {
    uint32_t* const to[2] = {&low, &high};
    for (int i = 0; i < 2; ++i) {
        const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(codes >> 16 * i), __NV_E4M3);
        *to[i] = pair.x | uint32_t(pair.y) << 16;
    }
}
inline uint32_t pack_bf16(float low, float high) {
    auto bits = [](float f) {
        const __nv_bfloat16 h = __float2bfloat16_rn(f);
        uint16_t u;
        std::memcpy(&u, &h, 2);
        return uint32_t(u);
    };
    return bits(low) | bits(high) << 16;
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return std::fabs(x) > 0x1p126f ? std::copysign(0.0f, x) : 1.0f / x; }

}  // namespace kn::cuda

// ---- CUDA's own words

#define threadIdx (uint3{unsigned(kn::cuda::cpu::me().index), 0, 0})
#define blockIdx (kn::cuda::cpu::here().id)
#define blockDim (kn::cuda::cpu::machine()->block)
#define gridDim (kn::cuda::cpu::machine()->grid)

inline void __syncthreads() { kn::cuda::cpu::sync_threads(); }
inline void __syncwarp(unsigned mask = ~0u) { kn::cuda::cpu::sync_warp(mask); }
template <class T> T __shfl_sync(unsigned mask, T v, int lane) { return kn::cuda::cpu::from_lane(v, lane, mask); }
template <class T> T __shfl_xor_sync(unsigned mask, T v, int by) {
    return kn::cuda::cpu::from_lane(v, (kn::cuda::cpu::me().index & 31) ^ by, mask);
}
template <class T> T __shfl_up_sync(unsigned mask, T v, int by) {
    const int lane = kn::cuda::cpu::me().index & 31;
    return kn::cuda::cpu::from_lane(v, lane >= by ? lane - by : lane, mask);
}
inline unsigned __ballot_sync(unsigned mask, int p) {
    return kn::cuda::cpu::over_lanes<int>(p != 0, mask, 0,
                                          [](int all, int one, int i) { return int(unsigned(all) | unsigned(one) << i); });
}
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, p) == mask; }
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __reduce_add_sync(unsigned mask, int v) {
    return kn::cuda::cpu::over_lanes<int>(v, mask, 0, [](int all, int one, int) { return all + one; });
}
inline unsigned __match_any_sync(unsigned mask, int v) {
    return unsigned(kn::cuda::cpu::over_lanes<int64_t>(
        v, mask, 0, [v](int64_t all, int64_t one, int i) { return one == v ? all | int64_t(1) << i : all; }));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
    const uint64_t both = a | uint64_t(b) << 32;
    unsigned r = 0;
    for (int i = 0; i < 4; ++i) r |= unsigned(both >> (s >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return r;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __float_as_uint(float f) {
    unsigned u;
    std::memcpy(&u, &f, 4);
    return u;
}
inline float __uint_as_float(unsigned u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline int __float_as_int(float f) { return int(__float_as_uint(f)); }
inline float __int_as_float(int u) { return __uint_as_float(unsigned(u)); }
inline int __reduce_max_sync(unsigned mask, int v) {
    return kn::cuda::cpu::over_lanes<int>(v, mask, INT_MIN, [](int all, int one, int) { return std::max(all, one); });
}
inline int __reduce_min_sync(unsigned mask, int v) {
    return kn::cuda::cpu::over_lanes<int>(v, mask, INT_MAX, [](int all, int one, int) { return std::min(all, one); });
}
inline unsigned __vmaxu2(unsigned a, unsigned b) { return std::max(a & 0xffff, b & 0xffff) | std::max(a >> 16, b >> 16) << 16; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T atomicAdd(T* p, T v) { return kn::cuda::cpu::atomic(p, v); }
template <class T> T atomicCAS(T* p, T old, T to) {
    const T seen = *p;
    if (seen == old) *p = to;
    return seen;
}
inline void __threadfence() {}
using std::max;
using std::min;
