// Kernels for GPUs that do in one pass what LibTorch's operations do in several. gpu_args.h stands in front of this
// text; nvrtc.cpp compiles both when a worker starts, for the GPU that it has, and emulated.cpp runs them on a CPU.
//
// The arithmetic is that of kernels.cpp: numbers are fp32 or bf16 in memory and fp32 in between, and a result is
// rounded once. Sums are split over the threads of a block and added in a fixed order, without atomic operations: the
// same GPU gives the same bits each time.
//
// A kernel has up to four forms. `_wide` loads and stores 16 bytes at a time: it wants rows whose beginnings and widths
// are multiples of that. All threads of a block reach every barrier, and all lanes of a warp every exchange.

typedef unsigned short bf16;

__device__ inline float wide(float value) {
  return value;
}

__device__ inline float wide(bf16 value) {
  return __uint_as_float(static_cast<unsigned int>(value) << 16);
}

__device__ inline void narrow(float value, float* to) {
  *to = value;
}

// Rounded to the nearest, ties to even; a NaN stays one.
__device__ inline void narrow(float value, bf16* to) {
  const unsigned int bits = __float_as_uint(value);
  const unsigned int rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *to = static_cast<bf16>(value != value ? (bits >> 16) | 0x40u : rounded);
}

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

// Elements that are loaded at a time: 16 bytes at most.
template <class T, int N>
struct Most {
  static constexpr int count = N * static_cast<int>(sizeof(T)) > 16 ? 16 / static_cast<int>(sizeof(T)) : N;
};

// A GPU refuses a wide access that is not aligned, a CPU does not notice: the emulation looks.
#ifndef TRAINER_ALIGNED
#define TRAINER_ALIGNED(pointer, bytes)
#endif

template <int N, class T>
__device__ inline void load(const T* from, float (&to)[N]) {
  constexpr int kCount = Most<T, N>::count;
  TRAINER_ALIGNED(from, kCount * sizeof(T));
  for (int begin = 0; begin < N; begin += kCount) {
    const Pack<T, kCount> pack = *reinterpret_cast<const Pack<T, kCount>*>(from + begin);
    for (int i = 0; i < kCount; ++i) {
      to[begin + i] = wide(pack.at[i]);
    }
  }
}

template <int N, class T>
__device__ inline void store(T* to, const float (&from)[N]) {
  constexpr int kCount = Most<T, N>::count;
  TRAINER_ALIGNED(to, kCount * sizeof(T));
  for (int begin = 0; begin < N; begin += kCount) {
    Pack<T, kCount> pack;
    for (int i = 0; i < kCount; ++i) {
      narrow(from[begin + i], &pack.at[i]);
    }
    *reinterpret_cast<Pack<T, kCount>*>(to + begin) = pack;
  }
}

constexpr int kWarps = TRAINER_THREADS / 32;

// The sum over the threads of the block: every thread gets it.
__device__ inline float sum_of_block(float value) {
  __shared__ float parts[kWarps];
  for (int step = 16; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, step);
  }
  if (threadIdx.x % 32 == 0) {
    parts[threadIdx.x / 32] = value;
  }
  __syncthreads();
  float sum = parts[0];
  for (int warp = 1; warp < kWarps; ++warp) {
    sum += parts[warp];
  }
  // Before `parts` is written again.
  __syncthreads();
  return sum;
}

// The largest over the threads of the block. None of them is a NaN.
__device__ inline float largest_of_block(float value) {
  __shared__ float parts[kWarps];
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, value, step);
    value = other > value ? other : value;
  }
  if (threadIdx.x % 32 == 0) {
    parts[threadIdx.x / 32] = value;
  }
  __syncthreads();
  float most = parts[0];
  for (int warp = 1; warp < kWarps; ++warp) {
    most = parts[warp] > most ? parts[warp] : most;
  }
  __syncthreads();
  return most;
}

template <class T>
__device__ inline const T* row_of(const void* first, trainer_i64 stride, trainer_i64 row) {
  return static_cast<const T*>(first) + row * stride;
}

template <class T>
__device__ inline T* row_of(void* first, trainer_i64 stride, trainer_i64 row) {
  return static_cast<T*>(first) + row * stride;
}

