"""Serves the models with KServe's Python server: python kserve_server.py PORT."""

import sys

import numpy as np
from arithmetic import SHAPE, SIDES, classify, compare_sides, names, segment, tensor
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer
from kserve.utils.utils import get_predict_response


class Declared(Model):
    """A model that says what it takes and answers; scores, and with `wordy` a word beside them."""

    def __init__(self, name: str, function, scores: dict, *, shape=SHAPE, wordy: bool = False) -> None:
        super().__init__(name)
        self.function, self.scores, self.shape, self.wordy = function, scores, shape, wordy
        self.ready = True

    def get_input_types(self) -> list[dict]:
        return [tensor("x", "FP32", *self.shape)]

    def get_output_types(self) -> list[dict]:
        return [*([tensor("word", "BYTES")] if self.wordy else []), self.scores]

    def predict(self, payload: InferRequest, headers=None, response_headers=None) -> InferResponse:
        binary = payload.use_binary_outputs
        scores = self.function(payload.inputs[0].as_numpy())
        outputs = []
        if self.wordy:
            outputs.append(InferOutput("word", [len(scores)], "BYTES"))
            outputs[0].set_data_from_numpy(np.array(names(scores), dtype=np.object_), binary_data=binary)
        outputs.append(InferOutput(self.scores["name"], list(scores.shape), "FP32"))
        outputs[-1].set_data_from_numpy(scores, binary_data=binary)
        return InferResponse(
            payload.id or "none",
            self.name,
            outputs,
            use_binary_outputs=binary,
            requested_outputs=payload.request_outputs,
        )


class Undeclared(Model):
    """A model as KServe's own runtimes are: nothing in its metadata, and an output named output-0."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.ready = True

    def predict(self, payload: InferRequest, headers=None, response_headers=None) -> InferResponse:
        return get_predict_response(payload, classify(payload.inputs[0].as_numpy()), self.name)


if __name__ == "__main__":
    ModelServer(http_port=int(sys.argv[1]), enable_grpc=False, workers=1).start(
        [
            Declared("classifier", classify, tensor("scores", "FP32", 3)),
            Declared("segmenter", segment, tensor("polyp", "FP32", *SHAPE)),
            Declared("wordy", classify, tensor("scores", "FP32", 3), wordy=True),
            Declared("sides", compare_sides, tensor("scores", "FP32", 2), shape=SIDES),
            Undeclared("undeclared"),
        ]
    )
