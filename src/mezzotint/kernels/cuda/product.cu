// FP8 times FP8 on Hopper's tensor cores: x [m, k] and codes [rows, k], both e4m3 with k dense.
//
// The first columns of the result, one for each of the first `plain` rows of codes, are written as BF16; the others go
// through an activation and are rounded to e4m3, as the next product reads them.
//
// A cluster of two blocks computes 256 x 256 numbers at a time, each block 128 rows of them. Per step along k every
// block fetches its own rows of x and half of the rows of codes, which the copy engine writes into both blocks. One
// warp group of a block fetches, STAGES steps ahead, the two others multiply 64 rows each. Blocks stay and take one
// tile after another.
//
// Defined by whoever compiles this: ACTIVATION 0 none, 1 GELU, 2 SwiGLU; X_BY_ROW and CODES_BY_ROW 1 if these have a
// scale for each row, 0 if one for all; BIAS 1 if there is one.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
struct alignas(64) TensorMap { unsigned char bytes[128]; };  // CUtensorMap
struct alignas(8) Two { float x, y; };

constexpr int CLUSTER = 2, WORKERS = 2, GROUP_THREADS = 128;
constexpr int ROWS = 128, HALF = 128, COLUMNS = 2 * HALF, DEPTH = 128, STAGES = 4;
constexpr int WORKER_ROWS = ROWS / WORKERS;
constexpr int X_BYTES = ROWS * DEPTH, HALF_BYTES = HALF * DEPTH, STAGE_BYTES = X_BYTES + 2 * HALF_BYTES;
constexpr int SLAB_BYTES = WORKER_ROWS * 128, SLABS = 2;  // a slab is what one store takes: 128 bytes of each row
constexpr int ALIGNMENT = 1024;  // of what is swizzled by 128 bytes
constexpr int NONE = 0, SWIGLU = 2;

#define DEVICE __device__ __forceinline__

// Barriers in shared memory

DEVICE u32 shared(const void* at) { return (u32)__cvta_generic_to_shared(at); }
DEVICE void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nwait:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra wait;\n}"
      ::"r"(barrier), "r"(parity) : "memory");
}
// With the default scope: naming the cluster's makes every arrival wait for all of the GPU's memory.
DEVICE void barrier_arrive_at(u32 barrier, u32 block) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}"
      ::"r"(barrier), "r"(block) : "memory");
}
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE u32 block_in_cluster() { u32 block; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(block)); return block; }
DEVICE void group_sync(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

// The copy engine

DEVICE void fetch(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}
DEVICE void fetch_for_both(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;"
      ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier), "h"((u16)((1 << CLUSTER) - 1)) : "memory");
}
DEVICE void store(const TensorMap* map, int column, int row, u32 from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\ncp.async.bulk.commit_group;"
      ::"l"(map), "r"(column), "r"(row), "r"(from) : "memory");
}
template <int LEFT> DEVICE void stores_have_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory");
}
DEVICE void visible_to_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The tensor cores

DEVICE u64 descriptor(u32 at) {  // rows of 128 bytes, swizzled by 128 bytes, 1024 bytes from eight rows to the next
  return (u64)((at & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
DEVICE void multiply(float (&sum)[128], u64 x, u64 codes, int add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3 {@PLACES@}, %128, %129, add, 1, 1;\n}"
      : @SUMS@ : "l"(x), "l"(codes), "r"(add));
}
DEVICE void multiply_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> DEVICE void multiply_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Arithmetic

DEVICE u16 e4m3x2(float first, float second) {  // clamps to 448
  u16 both; asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(second), "f"(first)); return both;
}
DEVICE u32 bf16x2(float first, float second) {
  u32 both; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first)); return both;
}
DEVICE float tanh(float x) { float y; asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }  // to 5e-4
constexpr float SQRT_2_OVER_PI = 0.79788456f;
DEVICE float gelu(float x, float factor) {  // by tanh, times `factor`
  const float half = 0.5f * factor * x;
  return half * tanh(x * (SQRT_2_OVER_PI + 0.044715f * SQRT_2_OVER_PI * (x * x))) + half;
}
DEVICE float silu_of_twice(float half) { return half * tanh(half) + half; }

struct Tile { int row, column; };

// Tiles in the order that they are computed: `group` rows of them at a time, so that what is computed at once reads
// few different rows and columns.
struct Tiles {
  int rows, columns, group;
  DEVICE int count() const { return rows * columns; }
  DEVICE Tile at(int place) const {
    const int before = place / (group * columns) * group, size = min(rows - before, group);
    const int own = place - before * columns;
    return {before + own % size, own / size};
  }
};