// y = x · scale · weight in each row, where scale = 1 / sqrt(mean(x²) + eps), which is stored.
template <class T, int N>
__device__ inline void rms_norm(const RmsNormArgs& args) {
  const trainer_i64 row = blockIdx.x;
  const int width = static_cast<int>(args.width), begin = static_cast<int>(threadIdx.x) * N;
  const T* x = row_of<T>(args.x, args.x_stride, row);
  T* y = row_of<T>(args.y, args.y_stride, row);
  float squares = 0.0f;
  for (int at = begin; at < width; at += TRAINER_THREADS * N) {
    float values[N];
    load<N>(x + at, values);
    for (int i = 0; i < N; ++i) {
      squares += values[i] * values[i];
    }
  }
  const float scale = 1.0f / sqrtf(sum_of_block(squares) / static_cast<float>(width) + args.eps);
  if (threadIdx.x == 0) {
    args.scales[row] = scale;
  }
  for (int at = begin; at < width; at += TRAINER_THREADS * N) {
    float values[N], factors[N];
    load<N>(x + at, values);
    load<N>(args.weight + at, factors);
    for (int i = 0; i < N; ++i) {
      values[i] = values[i] * scale * factors[i];
    }
    store<N>(y + at, values);
  }
}

// The gradient with respect to x.
template <class T, int N>
__device__ inline void rms_norm_backward(const RmsNormBackwardArgs& args) {
  const trainer_i64 row = blockIdx.x;
  const int width = static_cast<int>(args.width), begin = static_cast<int>(threadIdx.x) * N;
  const T* x = row_of<T>(args.x, args.x_stride, row);
  const T* dy = row_of<T>(args.dy, args.dy_stride, row);
  T* dx = row_of<T>(args.dx, args.dx_stride, row);
  const float scale = args.scales[row];
  float products = 0.0f;
  for (int at = begin; at < width; at += TRAINER_THREADS * N) {
    float values[N], given[N], factors[N];
    load<N>(x + at, values);
    load<N>(dy + at, given);
    load<N>(args.weight + at, factors);
    for (int i = 0; i < N; ++i) {
      products += given[i] * factors[i] * values[i];
    }
  }
  const float common = sum_of_block(products) / static_cast<float>(width) * scale * scale;
  for (int at = begin; at < width; at += TRAINER_THREADS * N) {
    float values[N], given[N], factors[N];
    load<N>(x + at, values);
    load<N>(dy + at, given);
    load<N>(args.weight + at, factors);
    for (int i = 0; i < N; ++i) {
      values[i] = (given[i] * factors[i] - values[i] * common) * scale;
    }
    store<N>(dx + at, values);
  }
}

