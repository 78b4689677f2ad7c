"""The price of a quantized training step: this package beside float training and other packages."""
