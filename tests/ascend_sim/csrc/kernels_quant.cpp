// npu_quant_matmul as far as it gives int32, with the limits that its documentation names for Atlas A2 and A3.
#include "kernels.h"

namespace sim {

using at::Tensor;
using Integer = std::optional<int64_t>;
using Optional = std::optional<Tensor>;

namespace {

constexpr int64_t kLongest = 65535;

bool was_given(const Optional& tensor) { return tensor && tensor->defined(); }

Tensor quant_matmul(const Tensor& x1, const Tensor& x2, const Tensor& scale, const Optional& offset,
                    const Optional& pertoken_scale, const Optional& bias, Integer output_dtype, Integer x1_dtype,
                    Integer x2_dtype, Integer pertoken_scale_dtype, Integer scale_dtype,
                    at::OptionalIntArrayRef group_sizes, const Optional& y_scale) {
  TORCH_CHECK(output_dtype == static_cast<int64_t>(at::kInt), "npu_quant_matmul is simulated with int32 output only");
  TORCH_CHECK(!was_given(offset) && !was_given(pertoken_scale) && !was_given(y_scale) && !x1_dtype && !x2_dtype &&
                  !pertoken_scale_dtype && !scale_dtype && !group_sizes,
              "npu_quant_matmul with int32 output takes a scale and a bias only");
  TORCH_CHECK(x1.scalar_type() == at::kChar && x2.scalar_type() == at::kChar, "x1 and x2 must be int8");
  TORCH_CHECK(x1.dim() == 2 && x2.dim() == 2 && x1.numel() && x2.numel(), "x1 and x2 must be matrices, not empty");
  TORCH_CHECK(x1.size(1) == x2.size(0), "the k of x1 and x2 differ");
  TORCH_CHECK(x1.size(1) <= kLongest && x2.size(1) <= kLongest, "the last axes of x1 and x2 must be 65535 at most");
  TORCH_CHECK(scale.scalar_type() == at::kFloat || scale.scalar_type() == at::kBFloat16, "scale must be float");
  TORCH_CHECK(scale.dim() == 1 && (scale.numel() == 1 || scale.numel() == x2.size(1)), "scale must be (1,) or (n,)");
  Tensor sums = x1.to(at::kLong).matmul(x2.to(at::kLong));
  if (was_given(bias)) {
    TORCH_CHECK(bias->scalar_type() == at::kInt && bias->dim() == 1 && bias->numel() == x2.size(1),
                "bias must be int32 of shape (n,)");
    sums = sums + *bias;
  }
  return sums.to(at::kInt);
}

}  // namespace

void register_quant(torch::Library& npu) { npu.impl("npu_quant_matmul", quant_matmul); }

}  // namespace sim
