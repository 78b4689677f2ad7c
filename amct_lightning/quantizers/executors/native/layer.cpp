// A quantized layer as one operator of torch, in float32: a training forward with its backward.
//
// It computes what modules/fused/ does in Python, from the same kernels, without the time that Python takes for it,
// which is longer than the arithmetic of a small layer. Backward has the input and the weight as they were, and rebuilds
// their quantized values, so that nothing is kept that a float layer does not keep.

#define TORCH_ASSERT_ONLY_METHOD_OPERATORS
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_unsafe_view.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "product.h"

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kChanged[] =
    "The weight or the learned scale of a quantized layer was changed in place between its forward and its backward, "
    "which needs it as it was. Call backward before the optimizer steps.";

struct Books {
  Tensor clip_max, clip_min, previous_max, previous_min, poison, scale;
};

// Which gradients are wanted; torch counts the tensors that there are.
struct Needs {
  bool x, weight, bias, clip_max, clip_min, learned;

  Needs(AutogradContext* context, bool has_bias, bool learns) {
    const size_t clips = has_bias ? 3 : 2;
    x = context->needs_input_grad(0);
    weight = context->needs_input_grad(1);
    bias = has_bias && context->needs_input_grad(2);
    clip_max = context->needs_input_grad(clips);
    clip_min = context->needs_input_grad(clips + 1);
    learned = learns && context->needs_input_grad(clips + 2);
  }
};

struct Refuse : torch::autograd::Function<Refuse> {
  static Tensor forward(AutogradContext* context, const Tensor& output, const Tensor&, const Tensor&, std::string why) {
    context->saved_data["why"] = std::move(why);
    return output.view_as(output);
  }
  static variable_list backward(AutogradContext* context, variable_list) {
    TORCH_CHECK(false, context->saved_data["why"].toStringRef());
  }
};

// What a forward has made: the output, upper and lower clip, scale and offset of the input, and scales of the weight.
struct Made {
  Tensor output, factors, scales;
};

Made compute(const Product& product, const Tensor& x, const Tensor& weight, const Optional& bias, const Books& books,
             const Optional& given, const Settings& s) {
  const int threads = at::get_num_threads();
  Tensor factors = numbers({4}), values = passing(x, 0), scales = numbers({s.rows});
  float* const clips[] = {floats(books.clip_max), floats(books.clip_min), floats(books.previous_max),
                          floats(books.previous_min)};
  if (train_and_keep(s.on_grid ? kGrid : kValues, floats(x), values.data_ptr(), x.numel(), clips, s.fixed_min,
                     floats(books.poison), floats(factors), s.bits, threads))
    for (const Tensor* clip : {&books.clip_max, &books.clip_min, &books.previous_max, &books.previous_min})
      clip->unsafeGetTensorImpl()->bump_version();
  if (given) {
    for (int64_t row = 0; row < s.rows; ++row) {
      const float scale = floats(*given)[row];  // on the device one that is too small is 1
      floats(scales)[row] = s.on_grid && scale < kEps ? 1.f : scale;
    }
  } else {
    weight_scales(floats(weight), s.rows, weight.numel() / s.rows, s.weight_bits, floats(scales), threads);
    std::memcpy(floats(books.scale), floats(scales), s.rows * sizeof(float));
  }
  Tensor output = s.on_grid ? grid_output(product, values, weight, bias, scales, floats(factors)[2], s)
                            : product.forward(values, quantized_weight(weight, scales, s), bias);
  return {output, factors, scales};
}

