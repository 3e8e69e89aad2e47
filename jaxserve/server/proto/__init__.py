"""The protocol buffers of the gRPC API and the Python files that tools/gen_proto.py makes of them."""
