"""How victims are spoken to: one module a wire, all of one form (`services.protocol.wires.base.Wire`).

predict   many images a request as float32 tensors, to POST /predict of a victim of this project
server    the same to a model of an Open Inference Protocol server, as its metadata say
image     one image a request as an 8-bit PNG, to POST /predict or to whatever a mapping file describes
"""
