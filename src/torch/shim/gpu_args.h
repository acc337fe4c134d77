// What the kernels for GPUs (gpu.cu) are given, one structure each. This text is compiled twice: with the shim, which
// fills the structures in, and in front of gpu.cu, which reads them. So it includes nothing, and its fields are
// pointers, numbers of 64 bits, and at the end of a structure an fp32 number: both compilers lay them out alike.
//
// A stride is in elements. Rows lie `stride` elements apart, and the elements of a row beside each other.
#ifndef TRAINER_GPU_ARGS
#define TRAINER_GPU_ARGS

// Threads of a block, of every kernel.
#define TRAINER_THREADS 256
// Columns of a weight's gradient that a block adds up.
#define TRAINER_COLUMNS 32

typedef long long trainer_i64;

// A block for each row.
struct RmsNormArgs {
  const void* x;
  trainer_i64 x_stride;
  const float* weight;
  void* y;
  trainer_i64 y_stride;
  float* scales;
  trainer_i64 width;
  float eps;
};

// A block for each row.
struct RmsNormBackwardArgs {
  const void* x;
  trainer_i64 x_stride;
  const float* weight;
  const float* scales;
  const void* dy;
  trainer_i64 dy_stride;
  void* dx;
  trainer_i64 dx_stride;
  trainer_i64 width;
};

// A block for TRAINER_COLUMNS columns (x) of each part of the rows (y). `parts`: [parts, width].
struct RmsNormWeightArgs {
  const void* x;
  trainer_i64 x_stride;
  const float* scales;
  const void* dy;
  trainer_i64 dy_stride;
  float* parts;
  trainer_i64 rows;
  trainer_i64 width;
};

// A thread for each column.
struct AddUpArgs {
  const float* parts;
  trainer_i64 count;
  trainer_i64 width;
  float* total;
};

// A block for each token of each sequence. `inverse`: 1 for the transposed turn.
struct RotateArgs {
  const void* x;
  trainer_i64 x_batch, x_token, x_head;
  const float* cos;
  const float* sin;
  trainer_i64 turn_batch, turn_token;
  void* y;
  trainer_i64 y_batch, y_token, y_head;
  trainer_i64 tokens, heads, head, width;
  trainer_i64 inverse;
};

// A block for each row.
struct GateArgs {
  const void* gate;
  trainer_i64 gate_stride;
  const void* up;
  trainer_i64 up_stride;
  void* y;
  trainer_i64 y_stride;
  trainer_i64 width;
};

// A block for each row.
struct GateBackwardArgs {
  const void* gate;
  trainer_i64 gate_stride;
  const void* up;
  trainer_i64 up_stride;
  const void* dy;
  trainer_i64 dy_stride;
  void* dgate;
  trainer_i64 dgate_stride;
  void* dup;
  trainer_i64 dup_stride;
  trainer_i64 width;
};

// A block for each row. `targets`: 64-bit numbers. `gradient`: 1 if the scores become their gradients.
struct CrossEntropyArgs {
  void* scores;
  trainer_i64 stride;
  const trainer_i64* targets;
  float* losses;
  trainer_i64 gradient;
  trainer_i64 width;
};

#endif