DEVICE int divided_up(int a, int b) { return (a + b - 1) / b; }

struct Scales {
  const float *x, *codes;
  const u16* bias;
  int last;
  float of_row[2];  // this thread's and the eighth after it, as far as they are not of columns

  DEVICE void at(int row, int m) {
#pragma unroll
    for (int h = 0; h < 2; h++) of_row[h] = x[X_BY_ROW ? min(row + h * 8, m - 1) : 0] * (CODES_BY_ROW ? 1.f : *codes);
  }
  // Four sums, of columns `column` and the next in both rows, as real numbers times `factor`.
  DEVICE void apply(const float* sum, int column, float factor, float (&y)[4]) const {
    column = min(column, last);  // what lies beyond is not stored
    float added[2] = {0.f, 0.f}, of_column[2] = {factor, factor};
    if constexpr (BIAS) {
      const u32 two = *(const u32*)(bias + column);
      added[0] = __uint_as_float(two << 16) * factor;
      added[1] = __uint_as_float(two & 0xFFFF0000u) * factor;
    }
    if constexpr (CODES_BY_ROW) {
      const Two two = *(const Two*)(codes + column);
      of_column[0] = two.x * factor;
      of_column[1] = two.y * factor;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float scale = of_row[X_BY_ROW ? i / 2 : 0] * of_column[i % 2];
      y[i] = BIAS ? sum[i] * scale + added[i % 2] : sum[i] * scale;
    }
  }
};

