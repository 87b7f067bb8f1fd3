// GEMM of 8-bit codes on Hopper tensor cores: x [m, k] and codes [n, k], both e4m3 or both int8,
// with contiguous k. Sums are float32 for e4m3, and exact in int32 for int8.
//
// The first `plain_n` output columns are written as BF16. The others go through an activation and
// are quantized to e4m3, ready for the next GEMM. int8 has no activation.
//
// A cluster of two blocks computes a 256 x 256 output tile; each block computes 128 rows of it. In
// each step along k, a block loads its own rows of x and half of the rows of codes. TMA multicasts
// that half to both blocks, so codes cross the L2 cache once per cluster and not twice.
//
// A block has three warpgroups. One loads, up to STAGES steps ahead; the other two compute 64 rows
// each. This is CUTLASS's "warp-specialized cooperative" schedule with persistent blocks:
// https://github.com/NVIDIA/cutlass/blob/v3.5.0/media/docs/efficient_gemm.md
//
// Names of instructions are those of the PTX ISA, where their rules are:
// https://docs.nvidia.com/cuda/parallel-thread-execution/
//
// Compile-time definitions, made by source.py: INT8 1 for int8, 0 for e4m3; ACTIVATION 0 none,
// 1 GELU, 2 SwiGLU; X_BY_ROW and CODES_BY_ROW 1 for one scale per row, 0 for one scale; BIAS 1 if
// there is a bias.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
#if INT8
typedef int Sum;
#else
typedef float Sum;
#endif
struct alignas(64) TensorMap { unsigned char bytes[128]; };  // the driver's CUtensorMap
struct alignas(8) Float2 { float x, y; };

constexpr int CLUSTER = 2, MMA_WARPGROUPS = 2, WARPGROUP_THREADS = 128;
// 128 columns of k are 128 bytes: the longest row that 128-byte swizzling allows. Four stages, the
// output tiles and the barriers fill the 227 KB of shared memory of a block.
constexpr int TILE_M = 128, HALF_N = 128, TILE_N = 2 * HALF_N, TILE_K = 128, STAGES = 4;
constexpr int WARPGROUP_M = TILE_M / MMA_WARPGROUPS;
constexpr int X_BYTES = TILE_M * TILE_K, HALF_BYTES = HALF_N * TILE_K;
constexpr int STAGE_BYTES = X_BYTES + 2 * HALF_BYTES;
// An output tile is what one TMA store writes: 128 bytes of each row of a warpgroup. With two, one
// is filled while the other is stored.
constexpr int OUT_TILE_BYTES = WARPGROUP_M * 128, OUT_TILES = 2;
constexpr int ALIGNMENT = 1024;  // 128-byte swizzling repeats every 8 rows of 128 bytes
constexpr int NONE = 0, SWIGLU = 2;

#define DEVICE __device__ __forceinline__

// Barriers in shared memory (mbarrier)

DEVICE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }
DEVICE void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
// Arrive, and let the phase end only when TMA has written `bytes` more.
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nwait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra wait;\n}"
      ::"r"(barrier), "r"(parity) : "memory");
}
// Arrive at the same barrier of some block of the cluster. Use the default scope: an explicit
// cluster scope makes every arrival wait for all outstanding accesses to global memory.
DEVICE void barrier_arrive_at(u32 barrier, u32 block) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}"
      ::"r"(barrier), "r"(block) : "memory");
}
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n"
               "barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE u32 block_in_cluster() {
  u32 block;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(block));
  return block;
}
// Hardware barrier 0 is __syncthreads; each warpgroup uses one of its own.
DEVICE void warpgroup_sync(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}

// TMA, the copy engine: one thread starts a copy of a whole tile. Source:
// PTX ISA, "cp.async.bulk.tensor".

DEVICE void tma_load(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];"
      ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}
// Write to the same offset in both blocks, and count the bytes at both blocks' barriers.
DEVICE void tma_load_multicast(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
      ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier), "h"((u16)((1 << CLUSTER) - 1))
      : "memory");
}
DEVICE void tma_store(const TensorMap* map, int column, int row, u32 from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
      "cp.async.bulk.commit_group;"
      ::"l"(map), "r"(column), "r"(row), "r"(from) : "memory");
}
// Wait until all but the last PENDING stores have read shared memory, which may then be reused.
template <int PENDING> DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
// TMA reads shared memory through another proxy, which sees ordinary stores only after a fence.
DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The tensor cores: a warpgroup of 128 threads multiplies [64, 32] by [32, 256] (wgmma)

