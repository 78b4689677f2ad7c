"""Computing with what the device computes with: integer codes, exact sums, the scales that the hardware keeps."""
