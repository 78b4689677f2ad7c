// Activations: their factors, what becomes of them, and their gradients.

#pragma once

#include <vector>

#include "numbers.h"

namespace {

struct Factors {
  float upper, lower, scale, offset;
};

// repair_clips and activation_scale_offset of functional.py.
Factors factors_of(float clip_max, float clip_min, float previous_max, float previous_min, int bits) {
  Factors f;
  const bool narrow = std::fabs(clip_max - clip_min) < kEps;
  f.upper = narrow || clip_max < 0 ? previous_max : clip_max;
  f.lower = narrow || clip_min > 0 ? previous_min : clip_min;
  const float h = static_cast<float>(1 << (bits - 1)), steps = static_cast<float>((1 << bits) - 1);
  const float high = f.upper < 0 ? 0.f : f.upper, low = f.lower > 0 ? 0.f : f.lower;
  f.scale = (high - low) / steps;
  f.offset = std::nearbyint(-h - low / f.scale);
  if (f.scale < kEps) {
    f.scale = 1.f;
    f.offset = -h;
  }
  return f;
}

// What becomes of x: fake-quantized values, codes from 0 on, codes of the device less their offset, and those times the
// scale. The device multiplies by the reciprocal and rounds before the offset is added.
enum Form { kValues, kCodes, kGrid, kGridValues };

template <Form form, class T, class Out>
uint32_t convert(const T* __restrict x, Out* __restrict out, int64_t n, float scale, float offset, int bits) {
  const float h = static_cast<float>(1 << (bits - 1)), top = h - 1, reciprocal = 1.f / scale;
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const float value = load(x[i]);
    const uint32_t magnitude = bits_of(value) & 0x7FFFFFFFu;  // NaN is above infinity
    largest = magnitude > largest ? magnitude : largest;
    float code = form < kGrid ? std::nearbyintf(value / scale + offset) : std::nearbyintf(value * reciprocal) + offset;
    code = clamp(code, -h, top);
    if constexpr (form == kCodes) {
      out[i] = static_cast<Out>(static_cast<int32_t>(code + h));
    } else if constexpr (form == kGrid) {
      out[i] = code - offset;
    } else if constexpr (form == kGridValues) {
      out[i] = (code - offset) * scale;
    } else {
      store(out + i, (code - offset) * scale);
    }
  }
  return largest;
}

template <class T>
float converted(int form, const T* x, void* out, int64_t n, float scale, float offset, int bits, int threads) {
  std::vector<uint32_t> largest((n + kBlock - 1) / kBlock);
  in_blocks(n, threads, [&](int64_t block, int64_t begin, int64_t length) {
    uint32_t& result = largest[block];
    if (form == kValues)
      result = convert<kValues>(x + begin, static_cast<T*>(out) + begin, length, scale, offset, bits);
    else if (form == kCodes)
      result = convert<kCodes>(x + begin, static_cast<uint8_t*>(out) + begin, length, scale, offset, bits);
    else if (form == kGrid)
      result = convert<kGrid>(x + begin, static_cast<float*>(out) + begin, length, scale, offset, bits);
    else
      result = convert<kGridValues>(x + begin, static_cast<float*>(out) + begin, length, scale, offset, bits);
  });
  uint32_t of_all = 0;
  for (const uint32_t part : largest) of_all = part > of_all ? part : of_all;
  return from_bits(of_all);
}

// activation_gradients of functions/activation.py, with its arithmetic for NaN and infinity.
template <class T>
void gradient_block(const T* x, const T* grad, T* out, int64_t n, float scale, float largest, float smallest,
                    float bound, double* sums) {
  float error_sum = 0, above_sum = 0, below_sum = 0;
#pragma omp simd reduction(+ : error_sum, above_sum, below_sum)
  for (int64_t i = 0; i < n; ++i) {
    const float value = load(x[i]), g = load(grad[i]);
    const float above = value - largest <= 0 ? 0.f : g, below = smallest - value <= 0 ? 0.f : g;
    const float inside = g - above - below;
    const float code = clamp(value / scale, -bound, bound);
    error_sum += (std::nearbyintf(code) - code) * inside;
    above_sum += above;
    below_sum += below;
    store(out + i, inside);
  }
  sums[0] = error_sum;
  sums[1] = above_sum;
  sums[2] = below_sum;
}

template <class T>
void gradients(const T* x, const T* grad, T* out, int64_t n, const float* factors, int bits, float* of_clips,
               int threads) {
  const float upper = factors[0], lower = factors[1], scale = factors[2], offset = factors[3];
  const float h = static_cast<float>(1 << (bits - 1)), bound = static_cast<float>(int64_t{1} << (bits + 1));
  const float largest = scale * ((h - 1) - offset), smallest = scale * (-h - offset);
  std::vector<double> parts((n + kBlock - 1) / kBlock * 3);
  in_blocks(n, threads, [&](int64_t block, int64_t begin, int64_t length) {
    gradient_block(x + begin, grad + begin, out + begin, length, scale, largest, smallest, bound, &parts[3 * block]);
  });
  double sums[3] = {0, 0, 0};
  for (size_t i = 0; i < parts.size(); ++i) sums[i % 3] += parts[i];
  const float ends[2] = {clamp(upper / scale, -bound, bound), clamp(lower / scale, -bound, bound)};
  const double upper_error = std::nearbyintf(ends[0]) - ends[0], lower_error = std::nearbyintf(ends[1]) - ends[1];
  const double shared = (sums[0] + upper_error * sums[1] + lower_error * sums[2]) / ((int64_t{1} << bits) - 1);
  of_clips[0] = static_cast<float>(shared + sums[1]);
  of_clips[1] = static_cast<float>(sums[2] - shared);
}

}  // namespace
