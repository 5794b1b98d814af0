"""Back ends that turn a weight into its quantized form. One protocol, one file for each."""
