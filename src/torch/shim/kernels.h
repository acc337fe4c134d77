// Loops over raw memory that do in one pass what LibTorch's operations do in several, on a CPU.
//
// kernels.cpp is compiled once for each Level of instructions, and kernels() in fused.cpp takes the highest that the
// machine has. All levels give the same bits: additions are split over 16 lanes at each of them, in one order, and
// products are never fused with additions. No result depends on the number of threads, because each row is computed by
// itself.
//
// Numbers are fp32 or bf16 in memory and fp32 in between; a result is rounded once.
#pragma once

#include <cstdint>

namespace trainer {

enum class Type : int32_t { kFloat, kBFloat16 };

enum class Activation : int32_t { kSilu, kGeluTanh };

// A run of rows: `first` is the first row's first element, `stride` elements lie between two rows.
struct Rows {
  void* first;
  int64_t stride;
};

// Places of the heads `[batch, tokens, heads, head]`: elements between two of each; the last extent is contiguous.
struct Heads {
  void* first;
  int64_t batch, token, head;
};

// Cosines and sines of each token, fp32 `width` in a row: elements between two sequences (0: all have the same) and
// between two tokens.
struct Turns {
  const float* cos;
  const float* sin;
  int64_t batch, token;
};

struct RotaryExtents {
  int64_t tokens, heads, head, width;
};

struct Kernels {
  // y = x · scale · weight in each row, where scale = 1 / sqrt(mean(x²) + eps), which is stored.
  void (*rms_norm)(
      Type type, Rows x, const float* weight, float eps, Rows y, float* scales, int64_t begin, int64_t end,
      int64_t width);
  // The gradient with respect to x goes to `dx`, that with respect to the weight is added to `sums`; either may be
  // missing (null).
  void (*rms_norm_backward)(
      Type type, Rows x, const float* weight, const float* scales, Rows dy, Rows dx, float* sums, int64_t begin,
      int64_t end, int64_t width);
  // total[i] = the sum of parts[k][i], in the order of k.
  void (*add_up)(const float* parts, int64_t count, int64_t width, float* total);
  // Turns the first `width` elements of each head and copies the others; `inverse` is the transposed turn. Tokens of
  // all sequences are counted in a row.
  void (*rotate)(
      Type type, Heads x, Turns turns, Heads y, RotaryExtents extents, bool inverse, int64_t begin, int64_t end);
  // y = act(gate) · up.
  void (*gate)(
      Type type, Activation act, Rows gate, Rows up, Rows y, int64_t begin, int64_t end, int64_t width);
  void (*gate_backward)(
      Type type, Activation act, Rows gate, Rows up, Rows dy, Rows dgate, Rows dup, int64_t begin, int64_t end,
      int64_t width);
  // losses[row] = -log softmax(scores)[target]. With `gradient` the scores are replaced by softmax - one-hot.
  void (*cross_entropy)(
      Type type, Rows scores, const int64_t* targets, float* losses, bool gradient, int64_t begin, int64_t end,
      int64_t width);
};

} // namespace trainer