// Describe a tile with 128-byte swizzling (layout type 1 in bits 62-63). All numbers are in units
// of 16 bytes: the address in bits 0-13, and in bits 32-45 the distance from eight rows to the
// next. Bits 16-29 are not used with this swizzling. Fields: CUTLASS's GmmaDescriptor,
// https://github.com/NVIDIA/cutlass/blob/v3.5.0/include/cute/arch/mma_sm90_desc.hpp
DEVICE u64 descriptor(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
// acc = x codes^T, plus the old acc where `accumulate` is not 0: so acc needs no zeroing.
DEVICE void wgmma(Sum (&acc)[128], u64 x, u64 codes, int accumulate) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.@TYPES@ "
      "{@OPERANDS@}, %128, %129, add@SIGNS@;\n}"
      : @ACCUMULATORS@ : "l"(x), "l"(codes), "r"(accumulate));
}
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Arithmetic

// The instruction puts its second operand into the lower half. satfinite clamps e4m3 to 448.
DEVICE u16 e4m3x2(float first, float second) {
  u16 both;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(second), "f"(first));
  return both;
}
DEVICE u32 bf16x2(float first, float second) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}
// One instruction, with a relative error of 2^-11: FP8 keeps 2^-4.
DEVICE float tanh(float x) { float y; asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
constexpr float SQRT_2_OVER_PI = 0.79788456f;
DEVICE float gelu(float x, float factor) {  // the tanh approximation, times `factor`
  const float half = 0.5f * factor * x;
  return half * tanh(x * (SQRT_2_OVER_PI + 0.044715f * SQRT_2_OVER_PI * (x * x))) + half;
}
// silu(x) = x * sigmoid(x) = x/2 * tanh(x/2) + x/2: one tanh instead of an exp and a division.
DEVICE float silu_of_half(float half) { return half * tanh(half) + half; }

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Tile { int row, column; };

// Tiles are processed in groups of `rows_per_group` tile rows. The clusters that run at the same
// time then share rows of x and rows of codes in the L2 cache.
struct TileScheduler {
  int rows, columns, rows_per_group;
  DEVICE int num_tiles() const { return rows * columns; }
  DEVICE Tile tile(int tile_id) const {
    const int first_row = tile_id / (rows_per_group * columns) * rows_per_group;
    const int group_rows = min(rows - first_row, rows_per_group);
    const int in_group = tile_id - first_row * columns;
    return {first_row + in_group % group_rows, in_group / group_rows};
  }
};

struct Scales {
  const float *x, *codes;
  const u16* bias;
  int last_pair;
  float row_scale[2];  // of this thread's row and of the row eight below it

  DEVICE void load_rows(int row, int m) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      row_scale[h] = x[X_BY_ROW ? min(row + h * 8, m - 1) : 0] * (CODES_BY_ROW ? 1.f : *codes);
    }
  }
  // Scale four accumulators: columns `column` and the next one, in both rows. Times `factor`.
  DEVICE void apply(const Sum* acc, int column, float factor, float (&y)[4]) const {
    column = min(column, last_pair);  // TMA does not store columns beyond the end
    float bias_value[2] = {0.f, 0.f}, column_scale[2] = {factor, factor};
    if constexpr (BIAS) {
      const u32 pair = *(const u32*)(bias + column);
      // A BF16 number is the upper half of a float.
      bias_value[0] = __uint_as_float(pair << 16) * factor;
      bias_value[1] = __uint_as_float(pair & 0xFFFF0000u) * factor;
    }
    if constexpr (CODES_BY_ROW) {
      const Float2 pair = *(const Float2*)(codes + column);
      column_scale[0] = pair.x * factor;
      column_scale[1] = pair.y * factor;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float scale = row_scale[X_BY_ROW ? i / 2 : 0] * column_scale[i % 2];
      const float sum = (float)acc[i];
      y[i] = BIAS ? sum * scale + bias_value[i % 2] : sum * scale;
    }
  }
};

