"""What runs: the hospital's black box, the gateway, and the wire between them."""
