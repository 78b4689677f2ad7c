"""Where a model is quantized: the observed data flow, the eligible layers and the QuantPlan made from both."""