// Where a byte of a row's first sixteen lies in a slab, and where so many sixteens further along the row: the copy
// engine swaps them by the row's last three bits. Eight rows further down is 1024 bytes further.
DEVICE u32 in_slab(int row, int byte) { return row * 128 + ((row & 7) << 4) + byte; }
DEVICE u32 further(u32 at, int sixteens) { return at ^ sixteens << 4; }

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__((WORKERS + 1) * GROUP_THREADS, 1) product(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap codes, const __grid_constant__ TensorMap out,
    const __grid_constant__ TensorMap rounded, const float* x_scale, const float* codes_scale, const u16* bias,
    const float* inverse, int m, int k, int rows, int plain, int group) {
  extern __shared__ unsigned char memory[];
  const u32 stages = (shared(memory) + ALIGNMENT - 1) & ~(ALIGNMENT - 1);
  const u32 slabs = stages + STAGES * STAGE_BYTES;
  const u32 full = slabs + WORKERS * SLABS * SLAB_BYTES, empty = full + 8 * STAGES;
  const int warpgroup = threadIdx.x / GROUP_THREADS, block = block_in_cluster();

  constexpr int STRIDE = ACTIVATION == SWIGLU ? HALF : COLUMNS;  // columns of a tile behind the activation
  const int active = ACTIVATION == SWIGLU ? (rows - plain) / 2 : rows - plain;
  const int plain_columns = divided_up(plain, COLUMNS);
  const Tiles tiles = {divided_up(m, ROWS * CLUSTER), plain_columns + divided_up(active, STRIDE), group};
  const int steps = divided_up(k, DEPTH), first_place = blockIdx.x / CLUSTER, places = gridDim.x / CLUSTER;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, WORKERS * CLUSTER);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();

  int stage = 0, phase = 0;
  if (warpgroup == WORKERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == WORKERS * GROUP_THREADS) {
      for (int place = first_place; place < tiles.count(); place += places) {
        const Tile tile = tiles.at(place);
        const int x_row = (tile.row * CLUSTER + block) * ROWS, behind = tile.column - plain_columns;
        const int codes_row = behind < 0              ? tile.column * COLUMNS + block * HALF
                              : ACTIVATION == SWIGLU ? plain + behind * HALF + block * active
                                                     : plain + behind * COLUMNS + block * HALF;
        for (int step = 0; step < steps; step++) {
          const u32 at = stages + stage * STAGE_BYTES, barrier = full + 8 * stage;
          barrier_wait(empty + 8 * stage, phase ^ 1);
          barrier_expect(barrier, STAGE_BYTES);
          fetch(at, &x, step * DEPTH, x_row, barrier);
          fetch_for_both(at + X_BYTES + block * HALF_BYTES, &codes, step * DEPTH, codes_row, barrier);
          if (++stage == STAGES) { stage = 0; phase ^= 1; }
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int thread = threadIdx.x % GROUP_THREADS;
    const int row = thread / 32 * 16 + thread % 32 / 4, pair = thread % 4 * 2;  // of a thread's first two sums
    const u32 slab = slabs + warpgroup * SLABS * SLAB_BYTES;
    const u32 at_bf16 = slab + in_slab(row, pair * 2), at_e4m3 = slab + in_slab(row, pair);
    Scales scales = {x_scale, codes_scale, bias, rows - 2};
    float sum[128];  // [column / 8][row / 8 % 2][column % 2]
    for (int place = first_place; place < tiles.count(); place += places) {
      for (int step = 0; step < steps; step++) {
        barrier_wait(full + 8 * stage, phase);
        const u32 at = stages + stage * STAGE_BYTES;
        const u64 own = descriptor(at + warpgroup * WORKER_ROWS * DEPTH), all = descriptor(at + X_BYTES);
        multiply_begin();
#pragma unroll
        for (int part = 0; part < DEPTH / 32; part++) multiply(sum, own + part * 2, all + part * 2, step | part);
        multiply_commit();
        multiply_wait<1>();
        if (step > 0 && thread < CLUSTER) barrier_arrive_at(empty + 8 * ((stage + STAGES - 1) % STAGES), thread);
        if (++stage == STAGES) { stage = 0; phase ^= 1; }
      }
      multiply_wait<0>();
      if (thread < CLUSTER) barrier_arrive_at(empty + 8 * ((stage + STAGES - 1) % STAGES), thread);

      const Tile tile = tiles.at(place);
      const int first_row = (tile.row * CLUSTER + block) * ROWS + warpgroup * WORKER_ROWS;
      const int behind = tile.column - plain_columns;
      scales.at(first_row + row, m);
      if (thread == 0) stores_have_read<0>();
      group_sync(warpgroup);
      if (behind < 0) {
        const int first = tile.column * COLUMNS;
#pragma unroll
        for (int quarter = 0; quarter < 4; quarter++) {
          const int in = quarter % 2 * SLAB_BYTES;
          if (quarter > 1) {
            if (thread == 0) stores_have_read<1>();
            group_sync(warpgroup);
          }
#pragma unroll
          for (int eight = 0; eight < 8; eight++) {
            float y[4];
            scales.apply(sum + quarter * 32 + eight * 4, first + quarter * 64 + eight * 8 + pair, 1.f, y);
            const u32 to = further(at_bf16 + in, eight);
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(bf16x2(y[0], y[1])));
            asm volatile("st.shared.b32 [%0 + 1024], %1;" ::"r"(to), "r"(bf16x2(y[2], y[3])));
          }
          visible_to_stores();
          group_sync(warpgroup);
          if (thread == 0) store(&out, first + quarter * 64, first_row, slab + in);
        }
      } else if constexpr (ACTIVATION != NONE) {
        const int first = behind * STRIDE;
        const float by = *inverse;
#pragma unroll
        for (int half = 0; half < STRIDE / HALF; half++) {
          const int in = half * SLAB_BYTES;
#pragma unroll
          for (int eight = 0; eight < 16; eight++) {
            const int column = plain + first + half * HALF + eight * 8 + pair;
            float y[4], z[4];
            if constexpr (ACTIVATION == SWIGLU) {
              float up[4];
              scales.apply(sum + eight * 4, column, 0.5f, y);
              scales.apply(sum + 64 + eight * 4, column + active, by, up);
#pragma unroll
              for (int i = 0; i < 4; i++) z[i] = silu_of_twice(y[i]) * up[i];
            } else {
              scales.apply(sum + half * 64 + eight * 4, column, 1.f, y);
#pragma unroll
              for (int i = 0; i < 4; i++) z[i] = gelu(y[i], by);
            }
            const u32 to = further(at_e4m3 + in, eight / 2) + eight % 2 * 8;
            asm volatile("st.shared.b16 [%0], %1;" ::"r"(to), "h"(e4m3x2(z[0], z[1])));
            asm volatile("st.shared.b16 [%0 + 1024], %1;" ::"r"(to), "h"(e4m3x2(z[2], z[3])));
          }
          visible_to_stores();
          group_sync(warpgroup);
          if (thread == 0) store(&rounded, first + half * HALF, first_row, slab + in);
        }
      }
    }
    if (thread == 0) stores_have_read<0>();
  }
  cluster_sync();  // neither block leaves while the other may write into it
}