struct QuantizedProduct : torch::autograd::Function<QuantizedProduct> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight, const Optional& bias,
                        const Tensor& clip_max, const Tensor& clip_min, const Optional& learned, const Made& made,
                        double factor, at::IntArrayRef settings, at::IntArrayRef geometry,
                        const std::string& refusal) {
    keep_for_backward(context, {x, weight, bias, clip_max, clip_min, learned}, geometry.empty());
    auto& saved = context->saved_data;
    saved["factors"] = made.factors;
    saved["scales"] = made.scales;
    saved["settings"] = settings.vec();
    saved["geometry"] = geometry.vec();
    saved["factor"] = factor;
    saved["has_bias"] = bias.has_value();
    saved["learns"] = learned.has_value();
    saved["clip"] = clip_max;
    saved["refusal"] = refusal;
    return made.output;
  }

  // Factors are no saved tensors: they are single numbers that nobody else has, and no float layer keeps them. Nor are
  // parameters that the float layer would not keep; their version tells whether they are as they were.
  static void keep_for_backward(AutogradContext* context, const std::array<Optional, 6>& tensors, bool linear) {
    const auto wants = [&](size_t i) { return tensors[i] && tensors[i]->requires_grad(); };
    if (!(wants(0) || wants(1) || wants(3) || wants(4) || wants(5))) return;
    const Tensor &x = *tensors[0], &weight = *tensors[1];
    if (wants(0) || !linear) {
      context->save_for_backward({x, weight});
    } else {
      context->save_for_backward({x});
      context->saved_data["weight"] = weight;
      context->saved_data["weight_version"] = static_cast<int64_t>(weight._version());
    }
    if (wants(5)) {
      context->saved_data["learned"] = *tensors[5];
      context->saved_data["learned_version"] = static_cast<int64_t>(tensors[5]->_version());
    }
  }

  static Tensor unchanged(AutogradContext* context, const std::string& name) {
    const Tensor tensor = context->saved_data[name].toTensor();
    TORCH_CHECK(context->saved_data[name + "_version"].toInt() == static_cast<int64_t>(tensor._version()), kChanged);
    return tensor;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const bool again = at::GradMode::is_enabled();
    // Read once, as activation checkpointing demands, which runs forwards now.
    const variable_list saved = grads[0].defined() ? context->get_saved_variables() : variable_list();
    variable_list found;
    {
      at::AutoDispatchBelowADInplaceOrView below;
      const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
      found = gradients_of(context, grads[0], saved);
    }
    const Tensor clip = context->saved_data["clip"].toTensor();
    if (again && grads[0].defined() && (grads[0].requires_grad() || clip.requires_grad()))
      for (Tensor& gradient : found)
        if (gradient.defined())
          gradient = Refuse::apply(gradient, grads[0], clip, context->saved_data["refusal"].toStringRef());
    return found;
  }

  static variable_list gradients_of(AutogradContext* context, const Tensor& grad, const variable_list& saved) {
    variable_list found(11);
    if (!grad.defined()) return found;
    auto& data = context->saved_data;
    const std::vector<int64_t> settings = data["settings"].toIntVector();
    const Settings s(settings);
    const Product product(data["geometry"].toIntVector());
    const Tensor factors = data["factors"].toTensor(), scales = data["scales"].toTensor();
    const Needs wants(context, data["has_bias"].toBool(), data["learns"].toBool());
    const std::array<bool, 3> needs = {wants.x || wants.clip_max || wants.clip_min, wants.weight || wants.learned,
                                       wants.bias};
    Tensor x = grad, weight = grad;
    if (!saved.empty()) {
      x = saved[0];
      weight = saved.size() > 1 ? saved[1] : unchanged(context, "weight");
    }
    if (wants.learned) unchanged(context, "learned");
    if (!is_dense(x)) x = x.contiguous();
    const int threads = at::get_num_threads();
    Tensor values = x, weights = weight;
    if (needs[1]) {
      values = passing(x, 0);
      converted(s.on_grid ? kGridValues : kValues, floats(x), values.data_ptr(), x.numel(), floats(factors)[2],
                floats(factors)[3], s.bits, threads);
    }
    if (needs[0]) weights = quantized_weight(weight, scales, s);
    auto [of_x, of_weight, of_bias] = product.backward(grad, values, weights, needs);
    if (needs[0]) {
      of_x = as_lies(of_x, x);
      const Tensor of_clips = numbers({2});
      gradients(floats(x), floats(of_x), floats(of_x), x.numel(), floats(factors), s.bits, floats(of_clips), threads);
      if (wants.x) found[0] = of_x;
      if (wants.clip_max) found[3] = of_clips.select(0, 0);
      if (wants.clip_min) found[4] = of_clips.select(0, 1);
    }
    if (wants.learned)
      found[5] = scale_gradients_of(weight, as_lies(of_weight, weight), data["learned"].toTensor(), s,
                                    data["factor"].toDouble());
    if (wants.weight) found[1] = of_weight;
    if (wants.bias) found[2] = of_bias;
    return found;
  }

  static Tensor scale_gradients_of(const Tensor& weight, const Tensor& grad, const Tensor& scales, const Settings& s,
                                   double factor) {
    Tensor found = numbers({s.rows});
    scale_gradients(floats(weight), floats(grad), s.rows, weight.numel() / s.rows, floats(scales), s.weight_bits,
                    static_cast<float>(factor), floats(found), at::get_num_threads());
    return found;
  }
};

Tensor quantized_product(const Tensor& x, const Tensor& weight, const Optional& bias, const Tensor& clip_max,
                         const Tensor& clip_min, const Tensor& previous_max, const Tensor& previous_min,
                         const Tensor& poison, const Optional& learned, const Optional& given, const Tensor& scale,
                         double factor, at::IntArrayRef settings, at::IntArrayRef geometry, const std::string& refusal) {
  Made made;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const Books books = {clip_max, clip_min, previous_max, previous_min, poison, scale};
    made = compute(Product(geometry), x, weight, bias, books, given, Settings(settings));
  }
  return QuantizedProduct::apply(x, weight, bias, clip_max, clip_min, learned, made, factor, settings, geometry,
                                 refusal);
}

// The output that was computed elsewhere, with the same backward.
Tensor with_backward(const Tensor& output, const Tensor& factors, const Tensor& scales, const Tensor& x,
                     const Tensor& weight, const Optional& bias, const Tensor& clip_max, const Tensor& clip_min,
                     const Optional& learned, double factor, at::IntArrayRef settings, at::IntArrayRef geometry,
                     const std::string& refusal) {
  Made made = {output, factors, scales};
  if (output.is_view()) {  // what follows may change it in place, which autograd refuses for a view made without a graph
    at::AutoDispatchBelowADInplaceOrView below;
    made.output = at::_unsafe_view(output, output.sizes());
  }
  return QuantizedProduct::apply(x, weight, bias, clip_max, clip_min, learned, made, factor, settings, geometry,
                                 refusal);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(amct_lightning, library) {
  library.def(
      "quantized_product(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) clip_max, Tensor(b!) clip_min, "
      "Tensor(c!) previous_max, Tensor(d!) previous_min, Tensor(e!) poison, Tensor? learned, Tensor? given, "
      "Tensor(f!) scale, float factor, int[] settings, int[] geometry, str refusal) -> Tensor",
      &quantized_product);
  library.def(
      "with_backward(Tensor output, Tensor factors, Tensor scales, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor clip_max, Tensor clip_min, Tensor? learned, float factor, int[] settings, int[] geometry, str refusal) "
      "-> Tensor",
      &with_backward);
}
