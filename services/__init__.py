"""What runs: the hospital's black box, the gateway, and the wire between them."""

import os

# Several processes share the cores here (trainer, hospital, gateway). OpenMP's default is to spin while waiting for the
# threads of its own team, which costs an order of magnitude as soon as those are waiting for a core themselves. Read
# when libgomp is loaded, so it must be set before the first import of torch.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
