// See kernels.h. Compiled several times, with KERNELS as the name of the table; it includes nothing that has functions,
// so that no code for one machine is linked into another's.
#include "kernels.h"

// Vectors of 64 bytes are split where a machine has shorter ones; they never cross a function that is not inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

#define INLINE inline __attribute__((always_inline))

namespace trainer {
namespace {

constexpr int64_t kLanes = 16;
typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));

using bf16 = uint16_t;

INLINE V all(float value) {
  return V{} + value;
}

INLINE V load(const float* from) {
  V values;
  __builtin_memcpy(&values, from, sizeof values);
  return values;
}

INLINE V load(const bf16* from) {
  H half;
  __builtin_memcpy(&half, from, sizeof half);
  return (V)(__builtin_convertvector(half, U) << 16);
}

INLINE void store(float* to, V values) {
  __builtin_memcpy(to, &values, sizeof values);
}

// Rounded to the nearest, ties to even; a NaN stays one.
INLINE void store(bf16* to, V values) {
  const U bits = (U)values;
  const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U nan = (bits >> 16) | 0x40;
  const H half = __builtin_convertvector(values != values ? nan : rounded, H);
  __builtin_memcpy(to, &half, sizeof half);
}

// `count` elements, fewer than there are lanes; the other lanes have `rest`.
template <class T>
INLINE V load(const T* from, int64_t count, float rest) {
  float values[kLanes];
  store(values, all(rest));
  T some[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    some[i] = from[i];
  }
  const V loaded = load(some);
  for (int64_t i = 0; i < count; ++i) {
    values[i] = loaded[i];
  }
  return load(values);
}

template <class T>
INLINE void store(T* to, V values, int64_t count) {
  T some[kLanes];
  store(some, values);
  for (int64_t i = 0; i < count; ++i) {
    to[i] = some[i];
  }
}

// The lanes of `x` and `y` at `at`: a full vector, or the rest of a row.
struct Full {
  template <class T>
  INLINE V get(const T* from, float = 0) const {
    return load(from);
  }
  template <class T>
  INLINE void put(T* to, V values) const {
    store(to, values);
  }
};

struct Rest {
  int64_t count;
  template <class T>
  INLINE V get(const T* from, float rest = 0) const {
    return load(from, count, rest);
  }
  template <class T>
  INLINE void put(T* to, V values) const {
    store(to, values, count);
  }
};

// `body(place, lanes)` for all of a row of `width` elements.
template <class Body>
INLINE void along(int64_t width, const Body& body) {
  int64_t at = 0;
  for (; at + kLanes <= width; at += kLanes) {
    body(at, Full{});
  }
  if (at < width) {
    body(at, Rest{width - at});
  }
}

#define LOOP __attribute__((always_inline))

// In a fixed order.
INLINE float sum(V lanes) {
  float values[kLanes];
  store(values, lanes);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      values[i] += values[i + half];
    }
  }
  return values[0];
}

INLINE float largest(V lanes) {
  float values[kLanes];
  store(values, lanes);
  for (int64_t i = 1; i < kLanes; ++i) {
    values[0] = values[i] > values[0] ? values[i] : values[0];
  }
  return values[0];
}

// e^x within 2 units of the last place for x from -87 to 88; beyond, what it is at these ends, which is next to nothing
// or next to infinity wherever it is used. A NaN stays one. The powers of 2 are taken off x in two parts, the first of
// which has few enough bits for exact products; the rest is in [-0.35, 0.35], where the polynomial is the Cephes
// library's for single precision (S. Moshier).
INLINE V exp(V x) {
  V inside = x < -87.0f ? all(-87.0f) : x;
  inside = inside > 88.0f ? all(88.0f) : inside;
  // Adding 1.5 · 2^23 rounds to a whole number, which is then in the lowest bits.
  const V shifted = inside * 1.44269504088896341f + 12582912.0f;
  const V power = shifted - 12582912.0f;
  const V rest = (inside - power * 0.693359375f) - power * -2.12194440e-4f;
  V y = all(1.9875691500e-4f);
  y = y * rest + 1.3981999507e-3f;
  y = y * rest + 8.3334519073e-3f;
  y = y * rest + 4.1665795894e-2f;
  y = y * rest + 1.6666665459e-1f;
  y = y * rest + 5.0000001201e-1f;
  y = (y * (rest * rest) + rest) + 1.0f;
  // Times 2^power: no sum of exponents leaves the range of normal numbers.
  y = (V)((U)y + ((U)shifted << 23));
  return x == x ? y : x;
}

