// Weights: their scales, what becomes of them, and the gradients of learned scales.

#pragma once

#include <limits>
#include <vector>

#include "numbers.h"

namespace {

struct Range {
  float high, low;
  uint32_t largest;  // the bits of the largest magnitude, which tell of NaN
};

template <class T>
Range range_of(const T* w, int64_t n) {
  float high = -std::numeric_limits<float>::infinity(), low = -high;
  uint32_t largest = 0;
#pragma omp simd reduction(max : high, largest) reduction(min : low)
  for (int64_t i = 0; i < n; ++i) {
    const float value = load(w[i]);
    const uint32_t magnitude = bits_of(value) & 0x7FFFFFFFu;
    high = value > high ? value : high;
    low = value < low ? value : low;
    largest = magnitude > largest ? magnitude : largest;
  }
  return {high, low, largest};
}

// arq_scale of functions/weight.py.
float scale_of(const Range& range, int bits) {
  if (range.largest > 0x7F800000u) return std::numeric_limits<float>::quiet_NaN();
  const float high = std::fabs(range.high), low = std::fabs(range.low), h = static_cast<float>(1 << (bits - 1));
  const float scale = (high > low ? high : low) / (h - 1 + (high < low ? 1.f : 0.f));
  return scale < kEps ? 1.f : scale;
}

template <bool codes, class T, class Out>
void quantize_row(const T* __restrict w, Out* __restrict out, int64_t n, float scale, int bits) {
  const float h = static_cast<float>(1 << (bits - 1)), top = h - 1;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float code = clamp(std::nearbyintf(load(w[i]) / scale), -h, top);
    if constexpr (codes)
      out[i] = code;
    else
      store(out + i, code * scale);
  }
}

// Rows are output channels; a weight with one scale is a single row, which is divided into blocks.
template <class Work>
void in_rows(int64_t rows, int64_t columns, int threads, Work work) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * columns >= kParallel)
  for (int64_t row = 0; row < rows; ++row) work(row);
}

template <class T>
void weight_scales(const T* w, int64_t rows, int64_t columns, int bits, float* scales, int threads) {
  if (rows > 1) {
    in_rows(rows, columns, threads, [&](int64_t row) { scales[row] = scale_of(range_of(w + row * columns, columns), bits); });
    return;
  }
  std::vector<Range> parts((columns + kBlock - 1) / kBlock);
  in_blocks(columns, threads, [&](int64_t block, int64_t begin, int64_t length) { parts[block] = range_of(w + begin, length); });
  Range range = parts[0];
  for (const Range& part : parts) {
    range.high = part.high > range.high ? part.high : range.high;
    range.low = part.low < range.low ? part.low : range.low;
    range.largest = part.largest > range.largest ? part.largest : range.largest;
  }
  scales[0] = scale_of(range, bits);
}

template <bool codes, class T, class Out>
void weight_values(const T* w, int64_t rows, int64_t columns, int bits, const float* scales, Out* out, int threads) {
  if (rows > 1) {
    in_rows(rows, columns, threads, [&](int64_t row) {
      quantize_row<codes>(w + row * columns, out + row * columns, columns, scales[row], bits);
    });
    return;
  }
  in_blocks(columns, threads, [&](int64_t, int64_t begin, int64_t length) {
    quantize_row<codes>(w + begin, out + begin, length, scales[0], bits);
  });
}

// gradient_of_scale of functions/weight.py, of one scale.
template <class T>
double scale_gradient(const T* w, const T* grad, int64_t n, float scale, int bits, float factor) {
  const float h = static_cast<float>(1 << (bits - 1)), largest = scale * (h - 1), smallest = scale * -h;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t length = begin + kBlock < n ? kBlock : n - begin;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < begin + length; ++i) {
      const float value = load(w[i]), code = value / scale;
      const float above = value > largest ? 1.f : 0.f, below = value < smallest ? 1.f : 0.f;
      const float step = (1 - above - below) * (std::nearbyintf(code) - code) - below * h + above * (h - 1);
      sum += step * factor * load(grad[i]);
    }
    total += sum;
  }
  return total;
}

// The scales of a product on the device: what its sums are multiplied by, and what the hardware keeps of that.
void product_scales(const float* scales, int64_t rows, float input_scale, float* products, float* kept) {
  for (int64_t row = 0; row < rows; ++row) {
    products[row] = scales[row] * input_scale;
    kept[row] = from_bits(bits_of(products[row]) & 0xFFFFE000u);
  }
}

template <class T>
void scale_gradients(const T* w, const T* grad, int64_t rows, int64_t columns, const float* scales, int bits,
                     float factor, float* out, int threads) {
  in_rows(rows, columns, threads, [&](int64_t row) {
    const int64_t begin = row * columns;
    out[row] = static_cast<float>(scale_gradient(w + begin, grad + begin, columns, scales[row], bits, factor));
  });
}

}  // namespace
