"""The models as MLServer runs them; each in a folder with a model-settings.json that names it."""

import numpy as np
from arithmetic import classify, compare_sides, names, segment
from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Arithmetic(MLModel):
    """Scores, and a word beside them where the model is called so."""

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        images = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32)
        scores = {"segmenter": segment, "sides": compare_sides}.get(self.name, classify)(images)
        outputs = [NumpyCodec.encode_output("polyp" if self.name == "segmenter" else "scores", scores)]
        if self.name == "wordy":
            outputs.insert(0, StringCodec.encode_output("word", names(scores)))
        return InferenceResponse(model_name=self.name, outputs=outputs)
