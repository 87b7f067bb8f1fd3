// Make the input of an INT8 GEMM: apply an activation, rotate groups of columns by a Hadamard
// matrix, and quantize each row, in one pass over memory.
//
// A block takes one row and keeps it in registers, because the scale needs the row's maximum.
// Sixteen threads take a span of 256 columns, 16 columns each, CHUNKS times. As a 16 x 16 matrix,
// thread t first holds column t of its span, and after a transposition in shared memory row t.
//
// The Hadamard matrix is a Kronecker power of a 4 x 4 matrix. So a rotation of 4^n columns is n
// steps, one for each digit of the column's number in base 4: two for the rows of the 16 x 16
// matrix and two for its columns.
//
// A byte of output leaves little time for arithmetic, so most of what follows saves instructions.
//
// Compile-time definitions, made by op.py: X_TYPE 0 BF16, 1 FP16, 2 FP32; ACTIVATION 0 none,
// 1 GELU, 2 SwiGLU; DIGITS 0 for no rotation, 2, 3 or 4 for groups of 16, 64 or 256 columns;
// PREFIX 1 if there is one; WHOLE_SPANS 1 if the columns are a multiple of 256; STATIC 1 for a
// given scale; CHUNKS.

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;
struct alignas(16) Float4 { float a, b, c, d; };
struct alignas(16) Codes { u32 words[4]; };
#if X_TYPE == 2
typedef float Element;
#else
typedef u16 Element;
#endif

constexpr int SPAN = 256, SIDE = 16, WARP = 32, MAX_WARPS = 32;
// Padding moves the second span of a warp to the other half of the 32 banks.
constexpr int SPAN_FLOATS = SPAN + SIDE;
constexpr float INT8_MAX = 127.f;
constexpr float NORM = DIGITS == 4 ? 1.f / 16 : DIGITS == 3 ? 1.f / 8 : DIGITS == 2 ? 1.f / 4 : 1.f;

#define DEVICE __device__ __forceinline__

DEVICE float to_float(Element x) {
#if X_TYPE == 0
  return __uint_as_float((u32)x << 16);  // a BF16 number is the upper half of a float
#elif X_TYPE == 1
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
#else
  return x;
#endif
}

// One instruction, with a relative error of 2^-11: INT8 keeps 2^-8.
DEVICE float tanh(float x) { float y; asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
constexpr float SQRT_2_OVER_PI = 0.79788456f;
DEVICE float gelu(float x) {  // the tanh approximation
  const float half = 0.5f * x;
  return half * tanh(x * (SQRT_2_OVER_PI + 0.044715f * SQRT_2_OVER_PI * (x * x))) + half;
}
// silu(x) = x * sigmoid(x) = x/2 * tanh(x/2) + x/2
DEVICE float silu(float x) { const float half = 0.5f * x; return half * tanh(half) + half; }

// The row as the GEMM reads it: `prefix_columns` of prefix, then the activation of x.
struct Row {
  const Element *prefix, *x;
  int prefix_columns, columns;

  DEVICE float at(int column) const {
    if (!WHOLE_SPANS && column >= columns) return 0.f;
    if (PREFIX && column < prefix_columns) return to_float(prefix[column]);
    const int active = PREFIX ? column - prefix_columns : column;
    const float y = to_float(x[active]);
    if (ACTIVATION == 1) return gelu(y);
    if (ACTIVATION == 2) return silu(y) * to_float(x[columns - prefix_columns + active]);
    return y;
  }
};

// Multiply the numbers that differ in one digit of their index, which counts STRIDE, by the 4 x 4
// matrix: all +1 but the antidiagonal (regular), or Sylvester's.
template <int STRIDE> DEVICE void rotate(float (&v)[SIDE], bool regular) {
#pragma unroll
  for (int i = 0; i < SIDE; i++) {
    if (i / STRIDE % 4 != 0) continue;
    float &a = v[i], &b = v[i + STRIDE], &c = v[i + 2 * STRIDE], &d = v[i + 3 * STRIDE];
    const float ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
    if (regular) {
      a = ab + c_d, b = ab - c_d, c = cd + a_b, d = cd - a_b;
    } else {
      a = ab + cd, b = a_b + c_d, c = ab - cd, d = a_b - c_d;
    }
  }
}

// Turn columns into rows: thread t gives v[r] of row r and column t, and gets row t. A thread reads
// 16 bytes at a time; the exclusive or spreads the reads of eight threads over all banks.
DEVICE void transpose(float (&v)[SIDE], float* span, int t) {
#pragma unroll
  for (int r = 0; r < SIDE; r++) span[r * SIDE + (((t >> 2) ^ (r >> 1 & 3)) << 2 | (t & 3))] = v[r];
  __syncwarp();
#pragma unroll
  for (int quad = 0; quad < 4; quad++) {
    const Float4 four = *(const Float4*)(span + t * SIDE + ((quad ^ (t >> 1 & 3)) << 2));
    v[quad * 4] = four.a, v[quad * 4 + 1] = four.b, v[quad * 4 + 2] = four.c, v[quad * 4 + 3] = four.d;
  }
  __syncwarp();  // the next chunk writes to the same place
}

// Return the maximum over the block. Bits of floats without sign are in the order of the numbers,
// and NaN comes last: so one NaN or infinity shows in the scale, and in the whole output row.
DEVICE float block_maximum(u32 bits, u32* warps) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) {
    bits = max(bits, __shfl_xor_sync(0xFFFFFFFF, bits, step));
  }
  if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = bits;
  __syncthreads();
  const int num_warps = blockDim.x / WARP;
  for (int warp = 0; warp < num_warps; warp++) bits = max(bits, warps[warp]);
  return __uint_as_float(bits);
}