template <class T>
INLINE T* row(Rows rows, int64_t index) {
  return static_cast<T*>(rows.first) + index * rows.stride;
}

// body(T{}) for the type of the elements.
template <class Body>
INLINE void typed(Type type, const Body& body) {
  if (type == Type::kFloat) {
    body(float{});
  } else {
    body(bf16{});
  }
}

void rms_norm(
    Type type, Rows x, const float* weight, float eps, Rows y, float* scales, int64_t begin, int64_t end,
    int64_t width) {
  typed(type, [&](auto of) LOOP {
    using T = decltype(of);
    for (int64_t r = begin; r < end; ++r) {
      const T* from = row<const T>(x, r);
      T* to = row<T>(y, r);
      V squares{};
      along(width, [&](int64_t at, auto lanes) LOOP {
        const V values = lanes.get(from + at);
        squares += values * values;
      });
      const float scale = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(width) + eps);
      scales[r] = scale;
      along(width, [&](int64_t at, auto lanes) LOOP {
        lanes.put(to + at, lanes.get(from + at) * scale * lanes.get(weight + at));
      });
    }
  });
}

void rms_norm_backward(
    Type type, Rows x, const float* weight, const float* scales, Rows dy, Rows dx, float* sums, int64_t begin,
    int64_t end, int64_t width) {
  typed(type, [&](auto of) LOOP {
    using T = decltype(of);
    for (int64_t r = begin; r < end; ++r) {
      const T* values = row<const T>(x, r);
      const T* given = row<const T>(dy, r);
      const float scale = scales[r];
      if (sums != nullptr) {
        along(width, [&](int64_t at, auto lanes) LOOP {
          const V added = lanes.get(given + at) * (lanes.get(values + at) * scale);
          lanes.put(sums + at, lanes.get(sums + at) + added);
        });
      }
      if (dx.first != nullptr) {
        V products{};
        along(width, [&](int64_t at, auto lanes) LOOP {
          products += lanes.get(given + at) * lanes.get(weight + at) * lanes.get(values + at);
        });
        const float common = sum(products) / static_cast<float>(width) * scale * scale;
        T* to = row<T>(dx, r);
        along(width, [&](int64_t at, auto lanes) LOOP {
          const V direct = lanes.get(given + at) * lanes.get(weight + at);
          lanes.put(to + at, (direct - lanes.get(values + at) * common) * scale);
        });
      }
    }
  });
}

void add_up(const float* parts, int64_t count, int64_t width, float* total) {
  along(width, [&](int64_t at, auto lanes) LOOP {
    V all_of{};
    for (int64_t k = 0; k < count; ++k) {
      all_of += lanes.get(parts + k * width + at);
    }
    lanes.put(total + at, all_of);
  });
}

void rotate(
    Type type, Heads x, Turns turns, Heads y, RotaryExtents extents, bool inverse, int64_t begin, int64_t end) {
  typed(type, [&](auto of) LOOP {
    using T = decltype(of);
    const int64_t half = extents.width / 2;
    for (int64_t token = begin; token < end; ++token) {
      const int64_t sequence = token / extents.tokens, place = token % extents.tokens;
      const float* cos = turns.cos + sequence * turns.batch + place * turns.token;
      const float* sin = turns.sin + sequence * turns.batch + place * turns.token;
      for (int64_t h = 0; h < extents.heads; ++h) {
        const T* from = static_cast<const T*>(x.first) + sequence * x.batch + place * x.token + h * x.head;
        T* to = static_cast<T*>(y.first) + sequence * y.batch + place * y.token + h * y.head;
        along(half, [&](int64_t at, auto lanes) LOOP {
          const V low = lanes.get(from + at), high = lanes.get(from + half + at);
          const V sin_low = lanes.get(sin + at), sin_high = lanes.get(sin + half + at);
          const V cos_low = lanes.get(cos + at), cos_high = lanes.get(cos + half + at);
          lanes.put(to + at, low * cos_low + high * (inverse ? sin_high : sin_low));
          lanes.put(to + half + at, high * cos_high + low * (inverse ? sin_low : sin_high));
        });
        for (int64_t at = extents.width; at < extents.head; ++at) {
          to[at] = from[at];
        }
      }
    }
  });
}

