"""The parties as processes: transport, certificates, dealer service, servers and owners' sessions."""

import os

# Before gRPC is imported: its core may write lines of its own where a port is taken or a peer goes away, beside the one
# that says it in our words. Whoever looks for a fault in it sets the variable.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