// Return the offset of a byte among the first 16 bytes of a row of an output tile, and advance an
// address by `chunks` of 16 bytes along its row. 128-byte swizzling XORs the index of a chunk with
// the row's last three bits, which spreads a column over all banks. TMA undoes it when it stores.
DEVICE u32 swizzled_offset(int row, int byte) { return row * 128 + ((row & 7) << 4) + byte; }
DEVICE u32 swizzle_advance(u32 address, int chunks) { return address ^ chunks << 4; }

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1)
__launch_bounds__((MMA_WARPGROUPS + 1) * WARPGROUP_THREADS, 1) gemm_act(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap codes,
    const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap quantized,
    const float* x_scale, const float* codes_scale, const u16* bias, const float* inverse_scale,
    int m, int k, int n, int plain_n, int rows_per_group) {
  extern __shared__ unsigned char memory[];
  const u32 stage_buffers = (shared_address(memory) + ALIGNMENT - 1) & ~(ALIGNMENT - 1);
  const u32 out_tiles = stage_buffers + STAGES * STAGE_BYTES;
  // Two barriers of 8 bytes per stage: the loader waits for `empty`, the others for `full`.
  const u32 full_barriers = out_tiles + MMA_WARPGROUPS * OUT_TILES * OUT_TILE_BYTES;
  const u32 empty_barriers = full_barriers + 8 * STAGES;
  const int warpgroup = threadIdx.x / WARPGROUP_THREADS, block = block_in_cluster();

  // SwiGLU makes one output column of two GEMM columns, gate and up.
  constexpr int ACTIVE_TILE_N = ACTIVATION == SWIGLU ? HALF_N : TILE_N;
  const int active_n = ACTIVATION == SWIGLU ? (n - plain_n) / 2 : n - plain_n;
  const int plain_tiles = ceil_div(plain_n, TILE_N);
  const TileScheduler scheduler = {
      ceil_div(m, TILE_M * CLUSTER), plain_tiles + ceil_div(active_n, ACTIVE_TILE_N),
      rows_per_group};
  const int steps = ceil_div(k, TILE_K);
  const int first_tile_id = blockIdx.x / CLUSTER, num_clusters = gridDim.x / CLUSTER;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      barrier_init(full_barriers + 8 * stage, 1);
      // A stage is empty when the warpgroups of both blocks have read it: multicast fills both.
      barrier_init(empty_barriers + 8 * stage, MMA_WARPGROUPS * CLUSTER);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();  // the other block must not arrive at barriers that are not initialized

  int stage = 0, phase = 0;
  if (warpgroup == MMA_WARPGROUPS) {
    // Loading needs few registers; 128 accumulators per thread and the epilogue need many. The
    // totals must fit: 40 + 2 * 232 = 504, times 128 threads, of 65536 registers.
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == MMA_WARPGROUPS * WARPGROUP_THREADS) {
      for (int tile_id = first_tile_id; tile_id < scheduler.num_tiles(); tile_id += num_clusters) {
        const Tile tile = scheduler.tile(tile_id);
        const int x_row = (tile.row * CLUSTER + block) * TILE_M;
        const int active_tile = tile.column - plain_tiles;  // negative without activation
        // Under SwiGLU the two blocks load gate and up of the same columns.
        const int codes_row =
            active_tile < 0        ? tile.column * TILE_N + block * HALF_N
            : ACTIVATION == SWIGLU ? plain_n + active_tile * HALF_N + block * active_n
                                   : plain_n + active_tile * TILE_N + block * HALF_N;
        for (int step = 0; step < steps; step++) {
          const u32 buffer = stage_buffers + stage * STAGE_BYTES;
          const u32 barrier = full_barriers + 8 * stage;
          // phase ^ 1: the first wait on a new barrier passes at once, as the stage is empty.
          barrier_wait(empty_barriers + 8 * stage, phase ^ 1);
          barrier_expect(barrier, STAGE_BYTES);
          tma_load(buffer, &x, step * TILE_K, x_row, barrier);
          tma_load_multicast(buffer + X_BYTES + block * HALF_BYTES, &codes, step * TILE_K,
                             codes_row, barrier);
          if (++stage == STAGES) { stage = 0; phase ^= 1; }
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int thread = threadIdx.x % WARPGROUP_THREADS;
    // Row and column of a thread's first two accumulators. A warp has 16 rows; a thread has rows
    // row and row + 8, and two adjacent columns of every eight. Source: PTX ISA, wgmma, figure
    // "D fragment layout for .m64nNk32".
    const int row = thread / 32 * 16 + thread % 32 / 4, pair = thread % 4 * 2;
    const u32 out_tile = out_tiles + warpgroup * OUT_TILES * OUT_TILE_BYTES;
    const u32 bf16_address = out_tile + swizzled_offset(row, pair * 2);
    const u32 e4m3_address = out_tile + swizzled_offset(row, pair);
    Scales scales = {x_scale, codes_scale, bias, n - 2};
    Sum acc[128];  // [column / 8][row / 8 % 2][column % 2]
    for (int tile_id = first_tile_id; tile_id < scheduler.num_tiles(); tile_id += num_clusters) {
      for (int step = 0; step < steps; step++) {
        barrier_wait(full_barriers + 8 * stage, phase);
        const u32 buffer = stage_buffers + stage * STAGE_BYTES;
        const u64 a_desc = descriptor(buffer + warpgroup * WARPGROUP_M * TILE_K);
        const u64 b_desc = descriptor(buffer + X_BYTES);
        wgmma_fence();
        // A slice of 32 bytes along k is two units of 16 bytes. The hardware applies the swizzle
        // to the final address, so advancing the start of the descriptor is enough.
#pragma unroll
        for (int k_slice = 0; k_slice < TILE_K / 32; k_slice++) {
          wgmma(acc, a_desc + k_slice * 2, b_desc + k_slice * 2, step | k_slice);
        }
        wgmma_commit();
        // Keep this step running and wait for the one before it, whose stage is then free.
        wgmma_wait<1>();
        if (step > 0 && thread < CLUSTER) {
          barrier_arrive_at(empty_barriers + 8 * ((stage + STAGES - 1) % STAGES), thread);
        }
        if (++stage == STAGES) { stage = 0; phase ^= 1; }
      }
      wgmma_wait<0>();
      if (thread < CLUSTER) {
        barrier_arrive_at(empty_barriers + 8 * ((stage + STAGES - 1) % STAGES), thread);
      }

      // The epilogue. Meanwhile the loader fills the stages for the next tile.
      const Tile tile = scheduler.tile(tile_id);
      const int first_row = (tile.row * CLUSTER + block) * TILE_M + warpgroup * WARPGROUP_M;
      const int active_tile = tile.column - plain_tiles;
      scales.load_rows(first_row + row, m);
      if (thread == 0) tma_store_wait_read<0>();
      warpgroup_sync(warpgroup);
      if (active_tile < 0) {
        const int first_column = tile.column * TILE_N;
        // 128 bytes of each row are 64 BF16 numbers, a quarter of the tile.
#pragma unroll
        for (int quarter = 0; quarter < 4; quarter++) {
          const int tile_offset = quarter % 2 * OUT_TILE_BYTES;
          if (quarter > 1) {  // reuse the output tile of two quarters ago
            if (thread == 0) tma_store_wait_read<1>();
            warpgroup_sync(warpgroup);
          }
#pragma unroll
          for (int column_group = 0; column_group < 8; column_group++) {
            float y[4];
            scales.apply(acc + quarter * 32 + column_group * 4,
                         first_column + quarter * 64 + column_group * 8 + pair, 1.f, y);
            const u32 to = swizzle_advance(bf16_address + tile_offset, column_group);
            // 1024 bytes further is the row eight below, with the same swizzle.
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(bf16x2(y[0], y[1])));
            asm volatile("st.shared.b32 [%0 + 1024], %1;" ::"r"(to), "r"(bf16x2(y[2], y[3])));
          }
          fence_async_proxy();
          warpgroup_sync(warpgroup);
          if (thread == 0) {
            tma_store(&out, first_column + quarter * 64, first_row, out_tile + tile_offset);
          }
        }
      } else if constexpr (ACTIVATION != NONE) {
        const int first_column = active_tile * ACTIVE_TILE_N;
        const float inverse = *inverse_scale;
        // 128 bytes of each row are 128 e4m3 numbers, half of the tile.
#pragma unroll
        for (int half = 0; half < ACTIVE_TILE_N / HALF_N; half++) {
          const int tile_offset = half * OUT_TILE_BYTES;
#pragma unroll
          for (int column_group = 0; column_group < 16; column_group++) {
            const int column = plain_n + first_column + half * HALF_N + column_group * 8 + pair;
            float y[4], z[4];
            if constexpr (ACTIVATION == SWIGLU) {
              // The first 64 accumulators are the gate, the other 64 the same columns of up.
              float up[4];
              scales.apply(acc + column_group * 4, column, 0.5f, y);
              scales.apply(acc + 64 + column_group * 4, column + active_n, inverse, up);
#pragma unroll
              for (int i = 0; i < 4; i++) z[i] = silu_of_half(y[i]) * up[i];
            } else {
              scales.apply(acc + half * 64 + column_group * 4, column, 1.f, y);
#pragma unroll
              for (int i = 0; i < 4; i++) z[i] = gelu(y[i], inverse);
            }
            // Two groups of eight columns share a chunk of 16 bytes.
            const u32 to = swizzle_advance(e4m3_address + tile_offset, column_group / 2) +
                           column_group % 2 * 8;
            asm volatile("st.shared.b16 [%0], %1;" ::"r"(to), "h"(e4m3x2(z[0], z[1])));
            asm volatile("st.shared.b16 [%0 + 1024], %1;" ::"r"(to), "h"(e4m3x2(z[2], z[3])));
          }
          fence_async_proxy();
          warpgroup_sync(warpgroup);
          if (thread == 0) {
            tma_store(&quantized, first_column + half * HALF_N, first_row, out_tile + tile_offset);
          }
        }
      }
    }
    if (thread == 0) tma_store_wait_read<0>();
  }
  cluster_sync();  // a block must not exit while the other may still write to its shared memory
}