// Return the integers nearest to four numbers of [-128, 127], as bytes, ties to even. A float32 of
// 1.5 * 2^23 and more is an integer, whose last byte is that of x.
constexpr float ROUNDER = 12582912.f;
DEVICE u32 to_int8x4(const float* v, float inverse) {
  u32 bits[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float x = v[i] * inverse;
    if (STATIC) x = fminf(fmaxf(x, -INT8_MAX - 1.f), INT8_MAX);
    bits[i] = __float_as_uint(x + ROUNDER);
  }
  const u32 low = __byte_perm(bits[0], bits[1], 0x0040);
  return __byte_perm(low, __byte_perm(bits[2], bits[3], 0x0040), 0x5410);
}

extern "C" __global__ void __launch_bounds__(512) quantize_int8(
    const Element* x, const Element* prefix, const signed char* signs, const float* input_scale,
    signed char* codes, float* scale_out, int columns, int prefix_columns, int x_stride,
    int prefix_stride) {
  extern __shared__ Float4 memory[];
  __shared__ u32 warps[MAX_WARPS];
  const i64 row = blockIdx.x;
  const Row input = {prefix + row * prefix_stride, x + row * x_stride, prefix_columns, columns};
  const int t = threadIdx.x % SIDE, spans = blockDim.x / SIDE, first_span = threadIdx.x / SIDE;
  float* span_memory = (float*)memory + first_span * SPAN_FLOATS;
  const bool regular = DIGITS > 0 && signs[3] < 0;  // the last sign of the 4 x 4 matrix's first row

  float v[CHUNKS][SIDE];
  u32 largest = 0;
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    const int start = (chunk * spans + first_span) * SPAN;
    const bool inside = start < columns;
#pragma unroll
    for (int r = 0; r < SIDE; r++) v[chunk][r] = inside ? input.at(start + r * SIDE + t) : 0.f;
    if (DIGITS > 2) rotate<1>(v[chunk], regular);
    if (DIGITS > 3) rotate<4>(v[chunk], regular);
    transpose(v[chunk], span_memory, t);
    if (DIGITS > 0) {
      rotate<1>(v[chunk], regular);
      rotate<4>(v[chunk], regular);
    }
#pragma unroll
    for (int i = 0; i < SIDE; i++) {
      largest = max(largest, __float_as_uint(v[chunk][i]) & 0x7FFFFFFF);
    }
  }

  const float maximum = block_maximum(largest, warps) * NORM;
  // A row of zeros stays zero with any scale, and 0 / 0 would be NaN.
  float scale = maximum == 0.f ? 1.f : maximum / INT8_MAX;
  if (STATIC) scale = *input_scale;
  const float inverse = NORM / scale;
  if (threadIdx.x == 0) {
    // A static scale has no maximum in it, so a damaged row would look like a row of zeros.
    scale_out[row] = STATIC && !(maximum <= 3.4e38f) ? maximum - maximum : scale;
  }
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    const int column = (chunk * spans + first_span) * SPAN + t * SIDE;
    if (column >= columns) continue;
    Codes packed;
#pragma unroll
    for (int quad = 0; quad < 4; quad++) {
      packed.words[quad] = to_int8x4(v[chunk] + quad * 4, inverse);
    }
    *(Codes*)(codes + row * columns + column) = packed;
  }
}