// act(g), and its derivative.
template <Activation act>
INLINE V activated(V g, V* slope) {
  if constexpr (act == Activation::kSilu) {
    const V sigmoid = 1.0f / (1.0f + exp(-g));
    *slope = sigmoid * (1.0f + g * (1.0f - sigmoid));
    return g * sigmoid;
  } else {
    // g · (1 + tanh(u)) / 2 = g · sigmoid(2u), with u = sqrt(2/π) · (g + 0.044715 · g³).
    const V square = g * g;
    const V inner = g * (1.59576912160573071f + 0.0713548162726008f * square);
    const V sigmoid = 1.0f / (1.0f + exp(-inner));
    *slope = sigmoid + g * sigmoid * (1.0f - sigmoid) * (1.59576912160573071f + 0.214064448817802f * square);
    return g * sigmoid;
  }
}

template <class Body>
INLINE void acted(Activation act, const Body& body) {
  if (act == Activation::kSilu) {
    body([](V g, V* slope) LOOP { return activated<Activation::kSilu>(g, slope); });
  } else {
    body([](V g, V* slope) LOOP { return activated<Activation::kGeluTanh>(g, slope); });
  }
}

void gate(Type type, Activation act, Rows gates, Rows ups, Rows y, int64_t begin, int64_t end, int64_t width) {
  typed(type, [&](auto of) LOOP {
    using T = decltype(of);
    acted(act, [&](auto function) LOOP {
      for (int64_t r = begin; r < end; ++r) {
        const T* g = row<const T>(gates, r);
        const T* u = row<const T>(ups, r);
        T* to = row<T>(y, r);
        along(width, [&](int64_t at, auto lanes) LOOP {
          V slope;
          lanes.put(to + at, function(lanes.get(g + at), &slope) * lanes.get(u + at));
        });
      }
    });
  });
}

void gate_backward(
    Type type, Activation act, Rows gates, Rows ups, Rows dy, Rows dgate, Rows dup, int64_t begin, int64_t end,
    int64_t width) {
  typed(type, [&](auto of) LOOP {
    using T = decltype(of);
    acted(act, [&](auto function) LOOP {
      for (int64_t r = begin; r < end; ++r) {
        const T* g = row<const T>(gates, r);
        const T* u = row<const T>(ups, r);
        const T* given = row<const T>(dy, r);
        T* to_gate = row<T>(dgate, r);
        T* to_up = row<T>(dup, r);
        along(width, [&](int64_t at, auto lanes) LOOP {
          V slope;
          const V acts = function(lanes.get(g + at), &slope);
          const V d = lanes.get(given + at);
          lanes.put(to_gate + at, d * lanes.get(u + at) * slope);
          lanes.put(to_up + at, d * acts);
        });
      }
    });
  });
}

void cross_entropy(
    Type type, Rows scores, const int64_t* targets, float* losses, bool gradient, int64_t begin, int64_t end,
    int64_t width) {
  constexpr float kNone = -__builtin_inff();
  typed(type, [&](auto of) LOOP {
    using T = decltype(of);
    for (int64_t r = begin; r < end; ++r) {
      T* row_of = row<T>(scores, r);
      V most = all(kNone);
      along(width, [&](int64_t at, auto lanes) LOOP {
        const V values = lanes.get(row_of + at, kNone);
        most = values > most ? values : most;
      });
      const float top = largest(most);
      const int64_t target = targets[r];
      const float wanted = load(row_of + target, 1, 0)[0];
      V exps{};
      if constexpr (sizeof(T) == sizeof(float)) {
        // fp32 scores keep their exponentials, so that each is computed once.
        if (gradient) {
          along(width, [&](int64_t at, auto lanes) LOOP {
            const V e = exp(lanes.get(row_of + at, kNone) - top);
            exps += e;
            lanes.put(row_of + at, e);
          });
        }
      }
      const bool kept = gradient && sizeof(T) == sizeof(float);
      if (!kept) {
        along(width, [&](int64_t at, auto lanes) LOOP { exps += exp(lanes.get(row_of + at, kNone) - top); });
      }
      const float total = sum(exps);
      losses[r] = static_cast<float>(__builtin_log(static_cast<double>(total)) + static_cast<double>(top) - wanted);
      if (!gradient) {
        continue;
      }
      const float factor = 1.0f / total;
      // Of the target: softmax - 1, from its exact difference.
      V own = exp(all(wanted - top)) * factor - 1.0f;
      along(width, [&](int64_t at, auto lanes) LOOP {
        const V values = lanes.get(row_of + at);
        lanes.put(row_of + at, (kept ? values : exp(values - top)) * factor);
      });
      store(row_of + target, own, 1);
    }
  });
}

} // namespace

extern const Kernels KERNELS;
const Kernels KERNELS{rms_norm, rms_norm_backward, add_up, rotate, gate, gate_backward, cross_entropy};

} // namespace trainer
