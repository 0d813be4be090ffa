"""Arrays in, arrays out: criteria, masks, observers and affine codes."""
