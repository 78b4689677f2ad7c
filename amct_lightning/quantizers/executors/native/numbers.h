// Numbers of both dtypes, and how work is shared by threads.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kBlock = 8192;     // elements; a block stays in the first level of the cache
constexpr int64_t kParallel = 32768;  // elements from which on several threads share the work
constexpr float kEps = 1.192092896e-7f;

struct Bf16 {
  uint16_t bits;
};

inline float load(float value) { return value; }
inline float load(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void store(float* to, float value) { *to = value; }
inline void store(Bf16* to, float value) {  // to the nearest, ties to even; NaN stays NaN
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>(value != value ? 0x7FC0u : rounded);
}

inline float clamp(float value, float low, float high) {  // NaN stays NaN, as torch has it
  value = value < low ? low : value;
  return value > high ? high : value;
}

template <class Work>
void in_blocks(int64_t n, int threads, Work work) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && n >= kParallel)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * kBlock;
    work(block, begin, begin + kBlock < n ? kBlock : n - begin);
  }
}

}  // namespace