// The gradient with respect to the weight, of each part of the rows: parts[part][column].
template <class T, int N>
__device__ inline void rms_norm_weight(const RmsNormWeightArgs& args) {
  __shared__ float sums[kWarps][TRAINER_COLUMNS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const trainer_i64 column = static_cast<trainer_i64>(blockIdx.x) * TRAINER_COLUMNS + lane;
  const trainer_i64 part = blockIdx.y, parts = gridDim.y;
  const trainer_i64 end = (part + 1) * args.rows / parts;
  float sum = 0.0f;
  if (column < args.width) {
    for (trainer_i64 row = part * args.rows / parts + warp; row < end; row += kWarps) {
      const float given = wide(row_of<T>(args.dy, args.dy_stride, row)[column]);
      sum += given * (wide(row_of<T>(args.x, args.x_stride, row)[column]) * args.scales[row]);
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && column < args.width) {
    for (int other = 1; other < kWarps; ++other) {
      sum += sums[other][lane];
    }
    args.parts[part * args.width + column] = sum;
  }
}

// total[i] = the sum of parts[k][i], in the order of k.
template <class T, int N>
__device__ inline void add_up(const AddUpArgs& args) {
  const trainer_i64 column = static_cast<trainer_i64>(blockIdx.x) * TRAINER_THREADS + threadIdx.x;
  if (column < args.width) {
    float sum = 0.0f;
    for (trainer_i64 part = 0; part < args.count; ++part) {
      sum += args.parts[part * args.width + column];
    }
    args.total[column] = sum;
  }
}

// Turns the first `width` elements of each head and copies the others.
template <class T, int N>
__device__ inline void rotate(const RotateArgs& args) {
  const trainer_i64 sequence = blockIdx.x / args.tokens, place = blockIdx.x % args.tokens;
  const T* x = static_cast<const T*>(args.x) + sequence * args.x_batch + place * args.x_token;
  T* y = static_cast<T*>(args.y) + sequence * args.y_batch + place * args.y_token;
  const float* cos = args.cos + sequence * args.turn_batch + place * args.turn_token;
  const float* sin = args.sin + sequence * args.turn_batch + place * args.turn_token;
  const int half = static_cast<int>(args.width) / 2, packs = half / N;
  const int count = static_cast<int>(args.heads) * packs;
  for (int item = static_cast<int>(threadIdx.x); item < count; item += TRAINER_THREADS) {
    const int head = item / packs, at = item % packs * N;
    const T* from = x + head * args.x_head + at;
    T* to = y + head * args.y_head + at;
    float low[N], high[N], cos_low[N], cos_high[N], sin_low[N], sin_high[N];
    load<N>(from, low);
    load<N>(from + half, high);
    load<N>(cos + at, cos_low);
    load<N>(cos + half + at, cos_high);
    load<N>(sin + at, sin_low);
    load<N>(sin + half + at, sin_high);
    for (int i = 0; i < N; ++i) {
      const float first = low[i], second = high[i];
      low[i] = first * cos_low[i] + second * (args.inverse != 0 ? sin_high[i] : sin_low[i]);
      high[i] = second * cos_high[i] + first * (args.inverse != 0 ? sin_low[i] : sin_high[i]);
    }
    store<N>(to, low);
    store<N>(to + half, high);
  }
  const int kept = static_cast<int>(args.head - args.width);
  for (int item = static_cast<int>(threadIdx.x); item < static_cast<int>(args.heads) * kept; item += TRAINER_THREADS) {
    const int head = item / kept;
    const trainer_i64 at = args.width + item % kept;
    y[head * args.y_head + at] = x[head * args.x_head + at];
  }
}

struct Silu {
  // act(g), and its derivative.
  static __device__ inline float of(float g, float* slope) {
    const float sigmoid = 1.0f / (1.0f + expf(-g));
    *slope = sigmoid * (1.0f + g * (1.0f - sigmoid));
    return g * sigmoid;
  }
};

struct GeluTanh {
  // g · (1 + tanh(u)) / 2 = g · sigmoid(2u), with u = sqrt(2/π) · (g + 0.044715 · g³).
  static __device__ inline float of(float g, float* slope) {
    const float square = g * g;
    const float inner = g * (1.59576912160573071f + 0.0713548162726008f * square);
    const float sigmoid = 1.0f / (1.0f + expf(-inner));
    *slope = sigmoid + g * sigmoid * (1.0f - sigmoid) * (1.59576912160573071f + 0.214064448817802f * square);
    return g * sigmoid;
  }
};

// y = act(gate) · up.
template <class Act, class T, int N>
__device__ inline void gate(const GateArgs& args) {
  const trainer_i64 row = blockIdx.x;
  const int width = static_cast<int>(args.width);
  const T* gates = row_of<T>(args.gate, args.gate_stride, row);
  const T* ups = row_of<T>(args.up, args.up_stride, row);
  T* y = row_of<T>(args.y, args.y_stride, row);
  for (int at = static_cast<int>(threadIdx.x) * N; at < width; at += TRAINER_THREADS * N) {
    float g[N], u[N], slope;
    load<N>(gates + at, g);
    load<N>(ups + at, u);
    for (int i = 0; i < N; ++i) {
      g[i] = Act::of(g[i], &slope) * u[i];
    }
    store<N>(y + at, g);
  }
}

template <class Act, class T, int N>
__device__ inline void gate_backward(const GateBackwardArgs& args) {
  const trainer_i64 row = blockIdx.x;
  const int width = static_cast<int>(args.width);
  const T* gates = row_of<T>(args.gate, args.gate_stride, row);
  const T* ups = row_of<T>(args.up, args.up_stride, row);
  const T* dy = row_of<T>(args.dy, args.dy_stride, row);
  T* dgates = row_of<T>(args.dgate, args.dgate_stride, row);
  T* dups = row_of<T>(args.dup, args.dup_stride, row);
  for (int at = static_cast<int>(threadIdx.x) * N; at < width; at += TRAINER_THREADS * N) {
    float g[N], u[N], given[N];
    load<N>(gates + at, g);
    load<N>(ups + at, u);
    load<N>(dy + at, given);
    for (int i = 0; i < N; ++i) {
      float slope;
      const float act = Act::of(g[i], &slope);
      g[i] = given[i] * u[i] * slope;
      u[i] = given[i] * act;
    }
    store<N>(dgates + at, g);
    store<N>(dups + at, u);
  }
}

// losses[row] = -log softmax(scores)[target]. With `gradient` the scores are replaced by softmax - one-hot. One pass
// finds the largest score and the sum of the exponentials, corrected whenever a larger score is met; a second one
// writes the gradient. A target outside the row has NaNs for its loss and gradient: a step with such a loss is refused.
template <class T, int N>
__device__ inline void cross_entropy(const CrossEntropyArgs& args) {
  const trainer_i64 row = blockIdx.x;
  const int width = static_cast<int>(args.width), begin = static_cast<int>(threadIdx.x) * N;
  T* scores = row_of<T>(args.scores, args.stride, row);
  const trainer_i64 target = args.targets[row];
  const bool known = target >= 0 && target < args.width;
  // Each thread reads it before any thread writes: barriers lie in between.
  const float wanted = known ? wide(scores[target]) : __uint_as_float(0x7fc00000u);
  // The lowest finite number, so that no difference of infinities is a NaN.
  float most = -3.402823466e+38f, total = 0.0f;
  for (int at = begin; at < width; at += TRAINER_THREADS * N) {
    float values[N];
    load<N>(scores + at, values);
    float higher = most;
    for (int i = 0; i < N; ++i) {
      higher = values[i] > higher ? values[i] : higher;
    }
    total *= expf(most - higher);
    most = higher;
    for (int i = 0; i < N; ++i) {
      total += expf(values[i] - most);
    }
  }
  const float top = largest_of_block(most);
  total = sum_of_block(total * expf(most - top));
  if (threadIdx.x == 0) {
    args.losses[row] = logf(total) + (top - wanted);
  }
  if (args.gradient != 0) {
    const float factor = known ? 1.0f / total : wanted;
    for (int at = begin; at < width; at += TRAINER_THREADS * N) {
      float values[N];
      load<N>(scores + at, values);
      for (int i = 0; i < N; ++i) {
        values[i] = expf(values[i] - top) * factor - (at + i == target ? 1.0f : 0.0f);
      }
      store<N>(scores + at, values);
    }
  }
}

// The kernels by their names: see launch.cpp.
#define TRAINER_KERNEL(name, Args, ...) \
  TRAINER_GLOBAL void name(const Args args) { \
    __VA_ARGS__(args); \
  }
#define TRAINER_KERNELS(name, Args, ...) \
  TRAINER_KERNEL(name##_f32, Args, __VA_ARGS__ float, 1>) \
  TRAINER_KERNEL(name##_f32_wide, Args, __VA_ARGS__ float, 4>) \
  TRAINER_KERNEL(name##_bf16, Args, __VA_ARGS__ bf16, 1>) \
  TRAINER_KERNEL(name##_bf16_wide, Args, __VA_ARGS__ bf16, 8>)

#ifndef TRAINER_GLOBAL
#define TRAINER_GLOBAL extern "C" __global__ __launch_bounds__(TRAINER_THREADS)
#endif

TRAINER_KERNELS(rms_norm, RmsNormArgs, rms_norm<)
TRAINER_KERNELS(rms_norm_backward, RmsNormBackwardArgs, rms_norm_backward<)
TRAINER_KERNEL(rms_norm_weight_f32, RmsNormWeightArgs, rms_norm_weight<float, 1>)
TRAINER_KERNEL(rms_norm_weight_bf16, RmsNormWeightArgs, rms_norm_weight<bf16, 1>)
TRAINER_KERNEL(add_up_f32, AddUpArgs, add_up<float, 1>)
TRAINER_KERNELS(rotate, RotateArgs, rotate<)
TRAINER_KERNELS(silu, GateArgs, gate<Silu,)
TRAINER_KERNELS(silu_backward, GateBackwardArgs, gate_backward<Silu,)
TRAINER_KERNELS(gelu, GateArgs, gate<GeluTanh,)
TRAINER_KERNELS(gelu_backward, GateBackwardArgs, gate_backward<GeluTanh,)
TRAINER_KERNELS(cross_entropy, CrossEntropyArgs, cross_entropy<)
